//! `fsck`: a preen before the mount, when the filesystem was not cleanly unmounted. XFS and Btrfs recover
//! by themselves when they are mounted; for ext4 `e2fsck -p` repairs what is safe to repair.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::Result;
use crate::host::{Host, Observe, Signature};
use crate::values::{FsType, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preen {
    /// Repair nothing.
    pub read_only: bool,
}

impl Act for Preen {
    fn names(&self) -> (&'static str, &'static str) {
        ("fsck", "keep-repairs")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply if self.read_only => "repair nothing, since it is read-only".into(),
            Direction::Apply => "repair what is safe to repair, if it was not cleanly unmounted".into(),
            Direction::Undo => "nothing: repairs stay".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        if self.read_only { "true".into() } else { format!("fsck -p {}", device_name(facts)) }
    }

    fn is_applied(&self, _: &VolumeId, facts: &mut Facts, _: &dyn Observe) -> Result<bool> {
        Ok(match facts.signature {
            None => false,
            Some(Signature::Filesystem { fs: FsType::Ext4, clean: false }) => self.read_only,
            Some(_) => true,
        })
    }

    fn apply(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        if let Some(Signature::Filesystem { fs, .. }) = facts.signature {
            let note = host.preen(facts.device()?, fs)?;
            facts.notes.extend(note);
            facts.signature = Some(Signature::Filesystem { fs, clean: true });
        }
        Ok(())
    }
}
