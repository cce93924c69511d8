//! The data path with real threads and sockets: against a server in this process that forgets unflushed writes,
//! stalls, lies and grows, and (tests with `root_`) against nbdkit through FUSE and a loop device.

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::forgetful::{Asks, Disk, Server};
use tempfile::TempDir;
use zerofsctl::error::{Error, Kind, Result};
use zerofsctl::keeper::path::{Completion, DataEvent, DataPath, DataPathConfig, LogState, Op, Prober};
use zerofsctl::zerofs::nbd::Command;

struct Bench {
    dir: TempDir,
    disk: Arc<Mutex<Disk>>,
    path: Option<Arc<DataPath>>,
    events: mpsc::Receiver<DataEvent>,
}

const MIB: usize = 1 << 20;

impl Bench {
    fn new(size: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk { volatile: vec![0; size], durable: vec![0; size], size, ..Disk::default() };
        let disk = Arc::new(Mutex::new(disk));
        let (path, events) = open(config(dir.path()), &disk).unwrap();
        Bench { dir, disk, path: Some(path), events }
    }

    fn path(&self) -> &Arc<DataPath> {
        self.path.as_ref().unwrap()
    }

    fn server(&self) -> Server {
        Server::start(self.dir.path(), &self.disk)
    }

    fn count(&self, command: Command) -> u64 {
        self.disk.lock().unwrap().counts.get(&(command as u16)).copied().unwrap_or(0)
    }

    fn lost(&self) -> String {
        loop {
            match self.events.recv_timeout(Duration::from_secs(20)).expect("the loss is told") {
                DataEvent::ServerLost(why) => return why,
                _ => continue,
            }
        }
    }
}

fn config(dir: &Path) -> DataPathConfig {
    DataPathConfig {
        run_dir: dir.to_owned(),
        export: "vol".into(),
        connections: 4,
        log_bytes: 8 << 20,
        io_timeout: None,
        volume: "vol".parse().unwrap(),
        epoch: 1,
        zeros_when_closed: true,
        replay_log: true,
    }
}

fn open(
    config: DataPathConfig,
    disk: &Arc<Mutex<Disk>>,
) -> Result<(Arc<DataPath>, mpsc::Receiver<DataEvent>)> {
    let (tell, events) = mpsc::channel();
    Ok((DataPath::new(config, Arc::new(Asks(Arc::clone(disk))), tell)?, events))
}

fn later(path: &DataPath, op: Op<'_>) -> mpsc::Receiver<Result<Vec<u8>, i32>> {
    let (tell, told) = mpsc::channel();
    path.submit(op, Completion::new(move |r| drop(tell.send(r.map(<[u8]>::to_vec)))));
    told
}

fn wait(told: &mpsc::Receiver<Result<Vec<u8>, i32>>) -> Result<Vec<u8>, i32> {
    told.recv_timeout(Duration::from_secs(30)).expect("an answer within thirty seconds")
}

fn now(path: &DataPath, op: Op<'_>) -> Result<Vec<u8>, i32> {
    wait(&later(path, op))
}

fn write(path: &DataPath, offset: usize, data: &[u8]) {
    now(path, Op::Write { offset: offset as u64, data, fua: false }).unwrap();
}

fn read(path: &DataPath, offset: usize, len: usize) -> Vec<u8> {
    now(path, Op::Read { offset: offset as u64, len: len as u32 }).unwrap()
}

#[test]
fn what_is_written_is_read_in_all_sizes() {
    let bench = Bench::new(64 * MIB);
    let _server = bench.server();
    let up = bench.path().server_up().unwrap();
    assert_eq!((up.entries, up.size), (0, 64 * MIB as u64));
    let mut rng = StdRng::seed_from_u64(1);
    let mut truth = vec![0; 64 * MIB];
    for len in [1, 511, 512, 4096, 100_000, MIB, 3 * MIB + 5, 20 * MIB] {
        let at = rng.random_range(0..truth.len() - len);
        let data: Vec<u8> = (0..len).map(|_| rng.random()).collect();
        write(bench.path(), at, &data);
        truth[at..at + len].copy_from_slice(&data);
        assert!(read(bench.path(), at, len) == data, "{len} bytes");
    }
    for (trim, len) in [(true, 40 * MIB), (false, 33 * MIB)] {
        let (offset, n) = (MIB as u64, len as u64);
        let op = if trim { Op::Trim { offset, len: n } } else { Op::Zero { offset, len: n, fua: true } };
        truth[MIB..MIB + len].fill(0);
        now(bench.path(), op).unwrap();
    }
    assert!(read(bench.path(), 0, truth.len()) == truth);
    assert_eq!(now(bench.path(), Op::Read { offset: 64 << 20, len: 1 }), Err(libc::EINVAL));
    assert_eq!(now(bench.path(), Op::Write { offset: 64 << 20, data: &[1], fua: false }), Err(libc::ENOSPC));
    assert_eq!(bench.count(Command::Trim), 2, "split at 32 MiB");
    bench.path().flush().unwrap();
    assert!(bench.disk.lock().unwrap().durable == truth);
    assert_eq!(bench.path().log_state(), LogState::Clean);
}

/// Writers in several threads, and a server that is killed again and again, forgetting what was not flushed.
fn kill_under_load(replay_log: bool) -> usize {
    let mut bench = Bench::new(16 * MIB);
    drop(bench.path.take());
    let (path, events) =
        open(DataPathConfig { replay_log, ..config(bench.dir.path()) }, &bench.disk).unwrap();
    (bench.path, bench.events) = (Some(path), events);
    let mut server = bench.server();
    bench.path().server_up().unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..4usize)
        .map(|w| {
            let (path, end, done) = (Arc::clone(bench.path()), Arc::clone(&end), Arc::clone(&done));
            std::thread::spawn(move || {
                // Each has its own quarter, in blocks of 4 KiB.
                let mut rng = StdRng::seed_from_u64(w as u64);
                let mut truth = vec![0u8; 1024];
                let mut n = 0u64;
                while !end.load(Ordering::SeqCst) {
                    let mut flying = Vec::new();
                    for _ in 0..rng.random_range(1..8) {
                        let block = rng.random_range(0..1024usize);
                        let offset = ((w * 1024 + block) * 4096) as u64;
                        n += 1;
                        let value = (n % 255 + 1) as u8;
                        if flying.iter().any(|(b, _, _)| *b == block) {
                            continue;
                        }
                        let (value, told) = match rng.random_range(0..10) {
                            0 => (0, later(&path, Op::Trim { offset, len: 4096 })),
                            1 => (0, later(&path, Op::Zero { offset, len: 4096, fua: false })),
                            _ => (
                                value,
                                later(
                                    &path,
                                    Op::Write { offset, data: &[value; 4096], fua: n.is_multiple_of(16) },
                                ),
                            ),
                        };
                        flying.push((block, value, told));
                    }
                    if n.is_multiple_of(64) {
                        now(&path, Op::Flush).unwrap();
                    }
                    for (block, value, told) in flying {
                        wait(&told).expect("a stall is no error");
                        truth[block] = value;
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                }
                (w, truth)
            })
        })
        .collect();
    let mut rng = StdRng::seed_from_u64(99);
    for _ in 0..12 {
        let goal = done.load(Ordering::SeqCst) + 150;
        let patience = Instant::now();
        while done.load(Ordering::SeqCst) < goal {
            assert!(patience.elapsed() < Duration::from_secs(30), "I/O stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
        server.kill();
        bench.lost();
        server = bench.server();
        bench.path().server_up().unwrap();
    }
    end.store(true, Ordering::SeqCst);
    let truths: Vec<_> = writers.into_iter().map(|w| w.join().unwrap()).collect();
    let mut wrong = 0;
    for (w, truth) in truths {
        for (block, value) in truth.into_iter().enumerate() {
            let found = read(bench.path(), (w * 1024 + block) * 4096, 4096);
            wrong += usize::from(found != [value; 4096]);
        }
    }
    assert_eq!(bench.path().stats().errors, 0);
    server.kill();
    wrong
}

#[test]
fn a_server_that_is_killed_under_load_is_a_stall_and_loses_nothing() {
    assert_eq!(kill_under_load(true), 0);
}

#[test]
fn without_the_replay_log_the_same_load_loses_acknowledged_writes() {
    let wrong = kill_under_load(false);
    assert!(wrong > 0, "the test above would not notice");
}

#[test]
fn what_a_dead_keeper_left_is_replayed_by_the_next() {
    let mut bench = Bench::new(16 * MIB);
    let server = bench.server();
    bench.path().server_up().unwrap();
    let data: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8).collect();
    write(bench.path(), 12345, &data);
    write(bench.path(), 9 * MIB, b"more");
    now(bench.path(), Op::Trim { offset: 12345, len: 100 }).unwrap();
    // As good as a kill: nothing is flushed, the file stays.
    drop(bench.path.take());
    server.kill();
    assert!(bench.disk.lock().unwrap().volatile.iter().all(|b| *b == 0), "all was forgotten");

    let next = DataPathConfig { epoch: 2, ..config(bench.dir.path()) };
    let (path, _events) = open(next.clone(), &bench.disk).unwrap();
    let left = LogState::LeftBehind { entries: 3, bytes: MIB as u64 + 104, epoch: 1 };
    assert_eq!(path.log_state(), left);
    // The volume cannot be opened by a second keeper meanwhile, and not by one of another boot or volume.
    assert_eq!(open(next.clone(), &bench.disk).err().map(|e| e.kind()), Some(Kind::Busy));
    assert_eq!(path.server_up().unwrap_err().kind(), Kind::Unreachable, "no server yet");
    let server = bench.server();
    let up = path.server_up().unwrap();
    assert_eq!((up.entries, up.bytes), (3, MIB as u64 + 104));
    assert_eq!(path.log_state(), LogState::Clean);
    let mut expected = data;
    expected[..100].fill(0);
    assert!(read(&path, 12345, MIB) == expected);
    assert_eq!(read(&path, 9 * MIB, 4), b"more");
    drop(path);
    server.kill();
    // Durable, since a replay ends with a flush.
    assert_eq!(bench.disk.lock().unwrap().volatile[9 * MIB..9 * MIB + 4], *b"more");
}

#[test]
fn a_foreign_log_is_refused_until_it_is_discarded() {
    let mut bench = Bench::new(MIB);
    let server = bench.server();
    bench.path().server_up().unwrap();
    write(bench.path(), 0, b"old");
    assert_eq!(bench.path().discard_log().unwrap_err().kind(), Kind::Refused, "in use");
    drop(bench.path.take());
    server.kill();
    let other = DataPathConfig { volume: "other".parse().unwrap(), ..config(bench.dir.path()) };
    let (path, _events) = open(other, &bench.disk).unwrap();
    assert!(matches!(path.log_state(), LogState::Foreign { why } if why.contains("vol")));
    let _server = bench.server();
    let e = path.server_up().unwrap_err();
    assert_eq!(e.kind(), Kind::Refused);
    assert!(e.hint_text().is_some());
    path.discard_log().unwrap();
    assert_eq!(path.server_up().unwrap().entries, 0);
    assert_eq!(read(&path, 0, 3), [0; 3]);
}

#[test]
fn a_server_that_stops_is_a_stall_even_when_the_sockets_are_full() {
    let bench = Bench::new(64 * MIB);
    let server = bench.server();
    bench.path().server_up().unwrap();
    server.stop(true);
    let block = vec![7; MIB];
    let told: Vec<_> = (0..24)
        .map(|i| later(bench.path(), Op::Write { offset: (i * MIB) as u64, data: &block, fua: false }))
        .collect();
    // Submitting did not block; reads and a flush queue up behind.
    let reads: Vec<_> =
        (0..64).map(|i| later(bench.path(), Op::Read { offset: i * MIB as u64, len: MIB as u32 })).collect();
    let flush = later(bench.path(), Op::Flush);
    std::thread::sleep(Duration::from_millis(200));
    assert!(told.iter().all(|t| t.try_recv().is_err()), "nothing is answered by a stopped server");
    server.stop(false);
    told.iter().chain(&reads).chain([&flush]).for_each(|t| drop(wait(t).unwrap()));
    for i in 0..24 {
        assert!(read(bench.path(), i * MIB, MIB) == block);
    }
    assert!(bench.path().stats().own_flushes > 0, "the log of 8 MiB must have been full");
}

#[test]
fn a_closed_or_lying_server_is_replaced_and_its_answers_are_not_believed() {
    let bench = Bench::new(4 * MIB);
    let server = bench.server();
    bench.path().server_up().unwrap();
    write(bench.path(), 0, &[9; 8192]);
    bench.disk.lock().unwrap().closed = true;
    let held = later(bench.path(), Op::Read { offset: 4096, len: 4096 });
    assert!(bench.lost().contains("closed"));
    server.kill();
    let server = bench.server();
    assert_eq!(bench.path().server_up().unwrap().entries, 1);
    assert!(wait(&held).unwrap() == [9; 4096]);

    write(bench.path(), 0, &[8; 8192]);
    bench.disk.lock().unwrap().lies = true;
    let held = later(bench.path(), Op::Flush);
    assert!(bench.lost().contains("not durable"));
    assert!(held.try_recv().is_err(), "the flush is not answered");
    server.kill();
    let server = bench.server();
    bench.path().server_up().unwrap();
    wait(&held).unwrap();
    server.kill();
    assert!(bench.disk.lock().unwrap().volatile[..8192] == [8; 8192]);
}

#[test]
fn errors_are_asked_about_and_only_then_told() {
    let bench = Bench::new(4 * MIB);
    let _server = bench.server();
    bench.path().server_up().unwrap();
    bench.disk.lock().unwrap().errors = vec![libc::EIO as u32; 2];
    write(bench.path(), 0, &[1; 4096]);
    assert_eq!(bench.path().stats().retries, 2);
    bench.disk.lock().unwrap().errors = vec![libc::ENOSPC as u32];
    let full = now(bench.path(), Op::Write { offset: 0, data: &[2; 4096], fua: false });
    assert_eq!(full, Err(libc::ENOSPC));
    let told = bench.events.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(matches!(told, DataEvent::ErrorDelivered { errno: libc::ENOSPC, what } if what.contains("4096")));
    bench.path().flush().unwrap();
    assert_eq!(bench.path().log_state(), LogState::Clean, "a failed write is not kept");
}

#[test]
fn a_failed_volume_answers_everything_with_an_error() {
    let bench = Bench::new(4 * MIB);
    let server = bench.server();
    bench.path().server_up().unwrap();
    write(bench.path(), 0, &[1; 4096]);
    server.stop(true);
    let held = later(bench.path(), Op::Read { offset: 0, len: 4096 });
    bench.path().fail("fenced");
    assert_eq!(wait(&held), Err(libc::EIO));
    assert_eq!(now(bench.path(), Op::Flush), Err(libc::EIO));
    assert_eq!(bench.path().log_state(), LogState::Clean);
    server.kill();
    let _server = bench.server();
    assert_eq!(bench.path().server_up().unwrap_err().kind(), Kind::Refused);
}

#[test]
fn a_time_limit_turns_a_stall_into_an_error() {
    let bench = Bench::new(4 * MIB);
    let _server = bench.server();
    drop(bench.path);
    let limited = DataPathConfig { io_timeout: Some(Duration::from_millis(300)), ..config(bench.dir.path()) };
    let (path, _events) = open(limited, &bench.disk).unwrap();
    path.server_up().unwrap();
    path.server_down();
    let start = Instant::now();
    assert_eq!(now(&path, Op::Read { offset: 0, len: 512 }), Err(libc::EIO));
    assert!(start.elapsed() > Duration::from_millis(250), "{:?}", start.elapsed());
    assert!(path.stats().timed_out);
    path.server_up().unwrap();
    assert_eq!(read(&path, 0, 512), [0; 512]);
    assert!(!path.stats().timed_out);
}

#[test]
fn a_grown_device_is_learnt_while_io_goes_on_and_a_shrunk_one_is_refused() {
    let bench = Bench::new(4 * MIB);
    let _server = bench.server();
    bench.path().server_up().unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let load = {
        let (path, end) = (Arc::clone(bench.path()), Arc::clone(&end));
        std::thread::spawn(move || {
            let mut n = 0u32;
            while !end.load(Ordering::SeqCst) {
                write(&path, (n % 1000) as usize * 4096, &[n as u8; 4096]);
                n += 1;
            }
            n
        })
    };
    for size in [8 * MIB, 12 * MIB] {
        {
            let mut disk = bench.disk.lock().unwrap();
            disk.volatile.resize(size, 0);
            disk.durable.resize(size, 0);
            disk.size = size;
        }
        assert_eq!(bench.path().resize().unwrap(), size as u64);
        write(bench.path(), size - 4096, &[5; 4096]);
    }
    end.store(true, Ordering::SeqCst);
    assert!(load.join().unwrap() > 0);
    bench.disk.lock().unwrap().size = 4 * MIB;
    let e = bench.path().resize().unwrap_err();
    assert_eq!(e.kind(), Kind::Refused);
    assert_eq!(bench.path().size(), 12 * MIB as u64);
    assert_eq!(bench.path().stats().stalls, 0);
}

// ---- Through FUSE and a loop device, on nbdkit.

fn run(program: &str, args: &[&str]) -> String {
    let out =
        Program::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} is needed: {e}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// An nbdkit on `DIR/nbd.sock`.
struct Nbdkit(Child);

impl Nbdkit {
    fn start(dir: &Path, args: &[&str]) -> Self {
        let socket = dir.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        let child = Program::new("nbdkit")
            .args(["-f", "-U"])
            .arg(&socket)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdkit is needed");
        let start = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "nbdkit does not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        Nbdkit(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Healthy;

impl Prober for Healthy {
    fn database_open(&self) -> Result<bool, Error> {
        Ok(true)
    }
    fn flush_was_honest(&self, _: Instant) -> bool {
        true
    }
}

/// A mounted data path with a loop device.
struct Device {
    path: Arc<DataPath>,
    events: mpsc::Receiver<DataEvent>,
    dir: TempDir,
    device: PathBuf,
}

impl Device {
    fn attach(dir: TempDir) -> Self {
        // SAFETY: no arguments.
        assert_eq!(unsafe { libc::geteuid() }, 0, "this test needs root");
        let (tell, events) = mpsc::channel();
        let config = DataPathConfig { log_bytes: 64 << 20, ..config(dir.path()) };
        let path = DataPath::new(config, Arc::new(Healthy), tell).unwrap();
        path.server_up().unwrap();
        let fuse = dir.path().join("fuse");
        std::fs::create_dir(&fuse).unwrap();
        path.mount_fuse(&fuse).unwrap();
        let disk = fuse.join("disk");
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), path.size());
        let device = run("losetup", &["-f", "--show", "--direct-io=on", disk.to_str().unwrap()]);
        let dio = run("losetup", &["-n", "-O", "DIO", device.trim()]);
        assert_eq!(dio.trim(), "1", "the loop device does no direct I/O");
        Device { path, events, dir, device: device.trim().into() }
    }

    fn name(&self) -> &str {
        self.device.to_str().unwrap()
    }

    fn open(&self) -> File {
        use std::os::unix::fs::OpenOptionsExt;
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&self.device).unwrap()
    }

    fn detach(mut self) {
        let busy = self.path.unmount_fuse().unwrap_err();
        assert_eq!(busy.kind(), Kind::Busy);
        run("losetup", &["-d", self.name()]);
        self.device = "none".into();
        // The kernel lets go of the file a moment later.
        let start = Instant::now();
        while let Err(e) = self.path.unmount_fuse() {
            assert!(start.elapsed() < Duration::from_secs(10), "{e}");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!self.dir.path().join("fuse/disk").exists());
    }
}

impl Drop for Device {
    /// A test that fails leaves nothing behind either.
    fn drop(&mut self) {
        let _ = Program::new("losetup").arg("-d").arg(&self.device).stderr(Stdio::null()).status();
        self.path.fail("the test is over");
    }
}

/// Memory for direct I/O: one MiB that starts on a page.
fn aligned(memory: &mut Vec<u8>) -> &mut [u8] {
    memory.resize(MIB + 4096, 0);
    let start = memory.as_ptr().align_offset(4096);
    &mut memory[start..start + MIB]
}

#[test]
fn root_flush_fua_trim_and_zeros_reach_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let logfile = format!("logfile={}", log.display());
    let _nbdkit = Nbdkit::start(dir.path(), &["--filter=log", "memory", "size=64M", &logfile]);
    let device = Device::attach(dir);
    let count = |what: &str| {
        let text = std::fs::read_to_string(&log).unwrap();
        text.lines().filter(|l| l.contains(&format!(" {what} id="))).count()
    };
    let mut memory = Vec::new();
    let data = aligned(&mut memory);
    data.fill(0xa5);
    let file = device.open();

    file.write_all_at(data, 0).unwrap();
    assert!(count("Write") >= 1);
    let before = count("Flush");
    file.sync_all().unwrap();
    assert!(count("Flush") > before, "fsync of the block device flushes the server");
    assert_eq!(device.path.log_state(), LogState::Clean);

    // A synchronous direct write is force unit access, which a loop device does by a flush.
    let before = count("Flush");
    let dsync = {
        use std::os::unix::fs::OpenOptionsExt;
        OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
            .open(&device.device)
            .unwrap()
    };
    dsync.write_all_at(&data[..4096], 4096).unwrap();
    assert!(count("Flush") > before, "FUA reaches the server");
    drop(dsync);

    let before = count("Trim");
    run("blkdiscard", &["-o", "65536", "-l", "131072", device.name()]);
    assert!(count("Trim") > before, "discard reaches the server");
    let before = count("Trim") + count("Zero");
    run("blkdiscard", &["-z", "-o", "524288", "-l", "65536", device.name()]);
    assert!(count("Trim") + count("Zero") > before, "write zeroes reaches the server without data");
    file.read_exact_at(data, 0).unwrap();
    for (i, byte) in data.iter().enumerate() {
        let hole = (65536..196_608).contains(&i) || (524_288..589_824).contains(&i);
        assert_eq!(*byte, if hole { 0 } else { 0xa5 }, "byte {i}");
    }
    drop(file);
    device.detach();
}

fn fio(device: &str, name: &str, seconds: u32, extra: &[&str]) -> Child {
    Program::new("fio")
        .args(["--ioengine=libaio", "--direct=1", "--iodepth=16", "--bsrange=512-64k", "--verify=crc32c"])
        .args(["--rw=randwrite", "--verify_fatal=1", "--serialize_overlap=1", "--output-format=normal"])
        .args([format!("--name={name}"), format!("--filename={device}"), format!("--runtime={seconds}")])
        .args(["--time_based", "--do_verify=1", "--verify_backlog=256"])
        .args(extra)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio is needed")
}

fn fio_ends_well(fio: Child) {
    let out = fio.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("err= 0") && !text.contains("verify failed") && !text.contains("bad "), "{text}");
}

#[test]
fn root_fio_verifies_and_all_three_file_systems_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let _nbdkit = Nbdkit::start(dir.path(), &["memory", "size=512M"]);
    let device = Device::attach(dir);
    fio_ends_well(fio(device.name(), "check", 4, &["--fsync=32"]));
    for mkfs in [&["mkfs.ext4", "-Fq"][..], &["mkfs.xfs", "-fq"], &["mkfs.btrfs", "-fq"]] {
        run(mkfs[0], &[mkfs[1], device.name()]);
        let found = run("blkid", &["-p", "-o", "value", "-s", "TYPE", device.name()]);
        assert_eq!(found.trim(), &mkfs[0][5..]);
    }
    assert_eq!(device.path.stats().errors, 0);
    device.detach();
}

#[test]
fn root_a_killed_and_restarted_server_is_a_stall_for_the_block_device() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    File::create(&store).unwrap().set_len(256 << 20).unwrap();
    let store = store.to_str().unwrap().to_owned();
    // A little delay, so that requests are in flight at the kill.
    let args = ["--filter=delay", "file", store.as_str(), "wdelay=2ms", "rdelay=1ms"];
    let mut nbdkit = Nbdkit::start(dir.path(), &args);
    let device = Device::attach(dir);
    let load = fio(device.name(), "kill", 6, &["--size=64m"]);
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(700));
        nbdkit.kill();
        let event = device.events.recv_timeout(Duration::from_secs(10)).expect("the loss is told");
        assert!(matches!(event, DataEvent::ServerLost(_)), "{event:?}");
        nbdkit = Nbdkit::start(device.dir.path(), &args);
        device.path.server_up().unwrap();
    }
    fio_ends_well(load);
    let stats = device.path.stats();
    assert_eq!((stats.stalls, stats.errors), (5, 0), "{stats:?}");
    assert!(stats.replayed_entries > 0, "{stats:?}");
    device.detach();
    nbdkit.kill();
}
