use clap::Args;

use super::{Store, time};
use crate::catalog::VolumeRecord;
use crate::cli::{Context, StorageArgs};
use crate::error::{Kind, Result};
use crate::report::{Report, gc};

/// List the volumes that are marked or being deleted, and when they are due
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl gc-s3 status --config zerofs.yaml
  zerofsctl gc-s3 status --grace 72h --storage-url s3://bucket/prefix")]
pub struct StatusArgs {
    /// How long a volume must have been marked, as the sweep has it
    #[arg(long, value_name = "TIME", default_value = "24h")]
    grace: String,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &StatusArgs, context: &Context) -> Result<Report> {
    let grace = time("--grace", &args.grace)?;
    let store = Store::open(&args.storage, context)?;
    let records = records(&store, context)?;
    Ok(gc::status(&records, grace, store.objects.now()?))
}

/// Every record that can be used; a warning for each other one.
pub(in crate::cli) fn records(store: &Store, context: &Context) -> Result<Vec<VolumeRecord>> {
    let mut records = Vec::new();
    for id in store.catalog.list() {
        match id.and_then(|id| store.catalog.get(&id)) {
            Ok(Some((record, _))) => records.push(record),
            Ok(None) => {}
            Err(e) if e.kind() == Kind::Refused => context.progress.warn(&e.to_string()),
            Err(e) => return Err(e),
        }
    }
    records.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(records)
}
