use std::collections::BTreeSet;

use clap::{Args, Subcommand};
use jiff::SignedDuration;

use super::{Context, StorageArgs};
use crate::catalog::{self, Catalog, Objects, Scheme, StorageUrl};
use crate::error::{Error, Result};
use crate::gc::{ClusterWitness, Collector, Journals, Options, Patience, Watch, Witness};
use crate::k8s::Cluster;
use crate::report::Report;

mod bar;
mod mark;
mod metrics;
mod restore;
mod scan;
mod status;
mod sweep;

pub(super) use status::records;

/// Find and delete what deleted volumes left in the bucket, and nothing else
///
/// A scan gives every volume a verdict. mark writes a dated mark into the records of orphans; sweep deletes, a grace period
/// later, what is still marked and still an orphan. Until then an attach or restore takes the mark away.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl gc-s3 scan --context prod --config zerofs.yaml
  zerofsctl gc-s3 mark --context prod --context staging --config zerofs.yaml
  zerofsctl gc-s3 mark vol7 --no-kubernetes --config zerofs.yaml
  zerofsctl gc-s3 status --config zerofs.yaml
  zerofsctl gc-s3 sweep --context prod --context staging --config zerofs.yaml")]
pub struct GcArgs {
    #[command(subcommand)]
    command: GcCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum GcCommand {
    Scan(scan::ScanArgs),
    Mark(mark::MarkArgs),
    Sweep(sweep::SweepArgs),
    Restore(restore::RestoreArgs),
    Status(status::StatusArgs),
}

/// Who is asked what is live, and what counts as settled.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Evidence")]
pub struct EvidenceArgs {
    /// A Kubernetes cluster to ask, by its context in the kubeconfig; repeatable, and all must answer. Without one: the
    /// current context, or the cluster around this pod
    #[arg(long, value_name = "CTX")]
    context: Vec<String>,
    /// Ask no cluster: volumes of a cluster are then never orphans
    #[arg(long, conflicts_with = "context")]
    no_kubernetes: bool,
    /// A cluster that is gone for good: nothing in it refers to its volumes any more; repeatable
    #[arg(long, value_name = "ID")]
    gone_cluster: Vec<String>,
    /// A volume whose record was written within this time may still be in the making
    #[arg(long, value_name = "TIME", default_value = "1h")]
    min_age: String,
    /// Whoever wrote to a volume within this time may still be at it
    #[arg(long, value_name = "TIME", default_value = "5m")]
    quiet: String,
}

pub fn run(args: &GcArgs, context: &Context) -> Result<Report> {
    share_memory();
    match &args.command {
        GcCommand::Scan(args) => scan::run(args, context),
        GcCommand::Mark(args) => mark::run(args, context),
        GcCommand::Sweep(args) => sweep::run(args, context),
        GcCommand::Restore(args) => restore::run(args, context),
        GcCommand::Status(args) => status::run(args, context),
    }
}

/// The threads of a run take turns at reading pages, and each would keep the memory of its largest for itself. Two pools for
/// all of them take a quarter less, at the same speed.
fn share_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only sets a number inside the allocator, under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// The two halves of a store.
pub(in crate::cli) struct Store {
    pub(in crate::cli) catalog: Box<dyn Catalog>,
    pub(in crate::cli) objects: Box<dyn Objects>,
}

impl Store {
    /// The store that the settings name, or the embedded one.
    pub(in crate::cli) fn open(args: &StorageArgs, context: &Context) -> Result<Store> {
        let settings = context.settings(args)?;
        let url = match &settings.storage_url {
            Some(url) => url.clone(),
            None => context.dirs()?.embedded_store()?,
        };
        Ok(Store {
            catalog: catalog::open(&url, &settings.s3)?,
            objects: catalog::objects(&url, &settings.s3)?,
        })
    }

    fn url(&self) -> &StorageUrl {
        self.catalog.url()
    }
}

impl EvidenceArgs {
    fn options(&self) -> Result<Options> {
        Ok(Options {
            gone_clusters: self.gone_cluster.iter().cloned().collect(),
            patience: Patience {
                young: time("--min-age", &self.min_age)?,
                quiet: time("--quiet", &self.quiet)?,
            },
            ..Options::default()
        })
    }

    /// Whoever can tell what refers to volumes. The journals of this node always can.
    fn witnesses(&self, store: &Store, context: &Context) -> Result<Vec<Box<dyn Witness>>> {
        let run_dir = context.dirs()?.run;
        let mut witnesses: Vec<Box<dyn Witness>> =
            vec![Box::new(Journals { run_dir, url: store.url().clone() })];
        let contexts: BTreeSet<Option<&str>> = match self.context.as_slice() {
            _ if self.no_kubernetes => BTreeSet::new(),
            [] => [None].into(),
            named => named.iter().map(|c| Some(c.as_str())).collect(),
        };
        for name in contexts {
            witnesses.push(Box::new(ClusterWitness::new(Cluster::connect(name)?)));
        }
        Ok(witnesses)
    }
}

/// A collector on a store, for as long as `work` takes.
fn collect<T>(
    store: &Store,
    witnesses: &[Box<dyn Witness>],
    options: Options,
    watch: &dyn Watch,
    work: impl FnOnce(&Collector<'_>) -> Result<T>,
) -> Result<T> {
    let witnesses: Vec<&dyn Witness> = witnesses.iter().map(AsRef::as_ref).collect();
    work(&Collector {
        catalog: store.catalog.as_ref(),
        objects: store.objects.as_ref(),
        witnesses: &witnesses,
        options,
        watch,
    })
}

fn time(flag: &str, text: &str) -> Result<SignedDuration> {
    humantime::parse_duration(text).ok().and_then(|d| SignedDuration::try_from(d).ok()).ok_or_else(|| {
        Error::usage(format!("invalid {flag} {text:?}")).hint("write a time such as 90s, 30m, 24h or 7d")
    })
}

/// What a person has to type: the bucket, or the last part of a folder's name.
fn place(url: &StorageUrl) -> String {
    match url.scheme() {
        Scheme::S3 { bucket, .. } => bucket.to_owned(),
        Scheme::File(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    }
}
