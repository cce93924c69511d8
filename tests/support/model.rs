//! The driver's services on model machines: one [`FakeHost`] per volume, and a real catalog of the embedded kind in memory.
//! Nothing is mounted, so a test can ask thousands of times, from anywhere.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tonic::Status;
use zerofsctl::catalog::{Catalog, LocalCatalog, LocalObjects, Objects, Owner, StorageUrl};
use zerofsctl::csi::controller::ControllerService;
use zerofsctl::csi::node::NodeService;
use zerofsctl::csi::proto::controller_server::Controller as _;
use zerofsctl::csi::proto::node_server::Node as _;
use zerofsctl::csi::proto::*;
use zerofsctl::csi::{Backend, Config, Driver, Need, Role};
use zerofsctl::error::{Error, Kind, Result};
use zerofsctl::host::fake::FakeHost;
use zerofsctl::host::{Host, Observe};
use zerofsctl::journal;
use zerofsctl::values::VolumeId;

/// The node's id.
pub const NODE: &str = "n1";

/// See the module.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    dir: tempfile::TempDir,
    catalog: Arc<LocalCatalog>,
    hosts: Mutex<BTreeMap<VolumeId, Arc<Mutex<FakeHost>>>>,
    /// The store cannot be reached.
    away: AtomicBool,
    /// The next operation is refused at this change; 0 for none.
    fail_at: AtomicU64,
    /// The cluster around it; an error while its API server does not answer.
    cluster: Mutex<std::result::Result<Option<String>, ()>>,
    /// What the settings say of deletions.
    delete_grace: Mutex<Option<Duration>>,
}

/// A lock that a panic of the model's own checks must not hide behind another.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Model {
    /// Nothing in the store, and nothing on the node.
    pub fn new() -> Model {
        // Journals are synced: memory keeps that quick.
        let dir = tempfile::Builder::new().prefix("model").tempdir_in("/dev/shm").expect("/dev/shm is there");
        let url: StorageUrl =
            format!("file://{}", dir.path().join("store").display()).parse().expect("a store's address");
        let catalog = Arc::new(LocalCatalog::new(url).expect("a folder"));
        Model(Arc::new(Inner {
            dir,
            catalog,
            hosts: Mutex::default(),
            away: AtomicBool::new(false),
            fail_at: AtomicU64::new(0),
            cluster: Mutex::new(Ok(None)),
            delete_grace: Mutex::default(),
        }))
    }

    /// A driver on it that serves everything.
    pub fn driver(&self) -> Arc<Driver> {
        let config = Config {
            node_id: NODE.into(),
            role: Role::All,
            max_volumes: None,
            made: Default::default(),
            nodes: ["n2".to_owned()].into(),
            run_dir: self.run_dir(),
            node_local: false,
        };
        Driver::new(config, Box::new(self.clone()))
    }

    /// Where the journals are.
    pub fn run_dir(&self) -> PathBuf {
        self.0.dir.path().join("run")
    }

    /// Everything that a call could change, as text: what is on the node, and every record.
    pub fn state(&self) -> String {
        let records: Vec<_> = self
            .records()
            .iter()
            .map(|id| self.catalog().get(id).expect("it reads").map(|(record, _)| record))
            .collect();
        format!("{:#?}\n{records:#?}", self.on_node())
    }

    /// The store answers no more, or again.
    pub fn away(&self, away: bool) {
        self.0.away.store(away, Ordering::Relaxed);
    }

    /// Lets the `n`th change of the next operation fail; 0 for none.
    pub fn fail_at(&self, n: u64) {
        self.0.fail_at.store(n, Ordering::Relaxed);
    }

    /// Puts a cluster around it, whose API server answers or not.
    pub fn in_cluster(&self, cluster: std::result::Result<Option<&str>, ()>) {
        *locked(&self.0.cluster) = cluster.map(|uid| uid.map(str::to_owned));
    }

    /// Sets the grace period of the settings.
    pub fn delete_grace(&self, grace: Option<Duration>) {
        *locked(&self.0.delete_grace) = grace;
    }

    /// The store's folder.
    pub fn store(&self) -> PathBuf {
        self.0.dir.path().join("store")
    }

    /// The catalog itself.
    pub fn catalog(&self) -> &LocalCatalog {
        &self.0.catalog
    }

    /// What is on the node: of each volume that has anything there, what that is.
    pub fn on_node(&self) -> BTreeMap<VolumeId, Vec<&'static str>> {
        let mut found: BTreeMap<VolumeId, Vec<&'static str>> = BTreeMap::new();
        for (volume, host) in locked(&self.0.hosts).iter() {
            let left = locked(host).leftovers();
            if !left.is_empty() {
                found.insert(volume.clone(), left);
            }
        }
        for volume in journal::volumes(&self.run_dir()).expect("the run folder reads") {
            found.entry(volume).or_default().push("journal");
        }
        found
    }

    /// The ids of all records.
    pub fn records(&self) -> Vec<VolumeId> {
        let mut all: Vec<_> = self.0.catalog.list().map(|id| id.expect("a name")).collect();
        all.sort();
        all
    }

    fn host(&self, volume: &VolumeId) -> Arc<Mutex<FakeHost>> {
        locked(&self.0.hosts).entry(volume.clone()).or_default().clone()
    }

    /// The model keeps claims to itself; the catalog is to tell of them, as the real host's does.
    fn record(&self, volume: &VolumeId, host: &FakeHost) -> Result<()> {
        let Some((mut record, tag)) = self.0.catalog.get(volume)? else { return Ok(()) };
        match host.claim(volume)? {
            Some(claim) => {
                record.epoch = claim.epoch;
                record.capacity = claim.capacity.unwrap_or(record.capacity);
                record.content = claim.content;
                record.owner.get_or_insert_with(|| Owner {
                    node: NODE.into(),
                    machine_id: String::new(),
                    boot_id: String::new(),
                    instance: String::new(),
                    state_dir: "/s".into(),
                    run_dir: "/r".into(),
                    since: jiff::Timestamp::UNIX_EPOCH,
                });
            }
            None => record.owner = None,
        }
        let _ = self.0.catalog.update(&record, &tag)?;
        Ok(())
    }

    fn reachable(&self) -> Result<()> {
        if self.0.away.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::Unreachable, "the store does not answer").hint("look at the store"));
        }
        Ok(())
    }
}

impl Backend for Model {
    fn with_host(
        &self,
        volume: &VolumeId,
        need: Need,
        work: &mut dyn FnMut(&dyn Host) -> Result<()>,
    ) -> Result<()> {
        if need != Need::Settle {
            self.reachable()?;
        }
        let record = self.0.catalog.get(volume)?.map(|(record, _)| record);
        let host = self.host(volume);
        let mut host = locked(&host);
        // Deleted since, and perhaps made anew: no node ever had the one of the record.
        if record.as_ref().is_none_or(|record| record.epoch == 0) && host.leftovers().is_empty() {
            *host = FakeHost::new();
        }
        if let Some(record) = record {
            host.know(record.capacity, record.filesystem, record.content, record.epoch);
        }
        let fail_at = self.0.fail_at.swap(0, Ordering::Relaxed);
        host.fail_at((fail_at > 0).then(|| fail_at - 1));
        let result = work(&*host);
        host.fail_at(None);
        self.record(volume, &host)?;
        result
    }

    fn catalog(&self) -> Result<Arc<dyn Catalog>> {
        self.reachable()?;
        Ok(self.0.catalog.clone())
    }

    fn objects(&self) -> Result<Arc<dyn Objects>> {
        self.reachable()?;
        Ok(Arc::new(LocalObjects::new(self.0.catalog.url())?))
    }

    fn cluster(&self) -> Result<Option<String>> {
        locked(&self.0.cluster).clone().map_err(|()| {
            Error::new(Kind::Unreachable, "the API server does not answer").hint("look at the API server")
        })
    }

    fn delete_grace(&self) -> Result<Option<Duration>> {
        Ok(*locked(&self.0.delete_grace))
    }

    fn probe(&self, _: Role) -> Result<()> {
        self.reachable()
    }
}

/// A call with what it says.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    CreateVolume(CreateVolumeRequest),
    DeleteVolume(DeleteVolumeRequest),
    ControllerPublishVolume(ControllerPublishVolumeRequest),
    ControllerUnpublishVolume(ControllerUnpublishVolumeRequest),
    ValidateVolumeCapabilities(ValidateVolumeCapabilitiesRequest),
    ListVolumes(ListVolumesRequest),
    ControllerGetVolume(ControllerGetVolumeRequest),
    ControllerExpandVolume(ControllerExpandVolumeRequest),
    ControllerModifyVolume(ControllerModifyVolumeRequest),
    NodeStageVolume(NodeStageVolumeRequest),
    NodeUnstageVolume(NodeUnstageVolumeRequest),
    NodePublishVolume(NodePublishVolumeRequest),
    NodeUnpublishVolume(NodeUnpublishVolumeRequest),
    NodeGetVolumeStats(NodeGetVolumeStatsRequest),
    NodeExpandVolume(NodeExpandVolumeRequest),
}

impl Ask {
    /// Asks the services of a driver, as the transport does, but without one.
    pub async fn ask(&self, driver: &Arc<Driver>) -> std::result::Result<(), Status> {
        let (c, n) = (ControllerService(driver.clone()), NodeService(driver.clone()));
        fn done<T>(_: tonic::Response<T>) {}
        macro_rules! ask {
            ($service:ident.$call:ident($request:ident)) => {
                $service.$call(tonic::Request::new($request.clone())).await.map(done)
            };
        }
        match self {
            Ask::CreateVolume(r) => ask!(c.create_volume(r)),
            Ask::DeleteVolume(r) => ask!(c.delete_volume(r)),
            Ask::ControllerPublishVolume(r) => ask!(c.controller_publish_volume(r)),
            Ask::ControllerUnpublishVolume(r) => ask!(c.controller_unpublish_volume(r)),
            Ask::ValidateVolumeCapabilities(r) => ask!(c.validate_volume_capabilities(r)),
            Ask::ListVolumes(r) => ask!(c.list_volumes(r)),
            Ask::ControllerGetVolume(r) => ask!(c.controller_get_volume(r)),
            Ask::ControllerExpandVolume(r) => ask!(c.controller_expand_volume(r)),
            Ask::ControllerModifyVolume(r) => ask!(c.controller_modify_volume(r)),
            Ask::NodeStageVolume(r) => ask!(n.node_stage_volume(r)),
            Ask::NodeUnstageVolume(r) => ask!(n.node_unstage_volume(r)),
            Ask::NodePublishVolume(r) => ask!(n.node_publish_volume(r)),
            Ask::NodeUnpublishVolume(r) => ask!(n.node_unpublish_volume(r)),
            Ask::NodeGetVolumeStats(r) => ask!(n.node_get_volume_stats(r)),
            Ask::NodeExpandVolume(r) => ask!(n.node_expand_volume(r)),
        }
    }
}

/// A runtime for the calls of a test.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}
