//! fsck: attaches a volume without mounting it, checks it, and detaches it again.

use super::*;

/// What to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsckSpec {
    /// How to reach the volume; target and options of it are not used.
    pub attach: AttachSpec,
    /// Write repairs.
    pub repair: bool,
    /// Read the data, too.
    pub read_data: Option<Slice>,
}

impl FsckSpec {
    /// The plan. Pure.
    pub fn plan(&self) -> Plan {
        let mut spec = self.attach.clone();
        spec.read_only = !self.repair;
        spec.block = false;
        let mut tasks = attach::prepare(&spec);
        let down = attach::takedown(&tasks);
        for task in &mut tasks {
            if let Step::Claim(claim) = &mut task.step {
                claim.must_exist = true;
            }
        }
        tasks.push(Task::apply(step::ProbeSignature {}.into()));
        tasks.push(Task::apply(step::Check { repair: self.repair }.into()));
        if let Some(slice) = self.read_data {
            tasks.push(Task::apply(step::ReadData { slice }.into()));
        }
        tasks.extend(down);
        Plan { operation: Operation::Fsck, volume: self.attach.volume.clone(), tasks }
    }
}

/// The dry run of a check.
pub fn preview(
    host: &dyn crate::host::Observe,
    run_dir: &Path,
    spec: &FsckSpec,
) -> Result<Vec<crate::run::Preview>> {
    let volume = &spec.attach.volume;
    require_detached(&Standing::of(&Journal::peek(run_dir, volume)?.unwrap_or_default()), volume)?;
    crate::run::preview(host, &spec.plan(), Facts::default())
}

fn require_detached(standing: &Standing, volume: &VolumeId) -> Result<()> {
    if standing.claimed {
        return Err(Error::new(Kind::Busy, "it is attached on this node")
            .on(volume)
            .hint(format!("a check needs it detached: zerofsctl detach {volume}")));
    }
    Ok(())
}

/// Checks a volume that is not attached.
pub fn fsck(engine: &Engine<'_>, run_dir: &Path, spec: &FsckSpec) -> Result<RunReport> {
    let volume = &spec.attach.volume;
    let mut journal = open(engine, run_dir, volume)?;
    let result = (|| {
        revive(engine, volume)?;
        engine.settle(&mut journal, None)?;
        require_detached(&journal.standing(), volume)?;
        engine.run(&mut journal, spec.plan(), Facts::default())
    })();
    journal.close()?;
    result
}
