//! `read-data`: all of the device, or a slice of it, is read through ZeroFS, so that what cannot be read is
//! known before it is needed.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::Result;
use crate::host::{Host, Observe};
use crate::values::{Slice, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadData {
    /// Which part.
    pub slice: Slice,
}

impl Act for ReadData {
    fn names(&self) -> (&'static str, &'static str) {
        ("read-data", "forget-data")
    }

    fn describe(&self, _: Direction) -> String {
        format!("read {} of the data through ZeroFS", self.slice)
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        format!("dd if={} of=/dev/null bs=1M iflag=direct conv=noerror", device_name(facts))
    }

    fn is_applied(&self, _: &VolumeId, _: &mut Facts, _: &dyn Observe) -> Result<bool> {
        Ok(false)
    }

    fn apply(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        facts.unreadable = Some(host.read_data(facts.device()?, self.slice)?);
        Ok(())
    }
}
