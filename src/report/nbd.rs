//! The forms of what `zerofsctl nbd` answers.

use std::time::Duration;

use jiff::{RoundMode, SpanRound, Timestamp, Unit};
use serde_json::json;

use super::{Report, counted};
use crate::error::Error;
use crate::host::nbd::capacity::MORE_DEVICES;
use crate::host::nbd::survey::{Device, Survey};
use crate::host::nbd::usage::Mounted;
use crate::host::nbd::verdict::{Proof, Verdict};
use crate::host::users;
use crate::ops::nbd_gc::{Fate, GcSpec, Item, Left};

/// How many mount points a table shows of one device; the rest is counted.
const MOUNTS_SHOWN: usize = 2;

/// The answer of `nbd list`. With `check` a leak gives exit code 3.
pub fn list(survey: &Survey, check: bool, now: Timestamp) -> Report {
    let columns = [
        "DEVICE",
        "VERDICT",
        "SIZE",
        "VOLUME",
        "SERVER",
        "MOUNTED AT",
        "BACKEND",
        "OURS BY",
        "HELD BY",
        "OPEN BY",
        "DEAD LINKS",
        "SINCE",
        "WHY",
    ];
    let rows: Vec<Vec<String>> = survey.devices.iter().map(|d| row(d, now)).collect();
    let leaks: Vec<&Device> = of(survey, Verdict::OursLeaked).collect();
    let mut notes = Vec::new();
    for device in &leaks {
        let since =
            device.leaked_since.map_or_else(String::new, |t| format!(", since {} at least", age(t, now)));
        notes.push(format!("{} is leaked{since}: {}", device.path.display(), device.why));
    }
    if !leaks.is_empty() {
        notes.push("hint: see what can go: zerofsctl nbd gc".into());
    }
    for device in of(survey, Verdict::Unknown) {
        notes.push(format!("{} is unknown: {}", device.path.display(), device.why));
    }
    if !survey.identifiers {
        notes.push(
            "note: this kernel is older than 5.14 and keeps no backend identifiers: our records tell what is ours"
                .into(),
        );
    }
    let c = &survey.capacity;
    if c.available && c.remaining() == 0 {
        notes.push(format!("hint: no further device can be connected; {MORE_DEVICES}"));
    }
    let counts = format!("{} of {} NBD devices are connected", c.connected, c.existing);
    let counts = match c.nbds_max {
        Some(max) => format!("{counts} (nbds_max {max}, {} more can be)", c.remaining()),
        None => counts,
    };
    let report = Report::new("nbd-list", survey)
        .names(survey.devices.iter().map(|d| d.path.display().to_string()))
        .exit(match check {
            true if !leaks.is_empty() => 3,
            // One of them may be a leak.
            true if of(survey, Verdict::Unknown).next().is_some() => 4,
            _ => 0,
        });
    if !c.available {
        return report.summary("there are no NBD devices");
    }
    let report = report.summary(counts).notes(notes);
    if rows.is_empty() { report } else { report.table(&columns, rows).wide_from(6) }
}

/// Why there is nothing to tell of, and what to do about it.
pub fn why_none(e: &Error) -> Vec<String> {
    let hint = e.hint_text().map(|hint| format!("hint: {hint}"));
    std::iter::once(format!("note: {}", e.message())).chain(hint).collect()
}

fn of(survey: &Survey, verdict: Verdict) -> impl Iterator<Item = &Device> {
    survey.devices.iter().filter(move |d| d.verdict == Some(verdict))
}

fn row(d: &Device, now: Timestamp) -> Vec<String> {
    let dash = || "-".to_owned();
    let server = d.server.as_ref().map_or_else(dash, |s| match (s.keeper, s.zerofs) {
        (Some(pid), _) if s.answers => format!("{pid}, answers"),
        (Some(pid), _) => format!("{pid}, no answer"),
        (None, Some(pid)) => format!("zerofs {pid}"),
        (None, None) => s.elsewhere.as_ref().map_or("none".into(), |e| format!("{}, elsewhere", e.pid)),
    });
    vec![
        d.path.display().to_string(),
        d.verdict.map_or_else(|| "not connected".into(), |v| v.name().to_owned()),
        if d.is_connected() { d.size.to_string() } else { dash() },
        d.volume.as_ref().map_or_else(dash, ToString::to_string),
        server,
        mounted(&d.mounts),
        match &d.backend {
            // Foreign text goes to a terminal.
            Some(text) => format!("\"{}\"", text.escape_debug()),
            None => dash(),
        },
        match d.proof {
            Some(Proof::Backend) => "backend".into(),
            Some(Proof::Journal) => "journal".into(),
            None => dash(),
        },
        if d.holders.is_empty() { dash() } else { d.holders.join(", ") },
        match &d.openers {
            Some(users) if users.is_empty() => "0".into(),
            Some(users) => format!("{}: {}", users.len(), users::list(users)),
            None => dash(),
        },
        d.server.as_ref().and_then(|s| s.dead_links).map_or_else(dash, |n| n.to_string()),
        d.connection.as_ref().map_or_else(dash, |c| age(c.since, now)),
        d.why.clone(),
    ]
}

/// Each place once, those of our own namespace first.
fn mounted(mounts: &[Mounted]) -> String {
    let mut shown: Vec<String> = Vec::new();
    for mount in mounts {
        let text = match mount.in_namespace_of {
            None => mount.target.display().to_string(),
            // The same mount usually shows in many namespaces: the place tells enough.
            Some(_) if mounts.iter().any(|m| m.in_namespace_of.is_none() && m.target == mount.target) => {
                continue;
            }
            Some(pid) => format!("{} (namespace of {pid})", mount.target.display()),
        };
        if !shown.contains(&text) {
            shown.push(text);
        }
    }
    let more = shown.len().saturating_sub(MOUNTS_SHOWN);
    shown.truncate(MOUNTS_SHOWN);
    match (shown.is_empty(), more) {
        (true, _) => "-".into(),
        (false, 0) => shown.join(", "),
        (false, n) => format!("{} and {n} more", shown.join(", ")),
    }
}

/// `2h 5m`; two units at most.
fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(since).as_secs().max(0);
    let smallest = match seconds {
        0..3600 => Unit::Second,
        3600..86400 => Unit::Minute,
        _ => Unit::Hour,
    };
    let options = SpanRound::new().largest(Unit::Hour).smallest(smallest).mode(RoundMode::Trunc);
    let span = jiff::Span::new().seconds(seconds).round(options).unwrap_or_default();
    format!("{span:#}")
}

/// The answer of `nbd gc`: the plan, or with `done` what became of it.
pub fn gc(items: &[Item], spec: GcSpec, done: bool, now: Timestamp) -> Report {
    let rows = items
        .iter()
        .map(|i| {
            let (outcome, why) = match &i.fate {
                Fate::Would => ("would disconnect", i.device.why.clone()),
                Fate::Disconnected => ("disconnected", i.device.why.clone()),
                Fate::Kept(reason) => ("kept", reason.why.clone()),
                Fate::Failed(reason) => ("failed", reason.why.clone()),
            };
            vec![
                i.device.path.display().to_string(),
                outcome.to_owned(),
                i.device.verdict.map_or("-", Verdict::name).to_owned(),
                i.device.volume.as_ref().map_or_else(|| "-".into(), ToString::to_string),
                why,
            ]
        })
        .collect();
    let count = |wanted: fn(&Fate) -> bool| items.iter().filter(|i| wanted(&i.fate)).count();
    let (would, gone, failed) = (
        count(|f| *f == Fate::Would),
        count(|f| *f == Fate::Disconnected),
        count(|f| matches!(f, Fate::Failed(_))),
    );
    let devices = |n: usize| counted(n, "device");
    let come_back = come_back(items, spec, now);
    let summary = match (done, would, gone, failed) {
        (false, 0, ..) if come_back.is_some() => "nothing to collect yet".to_owned(),
        (false, 0, ..) => "nothing to collect".to_owned(),
        (false, n, ..) => format!("{} would be disconnected; nothing was changed", devices(n)),
        (true, _, 0, 0) => "nothing was collected".into(),
        (true, _, n, 0) => format!("{} disconnected", devices(n)),
        (true, _, n, f) => format!("{} disconnected, {} failed", devices(n), devices(f)),
    };
    let mut notes = Vec::new();
    for item in items.iter().filter(|i| matches!(i.fate, Fate::Would | Fate::Disconnected)) {
        let Some(volume) = &item.device.volume else { continue };
        let name = item.device.path.display();
        match &item.left {
            Some(Left::Entries(n)) => notes.push(format!(
                "{name}: the replay log of {volume} holds {}. It stays; get them back on this node: zerofsctl recover \
                 {volume}, or attach {volume} here",
                counted(*n, "acknowledged write")
            )),
            Some(Left::Maybe) => notes.push(format!(
                "{name}: the replay log of {volume} stays; should it hold acknowledged writes, get them back on this \
                 node: zerofsctl recover {volume}, or attach {volume} here"
            )),
            Some(Left::Void(why)) => notes.push(format!(
                "{name}: the replay log of {volume} is void: {why}. It stays until {volume} is attached here, which \
                 discards it"
            )),
            Some(Left::Damaged(why)) => notes.push(format!(
                "{name}: the replay log of {volume} cannot be read: {why}. It may hold acknowledged writes, and stays \
                 until {volume} is attached here, which discards it: copy it before"
            )),
            Some(Left::Nothing) | None => {}
        }
    }
    notes.extend(items.iter().filter_map(|item| match &item.fate {
        Fate::Kept(reason) | Fate::Failed(reason) => {
            Some(format!("{}: hint: {}", item.device.path.display(), reason.hint.as_ref()?))
        }
        Fate::Would | Fate::Disconnected => None,
    }));
    notes.extend(come_back);
    if would > 0 {
        notes.push("hint: disconnect them: zerofsctl nbd gc --yes".into());
    }
    let exit = match (failed, gone) {
        (0, _) => 0,
        (_, 0) => 1,
        _ => 5,
    };
    let wanted = items.iter().filter(|i| matches!(i.fate, Fate::Would | Fate::Disconnected));
    let report = Report::new(
        "nbd-gc",
        json!({"dry_run": !done, "older_than_seconds": spec.older_than.as_secs_f64(), "devices": items}),
    )
    .summary(summary)
    .names(wanted.map(|i| i.device.path.display().to_string()))
    .notes(notes)
    .exit(exit);
    if items.is_empty() {
        report
    } else {
        report.table(&["DEVICE", "OUTCOME", "VERDICT", "VOLUME", "WHY"], rows)
    }
}

/// For how long leaks that are only too young have been known, and when they are old enough.
fn come_back(items: &[Item], spec: GcSpec, now: Timestamp) -> Option<String> {
    let mut waits: Vec<Duration> = items
        .iter()
        .filter_map(|item| match &item.fate {
            Fate::Kept(reason) => Some(seconds_until(reason.due_at?, now)),
            _ => None,
        })
        .collect();
    waits.sort_unstable();
    let (first, last) = (*waits.first()?, *waits.last()?);
    let text = humantime::format_duration;
    let known = |wait| text(spec.older_than.saturating_sub(wait));
    let are = if waits.len() == 1 { "is" } else { "are" };
    let leaks = format!("{} {are} kept", counted(waits.len(), "leak"));
    let of = text(spec.older_than);
    Some(if first == last {
        format!("{leaks}: known for {} of {of}; run again in {}", known(first), text(first))
    } else {
        format!(
            "{leaks}: known for {} to {} of {of}; run again in {}, and in {} for all",
            known(last),
            known(first),
            text(first),
            text(last)
        )
    })
}

/// Rounded up, so that whoever waits for so long is not too early.
fn seconds_until(at: Timestamp, now: Timestamp) -> Duration {
    let left = Duration::try_from(at.duration_since(now)).unwrap_or_default();
    Duration::from_secs(left.as_secs() + u64::from(left.subsec_nanos() > 0))
}

/// What a server says of one export.
#[derive(Debug, Clone)]
pub struct ExportInfo {
    /// Its name; empty for the default export.
    pub name: String,
    /// Size, flags, block sizes.
    pub export: crate::zerofs::nbd::Export,
    /// It tells holes from data.
    pub block_status: bool,
}

impl ExportInfo {
    /// Each ability by its name in the protocol, with whether the server has it.
    fn abilities(&self) -> [(&'static str, bool); 9] {
        let flags = self.export.flags;
        [
            ("read-only", flags.is_read_only()),
            ("flush", flags.has_flush()),
            ("fua", flags.has_fua()),
            ("trim", flags.has_trim()),
            ("write-zeroes", flags.has_write_zeroes()),
            ("fast-zero", flags.has_fast_zero()),
            ("cache", flags.has_cache()),
            ("multi-conn", flags.can_multi_conn()),
            ("block-status", self.block_status),
        ]
    }
}

/// The answer of `nbd info`. `lists` tells whether the server lists its exports, `structured` whether it has
/// structured replies.
pub fn info(socket: &std::path::Path, lists: bool, structured: bool, exports: &[ExportInfo]) -> Report {
    let named = |e: &ExportInfo| {
        if e.name.is_empty() { "\"\"".to_owned() } else { e.name.escape_debug().to_string() }
    };
    let rows = exports
        .iter()
        .map(|e| {
            let can: Vec<&str> =
                e.abilities().into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect();
            let x = &e.export;
            vec![
                named(e),
                crate::values::ByteSize(x.size).to_string(),
                format!("{}/{}/{}", x.min_block, x.preferred_block, x.max_block),
                if can.is_empty() { "-".into() } else { can.join(" ") },
                x.size.to_string(),
                format!("{:#06x}", x.flags.bits()),
            ]
        })
        .collect();
    let data = exports.iter().map(|e| {
        let abilities: serde_json::Map<String, serde_json::Value> =
            e.abilities().into_iter().map(|(name, has)| (name.replace('-', "_"), has.into())).collect();
        json!({"name": e.name, "size": e.export.size, "flags": e.export.flags, "min_block": e.export.min_block,
            "preferred_block": e.export.preferred_block, "max_block": e.export.max_block, "can": abilities})
    });
    let replies = if structured { "structured replies" } else { "simple replies only" };
    let listing = if lists { "" } else { ", does not list its exports" };
    let report = Report::new(
        "nbd-info",
        json!({"socket": socket, "lists_exports": lists, "structured_replies": structured, "exports": data.collect::<Vec<_>>()}),
    )
    .summary(format!("{}: newstyle, {replies}{listing}", socket.display()))
    .names(exports.iter().map(|e| e.name.clone()));
    if exports.is_empty() {
        return report.notes(["it has no export".to_owned()]);
    }
    report.table(&["EXPORT", "SIZE", "BLOCKS MIN/BEST/MAX", "CAN", "BYTES", "FLAGS"], rows).wide_from(4)
}

/// One change that `nbd watch` saw.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Change {
    /// It is connected now, or was when the watch began.
    Connected {
        /// What it is.
        device: Box<Device>,
    },
    /// It is not connected any more.
    Disconnected {
        /// What it was.
        device: Box<Device>,
    },
    /// It has another size.
    Resized {
        /// The size before.
        from: crate::values::ByteSize,
        /// What it is now.
        device: Box<Device>,
    },
    /// It is something else to us.
    Verdict {
        /// The verdict before.
        from: Option<Verdict>,
        /// What it is now.
        device: Box<Device>,
    },
    /// The kernel has given up a connection of it.
    LinkDead {
        /// The N of `/dev/nbdN`.
        index: u32,
    },
}

/// What happened between two looks, by index.
pub fn changes(before: &[Device], now: &[Device]) -> Vec<Change> {
    let connected =
        |all: &[Device], index: u32| all.iter().find(|d| d.index == index && d.is_connected()).cloned();
    let indices: std::collections::BTreeSet<u32> = before.iter().chain(now).map(|d| d.index).collect();
    let mut changes = Vec::new();
    for index in indices {
        match (connected(before, index), connected(now, index)) {
            (None, None) => {}
            (None, Some(d)) => changes.push(Change::Connected { device: d.into() }),
            (Some(d), None) => changes.push(Change::Disconnected { device: d.into() }),
            (Some(a), Some(b)) => {
                let id = |d: &Device| d.connection.as_ref().map(|c| c.id);
                if id(&a) != id(&b) || a.backend != b.backend {
                    changes.push(Change::Disconnected { device: a.into() });
                    changes.push(Change::Connected { device: b.into() });
                    continue;
                }
                if a.size != b.size {
                    changes.push(Change::Resized { from: a.size, device: b.clone().into() });
                }
                if a.verdict != b.verdict {
                    changes.push(Change::Verdict { from: a.verdict, device: b.into() });
                }
            }
        }
    }
    changes
}

impl Change {
    /// The line of it, at `at`.
    pub fn line(&self, at: Timestamp, json: bool) -> String {
        if json {
            let mut value = serde_json::to_value(self).unwrap_or_default();
            if let Some(map) = value.as_object_mut() {
                map.insert("schema".into(), super::SCHEMA.into());
                map.insert("kind".into(), "nbd-change".into());
                map.insert("at".into(), at.to_string().into());
            }
            return value.to_string();
        }
        let is = |d: &Device| {
            let volume = d.volume.as_ref().map_or_else(String::new, |v| format!(" {v}"));
            format!("{}{volume}: {}", d.verdict.map_or("not connected", Verdict::name), d.why)
        };
        let text = match self {
            Change::Connected { device: d } => {
                format!("{} connected, {}, {}", d.path.display(), d.size, is(d))
            }
            Change::Disconnected { device: d } => {
                let volume = d.volume.as_ref().map_or_else(String::new, |v| format!(" {v}"));
                format!(
                    "{} disconnected, was {}{volume}",
                    d.path.display(),
                    d.verdict.map_or("-", Verdict::name)
                )
            }
            Change::Resized { from, device: d } => {
                format!("{} resized from {from} to {}", d.path.display(), d.size)
            }
            Change::Verdict { from, device: d } => {
                format!("{} was {}, is {}", d.path.display(), from.map_or("-", Verdict::name), is(d))
            }
            Change::LinkDead { index } => format!("/dev/nbd{index} lost a connection to its server"),
        };
        format!("{} {text}", at.strftime("%F %T"))
    }
}
