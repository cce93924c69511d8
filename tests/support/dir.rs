//! A test's own folder, and the proof that nothing uses it any more.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zerofsctl::host::nbd::{self, netlink};
use zerofsctl::keeper::device::Record;

/// A folder with a short path (a unix socket's path has at most 107 bytes).
///
/// At the end of the test nothing may use it: a mount, a loop device or a process that is left when this is
/// dropped fails the test. Whether the test succeeded or not, they are then ended and the folder removed.
pub struct TestDir {
    path: PathBuf,
    // A process that was told to stop may need a moment.
    patience: Duration,
}

/// Something that still uses a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// A mount at or below the folder, or of a loop device whose file is there: the mount point.
    Mount(PathBuf),
    /// A loop device whose file is there: for example `/dev/loop3`, and the file.
    Loop(PathBuf, PathBuf),
    /// What libmount still tells about a mount there that is gone.
    Note(PathBuf),
    /// A process with the folder in its command line, as its working folder, or with a file open in it.
    Process(i32, String),
}

const PATIENCE: Duration = Duration::from_secs(10);

impl TestDir {
    /// Makes a new folder in /tmp.
    #[track_caller]
    pub fn new() -> TestDir {
        let dir = tempfile::Builder::new().prefix("zc-").tempdir_in("/tmp").expect("/tmp can be written");
        TestDir { path: dir.keep(), patience: PATIENCE }
    }

    /// The same folder, which gives what is left only this long to go away, not ten seconds.
    pub fn patience(mut self, patience: Duration) -> TestDir {
        self.patience = patience;
        self
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Fails if something uses the folder, and goes on doing so for some seconds.
    #[track_caller]
    pub fn assert_unused(&self) {
        let left = settled(&self.path, self.patience);
        assert!(left.is_empty(), "still in use: {left:#?}");
    }
}

impl AsRef<Path> for TestDir {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let left =
            if std::thread::panicking() { leftovers(&self.path) } else { settled(&self.path, self.patience) };
        clean(&self.path);
        // Never through a mount that could not be taken away: that would empty what is mounted there.
        let safe = !leftovers(&self.path).iter().any(|l| matches!(l, Leftover::Mount(_)));
        if safe {
            let _ = fs::remove_dir_all(&self.path);
        }
        assert!(left.is_empty() || std::thread::panicking(), "the test left behind: {left:#?}");
        assert!(safe || std::thread::panicking(), "a mount below {} cannot be removed", self.path.display());
    }
}

/// The leftovers once they have had time to go away.
fn settled(dir: &Path, patience: Duration) -> Vec<Leftover> {
    let began = Instant::now();
    loop {
        let left = leftovers(dir);
        if left.is_empty() || began.elapsed() > patience {
            return left;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Everything that uses `dir` now; mounts are listed in the order in which they were made.
pub fn leftovers(dir: &Path) -> Vec<Leftover> {
    let loops = loops(dir);
    let mut found: Vec<_> = mounts()
        .into_iter()
        .filter(|(point, source)| point.starts_with(dir) || loops.iter().any(|(device, _)| source == device))
        .map(|(point, _)| Leftover::Mount(point))
        .collect();
    found.extend(notes(dir).into_iter().map(Leftover::Note));
    found.extend(loops.into_iter().map(|(device, file)| Leftover::Loop(device, file)));
    found.extend(processes(dir).into_iter().map(|(pid, what)| Leftover::Process(pid, what)));
    found
}

/// Ends whatever uses the folder: processes first, so that a mount whose server hangs lets go.
fn clean(dir: &Path) {
    for leftover in leftovers(dir) {
        if let Leftover::Process(pid, _) = leftover {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    // Without its keeper, an NBD device has everybody wait who looks at it, and nothing would ever end.
    for run in entries(dir.join("r/volumes")) {
        let volume = run.file_name().and_then(|name| name.to_str()?.parse().ok());
        let record = Record::read(&run).ok().flatten();
        if let (Some(volume), Some(record)) = (volume, record)
            && let Ok(Some(device)) = record.device(&nbd::backend_id(&volume))
        {
            let _ = netlink::disconnect(device.index);
        }
    }
    for leftover in leftovers(dir).into_iter().rev() {
        match leftover {
            Leftover::Mount(point) => {
                let _ = umount2(&point, MntFlags::MNT_DETACH);
            }
            Leftover::Loop(device, _) => {
                let _ = std::process::Command::new("losetup").arg("--detach").arg(device).status();
            }
            Leftover::Note(_) | Leftover::Process(..) => {}
        }
    }
    // What libmount noted of the mounts.
    for point in notes(dir) {
        let words = ["--fake", "--no-canonicalize", "--"];
        let _ = std::process::Command::new("umount").args(words).arg(point).status();
    }
    // A loop device goes only when its last mount has gone, which for a lazy unmount is a moment later.
    let began = Instant::now();
    while !leftovers(dir).is_empty() && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Mount points and sources of this mount namespace.
fn mounts() -> Vec<(PathBuf, PathBuf)> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    table
        .lines()
        .filter_map(|line| {
            let point = line.split(' ').nth(4)?;
            let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
            Some((unescape(point).into(), unescape(source).into()))
        })
        .collect()
}

/// Mount points below `dir` in libmount's table that the kernel does not know.
fn notes(dir: &Path) -> Vec<PathBuf> {
    let mounted: Vec<_> = mounts().into_iter().map(|(point, _)| point).collect();
    let table = fs::read_to_string("/run/mount/utab").unwrap_or_default();
    let points = table.split_ascii_whitespace().filter_map(|field| field.strip_prefix("TARGET="));
    points
        .map(|p| unescape(p).into())
        .filter(|p: &PathBuf| p.starts_with(dir) && !mounted.contains(p))
        .collect()
}

/// The kernel writes the characters that would break its own table as octal numbers.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// Loop devices whose file is below `dir`.
fn loops(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    entries("/sys/block")
        .into_iter()
        .filter_map(|block| {
            let file = fs::read_to_string(block.join("loop/backing_file")).ok()?;
            let file = PathBuf::from(file.trim_end_matches('\n'));
            file.starts_with(dir).then(|| (Path::new("/dev").join(block.file_name().expect("a name")), file))
        })
        .collect()
}

/// Processes other than this one that mention or use `dir`, and their command lines.
pub fn processes(dir: &Path) -> Vec<(i32, String)> {
    let own = std::process::id() as i32;
    entries("/proc")
        .into_iter()
        .filter_map(|proc| {
            let pid: i32 = proc.file_name()?.to_str()?.parse().ok()?;
            if pid == own || zombie(&proc) {
                return None;
            }
            let command = fs::read(proc.join("cmdline")).ok()?;
            let mentions =
                command.windows(dir.as_os_str().len()).any(|part| part == dir.as_os_str().as_bytes());
            let below = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(dir));
            let uses = below(proc.join("cwd")) || entries(proc.join("fd")).into_iter().any(below);
            (mentions || uses).then(|| (pid, String::from_utf8_lossy(&command).replace('\0', " ")))
        })
        .collect()
}

/// A process that has ended and only waits for its parent to ask how.
fn zombie(proc: &Path) -> bool {
    let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

/// The paths of a folder's entries; none when it cannot be read, as with a process that has just ended.
fn entries(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
