//! A scan: everything that is known of every volume, and the verdicts. It only looks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use jiff::Timestamp;

use super::evidence::{Facts, Recorded, Reference, Testimony};
use super::measure::measure;
use super::verdict::{Evidence, Judgement, Verdict, judge};
use super::{Collector, while_learning};
use crate::catalog::{self, Below, StorageUrl, Tag, VolumeRecord};
use crate::error::{Error, Kind, Result};
use crate::values::VolumeId;

/// A volume, or what might be one.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its name.
    pub volume: VolumeId,
    /// The catalog's record.
    pub record: Recorded,
    /// Which write of the record that was; none without a usable one.
    pub tag: Option<Tag>,
    /// Its objects.
    pub facts: Facts,
    /// What refers to it.
    pub references: Vec<Reference>,
    /// The verdict.
    pub judgement: Judgement,
}

impl Seen {
    /// The record, if there is a usable one.
    pub fn usable(&self) -> Option<(&VolumeRecord, &Tag)> {
        match (&self.record, &self.tag) {
            (Recorded::Yes(record, _), Some(tag)) => Some((record, tag)),
            _ => None,
        }
    }
}

/// What a scan found.
#[derive(Debug, Clone)]
pub struct Scan {
    /// The store.
    pub url: StorageUrl,
    /// The store's time when it began.
    pub now: Timestamp,
    /// By name.
    pub volumes: Vec<Seen>,
    /// The clusters that were asked and answered in full, and those that are gone on the operator's word.
    pub asked: BTreeSet<String>,
    /// Those of them that answered that nothing at all refers to any volume.
    pub silent: BTreeSet<String>,
    /// Folders beside the volumes that cannot be volumes, and files.
    pub strange: Vec<String>,
    /// Whether deleted objects stay as old versions, if the server tells.
    pub keeps_versions: Option<bool>,
}

impl Scan {
    /// How many volumes have a record.
    pub fn recorded(&self) -> usize {
        self.volumes.iter().filter(|v| v.record != Recorded::No).count()
    }

    /// What is known of a volume.
    pub fn seen(&self, volume: &VolumeId) -> Option<&Seen> {
        let at = self.volumes.binary_search_by(|seen| seen.volume.cmp(volume)).ok()?;
        self.volumes.get(at)
    }

    /// How many have this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.volumes.iter().filter(|v| v.judgement.verdict == verdict).count()
    }
}

/// At most so many strange names are told.
const STRANGE: usize = 20;

impl Collector<'_> {
    /// Looks at everything. Records come before what refers to volumes: whatever is referred to later had its record
    /// before, so a volume that is being made is never seen with its record and without its PersistentVolume for long
    /// (and [`Patience::young`](super::Patience) covers that).
    ///
    /// # Errors
    /// Any error is one of the whole scan; a record that cannot be used is none, its volume is `unknown`.
    pub fn scan(&self) -> Result<Scan> {
        self.scan_inner().map_err(while_learning)
    }

    fn scan_inner(&self) -> Result<Scan> {
        self.watch.stage("reading the catalog");
        let now = self.now()?;
        let keeps_versions = self.objects.keeps_versions()?;
        let records = self.records()?;
        self.watch.stage("asking what refers to volumes");
        let Testimonies { references, asked, silent } = self.testimonies()?;
        self.watch.stage("counting objects");
        let (found, strange) = self.prefixes()?;
        let all: BTreeSet<VolumeId> = records.keys().chain(&found).cloned().collect();
        if let Some(missing) = self.options.named.iter().find(|n| !all.contains(*n)) {
            return Err(Error::new(Kind::NotFound, "there is no such volume in the bucket")
                .on(missing)
                .hint("see what there is: zerofsctl gc-s3 scan"));
        }
        let facts = self.measure_all(all.iter().filter(|v| found.contains(*v)).cloned().collect())?;
        // In a bucket with versions MinIO lists the folders of what was deleted, too: nobody's, and nothing.
        let nothing = |v: &VolumeId| {
            !records.contains_key(v) && facts.get(v).is_some_and(|facts| facts.objects == Some(0))
        };
        let volumes = all
            .into_iter()
            .filter(|volume| !nothing(volume))
            .map(|volume| {
                let (record, tag) = records.get(&volume).cloned().unwrap_or((Recorded::No, None));
                let facts = facts.get(&volume).cloned().unwrap_or(Facts::EMPTY);
                let references = references.get(&volume).cloned().unwrap_or_default();
                let judgement = self.judge(&volume, &record, &references, &asked, &facts, now);
                Seen { volume, record, tag, facts, references, judgement }
            })
            .collect();
        Ok(Scan { url: self.catalog.url().clone(), now, volumes, asked, silent, strange, keeps_versions })
    }

    pub(super) fn judge(
        &self,
        volume: &VolumeId,
        record: &Recorded,
        references: &[Reference],
        asked: &BTreeSet<String>,
        facts: &Facts,
        now: Timestamp,
    ) -> Judgement {
        let named = self.options.named.contains(volume);
        judge(&Evidence { record, references, asked, facts, now, named, patience: self.options.patience })
    }

    /// The records, each with the time of its last write.
    fn records(&self) -> Result<BTreeMap<VolumeId, (Recorded, Option<Tag>)>> {
        let below = Below::records();
        let (mut written, mut next) = (Vec::new(), None);
        loop {
            let page = self.objects.page(&below, false, next.as_deref())?;
            for object in page.objects {
                match catalog::id_of(object.key.strip_prefix(below.as_str()).unwrap_or(&object.key)) {
                    Ok(id) => written.push((id, object.modified)),
                    Err(e) => self.watch.note(&e.to_string()),
                }
            }
            self.check_interrupted()?;
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        let records = Mutex::new(BTreeMap::new());
        super::in_parallel(self.options.workers, written, |(id, modified)| {
            let recorded = match self.catalog.get(&id) {
                // The listing may be of an older write than the record. Then it is younger than we take it for, which an
                // attach in between would explain; the last look before a deletion sees that.
                Ok(Some((record, tag))) => (Recorded::Yes(Box::new(record), modified), Some(tag)),
                // Gone since it was listed.
                Ok(None) => return Ok(()),
                Err(e) if e.kind() == Kind::Refused => (Recorded::Unusable(e.message().to_owned()), None),
                Err(e) => return Err(e),
            };
            records.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(id, recorded);
            self.check_interrupted()
        })?;
        Ok(records.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    pub(super) fn testimonies(&self) -> Result<Testimonies> {
        let mut all = Testimonies { asked: self.options.gone_clusters.clone(), ..Testimonies::default() };
        for witness in self.witnesses {
            let Testimony { cluster, references } =
                witness.testify().map_err(|e| e.context(witness.name()))?;
            if let Some(cluster) = cluster {
                if references.is_empty() {
                    all.silent.insert(cluster.clone());
                }
                all.asked.insert(cluster);
            }
            for (volume, more) in references {
                all.references.entry(volume).or_default().extend(more);
            }
            self.check_interrupted()?;
        }
        Ok(all)
    }

    /// The folders of the store that can be volumes, and what else is there.
    fn prefixes(&self) -> Result<(BTreeSet<VolumeId>, Vec<String>)> {
        let (mut volumes, mut strange, mut next) = (BTreeSet::new(), Vec::new(), None);
        let mut odd = |name: &str| {
            if strange.len() < STRANGE {
                strange.push(name.chars().take(80).flat_map(char::escape_debug).collect());
            }
        };
        loop {
            let page = self.objects.page(&Below::root(), true, next.as_deref())?;
            for folder in &page.folders {
                let name = folder.trim_end_matches('/');
                match name.parse::<VolumeId>() {
                    Ok(id) => _ = volumes.insert(id),
                    Err(_) if name == catalog::FOLDER => {}
                    Err(_) => odd(folder),
                }
            }
            page.objects.iter().for_each(|o| odd(&o.key));
            self.check_interrupted()?;
            next = page.next;
            if next.is_none() {
                return Ok((volumes, strange));
            }
        }
    }

    fn measure_all(&self, volumes: Vec<VolumeId>) -> Result<BTreeMap<VolumeId, Facts>> {
        let facts = Mutex::new(BTreeMap::new());
        let workers = self.options.workers;
        // A few large volumes are shared out themselves.
        let inside = if workers == 1 { 1 } else { (2 * workers / volumes.len().max(1)).max(2) };
        super::in_parallel(workers, volumes, |volume| {
            let found = measure(self.objects, &volume, inside, self.watch)?;
            self.watch.volume(&volume);
            facts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(volume, found);
            self.check_interrupted()
        })?;
        Ok(facts.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// What all witnesses said together.
#[derive(Debug, Clone, Default)]
pub(super) struct Testimonies {
    pub(super) references: BTreeMap<VolumeId, Vec<Reference>>,
    pub(super) asked: BTreeSet<String>,
    pub(super) silent: BTreeSet<String>,
}
