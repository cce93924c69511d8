//! What an operator does with volumes, told with the built program, the real ZeroFS, real devices and real
//! filesystems: attach, look, mount twice, hand out raw, read only, grow, check, repair, recover, lose to
//! another owner, adopt.

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::cli::{
    Answer, Node, Victim, assert_holds, files_below, pattern, write_acknowledged, write_durably,
};
use support::stuck::{a_mount_that_outlives_its_command, an_unmount_without_storage};
use support::zerofs::Daemon;
use support::{require_program, wait_until, zerofs_bin};

const MIB: usize = 1 << 20;

/// All bytes of a device, for comparing.
fn checksum(device: &Path) -> u32 {
    let mut file = File::open(device).expect("the device opens");
    let (mut sum, mut buffer) = (0, vec![0; MIB]);
    loop {
        match file.read(&mut buffer).expect("the device reads") {
            0 => return sum,
            n => sum = crc32c::crc32c_append(sum, &buffer[..n]),
        }
    }
}

/// The catalog's record of a volume in the embedded store.
fn record(node: &Node, volume: &str) -> PathBuf {
    node.state().join(format!("store/.zerofsctl/volumes/{volume}.json"))
}

/// The block device behind a `--block` target.
fn device(link: &str) -> PathBuf {
    let device = fs::read_link(link).expect("a raw attach makes a link");
    assert!(device.starts_with("/dev"), "{}", device.display());
    device
}

#[test]
fn root_the_life_of_a_volume() {
    let node = Node::new();
    let (m, m2) = (node.target("m"), node.target("m2"));
    let bytes = pattern(1, 5 * MIB);
    let plan = node.json(&["attach", "vol1", "--target", &m, "--size", "512Mi", "--dry-run"]);
    assert_eq!(plan["dry_run"], true);
    node.assert_nothing_left("after a dry run");
    assert!(
        !Path::new(&m).exists() && !node.state().join("store/vol1").exists(),
        "a dry run changes nothing"
    );

    let first = node.json(&["attach", "vol1", "--target", &m, "--size", "512Mi"]);
    assert_eq!(first["already"], false);
    write_durably(&Path::new(&m).join("data"), &bytes);
    let again = node.json(&["attach", "vol1", "--target", &m]);
    assert_eq!(again["already"], true, "{again:#}");
    // A second mount of the same filesystem; going there is no longer than the mount itself.
    node.ok(&["attach", "vol1", "--target", &m2]);
    node.assert_attached("vol1", &[&m, &m2], "two mounts");
    assert_holds(&Path::new(&m2).join("data"), &bytes, "at the second target");
    assert_eq!(node.ok(&["list", "-o", "name"]).stdout, "vol1\n");
    let listed = node.json(&["list"]);
    assert_eq!(
        (&listed[0]["state"], &listed[0]["size"]),
        (&"attached".into(), &(512 * MIB).into()),
        "{listed:#}"
    );
    let table = node.ok(&["list"]).stdout;
    assert!(table.starts_with("VOLUME") && table.contains(&m) && table.contains("512Mi"), "{table}");
    let shown = node.ok(&["show", "vol1"]).stdout;
    for word in ["keeper.sock", "/dev/loop", "ext4", "journal", &m, &m2] {
        assert!(shown.contains(word), "{word} is not shown: {shown}");
    }
    // Another size or filesystem than it has is a conflict, not a change.
    node.run(&["attach", "vol1", "--target", &m, "--size", "1Gi"]).expect_error(1, &["512Mi", "1Gi"]);
    node.run(&["attach", "vol1", "--target", &m, "--fs", "xfs"]).expect_error(1, &["ext4", "xfs"]);
    node.run(&["fsck", "vol1"]).expect_error(11, &["attached"]);
    node.ok(&["detach", &m2]);
    assert!(!Path::new(&m2).exists(), "the folder that was made for the second mount is gone");
    node.assert_attached("vol1", &[&m], "one mount is left");

    // In use means in use.
    let held = File::open(Path::new(&m).join("data")).expect("the file");
    node.run(&["detach", "vol1"]).expect_error(11, &["vol1", "in use", &std::process::id().to_string()]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "after a refused detach");
    drop(held);
    node.assert_attached("vol1", &[&m], "after a refused detach");
    let loop_device = node.found("vol1")["device"]["path"].as_str().expect("a device").to_owned();
    node.ok(&["detach", &loop_device]);
    node.assert_nothing_left("after the detach");
    let twice = node.json(&["detach", "vol1"]);
    assert_eq!(twice["already"], true, "{twice:#}");

    node.ok(&["resize", "vol1", "1Gi"]);
    assert_eq!(node.json(&["resize", "vol1", "1Gi"])["facts"]["capacity"], 1024 * MIB);
    node.run(&["resize", "vol1", "512Mi"]).expect_error(2, &["vol1"]);
    node.ok(&["fsck", "vol1"]);
    node.ok(&["fsck", "vol1", "--read-data"]);
    node.ok(&["fsck", "vol1", "--read-data", "2/5"]);
    node.assert_nothing_left("after checks");
    assert_eq!(node.json(&["list"])[0]["state"], "released");
    node.ok(&["attach", "vol1", "--target", &m, "--size", "1Gi"]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "after growing");
    node.ok(&["detach", "--all"]);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_xfs_and_btrfs_grow_while_they_are_used() {
    let node = Node::new();
    for fs in ["xfs", "btrfs"] {
        let (m, bytes) = (node.target(fs), pattern(2, 3 * MIB));
        node.ok(&["attach", fs, "--target", &m, "--fs", fs, "--size", "512Mi"]);
        write_durably(&Path::new(&m).join("data"), &bytes);
        let held = File::open(Path::new(&m).join("data")).expect("the file");
        node.ok(&["resize", fs, "1Gi"]);
        let vfs = nix::sys::statvfs::statvfs(m.as_str()).expect("statvfs");
        assert!(vfs.blocks() * vfs.fragment_size() > 900 * MIB as u64, "{fs} has grown");
        assert_holds(&Path::new(&m).join("data"), &bytes, fs);
        drop(held);
        node.ok(&["detach", fs]);
        node.ok(&["fsck", fs]);
    }
    node.assert_nothing_left("in the end");
}

/// libmount's table has `_netdev` for the init system: for as long as the volume is mounted, and not a moment longer,
/// or every mount of this machine would have to read through all volumes that ever were. [`Node`] looks in the end.
#[test]
fn root_what_mount_notes_for_the_init_system_goes_with_the_mount() {
    let node = Node::new();
    let m = node.target("a folder");
    let noted = || {
        let table = fs::read_to_string("/run/mount/utab").expect("libmount's table");
        let line = format!("TARGET={} ", m.replace(' ', "\\040"));
        table.lines().filter(|l| l.contains(&line) && l.contains("_netdev")).count()
    };
    node.ok(&["attach", "vol1", "--target", &m]);
    assert_eq!(noted(), 1);
    let held = File::create(Path::new(&m).join("held")).expect("a file");
    node.run(&["detach", "vol1"]).expect_error(11, &["is in use by"]);
    assert_eq!(noted(), 1, "it is still mounted");
    drop(held);
    node.ok(&["detach", "vol1"]);
    assert_eq!(noted(), 0);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_a_raw_device() {
    let node = Node::new();
    let link = node.target("disk");
    let bytes = pattern(3, 4 * MIB);
    node.ok(&["attach", "raw", "--block", "--target", &link, "--size", "64Mi"]);
    let file = OpenOptions::new().write(true).open(device(&link)).expect("the device");
    file.write_all_at(&bytes, 8 * MIB as u64).expect("a write");
    file.sync_all().expect("a flush");
    drop(file);
    node.ok(&["detach", &link]);
    assert!(!Path::new(&link).exists() && fs::symlink_metadata(&link).is_err(), "the link is gone");
    node.assert_nothing_left("after a raw detach");

    node.ok(&["attach", "raw", "--block", "--read-only", "--target", &link]);
    let mut back = vec![0; bytes.len()];
    File::open(device(&link)).expect("the device").read_exact_at(&mut back, 8 * MIB as u64).expect("a read");
    assert!(back == bytes, "what was written is read back");
    let refused = OpenOptions::new().write(true).open(device(&link)).and_then(|mut f| f.write_all(b"x"));
    refused.expect_err("a read-only device takes no writes");
    node.ok(&["detach", "raw"]);
    // Somebody's raw data is never taken for a blank disk.
    node.run(&["attach", "raw", "--target", &node.target("m")]).expect_error(1, &["raw", "step"]);
    node.ok(&["attach", "raw", "--block", "--target", &link]);
    File::open(device(&link)).expect("the device").read_exact_at(&mut back, 8 * MIB as u64).expect("a read");
    assert!(back == bytes, "no filesystem was made over it");
    node.ok(&["detach", "raw"]);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_read_only_changes_nothing() {
    let node = Node::new();
    let (m, link) = (node.target("m"), node.target("disk"));
    let bytes = pattern(4, MIB);
    node.run(&["attach", "vol1", "--target", &m, "--read-only"]).expect_error(10, &["no such volume"]);
    assert!(!node.state().join("store/vol1").exists(), "a read-only attach makes no volume");
    for (fs, size) in [("ext4", "64Mi"), ("xfs", "320Mi"), ("btrfs", "128Mi")] {
        node.ok(&["attach", fs, "--target", &m, "--fs", fs, "--size", size]);
        write_durably(&Path::new(&m).join("data"), &bytes);
        node.ok(&["detach", fs]);
        let sum = || {
            node.ok(&["attach", fs, "--block", "--read-only", "--target", &link]);
            let sum = checksum(&device(&link));
            node.ok(&["detach", fs]);
            sum
        };
        let before = sum();
        node.ok(&["attach", fs, "--target", &m, "--read-only"]);
        assert_holds(&Path::new(&m).join("data"), &bytes, fs);
        let refused =
            File::create(Path::new(&m).join("more")).expect_err("a read-only filesystem takes no file");
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{fs}");
        node.run(&["attach", fs, "--target", &m]).expect_error(1, &["read-only"]);
        node.run(&["resize", fs, "1Gi"]).expect_error(1, &["read-only"]);
        node.ok(&["detach", fs]);
        assert_eq!(sum(), before, "{fs}: a read-only attach changed the device");
    }
    // Never formatted: there is nothing to mount, and nothing is made.
    // No filesystem: there is nothing to mount, and none is made.
    node.ok(&["attach", "blank", "--block", "--target", &link, "--size", "64Mi"]);
    node.ok(&["detach", "blank"]);
    node.run(&["attach", "blank", "--target", &m, "--read-only"])
        .expect_error(1, &["blank", "no filesystem"]);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_a_damaged_filesystem_is_found_and_repaired() {
    let node = Node::new();
    require_program("dumpe2fs");
    let (m, link) = (node.target("m"), node.target("disk"));
    let bytes = pattern(5, MIB);
    node.ok(&["attach", "vol1", "--target", &m, "--size", "256Mi"]);
    for name in ["first", "second"] {
        write_durably(&Path::new(&m).join(name), &bytes);
    }
    let inode =
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(Path::new(&m).join("second")).expect("stat"));
    node.ok(&["detach", "vol1"]);
    node.ok(&["attach", "vol1", "--block", "--target", &link]);
    // Garbage over the inode of the second file, in the first inode table.
    let dump = Command::new("dumpe2fs").arg(device(&link)).output().expect("dumpe2fs");
    let dump = String::from_utf8_lossy(&dump.stdout).into_owned();
    let table = dump.split_once("Inode table at ").expect("an inode table").1;
    let block: u64 =
        table.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).expect("a block");
    let value = |key: &str| -> u64 {
        let line = dump.lines().find_map(|l| l.strip_prefix(key)).expect("a value");
        line.trim().parse().expect("a number")
    };
    let at = block * value("Block size:") + (inode - 1) * value("Inode size:");
    let raw = OpenOptions::new().write(true).open(device(&link)).expect("the device");
    raw.write_all_at(&pattern(6, 256), at).expect("garbage");
    raw.sync_all().expect("a flush");
    drop(raw);
    node.ok(&["detach", "vol1"]);

    let found = node.run(&["fsck", "vol1"]);
    assert_eq!(found.code, Some(3), "{found:#?}");
    assert!(found.stdout.contains("has faults") && found.stdout.contains("--repair"), "{found:#?}");
    assert_eq!(node.run(&["fsck", "vol1"]).code, Some(3), "a check repairs nothing");
    node.run(&["fsck", "vol1", "--repair"]).expect_error(2, &["vol1", "confirmed"]);
    let repaired = node.ok(&["fsck", "vol1", "--repair", "--yes"]);
    assert!(repaired.stdout.contains("was repaired and is clean"), "{repaired:#?}");
    node.ok(&["fsck", "vol1"]);
    node.assert_nothing_left("after the repair");
    node.ok(&["attach", "vol1", "--target", &m]);
    assert_holds(&Path::new(&m).join("first"), &bytes, "after the repair");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_recover_brings_a_volume_back_with_all_that_was_acknowledged() {
    let node = Node::new();
    let (m, m2) = (node.target("m"), node.target("m2"));
    let bytes = pattern(7, 3 * MIB);
    node.ok(&["attach", "vol1", "--target", &m]);
    node.ok(&["attach", "vol1", "--target", &m2]);
    for (round, victim) in [Victim::Keeper, Victim::Both, Victim::Zerofs].into_iter().enumerate() {
        let name = format!("data{round}");
        write_durably(&Path::new(&m).join(&name), &bytes);
        assert!(node.kill(victim));
        if victim != Victim::Zerofs {
            assert_eq!(node.found("vol1")["state"], "broken");
        }
        let recovered = node.json(&["recover"]);
        assert_eq!(recovered["volumes"][0]["volume"], "vol1", "{recovered:#}");
        wait_until("it is attached again", Duration::from_secs(20), || {
            node.found("vol1")["state"] == "attached"
        });
        node.assert_attached("vol1", &[&m, &m2], &format!("after {victim:?}"));
        for n in 0..=round {
            assert_holds(&Path::new(&m2).join(format!("data{n}")), &bytes, &format!("after {victim:?}"));
        }
    }
    let nothing = node.json(&["recover", "vol1"]);
    assert_eq!(nothing["volumes"][0]["recovered"]["what"], serde_json::json!([]), "{nothing:#}");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}

/// A program that looks at every disk of the machine must not stop at the one whose keeper is gone or stuck: btrfs-progs
/// asks for the file behind each mounted loop device.
#[test]
fn root_a_dead_or_stuck_neighbour_stops_nobody() {
    let node = Node::new();
    let (near, m) = (node.target("near"), node.target("m"));
    let bytes = pattern(10, MIB);
    node.ok(&["attach", "near", "--target", &near]);
    write_durably(&Path::new(&near).join("data"), &bytes);
    let keeper = node.processes().0[0];
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        kill(Pid::from_raw(keeper), signal).expect("the keeper is there");
        for fs in ["ext4", "xfs", "btrfs"] {
            let volume = format!("{fs}-{}", signal.as_str().to_lowercase());
            node.ok(&["attach", &volume, "--target", &m, "--fs", fs, "--size", "512Mi"]);
            node.ok(&["detach", &volume]);
            node.ok(&["fsck", &volume]);
        }
        let table = fs::read_to_string("/proc/self/mounts").expect("the mount table");
        assert!(table.contains(&near), "{signal}: what the programs did not see is still mounted");
        if signal == Signal::SIGSTOP {
            kill(Pid::from_raw(keeper), Signal::SIGCONT).expect("the keeper is there");
            assert_holds(&Path::new(&near).join("data"), &bytes, "after it was stuck");
        }
    }
    node.ok(&["recover"]);
    assert_holds(&Path::new(&near).join("data"), &bytes, "after it was dead");
    node.ok(&["detach", "--all"]);
    node.assert_nothing_left("in the end");
}

/// `/var` is full: what was attached goes on, a dead ZeroFS is followed by the next one, and what is started anew is
/// refused with a word about the room.
#[test]
fn root_a_full_state_disk_stops_no_volume() {
    let node = Node::new();
    let (m, m2) = (node.target("m"), node.target("m2"));
    let state = node.state();
    fs::create_dir_all(&state).expect("the state folder");
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("test"), &state, Some("tmpfs"), none, Some("size=16m")).expect("a tmpfs");
    let store = format!("file://{}", node.target("store"));
    let bytes = pattern(11, 3 * MIB);
    let attach = |volume: &str, m: &str| {
        let words = ["attach", volume, "--target", m, "--size", "64Mi", "--storage-url", &store];
        Answer::of(node.command(&words).env("ZEROFS_ENCRYPTION_PASSWORD", "of a store elsewhere"))
    };
    attach("vol1", &m).expect_code(0);
    let filler = state.join("filler");
    let fill = || {
        let mut file = OpenOptions::new().append(true).create(true).open(&filler).expect("the filler");
        while file.write_all(&[1; 4096]).is_ok() {}
    };
    fill();
    for round in 0..5 {
        write_durably(&Path::new(&m).join(format!("data{round}")), &bytes);
        assert!(node.kill(Victim::Zerofs));
        fill();
        wait_until("another ZeroFS serves it", Duration::from_secs(30), || {
            node.processes().1.len() == 1 && node.found("vol1")["state"] == "attached"
        });
        for n in 0..=round {
            assert_holds(&Path::new(&m).join(format!("data{n}")), &bytes, "with a full disk");
        }
    }
    fill();
    attach("vol2", &m2).expect_error(1, &["No space left"]);
    assert!(node.kill(Victim::Both));
    fill();
    // The room for the log is still there, and the rest is written over what was there before.
    node.ok(&["recover"]);
    for n in 0..5 {
        assert_holds(&Path::new(&m).join(format!("data{n}")), &bytes, "after recovery");
    }
    fs::remove_file(&filler).expect("room");
    attach("vol2", &m2).expect_code(0);
    node.ok(&["detach", "--all"]);
    nix::mount::umount(&state).expect("nobody is in the state folder any more");
    node.assert_nothing_left("in the end");
}

#[test]
fn root_an_unmount_that_waits_for_its_storage_is_told_of_and_comes_to_its_end() {
    an_unmount_without_storage(&Node::new(), "fuse");
}

#[test]
fn root_a_mount_that_outlives_its_command_is_waited_for() {
    a_mount_that_outlives_its_command(&Node::new(), "fuse");
}

#[test]
fn root_unflushed_writes_survive_the_keeper_on_a_raw_device() {
    let node = Node::new();
    let link = node.target("disk");
    node.ok(&["attach", "raw", "--block", "--target", &link, "--size", "64Mi"]);
    let bytes = pattern(8, 2 * MIB);
    let path = device(&link);
    let held = write_acknowledged(&path, 4 * MIB as u64, &bytes);
    assert!(node.kill(Victim::Both));
    drop(held);
    node.ok(&["recover", "raw"]);
    let mut back = vec![0; bytes.len()];
    File::open(device(&link)).expect("the device").read_exact_at(&mut back, 4 * MIB as u64).expect("a read");
    assert!(back == bytes, "an acknowledged write was lost");
    node.ok(&["detach", "raw"]);
}

/// A second server on the same data fences the first one off: its device must fail, and never serve old data as
/// new or go on writing.
#[test]
fn root_a_fenced_volume_fails_cleanly() {
    let node = Node::new();
    let m = node.target("m");
    let bytes = pattern(9, MIB);
    node.ok(&["attach", "vol1", "--target", &m]);
    write_durably(&Path::new(&m).join("data"), &bytes);
    let config = fs::read_to_string(node.state().join("volumes/vol1/config.toml")).expect("the config");
    let own_cache = node.state().join("volumes/vol1/cache").display().to_string();
    let other = node.dir.join("other");
    fs::create_dir(&other).expect("a folder");
    let cache = other.join("cache").display().to_string();
    assert!(config.contains(&own_cache), "the config names the cache");
    fs::write(other.join("config.toml"), config.replace(&own_cache, &cache)).expect("a config");
    let mut command = Command::new(zerofs_bin());
    command.args(["run", "--config", "config.toml"]).current_dir(&other).env_clear();
    let usurper = Daemon::start(&mut command, &other.join("log"));
    wait_until("the other server answers", Duration::from_secs(30), || {
        zerofsctl::zerofs::ninep::Ninep::open(&other, Duration::from_secs(5)).is_ok()
    });
    // The next durable write tells the old server that it is not the owner any more.
    let refused = File::create(Path::new(&m).join("late")).and_then(|mut f| {
        f.write_all(&bytes)?;
        f.sync_all()
    });
    let refused = refused.expect_err("a fenced device takes no writes");
    assert!(matches!(refused.raw_os_error(), Some(libc::EIO | libc::EROFS)), "{refused}");
    wait_until("it is known to be fenced", Duration::from_secs(20), || {
        node.found("vol1")["state"] == "fenced"
    });
    let listed = node.ok(&["list"]).stdout;
    assert!(listed.contains("fenced"), "{listed}");
    wait_until("the fenced server has ended", Duration::from_secs(20), || node.processes().1.is_empty());
    std::thread::sleep(Duration::from_secs(1));
    let (_, servers) = node.processes();
    assert!(servers.is_empty(), "the fenced server is not started again: {servers:?}");
    node.run(&["attach", "vol1", "--target", &node.target("m2")]).expect_error(1, &["vol1", "fenced"]);
    node.ok(&["detach", "vol1"]);
    drop(usurper);
    node.assert_nothing_left("after a fenced volume");
    // What was durable before is there for the next owner.
    node.ok(&["attach", "vol1", "--target", &m]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "for the next owner");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_another_state_root_must_wait_until_it_is_free() {
    let (node, other) = (Node::new(), Node::new());
    let (m, m2) = (node.target("m"), other.target("m"));
    let store = format!("file://{}", node.dir.join("store").display());
    let run = |node: &Node, words: &[&str]| {
        Answer::of(node.command(words).env("ZEROFS_ENCRYPTION_PASSWORD", "correct horse"))
    };
    let bytes = pattern(10, MIB);
    run(&node, &["attach", "vol1", "--target", &m, "--storage-url", &store]).expect_code(0);
    write_durably(&Path::new(&m).join("data"), &bytes);
    let attach = ["attach", "vol1", "--target", &m2, "--storage-url", &store];
    let refused = run(&other, &attach).expect_error(11, &["vol1", "attached by"]);
    assert!(refused.stderr.contains("zerofsctl --state-dir"), "it says how to detach it there: {refused:#?}");
    other.assert_nothing_left("after a refusal");
    assert_eq!(node.found("vol1")["restarts"], 0, "nobody was disturbed");
    let elsewhere = run(&other, &["list", "--storage-url", &store, "-o", "json"]).expect_code(0).json();
    assert_eq!(elsewhere[0]["state"], "elsewhere", "{elsewhere:#}");
    write_durably(&Path::new(&m).join("data"), &bytes);
    node.ok(&["detach", "vol1"]);
    run(&other, &attach).expect_code(0);
    assert_holds(&Path::new(&m2).join("data"), &bytes, "on the other node");
    run(&node, &["attach", "vol1", "--target", &m, "--storage-url", &store]).expect_error(11, &["vol1"]);
    other.ok(&["detach", "vol1"]);
    other.assert_nothing_left("in the end");
    node.assert_nothing_left("in the end");
}

/// Volumes of older drivers have no record: what they hold is taken over as it is.
#[test]
fn root_a_volume_without_a_record_is_adopted_and_never_formatted() {
    let node = Node::new();
    let (m, link) = (node.target("m"), node.target("disk"));
    let bytes = pattern(11, MIB);
    node.ok(&["attach", "old", "--target", &m, "--size", "300Mi"]);
    write_durably(&Path::new(&m).join("data"), &bytes);
    node.ok(&["detach", "old"]);
    fs::remove_file(record(&node, "old")).expect("the record");
    let adopted = node.ok(&["attach", "old", "--target", &m]);
    assert!(adopted.stdout.contains("adopted"), "{adopted:#?}");
    assert_holds(&Path::new(&m).join("data"), &bytes, "of an adopted volume");
    assert_eq!(node.found("old")["size"], 300 * MIB);
    node.ok(&["detach", "old"]);
    node.ok(&["attach", "old", "--target", &m]);
    assert_holds(&Path::new(&m).join("data"), &bytes, "of an adopted volume");
    node.ok(&["detach", "old"]);

    // A blank disk of unknown origin may be somebody's data that cannot be read.
    node.ok(&["attach", "blank", "--block", "--target", &link, "--size", "64Mi"]);
    node.ok(&["detach", "blank"]);
    fs::remove_file(record(&node, "blank")).expect("the record");
    node.run(&["attach", "blank", "--target", &m]).expect_error(1, &["blank", "older driver"]);
    node.assert_nothing_left("after a refusal");
    node.ok(&["attach", "blank", "--block", "--target", &link]);
    let mut start = vec![1; MIB];
    File::open(device(&link)).expect("the device").read_exact(&mut start).expect("a read");
    assert!(start.iter().all(|b| *b == 0), "nothing was written on it");
    node.ok(&["detach", "blank"]);
    node.assert_nothing_left("in the end");
    // Logs stay, for whoever wants to know.
    assert!(!files_below(&node.state().join("logs/old")).is_empty());
}
