//! The decision, without any I/O: what is known of a volume in, a verdict with its reason out.
//!
//! Doubt is `unknown` or `live`, never `orphan`. An orphan has a sound record that belongs to a cluster which was asked
//! and answered in full (or to no cluster, and an operator named it), nobody has it attached, nothing refers to it, and
//! nothing has written to it of late.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::evidence::{Facts, Recorded, Reference, ReferenceKind};
use crate::catalog::{DataPrefix, MarkedBy, State};

/// What becomes of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// In use, or may be.
    Live,
    /// Kept by a PersistentVolume, or nobody's business but that of who made it.
    Retained,
    /// Its PersistentVolume is gone and its data was kept on purpose.
    Released,
    /// Nobody wants it.
    Orphan,
    /// Too little is known.
    Unknown,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Verdict; 5] =
        [Verdict::Live, Verdict::Retained, Verdict::Released, Verdict::Orphan, Verdict::Unknown];

    /// One word.
    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Live => "live",
            Verdict::Retained => "retained",
            Verdict::Released => "released",
            Verdict::Orphan => "orphan",
            Verdict::Unknown => "unknown",
        }
    }
}

/// How long things take until they count as settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// A record that was written within this time may be of a volume whose PersistentVolume is still being made.
    pub young: SignedDuration,
    /// Whoever wrote to a volume within this time, without having it in the catalog, may be still at it. ZeroFS flushes
    /// what it was given after 30 s unless told otherwise.
    pub quiet: SignedDuration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { young: SignedDuration::from_hours(1), quiet: SignedDuration::from_mins(5) }
    }
}

/// All that is known of one volume.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// The catalog's record.
    pub record: &'a Recorded,
    /// What refers to it, from all witnesses.
    pub references: &'a [Reference],
    /// The clusters that were asked and answered in full.
    pub asked: &'a BTreeSet<String>,
    /// Its objects.
    pub facts: &'a Facts,
    /// The store's time.
    pub now: Timestamp,
    /// An operator named it.
    pub named: bool,
    /// What counts as settled.
    pub patience: Patience,
}

/// A verdict and the reason in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
}

/// Judges a volume.
pub fn judge(e: &Evidence<'_>) -> Judgement {
    let say = |verdict, reason: String| Judgement { verdict, reason };
    if let Some(r) = e.references.iter().find(|r| r.kind.in_use()) {
        return say(Verdict::Live, format!("{r} refers to it"));
    }
    if let Recorded::Yes(record, _) = e.record
        && record.state == State::Deleting
    {
        // Part of it may be gone, so no PersistentVolume can bring it back.
        return say(Verdict::Orphan, "its deletion has begun, and can only be finished".into());
    }
    if let Some(r) = e.references.iter().find(|r| r.kind != ReferenceKind::RetainedVolume) {
        return say(Verdict::Live, format!("{r} refers to it"));
    }
    if let Some(r) = e.references.first() {
        return say(Verdict::Retained, format!("{r} refers to it"));
    }
    let (record, written) = match e.record {
        Recorded::No => {
            let what = match &e.facts.content {
                DataPrefix::Foreign(name) => format!("it holds {name}, which is not of ZeroFS"),
                _ => "it has no catalog record; an attach makes one".into(),
            };
            return say(Verdict::Unknown, what);
        }
        Recorded::Unusable(why) => return say(Verdict::Unknown, why.clone()),
        Recorded::Yes(record, written) => (record, *written),
    };
    if let Some(owner) = &record.owner {
        return say(Verdict::Live, format!("attached by {owner}"));
    }
    if let Some(published) = &record.published {
        return say(Verdict::Live, format!("published to node {}", published.node));
    }
    let mark = record.mark();
    // A server that is in no catalog: an older driver's, or one that lost its volume.
    if let Some(newest) = e.facts.newest
        && newest > written
    {
        let age = age(newest, e.now);
        if age < e.patience.quiet {
            return say(Verdict::Live, format!("something wrote to it {} ago", ago(age)));
        }
    }
    if let Some(mark) = mark
        && mark.manifest < e.facts.manifest
    {
        return say(Verdict::Live, "something wrote to it since it was marked".into());
    }
    if let DataPrefix::Foreign(name) = &e.facts.content {
        return say(Verdict::Unknown, format!("it holds {name}, which is not of ZeroFS"));
    }
    if let Some(cluster) = record.cluster.as_ref().filter(|c| !e.asked.contains(*c)) {
        return say(Verdict::Unknown, format!("it belongs to cluster {cluster}, which was not asked"));
    }
    if e.named {
        return say(Verdict::Orphan, "it was named, and nothing refers to it".into());
    }
    if let Some(mark) = mark.filter(|m| m.by != MarkedBy::Scan) {
        return say(Verdict::Orphan, mark.why.clone());
    }
    if record.state == State::Released {
        return say(
            Verdict::Released,
            "its PersistentVolume is gone, and its data was kept on purpose".into(),
        );
    }
    let Some(cluster) = &record.cluster else {
        return say(Verdict::Retained, "it belongs to no cluster; only naming it marks it".into());
    };
    // A mark is a write too, made after this was looked at.
    let age = e.now.duration_since(written);
    if mark.is_none() && age < e.patience.young {
        return say(Verdict::Live, format!("its record was written {} ago", ago(age)));
    }
    say(Verdict::Orphan, format!("nothing in cluster {cluster} refers to it"))
}

/// How long ago something was written. The store's Date has whole seconds, and its times of objects may be finer: what was
/// written right now is not ahead of its clock.
pub(super) fn age(written: Timestamp, now: Timestamp) -> SignedDuration {
    let age = now.duration_since(written);
    // Less than a whole second either way.
    if age.as_secs() == 0 { age.max(SignedDuration::ZERO) } else { age }
}

/// A duration in at most two units, for people.
pub fn ago(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    let two = |n: i64, unit: &str, m: i64, small: &str| {
        if m == 0 { format!("{n} {unit}") } else { format!("{n} {unit} {m} {small}") }
    };
    match seconds {
        ..0 => "less than no time (its clock is ahead)".into(),
        0..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86_400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Family, Owner, Published, Tombstone, VolumeRecord};
    use crate::values::ByteSize;

    const NOW: i64 = 1_790_000_000;

    fn at(before_now: i64) -> Timestamp {
        Timestamp::from_second(NOW - before_now).unwrap()
    }

    fn reference(kind: ReferenceKind) -> Reference {
        Reference { kind, name: "pv-1 in c-1".into() }
    }

    /// An orphan in every respect; each test changes one.
    struct Case {
        record: VolumeRecord,
        written: Timestamp,
        references: Vec<Reference>,
        facts: Facts,
        asked: Vec<&'static str>,
        named: bool,
    }

    fn case(change: impl FnOnce(&mut Case)) -> Judgement {
        let mut record = VolumeRecord::new("vol1".parse().unwrap(), ByteSize(1 << 30), None, at(90_000));
        record.cluster = Some("c-1".into());
        let facts = Facts {
            content: DataPrefix::ZeroFs(Family::Old),
            objects: Some(7),
            bytes: 700,
            newest: Some(at(80_000)),
            manifest: Some("vol1/manifest/0007.manifest".into()),
        };
        let mut case =
            Case { record, written: at(70_000), references: vec![], facts, asked: vec!["c-1"], named: false };
        change(&mut case);
        judge_case(&case, &Recorded::Yes(Box::new(case.record.clone()), case.written))
    }

    fn judge_case(case: &Case, record: &Recorded) -> Judgement {
        judge(&Evidence {
            record,
            references: &case.references,
            asked: &case.asked.iter().map(|c| (*c).to_owned()).collect(),
            facts: &case.facts,
            now: at(0),
            named: case.named,
            patience: Patience::default(),
        })
    }

    fn owner() -> Owner {
        Owner {
            node: "node-a".into(),
            machine_id: "m".into(),
            boot_id: "b".into(),
            instance: "i".into(),
            state_dir: "/s".into(),
            run_dir: "/r".into(),
            since: at(0),
        }
    }

    fn published() -> Published {
        Published { node: "node-b".into(), read_only: false, mode: "SINGLE_NODE_WRITER".into(), since: at(0) }
    }

    fn tombstone(by: MarkedBy) -> Option<Tombstone> {
        Some(Tombstone {
            at: at(10),
            by,
            why: "as was said".into(),
            epoch: 0,
            manifest: Some("vol1/manifest/0007.manifest".into()),
            grace_seconds: None,
        })
    }

    #[track_caller]
    fn assert_verdict(judgement: &Judgement, verdict: Verdict, word: &str) {
        assert_eq!(judgement.verdict, verdict, "{judgement:?}");
        assert!(judgement.reason.contains(word), "{judgement:?}");
    }

    #[test]
    fn an_orphan_is_one_only_if_everything_says_so() {
        assert_verdict(&case(|_| {}), Verdict::Orphan, "nothing in cluster c-1");
        type Change = fn(&mut Case);
        let doubts: [(Change, Verdict, &str); 15] = [
            (
                |c| c.references.push(reference(ReferenceKind::PersistentVolume)),
                Verdict::Live,
                "PersistentVolume pv-1",
            ),
            (|c| c.references.push(reference(ReferenceKind::RetainedVolume)), Verdict::Retained, "retained"),
            (
                |c| c.references.push(reference(ReferenceKind::VolumeAttachment)),
                Verdict::Live,
                "VolumeAttachment",
            ),
            (|c| c.references.push(reference(ReferenceKind::Pod)), Verdict::Live, "pod"),
            (|c| c.references.push(reference(ReferenceKind::Journal)), Verdict::Live, "journal"),
            (
                |c| {
                    c.references.push(reference(ReferenceKind::RetainedVolume));
                    c.references.push(reference(ReferenceKind::PersistentVolume));
                },
                Verdict::Live,
                "PersistentVolume",
            ),
            (|c| c.record.owner = Some(owner()), Verdict::Live, "attached by node node-a"),
            (|c| c.record.published = Some(published()), Verdict::Live, "published to node node-b"),
            (|c| c.facts.newest = Some(at(20)), Verdict::Live, "wrote to it 20 s ago"),
            (|c| c.facts.newest = Some(at(-90_000)), Verdict::Live, "ahead"),
            (|c| c.written = at(600), Verdict::Live, "10 min ago"),
            (|c| c.asked.clear(), Verdict::Unknown, "c-1, which was not asked"),
            (|c| c.asked = vec!["c-2"], Verdict::Unknown, "not asked"),
            (|c| c.record.cluster = None, Verdict::Retained, "no cluster"),
            (|c| c.record.state = State::Released, Verdict::Released, "on purpose"),
        ];
        for (change, verdict, word) in doubts {
            assert_verdict(&case(change), verdict, word);
        }
    }

    #[test]
    fn what_the_owner_wrote_before_it_let_go_is_no_heartbeat() {
        let judged = case(|c| (c.written, c.facts.newest) = (at(4000), Some(at(4000))));
        assert_verdict(&judged, Verdict::Orphan, "nothing");
    }

    #[test]
    fn no_record_and_no_sound_record_are_never_orphans() {
        for named in [false, true] {
            for record in [Recorded::No, Recorded::Unusable("its record has format 2".into())] {
                let mut judged = None;
                case(|c| {
                    c.named = named;
                    judged = Some(judge_case(c, &record));
                });
                assert_eq!(judged.unwrap().verdict, Verdict::Unknown);
            }
        }
    }

    #[test]
    fn a_name_overrules_only_what_is_a_matter_of_wishes() {
        type Change = fn(&mut Case);
        let wishes: [Change; 3] =
            [|c| c.record.cluster = None, |c| c.record.state = State::Released, |c| c.written = at(1)];
        for change in wishes {
            let judged = case(|c| {
                change(c);
                c.named = true;
            });
            assert_verdict(&judged, Verdict::Orphan, "named");
        }
        let facts: [Change; 6] = [
            |c| c.record.published = Some(published()),
            |c| c.references.push(reference(ReferenceKind::PersistentVolume)),
            |c| c.record.owner = Some(owner()),
            |c| c.facts.newest = Some(at(20)),
            |c| c.asked.clear(),
            |c| c.facts.content = DataPrefix::Foreign("photo.jpg".into()),
        ];
        for change in facts {
            let judged = case(|c| {
                change(c);
                c.named = true;
            });
            assert_ne!(judged.verdict, Verdict::Orphan, "{judged:?}");
        }
    }

    #[test]
    fn marks() {
        // The mark is itself a recent write of the record.
        let marked = |by: MarkedBy, c: &mut Case| (c.record.tombstone, c.written) = (tombstone(by), at(10));
        assert_verdict(&case(|c| marked(MarkedBy::Scan, c)), Verdict::Orphan, "nothing in cluster");
        for by in [MarkedBy::Name, MarkedBy::DeleteVolume] {
            let judged = case(|c| {
                marked(by, c);
                c.record.cluster = None;
            });
            assert_verdict(&judged, Verdict::Orphan, "as was said");
        }
        // A server wrote since, an older version attached since, a PersistentVolume came back.
        let judged = case(|c| {
            marked(MarkedBy::Scan, c);
            c.facts.manifest = Some("vol1/manifest/0008.manifest".into());
        });
        assert_verdict(&judged, Verdict::Live, "since it was marked");
        let judged = case(|c| {
            marked(MarkedBy::Name, c);
            c.record.epoch = 1;
        });
        assert_verdict(&judged, Verdict::Live, "its record was written");
        let judged = case(|c| {
            marked(MarkedBy::DeleteVolume, c);
            c.references.push(reference(ReferenceKind::PersistentVolume));
        });
        assert_verdict(&judged, Verdict::Live, "PersistentVolume");
    }

    #[test]
    fn a_begun_deletion_is_finished_whatever_still_names_it() {
        type Change = fn(&mut Case);
        let changes: [Change; 4] = [
            |_| {},
            |c| c.references.push(reference(ReferenceKind::PersistentVolume)),
            |c| c.asked.clear(),
            |c| c.written = at(1),
        ];
        for change in changes {
            let judged = case(|c| {
                c.record.state = State::Deleting;
                change(c);
            });
            assert_verdict(&judged, Verdict::Orphan, "has begun");
        }
        let judged = case(|c| {
            c.record.state = State::Deleting;
            c.references.push(reference(ReferenceKind::Journal));
        });
        assert_verdict(&judged, Verdict::Live, "journal");
    }

    #[test]
    fn durations_for_people() {
        for (seconds, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (3599, "59 min 59 s"),
            (3600, "1 h"),
            (90_061, "1 d 1 h"),
        ] {
            assert_eq!(ago(SignedDuration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_clock_of_whole_seconds_is_not_behind_what_was_just_written() {
        let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        let ahead = |ms| age(now + SignedDuration::from_millis(ms), now);
        assert_eq!(ahead(999), SignedDuration::ZERO);
        assert_eq!(ahead(-1500), SignedDuration::from_millis(1500));
        assert_eq!(ahead(1000), SignedDuration::from_secs(-1), "that clock is wrong");
    }
}
