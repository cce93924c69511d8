use clap::Args;

use super::context::Purpose;
use super::{Context, StorageArgs};
use crate::error::{Kind, Result};
use crate::host::linux::{Dirs, LinuxHost};
use crate::host::{Life, Observe, mounts};
use crate::journal::{self, Journal, Standing, place};
use crate::keeper::control::{State, Status};
use crate::report::Report;
use crate::report::volume::{Found, list};
use crate::values::VolumeId;

/// List the volumes of this node and of a store
///
/// The state is what is found, not what was written down: attached, stalled (I/O waits for ZeroFS), waiting (I/O waits
/// for the next keeper), fenced (another node took it), broken (its device gives errors), interrupted (a command was cut short), busy (a command is at work),
/// elsewhere (another node has it), or released. For waiting, broken and interrupted run: zerofsctl recover.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl list
  zerofsctl list -o wide
  zerofsctl list --storage-url s3://bucket/prefix --config zerofs.yaml")]
pub struct ListArgs {
    #[command(flatten)]
    storage: StorageArgs,
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
    let nbd = status.as_ref().and_then(|s| s.nbd.as_ref());
    let run_recover = format!("zerofsctl recover {volume}");
    // Between two steps of a command, what is found is no state to act on.
    let holder = journal::holder(&dirs.run, volume);
    let (state, reason) = match (&status, holder) {
        (_, Some(pid)) if open => ("busy".to_owned(), Some(format!("a command is at work, pid {pid}"))),
        _ if open => ("interrupted".into(), Some(format!("a command was cut short; run: {run_recover}"))),
        (Some(_), _) if view.life == Life::Dead => {
            let why = nbd.and_then(|n| n.failed.clone()).unwrap_or_else(|| "it gives errors only".into());
            ("broken".into(), Some(format!("its device has failed: {why}; run: {run_recover}")))
        }
        (Some(_), _) if view.life == Life::Waiting => {
            ("stalled".into(), Some("the next keeper has not taken over the device yet".into()))
        }
        (Some(s), _) if s.state == State::Ready && view.device.is_some() => {
            let at_work = holder.map(|pid| format!("a command is at work, pid {pid}"));
            ("attached".into(), s.reason.clone().or(at_work))
        }
        (Some(s), _) => (s.state.name().to_owned(), s.reason.clone()),
        (None, _) if view.life == Life::Waiting => (
            "waiting".into(),
            Some(format!("its keeper is gone, and I/O waits for the next one; run: {run_recover}")),
        ),
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
        transport: view.transport.or(facts.transport),
        path: view.path.or(facts.path),
        reconnects: nbd.map(|n| n.reconnects),
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
                transport: None,
                path: None,
                reconnects: None,
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
    Ok(list(&found))
}
