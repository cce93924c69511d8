use clap::Args;

use super::Store;
use crate::cli::{Context, StorageArgs};
use crate::error::Result;
use crate::gc;
use crate::report::Report;
use crate::values::VolumeId;

/// Take the mark of a volume away, and keep it
///
/// From then on it counts as kept on purpose: no scan makes an orphan of it, only naming it to mark does. Once its
/// deletion has begun there is no way back.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl gc-s3 restore vol7 --config zerofs.yaml")]
pub struct RestoreArgs {
    /// The volume's name
    volume: String,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &RestoreArgs, context: &Context) -> Result<Report> {
    let volume: VolumeId = args.volume.parse()?;
    let store = Store::open(&args.storage, context)?;
    let (record, changed) = gc::restore(store.catalog.as_ref(), &volume)?;
    Ok(crate::report::gc::restored(&record, changed))
}
