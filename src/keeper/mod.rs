//! The keeper: one small process per attached volume, between the block layer and ZeroFS.
//!
//! `zerofsctl keeper --volume-run-dir DIR` runs [`main`]: it reads `keeper.json` in that folder, starts (or
//! adopts) the volume's ZeroFS, watches and restarts it, carries the data path, and answers on `keeper.sock`.
//! [`spawn`] starts it detached, and [`client::KeeperClient`] talks to it.
//!
//! It promises: one keeper per run folder; a second ZeroFS is never started beside a living one; and when it
//! ends by itself, nothing of it is left but its logs and, after a forced stop, the replay log.

mod causes;
mod chunks;
pub mod client;
pub mod control;
pub mod device;
pub mod fuse;
pub mod guard;
pub mod log;
mod nbd;
pub mod path;
mod pipe;
pub mod process;
mod ready;
mod service;
mod supervisor;
pub(crate) mod taken;
mod watchdog;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, mpsc};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use self::client::KeeperClient;
use self::control::{Handler, WireError};
use self::device::Device;
use self::path::{DataPath, DataPathConfig};
use self::process::{Identity, Launch, boot_id, passed_on, set_own_oom_score, write_json};
use self::service::{Desk, Shared};
use self::supervisor::{Event, Supervisor};
use self::watchdog::Watch;
use crate::atomic_file::open_lock;
use crate::error::{Doing, Error, Kind, Result};
use crate::host::cgroup::{Cgroup, Limits};
use crate::host::mounts;
use crate::values::VolumeId;
use crate::zerofs::versions::{Profile, Version};

/// The keeper's config in the run folder.
pub const CONFIG: &str = "keeper.json";

/// The keeper's identity in the run folder.
pub const PID_FILE: &str = "keeper.pid";

/// The file in the run folder that names the process of ZeroFS.
pub const ZEROFS_PID_FILE: &str = supervisor::RECORD;

/// Held by the keeper of a run folder while it lives.
const LOCK: &str = "keeper.lock";

/// The keeper's own log in the log folder; ZeroFS's is beside it.
pub const KEEPER_LOG: &str = "keeper.log";

/// ZeroFS's log in the log folder.
pub const ZEROFS_LOG: &str = "zerofs.log";

/// The keeper's own log is rotated at that size, in bytes.
const KEEPER_LOG_LIMIT: u64 = 4 << 20;

/// The program of this process, whatever happened to its file since.
pub const OWN_EXE: &str = "/proc/self/exe";

/// What a keeper is called in lists of processes, where the name of [`OWN_EXE`] would be `exe`.
const NAME: &str = "zerofsctl";

/// Everything that a keeper must know; it holds no secret. Stored as `keeper.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeeperConfig {
    /// The version of this format.
    pub format: u32,
    /// The volume.
    pub volume: VolumeId,
    /// The volume's run folder: sockets, pid files, the replay log.
    pub run_dir: PathBuf,
    /// Where `zerofs.log` and `keeper.log` go.
    pub log_dir: PathBuf,
    /// The ZeroFS program.
    pub zerofs_bin: PathBuf,
    /// Its version.
    pub zerofs_version: Version,
    /// The config.toml of ZeroFS; its sockets are relative to the run folder.
    pub config_path: PathBuf,
    /// ZeroFS's log level or filter; info when none.
    #[serde(default)]
    pub rust_log: Option<String>,
    /// The NBD export.
    pub export: String,
    /// Connections to it.
    pub connections: usize,
    /// The size of the replay log in bytes.
    pub log_bytes: u64,
    /// After that many milliseconds without an answer I/O fails; none waits for ever.
    #[serde(default)]
    pub io_timeout_ms: Option<u64>,
    /// The attach epoch of the catalog.
    pub epoch: u64,
    /// What ZeroFS may use.
    #[serde(default)]
    pub limits: Limits,
    /// Whether a limit that cannot be set is an error instead of a warning.
    #[serde(default)]
    pub limits_required: bool,
    /// The boot that this was written in.
    pub boot_id: String,
    /// How long ZeroFS may take for its first answer, in seconds.
    pub start_limit_seconds: u64,
    /// How long a stop that nobody waits for is expected to take, in seconds.
    pub stop_grace_seconds: u64,
    /// False only in tests, which then must see data lost.
    #[serde(default = "yes")]
    pub replay_log: bool,
}

fn yes() -> bool {
    true
}

impl KeeperConfig {
    /// The newest format.
    pub const FORMAT: u32 = 1;

    /// Reads `keeper.json` in `run_dir`.
    pub fn read(run_dir: &Path) -> Result<KeeperConfig> {
        let path = run_dir.join(CONFIG);
        let text = std::fs::read(&path).doing("read", &path)?;
        let config: KeeperConfig = serde_json::from_slice(&text)
            .map_err(|e| Error::failed(format!("cannot understand {}: {e}", path.display())))?;
        if config.format != Self::FORMAT {
            return Err(Error::failed(format!(
                "{} has format {}, and this zerofsctl knows format {}",
                path.display(),
                config.format,
                Self::FORMAT
            )));
        }
        Ok(config)
    }
}

/// What the program around the keeper adds to it.
#[derive(Default)]
pub struct Hooks {
    /// Asked before ZeroFS is started again: is the volume still ours? A [`Kind::Conflict`] says that it has a new
    /// owner, and ZeroFS is not started; any other error puts the start off, since in doubt it is not ours. It
    /// runs on a thread of its own, and I/O waits for it, so it should answer or give up within seconds.
    pub before_restart: Option<OwnerCheck>,
}

/// See [`Hooks::before_restart`].
pub type OwnerCheck = Arc<dyn Fn(&KeeperConfig) -> Result<()> + Send + Sync>;

/// The name of that thread.
pub(crate) const OWNER_THREAD: &str = "owner";

/// A keeper that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spawned {
    /// Its process.
    pub keeper: Identity,
    /// Whether it ran before.
    pub already: bool,
}

/// What a keeper says on its standard output, once, as a line of JSON.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FirstWord {
    Serving(Identity),
    Error(WireError),
}

/// Starts the keeper of a volume, detached, and waits up to `limit` until it answers on its socket (ZeroFS may
/// still be starting then: [`KeeperClient::wait_ready`]). One that runs already is left as it is.
///
/// `program` is the zerofsctl binary: [`OWN_EXE`] except in tests.
pub fn spawn(program: &Path, config: &KeeperConfig, limit: Duration) -> Result<Spawned> {
    let deadline = Instant::now() + limit;
    while let Some(keeper) = Identity::read(&config.run_dir.join(PID_FILE)).filter(Identity::is_alive) {
        match KeeperClient::connect(&config.run_dir).and_then(|mut c| c.ping()) {
            Ok(keeper) => return Ok(Spawned { keeper, already: true }),
            // It is just starting or ending.
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(e.context(format!("the keeper ({keeper}) runs, but"))),
        }
    }
    for dir in [&config.run_dir, &config.log_dir] {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).doing("make", dir)?;
    }
    write_json(&config.run_dir.join(CONFIG), config)?;
    let log_path = config.log_dir.join(KEEPER_LOG);
    let log = open_keeper_log(&log_path).doing("open", &log_path)?;
    let (answer, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).doing("make", "a pipe")?;
    let keeper = Launch {
        program,
        name: Some(NAME),
        args: vec!["keeper".into(), "--volume-run-dir".into(), config.run_dir.clone().into()],
        env: passed_on(),
        cwd: &config.run_dir,
        output: &log,
        answer: Some(theirs),
        cgroup: None,
    }
    .start()?;
    let identity = keeper.identity().clone();
    let word = first_word(answer, deadline);
    // A parent that lives on must not collect zombies, whenever its keeper ends.
    let reaper = thread("keeper-end", move || while keeper.wait(Duration::from_secs(3600)).is_none() {});
    drop(reaper);
    match word? {
        Some(FirstWord::Serving(keeper)) => Ok(Spawned { keeper, already: false }),
        Some(FirstWord::Error(e)) => Err(e.into()),
        None => {
            let text = std::fs::read_to_string(&log_path).unwrap_or_default();
            let said = text.lines().last().map(|l| format!(": {}", causes::shorten(l))).unwrap_or_default();
            Err(Error::failed(format!("the keeper ({identity}) ended at once{said}"))
                .hint(format!("read its log: {}", log_path.display())))
        }
    }
}

/// Reads the keeper's first line; none when it ended without one.
fn first_word(answer: OwnedFd, deadline: Instant) -> Result<Option<FirstWord>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(answer.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if Instant::now() >= deadline => {
                return Err(Error::new(Kind::Unreachable, "the keeper was started, but does not answer")
                    .hint("look for what it waits for: zerofsctl show VOLUME"));
            }
            Ok(0) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e).doing("wait for", "the keeper"),
            Ok(_) => break,
        }
    }
    let mut line = String::new();
    // The line is short and written in one piece.
    BufReader::new(File::from(answer)).read_line(&mut line).doing("read from", "the keeper")?;
    Ok(serde_json::from_str(&line).ok())
}

/// The ZeroFS processes that belong to a run folder, found by their marker: with no keeper alive, orphans.
pub fn find_zerofs(run_dir: &Path) -> Vec<Identity> {
    process::find_marked(process::MARKER, run_dir.as_os_str())
}

/// The keeper process: works until the volume is stopped.
pub fn main(run_dir: &Path, hooks: Hooks) -> ExitCode {
    match Keeper::start(run_dir, hooks) {
        Ok(keeper) => keeper.run(),
        Err(e) => {
            say(&FirstWord::Error((&e).into()));
            error!("{e}");
            ExitCode::from(e.kind().row().exit)
        }
    }
}

/// Tells whoever started us; nobody may be listening any more.
fn say(word: &FirstWord) {
    if let Ok(mut line) = serde_json::to_string(word) {
        line.push('\n');
        let mut out = io::stdout();
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }
}

struct Keeper {
    config: KeeperConfig,
    supervisor: Supervisor,
    shared: Arc<Shared>,
    /// Held until the process ends.
    _lock: File,
}

impl Keeper {
    fn start(run_dir: &Path, hooks: Hooks) -> Result<Keeper> {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        // The kernel took the name of the file that was executed.
        let _ = nix::sys::prctl::set_name(c"zerofsctl");
        let lock = take_lock(run_dir)?;
        Identity::own().write(&run_dir.join(PID_FILE))?;
        let config = KeeperConfig::read(run_dir)?;
        std::env::set_current_dir(&config.run_dir).doing("enter", &config.run_dir)?;
        if config.boot_id != boot_id() {
            return Err(Error::refused(format!(
                "{} was written before this machine was started",
                run_dir.join(CONFIG).display()
            ))
            .hint("settle what is left of the volume: zerofsctl recover"));
        }
        adjust_resource_limits();
        // Before any thread is made, so that all of them have it.
        let notes = become_part_of_the_io_path();
        let signals = signals_to_wait_for();
        signals.thread_block().doing("block the signals of", "the keeper")?;
        log_to(&config.log_dir.join(KEEPER_LOG))?;
        end_on_panic();
        info!("keeper of volume {}, zerofsctl {}", config.volume, env!("CARGO_PKG_VERSION"));

        let profile = Profile::of(config.zerofs_version)?;
        let (cgroup, limit_problems) = limit(&config)?;
        let (events, incoming) = mpsc::channel();
        let told = events.clone();
        let watch = Arc::new(Watch::new(
            &config.run_dir,
            &config.log_dir.join(ZEROFS_LOG),
            profile.clone(),
            config.volume.as_str(),
            // The receiver is gone only when the process is about to end.
            Box::new(move |alarm| drop(told.send(Event::Alarm(alarm)))),
        )?);
        let (data_events, data_incoming) = mpsc::channel();
        let data = DataPath::new(data_path_config(&config, &profile), watch.clone(), data_events)?;
        let left = device::Record::read(&config.run_dir)?;
        let resumes = left.is_some();
        let device = Device::of(left);
        let shared = Arc::new(Shared::new(config.clone(), data.clone(), events.clone(), device));
        for warning in notes.into_iter().chain(limit_problems).chain(profile.warning.clone()) {
            shared.warn(warning);
        }
        let mut supervisor = Supervisor::new(shared.clone(), watch.clone(), hooks, profile, incoming, cgroup);
        // Attach waits for ZeroFS, so it is started before everything that can be done meanwhile.
        let adopted = supervisor.start_or_adopt(resumes);

        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            thread(name, work).doing("start a thread of", "the keeper").map(drop)
        };
        let listener = control::bind(&config.run_dir)?;
        let handler: Arc<dyn Handler> = Arc::new(Desk(shared.clone()));
        start("control", Box::new(move || control::serve(&listener, &handler)))?;
        let follower = watch.clone();
        start(
            "watch-log",
            Box::new(move || {
                if let Err(e) = follower.follow() {
                    error!("the log of ZeroFS is not watched: {e}");
                }
            }),
        )?;
        start("probe", Box::new(move || watch.probe(busy(data))))?;
        if resumes {
            let heir = shared.clone();
            start("take-over", Box::new(move || heir.take_over_device(adopted)))?;
        }
        let told = events.clone();
        start(
            "data-events",
            Box::new(move || data_incoming.into_iter().for_each(|e| drop(told.send(Event::Data(e))))),
        )?;
        start(
            "signals",
            Box::new(move || {
                while let Ok(signal) = signals.wait() {
                    info!("received {signal}");
                    if signal == Signal::SIGTERM {
                        let _ = events.send(Event::Terminate);
                    }
                }
            }),
        )?;
        Ok(Keeper { config, supervisor, shared, _lock: lock })
    }

    fn run(mut self) -> ExitCode {
        say(&FirstWord::Serving(Identity::own()));
        // Whoever started us may wait for the end of its pipe.
        if let Err(e) = nix::unistd::dup2_stdout(io::stderr()) {
            warn!("cannot redirect standard output: {e}");
        }
        let clean = self.supervisor.run();
        let _ = std::fs::remove_file(self.config.run_dir.join(PID_FILE));
        let _ = std::fs::remove_file(self.config.run_dir.join(LOCK));
        self.shared.wait_for_clients();
        if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Whether there was I/O since it was asked last.
fn busy(data: Arc<DataPath>) -> impl FnMut() -> bool {
    let mut last = 0;
    move || {
        let stats = data.stats();
        let done = stats.reads + stats.writes + stats.flushes + stats.trims + stats.zeros;
        std::mem::replace(&mut last, done) != done || stats.pending > 0
    }
}

fn data_path_config(config: &KeeperConfig, profile: &Profile) -> DataPathConfig {
    DataPathConfig {
        run_dir: config.run_dir.clone(),
        export: config.export.clone(),
        connections: config.connections,
        log_bytes: config.log_bytes,
        io_timeout: config.io_timeout_ms.map(Duration::from_millis),
        volume: config.volume.clone(),
        epoch: config.epoch,
        zeros_when_closed: profile.zeros_when_closed,
        replay_log: config.replay_log,
    }
}

/// The control group of ZeroFS, and what of its limits is not in force.
fn limit(config: &KeeperConfig) -> Result<(Option<Cgroup>, Vec<String>)> {
    // Volumes of two run folders may have the same name.
    let folder = std::fs::metadata(&config.run_dir).doing("look at", &config.run_dir)?.ino();
    let name = format!("{}-{folder:x}", config.volume);
    if config.limits.is_none() {
        // One that a killed keeper made, and that its ZeroFS may still be in: removed in the end.
        return Ok((Cgroup::find(&name), Vec::new()));
    }
    match Cgroup::create(&name, config.limits) {
        Ok((group, problems)) if config.limits_required && !problems.is_empty() => {
            group.remove()?;
            Err(Error::environment(problems.join("; ")).hint("attach without limits"))
        }
        Ok((group, problems)) => Ok((Some(group), problems)),
        Err(e) if config.limits_required => Err(e),
        Err(e) => Ok((None, vec![e.message().to_owned()])),
    }
}

/// One keeper per run folder.
fn take_lock(run_dir: &Path) -> Result<File> {
    let path = run_dir.join(LOCK);
    loop {
        let file = open_lock(&path).doing("open", &path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(Error::new(Kind::Busy, "another keeper of this volume is running")
                    .hint("see it with: zerofsctl list"));
            }
            Err(std::fs::TryLockError::Error(e)) => return Err(e).doing("lock", &path),
        }
        // A keeper that ended between our open and our lock has removed the file that we now hold.
        let ours = file.metadata().doing("read", &path)?;
        if std::fs::metadata(&path).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
}

/// The device depends on this process, so the kernel must not wait for the device on its behalf, nor choose it
/// when memory runs out. Tells what was not permitted.
fn become_part_of_the_io_path() -> Vec<String> {
    let mut notes = Vec::new();
    /// From linux/prctl.h; the libc crate does not have it.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: a plain system call without pointers.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        notes.push(format!(
            "the keeper could not be made an I/O flusher ({}): under memory pressure the device may stall",
            io::Error::last_os_error()
        ));
    }
    if !set_own_oom_score(b"-1000\n") {
        notes.push("the keeper could not be protected from the kernel's out-of-memory killer".to_owned());
    }
    notes
}

/// For us and for ZeroFS, which inherits them: all the descriptors that we may have (a store of many objects
/// opens many), and no core dumps, which would hold the password and the data.
fn adjust_resource_limits() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

/// A thread of the data path or the supervisor that is gone would leave the device hanging for ever, and
/// nobody would know why. An end of the whole process is noticed, and what was acknowledged is in the log.
fn end_on_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // To standard error, which is the log. Not through the logger: whoever panics may hold its lock.
        usual(panic);
        let spared = [Some(control::CLIENT_THREAD), Some(OWNER_THREAD)];
        if !spared.contains(&std::thread::current().name()) {
            std::process::abort();
        }
    }));
}

fn signals_to_wait_for() -> SigSet {
    // HUP and INT come from terminals; a keeper has none, and ends by TERM or by its socket.
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

/// Whether something is mounted exactly there.
fn is_mount_point(path: &Path) -> bool {
    mounts::table("self").is_ok_and(|table| mounts::at(&table, path).is_some())
}

// --- the keeper's own log -------------------------------------------------------------------------------

fn open_keeper_log(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).mode(0o600).open(path)
}

/// Sends what the keeper logs to its file, which is renamed when it is large; panics too, by way of
/// standard error.
fn log_to(path: &Path) -> Result<()> {
    let file = open_keeper_log(path).doing("open", path)?;
    let size = AtomicU64::new(file.metadata().doing("read", path)?.len());
    let log = KeeperLog { path: path.to_owned(), file, size };
    nix::unistd::dup2_stderr(&log.file).doing("open", path)?;
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_max_level(tracing::Level::INFO)
        .with_writer(Mutex::new(log))
        // It would say on standard error, with a panic where that is full, too.
        .log_internal_errors(false)
        .finish();
    // Already set only where a test runs a keeper in its own process.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

struct KeeperLog {
    path: PathBuf,
    file: File,
    size: AtomicU64,
}

impl Write for KeeperLog {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let size = self.size.fetch_add(text.len() as u64, Ordering::Relaxed);
        if size > KEEPER_LOG_LIMIT
            && watchdog::make_room(&self.path).is_ok()
            && std::fs::rename(&self.path, watchdog::numbered(&self.path, 1)).is_ok()
        {
            self.file = open_keeper_log(&self.path)?;
            self.size.store(text.len() as u64, Ordering::Relaxed);
            let _ = nix::unistd::dup2_stderr(&self.file);
            let _ = nix::unistd::dup2_stdout(&self.file);
        }
        self.file.write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Starts a thread with a small stack: a keeper has many threads, and none of them recurses.
pub(crate) fn thread(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(256 * 1024).spawn(work)
}

/// Locks. A panic elsewhere leaves nothing half done in what we guard so.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same, unless somebody else holds it now.
fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(held) => Some(held),
        Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
