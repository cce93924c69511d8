//! detach: the plan of attach backwards. What fails is an error, and whatever was not taken down stays.

use super::*;
use crate::host::StopOptions;

/// How much to take away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All mounts, the device, ZeroFS, the claim.
    Volume,
    /// One target; everything, when it is the last.
    Target(TargetPath),
}

/// The plan, from what stands. Pure.
pub fn plan(volume: &VolumeId, standing: &Standing, scope: &Scope, stop: StopOptions) -> Result<Plan> {
    let mut tasks: Vec<Task> = Vec::new();
    let all = match scope {
        Scope::Volume => true,
        Scope::Target(target) => {
            if !standing.all_places().any(|p| place(p) == Some(target)) {
                return Err(Error::new(Kind::NotFound, format!("it is not attached at {target}"))
                    .on(volume)
                    .hint(format!("see where it is: zerofsctl show {volume}")));
            }
            let shows = |p: &Step| matches!(p, Step::Bind(bind) if bind.source.as_ref() == Some(target));
            if let Some(bind) = standing.all_places().find(|p| shows(p)).and_then(place) {
                return Err(Error::new(Kind::Busy, format!("it is published from {target} at {bind}"))
                    .on(volume)
                    .hint(format!("take it away there first: zerofsctl detach {bind}; or everything: zerofsctl detach {volume}")));
            }
            standing.all_places().count() == 1
        }
    };
    for step in standing.all_places().rev() {
        if all || matches!(scope, Scope::Target(t) if place(step) == Some(t)) {
            tasks.push(Task::undo(step.clone()));
        }
    }
    if all {
        if let Some(connect) = standing.connect.as_ref().or(standing.awaited.as_ref().map(|a| &a.connect)) {
            tasks.push(Task::undo(connect.clone().into()));
        }
        let options = standing.start.as_ref().map(|s| s.options.clone()).unwrap_or_default();
        tasks.push(Task::undo(step::Start { options, stop }.into()));
        tasks.push(Task::undo(step::WriteConfig {}.into()));
        if let Some(claim) = &standing.claim {
            tasks.push(Task::undo(claim.clone().into()));
        }
    }
    Ok(Plan { operation: Operation::Detach, volume: volume.clone(), tasks })
}

/// Detaches. None when nothing of the volume is on this node.
pub fn detach(
    engine: &Engine<'_>,
    run_dir: &Path,
    volume: &VolumeId,
    scope: &Scope,
    stop: StopOptions,
) -> Result<Option<RunReport>> {
    let mut journal = open(engine, run_dir, volume)?;
    let wanted = Plan { operation: Operation::Detach, volume: volume.clone(), tasks: vec![] };
    let result = (|| {
        // An unmount from a device that waits would wait, too. Without a server there is no next keeper: then the steps
        // find out how long they may take, and --force what they may give up.
        if let Err(e) = revive(engine, volume) {
            engine.observer.note(&format!("the next keeper cannot serve its device ({e})"));
        }
        // An earlier detach of everything that was cut short, wanted again: this one's own stop options
        // count, so it starts afresh from what stands.
        let open_detach = journal.open_run().is_some_and(|r| r.plan.operation == Operation::Detach);
        if open_detach && *scope == Scope::Volume {
            journal.end(crate::journal::End::Abandoned)?;
        }
        engine.settle(&mut journal, Some(&wanted))?;
        let standing = journal.standing();
        if !standing.claimed {
            return Ok(None);
        }
        let plan = plan(volume, &standing, scope, stop)?;
        engine.run(&mut journal, plan, standing.facts).map(Some)
    })();
    journal.close()?;
    result
}

/// The dry run of a detach; none when nothing of the volume is on this node.
pub fn preview(
    host: &dyn crate::host::Observe,
    run_dir: &Path,
    volume: &VolumeId,
    scope: &Scope,
    stop: StopOptions,
) -> Result<Option<Vec<crate::run::Preview>>> {
    let standing = Standing::of(&Journal::peek(run_dir, volume)?.unwrap_or_default());
    if !standing.claimed {
        return Ok(None);
    }
    let plan = plan(volume, &standing, scope, stop)?;
    crate::run::preview(host, &plan, standing.facts).map(Some)
}
