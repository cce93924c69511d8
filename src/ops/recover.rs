//! recover: settles what killed runs and killed keepers left, and nothing else.

use super::*;
use crate::host::StopOptions;

/// What was settled.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Recovered {
    /// In words; empty when there was nothing to do.
    pub what: Vec<String>,
    /// Whether the volume is attached now.
    pub attached: bool,
}

/// Settles one volume: an open run is finished or undone; a device that waits for a keeper gets the next one; one that gives
/// errors is taken down and, since it was wanted, attached again at the same places.
pub fn recover(engine: &Engine<'_>, run_dir: &Path, volume: &VolumeId) -> Result<Recovered> {
    let mut journal = open(engine, run_dir, volume)?;
    let result = settle_all(engine, &mut journal, volume);
    journal.close()?;
    result
}

/// The same, under a lock that is held already.
pub(super) fn settle_all(engine: &Engine<'_>, journal: &mut Journal, volume: &VolumeId) -> Result<Recovered> {
    let mut what = Vec::new();
    if revive(engine, volume)? {
        what.push("started the next keeper, which took over the waiting device".into());
    }
    // A resize needs a living volume: it is finished last.
    let resize = journal.open_run().and_then(resize_to);
    if resize.is_some() {
        journal.end(crate::journal::End::Abandoned)?;
    }
    let name = journal.open_run().map(|r| r.plan.operation.name());
    match (engine.settle(journal, None)?, name) {
        (Settlement::Finish, Some(name)) => {
            what.push(format!("finished an earlier {name} that was cut short"))
        }
        (Settlement::Unwind, Some(name)) => what.push(format!("undid an earlier {name} that was cut short")),
        _ => {}
    }
    if clear_wreck(engine, journal, volume)? || clear_harmed(engine, journal, volume)? {
        what.push("took down a device that had given errors".into());
    }
    if bring_back(engine, journal, volume)? {
        what.push("attached it again".into());
    }
    if let (Some(size), true) = (resize, journal.standing().connect.is_some()) {
        let standing = journal.standing();
        let plan = super::resize::plan(volume, &standing, size)?;
        engine.run(journal, plan, standing.facts)?;
        what.push("finished a resize that was cut short".into());
    }
    Ok(Recovered { what, attached: journal.standing().connect.is_some() })
}

/// Attaches again, at all its places, what was taken down in order to be brought back, or lost its keeper. True when there
/// was such a thing. No run is open.
pub(super) fn bring_back(engine: &Engine<'_>, journal: &mut Journal, volume: &VolumeId) -> Result<bool> {
    let standing = journal.standing();
    let Some(claim) = standing.claim.clone() else { return Ok(false) };
    let wanted = standing.awaited.as_ref().map(|a| a.connect.clone());
    let Some(connect) = standing.connect.clone().or_else(|| wanted.clone()) else { return Ok(false) };
    if wanted.is_none() && !matches!(engine.host.keeper(volume)?, KeeperView::Dead { .. }) {
        return Ok(false);
    }
    if !is_ours(engine, volume, &standing)? {
        engine.observer.note("somebody else has had the volume since: what is left of it here is taken down");
        let plan = super::detach::plan(volume, &standing, &Scope::Volume, StopOptions::default())?;
        engine.run(journal, plan, standing.facts)?;
        return Ok(false);
    }
    let plan = again_plan(volume, &standing, claim, connect);
    engine.run(journal, plan, standing.facts.carried())?;
    Ok(true)
}

/// The size that an open resize was after.
fn resize_to(run: &crate::journal::Run) -> Option<ByteSize> {
    if run.plan.operation != Operation::Resize {
        return None;
    }
    run.plan.tasks.iter().find_map(|t| match &t.step {
        Step::GrowDisk(g) => Some(g.size),
        _ => None,
    })
}

/// The attach that the journal remembers, with all its places.
fn again_plan(volume: &VolumeId, standing: &Standing, claim: step::Claim, connect: step::Connect) -> Plan {
    let awaited = standing.awaited.as_ref();
    let start = awaited
        .and_then(|a| a.start.clone())
        .or_else(|| standing.start.clone())
        .unwrap_or(step::Start { options: Default::default(), stop: Default::default() });
    // Where this fails, the claim stays, and the next one goes on.
    let start = step::Start { stop: StopOptions { may_leave_log: true, ..start.stop }, ..start };
    let read_only = connect.read_only;
    // Size and filesystem are recorded by now.
    // And leave to take it over was given for one attach.
    let claim = step::Claim { size: None, fs: None, must_exist: true, take_over: false, ..claim };
    let mut steps: Vec<Step> = vec![
        claim.into(),
        step::WriteConfig {}.into(),
        start.into(),
        step::CreateDisk {}.into(),
        step::Replay {}.into(),
        connect.into(),
    ];
    if standing.all_places().any(|p| matches!(p, Step::Mount(_))) {
        steps.push(step::ProbeSignature {}.into());
        steps.push(step::Format { read_only }.into());
        steps.push(step::Preen { read_only }.into());
    }
    steps.extend(standing.all_places().cloned());
    Plan {
        operation: Operation::Attach,
        volume: volume.clone(),
        tasks: steps.into_iter().map(Task::apply).collect(),
    }
}
