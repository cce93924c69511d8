//! The collector's world: this machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Left, World};
use crate::error::{Doing, Error, Result};
use crate::host::bind::is_node_of;
use crate::host::nbd::claim::{self, Claim};
use crate::host::nbd::owners::RunDir;
use crate::host::nbd::survey::{self, Roots, Scope, Survey};
use crate::host::nbd::{disconnect_within, marks, sysfs};
use crate::journal::{Held, Journal, Standing, volume_folder};
use crate::keeper::log::{self, Peeked};
use crate::values::VolumeId;

/// How long keepers may take to answer, all together.
pub const KEEPERS: Duration = Duration::from_secs(2);
/// How long the kernel may take to let go.
const LET_GO: Duration = Duration::from_secs(10);

/// See the module.
pub struct Node {
    run: PathBuf,
    roots: Roots,
}

impl Node {
    /// The machine, with our run root.
    pub fn new(run: &Path) -> Node {
        Node { run: run.to_owned(), roots: Roots::default() }
    }
}

/// A volume's lock, and no lock file left behind.
pub struct VolumeLock(Option<Held>);

impl Drop for VolumeLock {
    fn drop(&mut self) {
        if let Some(Err(e)) = self.0.take().map(Held::release) {
            tracing::warn!("{e}");
        }
    }
}

impl World for Node {
    type Lock = VolumeLock;
    type Claim = Claim;

    fn look(&self) -> Result<Survey> {
        let owners = RunDir::new(&self.run, KEEPERS);
        let mut survey = survey::take(&self.roots, &owners, Scope::default())?;
        marks::update(&self.run, &mut survey, self.now())?;
        Ok(survey)
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn now(&self) -> jiff::Timestamp {
        jiff::Timestamp::now()
    }

    fn lock(&self, volume: &VolumeId) -> Result<VolumeLock> {
        Held::take(&self.run, volume).map(|held| VolumeLock(Some(held)))
    }

    fn claim(&self, index: u32) -> Result<Claim> {
        claim::device(index)
    }

    fn disconnect(&self, index: u32, claim: Claim) -> Result<()> {
        let claim = match claim {
            Claim::Waits(opened) => match opened.try_recv() {
                Ok(opened) => claim::of(opened, index)?,
                Err(_) => Claim::Waits(opened),
            },
            open => open,
        };
        let before = sysfs::one(index)?;
        let begun = Instant::now();
        let slow = || {
            Error::failed(format!("/dev/nbd{index} is not free {} s after the disconnect", LET_GO.as_secs()))
                .hint(format!("see who holds it: fuser -v /dev/nbd{index}; then run the same command again"))
        };
        if !disconnect_within(index, LET_GO)? {
            return Err(slow());
        }
        // Only now: while we have it open, the index cannot become somebody else's. From here on we only look.
        match claim {
            Claim::Open(fd) => drop(fd),
            // Whatever came of it.
            Claim::Waits(opened) => {
                drop(opened.recv_timeout(LET_GO.saturating_sub(begun.elapsed())).map_err(|_| slow())?);
            }
        }
        let is_there = |now: &sysfs::NbdDevice| before.as_ref().is_some_and(|d| now.is_same_connection(d));
        while sysfs::one(index)?.is_some_and(|now| is_there(&now)) {
            if begun.elapsed() >= LET_GO {
                return Err(slow());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn leads_to(&self, volume: &VolumeId, index: u32) -> Result<Option<PathBuf>> {
        let standing = Standing::of(&Journal::peek(&self.run, volume)?.unwrap_or_default());
        let device = sysfs::path(index);
        for target in standing.raw_places() {
            let target_is_link = std::fs::read_link(target.as_path()).is_ok_and(|to| to == device);
            if target_is_link || is_node_of(target.as_path(), &device)? {
                return Ok(Some(target.as_path().to_owned()));
            }
        }
        Ok(None)
    }

    fn left(&self, volume: &VolumeId, lock: Option<&VolumeLock>) -> Result<Left> {
        let folder = volume_folder(&self.run, volume);
        if lock.is_none() {
            let path = folder.join(log::FILE_NAME);
            let is_there = path.try_exists().doing("look for the replay log", &path)?;
            return Ok(if is_there { Left::Maybe } else { Left::Nothing });
        }
        Ok(match log::peek(&folder, volume, &log::boot_id()?)? {
            Peeked::Nothing => Left::Nothing,
            Peeked::Left { entries, .. } => Left::Entries(entries),
            Peeked::Void { why } => Left::Void(why),
            Peeked::Damaged { why } => Left::Damaged(why),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::log::{Identity, Kind, MIN_CAPACITY, Opened, ReplayLog};

    /// What gc says of a log, which stays as it is.
    fn left(run: &Path, volume: &VolumeId) -> (String, String) {
        let path = volume_folder(run, volume).join(log::FILE_NAME);
        let bytes = || std::fs::read(&path).ok();
        let before = bytes();
        let node = Node::new(run);
        let planned = node.left(volume, None).unwrap();
        let lock = node.lock(volume).unwrap();
        let found = node.left(volume, Some(&lock)).unwrap();
        drop(lock);
        assert!(before == bytes(), "a look has changed the log");
        (format!("{planned:?}"), format!("{found:?}"))
    }

    #[test]
    fn whatever_a_replay_log_holds_is_told_and_left_alone() {
        let run = tempfile::tempdir().unwrap();
        let volume: VolumeId = "vol1".parse().unwrap();
        let folder = volume_folder(run.path(), &volume);
        std::fs::create_dir_all(&folder).unwrap();
        let told = |found: &str| {
            let (planned, is) = left(run.path(), &volume);
            assert_eq!((&*planned, &*is), ("Maybe", found));
        };
        let open = |boot: String| {
            let who = Identity { volume: volume.clone(), epoch: 7, boot };
            match ReplayLog::open(&folder, &who, 16 * MIN_CAPACITY).unwrap() {
                Opened::Log(log) => log,
                Opened::Foreign { why } => panic!("{why}"),
            }
        };
        assert_eq!(left(run.path(), &volume), ("Nothing".into(), "Nothing".into()));
        let mut log = open(log::boot_id().unwrap());
        let node = Node::new(run.path());
        let lock = node.lock(&volume).unwrap();
        // Somebody stands behind the device after all.
        assert_eq!(node.left(&volume, Some(&lock)).unwrap_err().kind(), crate::error::Kind::Busy);
        drop((lock, log));
        told("Nothing");
        log = open(log::boot_id().unwrap());
        log.append(Kind::Write, 0, 3, b"abc").unwrap();
        log.append(Kind::Trim, 0, 4096, &[]).unwrap();
        drop(log);
        told("Entries(2)");
        std::fs::write(folder.join(log::FILE_NAME), [7; 8192]).unwrap();
        told("Damaged(\"it is no replay log\")");
        std::fs::remove_file(folder.join(log::FILE_NAME)).unwrap();
        drop(open("another boot".into()));
        told("Void(\"it is from before the last reboot\")");
    }
}
