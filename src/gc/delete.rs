//! The deletion of one volume on the word of whoever owns it: CSI's DeleteVolume.

use jiff::{SignedDuration, Timestamp};

use super::Watch;
use super::measure::glance;
use super::sweep::{Lease, Outcome, finish};
use super::verdict::{Patience, age, ago};
use crate::catalog::{Catalog, DataPrefix, MarkedBy, Objects, State, Tombstone, VolumeRecord, Written};
use crate::error::{Error, Kind, Result};
use crate::values::{ByteSize, VolumeId};

/// How [`delete_volume`] goes about it.
#[derive(Debug, Clone, Copy)]
pub struct DeleteOptions {
    /// Only mark it, and leave the deletion to a `gc-s3 sweep` (or to a later call) after this time.
    pub grace: Option<SignedDuration>,
    /// Whoever wrote to it within this time, without having it in the catalog, may be still at it.
    pub quiet: SignedDuration,
    /// Batches of deletions in flight.
    pub threads: usize,
}

impl Default for DeleteOptions {
    fn default() -> Self {
        DeleteOptions { grace: None, quiet: Patience::default().quiet, threads: 8 }
    }
}

/// What [`delete_volume`] came to. All of these are success for CSI's DeleteVolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    /// There was neither a record nor an object.
    WasGone,
    /// Its objects, its unfinished uploads and its record are gone.
    Gone {
        /// Objects that this call deleted.
        objects: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// It is marked, and will be deleted by a sweep after this time, by the object store's clock.
    Marked {
        /// From when on it may be deleted.
        due: Timestamp,
    },
}

/// Deletes a volume, because its owner says so: record and reachable evidence only have to agree that nobody uses it. With
/// [`DeleteOptions::grace`] it is marked instead, and `gc-s3 restore` can take that back until a sweep.
///
/// Calling it again goes on where a call was cut short, from any node. Once the deletion has begun the volume can never be
/// attached again, and this call finishes it. A volume without a record (an older driver's) gets one first.
///
/// # Errors
/// - [`Kind::Busy`] (gRPC ABORTED, so the provisioner asks again): a node has it attached; something wrote to it after its
///   record was last written and less than [`DeleteOptions::quiet`] ago, so a server that is in no catalog may be running;
///   a server wrote while it was being deleted; or another collector's last requests may still be under way.
/// - [`Kind::Refused`]: its record cannot be used, or under its prefix there is something that is not of ZeroFS.
/// - [`Kind::Unreachable`]: the store does not answer. Nothing, or only a part, was deleted.
/// - [`Kind::Interrupted`]: `watch` asked to stop, before the deletion or between two of its batches.
///
/// # Example
/// ```no_run
/// # fn main() -> zerofsctl::error::Result<()> {
/// use zerofsctl::gc::{self, DeleteOptions, Deletion};
/// use zerofsctl::{catalog, settings::S3Settings};
///
/// let (url, s3) = ("s3://volumes/csi".parse()?, S3Settings::default());
/// let (records, objects) = (catalog::open(&url, &s3)?, catalog::objects(&url, &s3)?);
/// let volume = "pvc-0b6f".parse()?;
/// let how = DeleteOptions::default();
/// match gc::delete_volume(records.as_ref(), objects.as_ref(), &volume, &how, &gc::Unwatched)? {
///     Deletion::Gone { objects, .. } => println!("{objects} objects deleted"),
///     Deletion::Marked { due } => println!("to be deleted after {due}"),
///     Deletion::WasGone => {}
/// }
/// # Ok(())
/// # }
/// ```
pub fn delete_volume(
    catalog: &dyn Catalog,
    objects: &dyn Objects,
    volume: &VolumeId,
    options: &DeleteOptions,
    watch: &dyn Watch,
) -> Result<Deletion> {
    delete(catalog, objects, volume, options, watch).map_err(|e| e.on(volume))
}

fn delete(
    catalog: &dyn Catalog,
    objects: &dyn Objects,
    volume: &VolumeId,
    options: &DeleteOptions,
    watch: &dyn Watch,
) -> Result<Deletion> {
    for _ in 0..8 {
        let Some((record, tag)) = catalog.get(volume)? else {
            let facts = glance(objects, volume, watch)?;
            match facts.content {
                DataPrefix::Empty => return Ok(Deletion::WasGone),
                DataPrefix::Foreign(name) => return Err(foreign(&name)),
                DataPrefix::ZeroFs(_) => {}
            }
            quiet(facts.newest, None, objects.now()?, options)?;
            let adopted = VolumeRecord::adopted(volume.clone(), ByteSize(0), objects.now()?);
            // Somebody else may be first; then theirs is read.
            let _ = catalog.create(&adopted)?;
            continue;
        };
        if record.state == State::Deleting {
            let Some(lease) = Lease::take(catalog, objects, volume)? else { return Ok(Deletion::WasGone) };
            return deletion(finish(&lease, options.threads, watch));
        }
        let now = objects.now()?;
        let grace = options.grace.filter(|g| g.is_positive());
        // Whoever has it is told by these moves, before anything is asked of the bucket.
        let nonce = crate::catalog::nonce()?;
        let until = now.checked_add(SignedDuration::from_secs(180)).unwrap_or(Timestamp::MAX);
        let deleting = record.sweeping(&nonce, now, until)?;
        let facts = glance(objects, volume, watch)?;
        if let DataPrefix::Foreign(name) = &facts.content {
            return Err(foreign(name));
        }
        let marked_by_us = record.mark().filter(|m| m.by == MarkedBy::DeleteVolume);
        // What its owner wrote came before the owner let go. A mark of ours is the later write, so then that counts.
        let written = match marked_by_us {
            Some(mark) => Some(mark.at),
            None => objects.record_written(volume)?,
        };
        quiet(facts.newest, written, now, options)?;
        if let Some(grace) = grace {
            let due = match marked_by_us {
                Some(mark) => mark.due(grace),
                None => now.checked_add(grace).unwrap_or(Timestamp::MAX),
            };
            if marked_by_us.is_some() && now < due {
                return Ok(Deletion::Marked { due });
            }
            if marked_by_us.is_none() {
                let tombstone = Tombstone {
                    at: now,
                    by: MarkedBy::DeleteVolume,
                    why: "its PersistentVolume was deleted with its data".into(),
                    epoch: record.epoch,
                    manifest: facts.manifest,
                    grace_seconds: u64::try_from(grace.as_secs()).ok(),
                };
                match catalog.update(&record.marked(tombstone)?, &tag)? {
                    Written::Done(_) => return Ok(Deletion::Marked { due }),
                    Written::LostRace => continue,
                }
            }
        }
        if let Written::Done(_) = catalog.update(&deleting, &tag)? {
            let lease = Lease::new(catalog, objects, volume, nonce, until);
            return deletion(finish(&lease, options.threads, watch));
        }
    }
    Err(Error::new(Kind::Busy, "its catalog record keeps changing under us").hint("try again"))
}

/// Fails while somebody may be writing who is in no catalog.
fn quiet(
    newest: Option<Timestamp>,
    written: Option<Timestamp>,
    now: Timestamp,
    options: &DeleteOptions,
) -> Result<()> {
    let Some(newest) = newest else { return Ok(()) };
    let age = age(newest, now);
    if written.is_some_and(|w| newest <= w) || age >= options.quiet {
        return Ok(());
    }
    Err(Error::new(Kind::Busy, format!("something wrote to it {} ago, so a server may be running", ago(age)))
        .hint(format!(
            "stop whatever serves it (its pod, or ZeroFS by hand), and try again in {}",
            ago(options.quiet - age)
        )))
}

fn foreign(name: &str) -> Error {
    Error::refused(format!("under its prefix there is something that is not of ZeroFS: {name}"))
        .hint("look at the folder in the bucket, and move it away; then try again")
}

fn deletion(outcome: Outcome) -> Result<Deletion> {
    match outcome {
        Outcome::Gone { objects, bytes, .. } => Ok(Deletion::Gone { objects, bytes }),
        Outcome::Emptied { after, .. } => Err(Error::new(
            Kind::Busy,
            format!(
                "its data is gone; its record goes after {after}, when nobody else can be deleting any more"
            ),
        )
        .hint("try again then")),
        Outcome::Kept(why) => Err(Error::new(Kind::Busy, why).hint("try again")),
        Outcome::Failed(e) => Err(e),
    }
}
