//! Marks, and taking them away.

use std::sync::Mutex;

use super::Collector;
use super::evidence::Recorded;
use super::plan::Plan;
use super::scan::Scan;
use crate::catalog::{Catalog, MarkedBy, Tombstone, VolumeRecord, Written};
use crate::error::{Error, Kind, Result};
use crate::values::VolumeId;

/// What a mark did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marked {
    /// Marked now.
    pub marked: Vec<VolumeId>,
    /// Marks that were taken away, and why.
    pub unmarked: Vec<(VolumeId, String)>,
    /// Changed by somebody else in between, so left alone.
    pub changed: Vec<VolumeId>,
}

impl Collector<'_> {
    /// Marks what the plan of this scan says.
    pub fn mark(&self, scan: &Scan, plan: &Plan) -> Result<Marked> {
        let done = Mutex::new(self.unmark(scan, plan)?);
        let lock = || done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        super::in_parallel(self.options.workers, plan.lines.iter().collect(), |line| {
            self.check_interrupted()?;
            let Some(seen) = scan.seen(&line.volume) else { return Ok(()) };
            let Some((record, tag)) = seen.usable() else { return Ok(()) };
            let by = if self.options.named.contains(&line.volume) { MarkedBy::Name } else { MarkedBy::Scan };
            let tombstone = Tombstone {
                at: self.now()?,
                by,
                why: line.reason.clone(),
                epoch: record.epoch,
                manifest: seen.facts.manifest.clone(),
                grace_seconds: None,
            };
            // On what was seen: whatever happened since is another write, and then this one loses.
            match self.catalog.update(&record.marked(tombstone)?, tag)? {
                Written::Done(_) => lock().marked.push(line.volume.clone()),
                Written::LostRace => lock().changed.push(line.volume.clone()),
            }
            self.watch.volume(&line.volume);
            Ok(())
        })?;
        let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        done.marked.sort();
        done.changed.sort();
        Ok(done)
    }

    /// Takes the marks away that the plan says.
    pub(super) fn unmark(&self, scan: &Scan, plan: &Plan) -> Result<Marked> {
        let mut done = Marked::default();
        for (volume, why) in &plan.unmark {
            let Some(seen) = scan.seen(volume) else { continue };
            let (Recorded::Yes(record, _), Some(tag)) = (&seen.record, &seen.tag) else { continue };
            match self.catalog.update(&record.unmarked(), tag)? {
                Written::Done(_) => done.unmarked.push((volume.clone(), why.clone())),
                Written::LostRace => done.changed.push(volume.clone()),
            }
        }
        Ok(done)
    }
}

/// Takes the mark of one volume away for good: from then on it counts as kept on purpose. False if it had none.
///
/// # Errors
/// [`Kind::Refused`] once its deletion has begun; [`Kind::NotFound`] without a record.
pub fn restore(catalog: &dyn Catalog, volume: &VolumeId) -> Result<(VolumeRecord, bool)> {
    for _ in 0..8 {
        let Some((record, tag)) = catalog.get(volume)? else {
            return Err(Error::new(Kind::NotFound, format!("it has no record in {}", catalog.url()))
                .on(volume)
                .hint("see what there is: zerofsctl volume list"));
        };
        let restored = record.restored()?;
        if restored == record {
            return Ok((record, false));
        }
        if let Written::Done(_) = catalog.update(&restored, &tag)? {
            return Ok((restored, true));
        }
    }
    Err(Error::new(Kind::Busy, "its catalog record keeps changing under us").on(volume).hint("try again"))
}
