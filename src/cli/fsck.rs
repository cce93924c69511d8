use std::io::IsTerminal;

use clap::Args;

use super::context::Purpose;
use super::{Context, StorageArgs};
use crate::error::{Error, Kind, Result};
use crate::ops::{self, AttachSpec};
use crate::report::Report;
use crate::values::{ByteSize, Slice, TargetPath, VolumeId};

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
    let host = context.host(&volume, &args.storage, Purpose::Start).map_err(|e| e.on(&volume))?;
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
    let check = run.facts.check.clone();
    let clean = check.as_ref().is_none_or(|c| c.clean);
    let unreadable = run.facts.unreadable.clone().unwrap_or_default();
    let fs = run.facts.fs.map_or("filesystem", |fs| fs.name());
    let summary = match (clean, unreadable.is_empty(), check.as_ref().is_some_and(|c| c.repaired)) {
        (true, true, false) => format!("{volume}: the {fs} is clean"),
        (true, true, true) => format!("{volume}: the {fs} was repaired and is clean now"),
        (true, false, _) => format!("{volume}: the {fs} is clean, but some of the data cannot be read"),
        (false, ..) => format!("{volume}: the {fs} has faults"),
    };
    let mut notes: Vec<String> = Vec::new();
    if let Some(check) = check.filter(|c| !c.clean || c.repaired) {
        notes.extend(check.output.lines().map(|l| format!("  {l}")));
    }
    if !clean && !args.repair {
        notes.push(format!("hint: repair it: zerofsctl fsck {volume} --repair"));
    }
    for (start, length) in &unreadable {
        notes.push(format!("unreadable: {} at byte {start}", ByteSize(*length)));
    }
    if read_data.is_some() && host.zerofs_version().is_ok_and(|v| v.to_string() == "0.19.1") {
        notes.push(
            "note: ZeroFS 0.19.1 delivers damaged objects as zeros, so this check cannot see them".into(),
        );
    }
    let exit = if clean && unreadable.is_empty() { 0 } else { 3 };
    Ok(Report::of_run("fsck", &volume, &run).summary(summary).notes(notes).exit(exit))
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
