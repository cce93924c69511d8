use clap::Args;
use serde_json::json;

use super::context::Purpose;
use super::{Context, StorageArgs};
use crate::error::{Error, Kind, Result};
use crate::journal;
use crate::ops;
use crate::report::Report;
use crate::values::VolumeId;

/// Settle what killed commands and killed keepers left
///
/// An attach that was cut short is undone; a detach or resize is finished. Where a keeper was killed, the next one takes
/// over log and NBD device; a device that gives errors (on FUSE it ends with its keeper) is taken down, every acknowledged
/// write is replayed, and the volume is attached again where it was. attach and detach do the same first, for their own
/// volume. What is in order is not touched.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl recover
  zerofsctl recover vol1")]
pub struct RecoverArgs {
    /// Only this volume; otherwise every volume of this node
    volume: Option<String>,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &RecoverArgs, context: &Context) -> Result<Report> {
    let only: Option<VolumeId> = args.volume.as_deref().map(str::parse).transpose()?;
    context.require_root()?;
    let dirs = context.dirs()?;
    let here = journal::volumes(&dirs.run)?;
    if let Some(volume) = only.as_ref().filter(|v| !here.contains(v)) {
        return Err(Error::new(Kind::NotFound, "nothing of it is on this node")
            .on(volume)
            .hint("see what is here: zerofsctl list"));
    }
    let (mut rows, mut data, mut names, mut failed) = (Vec::new(), Vec::new(), Vec::new(), 0usize);
    let volumes: Vec<VolumeId> = only.map_or(here, |v| vec![v]);
    for volume in &volumes {
        let result = context.host(volume, &args.storage, Purpose::Reopen).and_then(|host| {
            let engine = context.engine(&host);
            ops::recover::recover(&engine, &dirs.run, volume)
        });
        match result {
            Ok(recovered) => {
                let what =
                    if recovered.what.is_empty() { "in order".to_owned() } else { recovered.what.join(", ") };
                rows.push(vec![volume.to_string(), what]);
                data.push(json!({"volume": volume, "recovered": recovered}));
                names.push(volume.to_string());
            }
            Err(e) if volumes.len() == 1 => return Err(e.on(volume)),
            Err(e) => {
                context.print_error(&e);
                rows.push(vec![volume.to_string(), format!("failed: {}", e.message())]);
                data.push(json!({"volume": volume, "error": e.message(), "hint": e.hint_text()}));
                failed += 1;
            }
        }
    }
    let exit = if failed == 0 {
        0
    } else if failed < volumes.len() {
        5
    } else {
        1
    };
    let report = Report::new("recover", json!({"volumes": data})).names(names).exit(exit);
    Ok(if rows.is_empty() {
        report.summary("nothing to recover: no volumes on this node")
    } else {
        report.table(&["VOLUME", "WHAT"], rows)
    })
}
