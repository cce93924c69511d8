//! What the program says where, on the real system: the answer on standard output, the story on standard error; what a
//! failure among many does; and what Ctrl-C leaves.

mod support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::cli::{Answer, Node};

#[test]
fn root_detach_all_goes_on_after_a_failure_and_exits_5() {
    let node = Node::new();
    for volume in ["a", "b", "c"] {
        node.ok(&["attach", volume, "--target", volume]);
    }
    let held = fs::File::create(node.target("b") + "/held").unwrap();
    let answer = node.run(&["detach", "--all"]).expect_code(5);
    assert!(answer.stdout.starts_with("1 of 3 volumes failed\n"), "{answer:#?}");
    for (volume, result) in [("a", "detached"), ("b", "failed"), ("c", "detached")] {
        let line = answer.stdout.lines().find(|l| l.split_whitespace().next() == Some(volume));
        assert!(line.is_some_and(|l| l.contains(result)), "{volume}: {answer:#?}");
    }
    assert!(answer.stderr.contains("error: volume b: step unmount: "), "{answer:#?}");
    assert!(answer.stderr.contains("hint: "), "{answer:#?}");
    node.assert_attached("b", &[&node.target("b")], "after a detach that failed");

    // All of them failed: that is a failure, not a part.
    node.run(&["detach", "--all", "-o", "json"]).expect_code(1).json();
    drop(held);
    let answer = node.ok(&["detach", "--all"]);
    assert!(answer.stdout.starts_with("1 volume detached\n"), "{answer:#?}");
    let answer = node.ok(&["detach", "--all"]);
    assert_eq!(answer.stdout, "nothing is attached on this node\n");
    node.assert_nothing_left("in the end");
}

#[test]
fn root_stdout_is_the_answer_and_stderr_the_story() {
    let node = Node::new();
    let answer = node.ok(&["attach", "vol1", "--target", "m", "-o", "json", "-v"]);
    assert_eq!(answer.json()["volume"], "vol1");
    assert!(answer.stderr.lines().any(|l| l.starts_with("vol1: mount done (")), "{answer:#?}");

    let answer = node.ok(&["attach", "vol1", "--target", "m", "-o", "name"]);
    assert_eq!((answer.stdout.as_str(), answer.stderr.as_str()), ("vol1\n", ""));
    let answer = node.ok(&["attach", "vol1", "--target", "m"]);
    assert!(answer.stdout.starts_with("vol1 is already attached at "), "{answer:#?}");
    assert_eq!(answer.stderr, "");

    for words in [&["list"][..], &["show", "vol1"], &["zerofs", "versions"], &["recover"]] {
        for format in ["table", "wide", "json", "yaml", "name"] {
            let answer = node.ok(&[words, &["-o", format]].concat());
            assert_eq!(answer.stderr, "", "{answer:#?}");
            assert!(!answer.stdout.is_empty(), "{answer:#?}");
            match format {
                "json" => drop(answer.json()),
                "name" => assert!(!answer.stdout.trim().contains(' '), "{answer:#?}"),
                _ => {}
            }
        }
    }

    // As a log collector wants it: every line of the story is an object with a time and a level.
    let answer = node.ok(&["detach", "vol1", "--log-format", "json"]);
    assert!(answer.stderr.lines().count() >= 5, "{answer:#?}");
    for line in answer.stderr.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(
            line["timestamp"].is_string() && line["level"].is_string() && line["message"].is_string(),
            "{line}"
        );
    }
    node.assert_nothing_left("in the end");
}

#[test]
fn root_readers_that_went_away_do_not_stop_the_work() {
    let node = Node::new();
    for words in [&["attach", "vol1", "--target", "m", "-v"][..], &["detach", "vol1", "-v"]] {
        let mut command = node.command(words);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().unwrap().code(), Some(0), "{words:?}");
    }
    node.assert_nothing_left("in the end");
}

#[test]
fn root_ctrl_c_ends_an_attach_between_two_steps_and_undoes_it() {
    let node = Node::new();
    // Made before, so that the attach that is interrupted has only to start it.
    node.ok(&["attach", "vol1", "--target", "m"]);
    fs::write(node.target("m") + "/data", "kept").unwrap();
    node.ok(&["detach", "vol1"]);
    for milliseconds in [0, 30, 100, 250, 500] {
        let mut command = node.command(&["attach", "vol1", "--target", "m"]);
        // As a terminal does it: the signal goes to the whole group, so to mount and fsck, too.
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        let _ = kill(Pid::from_raw(-(child.id() as i32)), Signal::SIGINT);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            // Too late, it was through.
            Some(0) => drop(node.ok(&["detach", "vol1"])),
            Some(130) => {
                assert!(stderr.contains("error: volume vol1: step "), "{stderr}");
                assert!(stderr.contains("hint: "), "{stderr}");
            }
            // Before it could catch a signal, it had done nothing.
            None => assert!(stderr.is_empty(), "{stderr}"),
            other => panic!("after {milliseconds} ms: {other:?}: {stderr}"),
        }
        node.assert_nothing_left(&format!("after Ctrl-C at {milliseconds} ms"));
    }
    node.ok(&["attach", "vol1", "--target", "m"]);
    assert_eq!(fs::read_to_string(node.target("m") + "/data").unwrap(), "kept");
    let last: Answer = node.ok(&["detach", "vol1"]);
    assert!(last.stdout.starts_with("vol1 is detached\n"), "{last:#?}");
    node.assert_nothing_left("in the end");
}
