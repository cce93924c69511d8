//! What a mark or a sweep would do: plain data, to be shown, confirmed, and saved. A saved plan runs only if a new scan
//! comes to the same.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Collector;
use super::scan::{Scan, Seen};
use super::verdict::Verdict;
use crate::catalog::{MarkedBy, State, StorageUrl};
use crate::error::{Doing, Error, Kind, Result};
use crate::values::VolumeId;

/// The version of a saved plan.
const FORMAT: u32 = 1;

/// One volume that is to be marked or deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The volume.
    pub volume: VolumeId,
    /// Its attach epoch.
    pub epoch: u64,
    /// When it was marked; none if it is to be marked now.
    pub marked: Option<Timestamp>,
    /// Its deletion had begun before.
    pub begun: bool,
    /// How many objects it has.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Why.
    pub reason: String,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    format: u32,
    /// The store.
    pub url: StorageUrl,
    /// The store's time of the scan.
    pub made: Timestamp,
    /// What is to be marked or deleted.
    pub lines: Vec<Line>,
    /// Marked volumes that turned out to be wanted, and why: their marks go.
    pub unmark: Vec<(VolumeId, String)>,
    /// Marked volumes whose time has not come, and when it will.
    pub waiting: Vec<(VolumeId, Timestamp)>,
}

impl Plan {
    /// How many objects it deletes, as far as they were counted.
    pub fn objects(&self) -> u64 {
        self.lines.iter().map(|l| l.objects).sum()
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.lines.iter().map(|l| l.bytes).sum()
    }

    /// Writes it to a file that only its owner can read.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::failed(format!("cannot encode the plan: {e}")))?;
        text.push('\n');
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder).doing("write the plan in", folder)?;
        std::io::Write::write_all(&mut file, text.as_bytes()).doing("write the plan", path)?;
        file.persist(path).map_err(|e| e.error).doing("write the plan", path)?;
        Ok(())
    }

    /// Reads a saved one.
    pub fn load(path: &Path) -> Result<Plan> {
        let hint = "make a new one: zerofsctl gc-s3 sweep --plan FILE without --yes";
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::usage(format!("there is no plan {}", path.display())).hint(hint));
            }
            Err(e) => return Err(e).doing("read the plan", path),
        };
        let plan: Plan = serde_json::from_str(&text).map_err(|e| {
            let (line, column) = (e.line(), e.column());
            Error::usage(format!("{} is no plan: not valid at line {line} column {column}", path.display()))
                .hint(hint)
        })?;
        if plan.format != FORMAT {
            return Err(Error::usage(format!("the plan has format {}, not {FORMAT}", plan.format)).hint(hint));
        }
        Ok(plan)
    }

    /// Fails unless `now`, made by a new scan, deletes the same volumes in the same state.
    pub fn require_same(&self, now: &Plan) -> Result<()> {
        if self.url != now.url {
            return Err(Error::usage(format!("the plan is for {}, not {}", self.url, now.url))
                .hint(format!("give --storage-url {}", self.url)));
        }
        let key = |l: &Line| (l.volume.clone(), l.epoch, l.marked, l.begun);
        let differs = |a: &Plan, b: &Plan| {
            a.lines.iter().find(|l| !b.lines.iter().any(|o| key(o) == key(l))).map(|l| l.volume.clone())
        };
        // A deletion that has begun since then is one that this plan began.
        let (planned, found) = (self.settled(now), now.settled(self));
        let difference = match (differs(&planned, &found), differs(&found, &planned)) {
            (None, None) => return Ok(()),
            (Some(volume), _) => (volume, "is no longer to be deleted"),
            (None, Some(volume)) => (volume, "is to be deleted now, and is not in the plan"),
        };
        Err(Error::new(
            Kind::Conflict,
            format!(
                "the plan does not hold any more: volume {} {}; nothing was deleted",
                difference.0, difference.1
            ),
        )
        .hint("make a new one and look at it: zerofsctl gc-s3 sweep --plan FILE"))
    }

    /// Without the volumes that one of both has begun to delete: finishing them needs no new consent.
    fn settled(&self, other: &Plan) -> Plan {
        let begun = |v: &VolumeId| self.lines.iter().chain(&other.lines).any(|l| l.volume == *v && l.begun);
        let lines = self.lines.iter().filter(|l| !begun(&l.volume)).cloned().collect();
        Plan { lines, ..self.clone() }
    }
}

impl Collector<'_> {
    /// What a mark would do: orphans that are not marked yet.
    pub fn plan_mark(&self, scan: &Scan) -> Result<Plan> {
        self.plan(scan, "mark", |seen| {
            let (record, _) = seen.usable()?;
            let wanted = self.options.named.is_empty() || self.options.named.contains(&seen.volume);
            (wanted && record.state != State::Deleting && record.mark().is_none()).then(|| line(seen, None))
        })
        .and_then(|plan| match self.refused_name(scan) {
            Some(e) => Err(e),
            None => Ok(plan),
        })
    }

    /// What a sweep would do: orphans that were marked long enough ago, and deletions that have begun.
    pub fn plan_sweep(&self, scan: &Scan) -> Result<Plan> {
        let mut plan = self.plan(scan, "delete", |seen| {
            let (record, _) = seen.usable()?;
            if record.state == State::Deleting {
                return Some(Line { begun: true, ..line(seen, None) });
            }
            let mark = record.mark()?;
            (mark.due(self.options.grace) <= scan.now).then(|| line(seen, Some(mark.at)))
        })?;
        plan.waiting = scan
            .volumes
            .iter()
            .filter_map(|seen| {
                let mark = seen.usable()?.0.mark()?;
                let due = mark.due(self.options.grace);
                (due > scan.now).then(|| (seen.volume.clone(), due))
            })
            .collect();
        Ok(plan)
    }

    fn plan(&self, scan: &Scan, verb: &str, select: impl Fn(&Seen) -> Option<Line>) -> Result<Plan> {
        let orphans = scan.volumes.iter().filter(|s| s.judgement.verdict == Verdict::Orphan);
        let lines: Vec<Line> = orphans.filter_map(select).collect();
        let fresh: Vec<&Line> = lines.iter().filter(|l| !l.begun).collect();
        if let Some((line, cluster)) =
            fresh.iter().find_map(|l| Some((l, self.silent_evidence(scan, &l.volume)?)))
        {
            return Err(Error::refused(format!(
                "cluster {cluster} answers that nothing refers to any volume, which is more likely a mistake than the \
                 truth; nothing was changed"
            ))
            .on(&line.volume)
            .hint("check --context; if the cluster is really empty, name the volumes: zerofsctl gc-s3 mark VOLUME"));
        }
        self.options.limit.check(fresh.len(), scan.recorded(), verb)?;
        let unmark = scan
            .volumes
            .iter()
            .filter(|s| !matches!(s.judgement.verdict, Verdict::Orphan | Verdict::Unknown))
            .filter(|s| s.usable().is_some_and(|(r, _)| r.tombstone.is_some() && r.owner.is_none()))
            .map(|s| (s.volume.clone(), s.judgement.reason.clone()))
            .collect();
        Ok(Plan { format: FORMAT, url: scan.url.clone(), made: scan.now, lines, unmark, waiting: Vec::new() })
    }

    /// The cluster on whose word alone the volume is an orphan, when it is a cluster that knows of no volume at all.
    fn silent_evidence(&self, scan: &Scan, volume: &VolumeId) -> Option<String> {
        let seen = scan.seen(volume)?;
        let (record, _) = seen.usable()?;
        let said =
            self.options.named.contains(volume) || record.mark().is_some_and(|m| m.by != MarkedBy::Scan);
        record.cluster.clone().filter(|c| !said && scan.silent.contains(c))
    }

    /// Whoever names a volume is told when it cannot be marked.
    fn refused_name(&self, scan: &Scan) -> Option<Error> {
        let seen = scan
            .volumes
            .iter()
            .find(|s| self.options.named.contains(&s.volume) && s.judgement.verdict != Verdict::Orphan)?;
        let kind = if seen.judgement.verdict == Verdict::Live { Kind::Busy } else { Kind::Refused };
        Some(
            Error::new(kind, format!("it cannot be marked: {}", seen.judgement.reason))
                .on(&seen.volume)
                .hint(format!("look at it: zerofsctl volume show {}", seen.volume)),
        )
    }
}

fn line(seen: &Seen, marked: Option<Timestamp>) -> Line {
    Line {
        volume: seen.volume.clone(),
        epoch: seen.usable().map_or(0, |(r, _)| r.epoch),
        marked,
        begun: false,
        objects: seen.facts.objects.unwrap_or(0),
        bytes: seen.facts.bytes,
        reason: seen.judgement.reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lines: &[(&str, u64, i64, bool)]) -> Plan {
        let lines = lines
            .iter()
            .map(|(volume, epoch, marked, begun)| Line {
                volume: volume.parse().unwrap(),
                epoch: *epoch,
                marked: Some(Timestamp::from_second(*marked).unwrap()),
                begun: *begun,
                objects: 1,
                bytes: 2,
                reason: "r".into(),
            })
            .collect();
        Plan {
            format: FORMAT,
            url: "s3://vols/a".parse().unwrap(),
            made: Timestamp::UNIX_EPOCH,
            lines,
            unmark: vec![],
            waiting: vec![],
        }
    }

    #[test]
    fn a_plan_comes_back_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        let saved = plan(&[("vol1", 3, 5, false)]);
        saved.save(&path).unwrap();
        assert_eq!(Plan::load(&path).unwrap(), saved);
        let text = std::fs::read_to_string(&path).unwrap();
        for bad in
            [String::new(), text.replace("\"format\": 1", "\"format\": 2"), text.replace("vol1", "../x")]
        {
            std::fs::write(&path, bad).unwrap();
            let e = Plan::load(&path).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{e}");
            assert!(e.hint_text().is_some());
        }
        assert_eq!(Plan::load(&dir.path().join("none")).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_plan_holds_only_while_everything_in_it_is_as_it_was() {
        let saved = plan(&[("vol1", 3, 5, false), ("vol2", 1, 6, false)]);
        saved.require_same(&saved).unwrap();
        // What it began itself before it was cut short is no change.
        saved.require_same(&plan(&[("vol1", 3, 5, true), ("vol2", 1, 6, false)])).unwrap();
        for (now, says) in [
            (plan(&[("vol1", 3, 5, false)]), "vol2 is no longer"),
            (plan(&[("vol1", 4, 5, false), ("vol2", 1, 6, false)]), "vol1 is no longer"),
            (plan(&[("vol1", 3, 9, false), ("vol2", 1, 6, false)]), "vol1 is no longer"),
            (
                plan(&[("vol1", 3, 5, false), ("vol2", 1, 6, false), ("vol3", 0, 0, false)]),
                "vol3 is to be deleted",
            ),
        ] {
            let e = saved.require_same(&now).unwrap_err();
            assert_eq!(e.kind(), Kind::Conflict);
            assert!(e.to_string().contains(says), "{e}");
        }
        let elsewhere = Plan { url: "s3://vols/b".parse().unwrap(), ..saved.clone() };
        assert_eq!(saved.require_same(&elsewhere).unwrap_err().kind(), Kind::Usage);
    }
}
