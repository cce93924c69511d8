use std::path::Path;

use clap::Args;
use serde_json::json;

use super::context::Purpose;
use super::{Context, StorageArgs, attach, context};
use crate::error::{Error, Kind, Result};
use crate::host::linux::Dirs;
use crate::host::{Observe, StopOptions, device, loopdev};
use crate::journal::{self, Journal, Standing, place};
use crate::ops::{self, Scope};
use crate::plan::Operation;
use crate::report::{Report, counted};
use crate::step::Step;
use crate::values::{TargetPath, VolumeId};

/// Unmount a volume, take its device away, and stop its ZeroFS
///
/// A path takes away that mount only, and everything if it is the last one. A volume or device takes away
/// everything. What is in use is not touched: the command fails and says who uses it. With --all, exit code 5 says
/// that some volumes failed.
///
/// Without a server that takes data (S3 is away, or ZeroFS is gone for good) it fails after --stop-timeout, and nothing
/// is lost. With --force it then fails the device: what was only cached, and never acknowledged, is lost, as in a
/// power cut. What was acknowledged stays in this node's replay log; an attach here brings it back, and an attach on
/// another node, or a reboot, loses it.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl detach vol1
  zerofsctl detach /mnt/vol1
  zerofsctl detach /dev/loop0
  zerofsctl detach --all")]
pub struct DetachArgs {
    /// A volume's name, one of its targets, or its device
    #[arg(value_name = "VOLUME|PATH|DEVICE", required_unless_present = "all", conflicts_with = "all")]
    what: Option<String>,
    /// Every volume of this node
    #[arg(long)]
    all: bool,
    /// How long ZeroFS may take to flush and stop, such as 90s or 10m
    #[arg(long, value_name = "TIME", default_value = "120s")]
    stop_timeout: String,
    /// After that time fail the device, and kill ZeroFS
    #[arg(long)]
    force: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &DetachArgs, context: &Context) -> Result<Report> {
    let stop = StopOptions {
        timeout: attach::time("--stop-timeout", &args.stop_timeout)?,
        force: args.force,
        ..StopOptions::default()
    };
    let dirs = context.dirs()?;
    let Some(what) = &args.what else {
        context.require_root()?;
        return all(args, context, &dirs, stop);
    };
    let (volume, scope) = resolve(what, context, &dirs)?;
    context.require_root()?;
    one(args, context, &dirs, &volume, &scope, stop)
}

/// Finds the volume that a name, a path or a device means.
pub(super) fn resolve(what: &str, context: &Context, dirs: &Dirs) -> Result<(VolumeId, Scope)> {
    if !what.contains('/') {
        return Ok((what.parse()?, Scope::Volume));
    }
    let target = TargetPath::new(Path::new(what), &context.cwd)?;
    let mut given_up = None;
    for volume in journal::volumes(&dirs.run)? {
        let runs = Journal::peek(&dirs.run, &volume)?.unwrap_or_default();
        // A detach that was given up may have taken the place away already: it is still the volume that is meant, unless
        // another one is there by now.
        let is_given_up = |run: &journal::Run| {
            run.end.is_none()
                && run.plan.operation == Operation::Detach
                && run.plan.tasks.iter().any(|t| place(&t.step) == Some(&target))
                && run.plan.tasks.iter().any(|t| matches!(t.step, Step::Connect(_)))
        };
        if runs.last().is_some_and(is_given_up) {
            given_up.get_or_insert((volume, Scope::Volume));
            continue;
        }
        let standing = Standing::of(&runs);
        if standing.all_places().any(|p| place(p) == Some(&target)) {
            return Ok((volume, Scope::Target(target)));
        }
        let (_, file) = dirs.fuse(&volume);
        let device = match device::nbd_device(&dirs.volume_run(&volume), &volume)? {
            Some(device) => Some(device),
            None => loopdev::find(&file)?,
        };
        if device.is_some_and(|d| d.path == target.as_path()) {
            return Ok((volume, Scope::Volume));
        }
    }
    given_up.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("nothing of ours is at {target}"))
            .hint("see what is attached: zerofsctl list")
    })
}

fn one(
    args: &DetachArgs,
    context: &Context,
    dirs: &Dirs,
    volume: &VolumeId,
    scope: &Scope,
    stop: StopOptions,
) -> Result<Report> {
    let known = dirs.volume_run(volume).exists();
    let host = context.host(volume, &StorageArgs::default(), Purpose::Settle).map_err(|e| e.on(volume))?;
    let host = host.stopping(stop);
    if args.dry_run {
        return match ops::detach::preview(&host, &dirs.run, volume, scope, stop)? {
            Some(lines) => Ok(Report::of_preview("detach", volume, &lines)),
            None => nothing(volume, &host, known),
        };
    }
    if !known {
        return nothing(volume, &host, known);
    }
    let engine = context.engine(&host);
    match ops::detach::detach(&engine, &dirs.run, volume, scope, stop)? {
        Some(run) => {
            let what = match scope {
                Scope::Target(t) if run.tasks.len() == 1 => format!("{volume} is no longer at {t}"),
                _ => format!("{volume} is detached"),
            };
            Ok(Report::of_run("detach", volume, &run).summary(what))
        }
        None => nothing(volume, &host, known),
    }
}

/// There was nothing to detach: fine if there is such a volume, a typing error if not.
fn nothing(volume: &VolumeId, host: &crate::host::linux::LinuxHost, known: bool) -> Result<Report> {
    let exists = known || host.claim(volume)?.is_some() || host.catalog().get(volume)?.is_some();
    if !exists {
        return Err(Error::new(Kind::NotFound, "no such volume is attached on this node")
            .on(volume)
            .hint("see what is attached: zerofsctl list"));
    }
    Ok(Report::new("detach", json!({"volume": volume, "already": true, "steps": []}))
        .summary(format!("{volume} is already detached"))
        .names([volume.to_string()]))
}

fn all(args: &DetachArgs, context: &Context, dirs: &Dirs, stop: StopOptions) -> Result<Report> {
    let mut rows = Vec::new();
    let mut data = Vec::new();
    let (mut done, mut failed) = (Vec::new(), 0u32);
    let word = if args.dry_run { "would be detached" } else { "detached" };
    for volume in journal::volumes(&dirs.run)? {
        if context::interrupted() {
            return Err(
                Error::new(Kind::Interrupted, "interrupted").hint("run the same command again to go on")
            );
        }
        match one(args, context, dirs, &volume, &Scope::Volume, stop) {
            Ok(report) => {
                rows.push(vec![volume.to_string(), word.into(), String::new()]);
                data.push(report.data);
                done.push(volume.to_string());
            }
            Err(e) => {
                context.print_error(&e);
                rows.push(vec![volume.to_string(), "failed".into(), e.message().to_owned()]);
                data.push(json!({"volume": volume, "error": e.message(), "hint": e.hint_text()}));
                failed += 1;
            }
        }
    }
    let summary = match (rows.len(), failed) {
        (0, _) => "nothing is attached on this node".to_owned(),
        (n, 0) => format!("{} {word}", counted(n, "volume")),
        (n, f) => format!("{f} of {n} volumes failed"),
    };
    let exit = match (failed, done.len()) {
        (0, _) => 0,
        (_, 0) => 1,
        _ => 5,
    };
    Ok(Report::new("detach", json!({"volumes": data}))
        .summary(summary)
        .table(if rows.is_empty() { &[] } else { &["VOLUME", "RESULT", "WHY"] }, rows)
        .names(done)
        .exit(exit))
}
