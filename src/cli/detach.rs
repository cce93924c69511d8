use std::path::Path;

use clap::Args;
use serde_json::json;

use super::context::Purpose;
use super::{Context, StorageArgs, attach};
use crate::error::{Error, Kind, Result};
use crate::host::linux::Dirs;
use crate::host::{Observe, StopOptions, loopdev};
use crate::journal::{self, Journal, Standing, place};
use crate::ops::{self, Scope};
use crate::report::Report;
use crate::run::Engine;
use crate::values::{TargetPath, VolumeId};

/// Unmount a volume, take its device away, stop its ZeroFS cleanly
///
/// A target path takes away only that mount, and everything when it is the last one. A device or volume name takes
/// away everything. What is in use is never touched: the command fails and says who uses it.
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
    /// How long ZeroFS may take to flush and stop
    #[arg(long, value_name = "TIME", default_value = "120s")]
    stop_timeout: String,
    /// Kill ZeroFS when that time is over; what it had not flushed stays in the replay log of this node
    #[arg(long)]
    force: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: &DetachArgs, context: &Context) -> Result<Report> {
    let stop =
        StopOptions { timeout: attach::time("--stop-timeout", &args.stop_timeout)?, force: args.force };
    let dirs = context.dirs()?;
    let Some(what) = &args.what else {
        context.require_root()?;
        return all(args, context, &dirs, stop);
    };
    let (volume, scope) = resolve(what, context, &dirs)?;
    context.require_root()?;
    let (report, _) = one(args, context, &dirs, &volume, &scope, stop)?;
    Ok(report)
}

/// Finds the volume that a name, a path or a device means.
pub(super) fn resolve(what: &str, context: &Context, dirs: &Dirs) -> Result<(VolumeId, Scope)> {
    if !what.contains('/') {
        return Ok((what.parse()?, Scope::Volume));
    }
    let target = TargetPath::new(Path::new(what), &context.cwd)?;
    for volume in journal::volumes(&dirs.run)? {
        let standing = Standing::of(&Journal::peek(&dirs.run, &volume)?.unwrap_or_default());
        if standing.places.iter().any(|p| place(p) == Some(&target)) {
            return Ok((volume, Scope::Target(target)));
        }
        let (_, file) = dirs.fuse(&volume);
        if loopdev::find(&file)?.is_some_and(|d| d.path == target.as_path()) {
            return Ok((volume, Scope::Volume));
        }
    }
    Err(Error::new(Kind::NotFound, format!("nothing of ours is at {target}"))
        .hint("see what is attached: zerofsctl list"))
}

fn one(
    args: &DetachArgs,
    context: &Context,
    dirs: &Dirs,
    volume: &VolumeId,
    scope: &Scope,
    stop: StopOptions,
) -> Result<(Report, bool)> {
    let known = dirs.volume_run(volume).exists();
    let host = context.host(volume, &StorageArgs::default(), Purpose::Settle).map_err(|e| e.on(volume))?;
    if args.dry_run {
        return match ops::detach::preview(&host, &dirs.run, volume, scope, stop)? {
            Some(lines) => Ok((Report::of_preview("detach", volume, &lines), true)),
            None => nothing(volume, &host, known).map(|r| (r, false)),
        };
    }
    if !known {
        return nothing(volume, &host, known).map(|r| (r, false));
    }
    let engine = Engine { host: &host, observer: &context.progress };
    match ops::detach::detach(&engine, &dirs.run, volume, scope, stop)? {
        Some(run) => {
            let what = match scope {
                Scope::Target(t) if run.tasks.len() == 1 => format!("{volume} is no longer at {t}"),
                _ => format!("{volume} is detached"),
            };
            Ok((Report::of_run("detach", volume, &run).summary(what), true))
        }
        None => nothing(volume, &host, known).map(|r| (r, false)),
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
    for volume in journal::volumes(&dirs.run)? {
        match one(args, context, dirs, &volume, &Scope::Volume, stop) {
            Ok((report, _)) => {
                let word = if args.dry_run { "would detach" } else { "detached" };
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
        (n, 0) => format!("{n} volumes"),
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
