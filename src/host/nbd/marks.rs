//! Since when leaks are leaks: the kernel does not know, so the first look that finds one writes it down, in
//! `nbd-leaks.json` below the run root, and a look that finds it otherwise forgets it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::survey::{Device, Survey};
use super::verdict::Verdict;
use crate::error::{Doing, Error, Result};
use crate::journal::private_folder;
use crate::keeper::process::write_json;

/// One connection that was found to be a leak.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    index: u32,
    /// The connection's number and process, and its identifier: a later connection of the same index is another.
    id: u64,
    pid: Option<u32>,
    backend: Option<String>,
    since: jiff::Timestamp,
}

impl Mark {
    fn of(device: &Device, since: jiff::Timestamp) -> Option<Mark> {
        let connection = device.connection.as_ref()?;
        let (id, pid, backend) = (connection.id, connection.pid, device.backend.clone());
        Some(Mark { index: device.index, id, pid, backend, since })
    }

    fn is_of(&self, device: &Device) -> bool {
        Mark::of(device, self.since).as_ref() == Some(self)
    }
}

fn path(run: &Path) -> PathBuf {
    run.join("nbd-leaks.json")
}

/// A file that makes no sense counts as none: leaks are only younger then, and are kept for longer.
fn read(run: &Path) -> Vec<Mark> {
    let bytes = std::fs::read(path(run)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Tells each leak since when it is known.
pub fn fill(run: &Path, survey: &mut Survey) {
    let marks = read(run);
    for device in survey.devices.iter_mut().filter(|d| d.verdict == Some(Verdict::OursLeaked)) {
        device.leaked_since = marks.iter().find(|m| m.is_of(device)).map(|m| m.since);
    }
}

/// The same, and writes down the leaks that are new, at `now`, and forgets those that are none any more.
///
/// # Errors
/// When the run root cannot be written.
pub fn update(run: &Path, survey: &mut Survey, now: jiff::Timestamp) -> Result<()> {
    let before = read(run);
    fill(run, survey);
    let leaks = survey.devices.iter_mut().filter(|d| d.verdict == Some(Verdict::OursLeaked));
    let marks: Vec<Mark> = leaks
        .filter_map(|device| {
            // A clock that was set back must not make a leak older than it is.
            let since = device.leaked_since.filter(|since| *since <= now).unwrap_or(now);
            device.leaked_since = Some(since);
            Mark::of(device, since)
        })
        .collect();
    if marks == before {
        return Ok(());
    }
    let file = path(run);
    if marks.is_empty() {
        return match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).doing("remove", &file),
            _ => Ok(()),
        };
    }
    private_folder(run)?;
    write_json(&file, &marks).map_err(|e: Error| e.context("cannot note since when leaks are leaks"))
}
