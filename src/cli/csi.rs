use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::context::Purpose;
use super::device::DeviceArgs;
use super::{Context, Global, StorageArgs};
use crate::catalog::{Catalog, Objects, StorageUrl};
use crate::csi::keepers;
use crate::csi::{Backend, ClusterId, Config, Driver, Need, OurCluster, Role, http, request, server, socket};
use crate::error::{Error, Result};
use crate::host::{self, Host, Transport};
use crate::report::Report;
use crate::settings::Settings;
use crate::values::VolumeId;
use crate::watch::Settler;

/// Serve CSI, for Kubernetes and other orchestrators
#[derive(Debug, Clone, Args)]
pub struct CsiArgs {
    #[command(subcommand)]
    command: CsiCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum CsiCommand {
    Serve(ServeArgs),
}

/// Run the CSI driver zerofs.csi.driver
///
/// It attaches volumes just as the command line does, and both can be used side by side. It can be stopped, killed and
/// upgraded while volumes are mounted: they go on. SIGTERM lets what runs finish first.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl csi serve --endpoint unix:///run/zerofs/csi.sock --node-id node1
  zerofsctl csi serve --endpoint unix:///csi/csi.sock --role node --config zerofs.yaml --secret secrets.yaml

Environment:
  CSI_ENDPOINT, NODE_ID, METRICS_BIND_ADDRESS    as the options of these names")]
pub struct ServeArgs {
    /// The unix socket to listen on; a stale one is replaced
    #[arg(long, env = "CSI_ENDPOINT", value_name = "unix:///PATH", hide_env = true)]
    endpoint: String,
    /// The name of this node [default: the host name]
    #[arg(long, env = "NODE_ID", value_name = "NAME", hide_env = true)]
    node_id: Option<String>,
    /// What to serve: node, controller or all
    #[arg(long, value_name = "ROLE", default_value = "all")]
    role: String,
    /// Where ZeroFS runs: process
    #[arg(long, value_name = "KIND", default_value = "process")]
    runtime: String,
    #[command(flatten)]
    device: DeviceArgs,
    /// For /metrics, /healthz and /readyz; 0 for none
    #[arg(
        long,
        env = "METRICS_BIND_ADDRESS",
        value_name = "HOST:PORT",
        default_value = ":8080",
        hide_env = true
    )]
    metrics_bind_address: String,
    /// The most volumes that this node takes [default: as many as it has NBD devices; no limit with fuse]
    #[arg(long, value_name = "N")]
    max_volumes: Option<u32>,
    /// Another node that volumes may be published to; repeatable [default: any, for a controller by itself]
    #[arg(long, value_name = "NAME")]
    node: Vec<String>,
    /// The Kubernetes cluster that new volumes belong to, for gc-s3: its UID, none, or auto, which asks the cluster around
    /// this pod and is none elsewhere
    #[arg(long, value_name = "UID", default_value = "auto")]
    cluster_id: String,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &CsiArgs, context: &Context, global: &Global) -> Result<Report> {
    let CsiCommand::Serve(args) = &args.command;
    let endpoint = socket::endpoint(&args.endpoint)?;
    let role: Role = args.role.parse()?;
    if args.runtime != "process" {
        return Err(Error::usage(format!("unknown runtime {:?}", args.runtime))
            .hint("choose process: ZeroFS runs as a process on this node"));
    }
    let made = args.device.check()?;
    let metrics = http::address(&args.metrics_bind_address)?;
    if args.max_volumes == Some(0) {
        return Err(Error::usage("--max-volumes is 0").hint("leave it out for no limit"));
    }
    let node_id = request::node(&args.node_id.clone().unwrap_or_else(super::context::node_name))
        .map_err(|e| e.context("--node-id"))?;
    let cluster = match args.cluster_id.as_str() {
        "auto" => ClusterId::auto(|name| std::env::var_os(name)),
        named => named.parse().map_err(|e: Error| e.context("--cluster-id"))?,
    };
    let nodes = args.node.iter().map(|n| request::node(n)).collect::<Result<_>>()?;
    context.require_root()?;
    let dirs = context.dirs()?;
    let settings = context.settings(&args.storage)?;
    let node_local = !settings.storage_url.as_ref().is_some_and(crate::catalog::StorageUrl::is_s3);
    let _held = socket::lock(&dirs.state)?;
    let backend = Machine {
        global: Global { node: Some(node_id.clone()), ..global.clone() },
        storage: args.storage.clone(),
        transport: made.transport,
        catalog: Mutex::new(None),
        objects: Mutex::default(),
        cluster: OurCluster::new(cluster),
    };
    let config = Config {
        node_id,
        role,
        max_volumes: args
            .max_volumes
            .or_else(|| role.has_node().then(|| nbd_devices(made.transport)).flatten()),
        made,
        nodes,
        run_dir: dirs.run.clone(),
        node_local,
    };
    let (listener, _socket) = socket::bind(&endpoint)?;
    let driver = Driver::new(config, Box::new(backend));
    let watched = role.has_node().then(|| Settler::new(dirs.clone(), driver.config.node_id.clone()));
    let _keepers = watched.map(|w| keepers::start(driver.clone(), Arc::new(w))).transpose()?;
    server::run(&driver, listener, metrics, stopped, |at| {
        let at = at.map(|at| format!(", metrics on http://{at}/metrics")).unwrap_or_default();
        tracing::info!(
            "{} {} serves {} as node {}{at}",
            crate::csi::DRIVER,
            env!("CARGO_PKG_VERSION"),
            endpoint.display(),
            driver.config.node_id
        );
    })?;
    Ok(Report::new("csi", json!({"stopped": true})).summary("stopped"))
}

/// SIGTERM or SIGINT.
async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers a signal simply ends the process, and the next start settles what ran.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// How many NBD devices this machine can have, where volumes are made of those. What cannot be known is no limit: the
/// probe tells what is missing.
fn nbd_devices(wanted: Transport) -> Option<u32> {
    // Only a module that is loaded knows how many it has.
    match host::device::prepare(wanted) {
        Ok(Transport::Nbd) => host::nbd::capacity().ok().filter(|c| c.available).map(|c| c.limit),
        _ => None,
    }
}

/// The real machine: each operation gets a host of its own, opened as for a command.
struct Machine {
    global: Global,
    storage: StorageArgs,
    transport: Transport,
    /// Made once: an S3 client is dear.
    catalog: Mutex<Option<Arc<dyn Catalog>>>,
    /// Shared by the deletions of one moment, and gone when the last of them has ended.
    objects: Mutex<Option<Weak<dyn Objects>>>,
    cluster: OurCluster,
}

impl Machine {
    /// Belongs to the calling thread.
    fn context(&self) -> Context {
        Context::new(self.global.clone())
    }

    /// The store, and how to reach it.
    fn store(&self) -> Result<(StorageUrl, Settings)> {
        let context = self.context();
        let settings = context.settings(&self.storage)?;
        let url = match &settings.storage_url {
            Some(url) => url.clone(),
            None => context.dirs()?.embedded_store()?,
        };
        Ok((url, settings))
    }
}

impl Backend for Machine {
    fn with_host(
        &self,
        volume: &VolumeId,
        need: Need,
        work: &mut dyn FnMut(&dyn Host) -> Result<()>,
    ) -> Result<()> {
        let purpose = match need {
            Need::Start => Purpose::Start,
            Need::Reopen => Purpose::Reopen,
            Need::Settle => Purpose::Settle,
        };
        let host = self.context().host(volume, &self.storage, purpose).map_err(|e| e.on(volume))?;
        work(&host)
    }

    fn catalog(&self) -> Result<Arc<dyn Catalog>> {
        let mut held = self.catalog.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(catalog) = &*held {
            return Ok(catalog.clone());
        }
        let (url, settings) = self.store()?;
        let catalog: Arc<dyn Catalog> = Arc::from(crate::catalog::open(&url, &settings.s3)?);
        *held = Some(catalog.clone());
        Ok(catalog)
    }

    fn objects(&self) -> Result<Arc<dyn Objects>> {
        let mut held = self.objects.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(objects) = held.as_ref().and_then(Weak::upgrade) {
            return Ok(objects);
        }
        let (url, settings) = self.store()?;
        let objects: Arc<dyn Objects> = Arc::from(crate::catalog::objects(&url, &settings.s3)?);
        *held = Some(Arc::downgrade(&objects));
        Ok(objects)
    }

    fn cluster(&self) -> Result<Option<String>> {
        self.cluster.uid()
    }

    fn delete_grace(&self) -> Result<Option<Duration>> {
        Ok(self.context().settings(&self.storage)?.delete_grace)
    }

    fn probe(&self, role: Role) -> Result<()> {
        let context = self.context();
        context.settings(&self.storage)?;
        if role.has_node() {
            context.zerofs_program()?;
            host::device::transport(self.transport)?;
        }
        // Whether there is such a record does not matter: the store has answered.
        self.catalog()?.get(&"zerofsctl-probe".parse()?).map(drop)
    }
}
