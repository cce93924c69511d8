//! The crash matrix on the real system, for whatever transport: the command is killed with SIGKILL before and after every
//! step of an operation, alone and together with ZeroFS, the keeper, or both; then the same command runs again. Each time
//! the end must be the same: attached or detached as asked, everything that was durable is there, and after a detach no
//! process, mount, device or file is left.
//!
//! Which steps there are is asked of the program itself, so a new step is in the matrix by itself. By default some
//! instants are killed, with one of the four sets of victims and one of the follow-ups in turn. The long run goes through
//! all: the whole product, or every step and instant once.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use zerofsctl::host::nbd::sysfs;

use super::cli::{Answer, Node, Victim, assert_holds, pattern, write_durably};
use super::vm::Baseline;
use super::{is_long, side_by_side};

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

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `attach`
    Attach,
    /// `detach`
    Detach,
    /// `resize`
    Resize,
    /// `fsck`
    Fsck,
}

/// An operation, and the state that it starts from.
pub struct Case {
    /// Which.
    pub operation: Operation,
    /// `fuse` or `nbd`.
    pub transport: &'static str,
    /// ext4, xfs or btrfs.
    pub fs: &'static str,
    /// Of the volume, in bytes.
    pub size: u64,
    /// There is a volume with data; otherwise a new one each time.
    pub existing: bool,
    /// It is attached when the command comes.
    pub attached: bool,
    /// How much a resize adds, in bytes.
    pub grows: u64,
}

impl Case {
    fn ends_attached(&self) -> bool {
        match self.operation {
            Operation::Attach => true,
            Operation::Detach | Operation::Fsck => false,
            Operation::Resize => self.attached,
        }
    }

    fn name(&self) -> String {
        let old = if self.existing { "old" } else { "new" };
        let attached = if self.attached { "attached" } else { "detached" };
        format!("{:?} of {old} {attached} {} on {}", self.operation, self.fs, self.transport)
    }
}

/// In bytes.
pub const MIB: u64 = 1 << 20;

/// A node with one volume after the other, and what the present one must hold.
struct Scene<'a> {
    case: &'a Case,
    node: Node,
    /// What the names of its volumes begin with: the kernel's devices know no nodes, so no other scene has it.
    prefix: String,
    target: String,
    volume: String,
    size: u64,
    files: u64,
    data: Vec<(String, Vec<u8>)>,
}

impl<'a> Scene<'a> {
    fn new(case: &'a Case) -> Scene<'a> {
        let node = Node::new();
        let target = node.target("m");
        static SCENES: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("m{}-{}-", std::process::id(), SCENES.fetch_add(1, Ordering::Relaxed));
        let volume = format!("{prefix}0");
        Scene { case, node, prefix, target, volume, size: case.size, files: 0, data: vec![] }
    }

    /// Makes what the command starts from: a new volume, or the one of the round before.
    fn set(&mut self) {
        self.files += 1;
        if !self.case.existing {
            self.volume = format!("{}{}", self.prefix, self.files);
            self.data.clear();
            return;
        }
        if self.data.is_empty() || self.case.attached {
            self.node.ok(&self.attach());
        }
        if self.data.is_empty() {
            self.write("first");
            if !self.case.attached {
                self.node.ok(&["detach", &self.volume]);
            }
        } else if self.case.attached {
            self.write("before");
        }
    }

    fn attach(&self) -> Vec<String> {
        let Case { fs, transport, .. } = self.case;
        let mut words =
            vec!["attach", &self.volume, "--target", &self.target, "--fs", fs, "--transport", transport];
        let size = self.size.to_string();
        if self.data.is_empty() {
            words.extend(["--size", &size]);
        }
        words.into_iter().map(str::to_owned).collect()
    }

    fn command(&self) -> Vec<String> {
        match self.case.operation {
            Operation::Attach => self.attach(),
            Operation::Detach => vec!["detach".into(), self.volume.clone()],
            Operation::Fsck => vec!["fsck".into(), self.volume.clone()],
            Operation::Resize => {
                vec!["resize".into(), self.volume.clone(), (self.size + self.case.grows).to_string()]
            }
        }
    }

    /// A file of which the command must not lose a byte. The same names come again, so that the room is enough.
    fn write(&mut self, name: &str) {
        let bytes = pattern(self.files, 3 * MIB as usize + 777);
        write_durably(&Path::new(&self.target).join(name), &bytes);
        self.data.retain(|(n, _)| n != name);
        self.data.push((name.to_owned(), bytes));
    }

    fn assert_data(&self, when: &str) {
        for (name, bytes) in &self.data {
            assert_holds(&Path::new(&self.target).join(name), bytes, when);
        }
    }

    fn must(&self, words: &[impl AsRef<str>], when: &str) -> Answer {
        let answer = self.node.run(words);
        assert_eq!(answer.code, Some(0), "{when}: {answer:#?}");
        answer
    }

    /// Everything is as it must be after the command; then a detach leaves nothing.
    fn check(&mut self, when: &str) {
        if self.case.operation == Operation::Resize {
            self.size += self.case.grows;
        }
        if self.case.ends_attached() {
            self.node.assert_attached(&self.volume, &[&self.target], when);
        } else {
            self.assert_nothing_left(when);
            self.must(&self.attach(), when);
        }
        self.assert_data(when);
        let found = self.node.found(&self.volume);
        assert_eq!(found["transport"], self.case.transport, "{when}: {found:#}");
        assert_eq!(found["fs"], self.case.fs, "{when}: {found:#}");
        assert_eq!(found["size"], self.size, "{when}: {found:#}");
        // The filesystem has grown with the device: all is there but what it needs for itself.
        let vfs = nix::sys::statvfs::statvfs(self.target.as_str()).expect("statvfs");
        let has = vfs.blocks() * vfs.fragment_size();
        assert!(has > self.size * 3 / 4, "{when}: the filesystem has only {has} of {} bytes", self.size);
        self.write("after");
        self.must(&["detach", &self.volume], when);
        self.assert_nothing_left(when);
    }

    fn assert_nothing_left(&self, when: &str) {
        self.node.assert_nothing_left(when);
        let ours = format!("zerofs:{}", self.prefix);
        let left: Vec<_> = sysfs::all()
            .expect("sysfs can be read")
            .into_iter()
            .filter(|d| d.connected && d.backend.as_ref().is_some_and(|b| b.starts_with(&ours)))
            .collect();
        assert!(left.is_empty(), "{when}: NBD devices are left: {left:#?}");
    }
}

/// The steps of the command, and whether each has something to do: a step that finds everything so already
/// has no instants but the last.
fn steps(scene: &mut Scene<'_>) -> Vec<(String, bool)> {
    scene.set();
    let words = scene.command();
    let mut dry = words.clone();
    dry.push("--dry-run".into());
    let planned: Vec<String> = names(&scene.node.json(&dry)["steps"]);
    let run = scene.node.json(&words);
    let taken = run["steps"].as_array().expect("steps");
    assert_eq!(planned, names(&run["steps"]), "the dry run names the steps that are then taken");
    scene.check("without a kill");
    planned.into_iter().zip(taken).map(|(name, step)| (name, step["outcome"] == "done")).collect()
}

fn names(steps: &serde_json::Value) -> Vec<String> {
    let steps = steps.as_array().expect("steps");
    steps.iter().map(|s| s["step"].as_str().expect("a name").to_owned()).collect()
}

/// How much of a case's matrix is gone through.
pub struct Extent {
    /// By default only one round in so many; in the long run all of them.
    pub every: usize,
    /// Whether the long run takes each step and instant with every victim and follow-up.
    pub product: bool,
}

/// The matrix of a case. Its rounds depend on nothing but the state that each makes for itself, so in the long run
/// several nodes share them.
pub fn matrix(case: &Case, extent: &Extent) {
    let began = Instant::now();
    let devices = Baseline::take();
    let steps = steps(&mut Scene::new(case));
    let instants: Vec<_> = steps
        .iter()
        .flat_map(|(name, does)| INSTANTS.map(|instant| (name, *does, instant)))
        .filter(|(_, does, instant)| *does || *instant == "after")
        .collect();
    // One at least.
    let every = if is_long() { 1 } else { extent.every.min(instants.len()) };
    let points: Vec<_> = instants.into_iter().enumerate().filter(|(n, _)| (n + 1) % every == 0).collect();
    let variants = if is_long() && extent.product { VICTIMS.len() * FOLLOW_UPS.len() } else { 1 };
    let rounds: Vec<_> =
        points.iter().enumerate().flat_map(|(n, point)| (0..variants).map(move |v| (n, point, v))).collect();
    assert!(!rounds.is_empty(), "{}: no instant of {} steps was chosen", case.name(), steps.len());
    println!("{}: {} steps, {} kills to come", case.name(), steps.len(), rounds.len());
    let (wanted, met) = (AtomicU32::new(0), AtomicU32::new(0));
    side_by_side(
        &rounds,
        || Scene::new(case),
        |scene, _, (n, (_, (name, _, instant)), variant)| {
            // Alone, victims and follow-ups go round: 4 and 3 have no common divisor. A step has four instants, too, so
            // that each of these gets another victim with each step.
            let turn = if variants > 1 { *variant } else { n + n / INSTANTS.len() };
            let (victim, follow_up) = (VICTIMS[turn % VICTIMS.len()], FOLLOW_UPS[turn % FOLLOW_UPS.len()]);
            if victim != Victim::Nobody {
                wanted.fetch_add(1, Ordering::Relaxed);
            }
            met.fetch_add(u32::from(one(scene, name, instant, victim, follow_up)), Ordering::Relaxed);
        },
    );
    // At the first instants of an attach and the last of a detach there is nobody.
    let (wanted, met) = (wanted.into_inner(), met.into_inner());
    assert!(wanted < 6 || met > 0, "{}: {wanted} victims, and none of them was there", case.name());
    devices.assert_back();
    println!("{}: {} kills, {:.0?}", case.name(), rounds.len(), began.elapsed());
}

/// Whether the victim was there.
fn one(scene: &mut Scene<'_>, step: &str, instant: &str, victim: Victim, follow_up: FollowUp) -> bool {
    let case = scene.case;
    let when = format!("{}: {step}:{instant}, {victim:?}, {follow_up:?}", case.name());
    scene.set();
    let command = scene.command();
    assert!(scene.node.killed_at(&format!("{step}:{instant}"), &command), "{when}: it was not killed");
    let met = scene.node.kill(victim);
    match follow_up {
        FollowUp::Again => {}
        FollowUp::Recover => {
            settle(scene, "recover", &when);
        }
        FollowUp::Detach => {
            settle(scene, "detach", &when);
            scene.assert_nothing_left(&when);
        }
    }
    scene.must(&command, &when);
    if case.operation == Operation::Resize && case.attached && follow_up == FollowUp::Detach {
        // It was grown detached.
        scene.must(&scene.attach(), &when);
    }
    scene.check(&when);
    met
}

/// The command was killed so early that nothing is on this node, or so late that nothing is left: then there is
/// nothing to settle.
fn settle(scene: &Scene<'_>, verb: &str, when: &str) {
    let answer = scene.node.run(&[verb, &scene.volume]);
    let nothing =
        answer.stderr.contains("is on this node") || answer.stderr.contains("is attached on this node");
    assert!(answer.code == Some(0) || answer.code == Some(10) && nothing, "{when}: {answer:#?}");
}
