//! What the collector writes into a record: the mark, and who is deleting.
//!
//! A volume goes `ready` or `released` → marked (a [`Tombstone`], and it can still be attached or restored) →
//! `deleting` (a [`Sweeper`], and there is no way back) → gone. Each move is one conditional put, so that an attach and
//! a deletion cannot both win.
//!
//! An older zerofsctl keeps these fields without knowing them. When it attaches a marked volume, the mark stays in the
//! record, but the epoch goes up: a mark of another epoch is void.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{State, VolumeRecord};
use crate::error::{Error, Kind, Result};

/// Why a volume was marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarkedBy {
    /// A scan found that nothing refers to it in its own cluster.
    Scan,
    /// An operator named it.
    Name,
    /// CSI's DeleteVolume, with a grace period.
    DeleteVolume,
}

/// The mark of a volume that is to be deleted after a grace period. Times are the object store's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Since when.
    pub at: Timestamp,
    /// Who wants it gone.
    pub by: MarkedBy,
    /// The reason in words.
    pub why: String,
    /// The attach epoch at that time: an attach since then voids the mark.
    pub epoch: u64,
    /// The newest manifest at that time: a later one means that a server wrote since then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// How long it must stay marked, in seconds, when that was decided at the mark; else the sweep says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_seconds: Option<u64>,
}

impl Tombstone {
    /// From when on the volume may be deleted. `grace` counts where the mark itself has none.
    pub fn due(&self, grace: SignedDuration) -> Timestamp {
        let own = self.grace_seconds.map(|s| SignedDuration::from_secs(i64::try_from(s).unwrap_or(i64::MAX)));
        self.at.checked_add(own.unwrap_or(grace)).unwrap_or(Timestamp::MAX)
    }
}

/// The process that deletes a volume's data.
///
/// Any process may take a deletion over at any time: deleting twice does no harm. Only the record must outlive
/// everybody who may still be deleting, since after it another volume of this name may be made, with the same keys. So
/// each sweeper renews its time before it runs out, stops when it finds another's name here, and the last one removes
/// the record only after the time of all before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sweeper {
    /// A random name.
    pub nonce: String,
    /// After this it has stopped deleting, by the object store's clock.
    pub until: Timestamp,
    /// After this everybody before it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others_until: Option<Timestamp>,
}

impl VolumeRecord {
    /// The mark, if it still counts: not attached since, and not being deleted yet.
    pub fn mark(&self) -> Option<&Tombstone> {
        self.tombstone
            .as_ref()
            .filter(|t| t.epoch == self.epoch && self.owner.is_none() && self.state != State::Deleting)
    }

    /// Marks it. Refused while somebody has it, and when its deletion has begun.
    pub fn marked(&self, tombstone: Tombstone) -> Result<VolumeRecord> {
        self.nobody_has_it()?;
        self.not_deleting().map_err(|e| e.on(&self.id))?;
        Ok(VolumeRecord { tombstone: Some(tombstone), ..self.clone() })
    }

    /// Takes the mark away.
    pub fn unmarked(&self) -> VolumeRecord {
        VolumeRecord { tombstone: None, ..self.clone() }
    }

    /// Takes the mark away and keeps the volume: no scan marks it again.
    pub fn restored(&self) -> Result<VolumeRecord> {
        if self.state == State::Deleting {
            return Err(Error::refused(
                "it is too late to restore it: its deletion has begun, and data is missing",
            )
            .on(&self.id)
            .hint("finish the deletion: zerofsctl gc-s3 sweep"));
        }
        let state = if self.tombstone.is_some() { State::Released } else { self.state };
        Ok(VolumeRecord { state, ..self.unmarked() })
    }

    /// Gives the deletion to `nonce` until `until`, and begins it if it has not begun. From then on it cannot be attached.
    pub fn sweeping(&self, nonce: &str, now: Timestamp, until: Timestamp) -> Result<VolumeRecord> {
        let others_until = match &self.sweeper {
            Some(s) if s.nonce == nonce => s.others_until,
            Some(s) => s.others_until.max(Some(s.until)).filter(|t| *t > now),
            None => None,
        };
        let sweeper = Some(Sweeper { nonce: nonce.to_owned(), until, others_until });
        Ok(VolumeRecord { sweeper, ..self.begin_delete()? })
    }

    fn nobody_has_it(&self) -> Result<()> {
        match &self.owner {
            None => Ok(()),
            Some(owner) => Err(Error::new(Kind::Busy, format!("it is attached by {owner}"))
                .on(&self.id)
                .hint(format!("detach it there: zerofsctl detach {}", self.id))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{ClaimOptions, Owner};
    use crate::values::ByteSize;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_790_000_000 + second).unwrap()
    }

    fn record() -> VolumeRecord {
        VolumeRecord::new("vol1".parse().unwrap(), ByteSize(1 << 30), None, at(0))
    }

    fn tombstone() -> Tombstone {
        Tombstone {
            at: at(10),
            by: MarkedBy::Scan,
            why: "nothing refers to it".into(),
            epoch: 0,
            manifest: None,
            grace_seconds: None,
        }
    }

    fn owner() -> Owner {
        Owner {
            node: "a".into(),
            machine_id: "m".into(),
            boot_id: "b".into(),
            instance: "i".into(),
            state_dir: "/s".into(),
            run_dir: "/r".into(),
            since: at(0),
        }
    }

    #[test]
    fn an_attach_takes_the_mark_away() {
        let marked = record().marked(tombstone()).unwrap();
        assert!(marked.mark().is_some());
        let claimed = marked.claim(&owner(), &ClaimOptions::default()).unwrap().record;
        assert_eq!(claimed.tombstone, None);
        assert_eq!(claimed.marked(tombstone()).unwrap_err().kind(), Kind::Busy);
        // An older version keeps the field, so the epoch must tell.
        let older = VolumeRecord { tombstone: marked.tombstone.clone(), owner: None, ..claimed };
        assert_eq!(older.mark(), None);
    }

    #[test]
    fn a_begun_deletion_has_no_way_back_and_refuses_every_attach() {
        let deleting = record().marked(tombstone()).unwrap().sweeping("a", at(100), at(220)).unwrap();
        assert_eq!(deleting.state, State::Deleting);
        assert_eq!(deleting.mark(), None);
        let take_over = ClaimOptions { take_over: true, ..ClaimOptions::default() };
        let refusals = [
            deleting.claim(&owner(), &take_over).unwrap_err(),
            deleting.restored().unwrap_err(),
            deleting.marked(tombstone()).unwrap_err(),
        ];
        for e in refusals {
            assert_eq!(e.kind(), Kind::Refused, "{e}");
            assert!(e.hint_text().unwrap().contains("gc-s3"), "{e:?}");
        }
    }

    #[test]
    fn restoring_keeps_the_volume_for_good() {
        let restored = record().marked(tombstone()).unwrap().restored().unwrap();
        assert_eq!((restored.state, restored.tombstone), (State::Released, None));
        assert_eq!(record().restored().unwrap(), record(), "what was not marked stays as it is");
    }

    #[test]
    fn the_last_sweeper_knows_until_when_others_may_delete() {
        let a = record().sweeping("a", at(0), at(120)).unwrap();
        assert_eq!(a.sweeper.as_ref().unwrap().others_until, None);
        let b = a.sweeping("b", at(50), at(170)).unwrap();
        assert_eq!(b.sweeper.as_ref().unwrap().others_until, Some(at(120)));
        let renewed = b.sweeping("b", at(90), at(210)).unwrap();
        assert_eq!(renewed.sweeper.as_ref().unwrap().others_until, Some(at(120)));
        let c = renewed.sweeping("c", at(300), at(420)).unwrap();
        assert_eq!(c.sweeper.unwrap().others_until, None, "all of them have ended");
    }

    #[test]
    fn the_mark_or_the_sweep_says_when_it_is_due() {
        let hour = SignedDuration::from_hours(1);
        assert_eq!(tombstone().due(hour), at(10 + 3600));
        let own = Tombstone { grace_seconds: Some(5), ..tombstone() };
        assert_eq!(own.due(hour), at(15));
        let never = Tombstone { grace_seconds: Some(u64::MAX), ..tombstone() };
        assert_eq!(never.due(hour), Timestamp::MAX);
    }
}
