//! I/O through the keeper: ext4 on a loop device on the FUSE file, with ZeroFS killed, its storage cut off, or
//! the keeper itself killed under the load. The filesystem may see stalls, and nothing else.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::fio::{FioJob, FioReport};
use support::keeper::{LONG, SIZE, Volume, client, nothing_left, ready, signal, start, stop, stop_with};
use support::moto::Moto;
use support::proxy::{FaultProxy, Mode};
use support::wait_until;
use zerofsctl::error::Kind;
use zerofsctl::keeper::control::State;
use zerofsctl::keeper::path::{LogState, Stats};
use zerofsctl::zerofs::config::Aws;
use zerofsctl::zerofs::ninep;

/// A volume whose device is there.
struct Disk<'a> {
    v: &'a Volume,
    device: PathBuf,
    mount: Option<PathBuf>,
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(support::require_program(program)).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

impl Disk<'_> {
    /// Starts the volume and makes the device.
    fn attach(v: &Volume) -> Disk<'_> {
        support::require_root();
        ready(&v.config);
        ninep::create_disk(&v.config.run_dir, "disk", SIZE).unwrap();
        let mut client = client(&v.config).within(LONG);
        client.replay().unwrap();
        client.mount().unwrap();
        let file = v.config.run_dir.join("fuse/disk");
        let args = ["--find", "--show", "--direct-io=on", file.to_str().unwrap()];
        let device = run("losetup", &args).trim().into();
        Disk { v, device, mount: None }
    }

    /// Mounts the filesystem on it, making one if wanted.
    fn mount(&mut self, make: bool) -> PathBuf {
        let device = self.device.to_str().unwrap();
        if make {
            run("mkfs.ext4", &["-q", "-E", "nodiscard", device]);
        }
        let dir = self.v.dir.join("mnt");
        fs::create_dir_all(&dir).unwrap();
        run("mount", &["-t", "ext4", device, dir.to_str().unwrap()]);
        self.mount = Some(dir.clone());
        dir
    }

    fn unmount(&mut self) {
        if let Some(dir) = self.mount.take() {
            run("umount", &[dir.to_str().unwrap()]);
        }
    }

    /// Takes it all down, and shows that the filesystem is sound and nothing is left.
    fn detach(mut self) -> Stats {
        if self.mount.is_some() {
            self.unmount();
            run("e2fsck", &["-fn", self.device.to_str().unwrap()]);
        }
        run("losetup", &["--detach", self.device.to_str().unwrap()]);
        let mut client = client(&self.v.config).within(LONG);
        let stats = client.status().unwrap().stats;
        wait_until("the loop device lets go", LONG, || client.unmount().is_ok());
        stop(&self.v.config);
        stats
    }
}

/// A load that reads back and compares what it writes, for some seconds.
fn load(dir: &Path, name: &str, direct: bool, fsync: bool, seconds: u64) -> FioJob {
    FioJob::new(dir, name)
        .set("filename", dir.join(format!("{name}.data")).display())
        .set("rw", "randwrite")
        .set("bsrange", "4k-64k")
        .set("size", "48m")
        .set("ioengine", if direct { "libaio" } else { "psync" })
        .set("iodepth", if direct { 16 } else { 1 })
        .set("direct", u8::from(direct))
        .set("fsync", if fsync { 32 } else { 0 })
        .set("verify", "crc32c")
        .set("verify_backlog", 256)
        .set("verify_fatal", 1)
        .set("randrepeat", 0)
        .set("time_based", 1)
        .set("runtime", seconds)
}

/// Kills ZeroFS about every second while the load runs.
fn kill_while(v: &Volume, job: FioJob) -> (FioReport, u32) {
    let mut run = job.start();
    let mut kills = 0;
    let begun = Instant::now();
    while run.running() {
        std::thread::sleep(Duration::from_millis(700 + 137 * u64::from(kills % 5)));
        if let Some(zerofs) = client(&v.config).status().unwrap().zerofs
            && run.running()
        {
            // It may have gone by itself since.
            let killed = nix::sys::signal::kill(nix::unistd::Pid::from_raw(zerofs.pid), Signal::SIGKILL);
            kills += u32::from(killed.is_ok());
        }
        assert!(begun.elapsed() < Duration::from_secs(240), "the load does not end:\n{}", v.logs());
    }
    (run.finish(LONG), kills)
}

fn killing(direct: bool, fsync: bool) {
    let v = Volume::new();
    let mut disk = Disk::attach(&v);
    let dir = disk.mount(true);
    for round in 0..support::rounds(1, 3) {
        let (report, kills) = kill_while(&v, load(&dir, &format!("load{round}"), direct, fsync, 12));
        report.assert_clean();
        // Few on a busy machine, where most of the time goes into starting it again.
        assert!(kills >= 3, "{kills} kills");
        assert!(report.writes.ios > 20, "{report:?}");
        fs::remove_file(dir.join(format!("load{round}.data"))).unwrap();
    }
    let stats = disk.detach();
    assert_eq!(stats.errors, 0, "{stats:?}");
    assert!(stats.replayed_entries > 0, "{stats:?}");
}

#[test]
fn root_direct_writes_survive_kills_of_zerofs() {
    killing(true, false);
}

#[test]
fn root_direct_writes_with_fsync_survive_kills_of_zerofs() {
    killing(true, true);
}

#[test]
fn root_buffered_writes_survive_kills_of_zerofs() {
    killing(false, false);
}

#[test]
fn root_buffered_writes_with_fsync_survive_kills_of_zerofs() {
    killing(false, true);
}

#[test]
fn root_without_the_replay_log_the_same_load_loses_data() {
    let mut v = Volume::new();
    v.config.replay_log = false;
    support::require_root();
    ready(&v.config);
    ninep::create_disk(&v.config.run_dir, "disk", SIZE).unwrap();
    let mut c = client(&v.config).within(LONG);
    c.mount().unwrap();
    // Without a filesystem, whose broken state nobody could take down.
    let file = v.config.run_dir.join("fuse/disk");
    let job = load(v.dir.path(), "lossy", true, false, 12).set("filename", file.display());
    let (report, kills) = kill_while(&v, job);
    assert!(kills >= 1);
    assert!(report.writes.ios > 20, "{report:?}");
    let lost = !report.verify_failures.is_empty() || report.errno == i64::from(libc::EILSEQ);
    assert!(lost, "nothing is missing: {report:?}");
    c.unmount().unwrap();
    stop(&v.config);
}

#[test]
fn root_the_watchdogs_kills_are_stalls_too() {
    let v = Volume::new();
    let mut disk = Disk::attach(&v);
    let dir = disk.mount(true);
    let mut run = load(&dir, "load", true, true, 12).start();
    let lines = [
        "ERROR slatedb::dispatcher: background task failed [name=memtable_writer]",
        " WARN slatedb::mem_table_flush: won't flush imm to l0 because too many l0 files",
    ];
    for n in 0.. {
        std::thread::sleep(Duration::from_millis(1100));
        // Only a server that serves: faster than it can start, nothing would ever be done.
        wait_until("it is ready, or the load is over", LONG, || {
            !run.running() || client(&v.config).status().unwrap().state == State::Ready
        });
        if !run.running() {
            break;
        }
        v.log(&format!("2026-11-20T17:58:59.216453Z {}\n", lines[n % 2]));
    }
    run.finish(LONG).assert_clean();
    let status = client(&v.config).status().unwrap();
    assert!(status.restarts >= 3, "{status:?}");
    assert_eq!(disk.detach().errors, 0);
}

/// Fills one 4 KiB block with a number that depends on its place and on `salt`.
fn block(index: u64, salt: u64) -> Vec<u8> {
    (0..512u64)
        .flat_map(|i| (index.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (salt << 32) ^ i).to_le_bytes())
        .collect()
}

#[repr(align(4096))]
struct Aligned([u8; 4096]);

fn open_direct(path: &Path) -> File {
    File::options().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(path).unwrap()
}

fn write_block(file: &File, index: u64, salt: u64) {
    let mut buffer = Box::new(Aligned([0; 4096]));
    buffer.0.copy_from_slice(&block(index, salt));
    file.write_all_at(&buffer.0, index * 4096).unwrap();
}

fn read_block(file: &File, index: u64) -> Vec<u8> {
    let mut buffer = Box::new(Aligned([0; 4096]));
    file.read_exact_at(&mut buffer.0, index * 4096).unwrap();
    buffer.0.to_vec()
}

#[test]
fn root_what_was_acknowledged_survives_the_death_of_keeper_and_zerofs() {
    for zerofs_too in [true, false] {
        let v = Volume::new();
        let disk = Disk::attach(&v);
        let device = open_direct(&disk.device);
        // The second round overwrites some of the first; nothing is flushed.
        for (salt, count) in [(1, 500), (2, 200)] {
            (0..count).for_each(|i| write_block(&device, i * 7, salt));
        }
        let status = client(&v.config).status().unwrap();
        assert!(matches!(status.log, LogState::LeftBehind { entries: 1.., .. }), "{:?}", status.log);
        signal(status.keeper.pid, Signal::SIGKILL);
        if zerofs_too {
            signal(status.zerofs.as_ref().unwrap().pid, Signal::SIGKILL);
        }
        wait_until("the keeper is gone", LONG, || !status.keeper.is_alive());
        drop(device);
        run("losetup", &["--detach", disk.device.to_str().unwrap()]);

        start(&v.config);
        let mut c = client(&v.config).within(LONG);
        let after = c.wait_ready(LONG).unwrap();
        let LogState::LeftBehind { entries, .. } = after.log else { panic!("{after:?}") };
        assert_eq!(c.replay().unwrap().entries, entries);
        let now = c.status().unwrap();
        assert_ne!(now.zerofs, status.zerofs, "one that may still carry out old requests is replaced");
        assert_eq!(now.log, LogState::Clean);
        c.mount().unwrap();
        let file = open_direct(&v.config.run_dir.join("fuse/disk"));
        for i in 0..500 {
            let salt = if i < 200 { 2 } else { 1 };
            assert!(read_block(&file, i * 7) == block(i * 7, salt), "block {i}");
        }
        drop(file);
        c.unmount().unwrap();
        stop(&v.config);
    }
}

#[test]
fn root_a_stop_flushes_refuses_while_mounted_and_force_keeps_the_log() {
    let v = Volume::new();
    let disk = Disk::attach(&v);
    let keeper = client(&v.config).status().unwrap().keeper;
    write_block(&open_direct(&disk.device), 3, 1);
    let e = stop_with(&v.config, 5.0, false).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    signal(keeper.pid, Signal::SIGTERM);
    std::thread::sleep(Duration::from_secs(1));
    assert!(keeper.is_alive(), "a keeper whose device is in use ignores SIGTERM");
    let e = client(&v.config).discard_log().unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    wait_until("but flushes", LONG, || client(&v.config).status().unwrap().log == LogState::Clean);
    write_block(&open_direct(&disk.device), 4, 1);
    run("losetup", &["--detach", disk.device.to_str().unwrap()]);
    wait_until("the device lets go", LONG, || client(&v.config).unmount().is_ok());

    let stopped = stop_with(&v.config, 5.0, true).unwrap();
    assert!(!stopped.clean, "{stopped:?}");
    assert_eq!((stopped.kept_entries, stopped.kept_bytes), (1, 4096));
    let left: Vec<_> = fs::read_dir(&v.config.run_dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["replay.log"]);

    // A stop before the replay keeps it too, and says so.
    ready(&v.config);
    let stopped = stop_with(&v.config, 10.0, false).unwrap();
    assert_eq!((stopped.clean, stopped.kept_entries), (false, 1));

    let disk = Disk::attach(&v);
    assert!(read_block(&open_direct(&disk.device), 3) == block(3, 1));
    assert!(read_block(&open_direct(&disk.device), 4) == block(4, 1));
    disk.detach();
    nothing_left(&v.config);
}

#[test]
fn root_a_fenced_volume_fails_its_device_and_leaves_nothing() {
    let v = Volume::new();
    let disk = Disk::attach(&v);
    let elsewhere = v.elsewhere();
    let device = open_direct(&disk.device);
    write_block(&device, 1, 1);
    ready(&elsewhere);
    wait_until("it is fenced", LONG, || client(&v.config).status().unwrap().state == State::Fenced);
    let mut buffer = Box::new(Aligned([0; 4096]));
    let e = device.read_exact_at(&mut buffer.0, 4096).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(nix::libc::EIO), "no zeros where data was");
    drop(device);
    run("losetup", &["--detach", disk.device.to_str().unwrap()]);
    wait_until("the device lets go", LONG, || client(&v.config).unmount().is_ok());
    let stopped = stop_with(&v.config, 10.0, false).unwrap();
    assert_eq!((stopped.clean, stopped.kept_entries), (false, 0), "{stopped:?}");
    assert!(
        matches!(&stopped.warnings[..], [w] if w.contains("1 writes that were not flushed")),
        "{stopped:?}"
    );
    assert!(!v.logs().contains("cannot empty the replay log"));
    nothing_left(&v.config);
    stop(&elsewhere);
}

#[test]
fn root_the_device_grows() {
    let v = Volume::new();
    let disk = Disk::attach(&v);
    ninep::grow_disk(&v.config.run_dir, "disk", 2 * SIZE).unwrap();
    assert_eq!(client(&v.config).resize().unwrap(), 2 * SIZE);
    run("losetup", &["--set-capacity", disk.device.to_str().unwrap()]);
    let bytes = run("blockdev", &["--getsize64", disk.device.to_str().unwrap()]);
    assert_eq!(bytes.trim(), (2 * SIZE).to_string());
    write_block(&open_direct(&disk.device), SIZE / 4096 + 5, 1);
    disk.detach();
}

/// The load on an S3 store that refuses connections for `seconds`.
fn outage(seconds: u64, mode: Mode) {
    let folder = support::dir::TestDir::new();
    let moto = Moto::start(folder.path());
    moto.create_bucket("vols");
    let proxy = FaultProxy::start(moto.address());
    let mut v = Volume::with(|input| {
        input.storage_url = "s3://vols/csi/vol1".to_owned();
        input.aws = Aws {
            endpoint: Some(format!("http://{}", proxy.address())),
            region: Some("us-east-1".to_owned()),
            allow_http: Some(true),
            access_key_id: Some("key".to_owned()),
            secret_access_key: Some("secret-key".to_owned().into()),
            session_token: None,
        };
    });
    v.config.start_limit_seconds = 60;
    let mut disk = Disk::attach(&v);
    let dir = disk.mount(true);
    // Something old, which is not in any cache of ours.
    let old: Vec<u8> = (0..2048).flat_map(|i| block(i, 9)).collect();
    fs::write(dir.join("old"), &old).unwrap();
    run("sync", &["-f", dir.to_str().unwrap()]);
    let mut run_ = load(&dir, "load", true, true, seconds + 12).start();
    std::thread::sleep(Duration::from_secs(4));
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    proxy.set(mode);
    let begun = Instant::now();
    let reader = {
        let path = dir.join("old");
        std::thread::spawn(move || fs::read(path).unwrap())
    };
    std::thread::sleep(Duration::from_secs(seconds).saturating_sub(begun.elapsed()));
    proxy.set(Mode::Pass);
    assert!(reader.join().unwrap() == old, "what was read during the outage:\n{}", v.logs());
    wait_until("the load ends", Duration::from_secs(180), || !run_.running());
    run_.finish(LONG).assert_clean();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert!(fs::read(dir.join("old")).unwrap() == old);
    let restarts = client(&v.config).status().unwrap().restarts;
    if mode == Mode::Refuse && seconds >= 5 {
        assert!(restarts > 0, "ZeroFS cannot have survived that:\n{}", v.logs());
    }
    let stats = disk.detach();
    assert_eq!(stats.errors, 0, "{stats:?}");
}

#[test]
fn root_a_store_that_refuses_for_2_seconds_is_a_stall() {
    outage(2, Mode::Refuse);
}

#[test]
fn root_a_store_that_refuses_for_5_seconds_is_a_stall() {
    outage(5, Mode::Refuse);
}

#[test]
fn root_a_store_that_refuses_for_60_seconds_is_a_stall() {
    outage(60, Mode::Refuse);
}

#[test]
fn root_a_store_that_hangs_for_20_seconds_is_a_stall() {
    outage(20, Mode::Stall);
}
