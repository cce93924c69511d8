//! `grant-group`: the files of a mounted volume are opened to a group, as a pod's fsGroup asks. The filesystems that we
//! have know no such mount option, so the files themselves are changed, unless their root says that it was done.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::Result;
use crate::host::{Host, Observe, TargetView};
use crate::values::{TargetPath, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantGroup {
    /// Where it is mounted.
    pub target: TargetPath,
    /// The group's number.
    pub gid: u32,
}

impl Act for GrantGroup {
    fn names(&self) -> (&'static str, &'static str) {
        ("grant-group", "keep-group")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => format!("open its files to group {}", self.gid),
            Direction::Undo => "nothing: the files keep their group".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, _: &Facts) -> String {
        let (gid, target) = (self.gid, &self.target);
        format!(
            "chgrp -R {gid} {target}; chmod -R g+rwX {target}; find {target} -type d -exec chmod g+s {{}} +"
        )
    }

    fn is_applied(&self, _: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        match host.target(&self.target)? {
            TargetView::MountPoint(entry) if !entry.read_only => host.group_granted(&self.target, self.gid),
            // What cannot be written keeps its group.
            TargetView::MountPoint(_) => Ok(true),
            _ => Ok(false),
        }
    }

    fn apply(&self, _: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        host.grant_group(&self.target, self.gid)
    }
}
