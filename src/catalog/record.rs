//! The catalog record of one volume, and the moves that are legal on it.
//!
//! The moves are pure: record in, record or refusal out. Whoever applies one writes the result with a conditional
//! put, so that of several racers exactly one wins.
//!
//! The record is JSON with `"format": 1`. A newer format is refused. Unknown fields of this format are kept
//! when the record is written again: a newer zerofsctl may have put them there, and an older one on another
//! node must not lose them. That makes it a rule for format 1: a field that an old version may not ignore
//! needs a new format number.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tombstone::{Sweeper, Tombstone};
use crate::error::{Error, Kind, Result};
use crate::password::PasswordCheck;
use crate::values::{ByteSize, FsType, VolumeId};

/// The format that this version writes, and the newest that it reads.
pub const FORMAT: u64 = 1;

/// A record larger than this is not one of ours. A real one has about 1 KiB.
pub const MAX_BYTES: u64 = 64 * 1024;

/// One volume, as the bucket knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The volume.
    pub id: VolumeId,
    /// The size of its block device, in bytes.
    pub capacity: ByteSize,
    /// The filesystem that it has, or is to get; none for a raw or not yet examined device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FsType>,
    /// When the record was made.
    pub created: Timestamp,
    /// The Kubernetes cluster that it belongs to, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// The ZeroFS version that last had it open for writing; none when an older driver wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zerofs_version: Option<String>,
    /// What is known of the device's content; decides whether mkfs may ever run.
    pub content: Content,
    /// Whether the volume was there before its record.
    #[serde(default)]
    pub adopted: bool,
    /// Goes up by one whenever the volume gets another owner. A replay log of an older epoch is void.
    pub epoch: u64,
    /// Who has it attached; none while it is detached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Where it is in its life.
    pub state: State,
    /// Tells a wrong encryption password before ZeroFS is started with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_check: Option<PasswordCheck>,
    /// What CreateVolume asked for; none for a volume that was made by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provision: Option<super::Provision>,
    /// The node that it is published to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<super::Published>,
    /// The node that the orchestrator took it from while that node still had it attached: it may be taken over there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
    /// The size that it is to grow to when a node has it next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<ByteSize>,
    /// Settings of its own, over those of the installation; see [`crate::settings::MUTABLE_KEYS`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tuning: BTreeMap<String, String>,
    /// Set when it is to be deleted after a grace period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tombstone: Option<Tombstone>,
    /// Who deletes its data, in the state `deleting`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweeper: Option<Sweeper>,
    /// Fields of this format that this version does not know, kept as they are.
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

/// What is known of the device's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// Nothing was ever written to the device.
    Never,
    /// mkfs was started. No user data was ever written, because a mount comes only after `Formatted` was recorded.
    Formatting,
    /// It has a filesystem, and maybe user data.
    Formatted,
    /// It was handed out as a raw block device: whatever is on it is the user's.
    Raw,
    /// Adopted from an older driver: nobody can prove that it was never formatted.
    Unknown,
}

impl Content {
    /// Whether the catalog allows mkfs; the device must be proven blank as well.
    pub const fn allows_format(self) -> bool {
        matches!(self, Content::Never | Content::Formatting)
    }
}

/// Where a volume is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// In service, attached or not.
    Ready,
    /// Its PersistentVolume was deleted with the data kept. It can still be attached by hand.
    Released,
    /// Its data is being deleted; there is no way back.
    Deleting,
}

/// Who has a volume attached: one state root on one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The node name, for people.
    pub node: String,
    /// `/etc/machine-id`; empty when the machine has none.
    pub machine_id: String,
    /// `/proc/sys/kernel/random/boot_id`; empty when unknown.
    pub boot_id: String,
    /// The random id of the state root.
    pub instance: String,
    /// The state root.
    pub state_dir: PathBuf,
    /// The run root.
    pub run_dir: PathBuf,
    /// Since when.
    pub since: Timestamp,
}

/// How the recorded owner relates to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// The same state root and run root, or the same state root before a reboot.
    Us,
    /// This machine before its last boot: whatever ran then is gone.
    BeforeReboot,
    /// This machine and boot, but another state or run root: probe whether its keeper lives and a log is left.
    OtherRoot,
    /// Another machine, as far as we can tell.
    Elsewhere,
}

impl Owner {
    /// How this owner (of the record) relates to `me`.
    ///
    /// A machine counts as the same only if the machine id and the node name agree and the id is not empty:
    /// cloned machines often share one machine id, and taking a volume from a live clone would cut it off.
    pub fn relation(&self, me: &Owner) -> Relation {
        let same_machine =
            !me.machine_id.is_empty() && self.machine_id == me.machine_id && self.node == me.node;
        let same_boot = !me.boot_id.is_empty() && self.boot_id == me.boot_id;
        let boots_differ = !me.boot_id.is_empty() && !self.boot_id.is_empty() && self.boot_id != me.boot_id;
        // A machine without an id is trusted on its state root alone: that id is random and stays on its disk.
        let same_instance = self.instance == me.instance
            && (same_machine || self.machine_id.is_empty() && me.machine_id.is_empty());
        match () {
            () if same_instance && (boots_differ || self.run_dir == me.run_dir) => Relation::Us,
            () if same_instance => Relation::OtherRoot,
            () if same_machine && boots_differ => Relation::BeforeReboot,
            () if same_machine && same_boot => Relation::OtherRoot,
            () => Relation::Elsewhere,
        }
    }

    fn command(&self) -> String {
        format!(
            "zerofsctl --state-dir {} --run-dir {}",
            shell_word(&self.state_dir),
            shell_word(&self.run_dir)
        )
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whole seconds: nobody needs the rest in a message.
        let since = self.since.strftime("%Y-%m-%d %H:%M:%S UTC");
        write!(f, "node {} (state folder {}) since {since}", self.node, self.state_dir.display())
    }
}

fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    if !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "/-_.+=@,:".contains(c)) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// What a claim asks for, and what the caller found out about the other owner.
#[derive(Debug, Clone, Default)]
pub struct ClaimOptions {
    /// The other owner's keeper runs (asked only for [`Relation::OtherRoot`]).
    pub other_alive: bool,
    /// The other owner left a replay log with entries (asked only for [`Relation::OtherRoot`]).
    pub other_log_left: bool,
    /// The operator says that the other node is gone for good (`--take-over`).
    pub take_over: bool,
    /// The capacity that was asked for, if one was.
    pub capacity: Option<ByteSize>,
    /// The filesystem that was asked for, if one was.
    pub filesystem: Option<FsType>,
    /// The ZeroFS version that will open it for writing.
    pub zerofs_version: Option<String>,
}

/// How a claim was won.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClaimedAs {
    /// Nobody had it.
    Free,
    /// It was ours already.
    Already,
    /// Its owner was this machine before a reboot.
    BeforeReboot,
    /// Its owner on this machine is dead and left nothing to replay.
    Abandoned,
    /// Taken from another node on the operator's word.
    TakenOver,
}

/// A claim that may be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The record to write; equal to the old one when there is nothing to write.
    pub record: VolumeRecord,
    /// The epoch of this attachment.
    pub epoch: u64,
    /// How it was won.
    pub how: ClaimedAs,
}

/// What a release comes to.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one of them at a time, and it is taken apart at once"
)]
pub enum Release {
    /// The record to write.
    Done(VolumeRecord),
    /// Nobody had it.
    Already,
    /// Somebody else has it by now; the record stays as it is.
    Lost(Owner),
}

impl VolumeRecord {
    /// A new volume: never formatted, nobody's, epoch 0.
    pub fn new(id: VolumeId, capacity: ByteSize, filesystem: Option<FsType>, created: Timestamp) -> Self {
        VolumeRecord {
            id,
            capacity,
            filesystem,
            created,
            cluster: None,
            zerofs_version: None,
            content: Content::Never,
            adopted: false,
            epoch: 0,
            owner: None,
            state: State::Ready,
            password_check: None,
            provision: None,
            published: None,
            lost: None,
            wanted: None,
            tuning: BTreeMap::new(),
            tombstone: None,
            sweeper: None,
            extra: BTreeMap::new(),
        }
    }

    /// A volume that an older driver made: its content is unknown, so it will never be formatted.
    pub fn adopted(id: VolumeId, capacity: ByteSize, created: Timestamp) -> Self {
        VolumeRecord { content: Content::Unknown, adopted: true, ..Self::new(id, capacity, None, created) }
    }

    /// Gives the volume to `me`, or says why not.
    ///
    /// The epoch stays when it is ours already, else it goes up by one. Refusals: [`Kind::Busy`] when another
    /// has it, [`Kind::Refused`] when that would lose acknowledged writes or it is being deleted,
    /// [`Kind::Conflict`] when its size or filesystem is not what was asked for.
    pub fn claim(&self, me: &Owner, ask: &ClaimOptions) -> Result<Claim> {
        self.claim_inner(me, ask).map_err(|e| e.on(&self.id))
    }

    fn claim_inner(&self, me: &Owner, ask: &ClaimOptions) -> Result<Claim> {
        let id = &self.id;
        self.not_deleting()?;
        if let Some(asked) = ask.capacity.filter(|asked| *asked != self.capacity) {
            let hint = if asked > self.capacity {
                format!("leave --size out, then grow it: zerofsctl resize {id} {asked}")
            } else {
                "leave --size out; a volume cannot be made smaller".to_owned()
            };
            return Err(Error::new(
                Kind::Conflict,
                format!("it has {} ({} bytes), not {asked}", self.capacity, self.capacity.bytes()),
            )
            .hint(hint));
        }
        if let (Some(has), Some(asked)) = (self.filesystem, ask.filesystem)
            && has != asked
        {
            return Err(Error::new(Kind::Conflict, format!("it has the filesystem {has}, not {asked}"))
                .hint(format!("leave --fs out, or use --fs {has}")));
        }
        let how = match &self.owner {
            None => ClaimedAs::Free,
            Some(owner) => match owner.relation(me) {
                Relation::Us => ClaimedAs::Already,
                Relation::BeforeReboot => ClaimedAs::BeforeReboot,
                Relation::OtherRoot if ask.other_alive => {
                    return Err(Error::new(Kind::Busy, format!("it is attached by {owner}"))
                        .hint(format!("detach it there: {} detach {id}", owner.command())));
                }
                Relation::OtherRoot if ask.other_log_left => {
                    return Err(Error::refused(format!(
                        "{owner} ended without detaching it, and left acknowledged writes to replay"
                    ))
                    .hint(format!("settle it there first: {} recover {id}", owner.command())));
                }
                Relation::OtherRoot => ClaimedAs::Abandoned,
                Relation::Elsewhere if ask.take_over => ClaimedAs::TakenOver,
                Relation::Elsewhere => {
                    return Err(Error::new(Kind::Busy, format!("it is attached by {owner}")).hint(format!(
                        "detach it there: {} detach {id}; only if that node is gone for good: \
                         zerofsctl attach {id} --take-over with your other options",
                        owner.command()
                    )));
                }
            },
        };
        let mut record = self.clone();
        if how != ClaimedAs::Already {
            record.epoch = self.epoch.checked_add(1).ok_or_else(|| {
                Error::refused("its attach epoch is at its end").hint("restore the volume's catalog record")
            })?;
        }
        let unchanged =
            matches!((&self.owner, how), (Some(o), ClaimedAs::Already) if o.boot_id == me.boot_id);
        if !unchanged {
            record.owner = Some(me.clone());
        }
        if record.filesystem.is_none() && record.content.allows_format() {
            record.filesystem = ask.filesystem;
        }
        // Whoever attaches it wants it.
        record.tombstone = None;
        if ask.zerofs_version.is_some() {
            record.zerofs_version.clone_from(&ask.zerofs_version);
        }
        Ok(Claim { epoch: record.epoch, record, how })
    }

    /// Gives the volume up, if it is ours.
    pub fn release(&self, me: &Owner) -> Release {
        match &self.owner {
            None => Release::Already,
            Some(owner) if owner.relation(me) == Relation::Us => {
                Release::Done(VolumeRecord { owner: None, ..self.clone() })
            }
            Some(owner) => Release::Lost(owner.clone()),
        }
    }

    /// Records that mkfs is about to run. Refused unless the volume was provably never in use.
    pub fn begin_format(&self, filesystem: FsType) -> Result<VolumeRecord> {
        if !self.content.allows_format() {
            let why = match self.content {
                Content::Formatted => "it was formatted before",
                Content::Raw => "it was handed out as a raw device, so its content is the user's",
                _ => "it was adopted from an older driver, so it may have been formatted before",
            };
            return Err(Error::refused(format!("it must not be formatted: {why}"))
                .on(&self.id)
                .hint("attach it with --block and examine the device: blkid -p DEVICE"));
        }
        if let Some(has) = self.filesystem.filter(|has| *has != filesystem) {
            return Err(Error::new(
                Kind::Conflict,
                format!("it is to have the filesystem {has}, not {filesystem}"),
            )
            .on(&self.id)
            .hint(format!("use --fs {has}")));
        }
        Ok(VolumeRecord { content: Content::Formatting, filesystem: Some(filesystem), ..self.clone() })
    }

    /// Records a filesystem that is really there: mkfs has finished, or one was found on the device.
    pub fn formatted(&self, filesystem: FsType) -> Result<VolumeRecord> {
        if let Some(has) = self.filesystem.filter(|has| *has != filesystem) {
            return Err(Error::new(
                Kind::Conflict,
                format!("its device holds {filesystem}, but the catalog says {has}"),
            )
            .on(&self.id)
            .hint("attach it with --block and examine the device: blkid -p DEVICE"));
        }
        Ok(VolumeRecord { content: Content::Formatted, filesystem: Some(filesystem), ..self.clone() })
    }

    /// Records that the device is handed out raw, after which we never format it. A volume that has a filesystem
    /// keeps it on record.
    pub fn handed_out_raw(&self) -> VolumeRecord {
        let content = match self.content {
            Content::Never | Content::Formatting | Content::Raw => Content::Raw,
            Content::Formatted => Content::Formatted,
            Content::Unknown => Content::Unknown,
        };
        VolumeRecord { content, ..self.clone() }
    }

    /// Records a larger capacity; the same one changes nothing, a smaller one is refused.
    pub fn grown_to(&self, capacity: ByteSize) -> Result<VolumeRecord> {
        self.not_deleting().map_err(|e| e.on(&self.id))?;
        if capacity < self.capacity {
            return Err(Error::usage(format!(
                "it has {} ({} bytes) and cannot be made smaller",
                self.capacity,
                self.capacity.bytes()
            ))
            .on(&self.id)
            .hint("make a smaller volume and copy the files"));
        }
        Ok(VolumeRecord { capacity, ..self.clone() })
    }

    /// Records that the data is about to be deleted. Refused while somebody has the volume.
    pub fn begin_delete(&self) -> Result<VolumeRecord> {
        if let Some(owner) = &self.owner {
            return Err(Error::new(Kind::Busy, format!("it is attached by {owner}"))
                .on(&self.id)
                .hint(format!("detach it there: {} detach {}", owner.command(), self.id)));
        }
        if let Some(published) = &self.published {
            return Err(Error::new(Kind::Busy, format!("it is published to node {}", published.node))
                .on(&self.id)
                .hint("unpublish it there first: delete the pods that use it"));
        }
        Ok(VolumeRecord { state: State::Deleting, ..self.clone() })
    }

    pub(super) fn not_deleting(&self) -> Result<()> {
        if self.state == State::Deleting {
            return Err(Error::refused("it is being deleted, and part of its data may be gone").hint(
                "use another volume name, or wait until it is gone: zerofsctl gc-s3 status; \
                 to finish a deletion that was cut short: zerofsctl gc-s3 sweep",
            ));
        }
        Ok(())
    }

    /// The record as it is stored. `nonce` makes each write distinct, so that a writer whose answer was lost can
    /// see whether its write arrived.
    pub(crate) fn encode(&self, nonce: &str) -> Result<String> {
        let unexpected =
            |e: serde_json::Error| Error::failed(format!("cannot write the catalog record: {e}"));
        let Value::Object(fields) = serde_json::to_value(self).map_err(unexpected)? else {
            return Err(Error::failed("cannot write the catalog record: it is not an object"));
        };
        let mut all = serde_json::Map::new();
        all.insert("format".to_owned(), FORMAT.into());
        all.extend(fields);
        all.insert(NONCE.to_owned(), nonce.into());
        let mut text = serde_json::to_string_pretty(&all).map_err(unexpected)?;
        text.push('\n');
        Ok(text)
    }

    /// Reads a stored record. Whatever is not a sound record of `id` is [`Kind::Refused`]: it must never be taken
    /// for a volume without a record. The second part is the nonce of its write.
    pub(crate) fn decode(id: &VolumeId, bytes: &[u8]) -> Result<(VolumeRecord, String)> {
        let damaged = |why: String| {
            Error::refused(format!("its catalog record cannot be used: {why}")).on(id).hint(format!(
                "look at <storage URL>/{} and restore it; while it is damaged the volume is left alone",
                super::key(id)
            ))
        };
        if bytes.len() as u64 > MAX_BYTES {
            return Err(damaged(format!("it has more than {MAX_BYTES} bytes")));
        }
        // serde_json's messages may quote what they found; the place is enough.
        let at = |e: &serde_json::Error| format!("not valid at line {} column {}", e.line(), e.column());
        let Value::Object(mut all) = serde_json::from_slice(bytes).map_err(|e| damaged(at(&e)))? else {
            return Err(damaged("it is not a JSON object".to_owned()));
        };
        match all.remove("format").as_ref().and_then(Value::as_u64) {
            Some(FORMAT) => {}
            Some(newer) if newer > FORMAT => {
                return Err(Error::refused(format!(
                    "its catalog record has format {newer}, this zerofsctl knows up to {FORMAT}"
                ))
                .on(id)
                .hint("upgrade zerofsctl on this node to the version that the other nodes run"));
            }
            _ => return Err(damaged("it has no valid format number".to_owned())),
        }
        let nonce = match all.remove(NONCE) {
            Some(Value::String(nonce)) => nonce,
            // Edited by hand: legal, and no write of ours.
            _ => String::new(),
        };
        let record: VolumeRecord =
            serde_json::from_value(Value::Object(all)).map_err(|e| damaged(plain(&e.to_string())))?;
        if record.id != *id {
            return Err(damaged(format!("it is the record of volume {}", record.id)));
        }
        // These reach messages and commands to copy: nothing in them may move the cursor or be relative.
        let texts = record.owner.iter().flat_map(|o| [&o.node, &o.machine_id, &o.boot_id, &o.instance]);
        if texts
            .chain(&record.cluster)
            .chain(&record.zerofs_version)
            .chain(&record.lost)
            .chain(record.published.iter().flat_map(|p| [&p.node, &p.mode]))
            .chain(record.tombstone.iter().flat_map(|t| std::iter::once(&t.why).chain(&t.manifest)))
            .chain(record.sweeper.iter().map(|s| &s.nonce))
            .any(|t| t.len() > 1024 || t.chars().any(char::is_control))
        {
            return Err(damaged("a name in it is too long or has control characters".to_owned()));
        }
        if let Some(owner) = &record.owner {
            for dir in [&owner.state_dir, &owner.run_dir] {
                if !dir.is_absolute() || dir.display().to_string().chars().any(char::is_control) {
                    return Err(damaged("a folder in it is not an absolute plain path".to_owned()));
                }
            }
        }
        // That of an adopted volume is known once its disk was seen.
        if record.capacity.bytes() == 0 && !record.adopted {
            return Err(damaged("its capacity is zero".to_owned()));
        }
        Ok((record, nonce))
    }
}

const NONCE: &str = "write";

/// A foreign text, cut and without control characters, for a message.
fn plain(text: &str) -> String {
    text.chars()
        .take(160)
        .flat_map(|c| if c.is_control() { ' '.escape_debug() } else { c.escape_debug() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> VolumeId {
        "vol1".parse().unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_790_000_000 + second).unwrap()
    }

    fn me() -> Owner {
        Owner {
            node: "node-a".into(),
            machine_id: "m1".into(),
            boot_id: "b1".into(),
            instance: "i1".into(),
            state_dir: "/var/lib/zerofsctl".into(),
            run_dir: "/run/zerofsctl".into(),
            since: at(0),
        }
    }

    fn owned(change: impl FnOnce(&mut Owner)) -> VolumeRecord {
        let mut owner = me();
        change(&mut owner);
        VolumeRecord { owner: Some(owner), epoch: 7, ..fresh() }
    }

    fn fresh() -> VolumeRecord {
        VolumeRecord::new(id(), ByteSize(ByteSize::GIB), Some(FsType::Ext4), at(0))
    }

    #[test]
    fn relations() {
        type Change = fn(&mut Owner);
        let cases: [(&str, Change, Relation); 12] = [
            ("the same", |_| {}, Relation::Us),
            ("the same, before a reboot", |o| o.boot_id = "b0".into(), Relation::Us),
            (
                "the same, before a reboot, other run root",
                |o| (o.boot_id, o.run_dir) = ("b0".into(), "/run/x".into()),
                Relation::Us,
            ),
            ("another run root of ours", |o| o.run_dir = "/run/x".into(), Relation::OtherRoot),
            ("another state root", |o| o.instance = "i2".into(), Relation::OtherRoot),
            (
                "another state root before a reboot",
                |o| (o.instance, o.boot_id) = ("i2".into(), "b0".into()),
                Relation::BeforeReboot,
            ),
            (
                "another state root, boot unknown",
                |o| (o.instance, o.boot_id) = ("i2".into(), "".into()),
                Relation::Elsewhere,
            ),
            (
                "another machine",
                |o| (o.instance, o.machine_id, o.boot_id) = ("i2".into(), "m2".into(), "b2".into()),
                Relation::Elsewhere,
            ),
            (
                "a clone with our machine id",
                |o| (o.instance, o.node, o.boot_id) = ("i2".into(), "node-b".into(), "b2".into()),
                Relation::Elsewhere,
            ),
            (
                "a clone with our machine id and state root",
                |o| (o.node, o.boot_id) = ("node-b".into(), "b2".into()),
                Relation::Elsewhere,
            ),
            (
                "our state root on another machine",
                |o| (o.machine_id, o.boot_id) = ("m2".into(), "b2".into()),
                Relation::Elsewhere,
            ),
            (
                "machine id unknown there",
                |o| (o.instance, o.machine_id) = ("i2".into(), "".into()),
                Relation::Elsewhere,
            ),
        ];
        for (what, change, expected) in cases {
            let mut owner = me();
            change(&mut owner);
            assert_eq!(owner.relation(&me()), expected, "{what}");
        }
        let nameless = Owner { machine_id: String::new(), ..me() };
        assert_eq!(nameless.relation(&nameless), Relation::Us);
        let other = Owner { instance: "i2".into(), ..nameless.clone() };
        assert_eq!(other.relation(&nameless), Relation::Elsewhere);
    }

    #[test]
    fn claims_that_are_won() {
        let none = ClaimOptions::default();
        let take_over = ClaimOptions { take_over: true, ..none.clone() };
        let cases = [
            ("free", fresh(), &none, 1, ClaimedAs::Free),
            ("ours", owned(|_| {}), &none, 7, ClaimedAs::Already),
            ("ours before a reboot", owned(|o| o.boot_id = "b0".into()), &none, 7, ClaimedAs::Already),
            (
                "this machine before a reboot",
                owned(|o| (o.instance, o.boot_id) = ("i2".into(), "b0".into())),
                &none,
                8,
                ClaimedAs::BeforeReboot,
            ),
            ("dead, no log", owned(|o| o.instance = "i2".into()), &none, 8, ClaimedAs::Abandoned),
            ("gone node", owned(|o| o.machine_id = "m2".into()), &take_over, 8, ClaimedAs::TakenOver),
            ("released", VolumeRecord { state: State::Released, ..fresh() }, &none, 1, ClaimedAs::Free),
        ];
        for (what, record, ask, epoch, how) in cases {
            let claim = record.claim(&me(), ask).expect(what);
            assert_eq!((claim.epoch, claim.how), (epoch, how), "{what}");
            assert_eq!(claim.record.epoch, epoch, "{what}");
            assert_eq!(claim.record.owner.as_ref(), Some(&me()), "{what}");
            assert_eq!(claim.record.state, record.state, "{what}");
            // A claim that is won is ours from then on, and claiming again changes nothing.
            let again = claim.record.claim(&me(), &none).expect(what);
            assert_eq!((again.how, &again.record), (ClaimedAs::Already, &claim.record), "{what}");
        }
    }

    #[test]
    fn claims_that_are_refused() {
        let alive = ClaimOptions { other_alive: true, other_log_left: true, ..Default::default() };
        let log = ClaimOptions { other_log_left: true, ..Default::default() };
        let forced = |ask: &ClaimOptions| ClaimOptions { take_over: true, ..ask.clone() };
        let elsewhere = || owned(|o| (o.machine_id, o.node) = ("m2".into(), "node-b".into()));
        let other = || owned(|o| (o.instance, o.state_dir) = ("i2".into(), "/srv/my state".into()));
        let cases = [
            (elsewhere(), ClaimOptions::default(), Kind::Busy, ["node-b", "--take-over"]),
            (other(), alive.clone(), Kind::Busy, ["/srv/my state", "--state-dir '/srv/my state'"]),
            (other(), forced(&alive), Kind::Busy, ["/srv/my state", "detach vol1"]),
            (other(), log.clone(), Kind::Refused, ["acknowledged writes", "recover vol1"]),
            (other(), forced(&log), Kind::Refused, ["acknowledged writes", "recover vol1"]),
            (
                VolumeRecord { state: State::Deleting, ..fresh() },
                ClaimOptions { take_over: true, ..Default::default() },
                Kind::Refused,
                ["being deleted", "another volume name"],
            ),
            (
                fresh(),
                ClaimOptions { capacity: Some(ByteSize(2 * ByteSize::GIB)), ..Default::default() },
                Kind::Conflict,
                ["1Gi", "zerofsctl resize vol1 2Gi"],
            ),
            (
                fresh(),
                ClaimOptions { capacity: Some(ByteSize(ByteSize::MIB)), ..Default::default() },
                Kind::Conflict,
                ["1Mi", "smaller"],
            ),
            (
                fresh(),
                ClaimOptions { filesystem: Some(FsType::Xfs), ..Default::default() },
                Kind::Conflict,
                ["ext4", "--fs ext4"],
            ),
            (
                VolumeRecord { epoch: u64::MAX, ..fresh() },
                ClaimOptions::default(),
                Kind::Refused,
                ["epoch", "catalog record"],
            ),
        ];
        for (record, ask, kind, says) in cases {
            let e = record.claim(&me(), &ask).expect_err(says[0]);
            let text = format!("{e}\nhint: {}", e.hint_text().expect("a hint"));
            assert_eq!(e.kind(), kind, "{text}");
            assert!(text.starts_with("volume vol1: "), "{text}");
            for part in says {
                assert!(text.contains(part), "{part:?} is not in: {text}");
            }
        }
    }

    #[test]
    fn a_claim_records_what_was_asked() {
        let raw = VolumeRecord { filesystem: None, ..fresh() };
        let ask = ClaimOptions {
            capacity: Some(raw.capacity),
            filesystem: Some(FsType::Xfs),
            zerofs_version: Some("0.19.1".into()),
            ..Default::default()
        };
        let record = raw.claim(&me(), &ask).unwrap().record;
        assert_eq!(record.filesystem, Some(FsType::Xfs));
        assert_eq!(record.zerofs_version.as_deref(), Some("0.19.1"));
        // What is on a raw or adopted device is not ours to declare.
        for content in [Content::Raw, Content::Unknown] {
            let record = VolumeRecord { content, ..raw.clone() };
            assert_eq!(record.claim(&me(), &ask).unwrap().record.filesystem, None);
        }
        let no_version = ClaimOptions::default();
        assert_eq!(
            record.claim(&me(), &no_version).unwrap().record.zerofs_version.as_deref(),
            Some("0.19.1")
        );
    }

    #[test]
    fn releases() {
        assert_eq!(fresh().release(&me()), Release::Already);
        let Release::Done(record) = owned(|_| {}).release(&me()) else { panic!("it is ours") };
        assert_eq!((record.owner, record.epoch), (None, 7));
        let others = owned(|o| o.instance = "i2".into());
        assert_eq!(others.release(&me()), Release::Lost(others.owner.clone().unwrap()));
    }

    #[test]
    fn content_moves() {
        use Content::*;
        // (before, begin_format, formatted, handed_out_raw)
        let table = [
            (Never, Some(Formatting), Formatted, Raw),
            (Formatting, Some(Formatting), Formatted, Raw),
            (Formatted, None, Formatted, Formatted),
            (Raw, None, Formatted, Raw),
            (Unknown, None, Formatted, Unknown),
        ];
        for (before, begin, done, raw) in table {
            let record = VolumeRecord { content: before, ..fresh() };
            match begin {
                Some(after) => assert_eq!(record.begin_format(FsType::Ext4).unwrap().content, after),
                None => {
                    let e = record.begin_format(FsType::Ext4).unwrap_err();
                    assert_eq!(e.kind(), Kind::Refused);
                    assert!(e.hint_text().is_some());
                }
            }
            assert_eq!(record.formatted(FsType::Ext4).unwrap().content, done, "{before:?}");
            assert_eq!(record.handed_out_raw().content, raw, "{before:?}");
        }
        assert_eq!(fresh().begin_format(FsType::Xfs).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(fresh().formatted(FsType::Xfs).unwrap_err().kind(), Kind::Conflict);
        let adopted = VolumeRecord::adopted(id(), ByteSize(1 << 30), at(0));
        assert_eq!((adopted.content, adopted.adopted), (Unknown, true));
        assert_eq!(adopted.formatted(FsType::Btrfs).unwrap().filesystem, Some(FsType::Btrfs));
    }

    #[test]
    fn growing_and_deleting() {
        let record = fresh();
        assert_eq!(record.grown_to(ByteSize(2 << 30)).unwrap().capacity, ByteSize(2 << 30));
        assert_eq!(record.grown_to(record.capacity).unwrap(), record);
        assert_eq!(record.grown_to(ByteSize(1)).unwrap_err().kind(), Kind::Usage);
        assert_eq!(owned(|_| {}).begin_delete().unwrap_err().kind(), Kind::Busy);
        let deleting = record.begin_delete().unwrap();
        assert_eq!(deleting.state, State::Deleting);
        assert_eq!(deleting.begin_delete().unwrap(), deleting);
        assert_eq!(deleting.grown_to(ByteSize(2 << 30)).unwrap_err().kind(), Kind::Refused);
    }

    /// What version 0.1.0 wrote. It must parse for ever.
    const FORMAT_1: &str = r#"{
      "format": 1, "id": "vol1", "capacity": 1073741824, "filesystem": "ext4", "created": "2026-11-20T18:00:00Z",
      "cluster": "c-1", "zerofs_version": "0.19.1", "content": "formatted", "adopted": false, "epoch": 3,
      "owner": {"node": "node-a", "machine_id": "m1", "boot_id": "b1", "instance": "i1",
        "state_dir": "/var/lib/zerofsctl", "run_dir": "/run/zerofsctl", "since": "2026-11-20T18:00:01Z"},
      "state": "ready", "password_check": "$argon2id$v=19$m=7168,t=5,p=1$c29tZXNhbHQ$AAAA",
      "write": "0011223344556677", "from_the_future": {"a": [1, 18446744073709551615]}
    }"#;

    #[test]
    fn format_1_parses_and_unknown_fields_survive() {
        let (record, nonce) = VolumeRecord::decode(&id(), FORMAT_1.as_bytes()).unwrap();
        assert_eq!(nonce, "0011223344556677");
        assert_eq!((record.epoch, record.content), (3, Content::Formatted));
        assert_eq!(record.owner.as_ref().unwrap().node, "node-a");
        assert_eq!(record.extra.len(), 1);
        let again = record.encode("x").unwrap();
        assert_eq!(VolumeRecord::decode(&id(), again.as_bytes()).unwrap(), (record.clone(), "x".to_owned()));
        assert!(again.contains("18446744073709551615"));
        assert!(!format!("{record:?}").contains("argon2id"));
        let minimal = r#"{"format":1,"id":"vol1","capacity":5,"created":"2026-11-20T18:00:00Z",
            "content":"never","epoch":0,"state":"ready"}"#;
        let (record, nonce) = VolumeRecord::decode(&id(), minimal.as_bytes()).unwrap();
        assert_eq!((record.owner, nonce.as_str()), (None, ""));
    }

    /// What versions with a collector write. It must parse for ever.
    const FORMAT_1_MARKED: &str = r#"{
      "format": 1, "id": "vol1", "capacity": 1073741824, "created": "2026-11-20T18:00:00Z", "cluster": "c-1",
      "content": "formatted", "adopted": false, "epoch": 3, "state": "ready",
      "tombstone": {"at": "2026-11-26T10:00:00Z", "by": "scan", "why": "no PersistentVolume refers to it", "epoch": 3,
        "manifest": "vol1/manifest/00000000000000000042.manifest", "grace_seconds": 86400},
      "sweeper": {"nonce": "0011223344556677", "until": "2026-11-27T10:02:00Z", "others_until": "2026-11-27T10:01:00Z"}
    }"#;

    #[test]
    fn a_marked_record_parses() {
        let (record, _) = VolumeRecord::decode(&id(), FORMAT_1_MARKED.as_bytes()).unwrap();
        let mark = record.mark().expect("it counts");
        assert_eq!((mark.by, mark.grace_seconds), (crate::catalog::MarkedBy::Scan, Some(86400)));
        assert!(record.extra.is_empty() && record.sweeper.is_some());
        let again = record.encode("x").unwrap();
        assert_eq!(VolumeRecord::decode(&id(), again.as_bytes()).unwrap().0, record);
        for (from, to) in [
            ("\"scan\"", "\"whim\""),
            ("no PersistentVolume", "no \\u001b[2J"),
            ("2026-11-26T10:00:00Z", "yesterday"),
        ] {
            let bad = FORMAT_1_MARKED.replace(from, to);
            assert_eq!(
                VolumeRecord::decode(&id(), bad.as_bytes()).unwrap_err().kind(),
                Kind::Refused,
                "{to}"
            );
        }
    }

    #[test]
    fn what_is_not_a_sound_record_is_refused() {
        let edit = |from: &str, to: &str| {
            assert!(FORMAT_1.contains(from), "{from}");
            FORMAT_1.replace(from, to)
        };
        let cases = [
            String::new(),
            "{".into(),
            "null".into(),
            "[]".into(),
            "\0\0\0\0".into(),
            FORMAT_1[..FORMAT_1.len() / 2].to_owned(),
            format!("{FORMAT_1}x"),
            edit("\"format\": 1", "\"format\": 2"),
            edit("\"format\": 1", "\"format\": 0"),
            edit("\"format\": 1", "\"format\": \"1\""),
            edit("\"format\": 1,", ""),
            edit("\"id\": \"vol1\"", "\"id\": \"vol2\""),
            edit("\"id\": \"vol1\"", "\"id\": \"../x\""),
            edit("1073741824", "0"),
            edit("1073741824", "-1"),
            edit("\"formatted\"", "\"blank\""),
            edit("\"ext4\"", "\"zfs\""),
            edit("\"state\": \"ready\"", "\"state\": \"gone\""),
            edit("\"epoch\": 3", "\"epoch\": -3"),
            edit("node-a", "node\\u001b[2J"),
            edit("/run/zerofsctl", "run"),
            edit("\"content\": \"formatted\",", ""),
            FORMAT_1.replace("c-1", &"x".repeat(MAX_BYTES as usize)),
        ];
        for case in cases {
            let shown = &case[..case.len().min(60)];
            let e = VolumeRecord::decode(&id(), case.as_bytes()).expect_err(shown);
            assert_eq!(e.kind(), Kind::Refused, "{shown}: {e}");
            assert!(e.hint_text().is_some() && e.to_string().len() < 400, "{e}");
            assert!(!e.to_string().chars().any(char::is_control), "{e}");
        }
        let newer = edit("\"format\": 1", "\"format\": 2");
        let e = VolumeRecord::decode(&id(), newer.as_bytes()).unwrap_err();
        assert!(e.hint_text().unwrap().contains("upgrade zerofsctl"), "{e}");
    }

    proptest::proptest! {
        #[test]
        fn torn_and_flipped_records_never_panic(cut in 0usize..900, flip in 0usize..900, bit in 0u8..8) {
            let mut bytes = FORMAT_1.as_bytes().to_vec();
            let at = flip % bytes.len();
            bytes[at] ^= 1 << bit;
            bytes.truncate(cut.max(1));
            if let Err(e) = VolumeRecord::decode(&id(), &bytes) {
                proptest::prop_assert_eq!(e.kind(), Kind::Refused);
            }
        }
    }
}
