//! What is known of a volume before it is judged, and who can tell what refers to it.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use crate::catalog::{DataPrefix, VolumeRecord};
use crate::error::Result;
use crate::values::VolumeId;

/// Something that refers to a volume.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reference {
    /// What it is.
    pub kind: ReferenceKind,
    /// Its name, and where it is.
    pub name: String,
}

/// The kinds of references.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReferenceKind {
    /// A PersistentVolume that is bound, or can be.
    PersistentVolume,
    /// A PersistentVolume whose claim was deleted and which is kept (`Retain`).
    RetainedVolume,
    /// A VolumeAttachment.
    VolumeAttachment,
    /// A pod: a server of it, or a user.
    Pod,
    /// The journal of a node.
    Journal,
}

impl ReferenceKind {
    /// Whether a server may be running for it.
    pub const fn in_use(self) -> bool {
        matches!(self, Self::VolumeAttachment | Self::Pod | Self::Journal)
    }

    const fn noun(self) -> &'static str {
        match self {
            Self::PersistentVolume => "PersistentVolume",
            Self::RetainedVolume => "retained PersistentVolume",
            Self::VolumeAttachment => "VolumeAttachment",
            Self::Pod => "pod",
            Self::Journal => "the journal of",
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.noun(), self.name)
    }
}

/// Everything that a witness knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Testimony {
    /// The cluster that it speaks for, as records name it; none for what is no cluster, such as a node's journals.
    pub cluster: Option<String>,
    /// Who refers to which volume.
    pub references: BTreeMap<VolumeId, Vec<Reference>>,
}

/// Somebody who can tell what refers to volumes: a cluster, the journals of this node.
///
/// An answer is complete or an error: a time-out, a page that is cut short and a list that is forbidden are errors.
pub trait Witness: Send + Sync {
    /// For messages: `Kubernetes context prod`.
    fn name(&self) -> String;

    /// Everything, in one look.
    fn testify(&self) -> Result<Testimony>;

    /// What refers to one volume now; asked right before its deletion begins.
    fn refers(&self, volume: &VolumeId) -> Result<Vec<Reference>>;
}

/// What the catalog has of a volume.
#[derive(Debug, Clone, PartialEq)]
pub enum Recorded {
    /// No record.
    No,
    /// A record that cannot be used, and why.
    Unusable(String),
    /// A record, and when it was last written, by the store's clock.
    Yes(Box<VolumeRecord>, Timestamp),
}

/// What lies under a volume's prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// What it is.
    pub content: DataPrefix,
    /// How many objects; none if they were not counted.
    pub objects: Option<u64>,
    /// Their bytes.
    pub bytes: u64,
    /// When the newest was written.
    pub newest: Option<Timestamp>,
    /// The newest manifest: whoever writes to a volume writes manifests, with rising numbers.
    pub manifest: Option<String>,
}

impl Facts {
    /// Nothing there.
    pub const EMPTY: Facts =
        Facts { content: DataPrefix::Empty, objects: Some(0), bytes: 0, newest: None, manifest: None };
}
