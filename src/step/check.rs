//! `check`: the filesystem is checked while nothing has it mounted; with `repair`, repaired.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::{Error, Kind, Result};
use crate::host::{Host, Observe, Signature};
use crate::values::{FsType, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Write repairs.
    pub repair: bool,
}

impl Act for Check {
    fn names(&self) -> (&'static str, &'static str) {
        ("check", "keep-check")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply if self.repair => "check the filesystem and repair it".into(),
            Direction::Apply => "check the filesystem, writing nothing".into(),
            Direction::Undo => "nothing".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        let device = device_name(facts);
        match (facts.fs.unwrap_or(FsType::Ext4), self.repair) {
            (FsType::Ext4, false) => format!("e2fsck -fn {device}"),
            (FsType::Ext4, true) => format!("e2fsck -fy {device}"),
            (FsType::Xfs, false) => format!("xfs_repair -n {device}"),
            (FsType::Xfs, true) => format!("xfs_repair {device}"),
            (FsType::Btrfs, false) => format!("btrfs check --readonly {device}"),
            (FsType::Btrfs, true) => format!("btrfs check --repair {device}"),
        }
    }

    fn is_applied(&self, _: &VolumeId, _: &mut Facts, _: &dyn Observe) -> Result<bool> {
        Ok(false)
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let device = facts.device()?.clone();
        if let Some(mount) = host.mounts_of(&device.path)?.first() {
            return Err(Error::new(Kind::Busy, format!("it is mounted at {}", mount.target.display()))
                .hint(format!("detach it first: zerofsctl detach {volume}")));
        }
        match facts.signature.clone() {
            Some(Signature::Filesystem { fs, .. }) => {
                facts.fs = Some(fs);
                facts.check = Some(host.check(&device, fs, self.repair)?);
                Ok(())
            }
            Some(Signature::Blank) => {
                Err(Error::refused("there is no filesystem on it: the device is blank")
                    .hint(format!("make one by attaching it: zerofsctl attach {volume} --target DIR")))
            }
            Some(Signature::Other(what)) => {
                Err(Error::refused(format!("there is no filesystem that we know on it: {what}"))
                    .hint("attach it with --block and use the tools of whatever is on it"))
            }
            None => Err(Error::failed("the device was not probed")),
        }
    }
}
