//! The command line: one file per subcommand, each with its arguments and a `run` that answers with a
//! [`Report`]. Values are checked once, where arguments become a spec.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::{Error, Kind, Result};
use crate::report::{Format, Report};

mod attach;
mod context;
mod csi;
mod demo;
mod detach;
mod device;
mod fsck;
mod gc;
mod generate;
mod keeper;
mod list;
mod nbd;
mod progress;
mod recover;
mod resize;
mod show;
mod watch;
mod volume;
mod zerofs;

pub use context::Context;

/// Attach, check, grow and detach ZeroFS volumes: block devices whose data lives in S3
#[derive(Debug, Parser)]
#[command(
    name = "zerofsctl",
    version,
    max_term_width = 100,
    subcommand_required = true,
    after_help = "\
Examples:
  zerofsctl demo
  zerofsctl attach vol1 --target /mnt/vol1 --size 10Gi
  zerofsctl list
  zerofsctl detach vol1

Environment:
  ZEROFSCTL_STATE_DIR, ZEROFSCTL_RUN_DIR, ZEROFS_BIN    as the options of these names
  ZEROFSCTL_TOOLS    where zerofs is looked for last [default: ~/.cache/zerofsctl/tools]
  ZEROFS_ENCRYPTION_PASSWORD_FILE, ZEROFS_ENCRYPTION_PASSWORD    the volume's password
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN    keys for S3
  NODE_ID    the name of this node in the catalog [default: the host name]
  NO_COLOR    no colours

Exit codes:
  0 done    1 failed    2 wrong usage    3 findings    4 warnings only    5 done in part
  10 not found    11 busy    20 unreachable    130 interrupted"
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print the answer as table, wide, json, yaml or name
    #[arg(short = 'o', long = "output", global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT", hide_possible_values = true)]
    output: Format,
    /// For configs, caches, logs and the embedded store
    #[arg(
        long,
        global = true,
        env = "ZEROFSCTL_STATE_DIR",
        default_value = "/var/lib/zerofsctl",
        value_name = "DIR",
        hide_env = true
    )]
    state_dir: PathBuf,
    /// For journals, locks and sockets
    #[arg(
        long,
        global = true,
        env = "ZEROFSCTL_RUN_DIR",
        default_value = "/run/zerofsctl",
        value_name = "DIR",
        hide_env = true
    )]
    run_dir: PathBuf,
    /// The zerofs program; else the one in PATH, or in the tools folder
    #[arg(long, global = true, env = "ZEROFS_BIN", value_name = "FILE", hide_env = true)]
    zerofs_bin: Option<PathBuf>,
    /// Tell more on standard error; -vv for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Write standard error as text or json
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT", hide_possible_values = true)]
    log_format: LogFormat,
    /// The name of this node; none for NODE_ID or the host name.
    #[arg(skip)]
    node: Option<String>,
}

/// `--log-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Where a volume's data is, and the secrets for it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Storage")]
pub struct StorageArgs {
    /// s3://BUCKET/PREFIX or file:///FOLDER [default: a store on this machine]
    #[arg(long, value_name = "URL")]
    storage_url: Option<String>,
    /// Settings: ConfigMap keys as a plain map, or Kubernetes manifests
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Secret manifests, if they are not in the --config file; repeatable
    #[arg(long, value_name = "FILE")]
    secret: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Attach(Box<attach::AttachArgs>),
    Detach(detach::DetachArgs),
    List(list::ListArgs),
    Show(show::ShowArgs),
    Resize(resize::ResizeArgs),
    Fsck(fsck::FsckArgs),
    Recover(recover::RecoverArgs),
    Watch(watch::WatchArgs),
    Nbd(nbd::NbdArgs),
    #[command(name = "gc-s3")]
    Gc(gc::GcArgs),
    Volume(volume::VolumeArgs),
    Zerofs(zerofs::ZerofsArgs),
    Demo(demo::DemoArgs),
    Csi(csi::CsiArgs),
    #[command(hide = true)]
    Generate(generate::GenerateArgs),
    #[command(hide = true)]
    Keeper(keeper::KeeperArgs),
}

/// Parses, runs, prints; the exit code is the answer's or the error's.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let parsed = definition().try_get_matches_from(&args);
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(e) if !e.use_stderr() => {
            // A reader may go away after the first lines: `zerofsctl --help | head`.
            let _ = e.print();
            return 0;
        }
        Err(e) if e.kind() == clap::error::ErrorKind::MissingSubcommand => {
            let page = definition().try_get_matches_from(args.into_iter().chain(["--help".into()]));
            let _ = write!(std::io::stderr(), "{}", page.err().map(|e| e.render()).unwrap_or_default());
            return Kind::Usage.row().exit;
        }
        Err(e) => {
            let json = args.windows(2).any(|w| w[0] == "--log-format" && w[1] == "json")
                || args.iter().any(|a| a == "--log-format=json");
            let error = wrong_usage(&e);
            context::write_error(&error, json);
            return error.kind().row().exit;
        }
    };
    // Neither a terminal nor a signal handler is anything for the keeper.
    if let Command::Keeper(args) = cli.command {
        return keeper::run(&args);
    }
    // A server tells what it does without being asked to.
    let verbose = cli.global.verbose + u8::from(matches!(cli.command, Command::Csi(_)));
    context::init_log(verbose, cli.global.log_format == LogFormat::Json);
    let format = cli.global.output;
    let global = cli.global;
    let context = Context::new(global.clone());
    match run(cli.command, &context, &global).and_then(|r| context.print(&r, format).map(|()| r.exit)) {
        Ok(exit) => exit,
        Err(error) => {
            context.print_error(&error);
            error.kind().row().exit
        }
    }
}

/// What clap complains about, in the form of all our errors: what is wrong, and the help page to read.
fn wrong_usage(e: &clap::Error) -> Error {
    let text = e.render().to_string();
    let mut page = String::from("zerofsctl");
    let mut kept = Vec::new();
    for paragraph in text.trim().split("\n\n") {
        if let Some(usage) = paragraph.strip_prefix("Usage: ") {
            let words = usage.split(' ').take_while(|w| w.starts_with(|c: char| c.is_ascii_lowercase()));
            page = words.collect::<Vec<_>>().join(" ");
        } else if !paragraph.starts_with("For more information") {
            kept.push(paragraph.trim().trim_start_matches("error: "));
        }
    }
    // A tip such as "a similar argument exists" is worth more than the page, but both fit.
    Error::usage(kept.join("; ").replace("\n ", "")).hint(format!("run: {page} --help"))
}

fn run(command: Command, context: &Context, global: &Global) -> Result<Report> {
    match command {
        Command::Attach(args) => attach::run(&args, context),
        Command::Detach(args) => detach::run(&args, context),
        Command::List(args) => list::run(&args, context),
        Command::Show(args) => show::run(&args, context),
        Command::Resize(args) => resize::run(&args, context),
        Command::Fsck(args) => fsck::run(&args, context),
        Command::Recover(args) => recover::run(&args, context),
        Command::Watch(args) => watch::run(&args, context),
        Command::Nbd(args) => nbd::run(&args, context, context.format()),
        Command::Gc(args) => gc::run(&args, context),
        Command::Volume(args) => volume::run(&args, context),
        Command::Zerofs(args) => zerofs::run(&args, context),
        Command::Demo(args) => demo::run(&args, context),
        Command::Csi(args) => csi::run(&args, context, global),
        Command::Generate(args) => generate::run(&args),
        // Taken care of before anything else.
        Command::Keeper(args) => Ok(Report::new("keeper", ()).exit(keeper::run(&args))),
    }
}

/// The definition, for parsing, help pages, man pages and completions. Every help page is the short one, so that
/// it fits on a screen; what a command's comment says beyond its first line stands below that line.
pub fn definition() -> clap::Command {
    fn compact(command: clap::Command) -> clap::Command {
        let more = command.get_long_about().map(ToString::to_string);
        let more = more.as_deref().and_then(|text| text.split_once("\n\n")).map(|(_, more)| more.to_owned());
        let command = match more {
            // A template is taken as it is, so the lines are broken here.
            Some(more) => command.help_template(format!(
                "{{before-help}}{{about-with-newline}}\n{}\n\n{{usage-heading}} {{usage}}\n\n{{all-args}}{{after-help}}",
                wrapped(&more)
            )),
            None => command,
        };
        command.disable_help_flag(true).disable_help_subcommand(true).mut_subcommands(compact).arg(
            clap::Arg::new("help")
                .short('h')
                .long("help")
                .help("Print this help")
                .help_heading("Global options")
                .display_order(1000)
                .action(clap::ArgAction::HelpShort),
        )
    }
    compact(Cli::command())
}

/// At most 100 columns, as the rest of the help.
fn wrapped(text: &str) -> String {
    let mut out = String::new();
    for paragraph in text.split("\n\n") {
        let mut column = 0;
        for word in paragraph.split_whitespace() {
            let width = word.chars().count();
            match column {
                0 => {}
                n if n + 1 + width > 100 => {
                    out.push('\n');
                    column = 0;
                }
                _ => {
                    out.push(' ');
                    column += 1;
                }
            }
            out.push_str(word);
            column += width;
        }
        out.push_str("\n\n");
    }
    out.trim_end().to_owned()
}
