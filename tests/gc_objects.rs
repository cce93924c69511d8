//! Listing and deleting objects of a bucket (moto, or MinIO: `support::s3`), and answers of servers in trouble (scripted).

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use support::dir::TestDir;
use support::s3::S3;
use support::script::{Script, answer};
use zerofsctl::catalog::{self, Below, Objects, VolumeRecord, Written};
use zerofsctl::error::Kind;
use zerofsctl::gc::{
    self, Collector, DeleteOptions, Deletion, Limit, Options, Outcome, Patience, Unwatched, Verdict,
};
use zerofsctl::password::Secret;
use zerofsctl::settings::{AwsCredentials, S3Settings};
use zerofsctl::values::{ByteSize, VolumeId};

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

fn all(objects: &dyn Objects, below: &Below) -> (BTreeSet<String>, usize) {
    let (mut keys, mut pages, mut next) = (BTreeSet::new(), 0, None);
    loop {
        let page = objects.page(below, false, next.as_deref()).unwrap();
        pages += 1;
        keys.extend(page.objects.into_iter().map(|o| o.key));
        next = page.next;
        if next.is_none() {
            return (keys, pages);
        }
    }
}

#[test]
fn a_bucket_is_listed_page_by_page_and_only_the_volume_is_deleted() {
    let dir = TestDir::new();
    let server = S3::start(dir.path());
    server.create_bucket("vols");
    for n in 0..1100 {
        server.put("vols", &format!("some/where/vol1/compacted/{n:05}.sst"), b"abc");
    }
    for key in
        ["vol10/manifest/1", "vol1.txt", "vol1/manifest/odd%20name%2B%26", ".zerofsctl/volumes/vol1.json"]
    {
        server.put("vols", &format!("some/where/{key}"), b"abc");
    }
    server.put("vols", "some/where-else/vol1/manifest/1", b"abc");
    server.begin_upload("vols", "some/where/vol1/compacted/part.sst");
    server.begin_upload("vols", "some/where/vol10/compacted/part.sst");
    let objects = catalog::objects(&"s3://vols/some/where".parse().unwrap(), &server.settings()).unwrap();

    let vol1 = id("vol1");
    let (keys, pages) = all(objects.as_ref(), &Below::volume(&vol1));
    assert_eq!((keys.len(), pages), (1101, 2));
    assert!(keys.contains("vol1/manifest/odd name+&"), "{keys:?}");
    let tables = Below::volume(&vol1).folder("compacted");
    let late = objects.page_from(&tables, "vol1/compacted/01098.sst").unwrap();
    let late: Vec<_> = late.objects.iter().map(|o| o.key.as_str()).collect();
    assert_eq!(
        late,
        ["vol1/compacted/01098.sst", "vol1/compacted/01099.sst"],
        "that one and what comes later"
    );
    assert_eq!(objects.page_from(&tables, "vol1/compacted/01099.sst2").unwrap().objects.len(), 0);
    let elsewhere = objects.page_from(&tables, "vol10/manifest/1").unwrap();
    assert_eq!(elsewhere.objects.len(), 1000, "from the beginning");
    let top = objects.page(&Below::root(), true, None).unwrap();
    assert_eq!(top.folders, [".zerofsctl/", "vol1/", "vol10/"]);
    assert_eq!(top.objects.iter().map(|o| o.key.as_str()).collect::<Vec<_>>(), ["vol1.txt"]);
    let off = objects.now().unwrap().duration_since(Timestamp::now()).abs();
    assert!(off < SignedDuration::from_mins(5), "the server has this machine's clock: {off:?}");
    assert!(objects.record_written(&vol1).unwrap().is_some());
    assert!(objects.record_written(&id("vol")).unwrap().is_none());
    assert_eq!(objects.keeps_versions().unwrap(), Some(false));

    let uploads = objects.uploads(&vol1).unwrap();
    assert_eq!(uploads.iter().map(|u| u.key.as_str()).collect::<Vec<_>>(), ["vol1/compacted/part.sst"]);
    objects.abort(&vol1, &uploads[0]).unwrap();
    objects.abort(&vol1, &uploads[0]).unwrap();
    assert!(objects.uploads(&vol1).unwrap().is_empty());
    assert_eq!(objects.uploads(&id("vol10")).unwrap().len(), 1);

    for bad in ["vol10/manifest/1", "vol1.txt", ".zerofsctl/volumes/vol1.json", "vol1/../vol10/manifest/1"] {
        let e = objects.delete(&vol1, &["vol1/compacted/00000.sst".into(), bad.into()]).unwrap_err();
        assert_eq!(e.kind(), Kind::Refused, "{bad}");
    }
    assert_eq!(all(objects.as_ref(), &Below::volume(&vol1)).0.len(), 1101, "nothing was deleted");
    for batch in keys.iter().cloned().collect::<Vec<_>>().chunks(catalog::MAX_BATCH) {
        assert!(objects.delete(&vol1, batch).unwrap().is_empty());
        assert!(objects.delete(&vol1, batch).unwrap().is_empty(), "what is gone counts as deleted");
    }
    assert!(all(objects.as_ref(), &Below::volume(&vol1)).0.is_empty());
    assert_eq!(all(objects.as_ref(), &Below::root()).0.len(), 3);
    assert_eq!(server.keys("vols", "some/where-else/").len(), 1);
}

#[test]
fn marked_volumes_go_from_a_bucket_with_all_that_is_theirs_and_nothing_else() {
    let dir = TestDir::new();
    let server = S3::start(dir.path());
    server.create_bucket("vols");
    let url = "s3://vols".parse().unwrap();
    let records = catalog::open(&url, &server.settings()).unwrap();
    let objects = catalog::objects(&url, &server.settings()).unwrap();
    let mut kept = BTreeSet::new();
    for (volume, count) in [("vol1", 40), ("vol10", 3), ("gone", 4), ("kept", 2)] {
        let record = VolumeRecord::new(id(volume), ByteSize(1 << 30), None, Timestamp::now());
        assert!(matches!(records.create(&record).unwrap(), Written::Done(_)));
        for n in 0..count {
            server.put("vols", &format!("{volume}/compacted/{n:05}.sst"), b"abc");
            if !["vol1", "gone"].contains(&volume) {
                kept.insert(format!("{volume}/compacted/{n:05}.sst"));
            }
        }
    }
    server.begin_upload("vols", "vol1/compacted/part.sst");
    // Beside them: another installation, somebody's photos, and a volume of an older driver.
    for key in ["csi/pvc-1/manifest/1", "photos/2024.jpg", "older/manifest/1", "readme.txt"] {
        server.put("vols", key, b"abc");
        kept.insert(key.to_owned());
    }
    server.put("vols", ".zerofsctl/volumes/newer.json", br#"{"format": 2, "id": "newer"}"#);
    server.put("vols", "newer/manifest/1", b"abc");
    kept.insert("newer/manifest/1".into());
    // MinIO tells the fraction of the second in which an object was written, but its Date has none: until then the last one
    // would be younger than no time at all, and its volume live.
    std::thread::sleep(Duration::from_millis(1100));
    let collector = |options: Options| Collector {
        catalog: records.as_ref(),
        objects: objects.as_ref(),
        witnesses: &[],
        options,
        watch: &Unwatched,
    };
    let zero = SignedDuration::ZERO;
    let options = Options {
        named: ["vol1", "gone"].map(id).into(),
        limit: Limit::Percent(50),
        grace: zero,
        patience: Patience { young: zero, quiet: zero },
        workers: 4,
        ..Options::default()
    };
    let c = collector(options.clone());
    let scan = c.scan().unwrap();
    let verdict = |v: &str| scan.volumes.iter().find(|s| s.volume == id(v)).unwrap().judgement.clone();
    for v in ["csi", "photos", "older", "newer"] {
        assert_eq!(verdict(v).verdict, Verdict::Unknown, "{v}");
    }
    assert!(verdict("newer").reason.contains("format 2"), "{:?}", verdict("newer"));
    assert_eq!(scan.strange, ["readme.txt"]);
    let plan = c.plan_mark(&scan).unwrap();
    assert_eq!((plan.lines.len(), plan.objects(), plan.bytes()), (2, 44, 3 * 44));
    assert_eq!(c.mark(&scan, &plan).unwrap().marked, ["gone", "vol1"].map(id));
    let c = collector(Options { named: BTreeSet::new(), ..options });
    let scan = c.scan().unwrap();
    let swept = c.sweep(&scan, &c.plan_sweep(&scan).unwrap()).unwrap();
    assert!(
        matches!(
            &swept.volumes[..],
            [
                (_, Outcome::Gone { objects: 4, .. }),
                (_, Outcome::Gone { objects: 40, bytes: 120, uploads: 1 })
            ]
        ),
        "{swept:?}"
    );
    let left: BTreeSet<String> =
        server.keys("vols", "").into_iter().filter(|k| !k.starts_with(".zerofsctl")).collect();
    assert_eq!(left, kept);
    assert!(!server.text("/vols?uploads").contains("<UploadId>"));
    let records_left = server.keys("vols", ".zerofsctl/volumes/");
    assert_eq!(records_left.len(), 3, "{records_left:?}");

    // The same for one volume, as CSI does it, again and again.
    let now = DeleteOptions::default();
    // The store's times are whole seconds; a later one than that of the record is what counts.
    std::thread::sleep(Duration::from_millis(1100));
    server.put("vols", "vol10/manifest/1", b"abc");
    let gone = gc::delete_volume(records.as_ref(), objects.as_ref(), &id("vol10"), &now, &Unwatched);
    // It was written to after its record, a moment ago: a server may be running.
    assert_eq!(gone.unwrap_err().kind(), Kind::Busy);
    std::thread::sleep(Duration::from_millis(1100));
    let at_once = DeleteOptions { quiet: zero, ..now };
    let gone =
        gc::delete_volume(records.as_ref(), objects.as_ref(), &id("vol10"), &at_once, &Unwatched).unwrap();
    assert_eq!(gone, Deletion::Gone { objects: 4, bytes: 12 });
    let again =
        gc::delete_volume(records.as_ref(), objects.as_ref(), &id("vol10"), &at_once, &Unwatched).unwrap();
    assert_eq!(again, Deletion::WasGone);
    assert!(records.get(&id("kept")).unwrap().is_some());
}

fn settings(address: std::net::SocketAddr) -> S3Settings {
    S3Settings {
        endpoint: Some(format!("http://{address}")),
        region: None,
        allow_http: Some(true),
        credentials: Some(AwsCredentials {
            access_key_id: Secret::new("AKIAHUNTER22".into()),
            secret_access_key: Secret::new("hunter22".into()),
            session_token: None,
        }),
    }
}

fn list(rest: &str) -> String {
    format!("<ListBucketResult>{rest}</ListBucketResult>")
}

#[test]
fn a_server_that_asks_for_less_haste_gets_it() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let server = Script::new(move |request| {
        let n = counted.fetch_add(1, Ordering::SeqCst);
        if n % 3 != 2 {
            return answer(503, "<Error><Code>SlowDown</Code></Error>");
        }
        if request.method == "POST" {
            assert!(request.path.contains("?delete"), "{}", request.path);
            return answer(200, "<DeleteResult><Deleted><Key>x/vol1/a</Key></Deleted></DeleteResult>");
        }
        answer(200, &list("<IsTruncated>false</IsTruncated>"))
    });
    let objects = catalog::objects(&"s3://vols/x".parse().unwrap(), &settings(server.address)).unwrap();
    assert!(objects.page(&Below::root(), false, None).unwrap().objects.is_empty());
    assert_eq!(seen.load(Ordering::SeqCst), 3);
    assert!(objects.delete(&id("vol1"), &["vol1/a".into()]).unwrap().is_empty());
    assert_eq!(seen.load(Ordering::SeqCst), 6);
}

#[test]
fn answers_that_are_cut_short_or_make_no_sense_are_errors_never_an_end() {
    let object = "<Contents><Key>x/vol1/a</Key><Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>";
    for (what, text) in [
        ("truncated without a place to go on", list(&format!("{object}<IsTruncated>true</IsTruncated>"))),
        ("nothing about truncation", list(object)),
        ("a web page", "<html>hello</html>".to_owned()),
        ("nothing", String::new()),
        (
            "another's key",
            list("<IsTruncated>false</IsTruncated>")
                .replace("</List", &format!("{}</List", object.replace("x/vol1", "y/vol1"))),
        ),
        (
            "no time",
            list(&format!(
                "{}<IsTruncated>false</IsTruncated>",
                object.replace("2026-01-01T00:00:00.000Z", "soon")
            )),
        ),
        ("an error in a success", "<Error><Code>InternalError</Code></Error>".to_owned()),
    ] {
        let server = Script::new(move |_| answer(200, &text));
        let objects = catalog::objects(&"s3://vols/x".parse().unwrap(), &settings(server.address)).unwrap();
        let e = objects.page(&Below::volume(&id("vol1")), false, None).expect_err(what);
        assert!(
            e.hint_text().is_some() && !format!("{e:?}").to_lowercase().contains("hunter22"),
            "{what}: {e:?}"
        );
    }
}

#[test]
fn refusals_of_single_objects_and_of_whole_batches_are_told_apart() {
    let denied = "<DeleteResult><Error><Key>x/vol1/b</Key><Code>AccessDenied</Code><Message>m</Message></Error></DeleteResult>";
    let server = Script::new(move |_| answer(200, denied));
    let objects = catalog::objects(&"s3://vols/x".parse().unwrap(), &settings(server.address)).unwrap();
    for keys in [vec!["vol1/a".to_owned(), "vol1/b".into(), "vol1/c".into()], vec!["vol1/b".into()]] {
        let failed = objects.delete(&id("vol1"), &keys).unwrap();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!((failed[0].0.as_str(), failed[0].1.kind()), ("vol1/b", Kind::Environment));
    }
    for (status, code, kind) in [
        (403, "AccessDenied", Kind::Environment),
        (404, "NoSuchBucket", Kind::NotFound),
        (403, "SignatureDoesNotMatch", Kind::Usage),
        (400, "MalformedXML", Kind::Failed),
    ] {
        let server = Script::new(move |_| answer(status, &format!("<Error><Code>{code}</Code></Error>")));
        let objects = catalog::objects(&"s3://vols/x".parse().unwrap(), &settings(server.address)).unwrap();
        for keys in [vec!["vol1/a".to_owned(), "vol1/b".into()], vec!["vol1/a".into()]] {
            let e = objects.delete(&id("vol1"), &keys).unwrap_err();
            assert_eq!(e.kind(), kind, "{code}: {e}");
        }
    }
}

#[test]
fn a_bucket_that_does_not_answer_is_unreachable_soon() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let objects = catalog::objects(&"s3://vols/x".parse().unwrap(), &settings(free)).unwrap();
    let began = Instant::now();
    let e = objects.page(&Below::root(), true, None).unwrap_err();
    assert_eq!(e.kind(), Kind::Unreachable, "{e}");
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}
