//! `start`: the keeper and its ZeroFS run, and both sockets answer.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::{Error, Result};
use crate::host::{Host, KeeperOptions, KeeperView, Observe, StopOptions};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// For the keeper.
    pub options: KeeperOptions,
    /// How a stop behaves.
    pub stop: StopOptions,
}

impl Act for Start {
    fn names(&self) -> (&'static str, &'static str) {
        ("start", "stop")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => "start keeper and ZeroFS, wait until both sockets answer".into(),
            Direction::Undo if self.stop.force => {
                "flush and stop ZeroFS; kill it when that takes too long".into()
            }
            Direction::Undo => "flush and stop ZeroFS, wait for its clean exit".into(),
        }
    }

    fn command(&self, direction: Direction, volume: &VolumeId, _: &Facts) -> String {
        match direction {
            Direction::Apply => format!("zerofs run -c \"$STATE_DIR/volumes/{volume}/config.toml\" &"),
            Direction::Undo => "kill -TERM \"$ZEROFS_PID\" && wait".into(),
        }
    }

    fn is_applied(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        match host.keeper(volume)? {
            KeeperView::Dead { .. } => Ok(false),
            KeeperView::Alive { usable: true, .. } => Ok(true),
            KeeperView::Alive { state, reason, .. } => {
                let reason = reason.map(|r| format!(": {r}")).unwrap_or_default();
                Err(Error::refused(format!("its ZeroFS is {state}{reason}"))
                    .hint(format!("take it down first: zerofsctl detach {volume}")))
            }
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let epoch = facts.epoch.ok_or_else(|| Error::failed("the claim left no epoch"))?;
        host.start_keeper(volume, epoch, &self.options)
    }

    fn is_undone(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        // A keeper that was killed could not tidy up after itself.
        let gone = host.keeper(volume)? == KeeperView::Dead { orphan: false, left_behind: 0 };
        Ok(gone && !host.keeper_files(volume)?)
    }

    fn undo(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        host.stop_keeper(volume, &self.stop)
    }
}
