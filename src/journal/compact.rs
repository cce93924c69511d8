//! A journal that stays short. A staged volume lives for months, and every pod that comes and goes writes two runs: what
//! has come and gone is left out when there is enough of it. What is left folds to the same standing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;

use super::{End, Journal, Run, Standing};
use crate::error::{Doing, Result};
use crate::plan::Operation;
use crate::step::Step;
use crate::values::TargetPath;

/// A journal with fewer runs is left as it is.
const ENOUGH: usize = 64;

/// The place of a publish or unpublish.
fn published(run: &Run) -> Option<&TargetPath> {
    let is_one = matches!(run.plan.operation, Operation::Publish | Operation::Unpublish);
    run.plan.tasks.iter().filter(|_| is_one).find_map(|t| match &t.step {
        Step::Bind(bind) => Some(&bind.target),
        _ => None,
    })
}

/// Which runs are of no more account: those of places that were taken away completely. The newest run always stays, since
/// its facts count, and so does everything of a place that any other operation had to do with.
fn superseded(runs: &[Run]) -> BTreeSet<usize> {
    let mut gone: BTreeMap<&TargetPath, usize> = BTreeMap::new();
    let last = runs.len().saturating_sub(1);
    for (index, run) in runs.iter().enumerate().take(last) {
        if run.plan.operation == Operation::Unpublish
            && run.end == Some(End::Done)
            && let Some(target) = published(run)
        {
            gone.insert(target, index);
        }
    }
    for run in runs.iter().filter(|run| published(run).is_none()) {
        for task in &run.plan.tasks {
            if let Step::Bind(bind) = &task.step {
                gone.remove(&bind.target);
            }
        }
    }
    let of_gone = |(index, run): (usize, &Run)| {
        published(run).and_then(|t| gone.get(t)).is_some_and(|until| index <= *until).then_some(index)
    };
    runs.iter().enumerate().filter_map(of_gone).collect()
}

impl Journal {
    /// Leaves out what is of no more account, if there is enough of it and no run is open.
    pub(super) fn shorten(&mut self) -> Result<()> {
        if self.runs.len() < ENOUGH || self.open_run().is_some() || self.incomplete {
            return Ok(());
        }
        let out = superseded(&self.runs);
        if out.len() < ENOUGH / 2 {
            return Ok(());
        }
        let kept = |index: &usize| !out.contains(index);
        let runs: Vec<Run> =
            self.runs.iter().enumerate().filter(|(i, _)| kept(i)).map(|(_, r)| r.clone()).collect();
        // In doubt it stays as it is.
        if Standing::of(&runs) != Standing::of(&self.runs) {
            return Ok(());
        }
        let mut text = String::new();
        self.file.seek(SeekFrom::Start(0)).doing("seek in the journal", &self.path)?;
        self.file.read_to_string(&mut text).doing("read the journal", &self.path)?;
        let mut index = None;
        let mut short = String::new();
        for line in text.split_inclusive('\n') {
            if line.get(9..).is_some_and(|json| json.starts_with("{\"rec\":\"begin\"")) {
                index = Some(index.map_or(0, |i: usize| i + 1));
            }
            if index.is_some_and(|i| kept(&i)) {
                short.push_str(line);
            }
        }
        if index != Some(self.runs.len() - 1) {
            return Ok(());
        }
        let new = self.path.with_file_name(super::SHORTENED);
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&new)
            .doing("open the shortened journal", &new)?;
        file.set_len(0).doing("truncate", &new)?;
        file.write_all(short.as_bytes()).doing("write", &new)?;
        file.sync_all().doing("sync", &new)?;
        std::fs::rename(&new, &self.path).doing("put in place", &self.path)?;
        self.file = file;
        self.runs = runs;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeHost;
    use crate::ops::{self, AttachSpec, PublishSpec};
    use crate::run::{Engine, Silent};

    #[test]
    fn pods_that_come_and_go_leave_a_short_journal_and_the_same_standing() {
        let dir = tempfile::tempdir().unwrap();
        let host = FakeHost::new();
        let engine = Engine { host: &host, observer: &Silent };
        let at = |p: String| TargetPath::new(p.as_ref(), "/".as_ref()).unwrap();
        let volume = "v".parse().unwrap();
        let spec = AttachSpec::plain("v".parse().unwrap(), at("/staged".into()), "file:///s".into());
        ops::attach::attach(&engine, dir.path(), &spec).unwrap();
        let publish = |name: &str| PublishSpec {
            volume: "v".parse().unwrap(),
            staged: at("/staged".into()),
            target: at(format!("/pods/{name}")),
            read_only: false,
            block: false,
            alone: false,
            group: None,
        };
        ops::publish::publish(&engine, dir.path(), &publish("stays")).unwrap();
        for n in 0..200 {
            let pod = publish(&n.to_string());
            ops::publish::publish(&engine, dir.path(), &pod).unwrap();
            ops::publish::unpublish(&engine, dir.path(), &volume, &pod.target).unwrap();
        }
        let runs = Journal::peek(dir.path(), &volume).unwrap().unwrap();
        assert!(runs.len() <= ENOUGH + ENOUGH / 2, "{} runs", runs.len());
        let places = Standing::of(&runs).places;
        assert_eq!(places.len(), 2, "{places:?}");
        ops::publish::unpublish(&engine, dir.path(), &volume, &publish("stays").target).unwrap();
        ops::detach::detach(&engine, dir.path(), &volume, &ops::Scope::Volume, Default::default()).unwrap();
        assert!(host.leftovers().is_empty());
        assert_eq!(super::super::volumes(dir.path()).unwrap(), vec![]);
    }
}
