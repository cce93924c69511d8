//! The driver as an orchestrator sees it: the built program serving on a socket of a test's node, and a client that
//! says things in order.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::transport::Channel;
use tonic::{Code, Status};
use zerofsctl::csi::proto::controller_client::ControllerClient;
use zerofsctl::csi::proto::identity_client::IdentityClient;
use zerofsctl::csi::proto::node_client::NodeClient;
use zerofsctl::csi::proto::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use zerofsctl::csi::proto::*;

pub use zerofsctl::csi::proto::volume_capability::access_mode::Mode;

use super::cli::Node;
use super::wait_until;

/// How long a call may take before the test gives up: a generous limit against hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// A driver that runs.
pub struct Driver {
    child: Child,
    /// Its socket.
    pub socket: PathBuf,
    log: PathBuf,
    /// How much its predecessors of the same node had said.
    before: usize,
}

/// The words with which a driver is started, and its socket.
pub fn words(node: &Node, more: &[&str]) -> (Vec<String>, PathBuf) {
    let socket = node.dir.join("csi.sock");
    let endpoint = format!("unix://{}", socket.display());
    let mut words = vec!["csi", "serve", "--endpoint", &endpoint, "--metrics-bind-address", "127.0.0.1:0"];
    if !more.contains(&"--node-id") {
        words.extend(["--node-id", "n1"]);
    }
    words.extend(more);
    (words.into_iter().map(str::to_owned).collect(), socket)
}

/// The command that starts a driver, and its socket.
pub fn command(node: &Node, more: &[&str]) -> (Command, PathBuf) {
    let (words, socket) = words(node, more);
    let mut command = node.command(&words);
    for name in ["CSI_ENDPOINT", "METRICS_BIND_ADDRESS"] {
        command.env_remove(name);
    }
    (command, socket)
}

impl Driver {
    /// Starts one and waits until it serves.
    #[track_caller]
    pub fn start(node: &Node, more: &[&str]) -> Driver {
        let (command, socket) = command(node, more);
        Driver::spawn(command, socket, node)
    }

    /// The same, by a command of the test's own.
    #[track_caller]
    pub fn spawn(mut command: Command, socket: PathBuf, node: &Node) -> Driver {
        let log = node.dir.join("csi.log");
        let file = File::options().create(true).append(true).open(&log).expect("the log opens");
        let before = fs::read_to_string(&log).expect("the log can be read").len();
        let child =
            command.stdout(file.try_clone().unwrap()).stderr(file).spawn().expect("the driver starts");
        let mut driver = Driver { child, socket, log, before };
        let mut ended = None;
        wait_until("the driver serves", LIMIT, || {
            ended = driver.child.try_wait().expect("it is our child");
            ended.is_some() || UnixStream::connect(&driver.socket).is_ok()
        });
        assert!(ended.is_none(), "the driver ended with {ended:?}:\n{}", driver.log());
        driver
    }

    /// What it said so far, and what its predecessors of the same node said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Kills it at once.
    pub fn kill(mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }

    /// Asks it to stop, and waits for that.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM).expect("it can be signalled");
        let mut ended = None;
        wait_until("the driver stops", Duration::from_secs(150), || {
            ended = self.child.try_wait().expect("it is our child");
            ended.is_some()
        });
        ended.expect("it was waited for")
    }

    /// The address of its metrics, out of its log.
    pub fn metrics(&self) -> std::net::SocketAddr {
        let mut found = None;
        wait_until("the driver tells its metrics' address", LIMIT, || {
            let log = self.log();
            let at = log[self.before..].split_once("metrics on http://");
            found = at.and_then(|(_, rest)| rest.split("/metrics").next()?.parse().ok());
            found.is_some()
        });
        found.expect("it was waited for")
    }

    /// A client of its own connection.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::connect(&self.socket)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the driver's log:\n{}", self.log());
        }
    }
}

/// An orchestrator.
pub struct Client {
    runtime: tokio::runtime::Runtime,
    /// For calls that this has no word for.
    pub channel: Channel,
    /// The deadline of each call.
    pub limit: Duration,
}

/// How a volume is wanted.
pub fn mount(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode as i32 }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

/// The same, raw.
pub fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode as i32 }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

/// At least so many bytes.
pub fn at_least(bytes: i64) -> Option<CapacityRange> {
    Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 })
}

/// Parameters of a StorageClass.
pub fn parameters(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn text(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

macro_rules! ask {
    ($self:ident, $client:ident, $call:ident, $request:expr) => {{
        let mut client = $client::new($self.channel.clone());
        let request = tonic::Request::new($request);
        $self.runtime.block_on(async {
            match tokio::time::timeout($self.limit, client.$call(request)).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::new(Code::DeadlineExceeded, "the test gave up")),
            }
        })
    }};
}

impl Client {
    /// Connects to a socket.
    #[track_caller]
    pub fn connect(socket: &Path) -> Client {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let address = format!("unix://{}", socket.display());
        let endpoint = tonic::transport::Endpoint::from_shared(address).expect("an address");
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Client { runtime, channel, limit: LIMIT }
    }

    /// Runs anything on the client's runtime.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Identity: Probe.
    pub fn probe(&self) -> Result<ProbeResponse, Status> {
        ask!(self, IdentityClient, probe, ProbeRequest {})
    }

    /// Controller: CreateVolume.
    pub fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        ask!(self, ControllerClient, create_volume, request).map(|r| r.volume.expect("a volume"))
    }

    /// A filesystem volume of at least that size.
    pub fn create_plain(&self, name: &str, bytes: i64, pairs: &[(&str, &str)]) -> Result<Volume, Status> {
        self.create(CreateVolumeRequest {
            name: name.into(),
            capacity_range: at_least(bytes),
            volume_capabilities: vec![mount(Mode::SingleNodeWriter)],
            parameters: parameters(pairs),
            ..Default::default()
        })
    }

    /// Controller: DeleteVolume.
    pub fn delete(&self, volume: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest { volume_id: volume.into(), ..Default::default() };
        ask!(self, ControllerClient, delete_volume, request).map(drop)
    }

    /// Controller: ControllerPublishVolume.
    pub fn controller_publish(
        &self,
        volume: &str,
        node: &str,
        capability: VolumeCapability,
        readonly: bool,
    ) -> Result<BTreeMap<String, String>, Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: volume.into(),
            node_id: node.into(),
            volume_capability: Some(capability),
            readonly,
            ..Default::default()
        };
        ask!(self, ControllerClient, controller_publish_volume, request).map(|r| r.publish_context)
    }

    /// Controller: ControllerUnpublishVolume.
    pub fn controller_unpublish(&self, volume: &str, node: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: volume.into(),
            node_id: node.into(),
            ..Default::default()
        };
        ask!(self, ControllerClient, controller_unpublish_volume, request).map(drop)
    }

    /// Controller: ControllerExpandVolume.
    pub fn controller_expand(
        &self,
        volume: &str,
        bytes: i64,
    ) -> Result<ControllerExpandVolumeResponse, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: volume.into(),
            capacity_range: at_least(bytes),
            ..Default::default()
        };
        ask!(self, ControllerClient, controller_expand_volume, request)
    }

    /// Controller: ControllerModifyVolume.
    pub fn modify(&self, volume: &str, pairs: &[(&str, &str)]) -> Result<(), Status> {
        let request = ControllerModifyVolumeRequest {
            volume_id: volume.into(),
            mutable_parameters: parameters(pairs),
            ..Default::default()
        };
        ask!(self, ControllerClient, controller_modify_volume, request).map(drop)
    }

    /// Controller: ControllerGetVolume.
    pub fn get(&self, volume: &str) -> Result<ControllerGetVolumeResponse, Status> {
        let request = ControllerGetVolumeRequest { volume_id: volume.into() };
        ask!(self, ControllerClient, controller_get_volume, request)
    }

    /// Controller: ListVolumes.
    pub fn list(&self, max_entries: i32, token: &str) -> Result<ListVolumesResponse, Status> {
        let request = ListVolumesRequest { max_entries, starting_token: token.into() };
        ask!(self, ControllerClient, list_volumes, request)
    }

    /// Controller: ValidateVolumeCapabilities.
    pub fn validate(
        &self,
        volume: &str,
        capability: VolumeCapability,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: volume.into(),
            volume_capabilities: vec![capability],
            ..Default::default()
        };
        ask!(self, ControllerClient, validate_volume_capabilities, request)
    }

    /// Node: NodeGetInfo.
    pub fn info(&self) -> Result<NodeGetInfoResponse, Status> {
        ask!(self, NodeClient, node_get_info, NodeGetInfoRequest {})
    }

    /// Node: NodeStageVolume.
    pub fn stage(&self, volume: &str, at: &Path, capability: VolumeCapability) -> Result<(), Status> {
        let request = NodeStageVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: text(at),
            volume_capability: Some(capability),
            ..Default::default()
        };
        ask!(self, NodeClient, node_stage_volume, request).map(drop)
    }

    /// NodeStageVolume with a deadline, as a kubelet sets one.
    pub fn stage_within(
        &self,
        volume: &str,
        at: &Path,
        capability: VolumeCapability,
        limit: Duration,
    ) -> Result<(), Status> {
        let mut request = tonic::Request::new(NodeStageVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: text(at),
            volume_capability: Some(capability),
            ..Default::default()
        });
        request.set_timeout(limit);
        let call = async { NodeClient::new(self.channel.clone()).node_stage_volume(request).await };
        self.block_on(call).map(drop)
    }

    /// Node: NodeUnstageVolume.
    pub fn unstage(&self, volume: &str, at: &Path) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest { volume_id: volume.into(), staging_target_path: text(at) };
        ask!(self, NodeClient, node_unstage_volume, request).map(drop)
    }

    /// Node: NodePublishVolume.
    pub fn publish(
        &self,
        volume: &str,
        staged: &Path,
        at: &Path,
        capability: VolumeCapability,
        readonly: bool,
    ) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: volume.into(),
            staging_target_path: text(staged),
            target_path: text(at),
            volume_capability: Some(capability),
            readonly,
            ..Default::default()
        };
        ask!(self, NodeClient, node_publish_volume, request).map(drop)
    }

    /// Node: NodeUnpublishVolume.
    pub fn unpublish(&self, volume: &str, at: &Path) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest { volume_id: volume.into(), target_path: text(at) };
        ask!(self, NodeClient, node_unpublish_volume, request).map(drop)
    }

    /// Node: NodeGetVolumeStats.
    pub fn stats(&self, volume: &str, at: &Path) -> Result<NodeGetVolumeStatsResponse, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.into(),
            volume_path: text(at),
            ..Default::default()
        };
        ask!(self, NodeClient, node_get_volume_stats, request)
    }

    /// Node: NodeExpandVolume.
    pub fn expand(&self, volume: &str, at: &Path, bytes: i64) -> Result<NodeExpandVolumeResponse, Status> {
        let request = NodeExpandVolumeRequest {
            volume_id: volume.into(),
            volume_path: text(at),
            capacity_range: (bytes > 0).then(|| at_least(bytes)).flatten(),
            ..Default::default()
        };
        ask!(self, NodeClient, node_expand_volume, request)
    }
}

/// Fails unless it was refused with this code and words, and with a hint.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("it must be refused");
    assert_eq!(status.code(), code, "{status:?}");
    for word in words {
        assert!(status.message().contains(word), "no {word:?} in {status:?}");
    }
    assert!(status.message().contains("hint: "), "no hint in {status:?}");
}
