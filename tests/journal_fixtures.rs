//! Journals of format 1, as its first version wrote them. They must parse, and mean the same, for ever: a node may be
//! upgraded between a kill and the next command. Never change a fixture; a new format gets a folder of its own.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use zerofsctl::error::Kind;
use zerofsctl::journal::{Journal, Run, Standing, place};
use zerofsctl::values::VolumeId;

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/journal-v1");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 6, "fixtures are missing");
    files
}

fn volume() -> VolumeId {
    "vol1".parse().unwrap()
}

/// Puts the bytes where a volume's journal is.
fn planted(bytes: &[u8]) -> tempfile::TempDir {
    let run = tempfile::tempdir().unwrap();
    let folder = run.path().join("volumes/vol1");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("journal"), bytes).unwrap();
    run
}

fn read(file: &Path) -> Vec<Run> {
    let run = planted(&std::fs::read(file).unwrap());
    Journal::peek(run.path(), &volume()).unwrap().unwrap()
}

fn summary(runs: &[Run]) -> String {
    let mut text = String::new();
    for run in runs {
        text += &format!("{}: {:?}", run.plan.operation.name(), run.end);
        text += if run.unwinding { ", unwinding\n" } else { "\n" };
        for (task, state) in run.plan.tasks.iter().zip(&run.states) {
            text += &format!("  {}: {state:?}\n", task.name());
        }
        text.extend(run.error.iter().map(|e| format!("  error: {e}\n")));
    }
    let standing = Standing::of(runs);
    let places: Vec<String> =
        standing.places.iter().map(|p| place(p).map(ToString::to_string).unwrap_or_default()).collect();
    let (claimed, connected) = (standing.claimed, standing.connect.is_some());
    text += &format!("standing: claimed {claimed}, connected {connected}, places {places:?}\n");
    text += &format!("facts: {}\n", serde_json::to_string(&standing.facts).unwrap());
    text
}

#[test]
fn every_fixture_parses_and_means_the_same() {
    for file in fixtures() {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        insta::assert_snapshot!(format!("v1-{name}"), summary(&read(&file)));
    }
}

#[test]
fn the_fixtures_have_every_step_operation_and_record() {
    let (mut steps, mut operations, mut records) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for file in fixtures() {
        for line in std::fs::read_to_string(&file).unwrap().lines() {
            let record: serde_json::Value = serde_json::from_str(line.split_once(' ').unwrap().1).unwrap();
            records.insert(record["rec"].as_str().unwrap().to_owned());
            let Some(tasks) = record["plan"]["tasks"].as_array() else { continue };
            operations.insert(record["plan"]["operation"].as_str().unwrap().to_owned());
            steps.extend(tasks.iter().map(|t| t["step"].as_str().unwrap().to_owned()));
        }
    }
    let has = |found: &BTreeSet<String>, wanted: &[&str]| {
        for name in wanted {
            assert!(found.contains(*name), "{name} is in no fixture; there are {found:?}");
        }
    };
    has(&records, &["begin", "started", "settled", "failed", "unwinding", "undone", "end"]);
    has(&operations, &["attach", "detach", "resize", "resize-detached", "fsck"]);
    has(&steps, &["claim", "write-config", "start", "create-disk", "replay", "connect", "probe-signature"]);
    has(&steps, &["format", "preen", "mount", "link", "grow-disk", "grow-device", "grow-filesystem"]);
    has(&steps, &["grow-unmounted", "check", "read-data"]);
}

#[test]
fn a_torn_last_line_is_dropped_and_a_damaged_one_before_it_is_refused() {
    for file in fixtures() {
        let bytes = std::fs::read(&file).unwrap();
        let whole = read(&file).len();
        let torn = planted(&bytes[..bytes.len() - 3]);
        let runs = Journal::peek(torn.path(), &volume()).unwrap().unwrap();
        assert!(runs.len() == whole || runs.len() + 1 == whole, "{}", file.display());

        let mut damaged = bytes.clone();
        damaged[20] ^= 1;
        let error = Journal::peek(planted(&damaged).path(), &volume()).unwrap_err();
        assert_eq!(error.kind(), Kind::Refused, "{error}");
        assert!(error.hint_text().is_some());
    }
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    let text = std::fs::read_to_string(&fixtures()[0]).unwrap();
    let json = text.lines().next().unwrap().split_once(' ').unwrap().1.replace("\"v\":1", "\"v\":2");
    let line =
        format!("{:08x} {json}\n{:08x} {{}}\n", crc32c::crc32c(json.as_bytes()), crc32c::crc32c(b"{}"));
    let run = planted(line.as_bytes());
    let error = Journal::open(run.path(), &volume()).unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error}");
    assert!(error.hint_text().is_some());
    assert_eq!(std::fs::read(run.path().join("volumes/vol1/journal")).unwrap(), line.as_bytes());
}
