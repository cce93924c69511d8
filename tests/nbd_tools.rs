//! `zerofsctl nbd list`, `gc` and `watch` on the kernel's real devices: a leak of ours goes, and whatever is used, served
//! or somebody else's stays as it was. Runs where the nbd module is: scripts/vm-test, make test-nbd.

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::dir::TestDir;
use support::vm::{Baseline, Device, LONG, Mounted, Nbdkit, Victim, require_nbd, run};
use support::{cli, wait_until};
use zerofsctl::journal::Held;

const MIB: u64 = 1 << 20;

fn with_nbd(test: impl FnOnce(&TestDir)) {
    require_nbd();
    let before = Baseline::take();
    let dir = TestDir::new();
    test(&dir);
    before.assert_back();
}

fn program(dir: &TestDir, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_zerofsctl"));
    command
        .env("ZEROFSCTL_RUN_DIR", dir.join("run"))
        .env("ZEROFSCTL_STATE_DIR", dir.join("state"))
        .arg("nbd")
        .args(args);
    command
}

/// What it answers as JSON, and its exit code.
fn ask(dir: &TestDir, args: &[&str]) -> (Value, i32) {
    let out = program(dir, args).args(["-o", "json"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let value = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&out.stderr)));
    (value, out.status.code().unwrap())
}

/// The verdict on a device, and why.
#[track_caller]
fn verdict(dir: &TestDir, device: &Device) -> (String, String) {
    let (answer, _) = ask(dir, &["list"]);
    let devices = answer["data"]["devices"].as_array().unwrap();
    let found = devices.iter().find(|d| d["index"] == device.index()).expect("it is listed");
    (found["verdict"].as_str().unwrap().to_owned(), found["why"].as_str().unwrap().to_owned())
}

/// The fate of each device that a gc names.
fn fates(answer: &Value) -> Vec<(u64, String)> {
    let of = |item: &Value| {
        (item["device"]["index"].as_u64().unwrap(), item["fate"]["outcome"].as_str().unwrap().to_owned())
    };
    answer["data"]["devices"].as_array().unwrap().iter().map(of).collect()
}

fn connect(server: &Nbdkit, backend: &str) -> Device {
    // The name lives as long as the program: a handful of bytes for each test.
    let backend: &'static str = Box::leak(backend.to_owned().into_boxed_str());
    Device::connect(server, 1, |c| c.backend = Some(backend))
}

/// A device of a volume whose server has been killed.
fn leak(dir: &TestDir, volume: &str) -> Device {
    let mut server = Nbdkit::memory(dir, volume, 16 * MIB);
    let device = connect(&server, &format!("zerofs:{volume}"));
    server.server().kill();
    device
}

#[test]
fn nbd_smoke_gc_takes_the_leak_and_leaves_what_is_foreign() {
    with_nbd(|dir| {
        let server = Nbdkit::memory(dir, "foreign", 64 * MIB);
        let idle = Device::foreign(&server, 1);
        let server2 = Nbdkit::memory(dir, "foreign2", 64 * MIB);
        let mounted = Device::foreign(&server2, 1);
        let mount = Mounted::make(&mounted.path(), dir.join("mount"), "ext4");
        fs::write(mount.join("file"), "data").unwrap();
        let server3 = Nbdkit::memory(dir, "near", 16 * MIB);
        let near: Vec<Device> = ["zerofs", "zerofs:", "zerofs:../x", "ZEROFS:leak"]
            .iter()
            .map(|b| connect(&server3, b))
            .collect();
        let leaked = leak(dir, "leak");
        let index = u64::from(leaked.index());

        assert_eq!(verdict(dir, &leaked).0, "ours-leaked");
        for device in near.iter().chain([&idle, &mounted]) {
            assert_eq!(verdict(dir, device).0, "foreign", "{:?}", device.state());
        }
        assert_eq!(ask(dir, &["list", "--check"]).1, 3);
        let before: Vec<_> = near.iter().chain([&idle, &mounted]).map(Device::state).collect();

        // The plan changes nothing, and a leak that was just found is too young.
        let (plan, code) = ask(dir, &["gc", "--older-than", "0s"]);
        assert_eq!(code, 0);
        let planned: Vec<u64> = fates(&plan).iter().filter(|f| f.1 == "would").map(|f| f.0).collect();
        assert_eq!(planned, [index], "{plan}");
        let (young, _) = ask(dir, &["gc", "--yes"]);
        assert!(fates(&young).iter().all(|f| f.1 == "kept"), "{young}");
        let items = young["data"]["devices"].as_array().unwrap();
        let due: Vec<_> = items.iter().filter(|i| i["fate"]["due_at"].is_string()).collect();
        assert_eq!((due.len(), &due[0]["device"]["index"]), (1, &index.into()), "{young}");
        assert!(leaked.state().connected);

        // While a command holds the volume, it stays; then it goes, and alone.
        let lock = Held::take(&dir.join("run"), &"leak".parse().unwrap()).unwrap();
        let (busy, _) = ask(dir, &["gc", "--older-than", "0s", "--yes"]);
        assert!(fates(&busy).iter().all(|f| f.1 == "kept"), "{busy}");
        lock.release().unwrap();
        let (done, code) = ask(dir, &["gc", "--older-than", "0s", "--yes"]);
        assert_eq!(code, 0, "{done}");
        let gone: Vec<u64> = fates(&done).iter().filter(|f| f.1 == "disconnected").map(|f| f.0).collect();
        assert_eq!(gone, [index], "{done}");
        assert!(!leaked.state().connected);
        assert_eq!(ask(dir, &["list", "--check"]).1, 0);
        let after: Vec<_> = near.iter().chain([&idle, &mounted]).map(Device::state).collect();
        assert_eq!(after, before);
        assert_eq!(fs::read_to_string(mount.join("file")).unwrap(), "data");
        assert_eq!(fs::read_dir(dir.join("run/locks")).unwrap().count(), 0, "no lock file is left");
        mount.unmount();
        near.into_iter().chain([idle, mounted]).for_each(Device::disconnect);
    });
}

#[test]
fn nbd_gc_leaves_what_is_mounted_open_or_held_in_any_way() {
    with_nbd(|dir| {
        let servers: Vec<Nbdkit> = (0..4).map(|n| Nbdkit::memory(dir, &format!("s{n}"), 64 * MIB)).collect();
        let device = |n: usize| connect(&servers[n], &format!("zerofs:vol{n}"));
        let (hidden, open, looped, served) = (device(0), device(1), device(2), device(3));
        for d in [&hidden, &open, &looped, &served] {
            assert_eq!(verdict(dir, d).0, "ours-leaked", "nothing of ours serves it, and nobody uses it");
        }

        // Mounted where only one other process sees it.
        let path = hidden.path();
        run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap()]);
        fs::create_dir(dir.join("place")).unwrap();
        let script = format!("mount {} {} && exec sleep 1000", path.display(), dir.join("place").display());
        let mut other = Victim::spawn(Command::new("unshare").args(["--mount", "sh", "-c", &script]));
        let table = format!("/proc/{}/mountinfo", other.pid());
        wait_until("it is mounted there", LONG, || {
            fs::read_to_string(&table).is_ok_and(|t| t.contains(&*path.to_string_lossy()))
        });
        // Open under another name.
        let node = dir.join("node");
        let state = open.path();
        let rdev = std::os::unix::fs::MetadataExt::rdev(&fs::metadata(&state).unwrap());
        nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFBLK, nix::sys::stat::Mode::S_IRUSR, rdev)
            .unwrap();
        let file = File::open(&node).unwrap();
        let loop_device = run("losetup", &["--find", "--show", looped.path().to_str().unwrap()]);
        // Served, by whatever run folder.
        let mut server = Victim::spawn(
            Command::new("sleep").arg("1000").env("ZEROFSCTL_RUN_DIR", "/elsewhere/volumes/vol3"),
        );

        for (d, wanted, word) in [
            (&hidden, "ours-in-use", "mount namespace of process"),
            (&open, "ours-in-use", "open in"),
            (&looped, "ours-in-use", "held by loop"),
            (&served, "ours-idle", "pid"),
        ] {
            let (is, why) = verdict(dir, d);
            assert!(is == wanted && why.contains(word), "{is}: {why}");
        }
        let (done, _) = ask(dir, &["gc", "--older-than", "0s", "--yes"]);
        assert!(fates(&done).iter().all(|f| f.1 == "kept"), "{done}");
        assert!([&hidden, &open, &looped, &served].iter().all(|d| d.state().connected));

        // Once nobody needs them any more, all go, and their names with them.
        other.kill();
        server.kill();
        drop(file);
        run("losetup", &["--detach", loop_device.trim()]);
        let all = [&hidden, &open, &looped, &served];
        wait_until("all are seen as leaks", LONG, || all.iter().all(|d| verdict(dir, d).0 == "ours-leaked"));
        let (done, code) = ask(dir, &["gc", "--older-than", "0s", "--yes"]);
        assert_eq!((fates(&done).iter().filter(|f| f.1 == "disconnected").count(), code), (4, 0), "{done}");
        assert!(all.iter().all(|d| !d.state().connected));
    });
}

/// What a node tells of the only device that serves its volume vol1, asked with these words besides.
#[track_caller]
fn listed(node: &cli::Node, words: &[&str]) -> Value {
    let answer = node.json(&[&["nbd", "list"], words].concat());
    let is_it = |d: &&Value| d["volume"] == "vol1" && d["mounts"] != json!([]);
    answer["devices"].as_array().unwrap().iter().find(is_it).expect("it is listed").clone()
}

/// An attach that was killed has left a device, and the volume is attached again; and whoever asks knows another run folder.
#[test]
fn nbd_list_raises_no_alarm_for_a_volume_with_two_devices_or_from_another_run_folder() {
    with_nbd(|dir| {
        let leaked = leak(dir, "vol1");
        let node = cli::Node::new();
        let m = node.target("m");
        node.ok(&["attach", "vol1", "--target", &m, "--size", "128Mi", "--fs", "ext4", "--transport", "nbd"]);
        let live = listed(&node, &[]);
        assert!(
            live["index"].as_u64() > Some(leaked.index().into()),
            "the leak is looked at first: {live:#}"
        );
        let mounted_and_served = format!("mounted at {m}");
        assert_eq!(live["why"], mounted_and_served, "{live:#}");
        let server = &live["server"];
        assert_eq!((&server["answers"], &server["index"]), (&json!(true), &live["index"]), "{live:#}");

        let seen = listed(&node, &["--run-dir", &node.target("other")]);
        assert_eq!(seen["why"], mounted_and_served, "{seen:#}");
        let elsewhere = &seen["server"]["elsewhere"];
        assert_eq!(
            (&elsewhere["program"], &elsewhere["pid"]),
            (&json!("keeper"), &server["keeper"]),
            "{seen:#}"
        );

        // The other device stays as long as the keeper runs, and no longer.
        let gc = || node.json(&["nbd", "gc", "--older-than", "0s", "--yes"]);
        let fate = |answer: &Value| {
            let items = answer["devices"].as_array().unwrap();
            let item =
                items.iter().find(|i| i["device"]["index"] == leaked.index()).expect("it is connected");
            (item["device"]["verdict"].clone(), item["fate"]["outcome"].clone())
        };
        let kept = gc();
        assert_eq!(fate(&kept), (json!("ours-idle"), json!("kept")), "{kept:#}");
        let has = format!("its volume's keeper (pid {}) has /dev/nbd{}", server["keeper"], live["index"]);
        assert!(kept.to_string().contains(&has), "{kept:#}");
        assert_eq!(listed(&node, &[])["why"], mounted_and_served);
        node.ok(&["detach", "vol1"]);
        let gone = gc();
        assert_eq!(fate(&gone).1, "disconnected", "{gone:#}");
        node.assert_nothing_left("at the end");
    });
}

/// The kernel tells of a dead socket once, and nobody hears it when it is the keeper that died.
#[test]
fn nbd_list_counts_sockets_that_died_with_their_keepers() {
    require_nbd();
    let before = Baseline::take();
    let node = cli::Node::new();
    let m = node.target("m");
    let attach = ["attach", "vol1", "--target", &m, "--size", "128Mi", "--fs", "ext4", "--transport", "nbd"];
    node.ok(&attach);
    let reconnects = || {
        let server = &listed(&node, &[])["server"];
        assert_eq!([&server["answers"], &server["connected"]], [true, true], "{server:#}");
        assert!(server["reconnects"].is_u64(), "{server:#}");
        assert_eq!(server["dead_links"], server["reconnects"], "its one socket, each time: {server:#}");
        server["reconnects"].as_u64()
    };
    assert_eq!(reconnects(), Some(0));
    for round in 1..=3 {
        assert!(node.kill(cli::Victim::Keeper));
        node.ok(&attach);
        wait_until("the next keeper serves", LONG, || {
            node.found("vol1")["reconnects"].as_u64() >= Some(round)
        });
        assert!(reconnects() >= Some(round));
    }
    node.ok(&["detach", "vol1"]);
    node.ok(&attach);
    assert_eq!(reconnects(), Some(0), "another attach, another count");
    node.ok(&["detach", "vol1"]);
    before.assert_back();
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_watch_tells_changes_and_ends_at_a_signal() {
    with_nbd(|dir| {
        let mut server = Nbdkit::memory(dir, "server", 16 * MIB);
        let mut child = program(dir, &["watch", "--interval", "50ms", "-o", "json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .for_each(|l| tell.send(serde_json::from_str::<Value>(&l).unwrap()).unwrap())
        });
        let next = |event: &str| loop {
            let change = told.recv_timeout(LONG).expect("a change is told");
            if change["event"] == event {
                return change;
            }
        };
        let device = connect(&server, "zerofs:vol");
        assert_eq!(next("connected")["device"]["index"], device.index());
        server.server().kill();
        assert_eq!(next("link-dead")["index"], device.index());
        let index = device.index();
        device.disconnect();
        assert_eq!(next("disconnected")["device"]["index"], index);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        let mut status = None;
        wait_until("it ends", Duration::from_secs(20), || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(0));
        reader.join().unwrap();
    });
}

#[test]
fn nbd_list_tells_64_devices_at_once() {
    const DEVICES: usize = 64;
    with_nbd(|dir| {
        let mut servers = [Nbdkit::memory(dir, "ours", 16 * MIB), Nbdkit::memory(dir, "foreign", 16 * MIB)];
        let devices: Vec<Device> = (0..DEVICES)
            .map(|n| connect(&servers[n % 2], &format!("{}:vol{n}", ["zerofs", "other"][n % 2])))
            .collect();
        servers[0].server().kill();
        let (mut times, mut answer) = (Vec::new(), Value::Null);
        for _ in 0..10 {
            let begun = std::time::Instant::now();
            answer = ask(dir, &["list"]).0;
            times.push(begun.elapsed());
        }
        let count = |verdict: &str| {
            let all = answer["data"]["devices"].as_array().unwrap();
            all.iter().filter(|d| d["verdict"] == verdict).count()
        };
        assert_eq!((count("ours-leaked"), count("foreign")), (DEVICES / 2, DEVICES / 2), "{answer}");
        times.sort_unstable();
        println!("with {DEVICES} devices: median {:.1?}, least {:.1?}", times[times.len() / 2], times[0]);
        let loaded = fs::read_to_string("/proc/loadavg").unwrap();
        println!("load average {loaded}");
        devices.into_iter().for_each(Device::disconnect);
    });
}
