//! What DeleteVolume does with the data, on a store in a folder: kept, gone at once, or marked for later; refused while
//! somebody writes; ended between batches by a driver that stops. And whose a new volume is.

mod support;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use support::csi::{Mode, at_least, mount, parameters, refused};
use support::model::{Ask, Model, NODE, runtime};
use tonic::{Code, Status};
use zerofsctl::catalog::{Catalog, LocalObjects, State, Sweeper, VolumeRecord, Written};
use zerofsctl::csi::Driver;
use zerofsctl::csi::proto::*;
use zerofsctl::gc::{self, Collector, Limit, Options, Outcome, Patience, Unwatched};
use zerofsctl::values::VolumeId;

const MIB: i64 = 1 << 20;
const WITH_DATA: (&str, &str) = ("deleteDataOnPVCDelete", "true");

struct Bench {
    model: Model,
    driver: Arc<Driver>,
    runtime: tokio::runtime::Runtime,
}

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

impl Bench {
    fn new() -> Bench {
        let model = Model::new();
        let driver = model.driver();
        Bench { model, driver, runtime: runtime() }
    }

    fn ask(&self, ask: &Ask) -> Result<(), Status> {
        self.runtime.block_on(ask.ask(&self.driver))
    }

    fn create(&self, name: &str, pairs: &[(&str, &str)]) -> Result<(), Status> {
        self.ask(&Ask::CreateVolume(CreateVolumeRequest {
            name: name.into(),
            capacity_range: at_least(64 * MIB),
            volume_capabilities: vec![mount(Mode::SingleNodeWriter)],
            parameters: parameters(pairs),
            ..Default::default()
        }))
    }

    fn delete(&self, name: &str) -> Result<(), Status> {
        self.ask(&Ask::DeleteVolume(DeleteVolumeRequest { volume_id: name.into(), ..Default::default() }))
    }

    fn get(&self, name: &str) -> Result<(), Status> {
        self.ask(&Ask::ControllerGetVolume(ControllerGetVolumeRequest { volume_id: name.into() }))
    }

    /// A volume that was used and let go: `objects` objects, and a record that was written after them.
    fn used(&self, name: &str, objects: usize, pairs: &[(&str, &str)]) {
        self.create(name, pairs).unwrap();
        self.write(name, "manifest/00000000000000000001.manifest", Duration::from_secs(1));
        for n in 1..objects {
            self.write(name, &format!("compacted/{n:05}.sst"), Duration::from_secs(1));
        }
        self.change(name, |record| record.epoch += 1);
    }

    /// Writes an object of that age.
    fn write(&self, volume: &str, key: &str, age: Duration) {
        let path = self.model.store().join(volume).join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, volume).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now() - age).unwrap();
    }

    fn change(&self, volume: &str, change: impl FnOnce(&mut VolumeRecord)) {
        let (mut record, tag) = self.model.catalog().get(&id(volume)).unwrap().expect("it has a record");
        change(&mut record);
        assert!(matches!(self.model.catalog().update(&record, &tag).unwrap(), Written::Done(_)));
    }

    fn record(&self, volume: &str) -> Option<VolumeRecord> {
        self.model.catalog().get(&id(volume)).unwrap().map(|(record, _)| record)
    }

    fn objects(&self, volume: &str) -> Vec<PathBuf> {
        let below = support::cli::files_below(&self.model.store().join(volume));
        below.into_iter().filter(|path| path.is_file()).collect()
    }

    #[track_caller]
    fn assert_gone(&self, volume: &str) {
        assert_eq!((self.objects(volume), self.record(volume)), (vec![], None));
        assert!(!self.model.store().join(volume).exists(), "an empty folder is left");
    }

    /// A sweep of everything that is due now.
    fn sweep(&self) -> Vec<(VolumeId, Outcome)> {
        let objects = LocalObjects::new(self.model.catalog().url()).unwrap();
        let zero = SignedDuration::ZERO;
        let collector = Collector {
            catalog: self.model.catalog(),
            objects: &objects,
            witnesses: &[],
            options: Options {
                patience: Patience { young: zero, quiet: zero },
                grace: zero,
                limit: Limit::Percent(100),
                workers: 1,
                ..Options::default()
            },
            watch: &Unwatched,
        };
        let scan = collector.scan().unwrap();
        collector.sweep(&scan, &collector.plan_sweep(&scan).unwrap()).unwrap().volumes
    }
}

#[test]
fn the_data_goes_at_once_with_everything_that_is_its_own_and_nothing_else() {
    let bench = Bench::new();
    for name in ["vol1", "vol10", "kept"] {
        let pairs: &[_] = if name == "kept" { &[] } else { &[WITH_DATA] };
        bench.used(name, 4, pairs);
    }
    bench.delete("vol1").unwrap();
    bench.assert_gone("vol1");
    bench.delete("vol1").unwrap();
    assert_eq!(bench.objects("vol10").len(), 4);
    bench.delete("kept").unwrap();
    assert_eq!((bench.objects("kept").len(), bench.record("kept").unwrap().state), (4, State::Released));
    // The name is free again, and the next volume of it is its own.
    bench.used("vol1", 2, &[WITH_DATA]);
    assert_eq!(bench.objects("vol1").len(), 2);
}

#[test]
fn with_a_grace_period_it_is_marked_and_a_sweep_deletes_it_in_its_time() {
    let bench = Bench::new();
    bench.used("restored", 3, &[WITH_DATA, ("deleteDataGracePeriod", "1d")]);
    bench.used("swept", 3, &[WITH_DATA, ("deleteDataGracePeriod", "1d")]);
    assert_eq!(bench.record("swept").unwrap().provision.unwrap().delete_grace_seconds, Some(86_400));
    for name in ["restored", "swept"] {
        bench.delete(name).unwrap();
        let mark = bench.record(name).unwrap().mark().cloned().expect("it is marked");
        assert_eq!(mark.grace_seconds, Some(86_400));
        bench.delete(name).unwrap();
        assert_eq!(bench.record(name).unwrap().mark(), Some(&mark), "again is the same mark");
        assert_eq!(bench.objects(name).len(), 3);
        // For whoever asked, it is gone.
        refused(bench.get(name), Code::NotFound, &[name]);
        let again = bench.create(name, &[WITH_DATA, ("deleteDataGracePeriod", "1d")]);
        refused(again, Code::AlreadyExists, &[name, &format!("gc-s3 restore {name}")]);
    }
    // Its own time counts, not the sweep's, which is none at all here.
    assert!(bench.sweep().is_empty());
    assert!(gc::restore(bench.model.catalog(), &id("restored")).unwrap().1);
    bench.change("swept", |record| {
        let mark = record.tombstone.as_mut().expect("it is marked");
        mark.at = Timestamp::now() - SignedDuration::from_hours(25);
    });
    let swept = bench.sweep();
    assert!(
        matches!(&swept[..], [(v, Outcome::Gone { objects: 3, .. })] if v.as_str() == "swept"),
        "{swept:?}"
    );
    bench.assert_gone("swept");
    assert_eq!(bench.objects("restored").len(), 3);
    // A call that comes once it is due does the same.
    bench.used("late", 3, &[WITH_DATA, ("deleteDataGracePeriod", "2h")]);
    bench.delete("late").unwrap();
    bench.write("late", "manifest/00000000000000000001.manifest", Duration::from_secs(4 * 3600));
    bench.write("late", "compacted/00001.sst", Duration::from_secs(4 * 3600));
    bench.write("late", "compacted/00002.sst", Duration::from_secs(4 * 3600));
    bench.change("late", |record| {
        let mark = record.tombstone.as_mut().expect("it is marked");
        mark.at = Timestamp::now() - SignedDuration::from_hours(3);
    });
    bench.delete("late").unwrap();
    bench.assert_gone("late");
}

#[test]
fn the_settings_say_it_where_the_volume_does_not() {
    let bench = Bench::new();
    bench.used("by-settings", 2, &[WITH_DATA]);
    bench.used("at-once", 2, &[WITH_DATA, ("deleteDataGracePeriod", "0s")]);
    bench.used("own", 2, &[WITH_DATA, ("deleteDataGracePeriod", "7d")]);
    bench.create("never-started", &[]).unwrap();
    bench.model.delete_grace(Some(Duration::from_secs(3600)));
    for name in ["by-settings", "at-once", "own", "never-started"] {
        bench.delete(name).unwrap();
    }
    let grace = |name: &str| bench.record(name).unwrap().mark().expect("it is marked").grace_seconds;
    assert_eq!((grace("by-settings"), grace("own")), (Some(3600), Some(7 * 86_400)));
    bench.assert_gone("at-once");
    bench.assert_gone("never-started");
    // A mark of ours is no reason to wait once there is nothing to wait for.
    bench.model.delete_grace(None);
    bench.delete("by-settings").unwrap();
    bench.assert_gone("by-settings");
}

#[test]
fn a_grace_period_that_cannot_be_is_refused_when_the_volume_is_made() {
    let bench = Bench::new();
    for wrong in ["24", "soon", "-1h", "1500ms", "20years", "1h\u{1b}[2J"] {
        let made = bench.create("v", &[WITH_DATA, ("deleteDataGracePeriod", wrong)]);
        refused(made, Code::InvalidArgument, &["deleteDataGracePeriod", "\"24h\""]);
    }
    let made = bench.create("v", &[("deleteDataGracePeriod", "24h")]);
    refused(made, Code::InvalidArgument, &["deleteDataGracePeriod", "deleteDataOnPVCDelete: \"true\""]);
    assert_eq!(bench.record("v"), None);
    bench.create("v", &[WITH_DATA, ("deleteDataGracePeriod", "24h")]).unwrap();
    bench.create("v", &[WITH_DATA, ("deleteDataGracePeriod", "1day")]).unwrap();
    let other = bench.create("v", &[WITH_DATA, ("deleteDataGracePeriod", "25h")]);
    refused(other, Code::AlreadyExists, &["other parameters"]);
}

#[test]
fn what_is_in_use_or_written_to_stays_whole() {
    let bench = Bench::new();
    bench.used("published", 3, &[WITH_DATA]);
    bench
        .ask(&Ask::ControllerPublishVolume(ControllerPublishVolumeRequest {
            volume_id: "published".into(),
            node_id: NODE.into(),
            volume_capability: Some(mount(Mode::SingleNodeWriter)),
            ..Default::default()
        }))
        .unwrap();
    refused(bench.delete("published"), Code::FailedPrecondition, &["published to node n1"]);

    // A server that is in no catalog, at both speeds of a deletion.
    for (name, grace) in [("written", "0s"), ("written-later", "1d")] {
        bench.used(name, 3, &[WITH_DATA, ("deleteDataGracePeriod", grace)]);
        // Files have finer times than seconds, and this one is newer than the record.
        std::thread::sleep(Duration::from_millis(20));
        bench.write(name, "manifest/00000000000000000002.manifest", Duration::ZERO);
        refused(bench.delete(name), Code::Aborted, &[name, "a server may be running"]);
        let record = bench.record(name).unwrap();
        assert_eq!((record.state, record.mark()), (State::Ready, None));
        assert_eq!(bench.objects(name).len(), 4);
    }
    // Somebody else's file in its folder.
    bench.used("photos", 3, &[WITH_DATA]);
    bench.write("photos", "2024.jpg", Duration::from_secs(9000));
    refused(bench.delete("photos"), Code::FailedPrecondition, &["2024.jpg"]);
    assert_eq!((bench.objects("photos").len(), bench.record("photos").unwrap().state), (4, State::Ready));
    // It becomes quiet: then it goes.
    bench.write("written", "manifest/00000000000000000002.manifest", Duration::from_secs(301));
    bench.delete("written").unwrap();
    bench.assert_gone("written");
}

#[test]
fn a_driver_that_stops_ends_a_deletion_between_batches_and_the_next_one_goes_on() {
    let mut bench = Bench::new();
    bench.used("v", 2500, &[WITH_DATA]);
    bench.used("whole", 3, &[WITH_DATA]);
    bench.change("v", |record| record.state = State::Deleting);
    // It is asked to stop, and whoever holds on to a call must hear of it.
    bench.driver.interrupt();
    refused(bench.delete("v"), Code::DeadlineExceeded, &["it goes on from there"]);
    assert_eq!((bench.objects("v").len(), bench.record("v").unwrap().state), (2500, State::Deleting));
    refused(bench.delete("whole"), Code::DeadlineExceeded, &["whole"]);
    assert_eq!(bench.record("whole").unwrap().state, State::Ready, "nothing was begun");
    // The one before it has let go, so that the next need not wait.
    bench.driver = bench.model.driver();
    bench.delete("v").unwrap();
    bench.assert_gone("v");
}

#[test]
fn the_record_outlives_whatever_a_killed_driver_may_still_have_under_way() {
    let bench = Bench::new();
    bench.used("v", 3, &[WITH_DATA]);
    let until = Timestamp::now() + SignedDuration::from_secs(170);
    bench.change("v", |record| {
        record.state = State::Deleting;
        record.sweeper = Some(Sweeper { nonce: "of-the-killed-one".into(), until, others_until: None });
    });
    for _ in 0..2 {
        refused(bench.delete("v"), Code::Aborted, &["its data is gone"]);
        assert!(bench.objects("v").is_empty());
        assert_eq!(bench.record("v").unwrap().state, State::Deleting);
        refused(bench.create("v", &[WITH_DATA]), Code::Aborted, &["being deleted"]);
    }
    bench.change("v", |record| {
        let sweeper = record.sweeper.as_mut().expect("it is being deleted");
        sweeper.others_until = Some(Timestamp::now() - SignedDuration::from_secs(1));
    });
    bench.delete("v").unwrap();
    bench.assert_gone("v");
}

#[test]
fn a_new_volume_belongs_to_the_cluster_or_is_not_made() {
    let bench = Bench::new();
    bench.create("by-hand", &[]).unwrap();
    assert_eq!(bench.record("by-hand").unwrap().cluster, None);
    bench.model.in_cluster(Err(()));
    refused(bench.create("v", &[]), Code::Unavailable, &["the API server does not answer"]);
    assert_eq!(bench.record("v"), None);
    // Everything else works meanwhile.
    bench.get("by-hand").unwrap();
    bench.delete("by-hand").unwrap();
    bench.model.in_cluster(Ok(Some("c-1")));
    bench.create("v", &[]).unwrap();
    bench.create("v", &[]).unwrap();
    assert_eq!(bench.record("v").unwrap().cluster.as_deref(), Some("c-1"));
    // Of clusters that share a bucket, one has the name.
    bench.model.in_cluster(Ok(Some("c-2")));
    refused(bench.create("v", &[]), Code::AlreadyExists, &["another cluster, c-1"]);
    // One of no cluster is whoever's asks for the same.
    bench.change("v", |record| record.cluster = None);
    bench.create("v", &[]).unwrap();
}
