use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;

use super::bar::Bar;
use super::metrics::MetricsArgs;
use super::{EvidenceArgs, Store, collect, place, time};
use crate::cli::{Context, StorageArgs};
use crate::error::{Error, Kind, Result};
use crate::gc::{Options, Plan};
use crate::report::gc_metrics::{RunMetrics, Told};
use crate::report::{Format, Report, counted, gc};
use crate::values::ByteSize;

/// Delete the volumes that were marked long enough ago and are still orphans
///
/// It scans again first, shows what it would delete, and asks. Each volume is looked at once more right before its first
/// object goes; one that somebody wants by then is unmarked. A deletion that was cut short is finished by the next sweep.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl gc-s3 sweep --context prod --config z.yaml
  zerofsctl gc-s3 sweep --context prod --config z.yaml --plan plan.json          # writes it
  zerofsctl gc-s3 sweep --context prod --config z.yaml --plan plan.json --yes    # runs it")]
pub struct SweepArgs {
    /// How long a volume must have been marked
    #[arg(long, value_name = "TIME", default_value = "24h")]
    grace: String,
    /// Delete nothing at all if it would be more than so many volumes, or so many of a hundred
    #[arg(long, value_name = "N|P%", default_value = "10%")]
    max_delete: String,
    /// Delete without asking
    #[arg(long)]
    yes: bool,
    /// Write the plan there; with --yes run it, if a new scan comes to the same
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Only tell what would be deleted
    #[arg(long, conflicts_with_all = ["yes", "plan", "metrics_file"])]
    dry_run: bool,
    #[command(flatten)]
    storage: StorageArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    evidence: EvidenceArgs,
}

pub fn run(args: &SweepArgs, context: &Context) -> Result<Report> {
    let mut options = args.evidence.options()?;
    options.limit = args.max_delete.parse()?;
    options.grace = time("--grace", &args.grace)?;
    let store = Store::open(&args.storage, context)?;
    let saved = match &args.plan {
        Some(path) if args.yes => Some(Plan::load(&context.cwd.join(path))?),
        _ => None,
    };
    // Asked before the long work, not after it.
    if !args.yes && !args.dry_run && args.plan.is_none() && !std::io::stdin().is_terminal() {
        return Err(Error::usage("a deletion must be confirmed, and there is no terminal to ask on").hint(
            "look first: zerofsctl gc-s3 sweep --dry-run; then: zerofsctl gc-s3 sweep --yes, or with --plan FILE",
        ));
    }
    if args.metrics.wanted() && args.plan.is_some() && !args.yes {
        return Err(Error::usage(
            "--metrics-file tells what was deleted, and --plan without --yes deletes nothing",
        )
        .hint("leave --metrics-file out, or run the plan: --plan FILE --yes"));
    }
    args.metrics.note(Told::Sweep, &store, context, |metrics| {
        sweep(args, context, &store, options, saved.as_ref(), metrics)
    })
}

fn sweep(
    args: &SweepArgs,
    context: &Context,
    store: &Store,
    options: Options,
    saved: Option<&Plan>,
    metrics: &mut RunMetrics,
) -> Result<Report> {
    let witnesses = args.evidence.witnesses(store, context)?;
    context.catch_signals();
    let bar = Bar::new(None, context.json_log());
    let (scan, plan) = collect(store, &witnesses, options.clone(), &bar, |collector| {
        let scan = collector.scan()?;
        metrics.scanned(&scan);
        let plan = collector.plan_sweep(&scan)?;
        Ok((scan, plan))
    })?;
    drop(bar);
    if args.dry_run {
        return Ok(gc::plan("sweep", &plan, "a dry run, nothing was changed"));
    }
    if let (Some(path), false) = (&args.plan, args.yes) {
        plan.save(&context.cwd.join(path))?;
        return Ok(gc::plan("sweep", &plan, &format!("written to {}, nothing was deleted", path.display())));
    }
    if let Some(saved) = saved {
        saved.require_same(&plan)?;
    }
    if !args.yes && !plan.lines.is_empty() {
        confirm(&plan)?;
    }
    let bar = Bar::new(Some(plan.objects()), context.json_log());
    let swept = collect(store, &witnesses, options, &bar, |collector| collector.sweep(&scan, &plan))?;
    drop(bar);
    metrics.swept(&swept);
    Ok(gc::swept(&plan, &swept, scan.keeps_versions))
}

/// Whoever types the bucket's name and the count has read both.
fn confirm(plan: &Plan) -> Result<()> {
    let shown = gc::plan("sweep", plan, "about to be deleted").render(Format::Table, None)?;
    let _ = write!(std::io::stderr().lock(), "{shown}");
    let words = format!("{} {}", place(&plan.url), plan.lines.len());
    let typed: String = dialoguer::Input::new()
        .with_prompt(format!(
            "{}, {}, {} in {} are deleted for good. Type \"{words}\" to go on",
            counted(plan.lines.len(), "volume"),
            counted(plan.objects(), "object"),
            ByteSize(plan.bytes()),
            plan.url
        ))
        .allow_empty(true)
        .interact_text()
        .map_err(|e| Error::new(Kind::Interrupted, format!("the question was not answered: {e}")))?;
    if typed.trim() == words {
        return Ok(());
    }
    Err(Error::new(Kind::Interrupted, "not confirmed, nothing was deleted")
        .hint(format!("type the bucket's name and the number of volumes: {words}")))
}
