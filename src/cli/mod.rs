//! The command line: one file per subcommand, each with its arguments and a `run` that answers with a
//! [`Report`]. Values are checked once, where arguments become a spec.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::error::Result;
use crate::report::{Format, Report};

mod attach;
mod context;
mod demo;
mod detach;
mod fsck;
mod generate;
mod keeper;
mod list;
mod progress;
mod recover;
mod resize;
mod show;
mod zerofs;

pub use context::Context;

/// Run ZeroFS volumes: S3-backed block devices, attached, checked, grown and detached without losing a byte
#[derive(Debug, Parser)]
#[command(
    name = "zerofsctl",
    version,
    max_term_width = 100,
    propagate_version = true,
    infer_subcommands = false
)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 findings, 4 warnings only, 5 done in part, \
10 not found, 11 busy, 20 unreachable, 130 interrupted."
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
    /// How to print the answer
    #[arg(short = 'o', long = "output", global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT", hide_possible_values = true, help = "How to print the answer: table, wide, json, yaml or name")]
    output: Format,
    /// Configs, caches, logs and the embedded store
    #[arg(
        long,
        global = true,
        env = "ZEROFSCTL_STATE_DIR",
        default_value = "/var/lib/zerofsctl",
        value_name = "DIR",
        hide_env_values = true
    )]
    state_dir: PathBuf,
    /// Journals, locks and sockets
    #[arg(
        long,
        global = true,
        env = "ZEROFSCTL_RUN_DIR",
        default_value = "/run/zerofsctl",
        value_name = "DIR",
        hide_env_values = true
    )]
    run_dir: PathBuf,
    /// The zerofs program; else it is looked for in PATH, then in the tools folder
    #[arg(long, global = true, env = "ZEROFS_BIN", value_name = "FILE", hide_env_values = true)]
    zerofs_bin: Option<PathBuf>,
    /// Tell more on standard error; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// The form of the story on standard error: text or json
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT", hide_possible_values = true)]
    log_format: LogFormat,
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
    /// Where volumes live: s3://BUCKET/PREFIX or file:///FOLDER; else a store under the state folder
    #[arg(long, value_name = "URL")]
    storage_url: Option<String>,
    /// Settings, as a map of ConfigMap keys or as Kubernetes manifests
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Secret manifests, when they are not in the --config file; may be repeated
    #[arg(long, value_name = "FILE")]
    secret: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Attach(attach::AttachArgs),
    Detach(detach::DetachArgs),
    List(list::ListArgs),
    Show(show::ShowArgs),
    Resize(resize::ResizeArgs),
    Fsck(fsck::FsckArgs),
    Recover(recover::RecoverArgs),
    Zerofs(zerofs::ZerofsArgs),
    Demo(demo::DemoArgs),
    #[command(hide = true)]
    Generate(generate::GenerateArgs),
    #[command(hide = true)]
    Keeper(keeper::KeeperArgs),
}

/// Parses, runs, prints; the exit code is the answer's or the error's.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return u8::try_from(e.exit_code()).unwrap_or(2);
        }
    };
    // Neither a terminal nor a signal handler is anything for the keeper.
    if let Command::Keeper(args) = cli.command {
        return keeper::run(&args);
    }
    context::init_log(cli.global.verbose, cli.global.log_format == LogFormat::Json);
    let format = cli.global.output;
    let context = Context::new(cli.global);
    match run(cli.command, &context).and_then(|r| context.print(&r, format).map(|()| r.exit)) {
        Ok(exit) => exit,
        Err(error) => {
            context.print_error(&error);
            error.kind().row().exit
        }
    }
}

fn run(command: Command, context: &Context) -> Result<Report> {
    match command {
        Command::Attach(args) => attach::run(&args, context),
        Command::Detach(args) => detach::run(&args, context),
        Command::List(args) => list::run(&args, context),
        Command::Show(args) => show::run(&args, context),
        Command::Resize(args) => resize::run(&args, context),
        Command::Fsck(args) => fsck::run(&args, context),
        Command::Recover(args) => recover::run(&args, context),
        Command::Zerofs(args) => zerofs::run(&args, context),
        Command::Demo(args) => demo::run(&args, context),
        Command::Generate(args) => generate::run(&args),
        // Taken care of before anything else.
        Command::Keeper(args) => Ok(Report::new("keeper", ()).exit(keeper::run(&args))),
    }
}

/// The definition, for help pages, man pages and completions.
pub fn definition() -> clap::Command {
    Cli::command()
}
