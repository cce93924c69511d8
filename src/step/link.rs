//! `link`: for a raw block attach, the target is a symbolic link to the device.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::Result;
use crate::host::{Content, Host, Observe, TargetView};
use crate::values::{TargetPath, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Where.
    pub target: TargetPath,
    /// The device refuses writes.
    pub read_only: bool,
}

impl Link {
    fn linked_here(&self, facts: &Facts, host: &dyn Observe) -> Result<bool> {
        Ok(match (host.target(&self.target)?, &facts.device) {
            (TargetView::Other { link: Some(to) }, Some(device)) => to == device.path,
            _ => false,
        })
    }
}

impl Act for Link {
    fn names(&self) -> (&'static str, &'static str) {
        ("link", "unlink")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => format!("link the device at {}", self.target),
            Direction::Undo => format!("remove the link {}", self.target),
        }
    }

    fn command(&self, direction: Direction, _: &VolumeId, facts: &Facts) -> String {
        match direction {
            Direction::Apply => format!("ln -s {} {}", device_name(facts), self.target),
            Direction::Undo => format!("rm {}", self.target),
        }
    }

    fn is_applied(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        if self.linked_here(facts, host)? {
            return Ok(true);
        }
        match host.target(&self.target)? {
            TargetView::Missing => Ok(false),
            _ => Err(super::target::occupied(&self.target)),
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        // From here on anything may write to the device without our knowing.
        if !self.read_only && facts.content != Some(Content::Raw) && facts.content != Some(Content::Formatted)
        {
            host.record_content(volume, Content::Raw, None)?;
            facts.content = Some(Content::Raw);
        }
        host.link(facts.device()?, &self.target)
    }

    fn is_undone(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        if facts.device.is_none() {
            facts.device = host.device(volume)?.device;
        }
        Ok(!self.linked_here(facts, host)?)
    }

    fn undo(&self, _: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        host.unlink(&self.target)
    }
}
