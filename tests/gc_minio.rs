//! The collector on a real MinIO, for what moto does not have: versions, a listing of many pages, and an upload listing of its
//! own kind. `scripts/test-long gc` also runs the tests that both can serve (`ZEROFSCTL_TEST_S3=minio`).

mod support;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use support::dir::TestDir;
use support::minio::Minio;
use zerofsctl::catalog::{self, Below, Catalog, DataPrefix, Objects, StorageUrl, VolumeRecord, Written};
use zerofsctl::gc::{
    self, Collector, DeleteOptions, Deletion, Limit, Options, Outcome, Patience, Unwatched, Verdict,
};
use zerofsctl::values::{ByteSize, VolumeId};

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

struct Lab {
    // The server goes before its folder.
    minio: Minio,
    records: Box<dyn Catalog>,
    objects: Box<dyn Objects>,
    _dir: TestDir,
}

impl Lab {
    fn new() -> Lab {
        let dir = TestDir::new();
        let minio = Minio::start(dir.path());
        minio.ask("PUT", "/vols", &[], b"");
        let url: StorageUrl = "s3://vols/csi".parse().unwrap();
        let records = catalog::open(&url, &minio.settings()).unwrap();
        let objects = catalog::objects(&url, &minio.settings()).unwrap();
        Lab { minio, records, objects, _dir: dir }
    }

    /// A volume of a cluster that is gone, with this many objects.
    fn volume(&self, name: &str, count: usize) {
        let mut record = VolumeRecord::new(id(name), ByteSize(1 << 30), None, Timestamp::now());
        record.cluster = Some("gone".into());
        assert!(matches!(self.records.create(&record).unwrap(), Written::Done(_)));
        let key = |n: usize| match n {
            0 => format!("csi/{name}/.zerofs_bucket_id"),
            _ if n.is_multiple_of(2) => format!("csi/{name}/manifest/{n:020}.manifest"),
            _ => format!("csi/{name}/compacted/{n:026}.sst"),
        };
        let keys: Vec<String> = (0..count).map(key).collect();
        self.minio.put_many("vols", keys.iter().map(|k| (k.as_str(), &b"abc"[..])));
    }

    fn collector(&self, workers: usize) -> Collector<'_> {
        let zero = SignedDuration::ZERO;
        let options = Options {
            gone_clusters: ["gone".to_owned()].into(),
            limit: Limit::Percent(100),
            grace: zero,
            patience: Patience { young: zero, quiet: zero },
            workers,
            ..Options::default()
        };
        Collector {
            catalog: self.records.as_ref(),
            objects: self.objects.as_ref(),
            witnesses: &[],
            options,
            watch: &Unwatched,
        }
    }

    /// Until what was written is of another second than the store's Date.
    fn settle(&self) {
        std::thread::sleep(Duration::from_millis(1100));
    }
}

#[test]
fn volumes_of_many_pages_are_counted_and_deleted_whole() {
    let lab = Lab::new();
    let sizes = [("vol1", 6501), ("vol10", 40), ("vol2", 1000), ("vol3", 1001)];
    for (name, count) in sizes {
        lab.volume(name, count);
    }
    lab.settle();
    for workers in [1, 4] {
        let c = lab.collector(workers);
        let scan = c.scan().unwrap();
        let found: Vec<_> =
            scan.volumes.iter().map(|s| (s.volume.as_str(), s.facts.objects, s.judgement.verdict)).collect();
        assert_eq!(
            found,
            sizes.map(|(name, count)| (name, Some(count as u64), Verdict::Orphan)),
            "{workers}"
        );
    }
    let c = lab.collector(4);
    let scan = c.scan().unwrap();
    assert_eq!(c.mark(&scan, &c.plan_mark(&scan).unwrap()).unwrap().marked.len(), 4);
    lab.settle();
    let scan = c.scan().unwrap();
    let swept = c.sweep(&scan, &c.plan_sweep(&scan).unwrap()).unwrap();
    for ((volume, outcome), (name, count)) in swept.volumes.iter().zip(sizes) {
        assert_eq!(*volume, id(name));
        assert!(matches!(outcome, Outcome::Gone { objects, .. } if *objects == count as u64), "{outcome:?}");
    }
    assert_eq!(swept.volumes.len(), 4);
    let left = lab.objects.page(&Below::root(), false, None).unwrap();
    assert!(left.objects.is_empty(), "{left:?}");
}

#[test]
fn a_bucket_with_versions_is_told_and_a_volume_goes_from_its_listing() {
    let lab = Lab::new();
    assert_eq!(lab.objects.keeps_versions().unwrap(), Some(false));
    lab.minio.set_versioning("vols", "Enabled");
    assert_eq!(lab.objects.keeps_versions().unwrap(), Some(true));
    lab.volume("vol1", 30);
    lab.volume("vol2", 30);
    lab.settle();
    let options = DeleteOptions { quiet: SignedDuration::ZERO, ..DeleteOptions::default() };
    let delete = |name| {
        gc::delete_volume(lab.records.as_ref(), lab.objects.as_ref(), &id(name), &options, &gc::Unwatched)
            .unwrap()
    };
    assert_eq!(delete("vol1"), Deletion::Gone { objects: 30, bytes: 90 });
    // MinIO still lists its folders, when it is asked for folders.
    let folders = lab.minio.ask("GET", "/vols?list-type=2&prefix=csi%2F&delimiter=%2F", &[], b"");
    assert!(folders.contains("csi/vol1/"), "{folders}");
    assert_eq!(lab.records.data_prefix(&id("vol1")).unwrap(), DataPrefix::Empty);
    assert_eq!(delete("vol1"), Deletion::WasGone);
    let versions = lab.minio.ask("GET", "/vols?versions&prefix=csi%2Fvol1%2F", &[], b"");
    assert_eq!(versions.matches("<DeleteMarker>").count(), 30, "{versions}");
    assert_eq!(versions.matches("<Version>").count(), 30, "the data is still there, as the scan's note says");
    lab.minio.set_versioning("vols", "Suspended");
    assert_eq!(lab.objects.keeps_versions().unwrap(), Some(true), "old versions stay");
    assert_eq!(delete("vol2"), Deletion::Gone { objects: 30, bytes: 90 });
    // The name is free again, and its record starts anew.
    lab.volume("vol1", 3);
    let scan = lab.collector(2).scan().unwrap();
    let found: Vec<_> = scan.volumes.iter().map(|s| (s.volume.as_str(), s.facts.objects)).collect();
    assert_eq!(found, [("vol1", Some(3))]);
}

#[test]
fn unfinished_uploads_of_the_volume_and_of_no_other_are_aborted() {
    let lab = Lab::new();
    for (name, key) in
        [("vol1", "compacted/a.sst"), ("vol1", "compacted/b.sst"), ("vol10", "compacted/a.sst")]
    {
        lab.minio.ask("POST", &format!("/vols/csi/{name}/{key}?uploads"), &[], b"");
    }
    lab.minio.ask("POST", "/vols/elsewhere/vol1/a.sst?uploads", &[], b"");
    lab.volume("vol1", 3);
    lab.settle();
    let c = lab.collector(1);
    let scan = c.scan().unwrap();
    c.mark(&scan, &c.plan_mark(&scan).unwrap()).unwrap();
    lab.settle();
    let scan = c.scan().unwrap();
    let swept = c.sweep(&scan, &c.plan_sweep(&scan).unwrap()).unwrap();
    assert!(matches!(&swept.volumes[..], [(_, Outcome::Gone { objects: 3, uploads: 2, .. })]), "{swept:?}");
    let left = lab.minio.ask("GET", "/vols?uploads", &[], b"");
    assert!(left.contains("csi/vol10/compacted/a.sst") && left.contains("elsewhere/vol1/a.sst"), "{left}");
    assert_eq!(left.matches("<UploadId>").count(), 2, "{left}");
}
