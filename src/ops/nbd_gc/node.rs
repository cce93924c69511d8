//! The collector's world: this machine.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::{Left, World};
use crate::error::{Doing, Error, Kind, Result};
use crate::host::loopdev::open_exclusively;
use crate::host::nbd::owners::RunDir;
use crate::host::nbd::survey::{self, Roots, Scope, Survey};
use crate::host::nbd::{give_back_queue, marks, netlink, sysfs};
use crate::journal::{Held, volume_folder};
use crate::keeper::log::{self, ReplayLog};
use crate::values::VolumeId;

/// How long keepers may take to answer, all together.
pub const KEEPERS: Duration = Duration::from_secs(2);
/// How long an open of a device may take before it is taken for one that waits for a server: the first after a connect
/// reads the partition table.
const OPEN: Duration = Duration::from_secs(1);
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

/// What came of an open.
fn claimed(opened: std::result::Result<OwnedFd, Errno>, path: &Path) -> Result<Claim> {
    match opened {
        Ok(fd) => Ok(Claim::Open(fd)),
        Err(Errno::EBUSY) => {
            Err(Error::new(Kind::Busy, "the kernel says that somebody has it: a mount, a holder or a swap")
                .hint("see what it is now: zerofsctl nbd list"))
        }
        Err(e) => Err(e).doing("open", path),
    }
}

/// Whether a thread of ours stands in a wait of the kernel that nothing can interrupt.
fn waits_in_the_kernel(thread: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
}

/// The kernel's word that nobody has the device.
pub enum Claim {
    /// We have it open, exclusively.
    Open(OwnedFd),
    /// Our open, or one before it, waits for the partition table, which no server will deliver.
    ///
    /// The kernel refuses a device that is mounted, held or swapped on before it reads anything, so this one is none of these;
    /// and while the first open waits, there is no other. With the volume's lock held no server comes back to life, either.
    /// So whoever waits has got nothing from the device, and only a disconnect ends the wait, ours included.
    Waits(mpsc::Receiver<std::result::Result<OwnedFd, Errno>>),
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
        let path = sysfs::path(index);
        let (tell, told) = mpsc::sync_channel(1);
        let (introduce, introduced) = mpsc::sync_channel(1);
        let of_thread = path.clone();
        // On a thread, since there is no way to end an open that waits for the device.
        std::thread::Builder::new()
            .name("claim".into())
            .spawn(move || {
                let _ = introduce.send(nix::unistd::gettid());
                let _ = tell.send(open_exclusively(&of_thread));
            })
            .doing("start a thread to open", &path)?;
        let begun = Instant::now();
        let thread = introduced.recv().ok();
        loop {
            match told.recv_timeout(OPEN) {
                Ok(opened) => return claimed(opened, &path),
                // A busy machine may not have come to it yet; one that waits for the device is seen to do so.
                Err(_) if thread.is_some_and(waits_in_the_kernel) => return Ok(Claim::Waits(told)),
                Err(_) if begun.elapsed() < LET_GO => {}
                Err(_) => {
                    return Err(Error::new(
                        Kind::Busy,
                        format!("opening it takes longer than {} s", LET_GO.as_secs()),
                    )
                    .hint("run the same command again later"));
                }
            }
        }
    }

    fn disconnect(&self, index: u32, claim: Claim) -> Result<()> {
        let claim = match claim {
            Claim::Waits(opened) => match opened.try_recv() {
                Ok(opened) => claimed(opened, &sysfs::path(index))?,
                Err(_) => Claim::Waits(opened),
            },
            open => open,
        };
        let id =
            |survey: Option<sysfs::NbdDevice>| survey.filter(|d| d.connected).map(|d| (d.pid, d.backend));
        let before = id(sysfs::one(index)?);
        give_back_queue(index);
        let (tell, told) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("disconnect".into())
            .spawn(move || tell.send(netlink::disconnect(index)))
            .doing("start a thread to disconnect", sysfs::path(index))?;
        let begun = Instant::now();
        let slow = || {
            Error::failed(format!("/dev/nbd{index} is not free {} s after the disconnect", LET_GO.as_secs()))
                .hint(format!("see who holds it: fuser -v /dev/nbd{index}; then run the same command again"))
        };
        told.recv_timeout(LET_GO).map_err(|_| slow())??;
        // Only now: while we have it open, the index cannot become somebody else's. From here on we only look.
        match claim {
            Claim::Open(fd) => drop(fd),
            // Whatever came of it.
            Claim::Waits(opened) => {
                drop(opened.recv_timeout(LET_GO.saturating_sub(begun.elapsed())).map_err(|_| slow())?);
            }
        }
        while before.is_some() && id(sysfs::one(index)?) == before {
            if begun.elapsed() >= LET_GO {
                return Err(slow());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn left(&self, volume: &VolumeId, lock: Option<&VolumeLock>) -> Result<Left> {
        let folder = volume_folder(&self.run, volume);
        if !folder.join(log::FILE_NAME).exists() {
            return Ok(Left::Nothing);
        }
        if lock.is_none() {
            return Ok(Left::Maybe);
        }
        let who = log::Identity { volume: volume.clone(), epoch: 0, boot: log::boot_id()? };
        Ok(match ReplayLog::open(&folder, &who, log::MIN_CAPACITY)? {
            log::Opened::Log(log) if log.live() > 0 => Left::Entries(log.live()),
            // A log of another boot is void: the next attach says so.
            log::Opened::Log(_) | log::Opened::Foreign { .. } => Left::Nothing,
        })
    }
}
