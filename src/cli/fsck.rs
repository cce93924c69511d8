use std::io::IsTerminal;

use clap::Args;

use super::context::Purpose;
use super::{Context, StorageArgs};
use crate::error::{Error, Kind, Result};
use crate::ops::{self, AttachSpec};
use crate::report::{Report, operation};
use crate::values::{Slice, TargetPath, VolumeId};
use crate::zerofs::versions::Profile;

/// Check the filesystem of a detached volume; repair it with --repair
///
/// A check writes nothing; exit code 3 says that it found something. --read-data also reads the data through ZeroFS, all
/// of it or a slice, and tells what cannot be read. ZeroFS up to 0.19.1 delivers damaged objects as zeros: there, only
/// the filesystem's own checksums can find them.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl fsck vol1
  zerofsctl fsck vol1 --repair
  zerofsctl fsck vol1 --read-data
  zerofsctl fsck vol1 --read-data 1/7      # a seventh each night of the week")]
pub struct FsckArgs {
    /// The volume's name
    volume: String,
    /// Repair what is found; asks for the volume's name first
    #[arg(long)]
    repair: bool,
    /// Repair without asking
    #[arg(long, requires = "repair")]
    yes: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Also read the data: all, part N of T, or the first P percent
    #[arg(long, value_name = "N/T|P%", num_args = 0..=1, default_missing_value = "1/1")]
    read_data: Option<String>,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &FsckArgs, context: &Context) -> Result<Report> {
    let volume: VolumeId = args.volume.parse()?;
    let read_data: Option<Slice> = args.read_data.as_deref().map(str::parse).transpose()?;
    context.require_root()?;
    if args.repair && !args.yes && !args.dry_run {
        confirm(&volume)?;
    }
    let dirs = context.dirs()?;
    let host = context.host(&volume, &args.storage, Purpose::Reopen).map_err(|e| e.on(&volume))?;
    let spec = ops::fsck::FsckSpec {
        attach: AttachSpec::plain(
            volume.clone(),
            TargetPath::new(&dirs.volume_run(&volume), &context.cwd)?,
            host.catalog().url().to_string(),
        ),
        repair: args.repair,
        read_data,
    };
    if args.dry_run {
        return Ok(Report::of_preview("fsck", &volume, &ops::fsck::preview(&host, &dirs.run, &spec)?));
    }
    let engine = context.engine(&host);
    let run = ops::fsck::fsck(&engine, &dirs.run, &spec)?;
    let profile = host.zerofs_version().and_then(Profile::of);
    let hides_damage = read_data.is_some() && profile.is_ok_and(|p| p.has_fault("damage-reads-zeros"));
    Ok(operation::fsck(&volume, &run, args.repair, hides_damage))
}

/// A repair writes to a filesystem that may be half destroyed: somebody must want that.
fn confirm(volume: &VolumeId) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage("a repair must be confirmed, and there is no terminal to ask on")
            .on(volume)
            .hint(format!(
                "look first: zerofsctl fsck {volume}; then: zerofsctl fsck {volume} --repair --yes"
            )));
    }
    let typed: String = dialoguer::Input::new()
        .with_prompt(format!(
            "A repair may throw data away that it cannot place. Type the volume's name to repair {volume}"
        ))
        .allow_empty(true)
        .interact_text()
        .map_err(|e| Error::new(Kind::Interrupted, format!("the question was not answered: {e}")))?;
    if typed.trim() == volume.as_str() {
        return Ok(());
    }
    Err(Error::new(Kind::Interrupted, "not confirmed, nothing was changed")
        .on(volume)
        .hint("type the volume's name exactly"))
}
