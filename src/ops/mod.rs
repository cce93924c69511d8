//! The operations: what a user asks for becomes a plan, and the engine takes it through.
//!
//! The functions that make plans are pure; those that take an [`Engine`] first settle what an earlier,
//! killed run left, and take down the device of a dead keeper.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::host::KeeperView;
use crate::journal::{Journal, Settlement, Standing, place};
use crate::plan::{Operation, Plan, Task};
use crate::run::{Engine, RunReport};
use crate::step::Facts;
use crate::step::{self, Step, Transport};
use crate::values::{ByteSize, FsType, Slice, TargetPath, VolumeId};

pub mod attach;
pub mod detach;
pub mod fsck;
pub mod publish;
pub mod recover;
pub mod resize;

pub use attach::AttachSpec;
pub use detach::Scope;
pub use publish::PublishSpec;

/// Opens the journal of a volume that is to be changed.
///
/// Refuses when the volume runs here from another store than the one that the host looks into, as with another state
/// folder beside the same run folder: what is found here would then be taken for something that it is not.
fn open(engine: &Engine<'_>, run_dir: &Path, volume: &VolumeId) -> Result<Journal> {
    let journal = Journal::open(run_dir, volume)?;
    let standing = journal.standing();
    match (standing.claim.filter(|_| standing.start.is_some()), engine.host.store()) {
        (Some(claim), Some(store)) if claim.storage_url != store => {
            let message = format!("it is attached from {}, not {store}", claim.storage_url);
            Err(Error::new(Kind::Conflict, message)
                .on(volume)
                .hint("give the --state-dir with which it was attached; else choose another --run-dir"))
        }
        _ => Ok(journal),
    }
}

/// Takes down mounts and device whose keeper was killed: on FUSE they can only give errors any more.
/// Returns the places that were mounted there.
fn clear_wreck(engine: &Engine<'_>, journal: &mut Journal, volume: &VolumeId) -> Result<Vec<Step>> {
    let standing = journal.standing();
    let dead = matches!(engine.host.keeper(volume).map_err(|e| e.on(volume))?, KeeperView::Dead { .. });
    let Some(connect) = standing.connect.clone().filter(|_| dead) else { return Ok(vec![]) };
    if engine.host.device(volume)?.is_absent() && standing.places.is_empty() {
        return Ok(vec![]);
    }
    engine.observer.note("its keeper is gone, and the device with it: taking down what is left");
    let mut tasks: Vec<Task> = standing.places.iter().rev().cloned().map(Task::undo).collect();
    tasks.push(Task::undo(connect.into()));
    let plan = Plan { operation: Operation::Clear, volume: volume.clone(), tasks };
    engine.run(journal, plan, standing.facts)?;
    Ok(standing.places)
}
