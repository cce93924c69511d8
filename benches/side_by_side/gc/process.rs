//! One run of a program: how long it took, the most memory it had resident, and its processor time.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::field_kib;

/// What a run took, and what it printed.
pub struct Ran {
    /// From its start to its end.
    pub time: Duration,
    /// The most memory that it ever had resident, in KiB.
    pub peak_kib: u64,
    /// Its processor time, user and system.
    pub cpu: Duration,
    /// Its standard output.
    pub stdout: String,
}

impl Ran {
    /// So many things a second.
    pub fn rate(&self, things: u64) -> f64 {
        things as f64 / self.time.as_secs_f64()
    }
}

/// Runs it to its end; a failure ends the bench with what it said.
pub fn run(mut command: Command) -> Ran {
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it can be started");
    let (mut out, mut err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let read = |from: &mut dyn Read| {
        let mut text = Vec::new();
        from.read_to_end(&mut text).expect("a pipe can be read");
        String::from_utf8_lossy(&text).into_owned()
    };
    let folder = PathBuf::from(format!("/proc/{}", child.id()));
    std::thread::scope(|s| {
        let out = s.spawn(move || read(&mut out));
        let err = s.spawn(move || read(&mut err));
        // A maximum itself, so only the last moment can be missed. A process that has ended has no memory.
        let mut peak_kib = 0;
        while let Some(kib) = field_kib(&folder.join("status"), "VmHWM:") {
            peak_kib = peak_kib.max(kib);
            std::thread::sleep(Duration::from_millis(2));
        }
        let time = began.elapsed();
        // Not waited for yet, so the kernel still has its account.
        let cpu = cpu_of(child.id());
        let status = child.wait().expect("a child can be waited for");
        let (stdout, stderr) = (out.join().expect("read"), err.join().expect("read"));
        assert!(status.success(), "{command:?}: {status}\n{stderr}");
        Ran { time, peak_kib, cpu, stdout }
    })
}

/// The processor time of a process so far.
pub fn cpu_of(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name, which may contain anything: the 12th and 13th field, in hundredths.
    let rest = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * ticks)
}
