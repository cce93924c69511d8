use std::path::PathBuf;

use clap::Args;

use crate::keeper::{self, Hooks};

/// The keeper of one volume; started by attach, not by hand
#[derive(Debug, Clone, Args)]
pub struct KeeperArgs {
    /// The run folder of the volume
    #[arg(long, value_name = "DIR")]
    volume_run_dir: PathBuf,
}

pub fn run(args: &KeeperArgs) -> u8 {
    let code = keeper::main(&args.volume_run_dir, Hooks::default());
    u8::from(code != std::process::ExitCode::SUCCESS)
}
