//! How far a scan or a deletion is: a bar on a terminal, a line in ten seconds elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use crate::gc::Watch;
use crate::values::{ByteSize, VolumeId};

/// See the module.
pub struct Bar {
    bar: Option<ProgressBar>,
    begun: Instant,
    told: Mutex<Instant>,
    stage: Mutex<String>,
    objects: AtomicU64,
    bytes: AtomicU64,
    volumes: AtomicU64,
}

const PAUSE: Duration = Duration::from_secs(10);

impl Bar {
    /// For a run of which `total` objects are to be expected; none when nobody knows.
    pub fn new(total: Option<u64>, json: bool) -> Bar {
        let bar = (std::io::stderr().is_terminal() && !json).then(|| {
            let (bar, template) = match total {
                Some(total) => (
                    ProgressBar::new(total),
                    "{spinner} {msg} [{bar:30}] {human_pos} of {human_len} objects, {per_sec}, {eta} left",
                ),
                None => (
                    ProgressBar::new_spinner(),
                    "{spinner} {msg}: {human_pos} objects, {per_sec} ({elapsed})",
                ),
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Bar {
            bar,
            begun: Instant::now(),
            told: Mutex::new(Instant::now()),
            stage: Mutex::new(String::new()),
            objects: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            volumes: AtomicU64::new(0),
        }
    }

    fn line(&self, text: &str) {
        let print = || {
            let _ = writeln!(std::io::stderr().lock(), "{text}");
        };
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

impl Watch for Bar {
    fn stage(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
        what.clone_into(&mut self.stage.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    fn objects(&self, count: u64, bytes: u64) {
        let objects = self.objects.fetch_add(count, Ordering::Relaxed) + count;
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(bar) = &self.bar {
            bar.set_position(objects);
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if told.elapsed() >= PAUSE {
            *told = Instant::now();
            let rate = objects as f64 / self.begun.elapsed().as_secs_f64();
            let stage = self.stage.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
            let volumes = self.volumes.load(Ordering::Relaxed);
            self.line(&format!(
                "progress: {stage}: {} objects ({}) of {volumes} volumes so far, {rate:.0} a second",
                HumanCount(objects),
                ByteSize(bytes)
            ));
        }
    }

    fn volume(&self, _: &VolumeId) {
        self.volumes.fetch_add(1, Ordering::Relaxed);
    }

    fn note(&self, text: &str) {
        self.line(&format!("warning: {text}"));
    }

    fn interrupted(&self) -> bool {
        crate::cli::context::interrupted()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
