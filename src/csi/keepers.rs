//! The watcher of the node ([`crate::watch`]) on a thread of the driver: a killed keeper of an NBD device is a pause.
//!
//! There is one watcher per run folder. Where `zerofsctl watch` is at work already, that is enough: the driver leaves the
//! devices to it, and takes its place when it ends.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::Driver;
use crate::background::Background;
use crate::error::{Kind, Result};
use crate::watch::{Event, Volumes, Watcher};

/// How often the place of another watcher is asked for.
const AGAIN: Duration = Duration::from_secs(2);

/// Watches the keepers of the driver's run folder until that is dropped. Keepers that it started stay.
pub fn start(driver: Arc<Driver>, volumes: Arc<dyn Volumes>) -> Result<Background> {
    Background::start("keepers", move |stop| watch(&driver, &volumes, stop))
}

fn watch(driver: &Driver, volumes: &Arc<dyn Volumes>, stop: &EventFd) {
    let mut told = false;
    loop {
        match Watcher::new(&driver.config.run_dir, volumes.clone()) {
            Ok(watcher) => {
                told = false;
                match watcher.run(stop.as_fd(), &|event| tell(driver, event)) {
                    Ok(()) => return,
                    Err(e) => tracing::error!("cannot watch the keepers: {e}"),
                }
            }
            Err(e) if e.kind() == Kind::Busy => {
                if !told {
                    tracing::info!(
                        "{}: it starts keepers again, and this driver once it has ended",
                        e.message()
                    );
                }
                told = true;
            }
            Err(e) => tracing::error!("cannot watch the keepers: {e}"),
        }
        let timeout = PollTimeout::try_from(AGAIN).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(stop.as_fd(), PollFlags::POLLIN)], timeout).is_ok_and(|n| n > 0) {
            return;
        }
    }
}

fn tell(driver: &Driver, event: &Event) {
    if let Event::TookOver { elapsed, .. } = event {
        driver.metrics.took_over(*elapsed);
    }
    let (name, volume) = (event.name(), event.volume().map(tracing::field::display));
    if event.is_bad() {
        tracing::warn!(volume, event = name, "{}", event.message());
    } else {
        tracing::info!(volume, event = name, "{}", event.message());
    }
}
