//! The watcher of the node ([`crate::watch`]) on a thread of the driver: a killed keeper of an NBD device is a pause.
//!
//! There is one watcher per run folder. Where `zerofsctl watch` is at work already, that is enough: the driver leaves the
//! devices to it, and takes its place when it ends.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Driver;
use crate::error::{Doing, Error, Kind, Result};
use crate::watch::{Event, Volumes, Watcher};

/// How often the place of another watcher is asked for.
const AGAIN: Duration = Duration::from_secs(2);

/// The watcher, until it is dropped. Keepers that it started stay.
#[derive(Debug)]
pub struct Keepers {
    stop: Arc<EventFd>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Keepers {
    /// Watches the keepers of the driver's run folder.
    pub fn watch(driver: Arc<Driver>, volumes: Arc<dyn Volumes>) -> Result<Keepers> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .doing("make", "an event descriptor")?;
        let stop = Arc::new(stop);
        let asked = stop.clone();
        let thread = std::thread::Builder::new()
            .name("keepers".into())
            .spawn(move || watch(&driver, &volumes, &asked))
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        Ok(Keepers { stop, thread: Some(thread) })
    }
}

impl Drop for Keepers {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
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
