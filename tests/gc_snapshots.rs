//! The answers of the collector and of the catalog's commands, in every form, as snapshots to be read as prose.

use insta::assert_snapshot;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use zerofsctl::catalog::{DataPrefix, Family, MarkedBy, Owner, State, Sweeper, Tombstone, VolumeRecord};
use zerofsctl::error::{Error, Kind};
use zerofsctl::gc::evidence::{Facts, Recorded};
use zerofsctl::gc::verdict::{Evidence, judge};
use zerofsctl::gc::{Marked, Outcome, Patience, Plan, Reference, ReferenceKind, Scan, Seen, Swept};
use zerofsctl::report::{Format, Report, gc};
use zerofsctl::values::{ByteSize, FsType, VolumeId};

const NOW: i64 = 1_790_000_000;

fn at(before_now: i64) -> Timestamp {
    Timestamp::from_second(NOW - before_now).unwrap()
}

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

fn forms(name: &str, report: &Report) {
    for (form, format) in [
        ("table", Format::Table),
        ("wide", Format::Wide),
        ("json", Format::Json),
        ("yaml", Format::Yaml),
        ("name", Format::Name),
    ] {
        assert_snapshot!(format!("{name}-{form}"), report.render(format, None).unwrap());
    }
}

fn record(volume: &str) -> VolumeRecord {
    let mut record = VolumeRecord::new(id(volume), ByteSize(10 << 30), Some(FsType::Ext4), at(9_000_000));
    record.cluster = Some("6f1c3f0e".into());
    record.zerofs_version = Some("0.19.1".into());
    record
}

fn owner() -> Owner {
    Owner {
        node: "node-a".into(),
        machine_id: "m".into(),
        boot_id: "b".into(),
        instance: "i".into(),
        state_dir: "/var/lib/zerofsctl".into(),
        run_dir: "/run/zerofsctl".into(),
        since: at(3600),
    }
}

fn tombstone() -> Tombstone {
    Tombstone {
        at: at(7200),
        by: MarkedBy::Scan,
        why: "nothing in cluster 6f1c3f0e refers to it".into(),
        epoch: 0,
        manifest: None,
        grace_seconds: None,
    }
}

/// One volume of each kind.
fn records() -> Vec<VolumeRecord> {
    vec![
        VolumeRecord { owner: Some(owner()), epoch: 3, ..record("attached") },
        VolumeRecord { cluster: None, ..record("by-hand") },
        VolumeRecord {
            state: State::Deleting,
            tombstone: Some(tombstone()),
            sweeper: Some(Sweeper { nonce: "n".into(), until: at(-60), others_until: None }),
            ..record("half-gone")
        },
        VolumeRecord { tombstone: Some(tombstone()), ..record("marked") },
        record("orphan"),
        record("retained"),
        VolumeRecord { state: State::Released, ..record("released") },
    ]
}

fn scan() -> Scan {
    let asked = ["6f1c3f0e".to_owned()].into();
    let facts = Facts {
        content: DataPrefix::ZeroFs(Family::Old),
        objects: Some(1234),
        bytes: 5 << 30,
        newest: Some(at(400_000)),
        manifest: None,
    };
    let seen = |volume: VolumeId, record: Recorded, references: Vec<Reference>, facts: Facts| {
        let judgement = judge(&Evidence {
            record: &record,
            references: &references,
            asked: &asked,
            facts: &facts,
            now: at(0),
            named: false,
            patience: Patience::default(),
        });
        // Without a tag nobody could write it; a report asks for none but the record's own.
        let tag = Some(zerofsctl::catalog::Tag::of_model("t".into()));
        Seen { volume, record, tag, facts, references, judgement }
    };
    let mut volumes: Vec<Seen> = records()
        .into_iter()
        .map(|record| {
            let references = if record.id.as_str() == "retained" {
                vec![Reference { kind: ReferenceKind::RetainedVolume, name: "pvc-7 in 6f1c3f0e".into() }]
            } else {
                vec![]
            };
            seen(record.id.clone(), Recorded::Yes(Box::new(record), at(200_000)), references, facts.clone())
        })
        .collect();
    let photos =
        Facts { content: DataPrefix::Foreign("2024/".into()), objects: None, bytes: 0, ..facts.clone() };
    volumes.push(seen(id("photos"), Recorded::No, vec![], photos));
    volumes.push(seen(
        id("newer"),
        Recorded::Unusable("its catalog record has format 2".into()),
        vec![],
        facts,
    ));
    volumes.sort_by(|a, b| a.volume.cmp(&b.volume));
    Scan {
        url: "s3://volumes/csi".parse().unwrap(),
        now: at(0),
        volumes,
        asked,
        silent: Default::default(),
        strange: vec!["readme.txt".into()],
        keeps_versions: Some(true),
    }
}

fn plan() -> Plan {
    serde_json::from_value(json!({
        "format": 1, "url": "s3://volumes/csi", "made": at(0),
        "lines": [
            {"volume": "half-gone", "epoch": 0, "marked": null, "begun": true, "objects": 34, "bytes": 700_000,
                "reason": "its deletion has begun, and can only be finished"},
            {"volume": "orphan", "epoch": 2, "marked": at(90_000), "begun": false, "objects": 1234, "bytes": 5_368_709_120u64,
                "reason": "nothing in cluster 6f1c3f0e refers to it"}
        ],
        "unmark": [["back", "PersistentVolume pvc-9 in 6f1c3f0e refers to it"]],
        "waiting": [["marked", at(-79_200)]]
    }))
    .unwrap()
}

#[test]
fn answers_of_scan() {
    forms("scan", &gc::scan(&scan()));
    let empty = Scan { volumes: vec![], strange: vec![], keeps_versions: None, ..scan() };
    forms("scan-empty", &gc::scan(&empty));
}

#[test]
fn answers_of_mark_and_sweep() {
    let marked = Marked {
        marked: vec![id("orphan")],
        unmarked: vec![(id("back"), "PersistentVolume pvc-9 in 6f1c3f0e refers to it".into())],
        changed: vec![id("race")],
    };
    forms("mark", &gc::marked(&plan(), &marked));
    forms("plan", &gc::plan("sweep", &plan(), "a dry run, nothing was changed"));
    let failed = Error::new(Kind::Busy, "a server still writes to it").hint("stop it; then run this again");
    let swept = Swept {
        volumes: vec![
            (id("changed"), Outcome::Kept("attached by node node-a".into())),
            (id("emptied"), Outcome::Emptied { objects: 3, bytes: 300, after: at(-120) }),
            (id("failed"), Outcome::Failed(failed)),
            (id("half-gone"), Outcome::Gone { objects: 34, bytes: 700_000, uploads: 0 }),
            (id("orphan"), Outcome::Gone { objects: 1234, bytes: 5 << 30, uploads: 2 }),
        ],
        unmarked: marked.unmarked.clone(),
        interrupted: false,
    };
    let report = gc::swept(&plan(), &swept, Some(true));
    assert_eq!(report.exit, 5, "done in part");
    forms("sweep", &report);
    let interrupted = gc::swept(&plan(), &Swept { interrupted: true, ..Swept::default() }, None);
    assert_eq!(interrupted.exit, 130);
    forms("sweep-interrupted", &interrupted);
}

#[test]
fn answers_of_status_and_restore() {
    forms("status", &gc::status(&records(), SignedDuration::from_hours(24), at(0)));
    forms("status-none", &gc::status(&[record("vol1")], SignedDuration::ZERO, at(0)));
    let restored = VolumeRecord { state: State::Released, ..record("marked") };
    forms("restore", &gc::restored(&restored, true));
    forms("restore-already", &gc::restored(&restored, false));
}

#[test]
fn answers_of_the_catalog() {
    forms("volume-list", &gc::records(&records()));
    let url = "s3://volumes/csi".parse().unwrap();
    let all = records();
    for volume in ["attached", "half-gone", "marked"] {
        let record = all.iter().find(|r| r.id.as_str() == volume).unwrap();
        let data = DataPrefix::ZeroFs(Family::Old);
        forms(&format!("volume-show-{volume}"), &gc::record(record, &data, Some(at(200_000)), &url));
    }
    forms("volume-forget", &gc::forgotten(&id("vol1"), &url));
}
