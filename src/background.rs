//! A thread that is told to stop, and waited for, when its handle is dropped.

use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Doing, Error, Result};

/// The handle.
#[derive(Debug)]
pub struct Background {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts `work`, which is given a descriptor that becomes readable when it has to end.
    pub fn start(name: &str, work: impl FnOnce(&EventFd) + Send + 'static) -> Result<Background> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .doing("make", "an event descriptor")?;
        let stop = Arc::new(stop);
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || work(&told))
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        Ok(Background { stop, thread: Some(thread) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
