//! What commands share: folders, terminal, where a volume's storage is, and signals.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use owo_colors::OwoColorize;

use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use super::progress::Progress;
use super::{Global, StorageArgs};
use crate::catalog::StorageUrl;
use crate::error::{Error, Result};
use crate::host::linux::{Dirs, LinuxHost, Parts, Storage};
use crate::host::programs::is_program;
use crate::password::{self, Origin, Secret};
use crate::report::{Format, Report};
use crate::run::{Engine, Observer};
use crate::settings::{self, Settings, Sources};
use crate::values::VolumeId;

/// Surroundings of a command.
pub struct Context {
    global: Global,
    /// Where relative paths start.
    pub cwd: PathBuf,
    /// Shows the steps of a run.
    pub progress: Progress,
    /// Nothing of it stays: nobody needs to keep its password.
    trial: bool,
}

/// The password of the embedded store, in the state folder.
const STORE_PASSWORD: &str = "store.password";

/// Set by SIGINT and SIGTERM, asked between steps.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether a signal asked us to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

extern "C" fn on_signal(signal: i32) {
    const FIRST: &[u8] =
        b"\ninterrupted: this ends as soon as the current step does; press Ctrl-C again to kill it \
(then run: zerofsctl recover)\n";
    if INTERRUPTED.swap(true, Ordering::Relaxed) {
        // SAFETY: both calls may be made in a signal handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    } else if signal == libc::SIGINT {
        // SAFETY: write(2) may be called in a signal handler; the buffer is static.
        let _ = unsafe { libc::write(2, FIRST.as_ptr().cast(), FIRST.len()) };
    }
}

/// A first Ctrl-C ends the command between two steps, which it then undoes; a second one kills it.
fn catch_signals() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only uses an atomic and async-signal-safe calls.
        let _ = unsafe { sigaction(signal, &action) };
    }
}

/// The story goes to standard error.
pub(super) fn init_log(verbose: u8, json: bool) {
    use tracing_subscriber::filter::LevelFilter;
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    // The Kubernetes client logs whole answers that it does not understand. What goes wrong with it is in our errors.
    let filter = tracing_subscriber::EnvFilter::new(format!("{level},kube_client=off"));
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // It would panic where standard error is full or closed, in the midst of a step.
        .log_internal_errors(false)
        .with_env_filter(filter);
    let _ = if json {
        builder.with_target(false).json().flatten_event(true).try_init()
    } else {
        builder.event_format(Plain).try_init()
    };
}

/// A line of the library's log, in the form of our own: `warning: volume vol1: what happened`.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        use tracing::Level;
        let mut line = Line::default();
        event.record(&mut line);
        let word = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "note",
            _ => "debug",
        };
        write!(writer, "{word}: ")?;
        if let Some(volume) = &line.volume {
            write!(writer, "volume {volume}: ")?;
        }
        writeln!(writer, "{}{}", line.message, line.rest)
    }
}

/// The parts of a log line.
#[derive(Default)]
struct Line {
    volume: Option<String>,
    message: String,
    rest: String,
}

impl tracing::field::Visit for Line {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "volume" => self.volume = Some(format!("{value:?}")),
            // For machines; people have the message.
            "event" => {}
            name => self.rest.push_str(&format!(" {name}={value:?}")),
        }
    }
}

impl Context {
    pub(super) fn new(global: Global) -> Context {
        let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let json = global.log_format == super::LogFormat::Json;
        let progress = Progress::new(global.verbose, json);
        Context { global, cwd, progress, trial: false }
    }

    /// In which form the answer is wanted.
    pub fn format(&self) -> Format {
        self.global.output
    }

    /// From here on a first Ctrl-C ends the work at the next safe place; a second one kills.
    pub fn catch_signals(&self) {
        catch_signals();
    }

    /// Whether standard error is to be JSON lines.
    pub fn json_log(&self) -> bool {
        self.global.log_format == super::LogFormat::Json
    }

    /// What takes a plan through, with its progress shown. From here on a first Ctrl-C waits for the step at hand.
    pub fn engine<'a>(&'a self, host: &'a LinuxHost) -> Engine<'a> {
        catch_signals();
        Engine { host, observer: &self.progress }
    }

    /// The two roots, absolute.
    pub fn dirs(&self) -> Result<Dirs> {
        let absolute = |path: &Path, flag: &str| {
            let full = self.cwd.join(path);
            match full.to_str() {
                Some(text)
                    if !path.as_os_str().is_empty()
                        && !text.contains("..")
                        && !text.contains(char::is_control) =>
                {
                    Ok(full.components().collect::<PathBuf>())
                }
                _ => Err(Error::usage(format!("{flag} is not a plain path")).hint("give an absolute folder")),
            }
        };
        Ok(Dirs {
            state: absolute(&self.global.state_dir, "--state-dir")?,
            run: absolute(&self.global.run_dir, "--run-dir")?,
        })
    }

    /// A copy with other roots, for a trial: the demo works in its own.
    pub fn for_trial(&self, dirs: &Dirs) -> Context {
        let mut global = self.global.clone();
        global.state_dir.clone_from(&dirs.state);
        global.run_dir.clone_from(&dirs.run);
        Context { global, cwd: self.cwd.clone(), progress: self.progress.clone(), trial: true }
    }

    /// Whoever changes something must be root: devices, mounts and other users' files are at stake.
    pub fn require_root(&self) -> Result<()> {
        if nix::unistd::geteuid().is_root() {
            return Ok(());
        }
        Err(Error::environment("this needs root: it makes devices and mounts").hint("run it with sudo"))
    }

    /// The zerofs program: the flag or ZEROFS_BIN, PATH, the tools folder.
    pub fn zerofs_program(&self) -> Result<PathBuf> {
        if let Some(program) = &self.global.zerofs_bin {
            let program = self.cwd.join(program);
            return if is_program(&program) {
                Ok(program)
            } else {
                Err(Error::environment(format!("{} is not a program", program.display()))
                    .hint("give the zerofs program with --zerofs-bin or ZEROFS_BIN"))
            };
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut candidates: Vec<PathBuf> = std::env::split_paths(&path).map(|d| d.join("zerofs")).collect();
        candidates.extend(tools_folder().into_iter().flat_map(|tools| installed(&tools)));
        candidates.into_iter().find(|p| is_program(p)).ok_or_else(|| {
            Error::environment("the program zerofs is not installed").hint(
                "install it: cargo install zerofs --version 0.19.1 --locked; or say where it is: --zerofs-bin FILE",
            )
        })
    }

    /// The settings that flags, files and the environment give.
    pub fn settings(&self, args: &StorageArgs) -> Result<Settings> {
        let storage_url: Option<StorageUrl> = args.storage_url.as_deref().map(str::parse).transpose()?;
        let env = |name: &str| std::env::var_os(name);
        let sources =
            Sources { config: args.config.as_deref(), secrets: &args.secret, storage_url, env: &env };
        let (settings, warnings) = settings::load(&sources)?;
        for warning in warnings {
            self.progress.warn(&warning);
        }
        Ok(settings)
    }

    /// The host for one volume. Where neither flag nor file says where its data is, it is where it was attached
    /// from, or else the embedded store.
    pub fn host(&self, volume: &VolumeId, args: &StorageArgs, purpose: Purpose) -> Result<LinuxHost> {
        let dirs = self.dirs()?;
        let settings = self.settings(args)?;
        let saved = LinuxHost::saved_storage(&dirs, volume)?;
        let known = saved.is_some();
        let embedded = dirs.embedded_store()?;
        let storage = match (&settings.storage_url, saved) {
            (Some(url), Some(saved)) if *url != saved.url => {
                return Err(Error::new(
                    crate::error::Kind::Conflict,
                    format!("it is attached from {}, not {url}", saved.url),
                )
                .on(volume)
                .hint(format!("detach it first: zerofsctl detach {volume}")));
            }
            (None, Some(saved)) => saved,
            (Some(url), _) => Storage { url: url.clone(), s3: settings.s3.clone() },
            (None, None) => Storage { url: embedded.clone(), s3: settings.s3.clone() },
        };
        let password = match (&settings.encryption_password, purpose) {
            (Some(password), _) => Some(password.clone()),
            (None, Purpose::Start) if storage.url == embedded => Some(self.embedded_password(&dirs)?),
            // Without a password there is no volume either, which the claim will tell.
            (None, Purpose::Reopen) if storage.url == embedded => {
                dirs.state.join(STORE_PASSWORD).exists().then(|| self.embedded_password(&dirs)).transpose()?
            }
            // What is attached has its password in its config; whatever else is started must be given one, before
            // the catalog hears of it.
            (None, Purpose::Start | Purpose::Reopen) if !known => return Err(no_password()),
            _ => None,
        };
        let zerofs = match purpose {
            Purpose::Start | Purpose::Reopen => self.zerofs_program()?,
            // Needed only if a killed keeper's log must be replayed; then its absence is an error.
            Purpose::Settle => self.zerofs_program().unwrap_or_else(|_| "zerofs".into()),
        };
        LinuxHost::new(Parts {
            dirs,
            storage,
            settings,
            password,
            zerofs,
            program: crate::keeper::OWN_EXE.into(),
            node: self.global.node.clone().unwrap_or_else(node_name),
            only_looks: purpose == Purpose::Settle,
            progress: self.progress.long(),
        })
    }

    fn embedded_password(&self, dirs: &Dirs) -> Result<Secret> {
        crate::journal::private_folder(&dirs.state)?;
        let path = dirs.state.join(STORE_PASSWORD);
        let (password, origin) = password::store_password(&path)?;
        if origin == Origin::Made && !self.trial {
            self.progress.note(&format!(
                "made a random encryption password for the embedded store: {} (keep a copy: without it the data cannot be read)",
                path.display()
            ));
        }
        Ok(password)
    }

    /// Prints a report to standard output.
    pub fn print(&self, report: &Report, format: Format) -> Result<()> {
        self.progress.finish();
        let width = if std::io::stdout().is_terminal() { terminal_width() } else { None };
        report.print(format, width, &mut std::io::stdout().lock())
    }

    /// Prints an error to standard error: what failed, then what to do.
    pub fn print_error(&self, error: &Error) {
        self.progress.finish();
        write_error(error, self.global.log_format == super::LogFormat::Json);
    }
}

pub(super) fn write_error(error: &Error, json: bool) {
    let mut err = std::io::stderr().lock();
    if json {
        let line = serde_json::json!({
            "timestamp": jiff::Timestamp::now(), "level": "ERROR", "kind": error.kind(), "message": error.message(),
            "hint": error.hint_text(), "volume": error.volume(), "step": error.step(),
        });
        let _ = writeln!(err, "{line}");
        return;
    }
    let (word, hint) = if colored() {
        ("error:".red().bold().to_string(), "hint:".cyan().to_string())
    } else {
        ("error:".to_owned(), "hint:".to_owned())
    };
    let _ = writeln!(err, "{word} {error}");
    if let Some(text) = error.hint_text() {
        let _ = writeln!(err, "{hint} {text}");
    }
}

/// Whether standard error takes colours: a terminal does, unless NO_COLOR says otherwise.
fn colored() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn no_password() -> Error {
    Error::usage("no encryption password was given").hint(
        "set ZEROFS_ENCRYPTION_PASSWORD_FILE to a file that holds it, or name its Secret with --config and --secret",
    )
}

/// What a host is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A volume, maybe a new one, may be started: password and zerofs are needed.
    Start,
    /// The same, for a volume that must be there already.
    Reopen,
    /// What is there is taken down or looked at.
    Settle,
}

fn tools_folder() -> Option<PathBuf> {
    std::env::var_os("ZEROFSCTL_TOOLS")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/zerofsctl/tools")))
}

/// The zerofs programs in the tools folder, the newest name first.
fn installed(tools: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(tools)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("zerofs-"))
        .map(|e| e.path().join("bin/zerofs"))
        .collect();
    found.sort();
    found.reverse();
    found
}

/// NODE_ID, as existing installations set it, or the host name.
pub(super) fn node_name() -> String {
    std::env::var("NODE_ID").ok().filter(|n| !n.is_empty()).unwrap_or_else(|| {
        nix::unistd::gethostname()
            .ok()
            .and_then(|n| n.into_string().ok())
            .unwrap_or_else(|| "localhost".into())
    })
}

fn terminal_width() -> Option<u16> {
    // SAFETY: the ioctl fills a plain struct that lives here.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(1, libc::TIOCGWINSZ, &raw mut size) == 0).then_some(size)
    };
    size.map(|s| s.ws_col).filter(|w| *w >= 40)
}
