//! `claim`: the volume is ours in the catalog, so that no other node attaches it.

use serde::{Deserialize, Serialize};

use super::{Act, Direction, Facts};
use crate::error::{Error, Kind, Result};
use crate::host::{ClaimRequest, Claimed, Content, Host, Observe};
use crate::values::{ByteSize, FsType, VolumeId};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Where the data lives.
    pub storage_url: String,
    /// The size asked for; none takes what the volume has, or 1Gi for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// The filesystem asked for; none takes what the volume has, or ext4 for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<FsType>,
    /// Attached as a raw device.
    #[serde(default)]
    pub block: bool,
    /// Only a volume that exists already.
    #[serde(default)]
    pub must_exist: bool,
    /// Take it from an owner that is gone for good.
    #[serde(default)]
    pub take_over: bool,
}

impl Claim {
    fn learn(&self, volume: &VolumeId, claimed: Claimed, facts: &mut Facts) -> Result<()> {
        if let (Some(asked), Some(has)) = (self.size, claimed.capacity)
            && asked != has
        {
            return Err(Error::new(Kind::Conflict, format!("the volume has {has}, not {asked}")).hint(
                if asked > has {
                    format!("attach it without --size, then grow it: zerofsctl resize {volume} {asked}")
                } else {
                    "attach it without --size; a volume never shrinks".to_owned()
                },
            ));
        }
        // A raw volume's filesystem is its user's business.
        if let (Some(asked), Some(has)) = (self.fs, claimed.fs)
            && asked != has
            && claimed.content != Content::Never
        {
            return Err(Error::new(Kind::Conflict, format!("the volume has {has}, not {asked}"))
                .hint(format!("attach it with --fs {has}, or without --fs")));
        }
        facts.epoch = Some(claimed.epoch);
        facts.capacity = claimed.capacity.or(self.size);
        facts.content = Some(claimed.content);
        facts.fs =
            if claimed.content == Content::Never { self.fs.or(claimed.fs) } else { claimed.fs.or(self.fs) };
        for note in claimed.notes {
            if !facts.notes.contains(&note) {
                facts.notes.push(note);
            }
        }
        Ok(())
    }
}

impl Act for Claim {
    fn names(&self) -> (&'static str, &'static str) {
        ("claim", "release")
    }

    fn describe(&self, direction: Direction) -> String {
        match direction {
            Direction::Apply => format!("claim the volume in the catalog of {}", self.storage_url),
            Direction::Undo => "release the volume in the catalog, for any node to attach".into(),
        }
    }

    fn command(&self, direction: Direction, volume: &VolumeId, _: &Facts) -> String {
        let verb = match direction {
            Direction::Apply => "set owner and epoch",
            Direction::Undo => "clear owner",
        };
        format!("# conditional put of {}/.zerofsctl/volumes/{volume}.json: {verb}", self.storage_url)
    }

    fn is_applied(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Observe) -> Result<bool> {
        match host.claim(volume)? {
            // A volume that was never formatted takes its size and filesystem from the newest request.
            Some(c) if c.content == Content::Never && (self.size.is_some() || self.fs.is_some()) => Ok(false),
            Some(claimed) => self.learn(volume, claimed, facts).map(|()| true),
            None => Ok(false),
        }
    }

    fn apply(&self, volume: &VolumeId, facts: &mut Facts, host: &dyn Host) -> Result<()> {
        let request = ClaimRequest {
            storage_url: self.storage_url.clone(),
            size: self.size,
            fs: self.fs,
            block: self.block,
            must_exist: self.must_exist,
            take_over: self.take_over,
        };
        let claimed = host.take_claim(volume, &request)?;
        self.learn(volume, claimed, facts)
    }

    fn is_undone(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Observe) -> Result<bool> {
        host.claim_absent(volume)
    }

    fn undo(&self, volume: &VolumeId, _: &mut Facts, host: &dyn Host) -> Result<()> {
        host.release_claim(volume)
    }
}
