//! Runs fio, and reads from its report whether every I/O succeeded and every block read back as written.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// For how long the end of a killed fio is waited for.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// A job to be: fio's options, line by line.
pub struct FioJob {
    name: String,
    dir: PathBuf,
    options: Vec<(String, String)>,
}

/// A job that runs; ended with SIGKILL when dropped.
pub struct FioRun {
    name: String,
    dir: PathBuf,
    child: Child,
}

/// What fio reported.
#[derive(Debug)]
pub struct FioReport {
    /// How fio itself ended: it fails after any error.
    pub status: ExitStatus,
    /// Errors over all jobs, I/O and verification together.
    pub errors: u64,
    /// The first error's number (errno; 84, EILSEQ, is a block that is not as it was written), 0 if none.
    pub errno: i64,
    /// fio's own words about blocks that failed verification.
    pub verify_failures: Vec<String>,
    /// Reads done, and their rate per second.
    pub reads: Rate,
    /// Writes done, and their rate per second.
    pub writes: Rate,
    /// Everything that fio printed beside its report.
    pub messages: String,
}

/// One direction of a report.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    /// Requests completed.
    pub ios: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Requests per second.
    pub iops: f64,
    /// Completion latency, the longest, in nanoseconds.
    pub worst_ns: u64,
}

impl FioJob {
    /// A job by this name, with its files in `dir`: the job file, the report, and the verify state, which
    /// a later job of the same name continues from.
    pub fn new(dir: &Path, name: &str) -> FioJob {
        FioJob { name: name.into(), dir: dir.into(), options: vec![] }
    }

    /// Sets an option as in a job file, for example `("rw", "randwrite")`.
    pub fn set(mut self, option: &str, value: impl ToString) -> FioJob {
        self.options.push((option.into(), value.to_string()));
        self
    }

    /// Starts fio.
    #[track_caller]
    pub fn start(self) -> FioRun {
        let job = self.dir.join(format!("{}.fio", self.name));
        let lines: String =
            self.options.iter().map(|(option, value)| format!("{option}={value}\n")).collect();
        // Threads, because a job process of its own would outlive a fio that is killed.
        fs::write(&job, format!("[{}]\nthread=1\n{lines}", self.name))
            .expect("the test's folder can be written");
        let messages = File::create(self.dir.join(format!("{}.messages", self.name)))
            .expect("the test's folder can be written");
        let child = Command::new(super::require_program("fio"))
            .arg("--output-format=json")
            .arg(format!("--output={}", report_path(&self.dir, &self.name).display()))
            .arg(format!("--aux-path={}", self.dir.display()))
            .arg(&job)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(messages.try_clone().expect("a file can be cloned"))
            .stderr(messages)
            .spawn()
            .expect("fio can be started");
        FioRun { name: self.name, dir: self.dir, child }
    }

    /// Runs fio to its end; fails when it takes longer than `limit`.
    #[track_caller]
    pub fn run(self, limit: Duration) -> FioReport {
        self.start().finish(limit)
    }
}

impl FioRun {
    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Waits for the end and reads the report; fails when that takes longer than `limit`.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> FioReport {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be asked") {
                break status;
            }
            assert!(began.elapsed() < limit, "fio job {} still runs after {limit:?}", self.name);
            std::thread::sleep(Duration::from_millis(20));
        };
        let messages =
            fs::read_to_string(self.dir.join(format!("{}.messages", self.name))).unwrap_or_default();
        let report = fs::read_to_string(report_path(&self.dir, &self.name)).unwrap_or_default();
        parse(status, &report, messages)
    }
}

impl Drop for FioRun {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // One whose I/O hangs in the kernel cannot be killed; a test that fails for that must come to its end all the same.
        let began = Instant::now();
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && began.elapsed() < KILL_LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl FioReport {
    /// Fails unless every request succeeded and every block that was verified was as written.
    #[track_caller]
    pub fn assert_clean(&self) {
        let clean = self.status.success() && self.errors == 0 && self.errno == 0;
        assert!(clean && self.verify_failures.is_empty(), "fio found faults: {self:#?}");
    }
}

fn report_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.json"))
}

#[track_caller]
fn parse(status: ExitStatus, report: &str, messages: String) -> FioReport {
    // fio may write warnings into the same file, before the report.
    let json: Value = report
        .find('{')
        .and_then(|start| serde_json::from_str(&report[start..]).ok())
        .unwrap_or_else(|| panic!("fio wrote no report ({status})\n{report}\n{messages}"));
    let jobs = json["jobs"].as_array().expect("a report has jobs");
    assert!(!jobs.is_empty(), "fio ran no job ({status})\n{messages}");
    let all = format!("{report}\n{messages}");
    FioReport {
        status,
        // `total_err` counts only under continue_on_error; a job that stopped at an error has `error` alone.
        errors: jobs
            .iter()
            .map(|job| {
                job["total_err"].as_u64().unwrap_or(0).max(u64::from(job["error"].as_i64() != Some(0)))
            })
            .sum(),
        errno: jobs.iter().filter_map(|job| job["error"].as_i64()).find(|&error| error != 0).unwrap_or(0),
        verify_failures: all.lines().filter(|line| line.starts_with("verify:")).map(str::to_owned).collect(),
        reads: rate(jobs, "read"),
        writes: rate(jobs, "write"),
        messages,
    }
}

fn rate(jobs: &[Value], direction: &str) -> Rate {
    jobs.iter().map(|job| &job[direction]).fold(Rate::default(), |sum, one| Rate {
        ios: sum.ios + one["total_ios"].as_u64().unwrap_or(0),
        bytes: sum.bytes + one["io_bytes"].as_u64().unwrap_or(0),
        iops: sum.iops + one["iops"].as_f64().unwrap_or(0.0),
        worst_ns: sum.worst_ns.max(one["clat_ns"]["max"].as_u64().unwrap_or(0)),
    })
}
