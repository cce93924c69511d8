//! Faults of the drivers before this one, on the real system: each test would fail on its fault. docs/csi.md has the list.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, umount2};
use support::cli::{Node, Victim, assert_holds, files_below, pattern, write_durably};
use support::csi::{Client, Driver, Mode, at_least, block, mount, parameters, refused};
use support::dir::TestDir;
use support::zerofs::Daemon;
use support::{require_program, zerofs_bin};
use tonic::Code;
use zerofsctl::csi::proto::CreateVolumeRequest;

const MIB: i64 = 1 << 20;
const RWO: Mode = Mode::SingleNodeWriter;

/// A driver with one volume, `v`, in one pod.
struct Scene {
    driver: Driver,
    client: Client,
    staging: PathBuf,
    pod: PathBuf,
    node: Node,
}

impl Scene {
    fn new() -> Scene {
        let node = Node::new();
        let (staging, pod) = (node.dir.join("kubelet/staging"), node.dir.join("kubelet/pods/a"));
        Scene::at(node, staging, pod)
    }

    fn at(node: Node, staging: PathBuf, pod: PathBuf) -> Scene {
        let driver = Driver::start(&node, &[]);
        let client = driver.client();
        client.create_plain("v", 64 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
        for folder in [&staging, pod.parent().unwrap()] as [&Path; 2] {
            fs::create_dir_all(folder).unwrap();
        }
        client.stage("v", &staging, mount(RWO)).unwrap();
        client.publish("v", &staging, &pod, mount(RWO), false).unwrap();
        Scene { driver, client, staging, pod, node }
    }

    fn end(self, when: &str) {
        // The driver may still be looking after the volume: a kubelet tries again.
        support::wait_until("it is unpublished", Duration::from_secs(60), || {
            let answer = self.client.unpublish("v", &self.pod);
            assert!(answer.as_ref().err().is_none_or(|s| s.code() == Code::Aborted), "{answer:?}");
            answer.is_ok()
        });
        self.client.unstage("v", &self.staging).unwrap();
        self.client.delete("v").unwrap();
        assert!(self.driver.stop().success());
        self.node.assert_nothing_left(when);
    }
}

/// What the mount table says of a path: two mounts one after the other differ by their numbers.
fn mount_number(path: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = path.to_str().unwrap();
    let line = table.lines().rfind(|l| l.split(' ').nth(4) == Some(path))?;
    line.split(' ').next().map(str::to_owned)
}

#[test]
fn root_what_is_in_use_stays_whole_and_is_no_success() {
    let scene = Scene::new();
    let Scene { client, staging, pod, .. } = &scene;
    let mut held = File::create(pod.join("held")).unwrap();
    for _ in 0..2 {
        let status = client.unpublish("v", pod).expect_err("it is in use");
        assert!([Code::FailedPrecondition, Code::Aborted].contains(&status.code()), "{status:?}");
        assert!(status.message().contains("hint: "), "{status:?}");
        held.write_all(b"still here").and_then(|()| held.sync_all()).expect("the pod goes on");
        scene.node.assert_attached("v", &mounts(&[staging, pod]), "after an unpublish that was refused");
    }
    drop(held);
    client.unpublish("v", pod).unwrap();
    let mut held = File::create(staging.join("held")).unwrap();
    for _ in 0..2 {
        let status = client.unstage("v", staging).expect_err("it is in use");
        assert!([Code::FailedPrecondition, Code::Aborted].contains(&status.code()), "{status:?}");
        held.write_all(b"still here").and_then(|()| held.sync_all()).expect("the device is there");
        assert!(mount_number(staging).is_some());
    }
    drop(held);
    scene.end("after a volume that was in use");
}

/// As `show` lists them.
fn mounts<'a>(paths: &[&'a PathBuf]) -> Vec<&'a str> {
    let mut all: Vec<&str> = paths.iter().map(|p| p.to_str().unwrap()).collect();
    all.sort_unstable();
    all
}

#[test]
fn root_a_start_leaves_the_devices_and_mounts_of_others_alone() {
    // A device that is connected and not mounted, and a mount whose source nobody knows.
    let other = TestDir::new();
    let (file, place) = (other.join("disk"), other.join("mnt"));
    File::create(&file).unwrap().set_len(16 << 20).unwrap();
    let losetup = require_program("losetup");
    let made = Command::new(&losetup).args(["--find", "--show"]).arg(&file).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    fs::create_dir(&place).unwrap();
    nix::mount::mount(Some("zerofs"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let number = mount_number(&place);

    let scene = Scene::new();
    // Starts on a node with volumes and with a wreck, and looks after them.
    scene.driver.kill();
    scene.node.kill(Victim::Both);
    let driver = Driver::start(&scene.node, &[]);
    let scene = Scene { client: driver.client(), driver, ..scene };
    support::wait_until("the wreck is brought back", Duration::from_secs(120), || {
        fs::write(scene.pod.join("data"), b"x").is_ok()
    });
    scene.end("after two starts");

    let backing = fs::read_to_string(format!("/sys/block/{}/loop/backing_file", &device["/dev/".len()..]));
    assert_eq!(backing.unwrap().trim(), file.to_str().unwrap(), "the device of another is as it was");
    assert_eq!(mount_number(&place), number, "the mount of another is as it was");
    support::wait_until("it is free", Duration::from_secs(30), || umount2(&place, MntFlags::empty()).is_ok());
    assert!(Command::new(&losetup).args(["--detach", &device]).status().unwrap().success());
}

#[test]
fn root_a_folder_is_not_taken_for_the_mount_that_it_is_in() {
    let node = Node::new();
    let outer = node.dir.join("kubelet");
    fs::create_dir(&outer).unwrap();
    nix::mount::mount(Some("outer"), &outer, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let number = mount_number(&outer);
    let (staging, pod) = (outer.join("staging"), outer.join("pods/a"));
    let scene = Scene::at(node, staging.clone(), pod.clone());
    write_durably(&pod.join("data"), b"kept");
    let stays = || {
        assert_eq!(mount_number(&outer), number);
        assert_eq!(fs::read(pod.join("data")).unwrap(), b"kept");
    };
    // Never published there; and a folder inside of the volume itself.
    scene.client.unpublish("v", &outer.join("pods/never")).unwrap();
    fs::create_dir(outer.join("pods/empty")).unwrap();
    scene.client.unpublish("v", &outer.join("pods/empty")).unwrap();
    fs::create_dir(pod.join("inside")).unwrap();
    scene.client.unpublish("v", &pod.join("inside")).unwrap();
    stays();
    scene.client.unstage("v", &outer.join("other-staging")).expect_err("it is still published");
    stays();
    scene.client.unpublish("v", &pod).unwrap();
    scene.client.unstage("v", &outer.join("other-staging")).unwrap();
    assert!(mount_number(&staging).is_some(), "it is not staged there, so it stays");
    scene.client.unstage("v", &staging).unwrap();
    assert_eq!(mount_number(&outer), number);
    // Another test's child may hold a copy of it for a moment.
    support::wait_until("the folder around it is free", Duration::from_secs(30), || {
        umount2(&outer, MntFlags::empty()).is_ok()
    });
    scene.end("after folders in another mount");
}

#[test]
fn root_a_killed_zerofs_is_a_stall_for_the_pods_and_their_mounts_stay() {
    let scene = Scene::new();
    let (file, stop) = (scene.pod.join("data"), Arc::new(AtomicBool::new(false)));
    let (written, ask) = (file.clone(), stop.clone());
    let writer = std::thread::spawn(move || {
        let mut round = 1;
        while !ask.load(Ordering::Relaxed) {
            let bytes = pattern(round, 96 * 1024);
            write_durably(&written, &bytes);
            assert_holds(&written, &bytes, "while ZeroFS dies");
            round += 1;
        }
        round - 1
    });
    let number = mount_number(&scene.pod);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        assert!(scene.node.kill(Victim::Zerofs));
    }
    support::wait_until("it is well again", Duration::from_secs(120), || {
        scene.client.stats("v", &scene.pod).is_ok_and(|s| !s.volume_condition.expect("it has one").abnormal)
    });
    stop.store(true, Ordering::Relaxed);
    let rounds = writer.join().expect("no I/O failed");
    assert!(rounds > 0);
    assert_holds(&file, &pattern(rounds, 96 * 1024), "in the end");
    assert_eq!(mount_number(&scene.pod), number, "the same mount");
    scene.end("after three deaths of ZeroFS");
}

#[test]
fn root_a_volume_that_a_server_in_no_catalog_writes_to_is_not_deleted() {
    let scene = Scene::new();
    let Scene { client, node, staging, pod, .. } = &scene;
    write_durably(&pod.join("data"), &pattern(5, 1 << 20));
    // As an older driver's pod would have it: the same store and password, and no word in the catalog.
    let config = fs::read_to_string(node.state().join("volumes/v/config.toml")).unwrap();
    let own_cache = node.state().join("volumes/v/cache").display().to_string();
    let other = node.dir.join("other");
    fs::create_dir(&other).unwrap();
    assert!(config.contains(&own_cache), "the config names the cache");
    let config = config.replace(&own_cache, &other.join("cache").display().to_string());
    fs::write(other.join("config.toml"), config).unwrap();
    client.unpublish("v", pod).unwrap();
    client.unstage("v", staging).unwrap();

    let mut command = Command::new(zerofs_bin());
    command.args(["run", "--config", "config.toml"]).current_dir(&other).env_clear();
    let mut server = Daemon::start(&mut command, &other.join("log"));
    support::wait_until("the other server answers", Duration::from_secs(60), || {
        zerofsctl::zerofs::ninep::Ninep::open(&other, Duration::from_secs(5)).is_ok()
    });
    let store = node.state().join("store/v");
    let objects = || files_below(&store).into_iter().filter(|f| f.is_file()).count();
    let before = objects();
    refused(
        client.delete("v"),
        Code::Aborted,
        &["volume v", "a server may be running", "stop whatever serves it"],
    );
    assert!(objects() >= before && before > 3, "something was deleted");
    // It is its own again, and whole, once that server has ended.
    server.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(server.wait(Duration::from_secs(60)).success());
    client.stage("v", staging, mount(RWO)).unwrap();
    client.publish("v", staging, pod, mount(RWO), false).unwrap();
    assert_holds(&pod.join("data"), &pattern(5, 1 << 20), "after a deletion that was refused");
    // What was unstaged in good order, a moment ago, is deleted at once.
    scene.end("after a server in no catalog");
}

#[test]
fn root_a_copy_of_the_mounts_in_another_namespace_holds_no_unstage_up() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let client = driver.client();
    let made = client.create(CreateVolumeRequest {
        name: "raw".into(),
        capacity_range: at_least(32 * MIB),
        volume_capabilities: vec![block(RWO)],
        parameters: parameters(&[("deleteDataOnPVCDelete", "true")]),
        ..Default::default()
    });
    made.unwrap();
    let (staging, pods) = (node.dir.join("staging"), node.dir.join("pods"));
    for folder in [&staging, &pods] {
        fs::create_dir(folder).unwrap();
    }
    client.stage("raw", &staging, block(RWO)).unwrap();
    client.publish("raw", &staging, &pods.join("a"), block(RWO), false).unwrap();
    // As a container that starts meanwhile: it has a copy of every mount for as long as it lives.
    let mut container = Command::new(require_program("unshare"))
        .args(["--mount", "--propagation", "private", "sleep", "600"])
        .current_dir("/")
        .spawn()
        .unwrap();
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    let its = format!("/proc/{}/ns/mnt", container.id());
    support::wait_until("the container has its own mounts", Duration::from_secs(30), || {
        fs::read_link(&its).is_ok_and(|ns| ns != own)
    });
    client.unpublish("raw", &pods.join("a")).unwrap();
    let unstaged = client.unstage("raw", &staging);
    container.kill().unwrap();
    container.wait().unwrap();
    unstaged.unwrap();
    client.delete("raw").unwrap();
    assert!(driver.stop().success());
    node.assert_nothing_left("after a container with copies of the mounts");
}
