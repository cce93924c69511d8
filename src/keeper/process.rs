//! Processes that outlive the command that started them: starting one, knowing it again, signalling it.
//!
//! A process is known by pid, start time and boot id together, so that a pid that the kernel gave to
//! somebody else is never mistaken for ours; every signal goes through a pidfd that was compared with that
//! identity after it was opened. What dies between being spawned and being written down is found by a
//! marker in its environment.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};

use super::log;
use crate::error::{Doing, Error, Result};

/// The environment variable that marks a ZeroFS process as ours; its value is the volume's run folder.
pub const MARKER: &str = "ZEROFSCTL_RUN_DIR";

/// What tells one process from every other one that ever had its pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start: u64,
    /// The boot that it belongs to (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
}

impl Identity {
    /// The identity of the running process `pid`; none when there is none, or only its zombie.
    pub fn of(pid: i32) -> Option<Identity> {
        Process::of(pid).ok().flatten().map(|p| p.identity)
    }

    /// This process.
    pub fn own() -> Identity {
        Identity::of(std::process::id() as i32).expect("a running process finds itself in /proc")
    }

    /// Whether the process still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        Identity::of(self.pid).as_ref() == Some(self)
    }

    /// Reads an identity that [`Identity::write`] wrote; none when the file is missing or not readable as
    /// one (a killed writer leaves no half file, so that would be somebody else's).
    pub fn read(path: &Path) -> Option<Identity> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Writes the identity to `path` in one step: a reader sees the old file or the new one.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_json(path, self)
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pid {}", self.pid)
    }
}

/// Writes `value` as JSON to `path` in one step (a file beside it, then a rename), readable by the owner only.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut text = serde_json::to_vec(value).map_err(io::Error::from).doing("encode", path)?;
    text.push(b'\n');
    // Of a fixed name, and so one that whoever cleans up knows: a writer can be killed.
    let beside = dir.join(beside(path));
    match std::fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).doing("remove", &beside),
        _ => {}
    }
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&beside).doing("write", &beside)?;
    file.write_all(&text).doing("write", &beside)?;
    std::fs::rename(&beside, path).doing("write", path)
}

/// The name under which a file is written before it is put in its place.
pub(crate) fn beside(path: &Path) -> String {
    format!(".{}.new", path.file_name().unwrap_or_default().to_string_lossy())
}

/// The start time out of the text of `/proc/<pid>/stat`.
fn parse_start(stat: &str) -> Option<u64> {
    // The command name may itself hold spaces and parentheses: the last one ends it.
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(19)?.parse().ok()
}

fn start_of(pid: i32) -> Option<u64> {
    parse_start(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The id of the running boot; empty where the kernel does not say.
pub fn boot_id() -> String {
    log::boot_id().unwrap_or_default()
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It called exit with this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It was not our child, so nobody tells us.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exited with status {code}"),
            Exit::Signal(signal) => match Signal::try_from(*signal) {
                Ok(s) => write!(f, "was killed by {s}"),
                Err(_) => write!(f, "was killed by signal {signal}"),
            },
            Exit::Unknown => f.write_str("ended"),
        }
    }
}

/// A hold on one running (or just ended) process. Dropping it does nothing to the process.
#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
    identity: Identity,
}

impl Process {
    /// A hold on the process with this identity; none when it has ended.
    pub fn open(identity: &Identity) -> Result<Option<Process>> {
        Ok(Process::of(identity.pid)?.filter(|p| p.identity == *identity))
    }

    /// A hold on whatever runs as `pid` now.
    fn of(pid: i32) -> Result<Option<Process>> {
        let fd = match pidfd_open(pid) {
            Ok(fd) => fd,
            Err(Errno::ESRCH | Errno::EINVAL) => return Ok(None),
            Err(e) => return Err(os_error("open process", pid, e)),
        };
        // Read after the open, and only then compared: the descriptor cannot change its process.
        let Some(start) = start_of(pid) else { return Ok(None) };
        let process = Process { fd, identity: Identity { pid, start, boot: boot_id() } };
        // Not the state letter: a main thread may be a zombie while other threads still run.
        Ok((!process.ended(Duration::ZERO)).then_some(process))
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A descriptor that becomes readable when the process ends.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends a signal; false when the process has already ended.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        // SAFETY: plain system call on a descriptor that we own; a null siginfo means "as kill(2) does".
        let rc = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal as libc::c_int,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(rc) {
            Ok(_) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(e) => Err(os_error("signal process", self.identity.pid, e)),
        }
    }

    /// Waits up to `limit` for the end; false when it still runs. Leaves the exit status to [`Process::wait`].
    pub fn ended(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last round does not spin.
            let millis =
                left.as_millis().saturating_add(u128::from(!left.subsec_nanos().is_multiple_of(1_000_000)));
            let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if Instant::now() >= deadline => return false,
                Ok(0) | Err(_) => {}
                Ok(_) => return true,
            }
        }
    }

    /// Waits up to `limit` for the end and reaps the process if it is our child; none when it still runs. Only the
    /// first caller learns how it ended.
    pub fn wait(&self, limit: Duration) -> Option<Exit> {
        self.ended(limit).then(|| match waitid(Id::PIDFd(self.fd.as_fd()), WaitPidFlag::WEXITED) {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32),
            _ => Exit::Unknown,
        })
    }

    /// SIGKILL, then waits up to `limit`; none when it is still there (in an uninterruptible system call).
    pub fn kill(&self, limit: Duration) -> Result<Option<Exit>> {
        self.signal(Signal::SIGKILL)?;
        Ok(self.wait(limit))
    }
}

/// A descriptor that becomes readable when the process ends.
pub(crate) fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: plain system call; a non-negative result is a new descriptor that nobody else owns.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn os_error(what: &str, pid: i32, e: Errno) -> Error {
    Err::<(), _>(e).doing(what, pid.to_string()).expect_err("it is an error")
}

/// A process to start that shall outlive its parent: a session of its own, no terminal, its output in a file.
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// What it is called in its command line; its path when none.
    pub name: Option<&'a str>,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its whole environment: nothing else is inherited.
    pub env: Vec<(OsString, OsString)>,
    /// The folder that it starts in.
    pub cwd: &'a Path,
    /// Where standard error goes, and standard output too unless `answer` is given; open it for appending.
    pub output: &'a File,
    /// Where standard output goes instead.
    pub answer: Option<OwnedFd>,
    /// The `cgroup.procs` file of the control group that it shall start in, open for writing.
    pub cgroup: Option<&'a File>,
}

impl Launch<'_> {
    /// Starts it.
    pub fn start(self) -> Result<Process> {
        let output = || self.output.try_clone().map(Stdio::from);
        let mut command = Command::new(self.program);
        if let Some(name) = self.name {
            command.arg0(name);
        }
        command.args(&self.args).env_clear().envs(self.env.iter().map(|(k, v)| (k, v)));
        command.current_dir(self.cwd).stdin(Stdio::null());
        command.stdout(match self.answer {
            Some(answer) => answer.into(),
            None => output().doing("open the log of", self.program)?,
        });
        command.stderr(output().doing("open the log of", self.program)?);
        let cgroup = self.cgroup.map(AsRawFd::as_raw_fd);
        // SAFETY: between fork and exec only system calls that are async-signal-safe, and no allocation.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                // A keeper blocks what it waits for on a thread; what it starts must hear its SIGTERM.
                SigSet::empty().thread_set_mask()?;
                if let Some(fd) = cgroup {
                    nix::unistd::write(BorrowedFd::borrow_raw(fd), b"0")?;
                }
                // A keeper protects itself from the OOM killer; what it starts must not inherit that.
                set_own_oom_score(b"0\n");
                Ok(())
            });
        }
        let child = command.spawn().map_err(|e| {
            let message = format!("cannot start {}: {e}", self.program.display());
            match e.kind() {
                io::ErrorKind::NotFound => Error::environment(message)
                    .hint("install it, or say where it is with --zerofs-bin or ZEROFS_BIN"),
                io::ErrorKind::PermissionDenied => Error::environment(message)
                    .hint(format!("make it executable: chmod +x {}", self.program.display())),
                _ => Error::environment(message),
            }
        })?;
        let pid = child.id() as i32;
        // Our own child: even when it has ended already, its zombie keeps the pid until we reap it.
        let fd = pidfd_open(pid).map_err(|e| os_error("open process", pid, e))?;
        let start = start_of(pid).unwrap_or(0);
        Ok(Process { fd, identity: Identity { pid, start, boot: boot_id() } })
    }
}

/// Sets this process's OOM score adjustment, where permitted. Async-signal-safe.
pub(crate) fn set_own_oom_score(value: &[u8]) -> bool {
    // SAFETY: three plain system calls on a constant path and a buffer of known length.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return false;
        }
        let written = libc::write(fd, value.as_ptr().cast(), value.len());
        libc::close(fd);
        written == value.len() as isize
    }
}

/// The variables that a ZeroFS or keeper process takes over from ours: where certificates and proxies are.
/// Credentials are not among them: those come from the config alone.
pub(crate) fn passed_on() -> Vec<(OsString, OsString)> {
    const NAMES: [&str; 11] = [
        "PATH",
        "TZ",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "all_proxy",
    ];
    NAMES.into_iter().filter_map(|n| Some((n.into(), std::env::var_os(n)?))).collect()
}

/// Every running process whose environment carries `name=value`; its own process excepted.
pub fn find_marked(name: &str, value: &OsStr) -> Vec<Identity> {
    let wanted = [name.as_bytes(), b"=", value.as_bytes()].concat();
    let own = std::process::id() as i32;
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    // One buffer for all, and large: the file tells no size, so each would be read in many small pieces.
    let mut environ = Vec::with_capacity(64 << 10);
    pids.filter(|pid| *pid != own)
        .filter(|pid| {
            environ.clear();
            File::open(format!("/proc/{pid}/environ"))
                .and_then(|mut file| file.read_to_end(&mut environ))
                .is_ok_and(|_| environ.split(|b| *b == 0).any(|variable| variable == wanted))
        })
        .filter_map(Identity::of)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(marker: &str) -> Process {
        let null = File::options().append(true).open("/dev/null").unwrap();
        Launch {
            program: Path::new("/bin/sleep"),
            name: None,
            args: vec!["60".into()],
            env: vec![("ZEROFSCTL_TEST".into(), marker.into())],
            cwd: Path::new("/"),
            output: &null,
            answer: None,
            cgroup: None,
        }
        .start()
        .unwrap()
    }

    #[test]
    fn a_command_name_with_spaces_and_parentheses_does_not_confuse_the_start_time() {
        let stat = "42 (a ) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 9876 11 12";
        assert_eq!(parse_start(stat), Some(9876));
        assert_eq!(parse_start("42 (x"), None);
        assert_eq!(parse_start("42 (x) S 1"), None);
    }

    #[test]
    fn a_process_is_found_by_its_marker_signalled_and_reaped() {
        let marker = format!("m-{}", std::process::id());
        let p = sleeper(&marker);
        // The environment is there once exec has happened, and spawn returns after it.
        assert_eq!(find_marked("ZEROFSCTL_TEST", marker.as_ref()), vec![p.identity().clone()]);
        assert!(p.identity().is_alive());
        assert_eq!(p.wait(Duration::from_millis(5)), None);
        assert_eq!(p.kill(Duration::from_secs(5)).unwrap(), Some(Exit::Signal(9)));
        assert!(!p.identity().is_alive());
        assert!(!p.signal(Signal::SIGTERM).unwrap());
        assert!(Process::open(p.identity()).unwrap().is_none());
        assert_eq!(find_marked("ZEROFSCTL_TEST", marker.as_ref()), vec![]);
    }

    #[test]
    fn another_start_time_or_boot_is_another_process() {
        let own = Identity::own();
        assert!(Process::open(&own).unwrap().is_some());
        assert!(Process::open(&Identity { start: own.start + 1, ..own.clone() }).unwrap().is_none());
        assert!(Process::open(&Identity { boot: "another".into(), ..own }).unwrap().is_none());
    }

    #[test]
    fn an_identity_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pid");
        assert_eq!(Identity::read(&path), None);
        Identity::own().write(&path).unwrap();
        assert_eq!(Identity::read(&path), Some(Identity::own()));
        std::fs::write(&path, "{").unwrap();
        assert_eq!(Identity::read(&path), None);
    }

    #[test]
    fn a_missing_program_is_an_error_with_a_hint() {
        let null = File::options().append(true).open("/dev/null").unwrap();
        let launch = Launch {
            program: Path::new("/nonexistent/zerofs"),
            name: None,
            args: vec![],
            env: vec![],
            cwd: Path::new("/"),
            output: &null,
            answer: None,
            cgroup: None,
        };
        let e = launch.start().unwrap_err();
        assert_eq!(e.kind(), crate::error::Kind::Environment);
        assert!(e.hint_text().unwrap().contains("--zerofs-bin"));
    }
}
