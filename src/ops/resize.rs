//! resize: grows disk, device and filesystem, online. It never shrinks.

use super::*;

/// The plan. Pure.
pub fn plan(volume: &VolumeId, standing: &Standing, size: ByteSize) -> Result<Plan> {
    require_attached(standing, volume)?;
    if standing.connect.as_ref().is_some_and(|c| c.read_only) {
        return Err(Error::refused("it is attached read-only")
            .on(volume)
            .hint(format!("attach it read-write, then resize it: zerofsctl detach {volume}")));
    }
    let mut tasks =
        vec![Task::apply(step::GrowDisk { size }.into()), Task::apply(step::GrowDevice { size }.into())];
    let mounted = standing.places.iter().find_map(|p| match p {
        Step::Mount(m) => Some(m.target.clone()),
        _ => None,
    });
    if let Some(target) = mounted {
        tasks.push(Task::apply(step::GrowFilesystem { target }.into()));
    }
    Ok(Plan { operation: Operation::Resize, volume: volume.clone(), tasks })
}

/// Grows an attached volume.
pub fn resize(engine: &Engine<'_>, run_dir: &Path, volume: &VolumeId, size: ByteSize) -> Result<RunReport> {
    let mut journal = Journal::open(run_dir, volume)?;
    let result = (|| {
        // An attach or detach that was cut short is settled first; then this one sees what stands.
        if journal.open_run().is_some_and(|r| r.plan.operation != Operation::Resize) {
            engine.settle(&mut journal, None)?;
        }
        let standing = journal.standing();
        let plan = plan(volume, &standing, size)?;
        engine.run(&mut journal, plan, standing.facts)
    })();
    journal.close()?;
    result
}

/// The dry run of a resize.
pub fn preview(
    host: &dyn crate::host::Observe,
    run_dir: &Path,
    volume: &VolumeId,
    size: ByteSize,
) -> Result<Vec<crate::run::Preview>> {
    let standing = Standing::of(&Journal::peek(run_dir, volume)?.unwrap_or_default());
    let plan = plan(volume, &standing, size)?;
    crate::run::preview(host, &plan, standing.facts)
}
