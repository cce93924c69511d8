//! Locks that are files, each held by one process (flock), and what becomes of one whose holder is killed.
//!
//! A killed process lets go of everything, unless one of its threads waits in the kernel for a block device: then it
//! cannot end before the device answers, and its lock would keep away whoever could bring the device back. Such a process
//! does nothing any more, so its lock file is taken out of its way.
//!
//! Files are taken away, and locks are confirmed, under a lock of their folder: whoever got the lock of a file in the
//! instant in which that was taken away sees so.

use std::fs::{File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::stat::{major, minor};

use crate::atomic_file::{FolderLock, open_lock};

/// For how long a killed process may be on its way out before it counts as one that cannot end.
const DYING: Duration = Duration::from_secs(2);

/// The bit of SIGKILL in the masks of `/proc`.
const KILLED: u64 = 1 << (libc::SIGKILL - 1);

/// The flag of a thread that is on its way out, in `/proc/PID/task/TID/stat`.
const PF_EXITING: u64 = 0x4;

/// What came of an attempt.
#[derive(Debug)]
pub enum Taken {
    /// It is ours for as long as the file is open.
    Ours(File),
    /// Somebody else has it; none when it is not known who.
    Held(Option<i32>),
}

/// Tries to take the lock at `path`, making the file if need be. It waits for nothing but a holder that has been killed.
pub fn try_take(path: &Path) -> io::Result<Taken> {
    let mut dying: Option<(i32, Instant)> = None;
    loop {
        let file = open_lock(path)?;
        match file.try_lock() {
            Ok(()) => {
                let _folder = match lock_folder(path) {
                    Err(e) if e.kind() == io::ErrorKind::TimedOut => return Ok(Taken::Held(None)),
                    other => other?,
                };
                // The holder before us may have removed the file between our open and our lock.
                if is_at(&file, path)? {
                    return Ok(Taken::Ours(file));
                }
                continue;
            }
            Err(TryLockError::Error(e)) => return Err(e),
            Err(TryLockError::WouldBlock) => {}
        }
        let held = whoever_holds(path);
        let Some(pid) = held.filter(|pid| is_dying(*pid)) else { return Ok(Taken::Held(held)) };
        let since = dying.filter(|(of, _)| *of == pid).map_or_else(Instant::now, |(_, since)| since);
        dying = Some((pid, since));
        if since.elapsed() < DYING {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        match take_away(&file, path, pid) {
            Ok(Loss::Lost) => tracing::warn!(
                "process {pid} was killed and cannot end before its device answers: {} was taken from it",
                path.display()
            ),
            Ok(Loss::Over) => {}
            Ok(Loss::Kept) => return Ok(Taken::Held(held)),
            // Somebody stands still while doing the same.
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Ok(Taken::Held(held)),
            Err(e) => return Err(e),
        }
    }
}

/// The process that holds the lock at `path`, unless it was killed. Only a look: taking the lock, even for an instant, could
/// fail whoever wants it.
pub fn holder(path: &Path) -> Option<i32> {
    whoever_holds(path).filter(|pid| !is_dying(*pid))
}

/// Whether the process has been killed and does nothing any more, whether or not it has ended: each of its threads is
/// gone, or on its way out, or will be as soon as the kernel lets go of it.
pub fn is_dying(pid: i32) -> bool {
    every_thread(pid, |_, state| state.is_over || state.is_killed)
}

/// What the kernel says of a thread.
struct ThreadState {
    /// Gone, or on its way out.
    is_over: bool,
    /// It never gets back from where it is in the kernel, but to its end.
    is_killed: bool,
}

impl ThreadState {
    /// None when there is no such thread any more.
    fn of(thread: &Path) -> Option<ThreadState> {
        let status = std::fs::read_to_string(thread.join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let pending = |name| u64::from_str_radix(field(name)?, 16).ok();
        let stat = std::fs::read_to_string(thread.join("stat")).ok()?;
        // After the name: state, ppid, pgrp, session, tty, its group, flags.
        let flags: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(6)?.parse().ok()?;
        Some(ThreadState {
            is_over: field("State:")?.starts_with(['Z', 'X']) || flags & PF_EXITING != 0,
            is_killed: (pending("SigPnd:")? | pending("ShdPnd:")?) & KILLED != 0,
        })
    }
}

/// In doubt, as when one has just ended or become another, it is not so of every thread.
fn every_thread(pid: i32, is_so: impl Fn(&Path, &ThreadState) -> bool) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut seen = 0;
    let all = threads.into_iter().all(|thread| {
        seen += 1;
        thread.is_ok_and(|t| ThreadState::of(&t.path()).is_some_and(|state| is_so(&t.path(), &state)))
    });
    all && seen > 0
}

/// Whether the system call that a killed thread waits in changes nothing that anybody else could see, however late it
/// comes to its end.
fn is_harmless(thread: &Path) -> bool {
    const HARMLESS: [libc::c_long; 6] = [
        libc::SYS_read,
        libc::SYS_pread64,
        libc::SYS_openat,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_close,
    ];
    match std::fs::read_to_string(thread.join("syscall")) {
        Ok(call) => {
            call.split(' ').next().and_then(|n| n.parse().ok()).is_some_and(|n| HARMLESS.contains(&n))
        }
        // Not every architecture tells.
        Err(e) => e.kind() == io::ErrorKind::NotFound && thread.exists(),
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    Ok(std::fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino())))
}

fn lock_folder(path: &Path) -> io::Result<FolderLock> {
    FolderLock::take(path.parent().unwrap_or(Path::new("/")), Duration::from_secs(10))
}

/// What came of it that a killed process was to lose its lock.
enum Loss {
    /// Its file is gone: the next attempt makes another one.
    Lost,
    /// It is not as it was any more.
    Over,
    /// It waits in something that may yet change what its lock was for.
    Kept,
}

fn take_away(file: &File, path: &Path, pid: i32) -> io::Result<Loss> {
    // One at a time, or a second one would remove what the first has made and locked.
    let _alone = lock_folder(path)?;
    if !is_at(file, path)? || whoever_holds(path) != Some(pid) || !is_dying(pid) {
        return Ok(Loss::Over);
    }
    if !every_thread(pid, |thread, state| state.is_over || state.is_killed && is_harmless(thread)) {
        return Ok(Loss::Kept);
    }
    match std::fs::remove_file(path) {
        Ok(()) => Ok(Loss::Lost),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Loss::Over),
        Err(e) => Err(e),
    }
}

fn whoever_holds(path: &Path) -> Option<i32> {
    let meta = std::fs::metadata(path).ok()?;
    let file = format!("{:02x}:{:02x}:{}", major(meta.dev()), minor(meta.dev()), meta.ino());
    // 3: FLOCK  ADVISORY  WRITE 4711 08:01:131090 0 EOF
    // In reads as large as the kernel answers at once: between two, a lock that is given back elsewhere moves the others,
    // and the one that is looked for may be left out.
    let mut locks = vec![0; 1 << 16];
    let (mut table, mut filled) = (File::open("/proc/locks").ok()?, 0);
    loop {
        match table.read(locks.get_mut(filled..)?).ok()? {
            0 => break,
            n => filled += n,
        }
    }
    let locks = String::from_utf8_lossy(&locks[..filled]);
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (kind, pid) = (words.next()?, words.nth(2)?);
        (kind == "FLOCK" && words.next()? == file).then(|| pid.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one_and_its_file_may_be_removed_by_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.lock");
        let Taken::Ours(file) = try_take(&path).unwrap() else { panic!("nobody has it") };
        let own = std::process::id() as i32;
        assert!(matches!(try_take(&path).unwrap(), Taken::Held(Some(pid)) if pid == own));
        assert_eq!(holder(&path), Some(own));
        std::fs::remove_file(&path).unwrap();
        let Taken::Ours(_next) = try_take(&path).unwrap() else { panic!("it is another file") };
        drop(file);
        assert_eq!(holder(&path), Some(own));
    }

    #[test]
    fn who_lives_sleeps_or_is_stopped_is_not_dying_and_a_zombie_is() {
        assert!(!is_dying(std::process::id() as i32));
        assert!(!is_dying(i32::MAX));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        assert!(!is_dying(pid));
        let signal = |s| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), s).unwrap();
        signal(nix::sys::signal::SIGSTOP);
        assert!(!is_dying(pid));
        signal(nix::sys::signal::SIGKILL);
        let begun = Instant::now();
        while !is_dying(pid) {
            assert!(begun.elapsed() < Duration::from_secs(20), "it was killed");
        }
        child.wait().unwrap();
        assert!(!is_dying(pid), "nobody is");
    }
}
