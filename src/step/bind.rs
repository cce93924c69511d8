//! `bind`: what is staged appears at one more place: the filesystem in a folder, or the device's node as a file.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name, target};
use crate::error::{Error, Kind, Result};
use crate::host::{Content, Host, Life, MountEntry, Observe, TargetView};
use crate::values::{TargetPath, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Where.
    pub target: TargetPath,
    /// The mounted filesystem that appears there; none for the device itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<TargetPath>,
    /// Not to be written through this place.
    pub read_only: bool,
}

impl Bind {
    /// Whether what is mounted at the target is the volume.
    fn is_ours(&self, entry: &MountEntry, facts: &Facts, host: &dyn Observe) -> Result<bool> {
        let Some(device) = &facts.device else { return Ok(false) };
        if self.source.is_some() {
            return Ok(entry.source == device.path.to_string_lossy());
        }
        host.is_node_of(&self.target, &device.path)
    }

    /// Whether the volume is at the target. Something else there is not ours to unmount.
    fn bound_here(&self, facts: &Facts, host: &dyn Observe) -> Result<bool> {
        match host.target(&self.target)? {
            TargetView::MountPoint(entry) => self.is_ours(&entry, facts, host),
            _ => Ok(false),
        }
    }

    /// A device's node says by itself nothing of who may write: the device does.
    fn check_device(&self, facts: &Facts) -> Result<()> {
        if self.read_only && !facts.device()?.read_only {
            return Err(Error::refused("a device that is staged read-write cannot be handed out read-only")
                .hint(
                    "give the volume the access mode SINGLE_NODE_READER_ONLY (ReadOnlyMany is not served)",
                ));
        }
        Ok(())
    }

    /// The device can have another name since a keeper was replaced.
    fn learn_device(volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<()> {
        if let Some(device) = host.device(volume)?.device {
            facts.device = Some(device);
        }
        Ok(())
    }
}

impl Act for Bind {
    fn names(&self) -> (&'static str, &'static str) {
        ("bind", "unbind")
    }

    fn describe(&self, direction: Direction) -> String {
        let read_only = if self.read_only { " read-only" } else { "" };
        match (direction, &self.source) {
            (Direction::Apply, Some(source)) => format!("bind {source}{read_only} at {}", self.target),
            (Direction::Apply, None) => format!("bind the device{read_only} at {}", self.target),
            (Direction::Undo, _) => format!("unmount {} and remove it", self.target),
        }
    }

    fn command(&self, direction: Direction, _: &VolumeId, facts: &Facts) -> String {
        let target = &self.target;
        let source = self.source.as_ref().map_or_else(|| device_name(facts), ToString::to_string);
        let make = if self.source.is_some() { "mkdir" } else { "touch" };
        let options = if self.read_only { "-o bind,ro" } else { "--bind" };
        match direction {
            Direction::Apply => format!("{make} {target} && mount {options} {source} {target}"),
            Direction::Undo if self.source.is_some() => format!("umount {target} && rmdir {target}"),
            Direction::Undo => format!("umount {target} && rm {target}"),
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        Self::learn_device(volume, facts, host)?;
        match host.target(&self.target)? {
            TargetView::MountPoint(entry) if self.is_ours(&entry, facts, host)? => {
                if self.source.is_none() {
                    self.check_device(facts)?;
                }
                // Of a device's node, the mount's own flag means nothing: the device says whether it takes writes.
                if self.source.is_some() && entry.read_only != self.read_only {
                    let (is, asked) = if entry.read_only {
                        ("read-only", "read-write")
                    } else {
                        ("read-write", "read-only")
                    };
                    return Err(Error::new(
                        Kind::Conflict,
                        format!("it is at {} {is}, not {asked}", self.target),
                    )
                    .hint("unpublish it there first"));
                }
                Ok(true)
            }
            TargetView::MountPoint(entry) => Err(target::mounted(&self.target, &entry)),
            TargetView::Missing | TargetView::EmptyFolder if self.source.is_some() => Ok(false),
            TargetView::FullFolder if self.source.is_some() => Err(target::not_empty(&self.target)),
            _ if self.source.is_some() => Err(target::not_a_folder(&self.target)),
            TargetView::Missing => Ok(false),
            TargetView::Other { link: None } if host.is_empty_file(&self.target)? => Ok(false),
            _ => Err(target::occupied(&self.target)),
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let device = facts.device()?.clone();
        let missing = host.target(&self.target)? == TargetView::Missing;
        let Some(source) = &self.source else {
            self.check_device(facts)?;
            // From here on anything may write to the device without our knowing.
            if !device.read_only && !matches!(facts.content, Some(Content::Raw | Content::Formatted)) {
                host.record_content(volume, Content::Raw, None)?;
                facts.content = Some(Content::Raw);
            }
            if missing {
                host.make_file(&self.target)?;
            }
            return host.bind(&device.path, &self.target, false);
        };
        if missing {
            host.make_folder(&self.target)?;
        }
        host.bind(source.as_path(), &self.target, self.read_only)
    }

    fn is_undone(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        Self::learn_device(volume, facts, host)?;
        Ok(match host.target(&self.target)? {
            TargetView::MountPoint(entry) => !self.is_ours(&entry, facts, host)?,
            TargetView::EmptyFolder => false,
            TargetView::Other { link: None } => !host.is_empty_file(&self.target)?,
            _ => true,
        })
    }

    fn undo(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        Self::learn_device(volume, facts, host)?;
        if self.bound_here(facts, host)? {
            let dead = host.device(volume)?.life == Life::Dead;
            host.unmount(self.target.as_path(), dead)?;
        }
        // Whoever made it: after an unpublish there must be nothing.
        host.clear_target(&self.target)
    }
}
