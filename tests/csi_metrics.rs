//! What the driver tells of itself: OpenMetrics that a strict reader understands, with every series there from the start,
//! labels from closed lists only, and counters that count.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use support::cli::{Node, Victim, write_durably};
use support::csi::{Driver, Mode, mount, refused};
use support::wait_until;
use tonic::Code;
use zerofsctl::csi::Rpc;
use zerofsctl::csi::metrics::stages;

const MIB: i64 = 1 << 20;
const RWO: Mode = Mode::SingleNodeWriter;

/// One sample's name and labels.
type Series = (String, BTreeMap<String, String>);

/// A scrape, read as the OpenMetrics text format says.
struct Scrape {
    kinds: BTreeMap<String, String>,
    samples: BTreeMap<Series, f64>,
}

impl Scrape {
    #[track_caller]
    fn of(driver: &Driver) -> Scrape {
        let limit = Duration::from_secs(60);
        let answer = support::http::request(driver.metrics(), "GET", "/metrics", b"", limit).unwrap();
        assert_eq!(answer.status, 200);
        Scrape::parse(&String::from_utf8(answer.body).unwrap())
    }

    /// Whatever the format forbids is a failure.
    #[track_caller]
    fn parse(text: &str) -> Scrape {
        let text = text.strip_suffix("# EOF\n").expect("it ends with the mark of the end");
        let (mut kinds, mut units, mut samples) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut family = String::new();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (what, name) = (words.next().unwrap(), words.next().expect("a name").to_owned());
                let rest = words.next().expect("a text").to_owned();
                match what {
                    "TYPE" => assert!(kinds.insert(name.clone(), rest).is_none(), "twice: {line}"),
                    "UNIT" => assert!(units.insert(name.clone(), rest).is_none(), "twice: {line}"),
                    "HELP" => assert!(rest.len() > 5, "{line}"),
                    _ => panic!("{line}"),
                }
                family = name;
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels = labels.strip_suffix('}').unwrap_or_else(|| panic!("{line}"));
            let labels: BTreeMap<String, String> = labels
                .split(',')
                .filter(|l| !l.is_empty())
                .map(|label| {
                    let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
                    (key.to_owned(), value.strip_suffix('"').unwrap_or_else(|| panic!("{line}")).to_owned())
                })
                .collect();
            let suffix = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not in {family}"));
            let suffixes: &[&str] = match kinds.get(&family).map(String::as_str) {
                Some("counter") => &["_total"],
                Some("gauge") => &[""],
                Some("histogram") => &["_bucket", "_count", "_sum"],
                other => panic!("{family} is a {other:?}"),
            };
            assert!(suffixes.contains(&suffix), "{line}");
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(value >= 0.0, "{line}");
            assert!(samples.insert((name.to_owned(), labels), value).is_none(), "twice: {line}");
        }
        for (name, unit) in units {
            assert!(name.ends_with(&format!("_{unit}")), "{name} is in {unit}");
        }
        let scrape = Scrape { kinds, samples };
        scrape.check_histograms();
        scrape
    }

    fn check_histograms(&self) {
        let mut buckets: BTreeMap<Series, Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), value) in &self.samples {
            let Some(family) = name.strip_suffix("_bucket") else { continue };
            let mut labels = labels.clone();
            let bound = labels.remove("le").expect("a bucket has a bound").replace("+Inf", "inf");
            buckets.entry((family.to_owned(), labels)).or_default().push((bound.parse().unwrap(), *value));
        }
        assert!(!buckets.is_empty());
        for ((family, labels), mut bounds) in buckets {
            bounds.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(bounds.windows(2).all(|w| w[0].1 <= w[1].1), "{family} {labels:?}: {bounds:?}");
            let (last, all) = *bounds.last().unwrap();
            assert_eq!(last, f64::INFINITY);
            // Up to what a slow store may need.
            assert!(bounds.iter().any(|(bound, _)| *bound == 300.0), "{bounds:?}");
            assert_eq!(self.samples[&(format!("{family}_count"), labels)], all);
        }
    }

    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let series = (format!("zerofs_csi_{name}"), labels);
        *self.samples.get(&series).unwrap_or_else(|| panic!("no {series:?}"))
    }

    fn series(&self) -> BTreeSet<&Series> {
        self.samples.keys().filter(|(name, _)| !name.contains("nbd_devices")).collect()
    }
}

#[test]
fn root_every_series_is_there_from_the_start_and_counts() {
    let node = Node::new();
    let driver = Driver::start(&node, &[]);
    let before = Scrape::of(&driver);
    for (name, kind) in [
        ("node_operation_seconds", "histogram"),
        ("node_errors", "counter"),
        ("in_flight_operations", "gauge"),
        ("attached_volumes", "gauge"),
        ("unwell_volumes", "gauge"),
        ("zerofs_restarts", "counter"),
        ("reconnects", "counter"),
        ("io_stall_seconds", "counter"),
        ("recovered_volumes", "counter"),
    ] {
        assert_eq!(before.kinds.get(&format!("zerofs_csi_{name}")).map(String::as_str), Some(kind), "{name}");
    }
    assert!(before.kinds.keys().all(|name| name.starts_with("zerofs_csi_")), "{:?}", before.kinds);
    // Each call with each of its stages, and nothing else.
    let mut expected = BTreeSet::new();
    for rpc in Rpc::MEASURED {
        for stage in stages(rpc).iter().chain(&["total", "other"]) {
            expected.insert((rpc.name().to_owned(), (*stage).to_owned()));
        }
    }
    for name in ["node_operation_seconds_count", "node_errors_total"] {
        let name = format!("zerofs_csi_{name}");
        let found: BTreeSet<_> = before
            .samples
            .keys()
            .filter(|(n, _)| *n == name)
            .map(|(_, l)| {
                assert_eq!(l.len(), 2, "{l:?}");
                (l["operation"].clone(), l["stage"].clone())
            })
            .collect();
        assert_eq!(found, expected, "{name}");
    }
    for name in
        ["zerofs_restarts_total", "recovered_volumes_total", "io_stall_seconds_total", "attached_volumes"]
    {
        assert_eq!(before.value(name, &[]), 0.0, "{name}");
    }

    let client = driver.client();
    client.create_plain("v", 64 * MIB, &[("deleteDataOnPVCDelete", "true")]).unwrap();
    let (staging, pod) = (node.dir.join("kubelet/staging"), node.dir.join("kubelet/pod"));
    fs::create_dir_all(&staging).unwrap();
    client.stage("v", &staging, mount(RWO)).unwrap();
    client.publish("v", &staging, &pod, mount(RWO), false).unwrap();
    // Names of volumes and wrong words of callers must become no labels.
    refused(client.stage("nobody", &staging, mount(RWO)), Code::NotFound, &["nobody"]);
    refused(client.unpublish("../v", &pod), Code::InvalidArgument, &[]);
    client.stats("v", &pod).unwrap();
    write_durably(&pod.join("data"), b"kept");
    assert!(node.kill(Victim::Zerofs));
    write_durably(&pod.join("data"), b"kept, too");
    let mut after = Scrape::of(&driver);
    wait_until("the driver has looked after its volumes", Duration::from_secs(120), || {
        after = Scrape::of(&driver);
        after.value("attached_volumes", &[]) == 1.0 && after.value("zerofs_restarts_total", &[]) >= 1.0
    });
    assert_eq!(after.series(), before.series(), "no series comes or goes");
    let of = |operation, stage| [("operation", operation), ("stage", stage)];
    for (operation, stage, times) in [
        ("CreateVolume", "total", 1.0),
        ("NodeStageVolume", "total", 2.0),
        ("NodeStageVolume", "mount", 1.0),
        ("NodeStageVolume", "format", 1.0),
        ("NodePublishVolume", "bind", 1.0),
        ("NodeGetVolumeStats", "total", 1.0),
        ("NodeUnpublishVolume", "total", 1.0),
    ] {
        let count = after.value("node_operation_seconds_count", &of(operation, stage));
        assert_eq!(count, times, "{operation} {stage}");
        assert!(
            after.value("node_operation_seconds_sum", &of(operation, stage)) > 0.0,
            "{operation} {stage}"
        );
    }
    for (operation, times) in
        [("NodeStageVolume", 1.0), ("NodeUnpublishVolume", 1.0), ("NodePublishVolume", 0.0)]
    {
        assert_eq!(after.value("node_errors_total", &of(operation, "total")), times, "{operation}");
    }
    assert!(after.value("io_stall_seconds_total", &[]) > 0.0);
    assert_eq!(after.value("in_flight_operations", &[]), 0.0);

    client.unpublish("v", &pod).unwrap();
    client.unstage("v", &staging).unwrap();
    client.delete("v").unwrap();
    let end = Scrape::of(&driver);
    assert_eq!(end.series(), before.series());
    assert_eq!(end.value("node_operation_seconds_count", &of("NodeUnstageVolume", "stop")), 1.0);
    assert!(driver.stop().success());
    node.assert_nothing_left("after the metrics");
}
