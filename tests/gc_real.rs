//! The collector as an operator uses it: the built program, real ZeroFS volumes in a bucket, one of them in use all the time.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::cli::{Node, assert_holds, pattern, write_durably};
use support::dir::TestDir;
use support::s3::S3;

const MIB: usize = 1 << 20;

/// A node whose volumes are in a bucket.
struct Lab {
    // The node's leftovers go before the store that they wait for.
    node: Node,
    server: S3,
    _store: TestDir,
    options: Vec<String>,
}

impl Lab {
    fn new() -> Lab {
        let node = Node::new();
        let store = TestDir::new();
        let server = S3::start(store.path());
        server.create_bucket("vols");
        let [key, secret] = server.keys_of_account();
        let config = node.dir.join("config.yaml");
        let text = format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: zerofs}}\ndata:\n  storageURL: s3://vols/csi\n  \
             awsEndpoint: http://{}\n  awsAllowHTTP: \"true\"\n  encryptionPasswordSecretName: password\n  \
             awsCredentialsSecretName: aws\n  cacheDiskSizeGB: \"0.1\"\n  cacheMemorySizeGB: \"0.064\"\n---\n\
             apiVersion: v1\nkind: Secret\nmetadata: {{name: password}}\nstringData: {{password: correct horse battery}}\n---\n\
             apiVersion: v1\nkind: Secret\nmetadata: {{name: aws}}\nstringData: {{AWS_ACCESS_KEY_ID: {key}, AWS_SECRET_ACCESS_KEY: {secret}}}\n",
            server.address()
        );
        fs::write(&config, text).unwrap();
        fs::set_permissions(&config, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let options = vec!["--config".to_owned(), config.display().to_string()];
        Lab { node, server, _store: store, options }
    }

    fn words<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        words.iter().copied().chain(self.options.iter().map(String::as_str)).collect()
    }

    fn attach(&self, volume: &str) -> String {
        let target = self.node.target(volume);
        self.node.ok(&self.words(&["attach", volume, "--target", &target, "--size", "256Mi"]));
        target
    }

    fn keys(&self, volume: &str) -> usize {
        self.server.keys("vols", &format!("csi/{volume}/")).len()
    }
}

#[test]
fn root_orphans_go_and_everything_else_verifies() {
    let lab = Lab::new();
    let node = &lab.node;
    for (n, volume) in ["gone", "vol1", "vol10"].into_iter().enumerate() {
        let target = lab.attach(volume);
        write_durably(&Path::new(&target).join("data"), &pattern(n as u64, 2 * MIB));
        node.ok(&["detach", volume]);
        assert!(lab.keys(volume) > 3, "{volume} has objects");
    }
    lab.server.begin_upload("vols", "csi/vol1/compacted/part.sst");
    lab.server.put("vols", "csi/photos/2024.jpg", b"abc");
    let busy = lab.attach("busy");
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        // A load that verifies what it wrote, for as long as all the rest takes.
        let load = s.spawn(|| {
            while !stop.load(Ordering::Relaxed) || rounds.load(Ordering::Relaxed) < 8 {
                let n = rounds.load(Ordering::Relaxed);
                let (file, bytes) = (Path::new(&busy).join(format!("f{}", n % 4)), pattern(n, MIB));
                write_durably(&file, &bytes);
                assert_holds(&file, &bytes, "under load");
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let before = rounds.load(Ordering::Relaxed);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| collect(&lab)));
        let meanwhile = rounds.load(Ordering::Relaxed) - before;
        stop.store(true, Ordering::Relaxed);
        load.join().expect("the load verifies");
        if let Err(e) = result {
            std::panic::resume_unwind(e);
        }
        assert!(meanwhile > 0, "nothing was written while objects were deleted");
    });
    node.assert_attached("busy", &[&busy], "in the end");
    node.ok(&["detach", "busy"]);
    // What was kept is whole, read anew from the bucket.
    let target = lab.attach("vol10");
    assert_holds(&Path::new(&target).join("data"), &pattern(2, 2 * MIB), "the neighbour in name");
    node.ok(&["detach", "vol10"]);
    let busy = lab.attach("busy");
    let rounds = rounds.into_inner();
    for n in rounds - 4..rounds {
        assert_holds(
            &Path::new(&busy).join(format!("f{}", n % 4)),
            &pattern(n, MIB),
            "read anew from the bucket",
        );
    }
    node.ok(&["detach", "busy"]);
    // A name is free again, for a new and empty volume.
    let target = lab.attach("vol1");
    assert!(!Path::new(&target).join("data").exists());
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}

/// Everything that the collector does while the load runs.
fn collect(lab: &Lab) {
    let node = &lab.node;
    let scan = node.json(&lab.words(&["gc-s3", "scan", "--no-kubernetes"]));
    let verdict = |v: &str| {
        let all = scan["volumes"].as_array().unwrap();
        all.iter().find(|s| s["volume"] == v).unwrap_or_else(|| panic!("{v}: {scan:#}"))["verdict"].clone()
    };
    for (volume, expected) in [
        ("busy", "live"),
        ("gone", "retained"),
        ("vol1", "retained"),
        ("vol10", "retained"),
        ("photos", "unknown"),
    ] {
        assert_eq!(verdict(volume), expected, "{volume}: {scan:#}");
    }
    let mark = ["gc-s3", "mark", "--no-kubernetes", "--max-delete", "50%"];
    let with = |more: &[&'static str]| [&mark[..], more].concat();
    node.run(&lab.words(&with(&["busy"]))).expect_error(11, &["busy", "refers to it"]);
    node.run(&lab.words(&with(&["photos"]))).expect_error(1, &["photos", "cannot be marked"]);
    node.run(&lab.words(&with(&["nothing"]))).expect_error(10, &["nothing"]);
    let one = lab.words(&["gc-s3", "mark", "vol1", "gone", "vol10", "--no-kubernetes"]);
    node.run(&one).expect_error(1, &["3 of 4 volumes", "--max-delete"]);
    assert_eq!(node.json(&lab.words(&with(&["vol1", "--dry-run"])))["dry_run"], true);
    assert_eq!(node.ok(&lab.words(&["gc-s3", "status", "-o", "name"])).stdout, "");

    let before = (lab.keys("gone"), lab.keys("vol1"));
    node.ok(&lab.words(&with(&["gone", "vol1"])));
    assert_eq!(node.ok(&lab.words(&["gc-s3", "status", "-o", "name"])).stdout, "gone\nvol1\n");
    // A mark is taken away by an attach, and by a restore; and it can be made again.
    let target = lab.attach("gone");
    node.run(&lab.words(&with(&["gone"]))).expect_error(11, &["gone"]);
    assert_holds(&Path::new(&target).join("data"), &pattern(0, 2 * MIB), "after a mark");
    node.ok(&["detach", "gone"]);
    node.ok(&lab.words(&["gc-s3", "restore", "vol1"]));
    assert_eq!(node.ok(&lab.words(&["gc-s3", "status", "-o", "name"])).stdout, "");
    node.ok(&lab.words(&with(&["gone", "vol1"])));

    // Within the grace period nothing goes; without a word neither.
    let sweep = ["gc-s3", "sweep", "--no-kubernetes", "--max-delete", "50%"];
    let with = |more: &[&'static str]| [&sweep[..], more].concat();
    let early = node.json(&lab.words(&with(&["--yes"])));
    assert_eq!(early["volumes"].as_array().unwrap().len(), 0, "{early:#}");
    node.run(&lab.words(&with(&["--grace", "0s"]))).expect_error(2, &["confirmed"]);
    assert!(lab.keys("gone") >= before.0 && lab.keys("vol1") >= before.1);
    // The object store tells whole seconds: a mark is due from the next one on.
    std::thread::sleep(Duration::from_secs(2));
    let planned = node.ok(&lab.words(&with(&["--grace", "0s", "--plan", "plan.json", "-o", "name"])));
    assert_eq!(planned.stdout, "gone\nvol1\n");
    node.run(&lab.words(&with(&["--grace", "24h", "--plan", "plan.json", "--yes"])))
        .expect_error(1, &["does not hold"]);
    assert!(lab.keys("gone") >= before.0 && lab.keys("vol1") >= before.1);
    let swept = node.json(&lab.words(&with(&["--grace", "0s", "--plan", "plan.json", "--yes"])));
    for volume in swept["volumes"].as_array().unwrap() {
        assert_eq!(volume["outcome"], "gone", "{swept:#}");
    }
    assert_eq!((lab.keys("gone"), lab.keys("vol1")), (0, 0), "{swept:#}");
    assert!(!lab.server.text("/vols?uploads").contains("<UploadId>"));
    assert!(lab.keys("vol10") > 3 && lab.keys("photos") == 1);
    assert_eq!(node.ok(&lab.words(&["volume", "list", "-o", "name"])).stdout, "busy\nvol10\n");
    node.run(&lab.words(&["volume", "forget", "vol10"])).expect_error(1, &["still has data"]);
    node.run(&lab.words(&["volume", "forget", "busy"])).expect_error(11, &["busy", "attached"]);
    node.run(&lab.words(&["volume", "show", "vol1"])).expect_error(10, &["vol1"]);
    let again = node.json(&lab.words(&with(&["--grace", "0s", "--yes"])));
    assert_eq!(again["objects"], 0, "{again:#}");
}

#[test]
fn root_a_store_on_this_machine_is_collected_too() {
    let node = Node::new();
    for volume in ["vol1", "vol10"] {
        let target = node.target(volume);
        node.ok(&["attach", volume, "--target", &target, "--size", "64Mi"]);
        write_durably(&Path::new(&target).join("data"), &pattern(3, MIB));
        node.ok(&["detach", volume]);
    }
    let all = ["--no-kubernetes", "--max-delete", "1"];
    node.ok(&[&["gc-s3", "mark", "vol1"], &all[..]].concat());
    node.ok(&[&["gc-s3", "sweep", "--grace", "0s", "--yes"], &all[..]].concat());
    let store = node.state().join("store");
    assert!(!store.join("vol1").exists() && !store.join(".zerofsctl/volumes/vol1.json").exists());
    let target = node.target("vol10");
    node.ok(&["attach", "vol10", "--target", &target]);
    assert_holds(&Path::new(&target).join("data"), &pattern(3, MIB), "the neighbour in name");
    node.ok(&["detach", "vol10"]);
}

#[test]
fn root_bad_input_changes_nothing_and_says_what_to_do() {
    let lab = Lab::new();
    let node = &lab.node;
    let config = |name: &str, text: &str| {
        let path = node.dir.join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let address = lab.server.address();
    let plain = config("plain.yaml", &format!("storageURL: s3://vols/csi\nawsEndpoint: http://{address}\n"));
    let scan = ["gc-s3", "scan", "--no-kubernetes", "--config"];
    node.run(&[&scan[..], &[&plain]].concat()).expect_error(2, &["http://", "awsAllowHTTP"]);
    node.run(&["gc-s3", "scan"]).expect_error(2, &["Kubernetes"]);
    let url = "s3://no-such-bucket/csi";
    node.run(&lab.words(&["gc-s3", "scan", "--no-kubernetes", "--storage-url", url]))
        .expect_error(10, &["no such bucket"]);
    let down = config(
        "down.yaml",
        "storageURL: s3://vols/csi\nawsEndpoint: http://127.0.0.1:1\nawsAllowHTTP: \"true\"\n",
    );
    let mut command =
        node.command(&[&["gc-s3", "sweep", "--yes", "--no-kubernetes", "--config"][..], &[&down]].concat());
    command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
    support::cli::Answer::of(&mut command).expect_error(20, &["does not answer"]);
    // The root of a bucket, with another installation and a record of a newer format in it.
    lab.server.put("vols", "csi/pvc-1/manifest/1", b"abc");
    lab.server.put("vols", ".zerofsctl/volumes/newer.json", br#"{"format": 2, "id": "newer"}"#);
    lab.server.put("vols", "newer/manifest/1", b"abc");
    let root = lab.words(&["gc-s3", "scan", "--no-kubernetes", "--storage-url", "s3://vols"]);
    let scan = node.json(&root);
    assert_eq!(scan["counts"]["unknown"], 2, "{scan:#}");
    for words in
        [["--grace", "soon"], ["--max-delete", "lots"], ["--quiet", "-1s"], ["--plan", "missing.json"]]
    {
        let sweep = ["gc-s3", "sweep", "--yes", "--no-kubernetes"];
        node.run(&lab.words(&[&sweep[..], &words[..]].concat())).expect_error(2, &[]);
    }
    let keys = lab.server.keys("vols", "");
    assert_eq!(keys.len(), 3, "{keys:?}");
}

/// The samples of a text as Prometheus' own parser takes it: each of a metric that has a help and is a gauge, and none twice.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let (mut helped, mut typed, mut found) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    assert!(text.ends_with('\n'), "the last line has an end");
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next().unwrap(), words.next(), words.next(), words.next()) {
            ("#", Some("HELP"), Some(name), Some(_)) => assert!(helped.insert(name), "{line}"),
            ("#", Some("TYPE"), Some(name), Some("gauge")) => assert!(typed.insert(name), "{line}"),
            // For others these are comments.
            ("#", Some("UNIT"), Some(_), Some(_)) | ("#", Some("EOF"), None, None) => {}
            (series, Some(value), None, None) => {
                let name = series.split('{').next().unwrap();
                assert!(helped.contains(name) && typed.contains(name), "{line}");
                assert!(name.starts_with("zerofs_gc_") && series.ends_with('}'), "{line}");
                assert!(found.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{line} twice");
            }
            _ => panic!("{line:?} is no line of metrics"),
        }
    }
    found
}

#[test]
fn root_the_metrics_of_a_run_tell_how_it_ended() {
    let lab = Lab::new();
    let node = &lab.node;
    lab.attach("kept");
    node.ok(&["detach", "kept"]);
    lab.attach("orphan");
    node.ok(&["detach", "orphan"]);
    let path = node.dir.join("zerofs-gc.prom");
    let file = path.to_str().unwrap();
    let run = |words: &[&str]| {
        node.run(&lab.words(&[words, &["--no-kubernetes", "--metrics-file", file]].concat()))
    };
    let of = |command: &str, name: &str, more: &str| {
        let text = fs::read_to_string(&path).unwrap();
        let all = samples(&text);
        let series = format!("zerofs_gc_{name}{{command=\"{command}\",store=\"s3://vols/csi\"{more}}}");
        all.get(&series).copied().unwrap_or_else(|| panic!("no {series} in\n{text}"))
    };

    run(&["gc-s3", "scan"]).expect_code(0);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644, "node_exporter reads it");
    assert_eq!(of("scan", "volumes", ",verdict=\"retained\""), 2.0);
    assert_eq!(of("scan", "volumes", ",verdict=\"orphan\""), 0.0);
    let stored = lab.keys("kept") + lab.keys("orphan");
    assert_eq!(of("scan", "stored_objects", ",verdict=\"retained\""), stored as f64);
    assert!(of("scan", "stored_bytes", ",verdict=\"retained\"") > 1000.0);
    assert_eq!(of("scan", "last_run_exit_code", ""), 0.0);
    let success = of("scan", "last_success_timestamp_seconds", "");
    assert_eq!(success, of("scan", "last_run_timestamp_seconds", ""));
    // A run that fails says so, keeps no number of another day, and the time of the last success.
    let wrong = ["gc-s3", "scan", "--context", "nowhere", "--metrics-file", file];
    node.run(&lab.words(&wrong)).expect_code(2);
    assert_eq!(of("scan", "last_run_exit_code", ""), 2.0);
    assert_eq!(of("scan", "last_success_timestamp_seconds", ""), success);
    assert!(!fs::read_to_string(&path).unwrap().contains("zerofs_gc_volumes"));

    // A volume that is named counts as one that nobody wants.
    run(&["gc-s3", "mark", "orphan"]).expect_code(0);
    assert_eq!((of("mark", "newly_marked_volumes", ""), of("mark", "marked_volumes", "")), (1.0, 0.0));
    let objects = lab.keys("orphan");
    // The object store tells whole seconds: a mark is due from the next one on.
    std::thread::sleep(Duration::from_secs(2));
    let all = ["gc-s3", "sweep", "--grace", "0s", "--quiet", "0s", "--max-delete", "100%", "--yes"];
    run(&all).expect_code(0);
    assert_eq!(of("sweep", "swept_volumes", ",outcome=\"gone\""), 1.0);
    assert_eq!(of("sweep", "swept_volumes", ",outcome=\"failed\""), 0.0);
    assert_eq!(of("sweep", "deleted_objects", ""), objects as f64);
    assert!(of("sweep", "deleted_bytes", "") > 1000.0);
    assert_eq!(lab.keys("orphan"), 0);

    // A slip of the hand replaces nothing, and is told before anything is done.
    for wrong in ["config.yaml", "nowhere/zerofs-gc.prom", "."] {
        let answer = node.run(&lab.words(&["gc-s3", "scan", "--no-kubernetes", "--metrics-file", wrong]));
        answer.expect_error(2, &[wrong.split('/').next().unwrap()]);
    }
    assert!(fs::read_to_string(node.dir.join("config.yaml")).unwrap().contains("storageURL"));
    run(&["gc-s3", "sweep", "--dry-run"]).expect_error(2, &["--metrics-file"]);
    run(&["gc-s3", "sweep", "--plan", "plan.json"]).expect_error(2, &["--metrics-file", "deletes nothing"]);
}
