//! The collector against a model of buckets and clusters: random volumes, owners, clocks, crashes, and requests that
//! fail, answer late state or are applied without an answer.
//!
//! What is asserted, at every single deletion and at every move to `deleting`: it was a volume that nobody has, that no
//! PersistentVolume in its own (reachable) cluster refers to, or that its owner or an operator gave up by name, and that
//! was marked for its grace period. And in the end, once the faults have stopped: every orphan is gone with its uploads and
//! its record, and nothing of any other volume is missing.
//!
//! `ZEROFSCTL_CASES` sets how many cases are tried, `ZEROFSCTL_SEED` repeats one.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard};

use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zerofsctl::catalog::{
    Below, Catalog, ClaimOptions, DataPrefix, MAX_BATCH, MarkedBy, Object, Objects, Owner, Page, State,
    StorageUrl, Tag, Upload, VolumeRecord, Written,
};
use zerofsctl::error::{Error, Kind, Result};
use zerofsctl::gc::{
    self, Collector, DeleteOptions, Deletion, Limit, Options, Outcome, Patience, Reference, ReferenceKind,
    Testimony, Unwatched, Verdict, Witness,
};
use zerofsctl::values::{ByteSize, VolumeId};

const GRACE: i64 = 24 * 3600;
/// Small, so that a few objects make several pages.
const PAGE: usize = 3;

/// The state of the bucket that requests see.
#[derive(Clone, Default, PartialEq)]
struct Bucket {
    records: BTreeMap<VolumeId, (VolumeRecord, u64, i64)>,
    objects: BTreeMap<String, i64>,
    uploads: BTreeMap<String, String>,
}

/// One cluster.
#[derive(Default)]
struct Cluster {
    /// Volumes with a PersistentVolume, and whether that is a retained one.
    volumes: BTreeMap<VolumeId, bool>,
    reachable: bool,
}

/// What happens at a certain request, by somebody else.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    Attach,
    AttachAndRelease,
    Restore,
}

struct World {
    now: i64,
    bucket: Bucket,
    /// What a stale read sees.
    earlier: Bucket,
    version: u64,
    clusters: BTreeMap<String, Cluster>,
    rng: StdRng,
    /// Of a hundred requests.
    faults: u32,
    /// Requests until the process dies; then nothing is answered any more.
    dies_in: Option<u64>,
    dead: bool,
    requests: u64,
    /// At this request this happens.
    event: Option<(u64, VolumeId, Event)>,
    /// Whether the event was a success.
    happened: Option<bool>,
    /// The operator named them, or DeleteVolume did.
    given_up: BTreeSet<VolumeId>,
    /// Whose DeleteVolume or naming is at work: an attach before it has looked is not its end.
    at_work: BTreeSet<VolumeId>,
    /// Volumes whose deletion began rightly.
    doomed: BTreeSet<VolumeId>,
    /// Random events at requests.
    restless: bool,
    /// The grace period of the run at hand.
    grace: i64,
}

struct Model(Mutex<World>, StorageUrl);

fn id(text: &str) -> VolumeId {
    text.parse().unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn owner() -> Owner {
    Owner {
        node: "node-a".into(),
        machine_id: "m".into(),
        boot_id: "b".into(),
        instance: "i".into(),
        state_dir: "/s".into(),
        run_dir: "/r".into(),
        since: at(0),
    }
}

fn failed(what: &str) -> Error {
    Error::new(Kind::Unreachable, format!("cannot {what}: a fault of the test"))
}

/// How a request goes.
#[derive(PartialEq)]
enum Fate {
    Answered,
    /// It sees an earlier state.
    Stale,
    /// No effect, no answer.
    Lost,
    /// It has its effect, but no answer comes.
    Unanswered,
}

impl World {
    fn cluster_of(&self, record: &VolumeRecord) -> Option<&Cluster> {
        record.cluster.as_ref().and_then(|c| self.clusters.get(c))
    }

    /// Every request passes here.
    fn fate(&mut self) -> Fate {
        self.requests += 1;
        if self.rng.random_ratio(1, 3) {
            self.now += 1;
        }
        if let Some((when, volume, event)) = self.event.clone()
            && when == self.requests
        {
            self.happened = Some(self.happen(&volume, event));
        }
        if self.restless && self.rng.random_ratio(1, 20) {
            self.anything();
        }
        if self.rng.random_ratio(1, 4) {
            self.earlier = self.bucket.clone();
        }
        if let Some(left) = self.dies_in.as_mut() {
            *left = left.saturating_sub(1);
            if *left == 0 && !self.dead {
                self.dead = true;
                return if self.rng.random() { Fate::Lost } else { Fate::Unanswered };
            }
        }
        if self.dead {
            return Fate::Lost;
        }
        if self.rng.random_ratio(self.faults, 100) {
            return match self.rng.random_range(0..3) {
                0 => Fate::Lost,
                1 => Fate::Unanswered,
                _ => Fate::Stale,
            };
        }
        Fate::Answered
    }

    fn write(&mut self, record: VolumeRecord) -> u64 {
        self.version += 1;
        self.bucket.records.insert(record.id.clone(), (record, self.version, self.now));
        self.version
    }

    /// Somebody else's doing; whether it worked.
    fn happen(&mut self, volume: &VolumeId, event: Event) -> bool {
        let Some((record, ..)) = self.bucket.records.get(volume).cloned() else { return false };
        match event {
            Event::Attach | Event::AttachAndRelease => {
                let Ok(claim) = record.claim(&owner(), &ClaimOptions::default()) else { return false };
                assert_ne!(record.state, State::Deleting, "a half-deleted volume was attached: {record:?}");
                // Its server writes.
                let next = format!("{volume}/manifest/{:06}.manifest", self.version + 1000);
                let now = self.now;
                self.bucket.objects.insert(next, now);
                let released = VolumeRecord { owner: None, ..claim.record.clone() };
                self.write(if event == Event::Attach { claim.record } else { released });
                self.wanted(volume);
                true
            }
            Event::Restore => match record.restored() {
                // There was nothing to take back.
                Ok(same) if same == record => true,
                Ok(restored) => {
                    self.write(restored);
                    self.wanted(volume);
                    true
                }
                Err(_) => false,
            },
        }
    }

    fn wanted(&mut self, volume: &VolumeId) {
        if !self.at_work.contains(volume) {
            self.given_up.remove(volume);
        }
    }

    /// A word that left no mark counts no longer.
    fn forget_words(&mut self) {
        self.at_work.clear();
        let records = &self.bucket.records;
        self.given_up.retain(|v| {
            records.get(v).is_some_and(|(r, ..)| {
                r.state == State::Deleting || r.mark().is_some_and(|m| m.by != MarkedBy::Scan)
            })
        });
    }

    fn anything(&mut self) {
        let volumes: Vec<VolumeId> = self.bucket.records.keys().cloned().collect();
        let Some(volume) = pick(&mut self.rng, &volumes) else { return };
        match self.rng.random_range(0..4) {
            0 => _ = self.happen(&volume, Event::Attach),
            1 => _ = self.happen(&volume, Event::AttachAndRelease),
            2 => _ = self.happen(&volume, Event::Restore),
            _ => self.release(&volume),
        }
    }

    fn release(&mut self, volume: &VolumeId) {
        let Some((record, ..)) = self.bucket.records.get(volume).cloned() else { return };
        if record.owner.is_some() {
            self.write(VolumeRecord { owner: None, ..record });
        }
    }

    /// Whether nobody can want it: the truth, not what anybody was told.
    fn is_orphan(&self, record: &VolumeRecord) -> bool {
        let referred = self.cluster_of(record).is_some_and(|c| c.volumes.contains_key(&record.id));
        let answers = self.cluster_of(record).is_some_and(|c| c.reachable);
        let given_up = self.given_up.contains(&record.id);
        record.owner.is_none()
            && !referred
            && match (&record.cluster, record.state) {
                (None, _) => given_up,
                (Some(_), State::Released) => answers && given_up,
                (Some(_), _) => answers,
            }
    }

    /// Asserts that a volume may be deleted from here on.
    fn begins(&mut self, before: &VolumeRecord) {
        let volume = &before.id;
        let history = format!("{before:?} at {}", self.now);
        assert!(before.owner.is_none(), "attached: {history}");
        assert!(self.is_orphan(before) || self.given_up.contains(volume), "not an orphan: {history}");
        assert!(
            !self.cluster_of(before).is_some_and(|c| c.volumes.contains_key(volume))
                || self.given_up.contains(volume),
            "a PersistentVolume refers to it: {history}"
        );
        if let Some(mark) = &before.tombstone {
            assert_eq!(mark.epoch, before.epoch, "attached since it was marked: {history}");
            let since = self.now - mark.at.as_second();
            assert!(since >= self.grace, "marked only {since} s ago: {history}");
        } else {
            assert!(self.given_up.contains(volume), "never marked: {history}");
        }
        self.doomed.insert(volume.clone());
    }

    fn deletes(&self, volume: &VolumeId, key: &str) {
        assert!(key.starts_with(&format!("{volume}/")), "{key} is not of {volume}");
        assert!(self.doomed.contains(volume), "an object of {volume} was deleted, which is no orphan");
        let record = self.bucket.records.get(volume).map(|(r, ..)| r);
        assert_eq!(record.map(|r| r.state), Some(State::Deleting), "{volume} has no record that says so");
        assert!(record.unwrap().owner.is_none(), "{volume} is attached");
    }
}

fn pick<T: Clone>(rng: &mut StdRng, from: &[T]) -> Option<T> {
    if from.is_empty() { None } else { Some(from[rng.random_range(0..from.len())].clone()) }
}

impl Model {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }
}

impl Catalog for Model {
    fn url(&self) -> &StorageUrl {
        &self.1
    }

    fn get(&self, id: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>> {
        let mut w = self.world();
        let fate = w.fate();
        let from = match fate {
            Fate::Answered => &w.bucket,
            Fate::Stale => &w.earlier,
            _ => return Err(failed("read the record")),
        };
        Ok(from.records.get(id).map(|(r, version, _)| (r.clone(), tag(*version))))
    }

    fn create(&self, record: &VolumeRecord) -> Result<Written> {
        let mut w = self.world();
        let fate = w.fate();
        if fate == Fate::Lost {
            return Err(failed("write the record"));
        }
        let written = if w.bucket.records.contains_key(&record.id) {
            Written::LostRace
        } else {
            Written::Done(tag(w.write(record.clone())))
        };
        if fate == Fate::Unanswered { Err(failed("write the record")) } else { Ok(written) }
    }

    fn update(&self, record: &VolumeRecord, with: &Tag) -> Result<Written> {
        let mut w = self.world();
        let fate = w.fate();
        if fate == Fate::Lost {
            return Err(failed("write the record"));
        }
        let before = w.bucket.records.get(&record.id).cloned();
        let written = match before {
            Some((before, version, _)) if tag(version) == *with => {
                if record.state == State::Deleting && before.state != State::Deleting {
                    w.begins(&before);
                }
                assert!(
                    before.state != State::Deleting || record.state == State::Deleting,
                    "a way back out of a deletion: {before:?} {record:?}"
                );
                Written::Done(tag(w.write(record.clone())))
            }
            _ => Written::LostRace,
        };
        if fate == Fate::Unanswered { Err(failed("write the record")) } else { Ok(written) }
    }

    fn delete(&self, id: &VolumeId) -> Result<bool> {
        let mut w = self.world();
        let fate = w.fate();
        if fate == Fate::Lost {
            return Err(failed("remove the record"));
        }
        match w.bucket.records.get(id).map(|(r, ..)| r.state) {
            None => {}
            Some(State::Deleting) => {
                let below = format!("{id}/");
                let left = w.bucket.objects.keys().find(|k| k.starts_with(&below));
                assert!(left.is_none(), "the record goes before {left:?}");
                assert!(
                    !w.bucket.uploads.keys().any(|k| k.starts_with(&below)),
                    "the record goes before an upload"
                );
            }
            Some(other) => panic!("the record of a volume that is {other:?} was to be removed"),
        }
        let was = w.bucket.records.remove(id).is_some();
        if fate == Fate::Unanswered { Err(failed("remove the record")) } else { Ok(was) }
    }

    fn list(&self) -> Box<dyn Iterator<Item = Result<VolumeId>> + '_> {
        unreachable!("the collector lists records with the times of their writes")
    }

    fn data_prefix(&self, _: &VolumeId) -> Result<DataPrefix> {
        unreachable!("the collector looks at objects itself")
    }
}

fn tag(version: u64) -> Tag {
    Tag::of_model(version.to_string())
}

impl Objects for Model {
    fn page(&self, below: &Below, folders: bool, next: Option<&str>) -> Result<Page> {
        let mut w = self.world();
        let fate = w.fate();
        let from = match fate {
            Fate::Answered => &w.bucket,
            Fate::Stale => &w.earlier,
            _ => return Err(failed("list")),
        };
        let records =
            from.records.iter().map(|(id, (.., at))| (format!(".zerofsctl/volumes/{id}.json"), *at));
        let all: BTreeMap<String, i64> =
            from.objects.iter().map(|(k, t)| (k.clone(), *t)).chain(records).collect();
        let mut page = Page::default();
        let mut entries = 0;
        for (key, time) in all.range(below.as_str().to_owned()..) {
            let Some(rest) = key.strip_prefix(below.as_str()) else { break };
            let name = match rest.find('/').filter(|_| folders) {
                Some(slash) => format!("{}{}", below.as_str(), &rest[..=slash]),
                None => key.clone(),
            };
            if next.is_some_and(|n| name.as_str() <= n) {
                continue;
            }
            if page.next.as_deref() == Some(&name) {
                continue;
            }
            if entries == PAGE {
                return Ok(page);
            }
            entries += 1;
            page.next = Some(name.clone());
            if name.ends_with('/') {
                page.folders.push(name[below.as_str().len()..].to_owned());
            } else {
                page.objects.push(Object { key: name, size: 10, modified: at(*time) });
            }
        }
        page.next = None;
        Ok(page)
    }

    fn delete(&self, volume: &VolumeId, keys: &[String]) -> Result<Vec<(String, Error)>> {
        let mut w = self.world();
        let fate = w.fate();
        assert!(keys.len() <= MAX_BATCH);
        keys.iter().for_each(|k| w.deletes(volume, k));
        if fate == Fate::Lost {
            return Err(failed("delete"));
        }
        let mut refused = Vec::new();
        for key in keys {
            // Some are taken, some are not.
            if fate != Fate::Answered && w.rng.random() {
                refused.push((key.clone(), failed("delete it")));
            } else {
                w.bucket.objects.remove(key);
            }
        }
        if fate == Fate::Unanswered { Err(failed("delete")) } else { Ok(refused) }
    }

    fn uploads(&self, volume: &VolumeId) -> Result<Vec<Upload>> {
        let mut w = self.world();
        match w.fate() {
            // An upload that is in no answer would be lost for ever, so of this the server's word counts.
            Fate::Answered | Fate::Stale => {}
            _ => return Err(failed("list uploads")),
        }
        let below = format!("{volume}/");
        let found = w.bucket.uploads.iter().filter(|(k, _)| k.starts_with(&below));
        Ok(found.map(|(key, id)| Upload { key: key.clone(), id: id.clone() }).collect())
    }

    fn abort(&self, volume: &VolumeId, upload: &Upload) -> Result<()> {
        let mut w = self.world();
        let fate = w.fate();
        w.deletes(volume, &upload.key);
        if fate != Fate::Lost {
            w.bucket.uploads.remove(&upload.key);
        }
        if matches!(fate, Fate::Lost | Fate::Unanswered) { Err(failed("abort")) } else { Ok(()) }
    }

    fn tidy(&self, _: &VolumeId) -> Result<()> {
        Ok(())
    }

    fn record_written(&self, volume: &VolumeId) -> Result<Option<Timestamp>> {
        let mut w = self.world();
        match w.fate() {
            Fate::Answered | Fate::Stale => Ok(w.bucket.records.get(volume).map(|(.., t)| at(*t))),
            _ => Err(failed("examine the record")),
        }
    }

    fn keeps_versions(&self) -> Result<Option<bool>> {
        Ok(None)
    }

    fn now(&self) -> Result<Timestamp> {
        // Carried forward from the last answer: no request.
        let w = self.world();
        if w.dead { Err(failed("ask for the time")) } else { Ok(at(w.now)) }
    }
}

/// A cluster's API server.
struct Api<'a> {
    model: &'a Model,
    cluster: String,
}

impl Api<'_> {
    fn all(&self) -> Result<BTreeMap<VolumeId, Vec<Reference>>> {
        let mut w = self.model.world();
        // A stale list is none of the answers that a witness may give.
        if matches!(w.fate(), Fate::Lost | Fate::Unanswered) || !w.clusters[&self.cluster].reachable {
            return Err(failed("list PersistentVolumes"));
        }
        let reference = |retained: bool| Reference {
            kind: if retained { ReferenceKind::RetainedVolume } else { ReferenceKind::PersistentVolume },
            name: format!("pv in {}", self.cluster),
        };
        Ok(w.clusters[&self.cluster]
            .volumes
            .iter()
            .map(|(v, kept)| (v.clone(), vec![reference(*kept)]))
            .collect())
    }
}

impl Witness for Api<'_> {
    fn name(&self) -> String {
        format!("cluster {}", self.cluster)
    }

    fn testify(&self) -> Result<Testimony> {
        Ok(Testimony { cluster: Some(self.cluster.clone()), references: self.all()? })
    }

    fn refers(&self, volume: &VolumeId) -> Result<Vec<Reference>> {
        Ok(self.all()?.remove(volume).unwrap_or_default())
    }
}

/// A random world: two clusters that share a bucket, volumes in every state, and what else lies in buckets.
fn world(seed: u64) -> Model {
    let mut rng = StdRng::seed_from_u64(seed);
    // The store's clock is nobody else's: a day off, or years.
    let now = 1_700_000_000 + rng.random_range(-90_000..90_000) + rng.random_range(0..2) * 500_000_000;
    let mut w = World {
        now,
        bucket: Bucket::default(),
        earlier: Bucket::default(),
        version: 0,
        clusters: ["c-1", "c-2"]
            .into_iter()
            .map(|c| (c.to_owned(), Cluster { volumes: BTreeMap::new(), reachable: true }))
            .collect(),
        rng,
        faults: 0,
        dies_in: None,
        dead: false,
        requests: 0,
        event: None,
        happened: None,
        given_up: BTreeSet::new(),
        at_work: BTreeSet::new(),
        doomed: BTreeSet::new(),
        restless: false,
        grace: GRACE,
    };
    let volumes = w.rng.random_range(3..9);
    for n in 0..volumes {
        // Names that begin like each other.
        let volume = id(&format!("vol{}", [1, 10, 100, 11, 2, 20, 21, 3, 30][n]));
        let old = now - w.rng.random_range(4000..200_000);
        let kinds = [
            "manifest/000001.manifest",
            "manifest/000002.manifest",
            "compacted/01A.sst",
            ".zerofs_bucket_id",
        ];
        for kind in &kinds[..w.rng.random_range(1..=kinds.len())] {
            w.bucket.objects.insert(format!("{volume}/{kind}"), old);
        }
        if w.rng.random_ratio(1, 4) {
            w.bucket.uploads.insert(format!("{volume}/compacted/01B.sst"), "u1".into());
        }
        if w.rng.random_ratio(1, 8) {
            // Older driver's, or nobody knows whose.
            continue;
        }
        let mut record = VolumeRecord::new(volume.clone(), ByteSize(1 << 30), None, at(old));
        let cluster = ["c-1", "c-2"][w.rng.random_range(0..2)];
        match w.rng.random_range(0..10) {
            0 => {}
            1 => record.cluster = Some("c-unknown".into()),
            _ => {
                record.cluster = Some(cluster.into());
                if w.rng.random_ratio(1, 2) {
                    let retained = w.rng.random_ratio(1, 4);
                    w.clusters.get_mut(cluster).unwrap().volumes.insert(volume.clone(), retained);
                }
            }
        }
        if w.rng.random_ratio(1, 8) {
            record.state = State::Released;
        }
        if w.rng.random_ratio(1, 6) {
            record.owner = Some(owner());
        }
        w.version += 1;
        let version = w.version;
        w.bucket.records.insert(volume, (record, version, old));
    }
    // Each cluster has a volume that stays, so that none of them is silent.
    for cluster in ["c-1", "c-2"] {
        let volume = id(&format!("kept-{cluster}"));
        w.clusters.get_mut(cluster).unwrap().volumes.insert(volume.clone(), false);
        w.bucket.objects.insert(format!("{volume}/manifest/000001.manifest"), now - 5000);
    }
    w.bucket.objects.insert("photos/2024.jpg".into(), now - 1);
    w.bucket.objects.insert("vol1.txt".into(), now - 1);
    w.earlier = w.bucket.clone();
    Model(Mutex::new(w), "s3://model".parse().unwrap())
}

fn options(limit: Limit) -> Options {
    Options {
        limit,
        workers: 1,
        grace: SignedDuration::from_secs(GRACE),
        patience: Patience { young: SignedDuration::from_secs(3600), quiet: SignedDuration::from_secs(300) },
        ..Options::default()
    }
}

/// A process that marks and sweeps; what it answers does not matter, only what it does.
fn run(model: &Model, options: &Options) -> Result<(gc::Marked, gc::Swept)> {
    let apis = ["c-1", "c-2"].map(|c| Api { model, cluster: c.to_owned() });
    let reachable: Vec<&Api<'_>> =
        apis.iter().filter(|a| model.world().clusters[&a.cluster].reachable).collect();
    let witnesses: Vec<&dyn Witness> = reachable.iter().map(|a| *a as &dyn Witness).collect();
    let collector = Collector {
        catalog: model,
        objects: model,
        witnesses: &witnesses,
        options: options.clone(),
        watch: &Unwatched,
    };
    let scan = collector.scan()?;
    let plan = collector.plan_mark(&scan)?;
    let marked = collector.mark(&scan, &plan)?;
    let scan = collector.scan()?;
    let plan = collector.plan_sweep(&scan)?;
    let swept = collector.sweep(&scan, &plan)?;
    Ok((marked, swept))
}

fn some_seconds(w: &mut World) -> i64 {
    match w.rng.random_range(0..4) {
        0 => 0,
        1 => w.rng.random_range(0..600),
        _ => w.rng.random_range(0..3 * GRACE),
    }
}

/// One case, from a seed.
fn case(seed: u64) {
    let model = world(seed);
    let before: BTreeSet<String> = model.world().bucket.objects.keys().cloned().collect();
    let rounds = model.world().rng.random_range(1..6);
    for _ in 0..rounds {
        let (limit, named, delete) = {
            let mut w = model.world();
            let w = &mut *w;
            w.now += some_seconds(w);
            w.faults = [0, 2, 10, 30][w.rng.random_range(0..4)];
            w.dead = false;
            w.dies_in = w.rng.random_ratio(1, 2).then(|| w.rng.random_range(1..120));
            w.restless = w.rng.random_ratio(1, 3);
            for cluster in w.clusters.values_mut() {
                cluster.reachable = w.rng.random_ratio(4, 5);
            }
            // Claims come and go, and PersistentVolumes with them.
            for _ in 0..w.rng.random_range(0..3) {
                let cluster = ["c-1", "c-2"][w.rng.random_range(0..2)];
                let volumes: Vec<VolumeId> = w.clusters[cluster]
                    .volumes
                    .keys()
                    .filter(|v| !v.as_str().starts_with("kept"))
                    .cloned()
                    .collect();
                if let Some(volume) = pick(&mut w.rng, &volumes) {
                    w.clusters.get_mut(cluster).unwrap().volumes.remove(&volume);
                }
                // One may come back for a volume that was marked meanwhile.
                let claimed: Vec<VolumeId> = (w.bucket.records.values().map(|(record, ..)| record))
                    .filter(|r| r.cluster.as_deref() == Some(cluster) && r.state != State::Deleting)
                    .map(|r| r.id.clone())
                    .collect();
                if w.rng.random_ratio(1, 3)
                    && let Some(volume) = pick(&mut w.rng, &claimed)
                {
                    w.clusters.get_mut(cluster).unwrap().volumes.insert(volume, false);
                }
                w.anything();
            }
            let volumes: Vec<VolumeId> = w.bucket.records.keys().cloned().collect();
            let named = if w.rng.random_ratio(1, 5) { pick(&mut w.rng, &volumes) } else { None };
            let all: Vec<VolumeId> = volumes
                .iter()
                // DeleteVolume is called for a volume whose PersistentVolume is on its way out.
                .filter(|v| !v.as_str().starts_with("kept"))
                .cloned()
                .collect();
            let delete = if w.rng.random_ratio(1, 5) { pick(&mut w.rng, &all) } else { None };
            w.given_up.extend(named.iter().chain(&delete).cloned());
            let limit = if w.rng.random() { Limit::default() } else { Limit::Percent(100) };
            (limit, named, delete)
        };
        if let Some(volume) = &delete {
            let grace = model.world().rng.random::<bool>().then(|| SignedDuration::from_secs(GRACE));
            let own = DeleteOptions { grace, threads: 1, ..DeleteOptions::default() };
            // A deletion without a grace period of its own passes over the sweep's.
            if grace.is_none() {
                model.world().grace = 0;
            }
            model.world().at_work.insert(volume.clone());
            let _ = gc::delete_volume(&model, &model, volume, &own, &Unwatched);
            let mut w = model.world();
            w.grace = GRACE;
            let named = named.iter().cloned().collect::<Vec<_>>();
            w.forget_words();
            w.given_up.extend(named);
        }
        {
            let mut w = model.world();
            w.at_work.extend(named.iter().cloned());
        }
        let mut options = options(limit);
        options.named.extend(named);
        let _ = run(&model, &options);
        model.world().forget_words();
    }
    settle(&model);
    let w = model.world();
    // Nothing of a volume that was never given up is missing.
    for key in &before {
        let volume = key.split('/').next().unwrap().parse().ok();
        if !volume.is_some_and(|v| w.doomed.contains(&v)) {
            assert!(w.bucket.objects.contains_key(key), "{key} is missing");
        }
    }
}

/// The faults stop, and every orphan goes.
fn settle(model: &Model) {
    {
        let mut w = model.world();
        let w = &mut *w;
        (w.faults, w.dies_in, w.dead, w.restless, w.event) = (0, None, false, false, None);
        w.clusters.values_mut().for_each(|c| c.reachable = true);
        w.earlier = w.bucket.clone();
    }
    for _ in 0..3 {
        // Past the hour in which a record counts as young, and past the grace period.
        model.world().now += 2 * GRACE;
        run(model, &options(Limit::Percent(100))).expect("nothing fails any more");
    }
    let w = model.world();
    for (record, ..) in w.bucket.records.values() {
        // A mark in a cluster that nobody asked stays what it is.
        let asked = record.cluster.as_deref() != Some("c-unknown");
        assert!(record.state != State::Deleting, "a deletion was not finished: {record:?}");
        assert!(record.mark().is_none() || !asked, "a mark was neither swept nor taken away: {record:?}");
        let reachable_orphan =
            w.is_orphan(record) && record.state == State::Ready && record.cluster.is_some();
        assert!(!reachable_orphan, "an orphan is left: {record:?}");
    }
    for volume in &w.doomed {
        if !w.bucket.records.contains_key(volume) {
            let below = format!("{volume}/");
            assert!(!w.bucket.objects.keys().any(|k| k.starts_with(&below)), "objects of {volume} are left");
            assert!(!w.bucket.uploads.keys().any(|k| k.starts_with(&below)), "an upload of {volume} is left");
        }
    }
}

#[test]
fn no_object_of_a_wanted_volume_is_deleted_and_every_orphan_goes() {
    if let Ok(seed) = std::env::var("ZEROFSCTL_SEED") {
        return case(seed.parse().expect("ZEROFSCTL_SEED is a number"));
    }
    let cases = support::cases(3000);
    let threads = 2;
    std::thread::scope(|s| {
        for thread in 0..threads {
            s.spawn(move || {
                for n in (thread..u64::from(cases)).step_by(threads as usize) {
                    let result = std::panic::catch_unwind(|| case(n));
                    if let Err(e) = result {
                        eprintln!("repeat it with ZEROFSCTL_SEED={n}");
                        std::panic::resume_unwind(e);
                    }
                }
            });
        }
    });
}

/// A world with one marked orphan that is due, one live volume, and no faults.
fn due() -> (Model, VolumeId) {
    let model = world(7);
    let volume = id("orphan");
    {
        let mut w = model.world();
        let w = &mut *w;
        w.bucket.records.clear();
        w.clusters.values_mut().for_each(|c| c.volumes.retain(|v, _| v.as_str().starts_with("kept")));
        let old = w.now - 100_000;
        let mut record = VolumeRecord::new(volume.clone(), ByteSize(1 << 30), None, at(old));
        record.cluster = Some("c-1".into());
        w.version += 1;
        let version = w.version;
        w.bucket.records.insert(volume.clone(), (record, version, old));
        for n in 0..7 {
            w.bucket.objects.insert(format!("{volume}/compacted/{n}.sst"), old);
        }
        w.bucket.objects.insert(format!("{volume}/manifest/000001.manifest"), old);
        w.bucket.uploads.insert(format!("{volume}/compacted/x.sst"), "u".into());
    }
    let (marked, _) = run(&model, &options(Limit::default())).unwrap();
    assert_eq!(marked.marked, std::slice::from_ref(&volume));
    model.world().now += GRACE + 1;
    (model, volume)
}

#[test]
fn an_attach_or_restore_at_every_point_of_a_sweep_is_whole_or_refused() {
    for event in [Event::Attach, Event::AttachAndRelease, Event::Restore] {
        let (mut won, mut lost) = (0, 0);
        for point in 1.. {
            let (model, volume) = due();
            let (count, whole) = {
                let mut w = model.world();
                w.event = Some((w.requests + point, volume.clone(), event));
                let below = format!("{volume}/");
                let keys: BTreeSet<String> =
                    w.bucket.objects.keys().filter(|k| k.starts_with(&below)).cloned().collect();
                (w.requests, keys)
            };
            let swept = run(&model, &options(Limit::default()));
            let w = model.world();
            match w.happened {
                // It was attached or restored in time: nothing is missing, and it stays.
                Some(true) => {
                    won += 1;
                    swept.expect("a race is no error");
                    assert!(whole.iter().all(|k| w.bucket.objects.contains_key(k)), "{event:?} at {point}");
                    assert_ne!(w.bucket.records[&volume].0.state, State::Deleting, "{event:?} at {point}");
                }
                // It was too late: it was refused, and the deletion is finished.
                Some(false) => {
                    lost += 1;
                    let (_, swept) = swept.expect("a race is no error");
                    assert!(
                        matches!(swept.volumes[0].1, Outcome::Gone { objects: 8, uploads: 1, .. }),
                        "{swept:?}"
                    );
                    assert!(!w.bucket.records.contains_key(&volume), "{event:?} at {point}");
                }
                None => {
                    assert!(w.requests < count + point, "the sweep is over before this point");
                    break;
                }
            }
        }
        assert!(won > 10 && lost > 5, "{event:?}: {won} in time, {lost} too late");
    }
}

#[test]
fn a_sweep_that_dies_at_every_point_is_finished_by_the_next() {
    for point in 1.. {
        let (model, volume) = due();
        {
            let mut w = model.world();
            w.dies_in = Some(point);
        }
        let first = run(&model, &options(Limit::default()));
        let died = model.world().dead;
        {
            let mut w = model.world();
            (w.dead, w.dies_in) = (false, None);
            let begun = w.bucket.records.get(&volume).is_some_and(|(r, ..)| r.state == State::Deleting);
            let below = format!("{volume}/");
            let left = w.bucket.objects.keys().filter(|k| k.starts_with(&below)).count();
            assert!(
                left == 8 || begun || !w.bucket.records.contains_key(&volume),
                "{left} objects left at {point}"
            );
            if begun {
                assert!(!w.happen(&volume, Event::Attach), "a half-deleted volume was attached at {point}");
            }
        }
        // The dead one's last requests may still be under way, so the record waits for its time to pass.
        for _ in 0..2 {
            run(&model, &options(Limit::default())).expect("nothing fails any more");
            model.world().now += 400;
        }
        let w = model.world();
        assert!(!w.bucket.records.contains_key(&volume), "at {point}: {:?}", w.bucket.records[&volume]);
        assert!(!w.bucket.objects.keys().any(|k| k.starts_with("orphan/")), "at {point}");
        assert!(!w.bucket.uploads.keys().any(|k| k.starts_with("orphan/")), "at {point}");
        if !died {
            first.expect("it was not cut short");
            return;
        }
    }
}

#[test]
fn an_unreachable_cluster_or_an_error_ends_it_with_nothing_deleted() {
    let (model, volume) = due();
    let apis = ["c-1", "c-2"].map(|c| Api { model: &model, cluster: c.to_owned() });
    let witnesses: Vec<&dyn Witness> = apis.iter().map(|a| a as &dyn Witness).collect();
    let collector = Collector {
        catalog: &model,
        objects: &model,
        witnesses: &witnesses,
        options: options(Limit::default()),
        watch: &Unwatched,
    };
    let scan = collector.scan().unwrap();
    let plan = collector.plan_sweep(&scan).unwrap();
    assert_eq!(plan.lines.len(), 1);
    // It falls silent between the scan and the last look.
    model.world().clusters.get_mut("c-1").unwrap().reachable = false;
    let e = collector.sweep(&scan, &plan).unwrap_err();
    assert_eq!((e.kind(), e.volume()), (Kind::Unreachable, Some(&volume)), "{e}");
    assert!(e.message().ends_with("; nothing was deleted"), "{e}");
    let e = collector.scan().unwrap_err();
    assert_eq!(e.kind(), Kind::Unreachable, "{e}");
    assert!(e.message().contains("c-1") && e.message().ends_with("; nothing was deleted"), "{e}");
    let w = model.world();
    assert!(w.bucket.records[&volume].0.mark().is_some() && w.doomed.is_empty());
}

#[test]
fn a_volume_that_csi_gives_to_a_node_before_the_last_look_is_kept_and_stops_no_sweep() {
    let (model, volume) = due();
    let apis = ["c-1", "c-2"].map(|c| Api { model: &model, cluster: c.to_owned() });
    let witnesses: Vec<&dyn Witness> = apis.iter().map(|a| a as &dyn Witness).collect();
    let collector = Collector {
        catalog: &model,
        objects: &model,
        witnesses: &witnesses,
        options: options(Limit::default()),
        watch: &Unwatched,
    };
    let scan = collector.scan().unwrap();
    let plan = collector.plan_sweep(&scan).unwrap();
    assert_eq!(plan.lines.len(), 1);
    {
        let mut w = model.world();
        let w = &mut *w;
        w.version += 1;
        let (record, version, _) = w.bucket.records.get_mut(&volume).unwrap();
        *version = w.version;
        record.published = Some(zerofsctl::catalog::Published {
            node: "node-b".into(),
            read_only: false,
            mode: "SINGLE_NODE_WRITER".into(),
            since: at(w.now),
        });
    }
    let swept = collector.sweep(&scan, &plan).unwrap();
    let kept =
        matches!(&swept.volumes[..], [(_, Outcome::Kept(why))] if why.contains("published to node node-b"));
    assert!(kept, "{swept:?}");
    let w = model.world();
    assert!(w.doomed.is_empty() && w.bucket.records[&volume].0.mark().is_none());
}

#[test]
fn an_error_in_the_middle_of_a_sweep_tells_what_is_gone() {
    let (model, volume) = due();
    let first = id("first");
    {
        // Its deletion has begun, so that nobody needs to be asked.
        let mut w = model.world();
        let w = &mut *w;
        let (mut record, ..) = w.bucket.records[&volume].clone();
        (record.id, record.tombstone, record.state) = (first.clone(), None, State::Deleting);
        w.version += 1;
        let (version, old) = (w.version, w.now - 50_000);
        w.bucket.records.insert(first.clone(), (record, version, old));
        w.doomed.insert(first.clone());
        w.bucket.objects.insert(format!("{first}/manifest/000001.manifest"), old);
    }
    let apis = ["c-1", "c-2"].map(|c| Api { model: &model, cluster: c.to_owned() });
    let witnesses: Vec<&dyn Witness> = apis.iter().map(|a| a as &dyn Witness).collect();
    let collector = Collector {
        catalog: &model,
        objects: &model,
        witnesses: &witnesses,
        options: options(Limit::default()),
        watch: &Unwatched,
    };
    let scan = collector.scan().unwrap();
    let plan = collector.plan_sweep(&scan).unwrap();
    assert_eq!(plan.lines.iter().map(|l| &l.volume).collect::<Vec<_>>(), [&first, &volume]);
    model.world().clusters.get_mut("c-1").unwrap().reachable = false;
    let e = collector.sweep(&scan, &plan).unwrap_err();
    assert_eq!((e.kind(), e.volume()), (Kind::Unreachable, Some(&volume)), "{e}");
    assert!(e.message().contains("; 1 volumes were deleted before"), "{e}");
    assert!(!e.message().contains("nothing was deleted"), "{e}");
    let w = model.world();
    assert!(!w.bucket.records.contains_key(&first) && w.bucket.records[&volume].0.mark().is_some());
}

#[test]
fn a_cluster_that_knows_of_no_volume_at_all_is_not_believed() {
    let (model, volume) = due();
    model.world().clusters.get_mut("c-1").unwrap().volumes.clear();
    let e = run(&model, &options(Limit::Percent(100))).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    assert!(e.to_string().contains("c-1") && e.hint_text().unwrap().contains("gc-s3 mark"), "{e}");
    assert!(model.world().bucket.records.contains_key(&volume) && model.world().doomed.is_empty());
}

#[test]
fn a_plan_that_is_too_large_is_refused_whole() {
    let (model, volume) = due();
    {
        let mut w = model.world();
        let (record, ..) = w.bucket.records[&volume].clone();
        for n in 0..30 {
            let more = VolumeRecord { id: id(&format!("more{n}")), tombstone: None, ..record.clone() };
            w.version += 1;
            let (version, old) = (w.version, w.now - 50_000);
            w.bucket.records.insert(more.id.clone(), (more, version, old));
        }
    }
    let e = run(&model, &options(Limit::default())).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    assert!(e.to_string().contains("30 of 31") && e.to_string().contains("that is 3"), "{e}");
    let w = model.world();
    assert!(
        w.doomed.is_empty() && w.bucket.records.values().filter(|(r, ..)| r.mark().is_some()).count() == 1
    );
}

#[test]
fn delete_volume_refuses_what_is_in_use_and_finishes_what_was_cut_short() {
    let (model, volume) = due();
    let now = DeleteOptions { threads: 1, ..DeleteOptions::default() };
    {
        let mut w = model.world();
        w.grace = 0;
        w.given_up.insert(volume.clone());
        assert!(w.happen(&volume, Event::Attach));
        w.given_up.insert(volume.clone());
    }
    let e = gc::delete_volume(&model, &model, &volume, &now, &Unwatched).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    {
        // Released, and then a server that is in no catalog writes.
        let mut w = model.world();
        w.release(&volume);
        w.now += 10;
        let time = w.now;
        w.bucket.objects.insert(format!("{volume}/manifest/900000.manifest"), time);
    }
    let e = gc::delete_volume(&model, &model, &volume, &now, &Unwatched).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    assert!(e.to_string().contains("a server may be running"), "{e}");
    model.world().now += 301;
    let later = DeleteOptions { grace: Some(SignedDuration::from_hours(2)), ..now };
    let due = match gc::delete_volume(&model, &model, &volume, &later, &Unwatched).unwrap() {
        Deletion::Marked { due } => due,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        gc::delete_volume(&model, &model, &volume, &later, &Unwatched).unwrap(),
        Deletion::Marked { due }
    );
    model.world().now += 2 * 3600 + 10;
    model.world().dies_in = Some(14);
    gc::delete_volume(&model, &model, &volume, &later, &Unwatched).unwrap_err();
    {
        let mut w = model.world();
        (w.dead, w.dies_in) = (false, None);
        w.now += 1000;
        assert_eq!(w.bucket.records[&volume].0.state, State::Deleting);
    }
    assert!(matches!(
        gc::delete_volume(&model, &model, &volume, &now, &Unwatched).unwrap(),
        Deletion::Gone { .. }
    ));
    assert_eq!(gc::delete_volume(&model, &model, &volume, &now, &Unwatched).unwrap(), Deletion::WasGone);
    // An older driver's volume has no record: the word of its owner is enough.
    {
        let mut w = model.world();
        let old = w.now - 5000;
        w.given_up.insert(id("ancient"));
        w.bucket.objects.insert("ancient/manifest/000001.manifest".into(), old);
    }
    let gone = gc::delete_volume(&model, &model, &id("ancient"), &now, &Unwatched).unwrap();
    assert_eq!(gone, Deletion::Gone { objects: 1, bytes: 10 });
    let e = gc::delete_volume(&model, &model, &id("photos"), &now, &Unwatched).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
}

#[test]
fn a_scan_changes_nothing_and_gives_every_volume_a_reason() {
    for seed in 0..200 {
        let model = world(seed);
        let before = model.world().bucket.clone();
        let apis = ["c-1", "c-2"].map(|c| Api { model: &model, cluster: c.to_owned() });
        let witnesses: Vec<&dyn Witness> = apis.iter().map(|a| a as &dyn Witness).collect();
        let collector = Collector {
            catalog: &model,
            objects: &model,
            witnesses: &witnesses,
            options: options(Limit::default()),
            watch: &Unwatched,
        };
        let scan = collector.scan().unwrap();
        assert!(model.world().bucket == before, "a scan writes");
        assert!(scan.volumes.iter().all(|v| !v.judgement.reason.is_empty()));
        for seen in &scan.volumes {
            let record = before.records.get(&seen.volume).map(|(r, ..)| r);
            let orphan =
                record.is_some_and(|r| model.world().is_orphan(r)) && record.unwrap().state == State::Ready;
            assert_eq!(seen.judgement.verdict == Verdict::Orphan, orphan, "{seen:?}");
        }
        assert!(scan.strange.contains(&"vol1.txt".to_owned()));
    }
}

#[test]
fn whoever_wants_it_between_the_plan_and_the_last_look_keeps_it() {
    type Change = fn(&mut World, &VolumeId);
    let changes: [(Change, &str); 3] = [
        (
            |w, volume| _ = w.clusters.get_mut("c-1").unwrap().volumes.insert(volume.clone(), false),
            "PersistentVolume",
        ),
        (
            |w, volume| {
                let now = w.now;
                w.bucket.objects.insert(format!("{volume}/manifest/000002.manifest"), now);
            },
            "something wrote to it",
        ),
        (|w, volume| assert!(w.happen(volume, Event::AttachAndRelease)), "attached"),
    ];
    for (change, why) in changes {
        let (model, volume) = due();
        let apis = ["c-1", "c-2"].map(|c| Api { model: &model, cluster: c.to_owned() });
        let witnesses: Vec<&dyn Witness> = apis.iter().map(|a| a as &dyn Witness).collect();
        let collector = Collector {
            catalog: &model,
            objects: &model,
            witnesses: &witnesses,
            options: options(Limit::default()),
            watch: &Unwatched,
        };
        let scan = collector.scan().unwrap();
        let plan = collector.plan_sweep(&scan).unwrap();
        assert_eq!(plan.lines.len(), 1);
        change(&mut model.world(), &volume);
        let swept = collector.sweep(&scan, &plan).unwrap();
        match &swept.volumes[..] {
            [(_, Outcome::Kept(reason))] => assert!(reason.contains(why), "{reason}"),
            other => panic!("{why}: {other:?}"),
        }
        let w = model.world();
        assert!(
            w.doomed.is_empty() && w.bucket.records[&volume].0.mark().is_none(),
            "{why}: it lost its mark"
        );
    }
}
