use clap::Args;
use serde_json::json;

use super::context::Purpose;
use super::list::look;
use super::{Context, StorageArgs, detach};
use crate::error::{Error, Kind, Result};
use crate::journal::{Journal, Outcome, TaskState};
use crate::report::Report;

/// Show all of one volume: processes, sockets, device, mounts, journal
///
/// In the journal, a step stands bare when it was done, with = when it was so already, ? when it was begun, - when it
/// was undone, and … when it is still to come.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl show vol1
  zerofsctl show /mnt/vol1
  zerofsctl show vol1 -o json")]
pub struct ShowArgs {
    /// A volume's name, one of its targets, or its device
    volume: String,
    #[command(flatten)]
    storage: StorageArgs,
}

pub fn run(args: &ShowArgs, context: &Context) -> Result<Report> {
    let dirs = context.dirs()?;
    let (volume, _) = detach::resolve(&args.volume, context, &dirs)?;
    let host = context.host(&volume, &args.storage, Purpose::Settle)?;
    let runs = Journal::peek(&dirs.run, &volume)?;
    let record = host.catalog().get(&volume).map_err(|e| e.on(&volume))?.map(|(r, _)| r);
    if runs.is_none() && record.is_none() {
        return Err(Error::new(
            Kind::NotFound,
            format!("there is no such volume, neither here nor in {}", host.catalog().url()),
        )
        .on(&volume)
        .hint("see what there is: zerofsctl list"));
    }
    let (found, _, status) = look(&host, &dirs, &volume)?;
    let run = dirs.volume_run(&volume);
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |what: &str, value: String| rows.push(vec![what.to_owned(), value]);
    row("volume", volume.to_string());
    row(
        "state",
        found.reason.as_ref().map_or_else(|| found.state.clone(), |r| format!("{} ({r})", found.state)),
    );
    row("store", host.catalog().url().volume_url(&volume));
    if let Some(r) = &record {
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
    for target in &found.targets {
        row("target", target.clone());
    }
    if let Some(s) = &status {
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
            row("socket", run.join(socket).display().to_string());
        }
        row(
            "I/O",
            format!("{} reads, {} writes, {} flushes", s.stats.reads, s.stats.writes, s.stats.flushes),
        );
        for warning in &s.warnings {
            row("warning", warning.clone());
        }
    }
    row("logs", dirs.volume_logs(&volume).display().to_string());
    for r in runs.iter().flatten() {
        let end = r.end.map_or_else(|| "open".to_owned(), |e| format!("{e:?}").to_lowercase());
        let steps: Vec<String> = r
            .plan
            .tasks
            .iter()
            .zip(&r.states)
            .map(|(t, s)| {
                let mark = match s {
                    TaskState::Pending => "…",
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
    Ok(Report::new("show", json!({"found": found, "record": record.map(|r| json!({
            "capacity": r.capacity, "filesystem": r.filesystem, "content": r.content, "adopted": r.adopted, "epoch": r.epoch,
            "zerofs_version": r.zerofs_version, "owner": r.owner, "state": r.state, "created": r.created})),
            "status": status, "journal": runs}))
        .table(&["WHAT", "VALUE"], rows)
        .names([volume.to_string()]))
}
