//! The end of a keeper and its ZeroFS: what was acknowledged is made durable first, or waits for the next attach here.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{DYING, LinuxHost, START_LIMIT, remove};
use crate::atomic_file::replace;
use crate::catalog::{Relation, VolumeRecord};
use crate::error::{Doing, Error, Kind, Result};
use crate::host::{KeeperOptions, KeeperView, Observe, StopOptions};
use crate::keeper;
use crate::keeper::control::{self, State, Status, Stopped};
use crate::keeper::log::{self, Peeked};
use crate::keeper::path::LogState;
use crate::keeper::process::{Process, beside};
use crate::values::{ByteSize, VolumeId};

/// How long the replay of an earlier keeper's log may take.
pub(super) const REPLAY_LIMIT: Duration = Duration::from_secs(600);

/// How long a killed ZeroFS may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How long something that usually may take so long may take before this stop.
fn limit(stop: &StopOptions, usual: Duration) -> Duration {
    if stop.force { usual.min(stop.timeout) } else { usual }
}

/// The name of what [`Held`] is written to.
pub(super) const HELD: &str = "replay-held.json";

/// Beside a replay log that was left when the volume was let go: whose it is, and up to which attach epoch nobody but this
/// node had the volume since.
#[derive(Debug, Serialize, Deserialize)]
struct Held {
    epoch: u64,
    /// Of the volume's record: another volume of this name, in whatever store, was made at another instant.
    created: Timestamp,
}

impl Held {
    fn is_of(&self, record: &VolumeRecord) -> bool {
        self.created == record.created
    }
}

/// Up to which epoch nobody else had the volume, since a log of this epoch was written here.
fn last(held: Option<&Held>, epoch: u64) -> u64 {
    held.map_or(epoch, |held| held.epoch.max(epoch))
}

/// What is to become of what an earlier keeper left.
enum Settled {
    /// The next one brings it in.
    ByServing,
    /// It is of an attach before ours, and waits on for the next one that gets as far as its replay.
    BeforeUs,
    /// Somebody else has had the volume since.
    Void,
}

/// What always brings in what waits in the log.
fn with_its_log(volume: &VolumeId) -> String {
    format!(
        "let it go with its log (zerofsctl detach {volume} --force), then attach it on this node, before any other does: that brings them in"
    )
}

/// The error of a volume that is not let go, as so many writes could be lost.
fn would_lose(volume: &VolumeId, entries: u64, why: &str) -> Error {
    Error::refused(format!("{entries} acknowledged writes wait in its replay log, {why}"))
        .hint(with_its_log(volume))
}

/// The error of a ZeroFS that does not come up for what waits.
fn not_served(volume: &VolumeId, entries: u64, e: Error) -> Error {
    if entries == 0 {
        return e;
    }
    let message =
        format!("{entries} acknowledged writes wait in its replay log for a ZeroFS: {}", e.message());
    let hint = e.hint_text().map(|hint| format!("{hint}; or ")).unwrap_or_default();
    Error::new(e.kind(), message).hint(hint + &with_its_log(volume))
}

/// Whether the keeper has found a log of this attach, and the volume still is ours. One of an attach before is left as it is.
fn is_own(status: &Status) -> bool {
    status.state != State::Fenced
        && matches!(&status.log, LogState::LeftBehind { epoch, .. } if *epoch == status.epoch)
}

impl LinuxHost {
    /// See [`Host::stop_keeper`](crate::host::Host::stop_keeper).
    pub(super) fn stop_and_settle(&self, volume: &VolumeId, options: &StopOptions) -> Result<()> {
        // What is undone may be an earlier command's step, which knows nothing of what this one was told.
        // Nor does a command that only finishes an earlier one take its force for granted.
        let how = self.stop.unwrap_or(StopOptions { force: false, ..*options });
        let options = StopOptions { may_leave_log: options.may_leave_log, ..how };
        let settled = match self.keeper(volume)? {
            KeeperView::Dead { orphan: false, left_behind: 0 } => return self.clean_run_folder(volume),
            KeeperView::Dead { left_behind, .. } => match self.may_serve_again(volume, left_behind) {
                Ok(Settled::ByServing) => self.serve_again(volume, left_behind, &options),
                Ok(Settled::BeforeUs) => {
                    self.end_orphans(volume)?;
                    return self.clean_run_folder(volume);
                }
                Ok(Settled::Void) => return self.give_up(volume, left_behind),
                Err(e) => Err(e),
            },
            KeeperView::Alive { left_behind, .. } if left_behind > 0 && !options.may_leave_log => {
                let status = self.client(volume)?.status()?;
                if status.state == State::Failed && is_own(&status) {
                    // It is there only to say why, and what it could not do may work by now.
                    self.stop_within(volume, options.timeout, false)?;
                    return self.stop_and_settle(volume, &options);
                }
                if is_own(&status) { self.settle_log(volume, left_behind, &options) } else { Ok(()) }
            }
            KeeperView::Alive { .. } => Ok(()),
        };
        let mut forced = false;
        let mut by_force = |e: Error| {
            forced = true;
            self.stop_by_force(volume, &options, &e)
        };
        let stopped = match settled {
            Ok(()) => match self.stop_within(volume, options.timeout, false) {
                // Force is the last resort, not the first.
                Err(e) if options.force && matches!(e.kind(), Kind::Interrupted | Kind::Unreachable) => {
                    by_force(e)?
                }
                other => other?,
            },
            Err(e) if options.force => by_force(e)?,
            Err(e) => return Err(e),
        };
        for warning in &stopped.warnings {
            tracing::warn!(%volume, "{warning}");
        }
        if stopped.kept_entries > 0 {
            tracing::warn!(
                %volume,
                "{} acknowledged writes ({}) had not been flushed; they wait in this node's replay log for the next \
                 attach here, and an attach on another node loses them",
                stopped.kept_entries,
                ByteSize(stopped.kept_bytes)
            );
        }
        if forced {
            // With a store that is away it ends here, after all: the volume could not be released, and once the store is back, a
            // detach without force still brings in what waits in the log.
            self.fetch(volume)?;
        }
        self.clean_run_folder(volume)
    }

    /// Whether a ZeroFS may be started for what an earlier keeper left. With ZeroFS the newcomer wins: one that is started
    /// here after somebody else took the volume would cut off that one, and write old data over new.
    fn may_serve_again(&self, volume: &VolumeId, left_behind: u64) -> Result<Settled> {
        let record = self.fetch(volume)?.map(|(record, _)| record);
        let log = match self.peek_log(volume)? {
            Peeked::Left { epoch, .. } => Some(epoch),
            Peeked::Nothing | Peeked::Void { .. } | Peeked::Damaged { .. } => None,
        };
        if let Some(record) = &record
            && record.owner.as_ref().is_some_and(|owner| owner.relation(&self.owner) == Relation::Us)
        {
            // The first thing of a replay is that the log gets the epoch of its attach.
            let foreign = self.held(volume)?.is_some_and(|held| !held.is_of(record));
            let before = log.is_some_and(|epoch| foreign || epoch < record.epoch);
            return Ok(if before { Settled::BeforeUs } else { Settled::ByServing });
        }
        match (record, log) {
            (Some(record), Some(epoch))
                if record.epoch
                    > last(self.held(volume)?.filter(|held| held.is_of(&record)).as_ref(), epoch) =>
            {
                Ok(Settled::Void)
            }
            _ if left_behind == 0 => Ok(Settled::Void),
            _ => Err(would_lose(volume, left_behind, "and the volume is not ours in the catalog")),
        }
    }

    /// Ends what still runs here for a volume that somebody else has taken since; whatever was not flushed by then is void.
    fn give_up(&self, volume: &VolumeId, left_behind: u64) -> Result<()> {
        self.end_orphans(volume)?;
        if left_behind > 0 {
            tracing::warn!(
                %volume,
                "the volume was attached elsewhere since: {left_behind} acknowledged writes that had not been flushed before are void"
            );
            let log = self.dirs.volume_run(volume).join(log::FILE_NAME);
            remove(std::fs::remove_file(&log), &log)?;
        }
        self.clean_run_folder(volume)
    }

    /// Kills every ZeroFS of the volume that no keeper looks after.
    fn end_orphans(&self, volume: &VolumeId) -> Result<()> {
        for identity in keeper::find_zerofs(&self.dirs.volume_run(volume)) {
            let Some(process) = Process::open(&identity)? else { continue };
            if process.kill(KILL_LIMIT)?.is_none() {
                return Err(Error::failed(format!("the killed ZeroFS ({identity}) does not end"))
                    .hint("it waits in the kernel: see /proc/PID/stack, then try again"));
            }
        }
        Ok(())
    }

    /// Whatever an earlier keeper acknowledged must reach ZeroFS before the volume is let go.
    fn serve_again(&self, volume: &VolumeId, left_behind: u64, stop: &StopOptions) -> Result<()> {
        if !self.dirs.config(volume).exists() {
            return Err(would_lose(volume, left_behind, "and without its config no ZeroFS can take them"));
        }
        let epoch = self.known_or_fetch(volume)?.map_or(0, |(r, _)| r.epoch);
        let served = self.serve(volume, epoch, &KeeperOptions::default(), limit(stop, START_LIMIT));
        served.map_err(|e| not_served(volume, left_behind, e))?;
        // Without a log there may not even be a disk yet.
        if left_behind > 0 {
            self.replay_and_tell(volume, stop)?;
        }
        Ok(())
    }

    /// The same where the next keeper runs already, but has not replayed.
    fn settle_log(&self, volume: &VolumeId, left_behind: u64, stop: &StopOptions) -> Result<()> {
        let ready = self.client(volume)?.wait_ready(limit(stop, START_LIMIT));
        ready.map_err(|e| not_served(volume, left_behind, e))?;
        self.replay_and_tell(volume, stop)
    }

    fn stop_within(&self, volume: &VolumeId, timeout: Duration, force: bool) -> Result<Stopped> {
        let options =
            control::StopOptions { timeout_seconds: timeout.as_secs_f64(), force, even_if_mounted: false };
        self.client(volume)?.stop(options, &mut |p| {
            (self.progress)(&p.stage, p.elapsed_seconds as u64, Some(timeout.as_secs()));
        })
    }

    /// Ends ZeroFS, whatever it has not made durable.
    fn stop_by_force(&self, volume: &VolumeId, options: &StopOptions, why: &Error) -> Result<Stopped> {
        tracing::warn!(%volume, "{}: ZeroFS is killed now, as --force says", why.message());
        match self.stop_within(volume, options.timeout, true) {
            // No keeper could be started.
            Err(e) if e.kind() == Kind::NotFound => {
                self.end_orphans(volume)?;
                let (kept_entries, kept_bytes) = match self.peek_log(volume)? {
                    Peeked::Left { entries, bytes, .. } => (entries, bytes),
                    Peeked::Nothing | Peeked::Void { .. } | Peeked::Damaged { .. } => (0, 0),
                };
                Ok(Stopped { clean: kept_entries == 0, kept_entries, kept_bytes, ..Stopped::default() })
            }
            other => other,
        }
    }

    pub(super) fn replay_within(&self, volume: &VolumeId, limit: Duration) -> Result<(u64, Option<String>)> {
        let mut client = self.client(volume)?.within(limit);
        let status = client.status()?;
        let void = self.why_void(volume, &status)?;
        if void.is_some() {
            client.discard_log()?;
        }
        let entries = client.replay()?.entries;
        self.forget_held(volume)?;
        Ok(match void {
            Some(why) => {
                (0, Some(format!("the replay log of an earlier keeper was void and is discarded: {why}")))
            }
            None => (entries, None),
        })
    }

    /// The same before a stop, where nobody else tells what became of it.
    fn replay_and_tell(&self, volume: &VolumeId, stop: &StopOptions) -> Result<()> {
        if let (_, Some(note)) = self.replay_within(volume, limit(stop, REPLAY_LIMIT))? {
            tracing::warn!(%volume, "{note}");
        }
        Ok(())
    }

    /// Why the log that the keeper has found must not be replayed, if it must not.
    fn why_void(&self, volume: &VolumeId, status: &Status) -> Result<Option<String>> {
        let (epoch, entries) = match &status.log {
            LogState::Foreign { why } => return Ok(Some(why.clone())),
            LogState::LeftBehind { epoch, entries, .. } => (*epoch, *entries),
            LogState::Clean => return Ok(None),
        };
        let mut last_held = epoch;
        if let Some((record, _)) = self.known_or_fetch(volume)? {
            let held = self.held(volume)?;
            if held.as_ref().is_some_and(|held| !held.is_of(&record)) {
                return Ok(Some(format!("it was left by another volume of this name ({entries} entries)")));
            }
            last_held = last(held.as_ref(), epoch);
        }
        // A log of the epoch before ours is still true: it is what a forced detach on this node left, and with
        // anybody else in between there would be one more.
        let is_true = last_held + 1 >= status.epoch && epoch <= status.epoch;
        Ok((!is_true)
            .then(|| format!("the volume was attached elsewhere since ({entries} entries of epoch {epoch})")))
    }

    /// What is in the log that no keeper has open.
    pub(super) fn peek_log(&self, volume: &VolumeId) -> Result<Peeked> {
        let (folder, boot) = (self.dirs.volume_run(volume), log::boot_id()?);
        let begun = Instant::now();
        loop {
            match log::peek(&folder, volume, &boot) {
                // A keeper that was killed lets go of it as the last thing.
                Err(e) if e.kind() == Kind::Busy && begun.elapsed() < DYING => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => break other,
            }
        }
    }

    /// The entries in it.
    pub(super) fn left_behind(&self, volume: &VolumeId) -> Result<u64> {
        Ok(match self.peek_log(volume)? {
            Peeked::Left { entries, .. } => entries,
            // What may not or cannot be replayed can only be thrown away, which the replay step tells loudly.
            Peeked::Nothing | Peeked::Void { .. } | Peeked::Damaged { .. } => 0,
        })
    }

    fn held(&self, volume: &VolumeId) -> Result<Option<Held>> {
        let path = self.dirs.volume_run(volume).join(HELD);
        let held = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).doing("read", &path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).doing("read", &path),
        };
        held.map_err(|e| {
            e.hint(format!(
                "it says whose the replay log beside it is; to take that for this volume's: zerofsctl detach {volume} --force"
            ))
        })
    }

    pub(super) fn forget_held(&self, volume: &VolumeId) -> Result<()> {
        let path = self.dirs.volume_run(volume).join(HELD);
        remove(std::fs::remove_file(&path), &path)
    }

    fn note_held(&self, volume: &VolumeId, record: &VolumeRecord) -> Result<()> {
        let folder = self.dirs.volume_run(volume);
        let path = folder.join(HELD);
        let text = serde_json::to_vec(&Held { epoch: record.epoch, created: record.created })
            .doing("write", &path)?;
        replace(&path, &folder.join(beside(Path::new(HELD))), &text).doing("write", &path)
    }

    /// What is left in the log when the volume is let go. Of an attach before ours it stays true for the next one here, as
    /// nobody else had the volume meanwhile; of ours it would be lost to an attach elsewhere, which only force may risk.
    pub(super) fn pass_log_on(&self, volume: &VolumeId, record: &VolumeRecord) -> Result<()> {
        let held = match self.held(volume) {
            Err(e) if self.force() => {
                tracing::warn!(%volume, "{e}: it is written anew, as --force says");
                None
            }
            other => other?,
        };
        if held.as_ref().is_some_and(|held| !held.is_of(record)) {
            // Of another volume of this name: the log and what is noted of it stay as they are.
            return Ok(());
        }
        match self.peek_log(volume)? {
            Peeked::Nothing | Peeked::Void { .. } => Ok(()),
            Peeked::Left { entries, epoch, .. } if epoch == record.epoch && !self.force() => {
                Err(would_lose(volume, entries, "which an attach elsewhere would make void"))
            }
            Peeked::Left { epoch, .. } if last(held.as_ref(), epoch) + 1 >= record.epoch => self.note_held(volume, record),
            Peeked::Left { .. } => Ok(()),
            // It was let go by force before, and only the attach that replaces it has come to nothing.
            Peeked::Damaged { .. } if held.as_ref().is_some_and(|held| held.epoch + 1 >= record.epoch) => {
                self.note_held(volume, record)
            }
            Peeked::Damaged { why } if !self.force() => Err(Error::refused(format!(
                "its replay log cannot be read ({why}), and whether acknowledged writes wait in it cannot be told"
            ))
            .hint(format!(
                "keep a copy of {} for an examination; then let the volume go: zerofsctl detach {volume} --force",
                self.dirs.volume_run(volume).join(log::FILE_NAME).display()
            ))),
            Peeked::Damaged { why } => {
                tracing::warn!(%volume, "its replay log cannot be read ({why}), and stays until the next attach here discards it");
                self.note_held(volume, record)
            }
        }
    }
}
