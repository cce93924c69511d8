//! How a volume on this node is, and how full. It asks the keeper, the mount table and the kernel; nothing else, so that it
//! is quick and works while the store is away.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use super::proto::{VolumeCondition, VolumeUsage, volume_usage::Unit};
use crate::error::{Error, Kind, Result};
use crate::host::{device, mounts};
use crate::journal::{Journal, Standing, place, volume_folder};
use crate::keeper::client::KeeperClient;
use crate::keeper::control::{State, Status};
use crate::step::Step;
use crate::values::{TargetPath, VolumeId};

/// How long the kernel may take to say how full a filesystem is. It knows it by heart, unless I/O hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is known of a volume on this node.
pub struct Look {
    /// What operations left of it.
    pub standing: Standing,
    /// What its keeper says; none when there is no keeper.
    pub status: Option<Status>,
    /// Its NBD device stands and waits: what is asked of it is held until the next keeper serves it.
    pub waits: bool,
}

impl Look {
    /// How it is.
    pub fn condition(&self) -> VolumeCondition {
        of_keeper(self.status.as_ref(), self.waits)
    }
}

/// Looks at a volume; none when nothing of it is on this node.
pub fn look(run_dir: &Path, volume: &VolumeId) -> Result<Option<Look>> {
    let Some(runs) = Journal::peek(run_dir, volume)? else { return Ok(None) };
    let standing = Standing::of(&runs);
    // One that was taken down to be brought back is still here.
    if standing.connect.is_none() && standing.awaited.is_none() {
        return Ok(None);
    }
    let status = status(run_dir, volume)?;
    let waits = match &status {
        // One that was just started has handed over no sockets yet.
        Some(status) => status.nbd.as_ref().is_some_and(|n| n.failed.is_none() && n.connections == 0),
        None => device::may_be_taken_over(&volume_folder(run_dir, volume), volume)?,
    };
    Ok(Some(Look { standing, status, waits }))
}

/// What the keeper says; none when it is gone.
pub fn status(run_dir: &Path, volume: &VolumeId) -> Result<Option<Status>> {
    let asked = KeeperClient::connect(&volume_folder(run_dir, volume))
        .and_then(|client| client.within(Duration::from_secs(5)).status());
    match asked {
        Ok(status) => Ok(Some(status)),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn abnormal(message: impl Into<String>) -> VolumeCondition {
    VolumeCondition { abnormal: true, message: message.into() }
}

/// The condition as the keeper tells it; `waits` is of its device.
fn of_keeper(status: Option<&Status>, waits: bool) -> VolumeCondition {
    let Some(status) = status else {
        return abnormal(if waits {
            "its keeper is gone; I/O is held until the next one serves the device, and nothing is lost"
        } else {
            "its keeper is gone; it is being brought back"
        });
    };
    if let Some(why) = status.nbd.as_ref().and_then(|n| n.failed.as_deref()) {
        return abnormal(format!("its device has failed and is being made anew: {why}"));
    }
    let why = status.reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
    match status.state {
        State::Ready if waits => abnormal("I/O is held until its keeper serves the device again"),
        State::Ready => VolumeCondition { abnormal: false, message: "in service".into() },
        State::Starting | State::Stalled => {
            let seconds = status.state_seconds as u64;
            abnormal(format!("its server is restarting, I/O has been waiting for {seconds} s{why}"))
        }
        State::Fenced => abnormal(format!("another node has taken it, the device is dead{why}")),
        State::Failed => abnormal(format!("its server cannot run, the device is dead{why}")),
        State::Stopping => abnormal("its server is stopping"),
    }
}

/// What is answered of one place of a volume.
pub struct Stats {
    /// Bytes and inodes; only bytes of a raw device.
    pub usage: Vec<VolumeUsage>,
    /// How it is.
    pub condition: VolumeCondition,
}

/// Looks at the volume at one of its places. [`Kind::NotFound`] when it is not there.
pub fn stats(run_dir: &Path, volume: &VolumeId, at: &TargetPath) -> Result<Stats> {
    let found = look(run_dir, volume)?;
    let not_here = || {
        Error::new(Kind::NotFound, format!("it is not at {at}"))
            .on(volume)
            .hint(format!("see where it is: zerofsctl show {volume}"))
    };
    let look = found.ok_or_else(not_here)?;
    let condition = look.condition();
    let Look { standing, status, .. } = look;
    // A raw device is staged as a link in the folder that the caller knows.
    let is_there = |p: &&Step| {
        place(p).is_some_and(|t| {
            t == at || matches!(p, Step::Link(_)) && t.as_path().parent() == Some(at.as_path())
        })
    };
    let step = standing.all_places().find(is_there).ok_or_else(not_here)?;
    let raw = match step {
        Step::Link(_) => true,
        Step::Bind(bind) => bind.source.is_none(),
        _ => false,
    };
    if raw {
        let size = status.as_ref().map(|s| s.size).filter(|s| *s > 0);
        let size = size.or_else(|| standing.facts.device.as_ref().map(|d| d.size.bytes()));
        let usage =
            size.map(|s| VolumeUsage { total: number(s), unit: Unit::Bytes as i32, ..Default::default() });
        return Ok(Stats { usage: usage.into_iter().collect(), condition });
    }
    let Some(entry) = mounts::at(&mounts::table("self")?, at.as_path()) else {
        let usage = Vec::new();
        return Ok(Stats { usage, condition: abnormal(format!("nothing is mounted at {at} any more")) });
    };
    let wanted_read_only = match step {
        Step::Mount(m) => m.read_only,
        Step::Bind(b) => b.read_only || standing.connect.as_ref().is_some_and(|c| c.read_only),
        _ => false,
    };
    let condition = if !condition.abnormal && entry.read_only && !wanted_read_only {
        abnormal("its filesystem has become read-only after an error: restart the pods that use it")
    } else {
        condition
    };
    match filesystem(at.as_path()) {
        Some(Ok(usage)) => Ok(Stats { usage, condition }),
        Some(Err(e)) => {
            Ok(Stats { usage: Vec::new(), condition: worse(condition, format!("its filesystem fails: {e}")) })
        }
        None => Ok(Stats {
            usage: Vec::new(),
            condition: worse(condition, "its filesystem does not answer".into()),
        }),
    }
}

/// The keeper's word says more than the filesystem's, when both are bad.
fn worse(condition: VolumeCondition, message: String) -> VolumeCondition {
    if condition.abnormal { condition } else { abnormal(message) }
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// Asked on a thread of its own, which may hang with the filesystem.
fn filesystem(path: &Path) -> Option<std::io::Result<Vec<VolumeUsage>>> {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    let thread = std::thread::Builder::new().name("statvfs".into()).stack_size(64 * 1024);
    thread
        .spawn(move || {
            let _ = sender.send(ask(&path));
        })
        .ok()?;
    receiver.recv_timeout(PATIENCE).ok()
}

fn ask(path: &Path) -> std::io::Result<Vec<VolumeUsage>> {
    let s = nix::sys::statvfs::statvfs(path)?;
    let block = s.fragment_size();
    let bytes = VolumeUsage {
        available: number(s.blocks_available() * block),
        total: number(s.blocks() * block),
        used: number((s.blocks() - s.blocks_free()) * block),
        unit: Unit::Bytes as i32,
    };
    // Btrfs has no fixed number of inodes and says 0.
    let inodes = (s.files() > 0).then(|| VolumeUsage {
        available: number(s.files_available()),
        total: number(s.files()),
        used: number(s.files() - s.files_free()),
        unit: Unit::Inodes as i32,
    });
    Ok([Some(bytes), inodes].into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_bytes_and_inodes() {
        let usage = filesystem(Path::new("/")).unwrap().unwrap();
        assert_eq!(usage[0].unit, Unit::Bytes as i32);
        assert!(usage[0].total > 0 && usage[0].used >= 0 && usage[0].available >= 0);
        assert!(filesystem(Path::new("/nonexistent")).unwrap().is_err());
    }

    #[test]
    fn what_was_never_here_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = TargetPath::new("/x".as_ref(), "/".as_ref()).unwrap();
        let e = stats(dir.path(), &"v".parse().unwrap(), &at).err().unwrap();
        assert_eq!(e.kind(), Kind::NotFound);
        let (gone, waits) = (of_keeper(None, false), of_keeper(None, true));
        assert!(gone.abnormal && waits.abnormal);
        assert!(gone.message.contains("brought back") && waits.message.contains("held"), "{waits:?}");
    }
}
