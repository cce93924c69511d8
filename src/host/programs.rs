//! Every external program that zerofsctl runs: looked up once, run with a time limit, without a shell, and with
//! an error that names the package when it is missing. No secret is ever among the arguments.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::mounts;
use crate::error::{Error, Kind, Result};
use crate::keeper::process::pidfd_open;

/// The programs, with the Debian package that has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the program of that name")]
pub enum Program {
    Blkid,
    Mount,
    Umount,
    MkfsExt4,
    MkfsXfs,
    MkfsBtrfs,
    E2fsck,
    XfsRepair,
    Btrfs,
    Resize2fs,
    XfsGrowfs,
    Sync,
}

impl Program {
    /// The file name, and the Debian package.
    pub const fn names(self) -> (&'static str, &'static str) {
        match self {
            Program::Blkid => ("blkid", "util-linux"),
            Program::Mount => ("mount", "mount"),
            Program::Umount => ("umount", "mount"),
            Program::MkfsExt4 => ("mkfs.ext4", "e2fsprogs"),
            Program::MkfsXfs => ("mkfs.xfs", "xfsprogs"),
            Program::MkfsBtrfs => ("mkfs.btrfs", "btrfs-progs"),
            Program::E2fsck => ("e2fsck", "e2fsprogs"),
            Program::XfsRepair => ("xfs_repair", "xfsprogs"),
            Program::Btrfs => ("btrfs", "btrfs-progs"),
            Program::Resize2fs => ("resize2fs", "e2fsprogs"),
            Program::XfsGrowfs => ("xfs_growfs", "xfsprogs"),
            Program::Sync => ("sync", "coreutils"),
        }
    }

    /// Where it is.
    ///
    /// # Errors
    /// [`Kind::Environment`] that names the package.
    pub fn find(self) -> Result<PathBuf> {
        let (name, package) = self.names();
        // Without a login shell, PATH often lacks the sbin folders that these live in.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
        std::env::split_paths(&path)
            .chain(extra)
            .map(|dir| dir.join(name))
            .find(|p| is_program(p))
            .ok_or_else(|| {
                Error::environment(format!("the program {name} is not installed"))
                    .hint(format!("install it: apt-get install {package}"))
            })
    }

    /// Starts it, and whatever it says is dropped: for a program that may hang in the kernel, where no signal reaches
    /// it, so that nobody can wait for its end.
    pub fn spawn<S: AsRef<OsStr>>(self, args: &[S]) -> Result<Child> {
        let program = self.find()?;
        Command::new(&program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| Error::environment(format!("cannot start {}: {e}", program.display())))
    }

    /// Whether it asks of every mounted loop device if that is its own: by a `stat` of the file behind it, which fails
    /// when the keeper of another volume is gone and never ends when it is stuck.
    fn asks_other_disks<S: AsRef<OsStr>>(self, args: &[S]) -> bool {
        match self {
            Program::MkfsBtrfs => true,
            Program::Btrfs => args.first().is_some_and(|verb| verb.as_ref() == "check"),
            _ => false,
        }
    }

    /// Runs it to its end and collects what it says, bounded. No limit means that it may take as long as it
    /// takes: a check of a large filesystem must not be cut short.
    pub fn run<S: AsRef<OsStr> + Sync>(self, args: &[S], limit: Option<Duration>) -> Result<Output> {
        if !self.asks_other_disks(args) {
            return self.run_here(args, limit);
        }
        let alone = || {
            // Without the right to a view of its own it sees what is there, and says so itself if that is too much.
            let _ = mounts::leave_disks_out();
            self.run_here(args, limit)
        };
        std::thread::scope(|s| s.spawn(alone).join()).unwrap_or_else(|_| {
            Err(Error::failed(format!("the thread that ran {} panicked", self.names().0)))
        })
    }

    fn run_here<S: AsRef<OsStr>>(self, args: &[S], limit: Option<Duration>) -> Result<Output> {
        let program = self.find()?;
        let name = self.names().0;
        let begun = Instant::now();
        let mut child = Command::new(&program)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::environment(format!("cannot start {}: {e}", program.display())))?;
        // Both pipes are emptied while it runs, or it would block on a full one.
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let status = match wait(&mut child, limit, &mut |_| {}) {
            Ok(Some(status)) => status,
            Ok(None) => {
                let _ = child.wait();
                return Err(Error::new(
                    Kind::Interrupted,
                    format!("{name} did not end within {} s and was killed", begun.elapsed().as_secs()),
                )
                .hint("look at the device: dmesg | tail"));
            }
            Err(e) => return Err(Error::failed(format!("cannot wait for {name}: {e}"))),
        };
        let text = |thread: Option<std::thread::JoinHandle<String>>| {
            thread.and_then(|t| t.join().ok()).unwrap_or_default()
        };
        Ok(Output {
            name,
            code: status.code(),
            signal: status.signal(),
            stdout: text(stdout),
            stderr: text(stderr),
        })
    }
}

/// Waits for the end of a program, and tells `tick` every 50 ms how long it has waited. After `limit` the program is
/// sent SIGKILL and the answer is none; it is not waited for any more then, since it may hang in the kernel, out of
/// the signal's reach.
pub fn wait(
    child: &mut Child,
    limit: Option<Duration>,
    tick: &mut dyn FnMut(Duration),
) -> std::io::Result<Option<ExitStatus>> {
    const TICK: Duration = Duration::from_millis(50);
    let begun = Instant::now();
    let ended = pidfd_open(child.id() as i32)?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let elapsed = begun.elapsed();
        if limit.is_some_and(|l| elapsed > l) {
            let _ = child.kill();
            return Ok(None);
        }
        tick(elapsed);
        let left = limit.map_or(TICK, |l| TICK.min(l.saturating_sub(elapsed)));
        // Rounded up, so that the last round does not spin.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        // Interrupted or not: it is looked at again.
        let _ = poll(&mut [PollFd::new(ended.as_fd(), PollFlags::POLLIN)], timeout);
    }
}

/// The most that is kept of what a program says.
const KEPT: u64 = 256 * 1024;

fn collect(pipe: Option<impl Read + Send + 'static>) -> Option<std::thread::JoinHandle<String>> {
    let mut pipe = pipe?;
    std::thread::Builder::new()
        .stack_size(128 * 1024)
        .spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.by_ref().take(KEPT).read_to_end(&mut bytes);
            // The rest is read and dropped, so that the program is not killed by a broken pipe.
            let _ = std::io::copy(&mut pipe, &mut std::io::sink());
            String::from_utf8_lossy(&bytes).into_owned()
        })
        .ok()
}

/// Whether `path` is a file that may be executed.
pub fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its name.
    pub name: &'static str,
    /// Its exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Output {
    /// An error unless it exited with 0.
    pub fn success(self) -> Result<Output> {
        if self.code == Some(0) { Ok(self) } else { Err(self.failure()) }
    }

    /// The error that says how it ended, with its last words.
    pub fn failure(&self) -> Error {
        let how = match (self.code, self.signal) {
            (Some(code), _) => format!("exited with {code}"),
            (_, Some(signal)) => format!("was killed by signal {signal}"),
            _ => "ended in an unknown way".into(),
        };
        let words = [&self.stderr, &self.stdout].into_iter().find_map(|text| {
            let lines: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
            (!lines.is_empty()).then(|| lines[lines.len().saturating_sub(3)..].join("; "))
        });
        Error::failed(format!("{} {how}{}", self.name, words.map(|w| format!(": {w}")).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        // blkid on a FIFO that nobody writes to waits for ever.
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = Program::E2fsck.run(&[fifo.as_os_str()], Some(Duration::from_millis(300)));
        // Some versions refuse a FIFO at once: then there is nothing to kill, and the exit code says so.
        match error {
            Err(e) => assert_eq!(e.kind(), Kind::Interrupted),
            Ok(output) => assert_ne!(output.code, Some(0)),
        }
    }

    #[test]
    fn a_failure_says_how_and_repeats_the_last_words() {
        let output = Output {
            name: "mkfs.ext4",
            code: Some(1),
            signal: None,
            stdout: "noise".into(),
            stderr: "a\n\nb\nc\nd\n".into(),
        };
        assert_eq!(output.failure().message(), "mkfs.ext4 exited with 1: b; c; d");
    }
}
