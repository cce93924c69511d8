//! The forms of what the collector found, would do, and did; and of the catalog's records.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{Report, counted};
use crate::catalog::{DataPrefix, MarkedBy, State, StorageUrl, VolumeRecord};
use crate::gc::evidence::Recorded;
use crate::gc::verdict::ago;
use crate::gc::{Marked, Outcome, Plan, Scan, Seen, Swept, Verdict};
use crate::values::{ByteSize, VolumeId};

fn stamp(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

fn state(record: &VolumeRecord) -> &'static str {
    match record.state {
        State::Deleting => "deleting",
        _ if record.owner.is_some() => "attached",
        _ if record.mark().is_some() => "marked",
        State::Ready => "ready",
        State::Released => "released",
    }
}

fn recorded(seen: &Seen) -> &'static str {
    match &seen.record {
        Recorded::No => "none",
        Recorded::Unusable(_) => "unusable",
        Recorded::Yes(record, _) => state(record),
    }
}

fn dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

/// The answer of `gc-s3 scan`.
pub fn scan(scan: &Scan) -> Report {
    let age = |at: Timestamp| ago(scan.now.duration_since(at));
    let rows = scan
        .volumes
        .iter()
        .map(|seen| {
            let record = seen.usable().map(|(r, _)| r);
            let references: Vec<String> = seen.references.iter().map(ToString::to_string).collect();
            vec![
                seen.volume.to_string(),
                seen.judgement.verdict.name().into(),
                recorded(seen).into(),
                seen.facts.objects.map_or_else(|| "-".into(), |n| n.to_string()),
                if seen.facts.objects.is_some() { size(seen.facts.bytes) } else { "-".into() },
                dash(seen.facts.newest.map(age)),
                seen.judgement.reason.clone(),
                dash(record.and_then(|r| r.cluster.clone())),
                dash(record.and_then(|r| r.mark()).map(|m| stamp(m.at))),
                if references.is_empty() { "-".into() } else { references.join(", ") },
            ]
        })
        .collect();
    let data: Vec<Value> = scan
        .volumes
        .iter()
        .map(|seen| {
            let record = seen.usable().map(|(r, _)| r);
            json!({
                "volume": seen.volume, "verdict": seen.judgement.verdict, "reason": seen.judgement.reason,
                "record": recorded(seen), "objects": seen.facts.objects, "bytes": seen.facts.bytes,
                "newest": seen.facts.newest, "references": seen.references,
                "cluster": record.and_then(|r| r.cluster.as_ref()), "mark": record.and_then(|r| r.mark()),
            })
        })
        .collect();
    let counts: BTreeMap<&str, usize> = Verdict::ALL.iter().map(|v| (v.name(), scan.count(*v))).collect();
    let orphans: Vec<&Seen> =
        scan.volumes.iter().filter(|s| s.judgement.verdict == Verdict::Orphan).collect();
    let mut notes = Vec::new();
    if !orphans.is_empty() {
        let objects: u64 = orphans.iter().filter_map(|s| s.facts.objects).sum();
        let bytes: u64 = orphans.iter().map(|s| s.facts.bytes).sum();
        notes.push(format!(
            "{}: {}, {}",
            counted(orphans.len(), "orphan"),
            counted(objects, "object"),
            size(bytes)
        ));
    }
    notes.extend(versions_note(scan.keeps_versions));
    if !scan.strange.is_empty() {
        notes.push(format!("not of ZeroFS, and left alone: {}", scan.strange.join(", ")));
    }
    let words: Vec<String> =
        Verdict::ALL.iter().map(|v| format!("{} {}", scan.count(*v), v.name())).collect();
    let report = Report::new(
        "gc-scan",
        json!({"storage_url": scan.url, "at": scan.now, "counts": counts, "volumes": data,
            "asked": scan.asked, "strange": scan.strange, "keeps_versions": scan.keeps_versions}),
    )
    .summary(format!("{}: {}: {}", scan.url, counted(scan.volumes.len(), "volume"), words.join(", ")))
    .names(scan.volumes.iter().map(|s| s.volume.to_string()))
    .notes(notes);
    if scan.volumes.is_empty() {
        return report;
    }
    let columns = [
        "VOLUME",
        "VERDICT",
        "RECORD",
        "OBJECTS",
        "BYTES",
        "NEWEST",
        "REASON",
        "CLUSTER",
        "MARKED",
        "REFERENCES",
    ];
    report.table(&columns, rows).wide_from(7)
}

fn versions_note(keeps: Option<bool>) -> Option<String> {
    keeps.filter(|k| *k).map(|_| {
        "the bucket keeps old versions: what is deleted still takes room, until a lifecycle rule for noncurrent versions removes it"
            .into()
    })
}

/// A plan, shown before or instead of running it.
pub fn plan(verb: &'static str, plan: &Plan, how: &str) -> Report {
    let rows = plan
        .lines
        .iter()
        .map(|l| {
            vec![
                l.volume.to_string(),
                l.objects.to_string(),
                size(l.bytes),
                if l.begun { "begun".into() } else { dash(l.marked.map(stamp)) },
                l.reason.clone(),
            ]
        })
        .collect();
    let kind = if verb == "mark" { "gc-mark" } else { "gc-sweep" };
    let report = Report::new(kind, json!({"dry_run": true, "plan": plan}))
        .summary(format!(
            "{verb} {} of {}, {}, {}: {how}",
            counted(plan.lines.len(), "volume"),
            plan.url,
            counted(plan.objects(), "object"),
            size(plan.bytes())
        ))
        .names(plan.lines.iter().map(|l| l.volume.to_string()))
        .notes(plan.unmark.iter().map(|(v, why)| format!("{v} loses its mark: {why}")))
        .notes(plan.waiting.iter().map(|(v, due)| format!("{v} is marked, and due at {}", stamp(*due))));
    if plan.lines.is_empty() {
        report
    } else {
        report.table(&["VOLUME", "OBJECTS", "BYTES", "MARKED", "REASON"], rows)
    }
}

/// The answer of `gc-s3 mark`.
pub fn marked(plan: &Plan, done: &Marked) -> Report {
    let rows = done
        .marked
        .iter()
        .map(|volume| {
            let line = plan.lines.iter().find(|l| l.volume == *volume);
            vec![
                volume.to_string(),
                line.map_or(0, |l| l.objects).to_string(),
                size(line.map_or(0, |l| l.bytes)),
                line.map_or_else(String::new, |l| l.reason.clone()),
            ]
        })
        .collect();
    let report = Report::new(
        "gc-mark",
        json!({"storage_url": plan.url, "marked": done.marked, "unmarked": done.unmarked, "changed": done.changed}),
    )
    .summary(format!("{} of {} marked", counted(done.marked.len(), "volume"), plan.url))
    .names(done.marked.iter().map(ToString::to_string))
    .notes(done.unmarked.iter().map(|(v, why)| format!("{v} lost its mark: {why}")))
    .notes(done.changed.iter().map(|v| format!("{v} was changed meanwhile, and left alone")));
    if done.marked.is_empty() {
        report
    } else {
        report.table(&["VOLUME", "OBJECTS", "BYTES", "REASON"], rows)
    }
}

/// The answer of `gc-s3 sweep`; exit code 5 when something could not be deleted.
pub fn swept(plan: &Plan, done: &Swept, keeps_versions: Option<bool>) -> Report {
    let (mut objects, mut bytes, mut gone, mut failed) = (0, 0, 0, 0);
    let mut data = Vec::new();
    let mut rows = Vec::new();
    for (volume, outcome) in &done.volumes {
        let (word, count, sum, note) = match outcome {
            Outcome::Gone { objects, bytes, uploads } => {
                gone += 1;
                let aborted = if *uploads > 0 {
                    format!("{uploads} unfinished uploads aborted")
                } else {
                    String::new()
                };
                ("gone", *objects, *bytes, aborted)
            }
            Outcome::Emptied { objects, bytes, after } => {
                ("emptied", *objects, *bytes, format!("a sweep after {} removes its record", stamp(*after)))
            }
            Outcome::Kept(why) => ("kept", 0, 0, why.clone()),
            Outcome::Failed(e) => {
                failed += 1;
                ("failed", 0, 0, e.message().to_owned())
            }
        };
        objects += count;
        bytes += sum;
        data.push(json!({"volume": volume, "outcome": word, "objects": count, "bytes": sum, "note": note}));
        rows.push(vec![volume.to_string(), word.into(), count.to_string(), size(sum), note]);
    }
    let hints = done.volumes.iter().filter_map(|(v, o)| match o {
        Outcome::Failed(e) => Some(format!("{v}: hint: {}", e.hint_text()?)),
        _ => None,
    });
    let mut notes: Vec<String> =
        done.unmarked.iter().map(|(v, why)| format!("{v} lost its mark: {why}")).collect();
    notes.extend(plan.waiting.iter().map(|(v, due)| format!("{v} is marked, and due at {}", stamp(*due))));
    notes.extend(hints);
    notes.extend(versions_note(keeps_versions).filter(|_| objects > 0));
    if done.interrupted {
        notes.push("it was interrupted; run the same command again to go on".into());
    }
    let exit = if done.interrupted {
        130
    } else if failed > 0 {
        5
    } else {
        0
    };
    let report = Report::new(
        "gc-sweep",
        json!({"storage_url": plan.url, "volumes": data, "objects": objects, "bytes": bytes, "unmarked": done.unmarked,
            "waiting": plan.waiting, "interrupted": done.interrupted}),
    )
    .summary(format!(
        "{} deleted from {}, {}, {}",
        counted(gone, "volume"),
        plan.url,
        counted(objects, "object"),
        size(bytes)
    ))
    .names(done.volumes.iter().map(|(v, _)| v.to_string()))
    .notes(notes)
    .exit(exit);
    if rows.is_empty() {
        report
    } else {
        report.table(&["VOLUME", "OUTCOME", "OBJECTS", "BYTES", "NOTE"], rows)
    }
}

/// The answer of `gc-s3 restore`.
pub fn restored(record: &VolumeRecord, changed: bool) -> Report {
    let text =
        if changed { "is not marked any more, and kept on purpose from now on" } else { "was not marked" };
    Report::new("gc-restore", json!({"volume": record.id, "already": !changed, "state": record.state}))
        .summary(format!("{} {text}", record.id))
        .names([record.id.to_string()])
}

/// The answer of `gc-s3 status`.
pub fn status(records: &[VolumeRecord], grace: SignedDuration, now: Timestamp) -> Report {
    let (mut rows, mut data, mut names) = (Vec::new(), Vec::new(), Vec::new());
    for record in records {
        let (since, due, by, why) = match (record.state, record.mark(), &record.tombstone) {
            (State::Deleting, _, mark) => {
                (mark.as_ref().map(|m| m.at), None, "-", "run gc-s3 sweep to finish it".to_owned())
            }
            (_, Some(mark), _) => (Some(mark.at), Some(mark.due(grace)), by(mark.by), mark.why.clone()),
            _ => continue,
        };
        let left = due.map(|due| {
            if due <= now { "now".to_owned() } else { format!("in {}", ago(due.duration_since(now))) }
        });
        rows.push(vec![
            record.id.to_string(),
            state(record).into(),
            dash(since.map(stamp)),
            dash(left),
            by.into(),
            why.clone(),
        ]);
        data.push(json!({"volume": record.id, "state": state(record), "marked": since, "due": due, "by": by, "why": why}));
        names.push(record.id.to_string());
    }
    let report = Report::new("gc-status", data).names(names);
    if rows.is_empty() {
        return report.summary("no volume is marked or being deleted");
    }
    report.table(&["VOLUME", "STATE", "MARKED", "DUE", "BY", "WHY"], rows)
}

fn by(by: MarkedBy) -> &'static str {
    match by {
        MarkedBy::Scan => "scan",
        MarkedBy::Name => "name",
        MarkedBy::DeleteVolume => "DeleteVolume",
    }
}

/// The answer of `volume list`.
pub fn records(records: &[VolumeRecord]) -> Report {
    let rows = records
        .iter()
        .map(|r| {
            vec![
                r.id.to_string(),
                state(r).into(),
                r.capacity.to_string(),
                dash(r.filesystem.map(|f| f.to_string())),
                dash(r.cluster.clone()),
                stamp(r.created),
                r.epoch.to_string(),
                dash(r.owner.as_ref().map(|o| o.node.clone())),
                dash(r.zerofs_version.clone()),
            ]
        })
        .collect();
    let report = Report::new("volume-list", records.iter().map(plain).collect::<Vec<_>>())
        .names(records.iter().map(|r| r.id.to_string()));
    if records.is_empty() {
        return report.summary("no records");
    }
    let columns = ["VOLUME", "STATE", "SIZE", "FS", "CLUSTER", "CREATED", "EPOCH", "NODE", "ZEROFS"];
    report.table(&columns, rows).wide_from(6)
}

/// What may be shown of a record: all but the password's check value.
fn plain(r: &VolumeRecord) -> Value {
    json!({"volume": r.id, "state": state(r), "capacity": r.capacity, "filesystem": r.filesystem, "cluster": r.cluster,
        "created": r.created, "content": r.content, "adopted": r.adopted, "epoch": r.epoch, "owner": r.owner,
        "zerofs_version": r.zerofs_version, "mark": r.tombstone, "sweeper": r.sweeper})
}

/// The answer of `volume show`.
pub fn record(r: &VolumeRecord, data: &DataPrefix, written: Option<Timestamp>, url: &StorageUrl) -> Report {
    let holds = match data {
        DataPrefix::Empty => "nothing".to_owned(),
        DataPrefix::ZeroFs(family) => format!("a ZeroFS volume ({})", format!("{family:?}").to_lowercase()),
        DataPrefix::Foreign(name) => format!("something that is not of ZeroFS: {name}"),
    };
    let mut rows = vec![
        ("volume", r.id.to_string()),
        ("state", state(r).to_owned()),
        ("data", url.volume_url(&r.id)),
        ("holds", holds),
        ("size", r.capacity.to_string()),
        ("filesystem", dash(r.filesystem.map(|f| f.to_string()))),
        ("content", format!("{:?}", r.content).to_lowercase()),
        ("cluster", dash(r.cluster.clone())),
        ("owner", r.owner.as_ref().map_or_else(|| "nobody".into(), ToString::to_string)),
        ("epoch", r.epoch.to_string()),
        ("zerofs", dash(r.zerofs_version.clone())),
        ("created", stamp(r.created)),
        ("written", dash(written.map(stamp))),
    ];
    if let Some(mark) = &r.tombstone {
        let void = if r.mark().is_none() && r.state != State::Deleting {
            " (void: it was attached since)"
        } else {
            ""
        };
        rows.push(("marked", format!("{} by {}: {}{void}", stamp(mark.at), by(mark.by), mark.why)));
    }
    if let Some(sweeper) = &r.sweeper {
        rows.push(("deletion", format!("a collector is at work until {}", stamp(sweeper.until))));
    }
    let rows = rows.into_iter().map(|(what, value)| vec![what.to_owned(), value]).collect();
    Report::new("volume-show", plain(r)).table(&["WHAT", "VALUE"], rows).names([r.id.to_string()])
}

/// The answer of `volume forget`.
pub fn forgotten(volume: &VolumeId, url: &StorageUrl) -> Report {
    Report::new("volume-forget", json!({"volume": volume, "storage_url": url}))
        .summary(format!("the record of {volume} is gone from {url}"))
        .names([volume.to_string()])
}
