//! The first words on an operation that ran: what it came to, above the table of its steps.

use super::Report;
use crate::ops::AttachSpec;
use crate::run::RunReport;
use crate::values::{ByteSize, VolumeId};

/// The answer of `attach`.
pub fn attach(spec: &AttachSpec, run: &RunReport) -> Report {
    let device =
        run.facts.device.as_ref().map_or_else(String::new, |d| format!("{}, {}", d.path.display(), d.size));
    let fs = run.facts.fs.filter(|_| !spec.block).map_or_else(|| "raw".to_owned(), |fs| fs.to_string());
    let mode = if spec.read_only { ", read-only" } else { "" };
    let already = if run.already() { "already " } else { "" };
    Report::of_run("attach", &spec.volume, run)
        .summary(format!("{} is {already}attached at {} ({device}, {fs}{mode})", spec.volume, spec.target))
}

/// The answer of `fsck`. `repair` tells whether it was asked to repair, `hides_damage` whether data was read through
/// a ZeroFS that cannot tell damage.
pub fn fsck(volume: &VolumeId, run: &RunReport, repair: bool, hides_damage: bool) -> Report {
    let check = run.facts.check.clone();
    let clean = check.as_ref().is_none_or(|c| c.clean);
    let unreadable = run.facts.unreadable.clone().unwrap_or_default();
    let fs = run.facts.fs.map_or("filesystem", |fs| fs.name());
    let summary = match (clean, unreadable.is_empty(), check.as_ref().is_some_and(|c| c.repaired)) {
        (true, true, false) => format!("{volume}: the {fs} is clean"),
        (true, true, true) => format!("{volume}: the {fs} was repaired and is clean now"),
        (true, false, _) => format!("{volume}: the {fs} is clean, but some of the data cannot be read"),
        (false, ..) => format!("{volume}: the {fs} has faults"),
    };
    let mut notes: Vec<String> = Vec::new();
    if let Some(check) = check.filter(|c| !c.clean || c.repaired) {
        notes.extend(check.output.lines().map(|l| format!("  {l}")));
    }
    if !clean && !repair {
        notes.push(format!("hint: repair it: zerofsctl fsck {volume} --repair"));
    }
    for (start, length) in &unreadable {
        notes.push(format!("unreadable: {} at byte {start}", ByteSize(*length)));
    }
    if hides_damage {
        notes.push("note: this version of ZeroFS reads damaged objects as zeros, which this check cannot tell from data".into());
    }
    let exit = if clean && unreadable.is_empty() { 0 } else { 3 };
    Report::of_run("fsck", volume, run).summary(summary).notes(notes).exit(exit)
}
