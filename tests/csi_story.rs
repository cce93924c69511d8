//! What an orchestrator does with the driver, told over its socket with the built program, the real ZeroFS and real
//! devices: the life of a volume, several pods, raw devices, refusals, a driver that is killed, stopped and doubled.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::cli::{Node, Victim, pattern, write_durably};
use support::csi::{Client, Driver, Mode, block, command, mount, refused};
use support::wait_until;
use tonic::Code;
use zerofsctl::csi::proto::volume_usage::Unit;
use zerofsctl::csi::proto::{CreateVolumeRequest, VolumeCapability, volume_capability};

const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;
const RWO: Mode = Mode::SingleNodeWriter;

/// The folders that a kubelet makes for a volume and one pod.
struct Paths {
    staging: PathBuf,
    pods: PathBuf,
}

impl Paths {
    fn new(node: &Node, volume: &str) -> Paths {
        let staging = node.dir.join(format!("kubelet/staging/{volume}"));
        let pods = node.dir.join(format!("kubelet/pods/{volume}"));
        for folder in [&staging, &pods] {
            fs::create_dir_all(folder).unwrap();
        }
        Paths { staging, pods }
    }

    fn pod(&self, name: &str) -> PathBuf {
        self.pods.join(name)
    }
}

fn mounted(path: &Path) -> bool {
    let table = zerofsctl::host::mounts::table("self").expect("the mount table reads");
    zerofsctl::host::mounts::at(&table, path).is_some()
}

fn scrape(driver: &Driver, path: &str) -> (u16, String) {
    let answer = support::http::request(driver.metrics(), "GET", path, b"", Duration::from_secs(30)).unwrap();
    (answer.status, String::from_utf8(answer.body).unwrap())
}

#[test]
fn root_the_life_of_a_volume() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let mode = fs::metadata(&driver.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let client = driver.client();
    assert_eq!(client.probe().unwrap().ready, Some(true));
    let info = client.info().unwrap();
    assert_eq!(info.node_id, "n1");
    assert_eq!(info.accessible_topology.unwrap().segments["topology.zerofs.csi.driver/node"], "n1");

    // Which grows while it is mounted even where CAP_SYS_RESOURCE is missing, as in some containers.
    let data = [("deleteDataOnPVCDelete", "true"), ("mountOptions", "noatime"), ("filesystem", "xfs")];
    let made = client.create_plain("vol1", 300 * MIB + 1, &data).unwrap();
    assert_eq!((made.volume_id.as_str(), made.capacity_bytes), ("vol1", 300 * MIB + 4096));
    assert_eq!(client.create_plain("vol1", 300 * MIB + 1, &data).unwrap(), made);
    refused(client.create_plain("vol1", GIB, &data), Code::AlreadyExists, &["vol1"]);
    refused(client.create_plain("vol1", 300 * MIB + 1, &[]), Code::AlreadyExists, &["parameters"]);
    // Whose name is the beginning of another's.
    client.create_plain("vol10", 64 * MIB, &data).unwrap();

    let paths = Paths::new(&node, "vol1");
    let (staging, a, b) = (&paths.staging, paths.pod("a"), paths.pod("b"));
    let context = client.controller_publish("vol1", "n1", mount(RWO), false).unwrap();
    assert_eq!(context["readOnly"], "false");
    client.controller_publish("vol1", "n1", mount(RWO), false).unwrap();
    refused(client.controller_publish("vol1", "n1", mount(RWO), true), Code::AlreadyExists, &["read-write"]);
    refused(client.controller_publish("vol1", "n9", mount(RWO), false), Code::NotFound, &["n9"]);
    refused(
        client.publish("vol1", staging, &a, mount(RWO), false),
        Code::FailedPrecondition,
        &["not staged"],
    );
    client.stage("vol1", staging, mount(RWO)).unwrap();
    client.stage("vol1", staging, mount(RWO)).unwrap();
    refused(client.delete("vol1"), Code::FailedPrecondition, &["vol1"]);
    refused(client.controller_unpublish("vol1", "n1"), Code::FailedPrecondition, &["staged"]);

    for _ in 0..2 {
        client.publish("vol1", staging, &a, mount(RWO), false).unwrap();
        client.publish("vol1", staging, &b, mount(RWO), true).unwrap();
    }
    write_durably(&a.join("data"), b"hello");
    assert_eq!(fs::read(b.join("data")).unwrap(), b"hello");
    assert_eq!(File::create(b.join("x")).unwrap_err().raw_os_error(), Some(libc::EROFS));
    refused(client.publish("vol1", staging, &b, mount(RWO), false), Code::AlreadyExists, &["read-only"]);
    let alone = mount(Mode::SingleNodeSingleWriter);
    refused(
        client.publish("vol1", staging, &paths.pod("c"), alone, false),
        Code::FailedPrecondition,
        &["published at"],
    );
    refused(client.unstage("vol1", staging), Code::FailedPrecondition, &["published at"]);

    let stats = client.stats("vol1", &a).unwrap();
    assert!(!stats.volume_condition.unwrap().abnormal);
    let units: Vec<i32> = stats.usage.iter().map(|u| u.unit).collect();
    assert_eq!(units, [Unit::Bytes as i32, Unit::Inodes as i32]);
    let before = stats.usage[0].total;
    refused(client.stats("vol1", &paths.pod("nobody")), Code::NotFound, &["nobody"]);
    refused(client.stats("vol9", &a), Code::NotFound, &["vol9"]);

    let grown = client.controller_expand("vol1", 600 * MIB).unwrap();
    assert_eq!((grown.capacity_bytes, grown.node_expansion_required), (600 * MIB, true));
    for _ in 0..2 {
        assert_eq!(client.expand("vol1", &a, 0).unwrap().capacity_bytes, 600 * MIB);
    }
    assert!(client.stats("vol1", &a).unwrap().usage[0].total > before + 200 * MIB);
    assert_eq!(client.get("vol1").unwrap().status.unwrap().published_node_ids, ["n1"]);

    let (status, text) = scrape(&driver, "/metrics");
    assert_eq!(status, 200);
    let done = "zerofs_csi_node_operation_seconds_count{operation=\"NodeStageVolume\",stage=\"mount\"} 2";
    assert!(text.lines().any(|l| l == done), "{text}");
    assert_eq!(scrape(&driver, "/readyz").0, 200);
    assert_eq!(scrape(&driver, "/healthz").0, 200);

    for _ in 0..2 {
        client.unpublish("vol1", &a).unwrap();
        assert!(!a.exists() && b.join("data").exists(), "one pod's end is not another's");
    }
    client.unpublish("vol1", &b).unwrap();
    for _ in 0..2 {
        client.unstage("vol1", staging).unwrap();
        assert!(staging.exists() && !mounted(staging), "the staging folder is the kubelet's");
    }
    // A late one for another node changes nothing.
    client.controller_unpublish("vol1", "n2").unwrap();
    assert_eq!(client.get("vol1").unwrap().status.unwrap().published_node_ids, ["n1"]);
    for _ in 0..2 {
        client.controller_unpublish("vol1", "n1").unwrap();
    }
    for _ in 0..2 {
        client.delete("vol1").unwrap();
    }
    assert!(!node.state().join("store/vol1").exists());
    let left: Vec<String> =
        client.list(0, "").unwrap().entries.into_iter().map(|e| e.volume.unwrap().volume_id).collect();
    assert_eq!(left, ["vol10"]);
    client.delete("vol10").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after the life of a volume");
}

#[test]
fn root_a_raw_device_is_a_file_in_each_pod() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    let raw = || block(RWO);
    let made = client.create(CreateVolumeRequest {
        name: "raw".into(),
        capacity_range: support::csi::at_least(32 * MIB),
        volume_capabilities: vec![raw()],
        parameters: support::csi::parameters(&[("deleteDataOnPVCDelete", "true")]),
        ..Default::default()
    });
    assert_eq!(made.unwrap().capacity_bytes, 32 * MIB);
    let paths = Paths::new(&node, "raw");
    let a = paths.pod("a");
    refused(client.stage("raw", &paths.staging, mount(RWO)), Code::InvalidArgument, &["raw device"]);
    for _ in 0..2 {
        client.stage("raw", &paths.staging, raw()).unwrap();
    }
    for _ in 0..2 {
        client.publish("raw", &paths.staging, &a, raw(), false).unwrap();
    }
    refused(
        client.publish("raw", &paths.staging, &paths.pod("b"), raw(), true),
        Code::FailedPrecondition,
        &["read-only"],
    );
    assert!(!paths.pod("b").exists(), "what was refused leaves nothing");
    assert!(fs::metadata(&a).unwrap().file_type().is_block_device());
    let bytes = pattern(7, MIB as usize);
    let mut file = File::options().write(true).open(&a).unwrap();
    file.write_all(&bytes).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let stats = client.stats("raw", &a).unwrap();
    assert_eq!((stats.usage.len(), stats.usage[0].total), (1, 32 * MIB));
    assert_eq!(client.expand("raw", &a, 64 * MIB).unwrap().capacity_bytes, 64 * MIB);
    client.unpublish("raw", &a).unwrap();
    assert!(!a.exists());
    client.unstage("raw", &paths.staging).unwrap();
    client.stage("raw", &paths.staging, raw()).unwrap();
    client.publish("raw", &paths.staging, &a, raw(), false).unwrap();
    let mut read = vec![0; bytes.len()];
    File::open(&a).unwrap().read_exact(&mut read).unwrap();
    assert!(read == bytes, "the bytes are there after another stage");
    client.unpublish("raw", &a).unwrap();
    client.unstage("raw", &paths.staging).unwrap();
    client.delete("raw").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after a raw device");
}

/// Writes and reads back until told to stop; every error counts.
fn busy(file: PathBuf, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut round = 0;
        while !stop.load(Ordering::Relaxed) {
            let bytes = pattern(round, 256 * 1024);
            write_durably(&file, &bytes);
            assert!(fs::read(&file).unwrap() == bytes, "round {round}");
            round += 1;
        }
        round
    })
}

#[test]
fn root_a_killed_driver_interrupts_no_io_and_the_next_one_goes_on() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    client.create_plain("v", 128 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    let paths = Paths::new(&node, "v");
    let a = paths.pod("a");
    client.stage("v", &paths.staging, mount(RWO)).unwrap();
    client.publish("v", &paths.staging, &a, mount(RWO), false).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let work = busy(a.join("data"), stop.clone());
    driver.kill();
    std::thread::sleep(Duration::from_millis(300));
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    // All of it is known to the next one, and a second one of the same node is refused.
    client.publish("v", &paths.staging, &a, mount(RWO), false).unwrap();
    assert!(!client.stats("v", &a).unwrap().volume_condition.unwrap().abnormal);
    let (mut second, _) = command(&node, &[]);
    support::cli::Answer::of(&mut second).expect_error(11, &["another driver"]);
    assert!(driver.stop().success());
    std::thread::sleep(Duration::from_millis(200));
    stop.store(true, Ordering::Relaxed);
    assert!(work.join().expect("no I/O failed") > 0);
    assert!(mounted(&a), "a stop leaves what is mounted");
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    client.unpublish("v", &a).unwrap();
    client.unstage("v", &paths.staging).unwrap();
    client.delete("v").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after three drivers");
}

#[test]
fn root_a_killed_keeper_is_seen_and_the_volume_is_brought_back() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    client.create_plain("v", 128 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    let paths = Paths::new(&node, "v");
    let a = paths.pod("a");
    client.stage("v", &paths.staging, mount(RWO)).unwrap();
    client.publish("v", &paths.staging, &a, mount(RWO), false).unwrap();
    write_durably(&a.join("data"), b"kept");
    node.kill(Victim::Keeper);
    wait_until("the volume is back", Duration::from_secs(90), || {
        fs::read(a.join("data")).is_ok_and(|bytes| bytes == b"kept")
            && client.stats("v", &a).is_ok_and(|s| !s.volume_condition.unwrap().abnormal)
    });
    client.unpublish("v", &a).unwrap();
    client.unstage("v", &paths.staging).unwrap();
    client.delete("v").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after a killed keeper");
}

#[test]
fn root_the_retry_of_a_call_that_ran_out_of_time_finds_its_work() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    client.create_plain("v", 64 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    let paths = Paths::new(&node, "v");
    // No ZeroFS starts in so little time.
    let limit = Duration::from_millis(30);
    let late = client.stage_within("v", &paths.staging, mount(RWO), limit).unwrap_err();
    assert!(matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled), "{late:?}");
    // Its work goes on, and this waits for it.
    client.stage("v", &paths.staging, mount(RWO)).unwrap();
    assert!(mounted(&paths.staging));
    let (_, text) = scrape(&driver, "/metrics");
    let once = "zerofs_csi_node_operation_seconds_count{operation=\"NodeStageVolume\",stage=\"start\"} 1";
    assert!(text.lines().any(|l| l == once), "the work was done twice:\n{text}");
    client.unstage("v", &paths.staging).unwrap();
    client.delete("v").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after a deadline");
}

#[test]
fn root_data_is_kept_unless_its_class_says_otherwise() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    let made = client.create_plain("keep", 64 * MIB, &[]).unwrap();
    let paths = Paths::new(&node, "keep");
    client.stage("keep", &paths.staging, mount(RWO)).unwrap();
    client.unstage("keep", &paths.staging).unwrap();
    for _ in 0..2 {
        client.delete("keep").unwrap();
    }
    assert!(node.state().join("store/keep").exists());
    assert!(client.list(0, "").unwrap().entries.is_empty());
    refused(client.get("keep"), Code::NotFound, &["keep"]);
    refused(client.create_plain("keep", 64 * MIB, &[]), Code::AlreadyExists, &["data kept"]);
    assert_eq!(made.volume_id, "keep");
    // One that nobody ever started leaves no record behind.
    client.create_plain("unused", 64 * MIB, &[]).unwrap();
    client.delete("unused").unwrap();
    assert_eq!(node.json(&["list"]).as_array().map(Vec::len), Some(1));
    assert!(driver.stop().success());
}

#[test]
fn root_settings_of_its_own_and_a_group_of_its_own() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    client.create_plain("v", 128 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    refused(client.modify("v", &[("storageURL", "s3://x")]), Code::InvalidArgument, &["storageURL"]);
    refused(client.modify("nobody", &[("rustLog", "info")]), Code::NotFound, &["nobody"]);
    client.modify("v", &[("cacheMemorySizeGB", "0.25"), ("rustLog", "warn")]).unwrap();
    let paths = Paths::new(&node, "v");
    let a = paths.pod("a");
    client.stage("v", &paths.staging, mount(RWO)).unwrap();
    let config = fs::read_to_string(node.state().join("volumes/v/config.toml")).unwrap();
    assert!(config.contains("memory_size_gb = 0.25"), "its own setting counts");
    let group = VolumeCapability {
        access_type: Some(volume_capability::AccessType::Mount(volume_capability::MountVolume {
            volume_mount_group: "4711".into(),
            ..Default::default()
        })),
        ..mount(RWO)
    };
    client.publish("v", &paths.staging, &a, group, false).unwrap();
    let meta = fs::metadata(&a).unwrap();
    assert_eq!((meta.gid(), meta.mode() & 0o2070), (4711, 0o2070));
    client.unpublish("v", &a).unwrap();
    client.unstage("v", &paths.staging).unwrap();
    client.delete("v").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after settings of its own");
}

#[test]
fn root_pages_hold_every_volume_once() {
    let node = Node::new();
    let driver = Driver::start(&node, &["--max-volumes", "2"]);
    let client = driver.client();
    let names: Vec<String> = (0..5).map(|n| format!("v{n}")).collect();
    for name in &names {
        client.create_plain(name, 64 * MIB, &[]).unwrap();
    }
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let page = client.list(2, &token).unwrap();
        assert!(page.entries.len() <= 2);
        seen.extend(page.entries.into_iter().map(|e| e.volume.unwrap().volume_id));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, names);
    refused(client.list(2, "never given"), Code::Aborted, &["starting_token"]);
    refused(client.list(-1, ""), Code::InvalidArgument, &["max_entries"]);
    // The limit of the node holds at the controller, too.
    assert_eq!(client.info().unwrap().max_volumes_per_node, 2);
    for name in &names[..2] {
        client.controller_publish(name, "n1", mount(RWO), false).unwrap();
    }
    refused(client.controller_publish("v2", "n1", mount(RWO), false), Code::ResourceExhausted, &["limit"]);
    for name in &names[..2] {
        client.controller_unpublish(name, "n1").unwrap();
    }
    let answer = client.validate("v0", mount(Mode::MultiNodeMultiWriter)).unwrap();
    assert!(answer.confirmed.is_none() && answer.message.contains("MULTI_NODE_MULTI_WRITER"), "{answer:?}");
    assert!(client.validate("v0", mount(RWO)).unwrap().confirmed.is_some());
    assert!(client.validate("v0", block(RWO)).unwrap().confirmed.is_none());
    refused(client.validate("nobody", mount(RWO)), Code::NotFound, &["nobody"]);
    for name in &names {
        client.delete(name).unwrap();
    }
    assert!(driver.stop().success());
    node.assert_nothing_left("after pages");
}

#[test]
fn root_a_driver_without_a_node_role_serves_no_node_calls() {
    let node = Node::new();
    let driver = Driver::start(&node, &["--role", "controller"]);
    let client: Client = driver.client();
    assert_eq!(client.info().unwrap_err().code(), Code::Unimplemented);
    client.create_plain("v", 64 * MIB, &[]).unwrap();
    client.controller_publish("v", "far-away", mount(RWO), false).unwrap();
    refused(client.controller_publish("v", "b", mount(RWO), false), Code::FailedPrecondition, &["far-away"]);
    client.controller_unpublish("v", "").unwrap();
    client.delete("v").unwrap();
    assert!(driver.stop().success());
}
