use std::cell::Cell;
use std::os::fd::AsFd;
use std::sync::Arc;

use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;

use super::Context;
use crate::error::{Doing, Result};
use crate::report::Report;
use crate::watch::{Event, Settler, Watcher};

/// Start the next keeper of each volume whose keeper died
///
/// A killed keeper leaves an NBD device waiting: the kernel holds its I/O for the --reconnect-timeout of the attach. This
/// command runs until it is told to stop, one per node; it notices the death at once and starts the next keeper, which
/// takes over log and device, and mounts never notice but a pause. It tells each event in one line, with --log-format
/// json as an object. Volumes that a command works on are left alone meanwhile.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl watch
  zerofsctl watch --log-format json
  systemctl enable --now zerofsctl-watch    (with deploy/systemd/zerofsctl-watch.service)")]
pub struct WatchArgs {}

pub fn run(_: &WatchArgs, context: &Context) -> Result<Report> {
    context.require_root()?;
    let dirs = context.dirs()?;
    // Before any thread is made, so that all of them have it.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    signals.thread_block().doing("block the signals of", "the watcher")?;
    let stop = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)
        .doing("wait for the signals of", "the watcher")?;
    let watcher = Watcher::new(&dirs.run, Arc::new(Settler::new(dirs.clone(), super::context::node_name())))?;
    let (took_over, failed) = (Cell::new(0u64), Cell::new(0u64));
    watcher.run(stop.as_fd(), &|event| {
        match event {
            Event::TookOver { .. } => took_over.set(took_over.get() + 1),
            Event::Failed { .. } => failed.set(failed.get() + 1),
            _ => {}
        }
        context.progress.event(event);
    })?;
    Ok(Report::new("watch", json!({"took_over": took_over.get(), "failed": failed.get()})).summary(format!(
        "stopped; {} taken over, {} failed",
        took_over.get(),
        failed.get()
    )))
}
