//! The next keeper of a volume that a command is at work on. When the keeper dies, the command's own reads, and those of the
//! mkfs, fsck and mount that it runs, wait in the kernel; and since the command holds the volume, nobody else may start the
//! next keeper. What has been sent to a socket waits for new sockets without a limit, and cannot be killed.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::linux::{Dirs, LinuxHost};
use super::{Host, Life, Observe, device};
use crate::background::Background;
use crate::error::Result;
use crate::keeper::PID_FILE;
use crate::keeper::process::{Identity, Process};
use crate::values::VolumeId;

/// How long until the next look when there is no keeper to wait for, or when the next one could not be started.
const PAUSE: Duration = Duration::from_millis(500);

/// Looks after the keeper of a volume's NBD device until that is dropped, with nothing but what the attach has left. The drop
/// waits for a take-over that is at work, so that it meets nothing that comes after.
pub(super) fn start(dirs: &Dirs, node: &str, volume: &VolumeId) -> Result<Background> {
    let (dirs, node, volume) = (dirs.clone(), node.to_owned(), volume.clone());
    Background::start("companion", move |stop| look(&dirs, &node, &volume, stop))
}

fn look(dirs: &Dirs, node: &str, volume: &VolumeId, stop: &EventFd) {
    let run = dirs.volume_run(volume);
    loop {
        // One that stopped by itself has removed its file. A doubt is looked at again.
        let identity = Identity::read(&run.join(PID_FILE));
        let alive = identity.as_ref().and_then(|i| Process::open(i).ok().flatten());
        if let (Some(identity), None) = (identity, &alive)
            && device::may_be_taken_over(&run, volume).unwrap_or(false)
        {
            let taken = LinuxHost::saved(dirs, node, volume).and_then(|host| {
                let waits = host.device(volume)?.life == Life::Waiting;
                if waits {
                    tracing::warn!(%volume, "its keeper (pid {}) has died: starting the next one", identity.pid);
                    host.take_over(volume)?;
                }
                Ok(())
            });
            if let Err(e) = taken {
                tracing::warn!(%volume, "the next keeper does not serve the device yet: {}", e.message());
            }
        }
        if stopped(stop, alive.as_ref()) {
            return;
        }
    }
}

/// Waits until the keeper ends, or for a while when there is none; true when it is time to stop.
fn stopped(stop: &EventFd, keeper: Option<&Process>) -> bool {
    let mut fds = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    fds.extend(keeper.map(|k| PollFd::new(k.fd(), PollFlags::POLLIN)));
    let timeout = match keeper {
        Some(_) => PollTimeout::NONE,
        None => PollTimeout::try_from(PAUSE).unwrap_or(PollTimeout::MAX),
    };
    let _ = poll(&mut fds, timeout);
    fds[0].revents().is_some_and(|r| !r.is_empty())
}
