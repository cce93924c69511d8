//! The kernel's own word that nobody uses a device: an exclusive open, which waits for nothing.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::sysfs;
use crate::error::{Doing, Error, Kind, Result};
use crate::host::loopdev::open_exclusively;

/// How long an open of a device may take before it is taken for one that waits for a server: the first after a connect
/// reads the partition table.
const OPEN: Duration = Duration::from_secs(1);
/// How long a busy machine may take to come to it.
const BUSY: Duration = Duration::from_secs(10);

/// That nobody has the device.
pub enum Claim {
    /// We have it open, exclusively.
    Open(OwnedFd),
    /// Our open, or one before it, waits for the partition table, which no server delivers now.
    ///
    /// The kernel refuses a device that is mounted, held or swapped on before it reads anything, so this one is none of these;
    /// and while the first open waits, there is no other. So whoever waits has got nothing from the device, and as long as no
    /// server comes back to life, only a disconnect ends the wait, ours included.
    Waits(mpsc::Receiver<std::result::Result<OwnedFd, Errno>>),
}

/// Asks for `/dev/nbdN`. [`Kind::Busy`] when somebody has it mounted, or holds it.
pub fn device(index: u32) -> Result<Claim> {
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
            Ok(opened) => return of(opened, index),
            // A busy machine may not have come to it yet; one that waits for the device is seen to do so.
            Err(_) if thread.is_some_and(waits_in_the_kernel) => return Ok(Claim::Waits(told)),
            Err(_) if begun.elapsed() < BUSY => {}
            Err(_) => {
                return Err(Error::new(
                    Kind::Busy,
                    format!("opening it takes longer than {} s", BUSY.as_secs()),
                )
                .hint("run the same command again later"));
            }
        }
    }
}

/// What came of an open.
pub fn of(opened: std::result::Result<OwnedFd, Errno>, index: u32) -> Result<Claim> {
    match opened {
        Ok(fd) => Ok(Claim::Open(fd)),
        Err(Errno::EBUSY) => {
            Err(Error::new(Kind::Busy, "the kernel says that somebody has it: a mount, a holder or a swap")
                .hint("see what it is now: zerofsctl nbd list"))
        }
        Err(e) => Err(e).doing("open", sysfs::path(index)),
    }
}

/// Whether a thread of ours stands in a wait of the kernel that nothing can interrupt.
fn waits_in_the_kernel(thread: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
}
