//! csi-sanity, the conformance tests of the CSI authors, against the built program on the real system.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::cli::Node;
use super::csi::Driver;
use super::{tools_dir, wait_until};

/// Against hangs: the specs take a minute or two together, on a busy machine several.
const LIMIT: Duration = Duration::from_secs(1500);

/// So many specs passed when this was written; fewer mean that something is not advertised any more, or not run.
const LEAST: usize = 65;

/// The capabilities that the driver does not have, as the skips of csi-sanity call them. Any other skip is a failure.
const NOT_OFFERED: [&str; 8] = [
    "Snapshot not supported",
    "ListSnapshots not supported",
    "CreateSnapshot not supported",
    "DeleteSnapshot not supported",
    "GroupControllerService not supported",
    "VolumeGroupSnapshots not supported",
    // A copy would be made from a checkpoint, which is a snapshot.
    "Volume Cloning not supported",
    // A bucket has no size.
    "GetCapacity not supported",
];

/// The most volumes that the driver is told to take: one spec publishes them all and one more.
const MOST_VOLUMES: &str = "3";

/// Passes on what csi-sanity and the driver say to each other, each connection only after this long. csi-sanity waits for its
/// connection to become ready, and waits for ever when it was ready at once.
const BEFORE: Duration = Duration::from_secs(2);

/// Listens at `at` for as long as the test runs.
fn relay(at: &Path, driver: &Path) {
    let listener = UnixListener::bind(at).expect("the test's folder can be written");
    let driver = driver.to_owned();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            std::thread::sleep(BEFORE);
            let Ok(far) = UnixStream::connect(&driver) else { continue };
            for (mut from, mut to) in [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))]
                .into_iter()
                .map(|(a, b)| (a.expect("a socket can be cloned"), b.expect("a socket can be cloned")))
            {
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
}

/// One spec of the report.
#[derive(Debug, PartialEq, Eq)]
struct Spec {
    name: String,
    status: String,
    /// Why it was skipped or how it failed.
    message: String,
}

/// Runs every spec against a driver of its own, with volumes that are used as `access` (`mount` or `block`) says; `more`
/// are words for the driver, such as `--transport nbd`. No spec is left out.
#[track_caller]
pub fn all_specs(access: &str, more: &[&str]) {
    let program = tools_dir().join("csi-sanity-5.4.0/csi-sanity");
    assert!(program.is_file(), "{} is not there; scripts/setup test installs it", program.display());
    let node = Node::new();
    let driver = Driver::start(&node, &[&["--max-volumes", MOST_VOLUMES], more].concat());
    let file = |name: &str, text: &str| {
        let file = node.dir.join(name);
        fs::write(&file, text).expect("the test's folder can be written");
        file.display().to_string()
    };
    let parameters = file("parameters.yaml", "deleteDataOnPVCDelete: \"true\"\nfilesystem: ext4\n");
    let raw = file("raw.yaml", "deleteDataOnPVCDelete: \"true\"\n");
    let mutable = file("mutable.yaml", "cacheMemorySizeGB: \"0.25\"\nrustLog: warn\n");
    let report = node.dir.join("report.xml");
    let socket = node.dir.join("sanity.sock");
    relay(&socket, &driver.socket);
    let words = [
        format!("--csi.endpoint=unix://{}", socket.display()),
        format!("--csi.mountdir={}", node.target("kubelet-mount")),
        format!("--csi.stagingdir={}", node.target("kubelet-staging")),
        format!("--csi.testvolumeaccesstype={access}"),
        // One spec asks for 10 GiB, whatever is said here; nothing of it is allocated.
        "--csi.testvolumesize=67108864".to_owned(),
        "--csi.testvolumeexpandsize=134217728".to_owned(),
        format!("--csi.testvolumeparameters={}", if access == "block" { raw } else { parameters }),
        format!("--csi.testvolumemutableparameters={mutable}"),
        "--csi.testnodevolumeattachlimit=true".to_owned(),
        format!("--ginkgo.junit-report={}", report.display()),
        "--ginkgo.no-color".to_owned(),
    ];
    let log = node.dir.join("sanity.log");
    let out = fs::File::create(&log).expect("the test's folder can be written");
    let mut sanity = Command::new(program)
        .args(words)
        .current_dir(node.dir.path())
        .stdin(Stdio::null())
        .stdout(out.try_clone().expect("a file can be cloned"))
        .stderr(out)
        .spawn()
        .expect("csi-sanity starts");
    let mut ended = None;
    wait_until("csi-sanity ends", LIMIT, || {
        ended = sanity.try_wait().expect("it is our child");
        ended.is_some()
    });
    let said = fs::read_to_string(&log).unwrap_or_default();
    judge(&specs(&fs::read_to_string(&report).unwrap_or_default()), &said);
    assert!(ended.is_some_and(|status| status.success()), "csi-sanity: {ended:?}\n{said}");
    let left = driver.client().list(0, "").expect("the driver lists").entries;
    assert!(left.is_empty(), "csi-sanity deletes what it makes: {left:#?}");
    assert!(driver.stop().success());
    node.assert_nothing_left("after csi-sanity");
    assert_empty(&node.dir.join("kubelet-mount"));
    assert_empty(&node.dir.join("kubelet-staging"));
}

#[track_caller]
fn judge(specs: &[Spec], said: &str) {
    let of = |status: &str| specs.iter().filter(|s| s.status == status).count();
    let passed = of("passed");
    let other: Vec<&Spec> = specs
        .iter()
        .filter(|s| match s.status.as_str() {
            "passed" => false,
            // Left out by csi-sanity's own authors.
            "pending" => false,
            "skipped" => !NOT_OFFERED.iter().any(|why| s.message.contains(why)),
            _ => true,
        })
        .collect();
    assert!(other.is_empty(), "failed, or skipped without need: {other:#?}\n{said}");
    assert!(passed >= LEAST, "only {passed} specs passed, {} were skipped:\n{said}", of("skipped"));
    eprintln!(
        "csi-sanity: {passed} passed, {} skipped, {} pending, of {}",
        of("skipped"),
        of("pending"),
        specs.len()
    );
}

#[track_caller]
fn assert_empty(folder: &Path) {
    let left: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The specs of a JUnit report.
fn specs(report: &str) -> Vec<Spec> {
    let attribute = |tag: &str, name: &str| -> String {
        let start = format!(" {name}=\"");
        let value = tag.split_once(&start).and_then(|(_, rest)| rest.split('"').next());
        value
            .unwrap_or_default()
            .replace("&#34;", "\"")
            .replace("&#39;", "'")
            .replace("&gt;", ">")
            .replace("&amp;", "&")
    };
    report
        .split("<testcase ")
        .skip(1)
        .map(|part| {
            let (tag, body) = part.split_once('>').unwrap_or((part, ""));
            let tag = format!(" {tag}");
            let body = body.split("</testcase>").next().unwrap_or_default();
            // Reporting nodes of ginkgo itself are listed too.
            let message = ["<skipped", "<failure", "<error"]
                .iter()
                .find_map(|kind| body.split_once(kind).map(|(_, rest)| attribute(rest, "message")))
                .unwrap_or_default();
            Spec { name: attribute(&tag, "name"), status: attribute(&tag, "status"), message }
        })
        .filter(|spec| spec.name.starts_with("[It]"))
        .collect()
}

/// What the harness makes of a report; called by its test.
#[track_caller]
pub fn reads_reports() {
    let report = r#"<testsuites tests="3"><testsuite><testcase name="[BeforeSuite]" status="passed" time="0"></testcase>
<testcase name="[It] Node Service &#34;a&#34;" classname="CSI" status="passed" time="0.1"><system-err>&gt; Enter</system-err></testcase>
<testcase name="[It] b" classname="CSI" status="skipped" time="0.1"><skipped message="skipped - Snapshot not supported"></skipped></testcase>
<testcase name="[It] c" classname="CSI" status="failed" time="0.1"><failure message="no" type="failed">x</failure></testcase></testsuite></testsuites>"#;
    let spec = |name: &str, status: &str, message: &str| Spec {
        name: format!("[It] {name}"),
        status: status.into(),
        message: message.into(),
    };
    let expected = [
        spec("Node Service \"a\"", "passed", ""),
        spec("b", "skipped", "skipped - Snapshot not supported"),
        spec("c", "failed", "no"),
    ];
    assert_eq!(specs(report), expected);
    for (specs, why) in [
        (&expected[..], "a failure"),
        (&expected[..2], "too few"),
        (&[spec("d", "skipped", "skipped - NodeExpandVolume not supported")][..], "a needless skip"),
    ] {
        assert!(std::panic::catch_unwind(|| judge(specs, "")).is_err(), "{why}");
    }
}
