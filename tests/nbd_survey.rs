//! What `zerofsctl nbd list` concludes, on trees that look like the kernel's `/sys` and `/proc`: every way of using a
//! device, every closed door, and what a look costs. Needs nothing, but for the tests that say root.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use zerofsctl::host::nbd::marks;
use zerofsctl::host::nbd::survey::{self, Device, Owners, Roots, Scope, Server, Survey};
use zerofsctl::host::nbd::verdict::{Proof, Verdict};
use zerofsctl::values::{ByteSize, VolumeId};

const OWN_NAMESPACE: u64 = 4026531841;

fn vol(name: &str) -> VolumeId {
    name.parse().unwrap()
}

/// Our own records, made up.
#[derive(Default)]
struct Ours {
    servers: BTreeMap<VolumeId, Server>,
    recorded: BTreeMap<u32, Vec<(VolumeId, Option<u32>)>>,
    at_work: BTreeMap<VolumeId, i32>,
    asked: RefCell<Vec<Vec<VolumeId>>>,
}

impl Owners for Ours {
    fn servers(&self, volumes: &[VolumeId]) -> BTreeMap<VolumeId, Server> {
        self.asked.borrow_mut().push(volumes.to_vec());
        volumes.iter().filter_map(|v| Some((v.clone(), self.servers.get(v)?.clone()))).collect()
    }
    fn recorded(&self) -> BTreeMap<u32, Vec<(VolumeId, Option<u32>)>> {
        self.recorded.clone()
    }
    fn at_work(&self, volume: &VolumeId) -> Option<i32> {
        self.at_work.get(volume).copied()
    }
}

/// A machine: its trees.
struct Machine {
    root: tempfile::TempDir,
    ours: Ours,
    partitions: Vec<String>,
}

impl Machine {
    /// Kernel 6.12 with the module, 16 devices, one process: ourselves.
    fn new() -> Machine {
        let m = Machine { root: tempfile::tempdir().unwrap(), ours: Ours::default(), partitions: vec![] };
        for folder in ["sys/block", "sys/module/nbd/parameters", "proc/sys/kernel"] {
            fs::create_dir_all(m.path(folder)).unwrap();
        }
        m.write("sys/module/nbd/parameters/nbds_max", "16\n");
        m.write("sys/module/nbd/parameters/max_part", "16\n");
        m.write("proc/sys/kernel/osrelease", "6.12.48+deb13-amd64\n");
        m.write("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n");
        m.write("proc/partitions", "major minor  #blocks  name\n\n");
        for index in 0..16 {
            m.device(index);
        }
        m.process(1, "init", OWN_NAMESPACE, "");
        m.process(100, "zerofsctl", OWN_NAMESPACE, "");
        symlink("100", m.path("proc/self")).unwrap();
        symlink("pid:[4026531836]", m.path("proc/100/ns/pid")).unwrap();
        m
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.path().join(below)
    }

    fn write(&self, below: &str, text: &str) {
        fs::write(self.path(below), text).unwrap();
    }

    fn device(&self, index: u32) {
        fs::create_dir_all(self.path(&format!("sys/block/nbd{index}/holders"))).unwrap();
        self.write(&format!("sys/block/nbd{index}/size"), "0\n");
        self.write(&format!("sys/block/nbd{index}/dev"), &format!("43:{}\n", index * 32));
    }

    /// Connects a device of 1 GiB.
    fn connect(&mut self, index: u32, backend: Option<&str>) {
        let at = |file: &str| format!("sys/block/nbd{index}/{file}");
        self.write(&at("pid"), "4711\n");
        self.write(&at("size"), "2097152\n");
        if let Some(backend) = backend {
            self.write(&at("backend"), &format!("{backend}\n"));
        }
        self.partition(index * 32, &format!("nbd{index}"));
    }

    fn partition(&mut self, minor: u32, name: &str) {
        self.partitions.push(format!("  43 {minor:8}    1048576 {name}\n"));
        let text = format!("major minor  #blocks  name\n\n{}", self.partitions.concat());
        self.write("proc/partitions", &text);
    }

    fn process(&self, pid: u32, name: &str, namespace: u64, mounts: &str) {
        let folder = self.path(&format!("proc/{pid}"));
        fs::create_dir_all(folder.join("ns")).unwrap();
        fs::create_dir_all(folder.join("fd")).unwrap();
        symlink(format!("mnt:[{namespace}]"), folder.join("ns/mnt")).unwrap();
        for (file, text) in
            [("comm", format!("{name}\n")), ("cmdline", format!("{name}\0")), ("environ", "TZ=UTC\0".into())]
        {
            fs::write(folder.join(file), text).unwrap();
        }
        fs::write(folder.join("mountinfo"), mounts).unwrap();
    }

    fn mounts(&self, pid: u32, lines: &[&str]) {
        self.write(
            &format!("proc/{pid}/mountinfo"),
            &lines.iter().map(|l| format!("{l}\n")).collect::<String>(),
        );
    }

    /// A keeper's process, as its arguments show it.
    fn keeper(&self, pid: u32, run_dir: &str) {
        self.process(pid, "zerofsctl", OWN_NAMESPACE, "");
        let words = format!("/proc/self/exe\0keeper\0--volume-run-dir\0{run_dir}\0");
        self.write(&format!("proc/{pid}/cmdline"), &words);
    }

    /// A ZeroFS, as its environment shows it.
    fn zerofs(&self, pid: u32, run_dir: &str) {
        if !self.path(&format!("proc/{pid}")).exists() {
            self.process(pid, "zerofs", OWN_NAMESPACE, "");
        }
        self.write(&format!("proc/{pid}/environ"), &format!("PATH=/bin\0ZEROFSCTL_RUN_DIR={run_dir}\0"));
    }

    fn end(&self, pid: u32) {
        fs::remove_dir_all(self.path(&format!("proc/{pid}"))).unwrap();
    }

    /// Something that is there, and cannot be read.
    fn close(&self, below: &str) {
        let path = self.path(below);
        if path.is_file() {
            fs::remove_file(&path).unwrap();
        }
        fs::create_dir_all(&path).unwrap();
    }

    /// What is shown of other run folders behind a device, as JSON.
    fn elsewhere(&self, index: u32) -> Value {
        serde_json::to_value(self.one(index)).unwrap()["server"]["elsewhere"].take()
    }

    fn serve(&mut self, volume: &str, server: Server) {
        self.ours.servers.insert(vol(volume), server);
    }

    fn look_for(&self, scope: Scope) -> Survey {
        survey::take(&Roots::below(self.root.path()), &self.ours, scope).unwrap()
    }

    fn look(&self) -> Survey {
        self.look_for(Scope::default())
    }

    fn one(&self, index: u32) -> Device {
        self.look().devices.into_iter().find(|d| d.index == index).expect("it is connected")
    }

    #[track_caller]
    fn assert(&self, index: u32, verdict: Verdict, why: &str) {
        let device = self.one(index);
        assert_eq!(device.verdict, Some(verdict), "{device:#?}");
        assert!(device.why.contains(why), "{:?} lacks {why:?}", device.why);
    }
}

fn answering(pid: u32) -> Server {
    Server {
        keeper: Some(pid),
        answers: true,
        zerofs: Some(pid + 1),
        state: Some("ready".into()),
        ..Server::default()
    }
}

const ROOT: &str = "36 35 98:0 / / rw - ext4 /dev/root rw";

#[test]
fn nothing_connected_is_an_empty_list_and_asks_nobody() {
    let m = Machine::new();
    let survey = m.look();
    assert!(survey.devices.is_empty());
    assert_eq!(
        (survey.capacity.existing, survey.capacity.connected, survey.capacity.nbds_max),
        (16, 0, Some(16))
    );
    assert!(m.ours.asked.borrow().is_empty());
    let all = m.look_for(Scope { all: true, openers: false });
    assert_eq!(all.devices.len(), 16);
    assert!(all.devices.iter().all(|d| d.verdict.is_none() && !d.is_connected()));
}

#[test]
fn ours_with_nothing_before_or_behind_it_is_leaked() {
    let mut m = Machine::new();
    m.connect(3, Some("zerofs:vol1"));
    m.assert(3, Verdict::OursLeaked, "nothing serves it");
    let device = m.one(3);
    assert_eq!((device.volume, device.proof), (Some(vol("vol1")), Some(Proof::Backend)));
    assert_eq!((device.size, device.openers), (ByteSize(1 << 30), Some(vec![])));
}

#[test]
fn others_are_foreign_however_near_their_identifier_looks() {
    let mut m = Machine::new();
    let nearly = [
        None,
        Some(""),
        Some("zerofs"),
        Some("zerofs:"),
        Some("zerofs:../x"),
        Some("ZEROFS:vol1"),
        Some("zerofs:vol1 "),
        Some(" zerofs:vol1"),
        Some("nbdkit"),
    ];
    for (index, backend) in (0..).zip(nearly) {
        m.connect(index, backend);
        // Not even our own journal makes it ours.
        m.ours.recorded.insert(index, vec![(vol("vol1"), Some(4711))]);
        m.assert(index, Verdict::Foreign, "not ours");
    }
    assert!(m.ours.asked.borrow().is_empty(), "no keeper is asked about what is not ours");
}

#[test]
fn a_mount_counts_in_every_namespace_by_number_and_by_name() {
    let mut m = Machine::new();
    for index in 1..=5 {
        m.connect(index, Some(&format!("zerofs:vol{index}")));
    }
    m.partition(5 * 32 + 1, "nbd5p1");
    fs::create_dir_all(m.path("sys/block/nbd5/nbd5p1/holders")).unwrap();
    m.mounts(1, &[ROOT, "40 36 43:32 / /mnt/a\\040b rw - ext4 /dev/nbd1 rw"]);
    // In a container, under another name; Btrfs has a number of its own; a partition.
    m.process(200, "sleep", 4026532000, "");
    m.mounts(200, &[ROOT, "50 36 43:64 / /data rw - ext4 /dev/xvda rw"]);
    m.process(201, "sleep", 4026532001, "");
    m.mounts(201, &["51 36 0:57 / /b rw - btrfs /dev/nbd3 rw", "52 36 43:161 / /p rw - xfs /dev/nbd5p1 rw"]);
    m.assert(1, Verdict::OursInUse, "mounted at /mnt/a b, but nothing serves it");
    m.assert(2, Verdict::OursInUse, "mounted at /data in the mount namespace of process 200");
    m.assert(3, Verdict::OursInUse, "/b");
    m.assert(4, Verdict::OursLeaked, "");
    m.assert(5, Verdict::OursInUse, "/p");
    assert_eq!(m.look().namespaces, 3);
}

#[test]
fn a_namespace_is_read_once_and_through_whoever_is_still_there() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    for pid in 300..310 {
        m.process(pid, "sleep", 4026532000, "");
        // Only the last of them still has a table: the others are ending.
        fs::remove_file(m.path(&format!("proc/{pid}/mountinfo"))).unwrap();
    }
    m.mounts(309, &["50 36 43:32 / /data rw - ext4 /dev/nbd1 rw"]);
    m.assert(1, Verdict::OursInUse, "namespace of process 309");
}

#[test]
fn holders_swap_loop_devices_and_btrfs_members_count() {
    let mut m = Machine::new();
    for index in 1..=6 {
        m.connect(index, Some(&format!("zerofs:vol{index}")));
    }
    symlink("../../dm-0", m.path("sys/block/nbd1/holders/dm-0")).unwrap();
    let others: String = (0..100).map(|n| format!("/var/swap/{n}/{:064} file 1024 0 -2\n", 0)).collect();
    let ours = "/dev/nbd2  partition 1024 0 -2";
    m.write("proc/swaps", &format!("Filename Type Size Used Priority\n{others}{ours}\n"));
    fs::create_dir_all(m.path("sys/block/loop4/loop")).unwrap();
    m.write("sys/block/loop4/loop/backing_file", "/dev/nbd3\n");
    fs::create_dir_all(m.path("sys/fs/btrfs/0000-1111/devices")).unwrap();
    symlink("../../../nbd4", m.path("sys/fs/btrfs/0000-1111/devices/nbd4")).unwrap();
    m.partition(5 * 32 + 2, "nbd5p2");
    fs::create_dir_all(m.path("sys/block/nbd5/nbd5p2/holders/md0")).unwrap();
    m.assert(1, Verdict::OursInUse, "held by dm-0");
    m.assert(2, Verdict::OursInUse, "held by swap");
    m.assert(3, Verdict::OursInUse, "held by loop4");
    m.assert(4, Verdict::OursInUse, "held by btrfs 0000-1111");
    m.assert(5, Verdict::OursInUse, "held by md0");
    m.assert(6, Verdict::OursLeaked, "");
}

/// Makes the node of a block device: nothing needs to be behind it.
fn block_node(path: &Path, major: u64, minor: u64) {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    mknod(path, SFlag::S_IFBLK, Mode::S_IRUSR, makedev(major, minor)).expect("this test needs root");
}

#[test]
fn root_whoever_has_it_open_counts_whatever_the_node_is_called() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    m.connect(2, Some("nbdkit"));
    let node = m.path("some-other-name");
    block_node(&node, 43, 32);
    m.process(200, "dd", OWN_NAMESPACE, "");
    symlink("/dev/null", m.path("proc/200/fd/0")).unwrap();
    symlink(&node, m.path("proc/200/fd/3")).unwrap();
    m.assert(1, Verdict::OursInUse, "open in dd (200)");
    // The module's own count would prove that nobody has: one more than the two connections does not.
    m.write("sys/module/nbd/refcnt", "3\n");
    m.assert(1, Verdict::OursInUse, "open in dd (200)");
    let all = m.look_for(Scope { all: false, openers: true });
    assert_eq!(all.devices[1].openers.as_deref(), Some(&[][..]), "{all:#?}");
}

#[test]
fn the_modules_count_saves_the_look_at_every_open_file() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    m.connect(2, Some("zerofs:vol2"));
    m.mounts(1, &["50 36 43:64 / /data rw - ext4 /dev/nbd2 rw"]);
    // A process whose open files may not be read would be a doubt, if it had to be asked.
    fs::remove_dir(m.path("proc/1/fd")).unwrap();
    m.write("proc/1/fd", "");
    m.assert(1, Verdict::Unknown, "may not be read");
    m.write("sys/module/nbd/refcnt", "3\n");
    m.assert(1, Verdict::OursLeaked, "");
    m.write("sys/module/nbd/refcnt", "4\n");
    m.assert(1, Verdict::Unknown, "may not be read");
}

#[test]
fn a_server_a_stuck_one_too_or_a_command_makes_it_idle() {
    let mut m = Machine::new();
    for index in 1..=5 {
        m.connect(index, Some(&format!("zerofs:vol{index}")));
    }
    m.serve("vol1", answering(4000));
    m.serve("vol2", Server { keeper: Some(4002), ..Server::default() });
    m.serve("vol3", Server { zerofs: Some(4003), ..Server::default() });
    m.ours.at_work.insert(vol("vol4"), 4004);
    m.assert(1, Verdict::OursIdle, "its keeper answers (pid 4000)");
    m.assert(2, Verdict::OursIdle, "does not answer (pid 4002)");
    m.assert(3, Verdict::OursIdle, "without a keeper (pid 4003)");
    m.assert(4, Verdict::OursIdle, "a command is at work on its volume (pid 4004)");
    m.assert(5, Verdict::OursLeaked, "");
    // Used and served: the use is the word.
    m.mounts(1, &["50 36 43:32 / /data rw - ext4 /dev/nbd1 rw"]);
    m.assert(1, Verdict::OursInUse, "mounted at /data");
    assert!(!m.one(1).why.contains("nothing serves it"));
}

/// An attach that was killed left nbd0 and nbd2, and the volume is attached again, as nbd1.
#[test]
fn of_a_volumes_devices_its_keeper_serves_the_one_that_it_names() {
    let mut m = Machine::new();
    for index in [0, 2] {
        m.connect(index, Some("zerofs:vol1"));
    }
    m.connect(1, Some("zerofs:other"));
    m.connect(3, Some("zerofs:vol1"));
    m.keeper(4000, "/run/zerofsctl/volumes/vol1");
    m.zerofs(4001, "/run/zerofsctl/volumes/vol1");
    m.mounts(1, &["50 36 43:96 / /data rw - ext4 /dev/nbd3 rw"]);
    m.serve("vol1", Server { index: Some(3), ..answering(4000) });
    let asked = || m.ours.asked.take();
    assert_eq!(m.one(3).why, "mounted at /data");
    assert_eq!(asked(), [[vol("other"), vol("vol1")]], "each keeper is asked once");
    assert_eq!(m.one(3).server.unwrap().keeper, Some(4000));
    // What the keeper does not serve stays as long as it runs.
    for index in [0, 2] {
        m.assert(index, Verdict::OursIdle, "its volume's keeper (pid 4000) has /dev/nbd3");
        assert_eq!(m.one(index).server, Some(Server::default()));
    }
    let mounts = ["50 36 43:96 / /data rw - ext4 /dev/nbd3 rw", "51 36 43:0 / /old rw - ext4 /dev/nbd0 rw"];
    m.mounts(1, &mounts);
    m.assert(
        0,
        Verdict::OursInUse,
        "mounted at /old, but its volume's keeper (pid 4000) has /dev/nbd3: its I/O waits, or fails",
    );
    // One that does not tell may have any of them.
    for unknown in [answering(4000), Server { keeper: Some(4000), ..Server::default() }] {
        m.serve("vol1", unknown);
        assert_eq!(m.one(0).why, "mounted at /old");
        assert_eq!(m.one(3).why, "mounted at /data");
        m.assert(2, Verdict::OursIdle, "pid 4000");
    }
    m.ours.servers.clear();
    m.end(4000);
    m.end(4001);
    m.assert(2, Verdict::OursLeaked, "");
    m.assert(3, Verdict::OursInUse, "mounted at /data, but nothing serves it");
}

/// Both run folders have a volume of one name.
#[test]
fn a_device_that_our_keeper_does_not_serve_may_be_another_run_folders() {
    let mut m = Machine::new();
    m.connect(0, Some("zerofs:vol1"));
    m.connect(1, Some("zerofs:vol1"));
    m.keeper(4000, "/run/zerofsctl/volumes/vol1");
    m.serve("vol1", Server { index: Some(1), ..answering(4000) });
    m.mounts(1, &["50 36 43:0 / /data rw - ext4 /dev/nbd0 rw"]);
    m.assert(0, Verdict::OursInUse, "but its volume's keeper (pid 4000) has /dev/nbd1");
    m.keeper(200, "/elsewhere/volumes/vol1");
    assert_eq!(m.one(0).why, "mounted at /data");
    assert_eq!(
        m.elsewhere(0),
        json!({"program": "keeper", "pid": 200, "run_dir": "/elsewhere/volumes/vol1"})
    );
    assert_eq!(m.elsewhere(1), Value::Null);
    m.mounts(1, &[ROOT]);
    m.assert(0, Verdict::OursIdle, "a keeper runs with the run folder /elsewhere/volumes/vol1 (pid 200)");
}

#[test]
fn a_server_with_another_run_folder_counts() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    m.connect(2, Some("zerofs:vol2"));
    m.connect(3, Some("zerofs:vol"));
    m.keeper(200, "/elsewhere/volumes/vol1");
    m.zerofs(199, "/elsewhere/volumes/vol1");
    m.zerofs(201, "/elsewhere/volumes/vol2");
    m.assert(1, Verdict::OursIdle, "a keeper runs with the run folder /elsewhere/volumes/vol1 (pid 200)");
    m.assert(2, Verdict::OursIdle, "a ZeroFS runs with the run folder /elsewhere/volumes/vol2 (pid 201)");
    m.assert(3, Verdict::OursLeaked, "");
    let servers: Vec<_> = m.look().devices.into_iter().map(|d| d.server.unwrap()).collect();
    assert!(servers.iter().all(|s| s.keeper.is_none() && s.zerofs.is_none() && !s.answers), "{servers:#?}");
    // The name is anybody's to choose, and goes to a terminal.
    m.zerofs(201, "/\u{1b}[31m/vol2");
    m.assert(2, Verdict::OursIdle, "a ZeroFS runs with the run folder /\\u{1b}[31m/vol2 (pid 201)");
}

#[test]
fn what_is_mounted_through_another_run_folder_is_served() {
    let mut m = Machine::new();
    for index in 1..=3 {
        m.connect(index, Some(&format!("zerofs:vol{index}")));
    }
    m.mounts(
        1,
        &[
            "50 36 43:32 / /data rw - ext4 /dev/nbd1 rw",
            "51 36 43:64 / /dead rw - ext4 /dev/nbd2 rw",
            "52 36 43:96 / /ours rw - ext4 /dev/nbd3 rw",
        ],
    );
    m.serve("vol3", answering(4000));
    m.keeper(200, "/elsewhere/volumes/vol1");
    assert_eq!(m.one(1).why, "mounted at /data");
    assert_eq!(m.elsewhere(1)["pid"], 200);
    assert_eq!(m.one(3).why, "mounted at /ours");
    assert_eq!(m.one(2).why, "mounted at /dead, but nothing serves it: its I/O waits, or fails");
    // Behind a closed door somebody may.
    m.close("proc/1/environ");
    let why = "mounted at /dead; whether anything serves it is not known: 1 files of other users' processes";
    m.assert(2, Verdict::OursInUse, why);
    assert_eq!(m.one(1).why, "mounted at /data");
}

#[test]
fn every_closed_door_is_a_doubt_and_no_leak() {
    type Close = fn(&mut Machine);
    let doors: [(&str, Close); 12] = [
        ("its backend identifier", |m| {
            m.close("sys/block/nbd1/backend");
        }),
        ("its size", |m| m.write("sys/block/nbd1/size", "many\n")),
        ("holders", |m| fs::remove_dir(m.path("sys/block/nbd1/holders")).unwrap()),
        ("partitions", |m| fs::remove_file(m.path("proc/partitions")).unwrap()),
        ("mounts of 1 processes", |m| {
            fs::remove_file(m.path("proc/1/ns/mnt")).unwrap();
            fs::remove_dir(m.path("proc/1/ns")).unwrap();
            m.write("proc/1/ns", "");
        }),
        ("open files of 1", |m| {
            fs::remove_dir(m.path("proc/1/fd")).unwrap();
            m.write("proc/1/fd", "");
        }),
        ("files of other users", |m| {
            m.close("proc/1/environ");
        }),
        ("not every process", |m| {
            fs::remove_file(m.path("proc/100/ns/pid")).unwrap();
            symlink("pid:[4026532999]", m.path("proc/100/ns/pid")).unwrap();
        }),
        ("kept without a process", |m| {
            m.mounts(1, &[ROOT, "60 36 0:4 mnt:[4026532777] /run/ns/x rw - nsfs nsfs rw"]);
        }),
        ("swaps", |m| m.close("proc/swaps")),
        ("0000-1111/devices", |m| {
            fs::create_dir_all(m.path("sys/fs/btrfs/0000-1111")).unwrap();
            m.write("sys/fs/btrfs/0000-1111/devices", "");
        }),
        ("loop4/loop/backing_file", |m| m.close("sys/block/loop4/loop/backing_file")),
    ];
    for (why, close) in doors {
        let mut m = Machine::new();
        m.connect(1, Some("zerofs:vol1"));
        m.assert(1, Verdict::OursLeaked, "");
        close(&mut m);
        m.assert(1, Verdict::Unknown, why);
    }
}

#[test]
fn what_is_not_there_is_no_doubt() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    // A kernel without swap, a loop device without a file, and what is beside the filesystems of Btrfs.
    fs::remove_file(m.path("proc/swaps")).unwrap();
    fs::create_dir_all(m.path("sys/block/loop4")).unwrap();
    fs::create_dir_all(m.path("sys/fs/btrfs/features")).unwrap();
    m.assert(1, Verdict::OursLeaked, "");
}

#[test]
fn a_device_that_is_proven_to_be_used_is_so_whatever_else_is_closed() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    m.mounts(1, &["50 36 43:32 / /data rw - ext4 /dev/nbd1 rw"]);
    fs::remove_dir(m.path("sys/block/nbd1/holders")).unwrap();
    m.assert(1, Verdict::OursInUse, "/data");
}

#[test]
fn on_old_kernels_the_journal_tells_and_the_list_says_so() {
    let mut m = Machine::new();
    m.write("proc/sys/kernel/osrelease", "5.10.0-36-amd64\n");
    for index in 1..=4 {
        m.connect(index, None);
    }
    m.ours.recorded.insert(1, vec![(vol("vol1"), Some(4711))]);
    m.ours.recorded.insert(2, vec![(vol("vol2"), Some(4712))]);
    m.assert(1, Verdict::OursLeaked, "");
    assert_eq!(m.one(1).proof, Some(Proof::Journal));
    m.ours.recorded.insert(4, vec![(vol("vol4"), None)]);
    m.assert(2, Verdict::Unknown, "cannot prove");
    m.assert(3, Verdict::Foreign, "");
    m.assert(4, Verdict::Unknown, "cannot prove");
    // A stale record of another volume does not hide the true one; two that both fit prove nothing.
    m.ours.recorded.insert(1, vec![(vol("old"), Some(99)), (vol("vol1"), Some(4711))]);
    m.assert(1, Verdict::OursLeaked, "");
    m.ours.recorded.insert(1, vec![(vol("old"), Some(4711)), (vol("vol1"), Some(4711))]);
    m.assert(1, Verdict::Unknown, "cannot prove");
    m.ours.recorded.insert(1, vec![(vol("vol1"), Some(4711))]);
    assert!(!m.look().identifiers);
    m.write("proc/sys/kernel/osrelease", "linux\n");
    m.assert(1, Verdict::Unknown, "release is not known");
}

#[test]
fn a_leak_has_its_age_from_the_first_look_until_it_is_another_connection() {
    let mut m = Machine::new();
    m.connect(1, Some("zerofs:vol1"));
    let run = m.path("run");
    let at = |seconds: i64| jiff::Timestamp::from_second(1_800_000_000 + seconds).unwrap();
    let known = |m: &Machine, now: jiff::Timestamp| {
        let mut survey = m.look();
        marks::update(&run, &mut survey, now).unwrap();
        survey.devices[0].leaked_since
    };
    let mut only_looks = m.look();
    marks::fill(&run, &mut only_looks);
    assert_eq!(only_looks.devices[0].leaked_since, None);
    assert!(!run.exists(), "who only looks writes nothing");
    assert_eq!(known(&m, at(0)), Some(at(0)));
    assert_eq!(known(&m, at(60)), Some(at(0)));
    // Used for a while, then leaked again.
    m.serve("vol1", answering(4000));
    assert_eq!(known(&m, at(70)), None);
    m.ours.servers.clear();
    assert_eq!(known(&m, at(80)), Some(at(80)));
    // A clock that was set back makes nothing older.
    assert_eq!(known(&m, at(20)), Some(at(20)));
    // Connected anew: the kernel makes the file anew. The old one is kept, so that its number is not used again.
    let file = m.path("sys/block/nbd1/pid");
    fs::rename(&file, m.path("old")).unwrap();
    fs::write(&file, "4711\n").unwrap();
    assert_eq!(known(&m, at(90)), Some(at(90)));
    // A damaged file makes leaks younger, never older.
    fs::write(run.join("nbd-leaks.json"), "{").unwrap();
    assert_eq!(known(&m, at(100)), Some(at(100)));
}

/// The machine of the speed target: 64 devices of ours, 300 processes with 20 open files each, 40 mount namespaces.
fn large(mounted: bool) -> Machine {
    let mut m = Machine::new();
    for index in 0..64 {
        m.device(index);
        m.connect(index, Some(&format!("zerofs:vol{index}")));
        m.serve(&format!("vol{index}"), answering(5000 + index));
    }
    let lines: Vec<String> = (0..64)
        .map(|i| {
            format!("{} 36 43:{} / /mnt/vol{i} rw,relatime shared:{i} - ext4 /dev/nbd{i} rw", 100 + i, i * 32)
        })
        .collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    for pid in 1000..1300 {
        let namespace = OWN_NAMESPACE + u64::from(pid % 40);
        m.process(pid, "worker", namespace, "");
        if mounted {
            m.mounts(pid, &lines);
        }
        for fd in 0..20 {
            symlink("/dev/null", m.path(&format!("proc/{pid}/fd/{fd}"))).unwrap();
        }
    }
    m
}

#[test]
fn a_large_machine_is_surveyed() {
    for mounted in [true, false] {
        let m = large(mounted);
        let begun = std::time::Instant::now();
        let survey = m.look();
        println!("64 devices, 302 processes, mounted {mounted}: {:?}", begun.elapsed());
        assert_eq!(survey.devices.len(), 64);
        let wanted = if mounted { Verdict::OursInUse } else { Verdict::OursIdle };
        assert!(survey.devices.iter().all(|d| d.verdict == Some(wanted)));
        assert_eq!(m.ours.asked.borrow().len(), 1, "all keepers are asked at once");
    }
}
