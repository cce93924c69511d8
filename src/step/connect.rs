//! `connect`: the block device appears; backwards it goes, once nothing uses it any more.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::{Error, Kind, Result};
use crate::host::{
    ConnectRequest, Content, DeviceView, Host, IoPath, Life, Observe, RECONNECT_TIMEOUT, Transport, users,
};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// How.
    pub transport: Transport,
    /// The device refuses writes.
    pub read_only: bool,
    /// Where the kernel's NBD connections end.
    #[serde(default, skip_serializing_if = "is_default")]
    pub path: IoPath,
    /// How long the kernel holds I/O while no keeper serves the device.
    #[serde(default = "default_timeout")]
    pub reconnect_timeout: Duration,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn default_timeout() -> Duration {
    RECONNECT_TIMEOUT
}

impl Connect {
    fn learn(&self, view: DeviceView, volume: &VolumeId, facts: &mut Facts) -> Result<()> {
        let other = |is: String, asked: String| {
            Err(Error::new(Kind::Conflict, format!("it is attached {is} at the moment, not {asked}"))
                .hint(format!("detach it first: zerofsctl detach {volume}")))
        };
        let Some(device) = view.device else {
            return Err(Error::failed("the block device has disappeared")
                .hint(format!("run: zerofsctl recover {volume}")));
        };
        if device.read_only != self.read_only {
            let words = |read_only| if read_only { "read-only" } else { "read-write" }.to_owned();
            return other(words(device.read_only), words(self.read_only));
        }
        match (view.transport, view.path) {
            (Some(is), _) if self.transport != Transport::Auto && is != self.transport => {
                return other(format!("over {is}"), format!("over {}", self.transport));
            }
            (Some(Transport::Nbd), Some(is)) if is != self.path => {
                return other(format!("by the {is} path"), format!("by the {} one", self.path));
            }
            _ => {}
        }
        facts.transport = view.transport;
        facts.path = view.path;
        facts.device = Some(device);
        Ok(())
    }

    /// What it is over, as far as it is known.
    fn over(&self, facts: &Facts) -> Transport {
        facts.transport.unwrap_or(self.transport)
    }
}

impl Act for Connect {
    fn names(&self) -> (&'static str, &'static str) {
        ("connect", "disconnect")
    }

    fn describe(&self, direction: Direction) -> String {
        match (direction, self.transport, self.path) {
            (Direction::Apply, Transport::Nbd, IoPath::Guarded) => {
                "connect a kernel NBD device to the keeper".into()
            }
            (Direction::Apply, Transport::Nbd, IoPath::Direct) => {
                "connect a kernel NBD device straight to ZeroFS".into()
            }
            (Direction::Apply, Transport::Fuse, _) => {
                "serve the disk over FUSE and put a loop device with direct I/O on it".into()
            }
            (Direction::Apply, Transport::Auto, _) => {
                "make the block device: kernel NBD where it works, else FUSE and a loop device".into()
            }
            (Direction::Undo, Transport::Nbd, _) => {
                "flush, disconnect the NBD device, wait until the kernel let go".into()
            }
            (Direction::Undo, Transport::Fuse, _) => {
                "flush, then take the loop device and the FUSE mount away".into()
            }
            (Direction::Undo, Transport::Auto, _) => {
                "flush, take the block device away, wait until the kernel let go".into()
            }
        }
    }

    fn command(&self, direction: Direction, volume: &VolumeId, facts: &Facts) -> String {
        let run = format!("\"$RUN_DIR/volumes/{volume}");
        match (direction, self.over(facts)) {
            (Direction::Apply, Transport::Nbd) => format!(
                "nbd-client -unix {run}/nbd.sock\" -name disk -connections 4{} \"$DEVICE\"",
                if self.read_only { " -readonly" } else { "" }
            ),
            (Direction::Undo, Transport::Nbd) => format!("nbd-client -d {}", device_name(facts)),
            (Direction::Apply, _) => format!(
                "nbdfuse {run}/fuse/disk\" --unix nbd.sock & losetup --find --show --direct-io=on{} {run}/fuse/disk\"",
                if self.read_only { " --read-only" } else { "" }
            ),
            (Direction::Undo, _) => {
                format!("losetup --detach {}; umount {run}/fuse\"", device_name(facts))
            }
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let view = host.device(volume)?;
        if !view.is_complete() || view.life != Life::Served {
            return Ok(false);
        }
        self.learn(view, volume, facts).map(|()| true)
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let request = ConnectRequest {
            transport: host.prepare_transport(self.transport)?,
            path: self.path,
            read_only: self.read_only,
            reconnect_timeout: self.reconnect_timeout,
        };
        let device = host.connect(volume, &request)?;
        if facts.content == Some(Content::Unknown) {
            // Nobody wrote down how large an adopted volume is.
            host.record_capacity(volume, device.size)?;
        }
        self.learn(host.device(volume)?, volume, facts)
    }

    fn is_undone(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let view = host.device(volume)?;
        let absent = view.is_absent();
        if let Some(device) = view.device {
            facts.device = Some(device);
        }
        Ok(absent)
    }

    fn undo(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        let view = host.device(volume)?;
        if let Some(device) = view.device
            && view.life != Life::Dead
        {
            // It is in no mount table while it goes on.
            host.finish_unmount(&device)?;
        }
        // Asked again right before: the journal's device may have become somebody else's.
        let view = host.device(volume)?;
        // A dead device only gives errors: nobody who holds it can lose anything more.
        let dead = view.life == Life::Dead;
        if let Some(device) = view.device
            && !dead
        {
            let mounts = host.mounts_of(&device.path)?;
            if let Some(mount) = mounts.first() {
                return Err(Error::new(
                    Kind::Busy,
                    format!("{} is still mounted at {}", device.path.display(), mount.target.display()),
                )
                .hint(format!("unmount it first: umount {}", mount.target.display())));
            }
            let users = host.device_users(&device.path)?;
            if !users.is_empty() {
                return Err(Error::new(
                    Kind::Busy,
                    format!("{} is still in use by {}", device.path.display(), users::list(&users)),
                )
                .hint(format!(
                    "see who: fuser -vm {}; end them, then run the same command again",
                    device.path.display()
                )));
            }
        }
        host.disconnect(volume, dead)
    }
}
