//! `write-config`: config.toml for the ZeroFS version found, readable by root only.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::Result;
use crate::host::{Host, Observe};
use crate::values::VolumeId;

/// See the module. The config holds secrets, so it is in no plan: the host renders it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteConfig {}

impl Act for WriteConfig {
    fn names(&self) -> (&'static str, &'static str) {
        ("write-config", "remove-config")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "write the config of ZeroFS (mode 0600)".into(),
            Direction::Undo => "remove the config and the cache of ZeroFS".into(),
        }
    }

    fn command(&self, direction: Direction, volume: &VolumeId, _: &Facts) -> String {
        match direction {
            Direction::Apply => {
                format!("install -m 0600 config.toml \"$STATE_DIR/volumes/{volume}/config.toml\"")
            }
            Direction::Undo => format!("rm -r \"$STATE_DIR/volumes/{volume}\""),
        }
    }

    fn is_applied(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        host.config_present(volume)
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        host.write_config(volume, facts.capacity)
    }

    fn is_undone(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        host.config_absent(volume)
    }

    fn undo(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        host.remove_config(volume)
    }
}
