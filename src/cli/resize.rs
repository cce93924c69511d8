use clap::Args;

use super::context::Purpose;
use super::{Context, StorageArgs, detach};
use crate::error::Result;
use crate::ops::{self, AttachSpec};
use crate::report::Report;
use crate::values::{ByteSize, TargetPath};

/// Grow a volume, its device and its filesystem; online if it is attached
///
/// A volume that is not attached is started for a moment to grow it. Nothing ever shrinks: for that, copy the data to
/// a new volume.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl resize vol1 20Gi
  zerofsctl resize /mnt/vol1 20Gi --dry-run")]
pub struct ResizeArgs {
    /// A volume's name, one of its targets, or its device
    volume: String,
    /// The new size, such as 20Gi
    size: String,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &ResizeArgs, context: &Context) -> Result<Report> {
    let size: ByteSize = args.size.parse()?;
    size.check_volume()?;
    let dirs = context.dirs()?;
    let (volume, _) = detach::resolve(&args.volume, context, &dirs)?;
    context.require_root()?;
    let host = context.host(&volume, &args.storage, Purpose::Reopen).map_err(|e| e.on(&volume))?;
    // Where a volume that is not attached is mounted for a moment, as XFS and Btrfs need it.
    let place = dirs.volume_run(&volume).join("grow");
    let spec = AttachSpec::plain(
        volume.clone(),
        TargetPath::new(&place, &context.cwd)?,
        host.catalog().url().to_string(),
    );
    if args.dry_run {
        return Ok(Report::of_preview(
            "resize",
            &volume,
            &ops::resize::preview(&host, &dirs.run, &spec, size)?,
        ));
    }
    let engine = context.engine(&host);
    let run = ops::resize::resize(&engine, &dirs.run, &spec, size)?;
    let already = if run.already() { "already " } else { "" };
    Ok(Report::of_run("resize", &volume, &run).summary(format!("{volume} {already}has {size}")))
}
