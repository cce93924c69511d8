//! Everything behind a kernel NBD device dies, at random instants and under a verifying load, with the real ZeroFS, a
//! real filesystem and `zerofsctl watch`: each death is a stall and nothing else; on the direct path, an error at worst.
//! Needs root and a kernel with the nbd module: it runs in the virtual machine.
//!
//! The long run (`make test-long PART=nbd-kills`) does many kills. The figures are printed.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::Rng;
use rand::rngs::StdRng;
use support::cli::{Node, Victim, assert_holds, pattern, write_durably};
use support::fio::FioJob;
use support::ledger::{
    Ledger, Promise, drop_caches, fio, judge, print_stalls, reading, rng, stalls, writing,
};
use support::vm::{Baseline, KernelLog, require_nbd};
use support::watch::Watch;
use support::{is_long, rounds, wait_until};
use zerofsctl::host::nbd::{netlink, sysfs};
use zerofsctl::keeper::client::KeeperClient;
use zerofsctl::keeper::control::State;

const SECOND: Duration = Duration::from_secs(1);
/// No stall that these tests cause is longer, on any machine that is worth a result.
const LIMIT: Duration = Duration::from_secs(180);
/// At most that many kills in one round of load.
const KILLS: u32 = 6;

/// An attached volume, and its watcher.
struct Lab {
    node: Node,
    watch: Option<Watch>,
    index: u32,
    before: Baseline,
    kernel: KernelLog,
}

impl Lab {
    fn new(options: &[&str]) -> Lab {
        require_nbd();
        let node = Node::new();
        let (before, kernel) = (Baseline::take(), KernelLog::from_now());
        attach(&node, options);
        let watch = Some(Watch::start(&node));
        let index = device(&node);
        Lab { node, watch, index, before, kernel }
    }

    fn target(&self) -> PathBuf {
        target(&self.node)
    }

    /// How many requests the device has answered.
    fn answered(&self) -> u64 {
        let text =
            fs::read_to_string(format!("/sys/block/nbd{}/stat", self.index)).expect("it has statistics");
        let fields: Vec<u64> = text.split_whitespace().map(|f| f.parse().expect("a number")).collect();
        // Reads, writes, discards and flushes.
        [0, 4, 11, 15].iter().filter_map(|i| fields.get(*i)).sum()
    }

    /// Whether the device has a keeper other than this one, which serves it, with a ZeroFS other than that one.
    fn serves_again(&self, dead: &[i32]) -> bool {
        let folder = self.node.run_root().join("volumes/vol1");
        let status = KeeperClient::connect(&folder).and_then(|mut keeper| keeper.status());
        status.is_ok_and(|s| {
            let fresh = |pid| !dead.contains(&pid);
            fresh(s.keeper.pid)
                && s.zerofs.is_some_and(|z| fresh(z.pid))
                && s.state == State::Ready
                && s.nbd.is_some_and(|n| n.connections > 0)
        })
    }

    /// Kills, and waits until I/O goes on; none when there was nobody to kill.
    fn strike(&self, victim: Victim, rng: &mut StdRng) -> Option<Stall> {
        let (keepers, servers) = self.node.processes();
        let mut dead = match victim {
            Victim::Keeper => keepers,
            Victim::Zerofs => servers,
            _ => [keepers, servers].concat(),
        };
        if rng.random() {
            dead.reverse();
        }
        std::thread::sleep(rng.random_range(Duration::ZERO..SECOND / 20));
        let at = Instant::now();
        dead.retain(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).is_ok());
        if dead.is_empty() {
            return None;
        }
        let mut count = self.answered();
        let (mut last, mut io, mut restart) = (at, None, None);
        while io.is_none() || restart.is_none() {
            std::thread::sleep(Duration::from_millis(3));
            let now = Instant::now();
            if restart.is_none() && self.serves_again(&dead) {
                restart = Some(at.elapsed());
            }
            let answered = self.answered();
            if answered != count {
                // What comes soon after a kill was answered before.
                if now - last > SECOND / 25 && io.is_none() {
                    io = Some(now - at);
                }
                (count, last) = (answered, now);
            }
            // The load may have come to its end.
            if restart.is_some_and(|r| at.elapsed() > r + 5 * SECOND) {
                break;
            }
            assert!(at.elapsed() < LIMIT, "no I/O for {LIMIT:?}\n{}", self.diagnosis());
        }
        Some(Stall { at, restart: restart?, io })
    }

    /// What is wrong with the filesystem and its device, if anything.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let shown = self.node.json(&["show", "vol1"]);
        if shown["found"]["state"] != "attached" {
            faults.push(format!("it is {}", shown["found"]["state"]));
        }
        if shown["status"]["stats"]["errors"] != 0 {
            faults.push(format!("errors were delivered: {}", shown["status"]["stats"]));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        match mounts.lines().find(|l| l.split(' ').nth(4) == self.target().to_str()) {
            None => faults.push("it is not mounted".to_owned()),
            Some(line) if line.split([' ', ',']).any(|o| ["ro", "emergency_ro", "shutdown"].contains(&o)) => {
                faults.push(format!("the filesystem went read-only: {line}"));
            }
            Some(_) => {}
        }
        let errors = fs::read_to_string(format!("/sys/fs/ext4/nbd{}/errors_count", self.index));
        if errors.as_deref().map(str::trim).unwrap_or("untold") != "0" {
            faults.push(format!("ext4's count of errors is {errors:?}"));
        }
        // "I/O error, dev nbd0", "Buffer I/O error on dev nbd0", "EXT4-fs error (device nbd0)".
        let said = self.kernel.lines();
        faults.extend(said.iter().filter(|l| l.contains("I/O error") || l.contains("-fs error")).cloned());
        // What the driver says of a reply that it does not want, which costs the socket. That it sends a request again in the
        // instant of the hand-over cannot be helped.
        let unwanted =
            ["Double reply", "Unexpected reply", "Suspicious reply", "already handled", "Raced with"];
        let unwanted: Vec<_> =
            said.into_iter().filter(|l| unwanted.iter().any(|word| l.contains(word))).collect();
        let answered = self.owed_replies().into_iter().filter(|owed| *owed > 0).count();
        if unwanted.len() > answered / 2 + 2 {
            faults.extend(unwanted);
        }
        faults
    }

    /// For each hand-over of the device to the next keeper: how many requests that one has answered for a killed one.
    fn owed_replies(&self) -> Vec<u64> {
        let log = fs::read_to_string(self.node.state().join("logs/vol1/keeper.log")).unwrap_or_default();
        log.lines()
            .filter_map(|l| l.split_once("the replies to ")?.1.split(' ').next()?.parse().ok())
            .collect()
    }

    /// For a test that fails.
    fn diagnosis(&self) -> String {
        let mut text = format!("device: {:?}\n", sysfs::one(self.index));
        let last = |text: &str, n: usize| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(n)..].join("\n")
        };
        for name in ["keeper.log", "zerofs.log"] {
            let log = fs::read_to_string(self.node.state().join("logs/vol1").join(name)).unwrap_or_default();
            text += &format!("--- {name}\n{}\n", last(&log, 40));
        }
        let folder = self.node.run_root().join("volumes/vol1");
        text += &format!("--- status\n{:#?}\n", KeeperClient::connect(&folder).and_then(|mut k| k.status()));
        for name in ["stat", "inflight", "queue/io_timeout"] {
            let value =
                fs::read_to_string(format!("/sys/block/nbd{}/{name}", self.index)).unwrap_or_default();
            text += &format!("--- {name}: {}\n", value.trim());
        }
        text += &format!("--- kernel\n{}\n", last(&self.kernel.lines().join("\n"), 60));
        text += &format!(
            "--- watcher\n{}\n",
            fs::read_to_string(self.node.dir.join("watch.log")).unwrap_or_default()
        );
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            for thread in fs::read_dir(entry.path().join("task")).into_iter().flatten().flatten() {
                let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                if status.lines().any(|l| l.starts_with("State:\tD")) {
                    let stack = fs::read_to_string(thread.path().join("stack")).unwrap_or_default();
                    let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
                    text += &format!("--- waits in the kernel: {}\n{stack}\n", name.trim());
                }
            }
        }
        text
    }

    /// Detached, with nothing left; what was written is there after another attach, on a sound filesystem.
    fn end(mut self, files: &[&str]) {
        if let Some(watch) = self.watch.take() {
            watch.stop();
        }
        let Lab { node, before, .. } = &self;
        node.ok(&["detach", "vol1"]);
        before.assert_back();
        node.ok(&["fsck", "vol1"]);
        attach(node, &[]);
        for file in files {
            reading(job(&self, file), true).run(LIMIT).assert_clean();
        }
        node.ok(&["detach", "vol1"]);
        before.assert_back();
        node.assert_nothing_left("at the end");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.diagnosis());
            // Whoever waits for it in the kernel cannot be killed.
            let _ = netlink::disconnect(self.index);
        }
    }
}

fn target(node: &Node) -> PathBuf {
    node.dir.join("m")
}

fn attach(node: &Node, options: &[&str]) {
    let target = target(node);
    let words = ["attach", "vol1", "--target", target.to_str().unwrap(), "--transport", "nbd"];
    node.ok(&[&words, options].concat());
}

fn device(node: &Node) -> u32 {
    let found = node.found("vol1");
    let path = found["device"]["path"].as_str().unwrap_or_else(|| panic!("no device: {found:#}"));
    sysfs::index_of(Path::new(path)).unwrap_or_else(|| panic!("no NBD device: {found:#}"))
}

/// What a kill came to.
struct Stall {
    at: Instant,
    /// From the kill until the next processes serve the device.
    restart: Duration,
    /// From the kill to the first request that was answered after it; none when nobody asked.
    io: Option<Duration>,
}

#[derive(Default)]
struct Tally {
    kills: u32,
    restarts: Vec<Duration>,
    /// From the kill to the first answer.
    first: Vec<Duration>,
    /// The same without the restart's own time.
    beyond: Vec<Duration>,
    /// From the kill to the answer of a request that was on its way.
    under_way: Vec<Duration>,
    /// The same without the restart's own time.
    sent_again: Vec<Duration>,
    /// Requests that a keeper answered for the one before.
    owed: u64,
}

/// fio's job for a file. Small, and with few flushes: ZeroFS keeps what its compactions leave for minutes, and the store is
/// in the memory of the machine. One that is full is a stall for as long as it is, as it should be.
fn job(lab: &Lab, name: &str) -> FioJob {
    fio(lab.node.dir.path(), &lab.target().join(name)).set("size", "4m")
}

/// A verifying load, direct and buffered with fsync, during which `victim` is killed again and again; then everything is
/// read back, on the same mount.
fn round(lab: &Lab, victim: Victim, at_most: u32, rng: &mut StdRng, tally: &mut Tally) {
    // Without an fsync of its own: its times are those of single writes.
    let ledger = Ledger::new(lab.target().join("ledger"), 256).start(rng.random(), 0);
    let mut direct = writing(job(lab, "direct"), true, 0).start();
    let mut buffered = writing(job(lab, "buffered"), false, 64).start();
    let (began, mut blows) = (Instant::now(), Vec::new());
    while direct.running() || buffered.running() {
        std::thread::sleep(rng.random_range(SECOND / 5..SECOND));
        if (blows.len() as u32) < at_most.min(KILLS) && direct.running() {
            blows.extend(lab.strike(victim, rng));
        }
        assert!(began.elapsed() < 2 * LIMIT, "the load hangs\n{}", lab.diagnosis());
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
    for name in ["direct", "buffered"] {
        judge(&format!("reading {name}"), &reading(job(lab, name), true).run(LIMIT), &mut faults);
    }
    faults.extend(ledger.check(Promise::Acknowledged));
    faults.extend(lab.faults());
    assert!(faults.is_empty(), "{victim:?}: {faults:#?}");
    assert!(!blows.is_empty(), "a round without a kill shows nothing");
    println!(
        "{victim:?}: {} kills, {written:.1?} of writing, {:.1?} of reading",
        blows.len(),
        began.elapsed() - written
    );
    tally.kills += blows.len() as u32;
    for (n, blow) in blows.iter().enumerate() {
        tally.restarts.push(blow.restart);
        tally.first.extend(blow.io);
        tally.beyond.extend(blow.io.map(|io| io.saturating_sub(blow.restart)));
        // A write that the next kill met as well says nothing about this one.
        let next = blows.get(n + 1).map(|b| b.at);
        for stall in stalls(&[blow.at], &ledger.times) {
            if next.is_some_and(|next| blow.at + stall > next) {
                continue;
            }
            tally.under_way.push(stall);
            tally.sent_again.push(stall.saturating_sub(blow.restart));
        }
    }
}

fn kills_are_stalls(victim: Victim) {
    let count = rounds(3, 50);
    let mut rng = rng("kills");
    let mut tally = Tally::default();
    while tally.kills < count {
        let left = count - tally.kills;
        let lab = Lab::new(&["--size", "256Mi"]);
        round(&lab, victim, left, &mut rng, &mut tally);
        assert_eq!(device(&lab.node), lab.index, "the same device");
        tally.owed += lab.owed_replies().iter().sum::<u64>();
        lab.end(&["direct", "buffered"]);
    }
    assert!(!tally.first.is_empty(), "kills without a stall were no kills");
    if is_long() {
        // What is promised; a usual run has too few kills, on machines that do other things, to say anything about time.
        assert!(tally.first.len() >= count as usize / 2, "{} stalls of {count} kills", tally.first.len());
        let worst = tally.beyond.iter().max().copied().unwrap_or_default();
        assert!(
            worst <= Duration::from_secs(1),
            "{victim:?}: I/O waited {worst:.2?} longer than the restart took"
        );
    }
    if !matches!(victim, Victim::Zerofs) {
        assert!(tally.owed > 0, "no keeper has answered what the one before had taken");
        println!("{victim:?}: {} requests answered for a killed keeper", tally.owed);
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{victim:?}: {count} of {count} kills without an error or a lost write; load average {}",
        load.trim()
    );
    print_stalls("kill to serving again", &mut tally.restarts);
    print_stalls("kill to the first answer", &mut tally.first);
    print_stalls("of that, beyond the restart", &mut tally.beyond);
    print_stalls("kill to the answer of a write under way", &mut tally.under_way);
    print_stalls("of that, beyond the restart", &mut tally.sent_again);
}

#[test]
fn nbd_a_killed_zerofs_under_a_verifying_load_is_a_stall_and_nothing_else() {
    kills_are_stalls(Victim::Zerofs);
}

#[test]
fn nbd_a_killed_keeper_under_a_verifying_load_is_a_stall_and_nothing_else() {
    kills_are_stalls(Victim::Keeper);
}

#[test]
fn nbd_keeper_and_zerofs_killed_under_a_verifying_load_are_a_stall_and_nothing_else() {
    kills_are_stalls(Victim::Both);
}

// ---- The direct path.

/// What an attached volume on the direct path comes to when `victim` is killed under a verifying load. Whether its
/// device failed.
fn direct_round(lab: &mut Lab, victim: Victim, rng: &mut StdRng) -> bool {
    let path = |name: &str| lab.target().join(name);
    for name in ["load", "ledger"] {
        let _ = fs::remove_file(path(name));
    }
    let ledger = Ledger::new(path("ledger"), 256).start(rng.random(), 16);
    // Reads back what it wrote while it goes on, so that wrong data would be seen before an error hides it.
    let load = job(lab, "load")
        .set("rw", "randwrite")
        .set("direct", 1)
        .set("ioengine", "libaio")
        .set("iodepth", 16)
        .set("rate_iops", 350)
        .set("verify_backlog", 64)
        .start();
    std::thread::sleep(rng.random_range(SECOND / 4..2 * SECOND));
    let (keepers, servers) = lab.node.processes();
    let dead = match victim {
        Victim::Keeper => keepers,
        Victim::Zerofs => servers,
        _ => [keepers, servers].concat(),
    };
    assert!(!dead.is_empty(), "{victim:?}: nobody was there to be killed");
    for pid in &dead {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("it runs");
    }
    if victim == Victim::Keeper {
        // The kernel speaks to ZeroFS, which lives on.
        load.finish(LIMIT).assert_clean();
        let ledger = ledger.stop();
        assert_eq!(ledger.error, None);
        wait_until("the next keeper is there", LIMIT, || lab.node.found("vol1")["state"] == "attached");
        drop_caches(&lab.target()).expect("the filesystem can be synced");
        assert_eq!(ledger.check(Promise::Acknowledged), Vec::<String>::new());
        assert_eq!(lab.faults(), Vec::<String>::new());
        return false;
    }
    let report = load.finish(LIMIT);
    let wrong = !report.verify_failures.is_empty() || report.errno == i64::from(libc::EILSEQ);
    assert!(!wrong, "wrong data was read: {report:#?}");
    wait_until("the ledger gets an error", LIMIT, || ledger.thread.is_finished());
    wait_until("the device fails", LIMIT, || lab.node.found("vol1")["state"] == "broken");
    let ledger = ledger.thread.join().expect("the ledger's thread does not panic");
    assert!(ledger.error.is_some(), "it ended without an error");
    lab.node.ok(&["recover", "vol1"]);
    lab.index = device(&lab.node);
    lab.kernel = KernelLog::from_now();
    assert_eq!(ledger.check(Promise::Synced), Vec::<String>::new());
    assert_eq!(lab.faults(), Vec::<String>::new());
    true
}

#[test]
fn nbd_the_direct_path_under_the_same_kills_fails_or_is_clean_and_never_reads_wrong_data() {
    // So many of each victim.
    let count = 3 * rounds(1, 50);
    let mut rng = rng("the direct path");
    let mut failed = 0;
    let victims: Vec<Victim> =
        [Victim::Zerofs, Victim::Keeper, Victim::Both].into_iter().cycle().take(count as usize).collect();
    // A fresh volume for each few of them, since what is in a store is in the memory of the machine.
    for victims in victims.chunks(3) {
        let mut lab = Lab::new(&["--size", "256Mi", "--path", "direct"]);
        for victim in victims {
            failed += u32::from(direct_round(&mut lab, *victim, &mut rng));
        }
        lab.end(&[]);
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "direct path: {failed} of {count} kills failed the device, none read wrong data; load {}",
        load.trim()
    );
}

// ---- A server that stays away.

#[test]
fn nbd_a_server_that_is_gone_for_long_and_comes_back_is_a_stall_and_nothing_else() {
    let away = Duration::from_secs(if is_long() { 120 } else { 20 });
    let lab = Lab::new(&["--size", "256Mi"]);
    let mut rng = rng("gone for long");
    let ledger = Ledger::new(lab.target().join("ledger"), 256).start(rng.random(), 16);
    let load = writing(job(&lab, "direct"), true, 64).start();
    std::thread::sleep(SECOND);
    lab.node.hide_the_store();
    let at = Instant::now();
    assert!(lab.node.kill(Victim::Both));
    std::thread::sleep(away);
    assert!(!ledger.thread.is_finished(), "I/O failed while the server was away");
    lab.node.show_the_store();
    wait_until("the device is served again", LIMIT, || lab.serves_again(&[]));
    let restart = at.elapsed() - away;
    let mut faults = Vec::new();
    judge("direct writes", &load.finish(LIMIT), &mut faults);
    let ledger = ledger.stop();
    faults.extend(ledger.error.clone());
    drop_caches(&lab.target()).expect("the filesystem can be synced");
    judge("reading", &reading(job(&lab, "direct"), true).run(LIMIT), &mut faults);
    faults.extend(ledger.check(Promise::Acknowledged));
    faults.extend(lab.faults());
    assert!(faults.is_empty(), "{faults:#?}");
    let stall = stalls(&[at], &ledger.times);
    assert!(stall.iter().any(|s| *s >= away), "it was not away: {stall:?}");
    println!("gone for {away:?}: served again {restart:.2?} after its store was back, stall {stall:.2?}");
    lab.end(&["direct"]);
}

#[test]
fn nbd_a_server_that_is_gone_for_ever_lets_a_detach_end_and_it_says_what_was_lost() {
    let mut lab = Lab::new(&["--size", "256Mi"]);
    if let Some(watch) = lab.watch.take() {
        watch.stop();
    }
    let node = &lab.node;
    let bytes = pattern(3, 2 << 20);
    write_durably(&target(node).join("synced"), &bytes);
    node.hide_the_store();
    assert!(node.kill(Victim::Both));
    // In the page cache, and nowhere else.
    fs::write(target(node).join("cached"), &bytes).expect("the page cache takes it");
    let began = Instant::now();
    let refused = node.run(&["detach", "vol1", "--stop-timeout", "3s"]);
    assert!(
        refused.stderr.contains("nothing is lost") && refused.stderr.contains("detach --force"),
        "{refused:#?}"
    );
    refused.expect_error(130, &["could not be written out within 3 s", "m"]);
    assert!(sysfs::one(lab.index).unwrap().unwrap().connected, "nothing was taken away");
    let took = began.elapsed();
    let began = Instant::now();
    let forced = node.run(&["detach", "vol1", "--stop-timeout", "3s", "--force"]);
    let lost = format!(
        "warning: /dev/nbd{} is failed by force: what was cached, but not acknowledged, is lost",
        lab.index
    );
    assert!(forced.stderr.contains(&lost), "{forced:#?}");
    // What is left to do is done in the store, which is not there: the error is its own.
    forced.expect_error(2, &["release", "catalog"]);
    println!("gone for ever: a detach ended after {took:.1?}, a forced one after {:.1?}", began.elapsed());
    assert!(took < LIMIT && began.elapsed() < LIMIT, "they are bounded");
    lab.before.assert_back();
    node.show_the_store();
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("once the store is back");
    attach(node, &[]);
    assert_holds(&target(node).join("synced"), &bytes, "what was synced is there");
    node.ok(&["detach", "vol1"]);
    lab.before.assert_back();
}

// ---- Two run folders.

#[test]
fn nbd_two_run_folders_with_a_volume_of_one_name_keep_to_their_own_devices() {
    require_nbd();
    let before = Baseline::take();
    let nodes = [Node::new(), Node::new()];
    let contents = [pattern(1, 2 << 20), pattern(2, 2 << 20)];
    for (node, bytes) in nodes.iter().zip(&contents) {
        attach(node, &["--size", "256Mi"]);
        write_durably(&target(node).join("data"), bytes);
    }
    let devices = nodes.each_ref().map(device);
    assert_ne!(devices[0], devices[1]);
    for index in devices {
        assert_eq!(sysfs::one(index).unwrap().unwrap().backend.as_deref(), Some("zerofs:vol1"));
    }
    let both_hold = |when: &str| {
        for ((node, bytes), index) in nodes.iter().zip(&contents).zip(devices) {
            assert_eq!(node.found("vol1")["state"], "attached", "{when}");
            assert_eq!(device(node), index, "{when}");
            assert_holds(&target(node).join("data"), bytes, when);
        }
    };
    let watches = nodes.each_ref().map(Watch::start);
    for (times, victim) in [(1, Victim::Keeper), (2, Victim::Both)] {
        for node in &nodes {
            assert!(node.kill(victim));
        }
        for watch in &watches {
            watch.wait_for("took-over", times);
        }
        both_hold(&format!("after a kill of {victim:?}"));
    }
    watches.into_iter().for_each(Watch::stop);

    // One goes and comes back; the other never notices, nor does a collector take it for a leak of its own.
    nodes[0].ok(&["detach", "vol1"]);
    assert_eq!(Baseline::take().count(), before.count() + 1);
    nodes[0].ok(&["nbd", "gc", "--older-than", "0s", "--yes"]);
    assert_eq!(nodes[1].found("vol1")["state"], "attached");
    assert_holds(&target(&nodes[1]).join("data"), &contents[1], "after the other's detach and gc");
    attach(&nodes[0], &[]);
    assert_ne!(device(&nodes[0]), devices[1]);
    assert_holds(&target(&nodes[0]).join("data"), &contents[0], "attached again");
    for node in &nodes {
        node.ok(&["detach", "vol1"]);
        node.assert_nothing_left("at the end");
    }
    before.assert_back();
}
