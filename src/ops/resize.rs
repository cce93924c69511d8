//! resize: grows disk, device and filesystem; online when the volume is attached, and otherwise by attaching it
//! for a moment at a place of its own. It never shrinks.

use super::*;
use crate::host::Observe;

/// The plan for an attached volume. Pure.
pub fn plan(volume: &VolumeId, standing: &Standing, size: ByteSize) -> Result<Plan> {
    if standing.connect.as_ref().is_some_and(|c| c.read_only) {
        return Err(Error::refused("it is attached read-only")
            .on(volume)
            .hint(format!("attach it read-write, then resize it: zerofsctl detach {volume}")));
    }
    let mut tasks =
        vec![Task::apply(step::GrowDisk { size }.into()), Task::apply(step::GrowDevice { size }.into())];
    if let Some(target) = mounted_at(standing) {
        tasks.push(Task::apply(step::GrowFilesystem { target }.into()));
    }
    Ok(Plan { operation: Operation::Resize, volume: volume.clone(), tasks })
}

fn mounted_at(standing: &Standing) -> Option<TargetPath> {
    standing.places.iter().find_map(|p| match p {
        Step::Mount(m) => Some(m.target.clone()),
        _ => None,
    })
}

/// The plan for a volume that is not attached; the spec's target is the place of its own. Pure.
pub fn detached_plan(spec: &AttachSpec, size: ByteSize) -> Plan {
    let mut tasks = attach::prepare(&AttachSpec { size: None, fs: None, read_only: false, ..spec.clone() });
    let down: Vec<Task> = attach::takedown(&tasks);
    for task in &mut tasks {
        if let Step::Claim(claim) = &mut task.step {
            claim.must_exist = true;
        }
    }
    // Before the device is made, so that it has the new size from the start.
    let connect = tasks.iter().position(|t| matches!(t.step, Step::Connect(_))).unwrap_or(tasks.len());
    tasks.insert(connect, Task::apply(step::GrowDisk { size }.into()));
    let mount: Step = step::Mount { target: spec.target.clone(), options: vec![], read_only: false }.into();
    tasks.extend(
        [
            step::ProbeSignature {}.into(),
            step::Format { read_only: true }.into(),
            step::Preen { read_only: false }.into(),
            step::GrowUnmounted {}.into(),
            mount.clone(),
            step::GrowFilesystem { target: spec.target.clone() }.into(),
        ]
        .map(Task::apply),
    );
    tasks.push(Task::undo(mount));
    tasks.extend(down);
    Plan { operation: Operation::ResizeDetached, volume: spec.volume.clone(), tasks }
}

/// Refuses, before anything grows, what would fail half-way.
fn check(host: &dyn Observe, standing: &Standing) -> Result<()> {
    match (mounted_at(standing), standing.facts.fs) {
        (Some(_), Some(fs)) => host.can_grow_mounted(fs),
        _ => Ok(()),
    }
}

/// Grows a volume. The spec says how to reach it when it is not attached.
pub fn resize(engine: &Engine<'_>, run_dir: &Path, spec: &AttachSpec, size: ByteSize) -> Result<RunReport> {
    let volume = &spec.volume;
    let mut journal = open(engine, run_dir, volume)?;
    let result = (|| {
        let detached = detached_plan(spec, size);
        // On a device whose keeper was killed nothing can grow: it is brought back first.
        revive(engine, volume)?;
        let dead = engine.host.device(volume).map_err(|e| e.on(volume))?.life == Life::Dead;
        let gone = matches!(engine.host.keeper(volume).map_err(|e| e.on(volume))?, KeeperView::Dead { .. });
        if (gone || dead) && journal.standing().connect.is_some() {
            super::recover::settle_all(engine, &mut journal, volume)?;
        }
        // What was cut short is settled first; then this one sees what stands.
        let open = journal.open_run().map(|r| r.plan.operation);
        if open.is_some_and(|o| o != Operation::Resize)
            && engine.settle(&mut journal, Some(&detached))? == Settlement::Resume
        {
            return engine.run(&mut journal, detached, Facts::default());
        }
        // A healing that was cut short took itself back, and is no reason to think that nobody wants the volume here.
        if journal.open_run().is_none() {
            super::recover::bring_back(engine, &mut journal, volume)?;
        }
        let standing = journal.standing();
        if standing.connect.is_none() {
            return engine.run(&mut journal, detached, Facts::default());
        }
        let plan = plan(volume, &standing, size)?;
        if journal.open_run().is_none()
            && let Some(report) = engine.all_settled(&plan, &mut standing.facts.clone())?
        {
            return Ok(report);
        }
        check(engine.host, &standing).map_err(|e| e.on(volume))?;
        engine.run(&mut journal, plan, standing.facts)
    })();
    journal.close()?;
    result
}

/// The dry run of a resize.
pub fn preview(
    host: &dyn Observe,
    run_dir: &Path,
    spec: &AttachSpec,
    size: ByteSize,
) -> Result<Vec<crate::run::Preview>> {
    let standing = Standing::of(&Journal::peek(run_dir, &spec.volume)?.unwrap_or_default());
    if standing.connect.is_none() {
        return crate::run::preview(host, &detached_plan(spec, size), Facts::default());
    }
    let plan = plan(&spec.volume, &standing, size)?;
    check(host, &standing).map_err(|e| e.on(&spec.volume))?;
    crate::run::preview(host, &plan, standing.facts)
}
