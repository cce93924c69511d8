//! What is counted, in OpenMetrics. Labels are from closed lists, and every series is there from the start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::Rpc;
use crate::host::nbd::verdict::Verdict as NbdVerdict;

/// The stage that stands for a whole call.
pub const TOTAL: &str = "total";

/// What is not a step of the call's own plan: its undoing, or the settling of what an earlier one left.
const OTHER: &str = "other";

/// Upper bounds in seconds: an idempotent call takes a millisecond, a flush to a slow store minutes.
const BUCKETS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 300.0];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    operation: &'static str,
    stage: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verdict {
    verdict: &'static str,
}

/// The stages of a call, besides `total` and `other`.
pub const fn stages(rpc: Rpc) -> &'static [&'static str] {
    match rpc {
        Rpc::NodeStageVolume => &[
            "claim",
            "write-config",
            "start",
            "create-disk",
            "replay",
            "connect",
            "probe-signature",
            "format",
            "fsck",
            "mount",
            "link",
            "grow-disk",
            "grow-device",
            "grow-filesystem",
        ],
        Rpc::NodeUnstageVolume => &["unmount", "unlink", "disconnect", "stop", "remove-config", "release"],
        Rpc::NodePublishVolume => &["grant-group", "bind"],
        Rpc::NodeUnpublishVolume => &["unbind"],
        Rpc::NodeExpandVolume => &["grow-disk", "grow-device", "grow-filesystem"],
        _ => &[],
    }
}

fn label(rpc: Rpc, stage: &'static str) -> &'static str {
    if stage == TOTAL || stages(rpc).contains(&stage) { stage } else { OTHER }
}

/// What the keepers of this node said last.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// Times that ZeroFS was started again.
    pub restarts: u64,
    /// Times that the data path was connected again.
    pub reconnects: u64,
    /// Times that an NBD device was given new sockets; all keepers of an attach go on with this count.
    pub handed_over: u64,
    /// Seconds for which I/O waited for ZeroFS.
    pub stalled: f64,
}

/// See the module.
pub struct Metrics {
    registry: Registry,
    seconds: Family<Labels, Histogram, fn() -> Histogram>,
    errors: Family<Labels, Counter>,
    in_flight: Gauge,
    attached: Gauge,
    unwell: Gauge,
    restarts: Counter,
    reconnects: Counter,
    stalled: Counter<f64, AtomicU64>,
    recovered: Counter,
    devices: Family<Verdict, Gauge<i64, AtomicI64>>,
    /// By volume, to count only what is new.
    seen: std::sync::Mutex<BTreeMap<String, Seen>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Everything at zero.
    pub fn new() -> Metrics {
        let m = Metrics {
            registry: Registry::with_prefix("zerofs_csi"),
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            errors: Family::default(),
            in_flight: Gauge::default(),
            attached: Gauge::default(),
            unwell: Gauge::default(),
            restarts: Counter::default(),
            reconnects: Counter::default(),
            stalled: Counter::default(),
            recovered: Counter::default(),
            devices: Family::default(),
            seen: std::sync::Mutex::default(),
        };
        for rpc in Rpc::MEASURED {
            for stage in stages(rpc).iter().chain(&[TOTAL, OTHER]) {
                let labels = Labels { operation: rpc.name(), stage };
                drop(m.seconds.get_or_create(&labels));
                drop(m.errors.get_or_create(&labels));
            }
        }
        for verdict in NbdVerdict::ALL {
            drop(m.devices.get_or_create(&Verdict { verdict: verdict.name() }));
        }
        m.with_names()
    }

    fn with_names(mut self) -> Metrics {
        let r = &mut self.registry;
        r.register_with_unit(
            "node_operation",
            "How long calls and their stages took",
            Unit::Seconds,
            self.seconds.clone(),
        );
        r.register("node_errors", "Calls and stages that failed", self.errors.clone());
        r.register(
            "in_flight_operations",
            "Operations at work or waiting for their turn",
            self.in_flight.clone(),
        );
        r.register("attached_volumes", "Volumes that have a device on this node", self.attached.clone());
        r.register(
            "unwell_volumes",
            "Of these, those whose ZeroFS or keeper is not well",
            self.unwell.clone(),
        );
        r.register("zerofs_restarts", "Times that a ZeroFS was started again", self.restarts.clone());
        r.register("reconnects", "Times that a data path was connected again", self.reconnects.clone());
        r.register_with_unit(
            "io_stall",
            "For how long I/O waited for a ZeroFS that was away",
            Unit::Seconds,
            self.stalled.clone(),
        );
        r.register(
            "recovered_volumes",
            "Volumes that were brought back after their keeper died",
            self.recovered.clone(),
        );
        r.register("nbd_devices", "NBD devices of this node by verdict", self.devices.clone());
        self
    }

    /// A call, or one stage of it, took that long.
    pub fn observe(&self, rpc: Rpc, stage: &'static str, took: Duration) {
        if Rpc::MEASURED.contains(&rpc) {
            let labels = Labels { operation: rpc.name(), stage: label(rpc, stage) };
            self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
        }
    }

    /// It failed.
    pub fn failed(&self, rpc: Rpc, stage: &'static str) {
        if Rpc::MEASURED.contains(&rpc) {
            let labels = Labels { operation: rpc.name(), stage: label(rpc, stage) };
            self.errors.get_or_create(&labels).inc();
        }
    }

    /// What a look at all volumes found: what the keepers of `volumes` said, the names of all that are attached, and how
    /// many of them are not well.
    pub fn looked(&self, volumes: BTreeMap<String, Seen>, attached: &BTreeSet<String>, unwell: usize) {
        self.attached.set(attached.len() as i64);
        self.unwell.set(unwell as i64);
        let mut seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (name, now) in &volumes {
            // A new keeper counts from zero again.
            let before = seen.get(name).copied().unwrap_or_default();
            let new = |now: u64, before: u64| if now >= before { now - before } else { now };
            self.restarts.inc_by(new(now.restarts, before.restarts));
            self.reconnects.inc_by(new(now.reconnects, before.reconnects));
            self.reconnects.inc_by(new(now.handed_over, before.handed_over));
            let stalled =
                if now.stalled >= before.stalled { now.stalled - before.stalled } else { now.stalled };
            self.stalled.inc_by(stalled);
        }
        // What one told that has no keeper at the moment is not forgotten.
        seen.retain(|name, _| attached.contains(name));
        seen.extend(volumes);
    }

    /// The next keeper serves the device of one that was killed, that long after its end was noticed.
    pub fn took_over(&self, paused: Duration) {
        self.recovered.inc();
        self.stalled.inc_by(paused.as_secs_f64());
    }

    /// A volume was brought back.
    pub fn recovered(&self) {
        self.recovered.inc();
    }

    /// What the NBD devices of this node were found to be.
    pub fn nbd_devices(&self, found: impl Iterator<Item = NbdVerdict> + Clone) {
        for verdict in NbdVerdict::ALL {
            let count = found.clone().filter(|v| *v == verdict).count();
            self.devices.get_or_create(&Verdict { verdict: verdict.name() }).set(count as i64);
        }
    }

    /// The text of a scrape.
    pub fn text(&self, in_flight: usize) -> String {
        self.in_flight.set(in_flight as i64);
        let mut text = String::with_capacity(32 * 1024);
        // Writing into a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{AttachSpec, PublishSpec};
    use crate::values::TargetPath;

    #[test]
    fn names_are_those_of_existing_dashboards_and_all_series_exist() {
        let m = Metrics::new();
        m.observe(Rpc::NodeStageVolume, "mount", Duration::from_millis(3));
        m.observe(Rpc::NodeStageVolume, "never heard of", Duration::from_millis(3));
        m.failed(Rpc::NodePublishVolume, TOTAL);
        let text = m.text(2);
        for line in [
            "zerofs_csi_node_operation_seconds_bucket{le=\"300.0\",operation=\"NodeStageVolume\",stage=\"mount\"} 1",
            "zerofs_csi_node_operation_seconds_count{operation=\"NodeStageVolume\",stage=\"other\"} 1",
            "zerofs_csi_node_operation_seconds_count{operation=\"NodeUnstageVolume\",stage=\"total\"} 0",
            "zerofs_csi_node_errors_total{operation=\"NodePublishVolume\",stage=\"total\"} 1",
            "zerofs_csi_node_errors_total{operation=\"NodeStageVolume\",stage=\"format\"} 0",
            "zerofs_csi_in_flight_operations 2",
            "zerofs_csi_attached_volumes 0",
            "zerofs_csi_zerofs_restarts_total 0",
            "zerofs_csi_nbd_devices{verdict=\"ours-leaked\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn every_step_of_a_plan_is_a_stage_of_its_own() {
        let target = TargetPath::new("/a".as_ref(), "/".as_ref()).unwrap();
        let mut spec = AttachSpec::plain("v".parse().unwrap(), target.clone(), "file:///x".into());
        for block in [false, true] {
            spec.block = block;
            for task in spec.plan().tasks {
                assert_eq!(label(Rpc::NodeStageVolume, task.name()), task.name());
            }
        }
        let publish = PublishSpec {
            volume: spec.volume,
            staged: target.clone(),
            target,
            read_only: false,
            block: false,
            alone: false,
            group: Some(1),
        };
        for task in publish.plan().tasks {
            assert_eq!(label(Rpc::NodePublishVolume, task.name()), task.name());
        }
    }

    #[test]
    fn devices_are_counted_by_verdict_and_pauses_of_take_overs_are_stalls() {
        let m = Metrics::new();
        m.nbd_devices([NbdVerdict::Foreign, NbdVerdict::OursInUse, NbdVerdict::Foreign].into_iter());
        m.nbd_devices([NbdVerdict::Foreign].into_iter());
        m.took_over(Duration::from_millis(250));
        let text = m.text(0);
        for line in [
            "zerofs_csi_nbd_devices{verdict=\"foreign\"} 1",
            "zerofs_csi_nbd_devices{verdict=\"ours-in-use\"} 0",
            "zerofs_csi_io_stall_seconds_total 0.25",
            "zerofs_csi_recovered_volumes_total 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_new_keeper_counts_from_zero() {
        let m = Metrics::new();
        let look = |restarts| {
            let seen = Seen { restarts, ..Seen::default() };
            m.looked([("v".to_owned(), seen)].into(), &["v".to_owned()].into(), 0);
        };
        for restarts in [2, 3, 1] {
            look(restarts);
        }
        assert_eq!(m.restarts.get(), 4);
    }
}
