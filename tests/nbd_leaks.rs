//! No NBD device leaks, and none that is somebody else's or in use is touched: rounds of attach and detach that are killed
//! half-way beside foreign devices at work, and `nbd gc --yes` raced against attach, detach, kills and the watcher. Needs
//! root and a kernel with the nbd module: it runs in the virtual machine.
//!
//! A usual run has 12 rounds and races for 20 seconds; `make test-long PART=nbd-leaks` has 200 and 5 minutes, and
//! `make bench-rounds` 1,000 rounds.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::cli::{Answer, Node, Victim, assert_holds, pattern, write_durably};
use support::dir::TestDir;
use support::vm::{Baseline, Device, KernelLog, LONG, Mounted, Nbdkit, require_nbd};
use support::{is_long, rounds, wait_until};
use zerofsctl::host::nbd::{self, sysfs};
use zerofsctl::keeper::process::Identity;

const MIB: u64 = 1 << 20;

/// Blocks of a file written, synced, and read back past the page cache, over and over, on a thread. The first error and
/// the first wrong byte end it, and then fail the test.
struct Verifier {
    end: Arc<AtomicBool>,
    blocks: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Verifier {
    fn start(path: PathBuf) -> Verifier {
        const BLOCK: usize = 64 << 10;
        const BLOCKS: u64 = 64;
        let end = Arc::new(AtomicBool::new(false));
        let blocks = Arc::new(AtomicU64::new(0));
        let (ended, written) = (end.clone(), blocks.clone());
        let thread = std::thread::spawn(move || {
            let file = File::options().create(true).truncate(true).read(true).write(true).open(&path);
            let file = file.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let mut n = 0;
            while !ended.load(Ordering::SeqCst) || n == 0 {
                let (bytes, at) = (pattern(n, BLOCK), n % BLOCKS * BLOCK as u64);
                file.write_all_at(&bytes, at).and_then(|()| file.sync_all()).expect("written and synced");
                // SAFETY: the descriptor is open; the call takes nothing else of ours.
                let dropped =
                    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
                assert_eq!(dropped, 0);
                let mut read = vec![0; BLOCK];
                // The one before last too, which other writes came after.
                let before = n.saturating_sub(BLOCKS - 1);
                for (seed, at) in [(n, at), (before, before % BLOCKS * BLOCK as u64)] {
                    file.read_exact_at(&mut read, at).expect("read back");
                    assert!(read == pattern(seed, BLOCK), "block {seed} of {} is wrong", path.display());
                }
                n += 1;
                written.store(n, Ordering::SeqCst);
            }
        });
        Verifier { end, blocks, thread }
    }

    /// Returns once a few more blocks went all the way.
    fn assert_going_on(&self, when: &str) {
        let before = self.blocks.load(Ordering::SeqCst);
        wait_until(&format!("{when}: I/O goes on"), LONG, || {
            self.thread.is_finished() || self.blocks.load(Ordering::SeqCst) >= before + 2
        });
        assert!(!self.thread.is_finished(), "{when}: I/O has failed");
    }

    fn stop(self, when: &str) -> u64 {
        self.end.store(true, Ordering::SeqCst);
        self.thread.join().unwrap_or_else(|_| panic!("{when}: I/O has failed"));
        self.blocks.load(Ordering::SeqCst)
    }
}

/// Devices of others: one by nbd-client with a filesystem that is written to throughout, one that is idle, and some
/// whose identifiers look nearly like ours.
struct Foreign {
    servers: Vec<Nbdkit>,
    devices: Vec<Device>,
    states: Vec<sysfs::NbdDevice>,
    mount: Mounted,
    load: Verifier,
    /// Not the node's: what is there is no leftover of it.
    dir: TestDir,
}

impl Foreign {
    fn connect() -> Foreign {
        let dir = TestDir::new();
        let server = |name: &str| Nbdkit::memory(&dir, name, 64 * MIB);
        let servers = vec![server("f1"), server("f2"), server("f3")];
        let mounted = Device::foreign(&servers[0], 2);
        let mount = Mounted::make(&mounted.path(), dir.join("foreign"), "ext4");
        let load = Verifier::start(mount.join("load"));
        let mut devices = vec![mounted, Device::foreign(&servers[1], 1)];
        for backend in
            ["", "zerofs", "zerofs:", "zerofs:../vol1", "ZEROFS:vol1", "zerofs:vol1 ", "xzerofs:vol1"]
        {
            let device = Device::connect(&servers[2], 1, |c| c.backend = Some(backend));
            let shown = fs::read_to_string(format!("/sys/block/nbd{}/backend", device.index()));
            assert_eq!(shown.expect("the kernel shows it"), format!("{backend}\n"));
            devices.push(device);
        }
        let states = devices.iter().map(Device::state).collect();
        Foreign { servers, devices, states, mount, load, dir }
    }

    fn assert_untouched(&self, when: &str) {
        let now: Vec<_> = self.devices.iter().map(Device::state).collect();
        assert_eq!(now, self.states, "{when}");
        self.load.assert_going_on(when);
    }

    fn disconnect(self, when: &str) {
        self.assert_untouched(when);
        println!("{} blocks went through the foreign filesystem", self.load.stop(when));
        self.mount.unmount();
        self.devices.into_iter().for_each(Device::disconnect);
        drop(self.servers);
        self.dir.assert_unused();
    }
}

/// The volumes whose devices a gc with everything allowed has disconnected. It must not fail.
fn gc(node: &Node, when: &str) -> Vec<String> {
    let answer = node.json(&["nbd", "gc", "--older-than", "0s", "--yes"]);
    let items = answer["devices"].as_array().unwrap_or_else(|| panic!("{when}: {answer:#}"));
    items
        .iter()
        .filter(|item| match item["fate"]["outcome"].as_str() {
            Some("disconnected") => true,
            Some("kept") => false,
            _ => panic!("{when}: {item:#}"),
        })
        .map(|item| item["device"]["volume"].as_str().expect("what goes is ours").to_owned())
        .collect()
}

fn start<S: AsRef<str>>(node: &Node, words: &[S]) -> Child {
    let quiet = node.dir.join("killed.log");
    let log = || File::create(&quiet).expect("the test's folder can be written");
    node.command(words).stdout(log()).stderr(log()).spawn().expect("the program starts")
}

/// Who dies in the middle of an attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Death {
    zerofs: bool,
    keeper: bool,
    command: bool,
}

/// All that there are; ZeroFS dies in the first four.
const DEATHS: [Death; 6] = [
    Death { zerofs: true, keeper: false, command: false },
    Death { zerofs: true, keeper: false, command: true },
    Death { zerofs: true, keeper: true, command: false },
    Death { zerofs: true, keeper: true, command: true },
    Death { zerofs: false, keeper: true, command: false },
    Death { zerofs: false, keeper: false, command: true },
];

impl Death {
    /// Waits until the attach is at this instant and has those who are to die, kills, and returns when a command that lives
    /// on has ended too. Whether that was in the middle of the attach.
    fn strike(self, node: &Node, mut attach: Child, volume: &str, instant: Duration) -> bool {
        let mut ended = || attach.try_wait().expect("a child can be asked").is_some();
        std::thread::sleep(instant);
        wait_until("the attach has who is to die, or has ended", LONG, || {
            let (keepers, servers) = node.processes_of(volume);
            ended() || !(self.keeper && keepers.is_empty() || self.zerofs && servers.is_empty())
        });
        let mut met = !ended();
        if self.command {
            let _ = attach.kill();
        }
        if let Some(victim) = match (self.zerofs, self.keeper) {
            (true, true) => Some(Victim::Both),
            (true, false) => Some(Victim::Zerofs),
            (false, true) => Some(Victim::Keeper),
            (false, false) => None,
        } {
            met &= node.kill_of(volume, victim);
        }
        if self.command {
            // It may only be able to end when somebody brings its device back: that is what is typed next.
            std::thread::spawn(move || attach.wait());
        } else {
            attach.wait().expect("a child can be waited for");
        }
        met
    }
}

/// A part of a time that is another one for each number, spread evenly.
fn spread(time: Duration, n: u32) -> Duration {
    time.mul_f64(f64::from(n) * 0.618_033_988_75 % 1.0)
}

/// A node whose volume vol1 holds something, the words that attach it over NBD, the file, and what must be in it.
fn node_with_data() -> (Node, Vec<String>, PathBuf, Vec<u8>) {
    let node = Node::new();
    let m = node.target("m");
    let attach = ["attach", "vol1", "--target", &m, "--size", "128Mi", "--fs", "ext4", "--transport", "nbd"];
    let attach = attach.map(str::to_owned).to_vec();
    node.ok(&attach);
    let (file, bytes) = (Path::new(&m).join("data"), pattern(7, MIB as usize));
    write_durably(&file, &bytes);
    node.ok(&["detach", "vol1"]);
    (node, attach, file, bytes)
}

/// Starts the attach of vol1, and returns in the instant in which its device is connected: the command, the keeper, its
/// ZeroFS, and the device.
fn start_and_see_it_connected(node: &Node, attach: &[String]) -> (Child, Identity, Pid, PathBuf) {
    let backend = nbd::backend_id(&"vol1".parse().unwrap());
    let command = start(node, attach);
    let mut server = None;
    wait_until("the attach has a ZeroFS", LONG, || {
        server = node.processes().1.first().copied();
        server.is_some()
    });
    let keeper = Identity::read(&node.run_root().join("volumes/vol1/keeper.pid")).expect("it has a keeper");
    let begun = Instant::now();
    let device = loop {
        if let Some(device) = sysfs::named(&backend).unwrap().first() {
            break device.path();
        }
        assert!(begun.elapsed() < LONG, "the attach connects no device");
        std::thread::yield_now();
    };
    (command, keeper, Pid::from_raw(server.unwrap()), device)
}

/// What a command reads waits in the kernel, and so does the command; the volume is its own, so nobody else can help.
#[test]
fn nbd_a_command_whose_keeper_dies_starts_the_next_one_and_goes_on() {
    require_nbd();
    let alone = Baseline::take();
    let (node, attach, file, bytes) = node_with_data();
    let mut finished = 0;
    for n in 0..rounds(8, 40) {
        let (mut command, keeper, server, _) = start_and_see_it_connected(&node, &attach);
        std::thread::sleep(spread(Duration::from_millis(20), n));
        // So that what is read now stays on its way.
        kill(server, Signal::SIGSTOP).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        kill(Pid::from_raw(keeper.pid), Signal::SIGKILL).unwrap();
        wait_until("the keeper is gone", LONG, || !keeper.is_alive());
        kill(server, Signal::SIGCONT).unwrap();
        let when = format!("round {n}");
        wait_until(&format!("{when}: the command ends"), LONG, || command.try_wait().unwrap().is_some());
        finished += u32::from(command.wait().unwrap().success());
        node.ok(&attach);
        assert_holds(&file, &bytes, &when);
        node.ok(&["detach", "vol1"]);
    }
    println!("{finished} commands went on to their end");
    assert!(finished > 0);
    alone.assert_back();
    node.assert_nothing_left("at the end");
}

/// Whether a thread of the process stands in a wait that nothing can interrupt, and stays there.
fn has_a_waiting_thread(pid: u32) -> bool {
    let waiting = || -> BTreeSet<PathBuf> {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let waits = |t: &PathBuf| fs::read_to_string(t.join("stat")).is_ok_and(|s| s.contains(") D "));
        threads.map(|t| t.path()).filter(waits).collect()
    };
    let before = waiting();
    std::thread::sleep(Duration::from_millis(100));
    before.intersection(&waiting()).next().is_some()
}

/// Killed together with its keeper, a command cannot end as long as it waits for its device; its lock would keep away
/// whoever could bring the device back.
#[test]
fn nbd_a_killed_command_that_waits_for_its_device_keeps_nobody_away() {
    require_nbd();
    let alone = Baseline::take();
    let (node, attach, file, bytes) = node_with_data();
    let next: [&[String]; 3] =
        [&attach, &["recover".into(), "vol1".into()], &["detach".into(), "vol1".into()]];
    let mut met = 0;
    for n in 0..next.len() * 20 {
        if met == next.len() {
            break;
        }
        let (mut command, keeper, server, _) = start_and_see_it_connected(&node, &attach);
        kill(server, Signal::SIGSTOP).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) && !has_a_waiting_thread(command.id()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if has_a_waiting_thread(command.id()) {
            // First: it would start the next keeper.
            command.kill().unwrap();
            kill(Pid::from_raw(keeper.pid), Signal::SIGKILL).unwrap();
            kill(server, Signal::SIGKILL).unwrap();
            wait_until("the keeper is gone", LONG, || !keeper.is_alive());
            std::thread::sleep(Duration::from_millis(200));
            assert!(command.try_wait().unwrap().is_none(), "round {n}: it ended, although it waited");
            node.ok(next[met]);
            met += 1;
        } else {
            kill(server, Signal::SIGCONT).unwrap();
        }
        wait_until(&format!("round {n}: the command ends"), LONG, || command.try_wait().unwrap().is_some());
        node.ok(&attach);
        assert_holds(&file, &bytes, &format!("round {n}"));
        node.ok(&["detach", "vol1"]);
    }
    assert_eq!(met, next.len(), "a command was killed while it waited");
    alone.assert_back();
    node.assert_nothing_left("at the end");
}

/// Whether a keeper's child is setting the queue of the device, which waits for all I/O of the device.
fn sets_the_queue(keeper: &Identity) -> bool {
    let all = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).any(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Pid, name, state, parent; the name is that of the thread that forked it.
        stat.starts_with(&format!("{pid} (client) D {} ", keeper.pid))
    })
}

/// Whoever opens a new device, as udev does at once, makes the kernel look for partitions; the child that sets the queue
/// waits for that. When the keeper dies in this moment, its attach fails, and looks who uses the device: that waits, too.
#[test]
fn nbd_a_keeper_that_dies_while_the_queue_is_set_leaves_nobody_waiting() {
    require_nbd();
    let alone = Baseline::take();
    let (node, attach, file, bytes) = node_with_data();
    let (mut met, wanted) = (0, rounds(2, 10));
    for n in 0..wanted * 20 {
        if met == wanted {
            break;
        }
        let when = format!("round {n}");
        let (mut command, keeper, server, device) = start_and_see_it_connected(&node, &attach);
        kill(server, Signal::SIGSTOP).unwrap();
        let opener = std::thread::spawn(move || File::open(device).is_ok());
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) && !sets_the_queue(&keeper) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if sets_the_queue(&keeper) {
            met += 1;
            kill(Pid::from_raw(keeper.pid), Signal::SIGKILL).unwrap();
            wait_until("the keeper is gone", LONG, || !keeper.is_alive());
        }
        kill(server, Signal::SIGCONT).unwrap();
        wait_until(&format!("{when}: the command ends"), LONG, || command.try_wait().unwrap().is_some());
        wait_until(&format!("{when}: the other's open ends"), LONG, || opener.is_finished());
        node.ok(&attach);
        assert_holds(&file, &bytes, &when);
        node.ok(&["detach", "vol1"]);
    }
    assert_eq!(met, wanted, "a keeper was killed while its child waited");
    alone.assert_back();
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_rounds_of_attach_and_detach_killed_half_way_leak_nothing_and_touch_nobody() {
    require_nbd();
    let alone = Baseline::take();
    let node = Node::new();
    let foreign = Foreign::connect();
    let before = Baseline::take();
    let m = node.target("m");
    let (mut takes, mut collected, mut killed) = (Duration::ZERO, 0, 0);
    let began = Instant::now();
    let rounds = rounds(12, 200);
    // What each of three volumes must hold.
    let mut holds: [Option<Vec<u8>>; 3] = [None, None, None];
    for n in 0..rounds {
        let of = n as usize % holds.len();
        let volume = format!("vol{}", of + 1);
        let attach =
            ["attach", &volume, "--target", &m, "--size", "128Mi", "--fs", "ext4", "--transport", "nbd"];
        let mut when = format!("round {n}, {volume}");
        if n % 2 == 1 {
            let death = DEATHS[n as usize / 2 % 4];
            let mut attempts = 0;
            loop {
                let instant = spread(takes, n + attempts);
                let struck = death.strike(&node, start(&node, &attach), &volume, instant);
                if struck {
                    when = format!("{when}, {death:?} at {instant:?} of {takes:?}");
                    killed += 1;
                    break;
                }
                attempts += 1;
                assert!(attempts < 20, "{when}: every kill comes too late");
                node.ok(&["detach", &volume]);
            }
            // What is typed next, or runs by itself.
            match n / 2 % 3 {
                0 => collected += gc(&node, &when).len(),
                1 => {
                    // There may be nothing of it on this node any more.
                    let answer = node.run(&["recover", &volume]);
                    assert!(matches!(answer.code, Some(0 | 10)), "{when}: {answer:#?}");
                }
                _ => {}
            }
        }
        let begun = Instant::now();
        let answer = node.run(&attach);
        assert_eq!(answer.code, Some(0), "{when}: {answer:#?}");
        if n % 2 == 0 {
            takes = begun.elapsed();
        }
        node.assert_attached(&volume, &[&m], &when);
        let file = Path::new(&m).join("data");
        if let Some(bytes) = &holds[of] {
            assert_holds(&file, bytes, &when);
        }
        let bytes = pattern(u64::from(n), MIB as usize + 321);
        write_durably(&file, &bytes);
        holds[of] = Some(bytes);
        if n % 4 == 0 {
            assert_eq!(gc(&node, &when), Vec::<String>::new(), "{when}: nothing is leaked");
            node.assert_attached(&volume, &[&m], &when);
        }
        let answer = node.run(&["detach", &volume]);
        assert_eq!(answer.code, Some(0), "{when}: {answer:#?}");
        before.assert_back();
        foreign.assert_untouched(&when);
    }
    assert_eq!(killed, rounds / 2, "every second attach lost its ZeroFS half-way");
    assert_eq!(gc(&node, "at the end"), Vec::<String>::new(), "nothing is left to collect");
    foreign.disconnect("at the end");
    alone.assert_back();
    node.assert_nothing_left("at the end");
    println!("{rounds} rounds, {killed} killed, {collected} leaks collected, {:.0?}", began.elapsed());
}

/// What the threads of the race have in common.
struct Race<'a> {
    node: &'a Node,
    until: Instant,
    over: &'a AtomicBool,
}

impl Race<'_> {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until && !self.over.load(Ordering::SeqCst)
    }

    /// Runs a command to success. While gc looks at the volume's leak, or the watcher brings its keeper back, it is told
    /// that the volume is busy, and runs again.
    fn must(&self, words: &[&str], when: &str) -> Answer {
        let begun = Instant::now();
        loop {
            let answer = self.node.run(words);
            match answer.code {
                Some(0) => return answer,
                Some(11) if begun.elapsed() < LONG => std::thread::sleep(Duration::from_millis(20)),
                _ => panic!("{when}: {answer:#?}"),
            }
        }
    }

    fn attach(&self, volume: &str, target: &str, when: &str) {
        let words =
            ["attach", volume, "--target", target, "--size", "128Mi", "--fs", "ext4", "--transport", "nbd"];
        self.must(&words, when);
    }

    /// A volume that is attached, written to, robbed of its keeper and its server, and detached. Nothing of it is ever a
    /// leak: gc must not touch it.
    fn live(&self, volume: &str) -> u32 {
        let m = self.node.target(volume);
        let (mut n, mut last): (u32, Option<Vec<u8>>) = (0, None);
        while n == 0 || self.goes_on() {
            let when = format!("{volume}, round {n}");
            self.attach(volume, &m, &when);
            let file = Path::new(&m).join("data");
            if let Some(bytes) = &last {
                assert_holds(&file, bytes, &when);
            }
            let device = self.node.found(volume)["device"]["path"].clone();
            let load = Verifier::start(Path::new(&m).join("load"));
            load.assert_going_on(&when);
            let victim = [Victim::Keeper, Victim::Zerofs, Victim::Both][n as usize % 3];
            assert!(self.node.kill_of(volume, victim), "{when}: {victim:?} was there");
            let bytes = pattern(u64::from(n), MIB as usize);
            write_durably(&file, &bytes);
            load.assert_going_on(&when);
            load.stop(&when);
            assert_eq!(self.node.found(volume)["device"]["path"], device, "{when}: the same device");
            assert_holds(&file, &bytes, &when);
            last = Some(bytes);
            self.must(&["detach", volume], &when);
            n += 1;
        }
        n
    }

    /// A volume whose attach is killed anywhere, so that there are leaks, and which is then attached again.
    fn leaky(&self, volume: &str) -> u32 {
        let m = self.node.target(volume);
        let mut last: Option<Vec<u8>> = None;
        self.attach(volume, &m, volume);
        self.must(&["detach", volume], volume);
        let (mut n, mut takes) = (0, Duration::from_secs(1));
        while n == 0 || self.goes_on() {
            let when = format!("{volume}, round {n}");
            let words = ["attach", volume, "--target", &m, "--transport", "nbd"];
            if n % 2 == 0 {
                // The very moment when a device is there, and nothing else.
                let point = ["connect:applied", "connect:after"][n as usize / 2 % 2];
                let killed = Answer::of(self.node.command(&words).env("ZEROFSCTL_TEST_KILL", point));
                assert!(killed.signal == Some(9) || killed.code == Some(11), "{when}: {killed:#?}");
                // With its run folder gone, no watcher and no command knows of the device any more.
                let (run, lost) = (self.node.run_root(), self.node.dir.join(format!("lost-{volume}")));
                let lose = killed.signal == Some(9);
                if lose {
                    fs::rename(run.join("volumes").join(volume), &lost).expect("it has a run folder");
                }
                self.node.kill_of(volume, Victim::Both);
                if lose {
                    fs::remove_dir_all(&lost).expect("nobody writes to it");
                }
                if n == 0 {
                    let backend = nbd::backend_id(&volume.parse().unwrap());
                    let gone = || sysfs::named(&backend).unwrap().is_empty();
                    wait_until(&format!("{when}: gc takes the leak"), LONG, || !self.goes_on() || gone());
                }
            } else {
                let death = DEATHS[n as usize / 2 % DEATHS.len()];
                death.strike(self.node, start(self.node, &words), volume, spread(takes, n));
            }
            // Time for gc to find it, now and then.
            std::thread::sleep(spread(Duration::from_millis(1500), n + 1));
            let begun = Instant::now();
            self.attach(volume, &m, &when);
            takes = begun.elapsed();
            let file = Path::new(&m).join("data");
            if let Some(bytes) = &last {
                assert_holds(&file, bytes, &when);
            }
            let bytes = pattern(u64::from(n), MIB as usize);
            write_durably(&file, &bytes);
            last = Some(bytes);
            self.must(&["detach", volume], &when);
            n += 1;
        }
        n
    }
}

/// Sets the flag when it is dropped, so that the others stop when one has failed.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn nbd_race_of_gc_with_attach_detach_kills_and_the_watcher_takes_leaks_and_nothing_else() {
    require_nbd();
    let alone = Baseline::take();
    let node = Node::new();
    let foreign = Foreign::connect();
    let before = Baseline::take();
    let kernel = KernelLog::from_now();
    let log = node.dir.join("watch.log");
    let mut watch = node
        .command(&["watch"])
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .expect("the program starts");
    let (over, raced) = (AtomicBool::new(false), AtomicBool::new(false));
    let until = Instant::now() + Duration::from_secs(if is_long() { 300 } else { 20 });
    let race = Race { node: &node, until, over: &over };
    let collected = Mutex::new(Vec::new());
    let looks = AtomicU64::new(0);
    let live: &[&str] = if is_long() { &["live1", "live2"] } else { &["live1"] };
    let leaky = ["leaky1", "leaky2"];
    std::thread::scope(|scope| {
        let (race, over) = (&race, &over);
        let mut loops = Vec::new();
        for volume in live {
            loops.push((*volume, scope.spawn(move || (Ends(over), race.live(volume)).1)));
        }
        for volume in leaky {
            loops.push((volume, scope.spawn(move || (Ends(over), race.leaky(volume)).1)));
        }
        scope.spawn(|| {
            let _ends = Ends(over);
            while !raced.load(Ordering::SeqCst) {
                let gone = gc(&node, "gc in a loop");
                looks.fetch_add(1, Ordering::SeqCst);
                let wrong: Vec<_> = gone.iter().filter(|v| !leaky.contains(&v.as_str())).collect();
                assert!(wrong.is_empty(), "gc took {wrong:?}, which were in use");
                collected.lock().expect("no thread panics with it").extend(gone);
                foreign.assert_untouched("gc in a loop");
            }
        });
        let rounds: Vec<_> = loops.into_iter().map(|(volume, thread)| (volume, thread.join())).collect();
        raced.store(true, Ordering::SeqCst);
        for (volume, rounds) in rounds {
            println!("{volume}: {} rounds", rounds.unwrap_or_else(|_| panic!("{volume} has failed")));
        }
    });
    kill(Pid::from_raw(watch.id() as i32), Signal::SIGTERM).unwrap();
    let ended = watch.wait().unwrap();
    assert!(ended.success(), "{}", fs::read_to_string(&log).unwrap());
    let rest = gc(&node, "after the race");
    assert!(rest.iter().all(|v| leaky.contains(&v.as_str())), "{rest:?}");
    // A leak that nobody watches any more goes by gc alone.
    let volume = leaky[0];
    let words = ["attach", volume, "--target", &node.target(volume), "--transport", "nbd"];
    assert!(node.killed_at("connect:after", &words));
    assert!(node.kill_of(volume, Victim::Both));
    assert_eq!(gc(&node, "at the end"), [volume]);
    before.assert_back();
    node.ok(&["recover", volume]);
    let _ = node.run(&["detach", volume]);
    foreign.disconnect("at the end");
    alone.assert_back();
    node.assert_nothing_left("at the end");
    // Reads of a leak that gc disconnects fail; nobody loses a write.
    let lost = |line: &String| ["EXT4-fs error", "JBD2", "page write"].iter().any(|word| line.contains(word));
    let errors: Vec<_> = kernel.lines().into_iter().filter(lost).collect();
    assert!(errors.is_empty(), "{errors:#?}");
    let collected = collected.into_inner().unwrap();
    println!("{} looks of gc, {} leaks collected", looks.load(Ordering::SeqCst), collected.len());
    assert!(!collected.is_empty(), "gc has taken no leak while it was raced");
}
