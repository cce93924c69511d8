//! The deletion: volume by volume, each looked at once more right before.

use std::sync::Mutex;
use std::sync::mpsc::sync_channel;

use jiff::{SignedDuration, Timestamp};

use super::evidence::Recorded;
use super::measure::glance_since;
use super::plan::{Line, Plan};
use super::scan::Scan;
use super::verdict::Verdict;
use super::{Collector, NOTHING, Watch, undecided, while_learning};
use crate::catalog::{self, Below, Catalog, Objects, State, VolumeRecord, Written};
use crate::error::{Error, Kind, Result};
use crate::values::VolumeId;

/// How long a sweeper has a volume without saying so again. No request lasts as long by far.
const LEASE: SignedDuration = SignedDuration::from_secs(180);
/// It says so again when this is left.
const RENEW: SignedDuration = SignedDuration::from_secs(120);
/// How often a volume is listed until there is nothing; more than twice means that somebody writes.
const ROUNDS: usize = 4;

/// What became of a volume.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Its data is gone, and its record.
    Gone {
        /// Objects that were deleted now.
        objects: u64,
        /// Their bytes.
        bytes: u64,
        /// Unfinished uploads that were aborted.
        uploads: u64,
    },
    /// Its data is gone; its record goes with a later sweep, when nobody else can be at work any more.
    Emptied {
        /// Objects that were deleted now.
        objects: u64,
        /// Their bytes.
        bytes: u64,
        /// From when on the record can go.
        after: Timestamp,
    },
    /// It was left alone: it was changed, or somebody wants it after all.
    Kept(String),
    /// Its deletion has begun and could not be finished.
    Failed(Error),
}

/// What a sweep did.
#[derive(Debug, Clone, Default)]
pub struct Swept {
    /// By name.
    pub volumes: Vec<(VolumeId, Outcome)>,
    /// Marks that were taken away before, and why.
    pub unmarked: Vec<(VolumeId, String)>,
    /// It was asked to stop before it was through.
    pub interrupted: bool,
}

impl Collector<'_> {
    /// Deletes what the plan of this scan says.
    ///
    /// # Errors
    /// Those of learning what is live, for any volume: then no further volume is begun. What goes wrong with the deletion
    /// of one volume is in the answer.
    pub fn sweep(&self, scan: &Scan, plan: &Plan) -> Result<Swept> {
        self.watch.stage("deleting");
        let unmarked = self.unmark(scan, plan).map_err(while_learning)?.unmarked;
        let workers = self.options.workers;
        let inside = if workers == 1 { 1 } else { (64 / plan.lines.len().clamp(1, workers)).clamp(2, 32) };
        let outcomes = Mutex::new(Vec::new());
        let swept = super::in_parallel(workers, plan.lines.iter().collect(), |line| {
            self.check_interrupted()?;
            let outcome = self.sweep_volume(scan, line, inside)?;
            self.watch.volume(&line.volume);
            outcomes
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push((line.volume.clone(), outcome));
            Ok(())
        });
        let mut volumes = outcomes.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        volumes.sort_by(|a, b| a.0.cmp(&b.0));
        let stopped =
            volumes.iter().any(|(_, o)| matches!(o, Outcome::Failed(e) if e.kind() == Kind::Interrupted));
        match swept {
            Ok(()) => Ok(Swept { volumes, unmarked, interrupted: stopped }),
            Err(e) if e.kind() == Kind::Interrupted => Ok(Swept { volumes, unmarked, interrupted: true }),
            // What is done already must not go unmentioned.
            Err(e) => Err(match volumes.iter().filter(|(_, o)| !matches!(o, Outcome::Kept(_))).count() {
                0 => e.adding(NOTHING),
                begun => {
                    e.adding(format_args!("{begun} volumes were deleted before, or their deletion has begun"))
                }
            }),
        }
    }

    fn sweep_volume(&self, scan: &Scan, line: &Line, threads: usize) -> Result<Outcome> {
        let volume = &line.volume;
        let lease = if line.begun {
            match Lease::take(self.catalog, self.objects, volume) {
                Ok(Some(lease)) => lease,
                Ok(None) => return Ok(Outcome::Kept("somebody else has finished it".into())),
                Err(e) => return Ok(Outcome::Failed(e)),
            }
        } else {
            match self.begin(scan, line).map_err(|e| undecided(e.on(volume)))? {
                Ok(lease) => lease,
                Err(why) => return Ok(Outcome::Kept(why)),
            }
        };
        Ok(finish(&lease, threads, self.watch))
    }

    /// The last look, and then the point of no return: `deleting` in the record, if it is still the one that was looked at.
    fn begin(&self, scan: &Scan, line: &Line) -> Result<std::result::Result<Lease<'_>, String>> {
        let volume = &line.volume;
        // The record first: whoever attaches it after this makes our write lose.
        let Some((record, tag)) = self.catalog.get(volume)? else { return Ok(Err("it is gone".into())) };
        let Some(mark) = record.mark().filter(|m| Some(m.at) == line.marked && record.epoch == line.epoch)
        else {
            return Ok(Err("it was attached, restored or marked anew in between".into()));
        };
        let marked_at = mark.at;
        let manifest = mark.manifest.clone();
        let mut references = Vec::new();
        for witness in self.witnesses {
            references.extend(witness.refers(volume).map_err(|e| e.context(witness.name()))?);
        }
        let facts = glance_since(self.objects, volume, manifest.as_deref(), self.watch)?;
        let now = self.now()?;
        let recorded = Recorded::Yes(Box::new(record.clone()), marked_at);
        let judgement = self.judge(volume, &recorded, &references, &scan.asked, &facts, now);
        if judgement.verdict != Verdict::Orphan {
            if judgement.verdict != Verdict::Unknown {
                // Whoever wants it may have changed the record meanwhile; then there is no mark left to take.
                let _ = self.catalog.update(&record.unmarked(), &tag)?;
            }
            return Ok(Err(judgement.reason));
        }
        let nonce = catalog::nonce()?;
        match self.catalog.update(&record.sweeping(&nonce, now, until(now))?, &tag)? {
            Written::Done(_) => Ok(Ok(Lease::new(self.catalog, self.objects, volume, nonce, until(now)))),
            Written::LostRace => Ok(Err("it was changed in between".into())),
        }
    }
}

fn until(now: Timestamp) -> Timestamp {
    now.checked_add(LEASE).unwrap_or(Timestamp::MAX)
}

/// The deletion of a volume is ours, for a while. See [`Sweeper`](crate::catalog::Sweeper).
pub(super) struct Lease<'a> {
    catalog: &'a dyn Catalog,
    objects: &'a dyn Objects,
    volume: VolumeId,
    nonce: String,
    until: Mutex<Timestamp>,
}

impl<'a> Lease<'a> {
    pub(super) fn new(
        catalog: &'a dyn Catalog,
        objects: &'a dyn Objects,
        volume: &VolumeId,
        nonce: String,
        until: Timestamp,
    ) -> Lease<'a> {
        Lease { catalog, objects, volume: volume.clone(), nonce, until: Mutex::new(until) }
    }

    /// Takes a deletion over that somebody has begun; none if it is finished.
    pub(super) fn take(
        catalog: &'a dyn Catalog,
        objects: &'a dyn Objects,
        volume: &VolumeId,
    ) -> Result<Option<Lease<'a>>> {
        let lease = Lease::new(catalog, objects, volume, catalog::nonce()?, Timestamp::MIN);
        Ok(lease.write(true)?.then_some(lease))
    }

    /// Writes that it is ours; false if the record is gone. `over` takes it from another.
    fn write(&self, over: bool) -> Result<bool> {
        for _ in 0..8 {
            let Some((record, tag)) = self.catalog.get(&self.volume)? else { return Ok(false) };
            let theirs = record.sweeper.as_ref().is_some_and(|s| s.nonce != self.nonce);
            if record.state != State::Deleting || theirs && !over {
                return Err(Error::new(Kind::Busy, "another collector has taken its deletion over")
                    .on(&self.volume)
                    .hint("let it finish: zerofsctl gc-s3 status"));
            }
            let now = self.objects.now()?;
            if let Written::Done(_) =
                self.catalog.update(&record.sweeping(&self.nonce, now, until(now))?, &tag)?
            {
                *self.until.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = until(now);
                return Ok(true);
            }
        }
        Err(Error::new(Kind::Busy, "its catalog record keeps changing under us")
            .on(&self.volume)
            .hint("try again"))
    }

    /// Makes sure that it is ours for some time; called before each batch.
    fn hold(&self) -> Result<()> {
        let now = self.objects.now()?;
        // Held while it is renewed, so that one does it for all threads.
        let until = *self.until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if until.duration_since(now) > RENEW {
            return Ok(());
        }
        if self.write(false)? {
            return Ok(());
        }
        Err(Error::new(Kind::Busy, "another collector has finished its deletion")
            .on(&self.volume)
            .hint("nothing is left to do: zerofsctl gc-s3 status"))
    }

    /// Says that nobody of ours deletes any more, so that the next one need not wait.
    fn let_go(&self) {
        let done = || -> Result<()> {
            if let Some((record, tag)) = self.catalog.get(&self.volume)?
                && record.sweeper.as_ref().is_some_and(|s| s.nonce == self.nonce)
            {
                let now = self.objects.now()?;
                let _ = self.catalog.update(&record.sweeping(&self.nonce, now, now)?, &tag)?;
            }
            Ok(())
        };
        // If it cannot be written, the next one waits: no harm.
        let _ = done();
    }

    fn record(&self) -> Result<Option<VolumeRecord>> {
        Ok(self.catalog.get(&self.volume)?.map(|(r, _)| r))
    }
}

/// Deletes everything of a volume whose deletion has begun: objects, unfinished uploads, and at last the record.
pub(super) fn finish(lease: &Lease<'_>, threads: usize, watch: &dyn Watch) -> Outcome {
    let outcome = finish_inner(lease, threads, watch);
    match outcome {
        Ok(outcome) => outcome,
        Err(e) => {
            // A request that was not answered may still be under way: then the next one must wait.
            if e.kind() != Kind::Unreachable {
                lease.let_go();
            }
            Outcome::Failed(e.on(&lease.volume))
        }
    }
}

fn finish_inner(lease: &Lease<'_>, threads: usize, watch: &dyn Watch) -> Result<Outcome> {
    let (mut objects, mut bytes, mut uploads) = (0, 0, 0);
    let mut rounds = 0;
    loop {
        let round = clear(lease, threads, watch)?;
        objects += round.objects;
        bytes += round.bytes;
        if let Some((key, e)) = round.failed {
            return Err(e.context(format!("{key} is still there")));
        }
        if round.seen == 0 {
            // Parts of an upload that was cut short are in no listing; one that is completed meanwhile is in the next.
            let open = match lease.objects.uploads(&lease.volume) {
                // Policies that were written for an older driver do not allow it. It is no reason to keep the record for ever.
                Err(e) if e.kind() == Kind::Environment => {
                    watch.note(&format!(
                        "volume {}: its unfinished uploads, if any, are left: {}; allow s3:ListBucketMultipartUploads",
                        lease.volume,
                        e.message()
                    ));
                    Vec::new()
                }
                open => open?,
            };
            for upload in &open {
                lease.hold()?;
                lease.objects.abort(&lease.volume, upload)?;
                uploads += 1;
            }
            if open.is_empty() {
                break;
            }
        }
        rounds += 1;
        if rounds > ROUNDS {
            return Err(Error::new(Kind::Busy, "a server still writes to it").hint(
                "stop it: zerofsctl show and the pods of the volume tell where it runs; then run this again",
            ));
        }
    }
    lease.objects.tidy(&lease.volume)?;
    lease.hold()?;
    let Some(record) = lease.record()? else { return Ok(Outcome::Gone { objects, bytes, uploads }) };
    let now = lease.objects.now()?;
    if let Some(after) = record.sweeper.as_ref().and_then(|s| s.others_until).filter(|t| *t > now) {
        lease.let_go();
        return Ok(Outcome::Emptied { objects, bytes, after });
    }
    lease.catalog.delete(&lease.volume)?;
    Ok(Outcome::Gone { objects, bytes, uploads })
}

/// What one listing from end to end came to.
#[derive(Default)]
struct Round {
    /// Objects that were there.
    seen: u64,
    /// Those that were deleted.
    objects: u64,
    bytes: u64,
    /// One that could not be, and why.
    failed: Option<(String, Error)>,
}

/// Lists all objects and deletes them on the way: pages go to `threads` deleters, a few at most wait.
fn clear(lease: &Lease<'_>, threads: usize, watch: &dyn Watch) -> Result<Round> {
    let round = Mutex::new(Round::default());
    let delete = |batch: Batch| -> Result<()> {
        lease.hold()?;
        let failed = lease.objects.delete(&lease.volume, &batch.keys)?;
        let count = (batch.keys.len() - failed.len()) as u64;
        watch.objects(count, batch.bytes);
        let mut round = round.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        round.objects += count;
        round.bytes += batch.bytes;
        if let Some(first) = failed.into_iter().next() {
            round.failed.get_or_insert(first);
        }
        Ok(())
    };
    let pages = |send: &mut dyn FnMut(Batch) -> Result<bool>| -> Result<()> {
        let below = Below::volume(&lease.volume);
        let mut next = None;
        loop {
            if watch.interrupted() {
                return Err(Error::new(Kind::Interrupted, "stopped as asked")
                    .hint("the deletion goes on with the next sweep: zerofsctl gc-s3 sweep"));
            }
            let page = lease.objects.page(&below, false, next.as_deref())?;
            let mut batch = Batch::default();
            for object in page.objects {
                let inside = object.key.strip_prefix(below.as_str()).unwrap_or_default();
                let first = inside.find('/').map_or(inside, |slash| &inside[..=slash]);
                if !catalog::is_of_zerofs(first) {
                    return Err(Error::refused("it holds something that is not of ZeroFS")
                        .hint("look at the folder in the bucket, and move away what is not of ZeroFS; then sweep again"));
                }
                batch.bytes += object.size;
                batch.keys.push(object.key);
            }
            round.lock().unwrap_or_else(std::sync::PoisonError::into_inner).seen += batch.keys.len() as u64;
            if !batch.keys.is_empty() && !send(batch)? {
                return Ok(());
            }
            match page.next {
                None => return Ok(()),
                Some(same) if Some(&same) == next.as_ref() => {
                    return Err(
                        Error::new(Kind::Unreachable, "the listing does not get on").hint("try again")
                    );
                }
                other => next = other,
            }
        }
    };
    if threads <= 1 {
        pages(&mut |batch| delete(batch).map(|()| true))?;
    } else {
        let (sender, receiver) = sync_channel::<Batch>(threads);
        let receiver = Mutex::new(receiver);
        let failure = Mutex::new(None::<Error>);
        let failed = || failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some();
        let listed = std::thread::scope(|s| {
            for _ in 0..threads {
                s.spawn(|| {
                    loop {
                        let next = receiver.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv();
                        let Ok(batch) = next else { return };
                        // After an error the rest is only taken in, so that the lister does not wait for ever.
                        if failed() || watch.interrupted() {
                            continue;
                        }
                        if let Err(e) = delete(batch) {
                            failure
                                .lock()
                                .unwrap_or_else(std::sync::PoisonError::into_inner)
                                .get_or_insert(e);
                        }
                    }
                });
            }
            let listed = pages(&mut |batch| Ok(!failed() && sender.send(batch).is_ok()));
            drop(sender);
            listed
        });
        if let Some(e) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            return Err(e);
        }
        listed?;
    }
    Ok(round.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// The keys of a page.
#[derive(Default)]
struct Batch {
    keys: Vec<String>,
    bytes: u64,
}
