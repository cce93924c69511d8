//! `format`: mkfs, but only where three witnesses agree that nothing can be lost: both probes say
//! "blank" (`probe-signature`), and the catalog says that the volume was never formatted, or that its first
//! mkfs did not finish. A mount comes only after `formatted` was recorded, so an unfinished mkfs
//! proves that no user data was ever written.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts, device_name};
use crate::error::{Error, Kind, Result};
use crate::host::{Content, Host, Observe, Signature};
use crate::values::{FsType, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// Never: an attach that writes nothing.
    pub read_only: bool,
}

impl Format {
    fn target_fs(facts: &Facts) -> FsType {
        facts.fs.unwrap_or(FsType::Ext4)
    }
}

impl Act for Format {
    fn names(&self) -> (&'static str, &'static str) {
        ("format", "keep-filesystem")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply if self.read_only => {
                "make sure that there is a filesystem (read-only: never make one)".into()
            }
            Direction::Apply => "make a filesystem, only if the device is proven blank".into(),
            Direction::Undo => "nothing: a filesystem stays".into(),
        }
    }

    fn command(&self, direction: Direction, _: &VolumeId, facts: &Facts) -> String {
        match direction {
            Direction::Apply if self.read_only => "true".into(),
            // blkid exits with 2 when it finds nothing; nobody should run a bare mkfs that stands in a report.
            Direction::Apply => {
                let device = device_name(facts);
                let fs = Self::target_fs(facts);
                format!("blkid -p {device}; [ $? = 2 ] && mkfs.{fs} {device}")
            }
            Direction::Undo => "true".into(),
        }
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, _: &dyn Observe) -> Result<bool> {
        let content = facts.content.unwrap_or(Content::Unknown);
        match facts.signature.clone() {
            // Not probed yet: a dry run.
            None => Ok(false),
            // Half a mkfs can look like a whole one, so only the catalog's word counts.
            Some(_) if content == Content::Formatting && !self.read_only => Ok(false),
            Some(_) if content == Content::Formatting => {
                Err(Error::refused("its first mkfs did not finish, so there is no filesystem on it yet")
                    .hint(format!("attach it once without --read-only: zerofsctl attach {volume} --target DIR")))
            }
            Some(Signature::Filesystem { fs, .. }) => {
                if let Some(recorded) = facts.fs
                    && recorded != fs
                    && content == Content::Formatted
                {
                    return Err(Error::refused(format!("the device holds {fs}, but the catalog records {recorded}"))
                        .hint(format!("look at it before anything writes: zerofsctl attach {volume} --block --read-only --target /dev/shm/look")));
                }
                if let Some(asked) = facts.fs
                    && asked != fs
                {
                    return Err(Error::new(Kind::Conflict, format!("the device holds {fs}, not {asked}"))
                        .hint(format!("attach it with --fs {fs}, or without --fs")));
                }
                facts.fs = Some(fs);
                Ok(content == Content::Formatted || self.read_only)
            }
            Some(Signature::Other(what)) => Err(Error::refused(format!("the device is not blank: {what}")).hint(format!(
                "look at it as a raw device: zerofsctl attach {volume} --block --read-only --target /dev/shm/look"
            ))),
            Some(Signature::Blank) if self.read_only => {
                Err(Error::refused("there is no filesystem on it, and a read-only attach makes none")
                    .hint(format!("attach it once without --read-only: zerofsctl attach {volume} --target DIR")))
            }
            Some(Signature::Blank) => match content {
                Content::Never | Content::Formatting => Ok(false),
                Content::Unknown if facts.created_disk => Ok(false),
                Content::Formatted => Err(Error::refused(
                    "the device reads as blank, but the catalog says that it was formatted: its data is missing",
                )
                .hint("do not write to it; compare the objects under its prefix with a backup or an earlier bucket version")),
                Content::Raw => Err(Error::refused(
                    "the volume was used as a raw device; no filesystem is made on it",
                )
                .hint(format!("attach it with --block, or make one yourself: zerofsctl attach {volume} --block --target PATH"))),
                Content::Unknown => Err(Error::refused(
                    "the device reads as blank, but an older driver made the volume, so nothing proves that it was never written",
                )
                .hint(format!("if you know it is new: zerofsctl attach {volume} --block --target PATH, mkfs it, detach, attach again"))),
            },
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let content = facts.content.unwrap_or(Content::Unknown);
        if let Some(Signature::Filesystem { fs, .. }) = facts.signature
            && content != Content::Formatting
        {
            // An adopted or raw volume with a filesystem: only the record is behind.
            if content != Content::Raw {
                host.record_content(volume, Content::Formatted, Some(fs))?;
                facts.content = Some(Content::Formatted);
            }
            return Ok(());
        }
        let fs = Self::target_fs(facts);
        let device = facts.device()?.clone();
        if device.size.bytes() < fs.minimum() {
            return Err(Error::usage(format!("{} is too small for {fs}", device.size))
                .hint(format!("give at least {}", crate::values::ByteSize(fs.minimum()))));
        }
        host.record_content(volume, Content::Formatting, Some(fs))?;
        facts.content = Some(Content::Formatting);
        host.format(&device, fs, volume)?;
        host.record_content(volume, Content::Formatted, Some(fs))?;
        facts.content = Some(Content::Formatted);
        facts.fs = Some(fs);
        facts.signature = Some(Signature::Filesystem { fs, clean: true });
        Ok(())
    }
}
