//! What can go wrong, said so that somebody can act on it.
//!
//! An [`Error`] has a [`Kind`], a sentence, and nearly always a hint that names the command to run next.
//! The kinds are few; [`Kind::row`] is the only place that maps one to an exit code, a gRPC code, a
//! metric label and whether a retry may help.

use std::fmt;
use std::io::ErrorKind;

use serde::Serialize;

use crate::values::VolumeId;

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of a failure: what a caller may do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The request itself is wrong: a flag, a size, a name, a config key.
    Usage,
    /// The volume, path or device does not exist.
    NotFound,
    /// Someone else holds the volume, the device or the mount right now.
    Busy,
    /// The volume exists, but not as asked: another size, filesystem or owner.
    Conflict,
    /// Going on might lose data, so we do not: a doubtful probe, a fenced server, an unknown format.
    Refused,
    /// This machine lacks something: a program, a kernel feature, a privilege, room on a disk.
    Environment,
    /// S3, Kubernetes or ZeroFS does not answer.
    Unreachable,
    /// Stopped by a signal, or a time limit, before the work was complete.
    Interrupted,
    /// Everything else, including what should not happen.
    Failed,
}

/// One row of the error table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The process exit code.
    pub exit: u8,
    /// The gRPC status code number.
    pub grpc: i32,
    /// The metric label.
    pub label: &'static str,
    /// Whether the same request may succeed later without anybody changing anything.
    pub retryable: bool,
}

impl Kind {
    /// Every kind, in the order of the table.
    pub const ALL: [Kind; 9] = [
        Kind::Usage,
        Kind::NotFound,
        Kind::Busy,
        Kind::Conflict,
        Kind::Refused,
        Kind::Environment,
        Kind::Unreachable,
        Kind::Interrupted,
        Kind::Failed,
    ];

    /// The one table from kind to codes. The gRPC numbers are those of the gRPC specification.
    pub const fn row(self) -> Row {
        const fn row(exit: u8, grpc: i32, label: &'static str, retryable: bool) -> Row {
            Row { exit, grpc, label, retryable }
        }
        match self {
            Kind::Usage => row(2, 3, "usage", false),
            Kind::NotFound => row(10, 5, "not-found", false),
            Kind::Busy => row(11, 10, "busy", true),
            Kind::Conflict => row(1, 6, "conflict", false),
            Kind::Refused => row(1, 9, "refused", false),
            Kind::Environment => row(1, 9, "environment", false),
            Kind::Unreachable => row(20, 14, "unreachable", true),
            Kind::Interrupted => row(130, 4, "interrupted", true),
            Kind::Failed => row(1, 13, "failed", true),
        }
    }
}

/// A failure: its kind, what failed, where, and what to do next.
///
/// Never put a secret into any of its texts: they reach logs, reports and terminals.
#[derive(Debug, Clone)]
pub struct Error(Box<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    volume: Option<VolumeId>,
    step: Option<&'static str>,
}

impl Error {
    /// A failure of `kind`; `message` says what failed, in lower case and without a full stop.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, message: message.into(), hint: None, volume: None, step: None }))
    }

    /// Shorthand for [`Kind::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// Shorthand for [`Kind::Refused`].
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// Shorthand for [`Kind::Environment`].
    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(Kind::Environment, message)
    }

    /// Shorthand for [`Kind::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// What to do next; a command where there is one. The first hint wins: it is nearest to the cause.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Names the volume, unless a deeper layer already did.
    pub fn on(mut self, volume: &VolumeId) -> Self {
        self.0.volume.get_or_insert_with(|| volume.clone());
        self
    }

    /// Names the step, unless a deeper layer already did.
    pub fn in_step(mut self, step: &'static str) -> Self {
        self.0.step.get_or_insert(step);
        self
    }

    /// Puts `what` in front of the message: `what: message`.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// Puts `what` behind the message: `message; what`.
    pub fn adding(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{}; {what}", self.0.message);
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The sentence, without volume, step or hint.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The hint, when there is one.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The volume that it is about.
    pub fn volume(&self) -> Option<&VolumeId> {
        self.0.volume.as_ref()
    }

    /// The step that failed.
    pub fn step(&self) -> Option<&'static str> {
        self.0.step
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(volume) = &self.0.volume {
            write!(f, "volume {volume}: ")?;
        }
        if let Some(step) = self.0.step {
            write!(f, "step {step}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {}

/// Turns an I/O error into ours and says what was being done: `File::open(p).doing("open the journal", p)`.
pub trait Doing<T> {
    /// `what` is a verb phrase, `path` the object of it.
    fn doing(self, what: &str, path: impl AsRef<std::path::Path>) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: &str, path: impl AsRef<std::path::Path>) -> Result<T> {
        self.map_err(|e| {
            let e: std::io::Error = e.into();
            let path = path.as_ref();
            let message = format!("cannot {what} {}: {e}", path.display());
            // By its kind, which errors of temporary files have too; their number is hidden.
            match e.kind() {
                ErrorKind::PermissionDenied => {
                    Error::environment(message).hint("run it as root, or with CAP_SYS_ADMIN")
                }
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                    // The file itself may not be there, and df asks for one that is.
                    let place = path.ancestors().find(|p| p.exists()).unwrap_or(path).display();
                    Error::environment(message)
                        .hint(format!("free some room: df -h {place}; then run the same command again"))
                }
                ErrorKind::ReadOnlyFilesystem => Error::environment(message)
                    .hint("choose a writable folder with --state-dir and --run-dir"),
                ErrorKind::InvalidFilename => Error::usage(message).hint("choose shorter folders"),
                _ => Error::failed(message),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_distinct_and_exit_codes_are_those_of_the_design() {
        let labels: std::collections::HashSet<_> = Kind::ALL.iter().map(|k| k.row().label).collect();
        assert_eq!(labels.len(), Kind::ALL.len());
        for kind in Kind::ALL {
            assert!([1, 2, 10, 11, 20, 130].contains(&kind.row().exit), "{kind:?}");
        }
    }

    #[test]
    fn the_hint_nearest_to_the_cause_wins() {
        let e = Error::failed("x").hint("near").hint("far");
        assert_eq!(e.hint_text(), Some("near"));
    }

    #[test]
    fn display_names_volume_and_step() {
        let v: VolumeId = "vol1".parse().unwrap();
        let e = Error::failed("mkfs.ext4 exited with 1").on(&v).in_step("format");
        assert_eq!(e.to_string(), "volume vol1: step format: mkfs.ext4 exited with 1");
    }
}
