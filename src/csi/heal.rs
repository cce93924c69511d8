//! What the driver does unasked: at its start it settles what an earlier one was at, and from then on it looks after
//! the volumes of this node, and brings back those whose keeper was killed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::condition::Look;
use super::metrics::{Seen, TOTAL};
use super::{Driver, Need, Refusal, Rpc, condition};
use crate::error::{Kind, Result};
use crate::host::nbd::owners::RunDir;
use crate::host::nbd::survey::{self, Roots, Scope};
use crate::journal::{self, Journal};
use crate::keeper::{self, process::Identity};
use crate::ops::recover::{Recovered, recover};
use crate::plan::Operation;
use crate::values::VolumeId;

/// How often the volumes are looked at.
const PERIOD: Duration = Duration::from_secs(10);

/// The NBD devices are judged at the start and then in each of so many rounds: it means a look at every process.
const JUDGED: u32 = 6;

/// How long all keepers together may take to answer then.
const ANSWERS: Duration = Duration::from_millis(500);

/// Settles everything that is on this node, each volume by itself. Calls on a volume meanwhile are told to wait.
pub async fn settle_all(driver: &Arc<Driver>) {
    let volumes = match journal::volumes(&driver.config.run_dir) {
        Ok(volumes) => volumes,
        Err(e) => {
            tracing::error!("cannot tell what is on this node: {e}");
            return;
        }
    };
    let count = volumes.len();
    let mut tasks = tokio::task::JoinSet::new();
    for volume in volumes {
        let driver = driver.clone();
        tasks.spawn(async move {
            let (looker, looked_at) = (driver.clone(), volume.clone());
            match tokio::task::spawn_blocking(move || is_in_order(&looker, &looked_at)).await {
                // Most are: their calls need not wait.
                Ok(true) => Some(false),
                _ => settle(&driver, volume).await,
            }
        });
    }
    let (mut settled, mut failed) = (0, 0);
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(Some(true)) => settled += 1,
            Ok(Some(false)) => {}
            Ok(None) | Err(_) => failed += 1,
        }
    }
    tracing::info!(
        "{count} volumes were on this node: {settled} needed settling, {failed} could not be settled"
    );
}

/// Whether nothing was cut short, and the keeper of what is attached is there.
fn is_in_order(driver: &Driver, volume: &VolumeId) -> bool {
    let run_dir = &driver.config.run_dir;
    let Ok(Some(runs)) = Journal::peek(run_dir, volume) else { return false };
    let ended = runs.last().is_some_and(|r| r.end.is_some());
    let look = condition::look(run_dir, volume);
    ended && look.is_ok_and(|l| l.is_some_and(|l| l.status.is_some() && !is_broken(&l)))
}

/// Whether it needs to be brought back. A device that waits is for the watcher, who starts the next keeper at once.
fn is_broken(look: &Look) -> bool {
    let failed = look.status.as_ref().and_then(|s| s.nbd.as_ref()).is_some_and(|n| n.failed.is_some());
    look.standing.awaited.is_some() || failed || look.status.is_none()
}

/// Settles one volume; whether there was something to do, none when it failed.
async fn settle(driver: &Arc<Driver>, volume: VolumeId) -> Option<bool> {
    let begun = std::time::Instant::now();
    let request = driver.number();
    let job = super::Job { rpc: Rpc::Recovery, volume: volume.clone(), request };
    let worker = driver.clone();
    let work = move || -> Result<Recovered, Refusal> {
        reap(&worker, &job.volume);
        let run_dir = &worker.config.run_dir;
        Ok(worker.with_engine(&job, Need::Reopen, |engine, _| recover(engine, run_dir, &job.volume))?)
    };
    let result = driver.flights.fly(Rpc::Recovery, &volume, Vec::new(), work).await;
    driver.metrics.observe(Rpc::Recovery, TOTAL, begun.elapsed());
    match result {
        Ok(recovered) => {
            if !recovered.what.is_empty() {
                driver.metrics.recovered();
                tracing::info!(%volume, request, attached = recovered.attached, "settled: {}", recovered.what.join(", "));
            }
            Some(!recovered.what.is_empty())
        }
        // Somebody is at work on it, who settles it as well. In a step, it is the device that somebody holds.
        Err(refusal) if refusal.error().kind() == Kind::Busy && refusal.error().step().is_none() => {
            Some(false)
        }
        Err(refusal) => {
            driver.metrics.failed(Rpc::Recovery, TOTAL);
            tracing::error!(%volume, request, "cannot be settled: {}", refusal.status().message());
            None
        }
    }
}

/// A keeper that this driver started is its child, and when it was killed somebody must ask how it ended.
fn reap(driver: &Driver, volume: &VolumeId) {
    let file = journal::volume_folder(&driver.config.run_dir, volume).join(keeper::PID_FILE);
    if let Some(keeper) = Identity::read(&file).filter(|keeper| !keeper.is_alive()) {
        let pid = nix::unistd::Pid::from_raw(keeper.pid);
        let _ = nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
    }
}

/// Looks after the volumes until it is dropped.
pub async fn watch(driver: Arc<Driver>) {
    let mut failed: BTreeMap<VolumeId, u32> = BTreeMap::new();
    let mut waited = BTreeSet::new();
    for round in 0u32.. {
        if round % JUDGED == 0 {
            let looker = driver.clone();
            let _ = tokio::task::spawn_blocking(move || judge_devices(&looker)).await;
        }
        tokio::time::sleep(PERIOD).await;
        if driver.is_stopping() {
            return;
        }
        let looker = driver.clone();
        let Ok((mut broken, waiting)) = tokio::task::spawn_blocking(move || look_at_all(&looker)).await
        else {
            continue;
        };
        // The watcher had its time.
        broken.extend(waiting.intersection(&waited).cloned());
        waited = waiting;
        failed.retain(|volume, _| broken.contains(volume));
        for volume in broken {
            // One that cannot be brought back is tried again, ever more seldom.
            let tries = failed.entry(volume.clone()).or_default();
            *tries += 1;
            if !tries.is_power_of_two() {
                continue;
            }
            if settle(&driver, volume.clone()).await.is_some() {
                failed.remove(&volume);
            }
        }
    }
}

/// Judges the NBD devices of this machine, whoever connected them.
fn judge_devices(driver: &Driver) {
    let owners = RunDir::new(&driver.config.run_dir, ANSWERS);
    match survey::take(&Roots::default(), &owners, Scope::default()) {
        Ok(found) => driver.metrics.nbd_devices(found.devices.iter().filter_map(|d| d.verdict)),
        Err(e) => tracing::warn!("cannot judge the NBD devices: {e}"),
    }
}

/// Counts what the keepers say; the volumes that need to be brought back, and those whose device waits for a keeper.
fn look_at_all(driver: &Driver) -> (BTreeSet<VolumeId>, BTreeSet<VolumeId>) {
    let run_dir = &driver.config.run_dir;
    let (mut seen, mut broken, mut waiting) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let (mut attached, mut unwell) = (BTreeSet::new(), 0);
    for volume in journal::volumes(run_dir).unwrap_or_default() {
        // Between two steps of an operation, what is found is no state to act on. The clear-up of a failed device stays open
        // while somebody holds that.
        let open = Journal::peek(run_dir, &volume).ok().flatten().is_some_and(|runs| {
            runs.last().is_some_and(|r| r.end.is_none() && r.plan.operation != Operation::Clear)
        });
        let Ok(Some(found)) = condition::look(run_dir, &volume) else { continue };
        attached.insert(volume.to_string());
        unwell += usize::from(found.condition().abnormal);
        if is_broken(&found) && !open && journal::holder(run_dir, &volume).is_none() {
            let set = if found.waits { &mut waiting } else { &mut broken };
            set.insert(volume.clone());
        }
        if let Some(status) = found.status {
            let now = Seen {
                restarts: status.restarts,
                reconnects: status.stats.stalls,
                handed_over: status.nbd.as_ref().map_or(0, |n| n.reconnects),
                stalled: status.stats.stall_seconds,
            };
            seen.insert(volume.to_string(), now);
        }
    }
    driver.metrics.looked(seen, &attached, unwell);
    (broken, waiting)
}
