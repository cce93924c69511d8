use clap::{Args, Subcommand};

use super::gc::{Store, records};
use super::{Context, StorageArgs};
use crate::catalog::{DataPrefix, VolumeRecord, Written};
use crate::error::{Error, Kind, Result};
use crate::report::{Report, gc};
use crate::values::VolumeId;

/// Look at the catalog in the bucket, and take records out of it
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl volume list --storage-url s3://bucket/prefix --config zerofs.yaml
  zerofsctl volume show vol1
  zerofsctl volume forget vol1")]
pub struct VolumeArgs {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum VolumeCommand {
    List(ListArgs),
    Show(OneArgs),
    Forget(ForgetArgs),
}

/// List the records of all volumes
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl volume list --storage-url s3://bucket/prefix --config zerofs.yaml
  zerofsctl volume list -o wide")]
struct ListArgs {
    #[command(flatten)]
    storage: StorageArgs,
}

/// Show the record of a volume
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl volume show vol1 --config zerofs.yaml")]
struct OneArgs {
    /// The volume's name
    volume: String,
    #[command(flatten)]
    storage: StorageArgs,
}

/// Remove the record of a volume that has no data any more
///
/// A volume with data is not forgotten: without its record nothing would be known of it. To delete it, use gc-s3 mark.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl volume forget vol1 --config zerofs.yaml")]
struct ForgetArgs {
    /// The volume's name
    volume: String,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &VolumeArgs, context: &Context) -> Result<Report> {
    match &args.command {
        VolumeCommand::List(args) => {
            let store = Store::open(&args.storage, context)?;
            Ok(gc::records(&records(&store, context)?))
        }
        VolumeCommand::Show(args) => {
            let volume: VolumeId = args.volume.parse()?;
            let store = Store::open(&args.storage, context)?;
            let (record, _) = store.catalog.get(&volume)?.ok_or_else(|| no_record(&store, &volume))?;
            let written = store.objects.record_written(&volume)?;
            Ok(gc::record(&record, &store.catalog.data_prefix(&volume)?, written, store.catalog.url()))
        }
        VolumeCommand::Forget(args) => {
            let volume: VolumeId = args.volume.parse()?;
            let store = Store::open(&args.storage, context)?;
            forget(&store, &volume).map_err(|e| e.on(&volume))
        }
    }
}

fn forget(store: &Store, volume: &VolumeId) -> Result<Report> {
    let (record, tag) = store.catalog.get(volume)?.ok_or_else(|| no_record(store, volume))?;
    // Both the owner and the data speak against it, so both are asked before the record says `deleting`.
    let doomed: VolumeRecord = record.begin_delete()?;
    if store.catalog.data_prefix(volume)? != DataPrefix::Empty {
        return Err(Error::refused("it still has data, which nobody would know of without its record").hint(
            format!(
                "to delete the data too: zerofsctl gc-s3 mark {volume} --no-kubernetes, and later gc-s3 sweep"
            ),
        ));
    }
    if store.catalog.update(&doomed, &tag)? == Written::LostRace {
        return Err(Error::new(Kind::Busy, "its record was changed just now, so it is left alone")
            .hint(format!("look at it: zerofsctl volume show {volume}")));
    }
    store.catalog.delete(volume)?;
    Ok(gc::forgotten(volume, store.catalog.url()))
}

fn no_record(store: &Store, volume: &VolumeId) -> Error {
    Error::new(Kind::NotFound, format!("it has no record in {}", store.catalog.url()))
        .on(volume)
        .hint("see what there is: zerofsctl volume list; or say where it is: --config or --storage-url")
}
