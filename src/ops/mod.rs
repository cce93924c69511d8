//! The operations: what a user asks for becomes a plan, and the engine takes it through.
//!
//! The functions that make plans are pure; those that take an [`Engine`] first settle what an earlier,
//! killed run left, and take down the device of a dead keeper.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::host::{IoPath, KeeperView, Life, TargetView, Tenure, Transport};
use crate::journal::{Journal, Settlement, Standing, place};
use crate::plan::{Operation, Plan, Task};
use crate::run::{Engine, RunReport};
use crate::step::Facts;
use crate::step::{self, Step};
use crate::values::{ByteSize, FsType, Slice, TargetPath, VolumeId};

pub mod attach;
pub mod detach;
pub mod fsck;
pub mod nbd_gc;
pub mod publish;
pub mod recover;
pub mod resize;
pub mod take_over;

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

/// Takes down mounts and device of a device that only gives errors: a FUSE one whose keeper was killed, or an NBD one
/// whose server crashed on the direct path. True when there was such a wreck.
fn clear_wreck(engine: &Engine<'_>, journal: &mut Journal, volume: &VolumeId) -> Result<bool> {
    let standing = journal.standing();
    let Some(connect) = standing.connect.clone() else { return Ok(false) };
    let view = engine.host.device(volume).map_err(|e| e.on(volume))?;
    let wreck = if view.is_absent() {
        let keeper = engine.host.keeper(volume).map_err(|e| e.on(volume))?;
        !standing.places.is_empty() && matches!(keeper, KeeperView::Dead { .. })
    } else {
        view.life == Life::Dead
    };
    if wreck {
        engine.observer.note("its device only gives errors any more: taking down what is left");
        clear(engine, journal, volume, standing, connect)?;
    }
    Ok(wreck)
}

/// Whether a volume that stands here is ours in the catalog; false only when somebody else has had it since.
fn is_ours(engine: &Engine<'_>, volume: &VolumeId, standing: &Standing) -> Result<bool> {
    match engine.host.tenure(volume, standing.facts.epoch.unwrap_or(0)).map_err(|e| e.on(volume))? {
        Tenure::Ours => Ok(true),
        Tenure::Over => Ok(false),
        Tenure::Unclear(why) => Err(Error::refused(format!("it was attached here, but {why}"))
            .on(volume)
            .hint(format!(
                "bring its store back, or name this node as at that attach (NODE_ID); or take down what is here: zerofsctl detach {volume}"
            ))),
    }
}

/// Takes down an NBD device whose filesystem was told of an error, because the kernel held its I/O for as long as it may:
/// it takes no more writes, and only a mount anew brings it back. What is in use is not touched. True when there was
/// such a one.
fn clear_harmed(engine: &Engine<'_>, journal: &mut Journal, volume: &VolumeId) -> Result<bool> {
    let standing = journal.standing();
    let Some(connect) = standing.connect.clone() else { return Ok(false) };
    let view = engine.host.device(volume).map_err(|e| e.on(volume))?;
    let (Some(device), Some(Transport::Nbd)) = (view.device, view.transport) else { return Ok(false) };
    for place in &standing.places {
        let Step::Mount(mount) = place else { continue };
        if !mount.read_only
            && let TargetView::MountPoint(entry) = engine.host.target(&mount.target)?
            && entry.read_only
            && entry.source == device.path.to_string_lossy()
        {
            engine.observer.note("its filesystem was told of an I/O error: taking it down, to mount it anew");
            clear(engine, journal, volume, standing, connect)?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn clear(
    engine: &Engine<'_>,
    journal: &mut Journal,
    volume: &VolumeId,
    standing: Standing,
    connect: step::Connect,
) -> Result<()> {
    let mut tasks: Vec<Task> = standing.places.iter().rev().cloned().map(Task::undo).collect();
    tasks.push(Task::undo(connect.into()));
    let plan = Plan { operation: Operation::Clear, volume: volume.clone(), tasks };
    engine.run(journal, plan, standing.facts).map(drop)
}

/// Where the device only waits for the next keeper, starts that one: first of all, since whatever touches the device
/// would wait, too. True when it did. From then on the host does the same whenever it is needed.
///
/// It is no run of the journal: there is nothing to undo, and a kill in the middle leaves what was there before.
fn revive(engine: &Engine<'_>, volume: &VolumeId) -> Result<bool> {
    let named = |e: Error| e.on(volume).in_step("take-over");
    let waits = engine.host.device(volume).map_err(named)?.life == Life::Waiting;
    if waits {
        engine.observer.note("its keeper is gone, and its device waits: starting the next keeper");
        engine.host.take_over(volume).map_err(named)?;
    }
    engine.host.look_after(volume).map_err(named)?;
    Ok(waits)
}
