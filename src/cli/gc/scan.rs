use clap::Args;

use super::bar::Bar;
use super::metrics::MetricsArgs;
use super::{EvidenceArgs, Store, collect};
use crate::cli::{Context, StorageArgs};
use crate::error::Result;
use crate::report::gc_metrics::Told;
use crate::report::{Report, gc};

/// Give every volume in the bucket a verdict; change nothing
///
/// live: in use, or it may be. retained: kept by a PersistentVolume, or made by hand. released: its PersistentVolume is
/// gone and its data was kept on purpose. orphan: nobody wants it. unknown: too little is known, so it is left alone.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl gc-s3 scan --config zerofs.yaml                                  # the current context's cluster
  zerofsctl gc-s3 scan --context prod --context staging --config zerofs.yaml
  zerofsctl gc-s3 scan --no-kubernetes --storage-url s3://bucket/prefix -o wide")]
pub struct ScanArgs {
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    evidence: EvidenceArgs,
}

pub fn run(args: &ScanArgs, context: &Context) -> Result<Report> {
    let options = args.evidence.options()?;
    let store = Store::open(&args.storage, context)?;
    args.metrics.note(Told::Scan, &store, context, |metrics| {
        let witnesses = args.evidence.witnesses(&store, context)?;
        context.catch_signals();
        let bar = Bar::new(None, context.json_log());
        let scan = collect(&store, &witnesses, options, &bar, |c| c.scan())?;
        drop(bar);
        metrics.scanned(&scan);
        Ok(gc::scan(&scan))
    })
}
