//! publish and unpublish: what is staged at one place of the node appears at others, as pods need it.

use super::*;
use crate::journal::{End, Run, TaskState};
use crate::step::{Bind, GrantGroup};

/// Where a staged volume shall appear, and how. Every value is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishSpec {
    /// Which volume.
    pub volume: VolumeId,
    /// Where it is staged: the mount, or for a raw device its link.
    pub staged: TargetPath,
    /// Where it shall appear.
    pub target: TargetPath,
    /// Not to be written there.
    pub read_only: bool,
    /// The device itself, as a file.
    pub block: bool,
    /// Nowhere else at the same time.
    pub alone: bool,
    /// The group that its files are opened to.
    pub group: Option<u32>,
}

impl PublishSpec {
    /// The plan. Pure.
    pub fn plan(&self) -> Plan {
        let mut tasks = Vec::new();
        if let (Some(gid), false, false) = (self.group, self.block, self.read_only) {
            tasks.push(Task::apply(GrantGroup { target: self.staged.clone(), gid }.into()));
        }
        tasks.push(Task::apply(self.bind().into()));
        Plan { operation: Operation::Publish, volume: self.volume.clone(), tasks }
    }

    fn bind(&self) -> Bind {
        let source = (!self.block).then(|| self.staged.clone());
        Bind { target: self.target.clone(), source, read_only: self.read_only }
    }

    /// Refuses what does not fit to what stands.
    fn check(&self, standing: &Standing) -> Result<()> {
        let staged = standing.places.iter().any(|p| match p {
            Step::Mount(m) => !self.block && m.target == self.staged,
            Step::Link(l) => self.block && l.target == self.staged,
            _ => false,
        });
        if !staged {
            let what = if self.block { "as a raw device at" } else { "at" };
            return Err(Error::refused(format!("it is not staged {what} {}", self.staged))
                .on(&self.volume)
                .hint(format!("stage it first; see what is here: zerofsctl show {}", self.volume)));
        }
        let elsewhere = standing.places.iter().find_map(|p| match p {
            Step::Bind(b) if b.target != self.target => Some(&b.target),
            _ => None,
        });
        if let (true, Some(at)) = (self.alone, elsewhere) {
            return Err(Error::refused(format!(
                "it is published at {at} already, and its access mode allows one place only"
            ))
            .on(&self.volume)
            .hint("end the pod that uses it there, or choose the access mode ReadWriteOnce"));
        }
        Ok(())
    }
}

/// Publishes; a second time it is `already`, and then nothing is written to the journal either.
pub fn publish(engine: &Engine<'_>, run_dir: &Path, spec: &PublishSpec) -> Result<RunReport> {
    let volume = &spec.volume;
    let mut journal = open(engine, run_dir, volume)?;
    let result = (|| {
        revive(engine, volume)?;
        let plan = spec.plan();
        engine.settle(&mut journal, Some(&plan))?;
        let standing = journal.standing();
        let is_dead = || {
            Ok::<_, Error>(
                matches!(engine.host.keeper(volume)?, KeeperView::Dead { .. })
                    || engine.host.device(volume)?.life == Life::Dead,
            )
        };
        if standing.awaited.is_some() || standing.connect.is_some() && is_dead().map_err(|e| e.on(volume))? {
            // A place on a dead device is of no use: it is brought back first.
            super::recover::settle_all(engine, &mut journal, volume)?;
        }
        let standing = journal.standing();
        spec.check(&standing)?;
        if journal.open_run().is_none() && standing.places.contains(&spec.bind().into()) {
            let mut facts = standing.facts.clone();
            if let Some(report) = engine.all_settled(&plan, &mut facts)? {
                return Ok(report);
            }
        }
        engine.run(&mut journal, plan, standing.facts)
    })();
    journal.close()?;
    result
}

/// Takes the volume away from one place; none when it is not there, and so was nothing to do. The place is removed.
pub fn unpublish(
    engine: &Engine<'_>,
    run_dir: &Path,
    volume: &VolumeId,
    target: &TargetPath,
) -> Result<Option<RunReport>> {
    let mut journal = open(engine, run_dir, volume)?;
    let result = (|| {
        let is_gone = |run: &Run| {
            run.plan.operation == Operation::Detach
                && run.plan.tasks.iter().zip(&run.states).any(|(task, state)| {
                    matches!(&task.step, Step::Bind(b) if b.target == *target)
                        && matches!(state, TaskState::Settled(_))
                })
        };
        if let Some(run) = journal.open_run().filter(|run| is_gone(run)) {
            // The rest of that detach may wait for others that hold the device.
            if run.states.iter().all(|state| matches!(state, TaskState::Settled(_))) {
                journal.end(End::Done)?;
            }
            return Ok(None);
        }
        // To undo what was cut short may mean to wait for the device. Taking a place away never does.
        if journal.open_run().is_some() {
            revive(engine, volume)?;
        }
        let clears = journal.open_run().is_some_and(|run| run.plan.operation == Operation::Clear);
        if clears && engine.host.device(volume).map_err(|e| e.on(volume))?.life == Life::Dead {
            // It ends when nobody holds the failed device any more, which whoever leaves does not wait for. The next
            // command that needs the device begins anew with it.
            journal.end(End::Abandoned)?;
        } else {
            engine.settle(&mut journal, None)?;
        }
        let standing = journal.standing();
        // One that is awaited would come back otherwise.
        let bind = standing.all_places().find(|p| matches!(p, Step::Bind(b) if b.target == *target));
        let Some(bind) = bind.cloned() else {
            if let Some(other) = standing.all_places().find(|p| place(p) == Some(target)) {
                return Err(Error::refused(format!(
                    "at {target} it is staged, not published ({})",
                    other.name()
                ))
                .on(volume)
                .hint("unstage it there"));
            }
            return Ok(None);
        };
        let tasks = vec![Task::undo(bind)];
        let plan = Plan { operation: Operation::Unpublish, volume: volume.clone(), tasks };
        engine.run(&mut journal, plan, standing.facts).map(Some)
    })();
    journal.close()?;
    result
}
