//! The driver on NBD devices of the kernel: the life of a volume, and what a killed keeper and a killed driver are there: a
//! pause. Needs root and a kernel with the nbd module: scripts/vm-test runs it in the virtual machine.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::cli::{Node, Victim, assert_holds, pattern, write_durably};
use support::csi::{Client, Driver, Mode, block, mount, refused};
use support::watch::Watch;
use support::{is_long, wait_until};
use tonic::Code;
use zerofsctl::host::nbd::{self, sysfs};

const MIB: i64 = 1 << 20;
const RWO: Mode = Mode::SingleNodeWriter;
const NBD: [&str; 2] = ["--transport", "nbd"];

/// Long enough for any machine.
const LONG: Duration = Duration::from_secs(180);

/// A node with one volume, staged and in one pod.
struct Staged {
    node: Node,
    staging: PathBuf,
    pod: PathBuf,
}

impl Staged {
    #[track_caller]
    fn new(client: &Client, node: Node, fs: &str) -> Staged {
        let class = [("deleteDataOnPVCDelete", "true"), ("filesystem", fs)];
        client.create_plain("v", 300 * MIB, &class).unwrap();
        let (staging, pods) = (node.dir.join("kubelet/staging/v"), node.dir.join("kubelet/pods/v"));
        for folder in [&staging, &pods] {
            fs::create_dir_all(folder).unwrap();
        }
        client.stage("v", &staging, mount(RWO)).unwrap();
        let pod = pods.join("a");
        client.publish("v", &staging, &pod, mount(RWO), false).unwrap();
        Staged { node, staging, pod }
    }

    /// All of it backwards, with nothing left.
    #[track_caller]
    fn end(self, driver: Driver) {
        let client = driver.client();
        client.unpublish("v", &self.pod).unwrap();
        client.unstage("v", &self.staging).unwrap();
        client.delete("v").unwrap();
        assert!(driver.stop().success());
        self.node.assert_nothing_left("at the end");
    }

    fn reconnects(&self) -> u64 {
        self.node.found("v")["reconnects"].as_u64().unwrap_or(0)
    }

    /// Kills the keeper, and waits until the next one serves the device.
    #[track_caller]
    fn kill_keeper(&self, victim: Victim) {
        let before = self.reconnects();
        assert!(self.node.kill(victim));
        wait_until("the next keeper serves the device", LONG, || self.reconnects() > before);
    }
}

#[track_caller]
fn node() -> Node {
    let node = Node::new();
    nbd::ensure().expect("this test needs the nbd module: run it in the virtual machine, see scripts/vm");
    node
}

fn connected() -> usize {
    sysfs::all().unwrap().iter().filter(|d| d.connected).count()
}

fn is_well(client: &Client, pod: &Path) -> bool {
    client.stats("v", pod).is_ok_and(|s| !s.volume_condition.unwrap().abnormal)
}

/// The value of a series, once it has been scraped.
fn metric(driver: &Driver, series: &str) -> Option<f64> {
    let answer = support::http::request(driver.metrics(), "GET", "/metrics", b"", LONG).unwrap();
    let text = String::from_utf8(answer.body).unwrap();
    text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// Writes, syncs and reads back until it is told to stop; an error of any of them fails the test.
struct Work {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Work {
    fn start(file: PathBuf) -> Work {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::SeqCst) || rounds == 0 {
                let bytes = pattern(rounds, 128 * 1024);
                write_durably(&file, &bytes);
                assert!(fs::read(&file).unwrap() == bytes, "round {rounds}");
                rounds += 1;
            }
            rounds
        });
        Work { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("no I/O failed");
    }
}

#[test]
fn nbd_the_life_of_a_volume_that_csi_serves() {
    let node = node();
    let before = connected();
    let driver = Driver::start(&node, &NBD);
    let client = driver.client();
    assert_eq!(client.probe().unwrap().ready, Some(true));
    let limit = client.info().unwrap().max_volumes_per_node;
    assert_eq!(limit, i64::from(nbd::capacity().unwrap().limit));
    assert!(limit >= 16, "{limit}");

    let staged = Staged::new(&client, node, "ext4");
    assert_eq!(connected(), before + 1);
    let found = staged.node.found("v");
    assert_eq!((&found["transport"], &found["path"]), (&"nbd".into(), &"guarded".into()), "{found:#}");
    let bytes = pattern(1, MIB as usize);
    write_durably(&staged.pod.join("data"), &bytes);
    // Mounted, in a pod, and an ext4: the kernel must let us grow it.
    let size = |client: &Client| client.stats("v", &staged.pod).unwrap().usage[0].total;
    let small = size(&client);
    client.controller_expand("v", 600 * MIB).unwrap();
    assert_eq!(client.expand("v", &staged.pod, 0).unwrap().capacity_bytes, 600 * MIB);
    assert!(size(&client) > small + 200 * MIB);
    assert_holds(&staged.pod.join("data"), &bytes, "after the growth");

    // Judged when the driver starts.
    assert!(driver.stop().success());
    let driver = Driver::start(&staged.node, &NBD);
    let series = "zerofs_csi_nbd_devices{verdict=\"ours-in-use\"}";
    wait_until("the device is judged", LONG, || metric(&driver, series) == Some(1.0));
    refused(driver.client().unstage("v", &staged.staging), Code::FailedPrecondition, &["published at"]);
    staged.end(driver);
    assert_eq!(connected(), before);
}

#[test]
fn nbd_a_raw_device_that_csi_serves() {
    let node = node();
    let before = connected();
    let driver = Driver::start(&node, &NBD);
    let client = driver.client();
    client.create_plain("raw", 64 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    let (staging, pods) = (node.dir.join("staging"), node.dir.join("pods"));
    for folder in [&staging, &pods] {
        fs::create_dir_all(folder).unwrap();
    }
    // A volume that was made as a filesystem is none: the class decides.
    refused(client.stage("raw", &staging, block(RWO)), Code::InvalidArgument, &["filesystem"]);
    client.delete("raw").unwrap();
    client
        .create(zerofsctl::csi::proto::CreateVolumeRequest {
            name: "raw".into(),
            capacity_range: support::csi::at_least(64 * MIB),
            volume_capabilities: vec![block(RWO)],
            parameters: support::csi::parameters(&[("deleteDataOnPVCDelete", "true")]),
            ..Default::default()
        })
        .unwrap();
    client.stage("raw", &staging, block(RWO)).unwrap();
    let pod = pods.join("a");
    client.publish("raw", &staging, &pod, block(RWO), false).unwrap();
    let bytes = pattern(3, MIB as usize);
    write_durably(&pod, &bytes);
    // The pod's node goes on through another keeper: it is the same device.
    assert!(node.kill(Victim::Keeper));
    wait_until("the next keeper serves the device", LONG, || node.found("raw")["reconnects"] == 1);
    assert!(fs::read(&pod).unwrap()[..bytes.len()] == bytes);
    assert_eq!(client.expand("raw", &pod, 128 * MIB).unwrap().capacity_bytes, 128 * MIB);
    client.unpublish("raw", &pod).unwrap();
    client.unstage("raw", &staging).unwrap();
    client.delete("raw").unwrap();
    assert!(driver.stop().success());
    assert_eq!(connected(), before);
    node.assert_nothing_left("after a raw device");
}

#[test]
fn nbd_a_killed_keeper_is_a_pause_and_the_driver_starts_the_next_one() {
    let node = node();
    let before = connected();
    let driver = Driver::start(&node, &NBD);
    let client = driver.client();
    let staged = Staged::new(&client, node, "xfs");
    // The driver is the watcher of the node.
    staged.node.run(&["watch"]).expect_error(11, &["another watcher"]);
    let work = Work::start(staged.pod.join("data"));
    for victim in [Victim::Keeper, Victim::Keeper, Victim::Both, Victim::Keeper] {
        staged.kill_keeper(victim);
        // Calls meanwhile and afterwards work, too.
        client.publish("v", &staged.staging, &staged.pod, mount(RWO), false).unwrap();
    }
    wait_until("the volume is well", LONG, || is_well(&client, &staged.pod));
    work.stop();
    assert_eq!(connected(), before + 1, "the same device, and no other");
    wait_until("the take-overs are counted", LONG, || {
        metric(&driver, "zerofs_csi_recovered_volumes_total").is_some_and(|n| n >= 4.0)
            && metric(&driver, "zerofs_csi_reconnects_total").is_some_and(|n| n >= 4.0)
    });
    assert!(metric(&driver, "zerofs_csi_io_stall_seconds_total").unwrap() > 0.0);
    staged.end(driver);
    assert_eq!(connected(), before);
}

/// A crash of ZeroFS fails a device of the direct path for good. One pod leaves it at once, another one still holds it; the
/// driver comes back to it by itself, once it is free.
#[test]
fn nbd_a_failed_device_that_a_pod_holds_is_left_by_the_others_and_brought_back_when_it_is_free() {
    let node = node();
    let before = connected();
    let driver = Driver::start(&node, &[&NBD[..], &["--path", "direct"]].concat());
    let client = driver.client();
    let staged = Staged::new(&client, node, "ext4");
    let other = staged.pod.with_file_name("b");
    client.publish("v", &staged.staging, &other, mount(RWO), false).unwrap();
    let bytes = pattern(6, 1 << 20);
    write_durably(&other.join("data"), &bytes);
    let held = fs::File::open(other.join("data")).unwrap();
    assert!(staged.node.kill(Victim::Zerofs));
    let tried = |n| {
        let what = format!("the driver has tried {n} times");
        wait_until(&what, LONG, || driver.log().matches("cannot be settled").count() >= n);
    };
    tried(1);
    assert!(driver.log().contains("step disconnect: /dev/nbd"), "{}", driver.log());
    client.unpublish("v", &staged.pod).unwrap();
    assert!(!staged.pod.exists() && !is_well(&client, &other));
    if is_long() {
        // Once more, so that its own next try is all that is left to help.
        tried(2);
    }
    drop(held);
    wait_until("the volume is well", LONG, || is_well(&client, &other));
    assert_holds(&other.join("data"), &bytes, "on the new device");
    assert!(!staged.pod.exists(), "it was taken away");
    client.unpublish("v", &other).unwrap();
    staged.end(driver);
    assert_eq!(connected(), before);
}

#[test]
fn nbd_a_killed_driver_is_no_pause_and_the_next_one_finds_the_keeper_that_died_meanwhile() {
    let node = node();
    let before = connected();
    let driver = Driver::start(&node, &NBD);
    let staged = Staged::new(&driver.client(), node, "ext4");
    let work = Work::start(staged.pod.join("data"));
    driver.kill();
    std::thread::sleep(Duration::from_millis(300));
    // Now there is nobody: the kernel holds the I/O until the next driver comes.
    let reconnects = staged.reconnects();
    assert!(staged.node.kill(Victim::Keeper));
    assert_eq!(staged.node.found("v")["state"], "waiting");
    let driver = Driver::start(&staged.node, &NBD);
    wait_until("the next keeper serves the device", LONG, || staged.reconnects() > reconnects);
    assert!(driver.stop().success());

    // A watcher that was there first is enough, and is followed when it ends.
    let watch = Watch::start(&staged.node);
    let driver = Driver::start(&staged.node, &NBD);
    staged.kill_keeper(Victim::Keeper);
    watch.wait_for("took-over", 1);
    watch.stop();
    wait_until("the driver watches", LONG, || driver.log().contains("watching the keeper of 1 volume"));
    staged.kill_keeper(Victim::Both);
    let client = driver.client();
    wait_until("the volume is well", LONG, || is_well(&client, &staged.pod));
    work.stop();
    assert_eq!(connected(), before + 1);
    staged.end(driver);
    assert_eq!(connected(), before);
}
