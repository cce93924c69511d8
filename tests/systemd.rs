//! The unit that we ship, as systemd itself understands it.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::require_program;

fn unit() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd/zerofsctl-watch.service"))
        .unwrap()
}

#[test]
fn systemd_finds_no_fault_in_the_watchers_unit() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("zerofsctl-watch.service");
    // The program must be there: the one that was just built.
    let text = unit();
    assert_eq!(text.matches("/usr/local/bin/zerofsctl").count(), 1);
    fs::write(&file, text.replace("/usr/local/bin/zerofsctl", env!("CARGO_BIN_EXE_zerofsctl"))).unwrap();
    let verify = |file: &Path| {
        let out = Command::new(require_program("systemd-analyze"))
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(file)
            .output()
            .unwrap();
        let said = [out.stdout, out.stderr].concat();
        (out.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let (good, said) = verify(&file);
    assert!(good && said.trim().is_empty(), "{said}");

    // It would have said so.
    fs::write(&file, unit().replace("KillMode=process", "KillMod=process")).unwrap();
    let (_, said) = verify(&file);
    assert!(said.contains("KillMod"), "{said}");
}

#[test]
fn the_watchers_unit_lets_keepers_live_and_unmounts_before_it_stops() {
    let text = unit();
    for line in [
        "KillMode=process",
        "SendSIGKILL=no",
        "OOMPolicy=continue",
        "Before=remote-fs-pre.target",
        "Restart=always",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing");
    }
    assert!(text.lines().any(|l| l.starts_with("Wants=") && l.contains("remote-fs-pre.target")));
    // What it may call must be in the program.
    let exec = text.lines().find_map(|l| l.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<&str> = exec.split(' ').skip(1).chain(["--help"]).collect();
    let out = Command::new(env!("CARGO_BIN_EXE_zerofsctl")).args(&words).output().unwrap();
    assert!(out.status.success(), "{exec}: {}", String::from_utf8_lossy(&out.stderr));
}
