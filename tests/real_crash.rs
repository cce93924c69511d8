//! The crash matrix on the real system: the command is killed with SIGKILL before and after every step of
//! attach, detach and resize, alone and together with ZeroFS, the keeper, or both; then the same command runs
//! again. Each time the end must be the same: attached or detached as asked, everything that was durable is
//! there, and after a detach no process, mount, device or file is left.
//!
//! Which steps there are is asked of the program itself, so a new step is in the matrix by itself. By default
//! every step is killed at every instant, with one of the four sets of victims and one of the follow-ups in
//! turn; `ZEROFSCTL_ROUNDS` of 4 or more goes through all of them.

mod support;

use std::path::Path;

use support::cli::{Answer, Node, Victim, assert_holds, pattern, write_durably};
use support::rounds;

/// Around a step: before anything is recorded, after `started` was, after the change, after `done` was.
const INSTANTS: [&str; 4] = ["before", "started", "applied", "after"];
const VICTIMS: [Victim; 4] = [Victim::Nobody, Victim::Zerofs, Victim::Keeper, Victim::Both];
/// What is typed after the crash.
const FOLLOW_UPS: [FollowUp; 3] = [FollowUp::Again, FollowUp::Recover, FollowUp::Detach];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FollowUp {
    /// The same command.
    Again,
    /// `recover`, and then the same command.
    Recover,
    /// `detach`, and then the same command.
    Detach,
}

/// An operation, and the state that it starts from.
struct Case {
    fs: &'static str,
    size: &'static str,
    /// There was a volume with data before.
    existing: bool,
    /// It is attached when the command comes.
    attached: bool,
    /// The words; `TARGET` stands for the target.
    command: &'static [&'static str],
    /// Whether the volume is attached in the end.
    ends_attached: bool,
    /// The size in the end.
    ends_with: u64,
}

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// One volume, and what it must hold.
struct Scene<'a> {
    case: &'a Case,
    node: Node,
    target: String,
    data: Vec<(String, Vec<u8>)>,
}

impl<'a> Scene<'a> {
    fn set(case: &'a Case, seed: u64) -> Scene<'a> {
        let node = Node::new();
        let target = node.target("m");
        let mut scene = Scene { case, node, target, data: vec![] };
        if case.existing {
            scene.node.ok(&scene.attach());
            scene.write("before", seed);
            if !case.attached {
                scene.node.ok(&["detach", "vol1"]);
            }
        }
        scene
    }

    fn attach(&self) -> Vec<&str> {
        let mut words = vec!["attach", "vol1", "--target", &self.target, "--fs", self.case.fs];
        if !self.case.existing || self.data.is_empty() {
            words.extend(["--size", self.case.size]);
        }
        words
    }

    fn command(&self) -> Vec<&str> {
        match self.case.command {
            ["attach"] => self.attach(),
            words => words.to_vec(),
        }
    }

    fn write(&mut self, name: &str, seed: u64) {
        let bytes = pattern(seed, 3 * MIB as usize + 777);
        write_durably(&Path::new(&self.target).join(name), &bytes);
        self.data.push((name.to_owned(), bytes));
    }

    fn assert_data(&self, when: &str) {
        for (name, bytes) in &self.data {
            assert_holds(&Path::new(&self.target).join(name), bytes, when);
        }
    }

    /// Runs the command once more, as an operator would.
    fn again(&self, words: &[&str], when: &str) -> Answer {
        let answer = self.node.run(words);
        assert_eq!(answer.code, Some(0), "{when}: {answer:#?}");
        answer
    }

    /// Everything is as it must be after the command; then a detach leaves nothing.
    fn check(&mut self, seed: u64, when: &str) {
        if self.case.ends_attached {
            self.node.assert_attached("vol1", &[&self.target.clone()], when);
        } else {
            self.node.assert_nothing_left(when);
            self.again(&self.attach(), when);
        }
        self.assert_data(when);
        let found = self.node.found("vol1");
        assert_eq!(found["fs"], self.case.fs, "{when}: {found:#}");
        assert_eq!(found["size"], self.case.ends_with, "{when}: {found:#}");
        // The filesystem has grown with it: all but its own needs is there.
        let vfs = nix::sys::statvfs::statvfs(self.target.as_str()).expect("statvfs");
        let has = vfs.blocks() * vfs.fragment_size();
        assert!(has > self.case.ends_with * 3 / 4, "{when}: the filesystem has only {has} bytes");
        self.write("after", seed + 1);
        self.assert_data(when);
        self.again(&["detach", "vol1"], when);
        self.node.assert_nothing_left(when);
        // What was written in the end is in the store, too.
        self.again(&self.attach(), when);
        self.assert_data(when);
        self.again(&["detach", "vol1"], when);
        self.node.assert_nothing_left(when);
    }
}

/// The steps of the command, and whether each has something to do: a step that finds everything so already
/// has no instants but the last.
fn steps(case: &Case) -> Vec<(String, bool)> {
    let mut scene = Scene::set(case, 1);
    let mut words = scene.command();
    words.push("--dry-run");
    let planned: Vec<String> = names(&scene.node.json(&words)["steps"]);
    let run = scene.node.json(&scene.command());
    let taken = run["steps"].as_array().expect("steps");
    assert_eq!(planned, names(&run["steps"]), "the dry run names the steps that are then taken");
    let steps =
        planned.into_iter().zip(taken).map(|(name, step)| (name, step["outcome"] == "done")).collect();
    scene.check(1, "without a kill");
    steps
}

fn names(steps: &serde_json::Value) -> Vec<String> {
    let steps = steps.as_array().expect("steps");
    steps.iter().map(|s| s["step"].as_str().expect("a name").to_owned()).collect()
}

/// The whole matrix of a case, or the one round in `every` of it.
fn matrix(case: &Case, every: usize) {
    let all = rounds(1) >= 4;
    let steps = steps(case);
    let mut round = 0usize;
    let mut killed = 0usize;
    for (name, does) in &steps {
        for instant in INSTANTS {
            if !does && instant != "after" {
                continue;
            }
            // By default the victims and the follow-ups go round, each at its own pace.
            for variant in 0..if all { VICTIMS.len() * FOLLOW_UPS.len() } else { 1 } {
                round += 1;
                if !all && round % every != 0 {
                    continue;
                }
                let turn = if all { variant } else { round / every };
                let victim = VICTIMS[turn % VICTIMS.len()];
                let follow_up = FOLLOW_UPS[turn / if all { VICTIMS.len() } else { 1 } % FOLLOW_UPS.len()];
                one(case, name, instant, victim, follow_up, round as u64);
                killed += 1;
            }
        }
    }
    println!("{}: {} steps, {killed} kills", case.command.join(" "), steps.len());
}

fn one(case: &Case, step: &str, instant: &str, victim: Victim, follow_up: FollowUp, seed: u64) {
    let when = format!("{} {}: {step}:{instant}, {victim:?}, {follow_up:?}", case.fs, case.command.join(" "));
    let mut scene = Scene::set(case, seed);
    let point = format!("{step}:{instant}");
    assert!(scene.node.killed_at(&point, &scene.command()), "{when}: it was not killed");
    scene.node.kill(victim);
    match follow_up {
        FollowUp::Again => {}
        FollowUp::Recover => {
            // Killed so early that nothing is on this node, or so late that nothing is left.
            let answer = scene.node.run(&["recover", "vol1"]);
            assert!(matches!(answer.code, Some(0 | 10)), "{when}: {answer:#?}");
        }
        FollowUp::Detach => {
            let answer = scene.node.run(&["detach", "vol1"]);
            assert!(matches!(answer.code, Some(0 | 10)), "{when}: {answer:#?}");
            scene.node.assert_nothing_left(&when);
        }
    }
    scene.again(&scene.command(), &when);
    // A resize after the volume was taken down grows it detached.
    if case.ends_attached && case.command[0] == "resize" {
        scene.again(&scene.attach(), &when);
    }
    scene.check(seed, &when);
}

const ATTACH_FRESH: Case = Case {
    fs: "ext4",
    size: "256Mi",
    existing: false,
    attached: false,
    command: &["attach"],
    ends_attached: true,
    ends_with: 256 * MIB,
};

const ATTACH_EXISTING: Case = Case { existing: true, ..ATTACH_FRESH };
const DETACH: Case =
    Case { attached: true, command: &["detach", "vol1"], ends_attached: false, ..ATTACH_EXISTING };
const RESIZE_DETACHED: Case =
    Case { command: &["resize", "vol1", "1Gi"], ends_attached: false, ends_with: GIB, ..ATTACH_EXISTING };
const RESIZE_XFS: Case = Case {
    fs: "xfs",
    size: "512Mi",
    existing: true,
    attached: true,
    command: &["resize", "vol1", "1Gi"],
    ends_attached: true,
    ends_with: GIB,
};

#[test]
fn root_attach_of_a_new_volume_killed_at_every_step() {
    matrix(&ATTACH_FRESH, 1);
}

#[test]
fn root_attach_of_an_old_volume_killed_at_every_step() {
    matrix(&ATTACH_EXISTING, 1);
}

#[test]
fn root_detach_killed_at_every_step() {
    matrix(&DETACH, 1);
}

#[test]
fn root_resize_of_a_detached_volume_killed_at_every_step() {
    matrix(&RESIZE_DETACHED, 1);
}

#[test]
fn root_online_resize_killed_at_every_step() {
    matrix(&RESIZE_XFS, 1);
}

/// The other filesystems: a few rounds by default, every step in the long run.
#[test]
fn root_xfs_and_btrfs_killed_at_some_steps() {
    let cases = [
        Case { fs: "xfs", size: "512Mi", ends_with: 512 * MIB, ..ATTACH_FRESH },
        Case { fs: "btrfs", ..ATTACH_FRESH },
        Case { fs: "btrfs", ..ATTACH_EXISTING },
        Case { fs: "btrfs", ..DETACH },
        Case { fs: "btrfs", ..RESIZE_DETACHED },
        Case { fs: "btrfs", size: "512Mi", ..RESIZE_XFS },
        Case { fs: "xfs", size: "512Mi", ..RESIZE_DETACHED },
    ];
    for case in &cases {
        matrix(case, 16);
    }
}
