//! What an operator sees of volumes on kernel NBD devices, told with the built program, the real ZeroFS and real
//! filesystems: a killed keeper is a pause, whoever starts the next one; the direct path fails in the open; without a
//! server a detach ends all the same. Needs root and a kernel with the nbd module: it runs in the virtual machine.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::cli::{Node, Victim, assert_holds, pattern, write_durably};
use support::stuck::{a_mount_that_outlives_its_command, an_unmount_without_storage};
use support::watch::Watch;
use support::{require_program, wait_until};
use zerofsctl::host::nbd::{self, sysfs};

const MIB: usize = 1 << 20;

/// Long enough for any machine.
const LONG: Duration = Duration::from_secs(120);

/// A node on a machine whose kernel can do NBD.
#[track_caller]
fn node() -> Node {
    let node = Node::new();
    nbd::ensure().expect("this test needs the nbd module: run it in the virtual machine, see scripts/vm");
    node
}

/// How many NBD devices are connected, whoever did that.
fn connected() -> usize {
    sysfs::all().unwrap().iter().filter(|d| d.connected).count()
}

fn device(node: &Node, volume: &str) -> u32 {
    let found = node.found(volume);
    let path = found["device"]["path"].as_str().unwrap_or_else(|| panic!("no device: {found:#}"));
    sysfs::index_of(Path::new(path)).unwrap_or_else(|| panic!("no NBD device: {found:#}"))
}

/// Writes and syncs block after block into a file, on a thread; an error of any of them fails the test.
struct Writer {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Writer {
    fn start(path: &Path) -> Writer {
        let file = File::create(path).unwrap();
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut blocks = 0;
            while !ended.load(Ordering::SeqCst) || blocks == 0 {
                file.write_all_at(&pattern(blocks, 4096), blocks * 4096).unwrap();
                file.sync_data().unwrap();
                blocks += 1;
            }
            blocks
        });
        Writer { end, thread: Some(thread) }
    }

    /// Everything that was written and synced.
    fn stop(mut self) -> Vec<u8> {
        self.end.store(true, Ordering::SeqCst);
        let blocks = self.thread.take().expect("it is stopped once").join().expect("no write failed");
        (0..blocks).flat_map(|n| pattern(n, 4096)).collect()
    }
}

impl Drop for Writer {
    /// A test that failed lets go of the filesystem, so that it can be taken down.
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
    }
}

fn story_with_watcher(fs: &str) {
    let node = node();
    let before = connected();
    let m = node.target("m");
    let attach = ["attach", "vol1", "--target", &m, "--size", "512Mi", "--fs", fs, "--transport", "nbd"];
    node.ok(&attach);
    let index = device(&node, "vol1");
    let device = sysfs::one(index).unwrap().unwrap();
    assert_eq!(device.backend.as_deref(), Some("zerofs:vol1"));
    let watch = Watch::start(&node);
    node.run(&["watch"]).expect_error(11, &["another watcher"]);

    let writer = Writer::start(&Path::new(&m).join("stream"));
    for round in 1..=3 {
        assert!(node.kill(Victim::Keeper));
        // A command meanwhile waits for the watcher, or goes first.
        node.ok(&["attach", "vol1", "--target", &m]);
        wait_until("the next keeper serves", LONG, || node.found("vol1")["reconnects"] == round);
    }
    let taken = watch.count("took-over");
    // With its server, too.
    assert!(node.kill(Victim::Both));
    watch.wait_for("took-over", taken + 1);
    let bytes = writer.stop();
    assert_holds(&Path::new(&m).join("stream"), &bytes, "after four keepers");

    let found = node.found("vol1");
    assert_eq!(found["state"], "attached", "{found:#}");
    assert_eq!((&found["transport"], &found["path"]), (&"nbd".into(), &"guarded".into()), "{found:#}");
    assert_eq!(found["reconnects"], 4, "{found:#}");
    assert_eq!(connected(), before + 1, "the same device, and no other");
    let table = node.ok(&["list", "-o", "wide"]).stdout;
    assert!(table.contains(&format!("/dev/nbd{index}")) && table.contains(" nbd "), "{table}");

    node.ok(&["resize", "vol1", "1Gi"]);
    assert_eq!(sysfs::one(index).unwrap().unwrap().size.bytes(), 1 << 30);
    let room = nix::sys::statvfs::statvfs(Path::new(&m)).unwrap();
    assert!(room.blocks() * room.fragment_size() > 600 * MIB as u64, "the filesystem has grown");

    watch.stop();
    assert_holds(&Path::new(&m).join("stream"), &bytes, "the keepers outlive the watcher");
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("after detach");
    node.ok(&["fsck", "vol1"]);
    node.ok(&["attach", "vol1", "--target", &m]);
    assert_holds(&Path::new(&m).join("stream"), &bytes, "after a new attach");
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_a_watcher_makes_each_kill_a_pause_ext4() {
    story_with_watcher("ext4");
}

#[test]
fn nbd_a_watcher_makes_each_kill_a_pause_xfs() {
    story_with_watcher("xfs");
}

#[test]
fn nbd_a_watcher_makes_each_kill_a_pause_btrfs() {
    story_with_watcher("btrfs");
}

#[test]
fn nbd_every_command_that_meets_a_waiting_device_starts_the_next_keeper() {
    let node = node();
    let before = connected();
    let (m, m2) = (node.target("m"), node.target("m2"));
    let bytes = pattern(7, 3 * MIB);
    node.ok(&["attach", "vol1", "--target", &m, "--size", "256Mi", "--transport", "nbd"]);
    write_durably(&Path::new(&m).join("data"), &bytes);
    let index = device(&node, "vol1");

    for command in [
        &["recover", "vol1"] as &[&str],
        &["attach", "vol1", "--target", &m],
        &["attach", "vol1", "--target", &m2],
        &["resize", "vol1", "384Mi"],
        &["detach", &m2],
    ] {
        assert!(node.kill(Victim::Keeper), "{command:?}");
        assert_eq!(node.found("vol1")["state"], "waiting", "{command:?}");
        node.ok(command);
        assert_eq!(node.found("vol1")["state"], "attached", "{command:?}");
        assert_eq!(device(&node, "vol1"), index, "{command:?}");
        assert_holds(&Path::new(&m).join("data"), &bytes, &format!("{command:?}"));
    }
    assert!(node.kill(Victim::Both));
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("after detach of a waiting device");
    node.ok(&["attach", "vol1", "--target", &m, "--read-only"]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "attached again, read-only");
    node.ok(&["detach", "vol1"]);
}

#[test]
fn nbd_a_device_in_use_is_never_disconnected() {
    let node = node();
    let before = connected();
    let m = node.target("m");
    node.ok(&["attach", "vol1", "--target", &m, "--size", "256Mi", "--transport", "nbd"]);
    let device = sysfs::path(device(&node, "vol1"));
    // Held open, and mounted where we do not look.
    let held = File::open(&device).unwrap();
    node.run(&["detach", "vol1"]).expect_error(11, &["in use", &std::process::id().to_string()]);
    drop(held);
    node.ok(&["attach", "vol1", "--target", &m]);
    let elsewhere = node.dir.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mount = format!("mount {} {} && exec sleep 600", device.display(), elsewhere.display());
    let unshare = require_program("unshare");
    let mut other = std::process::Command::new(unshare)
        .args(["--mount", "--propagation", "private", "sh", "-c", &mount])
        .spawn()
        .unwrap();
    wait_until("the mount in the other namespace", LONG, || {
        fs::read_to_string(format!("/proc/{}/mountinfo", other.id()))
            .is_ok_and(|t| t.contains(elsewhere.to_str().unwrap()))
    });
    node.run(&["detach", "vol1"]).expect_error(11, &["in use"]);
    assert_eq!(connected(), before + 1);
    other.kill().unwrap();
    other.wait().unwrap();
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("after the users let go");
}

#[test]
fn nbd_the_direct_path_fails_in_the_open_and_recover_makes_a_new_device() {
    let node = node();
    let before = connected();
    let m = node.target("m");
    let bytes = pattern(9, 2 * MIB);
    node.ok(&["attach", "vol1", "--target", &m, "--size", "256Mi", "--path", "direct"]);
    assert_eq!(node.found("vol1")["path"], "direct");
    write_durably(&Path::new(&m).join("data"), &bytes);
    node.run(&["attach", "vol1", "--target", &node.target("m2"), "--transport", "nbd"])
        .expect_error(1, &["direct", "guarded"]);
    assert!(node.kill(Victim::Zerofs));
    wait_until("the device fails", LONG, || node.found("vol1")["state"] == "broken");
    let mut file = File::create(Path::new(&m).join("late")).ok();
    let written = file.as_mut().map(|f| f.write_all(&bytes).and_then(|()| f.sync_all()));
    assert!(!matches!(written, Some(Ok(()))), "a device that failed takes nothing");
    drop(file);
    node.ok(&["recover", "vol1"]);
    assert_eq!(node.found("vol1")["state"], "attached");
    assert_holds(&Path::new(&m).join("data"), &bytes, "what was synced is there");
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_after_the_kernel_gave_up_waiting_recover_mounts_anew() {
    let node = node();
    let before = connected();
    let m = node.target("m");
    let bytes = pattern(11, 2 * MIB);
    node.ok(&[
        "attach",
        "vol1",
        "--target",
        &m,
        "--size",
        "256Mi",
        "--transport",
        "nbd",
        "--reconnect-timeout",
        "1s",
    ]);
    write_durably(&Path::new(&m).join("data"), &bytes);
    assert!(node.kill(Victim::Keeper));
    // Nobody takes over: the filesystem is told of an error.
    let late = Path::new(&m).join("late");
    let failed = File::create(&late).and_then(|mut f| f.write_all(&bytes).and_then(|()| f.sync_all()));
    assert!(failed.is_err(), "without a keeper nothing is synced");
    node.ok(&["recover", "vol1"]);
    assert_eq!(node.found("vol1")["state"], "attached");
    assert_holds(&Path::new(&m).join("data"), &bytes, "what was synced is there");
    write_durably(&late, &bytes);
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_a_raw_device_waits_and_without_a_server_is_freed_by_force() {
    let node = node();
    let before = connected();
    let link = node.target("disk");
    let bytes = pattern(15, 2 * MIB);
    let attach = ["attach", "vol1", "--target", &link, "--size", "256Mi", "--block", "--transport", "nbd"];
    node.ok(&attach);
    let write = |at: u64| {
        let file = File::options().write(true).open(&link).unwrap();
        file.write_all_at(&bytes, at).and_then(|()| file.sync_all())
    };
    write(0).unwrap();
    assert!(node.kill(Victim::Both));
    node.ok(&["recover", "vol1"]);
    write(8 << 20).unwrap();
    assert!(node.kill(Victim::Keeper));
    node.hide_the_store();
    assert!(node.kill(Victim::Zerofs));
    let forced = node.run(&["detach", "vol1", "--stop-timeout", "2s", "--force"]);
    assert!(forced.code.is_some_and(|code| code != 0), "released without the store: {forced:?}");
    assert_eq!(connected(), before, "the device is free");
    node.show_the_store();
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("once the store is back");
    node.ok(&attach);
    for at in [0, 8 << 20] {
        let mut read = vec![0; bytes.len()];
        File::open(&link).unwrap().read_exact_at(&mut read, at).unwrap();
        assert!(read == bytes, "what was synced at {at} is there");
    }
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("at the end");
}

/// The first to open it would wait for the partition table: so the question who uses it must not.
#[test]
fn nbd_a_raw_device_that_nobody_has_opened_is_freed_without_its_server() {
    let node = node();
    let before = connected();
    let link = node.target("disk");
    node.ok(&["attach", "vol1", "--target", &link, "--size", "256Mi", "--block", "--transport", "nbd"]);
    node.hide_the_store();
    assert!(node.kill(Victim::Both));
    let mut detach = node.command(&["detach", "vol1", "--stop-timeout", "2s", "--force"]);
    let mut detach = detach.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the detach ends", LONG, || detach.try_wait().unwrap().is_some());
    let ended = detach.wait().unwrap();
    assert!(ended.code().is_some_and(|code| code != 0), "released without the store: {ended:?}");
    assert_eq!(connected(), before, "the device is free");
    node.show_the_store();
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("once the store is back");
}

/// Whoever got its index would be written to by the users of the link.
#[test]
fn nbd_the_index_of_a_device_that_failed_goes_to_nobody_while_its_link_stands() {
    let node = node();
    let before = connected();
    let (link, m) = (node.target("disk"), node.target("m"));
    let attach = ["attach", "vol1", "--target", &link, "--size", "128Mi", "--block", "--transport", "nbd"];
    node.ok(&[&attach[..], &["--path", "direct"]].concat());
    let failed = fs::read_link(&link).unwrap();
    assert!(node.kill(Victim::Zerofs));
    wait_until("the device is gone", LONG, || connected() == before);
    assert_eq!(fs::read_link(&link).unwrap(), failed, "the link still stands");
    for volume in ["vol2", "vol3"] {
        let target = node.target(volume);
        node.ok(&["attach", volume, "--target", &target, "--size", "128Mi", "--transport", "nbd"]);
        assert_ne!(sysfs::path(device(&node, volume)), failed, "{volume}");
    }
    node.ok(&["recover", "vol1"]);
    // With the link gone anybody may have it.
    node.ok(&["detach", "--all"]);
    node.ok(&["attach", "vol2", "--target", &m, "--transport", "nbd"]);
    assert_eq!(sysfs::path(device(&node, "vol2")), failed);
    node.ok(&["detach", "vol2"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("at the end");
}

/// Whoever got its index next would be written to by the users of the link.
/// The data of a leak that only its replay log has.
#[test]
fn nbd_gc_tells_how_many_writes_of_a_leak_were_never_flushed_and_leaves_them() {
    const WRITES: u64 = 8;
    let node = node();
    let before = connected();
    let link = node.target("disk");
    let attach = ["attach", "vol1", "--target", &link, "--size", "256Mi", "--block", "--transport", "nbd"];
    assert!(node.killed_at("connect:after", &attach));
    let device = sysfs::named(&nbd::backend_id(&"vol1".parse().unwrap())).unwrap()[0].path();
    for n in 0..WRITES {
        // A close writes it out, and flushes nothing.
        let file = File::options().write(true).open(&device).unwrap();
        file.write_all_at(&pattern(n, 4096), n * MIB as u64).unwrap();
    }
    assert!(node.kill(Victim::Both));
    let log = node.run_root().join("volumes/vol1/replay.log");
    let state = || (fs::read(&log).unwrap(), fs::metadata(&log).unwrap().modified().unwrap());
    let left = state();
    let gc = |words: &[&str]| {
        let answer = node.json(&[&["nbd", "gc", "--older-than", "0s"], words].concat());
        let items = answer["devices"].as_array().unwrap();
        items.iter().find(|i| i["device"]["volume"] == "vol1").unwrap_or_else(|| panic!("{answer:#}")).clone()
    };
    let plan = gc(&[]);
    assert_eq!((&plan["fate"]["outcome"], &plan["left"]), (&"would".into(), &"maybe".into()), "{plan:#}");
    let done = gc(&["--yes"]);
    assert_eq!(done["fate"]["outcome"], "disconnected", "{done:#}");
    assert_eq!(done["left"]["entries"], WRITES, "{done:#}");
    assert!(left == state(), "gc has changed the replay log");
    assert_eq!(connected(), before);
    node.ok(&attach);
    let file = File::open(&link).unwrap();
    for n in 0..WRITES {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, n * MIB as u64).unwrap();
        assert!(bytes[..] == pattern(n, 4096), "write {n} is lost");
    }
    drop(file);
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_gc_leaves_the_device_that_a_link_still_leads_to() {
    let node = node();
    let before = connected();
    let link = node.target("disk");
    node.ok(&["attach", "vol1", "--target", &link, "--size", "256Mi", "--block", "--transport", "nbd"]);
    assert!(node.kill(Victim::Both));
    let answer = node.json(&["nbd", "gc", "--older-than", "0s", "--yes"]);
    let items = answer["devices"].as_array().unwrap();
    let ours = items.iter().find(|i| i["device"]["volume"] == "vol1").unwrap_or_else(|| panic!("{answer:#}"));
    assert_eq!(ours["device"]["verdict"], "ours-leaked", "{ours:#}");
    assert_eq!(ours["fate"]["outcome"], "kept", "{ours:#}");
    assert!(ours["fate"]["why"].as_str().unwrap().contains(&link), "{ours:#}");
    assert_eq!(connected(), before + 1);
    node.ok(&["recover", "vol1"]);
    File::open(&link).unwrap().read_exact_at(&mut [0; 4096], 0).unwrap();
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_without_a_server_a_detach_ends_and_with_force_frees_the_device() {
    let node = node();
    let before = connected();
    let m = node.target("m");
    let bytes = pattern(13, 2 * MIB);
    node.ok(&["attach", "vol1", "--target", &m, "--size", "256Mi", "--transport", "nbd"]);
    write_durably(&Path::new(&m).join("data"), &bytes);
    // What no server takes: the store is gone, and then everybody who could tell.
    node.hide_the_store();
    assert!(node.kill(Victim::Both));
    fs::write(Path::new(&m).join("cached"), &bytes).unwrap();

    let refused = node.run(&["detach", "vol1", "--stop-timeout", "3s"]);
    assert!(!matches!(refused.code, Some(0)), "{refused:#?}");
    assert_eq!(connected(), before + 1, "nothing was taken away");
    node.run(&["detach", "vol1", "--stop-timeout", "3s", "--force"]);
    assert_eq!(connected(), before, "the device is free");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!(" {m} ")), "{mounts}");

    node.show_the_store();
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("once the store is back");
    node.ok(&["attach", "vol1", "--target", &m]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "what was synced is there");
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
}

#[test]
fn nbd_an_unmount_that_waits_for_its_storage_is_told_of_and_comes_to_its_end() {
    let before = connected();
    an_unmount_without_storage(&node(), "nbd");
    assert_eq!(connected(), before);
}

#[test]
fn nbd_a_mount_that_outlives_its_command_is_waited_for() {
    a_mount_that_outlives_its_command(&node(), "nbd");
}

/// Short, as it also runs on the stock kernel in emulation.
#[test]
fn nbd_smoke_a_volume_is_attached_written_detached_and_attached_again() {
    let node = node();
    let before = connected();
    let m = node.target("m");
    let bytes = pattern(5, MIB);
    node.ok(&["attach", "vol1", "--target", &m, "--size", "128Mi", "--transport", "nbd"]);
    let shown = sysfs::one(device(&node, "vol1")).unwrap().unwrap();
    assert_eq!((shown.size.0, shown.backend.as_deref()), (128 << 20, Some("zerofs:vol1")));
    write_durably(&Path::new(&m).join("data"), &bytes);
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.ok(&["attach", "vol1", "--target", &m]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "attached again");
    node.ok(&["detach", "vol1"]);
    assert_eq!(connected(), before);
    node.assert_nothing_left("after both detaches");
}
