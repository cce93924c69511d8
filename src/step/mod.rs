//! The steps: one file each, one closed enum over them.
//!
//! A step knows how to tell whether it is already so, how to make it so, and how to take it back. It
//! never calls another step; what it learns goes into the [`Facts`], where later steps read it. Probing
//! comes first in both directions, which makes recovery the normal path.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::host::{Host, Observe};
use crate::values::VolumeId;

mod bind;
mod check;
mod claim;
mod connect;
mod create_disk;
mod facts;
mod format;
mod grant_group;
mod grow_device;
mod grow_disk;
mod grow_filesystem;
mod grow_unmounted;
mod link;
mod mount;
mod preen;
mod probe_signature;
mod read_data;
mod replay;
mod start;
pub(crate) mod target;
mod write_config;

pub use bind::Bind;
pub use check::Check;
pub use claim::Claim;
pub use connect::Connect;
pub use create_disk::CreateDisk;
pub use facts::{Direction, Facts};
pub use format::Format;
pub use grant_group::GrantGroup;
pub use grow_device::GrowDevice;
pub use grow_disk::GrowDisk;
pub use grow_filesystem::GrowFilesystem;
pub use grow_unmounted::GrowUnmounted;
pub use link::Link;
pub use mount::Mount;
pub use preen::Preen;
pub use probe_signature::ProbeSignature;
pub use read_data::ReadData;
pub use replay::Replay;
pub use start::Start;
pub use write_config::WriteConfig;

/// What every step can do. `is_applied` and `is_undone` may learn facts, never change anything.
pub(crate) trait Act {
    /// Name forwards and backwards.
    fn names(&self) -> (&'static str, &'static str);
    /// A sentence on what it does, without a full stop.
    fn describe(&self, direction: Direction) -> String;
    /// A shell command that does about the same by hand.
    fn command(&self, direction: Direction, volume: &VolumeId, facts: &Facts) -> String;
    /// Whether there is nothing to apply.
    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool>;
    /// Makes it so.
    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()>;
    /// Whether there is nothing to undo; so it is for a step that learns, or whose effect stays.
    fn is_undone(&self, _: &VolumeId, _: &mut Facts, _: &dyn Observe) -> Result<bool> {
        Ok(true)
    }
    /// Takes it back, also when it was only half applied.
    fn undo(&self, _: &VolumeId, _: &mut Facts, _: &dyn Host) -> Result<()> {
        Ok(())
    }
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// One change to the world.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(tag = "step", rename_all = "kebab-case")]
        pub enum Step { $($(#[$doc])* $name($name)),+ }

        impl Step {
            fn act(&self) -> &dyn Act {
                match self { $(Step::$name(step) => step),+ }
            }
        }

        $(impl From<$name> for Step {
            fn from(step: $name) -> Step { Step::$name(step) }
        })+
    };
}

steps! {
    /// The volume is ours in the catalog.
    Claim,
    /// The ZeroFS config is on disk.
    WriteConfig,
    /// Keeper and ZeroFS run.
    Start,
    /// The disk exists inside ZeroFS.
    CreateDisk,
    /// What an earlier keeper left in its log is in ZeroFS.
    Replay,
    /// The block device is there.
    Connect,
    /// We know what is on the device.
    ProbeSignature,
    /// It has a filesystem.
    Format,
    /// The filesystem needs no repair before it is mounted.
    Preen,
    /// It is mounted.
    Mount,
    /// The device is linked at the target.
    Link,
    /// What is staged appears at the target.
    Bind,
    /// Its files are open to a group.
    GrantGroup,
    /// The disk inside ZeroFS has the new size.
    GrowDisk,
    /// The block device has it.
    GrowDevice,
    /// The filesystem has it.
    GrowFilesystem,
    /// An ext4 has it while it is not mounted.
    GrowUnmounted,
    /// The filesystem was checked.
    Check,
    /// The data was read.
    ReadData,
}

impl Step {
    /// The step's name: `mount`.
    pub fn name(&self) -> &'static str {
        self.act().names().0
    }

    /// Its name backwards: `unmount`.
    pub fn undo_name(&self) -> &'static str {
        self.act().names().1
    }

    /// A sentence on what it does in that direction.
    pub fn describe(&self, direction: Direction) -> String {
        self.act().describe(direction)
    }

    /// A shell command that does about the same.
    pub fn command(&self, direction: Direction, volume: &VolumeId, facts: &Facts) -> String {
        self.act().command(direction, volume, facts)
    }

    /// Whether it depends on what earlier steps find, so that a dry run cannot know.
    pub fn learns_on_the_way(&self) -> bool {
        matches!(self, Step::Replay(_) | Step::Format(_) | Step::Preen(_))
    }

    /// Whether there is nothing to do in that direction.
    pub fn is_settled(
        &self,
        direction: Direction,
        volume: &VolumeId,
        facts: &mut Facts,
        host: &dyn Observe,
    ) -> Result<bool> {
        match direction {
            Direction::Apply => self.act().is_applied(volume, facts, host),
            Direction::Undo => self.act().is_undone(volume, facts, host),
        }
    }

    /// Does it.
    pub fn execute(
        &self,
        direction: Direction,
        volume: &VolumeId,
        facts: &mut Facts,
        host: &dyn Host,
    ) -> Result<()> {
        match direction {
            Direction::Apply => self.act().apply(volume, facts, host),
            Direction::Undo => self.act().undo(volume, facts, host),
        }
    }
}

/// The device's path for a command line, or a placeholder before it is known.
fn device_name(facts: &Facts) -> String {
    facts.device.as_ref().map_or_else(|| "\"$DEVICE\"".to_owned(), |d| d.path.display().to_string())
}
