use clap::Args;

use super::bar::Bar;
use super::metrics::MetricsArgs;
use super::{EvidenceArgs, Store, collect};
use crate::cli::{Context, StorageArgs};
use crate::error::Result;
use crate::report::gc_metrics::Told;
use crate::report::{Report, gc};

/// Mark orphans, or the volumes that you name, for deletion; a sweep deletes them later
///
/// A volume that belongs to no cluster, or whose data was kept on purpose, is only marked when it is named. What is in use
/// is never marked, named or not.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl gc-s3 mark --context prod --context staging --config zerofs.yaml
  zerofsctl gc-s3 mark --context prod --gone-cluster 6f1c3f0e --config zerofs.yaml
  zerofsctl gc-s3 mark vol7 vol8 --no-kubernetes --config zerofs.yaml
  zerofsctl gc-s3 mark --dry-run --context prod --config zerofs.yaml")]
pub struct MarkArgs {
    /// Only these; without names, every orphan
    volume: Vec<String>,
    /// Mark nothing at all if it would be more than so many volumes, or so many of a hundred
    #[arg(long, value_name = "N|P%", default_value = "10%")]
    max_delete: String,
    /// Only tell what would be marked
    #[arg(long, conflicts_with = "metrics_file")]
    dry_run: bool,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    evidence: EvidenceArgs,
}

pub fn run(args: &MarkArgs, context: &Context) -> Result<Report> {
    let mut options = args.evidence.options()?;
    options.limit = args.max_delete.parse()?;
    options.named = args.volume.iter().map(|v| v.parse()).collect::<Result<_>>()?;
    let store = Store::open(&args.storage, context)?;
    args.metrics.note(Told::Mark, &store, context, |metrics| {
        let witnesses = args.evidence.witnesses(&store, context)?;
        context.catch_signals();
        let bar = Bar::new(None, context.json_log());
        collect(&store, &witnesses, options, &bar, |collector| {
            let scan = collector.scan()?;
            metrics.scanned(&scan);
            let plan = collector.plan_mark(&scan)?;
            if args.dry_run {
                return Ok(gc::plan("mark", &plan, "a dry run, nothing was changed"));
            }
            let done = collector.mark(&scan, &plan)?;
            metrics.marked(done.marked.len());
            Ok(gc::marked(&plan, &done))
        })
    })
}
