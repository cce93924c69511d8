//! The keeper as a real process, with the real ZeroFS on a `file://` store: starting, watching, restarting,
//! adopting, fencing, stopping. Each test ends by showing that nothing is left.

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::keeper::{
    LONG, SIZE, Volume, client, nothing_left, program, ready, signal, start, stop, stop_with,
};
use support::wait_until;
use zerofsctl::error::Kind;
use zerofsctl::host::cgroup::Limits;
use zerofsctl::keeper::client::KeeperClient;
use zerofsctl::keeper::control::{State, StopOptions};
use zerofsctl::keeper::process::Identity;
use zerofsctl::keeper::{Spawned, find_zerofs, spawn};
use zerofsctl::zerofs::config::Aws;
use zerofsctl::zerofs::ninep;

#[test]
fn a_volume_starts_tells_its_status_and_stops_without_a_trace() {
    let v = Volume::new();
    let began = Instant::now();
    let spawned = start(&v.config);
    assert!(!spawned.already);
    let status = client(&v.config).wait_ready(LONG).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(status.state, State::Ready, "{status:?}");
    assert_eq!(status.keeper, spawned.keeper);
    assert_eq!(status.restarts, 0);
    assert_eq!(status.reason, None);
    assert!(!status.data_path && !status.fuse_mounted);
    let zerofs = status.zerofs.unwrap();
    assert_eq!(find_zerofs(&v.config.run_dir), vec![zerofs.clone()]);
    // It outlives whoever started it: a session of its own, and no descriptor of ours.
    let stat = fs::read_to_string(format!("/proc/{}/stat", spawned.keeper.pid)).unwrap();
    let session: i32 =
        stat.rsplit(')').next().unwrap().split_ascii_whitespace().nth(3).unwrap().parse().unwrap();
    assert_eq!(session, spawned.keeper.pid);
    let environ = fs::read(format!("/proc/{}/environ", zerofs.pid)).unwrap();
    assert!(!String::from_utf8_lossy(&environ).contains("CARGO"), "nothing leaks into its environment");
    // Both sockets answer at once.
    ninep::create_disk(&v.config.run_dir, "disk", SIZE).unwrap();
    // A second start is no second keeper.
    assert_eq!(start(&v.config), Spawned { keeper: spawned.keeper, already: true });
    for name in ["keeper.sock", "keeper.pid", "zerofs.pid", "keeper.json"] {
        let mode = fs::metadata(v.config.run_dir.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name} is for its owner only");
    }
    stop(&v.config);
    assert!(fs::read_to_string(v.config.log_dir.join("zerofs.log")).unwrap().contains("db closed"));
    assert_eq!(KeeperClient::connect(&v.config.run_dir).err().unwrap().kind(), Kind::NotFound);
}

#[test]
fn a_killed_zerofs_is_started_again() {
    let v = Volume::new();
    let mut pid = ready(&v.config).zerofs.unwrap().pid;
    for restarts in 1..=3 {
        signal(pid, Signal::SIGKILL);
        wait_until("it is back", LONG, || {
            let s = client(&v.config).status().unwrap();
            s.state == State::Ready && s.restarts == restarts
        });
        let now = client(&v.config).status().unwrap().zerofs.unwrap().pid;
        assert_ne!(std::mem::replace(&mut pid, now), now);
        assert!(ninep::database_open(&v.config.run_dir).unwrap());
    }
    // A clean exit that nobody asked for is no different.
    signal(pid, Signal::SIGTERM);
    wait_until("it is back", LONG, || client(&v.config).status().unwrap().restarts == 4);
    stop(&v.config);
}

#[test]
fn a_wrong_password_is_told_as_such_and_never_quoted() {
    let mut v = Volume::new();
    ready(&v.config);
    stop(&v.config);
    v.input.password = "incorrect horse".to_owned().into();
    v.render();
    start(&v.config);
    let began = Instant::now();
    let e = client(&v.config).wait_ready(LONG).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10), "no retry helps");
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    assert!(e.message().contains("password is wrong"), "{e}");
    assert!(e.hint_text().is_some());
    let status = client(&v.config).status().unwrap();
    assert_eq!((status.state, &status.zerofs), (State::Failed, &None));
    assert!(!format!("{status:?} {e:?} {}", v.logs()).contains("incorrect horse"));
    stop(&v.config);
}

#[test]
fn a_binary_that_is_not_there_a_bad_config_and_a_bad_folder_are_told_apart() {
    let mut v = Volume::new();
    let good = v.config.clone();
    v.config.zerofs_bin = "/nonexistent/zerofs".into();
    start(&v.config);
    let e = client(&v.config).wait_ready(LONG).unwrap_err();
    assert_eq!(e.kind(), Kind::Environment);
    assert!(e.hint_text().unwrap().contains("--zerofs-bin"));
    stop(&v.config);

    v.config = good;
    let text = fs::read_to_string(&v.config.config_path).unwrap();
    fs::write(&v.config.config_path, text.replace("[lsm]", "[nosuchsection]\nx = 1\n[lsm]")).unwrap();
    start(&v.config);
    let e = client(&v.config).wait_ready(LONG).unwrap_err();
    assert_eq!(e.kind(), Kind::Environment, "{e}");
    assert!(e.message().contains("config"), "{e}");
    stop(&v.config);

    v.input.storage_url = "file:///proc/nonexistent/x".to_owned();
    v.render();
    start(&v.config);
    let e = client(&v.config).wait_ready(LONG).unwrap_err();
    assert_eq!(e.kind(), Kind::Environment, "{e}");
    stop(&v.config);
}

#[test]
fn a_store_that_refuses_connections_is_given_up_after_the_start_limit() {
    let mut v = Volume::new();
    // A port that was free a moment ago, so nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    v.input.storage_url = "s3://bucket/vol1".to_owned();
    v.input.aws = Aws {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        region: Some("us-east-1".to_owned()),
        allow_http: Some(true),
        access_key_id: Some("key".to_owned()),
        secret_access_key: Some("sesame-open".to_owned().into()),
        session_token: None,
    };
    v.config.start_limit_seconds = 4;
    v.render();
    start(&v.config);
    let e = client(&v.config).wait_ready(LONG).unwrap_err();
    assert_eq!(e.kind(), Kind::Unreachable, "{e}");
    assert!(e.message().contains("cannot be reached") || e.message().contains("refuses"), "{e}");
    assert!(!v.logs().contains("sesame-open"));
    stop(&v.config);
}

#[test]
fn a_killed_keeper_leaves_a_zerofs_that_the_next_one_adopts() {
    let v = Volume::new();
    let first = ready(&v.config);
    signal(first.keeper.pid, Signal::SIGKILL);
    wait_until("the keeper is gone", LONG, || !first.keeper.is_alive());
    assert!(first.zerofs.as_ref().unwrap().is_alive(), "ZeroFS outlives its keeper");
    let e = KeeperClient::connect(&v.config.run_dir).err().unwrap();
    assert_eq!(e.kind(), Kind::NotFound);

    let second = ready(&v.config);
    assert_ne!(second.keeper, first.keeper);
    assert_eq!(second.zerofs, first.zerofs, "not a second one, which would fence the first:\n{}", v.logs());

    // Even when it was killed before it could write down what it had started.
    signal(second.keeper.pid, Signal::SIGKILL);
    wait_until("the keeper is gone", LONG, || !second.keeper.is_alive());
    fs::write(v.config.run_dir.join("zerofs.pid"), r#"{"zerofs":null,"log_offset":0}"#).unwrap();
    let third = ready(&v.config);
    assert_eq!(third.zerofs, first.zerofs);

    // What the orphan said while nobody watched is read by the next keeper.
    signal(third.keeper.pid, Signal::SIGKILL);
    wait_until("the keeper is gone", LONG, || !third.keeper.is_alive());
    v.log("2026-11-20T17:58:59.216453Z ERROR slatedb::dispatcher: background task failed [name=x]\n");
    ready(&v.config);
    wait_until("another one is ready", LONG, || {
        let fourth = client(&v.config).status().unwrap();
        fourth.state == State::Ready && fourth.zerofs.is_some() && fourth.zerofs != first.zerofs
    });
    assert!(!first.zerofs.unwrap().is_alive());

    // Also when its log has been renamed.
    let fourth = client(&v.config).status().unwrap();
    signal(fourth.keeper.pid, Signal::SIGKILL);
    wait_until("the keeper is gone", LONG, || !fourth.keeper.is_alive());
    let (log, old) = (v.config.log_dir.join("zerofs.log"), v.config.log_dir.join("zerofs.log.old"));
    fs::rename(&log, &old).unwrap();
    let fifth = ready(&v.config);
    assert_eq!(fifth.zerofs, fourth.zerofs);
    let mut log = fs::File::options().append(true).open(old).unwrap();
    log.write_all(
        b"2026-11-20T17:58:59.216453Z ERROR slatedb::dispatcher: background task failed [name=x]\n",
    )
    .unwrap();
    wait_until("another one is ready", LONG, || {
        let sixth = client(&v.config).status().unwrap();
        sixth.state == State::Ready && sixth.zerofs.is_some() && sixth.zerofs != fourth.zerofs
    });
    stop(&v.config);
}

#[test]
fn a_keeper_killed_at_any_moment_of_its_start_leaves_what_the_next_one_can_take_over() {
    let v = Volume::new();
    // Without a ZeroFS of an earlier one, which would only be adopted.
    let end_zerofs = || {
        // A keeper that is dying may still come to start one.
        wait_until("no ZeroFS is left", LONG, || {
            let left = find_zerofs(&v.config.run_dir);
            for zerofs in &left {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(zerofs.pid), Signal::SIGKILL);
            }
            left.is_empty()
        });
    };
    for round in 0..support::rounds(12, 30) {
        let keeper = start(&v.config).keeper;
        std::thread::sleep(Duration::from_millis(u64::from(round) * 37 % 300));
        signal(keeper.pid, Signal::SIGKILL);
        if round % 3 != 0 {
            end_zerofs();
        }
    }
    // Even between the decision to start ZeroFS and its start, while the command that started it is gone too.
    let path = v.config.run_dir.join("keeper.pid");
    let mut last = Identity::read(&path);
    for pause in [0, 1, 2, 3, 4, 5, 7, 10] {
        end_zerofs();
        let config = v.config.clone();
        let starter = std::thread::spawn(move || spawn(&program(), &config, LONG));
        let mut keeper = None;
        wait_until("the next keeper is there", LONG, || {
            // The one before may still be dying.
            keeper = Identity::read(&path).filter(|i| Some(i) != last.as_ref() && i.is_alive());
            keeper.is_some()
        });
        std::thread::sleep(Duration::from_millis(pause));
        signal(keeper.as_ref().expect("it was waited for").pid, Signal::SIGKILL);
        last = keeper;
        // Killed or not: either is fine.
        let _ = starter.join().unwrap();
    }
    let status = ready(&v.config);
    assert_eq!(status.state, State::Ready);
    assert_eq!(find_zerofs(&v.config.run_dir).len(), 1);
    stop(&v.config);
}

#[test]
fn a_second_server_on_the_volume_fences_the_first_which_is_not_started_again() {
    let v = Volume::new();
    let elsewhere = v.elsewhere();
    let first = ready(&v.config);
    ninep::create_disk(&v.config.run_dir, "disk", SIZE).unwrap();
    ready(&elsewhere);
    // The first one notices when it next reads the manifest.
    wait_until("the first one is fenced", LONG, || {
        client(&v.config).status().unwrap().state == State::Fenced
    });
    wait_until("and killed", LONG, || find_zerofs(&v.config.run_dir).is_empty());
    std::thread::sleep(Duration::from_secs(2));
    let status = client(&v.config).status().unwrap();
    assert_eq!((status.state, status.zerofs, status.restarts), (State::Fenced, None, 0));
    assert!(status.reason.unwrap().contains("opened elsewhere"));
    assert!(!first.zerofs.unwrap().is_alive());
    let second = client(&elsewhere).status().unwrap();
    assert_eq!((second.state, second.restarts), (State::Ready, 0), "the new owner is left in peace");
    assert_eq!(ninep::disk_size(&elsewhere.run_dir, "disk").unwrap(), Some(SIZE));
    stop(&v.config);
    stop(&elsewhere);
}

#[test]
fn a_zerofs_that_died_is_not_started_again_once_the_catalog_names_a_new_owner() {
    let v = Volume::new();
    let zerofs = ready(&v.config).zerofs.unwrap();
    v.taken_over();
    signal(zerofs.pid, Signal::SIGKILL);
    wait_until("it is fenced", LONG, || client(&v.config).status().unwrap().state == State::Fenced);
    let status = client(&v.config).status().unwrap();
    assert_eq!((status.zerofs, status.restarts), (None, 0));
    assert!(status.reason.unwrap().contains("taken over"));
    stop(&v.config);
}

#[test]
fn a_zerofs_that_died_waits_while_nobody_can_tell_whose_the_volume_is() {
    let v = Volume::new();
    let zerofs = ready(&v.config).zerofs.unwrap();
    let (folder, away) = (v.dir.join("store/.zerofsctl"), v.dir.join("away"));
    fs::rename(&folder, &away).unwrap();
    signal(zerofs.pid, Signal::SIGKILL);
    wait_until("it says so", LONG, || {
        let reason = client(&v.config).status().unwrap().reason;
        reason.is_some_and(|r| r.contains("cannot tell whether the volume is still ours"))
    });
    assert_eq!(client(&v.config).status().unwrap().zerofs, None);
    fs::rename(&away, &folder).unwrap();
    wait_until("it is back", LONG, || client(&v.config).status().unwrap().state == State::Ready);
    stop(&v.config);
}

#[test]
fn a_fatal_line_in_the_log_means_kill_and_restart() {
    let v = Volume::new();
    let mut before = ready(&v.config);
    for (n, line) in [
        "2026-11-20T17:58:59.216453Z ERROR slatedb::dispatcher: background task panicked unexpectedly. [task_name=x]",
        "2026-11-20T17:58:59.216453Z ERROR zerofs::cli::server: Periodic flush failed: IoError",
        "2026-11-20T17:58:59.216453Z  WARN slatedb::mem_table_flush: won't flush imm to l0 because too many l0 files",
        "2026-11-20T17:58:59.216453Z  INFO object_store::client::retry: Encountered transport error of kind Connect, backing off for 0.3 seconds, retry 7 of 10: HTTP error",
    ]
    .iter()
    .enumerate()
    {
        v.log(&format!("{line}\n"));
        wait_until("it is replaced", LONG, || client(&v.config).status().unwrap().restarts == n as u64 + 1);
        wait_until("it is back", LONG, || client(&v.config).status().unwrap().state == State::Ready);
        let after = client(&v.config).status().unwrap();
        assert_ne!(before.zerofs, after.zerofs);
        before = after;
    }
    // A line that only looks like one.
    v.log("2026-11-20T17:58:59.216453Z  INFO zerofs: DB Path: /Fenced/background task failed\n");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(client(&v.config).status().unwrap().zerofs, before.zerofs);
    stop(&v.config);
}

/// It would make zeros durable half a second later, and a question that it does not answer takes longer than that.
#[test]
fn a_server_that_hangs_and_is_about_to_give_up_is_killed_at_once() {
    let v = Volume::new();
    let zerofs = ready(&v.config).zerofs.unwrap();
    signal(zerofs.pid, Signal::SIGSTOP);
    wait_until("it is reported", LONG, || client(&v.config).status().unwrap().state == State::Stalled);
    // The next question is under way by then, and gives up only after ten seconds.
    std::thread::sleep(Duration::from_millis(1500));
    v.log("2026-11-20T17:58:59.216453Z  INFO object_store::client::retry: Encountered transport error of kind Connect, backing off for 0.3 seconds, retry 5 of 10: HTTP error\n");
    wait_until("it is gone", Duration::from_secs(1), || !zerofs.is_alive());
    wait_until("another one is ready", LONG, || client(&v.config).status().unwrap().state == State::Ready);
    stop(&v.config);
}

#[test]
fn a_stopped_server_is_reported_and_left_alone() {
    let v = Volume::new();
    let pid = ready(&v.config).zerofs.unwrap().pid;
    signal(pid, Signal::SIGSTOP);
    wait_until("it is reported", LONG, || client(&v.config).status().unwrap().state == State::Stalled);
    signal(pid, Signal::SIGCONT);
    wait_until("it is well again", LONG, || client(&v.config).status().unwrap().state == State::Ready);
    let status = client(&v.config).status().unwrap();
    assert_eq!((status.zerofs.unwrap().pid, status.restarts), (pid, 0));
    stop(&v.config);
}

#[test]
fn a_stop_that_takes_too_long_is_an_error_and_goes_on_and_force_ends_it() {
    let v = Volume::new();
    let status = ready(&v.config);
    let pid = status.zerofs.unwrap().pid;
    signal(pid, Signal::SIGSTOP);
    let mut words = 0;
    let options = StopOptions { timeout_seconds: 2.5, force: false, even_if_mounted: false };
    let e = client(&v.config).stop(options, &mut |_| words += 1).unwrap_err();
    assert_eq!(e.kind(), Kind::Interrupted, "{e}");
    assert!(e.hint_text().unwrap().contains("--force"));
    assert!(words >= 2, "one word a second");
    assert_eq!(client(&v.config).status().unwrap().state, State::Stopping);
    // It goes on: once the process can, it ends, and so does the keeper.
    signal(pid, Signal::SIGCONT);
    wait_until("the keeper ends", LONG, || !status.keeper.is_alive());
    nothing_left(&v.config);

    let pid = ready(&v.config).zerofs.unwrap().pid;
    signal(pid, Signal::SIGSTOP);
    let stopped = stop_with(&v.config, 5.0, true).unwrap();
    assert!(stopped.clean, "nothing was written: {stopped:?}");
    nothing_left(&v.config);
}

/// As when the end of a device's sockets is being looked at while its detach goes on already.
#[test]
fn a_stop_waits_for_a_change_of_the_device_that_is_under_way() {
    let v = Volume::new();
    let pid = ready(&v.config).zerofs.unwrap().pid;
    ninep::create_disk(&v.config.run_dir, "disk", SIZE).unwrap();
    client(&v.config).replay().unwrap();
    signal(pid, Signal::SIGSTOP);
    std::thread::scope(|scope| {
        let resize = scope.spawn(|| client(&v.config).resize());
        std::thread::sleep(Duration::from_secs(1));
        let stop = scope.spawn(|| stop_with(&v.config, 20.0, false));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!resize.is_finished() && !stop.is_finished(), "{:?}", stop.join());
        signal(pid, Signal::SIGCONT);
        assert_eq!(resize.join().unwrap().unwrap(), SIZE);
        let stopped = stop.join().unwrap().unwrap();
        assert!(stopped.clean, "{stopped:?}");
    });
    nothing_left(&v.config);
}

#[test]
fn sigterm_stops_a_keeper_whose_device_is_not_in_use() {
    let v = Volume::new();
    let status = ready(&v.config);
    signal(status.keeper.pid, Signal::SIGHUP);
    signal(status.keeper.pid, Signal::SIGTERM);
    wait_until("the keeper ends", LONG, || !status.keeper.is_alive());
    nothing_left(&v.config);
    assert!(fs::read_to_string(v.config.log_dir.join("zerofs.log")).unwrap().contains("db closed"));
}

#[test]
fn a_stop_in_the_middle_of_a_start_leaves_nothing() {
    let v = Volume::new();
    start(&v.config);
    let stopped = stop_with(&v.config, 20.0, false).unwrap();
    assert!(stopped.clean, "{stopped:?}");
    nothing_left(&v.config);
}

#[test]
fn limits_that_cannot_be_set_are_a_warning_unless_they_are_required() {
    let mut v = Volume::new();
    v.config.limits = Limits { cpu_millis: Some(1500), memory_bytes: Some(4 << 30) };
    let status = ready(&v.config);
    let group = fs::read_to_string(format!("/proc/{}/cgroup", status.zerofs.unwrap().pid)).unwrap();
    // With the controllers there are no warnings, and without them there is no silence.
    let in_group = group.contains("zerofsctl/vol1");
    assert!(in_group || !status.warnings.is_empty());
    let unlimited = status.warnings.iter().any(|w| w.contains("limit"));
    stop(&v.config);

    v.config.limits_required = true;
    match spawn(&program(), &v.config, LONG) {
        Err(e) => {
            assert!(unlimited);
            assert_eq!(e.kind(), Kind::Environment, "{e}");
        }
        Ok(_) => {
            assert!(!unlimited);
            stop(&v.config);
        }
    }
}

#[test]
fn a_keeper_is_small() {
    let v = Volume::new();
    let pid = ready(&v.config).keeper.pid;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    // Its own memory: what else is resident is code, of which a debug build has any amount (`make bench` has the sum).
    let kib = |name: &str| -> u64 {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let own = kib("RssAnon:") + kib("RssShmem:");
    assert!(own < 5 << 10, "{own} KiB of its own");
    stop(&v.config);
}
