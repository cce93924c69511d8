use clap::Args;

use super::context::Purpose;
use super::{Context, StorageArgs, attach, detach};
use crate::error::Result;
use crate::ops;
use crate::report::Report;
use crate::values::ByteSize;

/// Grow an attached volume, its device and its filesystem, online
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  zerofsctl resize vol1 20Gi")]
pub struct ResizeArgs {
    /// A volume's name, one of its targets, or its device
    volume: String,
    /// The new size, such as 20Gi; a volume never shrinks
    size: String,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &ResizeArgs, context: &Context) -> Result<Report> {
    let size: ByteSize = args.size.parse()?;
    attach::check_size(size)?;
    let dirs = context.dirs()?;
    let (volume, _) = detach::resolve(&args.volume, context, &dirs)?;
    context.require_root()?;
    let host = context.host(&volume, &StorageArgs::default(), Purpose::Settle)?;
    if args.dry_run {
        return Ok(Report::of_preview(
            "resize",
            &volume,
            &ops::resize::preview(&host, &dirs.run, &volume, size)?,
        ));
    }
    let engine = context.engine(&host);
    let run = ops::resize::resize(&engine, &dirs.run, &volume, size)?;
    let already = if run.already() { "already " } else { "" };
    Ok(Report::of_run("resize", &volume, &run).summary(format!("{volume} {already}has {size}")))
}
