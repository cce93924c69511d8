//! nbd gc: disconnects leaked NBD devices, and nothing else.
//!
//! Who disconnects a device that is in use loses data, and the kernel lets him. So a device must be found leaked
//! twice, with a pause between, by looks that see every way of using it; then, with its volume's lock held and with an
//! exclusive claim on the device from the kernel itself (which a mount in any namespace, a holder or a swap refuses,
//! and which keeps the index from becoming another connection), once more; and only then it goes. Any doubt keeps it.

mod node;

pub use node::Node;

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::host::nbd::survey::{Device, Survey};
use crate::host::nbd::verdict::{Proof, Verdict};
use crate::values::VolumeId;

/// What to collect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GcSpec {
    /// How long a leak must have been known as one.
    pub older_than: Duration,
    /// Between the two looks.
    pub pause: Duration,
}

/// What is known of acknowledged writes in a leak's replay log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    /// There is no log, or an empty one.
    Nothing,
    /// There is a log, which only the holder of the volume's lock looks into: it could be in a keeper's way.
    Maybe,
    /// So many entries, all of which stay.
    Entries(u64),
    /// There is a log that nobody may replay, and why not.
    Void(String),
    /// There is a log that cannot be read, and why not: what it holds is not known.
    Damaged(String),
}

/// Everything that a collector sees and does.
pub trait World {
    /// Keeps operations on the volume away, until it is dropped.
    type Lock;
    /// Keeps everybody else from using the device, until it is dropped.
    type Claim;

    /// A look at every device. Leaks come with the time since which they are known to be leaks.
    fn look(&self) -> Result<Survey>;
    /// Lets time pass.
    fn pause(&self, time: Duration);
    /// The time.
    fn now(&self) -> Timestamp;
    /// [`Kind::Busy`] while an operation holds the volume.
    fn lock(&self, volume: &VolumeId) -> Result<Self::Lock>;
    /// The kernel's own word that nobody has the device: [`Kind::Busy`] when somebody has.
    fn claim(&self, index: u32) -> Result<Self::Claim>;
    /// Disconnects, and waits until the kernel has let go; gives the claim back meanwhile.
    fn disconnect(&self, index: u32, claim: Self::Claim) -> Result<()>;
    /// A path of the volume that still leads to the device, and would lead to whoever gets its index next.
    fn leads_to(&self, volume: &VolumeId, index: u32) -> Result<Option<PathBuf>>;
    /// What the volume's replay log holds; counted only with its lock.
    fn left(&self, volume: &VolumeId, lock: Option<&Self::Lock>) -> Result<Left>;
}

/// What becomes of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Fate {
    /// It would be disconnected.
    Would,
    /// It was disconnected.
    Disconnected,
    /// It stays.
    Kept(Reason),
    /// It should have gone, and this went wrong.
    Failed(Reason),
}

/// Why a device did not go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The sentence.
    pub why: String,
    /// What to do about it; a command where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Of a leak that is only too young: from when on it may go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub due_at: Option<Timestamp>,
}

impl Reason {
    /// One that time alone does not end.
    pub fn new(why: impl Into<String>) -> Reason {
        Reason { why: why.into(), hint: None, due_at: None }
    }
}

impl From<Error> for Reason {
    fn from(e: Error) -> Reason {
        Reason { hint: e.hint_text().map(str::to_owned), ..Reason::new(e.message()) }
    }
}

/// One connected device, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Item {
    /// As it was seen last.
    pub device: Device,
    /// What becomes of it.
    pub fate: Fate,
    /// For a leak: what its replay log holds.
    pub left: Option<Left>,
}

/// What every connected device would come to: the plan.
pub fn plan<W: World>(world: &W, spec: GcSpec) -> Result<Vec<Item>> {
    let first = world.look()?;
    if !first.devices.iter().any(|d| d.verdict == Some(Verdict::OursLeaked)) {
        return Ok(first.devices.into_iter().filter(Device::is_connected).map(kept).collect());
    }
    world.pause(spec.pause);
    let second = world.look()?;
    let now = world.now();
    let item = |device: Device| {
        let before = first.devices.iter().find(|d| d.is_same_connection(&device));
        let fate = match keep(world, &device, before, spec.older_than, now) {
            Ok(None) => Fate::Would,
            Ok(Some(why)) => Fate::Kept(why),
            Err(e) => Fate::Kept(e.into()),
        };
        let volume = device.volume.as_ref().filter(|_| device.verdict == Some(Verdict::OursLeaked));
        let left = volume.map(|v| world.left(v, None)).transpose();
        match left {
            Ok(left) => Item { device, fate, left },
            Err(e) => Item { device, fate: Fate::Kept(e.into()), left: None },
        }
    };
    Ok(second.devices.into_iter().filter(Device::is_connected).map(item).collect())
}

/// Carries a plan out: each leak on its own, so that one that cannot go does not keep the others.
pub fn collect<W: World>(world: &W, spec: GcSpec) -> Result<Vec<Item>> {
    let mut items = plan(world, spec)?;
    for item in items.iter_mut().filter(|i| i.fate == Fate::Would) {
        item.fate = match one(world, spec, item) {
            Ok(fate) => fate,
            Err(e) if e.kind() == Kind::Busy => Fate::Kept(e.into()),
            Err(e) => Fate::Failed(e.into()),
        };
    }
    Ok(items)
}

/// Disconnects one leak, when it still is one with everybody else kept away. [`Kind::Busy`] when somebody is not.
fn one<W: World>(world: &W, spec: GcSpec, item: &mut Item) -> Result<Fate> {
    let planned = &item.device;
    let volume =
        planned.volume.as_ref().ok_or_else(|| Error::refused("a device without a volume is not ours"))?;
    let lock = world.lock(volume)?;
    let claim = world.claim(planned.index)?;
    // The last look comes after everybody else was shut out, and right before the disconnect.
    let now = world.look()?;
    let Some(device) = now.devices.iter().find(|d| d.index == planned.index) else {
        return Ok(Fate::Kept(Reason::new("it is gone meanwhile")));
    };
    let before = Some(planned).filter(|p| p.is_same_connection(device));
    if let Some(why) = keep(world, device, before, spec.older_than, world.now())? {
        let hint = Some("see what it is now: zerofsctl nbd list".into());
        return Ok(Fate::Kept(Reason { hint, ..why }));
    }
    item.left = Some(world.left(volume, Some(&lock))?);
    world.disconnect(planned.index, claim)?;
    Ok(Fate::Disconnected)
}

fn kept(device: Device) -> Item {
    let why = Reason::new(&device.why);
    Item { device, fate: Fate::Kept(why), left: None }
}

/// As [`reason_to_keep`], and what is there besides the device.
fn keep<W: World>(
    world: &W,
    device: &Device,
    before: Option<&Device>,
    older_than: Duration,
    now: Timestamp,
) -> Result<Option<Reason>> {
    if let Some(why) = reason_to_keep(device, before, now, older_than) {
        return Ok(Some(why));
    }
    let Some(volume) = &device.volume else { return Ok(None) };
    let path = world.leads_to(volume, device.index)?;
    Ok(path.map(|p| {
        Reason::new(format!("{} leads to it: zerofsctl recover {volume}, or detach it", p.display()))
    }))
}

/// None only for a leak of ours that is the connection which was a leak `before`, and old enough.
fn reason_to_keep(
    device: &Device,
    before: Option<&Device>,
    now: Timestamp,
    older_than: Duration,
) -> Option<Reason> {
    if device.verdict != Some(Verdict::OursLeaked) || device.volume.is_none() {
        return Some(Reason::new(&device.why));
    }
    let by_identifier = device.backend.as_deref().and_then(crate::host::nbd::volume_of);
    let proven = match device.proof {
        Some(Proof::Backend) => by_identifier.is_some() && by_identifier == device.volume,
        Some(Proof::Journal) => device.backend.is_none(),
        None => false,
    };
    if !proven {
        return Some(Reason::new("it is not proven to be ours"));
    }
    if before.is_none_or(|b| b.verdict != Some(Verdict::OursLeaked)) {
        return Some(Reason::new("it was not yet leaked a moment ago"));
    }
    let Some(since) = device.leaked_since else {
        return Some(Reason::new("it is not known since when it is leaked"));
    };
    let age = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    (age < older_than).then(|| {
        let why = format!(
            "leaked, but known so for {} only, and {} are asked for",
            humantime::format_duration(Duration::from_secs(age.as_secs())),
            humantime::format_duration(older_than)
        );
        Reason { due_at: since.checked_add(older_than).ok(), ..Reason::new(why) }
    })
}
