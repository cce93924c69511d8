use clap::Args;
use serde::Serialize;

use super::context::Purpose;
use super::{Context, StorageArgs};
use crate::error::{Kind, Result};
use crate::host::linux::{Dirs, LinuxHost};
use crate::host::{Observe, mounts};
use crate::journal::{self, Journal, Standing, place};
use crate::keeper::control::{State, Status};
use crate::plan::Device;
use crate::report::Report;
use crate::values::{ByteSize, FsType, VolumeId};

/// List the volumes of this node and of a store
///
/// The state is what is found, not what was written down: attached, stalled (I/O waits for ZeroFS), fenced (another
/// node took it), broken (its keeper was killed), interrupted (a command was cut short), busy (a command is at work),
/// elsewhere (another node has it), or released. For broken and interrupted run: zerofsctl recover.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl list
  zerofsctl list -o wide
  zerofsctl list --storage-url s3://bucket/prefix --config zerofs.yaml")]
pub struct ListArgs {
    #[command(flatten)]
    storage: StorageArgs,
}

/// One volume, as found.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Found {
    pub volume: VolumeId,
    pub state: String,
    pub reason: Option<String>,
    pub size: Option<ByteSize>,
    pub fs: Option<FsType>,
    pub device: Option<Device>,
    pub targets: Vec<String>,
    pub storage_url: String,
    pub epoch: Option<u64>,
    pub keeper_pid: Option<i32>,
    pub zerofs_pid: Option<i32>,
    pub restarts: Option<u64>,
}

/// Looks at one volume of this node.
pub(super) fn look(
    host: &LinuxHost,
    dirs: &Dirs,
    volume: &VolumeId,
) -> Result<(Found, Standing, Option<Status>)> {
    let runs = Journal::peek(&dirs.run, volume)?.unwrap_or_default();
    let standing = Standing::of(&runs);
    let open = runs.last().is_some_and(|r| r.end.is_none());
    let status = host.status(volume)?;
    let view = host.device(volume)?;
    let table = mounts::table("self")?;
    let targets: Vec<String> = match &view.device {
        Some(device) => {
            let linked = standing.places.iter().filter_map(|p| match p {
                crate::step::Step::Link(link) => Some(link.target.to_string()),
                _ => None,
            });
            let mounted = table.iter().filter(|m| std::path::Path::new(&m.source) == device.path);
            mounted.map(|m| m.target.display().to_string()).chain(linked).collect()
        }
        None => standing.places.iter().filter_map(place).map(|t| format!("{t} (gone)")).collect(),
    };
    let run_recover = format!("zerofsctl recover {volume}");
    let (state, reason) = match (&status, journal::holder(&dirs.run, volume)) {
        (_, Some(pid)) => ("busy".to_owned(), Some(format!("a command is at work, pid {pid}"))),
        _ if open => ("interrupted".into(), Some(format!("a command was cut short; run: {run_recover}"))),
        (Some(s), _) if s.state == State::Ready && view.device.is_some() => {
            ("attached".into(), s.reason.clone())
        }
        (Some(s), _) => (s.state.name().to_owned(), s.reason.clone()),
        (None, _) if standing.connect.is_some() => {
            ("broken".into(), Some(format!("its keeper is gone; run: {run_recover}")))
        }
        (None, _) => ("released".into(), None),
    };
    let facts = &standing.facts;
    let found = Found {
        volume: volume.clone(),
        state,
        reason,
        size: view.device.as_ref().map(|d| d.size).or(facts.capacity),
        fs: facts.fs,
        targets,
        device: view.device,
        storage_url: standing.claim.as_ref().map(|c| c.storage_url.clone()).unwrap_or_default(),
        epoch: facts.epoch,
        keeper_pid: status.as_ref().map(|s| s.keeper.pid),
        zerofs_pid: status.as_ref().and_then(|s| s.zerofs.as_ref()).map(|z| z.pid),
        restarts: status.as_ref().map(|s| s.restarts),
    };
    Ok((found, standing, status))
}

pub fn run(args: &ListArgs, context: &Context) -> Result<Report> {
    let dirs = context.dirs()?;
    let mut found = Vec::new();
    for volume in journal::volumes(&dirs.run)? {
        let host = context.host(&volume, &StorageArgs::default(), Purpose::Settle);
        match host.and_then(|host| look(&host, &dirs, &volume)) {
            Ok((f, _, _)) => found.push(f),
            // One volume in trouble must not hide the others.
            Err(e) => context.progress.warn(&e.on(&volume).to_string()),
        }
    }
    let settings = context.settings(&args.storage)?;
    let wanted = settings.storage_url.is_some();
    // A look must not make the embedded store.
    if wanted || dirs.state.join("store").exists() {
        let any: VolumeId = "any".parse()?;
        let host = context.host(&any, &args.storage, Purpose::Settle)?;
        for id in host.catalog().list() {
            let record = match id.and_then(|id| host.catalog().get(&id)) {
                Ok(record) => record,
                Err(e) if e.kind() == Kind::Unreachable => return Err(e),
                Err(e) => {
                    context.progress.warn(&e.to_string());
                    continue;
                }
            };
            let Some((record, _)) = record.filter(|(r, _)| !found.iter().any(|f| f.volume == r.id)) else {
                continue;
            };
            found.push(Found {
                volume: record.id.clone(),
                state: if record.owner.is_some() { "elsewhere" } else { "released" }.into(),
                reason: record.owner.as_ref().map(|o| format!("attached by {o}")),
                size: Some(record.capacity),
                fs: record.filesystem,
                device: None,
                targets: vec![],
                storage_url: host.catalog().url().to_string(),
                epoch: Some(record.epoch),
                keeper_pid: None,
                zerofs_pid: None,
                restarts: None,
            });
        }
    }
    found.sort_by(|a, b| a.volume.cmp(&b.volume));
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
                text(f.epoch.map(|n| n.to_string())),
                text(f.keeper_pid.map(|n| n.to_string())),
                text(f.zerofs_pid.map(|n| n.to_string())),
                text(f.restarts.map(|n| n.to_string())),
                text(f.reason.clone()),
            ]
        })
        .collect();
    let columns = [
        "VOLUME", "STATE", "SIZE", "FS", "DEVICE", "TARGETS", "STORE", "EPOCH", "KEEPER", "ZEROFS",
        "RESTARTS", "REASON",
    ];
    // What is wrong must not need a wide terminal.
    let reasons = found.iter().filter(|f| f.state != "attached" && f.state != "elsewhere");
    let notes = reasons.filter_map(|f| Some(format!("{} is {}: {}", f.volume, f.state, f.reason.as_ref()?)));
    let mut report =
        Report::new("list", &found).names(found.iter().map(|f| f.volume.to_string())).notes(notes);
    report = if found.is_empty() {
        report.summary("no volumes")
    } else {
        report.table(&columns, rows).wide_from(6)
    };
    Ok(report)
}
