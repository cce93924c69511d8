//! What was acknowledged and is not durable yet, when a volume is let go: it goes in first, or waits for the next attach
//! here, or is void because somebody else has had the volume. On the built program, with the real ZeroFS.

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::cli::{Answer, Node, Victim, assert_holds, pattern, write_acknowledged, write_durably};
use support::{wait_until, zerofs_bin};

const AT: u64 = 4 << 20;
const LEN: usize = 2 << 20;

/// Far less than anything waits for that was told nothing.
const LONG: Duration = Duration::from_secs(60);

/// A node and its raw device.
struct Raw {
    node: Node,
    link: String,
    attach: Vec<String>,
    name: &'static str,
    /// None where the store is the node's own.
    password: Option<PathBuf>,
}

impl Raw {
    fn new() -> Raw {
        Raw::on(Node::new(), "here", &[])
    }

    fn on(node: Node, name: &'static str, words: &[&str]) -> Raw {
        let link = node.target("raw");
        let fixed = ["attach", "vol1", "--block", "--target", &link, "--size", "64Mi", "--transport", "fuse"];
        let attach = fixed.iter().chain(words).map(|word| (*word).to_owned()).collect();
        Raw { node, link, attach, name, password: None }
    }

    fn command<S: AsRef<str>>(&self, words: &[S]) -> Command {
        let mut command = self.node.command(words);
        command.env("NODE_ID", self.name);
        if let Some(file) = &self.password {
            command.env("ZEROFS_ENCRYPTION_PASSWORD_FILE", file);
        }
        command
    }

    fn attach(&self) -> Answer {
        Answer::of(&mut self.command(&self.attach)).expect_code(0)
    }

    fn device(&self) -> PathBuf {
        fs::read_link(&self.link).expect("a raw attach makes a link")
    }

    fn take_over(&mut self) {
        self.attach.push("--take-over".into());
        self.attach();
    }

    fn write_durably(&self, bytes: &[u8]) {
        let device = OpenOptions::new().write(true).open(self.device()).expect("it opens");
        device.write_all_at(bytes, AT).and_then(|()| device.sync_all()).expect("a durable write");
    }

    /// An attach that has acknowledged `bytes`, and lost its keeper.
    fn left_behind(&self, bytes: &[u8], victim: Victim) {
        self.attach();
        let held = write_acknowledged(&self.device(), AT, bytes);
        assert!(self.node.kill(victim));
        drop(held);
    }

    fn assert_holds(&self, bytes: &[u8], when: &str) {
        let mut back = vec![0; bytes.len()];
        let file = File::open(self.device()).expect("it opens");
        file.read_exact_at(&mut back, AT).expect("it reads");
        assert!(back == bytes, "{when}: not what was written");
    }

    /// Stops the ZeroFS that is left, so that nobody can settle anything with it.
    fn stop_zerofs(&self) {
        kill(Pid::from_raw(self.node.processes().1[0]), Signal::SIGSTOP).expect("it runs");
    }

    fn detach(&self, words: &[&str]) -> Answer {
        Answer::of(&mut self.command(&[&["detach", "vol1"], words].concat()))
    }

    /// With a program that tells its version, and then does `what`.
    fn detach_with(&self, what: &str, words: &[&str]) -> Command {
        let program = self.node.dir.join("zerofs");
        let real = zerofs_bin().display().to_string();
        let script = format!("#!/bin/sh\n[ \"$1\" = --version ] && exec {real} --version\n{what}\n");
        fs::write(&program, script).expect("a new file");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("it is ours");
        let mut command = self.command(&[&["detach", "vol1"], words].concat());
        command.env("ZEROFS_BIN", &program);
        command
    }

    fn assert_whole(&self, bytes: &[u8], when: &str) {
        self.attach();
        self.assert_holds(bytes, when);
        self.detach(&[]).expect_code(0);
        self.node.assert_nothing_left(when);
    }
}

/// Another node with the same store.
fn elsewhere(first: &Node) -> Raw {
    on_the_store_of(first, "elsewhere", Node::new())
}

fn on_the_store_of(first: &Node, name: &'static str, node: Node) -> Raw {
    let url = format!("file://{}", first.state().join("store").display());
    let password = Some(first.state().join("store.password"));
    Raw { password, ..Raw::on(node, name, &["--storage-url", &url]) }
}

/// With ZeroFS the newcomer wins: a server that is started for an old log would cut off the owner, and write old data over new.
#[test]
fn root_what_is_left_of_a_volume_that_was_taken_over_leaves_the_new_owner_alone() {
    for (victim, first) in [
        (Victim::Both, &[][..]),
        (Victim::Keeper, &[]),
        (Victim::Both, &["recover", "vol1"]),
        (Victim::Keeper, &["attach", "vol1", "--block", "--target", "again"]),
    ] {
        let (old, new) = (pattern(1, LEN), pattern(2, LEN));
        let a = Raw::new();
        a.left_behind(&old, victim);
        let mut b = elsewhere(&a.node);
        b.take_over();
        b.write_durably(&new);
        let before = b.node.processes();
        let mut said = String::new();
        for words in [first, &["detach", "vol1"]].into_iter().filter(|words| !words.is_empty()) {
            let answer = Answer::of(&mut a.command(words));
            assert_eq!(answer.code == Some(0), words[0] != "attach", "{answer:?}");
            said += &answer.stderr;
        }
        assert!(said.contains("acknowledged writes that had not been flushed before are void"), "{said}");
        assert_eq!(a.node.processes(), (vec![], vec![]), "{victim:?}");
        assert_eq!(b.node.processes(), before, "{victim:?}: the owner's server was cut off");
        b.assert_holds(&new, "with its owner");
        b.detach(&[]).expect_code(0);
        b.assert_whole(&new, "for the owner's next attach");
        a.node.assert_nothing_left("of the first owner");
    }
}

/// Leave to take a volume over is given for one attach, and not for bringing it back later.
#[test]
fn root_a_recovery_takes_nothing_over() {
    let a = Raw::new();
    let bytes = pattern(10, LEN);
    a.attach();
    let mut others = [elsewhere(&a.node), on_the_store_of(&a.node, "third", Node::new())];
    for other in &mut others {
        other.take_over();
    }
    let [b, c] = others;
    c.write_durably(&bytes);
    let before = c.node.processes();
    for old in [&a, &b] {
        old.node.kill(Victim::Both);
        Answer::of(&mut old.command(&["recover", "vol1"])).expect_code(0);
        old.node.assert_nothing_left("of an owner before");
    }
    assert_eq!(c.node.processes(), before, "the owner's server was cut off");
    c.assert_holds(&bytes, "with its owner");
    c.detach(&[]).expect_code(0);
}

/// A log is of one volume, and not of every one of its name.
#[test]
fn root_a_log_is_not_replayed_over_another_volume_of_the_same_name() {
    let (first, other) = (Raw::new(), Raw::new());
    let (old, theirs) = (pattern(11, LEN), pattern(12, LEN));
    other.attach();
    other.write_durably(&theirs);
    other.detach(&[]).expect_code(0);
    first.left_behind(&old, Victim::Both);
    Answer::of(&mut first.detach_with("exit 1", &["--force", "--stop-timeout", "2s"])).expect_code(0);
    let there = on_the_store_of(&other.node, "here", first.node);
    // An attach that comes to nothing does not make it one of this volume.
    let killed = Answer::of(there.command(&there.attach).env("ZEROFSCTL_TEST_KILL", "write-config:after"));
    assert_eq!(killed.signal, Some(9), "{killed:?}");
    Answer::of(&mut there.command(&["recover"])).expect_code(0);
    // One that is killed after its replay leaves no note that would make the next log another volume's.
    let killed = Answer::of(there.command(&there.attach).env("ZEROFSCTL_TEST_KILL", "replay:applied"));
    assert_eq!(killed.signal, Some(9), "{killed:?}");
    there.attach();
    there.assert_holds(&theirs, "of the other volume");
    let held = write_acknowledged(&there.device(), AT, &theirs[..4096]);
    assert!(there.node.kill(Victim::Both));
    drop(held);
    Answer::of(&mut there.command(&["recover"])).expect_code(0);
    there.assert_holds(&theirs, "of the other volume, with its own log");
    there.detach(&[]).expect_code(0);
    there.node.assert_nothing_left("of both");
}

/// What lives here is not taken for what an attach has made that finds the volume taken.
#[test]
fn root_an_attach_that_finds_the_volume_taken_leaves_what_is_here() {
    let a = Raw::new();
    let bytes = pattern(13, LEN);
    a.attach();
    let mut b = elsewhere(&a.node);
    b.take_over();
    let second = a.node.target("second");
    let words = ["attach", "vol1", "--block", "--target", &second, "--transport", "fuse"];
    Answer::of(&mut a.command(&words)).expect_error(1, &["somebody else has had it since"]);
    assert!(a.node.state().join("volumes/vol1/config.toml").exists());
    // Nor on a node that goes by another name today.
    let stranger = Answer::of(b.node.command(&words[..4]).env("NODE_ID", "stranger").arg(&second));
    stranger.expect_error(1, &["it was attached here, but the catalog says that"]);
    assert!(b.node.state().join("volumes/vol1/config.toml").exists());
    b.write_durably(&bytes);
    a.detach(&[]).expect_code(0);
    a.node.assert_nothing_left("of the first owner");
    b.assert_holds(&bytes, "with its owner");
    b.detach(&[]).expect_code(0);
}

/// An attach that came to nothing had the volume to itself: what waits in the log is as true as before.
#[test]
fn root_what_a_detach_by_force_left_survives_attaches_that_fail() {
    let raw = Raw::new();
    let bytes = pattern(3, LEN);
    raw.left_behind(&bytes, Victim::Both);
    let forced =
        Answer::of(&mut raw.detach_with("exit 1", &["--force", "--stop-timeout", "2s"])).expect_code(0);
    assert!(forced.stderr.contains("wait in this node's replay log"), "{forced:?}");
    for _ in 0..3 {
        let killed = Answer::of(raw.command(&raw.attach).env("ZEROFSCTL_TEST_KILL", "write-config:after"));
        assert_eq!(killed.signal, Some(9), "{killed:?}");
        Answer::of(&mut raw.command(&["recover"])).expect_code(0);
    }
    // No keeper can start.
    let logs = raw.node.state().join("logs");
    let _ = fs::remove_dir_all(logs.join("vol1"));
    fs::write(logs.join("vol1"), "no folder").expect("a new file");
    let failed = Answer::of(&mut raw.command(&raw.attach));
    assert!(failed.code != Some(0) && !failed.stderr.contains("undoing failed"), "{failed:?}");
    fs::remove_file(logs.join("vol1")).expect("it is ours");
    // What is noted of the log cannot be read.
    let held = raw.node.run_root().join("volumes/vol1/replay-held.json");
    let noted = fs::read(&held).expect("it is noted");
    fs::write(&held, "{").expect("it is ours");
    Answer::of(&mut raw.command(&raw.attach)).expect_error(1, &["replay-held.json"]);
    fs::write(&held, noted).expect("it is ours");
    Answer::of(&mut raw.command(&["recover"])).expect_code(0);
    raw.assert_whole(&bytes, "after attaches that came to nothing");
}

/// A volume is let go only with what it acknowledged, also when an earlier detach has started the next keeper for that.
#[test]
fn root_a_volume_whose_log_is_not_replayed_yet_is_not_released() {
    let raw = Raw::new();
    let bytes = pattern(4, LEN);
    raw.left_behind(&bytes, Victim::Both);
    for turn in 0..2 {
        let mut detach =
            raw.detach_with("exec sleep 1000", &[]).stderr(Stdio::null()).spawn().expect("it starts");
        wait_until("its keeper is started", LONG, || !raw.node.processes().0.is_empty());
        std::thread::sleep(Duration::from_secs(3));
        assert!(detach.try_wait().expect("it is ours").is_none(), "released in turn {turn}");
        detach.kill().and_then(|()| detach.wait()).expect("it is ours");
    }
    assert!(raw.node.kill(Victim::Both));
    raw.detach(&[]).expect_code(0);
    raw.node.assert_nothing_left("with the right program");
    elsewhere(&raw.node).assert_whole(&bytes, "elsewhere");
}

/// A detach by force that was cut short before it let the volume go: nothing else lets it go with its log, and what the error
/// says brings everything back.
#[test]
fn root_a_forced_detach_that_was_cut_short_is_finished_by_force_only() {
    let raw = Raw::new();
    let bytes = pattern(9, LEN);
    raw.left_behind(&bytes, Victim::Both);
    // Before its stop has done anything, it is as good as any other.
    let mut forced = raw.detach_with("exit 1", &["--force", "--stop-timeout", "2s"]);
    let killed = Answer::of(forced.env("ZEROFSCTL_TEST_KILL", "stop:started"));
    assert_eq!(killed.signal, Some(9), "{killed:?}");
    Answer::of(&mut raw.command(&["recover"])).expect_code(0);
    raw.node.assert_nothing_left("brought in");
    raw.left_behind(&bytes, Victim::Both);
    let mut forced = raw.detach_with("exit 1", &["--force", "--stop-timeout", "2s"]);
    let killed = Answer::of(forced.env("ZEROFSCTL_TEST_KILL", "remove-config:after"));
    assert_eq!(killed.signal, Some(9), "{killed:?}");
    for words in [&raw.attach[..], &["recover".to_owned()], &["detach".to_owned(), "vol1".to_owned()]] {
        let answer = Answer::of(&mut raw.command(words)).expect_error(1, &["wait in its replay log"]);
        assert!(answer.stderr.contains("detach vol1 --force"), "{answer:?}");
    }
    raw.detach(&["--force"]).expect_code(0);
    raw.assert_whole(&bytes, "after a detach by force in two goes");
}

/// Whether a log that cannot be read holds anything, nobody knows.
#[test]
fn root_a_volume_whose_log_is_damaged_is_not_released_but_by_force() {
    let raw = Raw::new();
    raw.left_behind(&pattern(8, LEN), Victim::Both);
    let log = raw.node.run_root().join("volumes/vol1/replay.log");
    let file = OpenOptions::new().write(true).open(&log).expect("the log");
    file.write_all_at(&[0xa5; 16 << 10], 0).expect("a write");
    for _ in 0..2 {
        raw.detach(&[]).expect_error(1, &["its replay log cannot be read"]);
        assert!(log.exists());
    }
    raw.detach(&["--force"]).expect_code(0);
    assert!(log.exists(), "for whoever wants to examine it");
    let killed = Answer::of(raw.command(&raw.attach).env("ZEROFSCTL_TEST_KILL", "write-config:after"));
    assert_eq!(killed.signal, Some(9), "{killed:?}");
    Answer::of(&mut raw.command(&["recover"])).expect_code(0);
    let attached = raw.attach();
    assert!(
        attached.stderr.contains("is discarded") || attached.stdout.contains("is discarded"),
        "{attached:?}"
    );
    raw.detach(&[]).expect_code(0);
    raw.node.assert_nothing_left("after a damaged log");
}

/// Force ends all that runs here, also when nothing can be asked or started; once the store is back, what was acknowledged goes in.
#[test]
fn root_force_without_keeper_and_store_ends_zerofs_and_keeps_the_log() {
    for victim in [Victim::Keeper, Victim::Both] {
        let raw = Raw::new();
        let bytes = pattern(5, LEN);
        raw.left_behind(&bytes, victim);
        raw.node.hide_the_store();
        let answer = raw.detach(&["--force", "--stop-timeout", "2s"]);
        assert!(answer.code.is_some_and(|code| code != 0), "{answer:?}");
        assert!(answer.stderr.contains("wait in this node's replay log"), "{answer:?}");
        assert_eq!(raw.node.processes(), (vec![], vec![]), "{victim:?}: {answer:?}");
        raw.node.show_the_store();
        raw.detach(&[]).expect_code(0);
        raw.assert_whole(&bytes, "once the store is back");
    }
}

#[test]
fn root_force_on_a_raw_device_waits_no_longer_than_it_was_told() {
    let raw = Raw::new();
    let bytes = pattern(6, LEN);
    raw.attach();
    let held = write_acknowledged(&raw.device(), AT, &bytes);
    raw.stop_zerofs();
    // Closed by somebody else: the flush on close waits for the server.
    let closing = std::thread::spawn(move || drop(held));
    let begun = Instant::now();
    let answer = raw.detach(&["--force", "--stop-timeout", "2s"]);
    assert!(begun.elapsed() < LONG, "{:?}: {answer:?}", begun.elapsed());
    closing.join().expect("no panic");
    if answer.code != Some(0) {
        // Whoever waits for its close still holds the device.
        answer.expect_code(11);
        raw.detach(&["--force", "--stop-timeout", "2s"]).expect_code(0);
    }
    raw.assert_whole(&bytes, "after a detach by force");
}

/// What somebody mounted on a folder of ours is theirs: it must not go with our dead filesystem.
#[test]
fn root_what_is_mounted_below_a_dead_filesystem_stays() {
    let node = Node::new();
    let target = node.target("m");
    node.ok(&["attach", "vol1", "--target", &target, "--size", "64Mi", "--transport", "fuse"]);
    let (file, bytes) = (Path::new(&target).join("data"), pattern(7, 1 << 20));
    write_durably(&file, &bytes);
    let below = Path::new(&target).join("below");
    fs::create_dir(&below).expect("a new folder");
    nix::mount::mount(Some("below"), &below, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
        .expect("a tmpfs");
    fs::write(below.join("theirs"), "theirs").expect("a new file");
    for words in [&["detach", "vol1"][..], &["detach", "vol1", "--force"]] {
        node.run(words).expect_error(11, &["is mounted below"]);
    }
    assert!(node.kill(Victim::Keeper));
    for words in [&["recover", "vol1"][..], &["detach", "vol1", "--force"]] {
        node.run(words).expect_error(11, &["is mounted below"]);
        assert_eq!(fs::read_to_string(below.join("theirs")).expect("it is still there"), "theirs");
    }
    nix::mount::umount(&below).expect("nobody is in it");
    node.ok(&["recover", "vol1"]);
    node.ok(&["attach", "vol1", "--target", &target]);
    assert_holds(&file, &bytes, "after what was below is gone");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}
