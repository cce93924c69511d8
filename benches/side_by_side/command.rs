//! Our side: the released command, run as a user runs it, with its roots in the bench's folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The command with roots of its own. The run root is on a tmpfs, as `/run` is wherever systemd runs, even where this
/// machine's own is not.
pub struct Zerofsctl {
    state: PathBuf,
    run: tempfile::TempDir,
}

impl Zerofsctl {
    /// A state folder below `dir`, and a run folder in memory.
    pub fn new(dir: &Path) -> Zerofsctl {
        let run = tempfile::Builder::new().prefix("zc-").tempdir_in("/dev/shm").expect("a tmpfs at /dev/shm");
        Zerofsctl { state: dir.join("state"), run }
    }

    /// A command line, not yet started. It finds ZeroFS where the floor finds it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zerofsctl"));
        command
            .args(args)
            .env("ZEROFSCTL_STATE_DIR", &self.state)
            .env("ZEROFSCTL_RUN_DIR", self.run.path())
            .env("ZEROFS_BIN", crate::support::zerofs_bin())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    /// The arguments of an attach with ext4.
    pub fn attach_args<'a>(volume: &'a str, target: &'a str, size: &'a str) -> [&'a str; 8] {
        ["attach", volume, "--target", target, "--size", size, "--fs", "ext4"]
    }

    /// Runs a command to its end and returns how long it took; a failure ends the bench.
    pub fn time(&self, args: &[&str]) -> Duration {
        let began = Instant::now();
        let child = self.command(args).spawn().expect("zerofsctl can be started");
        finish(child, args);
        began.elapsed()
    }

    /// Runs a command and returns the most memory, in KiB, that its own process ever had resident.
    ///
    /// The kernel's own account at the end (ru_maxrss) would include mkfs and mount. So this looks every half
    /// millisecond; what it reads is itself a maximum, hence only the last instant can be missed.
    pub fn peak_kib(&self, args: &[&str]) -> u64 {
        let child = self.command(args).spawn().expect("zerofsctl can be started");
        let status = PathBuf::from(format!("/proc/{}/status", child.id()));
        let mut peak = 0;
        // A process that has ended has no memory, and its status no such line.
        while let Some(kib) = field_kib(&status, "VmHWM:") {
            peak = peak.max(kib);
            std::thread::sleep(Duration::from_micros(500));
        }
        finish(child, args);
        peak
    }
}

/// Waits for a command's end; a failure ends the bench with what it said.
pub fn finish(child: Child, args: &[&str]) {
    let out = child.wait_with_output().expect("a child can be waited for");
    assert!(out.status.success(), "zerofsctl {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A value in kB of a file such as /proc/PID/status.
pub fn field_kib(file: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

/// The resident pages, in KiB, of one process that belong to mappings of files with this name.
pub fn mapped_kib(pid: i32, file_name: &str) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut ours = false;
    let mut sum = 0;
    for line in maps.lines() {
        // A mapping begins with its address range; its values follow, each as "Name: 12 kB".
        if line.split(' ').next().is_some_and(|first| first.contains('-')) {
            ours = line.ends_with(&format!("/{file_name}"));
        } else if let Some(kib) = line.strip_prefix("Rss:").filter(|_| ours) {
            sum += kib.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0);
        }
    }
    sum
}
