//! `replay`: acknowledged writes that a killed keeper had not flushed go into ZeroFS, before anything
//! reads the device.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::Result;
use crate::host::{Host, KeeperView, Observe};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {}

impl Act for Replay {
    fn names(&self) -> (&'static str, &'static str) {
        ("replay", "keep-log")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "replay acknowledged writes that an earlier keeper left in its log".into(),
            Direction::Undo => "nothing: what was acknowledged stays written".into(),
        }
    }

    fn command(&self, _: Direction, volume: &VolumeId, _: &Facts) -> String {
        format!("# entries of \"$RUN_DIR/volumes/{volume}/replay.log\" into nbd.sock, in order, then a flush")
    }

    fn is_applied(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        Ok(matches!(host.keeper(volume)?, KeeperView::Alive { left_behind: 0, .. }))
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let (entries, note) = host.replay(volume)?;
        facts.replayed = Some(entries);
        facts.notes.extend(note);
        Ok(())
    }
}
