//! DeleteVolume: keep the data, mark it for later, or delete it now, by the collector's own code.

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::SignedDuration;
use tonic::Code;

use super::controller::{TRIES, keeps_changing};
use super::proto::DeleteVolumeResponse;
use super::{Driver, Refusal};
use crate::catalog::{Catalog, DataPrefix, Family, Provision, State, VolumeRecord, Written};
use crate::error::{Error, Kind, Result as OurResult};
use crate::gc::{self, DeleteOptions, Deletion, Watch};
use crate::values::VolumeId;

/// Batches of one deletion in flight. Many volumes can be deleted at once.
const BATCHES: usize = 4;

/// A driver that is being stopped ends a deletion between two batches; the next one goes on.
struct Stop<'a>(&'a AtomicBool);

impl Watch for Stop<'_> {
    fn note(&self, text: &str) {
        tracing::warn!("{text}");
    }

    fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What becomes of the data of a volume that is given up.
enum Data {
    Kept,
    /// Deleted after this time, or now.
    Deleted(Option<SignedDuration>),
}

impl Driver {
    pub(super) fn delete(&self, volume: &VolumeId) -> Result<DeleteVolumeResponse, Refusal> {
        let catalog = self.backend.catalog()?;
        for _ in 0..TRIES {
            let Some((has, tag)) = catalog.get(volume)? else { return Ok(DeleteVolumeResponse {}) };
            has.begin_delete().map_err(|e| match e.kind() {
                Kind::Busy => Refusal::with(Code::FailedPrecondition, e),
                _ => e.into(),
            })?;
            match self.data_of(&*catalog, &has)? {
                Data::Kept if has.state == State::Released => return Ok(DeleteVolumeResponse {}),
                Data::Kept => {
                    let released = VolumeRecord { state: State::Released, ..has };
                    if let Written::Done(_) = catalog.update(&released, &tag)? {
                        tracing::info!(%volume, "its data is kept, as deleteDataOnPVCDelete is not \"true\"");
                        return Ok(DeleteVolumeResponse {});
                    }
                }
                Data::Deleted(grace) => {
                    self.delete_data(&*catalog, volume, grace)?;
                    return Ok(DeleteVolumeResponse {});
                }
            }
        }
        Err(keeps_changing(volume))
    }

    fn data_of(&self, catalog: &dyn Catalog, has: &VolumeRecord) -> OurResult<Data> {
        if has.state == State::Deleting {
            return Ok(Data::Deleted(None));
        }
        // One that no node ever started has no data to keep.
        let unstarted = has.epoch == 0
            && has.state != State::Released
            && matches!(
                catalog.data_prefix(&has.id)?,
                DataPrefix::Empty | DataPrefix::ZeroFs(Family::Unstarted)
            );
        match &has.provision {
            _ if unstarted => Ok(Data::Deleted(None)),
            Some(p) if p.delete_data => Ok(Data::Deleted(self.grace(p)?)),
            _ => Ok(Data::Kept),
        }
    }

    /// The volume's own, or else what the settings say now.
    fn grace(&self, provision: &Provision) -> OurResult<Option<SignedDuration>> {
        let seconds = match provision.delete_grace_seconds {
            Some(own) => Some(own),
            None => self.backend.delete_grace()?.map(|grace| grace.as_secs()),
        };
        Ok(seconds.map(|s| SignedDuration::from_secs(i64::try_from(s).unwrap_or(i64::MAX))))
    }

    fn delete_data(
        &self,
        catalog: &dyn Catalog,
        volume: &VolumeId,
        grace: Option<SignedDuration>,
    ) -> OurResult<()> {
        let objects = self.backend.objects()?;
        let how = DeleteOptions { grace, threads: BATCHES, ..DeleteOptions::default() };
        match gc::delete_volume(catalog, &*objects, volume, &how, &Stop(&self.interrupt)) {
            Ok(Deletion::Gone { objects, bytes }) => {
                tracing::info!(%volume, objects, bytes, "deleted with its data");
            }
            Ok(Deletion::Marked { due }) => {
                tracing::info!(%volume, %due, "marked: a gc-s3 sweep deletes its data once it is due");
            }
            Ok(Deletion::WasGone) => {}
            Err(e) if e.kind() == Kind::Interrupted => {
                return Err(Error::new(Kind::Interrupted, e.message())
                    .on(volume)
                    .hint("ask for the deletion again: it goes on from there"));
            }
            Err(e) => return Err(e),
        }
        Ok(())
    }
}
