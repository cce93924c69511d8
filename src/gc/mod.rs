//! The collector of what deleted volumes leave in the bucket, and nothing else.
//!
//! ```text
//! scan     records, then what refers to volumes, then objects → a verdict per volume      (only looks)
//! mark     orphan → a dated tombstone in its record                                       (attach or restore undoes it)
//! sweep    a grace period later: scan again; per volume look once more, then `deleting`   (no way back from here)
//!          in its record, then its objects, its unfinished uploads, and at last the record
//! ```
//!
//! What it promises:
//! - [`verdict::judge`] alone decides, without I/O. Nothing is an orphan because something was not found: see there.
//! - An error while learning what is live ends everything, with nothing deleted.
//! - Every move is a conditional put of the record that was looked at, so an attach and a deletion cannot both win.
//! - Times are the object store's.
//! - A deletion that was cut short goes on with the next sweep, by whomever.
//!
//! [`delete_volume`] is the same for one volume, for CSI's DeleteVolume.

use std::collections::BTreeSet;
use std::sync::Mutex;

use jiff::{SignedDuration, Timestamp};

use crate::catalog::{Catalog, Objects};
use crate::error::{Error, Kind, Result};
use crate::values::VolumeId;

mod cluster;
mod delete;
pub mod evidence;
mod journals;
mod limit;
mod mark;
mod measure;
mod plan;
mod scan;
mod sweep;
pub mod verdict;

pub use cluster::ClusterWitness;
pub use delete::{DeleteOptions, Deletion, delete_volume};
pub use evidence::{Reference, ReferenceKind, Testimony, Witness};
pub use journals::Journals;
pub use limit::Limit;
pub use mark::{Marked, restore};
pub use plan::{Line, Plan};
pub use scan::{Scan, Seen};
pub use sweep::{Outcome, Swept};
pub use verdict::{Judgement, Patience, Verdict};

/// Who is told how far it is, and can ask to stop. Called from several threads.
pub trait Watch: Sync {
    /// What is being done now: `reading the catalog`.
    fn stage(&self, _what: &str) {}
    /// Objects that were counted (scan) or deleted (sweep), and their bytes.
    fn objects(&self, _count: u64, _bytes: u64) {}
    /// One volume is through.
    fn volume(&self, _volume: &VolumeId) {}
    /// Something that somebody should know, and that stops nothing.
    fn note(&self, _text: &str) {}
    /// Whether to stop at the next safe place.
    fn interrupted(&self) -> bool {
        false
    }
}

/// Nobody watches.
#[derive(Debug, Clone, Copy)]
pub struct Unwatched;

impl Watch for Unwatched {}

/// What a run is to do, and how carefully.
#[derive(Debug, Clone)]
pub struct Options {
    /// Clusters that are gone for good, on the operator's word: their volumes count as referred to by nobody.
    pub gone_clusters: BTreeSet<String>,
    /// Volumes that the operator named.
    pub named: BTreeSet<VolumeId>,
    /// What counts as settled.
    pub patience: Patience,
    /// How long a volume must have been marked before it is swept, where its mark does not say.
    pub grace: SignedDuration,
    /// How many volumes a plan may take.
    pub limit: Limit,
    /// Volumes at a time; 1 does everything in order, on the caller's thread.
    pub workers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            gone_clusters: BTreeSet::new(),
            named: BTreeSet::new(),
            patience: Patience::default(),
            grace: SignedDuration::from_hours(24),
            limit: Limit::default(),
            workers: 16,
        }
    }
}

/// Everything that a scan, mark or sweep works with.
pub struct Collector<'a> {
    /// The records.
    pub catalog: &'a dyn Catalog,
    /// The objects of the same store.
    pub objects: &'a dyn Objects,
    /// Who can tell what refers to volumes.
    pub witnesses: &'a [&'a dyn Witness],
    /// What to do, and how carefully.
    pub options: Options,
    /// Who is told.
    pub watch: &'a dyn Watch,
}

impl Collector<'_> {
    fn check_interrupted(&self) -> Result<()> {
        if self.watch.interrupted() {
            return Err(Error::new(Kind::Interrupted, "stopped as asked")
                .hint("what was begun goes on with the next run of the same command"));
        }
        Ok(())
    }

    /// The store's time, for a mark or a due time.
    fn now(&self) -> Result<Timestamp> {
        self.objects.now()
    }
}

/// An error while learning what is live, before the first deletion: it ends the run with nothing deleted, and says so.
fn while_learning(e: Error) -> Error {
    match undecided(e) {
        e if e.kind() == Kind::Unreachable => e.adding(NOTHING),
        e => e,
    }
}

/// What an error says when it is so.
const NOTHING: &str = "nothing was deleted";

/// An error while learning what is live counts as "unreachable", except where trying again cannot help.
fn undecided(e: Error) -> Error {
    if matches!(e.kind(), Kind::Usage | Kind::NotFound | Kind::Interrupted | Kind::Unreachable) {
        return e;
    }
    let mut unreachable =
        Error::new(Kind::Unreachable, format!("cannot learn what is live: {}", e.message()));
    if let Some(volume) = e.volume() {
        unreachable = unreachable.on(volume);
    }
    match e.hint_text() {
        Some(hint) => unreachable.hint(hint.to_owned()),
        None => unreachable.hint("run the same command again"),
    }
}

/// Does `work` for each item in `threads` threads; after an error nobody begins another item, and the first error of
/// all is returned. With one thread it is the caller's.
fn in_parallel<T: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    if threads <= 1 || items.len() <= 1 {
        return items.into_iter().try_for_each(work);
    }
    let queue = Mutex::new(items.into_iter());
    let failure = Mutex::new(None::<Error>);
    let lock = |m: &Mutex<Option<Error>>| m.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let threads = threads.min(queue.lock().map_or(1, |q| q.len()));
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                loop {
                    if lock(&failure).is_some() {
                        return;
                    }
                    let next = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
                    let Some(item) = next else { return };
                    if let Err(e) = work(item) {
                        failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
                        return;
                    }
                }
            });
        }
    });
    match lock(&failure) {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_while_learning_are_unreachable_unless_a_retry_cannot_help() {
        for kind in Kind::ALL {
            let e = while_learning(Error::new(kind, "x").hint("near"));
            let kept = matches!(kind, Kind::Usage | Kind::NotFound | Kind::Interrupted);
            assert_eq!(e.kind(), if kept { kind } else { Kind::Unreachable });
            assert_eq!(e.message().ends_with("; nothing was deleted"), !kept, "{e}");
            assert_eq!(e.hint_text(), Some("near"));
        }
    }

    #[test]
    fn after_an_error_nobody_begins_another_item() {
        for threads in [1, 4] {
            let done = Mutex::new(0);
            let result = in_parallel(threads, (0..1000).collect(), |n: i32| {
                *done.lock().unwrap() += 1;
                if n == 5 { Err(Error::failed("five")) } else { Ok(()) }
            });
            assert_eq!(result.unwrap_err().message(), "five");
            assert!(*done.lock().unwrap() < 1000, "{threads}");
            in_parallel(threads, (0..100).collect(), |_: i32| Ok(())).unwrap();
        }
    }
}
