//! What the program itself prints, as snapshots: help pages, wrong usage, the known versions. It runs with nothing of
//! this machine. `cargo insta review` accepts a change; the model's plans and reports are in tests/snapshots.rs, since
//! a fork here would for an instant hold the locks that are taken there.

mod support;

use std::path::Path;
use std::process::Command;

use insta::assert_snapshot;
use support::kube;
use support::script::{Script, answer};

/// The program with nothing from this machine: no PATH, no home, its own folders.
fn program(args: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zerofsctl"));
    command
        .env_clear()
        .env("COLUMNS", "100")
        .env("ZEROFSCTL_STATE_DIR", dir.join("state"))
        .env("ZEROFSCTL_RUN_DIR", dir.join("run"))
        .current_dir(dir)
        .args(args);
    command
}

/// What it prints, and how it ends. The test's own folder is shown as DIR.
fn story(args: &[&str], dir: &Path) -> String {
    told(args, program(args, dir), dir)
}

fn told(args: &[&str], mut command: Command, dir: &Path) -> String {
    let output = command.output().unwrap();
    let text =
        |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().replace(&*dir.to_string_lossy(), "DIR");
    let mut story = format!("$ zerofsctl {}\n", args.join(" ").replace(&*dir.to_string_lossy(), "DIR"));
    for (stream, bytes) in [("", &output.stdout), ("! ", &output.stderr)] {
        story.extend(text(bytes).lines().map(|line| format!("{stream}{line}\n")));
    }
    story + &format!("[{}]\n", output.status.code().unwrap())
}

#[test]
fn every_help_page() {
    let dir = tempfile::tempdir().unwrap();
    fn pages(command: &clap::Command, path: &mut Vec<String>, dir: &Path) {
        let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
        args.push("--help");
        let name = if path.is_empty() { "help".to_owned() } else { format!("help-{}", path.join("-")) };
        let page = story(&args, dir);
        for line in page.lines() {
            assert!(line.chars().count() <= 100, "too wide for a terminal: {line}");
        }
        assert_snapshot!(name, page);
        for sub in command.get_subcommands() {
            path.push(sub.get_name().to_owned());
            pages(sub, path, dir);
            path.pop();
        }
    }
    pages(&zerofsctl::cli::definition(), &mut Vec::new(), dir.path());
}

#[test]
fn both_help_flags_give_the_same_page() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["attach", "detach", "fsck"] {
        let page = |flag| program(&[command, flag], dir.path()).output().unwrap().stdout;
        assert_eq!(page("-h"), page("--help"), "{command}");
    }
}

#[test]
fn wrong_words() {
    let dir = tempfile::tempdir().unwrap();
    let long = "x".repeat(300);
    let mut stories = String::new();
    for args in [
        &[] as &[&str],
        &["zerofs"],
        &["atach", "vol1"],
        &["attach"],
        &["attach", "vol1"],
        &["attach", "vol1", "--target", "m", "--sise", "1Gi"],
        &["attach", "a/b", "--target", "m"],
        &["attach", "..", "--target", "m"],
        &["attach", "a b", "--target", "m"],
        &["attach", &long, "--target", "m"],
        &["attach", "vol1", "--target", "/"],
        &["attach", "vol1", "--target", "../m"],
        &["attach", "vol1", "--target", "m", "--size", "0"],
        &["attach", "vol1", "--target", "m", "--size", "-1Gi"],
        &["attach", "vol1", "--target", "m", "--size", "1G1"],
        &["attach", "vol1", "--target", "m", "--size", "1000001"],
        &["attach", "vol1", "--target", "m", "--size", "5Pi"],
        &["attach", "vol1", "--target", "m", "--size", "64Mi", "--fs", "xfs"],
        &["attach", "vol1", "--target", "m", "--fs", "zfs"],
        &["attach", "vol1", "--target", "m", "--mount-option", "ro"],
        &["attach", "vol1", "--target", "m", "--mount-option", "bind"],
        &["attach", "vol1", "--target", "m", "--block", "--fs", "ext4"],
        &["attach", "vol1", "--target", "m", "--transport", "tcp"],
        &["attach", "vol1", "--target", "m", "--transport", "fuse", "--path", "direct"],
        &["attach", "vol1", "--target", "m", "--path", "short"],
        &["attach", "vol1", "--target", "m", "--reconnect-timeout", "0s"],
        &["attach", "vol1", "--target", "m", "--runtime", "pod"],
        &["attach", "vol1", "--target", "m", "--io-timeout", "5"],
        &["attach", "vol1", "--target", "m", "--replay-log", "1Mi"],
        &["detach"],
        &["detach", "vol1", "--all"],
        &["detach", "/mnt/nowhere"],
        &["detach", "vol1", "--stop-timeout", "soon"],
        &["resize", "vol1", "3GB"],
        &["fsck", "vol1", "--read-data", "9/3"],
        &["fsck", "vol1", "--yes"],
        &["list", "-o", "xml"],
        &["list", "--storage-url", "s4://x"],
        &["list", "--storage-url", "s3://"],
        &["list", "--config", "missing.yaml"],
        &["show", "vol1"],
        &["zerofs", "versions", "--zerofs-bin", "/missing"],
    ] {
        let story = story(args, dir.path());
        if !story.contains("error: the following required") && !story.contains("Usage:") {
            assert!(story.contains("! hint: ") || story.ends_with("[0]\n"), "no hint: {story}");
        }
        stories += &story;
        stories += "\n";
    }
    assert_snapshot!(stories);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a wrong word leaves something behind");
}

#[test]
fn wrong_settings() {
    let dir = tempfile::tempdir().unwrap();
    let mut stories = String::new();
    for (config, what) in [
        ("storageUrl: s3://bucket\n", "an unknown key"),
        ("cacheDiskSizeGB: lots\n", "a wrong type"),
        ("lsmFlushIntervalSecs: 1\n", "out of range"),
        ("storageURL: s3://bucket\nawsEndpoint: http://127.0.0.1:9\n", "plain HTTP, not allowed"),
        ("kind: ConfigMap\ndata:\n  cacheDiskSizeGB: 1.5\n", "a number in a ConfigMap"),
        ("deleteDataGracePeriod: tomorrow\n", "no time"),
        ("a: [b\n", "no YAML"),
        ("storageURL: s3://bucket\nawsCredentialsSecretName: aws\n", "a missing Secret"),
        ("encryptionPasswordSecretName: hunter2!\n", "a password where a name should be"),
    ] {
        std::fs::write(dir.path().join("c.yaml"), config).unwrap();
        stories += &format!("# {what}\n{}\n", story(&["list", "--config", "c.yaml"], dir.path()));
    }
    assert!(!stories.contains("hunter2"), "{stories}");
    assert_snapshot!(stories);
}

#[test]
fn a_cluster_that_cannot_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("store")).unwrap();
    let url = format!("file://{}", dir.path().join("store").display());
    let mut stories = String::new();
    let mut sweep = |what: &str, address: std::net::SocketAddr| {
        let kubeconfig = kube::plain_kubeconfig(address, dir.path(), "prod");
        let args = ["gc-s3", "sweep", "--yes", "--context", "prod", "--storage-url", &url];
        let mut command = program(&args, dir.path());
        command.env("KUBECONFIG", kubeconfig);
        let story = told(&args, command, dir.path());
        assert!(story.contains("; nothing was deleted\n") && story.contains("! hint: "), "{story}");
        stories += &format!("# {what}\n{story}\n");
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    sweep("nobody is there", free);
    let status = |code: u16, reason: &str| {
        let status = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
            "message": "hunter22",
        });
        answer(code, &status.to_string())
    };
    for (what, told) in [
        ("an expired token", status(401, "Unauthorized")),
        ("a right that is missing", status(403, "Forbidden")),
        ("a refusal", status(500, "InternalError")),
        ("a web page", answer(200, "<html>log in</html>")),
        ("something else than a namespace", answer(200, "{}")),
    ] {
        let server = Script::new(move |_| told.clone());
        sweep(what, server.address);
    }
    assert!(!stories.contains("hunter22"), "{stories}");
    assert_snapshot!(stories);
}

#[test]
fn an_error_as_json_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["show", "vol1", "--log-format", "json"], &["show", "--log-format=json", "-o", "xml"]]
        as [&[&str]; 2]
    {
        let output = program(args, dir.path()).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "ERROR");
        for key in ["timestamp", "kind", "message", "hint"] {
            assert!(line[key].is_string(), "{key}: {line}");
        }
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn the_known_versions() {
    let dir = tempfile::tempdir().unwrap();
    assert_snapshot!("versions-none-found", story(&["zerofs", "versions"], dir.path()));

    let fake = dir.path().join("zerofs");
    std::fs::write(&fake, "#!/bin/sh\necho zerofs 0.19.1\n").unwrap();
    std::fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for format in ["table", "wide", "name"] {
        let args = ["zerofs", "versions", "-o", format];
        let mut command = program(&args, dir.path());
        command.env("ZEROFS_BIN", &fake);
        assert_snapshot!(format!("versions-{format}"), told(&args, command, dir.path()));
    }
}

#[test]
fn no_answer_has_colours_without_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["--help"] as &[&str], &["list"], &["attach"], &["show", "vol1"]] {
        let output = program(args, dir.path()).output().unwrap();
        for bytes in [output.stdout, output.stderr] {
            assert!(!bytes.contains(&0x1b), "{args:?}");
        }
    }
}
