//! `grow-unmounted`: an ext4 takes the new room before it is mounted, which needs no privilege that containers
//! lack. XFS and Btrfs only grow while they are mounted.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::Result;
use crate::host::{Host, Observe, Signature};
use crate::values::{FsType, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowUnmounted {}

impl Act for GrowUnmounted {
    fn names(&self) -> (&'static str, &'static str) {
        ("grow-unmounted", "keep-size")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "grow the filesystem before it is mounted, if it is an ext4".into(),
            Direction::Undo => "nothing: a filesystem stays as large as it is".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        let device = device_name(facts);
        format!("e2fsck -f -p {device} && resize2fs {device}")
    }

    fn is_applied(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let Some(device) = facts.device.clone() else { return Ok(false) };
        if !matches!(facts.signature, Some(Signature::Filesystem { fs: FsType::Ext4, .. }))
            || !host.mounts_of(&device.path)?.is_empty()
        {
            return Ok(true);
        }
        host.filesystem_fills_device(&device, FsType::Ext4, &device.path)
    }

    fn apply(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        host.grow_unmounted(facts.device()?)
    }
}
