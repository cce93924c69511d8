//! `zerofsctl nbd`: the kernel's NBD devices, ours and others'.

use clap::{Args, Subcommand};

use super::Context;
use crate::error::Result;
use crate::report::{Format, Report};

mod gc;
mod info;
mod list;
mod watch;

/// See, watch and tidy up the kernel's NBD devices; ask an NBD server what it has
#[derive(Debug, Clone, Args)]
pub struct NbdArgs {
    #[command(subcommand)]
    command: NbdCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum NbdCommand {
    List(list::ListArgs),
    Gc(gc::GcArgs),
    Info(info::InfoArgs),
    Watch(watch::WatchArgs),
}

pub fn run(args: &NbdArgs, context: &Context, format: Format) -> Result<Report> {
    match &args.command {
        NbdCommand::List(args) => list::run(args, context, format),
        NbdCommand::Gc(args) => gc::run(args, context),
        NbdCommand::Info(args) => info::run(args, context),
        NbdCommand::Watch(args) => watch::run(args, context, format),
    }
}
