//! A plan: the ordered list of steps that one operation on one volume takes. Plain data: it is printed,
//! written to the journal, and read back by whoever settles a run that was killed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::host::{Content, Signature};
use crate::step::Step;
use crate::values::{ByteSize, FsType, TargetPath, VolumeId};

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
        }
    }

    /// Whether a run of this operation that was cut short is finished rather than unwound. What takes
    /// things down is always finished: half a detach is of no use to anybody. A resize is too: a disk
    /// that has grown never shrinks again.
    pub const fn settles_forward(self) -> bool {
        matches!(self, Operation::Detach | Operation::Resize | Operation::Clear)
    }
}

/// Which way a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Make it so.
    Apply,
    /// Make it so no longer.
    Undo,
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

/// A block device that shows a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `/dev/loop3`
    pub path: PathBuf,
    /// Whether writes are refused by the device.
    pub read_only: bool,
    /// Its size.
    pub size: ByteSize,
}

/// What the steps of a run learnt, for the steps after them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The attach epoch that the catalog gave us.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// The size of the volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<ByteSize>,
    /// What the catalog says of its content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Content>,
    /// The filesystem that it has, or shall get.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<FsType>,
    /// Whether this run created the disk, which proves that it is empty.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub created_disk: bool,
    /// The block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// What was found on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
    /// Entries that the replay log of an earlier keeper gave back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replayed: Option<u64>,
    /// Targets that we made, and so remove again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub made_targets: Vec<TargetPath>,
    /// Worth telling, though no error: shown below the report.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What a check of the filesystem found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckResult>,
    /// Byte ranges (start, length) that could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<Vec<(u64, u64)>>,
}

/// What a filesystem check said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckResult {
    /// No fault found, or every fault was repaired.
    pub clean: bool,
    /// Whether something was repaired.
    pub repaired: bool,
    /// The program's own words, bounded.
    pub output: String,
}

impl Facts {
    /// What a new run on the same volume still needs to know of earlier ones: which folders are ours.
    pub fn carried(&self) -> Facts {
        Facts { made_targets: self.made_targets.clone(), ..Facts::default() }
    }

    /// The device, which a plan's order guarantees to be known from `connect` on.
    pub fn device(&self) -> crate::error::Result<&Device> {
        self.device.as_ref().ok_or_else(|| {
            crate::error::Error::failed("the journal names no device for this volume")
                .hint("run: zerofsctl recover")
        })
    }
}
