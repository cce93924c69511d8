//! The journal: one append-only file per volume in which every run writes what it is about to do and what
//! it did, before and after it does it. It outlives the process, and so lets the next one settle a run
//! that was killed at any instant.
//!
//! A line is a CRC-32C in hex, a space, and one JSON object; each is synced before the step goes on. A torn
//! last line is what a kill leaves: it is dropped. A damaged line before the last is doubt: an error.
//! The format is versioned in each run's first line; fixtures of every version are kept and parse forever.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Kind, Result};
use crate::file_lock::{self, Taken};
use crate::plan::{Operation, Plan, Task};
use crate::step::Step;
use crate::step::{Direction, Facts};
use crate::values::{TargetPath, VolumeId};

mod compact;

/// Where a shortened journal is written, beside the journal itself.
const SHORTENED: &str = "journal.new";

/// The version that we write.
pub const VERSION: u32 = 1;

/// Held by the watcher of a run folder ([`crate::watch`]).
pub(crate) const WATCH_LOCK: &str = "watch.lock";

/// For how long a command waits for a volume on which the watcher is at work.
const WATCHER_PATIENCE: Duration = Duration::from_secs(30);

/// How a task went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was so before.
    Already,
    /// We made it so.
    Done,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// Every task is settled.
    Done,
    /// It failed before it had changed anything, or everything that it had done was undone.
    Unwound,
    /// A later operation made it pointless.
    Abandoned,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rec", rename_all = "kebab-case")]
enum Record {
    Begin { v: u32, at: jiff::Timestamp, plan: Plan, facts: Facts },
    Started { task: usize, facts: Facts },
    Settled { task: usize, outcome: Outcome, facts: Facts },
    Failed { task: usize, error: String },
    Unwinding,
    Undone { task: usize, facts: Facts },
    End { at: jiff::Timestamp, how: End },
}

/// What is known of one task of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// Not begun.
    Pending,
    /// Begun; whether it had its effect is not known.
    Started,
    /// Settled.
    Settled(Outcome),
    /// Undone again.
    Undone,
}

/// One run, folded from its lines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// When it began.
    pub at: jiff::Timestamp,
    /// What it is about.
    pub plan: Plan,
    /// One per task of the plan.
    pub states: Vec<TaskState>,
    /// What is known by now.
    pub facts: Facts,
    /// It failed and takes itself back.
    pub unwinding: bool,
    /// The last error that was recorded.
    pub error: Option<String>,
    /// None while it is open: it runs, or it was killed.
    pub end: Option<End>,
}

impl Run {
    /// Whether anything was begun that is not undone.
    pub fn changed_something(&self) -> bool {
        self.states.iter().any(|s| matches!(s, TaskState::Started | TaskState::Settled(Outcome::Done)))
    }
}

/// A volume's lock and journal, held for the time of an operation.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    lock: Lock,
    runs: Vec<Run>,
    /// Set while work is taken back.
    taking_back: bool,
    /// The file lacks what only the memory has.
    incomplete: bool,
}

impl Journal {
    /// Locks the volume and reads its journal.
    ///
    /// # Errors
    /// [`Kind::Busy`] while another operation holds the volume; [`Kind::Refused`] for a damaged journal.
    pub fn open(run_dir: &Path, volume: &VolumeId) -> Result<Journal> {
        let lock = Lock::acquire(run_dir, volume)?;
        let folder = volume_folder(run_dir, volume);
        private_folder(&folder)?;
        let path = folder.join("journal");
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .doing("open the journal", &path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).doing("read the journal", &path)?;
        let (runs, valid) = fold(&bytes).map_err(|e| e.on(volume))?;
        if valid < bytes.len() {
            tracing::warn!(volume = %volume, "dropping a torn last line of the journal");
            file.set_len(valid as u64).doing("truncate the journal", &path)?;
            file.seek(std::io::SeekFrom::End(0)).doing("seek in the journal", &path)?;
        }
        Ok(Journal { file, path, lock, runs, taking_back: false, incomplete: false })
    }

    /// Reads a journal without a lock, for those who only look; none when there is no journal.
    pub fn peek(run_dir: &Path, volume: &VolumeId) -> Result<Option<Vec<Run>>> {
        let path = volume_folder(run_dir, volume).join("journal");
        match std::fs::read(&path) {
            Ok(bytes) => fold(&bytes).map(|(runs, _)| Some(runs)).map_err(|e| e.on(volume)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).doing("read the journal", &path),
        }
    }

    /// Every run, oldest first.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The run that is open, if any.
    pub fn open_run(&self) -> Option<&Run> {
        self.runs.last().filter(|r| r.end.is_none())
    }

    /// What the runs together left.
    pub fn standing(&self) -> Standing {
        Standing::of(&self.runs)
    }

    /// Begins a run.
    pub(crate) fn begin(&mut self, plan: Plan, facts: Facts) -> Result<()> {
        debug_assert!(self.open_run().is_none(), "settle the open run first");
        if let Err(e) = self.shorten() {
            tracing::warn!("the journal stays long: {e}");
        }
        self.taking_back =
            matches!(plan.operation, Operation::Detach | Operation::Clear | Operation::Unpublish);
        self.append(Record::Begin { v: VERSION, at: jiff::Timestamp::now(), plan, facts })
    }

    /// The facts go along: what a probe learnt, an undo after a kill must know.
    pub(crate) fn started(&mut self, task: usize, facts: &Facts) -> Result<()> {
        self.append(Record::Started { task, facts: facts.clone() })
    }

    pub(crate) fn settled(&mut self, task: usize, outcome: Outcome, facts: &Facts) -> Result<()> {
        self.append(Record::Settled { task, outcome, facts: facts.clone() })
    }

    pub(crate) fn failed(&mut self, task: usize, error: &Error) -> Result<()> {
        self.append(Record::Failed { task, error: error.message().to_owned() })
    }

    pub(crate) fn unwinding(&mut self) -> Result<()> {
        self.append(Record::Unwinding)
    }

    pub(crate) fn undone(&mut self, task: usize, facts: &Facts) -> Result<()> {
        self.append(Record::Undone { task, facts: facts.clone() })
    }

    pub(crate) fn end(&mut self, how: End) -> Result<()> {
        self.append(Record::End { at: jiff::Timestamp::now(), how })
    }

    fn append(&mut self, record: Record) -> Result<()> {
        let json = serde_json::to_string(&record)
            .map_err(|e| Error::failed(format!("cannot encode a journal record: {e}")))?;
        let line = format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
        // First in memory, which refuses illegal moves: those must never reach the file.
        let mut runs = self.runs.clone();
        apply(&mut runs, record)?;
        if self.incomplete {
            // The file lacks a line, so no later one may follow it. What it has is enough to take all down again.
            if !self.taking_back {
                return Err(Error::environment("the journal could not be written").hint(format!(
                    "free some room: df -h {}; then run: zerofsctl recover",
                    self.path.display()
                )));
            }
            self.runs = runs;
            return Ok(());
        }
        let length = self.file.metadata().doing("stat the journal", &self.path)?.len();
        let written = self
            .file
            .write_all(line.as_bytes())
            .doing("write the journal", &self.path)
            .and_then(|()| self.file.sync_data().doing("sync the journal", &self.path));
        if let Err(e) = written {
            // On a full disk half a line may have got there: a next one after it would look like damage.
            self.file.set_len(length).doing("truncate the journal", &self.path)?;
            if !self.taking_back {
                return Err(e);
            }
            tracing::warn!("{e}; going on without it");
            self.incomplete = true;
        }
        self.runs = runs;
        Ok(())
    }

    /// From now on, and until the next run begins, a journal that cannot be written stops nothing: what is there is
    /// taken down, which must not fail for want of room. Each step looks before it acts, so a kill in between does
    /// no harm either.
    pub(crate) fn take_back(&mut self) {
        self.taking_back = true;
    }

    /// Removes the journal, the run folder and the lock file, once nothing is left of the volume on this
    /// node; otherwise keeps them.
    pub fn close(self) -> Result<()> {
        if self.open_run().is_some() || self.standing().claimed {
            return Ok(());
        }
        // One that a killed process had not yet put in its place.
        let _ = std::fs::remove_file(self.path.with_file_name(SHORTENED));
        std::fs::remove_file(&self.path).doing("remove the journal", &self.path)?;
        if let Some(folder) = self.path.parent() {
            match std::fs::remove_dir(folder) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    // Not ours to delete, but somebody should know.
                    tracing::warn!(folder = %folder.display(), "something is left in the run folder: {e}");
                }
                _ => {}
            }
        }
        self.lock.remove()
    }
}

/// What a volume's runs together left on this node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Standing {
    /// Whether we hold, or may hold, the claim.
    pub claimed: bool,
    /// The step that connected the device, if it stands.
    pub connect: Option<crate::step::Connect>,
    /// The step that started the keeper.
    pub start: Option<crate::step::Start>,
    /// The claim.
    pub claim: Option<crate::step::Claim>,
    /// `Mount`, `Link` and `Bind` steps that stand, oldest first.
    pub places: Vec<Step>,
    /// What was taken down only to be brought back, and is not back yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub awaited: Option<Awaited>,
    /// The newest facts.
    pub facts: Facts,
}

/// How a volume was attached whose device was taken down because it gave errors ([`Operation::Clear`]): until all of it is
/// back, or somebody takes it away, whoever settles the volume brings it back.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Awaited {
    /// The step that connected the device.
    pub connect: crate::step::Connect,
    /// The step that started the keeper.
    pub start: Option<crate::step::Start>,
    /// `Mount`, `Link` and `Bind` steps that do not stand, oldest first.
    pub places: Vec<Step>,
}

impl Standing {
    /// Folds the runs.
    pub fn of(runs: &[Run]) -> Standing {
        let mut standing = Standing {
            claimed: false,
            connect: None,
            start: None,
            claim: None,
            places: Vec::new(),
            awaited: None,
            facts: Facts::default(),
        };
        for run in runs {
            if run.plan.operation == Operation::Clear {
                standing.await_all(run);
            }
            for (task, state) in run.plan.tasks.iter().zip(&run.states) {
                standing.take(task, *state);
            }
            if run.plan.operation != Operation::Clear {
                standing.await_no_more(run);
            }
            // A run that took itself back leaves what was known before it, but for the folders that it removed.
            if run.end == Some(End::Unwound) {
                standing.facts.made_targets.clone_from(&run.facts.made_targets);
            } else {
                standing.facts = run.facts.clone();
            }
        }
        // What stands is not awaited, whatever is on record.
        let Standing { awaited, places, connect, .. } = &mut standing;
        if let Some(it) = awaited {
            it.places.retain(|p| !places.iter().any(|q| place(p) == place(q)));
        }
        if awaited.as_ref().is_some_and(|a| a.places.is_empty() && connect.is_some()) {
            *awaited = None;
        }
        standing
    }

    /// Everywhere that the volume is, or shall be again, oldest first.
    pub fn all_places(&self) -> impl DoubleEndedIterator<Item = &Step> {
        self.places.iter().chain(self.awaited.iter().flat_map(|a| &a.places))
    }

    /// The links and files that are the device itself, as a raw attach makes them.
    pub fn raw_places(&self) -> impl Iterator<Item = &TargetPath> {
        self.places.iter().filter_map(|place| match place {
            Step::Link(link) => Some(&link.target),
            Step::Bind(bind) if bind.source.is_none() => Some(&bind.target),
            _ => None,
        })
    }

    /// A run takes down what shall come back.
    fn await_all(&mut self, run: &Run) {
        let steps = || run.plan.tasks.iter().filter(|t| t.direction == Direction::Undo).map(|t| &t.step);
        let connect = steps().find_map(|s| match s {
            Step::Connect(connect) => Some(connect.clone()),
            _ => None,
        });
        let before = self.awaited.take();
        let Some(connect) = connect.or_else(|| before.as_ref().map(|b| b.connect.clone())) else { return };
        // The plan has the newest first.
        let mut places: Vec<Step> = steps().filter(|s| place(s).is_some()).cloned().collect();
        places.reverse();
        let start = self.start.clone().or_else(|| before.as_ref().and_then(|b| b.start.clone()));
        for step in before.into_iter().flat_map(|b| b.places) {
            if !places.iter().any(|p| place(p) == place(&step)) {
                places.push(step);
            }
        }
        self.awaited = Some(Awaited { connect, start, places });
    }

    /// What a run brought back for good, or took away because somebody asked for it, is no longer awaited.
    fn await_no_more(&mut self, run: &Run) {
        let Some(awaited) = &mut self.awaited else { return };
        for (task, state) in run.plan.tasks.iter().zip(&run.states) {
            if !matches!(state, TaskState::Settled(_)) {
                continue;
            }
            if place(&task.step).is_some() {
                awaited.places.retain(|p| place(p) != place(&task.step));
            }
            if task.direction == Direction::Undo && matches!(task.step, Step::Claim(_) | Step::Connect(_)) {
                self.awaited = None;
                return;
            }
        }
        if awaited.places.is_empty() && self.connect.is_some() {
            self.awaited = None;
        }
    }

    fn take(&mut self, task: &Task, state: TaskState) {
        // In doubt (started, not settled) a thing stands: then it is looked at, and taken down if it is there.
        let stands = match (task.direction, state) {
            (_, TaskState::Pending) => return,
            (Direction::Apply, TaskState::Undone) => false,
            (Direction::Apply, _) => true,
            (Direction::Undo, TaskState::Settled(_)) => false,
            (Direction::Undo, _) => return,
        };
        match &task.step {
            Step::Claim(step) => {
                self.claimed = stands;
                self.claim = stands.then(|| step.clone());
            }
            Step::Start(step) => self.start = stands.then(|| step.clone()),
            Step::Connect(step) => self.connect = stands.then(|| step.clone()),
            step @ (Step::Mount(_) | Step::Link(_) | Step::Bind(_)) => {
                // What is taken again keeps its turn: a bind must come after the mount that it shows.
                match (self.places.iter().position(|p| place(p) == place(step)), stands) {
                    (Some(at), true) => self.places[at] = step.clone(),
                    (Some(at), false) => drop(self.places.remove(at)),
                    (None, true) => self.places.push(step.clone()),
                    (None, false) => {}
                }
            }
            _ => {}
        }
    }
}

/// Where a `Mount`, `Link` or `Bind` puts the volume.
pub fn place(step: &Step) -> Option<&crate::values::TargetPath> {
    match step {
        Step::Mount(m) => Some(&m.target),
        Step::Link(l) => Some(&l.target),
        Step::Bind(b) => Some(&b.target),
        _ => None,
    }
}

/// The folder of a volume below the run root.
pub fn volume_folder(run_dir: &Path, volume: &VolumeId) -> PathBuf {
    run_dir.join("volumes").join(volume.as_str())
}

/// The process that holds a volume's lock right now, unless it was killed. Only a look: taking the lock, even for an
/// instant, could fail the command that wants it.
pub fn holder(run_dir: &Path, volume: &VolumeId) -> Option<i32> {
    file_lock::holder(&lock_path(run_dir, volume))
}

fn lock_path(run_dir: &Path, volume: &VolumeId) -> PathBuf {
    run_dir.join("locks").join(format!("{volume}.lock"))
}

/// Makes a folder that only its owner may enter, parents included.
pub(crate) fn private_folder(path: &Path) -> Result<()> {
    let made =
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).doing("make the folder", path);
    made.map_err(|e| e.hint("choose writable folders with --state-dir and --run-dir"))
}

/// The volumes that have a folder below the run root.
pub fn volumes(run_dir: &Path) -> Result<Vec<VolumeId>> {
    let folder = run_dir.join("volumes");
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).doing("read the folder", &folder),
    };
    let mut volumes = Vec::new();
    for entry in entries {
        let name = entry.doing("read the folder", &folder)?.file_name();
        if let Some(volume) = name.to_str().and_then(|n| n.parse().ok()) {
            volumes.push(volume);
        }
    }
    volumes.sort();
    Ok(volumes)
}

/// Parses and folds a journal; the number of valid bytes tells whether the last line is torn.
fn fold(bytes: &[u8]) -> Result<(Vec<Run>, usize)> {
    let damaged = |why: &str| {
        Error::refused(format!("its journal is damaged: {why}"))
            .hint("nothing was touched; look at what is attached (findmnt, losetup -l), take it down by hand, then move the journal away")
    };
    let mut runs = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let Some(length) = bytes[at..].iter().position(|b| *b == b'\n') else { break };
        let line = &bytes[at..at + length];
        let next = at + length + 1;
        let record = std::str::from_utf8(line)
            .ok()
            .and_then(|l| l.split_once(' '))
            .filter(|(crc, json)| u32::from_str_radix(crc, 16).ok() == Some(crc32c::crc32c(json.as_bytes())));
        let Some((_, json)) = record else {
            if next >= bytes.len() {
                break;
            }
            return Err(damaged("a line before the last fails its checksum"));
        };
        // The checksum holds, so what does not parse was written by another version, not torn.
        let record: Record = serde_json::from_str(json).map_err(|_| {
            Error::refused("its journal was written by another version of zerofsctl")
                .hint("settle it with that version: zerofsctl recover")
        })?;
        apply(&mut runs, record).map_err(|e| damaged(e.message()))?;
        at = next;
    }
    Ok((runs, at))
}

/// The legal moves.
fn apply(runs: &mut Vec<Run>, record: Record) -> Result<()> {
    let illegal = |what: &str| Error::failed(format!("{what} is not a legal move"));
    if let Record::Begin { v, at, plan, facts } = record {
        if runs.last().is_some_and(|r: &Run| r.end.is_none()) {
            return Err(illegal("a run that begins while another is open"));
        }
        if v > VERSION {
            return Err(Error::refused(format!("its journal has format {v}, we know up to {VERSION}")));
        }
        let states = vec![TaskState::Pending; plan.tasks.len()];
        runs.push(Run { at, plan, states, facts, unwinding: false, error: None, end: None });
        return Ok(());
    }
    let run = runs.last_mut().filter(|r| r.end.is_none()).ok_or_else(|| illegal("a record outside a run"))?;
    let state = |run: &Run, task: usize| {
        run.states.get(task).copied().ok_or_else(|| illegal("a task that the plan lacks"))
    };
    match record {
        Record::Begin { .. } => {}
        Record::Started { task, facts } => {
            // Also a settled one: a run that is resumed probes afresh, and the world may have changed since.
            if state(run, task)? == TaskState::Undone || run.unwinding {
                return Err(illegal("starting an undone task"));
            }
            run.states[task] = TaskState::Started;
            run.facts = facts;
        }
        Record::Settled { task, outcome, facts } => {
            let was = state(run, task)?;
            // What a killed run had begun or done stays ours, also when the probe now says "already".
            run.states[task] = match was {
                TaskState::Started | TaskState::Settled(Outcome::Done) => TaskState::Settled(Outcome::Done),
                _ => TaskState::Settled(outcome),
            };
            run.facts = facts;
        }
        Record::Failed { task, error } => {
            state(run, task)?;
            run.error = Some(error);
        }
        Record::Unwinding => run.unwinding = true,
        Record::Undone { task, facts } => {
            if !run.unwinding || state(run, task)? == TaskState::Pending {
                return Err(illegal("undoing what was not done"));
            }
            run.states[task] = TaskState::Undone;
            run.facts = facts;
        }
        Record::End { how, .. } => run.end = Some(how),
    }
    Ok(())
}

/// What the open run needs before `wanted` may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// Nothing is open.
    Nothing,
    /// Go on with it: the same plan is wanted again.
    Resume,
    /// Finish it.
    Finish,
    /// Take it back.
    Unwind,
    /// Close it: what it did may stay, and what is wanted does not need the rest.
    Abandon,
}

/// Decides what happens to an open run; `wanted` is none for `recover`.
pub fn settlement(open: Option<&Run>, wanted: Option<&Plan>) -> Settlement {
    let Some(run) = open else { return Settlement::Nothing };
    if run.unwinding {
        return Settlement::Unwind;
    }
    if wanted == Some(&run.plan) {
        return Settlement::Resume;
    }
    match (run.plan.operation, wanted.map(|p| p.operation)) {
        // Grown as far as it got is safe, and the next resize grows the rest.
        (Operation::Resize, Some(_)) => Settlement::Abandon,
        (operation, _) if operation.settles_forward() => Settlement::Finish,
        _ => Settlement::Unwind,
    }
}

/// A volume's lock without its journal: for those who only have to keep every operation away for a while.
#[derive(Debug)]
pub struct Held {
    lock: Lock,
    folder: PathBuf,
}

impl Held {
    /// Takes the lock; [`Kind::Busy`] while an operation holds the volume.
    pub fn take(run_dir: &Path, volume: &VolumeId) -> Result<Held> {
        Ok(Held { lock: Lock::acquire(run_dir, volume)?, folder: volume_folder(run_dir, volume) })
    }

    /// Lets go of it, and leaves no lock file of a volume that has nothing else here.
    pub fn release(self) -> Result<()> {
        if self.folder.exists() { Ok(()) } else { self.lock.remove() }
    }
}

/// The lock of a volume: the command line and CSI exclude each other through it.
#[derive(Debug)]
struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    fn acquire(run_dir: &Path, volume: &VolumeId) -> Result<Lock> {
        let folder = run_dir.join("locks");
        private_folder(&folder)?;
        let path = lock_path(run_dir, volume);
        // A process that another thread of ours just forked has our locks, too, until its exec: an instant.
        let mut patience = 100;
        let own = std::process::id() as i32;
        let begun = Instant::now();
        let busy = |held: Option<i32>| {
            let who = held.map_or_else(String::new, |pid| format!(" (pid {pid})"));
            Error::new(Kind::Busy, format!("another command is at work on it{who}"))
                .on(volume)
                .hint(format!("wait for it, or see what it does: zerofsctl show {volume}"))
        };
        loop {
            let held = match file_lock::try_take(&path).doing("lock", &path)? {
                Taken::Ours(file) => return Ok(Lock { file, path }),
                Taken::Held(held) => held,
            };
            let watches = |pid| file_lock::holder(&run_dir.join(WATCH_LOCK)) == Some(pid);
            match held {
                Some(pid) if begun.elapsed() < WATCHER_PATIENCE && watches(pid) => {
                    // It starts the next keeper, without which we could do nothing either.
                    std::thread::sleep(Duration::from_millis(10));
                }
                Some(pid) if pid != own => return Err(busy(held)),
                // Nobody is no reason to give up: whoever had it may just have let go of it.
                _ if patience == 0 => return Err(busy(held)),
                _ => {
                    patience -= 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    /// Removes the file while it is still held.
    fn remove(self) -> Result<()> {
        let removed = std::fs::remove_file(&self.path).doing("remove the lock", &self.path);
        drop(self.file);
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{Mount, WriteConfig};

    fn volume() -> VolumeId {
        "vol1".parse().unwrap()
    }

    fn mount(target: &str) -> Step {
        Mount {
            target: TargetPath::new(Path::new(target), Path::new("/")).unwrap(),
            options: vec![],
            read_only: false,
        }
        .into()
    }

    fn plan(operation: Operation, tasks: Vec<Task>) -> Plan {
        Plan { operation, volume: volume(), tasks }
    }

    #[test]
    fn a_command_waits_for_the_watcher_also_for_one_in_its_own_process() {
        let dir = tempfile::tempdir().unwrap();
        let volume: VolumeId = "vol1".parse().unwrap();
        let watch = crate::atomic_file::open_lock(&dir.path().join(WATCH_LOCK)).unwrap();
        let held = Held::take(dir.path(), &volume).unwrap();
        // Anybody else in this process is no watcher, and that is soon said.
        assert_eq!(Held::take(dir.path(), &volume).unwrap_err().kind(), Kind::Busy);
        watch.try_lock().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| Held::take(dir.path(), &volume).map(drop));
            std::thread::sleep(Duration::from_millis(400));
            assert!(!waiting.is_finished());
            drop(held);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_torn_last_line_is_dropped_at_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), &volume()).unwrap();
        let attach =
            plan(Operation::Attach, vec![Task::apply(WriteConfig {}.into()), Task::apply(mount("/m"))]);
        journal.begin(attach, Facts::default()).unwrap();
        journal.started(0, &Facts::default()).unwrap();
        let before = std::fs::metadata(&journal.path).unwrap().len() as usize;
        journal.settled(0, Outcome::Done, &Facts::default()).unwrap();
        let path = journal.path.clone();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in before..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let journal = Journal::open(dir.path(), &volume()).unwrap();
            assert_eq!(journal.open_run().unwrap().states[0], TaskState::Started, "cut at {cut}");
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap().len(), before, "cut at {cut}");
        }
    }

    #[test]
    fn a_damaged_line_before_the_last_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), &volume()).unwrap();
        journal.begin(plan(Operation::Attach, vec![Task::apply(mount("/m"))]), Facts::default()).unwrap();
        journal.started(0, &Facts::default()).unwrap();
        let path = journal.path.clone();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = Journal::open(dir.path(), &volume()).unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "a refused journal is left as it was");
    }

    #[test]
    fn the_lock_excludes_and_is_removed_with_the_journal() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), &volume()).unwrap();
        assert_eq!(Journal::open(dir.path(), &volume()).unwrap_err().kind(), Kind::Busy);
        journal.close().unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("locks")).unwrap().count(), 0);
        assert_eq!(volumes(dir.path()).unwrap(), vec![]);
        Journal::open(dir.path(), &volume()).unwrap();
    }

    #[test]
    fn what_a_killed_run_did_stays_its_own_when_it_is_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), &volume()).unwrap();
        journal.begin(plan(Operation::Attach, vec![Task::apply(mount("/m"))]), Facts::default()).unwrap();
        journal.started(0, &Facts::default()).unwrap();
        journal.settled(0, Outcome::Already, &Facts::default()).unwrap();
        assert_eq!(journal.open_run().unwrap().states[0], TaskState::Settled(Outcome::Done));
    }

    #[test]
    fn standing_follows_mounts_through_runs() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), &volume()).unwrap();
        for target in ["/a", "/b"] {
            journal
                .begin(plan(Operation::Attach, vec![Task::apply(mount(target))]), Facts::default())
                .unwrap();
            journal.started(0, &Facts::default()).unwrap();
            journal.settled(0, Outcome::Done, &Facts::default()).unwrap();
            journal.end(End::Done).unwrap();
        }
        assert_eq!(journal.standing().places, vec![mount("/a"), mount("/b")]);
        journal.begin(plan(Operation::Detach, vec![Task::undo(mount("/a"))]), Facts::default()).unwrap();
        journal.started(0, &Facts::default()).unwrap();
        assert_eq!(journal.standing().places.len(), 2, "in doubt it stands");
        journal.settled(0, Outcome::Done, &Facts::default()).unwrap();
        assert_eq!(journal.standing().places, vec![mount("/b")]);
    }

    #[test]
    fn settlements() {
        let run = |operation, unwinding| Run {
            at: jiff::Timestamp::UNIX_EPOCH,
            plan: plan(operation, vec![Task::apply(mount("/a"))]),
            states: vec![TaskState::Started],
            facts: Facts::default(),
            unwinding,
            error: None,
            end: None,
        };
        let same = plan(Operation::Attach, vec![Task::apply(mount("/a"))]);
        let other = plan(Operation::Attach, vec![Task::apply(mount("/b"))]);
        let detach = plan(Operation::Detach, vec![]);
        let attach = run(Operation::Attach, false);
        assert_eq!(settlement(None, Some(&same)), Settlement::Nothing);
        assert_eq!(settlement(Some(&attach), Some(&same)), Settlement::Resume);
        assert_eq!(settlement(Some(&attach), Some(&other)), Settlement::Unwind);
        assert_eq!(settlement(Some(&attach), Some(&detach)), Settlement::Unwind);
        assert_eq!(settlement(Some(&attach), None), Settlement::Unwind);
        assert_eq!(settlement(Some(&run(Operation::Attach, true)), Some(&same)), Settlement::Unwind);
        assert_eq!(settlement(Some(&run(Operation::Detach, false)), Some(&same)), Settlement::Finish);
        assert_eq!(settlement(Some(&run(Operation::Resize, false)), Some(&detach)), Settlement::Abandon);
        assert_eq!(settlement(Some(&run(Operation::Resize, false)), None), Settlement::Finish);
    }

    proptest::proptest! {
        #[test]
        fn parsing_any_bytes_never_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let _ = fold(&bytes);
        }
    }
}
