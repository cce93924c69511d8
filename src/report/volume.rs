//! The forms of a volume that was looked at: a line of `list`, and all of `show`.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use super::Report;
use crate::catalog::VolumeRecord;
use crate::host::{Device, IoPath, Transport};
use crate::journal::{Outcome, Run, TaskState};
use crate::keeper::control::Status;
use crate::values::{ByteSize, FsType, VolumeId};

/// One volume, as found.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// The volume.
    pub volume: VolumeId,
    /// One word: attached, stalled, broken, …
    pub state: String,
    /// Why, when not plainly well.
    pub reason: Option<String>,
    /// Of the device, or as recorded.
    pub size: Option<ByteSize>,
    /// The filesystem.
    pub fs: Option<FsType>,
    /// The block device, while there is one.
    pub device: Option<Device>,
    /// How that was made.
    pub transport: Option<Transport>,
    /// The path of an NBD device.
    pub path: Option<IoPath>,
    /// How often an NBD device got new connections, because a keeper or, on the direct path, ZeroFS was restarted.
    pub reconnects: Option<u64>,
    /// Where it is mounted or linked.
    pub targets: Vec<String>,
    /// The store.
    pub storage_url: String,
    /// The attach epoch.
    pub epoch: Option<u64>,
    /// The keeper.
    pub keeper_pid: Option<i32>,
    /// Its ZeroFS.
    pub zerofs_pid: Option<i32>,
    /// How often the keeper started ZeroFS again.
    pub restarts: Option<u64>,
}

/// The answer of `list`.
pub fn list(found: &[Found]) -> Report {
    let text = |o: Option<String>| o.unwrap_or_else(|| "-".into());
    let rows = found
        .iter()
        .map(|f| {
            vec![
                f.volume.to_string(),
                f.state.clone(),
                text(f.size.map(|s| s.to_string())),
                text(f.fs.map(|s| s.to_string())),
                text(f.device.as_ref().map(|d| d.path.display().to_string())),
                if f.targets.is_empty() { "-".into() } else { f.targets.join(", ") },
                f.storage_url.clone(),
                text(f.transport.map(|t| made(t, f.path))),
                text(f.reconnects.map(|n| n.to_string())),
                text(f.epoch.map(|n| n.to_string())),
                text(f.keeper_pid.map(|n| n.to_string())),
                text(f.zerofs_pid.map(|n| n.to_string())),
                text(f.restarts.map(|n| n.to_string())),
                text(f.reason.clone()),
            ]
        })
        .collect();
    let columns = [
        "VOLUME",
        "STATE",
        "SIZE",
        "FS",
        "DEVICE",
        "TARGETS",
        "STORE",
        "TRANSPORT",
        "RECONNECTS",
        "EPOCH",
        "KEEPER",
        "ZEROFS",
        "RESTARTS",
        "REASON",
    ];
    // What is wrong must not need a wide terminal.
    let reasons = found.iter().filter(|f| f.state != "attached" && f.state != "elsewhere");
    let notes = reasons.filter_map(|f| Some(format!("{} is {}: {}", f.volume, f.state, f.reason.as_ref()?)));
    let mut report =
        Report::new("list", found).names(found.iter().map(|f| f.volume.to_string())).notes(notes);
    report = if found.is_empty() {
        report.summary("no volumes")
    } else {
        report.table(&columns, rows).wide_from(6)
    };
    report
}

/// `fuse`, `nbd`, `nbd direct`.
fn made(transport: Transport, path: Option<IoPath>) -> String {
    match path {
        Some(IoPath::Direct) => format!("{transport} direct"),
        _ => transport.to_string(),
    }
}

/// Everything that `show` found out.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Where its data is.
    pub store: String,
    /// As `list` has it.
    pub found: Found,
    /// The catalog's record.
    pub record: Option<VolumeRecord>,
    /// What its keeper says.
    pub status: Option<Status>,
    /// The journal.
    pub runs: Vec<Run>,
    /// Where its sockets are.
    pub run_folder: PathBuf,
    /// Where its logs are.
    pub logs: PathBuf,
}

/// The answer of `show`.
pub fn show(seen: &Seen) -> Report {
    let Seen { store, found, record, status, runs, run_folder, logs } = seen;
    let volume = &found.volume;
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |what: &str, value: String| rows.push(vec![what.to_owned(), value]);
    row("volume", volume.to_string());
    row(
        "state",
        found.reason.as_ref().map_or_else(|| found.state.clone(), |r| format!("{} ({r})", found.state)),
    );
    row("store", store.clone());
    if let Some(r) = record {
        row(
            "catalog",
            format!(
                "{}, {}, content {}, epoch {}, written by ZeroFS {}",
                r.capacity,
                r.filesystem.map_or("no filesystem", |fs| fs.name()),
                format!("{:?}", r.content).to_lowercase(),
                r.epoch,
                r.zerofs_version.as_deref().unwrap_or("unknown")
            ),
        );
        row("owner", r.owner.as_ref().map_or_else(|| "nobody".into(), ToString::to_string));
    }
    if let Some(d) = &found.device {
        row(
            "device",
            format!("{}, {}{}", d.path.display(), d.size, if d.read_only { ", read-only" } else { "" }),
        );
    }
    if let Some(transport) = found.transport {
        row("transport", made(transport, found.path));
    }
    if let Some(n) = status.as_ref().and_then(|s| s.nbd.as_ref()) {
        row(
            "nbd",
            format!(
                "{} connections, {} lost, {} reconnects, I/O is held for {} s",
                n.connections,
                n.dead_connections,
                n.reconnects,
                n.reconnect_timeout_ms / 1000
            ),
        );
    }
    for target in &found.targets {
        row("target", target.clone());
    }
    if let Some(s) = status {
        row("keeper", format!("pid {}", s.keeper.pid));
        row(
            "zerofs",
            format!(
                "{}, version {}, {} restarts",
                s.zerofs.as_ref().map_or_else(|| "no process".into(), |z| format!("pid {}", z.pid)),
                s.zerofs_version,
                s.restarts
            ),
        );
        for socket in ["keeper.sock", "9p.sock", "nbd.sock", "rpc.sock"] {
            row("socket", run_folder.join(socket).display().to_string());
        }
        row(
            "I/O",
            format!("{} reads, {} writes, {} flushes", s.stats.reads, s.stats.writes, s.stats.flushes),
        );
        for warning in &s.warnings {
            row("warning", warning.clone());
        }
    }
    row("logs", logs.display().to_string());
    for r in runs {
        let end = r.end.map_or_else(|| "open".to_owned(), |e| format!("{e:?}").to_lowercase());
        let steps: Vec<String> = r
            .plan
            .tasks
            .iter()
            .zip(&r.states)
            .map(|(t, s)| {
                let mark = match s {
                    TaskState::Pending => ".",
                    TaskState::Started => "?",
                    TaskState::Settled(Outcome::Done) => "",
                    TaskState::Settled(Outcome::Already) => "=",
                    TaskState::Undone => "-",
                };
                format!("{mark}{}", t.name())
            })
            .collect();
        row(
            "journal",
            format!("{} {}: {end} [{}]", r.at.strftime("%F %T"), r.plan.operation.name(), steps.join(" ")),
        );
        if let Some(error) = &r.error {
            row("failed", error.clone());
        }
    }
    Report::new("show", json!({"found": found, "record": record.as_ref().map(|r| json!({
            "capacity": r.capacity, "filesystem": r.filesystem, "content": r.content, "adopted": r.adopted, "epoch": r.epoch,
            "zerofs_version": r.zerofs_version, "owner": r.owner, "state": r.state, "created": r.created})),
            "status": status, "journal": runs}))
        .table(&["WHAT", "VALUE"], rows)
        .names([volume.to_string()])
}
