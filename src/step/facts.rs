//! What a step is told and what it learns.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::host::{CheckResult, Content, Device, IoPath, Signature, Transport};
use crate::values::{ByteSize, FsType, TargetPath};

/// Which way a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Make it so.
    Apply,
    /// Make it so no longer.
    Undo,
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
    /// How it was made; never [`Transport::Auto`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// The path of an NBD device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<IoPath>,
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

impl Facts {
    /// What a new run on the same volume still needs to know of earlier ones: which folders are ours.
    pub fn carried(&self) -> Facts {
        Facts { made_targets: self.made_targets.clone(), ..Facts::default() }
    }

    /// The device, which a plan's order guarantees to be known from `connect` on.
    pub fn device(&self) -> Result<&Device> {
        self.device.as_ref().ok_or_else(|| {
            Error::failed("the journal names no device for this volume").hint("run: zerofsctl recover")
        })
    }
}
