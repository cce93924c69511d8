//! The NBD transport beside `nbd-client -connections 4`: one server, one kernel, the same fio jobs in turns. Our guarded
//! and direct paths, and the FUSE transport for the record. The data path runs in this process, with the sockets, the
//! flags and the queue settings of a keeper; what this process uses of the processor is its price.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use zerofsctl::host::nbd::sysfs::Queue;
use zerofsctl::host::nbd::{netlink, sysfs};
use zerofsctl::keeper::control::NbdPath;
use zerofsctl::keeper::device::{GUARDED_SOCKETS, direct_socket, queue, server_flags, sockets_of};
use zerofsctl::keeper::path::DataPath;
use zerofsctl::zerofs::nbd::{Command, RequestHeader, SimpleReply, TransmissionFlags};

use crate::command::Zerofsctl;
use crate::floor::{Floor, Server, run};
use crate::support::dir::TestDir;
use crate::support::fio::FioJob;
use crate::support::vm::{disconnect, free_index, require_nbd};
use crate::support::wait_until;
use crate::transport::{Keeper, Memory, data_path};
use crate::{Scale, against_least, against_most, head, median, row, say};

const LIMIT: Duration = Duration::from_secs(120);
/// How many connections nbd-client and the direct path have.
const CONNECTIONS: usize = 4;
/// The part of the device that the jobs read and write; written before, so that reads find data.
const SPAN: &str = "256m";
const JOBS: [(&str, &str); 4] = [("4k", "randread"), ("4k", "randwrite"), ("1m", "read"), ("1m", "write")];

/// A way to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    NbdClient,
    Guarded,
    Direct,
    Fuse,
}

impl Way {
    const ALL: [Way; 4] = [Way::NbdClient, Way::Guarded, Way::Direct, Way::Fuse];
}

/// What one way did in all of its turns, by job.
#[derive(Default, Clone)]
struct Figures {
    /// Requests per second.
    iops: [Vec<f64>; JOBS.len()],
    /// Microseconds of this process per request.
    cpu: [Vec<f64>; JOBS.len()],
}

/// Both servers, two tables each.
pub fn compare(scale: &Scale) {
    require_nbd();
    on_one(scale, "nbdkit memory", false, Memory::serve);
    on_one(scale, "ZeroFS, local store", true, zerofs_with_a_disk);
    queues(scale);
    list(scale);
}

/// What each of our queue settings is worth: the direct path with all of them, and with one as the kernel has it.
fn queues(scale: &Scale) {
    const JOBS: [(&str, &str, bool); 4] =
        [("4k", "randread", true), ("4k", "randwrite", true), ("1m", "read", true), ("1m", "read", false)];
    let dir = TestDir::new();
    let _server = Memory::serve(dir.path());
    let kernels = sysfs::queue(free_index()).expect("a queue can be read");
    let ours = queue(NbdPath::Direct);
    let queues = [
        ("all as we set them".to_owned(), ours.clone()),
        (
            format!("scheduler {}", kernels.scheduler.as_deref().unwrap_or("of the kernel")),
            Queue { scheduler: kernels.scheduler.clone(), ..ours.clone() },
        ),
        (
            format!("read-ahead {} KiB", kernels.read_ahead_kib.unwrap_or(128)),
            Queue { read_ahead_kib: kernels.read_ahead_kib, ..ours.clone() },
        ),
        ("largest request 128 KiB".to_owned(), Queue { max_request_kib: Some(128), ..ours.clone() }),
        ("largest request 512 KiB".to_owned(), Queue { max_request_kib: Some(512), ..ours }),
    ];
    let mut iops = vec![[const { Vec::new() }; JOBS.len()]; queues.len()];
    for turn in 0..scale.rounds {
        for n in (0..queues.len()).map(|n| (n + turn) % queues.len()) {
            say(format!("queue settings, turn {} of {}: {}", turn + 1, scale.rounds, queues[n].0));
            let attached = Attached::new(Way::Direct, dir.path(), false);
            let Attached::Kernel { index, .. } = attached else {
                unreachable!("the direct path is the kernel's")
            };
            sysfs::set_queue(index, &queues[n].1).expect("a queue can be set");
            if turn == 0 {
                fill(dir.path(), &attached.device());
            }
            for (i, (size, pattern, direct)) in JOBS.iter().enumerate() {
                iops[n][i].push(fio(scale, dir.path(), &attached.device(), size, pattern, *direct));
            }
        }
    }
    println!(
        "### Queue settings: the direct path to nbdkit memory, of what all of ours give; medians of {} turns each\n",
        scale.rounds
    );
    head(&["setting", "randread 4k", "randwrite 4k", "read 1m", "buffered read 1m"]);
    for (n, (name, _)) in queues.iter().enumerate() {
        let ratio = |i: usize| {
            let turns: Vec<f64> = iops[n][i].iter().zip(&iops[0][i]).map(|(a, b)| a / b).collect();
            median(&turns)
        };
        let cells = (0..JOBS.len()).map(|i| match n {
            0 => format!("{:.0}/s", median(&iops[0][i])),
            _ => format!("{:.3}", ratio(i)),
        });
        row([name.clone()].into_iter().chain(cells));
    }
    println!();
}

/// How long `nbd list` takes with all the devices that a kernel has by our advice: some of volumes in use, whose keepers
/// and mounts are asked for, some leaked, whose users are looked for, and some that are nobody's.
fn list(scale: &Scale) {
    const DEVICES: usize = 64;
    const VOLUMES: usize = 4;
    const LEAKS: usize = 30;
    say(format!("nbd list with {DEVICES} devices"));
    let dir = TestDir::new();
    let _server = Memory::serve(dir.path());
    let zerofsctl = Zerofsctl::new(&dir.join("z"));
    let volumes: Vec<String> = (0..VOLUMES).map(|n| format!("vol{n}")).collect();
    for volume in &volumes {
        let target = dir.join(volume).display().to_string();
        let mut attach = Zerofsctl::attach_args(volume, &target, "64Mi").to_vec();
        attach.extend(["--transport", "nbd"]);
        zerofsctl.time(&attach);
    }
    let devices: Vec<_> = (VOLUMES..DEVICES)
        .map(|n| {
            let (socket, export) = direct_socket(dir.path(), "disk").expect("the server answers");
            let name = format!("zerofs:leak{n}");
            let backend = (n < VOLUMES + LEAKS).then_some(&*name);
            let index = connect(NbdPath::Direct, &[socket], export.flags, export.size, backend);
            Attached::Kernel { index, data: None }
        })
        .collect();
    let mut list = zerofsctl.command(&["nbd", "list", "-o", "json"]);
    let listed = list.stdout(std::process::Stdio::piped()).output().expect("zerofsctl can be started");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let count = |verdict: &str| listed.matches(&format!("\"verdict\": \"{verdict}\"")).count();
    assert_eq!(count("ours-in-use"), VOLUMES, "{listed}");
    assert_eq!(count("ours-leaked"), LEAKS, "{listed}");
    let times_of =
        |words: &[&str]| (0..scale.rounds.max(30)).map(|_| zerofsctl.time(words)).collect::<Vec<_>>();
    let (times, help) = (times_of(&["nbd", "list"]), times_of(&["--help"]));
    drop(devices);
    for volume in &volumes {
        zerofsctl.time(&["detach", volume]);
    }
    let what = format!("{DEVICES} devices, {VOLUMES} of volumes in use and {LEAKS} leaked");
    tell_of_list(&what, &times, &help);
}

fn tell_of_list(what: &str, times: &[Duration], help: &[Duration]) {
    head(&["what", "measured"]);
    row([
        format!("`nbd list` with {what}; median of {}, ms", times.len()),
        against_most(median(times).as_secs_f64() * 1000.0, 20.0),
    ]);
    row([
        "`--help` beside it: the start of the program, ms".to_owned(),
        format!("{:.3}", median(help).as_secs_f64() * 1000.0),
    ]);
    println!();
}

/// `nbd list` at the machine's own speed: what a kernel shows of 64 devices, made of plain files in a mount namespace of its
/// own. A machine without the module has no slower way to tell it, and user-mode Linux pays tenfold for a system call.
pub fn list_of_files(scale: &Scale) {
    const DEVICES: usize = 64;
    const VOLUMES: usize = 4;
    const LEAKS: usize = 30;
    say(format!("nbd list with {DEVICES} devices that are files"));
    let dir = TestDir::new();
    let zerofsctl = Zerofsctl::new(&dir.join("z"));
    let volumes: Vec<String> = (0..VOLUMES).map(|n| format!("vol{n}")).collect();
    for volume in &volumes {
        let target = dir.join(volume).display().to_string();
        let mut attach = Zerofsctl::attach_args(volume, &target, "64Mi").to_vec();
        attach.extend(["--transport", "fuse"]);
        zerofsctl.time(&attach);
    }
    let tree = tempfile::Builder::new().prefix("zc-").tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
    let put = |file: &str, text: &str| {
        let file = tree.path().join(file);
        fs::create_dir_all(file.parent().expect("it has one")).expect("a folder");
        fs::write(file, text).expect("a file");
    };
    put("module/nbd/parameters/nbds_max", "64\n");
    put("module/nbd/parameters/max_part", "16\n");
    let mut partitions = fs::read_to_string("/proc/partitions").expect("the kernel has it");
    for n in 0..DEVICES {
        let at = format!("block/nbd{n}");
        let backend = match n {
            n if n < VOLUMES => Some(format!("zerofs:vol{n}\n")),
            n if n < VOLUMES + LEAKS => Some(format!("zerofs:leak{n}\n")),
            _ => None,
        };
        fs::create_dir_all(tree.path().join(&at).join("holders")).expect("a folder");
        put(&format!("{at}/size"), "131072\n");
        put(&format!("{at}/pid"), &format!("{}\n", std::process::id()));
        backend.into_iter().for_each(|text| put(&format!("{at}/backend"), &text));
        partitions.push_str(&format!("  43 {:8} {:10} nbd{n}\n", n * 32, 65536));
    }
    put("partitions", &partitions);
    let in_a_namespace = || {
        use nix::mount::{MsFlags, mount};
        let none = None::<&str>;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root may");
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("root may");
        for (from, to) in
            [("block", "/sys/block"), ("module", "/sys/module"), ("partitions", "/proc/partitions")]
        {
            mount(Some(&tree.path().join(from)), to, none, MsFlags::MS_BIND, none).expect("root may");
        }
        let mut list = zerofsctl.command(&["nbd", "list", "-o", "json"]);
        let listed = list.stdout(std::process::Stdio::piped()).output().expect("zerofsctl can be started");
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let of = |what: &str| listed.matches(&format!("\"volume\": \"{what}")).count();
        assert_eq!((of("vol"), of("leak")), (VOLUMES, LEAKS), "{listed}");
        assert_eq!(listed.matches("\"answers\": true").count(), VOLUMES, "{listed}");
        let times_of = |words: &[&str]| (0..scale.rounds.max(30)).map(|_| zerofsctl.time(words)).collect();
        (times_of(&["nbd", "list"]), times_of(&["--help"]))
    };
    let (times, help): (Vec<Duration>, Vec<Duration>) =
        std::thread::scope(|scope| scope.spawn(in_a_namespace).join().expect("it has not panicked"));
    for volume in &volumes {
        zerofsctl.time(&["detach", volume]);
    }
    let what =
        format!("{DEVICES} devices that are files, {VOLUMES} of volumes with keepers and {LEAKS} of others");
    tell_of_list(&what, &times, &help);
}

/// Every way of every turn has a server of its own, with nothing in it: one that has been written to for an hour would be
/// slower for whoever comes last, and its store larger than the machine's memory.
fn on_one<S>(scale: &Scale, server: &str, zeros_when_closed: bool, serve: impl Fn(&Path) -> S) {
    let mut figures = vec![Figures::default(); Way::ALL.len()];
    for turn in 0..scale.rounds {
        // Everybody is once the first after somebody else.
        for n in 0..Way::ALL.len() {
            let n = (n + turn) % Way::ALL.len();
            say(format!("{server}, turn {} of {}, {:?}", turn + 1, scale.rounds, Way::ALL[n]));
            let dir = TestDir::new();
            let dir = dir.path();
            // Ends after the device, which is dropped first.
            let _served = serve(dir);
            let attached = Attached::new(Way::ALL[n], dir, zeros_when_closed);
            fill(dir, &attached.device());
            for (i, job) in JOBS.iter().enumerate() {
                rest();
                let (iops, cpu) = measure(scale, dir, &attached.device(), job);
                figures[n].iops[i].push(iops);
                figures[n].cpu[i].push(cpu);
            }
        }
    }
    println!(
        "### {server}: fio, direct, 4k with 32 in flight, 1m with {}, {} s, {SPAN}; medians of {} turns each\n",
        scale.depth, scale.seconds, scale.rounds
    );
    head(&["job", "nbd-client -connections 4", "guarded", "ratio", "direct", "ratio", "fuse", "ratio"]);
    for (i, (size, pattern)) in JOBS.iter().enumerate() {
        let of = |way: usize| median(&figures[way].iops[i]);
        let show =
            |iops: f64| if *size == "4k" { format!("{iops:.0} IOPS") } else { format!("{iops:.0} MiB/s") };
        // Turn by turn, so that a moment in which the machine is slow for one of the two counts once.
        let ratio = |way: usize| {
            let turns: Vec<_> =
                figures[way].iops[i].iter().zip(&figures[0].iops[i]).map(|(a, b)| a / b).collect();
            median(&turns)
        };
        row([
            format!("{pattern} {size}"),
            show(of(0)),
            show(of(1)),
            against_least(ratio(1), 0.9),
            show(of(2)),
            against_least(ratio(2), 1.0),
            show(of(3)),
            format!("{:.3}", ratio(3)),
        ]);
    }
    println!();
    head(&["the keeper's processor time per request, µs", "guarded", "fuse"]);
    for (i, (size, pattern)) in JOBS.iter().enumerate() {
        let of = |way: usize| format!("{:.1}", median(&figures[way].cpu[i]));
        row([format!("{pattern} {size}"), of(1), of(3)]);
    }
    println!();
}

/// Waits until the machine is idle, a minute at most: a server goes on with what it took long after it answered, and
/// whoever was fastest to fill it would be measured beside more of that.
fn rest() {
    let times = || -> Vec<u64> {
        let stat = fs::read_to_string("/proc/stat").expect("the kernel has it");
        let line = stat.lines().next().expect("a line of all processors");
        line.split_whitespace().skip(1).map(|n| n.parse().expect("a number")).collect()
    };
    let idle = |t: &[u64]| (t[3] + t[4], t.iter().sum::<u64>());
    let (began, mut quiet) = (Instant::now(), 0);
    while quiet < 4 && began.elapsed() < Duration::from_secs(60) {
        let before = idle(&times());
        std::thread::sleep(Duration::from_millis(500));
        let after = idle(&times());
        let share = (after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64;
        quiet = if share > 0.9 { quiet + 1 } else { 0 };
    }
}

fn fill(dir: &Path, device: &Path) {
    let job = FioJob::new(dir, "fill").set("filename", device.display()).set("ioengine", "libaio");
    job.set("direct", 1)
        .set("iodepth", 4)
        .set("size", SPAN)
        .set("rw", "write")
        .set("bs", "1m")
        .set("end_fsync", 1)
        .run(LIMIT)
        .assert_clean();
}

/// Requests per second, and microseconds of this process per request.
fn measure(scale: &Scale, dir: &Path, device: &Path, (size, pattern): &(&str, &str)) -> (f64, f64) {
    let before = own_ticks();
    let iops = fio(scale, dir, device, size, pattern, true);
    let micros = (own_ticks() - before) as f64 * 10_000.0;
    (iops, micros / (iops * scale.seconds as f64))
}

/// Requests per second. What is not direct goes once through the page cache, which fio empties first.
fn fio(scale: &Scale, dir: &Path, device: &Path, size: &str, pattern: &str, direct: bool) -> f64 {
    let mut job = FioJob::new(dir, pattern).set("filename", device.display()).set("size", SPAN);
    job = job.set("rw", pattern).set("bs", size).set("randrepeat", 0);
    job = if direct {
        job.set("direct", 1)
            .set("ioengine", "libaio")
            .set("iodepth", if size == "4k" { 32 } else { scale.depth })
            .set("time_based", 1)
            .set("runtime", scale.seconds)
    } else {
        job.set("ioengine", "psync")
    };
    let report = job.run(LIMIT + Duration::from_secs(scale.seconds));
    report.assert_clean();
    report.reads.iops + report.writes.iops
}

/// What this process has used of the processor, in hundredths of a second: utime and stime.
fn own_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let fields: Vec<_> = stat.rsplit_once(") ").expect("a name in brackets").1.split(' ').collect();
    let number = |n: usize| fields[n].parse::<u64>().expect("a number");
    number(11) + number(12)
}

/// The server's export as a block device.
enum Attached {
    Fuse(Keeper),
    Kernel {
        index: u32,
        /// The guarded path.
        data: Option<Arc<DataPath>>,
    },
}

impl Attached {
    fn new(way: Way, dir: &Path, zeros_when_closed: bool) -> Attached {
        match way {
            Way::Fuse => Attached::Fuse(Keeper::attach(dir)),
            Way::NbdClient => Attached::Kernel { index: by_nbd_client(dir), data: None },
            Way::Guarded => {
                let data = data_path(dir, zeros_when_closed);
                let flags = data.flags().expect("a server is up");
                let sockets = sockets_of(&data, GUARDED_SOCKETS, false, &[]).expect("sockets can be made");
                let index = connect(NbdPath::Guarded, &sockets, flags, data.size(), None);
                Attached::Kernel { index, data: Some(data) }
            }
            Way::Direct => {
                let one = || direct_socket(dir, "disk").expect("the server answers");
                let (sockets, mut exports): (Vec<_>, Vec<_>) = (0..CONNECTIONS).map(|_| one()).unzip();
                let export = exports.pop().expect("there are several");
                let index = connect(NbdPath::Direct, &sockets, export.flags, export.size, None);
                Attached::Kernel { index, data: None }
            }
        }
    }

    fn device(&self) -> PathBuf {
        match self {
            Attached::Fuse(keeper) => keeper.device.clone(),
            Attached::Kernel { index, .. } => sysfs::path(*index),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Attached::Kernel { index, data } = self {
            disconnect(*index);
            if let Some(data) = data {
                data.close_nbd();
                data.flush().expect("the server answers");
                data.server_down();
            }
        }
    }
}

fn connect(
    path: NbdPath,
    sockets: &[UnixStream],
    flags: TransmissionFlags,
    size: u64,
    backend: Option<&str>,
) -> u32 {
    let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    let index = netlink::connect(&netlink::Connect {
        index: None,
        size,
        block_size: 512,
        server_flags: server_flags(flags, path, false),
        client_flags: 0,
        dead_conn_timeout: Duration::from_secs(600),
        backend,
        sockets: &sockets,
    })
    .expect("the kernel connects a device");
    sysfs::set_queue(index, &queue(path)).expect("a queue can be set");
    index
}

fn by_nbd_client(dir: &Path) -> u32 {
    let index = free_index();
    let socket = dir.join("nbd.sock");
    let device = sysfs::path(index);
    let connections = CONNECTIONS.to_string();
    let args: [&std::ffi::OsStr; 7] = [
        "-N".as_ref(),
        "disk".as_ref(),
        "-unix".as_ref(),
        socket.as_ref(),
        device.as_ref(),
        "-connections".as_ref(),
        connections.as_ref(),
    ];
    run("nbd-client", &args);
    let connected = || sysfs::one(index).ok().flatten().is_some_and(|d| d.size.0 != 0);
    wait_until("nbd-client's device has its size", LIMIT, connected);
    index
}

/// A job of [`wire`].
struct WireJob {
    name: &'static str,
    command: Command,
    len: u32,
    /// Requests in flight.
    depth: usize,
}

/// The guarded path without a device, beside the same requests straight to the server: this process plays the kernel. So it
/// also tells of machines without the module, at their own speed and with all of their processors.
pub fn wire(scale: &Scale) {
    on_wire(scale, "nbdkit memory", 30_000, false, Memory::serve);
    on_wire(scale, "ZeroFS, local store", 1_500, true, zerofs_with_a_disk);
}

fn zerofs_with_a_disk(dir: &Path) -> Server {
    let floor = Floor::new(dir, 1 << 30);
    let server = floor.start_server();
    floor.ensure_disk();
    server
}

fn on_wire<S>(
    scale: &Scale,
    server: &str,
    small: usize,
    zeros_when_closed: bool,
    serve: impl Fn(&Path) -> S,
) {
    let dir = TestDir::new();
    let served = serve(dir.path());
    let data = data_path(dir.path(), zeros_when_closed);
    let guarded = sockets_of(&data, GUARDED_SOCKETS, false, &[]).expect("sockets can be made");
    let straight = |n| (0..n).map(|_| direct_socket(dir.path(), "disk").expect("the server answers").0);
    let mut ways: [Vec<UnixStream>; 3] = [straight(1).collect(), straight(CONNECTIONS).collect(), guarded];
    let small_job = |name, command| WireJob { name, command, len: 4 << 10, depth: 32 };
    let large_job = |name, command| WireJob { name, command, len: 1 << 20, depth: scale.depth };
    // Fills what is read, and takes memory for all of the replay log: the first lap in it is slower.
    play(&mut ways[2], &large_job("fill", Command::Write), 320);
    println!(
        "### The guarded path without a device, {server}: requests per second, median of {} turns each\n",
        scale.rounds
    );
    head(&[
        "job",
        "straight, 1 connection",
        "straight, 4 connections",
        "guarded",
        "ratio",
        "the keeper's processor time per request, µs",
    ]);
    for job in [
        large_job("write 1m", Command::Write),
        large_job("read 1m", Command::Read),
        small_job("write 4k", Command::Write),
        small_job("read 4k", Command::Read),
    ] {
        let count = if job.len > 4 << 10 { small / 30 } else { small };
        let (mut rate, mut cpu) = ([const { Vec::new() }; 3], Vec::new());
        for turn in 0..scale.rounds {
            for n in (0..3).map(|n| (n + turn) % 3) {
                say(format!("{server}, {}, turn {} of {}", job.name, turn + 1, scale.rounds));
                let all = used(UsageWho::RUSAGE_SELF);
                let (began, players) = (Instant::now(), play(&mut ways[n], &job, count));
                rate[n].push(count as f64 / began.elapsed().as_secs_f64());
                if n == 2 {
                    cpu.push((used(UsageWho::RUSAGE_SELF) - all - players) / count as f64);
                }
            }
        }
        let ratios: Vec<f64> = (0..scale.rounds).map(|n| rate[2][n] / rate[1][n]).collect();
        row([job.name.to_owned()]
            .into_iter()
            .chain(rate.iter().map(|r| format!("{:.0}", median(r))))
            .chain([against_least(median(&ratios), 0.9), format!("{:.1}", median(&cpu))]));
    }
    println!();
    data.close_nbd();
    data.flush().expect("the server answers");
    data.server_down();
    drop(served);
}

/// The kernel's part, on each of the sockets a share of it: so many requests, so many of them in flight. Each reply is
/// read by itself. Gives the processor time that this took, in µs.
fn play(sockets: &mut [UnixStream], job: &WireJob, count: usize) -> f64 {
    let n = sockets.len();
    let share = |socket: &mut UnixStream, at: usize| {
        let before = used(UsageWho::RUSAGE_THREAD);
        play_one(socket, job, at * count / n, (at + 1) * count / n, job.depth / n);
        used(UsageWho::RUSAGE_THREAD) - before
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            sockets.iter_mut().enumerate().map(|(at, s)| scope.spawn(move || share(s, at))).collect();
        threads.into_iter().map(|t| t.join().expect("it has not panicked")).sum()
    })
}

fn play_one(kernel: &mut UnixStream, job: &WireJob, from: usize, to: usize, depth: usize) {
    let payload = vec![0x5a; job.len as usize];
    let mut reply = vec![0; SimpleReply::LEN + job.len as usize];
    if job.command == Command::Write {
        reply.truncate(SimpleReply::LEN);
    }
    let blocks = (256 << 20) / u64::from(job.len);
    let (mut sent, mut answered) = (from, from);
    while answered < to {
        while sent < to && sent - answered < depth {
            // Large ones one after the other, small ones anywhere, and none twice before all have been.
            let step = if job.len > 4 << 10 { 1 } else { 25_253 };
            let offset = (sent as u64 * step % blocks) * u64::from(job.len);
            let (command, len) = (job.command, job.len);
            let header = RequestHeader { flags: 0, command, cookie: sent as u64, offset, len }.encode();
            kernel.write_all(&header).expect("the server takes a request");
            if command == Command::Write {
                kernel.write_all(&payload).expect("the server takes a request");
            }
            sent += 1;
        }
        kernel.read_exact(&mut reply).expect("the server answers");
        let header = reply.first_chunk().expect("a reply has a header");
        assert_eq!(SimpleReply::decode(header).map(|r| r.error).ok(), Some(0));
        answered += 1;
    }
}

/// Microseconds of the processor.
fn used(who: UsageWho) -> f64 {
    let usage = getrusage(who).expect("a process can be asked");
    let micros = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 * 1e6 + t.tv_usec() as f64;
    micros(usage.user_time()) + micros(usage.system_time())
}
