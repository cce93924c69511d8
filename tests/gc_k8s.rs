//! The collector and real API servers: who refers to what, and what is wrong with a cluster's answer. Whatever is in doubt
//! ends with exit code 20 and with nothing deleted.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use support::cli::{Answer, Node};
use support::csi::{Driver, refused};
use support::kube::{Kube, config_of, plain_kubeconfig};
use support::proxy::{FaultProxy, Mode};
use support::script::{self, Request, Script, answer};
use tonic::Code;
use zerofsctl::catalog::{self, Catalog, Objects, State, StorageUrl, VolumeRecord, Written};
use zerofsctl::error::{Error, Kind};
use zerofsctl::gc::{
    ClusterWitness, Collector, Limit, Options, Outcome, Patience, Unwatched, Verdict, Witness,
};
use zerofsctl::k8s::{Cluster, DRIVER};
use zerofsctl::values::{ByteSize, VolumeId};

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

/// A PersistentVolume in this phase.
fn pv(name: &str, volume: &str, phase: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain", "storageClassName": "zerofs",
            "csi": {"driver": DRIVER, "volumeHandle": volume},
        },
        "status": {"phase": phase},
    })
}

fn attachment(name: &str, pv: &str) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": {"name": name},
        "spec": {"attacher": DRIVER, "nodeName": "node-a", "source": {"persistentVolumeName": pv}},
    })
}

fn pod(name: &str, labels: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "zerofs", "labels": labels},
        "spec": {"containers": [{"name": "zerofs", "image": "zerofs"}]},
    })
}

/// The documents of a manifest under deploy/.
fn manifest(name: &str) -> Vec<Value> {
    use serde::Deserialize;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_yaml::Deserializer::from_str(&text).map(|d| Value::deserialize(d).expect("YAML")).collect()
}

/// What the documentation tells an operator to apply; and the token of the account that it makes.
fn collectors_token(kube: &Kube) -> String {
    for object in manifest("gc-rbac.yaml") {
        kube.apply(&object, false).unwrap_or_else(|e| panic!("{object:#}: {e}"));
    }
    kube.token("zerofs", "zerofs-gc")
}

/// A store in a folder, with volumes that nobody writes to, and commands about it.
struct Lab {
    node: Node,
    store: PathBuf,
    url: StorageUrl,
    catalog: Box<dyn Catalog>,
    objects: Box<dyn Objects>,
}

impl Lab {
    fn new() -> Lab {
        let node = Node::new();
        let store = node.dir.join("store");
        fs::create_dir(&store).unwrap();
        let url = StorageUrl::from_dir(&store).unwrap();
        let (catalog, objects) = (
            catalog::open(&url, &Default::default()).unwrap(),
            catalog::objects(&url, &Default::default()).unwrap(),
        );
        Lab { node, store, url, catalog, objects }
    }

    /// A volume of this cluster, with some objects.
    fn volume(&self, name: &str, cluster: Option<&str>) {
        let mut record = VolumeRecord::new(id(name), ByteSize(1 << 30), None, Timestamp::now());
        record.cluster = cluster.map(str::to_owned);
        assert!(matches!(self.catalog.create(&record).unwrap(), Written::Done(_)), "{name} is new");
        for object in ["manifest/00000000000000000001.manifest", "compacted/01.sst", "compacted/02.sst"] {
            let path = self.store.join(name).join(object);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
    }

    /// The objects that a volume still has.
    fn count(&self, volume: &str) -> usize {
        support::cli::files_below(&self.store.join(volume)).iter().filter(|p| p.is_file()).count()
    }

    fn record(&self, volume: &str) -> Option<VolumeRecord> {
        self.catalog.get(&id(volume)).unwrap().map(|(record, _)| record)
    }

    #[track_caller]
    fn assert_whole(&self, volume: &str) {
        assert_eq!(self.count(volume), 3, "{volume}");
        let record = self.record(volume).unwrap_or_else(|| panic!("{volume} has lost its record"));
        assert_ne!(record.state, State::Deleting, "{volume}");
    }

    #[track_caller]
    fn assert_gone(&self, volume: &str) {
        assert_eq!((self.count(volume), self.record(volume)), (0, None), "{volume}");
    }

    /// A `gc-s3` command with these kubeconfigs, in which nothing counts as too young to be judged.
    fn run(&self, kubeconfigs: &[&Path], words: &[&str]) -> Answer {
        let paths: Vec<&str> = kubeconfigs.iter().map(|p| p.to_str().unwrap()).collect();
        let url = self.url.to_string();
        let settled = ["--storage-url", &url, "--min-age", "0s", "--quiet", "0s"];
        let mut command = self.node.command(&[&["gc-s3"], words, &settled].concat());
        Answer::of(command.env("KUBECONFIG", paths.join(":")))
    }

    /// The verdicts of a scan.
    #[track_caller]
    fn verdicts(&self, kubeconfigs: &[&Path], words: &[&str]) -> BTreeMap<String, String> {
        let scan = self.run(kubeconfigs, &[&["scan", "-o", "json"], words].concat()).expect_code(0).json();
        let text = |v: &Value| v.as_str().unwrap().to_owned();
        let volumes = scan["volumes"].as_array().unwrap();
        volumes.iter().map(|v| (text(&v["volume"]), text(&v["verdict"]))).collect()
    }

    fn collector<'a>(&'a self, witnesses: &'a [&'a dyn Witness]) -> Collector<'a> {
        let zero = SignedDuration::ZERO;
        let options = Options {
            patience: Patience { young: zero, quiet: zero },
            grace: zero,
            limit: Limit::Percent(100),
            workers: 4,
            ..Options::default()
        };
        Collector {
            catalog: self.catalog.as_ref(),
            objects: self.objects.as_ref(),
            witnesses,
            options,
            watch: &Unwatched,
        }
    }
}

const ALL: [&str; 2] = ["--max-delete", "100%"];

/// Everything at once, at no grace.
fn sweep() -> Vec<&'static str> {
    ["sweep", "--grace", "0s", "--yes"].into_iter().chain(ALL).collect()
}

fn mark() -> Vec<&'static str> {
    ["mark"].into_iter().chain(ALL).collect()
}

#[track_caller]
fn assert_verdicts(found: &BTreeMap<String, String>, expected: &[(&str, &str)]) {
    let expected: BTreeMap<String, String> =
        expected.iter().map(|(v, e)| ((*v).to_owned(), (*e).to_owned())).collect();
    assert_eq!(found, &expected);
}

#[test]
fn root_what_a_cluster_refers_to_stays_and_only_its_own_orphans_go() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let token = collectors_token(&kube);
    let config = kube.kubeconfig(lab.node.dir.path(), "prod", &token);
    let cluster = kube.identity();
    for name in ["a-bound", "a-static", "a-kept", "a-attached", "a-served", "a-labelled", "a-gone", "a-late"]
    {
        lab.volume(name, Some(&cluster));
    }
    lab.volume("a-elsewhere", Some("another-cluster"));
    lab.volume("a-by-hand", None);
    let objects = [
        pv("a-bound", "a-bound", "Bound"),
        pv("a-named-as-its-maker-liked", "a-static", "Available"),
        pv("a-kept", "a-kept", "Released"),
        attachment("a-csi-1", "a-attached"),
        pod("zerofs-volume-a-served", &json!({})),
        pod("a-somehow", &json!({"app": "zerofs", "type": "volume", "volume": "a-labelled"})),
    ];
    objects.iter().for_each(|o| kube.create(o));
    // Of another driver, of the same name.
    let mut foreign = pv("a-foreign", "a-gone", "Bound");
    foreign["spec"]["csi"]["driver"] = "ebs.csi.aws.com".into();
    kube.create(&foreign);

    let expected = [
        ("a-bound", "live"),
        ("a-static", "live"),
        ("a-kept", "retained"),
        ("a-attached", "live"),
        ("a-served", "live"),
        ("a-labelled", "live"),
        ("a-gone", "orphan"),
        ("a-late", "orphan"),
        ("a-elsewhere", "unknown"),
        ("a-by-hand", "retained"),
    ];
    assert_verdicts(&lab.verdicts(&[&config], &["--context", "prod"]), &expected);
    // The same by the current context; and with nobody asked.
    assert_verdicts(&lab.verdicts(&[&config], &[]), &expected);
    let unasked = lab.verdicts(&[&config], &["--no-kubernetes"]);
    assert!(unasked.values().all(|v| v != "orphan"), "{unasked:?}");
    lab.run(&[&config], &["scan", "--context", "prod", "--no-kubernetes"]).expect_code(2);
    lab.run(&[&config], &["scan", "--context", "prdo"]).expect_error(2, &["no context \"prdo\""]);

    lab.run(&[&config], &mark()).expect_code(0);
    // One that was marked is wanted after all: the last look sees it, whatever the plan says.
    let plan = [&sweep()[..], &["--plan", "plan.json"]].concat();
    let first: Vec<&str> = plan.iter().copied().filter(|w| *w != "--yes").collect();
    lab.run(&[&config], &first).expect_code(0);
    let late = pv("a-late-again", "a-late", "Available");
    kube.create(&late);
    lab.run(&[&config], &plan).expect_error(1, &["a-late", "does not hold"]);
    lab.run(&[&config], &sweep()).expect_code(0);
    lab.assert_gone("a-gone");
    for (volume, _) in expected.iter().filter(|(v, _)| *v != "a-gone") {
        lab.assert_whole(volume);
    }
    assert!(lab.record("a-late").unwrap().mark().is_none());
    objects.iter().chain([&late, &foreign]).for_each(|o| kube.delete(o));
}

#[test]
fn root_a_claim_that_comes_between_the_scan_and_the_deletion_is_seen() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let cluster = kube.identity();
    let path = kube.kubeconfig(lab.node.dir.path(), "prod", &collectors_token(&kube));
    let client = Cluster::from_config("prod", kube.run(async |_| read(&path).await)).unwrap();
    let witness = ClusterWitness::new(client);
    let kept = pv("b-kept", "b-kept", "Bound");
    kube.create(&kept);
    for name in ["b-kept", "b-pv", "b-attached", "b-served", "b-gone"] {
        lab.volume(name, Some(&cluster));
    }
    let witnesses: [&dyn Witness; 1] = [&witness];
    let collector = lab.collector(&witnesses);
    let scan = collector.scan().unwrap();
    let plan = collector.plan_mark(&scan).unwrap();
    assert_eq!(collector.mark(&scan, &plan).unwrap().marked.len(), 4);
    let scan = collector.scan().unwrap();
    let plan = collector.plan_sweep(&scan).unwrap();
    assert_eq!(plan.lines.len(), 4);
    let late = [
        pv("b-pv", "b-pv", "Available"),
        attachment("b-csi-1", "b-attached"),
        pod("zerofs-volume-b-served", &json!({})),
    ];
    late.iter().for_each(|o| kube.create(o));
    let swept = collector.sweep(&scan, &plan).unwrap();
    for (volume, outcome) in &swept.volumes {
        let gone = matches!(outcome, Outcome::Gone { .. });
        assert_eq!(gone, volume.as_str() == "b-gone", "{volume}: {outcome:?}");
    }
    lab.assert_gone("b-gone");
    ["b-kept", "b-pv", "b-attached", "b-served"].iter().for_each(|v| lab.assert_whole(v));
    late.iter().chain([&kept]).for_each(|o| kube.delete(o));
}

async fn read(path: &Path) -> kube::Config {
    config_of(&fs::read_to_string(path).unwrap()).await.unwrap()
}

/// PersistentVolumes change hands all the time, to names that come before or after in the list, so that whoever reads page
/// by page and not one moment misses some.
#[test]
fn root_volumes_that_change_hands_while_they_are_listed_are_never_orphans() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let cluster = kube.identity();
    let path = kube.kubeconfig(lab.node.dir.path(), "prod", kube.admin_token());
    let config = kube.run(async |_| read(&path).await);
    let witness = ClusterWitness::new(Cluster::from_config("prod", config).unwrap().paged(2));
    let volumes: Vec<String> = (0..6).map(|n| format!("c-{n}")).collect();
    for volume in &volumes {
        lab.volume(volume, Some(&cluster));
        kube.create(&pv(&format!("c-a-{volume}"), volume, "Bound"));
    }
    let rounds = support::rounds(12, 60);
    let (stop, turns) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        let hands = s.spawn(|| {
            let mut hand = 'a';
            while !stop.load(Ordering::Relaxed) {
                let other = if hand == 'a' { 'z' } else { 'a' };
                for volume in &volumes {
                    // The new one is there before the old one goes; the attachment holds on alone in turns.
                    let attached = attachment(&format!("c-csi-{volume}"), &format!("c-{other}-{volume}"));
                    kube.create(&pv(&format!("c-{other}-{volume}"), volume, "Bound"));
                    kube.create(&attached);
                    kube.delete(&pv(&format!("c-{hand}-{volume}"), volume, "Bound"));
                    kube.delete(&attached);
                    turns.fetch_add(1, Ordering::Relaxed);
                }
                hand = other;
            }
            for volume in &volumes {
                kube.delete(&pv(&format!("c-{hand}-{volume}"), volume, "Bound"));
            }
        });
        let witnesses: [&dyn Witness; 1] = [&witness];
        let collector = lab.collector(&witnesses);
        let scans = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let began = turns.load(Ordering::Relaxed);
            let (mut round, mut orphans) = (0, 0);
            while round < rounds || turns.load(Ordering::Relaxed) < began + 12 {
                lab.volume(&format!("c-orphan-{round}"), Some(&cluster));
                let scan = collector.scan().unwrap();
                for seen in scan.volumes.iter().filter(|s| volumes.iter().any(|v| v == s.volume.as_str())) {
                    assert_eq!(seen.judgement.verdict, Verdict::Live, "round {round}: {seen:?}");
                }
                collector.mark(&scan, &collector.plan_mark(&scan).unwrap()).unwrap();
                let scan = collector.scan().unwrap();
                let swept = collector.sweep(&scan, &collector.plan_sweep(&scan).unwrap()).unwrap();
                orphans += swept.volumes.len();
                round += 1;
            }
            assert_eq!(orphans, round as usize);
        }));
        stop.store(true, Ordering::Relaxed);
        hands.join().expect("the volumes change hands");
        scans.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    volumes.iter().for_each(|v| lab.assert_whole(v));
}

/// A real API server with somebody in between, who sees each answer and may do something about it.
fn between(
    kube: &Arc<Kube>,
    mut meddle: impl FnMut(&Request, u16, Value) -> script::Answer + Send + 'static,
) -> Script {
    // The script's thread outlives the test, and must not keep the server with it.
    let kube = Arc::downgrade(kube);
    Script::new(move |request| {
        let kube = kube.upgrade()?;
        let client = kube.run(async |client| client);
        let (status, body) = forward(&kube, &client, request);
        meddle(request, status, body)
    })
}

/// The real server's answer to a request, as `client` gets it.
fn forward(kube: &Kube, client: &kube::Client, request: &Request) -> (u16, Value) {
    let asked =
        hyper::Request::get(&request.path).header("accept", &request.accept).body(Vec::new()).unwrap();
    match kube.run(async |_| client.request_text(asked).await) {
        Ok(text) => (200, serde_json::from_str(&text).unwrap()),
        Err(kube::Error::Api(status)) => (status.code, serde_json::to_value(&*status).unwrap()),
        Err(e) => panic!("the real server: {e}"),
    }
}

fn pass(status: u16, body: &Value) -> script::Answer {
    answer(status, &body.to_string())
}

/// The witness of a server at this address, with pages of two objects.
fn witness_at(kube: &Kube, lab: &Lab, address: std::net::SocketAddr) -> ClusterWitness {
    let path = plain_kubeconfig(address, lab.node.dir.path(), "between");
    let config = kube.run(async |_| read(&path).await);
    ClusterWitness::new(
        Cluster::from_config("between", config).unwrap().paged(2).patient(Duration::from_secs(60)),
    )
}

/// Three live volumes, so two pages, and an orphan that is marked and due.
fn marked(kube: &Kube, lab: &Lab, tag: &str) -> Vec<Value> {
    let cluster = kube.identity();
    let pvs: Vec<Value> = (0..3).map(|n| pv(&format!("{tag}-{n}"), &format!("{tag}-{n}"), "Bound")).collect();
    pvs.iter().for_each(|o| kube.create(o));
    for n in 0..3 {
        lab.volume(&format!("{tag}-{n}"), Some(&cluster));
    }
    lab.volume(&format!("{tag}-orphan"), Some(&cluster));
    let path = kube.kubeconfig(lab.node.dir.path(), "marked", kube.admin_token());
    lab.run(&[&path], &mark()).expect_code(0);
    assert!(lab.record(&format!("{tag}-orphan")).unwrap().mark().is_some());
    pvs
}

#[test]
fn root_a_list_that_is_cut_short_or_makes_no_sense_deletes_nothing() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let pvs = marked(&kube, &lab, "d");
    type Which = fn(&Request) -> bool;
    type Meddle = fn(Value) -> script::Answer;
    let last_page: Which = |r| r.path.contains("/persistentvolumes") && r.path.contains("continue=");
    let first_page: Which = |r| r.path.contains("/persistentvolumes") && !r.path.contains("continue=");
    let small: Which = |r| r.path.contains("/persistentvolumes") && r.path.contains("limit=2");
    let volumes: Which = |r| r.path.contains("/persistentvolumes");
    let pods: Which = |r| r.path.contains("/pods");
    let attachments: Which = |r| r.path.contains("/volumeattachments");
    let who: Which = |r| r.path.contains("/namespaces/kube-system");
    let half: Meddle = |v| pass(200, &v).map(|text| text[..text.len() - 20].to_owned());
    let cases: Vec<(&str, Which, Meddle)> = vec![
        ("a last page that breaks off", last_page, half),
        ("a first page that breaks off", first_page, half),
        ("no answer", last_page, |_| None),
        ("pods break off", pods, half),
        ("attachments break off", attachments, half),
        ("nobody knows who it is", who, half),
        ("a page that lost its continuation", small, |mut v| {
            v["metadata"].as_object_mut().unwrap().remove("continue");
            pass(200, &v)
        }),
        ("the same page again and again", volumes, |_| {
            let metadata = json!({"resourceVersion": "7", "continue": "again"});
            pass(
                200,
                &json!({"kind": "PersistentVolumeList", "apiVersion": "v1", "metadata": metadata, "items": []}),
            )
        }),
        ("more objects, and no word where", volumes, |_| {
            let metadata = json!({"resourceVersion": "7", "remainingItemCount": 3});
            pass(
                200,
                &json!({"kind": "PersistentVolumeList", "apiVersion": "v1", "metadata": metadata, "items": []}),
            )
        }),
        ("a list of no moment", first_page, |mut v| {
            v["metadata"]["resourceVersion"] = "".into();
            pass(200, &v)
        }),
        ("another kind", first_page, |mut v| {
            v["kind"] = "PersistentVolumeClaimList".into();
            pass(200, &v)
        }),
        ("nothing", first_page, |_| pass(200, &json!({}))),
        ("a bare list", first_page, |_| pass(200, &json!({"items": []}))),
        ("no items", first_page, |mut v| {
            v.as_object_mut().unwrap().remove("items");
            pass(200, &v)
        }),
        ("a web page", first_page, |_| answer(200, "<html>log in</html>")),
        ("full pods in the place of metadata", pods, |mut v| {
            v["kind"] = "PodList".into();
            pass(200, &v)
        }),
        ("an error of the server", last_page, |_| pass(500, &json!({"kind": "Status", "code": 500}))),
        ("forgotten every time", last_page, |_| {
            pass(410, &json!({"kind": "Status", "code": 410, "reason": "Expired"}))
        }),
        ("another moment every time", last_page, |mut v| {
            v["metadata"]["resourceVersion"] = "1".into();
            pass(200, &v)
        }),
        ("another cluster", who, |mut v| {
            static ASKED: AtomicUsize = AtomicUsize::new(0);
            v["metadata"]["uid"] = format!("uid-{}", ASKED.fetch_add(1, Ordering::Relaxed)).into();
            pass(200, &v)
        }),
    ];
    for (what, which, meddle) in cases {
        let hits = Arc::new(AtomicUsize::new(0));
        let counted = hits.clone();
        let server = between(&kube, move |request, status, body| {
            if which(request) {
                counted.fetch_add(1, Ordering::Relaxed);
                return meddle(body);
            }
            pass(status, &body)
        });
        let witness = witness_at(&kube, &lab, server.address);
        let witnesses: [&dyn Witness; 1] = [&witness];
        let e = lab.collector(&witnesses).scan().expect_err(what);
        assert_eq!(e.kind(), Kind::Unreachable, "{what}: {e}");
        assert!(e.hint_text().is_some() && e.message().contains("between"), "{what}: {e:?}");
        assert!(e.message().ends_with("; nothing was deleted"), "{what}: {e:?}");
        assert!(hits.load(Ordering::Relaxed) > 0, "{what}: it was never asked");
        // The program itself, where its larger pages make no difference.
        if !which(&page_request()) {
            let path = plain_kubeconfig(server.address, lab.node.dir.path(), "between");
            lab.run(&[&path], &sweep()).expect_error(20, &["between"]);
        }
        lab.assert_whole("d-orphan");
    }
    // It was none of all that that kept it.
    let path = kube.kubeconfig(lab.node.dir.path(), "honest", kube.admin_token());
    lab.run(&[&path], &sweep()).expect_code(0);
    lab.assert_gone("d-orphan");
    pvs.iter().for_each(|o| kube.delete(o));
}

fn page_request() -> Request {
    let path = "/api/v1/persistentvolumes?&limit=2&continue=x".into();
    Request { method: "GET".into(), path, accept: String::new(), body: vec![], number: 0 }
}

#[test]
fn root_a_moment_that_is_forgotten_in_the_middle_of_a_list_is_read_anew() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let pvs = marked(&kube, &lab, "e");
    let codes = Arc::new(Mutex::new(Vec::new()));
    let (noted, store) = (codes.clone(), Arc::downgrade(&kube));
    let mut forgotten = false;
    let server = between(&kube, move |request, status, body| {
        if request.path.contains("/persistentvolumes") {
            noted.lock().unwrap().push(status);
            if !forgotten && body["metadata"]["continue"].as_str().is_some_and(|c| !c.is_empty()) {
                forgotten = true;
                store.upgrade()?.forget_the_past();
            }
        }
        pass(status, &body)
    });
    let witness = witness_at(&kube, &lab, server.address);
    let testimony = witness.testify().unwrap();
    for n in 0..3 {
        assert!(testimony.references.contains_key(&id(&format!("e-{n}"))), "{testimony:?}");
    }
    assert!(!testimony.references.contains_key(&id("e-orphan")));
    let codes = codes.lock().unwrap().clone();
    assert_eq!(codes.iter().filter(|c| **c == 410).count(), 1, "a real 410 Gone: {codes:?}");
    pvs.iter().for_each(|o| kube.delete(o));
}

#[test]
fn root_who_may_not_know_everything_deletes_nothing() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let pvs = marked(&kube, &lab, "f");
    let token = collectors_token(&kube);
    let folder = lab.node.dir.path();
    let account = |name: &str| {
        kube.create(&json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "zerofs"},
        }));
    };
    let mut made = Vec::new();
    // Of the rules in the manifest, each one less: all are needed.
    let role = manifest("gc-rbac.yaml").into_iter().find(|o| o["kind"] == "ClusterRole").unwrap();
    let mut lacking = Vec::new();
    for (r, rule) in role["rules"].as_array().unwrap().iter().enumerate() {
        for (n, resource) in rule["resources"].as_array().unwrap().iter().enumerate() {
            let mut rules = role["rules"].clone();
            rules[r]["resources"].as_array_mut().unwrap().remove(n);
            if rules[r]["resources"].as_array().unwrap().is_empty() {
                rules.as_array_mut().unwrap().remove(r);
            }
            lacking.push((resource.as_str().unwrap().to_owned(), rules));
        }
    }
    assert_eq!(lacking.len(), 4);
    for (resource, rules) in lacking {
        let name = format!("f-no-{resource}");
        account(&name);
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules,
        });
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "zerofs"}],
        });
        for object in [role, binding] {
            kube.create(&object);
            made.push(object);
        }
        let path = kube.kubeconfig(folder, &name, &kube.token("zerofs", &name));
        // Rights take a moment to get around.
        support::wait_until("the role is known", Duration::from_secs(60), || {
            lab.run(&[&path], &["scan"]).stderr.contains(&format!("{resource}: that is forbidden"))
        });
        let refused = lab.run(&[&path], &sweep()).expect_error(20, &[&resource, "forbidden"]);
        assert!(refused.stderr.contains("gc-rbac.yaml"), "{refused:#?}");
        lab.assert_whole("f-orphan");
    }
    account("f-nothing");
    for (what, token, word) in [
        ("f-expired", kube.expired_token("zerofs", "zerofs-gc"), "does not know who we are"),
        ("f-unknown", "hunter22".into(), "does not know who we are"),
        ("f-nothing", kube.token("zerofs", "f-nothing"), "forbidden"),
    ] {
        let path = kube.kubeconfig(folder, what, &token);
        let refused = lab.run(&[&path], &sweep()).expect_error(20, &[word]);
        assert!(!format!("{refused:?}").contains(&token), "a token is no word for a message");
        lab.assert_whole("f-orphan");
    }
    // An account that is deleted while its token is still good by its date.
    account("f-leaver");
    let leaver = kube.kubeconfig(folder, "f-leaver", &kube.token("zerofs", "f-leaver"));
    kube.delete(&json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "f-leaver", "namespace": "zerofs"},
    }));
    lab.run(&[&leaver], &sweep()).expect_error(20, &[]);
    lab.assert_whole("f-orphan");

    // It may look, and do nothing else.
    let path = kube.kubeconfig(folder, "collector", &token);
    let config = kube.run(async |_| read(&path).await);
    kube.run(async |_| {
        use k8s_openapi::api::core::v1::{PersistentVolume, Secret};
        let client = kube::Client::try_from(config).unwrap();
        let forbidden = |e: kube::Error| matches!(e, kube::Error::Api(status) if status.code == 403);
        let volumes: kube::Api<PersistentVolume> = kube::Api::all(client.clone());
        assert!(forbidden(volumes.delete("f-0", &Default::default()).await.unwrap_err()));
        let secrets: kube::Api<Secret> = kube::Api::namespaced(client, "zerofs");
        assert!(forbidden(secrets.list(&Default::default()).await.unwrap_err()));
    });
    lab.run(&[&path], &sweep()).expect_code(0);
    lab.assert_gone("f-orphan");
    made.iter().chain(&pvs).for_each(|o| kube.delete(o));
}

/// A real 401 between two pages of one list.
#[test]
fn root_a_token_that_expires_in_the_middle_of_a_list_deletes_nothing() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let pvs = marked(&kube, &lab, "j");
    collectors_token(&kube);
    // On a busy machine even the first page may come too late; then it is given more time.
    let struck = [15, 60, 240].into_iter().any(|seconds| {
        let (e, codes) = scan_with_a_token_for(seconds, &kube, &lab);
        assert_eq!(e.kind(), Kind::Unreachable, "{e}");
        assert!(e.message().contains("does not know who we are"), "{e}");
        assert!(e.message().ends_with("; nothing was deleted") && e.hint_text().is_some(), "{e:?}");
        let (last, before) = codes.split_last().unwrap();
        assert!(*last == 401 && before.iter().all(|c| *c == 200), "{codes:?}");
        // Who it is, pods, attachments, and the first page of the volumes.
        before.len() >= 4
    });
    assert!(struck, "it never was in the middle");
    lab.assert_whole("j-orphan");
    pvs.iter().for_each(|o| kube.delete(o));
}

/// A scan whose token is good for so long, and which gets the second page of the volumes only after that; with the codes of
/// the real server's answers.
fn scan_with_a_token_for(seconds: i64, kube: &Arc<Kube>, lab: &Lab) -> (Error, Vec<u16>) {
    // A minute more is allowed for clocks that differ, and that a token was good is remembered for ten seconds.
    let end = Timestamp::now().as_second() + seconds - 60;
    let path = kube.kubeconfig(lab.node.dir.path(), "short", &kube.token_until("zerofs", "zerofs-gc", end));
    let client = kube.run(async |_| kube::Client::try_from(read(&path).await).unwrap());
    let codes = Arc::new(Mutex::new(Vec::new()));
    let (noted, kube_there) = (codes.clone(), Arc::downgrade(kube));
    let server = Script::new(move |request| {
        let kube = kube_there.upgrade()?;
        let second = request.path.contains("/persistentvolumes") && request.path.contains("continue=");
        while second && Timestamp::now().as_second() < end + 60 + 12 {
            std::thread::sleep(Duration::from_millis(200));
        }
        let (status, body) = forward(&kube, &client, request);
        noted.lock().unwrap().push(status);
        pass(status, &body)
    });
    let path = plain_kubeconfig(server.address, lab.node.dir.path(), "between");
    let config = kube.run(async |_| read(&path).await);
    let patient = Duration::from_secs(seconds as u64 + 120);
    let witness =
        ClusterWitness::new(Cluster::from_config("between", config).unwrap().paged(2).patient(patient));
    let witnesses: [&dyn Witness; 1] = [&witness];
    let e = lab.collector(&witnesses).scan().unwrap_err();
    let codes = codes.lock().unwrap().clone();
    (e, codes)
}

/// The pod of a driver or a collector: the variables and files that a kubelet gives it. It has mounts of its own.
fn in_pod(kube: &Kube, at: std::net::SocketAddr, node: &Node, token: &str, words: &[&str]) -> Command {
    let secrets = node.dir.join(format!("serviceaccount-{}", jiff::Timestamp::now().as_nanosecond()));
    fs::create_dir(&secrets).unwrap();
    for (name, text) in [("token", token), ("ca.crt", &kube.certificate()), ("namespace", "zerofs")] {
        fs::write(secrets.join(name), text).unwrap();
    }
    let script = format!(
        "mount -t tmpfs pod /run && mkdir -p /run/secrets/kubernetes.io && mkdir -p '{run}' && \
         ln -s '{secrets}' /run/secrets/kubernetes.io/serviceaccount && exec \"$@\"",
        run = node.run_root().display(),
        secrets = secrets.display()
    );
    let mut command = node.wrapped(&["unshare", "--mount", "sh", "-c", &script, "sh"], words);
    command
        .env("KUBERNETES_SERVICE_HOST", at.ip().to_string())
        .env("KUBERNETES_SERVICE_PORT", at.port().to_string());
    command
}

#[test]
fn root_a_driver_in_a_pod_makes_volumes_of_its_cluster_and_the_collector_knows_them() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let account = ("zerofs", "zerofs-csi-controller");
    let (namespace, rest): (Vec<Value>, Vec<Value>) =
        manifest("csi-rbac.yaml").into_iter().partition(|o| o["kind"] == "Namespace");
    kube.apply(&namespace[0], false).unwrap();
    let (accounts, rights): (Vec<Value>, Vec<Value>) =
        rest.into_iter().partition(|o| o["kind"] == "ServiceAccount");
    kube.apply(&accounts[0], false).unwrap();
    let token = kube.token(account.0, account.1);
    let proxy = FaultProxy::start(kube.address());
    let url = lab.url.to_string();
    let serve = |more: &[&str]| {
        let words = ["--role", "controller", "--storage-url", &url, "-vv"];
        let (words, socket) = support::csi::words(&lab.node, &[&words[..], more].concat());
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Driver::spawn(in_pod(&kube, proxy.address(), &lab.node, &token, &words), socket, &lab.node)
    };
    let driver = serve(&[]);
    let client = driver.client();
    let create = |name: &str| client.create_plain(name, 64 << 20, &[("deleteDataOnPVCDelete", "true")]);

    // Who may not ask makes nothing, and is told what to do about it. Neither does who gets no answer.
    refused(
        create("k-early"),
        Code::Unavailable,
        &["which cluster", "forbidden", "csi-rbac.yaml", "--cluster-id"],
    );
    for right in &rights {
        kube.apply(right, false).unwrap();
    }
    proxy.set(Mode::Refuse);
    refused(create("k-early"), Code::Unavailable, &["which cluster", "no whole answer", "--cluster-id"]);
    assert!(client.list(0, "").unwrap().entries.is_empty(), "a volume of no cluster was made");
    proxy.set(Mode::Pass);
    // Rights take a moment to get around.
    support::wait_until("the role is known", Duration::from_secs(60), || create("k-pv").is_ok());
    // Once it is known, nobody needs to be asked.
    proxy.set(Mode::Refuse);
    create("k-orphan").unwrap();
    for name in ["k-pv", "k-orphan"] {
        assert_eq!(lab.record(name).unwrap().cluster, Some(kube.identity()), "{name}");
    }
    let log = driver.log();
    assert!(log.contains(&kube.identity()) && !log.contains(&token), "a token is no word for a log");
    assert!(driver.stop().success());

    // With a name for it, or none, nobody is asked.
    for (id, cluster) in [("none", None), ("c-1", Some("c-1"))] {
        let driver = serve(&["--cluster-id", id]);
        let name = format!("k-{id}");
        driver.client().create_plain(&name, 64 << 20, &[]).unwrap();
        assert_eq!(lab.record(&name).unwrap().cluster.as_deref(), cluster);
        assert!(driver.stop().success());
    }
    proxy.set(Mode::Pass);

    // The collector, in a pod of its own, sees whose they are.
    let collectors = collectors_token(&kube);
    let live = pv("k-some-name", "k-pv", "Bound");
    kube.create(&live);
    let scan = ["gc-s3", "scan", "--storage-url", &url, "--min-age", "0s", "-o", "json"];
    let mut found = BTreeMap::new();
    support::wait_until("the collector may look", Duration::from_secs(60), || {
        let answer = Answer::of(&mut in_pod(&kube, kube.address(), &lab.node, &collectors, &scan));
        if answer.code == Some(0) {
            for volume in answer.json()["volumes"].as_array().unwrap() {
                let text = |key: &str| volume[key].as_str().unwrap().to_owned();
                found.insert(text("volume"), text("verdict"));
            }
        }
        answer.code == Some(0)
    });
    let expected = [("k-pv", "live"), ("k-orphan", "orphan"), ("k-none", "retained"), ("k-c-1", "unknown")];
    assert_verdicts(&found, &expected);
    kube.delete(&live);
}

#[test]
fn root_a_network_that_fails_deletes_nothing() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let pvs = marked(&kube, &lab, "g");
    let proxy = FaultProxy::start(kube.address());
    let path = kube.kubeconfig_at(proxy.address(), lab.node.dir.path(), "far", kube.admin_token());
    let config = kube.run(async |_| read(&path).await);
    assert_eq!(lab.verdicts(&[&path], &[])["g-orphan"], "orphan");
    proxy.set(Mode::Refuse);
    lab.run(&[&path], &sweep()).expect_error(20, &["Kubernetes context far"]);
    proxy.set(Mode::Stall);
    let cluster = Cluster::from_config("far", config.clone()).unwrap().patient(Duration::from_secs(3));
    let witness = ClusterWitness::new(cluster);
    let witnesses: [&dyn Witness; 1] = [&witness];
    let e = lab.collector(&witnesses).scan().unwrap_err();
    assert!(e.kind() == Kind::Unreachable && e.message().contains("no answer within"), "{e}");
    // It fails between the scan and the last look: the plan is made, and nothing is begun.
    proxy.set(Mode::Pass);
    let witness = ClusterWitness::new(Cluster::from_config("far", config).unwrap());
    let witnesses: [&dyn Witness; 1] = [&witness];
    let collector = lab.collector(&witnesses);
    let scan = collector.scan().unwrap();
    let plan = collector.plan_sweep(&scan).unwrap();
    assert_eq!(plan.lines.len(), 1);
    proxy.set(Mode::Refuse);
    let e = collector.sweep(&scan, &plan).unwrap_err();
    assert_eq!(e.kind(), Kind::Unreachable, "{e}");
    assert!(e.message().ends_with("; nothing was deleted"), "{e}");
    lab.assert_whole("g-orphan");
    // Somebody else at the same address: a certificate that is not the cluster's.
    let stranger = Script::new(|_| answer(200, "{}"));
    let path = kube.kubeconfig_at(stranger.address, lab.node.dir.path(), "stranger", kube.admin_token());
    lab.run(&[&path], &sweep()).expect_error(20, &["stranger"]);
    lab.assert_whole("g-orphan");
    proxy.set(Mode::Pass);
    assert_eq!(collector.sweep(&scan, &plan).unwrap().volumes.len(), 1);
    lab.assert_gone("g-orphan");
    pvs.iter().for_each(|o| kube.delete(o));
}

#[test]
fn root_clusters_that_share_a_bucket_are_all_asked_or_left_alone() {
    let (east, lab) = (Kube::shared(), Lab::new());
    let west = Kube::start();
    let (here, there) = (east.identity(), west.identity());
    assert_ne!(here, there);
    let folder = lab.node.dir.path();
    let proxy = FaultProxy::start(west.address());
    let configs = [
        east.kubeconfig(folder, "east", &collectors_token(&east)),
        west.kubeconfig_at(proxy.address(), folder, "west", &collectors_token(&west)),
    ];
    let both: Vec<&Path> = configs.iter().map(PathBuf::as_path).collect();
    let pv_east = pv("h-east", "h-east", "Bound");
    east.create(&pv_east);
    for (name, cluster) in
        [("h-east", &here), ("h-east-orphan", &here), ("h-west", &there), ("h-west-orphan", &there)]
    {
        lab.volume(name, Some(cluster));
    }
    let only_east = lab.verdicts(&both, &["--context", "east"]);
    assert_verdicts(
        &only_east,
        &[
            ("h-east", "live"),
            ("h-east-orphan", "orphan"),
            ("h-west", "unknown"),
            ("h-west-orphan", "unknown"),
        ],
    );
    let asked = ["--context", "east", "--context", "west"];
    let with = |words: Vec<&'static str>| [&words[..], &asked[..]].concat();
    // In the west nothing at all refers to any volume: more likely a mistake than the truth.
    lab.run(&both, &with(mark())).expect_error(1, &[&there, "nothing refers"]);
    let pv_west = pv("h-west", "h-west", "Bound");
    west.create(&pv_west);
    // Out of reach, the west stops everything.
    proxy.set(Mode::Refuse);
    lab.run(&both, &with(mark())).expect_error(20, &["Kubernetes context west"]);
    assert!(lab.record("h-east-orphan").unwrap().mark().is_none());
    proxy.set(Mode::Pass);
    lab.run(&both, &with(mark())).expect_code(0);
    proxy.set(Mode::Refuse);
    lab.run(&both, &with(sweep())).expect_error(20, &["Kubernetes context west"]);
    ["h-east", "h-east-orphan", "h-west", "h-west-orphan"].iter().for_each(|v| lab.assert_whole(v));
    // A marked volume of a cluster that is not asked is left alone, and keeps its mark.
    lab.run(&both, &[&sweep()[..], &["--context", "east"]].concat()).expect_code(0);
    lab.assert_gone("h-east-orphan");
    ["h-east", "h-west", "h-west-orphan"].iter().for_each(|v| lab.assert_whole(v));
    assert!(lab.record("h-west-orphan").unwrap().mark().is_some());
    proxy.set(Mode::Pass);
    lab.run(&both, &with(sweep())).expect_code(0);
    lab.assert_gone("h-west-orphan");
    ["h-east", "h-west"].iter().for_each(|v| lab.assert_whole(v));
    east.delete(&pv_east);
}

#[test]
fn root_the_manifests_are_what_a_real_server_takes_and_their_commands_run() {
    let (kube, lab) = (Kube::shared(), Lab::new());
    let token = collectors_token(&kube);
    let cron = manifest("gc-cronjob.yaml");
    for object in manifest("gc-rbac.yaml").iter().chain(&manifest("csi-rbac.yaml")).chain(&cron) {
        kube.apply(object, true).unwrap_or_else(|e| panic!("{object:#}: {e}"));
    }
    // A word that no server knows is an error here, so those above have none.
    let mut wrong = cron.iter().find(|o| o["kind"] == "CronJob").unwrap().clone();
    wrong["spec"]["jobTemplate"]["spec"]["backofLimit"] = 1.into();
    assert!(kube.apply(&wrong, true).is_err());

    // The commands of the job, one after the other, as the kubelet runs them: with the config from its file.
    let job = cron.iter().find(|o| o["kind"] == "CronJob").unwrap();
    let pod = &job["spec"]["jobTemplate"]["spec"]["template"]["spec"];
    assert_eq!(pod["serviceAccountName"], "zerofs-gc");
    let data =
        cron.iter().find(|o| o["kind"] == "ConfigMap").unwrap()["data"]["config.yaml"].as_str().unwrap();
    assert!(data.contains("storageURL: s3://zerofs"), "{data}");
    let config = lab.node.dir.join("config.yaml");
    fs::write(&config, data.replace("s3://zerofs", &lab.url.to_string())).unwrap();
    let kubeconfig = kube.kubeconfig(lab.node.dir.path(), "pod", &token);
    let live = pv("i-live", "i-live", "Bound");
    kube.create(&live);
    lab.volume("i-live", Some(&kube.identity()));
    let containers: Vec<Value> =
        ["initContainers", "containers"].iter().flat_map(|c| pod[*c].as_array().unwrap().clone()).collect();
    let names: Vec<&str> = containers.iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["scan", "mark", "sweep"]);
    let metrics = lab.node.dir.join("metrics");
    fs::create_dir(&metrics).unwrap();
    for container in &containers {
        let words: Vec<String> = container["args"]
            .as_array()
            .unwrap()
            .iter()
            .map(|w| w.as_str().unwrap().replace("/etc/zerofs-gc/config.yaml", config.to_str().unwrap()))
            .map(|w| w.replace("/metrics/", &format!("{}/", metrics.display())))
            .collect();
        Answer::of(lab.node.command(&words).env("KUBECONFIG", &kubeconfig)).expect_code(0);
    }
    lab.assert_whole("i-live");
    for step in names {
        let text = fs::read_to_string(metrics.join(format!("zerofs-gc-{step}.prom"))).unwrap();
        let line =
            format!("zerofs_gc_volumes{{command=\"{step}\",store=\"{}\",verdict=\"live\"}} 1", lab.url);
        assert!(text.lines().any(|l| l == line), "{text}");
    }
    kube.delete(&live);
}
