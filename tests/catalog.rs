//! The catalog's contract, on both kinds of store: a folder, and S3 (moto, which gets conditional writes right).
//! Answers that moto does not give come from a scripted server.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use support::dir::TestDir;
use support::s3::S3;
use support::script::{Answer, Script, answer};
use zerofsctl::catalog::{
    Catalog, ClaimOptions, DataPrefix, Family, Owner, State, StorageUrl, Tag, VolumeRecord, Written, objects,
    open,
};
use zerofsctl::error::{Error, Kind};
use zerofsctl::gc::{self, DeleteOptions, Deletion, Unwatched, Watch};
use zerofsctl::password::Secret;
use zerofsctl::settings::{AwsCredentials, S3Settings};
use zerofsctl::values::{ByteSize, FsType, VolumeId};

/// A store under test.
struct Store<'a> {
    url: StorageUrl,
    s3: S3Settings,
    /// Puts raw bytes at a key below the storage URL.
    put: &'a (dyn Fn(&str, &[u8]) + Sync),
}

impl Store<'_> {
    fn open(&self) -> Box<dyn Catalog> {
        open(&self.url, &self.s3).unwrap()
    }
}

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

fn record(name: &str) -> VolumeRecord {
    VolumeRecord::new(id(name), ByteSize(ByteSize::GIB), Some(FsType::Ext4), Timestamp::UNIX_EPOCH)
}

fn owner(instance: &str) -> Owner {
    Owner {
        node: format!("node-{instance}"),
        machine_id: format!("machine-{instance}"),
        boot_id: "boot".into(),
        instance: instance.into(),
        state_dir: "/var/lib/zerofsctl".into(),
        run_dir: "/run/zerofsctl".into(),
        since: Timestamp::UNIX_EPOCH,
    }
}

fn done(written: Written) -> Tag {
    match written {
        Written::Done(tag) => tag,
        Written::LostRace => panic!("nobody else writes here"),
    }
}

/// What every store must do.
fn contract(store: &Store<'_>) {
    nothing_is_none(store);
    records_come_back(store);
    writes_are_conditional(store);
    one_of_many_creators_wins(store);
    every_update_of_many_is_kept(store);
    one_of_many_claimers_wins(store);
    listing(store);
    damaged_records_are_refused_and_left_alone(store);
    prefixes(store);
    deleting(store);
    data_goes_and_only_that_of_the_volume(store);
}

fn nothing_is_none(store: &Store<'_>) {
    let catalog = store.open();
    assert_eq!(catalog.url(), &store.url);
    assert!(catalog.get(&id("none")).unwrap().is_none());
    assert_eq!(catalog.list().count(), 0);
    assert_eq!(catalog.data_prefix(&id("none")).unwrap(), DataPrefix::Empty);
    assert!(!catalog.delete(&id("none")).unwrap());
}

fn records_come_back(store: &Store<'_>) {
    let catalog = store.open();
    let mut volume = record("kept.vol_1");
    volume.cluster = Some("cluster \"ä\" \\ $x".into());
    let created = done(catalog.create(&volume).unwrap());
    let (read, tag) = store.open().get(&volume.id).unwrap().expect("it was created");
    assert_eq!((&read, &tag), (&volume, &created));
    let claim = read.claim(&owner("a"), &ClaimOptions::default()).unwrap();
    let updated = done(catalog.update(&claim.record, &tag).unwrap());
    assert_ne!(updated, created);
    assert_eq!(store.open().get(&volume.id).unwrap(), Some((claim.record, updated)));
}

fn writes_are_conditional(store: &Store<'_>) {
    let catalog = store.open();
    let volume = record("conditional");
    let first = done(catalog.create(&volume).unwrap());
    assert_eq!(catalog.create(&volume).unwrap(), Written::LostRace, "it is there already");
    // The same content again is another write, so the first tag is stale.
    let second = done(catalog.update(&volume, &first).unwrap());
    assert_ne!(first, second);
    let other = VolumeRecord { epoch: 99, ..volume.clone() };
    assert_eq!(catalog.update(&other, &first).unwrap(), Written::LostRace, "the tag is stale");
    assert_eq!(catalog.get(&volume.id).unwrap(), Some((volume, second)));
    let absent = record("absent");
    assert_eq!(catalog.update(&absent, &first).unwrap(), Written::LostRace, "nothing to replace");
    assert!(catalog.get(&absent.id).unwrap().is_none());
}

const RACERS: usize = 8;

/// Runs `race` in many threads at once; half of them share one catalog.
fn racing<T: Send>(store: &Store<'_>, race: impl Fn(usize, &dyn Catalog) -> T + Sync) -> Vec<T> {
    let start = Barrier::new(RACERS);
    let shared = store.open();
    std::thread::scope(|s| {
        let threads: Vec<_> = (0..RACERS)
            .map(|n| {
                let (race, start, shared) = (&race, &start, &shared);
                s.spawn(move || {
                    let own = store.open();
                    start.wait();
                    race(n, if n % 2 == 0 { own.as_ref() } else { shared.as_ref() })
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().expect("no racer fails")).collect()
    })
}

fn one_of_many_creators_wins(store: &Store<'_>) {
    for round in 0..5 {
        let name = format!("created-{round}");
        let results = racing(store, |n, catalog| {
            let mine = VolumeRecord { epoch: n as u64, ..record(&name) };
            catalog.create(&mine).unwrap()
        });
        let winners: Vec<_> = (0..RACERS).filter(|n| results[*n] != Written::LostRace).collect();
        assert_eq!(winners.len(), 1, "{results:?}");
        let (kept, tag) = store.open().get(&id(&name)).unwrap().unwrap();
        assert_eq!(kept.epoch, winners[0] as u64);
        assert_eq!(results[winners[0]], Written::Done(tag));
    }
}

fn every_update_of_many_is_kept(store: &Store<'_>) {
    const EACH: u64 = 5;
    let volume = record("counted");
    done(store.open().create(&volume).unwrap());
    let races = racing(store, |_, catalog| {
        let mut lost = 0;
        for _ in 0..EACH {
            loop {
                let (mut now, tag) = catalog.get(&volume.id).unwrap().unwrap();
                now.epoch += 1;
                match catalog.update(&now, &tag).unwrap() {
                    Written::Done(_) => break,
                    Written::LostRace => lost += 1,
                }
            }
        }
        lost
    });
    let (end, _) = store.open().get(&volume.id).unwrap().unwrap();
    assert_eq!(end.epoch, EACH * RACERS as u64);
    assert!(races.iter().sum::<i32>() > 0, "nobody ever lost, so nothing raced");
}

fn one_of_many_claimers_wins(store: &Store<'_>) {
    let volume = record("claimed");
    done(store.open().create(&volume).unwrap());
    let epochs = racing(store, |n, catalog| {
        let me = owner(&n.to_string());
        loop {
            let (now, tag) = catalog.get(&volume.id).unwrap().unwrap();
            match now.claim(&me, &ClaimOptions::default()) {
                Ok(claim) => {
                    if let Written::Done(_) = catalog.update(&claim.record, &tag).unwrap() {
                        return Ok(claim.epoch);
                    }
                }
                Err(e) => return Err(e.kind()),
            }
        }
    });
    assert_eq!(epochs.iter().filter(|e| **e == Ok(1)).count(), 1, "{epochs:?}");
    assert_eq!(epochs.iter().filter(|e| **e == Err(Kind::Busy)).count(), RACERS - 1, "{epochs:?}");
}

fn listing(store: &Store<'_>) {
    let catalog = store.open();
    let before: BTreeSet<_> = catalog.list().map(|id| id.unwrap()).collect();
    done(catalog.create(&record("listed")).unwrap());
    let mut after: BTreeSet<_> = catalog.list().map(|id| id.unwrap()).collect();
    assert!(after.remove(&id("listed")) && after == before, "{before:?} {after:?}");
    // What is not a record's name is told, and does not hide the others.
    (store.put)(".zerofsctl/volumes/notes.txt", b"x");
    let (good, bad): (Vec<_>, Vec<_>) = catalog.list().partition(Result::is_ok);
    assert_eq!((good.len(), bad.len()), (before.len() + 1, 1));
    let e = bad.into_iter().next().unwrap().unwrap_err();
    assert_eq!(e.kind(), Kind::Refused);
    assert!(e.to_string().contains("notes.txt") && e.hint_text().is_some(), "{e}");
}

fn damaged_records_are_refused_and_left_alone(store: &Store<'_>) {
    let catalog = store.open();
    let volume = record("sound");
    done(catalog.create(&volume).unwrap());
    let (_, tag) = catalog.get(&volume.id).unwrap().unwrap();
    let newer = r#"{"format": 2, "id": "newer", "everything": "else"}"#;
    let huge = vec![b' '; 100_000];
    let cases: [(&str, &[u8], &str); 6] = [
        ("newer", newer.as_bytes(), "format 2"),
        ("empty", b"", "not valid"),
        ("torn", br#"{"format": 1, "id": "torn", "capa"#, "not valid"),
        ("garbage", b"\0\xff\xfe\0", "not valid"),
        ("swapped", br#"{"format":1,"id":"sound","capacity":5,"created":"2026-11-20T18:00:00Z","content":"never","epoch":0,"state":"ready"}"#, "record of volume sound"),
        ("huge", &huge, "more than"),
    ];
    for (name, bytes, says) in cases {
        (store.put)(&format!(".zerofsctl/volumes/{name}.json"), bytes);
        let e = catalog.get(&id(name)).expect_err(name);
        assert_eq!(e.kind(), Kind::Refused, "{name}: {e}");
        assert_eq!(e.volume(), Some(&id(name)));
        assert!(e.to_string().contains(says) && e.hint_text().is_some(), "{name}: {e}");
        // It is not a free place either.
        let mine = record(name);
        assert_eq!(catalog.create(&mine).unwrap(), Written::LostRace, "{name}");
        assert_eq!(catalog.update(&mine, &tag).unwrap(), Written::LostRace, "{name}");
        assert!(catalog.delete(&id(name)).is_err(), "{name}");
        assert_eq!(catalog.get(&id(name)).expect_err(name).kind(), Kind::Refused, "{name}");
    }
}

fn prefixes(store: &Store<'_>) {
    let catalog = store.open();
    for (name, keys, expected) in [
        (
            "old",
            &[".zerofs_bucket_id", "manifest/00000000000000000001.manifest", "compacted/01ABC.sst"][..],
            DataPrefix::ZeroFs(Family::Old),
        ),
        (
            "new",
            &[".zerofs_bucket_id", "manifest/0001.manifest", "zerofs.key", "segments/a/b"],
            DataPrefix::ZeroFs(Family::New),
        ),
        (
            "begun",
            &[".zerofs_bucket_id", ".zerofs_compatibility_test_1"],
            DataPrefix::ZeroFs(Family::Unstarted),
        ),
        ("photos", &["2024/a.jpg"], DataPrefix::Foreign("2024/".into())),
        // Its name begins like another's, which must not see it.
        ("vol10", &["manifest/1"], DataPrefix::ZeroFs(Family::Old)),
    ] {
        for key in keys {
            (store.put)(&format!("{name}/{key}"), b"x");
        }
        assert_eq!(catalog.data_prefix(&id(name)).unwrap(), expected, "{name}");
    }
    assert_eq!(catalog.data_prefix(&id("vol1")).unwrap(), DataPrefix::Empty);
}

fn deleting(store: &Store<'_>) {
    let catalog = store.open();
    let volume = record("doomed");
    let tag = done(catalog.create(&volume).unwrap());
    let e = catalog.delete(&volume.id).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    let doomed = volume.begin_delete().unwrap();
    assert_eq!(doomed.state, State::Deleting);
    done(catalog.update(&doomed, &tag).unwrap());
    assert!(catalog.delete(&volume.id).unwrap());
    assert!(!catalog.delete(&volume.id).unwrap());
    assert!(catalog.get(&volume.id).unwrap().is_none());
}

fn data_goes_and_only_that_of_the_volume(store: &Store<'_>) {
    let catalog = store.open();
    let (one, ten) = (record("gone1"), record("gone10"));
    for volume in [&one, &ten] {
        let _ = done(catalog.create(volume).unwrap());
        for key in [".zerofs_bucket_id", "manifest/00000000000000000001.manifest", "compacted/01ABC.sst"] {
            (store.put)(&format!("{}/{key}", volume.id), b"x");
        }
    }
    let objects = objects(&store.url, &store.s3).unwrap();
    let delete = |watch: &dyn Watch| {
        let how = DeleteOptions { quiet: SignedDuration::ZERO, ..DeleteOptions::default() };
        gc::delete_volume(catalog.as_ref(), objects.as_ref(), &one.id, &how, watch)
    };
    // Stopped before it is begun, and then between its listing and its end.
    assert_eq!(delete(&StopAt::new(0)).unwrap_err().kind(), Kind::Interrupted);
    assert_eq!(catalog.get(&one.id).unwrap().unwrap().0.state, State::Ready, "nothing was begun");
    let mut interrupted = 0;
    let gone = (1..).find_map(|n| match delete(&StopAt::new(n)) {
        Ok(gone) => Some(gone),
        Err(e) => {
            assert_eq!(e.kind(), Kind::Interrupted, "{e}");
            assert_eq!(catalog.get(&one.id).unwrap().unwrap().0.state, State::Deleting);
            interrupted += 1;
            None
        }
    });
    assert!(matches!(gone, Some(Deletion::Gone { objects: 0..=3, .. })), "{gone:?}");
    assert!(interrupted > 0, "it is asked whether to stop while it deletes");
    assert_eq!(delete(&Unwatched).unwrap(), Deletion::WasGone);
    assert_eq!(catalog.data_prefix(&one.id).unwrap(), DataPrefix::Empty);
    assert!(matches!(catalog.data_prefix(&ten.id).unwrap(), DataPrefix::ZeroFs(_)), "its neighbour stays");
    assert!(catalog.get(&one.id).unwrap().is_none() && catalog.get(&ten.id).unwrap().is_some());
}

/// Asks to stop from the `n`th question on.
struct StopAt(AtomicUsize);

impl StopAt {
    fn new(n: usize) -> StopAt {
        StopAt(AtomicUsize::new(n))
    }
}

impl Watch for StopAt {
    fn interrupted(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err()
    }
}

fn put_file(root: &Path, key: &str, bytes: &[u8]) {
    let path = root.join(key);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn local(root: &Path) -> Box<dyn Catalog> {
    open(&StorageUrl::from_dir(root).unwrap(), &S3Settings::default()).unwrap()
}

#[test]
fn the_contract_on_a_folder() {
    let dir = TestDir::new();
    let root = dir.path().join("some/store");
    let url = StorageUrl::from_dir(&root).unwrap();
    nothing_is_none(&Store { url: url.clone(), s3: S3Settings::default(), put: &|_, _| {} });
    assert!(!dir.path().join("some").exists(), "reading makes nothing");
    contract(&Store { url, s3: S3Settings::default(), put: &|key, bytes| put_file(&root, key, bytes) });
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path().join("some")), 0o700);
    assert_eq!(mode(root.join(".zerofsctl/volumes")), 0o700);
    assert_eq!(mode(root.join(".zerofsctl/volumes/counted.json")), 0o600);
    assert!(!root.join(".zerofsctl/new.json").exists(), "no leftover");
    // A folder that a killed ZeroFS left empty holds nothing.
    std::fs::create_dir_all(root.join("hollow/manifest")).unwrap();
    assert_eq!(local(&root).data_prefix(&id("hollow")).unwrap(), DataPrefix::Empty);
}

#[test]
fn a_folder_that_cannot_be_used_says_why() {
    let dir = TestDir::new();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let below = local(&file.join("store"));
    for e in [
        below.create(&record("vol1")).unwrap_err(),
        below.get(&id("vol1")).unwrap_err(),
        below.data_prefix(&id("vol1")).unwrap_err(),
        below.list().next().unwrap().unwrap_err(),
    ] {
        assert_eq!(e.kind(), Kind::Usage, "{e}");
        assert!(e.hint_text().unwrap().contains("--storage-url"), "{e}");
    }
    // /proc takes no new folders, not even from root.
    let e = local(Path::new("/proc/zerofsctl-store")).create(&record("vol1")).unwrap_err();
    assert!(e.to_string().contains("/proc/zerofsctl-store"), "{e}");
    let held = local(&dir.path().join("held"));
    done(held.create(&record("vol1")).unwrap());
    std::fs::write(dir.path().join("held/plain"), "").unwrap();
    assert_eq!(held.data_prefix(&id("plain")).unwrap(), DataPrefix::Foreign("plain".into()));
    // A record whose place is taken by a folder is not "no record".
    std::fs::create_dir(dir.path().join("held/.zerofsctl/volumes/odd.json")).unwrap();
    let e = held.get(&id("odd")).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    assert_eq!(held.create(&record("odd")).unwrap(), Written::LostRace);
}

#[test]
fn root_a_full_and_a_read_only_folder_fail_cleanly() {
    support::require_root();
    let dir = TestDir::new();
    let at = dir.path().join("small");
    std::fs::create_dir(&at).unwrap();
    let mount = Mounted::tmpfs(&at, "size=64k,nr_inodes=64");
    let catalog = local(&at.join("store"));
    let tag = done(catalog.create(&record("vol1")).unwrap());
    std::fs::write(at.join("ballast"), vec![1; 1 << 20]).unwrap_err();
    for e in [
        catalog.create(&record("vol2")).unwrap_err(),
        catalog.update(&VolumeRecord { epoch: 9, ..record("vol1") }, &tag).unwrap_err(),
    ] {
        assert_eq!(e.kind(), Kind::Environment, "{e}");
        assert!(e.hint_text().unwrap().contains("free some room"), "{e}");
    }
    // The old record is whole, and a second try after making room works.
    assert_eq!(catalog.get(&id("vol1")).unwrap(), Some((record("vol1"), tag.clone())));
    assert!(catalog.get(&id("vol2")).unwrap().is_none());
    std::fs::remove_file(at.join("ballast")).unwrap();
    done(catalog.create(&record("vol2")).unwrap());
    mount.read_only();
    let e = catalog.update(&record("vol1"), &tag).unwrap_err();
    assert_eq!(e.kind(), Kind::Environment, "{e}");
    assert!(e.hint_text().unwrap().contains("read-only"), "{e}");
    assert_eq!(catalog.get(&id("vol1")).unwrap(), Some((record("vol1"), tag)), "reading still works");
}

struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn tmpfs(at: &'a Path, options: &str) -> Self {
        nix::mount::mount(Some("none"), at, Some("tmpfs"), nix::mount::MsFlags::empty(), Some(options))
            .unwrap();
        Mounted(at)
    }

    fn read_only(&self) {
        let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
        nix::mount::mount(None::<&str>, self.0, None::<&str>, flags, None::<&str>).unwrap();
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        nix::mount::umount(self.0).expect("nothing uses the test's mount");
    }
}

/// The secrets of all S3 tests: no error and no debug output may contain them.
const KEY_ID: &str = "AKIAHUNTER22EXAMPLE";
const SECRET_KEY: &str = "hunter22+secret/key";

fn s3_settings(address: SocketAddr) -> S3Settings {
    S3Settings {
        endpoint: Some(format!("http://{address}")),
        region: None,
        allow_http: Some(true),
        credentials: Some(AwsCredentials {
            access_key_id: Secret::new(KEY_ID.into()),
            secret_access_key: Secret::new(SECRET_KEY.into()),
            session_token: Some(Secret::new("hunter22-token".into())),
        }),
    }
}

fn s3(url: &str, address: SocketAddr) -> Box<dyn Catalog> {
    open(&url.parse().unwrap(), &s3_settings(address)).unwrap()
}

#[track_caller]
fn assert_error(e: &Error, kind: Kind, words: &[&str]) {
    let all = format!("{e}\nhint: {}", e.hint_text().expect("a hint"));
    assert_eq!(e.kind(), kind, "{all}");
    for word in words {
        assert!(all.contains(word), "{word:?} is not in: {all}");
    }
    let debug = format!("{all} {e:?}").to_lowercase();
    assert!(!debug.contains("hunter22"), "{debug}");
    assert!(!all.contains("hint: hint") && all.len() < 700, "{all}");
}

#[test]
fn the_contract_on_s3() {
    let dir = TestDir::new();
    let server = S3::start(dir.path());
    server.create_bucket("vols");
    let raw = |prefix: &'static str| {
        let server = &server;
        move |key: &str, bytes: &[u8]| server.put("vols", &format!("{prefix}{key}"), bytes)
    };
    let settings = match &server {
        // It takes any; these are hard to quote.
        S3::Moto(moto) => s3_settings(moto.address()),
        S3::Minio(minio) => minio.settings(),
    };
    let below = raw("some/where/");
    contract(&Store { url: "s3://vols/some/where".parse().unwrap(), s3: settings.clone(), put: &below });
    assert!(server.keys("vols", "some/where/.zerofsctl/").len() > 5, "the records are where they should be");
    // A second installation in the same bucket, without a prefix, sees nothing of the first.
    let top = raw("");
    let store = Store { url: "s3://vols".parse().unwrap(), s3: settings.clone(), put: &top };
    nothing_is_none(&store);
    writes_are_conditional(&store);

    // More records than one page holds.
    for n in 0..1005 {
        (store.put)(&format!(".zerofsctl/volumes/many-{n}.json"), b"{}");
    }
    let listed: BTreeSet<_> = store.open().list().map(|id| id.unwrap()).collect();
    assert_eq!(listed.len(), 1006);

    // 404 of the bucket is not 404 of the key.
    let nowhere = open(&"s3://no-such-bucket/x".parse().unwrap(), &settings).unwrap();
    assert_error(
        &nowhere.get(&id("vol1")).unwrap_err(),
        Kind::NotFound,
        &["no such bucket", "no-such-bucket", "create the bucket"],
    );
    assert_error(&nowhere.create(&record("vol1")).unwrap_err(), Kind::NotFound, &["no such bucket"]);
    assert_error(&nowhere.list().next().unwrap().unwrap_err(), Kind::NotFound, &["no such bucket"]);
    assert_error(&nowhere.data_prefix(&id("vol1")).unwrap_err(), Kind::NotFound, &["no such bucket"]);
    assert_error(&nowhere.delete(&id("vol1")).unwrap_err(), Kind::NotFound, &["no such bucket"]);
}

#[test]
fn an_s3_that_refuses_connections_is_unreachable_soon() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let catalog = s3("s3://vols", free);
    for run in [
        (|c: &dyn Catalog| c.get(&id("vol1")).unwrap_err()) as fn(&dyn Catalog) -> Error,
        |c| c.create(&record("vol1")).unwrap_err(),
        |c| c.list().next().unwrap().unwrap_err(),
    ] {
        let began = Instant::now();
        let e = run(catalog.as_ref());
        assert_error(
            &e,
            Kind::Unreachable,
            &["does not answer", "refused", &free.to_string(), "awsEndpoint"],
        );
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }
    let listed: Vec<_> = catalog.list().collect();
    assert_eq!(listed.len(), 1, "the listing ends after the error");
}

#[test]
fn an_s3_that_swallows_connections_is_unreachable_in_fifteen_seconds() {
    // A full queue of connections that nobody accepts drops further ones, like a firewall does.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: the descriptor is open; listen again only changes the length of its queue.
    assert_eq!(unsafe { nix::libc::listen(listener.as_raw_fd(), 0) }, 0);
    let address = listener.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        queue.push(stream);
        assert!(queue.len() < 1000, "the queue never fills");
    }
    let began = Instant::now();
    let e = s3("s3://vols", address).get(&id("vol1")).unwrap_err();
    assert_error(&e, Kind::Unreachable, &["does not answer", "in time"]);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[test]
fn a_host_that_does_not_exist_and_plain_http_are_told() {
    let url: StorageUrl = "s3://vols".parse().unwrap();
    let mut settings = s3_settings(([127, 0, 0, 1], 1).into());
    settings.allow_http = None;
    let e = open(&url, &settings).map(|_| ()).unwrap_err();
    assert_error(&e, Kind::Usage, &["http://", "awsAllowHTTP"]);
    let e = open(&"file:///a".parse().unwrap(), &settings).map(|_| ());
    assert!(e.is_ok(), "a folder needs no S3 settings");
    // TLS against a server that does not speak it.
    let server = Script::new(|_| answer(200, ""));
    settings.endpoint = Some(format!("https://{}", server.address));
    let e = open(&url, &settings).unwrap().get(&id("vol1")).unwrap_err();
    assert_error(&e, Kind::Unreachable, &["does not answer"]);
}

#[test]
fn refusals_of_the_server_have_a_kind_and_a_hint_and_repeat_nothing() {
    let error = |code: &str| {
        // As real servers do it, with all that must not be repeated.
        format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>bad {KEY_ID}</Message><AWSAccessKeyId>{KEY_ID}\
             </AWSAccessKeyId><StringToSign>{SECRET_KEY}</StringToSign><Region>eu-west-3</Region></Error>"
        )
    };
    let cases: [(u16, &str, Kind, &[&str]); 14] = [
        (403, "AccessDenied", Kind::Environment, &["access denied", "s3:ListBucket"]),
        (403, "", Kind::Environment, &["access denied"]),
        (401, "", Kind::Environment, &["access denied"]),
        (403, "InvalidAccessKeyId", Kind::Usage, &["credentials are wrong", "AWS_ACCESS_KEY_ID"]),
        (403, "SignatureDoesNotMatch", Kind::Usage, &["credentials are wrong", "AWS_SECRET_ACCESS_KEY"]),
        (400, "ExpiredToken", Kind::Usage, &["expired"]),
        (403, "RequestTimeTooSkewed", Kind::Environment, &["clock"]),
        (404, "NoSuchBucket", Kind::NotFound, &["no such bucket", "bucket vols"]),
        (301, "PermanentRedirect", Kind::Usage, &["another region", "awsDefaultRegion"]),
        (400, "AuthorizationHeaderMalformed", Kind::Usage, &["another region", "eu-west-3"]),
        (501, "NotImplemented", Kind::Refused, &["conditional writes"]),
        (503, "SlowDown", Kind::Unreachable, &["503 SlowDown", "later"]),
        (500, "", Kind::Unreachable, &["500"]),
        (418, "Teapot", Kind::Failed, &["418 Teapot"]),
    ];
    for (status, code, kind, words) in cases {
        let body = if code.is_empty() { String::new() } else { error(code) };
        let server = Script::new(move |_| answer(status, &body));
        let catalog = s3("s3://vols/x", server.address);
        let began = Instant::now();
        assert_error(&catalog.get(&id("vol1")).unwrap_err(), kind, words);
        assert_error(&catalog.create(&record("vol1")).unwrap_err(), kind, words);
        assert_error(&catalog.data_prefix(&id("vol1")).unwrap_err(), kind, words);
        assert_error(&catalog.list().next().unwrap().unwrap_err(), kind, words);
        assert!(began.elapsed() < Duration::from_secs(30), "{status} {code}: {:?}", began.elapsed());
    }
    // Only 404 of the key means that there is no record, with or without a code.
    for body in [error("NoSuchKey"), String::new()] {
        let server = Script::new(move |_| answer(404, &body));
        assert!(s3("s3://vols/x", server.address).get(&id("vol1")).unwrap().is_none());
    }
}

#[test]
fn answers_that_make_no_sense_are_errors_never_no_record() {
    let long = "x".repeat(1000);
    for (what, text) in [
        ("a web page", answer(200, "<html>hello</html>")),
        ("an empty page", answer(200, "")),
        ("a torn answer", Some("HTTP/1.1 200 X\r\ncontent-length: 1000\r\netag: \"a\"\r\n\r\n{".to_owned())),
        ("no HTTP", Some(format!("hello {long}\r\n\r\n"))),
        ("no ETag", Some("HTTP/1.1 200 X\r\ncontent-length: 2\r\nlast-modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nconnection: close\r\n\r\n{}".to_owned())),
        ("a redirect", Some("HTTP/1.1 302 X\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned())),
    ] {
        let server = Script::new(move |_| text.clone());
        let e = s3("s3://vols/x", server.address).get(&id("vol1")).expect_err(what);
        let all = format!("{e} {e:?}").to_lowercase();
        assert!(!all.contains("hunter22") && e.hint_text().is_some(), "{what}: {e:?}");
    }
}

/// A server with one object, which stores the first write and closes the connection instead of answering it.
fn forgetful(stored_before: Option<Vec<u8>>) -> (Script, Arc<AtomicUsize>) {
    let puts = Arc::new(AtomicUsize::new(0));
    let counted = puts.clone();
    let mut stored = stored_before;
    let script = Script::new(move |request| {
        if request.method == "GET" {
            assert!(request.path.ends_with("/vol1.json"), "{}", request.path);
            return match &stored {
                None => answer(404, "<Error><Code>NoSuchKey</Code></Error>"),
                Some(body) => Some(format!(
                    "HTTP/1.1 200 X\r\netag: \"now\"\r\nlast-modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\
                     content-length: {}\r\nconnection: close\r\n\r\n{}",
                    body.len(),
                    String::from_utf8_lossy(body)
                )),
            };
        }
        if counted.fetch_add(1, Ordering::SeqCst) == 0 {
            stored = Some(request.body.clone());
            return None;
        }
        answer(412, "<Error><Code>PreconditionFailed</Code></Error>")
    });
    (script, puts)
}

#[test]
fn a_write_whose_answer_was_lost_is_recognised_as_ours() {
    let (server, puts) = forgetful(None);
    let catalog = s3("s3://vols/x", server.address);
    let tag = done(catalog.create(&record("vol1")).unwrap());
    assert!(puts.load(Ordering::SeqCst) >= 2, "the request was repeated");
    assert_eq!(catalog.get(&id("vol1")).unwrap(), Some((record("vol1"), tag)));

    let (server, puts) = forgetful(None);
    let catalog = s3("s3://vols/x", server.address);
    let some_tag = {
        let (other, _) = forgetful(None);
        done(s3("s3://vols/x", other.address).create(&record("vol1")).unwrap())
    };
    done(catalog.update(&VolumeRecord { epoch: 5, ..record("vol1") }, &some_tag).unwrap());
    assert!(puts.load(Ordering::SeqCst) >= 2);
    assert_eq!(catalog.get(&id("vol1")).unwrap().unwrap().0.epoch, 5);
}

#[test]
fn a_conflict_with_a_request_that_then_fails_is_tried_again() {
    // AWS answers 409 to a create while another one is in flight; here that other one never succeeds.
    let bodies = Arc::new(std::sync::Mutex::new(BTreeMap::new()));
    let seen = bodies.clone();
    let server = Script::new(move |request| {
        if request.method == "GET" {
            return answer(404, "<Error><Code>NoSuchKey</Code></Error>");
        }
        seen.lock().unwrap().insert(request.number, request.body.clone());
        if seen.lock().unwrap().len() < 3 {
            return answer(409, "<Error><Code>ConditionalRequestConflict</Code></Error>");
        }
        Some("HTTP/1.1 200 X\r\netag: \"mine\"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned())
    });
    done(s3("s3://vols/x", server.address).create(&record("vol1")).unwrap());
    assert_eq!(bodies.lock().unwrap().len(), 3);
}

/// Finishes the deletion of a volume in a bucket that answers requests to delete with `deleted`, to list with `listed`, and to
/// list unfinished uploads with `uploads`; how often it was asked to delete something.
fn delete_from_bucket(
    listed: impl FnMut() -> Answer + Send + 'static,
    deleted: Answer,
    uploads: Answer,
    watch: &dyn Watch,
) -> (Result<Deletion, Error>, usize) {
    let mut listed = listed;
    let mut doomed = record("vol1");
    doomed.state = State::Deleting;
    // As it is stored.
    let mut stored = serde_json::to_value(&doomed).unwrap();
    stored["format"] = zerofsctl::catalog::FORMAT.into();
    stored["write"] = "0".into();
    let mut body = stored.to_string();
    let deletions = Arc::new(AtomicUsize::new(0));
    let count = deletions.clone();
    let server = Script::new(move |request| {
        let listing = request.path.contains("list-type");
        let sound = |body: &str| {
            Some(format!(
                "HTTP/1.1 200 OK\r\netag: \"1\"\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\
                 last-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            ))
        };
        match &*request.method {
            // That of the catalog tells the time.
            "GET" if listing && request.path.contains(".zerofsctl") => {
                sound("<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
            }
            "GET" if listing => listed(),
            "GET" if request.path.contains("uploads=") => uploads.clone(),
            "GET" => sound(&body),
            "PUT" => {
                body = String::from_utf8(request.body.clone()).unwrap();
                sound("")
            }
            _ => {
                count.fetch_add(1, Ordering::Relaxed);
                deleted.clone()
            }
        }
    });
    let url = "s3://vols/x".parse().unwrap();
    let objects = objects(&url, &s3_settings(server.address)).unwrap();
    let catalog = s3("s3://vols/x", server.address);
    let how = DeleteOptions { threads: 1, ..DeleteOptions::default() };
    let result = gc::delete_volume(catalog.as_ref(), objects.as_ref(), &id("vol1"), &how, watch);
    (result, deletions.load(Ordering::Relaxed))
}

const TWO_OBJECTS: &str = "<ListBucketResult><IsTruncated>false</IsTruncated>\
    <Contents><Key>x/vol1/manifest/1</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag><Size>1</Size></Contents>\
    <Contents><Key>x/vol1/manifest/2</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag><Size>1</Size></Contents>\
    </ListBucketResult>";

const NO_UPLOADS: &str =
    "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>";

/// Keeps what it is told.
#[derive(Default)]
struct Notes(std::sync::Mutex<Vec<String>>);

impl Watch for Notes {
    fn note(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

#[test]
fn who_may_not_look_for_unfinished_uploads_is_told_and_the_volume_goes() {
    let gone = "<DeleteResult><Deleted><Key>x/vol1/manifest/1</Key></Deleted>\
                <Deleted><Key>x/vol1/manifest/2</Key></Deleted></DeleteResult>";
    let denied = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>";
    for (uploads, noted) in [(answer(200, NO_UPLOADS), 0), (answer(403, denied), 1)] {
        let mut listings = 0;
        let listed = move || {
            listings += 1;
            let empty = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
            answer(200, if listings == 1 { TWO_OBJECTS } else { empty })
        };
        let notes = Notes::default();
        // The record is deleted by a request of its own, whose answer does not matter here.
        let (result, _) = delete_from_bucket(listed, answer(200, gone), uploads, &notes);
        assert_eq!(result.unwrap(), Deletion::Gone { objects: 2, bytes: 2 });
        let notes = notes.0.into_inner().unwrap();
        assert_eq!(notes.len(), noted, "{notes:?}");
        assert!(
            notes.iter().all(|n| n.contains("vol1") && n.contains("s3:ListBucketMultipartUploads")),
            "{notes:?}"
        );
    }
    // A server that does not answer is another matter.
    let listed = || answer(200, "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>");
    let (result, deletions) = delete_from_bucket(listed, answer(200, gone), None, &Unwatched);
    assert_eq!((result.unwrap_err().kind(), deletions), (Kind::Unreachable, 0));
}

#[test]
fn one_object_that_cannot_be_deleted_fails_the_deletion() {
    let mixed = "<DeleteResult><Deleted><Key>x/vol1/manifest/1</Key></Deleted><Error><Key>x/vol1/manifest/2</Key>\
                 <Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>";
    let (result, deletions) = delete_from_bucket(
        || answer(200, TWO_OBJECTS),
        answer(200, mixed),
        answer(200, NO_UPLOADS),
        &Unwatched,
    );
    let e = result.unwrap_err();
    assert!(e.to_string().contains("vol1/manifest/2 is still there") && e.hint_text().is_some(), "{e}");
    assert!(deletions > 0, "{e}");
}

#[test]
fn a_listing_that_fails_is_never_an_empty_volume() {
    for listed in [answer(500, ""), answer(403, ""), answer(200, "<html>hello</html>"), None] {
        let (result, deletions) = delete_from_bucket(
            move || listed.clone(),
            answer(200, "<DeleteResult></DeleteResult>"),
            answer(200, NO_UPLOADS),
            &Unwatched,
        );
        let e = result.unwrap_err();
        assert!(e.hint_text().is_some() && !e.to_string().contains("cannot be used"), "{e}");
        assert_eq!(deletions, 0);
    }
}
