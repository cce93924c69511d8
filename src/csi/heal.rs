//! What the driver does unasked: at its start it settles what an earlier one was at, and from then on it looks after
//! the volumes of this node, and brings back those whose keeper was killed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::metrics::{Seen, TOTAL};
use super::{Driver, Need, Refusal, Rpc, condition};
use crate::error::{Kind, Result};
use crate::journal::{self, Journal};
use crate::keeper::{self, process::Identity};
use crate::ops::recover::{Recovered, recover};
use crate::values::VolumeId;

/// How often the volumes are looked at.
const PERIOD: Duration = Duration::from_secs(10);

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
    ended && condition::look(run_dir, volume).is_ok_and(|l| l.is_some_and(|l| l.status.is_some()))
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
        // Somebody is at work on it, who settles it as well.
        Err(refusal) if refusal.error().kind() == Kind::Busy => Some(false),
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
    loop {
        tokio::time::sleep(PERIOD).await;
        if driver.is_stopping() {
            return;
        }
        let looker = driver.clone();
        let Ok(broken) = tokio::task::spawn_blocking(move || look_at_all(&looker)).await else { continue };
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

/// Counts what the keepers say; the volumes whose keeper is gone.
fn look_at_all(driver: &Driver) -> BTreeSet<VolumeId> {
    let run_dir = &driver.config.run_dir;
    let (mut seen, mut broken, mut attached, mut unwell) = (BTreeMap::new(), BTreeSet::new(), 0, 0);
    for volume in journal::volumes(run_dir).unwrap_or_default() {
        // Between two steps of an operation, what is found is no state to act on.
        let open = Journal::peek(run_dir, &volume)
            .ok()
            .flatten()
            .is_some_and(|runs| runs.last().is_some_and(|r| r.end.is_none()));
        let Ok(Some(found)) = condition::look(run_dir, &volume) else { continue };
        attached += 1;
        match found.status {
            Some(status) => {
                let stats = &status.stats;
                let now = Seen {
                    restarts: status.restarts,
                    reconnects: stats.stalls,
                    stalled: stats.stall_seconds,
                };
                seen.insert(volume.to_string(), now);
                unwell += usize::from(condition::of_keeper(Some(&status)).abnormal);
            }
            None => {
                unwell += 1;
                if !open && journal::holder(run_dir, &volume).is_none() {
                    broken.insert(volume);
                }
            }
        }
    }
    driver.metrics.looked(seen, attached, unwell);
    broken
}
