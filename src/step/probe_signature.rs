//! `probe-signature`: what is on the device, by two independent probes. It changes nothing.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::Result;
use crate::host::{Content, Host, Observe, Signature};
use crate::values::{FsType, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeSignature {}

impl Act for ProbeSignature {
    fn names(&self) -> (&'static str, &'static str) {
        ("probe-signature", "forget-signature")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => {
                "look twice what is on the device: blkid, and our own superblock table".into()
            }
            Direction::Undo => "nothing".into(),
        }
    }

    fn command(&self, _: Direction, _: &VolumeId, facts: &Facts) -> String {
        format!("blkid -p -o export {}", device_name(facts))
    }

    fn is_applied(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        // A mounted filesystem is in use: its superblock looks unclean, and that is as it should be.
        let Some(device) = facts.device.clone() else { return Ok(false) };
        let mounted = host.mounts_of(&device.path)?;
        let fs: Option<FsType> = mounted.first().and_then(|m| m.fs.parse().ok());
        if let Some(fs) = fs {
            facts.signature = Some(Signature::Filesystem { fs, clean: true });
            facts.fs = Some(fs);
        }
        Ok(fs.is_some())
    }

    fn apply(&self, _: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        // What an earlier command began to unmount may still be written to, and is in no mount table.
        host.finish_unmount(facts.device()?)?;
        let recorded = facts.fs.filter(|_| facts.content == Some(Content::Formatted));
        let signature = host.signature(&facts.device()?.path, recorded)?;
        facts.signature = Some(signature);
        Ok(())
    }
}
