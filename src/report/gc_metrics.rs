//! What a run of the collector came to, as Prometheus reads it: for node_exporter's textfile collector, or to be pushed.
//!
//! All of it is gauges of the last run, since the next run is another process. The labels `command` and `store` let the files
//! of several commands and buckets lie side by side.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::catalog::StorageUrl;
use crate::gc::{Outcome, Scan, Swept, Verdict};

/// The name of the metric that outlives its run.
const SUCCESS: &str = "zerofs_gc_last_success_timestamp_seconds";

/// The commands that tell of themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Told {
    /// `gc-s3 scan`
    Scan,
    /// `gc-s3 mark`
    Mark,
    /// `gc-s3 sweep`
    Sweep,
}

impl Told {
    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Told::Scan => "scan",
            Told::Mark => "mark",
            Told::Sweep => "sweep",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Run {
    command: &'static str,
    store: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfVerdict {
    command: &'static str,
    store: String,
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    command: &'static str,
    store: String,
    outcome: &'static str,
}

/// What can become of a volume that a sweep takes up.
const OUTCOMES: [&str; 4] = ["gone", "emptied", "kept", "failed"];

/// See the module.
pub struct RunMetrics {
    registry: Registry,
    run: Run,
}

impl RunMetrics {
    /// Of a run of `command` on `store` that knows nothing yet.
    pub fn new(command: Told, store: &StorageUrl) -> RunMetrics {
        RunMetrics {
            registry: Registry::with_prefix("zerofs_gc"),
            run: Run { command: command.name(), store: store.to_string() },
        }
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) {
        let family = Family::<Run, Gauge<f64, AtomicU64>>::default();
        family.get_or_create(&self.run).set(value);
        match unit {
            Some(unit) => self.registry.register_with_unit(name, help, unit, family),
            None => self.registry.register(name, help, family),
        }
    }

    /// What it found. A run that fails before it knows leaves these out: no number is better than one of another day.
    pub fn scanned(&mut self, scan: &Scan) {
        type Counts = Family<OfVerdict, Gauge>;
        let (volumes, objects, bytes) = (Counts::default(), Counts::default(), Counts::default());
        for verdict in Verdict::ALL {
            let labels = OfVerdict {
                command: self.run.command,
                store: self.run.store.clone(),
                verdict: verdict.name(),
            };
            let of = || scan.volumes.iter().filter(|s| s.judgement.verdict == verdict);
            volumes.get_or_create(&labels).set(whole(of().count() as u64));
            objects.get_or_create(&labels).set(whole(of().filter_map(|s| s.facts.objects).sum()));
            bytes.get_or_create(&labels).set(whole(of().map(|s| s.facts.bytes).sum()));
        }
        let r = &mut self.registry;
        r.register("volumes", "Volumes in the store, by verdict", volumes);
        r.register(
            "stored_objects",
            "Objects of these volumes; of what is no volume they are not counted",
            objects,
        );
        r.register_with_unit("stored", "Bytes of these objects", Unit::Bytes, bytes);
        let marked = scan.volumes.iter().filter(|s| s.usable().is_some_and(|(r, _)| r.mark().is_some()));
        let marked = marked.count() as f64;
        self.gauge("marked_volumes", "Volumes that had a mark when the run began", None, marked);
    }

    /// How many volumes it marked.
    pub fn marked(&mut self, volumes: usize) {
        self.gauge("newly_marked_volumes", "Volumes that this run marked", None, volumes as f64);
    }

    /// What it deleted.
    pub fn swept(&mut self, swept: &Swept) {
        let volumes = Family::<OfOutcome, Gauge>::default();
        let (mut objects, mut bytes, mut uploads) = (0, 0, 0);
        let labels =
            |outcome| OfOutcome { command: self.run.command, store: self.run.store.clone(), outcome };
        for outcome in OUTCOMES {
            drop(volumes.get_or_create(&labels(outcome)));
        }
        for (_, outcome) in &swept.volumes {
            let (word, more) = match outcome {
                Outcome::Gone { objects, bytes, uploads } => (OUTCOMES[0], (*objects, *bytes, *uploads)),
                Outcome::Emptied { objects, bytes, .. } => (OUTCOMES[1], (*objects, *bytes, 0)),
                Outcome::Kept(_) => (OUTCOMES[2], (0, 0, 0)),
                Outcome::Failed(_) => (OUTCOMES[3], (0, 0, 0)),
            };
            volumes.get_or_create(&labels(word)).inc();
            (objects, bytes, uploads) = (objects + more.0, bytes + more.1, uploads + more.2);
        }
        self.registry.register(
            "swept_volumes",
            "Volumes that this run took up, by what became of them",
            volumes,
        );
        self.gauge("deleted_objects", "Objects that this run deleted", None, objects as f64);
        self.gauge("deleted", "Bytes of these objects", Some(Unit::Bytes), bytes as f64);
        self.gauge("aborted_uploads", "Unfinished uploads that this run aborted", None, uploads as f64);
    }

    /// The text, once it has ended with `exit` after `took`. `before` is the text of the run before, which tells of the last
    /// success.
    pub fn text(mut self, exit: u8, ended: Timestamp, took: Duration, before: &str) -> String {
        let now = ended.as_second() as f64;
        let success = if exit == 0 { now } else { self.last_success(before) };
        let seconds = || Some(Unit::Seconds);
        self.gauge("last_run_timestamp", "When the command last ended", seconds(), now);
        self.gauge("last_run_duration", "How long that run took", seconds(), took.as_secs_f64());
        self.gauge("last_run_exit_code", "Its exit code: 0 is success", None, f64::from(exit));
        self.gauge(
            "last_success_timestamp",
            "When the command last ended with success, 0 for never",
            seconds(),
            success,
        );
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }

    /// 0 where there is none.
    fn last_success(&self, before: &str) -> f64 {
        // Only of the same command and store, as it was written: a label's value is escaped there.
        let mut own = RunMetrics { registry: Registry::with_prefix("zerofs_gc"), run: self.run.clone() };
        own.gauge("last_success_timestamp", "", Some(Unit::Seconds), 0.0);
        let mut example = String::new();
        let _ = prometheus_client::encoding::text::encode(&mut example, &own.registry);
        let sample = |text: &str| -> Option<(String, String)> {
            let line = text.lines().find(|l| l.starts_with(SUCCESS))?;
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.to_owned()))
        };
        match (sample(&example), sample(before)) {
            (Some((ours, _)), Some((theirs, value))) if ours == theirs => {
                value.parse().ok().filter(|v: &f64| v.is_finite() && *v >= 0.0).unwrap_or(0.0)
            }
            _ => 0.0,
        }
    }
}

fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    fn url() -> StorageUrl {
        "s3://volumes/csi".parse().unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_790_000_000 + second).unwrap()
    }

    fn end(metrics: RunMetrics, exit: u8, second: i64, before: &str) -> String {
        metrics.text(exit, at(second), Duration::from_millis(1500), before)
    }

    #[track_caller]
    fn assert_has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|l| l == *line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn the_last_success_outlives_failures_of_the_same_command_and_store() {
        let good = end(RunMetrics::new(Told::Scan, &url()), 0, 0, "");
        let line = "zerofs_gc_last_success_timestamp_seconds{command=\"scan\",store=\"s3://volumes/csi\"} 1790000000.0";
        assert_has(&good, &[line]);
        let failed = end(RunMetrics::new(Told::Scan, &url()), 20, 60, &good);
        let run = "{command=\"scan\",store=\"s3://volumes/csi\"}";
        assert_has(
            &failed,
            &[
                line,
                &format!("zerofs_gc_last_run_timestamp_seconds{run} 1790000060.0"),
                &format!("zerofs_gc_last_run_duration_seconds{run} 1.5"),
                &format!("zerofs_gc_last_run_exit_code{run} 20.0"),
            ],
        );
        assert_has(&end(RunMetrics::new(Told::Scan, &url()), 20, 120, &failed), &[line]);
        let never = |text: &str, of: &str| assert_has(text, &[&format!("{SUCCESS}{of} 0.0")]);
        never(
            &end(RunMetrics::new(Told::Mark, &url()), 1, 60, &good),
            "{command=\"mark\",store=\"s3://volumes/csi\"}",
        );
        let other = "s3://other".parse().unwrap();
        never(
            &end(RunMetrics::new(Told::Scan, &other), 1, 60, &good),
            "{command=\"scan\",store=\"s3://other\"}",
        );
        for damaged in ["", "\0", line.strip_suffix("1790000000.0").unwrap(), &format!("{SUCCESS}{run} NaN")]
        {
            never(&end(RunMetrics::new(Told::Scan, &url()), 1, 60, damaged), run);
        }
    }

    #[test]
    fn a_sweep_tells_what_became_of_each_volume() {
        let volume = |name: &str| name.parse().unwrap();
        let swept = Swept {
            volumes: vec![
                (volume("a"), Outcome::Gone { objects: 7, bytes: 70, uploads: 1 }),
                (volume("b"), Outcome::Gone { objects: 1, bytes: 10, uploads: 0 }),
                (volume("c"), Outcome::Emptied { objects: 2, bytes: 20, after: at(0) }),
                (volume("d"), Outcome::Failed(Error::new(Kind::Unreachable, "no answer"))),
            ],
            ..Swept::default()
        };
        let mut metrics = RunMetrics::new(Told::Sweep, &url());
        metrics.swept(&swept);
        let text = end(metrics, 5, 0, "");
        let of = |name: &str, more: &str, value: &str| {
            format!("zerofs_gc_{name}{{command=\"sweep\",store=\"s3://volumes/csi\"{more}}} {value}")
        };
        assert_has(
            &text,
            &[
                &of("swept_volumes", ",outcome=\"gone\"", "2"),
                &of("swept_volumes", ",outcome=\"emptied\"", "1"),
                &of("swept_volumes", ",outcome=\"kept\"", "0"),
                &of("swept_volumes", ",outcome=\"failed\"", "1"),
                &of("deleted_objects", "", "10.0"),
                &of("deleted_bytes", "", "100.0"),
                &of("aborted_uploads", "", "1.0"),
                "# TYPE zerofs_gc_deleted_bytes gauge",
                "# HELP zerofs_gc_deleted_bytes Bytes of these objects.",
            ],
        );
    }
}
