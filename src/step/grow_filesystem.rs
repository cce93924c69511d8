//! `grow-filesystem`: the mounted filesystem takes the new room.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::{Error, Result};
use crate::host::{Host, Observe};
use crate::values::{FsType, TargetPath, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowFilesystem {
    /// One of its mount points.
    pub target: TargetPath,
}

impl GrowFilesystem {
    fn fs(&self, facts: &Facts, host: &dyn Observe) -> Result<FsType> {
        let device = facts.device()?;
        host.mounts_of(&device.path)?
            .iter()
            .find(|m| m.target == self.target.as_path())
            .ok_or_else(|| {
                Error::refused(format!("it is not mounted at {} any more", self.target))
                    .hint("attach it again, then resize it")
            })?
            .fs
            .parse()
    }
}

impl Act for GrowFilesystem {
    fn names(&self) -> (&'static str, &'static str) {
        ("grow-filesystem", "keep-filesystem")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "grow the mounted filesystem to the size of the device".into(),
            Direction::Undo => "nothing: a filesystem stays as large as it is".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        match facts.fs {
            Some(FsType::Xfs) => format!("xfs_growfs {}", self.target),
            Some(FsType::Btrfs) => format!("btrfs filesystem resize max {}", self.target),
            _ => format!("resize2fs {}", device_name(facts)),
        }
    }

    fn is_applied(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let fs = self.fs(facts, host)?;
        facts.fs = Some(fs);
        host.filesystem_fills_device(facts.device()?, fs, self.target.as_path())
    }

    fn apply(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let fs = self.fs(facts, host)?;
        host.grow_filesystem(facts.device()?, fs, self.target.as_path())
    }
}
