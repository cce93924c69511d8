//! The FUSE transport beside nbdfuse: the same NBD server, the same loop device, the same fio job.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use zerofsctl::error::Result;
use zerofsctl::keeper::path::{DataPath, DataPathConfig, Prober};
use zerofsctl::zerofs::sock;

use crate::command::Zerofsctl;
use crate::floor::{Device, Floor, attach_loop, run};
use crate::support::dir::TestDir;
use crate::support::fio::FioJob;
use crate::support::require_program;
use crate::{Scale, against_least, head, median, row, say};

const LIMIT: Duration = Duration::from_secs(60);
/// The part of the device that the jobs read and write; written once before, so that reads find data.
const SPAN: &str = "256m";
const PATTERNS: [&str; 2] = ["randread", "randwrite"];

/// IOPS of one side: reads, writes.
type Iops = [Vec<f64>; 2];

/// How a server is tried with both sides.
type Trial = fn(&Scale) -> (Iops, Iops);

/// Both servers, one table.
pub fn compare(scale: &Scale) {
    println!(
        "## The FUSE transport: fio 4k, iodepth 16, direct, {} s, {SPAN}; median of {} turns each\n",
        scale.seconds,
        turns(scale)
    );
    head(&["server", "job", "zerofsctl, IOPS", "nbdfuse + losetup, IOPS", "ratio"]);
    let servers: [(&str, Trial); 2] = [("nbdkit memory", on_memory), ("ZeroFS, local store", on_zerofs)];
    for (server, trial) in servers {
        let (ours, floor) = trial(scale);
        for (i, pattern) in PATTERNS.iter().enumerate() {
            let (ours, floor) = (median(&ours[i]), median(&floor[i]));
            row([
                server.to_owned(),
                (*pattern).to_owned(),
                format!("{ours:.0}"),
                format!("{floor:.0}"),
                against_least(ours / floor, 1.5),
            ]);
        }
    }
    println!();
}

fn turns(scale: &Scale) -> usize {
    scale.rounds.min(3)
}

/// One nbdkit memory server for both sides, in turns.
fn on_memory(scale: &Scale) -> (Iops, Iops) {
    let dir = TestDir::new();
    let nbdkit = Memory::serve(dir.path());
    let (mut ours, mut floor) = (Iops::default(), Iops::default());
    for turn in 0..turns(scale) {
        say(format!("transport on nbdkit, turn {} of {}", turn + 1, turns(scale)));
        let keeper = Keeper::attach(dir.path());
        measure(scale, dir.path(), &keeper.device, turn == 0, &mut ours);
        drop(keeper);
        let nbdfuse = Device::attach(dir.path());
        measure(scale, dir.path(), &nbdfuse.path, false, &mut floor);
    }
    drop(nbdkit);
    (ours, floor)
}

/// An nbdkit server with 1 GiB of memory behind `nbd.sock`; ended when dropped.
pub struct Memory(Child);

impl Memory {
    /// Listens in this folder when this returns.
    pub fn serve(dir: &Path) -> Memory {
        let nbdkit = Command::new(require_program("nbdkit"))
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(dir.join("nbd.sock"))
            .args(["memory", "1G"])
            .current_dir(dir)
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdkit can be started");
        let began = Instant::now();
        while sock::connect(dir, "nbd.sock").is_err() {
            assert!(began.elapsed() < LIMIT, "nbdkit does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Memory(nbdkit)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A ZeroFS server for each side, with the same settings, in turns.
fn on_zerofs(scale: &Scale) -> (Iops, Iops) {
    let dir = TestDir::new();
    let zerofsctl = Zerofsctl::new(&dir.join("z"));
    let link = dir.join("device");
    let target = link.display().to_string();
    let by_hand = dir.join("f");
    let floor_volume = Floor::new(&by_hand, 1 << 30);
    let (mut ours, mut floor) = (Iops::default(), Iops::default());
    for turn in 0..turns(scale) {
        say(format!("transport on ZeroFS, turn {} of {}", turn + 1, turns(scale)));
        zerofsctl.time(&[
            "attach",
            "bench",
            "--target",
            &target,
            "--size",
            "1Gi",
            "--block",
            "--transport",
            "fuse",
        ]);
        measure(scale, dir.path(), &link, turn == 0, &mut ours);
        zerofsctl.time(&["detach", "bench"]);

        let server = floor_volume.start_server();
        floor_volume.ensure_disk();
        let nbdfuse = Device::attach(&by_hand);
        measure(scale, dir.path(), &nbdfuse.path, turn == 0, &mut floor);
        drop(nbdfuse);
        drop(server);
    }
    (ours, floor)
}

fn measure(scale: &Scale, dir: &Path, device: &Path, fill: bool, into: &mut Iops) {
    let job = |name: &str| {
        FioJob::new(dir, name)
            .set("filename", device.display())
            .set("ioengine", "libaio")
            .set("direct", 1)
            .set("iodepth", 16)
            .set("size", SPAN)
    };
    let limit = LIMIT + Duration::from_secs(scale.seconds);
    if fill {
        let filled = job("fill").set("rw", "write").set("bs", "1m").set("end_fsync", 1).run(limit);
        filled.assert_clean();
    }
    for (i, pattern) in PATTERNS.iter().enumerate() {
        let report = job(pattern)
            .set("rw", pattern)
            .set("bs", "4k")
            .set("time_based", 1)
            .set("runtime", scale.seconds)
            .set("ramp_time", 1)
            .set("randrepeat", 0)
            .run(limit);
        report.assert_clean();
        into[i].push(report.reads.iops + report.writes.iops);
    }
}

/// The keeper's data path in this process, with the FUSE transport and a loop device on it.
pub struct Keeper {
    path: Arc<DataPath>,
    fuse: PathBuf,
    /// The loop device.
    pub device: PathBuf,
}

/// nbdkit never lies.
struct Honest;

impl Prober for Honest {
    fn database_open(&self) -> Result<bool> {
        Ok(true)
    }

    fn flush_was_honest(&self, _: Instant) -> bool {
        true
    }
}

impl Keeper {
    /// On the NBD server in this folder.
    pub fn attach(run_dir: &Path) -> Keeper {
        let path = data_path(run_dir, true);
        let fuse = run_dir.join("fuse");
        fs::create_dir_all(&fuse).expect("the bench's folder can be written");
        path.mount_fuse(&fuse).expect("FUSE can be mounted");
        let device = attach_loop(&fuse.join("disk"));
        Keeper { path, fuse, device }
    }
}

/// A data path with the NBD server in this folder as its server. As with ZeroFS 0.19.1, every read is looked at if this
/// server may answer with zeros that are none.
pub fn data_path(run_dir: &Path, zeros_when_closed: bool) -> Arc<DataPath> {
    let (events, _) = mpsc::channel();
    let config = DataPathConfig {
        run_dir: run_dir.into(),
        export: "disk".into(),
        connections: 4,
        log_bytes: 256 << 20,
        io_timeout: None,
        volume: "bench".parse().expect("a valid volume id"),
        epoch: 1,
        zeros_when_closed,
        replay_log: true,
    };
    let path = DataPath::new(config, Arc::new(Honest), events).expect("a data path can be made");
    path.server_up().expect("the server answers");
    path
}

impl Drop for Keeper {
    fn drop(&mut self) {
        run("losetup", &["--detach".as_ref(), self.device.as_ref()]);
        let began = Instant::now();
        // The loop device lets go of the file a moment after losetup returns.
        while self.path.unmount_fuse().is_err() {
            assert!(began.elapsed() < LIMIT, "{} stays busy", self.fuse.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.path.flush().expect("nbdkit answers");
        self.path.server_down();
    }
}
