//! `grow-disk`: the disk inside ZeroFS gets the new size, then the catalog does.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::{Error, Result};
use crate::host::{Host, Observe};
use crate::values::{ByteSize, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowDisk {
    /// The new size.
    pub size: ByteSize,
}

impl Act for GrowDisk {
    fn names(&self) -> (&'static str, &'static str) {
        ("grow-disk", "keep-disk")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => format!("grow the disk inside ZeroFS to {}", self.size),
            Direction::Undo => "nothing: a disk never shrinks".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, _: &Facts) -> String {
        format!("truncate -s {} \"$NINEP_MOUNT/.nbd/disk\" && sync", self.size.bytes())
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let size = host.disk_size(volume)?.ok_or_else(|| {
            Error::refused("it has no disk").hint(format!("look at it: zerofsctl show {volume}"))
        })?;
        if size > self.size {
            return Err(Error::usage(format!("it has {size} already, and a volume never shrinks"))
                .hint(format!("give more than {size}; to shrink, copy the data to a new volume")));
        }
        facts.capacity = Some(size);
        let recorded = host.claim(volume)?.and_then(|c| c.capacity);
        Ok(size == self.size && recorded == Some(size))
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        host.grow_disk(volume, self.size)?;
        host.record_capacity(volume, self.size)?;
        facts.capacity = Some(self.size);
        Ok(())
    }
}
