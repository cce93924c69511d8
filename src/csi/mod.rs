//! The CSI 1.12 driver: the same operations as the command line, asked for over gRPC.
//!
//! Each call is parsed and checked ([`request`]), taken through as one operation of [`crate::ops`], and answered. One
//! operation runs per volume at a time ([`flight`]); one whose caller has gone goes on, and the caller's next try
//! finds it. gRPC and timers are asynchronous; operations run on threads of their own. What the driver needs of its
//! surroundings is a [`Backend`], so that tests can serve a model.
//!
//! Keepers are processes of their own: nothing that happens to the driver interrupts a mounted volume.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::error::Result;
use crate::host::Host;
use crate::run::Engine;
use crate::values::VolumeId;

pub mod backend;
pub mod cluster;
pub mod condition;
pub mod controller;
mod deletion;
pub mod errors;
pub mod flight;
pub mod heal;
pub mod http;
pub mod identity;
pub mod keepers;
pub mod metrics;
pub mod node;
pub mod observe;
pub mod proto;
pub mod request;
pub mod rpc;
pub mod server;
pub mod socket;

pub use backend::{Backend, Need};
pub use cluster::{ClusterId, OurCluster};
pub use errors::Refusal;
pub use rpc::Rpc;

/// The name that StorageClasses and PersistentVolumes of existing installations carry.
pub const DRIVER: &str = "zerofs.csi.driver";

/// The topology key of volumes that are in a store of one node.
pub const TOPOLOGY_KEY: &str = "topology.zerofs.csi.driver/node";

/// Which services are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Identity and Node.
    Node,
    /// Identity and Controller.
    Controller,
    /// All three: a machine without Kubernetes, and tests.
    All,
}

impl Role {
    /// Whether the Node service is offered.
    pub fn has_node(self) -> bool {
        self != Role::Controller
    }

    /// Whether the Controller service is offered.
    pub fn has_controller(self) -> bool {
        self != Role::Node
    }
}

impl std::str::FromStr for Role {
    type Err = crate::error::Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "node" => Ok(Role::Node),
            "controller" => Ok(Role::Controller),
            "all" => Ok(Role::All),
            _ => Err(crate::error::Error::usage(format!("unknown role {s:?}"))
                .hint("choose one of node, controller, all")),
        }
    }
}

/// How a driver is set up. Every value is checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The CSI node id.
    pub node_id: String,
    /// Which services.
    pub role: Role,
    /// How many volumes the node may have; none for as many as the orchestrator likes.
    pub max_volumes: Option<u32>,
    /// How devices are made.
    pub made: crate::host::Made,
    /// Other nodes that a controller may publish to; with none given and no Node service here, any.
    pub nodes: BTreeSet<String>,
    /// The run root: journals, locks, sockets of keepers.
    pub run_dir: PathBuf,
    /// Volumes can be reached from this node only.
    pub node_local: bool,
}

impl Config {
    /// Whether a node of this id can be published to.
    pub fn knows_node(&self, node: &str) -> bool {
        (self.role.has_node() && node == self.node_id)
            || self.nodes.contains(node)
            || (self.role == Role::Controller && self.nodes.is_empty())
    }

    /// Where the volumes can be reached from, when that is not everywhere.
    fn topology(&self) -> Option<proto::Topology> {
        let segments = [(TOPOLOGY_KEY.to_owned(), self.node_id.clone())].into();
        self.node_local.then_some(proto::Topology { segments })
    }
}

/// What the services share.
pub struct Driver {
    /// How it is set up.
    pub config: Config,
    /// Its surroundings.
    pub backend: Box<dyn Backend>,
    /// What is at work.
    pub flights: flight::Flights,
    /// What is counted.
    pub metrics: metrics::Metrics,
    /// No new work is taken.
    stopping: AtomicBool,
    /// Work ends after its step.
    interrupt: Arc<AtomicBool>,
    /// When the surroundings were last found well.
    well: tokio::sync::Mutex<Option<std::time::Instant>>,
    requests: AtomicU64,
}

/// One call at work: names it in logs, metrics and errors.
#[derive(Debug, Clone)]
pub struct Job {
    /// Which call.
    pub rpc: Rpc,
    /// On which volume.
    pub volume: VolumeId,
    /// The number that its log lines carry.
    pub request: u64,
}

impl Driver {
    /// Puts a driver together; it serves nothing yet.
    pub fn new(config: Config, backend: Box<dyn Backend>) -> Arc<Driver> {
        Arc::new(Driver {
            config,
            backend,
            flights: flight::Flights::new(),
            metrics: metrics::Metrics::new(),
            stopping: AtomicBool::new(false),
            interrupt: Arc::new(AtomicBool::new(false)),
            well: tokio::sync::Mutex::new(None),
            requests: AtomicU64::new(0),
        })
    }

    /// A number for a call, for its log lines.
    fn number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether no new work is taken.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Takes no new work from here on.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Lets what runs end after the step that it is at; what is not complete then undoes itself.
    pub fn interrupt(&self) {
        self.interrupt.store(true, Ordering::Relaxed);
    }

    /// Works with the engine on one volume. Called on a thread that may block.
    fn with_engine<T>(
        &self,
        job: &Job,
        need: Need,
        work: impl FnOnce(&Engine<'_>, &dyn Host) -> Result<T>,
    ) -> Result<T> {
        let observer = observe::Watcher { driver: self, job };
        let (mut work, mut answer) = (Some(work), None);
        self.backend.with_host(&job.volume, need, &mut |host| {
            let engine = Engine { host, observer: &observer };
            if let Some(work) = work.take() {
                answer = Some(work(&engine, host)?);
            }
            Ok(())
        })?;
        answer.ok_or_else(|| crate::error::Error::failed("the host was opened, but nothing was done with it"))
    }

    /// Takes one call through: counts it, logs it, and runs its work as the volume's only flight. `print` tells a retry
    /// from another request.
    async fn call<T: Clone + Send + Sync + 'static>(
        self: &Arc<Self>,
        rpc: Rpc,
        volume: Result<VolumeId>,
        print: Vec<u8>,
        work: impl FnOnce(&Driver, &Job) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<tonic::Response<T>, tonic::Status> {
        let begun = std::time::Instant::now();
        let request = self.number();
        let name = volume.as_ref().map(ToString::to_string).unwrap_or_default();
        let result = async {
            let volume = volume?;
            if self.is_stopping() {
                return Err(Refusal::stopping());
            }
            tracing::debug!(%volume, rpc = rpc.name(), request, "begun");
            let (driver, job) = (self.clone(), Job { rpc, volume: volume.clone(), request });
            self.flights.fly(rpc, &volume, print, move || work(&driver, &job)).await
        }
        .await;
        self.answered(rpc, &name, request, begun.elapsed(), result)
    }

    /// The same for a call that only looks, or that has no volume: it needs no flight.
    async fn look<T: Send + 'static>(
        self: &Arc<Self>,
        rpc: Rpc,
        volume: &str,
        work: impl FnOnce(&Driver) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<tonic::Response<T>, tonic::Status> {
        let begun = std::time::Instant::now();
        let request = self.number();
        let driver = self.clone();
        let result = match tokio::task::spawn_blocking(move || work(&driver)).await {
            Ok(result) => result,
            Err(_) => Err(Refusal::panicked()),
        };
        // Shown in logs: what is not a volume's name stays out of them.
        let name: String = volume.chars().take(VolumeId::MAX).filter(|c| c.is_ascii_graphic()).collect();
        self.answered(rpc, &name, request, begun.elapsed(), result)
    }

    fn answered<T>(
        &self,
        rpc: Rpc,
        volume: &str,
        request: u64,
        took: Duration,
        result: Result<T, Refusal>,
    ) -> Result<tonic::Response<T>, tonic::Status> {
        self.metrics.observe(rpc, metrics::TOTAL, took);
        let milliseconds = took.as_millis() as u64;
        match result {
            Ok(answer) => {
                tracing::info!(%volume, rpc = rpc.name(), request, milliseconds, "done");
                Ok(tonic::Response::new(answer))
            }
            Err(refusal) => {
                self.metrics.failed(rpc, metrics::TOTAL);
                let status = refusal.status();
                let error = refusal.error();
                let (step, hint) = (error.step().unwrap_or_default(), error.hint_text().unwrap_or_default());
                tracing::warn!(
                    %volume,
                    rpc = rpc.name(),
                    request,
                    milliseconds,
                    code = ?status.code(),
                    step,
                    hint,
                    "failed: {}",
                    error.message()
                );
                Err(status)
            }
        }
    }

    /// Whether everything is there that calls need: asked at most once in a few seconds.
    pub async fn probe(self: &Arc<Self>) -> Result<(), Refusal> {
        const FRESH: Duration = Duration::from_secs(5);
        if self.is_stopping() {
            return Err(Refusal::stopping());
        }
        let mut well = self.well.lock().await;
        if well.is_some_and(|at| at.elapsed() < FRESH) {
            return Ok(());
        }
        let driver = self.clone();
        let asked = tokio::task::spawn_blocking(move || driver.backend.probe(driver.config.role));
        let result = match tokio::time::timeout(Duration::from_secs(20), asked).await {
            Ok(Ok(result)) => result.map_err(Refusal::from),
            Ok(Err(_)) => Err(Refusal::panicked()),
            Err(_) => Err(Refusal::from(crate::error::Error::new(
                crate::error::Kind::Unreachable,
                "the store did not answer within 20 s",
            ))),
        };
        *well = result.is_ok().then(std::time::Instant::now);
        result
    }
}
