//! A plan: the ordered list of steps that one operation on one volume takes. Plain data: it is printed,
//! written to the journal, and read back by whoever settles a run that was killed.

use serde::{Deserialize, Serialize};

use crate::step::{Direction, Step};
use crate::values::VolumeId;

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Make a volume usable at a target.
    Attach,
    /// Take it away from one target, or altogether.
    Detach,
    /// Grow it.
    Resize,
    /// Grow it while it is not attached.
    ResizeDetached,
    /// Check its filesystem while nothing uses it.
    Fsck,
    /// Take down the device that a dead keeper left.
    Clear,
    /// Let what is staged appear at one more place.
    Publish,
    /// Take it away from there.
    Unpublish,
}

impl Operation {
    /// The verb, as commands and reports spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Attach => "attach",
            Operation::Detach => "detach",
            Operation::Resize | Operation::ResizeDetached => "resize",
            Operation::Fsck => "fsck",
            Operation::Clear => "clear",
            Operation::Publish => "publish",
            Operation::Unpublish => "unpublish",
        }
    }

    /// Whether a run of this operation that was cut short is finished rather than unwound. What takes
    /// things down is always finished: half a detach is of no use to anybody. A resize is too: a disk
    /// that has grown never shrinks again.
    pub const fn settles_forward(self) -> bool {
        matches!(self, Operation::Detach | Operation::Resize | Operation::Clear | Operation::Unpublish)
    }
}

/// A step and its direction: one line of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Which way.
    pub direction: Direction,
    /// What.
    #[serde(flatten)]
    pub step: Step,
}

impl Task {
    /// A step to apply.
    pub fn apply(step: Step) -> Self {
        Task { direction: Direction::Apply, step }
    }

    /// A step to undo.
    pub fn undo(step: Step) -> Self {
        Task { direction: Direction::Undo, step }
    }

    /// The name that reports, metrics and errors use: `mount`, and `unmount` backwards.
    pub fn name(&self) -> &'static str {
        match self.direction {
            Direction::Apply => self.step.name(),
            Direction::Undo => self.step.undo_name(),
        }
    }
}

/// The ordered tasks of one operation on one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What it is for.
    pub operation: Operation,
    /// On which volume.
    pub volume: VolumeId,
    /// In this order.
    pub tasks: Vec<Task>,
}
