//! `create-disk`: the file inside ZeroFS that is the block device.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::{Error, Result};
use crate::host::{Content, Host, KeeperView, Observe};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateDisk {}

impl Act for CreateDisk {
    fn names(&self) -> (&'static str, &'static str) {
        ("create-disk", "remove-disk")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "create the disk inside ZeroFS over 9P".into(),
            Direction::Undo => "remove the disk that this run created and nobody wrote".into(),
        }
    }

    fn command(&self, direction: Direction, _: &VolumeId, facts: &Facts) -> String {
        match direction {
            Direction::Apply => format!(
                "truncate -s {} \"$NINEP_MOUNT/.nbd/disk\" && sync",
                facts.capacity.map_or_else(|| "\"$SIZE\"".into(), |c| c.bytes().to_string())
            ),
            Direction::Undo => "rm \"$NINEP_MOUNT/.nbd/disk\"".into(),
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        let Some(size) = host.disk_size(volume)? else {
            if !matches!(facts.content, Some(Content::Never | Content::Unknown) | None) {
                return Err(Error::refused("the catalog says that this volume was written, but it has no disk")
                    .hint("the data under its prefix is not that of this volume, or it was deleted: restore it before attaching"));
            }
            facts.created_disk = true;
            return Ok(false);
        };
        // A size of zero is what a crash between creating and sizing leaves.
        if size.bytes() == 0 {
            facts.created_disk = true;
            return Ok(false);
        }
        match facts.capacity {
            Some(wanted) if size < wanted => {
                // Never written: sizing was cut short or asked anew. Written: a resize was cut short after
                // the record was written, which the order of resize forbids.
                if facts.content == Some(Content::Never) {
                    return Ok(false);
                }
                Err(Error::refused(format!(
                    "its disk has {size}, less than the {wanted} that the catalog records"
                ))
                .hint(format!("if a resize was cut short, run: zerofsctl recover {volume}")))
            }
            // Larger than recorded: a resize was cut short before it could record the new size.
            _ => {
                facts.capacity = Some(size);
                Ok(true)
            }
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let capacity = facts.capacity.ok_or_else(|| {
            Error::usage("the volume has no disk yet, and no size was given")
                .hint("say how large it shall be: --size 10Gi")
        })?;
        host.create_disk(volume, capacity)
    }

    fn is_undone(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        // Only a disk that this very run made, and that never went further than being empty: the catalog knows,
        // the facts of a killed run may be behind.
        Ok(!facts.created_disk
            || host.claim(volume)?.is_none_or(|c| c.content != Content::Never)
            || !matches!(host.keeper(volume)?, KeeperView::Alive { usable: true, .. }))
    }

    fn undo(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        host.remove_disk(volume)
    }
}
