use clap::Args;

use super::context::Purpose;
use super::list::look;
use super::{Context, StorageArgs, detach};
use crate::error::{Error, Kind, Result};
use crate::journal::Journal;
use crate::report::Report;
use crate::report::volume::{Seen, show};

/// Show all of one volume: processes, sockets, device, mounts, journal
///
/// In the journal, a step stands bare when it was done, with = when it was so already, ? when it was begun, - when it
/// was undone, and . when it is still to come.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl show vol1
  zerofsctl show /mnt/vol1
  zerofsctl show vol1 -o json")]
pub struct ShowArgs {
    /// A volume's name, one of its targets, or its device
    volume: String,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &ShowArgs, context: &Context) -> Result<Report> {
    let dirs = context.dirs()?;
    let (volume, _) = detach::resolve(&args.volume, context, &dirs)?;
    let host = context.host(&volume, &args.storage, Purpose::Settle)?;
    let runs = Journal::peek(&dirs.run, &volume)?;
    let record = host.catalog().get(&volume).map_err(|e| e.on(&volume))?.map(|(r, _)| r);
    if runs.is_none() && record.is_none() {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no such volume, neither here nor in {}", host.catalog().url()),
        )
        .on(&volume)
        .hint("see what there is: zerofsctl list"));
    }
    let (found, _, status) = look(&host, &dirs, &volume)?;
    let seen = Seen {
        store: host.catalog().url().volume_url(&volume),
        found,
        record,
        status,
        runs: runs.unwrap_or_default(),
        run_folder: dirs.volume_run(&volume),
        logs: dirs.volume_logs(&volume),
    };
    Ok(show(&seen))
}
