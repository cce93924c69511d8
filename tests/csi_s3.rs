//! Two nodes and a controller, each a driver with folders of its own, and one bucket (moto): a volume is on one node at a
//! time, moves with its data, and what comes late from the node that had it changes nothing. And readiness while the store is
//! away.

mod support;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use support::cli::{Node, assert_holds, pattern, write_durably};
use support::csi::{Client, Driver, Mode, mount, refused};
use support::moto::Moto;
use support::proxy::{self, FaultProxy};
use support::wait_until;
use tonic::Code;

const MIB: i64 = 1 << 20;
const RWO: Mode = Mode::SingleNodeWriter;
const LIMIT: Duration = Duration::from_secs(120);

/// A bucket behind a proxy.
struct Bucket {
    proxy: FaultProxy,
    moto: Moto,
    // The last to go: it sees what the others leave.
    node: Node,
}

impl Bucket {
    fn new() -> Bucket {
        let node = Node::new();
        let moto = Moto::start(node.dir.path());
        moto.create_bucket("vols");
        let proxy = FaultProxy::start(moto.address());
        Bucket { node, moto, proxy }
    }

    /// The settings, as an installation has them: a ConfigMap's keys, and Secrets.
    fn settings(&self) -> (String, String) {
        let config = self.node.dir.join("config.yaml");
        let text = format!(
            "storageURL: s3://vols/csi\nawsEndpoint: http://{}\nawsAllowHTTP: \"true\"\nawsDefaultRegion: us-east-1\n\
             awsCredentialsSecretName: aws\nencryptionPasswordSecretName: password\ncacheMemorySizeGB: \"0.25\"\n",
            self.proxy.address()
        );
        fs::write(&config, text).unwrap();
        let secrets = self.node.dir.join("secrets.yaml");
        let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: aws}\nstringData: {AWS_ACCESS_KEY_ID: test, \
                    AWS_SECRET_ACCESS_KEY: test}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: password}\n\
                    stringData: {password: \"a $tr\\\"ange \\\\ one\"}\n";
        fs::write(&secrets, text).unwrap();
        (config.display().to_string(), secrets.display().to_string())
    }

    /// Starts a driver of this role on a machine of its own.
    fn driver(&self, node: &Node, id: &str, role: &str) -> Driver {
        let (config, secrets) = self.settings();
        let words = ["--node-id", id, "--role", role, "--config", &config, "--secret", &secrets];
        Driver::start(node, &words)
    }
}

/// One machine with a driver on it, and a kubelet's folders.
struct Machine {
    node: Node,
    driver: Driver,
    client: Client,
    staging: PathBuf,
    pod: PathBuf,
}

impl Machine {
    fn new(bucket: &Bucket, id: &str) -> Machine {
        let node = Node::new();
        let driver = bucket.driver(&node, id, "node");
        let (client, staging) = (driver.client(), node.dir.join("kubelet/staging"));
        let pod = node.dir.join("kubelet/pods/a");
        for folder in [&staging, &node.dir.join("kubelet/pods")] {
            fs::create_dir_all(folder).unwrap();
        }
        Machine { node, driver, client, staging, pod }
    }

    fn up(&self) {
        self.client.stage("v", &self.staging, mount(RWO)).unwrap();
        self.client.publish("v", &self.staging, &self.pod, mount(RWO), false).unwrap();
    }

    /// As a kubelet does: a flush to a slow store takes what it takes.
    fn down(&self) {
        let patiently = |what: &str, call: &dyn Fn() -> Result<(), tonic::Status>| {
            wait_until(what, 3 * LIMIT, || {
                let answer = call();
                let wait = [Code::Unavailable, Code::Aborted, Code::DeadlineExceeded];
                assert!(answer.as_ref().err().is_none_or(|s| wait.contains(&s.code())), "{what}: {answer:?}");
                answer.is_ok()
            });
        };
        patiently("it is unpublished", &|| self.client.unpublish("v", &self.pod));
        patiently("it is unstaged", &|| self.client.unstage("v", &self.staging));
    }

    fn end(self, when: &str) {
        assert!(self.driver.stop().success());
        self.node.assert_nothing_left(when);
    }
}

/// Writes, makes durable and reads back until told to stop; every error counts.
fn busy(file: PathBuf, stop: Arc<AtomicBool>) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut round = 1;
        while !stop.load(Ordering::Relaxed) {
            let bytes = pattern(round, 128 * 1024);
            write_durably(&file, &bytes);
            assert_holds(&file, &bytes, "while it is written");
            round += 1;
        }
        round - 1
    })
}

#[test]
fn root_a_volume_moves_between_nodes_and_late_calls_do_not_disturb_its_next_one() {
    let bucket = Bucket::new();
    let central = Node::new();
    let controller = bucket.driver(&central, "controller", "controller");
    let client = controller.client();
    let (a, b) = (Machine::new(&bucket, "n1"), Machine::new(&bucket, "n2"));
    client.create_plain("v", 64 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();

    client.controller_publish("v", "n1", mount(RWO), false).unwrap();
    a.up();
    let bytes = pattern(41, 3 << 20);
    write_durably(&a.pod.join("data"), &bytes);
    // One node at a time, and it is named.
    refused(client.controller_publish("v", "n2", mount(RWO), false), Code::FailedPrecondition, &["n1"]);
    refused(b.client.stage("v", &b.staging, mount(RWO)), Code::FailedPrecondition, &["n1"]);
    b.node.assert_no_files_left("after a stage that was refused");

    a.down();
    client.controller_unpublish("v", "n1").unwrap();
    client.controller_publish("v", "n2", mount(RWO), false).unwrap();
    b.up();
    assert_holds(&b.pod.join("data"), &bytes, "on the next node");

    let stop = Arc::new(AtomicBool::new(false));
    let work = busy(b.pod.join("more"), stop.clone());
    // Everything that the first node can still ask for, late and twice.
    for _ in 0..2 {
        a.client.unpublish("v", &a.pod).unwrap();
        a.client.unstage("v", &a.staging).unwrap();
        client.controller_unpublish("v", "n1").unwrap();
        refused(a.client.stage("v", &a.staging, mount(RWO)), Code::FailedPrecondition, &["n2"]);
    }
    refused(client.delete("v"), Code::FailedPrecondition, &["n2"]);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(client.get("v").unwrap().status.unwrap().published_node_ids, ["n2"]);
    assert!(!b.client.stats("v", &b.pod).unwrap().volume_condition.unwrap().abnormal);
    stop.store(true, Ordering::Relaxed);
    assert!(work.join().expect("no I/O failed") > 0);

    b.down();
    client.controller_unpublish("v", "n2").unwrap();
    client.delete("v").unwrap();
    assert_eq!(bucket.moto.keys("vols", "csi/v/"), Vec::<String>::new());
    assert!(client.list(0, "").unwrap().entries.is_empty());
    a.end("on the first node");
    b.end("on the second node");
    assert!(controller.stop().success());
}

#[test]
fn root_a_lost_nodes_volume_is_taken_over_and_what_it_does_when_it_is_back_changes_nothing() {
    let bucket = Bucket::new();
    let central = Node::new();
    let controller = bucket.driver(&central, "controller", "controller");
    let client = controller.client();
    let (a, b) = (Machine::new(&bucket, "n1"), Machine::new(&bucket, "n2"));
    client.create_plain("v", 64 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    client.controller_publish("v", "n1", mount(RWO), false).unwrap();
    a.up();
    let bytes = pattern(42, 1 << 20);
    write_durably(&a.pod.join("data"), &bytes);
    // The orchestrator has given the node up: it takes the volume away without an unstage. The node lives on.
    client.controller_unpublish("v", "n1").unwrap();
    client.controller_publish("v", "n2", mount(RWO), false).unwrap();
    b.up();
    assert_holds(&b.pod.join("data"), &bytes, "on the next node");
    let stop = Arc::new(AtomicBool::new(false));
    let work = busy(b.pod.join("more"), stop.clone());
    // What the lost node still writes fails, and it learns why.
    let lost = a.pod.join("too-late");
    wait_until("the lost node is fenced", LIMIT, || {
        let write = fs::File::create(&lost).and_then(|f| {
            std::io::Write::write_all(&mut &f, b"too late")?;
            f.sync_all()
        });
        let condition = a.client.stats("v", &a.pod).map(|s| s.volume_condition.expect("it has one"));
        write.is_err() && condition.is_ok_and(|c| c.abnormal && c.message.contains("another node"))
    });
    a.down();
    client.controller_unpublish("v", "n1").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(client.get("v").unwrap().status.unwrap().published_node_ids, ["n2"]);
    stop.store(true, Ordering::Relaxed);
    assert!(work.join().expect("no I/O failed") > 0);
    assert!(!b.pod.join("too-late").exists());
    assert_holds(&b.pod.join("data"), &bytes, "in the end");
    b.down();
    client.controller_unpublish("v", "n2").unwrap();
    client.delete("v").unwrap();
    a.end("on the lost node");
    b.end("on the second node");
    assert!(controller.stop().success());
}

#[test]
fn root_readiness_is_false_while_the_store_is_away_and_true_again_after() {
    let bucket = Bucket::new();
    let node = Node::new();
    let driver = bucket.driver(&node, "n1", "all");
    let ask = |path: &str| {
        let answer = support::http::request(driver.metrics(), "GET", path, b"", LIMIT).unwrap();
        (answer.status, String::from_utf8(answer.body).unwrap())
    };
    let client = driver.client();
    assert_eq!(ask("/readyz").0, 200);
    assert_eq!(client.probe().unwrap().ready, Some(true));
    // One that is found missing at once, and one that is waited for.
    for fault in [proxy::Mode::Refuse, proxy::Mode::Stall] {
        bucket.proxy.set(fault);
        let mut why = String::new();
        wait_until("the store is missed", LIMIT, || {
            let (status, text) = ask("/readyz");
            why = text;
            status == 503
        });
        assert!(why.contains("http://") || why.contains("store"), "{why}");
        if fault == proxy::Mode::Refuse {
            let status = client.probe().expect_err("it is not ready");
            assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
            assert!(status.message().contains("hint: "), "{status:?}");
        }
        // The process itself is well: it must not be restarted for this.
        assert_eq!(ask("/healthz").0, 200);
        bucket.proxy.set(proxy::Mode::Pass);
        wait_until("the store is found again", LIMIT, || ask("/readyz").0 == 200);
        assert_eq!(client.probe().unwrap().ready, Some(true));
    }
    assert!(driver.stop().success());
    node.assert_nothing_left("after readiness");
}
