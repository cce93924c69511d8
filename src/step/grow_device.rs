//! `grow-device`: keeper and kernel learn the new size; nothing is disconnected.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::{Error, Result};
use crate::host::{Host, Observe, Transport};
use crate::values::{ByteSize, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowDevice {
    /// The new size.
    pub size: ByteSize,
}

impl Act for GrowDevice {
    fn names(&self) -> (&'static str, &'static str) {
        ("grow-device", "keep-device")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => format!("let the block device grow to {}, online", self.size),
            Direction::Undo => "nothing: a device never shrinks".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        let device = device_name(facts);
        match facts.transport {
            // No program does this: it is one message of the kernel's netlink family nbd.
            Some(Transport::Nbd) => {
                format!("# NBD_CMD_RECONFIGURE of {device} with SIZE_BYTES={}", self.size.bytes())
            }
            _ => format!("losetup --set-capacity {device}"),
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let device = host.device(volume)?.device.ok_or_else(|| {
            Error::refused("it has no block device")
                .hint(format!("attach it again: zerofsctl recover {volume}"))
        })?;
        let grown = device.size >= self.size;
        facts.device = Some(device);
        Ok(grown)
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        facts.device = Some(host.grow_device(volume)?);
        Ok(())
    }
}
