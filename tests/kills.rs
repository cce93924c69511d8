//! Everything that can die dies, under load, on the real thing: ZeroFS behind FUSE and a loop device, with a
//! filesystem on it. A death of ZeroFS, or of its object store, must be a stall and nothing else; a death of
//! everything must lose nothing that was acknowledged.
//!
//! The long run (`make test-long PART=kills`, `store` or `death`) does many rounds. The figures are printed; see them
//! with `cargo test --test kills -- --nocapture`.

mod support;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Seek, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::Value;
use support::dir::TestDir;
use support::fio::FioJob;
use support::ledger::{
    Ledger, Promise, drop_caches, judge, print_stalls, reading, rng, shorten, stalls, writing,
};
use support::moto::Moto;
use support::proxy::{FaultProxy, Mode};
use support::{rounds, side_by_side, wait_until};

const SECOND: Duration = Duration::from_secs(1);
/// No stall that these tests cause is longer, on any machine that is worth a result.
const LIMIT: Duration = Duration::from_secs(180);
/// At most that many kills in one round of load.
const KILLS: usize = 6;

// ---- A volume, and what is done to it.

/// A volume with its own state and run roots, driven by the program as a user would.
struct Lab {
    // Order matters: the volume's leftovers go before the store that they wait for.
    dir: TestDir,
    options: Vec<String>,
    env: Vec<(&'static str, String)>,
    s3: Option<(FaultProxy, Moto)>,
    _store: Option<TestDir>,
}

impl Lab {
    /// A volume in the embedded store, not attached.
    fn new(options: &[&str]) -> Lab {
        support::require_root();
        let dir = TestDir::new();
        let env = vec![
            ("ZEROFSCTL_STATE_DIR", dir.join("s").display().to_string()),
            ("ZEROFSCTL_RUN_DIR", dir.join("r").display().to_string()),
            ("ZEROFS_BIN", support::zerofs_bin().display().to_string()),
        ];
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        Lab { dir, options, env, s3: None, _store: None }
    }

    /// A volume in S3, which is reached through a proxy.
    fn on_s3() -> Lab {
        let mut lab = Lab::new(&["--size", "512Mi"]);
        let store = TestDir::new();
        let moto = Moto::start(store.path());
        moto.create_bucket("vols");
        let proxy = FaultProxy::start(moto.address());
        let config = lab.dir.join("config.yaml");
        // As little cache as there can be, so that reads go to the store.
        let text = format!(
            "storageURL: s3://vols/csi\nawsEndpoint: http://{}\nawsAllowHTTP: \"true\"\nawsDefaultRegion: us-east-1\n\
             cacheDiskSizeGB: \"0.1\"\ncacheMemorySizeGB: \"0.064\"\n",
            proxy.address()
        );
        fs::write(&config, text).unwrap();
        lab.options.extend(["--config".to_owned(), config.display().to_string()]);
        for (name, value) in [
            ("ZEROFS_ENCRYPTION_PASSWORD", "correct horse battery"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
        ] {
            lab.env.push((name, value.to_owned()));
        }
        lab.s3 = Some((proxy, moto));
        lab._store = Some(store);
        lab
    }

    fn proxy(&self) -> &FaultProxy {
        &self.s3.as_ref().expect("a volume in S3").0
    }

    /// Where the filesystem is.
    fn target(&self) -> PathBuf {
        self.dir.join("m")
    }

    fn run(&self, args: &[&str], limit: Duration) -> Output {
        // Files, for a pipe that nobody reads takes only so much.
        let [mut stdout, mut stderr] = [(); 2].map(|()| tempfile::tempfile().expect("a temporary file"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_zerofsctl"))
            .args(args)
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(stdout.try_clone().expect("a file can be cloned"))
            .stderr(stderr.try_clone().expect("a file can be cloned"))
            .spawn()
            .expect("zerofsctl starts");
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().expect("a child can be asked") {
                break status;
            }
            if began.elapsed() > limit {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{args:?} takes longer than {limit:?}\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let read = |file: &mut File| {
            let mut text = Vec::new();
            file.rewind().and_then(|()| file.read_to_end(&mut text)).expect("a file can be read");
            text
        };
        Output { status, stdout: read(&mut stdout), stderr: read(&mut stderr) }
    }

    #[track_caller]
    fn must(&self, args: &[&str]) -> String {
        let out = self.run(args, LIMIT);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            out.status.success(),
            "{args:?}: {}{}\n{}",
            text(&out.stdout),
            text(&out.stderr),
            self.logs()
        );
        text(&out.stdout)
    }

    #[track_caller]
    fn attach(&self) -> String {
        let target = self.target();
        let mut args = vec!["attach", "vol1", "--target", target.to_str().unwrap()];
        args.extend(self.options.iter().map(String::as_str));
        self.must(&args)
    }

    #[track_caller]
    fn detach(&self) {
        self.must(&["detach", "vol1"]);
    }

    #[track_caller]
    fn show(&self) -> Value {
        serde_json::from_str::<Value>(&self.must(&["show", "vol1", "-o", "json"])).expect("JSON")["data"]
            .clone()
    }

    #[track_caller]
    fn status(&self) -> Value {
        self.show()["status"].clone()
    }

    /// The ZeroFS process, if there is one just now.
    #[track_caller]
    fn zerofs(&self) -> Option<Pid> {
        pid(&self.show()["found"]["zerofs_pid"])
    }

    #[track_caller]
    fn keeper(&self) -> Pid {
        pid(&self.show()["found"]["keeper_pid"]).expect("a keeper")
    }

    /// Waits for a ZeroFS process other than `before`.
    #[track_caller]
    fn next_zerofs(&self, before: Option<Pid>) -> Pid {
        let mut found = None;
        wait_until("a ZeroFS runs", LIMIT, || {
            found = self.zerofs().filter(|p| Some(*p) != before);
            found.is_some()
        });
        found.expect("it was found")
    }

    /// SIGKILL for the ZeroFS that runs, if one does just now: when, and whom.
    #[track_caller]
    fn kill_zerofs(&self) -> Option<(Instant, Pid)> {
        let pid = self.zerofs()?;
        let at = Instant::now();
        kill(pid, Signal::SIGKILL).ok().map(|()| (at, pid))
    }

    #[track_caller]
    fn wait_ready(&self) {
        wait_until("the volume is ready", LIMIT, || self.status()["state"] == "ready");
    }

    /// A line of ZeroFS's log, as if it had written it.
    fn log_line(&self, text: &str) {
        let path = self.dir.join("s/logs/vol1/zerofs.log");
        let mut log = File::options().append(true).open(path).expect("ZeroFS has a log");
        log.write_all(format!("2026-11-20T17:59:02.345678Z {text}\n").as_bytes())
            .expect("a log can be written");
    }

    fn logs(&self) -> String {
        let mut all = String::new();
        for name in ["keeper.log", "zerofs.log"] {
            let text = fs::read_to_string(self.dir.join("s/logs/vol1").join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines[lines.len().saturating_sub(25)..].join("\n");
            let _ = write!(all, "--- {name} ---\n{last}\n");
        }
        all
    }

    /// What is wrong with the filesystem and its device, if anything.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let show = self.show();
        let device = show["found"]["device"]["path"].as_str().unwrap_or_default().to_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let target = self.target();
        match mounts.lines().find(|l| l.split(' ').nth(4) == target.to_str()) {
            None => faults.push("it is not mounted".to_owned()),
            // The mount's own options, then the superblock's.
            Some(line) => {
                let (mount, superblock) = line.split_once(" - ").unwrap_or((line, ""));
                let options = [mount.split(' ').nth(5), superblock.split(' ').nth(2)];
                if options.iter().flatten().any(|o| o.split(',').any(|o| o == "ro" || o == "shutdown")) {
                    faults.push(format!("the filesystem went read-only: {line}"));
                }
            }
        }
        let errors = Path::new("/sys/fs/ext4").join(device.trim_start_matches("/dev/")).join("errors_count");
        match fs::read_to_string(errors) {
            Ok(count) if count.trim() != "0" => faults.push(format!("ext4 saw {} errors", count.trim())),
            Ok(_) => {}
            Err(_) if show["found"]["fs"] == "ext4" => faults.push("ext4 tells no error count".to_owned()),
            Err(_) => {}
        }
        if show["status"]["stats"]["errors"] != 0 {
            faults.push(format!("errors were delivered: {}", show["status"]["stats"]));
        }
        faults
    }
}

fn pid(value: &Value) -> Option<Pid> {
    value.as_i64().map(|pid| Pid::from_raw(i32::try_from(pid).expect("a pid")))
}

// ---- The load of the kill tests.

/// What a round of load and kills found.
#[derive(Default)]
struct Round {
    faults: Vec<String>,
    kills: usize,
    stalls: Vec<Duration>,
}

fn fio(lab: &Lab, name: &str) -> FioJob {
    support::ledger::fio(lab.dir.path(), &lab.target().join(name))
}

/// A verifying load, direct and buffered, with and without fsync (which of them has it changes from round to round),
/// while `strike` does its worst again and again. Then everything is read back, on the same mount.
fn round(lab: &Lab, n: u32, rng: &mut StdRng, mut strike: impl FnMut(&mut StdRng) -> Vec<Instant>) -> Round {
    let fsync = if n.is_multiple_of(2) { (0, 32) } else { (32, 0) };
    let ledger = Ledger::new(lab.target().join("ledger"), 1024).start(rng.random(), fsync.0);
    let mut direct = writing(fio(lab, "direct"), true, fsync.0).start();
    let mut buffered = writing(fio(lab, "buffered"), false, fsync.1).start();
    let (began, mut kills) = (Instant::now(), Vec::new());
    while direct.running() || buffered.running() {
        std::thread::sleep(rng.random_range(SECOND..2 * SECOND));
        // On a slow machine a start takes longer than the time between two kills: the load has to end some time.
        if kills.len() < KILLS {
            kills.extend(strike(rng));
        }
    }
    let written = began.elapsed();
    let mut faults = Vec::new();
    judge("direct writes", &direct.finish(LIMIT), &mut faults);
    judge("buffered writes", &buffered.finish(LIMIT), &mut faults);
    let ledger = ledger.stop();
    faults.extend(ledger.error.clone());
    if let Err(e) = drop_caches(&lab.target()) {
        faults.push(format!("sync: {e}"));
    }
    let read = fio(lab, "direct").set("rw", "randread").set("direct", 1);
    judge("reading what was written directly", &read.run(LIMIT), &mut faults);
    judge(
        "reading what was written buffered",
        &fio(lab, "buffered").set("rw", "randread").run(LIMIT),
        &mut faults,
    );
    faults.extend(ledger.check(Promise::Acknowledged));
    faults.extend(lab.faults());
    println!(
        "round {n}: {} kills, {written:.1?} of writing, {:.1?} of reading",
        kills.len(),
        began.elapsed() - written
    );
    Round { faults, kills: kills.len(), stalls: stalls(&kills, &ledger.times) }
}

/// Kills ZeroFS, and sometimes its successor while that starts or replays.
fn kill_at_random(lab: &Lab, rng: &mut StdRng) -> Vec<Instant> {
    let Some((at, pid)) = lab.kill_zerofs() else { return vec![] };
    if rng.random_ratio(1, 4) {
        let successor = lab.next_zerofs(Some(pid));
        std::thread::sleep(rng.random_range(Duration::ZERO..SECOND / 2));
        let _ = kill(successor, Signal::SIGKILL);
    }
    vec![at]
}

/// What the rounds on all mounts came to.
#[derive(Default)]
struct Tally {
    kills: usize,
    stalls: Vec<Duration>,
}

/// An attached volume that rounds of kills are done on. When it is dropped, all is read again after a detach and an
/// attach.
struct Arena {
    lab: Lab,
    rng: StdRng,
}

impl Arena {
    fn new(name: &str, lab: Lab) -> Arena {
        lab.attach();
        Arena { lab, rng: rng(name) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let lab = &self.lab;
        lab.detach();
        lab.attach();
        for file in ["direct", "buffered"] {
            if lab.target().join(file).exists() {
                reading(fio(lab, file), true).run(LIMIT).assert_clean();
            }
        }
        lab.detach();
        let checked = lab.run(&["fsck", "vol1"], LIMIT);
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }
}

/// Rounds of load and kills, each on the mount of the one before; in the long run on several volumes at once.
fn rounds_of_kills(
    name: &str,
    lab: impl Fn() -> Lab + Sync,
    count: u32,
    strike: impl Fn(&Lab, &mut StdRng) -> Vec<Instant> + Sync,
) {
    let tally = Mutex::new(Tally::default());
    let numbers: Vec<u32> = (0..count).collect();
    side_by_side(
        &numbers,
        || Arena::new(name, lab()),
        |Arena { lab, rng }, _, n| {
            for file in ["direct", "buffered", "ledger"] {
                let _ = fs::remove_file(lab.target().join(file));
            }
            let round = round(lab, *n, rng, |rng| strike(lab, rng));
            assert!(
                round.faults.is_empty(),
                "{name}, round {n} of {count}: {:#?}\n{}",
                round.faults,
                lab.logs()
            );
            assert!(round.kills > 0, "a round without a kill shows nothing");
            let mut tally = tally.lock().expect("no round panicked");
            tally.kills += round.kills;
            tally.stalls.extend(round.stalls);
        },
    );
    let Tally { kills, mut stalls } = tally.into_inner().expect("no round panicked");
    assert!(!stalls.is_empty(), "kills without a stall were no kills");
    println!("{name}: {count} of {count} rounds without an error or a lost write, {kills} kills");
    print_stalls(name, &mut stalls);
}

#[test]
fn root_a_killed_zerofs_under_load_is_a_stall_and_nothing_else() {
    rounds_of_kills("ext4, kill -9", || Lab::new(&[]), rounds(2, 30), kill_at_random);
}

#[test]
fn root_a_killed_zerofs_under_load_is_a_stall_on_xfs_too() {
    rounds_of_kills("xfs, kill -9", || Lab::new(&["--fs", "xfs"]), rounds(1, 10), kill_at_random);
}

#[test]
fn root_the_watchdogs_kills_under_load_are_stalls_and_nothing_else() {
    const FATAL: [&str; 4] = [
        "ERROR slatedb: background task failed [name=writer, error=IoError, panic=None]",
        "ERROR zerofs: Periodic flush failed: IoError",
        "WARN slatedb: won't flush imm to l0 because too many l0 files [l0_len=16]",
        "ERROR slatedb: background task panicked unexpectedly. [task_name=memtable_writer, error=x]",
    ];
    let next = AtomicU32::new(0);
    rounds_of_kills(
        "ext4, the watchdog's kills",
        || Lab::new(&[]),
        rounds(1, 30),
        |lab, _| {
            lab.wait_ready();
            let before = lab.zerofs();
            let at = Instant::now();
            lab.log_line(FATAL[next.fetch_add(1, Ordering::Relaxed) as usize % FATAL.len()]);
            lab.next_zerofs(before);
            vec![at]
        },
    );
}

#[test]
fn root_without_the_replay_log_the_same_load_fails() {
    const TRIES: u32 = 8;
    let mut rng = rng("no replay log");
    for n in 0..TRIES {
        let mut lab = Lab::new(&[]);
        lab.env.push(("ZEROFSCTL_TEST_NO_REPLAY_LOG", "1".into()));
        lab.attach();
        // The filesystem is damaged by now, most likely: nothing more is asked of it than to go away.
        let round = round(&lab, n, &mut rng, |rng| kill_at_random(&lab, rng));
        let gone = lab.run(&["detach", "vol1", "--force"], LIMIT);
        assert!(gone.status.success(), "{}\n{}", String::from_utf8_lossy(&gone.stderr), lab.logs());
        // What is missing, and not only that something went wrong.
        let lost = |fault: &String| {
            ["is of write", "holds zeros", "holds garbage", "verify"].iter().any(|word| fault.contains(word))
        };
        if round.kills > 0 && round.faults.iter().any(lost) {
            println!("no replay log: seen in try {} of {TRIES}: {:#?}", n + 1, shorten(round.faults));
            return;
        }
    }
    panic!("no loss was seen in {TRIES} tries: the load cannot see what the replay log is for");
}

// ---- An object store that goes away.

/// Two files whose data is in the store and nowhere else: one to be read, one to be overwritten in small pieces,
/// which ZeroFS can do only after it has read what is around them. In the middle of that the store refuses
/// connections for `outage`.
fn outage(outage: Duration, rng: &mut StdRng) {
    let name = format!("store away for {outage:?}");
    let lab = Lab::on_s3();
    lab.attach();
    fio(&lab, "cold").set("rw", "write").set("do_verify", 0).set("end_fsync", 1).run(LIMIT).assert_clean();
    let ledger = Ledger::new(lab.target().join("ledger"), 4096);
    // Takes the cache away too.
    lab.detach();
    lab.attach();

    let writing = ledger.start(rng.random(), if rng.random() { 0 } else { 20 });
    let mut reads = reading(fio(&lab, "cold"), true).set("rate_iops", 300).start();
    std::thread::sleep(rng.random_range(SECOND / 4..SECOND));
    let began = Instant::now();
    lab.proxy().interrupt(Mode::Refuse, outage);
    std::thread::sleep(SECOND);
    lab.wait_ready();
    let mut faults = Vec::new();
    wait_until("the reads are done", LIMIT, || !reads.running());
    judge("cold reads", &reads.finish(LIMIT), &mut faults);
    let ledger = writing.stop();
    let longest = ledger.times.iter().map(|(began, ended)| *ended - *began).max().unwrap_or_default();
    let after = ledger.times.iter().filter(|(b, _)| *b > began + outage).count();
    faults.extend(ledger.error.clone());
    let mut look = |when: &str| {
        if let Err(e) = drop_caches(&lab.target()) {
            faults.push(format!("sync {when}: {e}"));
        }
        let mut found = ledger.check(Promise::Acknowledged);
        judge("reading again", &reading(fio(&lab, "cold"), false).run(LIMIT), &mut found);
        found.extend(lab.faults());
        faults.extend(found.into_iter().map(|f| format!("{when}: {f}")));
    };
    look("on the same mount");
    let restarts = lab.status()["restarts"].clone();
    let zeros = lab.status()["stats"]["zero_reads_checked"].clone();
    // Once more from the store alone: zeros that were stored would be there now.
    lab.detach();
    lab.attach();
    look("after another attach");
    assert!(faults.is_empty(), "{name}: {faults:#?}\n{}", lab.logs());
    assert!(after > 0, "{name}: nothing was written after the outage");
    println!(
        "{name}: {} writes ({} fsyncs), longest {longest:.2?}, {restarts} restarts, {zeros} zero reads asked about",
        ledger.times.len(),
        ledger.syncs.load(Ordering::Relaxed)
    );
    lab.detach();
}

#[test]
fn root_a_store_that_refuses_connections_is_a_stall_and_nothing_else() {
    // The first two are what a restart of the store's gateway takes; the last outlasts every retry, and is for the
    // long run alone. There the longest come first, so that none is waited for alone in the end.
    let counts = [(60, rounds(0, 10)), (5, rounds(1, 10)), (2, rounds(1, 10))];
    let outages: Vec<u64> = counts.iter().flat_map(|(s, n)| (0..*n).map(|_| *s)).collect();
    side_by_side(&outages, || rng("outages"), |rng, _, seconds| outage(Duration::from_secs(*seconds), rng));
    for (seconds, count) in counts.iter().filter(|(_, count)| *count > 0) {
        println!("store away for {seconds} s: {count} of {count} without zeros, an error or a lost write");
    }
}

// ---- Everything dies.

/// Kills the keeper and ZeroFS, in any order.
fn kill_both(lab: &Lab, rng: &mut StdRng) {
    let (keeper, zerofs) = (lab.keeper(), lab.next_zerofs(None));
    for pid in if rng.random() { [keeper, zerofs] } else { [zerofs, keeper] } {
        kill(pid, Signal::SIGKILL).expect("it runs");
    }
}

#[test]
fn root_what_was_acknowledged_survives_the_death_of_everything() {
    let count = rounds(2, 20);
    let mut rng = rng("everything");
    let (mut replayed, mut writes) = (0, 0);
    let lab = Lab::new(&[]);
    lab.attach();
    let mut ledger = Ledger::new(lab.target().join("ledger"), 1024);
    for n in 0..count {
        let sync_every = if n.is_multiple_of(2) { 10 } else { 0 };
        let run = ledger.start(rng.random(), sync_every);
        let load = writing(fio(&lab, &format!("load{n}")), n % 2 == 1, 8).set("rate_iops", 2000).start();
        std::thread::sleep(rng.random_range(SECOND / 2..2 * SECOND));
        // fio goes with its handle, and the ledger's thread with its first error.
        match n % 4 {
            // ZeroFS lives on, with requests that nobody will hear the answer of.
            3 => kill(lab.keeper(), Signal::SIGKILL).expect("it runs"),
            _ => kill_both(&lab, &mut rng),
        }
        drop(load);
        ledger = run.thread.join().expect("the ledger's thread does not panic");
        assert!(ledger.error.is_some(), "a device without a keeper must fail");
        assert!(ledger.times.len() > 10, "round {n}: only {} writes", ledger.times.len());
        let began = Instant::now();
        lab.attach();
        let took = began.elapsed();
        // The whole file had its place in the filesystem before, so nothing but the replay log decides.
        let mut faults = ledger.check(Promise::Acknowledged);
        faults.extend(lab.faults());
        assert!(faults.is_empty(), "round {n} of {count}: {faults:#?}\n{}", lab.logs());
        replayed += lab.status()["stats"]["replayed_entries"].as_u64().expect("a number");
        writes += ledger.times.len();
        println!("everything killed, round {n}: attached again in {took:.2?}");
        // What was tried and not acknowledged may be there or not: from here on it counts as it is.
        ledger.settle();
        let _ = fs::remove_file(lab.target().join(format!("load{n}")));
    }
    println!("everything killed: {count} of {count}, {writes} writes, {replayed} replayed");
    assert!(replayed > 0, "nothing was left for the replay log to bring back");
    lab.detach();
    let checked = lab.run(&["fsck", "vol1"], LIMIT);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn root_what_was_synced_survives_without_the_replay_log() {
    const FLUSHES: u32 = 200;
    let count = rounds(1, 10);
    let mut rng = rng("flushes");
    let lab = Lab::new(&[]);
    lab.attach();
    let mut ledger = Ledger::new(lab.target().join("ledger"), 256);
    for n in 0..count {
        let syncs = Arc::clone(&ledger.syncs);
        let zerofs = lab.next_zerofs(None);
        let run = ledger.start(rng.random(), 1);
        wait_until("200 flushes", LIMIT, || {
            syncs.load(Ordering::Relaxed) >= FLUSHES || run.thread.is_finished()
        });
        // Of one and the same server: a restart would have emptied what must not fill up.
        assert_eq!(lab.zerofs(), Some(zerofs), "round {n}");
        kill_both(&lab, &mut rng);
        ledger = run.thread.join().expect("the ledger's thread does not panic");
        let syncs = syncs.load(Ordering::Relaxed);
        assert!(syncs >= FLUSHES, "{syncs} flushes returned, {:?}", ledger.error);
        fs::remove_file(lab.dir.join("r/volumes/vol1/replay.log")).expect("a replay log was left");
        lab.attach();
        let mut faults = ledger.check(Promise::Synced);
        faults.extend(lab.faults());
        assert!(faults.is_empty(), "round {n} of {count}: {faults:#?}\n{}", lab.logs());
        println!("flushes without the replay log, round {n}: {syncs} in a row, all kept");
        ledger.settle();
    }
    println!("flushes without the replay log: {count} of {count}");
    lab.detach();
}

// ---- A ZeroFS that stops answering.

#[test]
fn root_a_stopped_zerofs_is_a_stall_and_nothing_else() {
    let lab = Lab::new(&[]);
    lab.attach();
    let mut rng = rng("stopped");
    let writing = Ledger::new(lab.target().join("ledger"), 1024).start(rng.random(), 20);
    std::thread::sleep(SECOND);
    let before = lab.next_zerofs(None);
    let at = Instant::now();
    kill(before, Signal::SIGSTOP).expect("it runs");
    // A detach would hang in the kernel, beyond the reach of any signal; so it says what is wrong, and does nothing.
    let refused = lab.run(&["detach", "vol1", "--stop-timeout", "2s"], LIMIT);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("could not be written out"), "{said}");
    std::thread::sleep((10 * SECOND).saturating_sub(at.elapsed()));
    let state = lab.status()["state"].clone();
    kill(before, Signal::SIGCONT).expect("it still runs");
    std::thread::sleep(2 * SECOND);
    let ledger = writing.stop();
    let stall = stalls(&[at], &ledger.times);
    println!("stopped for 10 s: state {state}, stall {stall:.2?}");
    let mut faults = ledger.error.iter().cloned().collect::<Vec<_>>();
    drop_caches(&lab.target()).expect("sync");
    faults.extend(ledger.check(Promise::Acknowledged));
    faults.extend(lab.faults());
    let status = lab.status();
    assert!(faults.is_empty(), "{faults:#?}\n{}", lab.logs());
    assert_eq!(
        (lab.zerofs(), &status["restarts"], &status["state"]),
        (Some(before), &0.into(), &"ready".into())
    );
    assert!(stall.len() == 1 && stall[0] > 9 * SECOND, "{stall:?}");
    lab.detach();
}

#[test]
fn root_with_a_time_limit_io_fails_and_detach_still_works() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let lab = Lab::new(&["--io-timeout", "3s"]);
    lab.attach();
    let writing = Ledger::new(lab.target().join("ledger"), 256).start(1, 0);
    std::thread::sleep(SECOND);
    let zerofs = lab.next_zerofs(None);
    let at = Instant::now();
    kill(zerofs, Signal::SIGSTOP).expect("it runs");
    wait_until("I/O fails", LIMIT, || writing.thread.is_finished());
    let took = at.elapsed();
    let ledger = writing.stop();
    let error = ledger.error.clone().expect("the ledger ended by itself");
    assert!(error.contains("Input/output error"), "{error}");
    assert!(took > TIMEOUT - SECOND && took < TIMEOUT + 10 * SECOND, "{took:?}");
    let began = Instant::now();
    let out = lab.run(&["detach", "vol1", "--stop-timeout", "5s", "--force"], LIMIT);
    println!("time limit 3 s: I/O failed after {took:.2?}; detached in {:.2?}", began.elapsed());
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{text}\n{}", lab.logs());
    assert!(began.elapsed() < 40 * SECOND, "{:?}", began.elapsed());
    // What was acknowledged before is kept all the same.
    lab.attach();
    let faults = ledger.check(Promise::Acknowledged);
    assert!(faults.is_empty(), "{faults:#?}\n{}", lab.logs());
    lab.detach();
}
