//! The built program on the real system: a node with a state and a run folder of its own, the commands that
//! a person types on it, and the proof that they left nothing behind.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use zerofsctl::host::nbd::sysfs;

use super::dir::{Leftover, TestDir, leftovers};
use super::{require_root, wait_until, zerofs_bin};

/// One node: folders of its own, so that nothing of it meets another test's.
pub struct Node {
    /// Holds everything.
    pub dir: TestDir,
}

/// What a command answered.
#[derive(Debug)]
pub struct Answer {
    /// The words, for messages.
    pub command: String,
    /// The exit code, if it was not killed.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// The answer.
    pub stdout: String,
    /// The story.
    pub stderr: String,
}

/// What may be killed behind the command's back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// Only the command itself.
    Nobody,
    /// The ZeroFS server.
    Zerofs,
    /// The keeper; on FUSE that ends the device.
    Keeper,
    /// Both at once.
    Both,
}

impl Node {
    /// A node on which nothing was ever attached.
    #[track_caller]
    pub fn new() -> Node {
        require_root();
        Node { dir: TestDir::new() }
    }

    /// The state root.
    pub fn state(&self) -> PathBuf {
        self.dir.join("s")
    }

    /// Nothing can be started any more: what the store is in has another place.
    #[track_caller]
    pub fn hide_the_store(&self) {
        let store = self.state().join("store");
        fs::rename(&store, self.state().join("store.away")).expect("the state folder can be written");
        fs::write(&store, b"not a folder").expect("the state folder can be written");
    }

    /// And back.
    #[track_caller]
    pub fn show_the_store(&self) {
        let store = self.state().join("store");
        fs::remove_file(&store).expect("the state folder can be written");
        fs::rename(self.state().join("store.away"), &store).expect("the state folder can be written");
    }

    /// The run root.
    pub fn run_root(&self) -> PathBuf {
        self.dir.join("r")
    }

    /// The program with these words, in a clean environment, for this node.
    pub fn command<S: AsRef<str>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zerofsctl"));
        self.surround(&mut command);
        command.args(words.iter().map(AsRef::as_ref));
        command
    }

    /// The same, started by another program: `wrapper` is for example `["setpriv", "--reuid=65534"]`.
    pub fn wrapped<S: AsRef<str>>(&self, wrapper: &[&str], words: &[S]) -> Command {
        let mut command = Command::new(wrapper[0]);
        self.surround(&mut command);
        command.args(&wrapper[1..]).arg(env!("CARGO_BIN_EXE_zerofsctl"));
        command.args(words.iter().map(AsRef::as_ref));
        command
    }

    fn surround(&self, command: &mut Command) {
        // What a developer has set must not change the outcome.
        for name in [
            "ZEROFS_ENCRYPTION_PASSWORD",
            "ZEROFS_ENCRYPTION_PASSWORD_FILE",
            "NODE_ID",
            "RUST_LOG",
            "KUBECONFIG",
            "KUBERNETES_SERVICE_HOST",
        ] {
            command.env_remove(name);
        }
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("AWS_")) {
            command.env_remove(name);
        }
        command
            .env("ZEROFSCTL_STATE_DIR", self.state())
            .env("ZEROFSCTL_RUN_DIR", self.run_root())
            // A developer's own cluster is none of the tests' business.
            .env("HOME", self.dir.path())
            .env("ZEROFS_BIN", zerofs_bin())
            .env_remove("ZEROFSCTL_TEST_KILL")
            .current_dir(self.dir.path())
            .stdin(std::process::Stdio::null());
    }

    /// Runs it to its end.
    pub fn run<S: AsRef<str>>(&self, words: &[S]) -> Answer {
        Answer::of(&mut self.command(words))
    }

    /// Runs it and expects success.
    #[track_caller]
    pub fn ok<S: AsRef<str>>(&self, words: &[S]) -> Answer {
        self.run(words).expect_code(0)
    }

    /// Runs it with `-o json` and expects success: the data.
    #[track_caller]
    pub fn json<S: AsRef<str>>(&self, words: &[S]) -> Value {
        let mut words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
        words.extend(["-o", "json"]);
        self.ok(&words).json()
    }

    /// Runs it, killed at `STEP:INSTANT`; whether it came to that.
    #[track_caller]
    pub fn killed_at<S: AsRef<str>>(&self, point: &str, words: &[S]) -> bool {
        let answer = Answer::of(self.command(words).env("ZEROFSCTL_TEST_KILL", point));
        match (answer.signal, answer.code) {
            (Some(9), _) => true,
            (_, Some(0)) => false,
            _ => panic!("with a kill at {point}: {answer:#?}"),
        }
    }

    /// A fresh path for a target.
    pub fn target(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// The processes of this node: the keepers' and the servers' pids.
    pub fn processes(&self) -> (Vec<i32>, Vec<i32>) {
        self.processes_of("")
    }

    /// The same, of one volume only.
    pub fn processes_of(&self, volume: &str) -> (Vec<i32>, Vec<i32>) {
        let mut own = super::dir::processes(self.dir.path());
        // Both have a folder of the volume in their command lines.
        let folder = format!("/volumes/{volume}");
        let of_volume =
            |rest: &str| volume.is_empty() || !rest.starts_with(|c: char| c.is_alphanumeric() || c == '-');
        own.retain(|(_, command)| command.split(&*folder).skip(1).any(of_volume));
        let (mut keepers, rest): (Vec<_>, Vec<_>) =
            own.into_iter().partition(|(_, command)| command.contains("--volume-run-dir"));
        // A child in which a keeper waits for its device has the name of a thread, and may outlive it for a while.
        let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        keepers.retain(|(pid, _)| name(*pid) == "zerofsctl\n");
        let servers = rest.into_iter().filter(|(_, command)| command.contains("config.toml"));
        (keepers.into_iter().map(|(pid, _)| pid).collect(), servers.map(|(pid, _)| pid).collect())
    }

    /// Kills with SIGKILL, and waits until the dead are gone. Whether there was anybody to kill.
    pub fn kill(&self, victim: Victim) -> bool {
        self.kill_of("", victim)
    }

    /// The same, of one volume only.
    pub fn kill_of(&self, volume: &str, victim: Victim) -> bool {
        let (keepers, servers) = self.processes_of(volume);
        let mut dead: Vec<i32> = Vec::new();
        // The keeper first: it must not have time to start the server again.
        if matches!(victim, Victim::Keeper | Victim::Both) {
            dead.extend(&keepers);
        }
        if matches!(victim, Victim::Zerofs | Victim::Both) {
            dead.extend(&servers);
        }
        for pid in &dead {
            // It may have ended by itself since.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        wait_until("killed processes are gone", Duration::from_secs(10), || {
            let (keepers, servers) = self.processes_of(volume);
            !dead.iter().any(|pid| keepers.contains(pid) || servers.contains(pid))
        });
        !dead.is_empty()
    }

    /// What `show` finds of a volume.
    #[track_caller]
    pub fn found(&self, volume: &str) -> Value {
        self.json(&["show", volume])["found"].clone()
    }

    /// Fails unless the volume is attached at exactly these targets, by one device, one mount each.
    #[track_caller]
    pub fn assert_attached(&self, volume: &str, targets: &[&str], when: &str) {
        let found = self.found(volume);
        assert_eq!(found["state"], "attached", "{when}: {found:#}");
        let mut at: Vec<&str> =
            found["targets"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
        at.sort_unstable();
        assert_eq!(at, targets, "{when}: {found:#}");
        let there = leftovers(self.dir.path());
        let loops = there.iter().filter(|l| matches!(l, Leftover::Loop(..))).count();
        let mounts = there.iter().filter(|l| matches!(l, Leftover::Mount(_))).count();
        let (keepers, servers) = self.processes();
        // The fuse transport has a mount and a loop device of its own.
        let fuse = usize::from(found["transport"] == "fuse");
        assert_eq!(
            (loops, mounts, keepers.len(), servers.len()),
            (fuse, fuse + targets.iter().filter(|t| Path::new(t).is_dir()).count(), 1, 1),
            "{when}: loop devices, mounts, keepers, servers: {there:#?}"
        );
        let backend = format!("zerofs:{volume}");
        let devices = sysfs::all().expect("sysfs can be read");
        let nbd = devices.iter().filter(|d| d.connected && d.backend.as_deref() == Some(&backend)).count();
        assert_eq!(nbd, 1 - fuse, "{when}: NBD devices: {devices:#?}");
    }

    /// Fails if a process, mount, device or file of an attached volume is left.
    #[track_caller]
    pub fn assert_nothing_left(&self, when: &str) {
        // A filesystem that was unmounted lazily, and a process that was killed, take a moment to go.
        let unused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.dir.assert_unused()));
        if let Err(payload) = unused {
            let why = payload.downcast_ref::<String>().cloned().unwrap_or_default();
            panic!("{when}: {why}");
        }
        self.assert_no_files_left(when);
    }

    /// The same, where the folders themselves are mounts of the test's own.
    #[track_caller]
    pub fn assert_no_files_left(&self, when: &str) {
        let marked = marked(&self.run_root());
        assert!(marked.is_empty(), "{when}: processes {marked:?} carry the marker of the run folder");
        let files: Vec<PathBuf> =
            [self.run_root().join("volumes"), self.run_root().join("locks"), self.state().join("volumes")]
                .iter()
                .flat_map(|folder| files_below(folder))
                .collect();
        assert!(files.is_empty(), "{when}: files are left: {files:#?}");
    }
}

impl Answer {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Answer {
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|w| w.to_string_lossy().into_owned())
            .collect();
        let Output { status, stdout, stderr } = command.output().expect("the program starts");
        Answer {
            command: words.join(" "),
            code: status.code(),
            signal: status.signal(),
            stdout: String::from_utf8(stdout).expect("UTF-8 on standard output"),
            stderr: String::from_utf8(stderr).expect("UTF-8 on standard error"),
        }
    }

    /// Fails unless it ended with this code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Answer {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// The data of `-o json`.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:#?}"));
        assert_eq!(value["schema"], 1, "{self:#?}");
        value["data"].clone()
    }

    /// Fails unless it is a clear error: this code, one `error:` line with all of `words` in it, a hint,
    /// nothing on standard output and no trace of a panic.
    #[track_caller]
    pub fn expect_error(self, code: i32, words: &[&str]) -> Answer {
        assert_eq!(self.code, Some(code), "{self:#?}");
        let line = self.stderr.lines().find(|l| l.starts_with("error: ")).unwrap_or_default();
        assert!(!line.is_empty(), "no error line: {self:#?}");
        for word in words {
            assert!(line.contains(word), "the error does not say {word:?}: {self:#?}");
        }
        assert!(self.stderr.contains("\nhint: "), "no hint: {self:#?}");
        assert!(
            !self.stderr.contains("zerofsctl panicked") && !self.stderr.contains("\nthread '"),
            "{self:#?}"
        );
        assert_eq!(self.stdout, "", "{self:#?}");
        self
    }
}

/// Processes whose environment names a run folder below `root`.
fn marked(root: &Path) -> Vec<i32> {
    let marker = format!("ZEROFSCTL_RUN_DIR={}/", root.display());
    fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let environ = fs::read(entry.path().join("environ")).ok()?;
            environ.split(|b| *b == 0).any(|v| v.starts_with(marker.as_bytes())).then_some(pid)
        })
        .collect()
}

/// Everything below a folder, folders too; nothing when it is not there.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.extend(files_below(&entry.path()));
        }
    }
    found
}

/// Bytes that are different everywhere and for every seed: a lost, moved or repeated block shows.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// An O_DIRECT write is acknowledged by the keeper, not by any cache. No flush follows, so that only the replay log
/// can have it; for closing the device flushes it, and the caller does that.
pub fn write_acknowledged(device: &Path, at: u64, bytes: &[u8]) -> File {
    let file =
        File::options().write(true).custom_flags(libc::O_DIRECT).open(device).expect("the device opens");
    let mut room = vec![0; bytes.len() + 4096];
    let start = room.as_ptr().align_offset(4096);
    room[start..start + bytes.len()].copy_from_slice(bytes);
    file.write_all_at(&room[start..start + bytes.len()], at).expect("an acknowledged write");
    file
}

/// Writes a file and returns when it is durable.
#[track_caller]
pub fn write_durably(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.write_all(bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.sync_all().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let folder = File::open(path.parent().expect("a folder")).expect("the folder opens");
    folder.sync_all().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Fails unless the file holds exactly these bytes on the device: the page cache is emptied of it first.
#[track_caller]
pub fn assert_holds(path: &Path, bytes: &[u8], when: &str) {
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{when}: {}: {e}", path.display()));
    // SAFETY: the descriptor is open; the call takes nothing else of ours.
    let dropped = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(dropped, 0, "{when}");
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap_or_else(|e| panic!("{when}: {}: {e}", path.display()));
    assert_eq!(read.len(), bytes.len(), "{when}: the length of {}", path.display());
    let first = read.iter().zip(bytes).position(|(a, b)| a != b);
    assert_eq!(first, None, "{when}: the first wrong byte of {}", path.display());
}
