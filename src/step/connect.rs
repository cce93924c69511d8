//! `connect`: the block device appears; backwards it goes, once nothing uses it any more.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::{Error, Kind, Result};
use crate::host::{Content, Device, Host, KeeperView, Observe, users};
use crate::values::VolumeId;

/// How the block device is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// What works here.
    #[default]
    Auto,
    /// The kernel's NBD client.
    Nbd,
    /// One file over FUSE, a loop device with direct I/O on it.
    Fuse,
}

impl FromStr for Transport {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Transport::Auto),
            "nbd" => Ok(Transport::Nbd),
            "fuse" => Ok(Transport::Fuse),
            _ => Err(Error::usage(format!("unknown transport {s:?}")).hint("choose one of auto, nbd, fuse")),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Auto => "auto",
            Transport::Nbd => "nbd",
            Transport::Fuse => "fuse",
        })
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// How.
    pub transport: Transport,
    /// The device refuses writes.
    pub read_only: bool,
}

impl Connect {
    fn learn(&self, device: Device, volume: &VolumeId, facts: &mut Facts) -> Result<()> {
        if device.read_only != self.read_only {
            let (is, asked) =
                if device.read_only { ("read-only", "read-write") } else { ("read-write", "read-only") };
            return Err(Error::new(
                Kind::Conflict,
                format!("it is attached {is} at the moment, not {asked}"),
            )
            .hint(format!("detach it first: zerofsctl detach {volume}")));
        }
        facts.device = Some(device);
        Ok(())
    }
}

impl Act for Connect {
    fn names(&self) -> (&'static str, &'static str) {
        ("connect", "disconnect")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "serve the disk over FUSE and put a loop device with direct I/O on it".into(),
            Direction::Undo => "flush, then take the loop device and the FUSE mount away".into(),
        }
    }

    fn command(&self, direction: Direction, volume: &VolumeId, facts: &Facts) -> String {
        let folder = format!("\"$RUN_DIR/volumes/{volume}/fuse");
        match direction {
            Direction::Apply => format!(
                "nbdfuse {folder}/disk\" --unix nbd.sock & losetup --find --show --direct-io=on{} {folder}/disk\"",
                if self.read_only { " --read-only" } else { "" }
            ),
            Direction::Undo => format!("losetup --detach {}; umount {folder}\"", device_name(facts)),
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let view = host.device(volume)?;
        match (view.fuse, view.device) {
            (true, Some(device)) => self.learn(device, volume, facts).map(|()| true),
            _ => Ok(false),
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let device = host.connect(volume, self.read_only)?;
        if facts.content == Some(Content::Unknown) {
            // Nobody wrote down how large an adopted volume is.
            host.record_capacity(volume, device.size)?;
        }
        self.learn(device, volume, facts)
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
        // A device whose keeper is dead only gives errors: nobody who holds it can lose anything more.
        let dead = matches!(host.keeper(volume)?, KeeperView::Dead { .. });
        // Asked again right before: the journal's device may have become somebody else's.
        if let Some(device) = host.device(volume)?.device
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
