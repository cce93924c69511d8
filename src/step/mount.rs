//! `mount`: the filesystem is mounted at the target, exactly there.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name, target};
use crate::error::{Error, Kind, Result};
use crate::host::{Host, Life, Observe, TargetView};
use crate::values::{TargetPath, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where.
    pub target: TargetPath,
    /// Options for mount(8), checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// Mounted read-only.
    pub read_only: bool,
}

impl Mount {
    /// Refuses a target that a mount would hide something at. True when our device is mounted there.
    fn ours(&self, facts: &Facts, host: &dyn Observe) -> Result<bool> {
        let target = &self.target;
        match host.target(target)? {
            TargetView::Missing | TargetView::EmptyFolder => Ok(false),
            TargetView::FullFolder => Err(target::not_empty(target)),
            TargetView::Other { .. } => Err(target::not_a_folder(target)),
            TargetView::MountPoint(entry) => match &facts.device {
                Some(device) if entry.source == device.path.to_string_lossy() => Ok(true),
                _ => Err(target::mounted(target, &entry)),
            },
        }
    }
}

impl Act for Mount {
    fn names(&self) -> (&'static str, &'static str) {
        ("mount", "unmount")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply if self.read_only => format!("mount it read-only at {}", self.target),
            Direction::Apply => format!("mount it at {}", self.target),
            Direction::Undo => format!("unmount {}", self.target),
        }
    }

    fn command(&self, direction: Direction, _: &VolumeId, facts: &Facts) -> String {
        match direction {
            Direction::Apply => {
                let mut options = self.options.clone();
                options.insert(0, if self.read_only { "ro" } else { "rw" }.into());
                let fs = facts.fs.map_or("\"$FS\"".to_owned(), |fs| fs.to_string());
                format!("mount -t {fs} -o {} {} {}", options.join(","), device_name(facts), self.target)
            }
            Direction::Undo => format!("umount {}", self.target),
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        if !self.ours(facts, host)? {
            // Noted before it is made: a kill right after the making must not leave it behind.
            if host.target(&self.target)? == TargetView::Missing && !facts.made_targets.contains(&self.target)
            {
                facts.made_targets.push(self.target.clone());
            }
            return Ok(false);
        }
        if let TargetView::MountPoint(entry) = host.target(&self.target)?
            && entry.read_only != self.read_only
        {
            return Err(if self.read_only {
                Error::new(Kind::Conflict, format!("it is mounted read-write at {}", self.target))
            } else {
                // The kernel turns a filesystem read-only when it saw an error.
                return Err(Error::refused(format!("it has become read-only at {}", self.target)).hint(
                    format!("mount it anew: zerofsctl recover {volume}; or detach it and attach it again"),
                ));
            }
            .hint(format!("detach it and attach it again: zerofsctl detach {volume}")));
        }
        Ok(true)
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        if host.target(&self.target)? == TargetView::Missing {
            host.make_folder(&self.target)?;
        }
        let fs = facts.fs.ok_or_else(|| {
            Error::failed("no filesystem is known on the device")
                .hint(format!("run: zerofsctl fsck {volume}"))
        })?;
        host.mount(facts.device()?, fs, &self.target, &self.options, self.read_only)
    }

    fn is_undone(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        if facts.device.is_none() {
            facts.device = host.device(volume)?.device;
        }
        let folder_left = facts.made_targets.contains(&self.target)
            && matches!(host.target(&self.target)?, TargetView::EmptyFolder);
        Ok(!self.mounted_here(facts, host)? && !folder_left)
    }

    fn undo(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        if facts.device.is_none() {
            facts.device = host.device(volume)?.device;
        }
        if self.mounted_here(facts, host)? {
            let dead = host.device(volume)?.life == Life::Dead;
            host.unmount(self.target.as_path(), dead)?;
        }
        if facts.made_targets.contains(&self.target) {
            host.remove_folder(&self.target)?;
            facts.made_targets.retain(|t| t != &self.target);
        }
        Ok(())
    }
}

impl Mount {
    /// Whether our device is mounted exactly at the target. Something else there is not ours to unmount.
    fn mounted_here(&self, facts: &Facts, host: &dyn Observe) -> Result<bool> {
        Ok(match (host.target(&self.target)?, &facts.device) {
            (TargetView::MountPoint(entry), Some(device)) => entry.source == device.path.to_string_lossy(),
            _ => false,
        })
    }
}
