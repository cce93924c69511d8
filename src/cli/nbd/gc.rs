use std::time::Duration;

use clap::Args;

use crate::cli::{Context, attach};
use crate::error::Result;
use crate::host::nbd::{absent, capacity};
use crate::ops::nbd_gc::{GcSpec, Node, collect, plan};
use crate::report::{Report, nbd};

/// Disconnect NBD devices of ours that leaked; a plan unless --yes is given
///
/// Only what zerofsctl nbd list calls ours-leaked, found so twice and again right before, with the volume's lock held and
/// the kernel's own word that nobody has the device. Foreign and unknown devices are never touched, nor is anything that
/// is mounted, held, open or served. A replay log stays: zerofsctl recover gives back what it holds.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl nbd gc
  zerofsctl nbd gc --yes
  zerofsctl nbd gc --older-than 0s --yes")]
pub struct GcArgs {
    /// How long a leak must be known, by an earlier gc or watch, such as 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "5m")]
    older_than: String,
    /// Disconnect them, without asking
    #[arg(long)]
    yes: bool,
    /// How long to wait between the two looks
    #[arg(long, value_name = "TIME", default_value = "1s", hide = true)]
    pause: String,
}

pub fn run(args: &GcArgs, context: &Context) -> Result<Report> {
    let time = |flag: &str, text: &str| -> Result<Duration> { attach::time(flag, text) };
    let spec =
        GcSpec { older_than: time("--older-than", &args.older_than)?, pause: time("--pause", &args.pause)? };
    context.require_root()?;
    let node = Node::new(&context.dirs()?.run);
    let items = if args.yes { collect(&node, spec)? } else { plan(&node, spec)? };
    let report = nbd::gc(&items, spec, args.yes, jiff::Timestamp::now());
    Ok(report.notes(absent(&capacity()?).iter().flat_map(nbd::why_none)))
}
