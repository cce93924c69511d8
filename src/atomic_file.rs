//! Small files that are there in full or not at all, after a crash too.
//!
//! [`FolderLock`] keeps writers of one folder apart (flock, so a dead writer holds nothing). [`replace`] writes
//! beside the target, syncs, renames and syncs the folder. The name beside the target is fixed: what a killed
//! writer left there is overwritten by the next one, so leftovers cannot pile up.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// An exclusive lock on a folder, released on drop. The folder itself is locked, so no lock file is needed.
#[derive(Debug)]
pub struct FolderLock {
    _folder: File,
}

impl FolderLock {
    /// Waits up to `limit`; [`io::ErrorKind::TimedOut`] when somebody else holds it for longer.
    pub fn take(dir: &Path, limit: Duration) -> io::Result<Self> {
        let folder = File::open(dir)?;
        let until = Instant::now() + limit;
        loop {
            match folder.try_lock() {
                Ok(()) => return Ok(FolderLock { _folder: folder }),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "another process holds its lock"));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(2)),
                Err(TryLockError::Error(e)) => return Err(e),
            }
        }
    }
}

/// Opens a file that is only there to be locked (mode 0600), and makes it if need be. It is not locked yet.
pub fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Writes `path` (mode 0600) so that a reader, now or after a power cut, sees either the old file or all of the
/// new one. `beside` must be on the same filesystem and is used by one writer at a time.
pub fn replace(path: &Path, beside: &Path, bytes: &[u8]) -> io::Result<()> {
    // A leftover may have other permissions, or be a link that somebody planted.
    match fs::remove_file(beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(beside, path)
    })();
    if let Err(e) = written {
        // On a full disk, give back what little was taken. The first error is the one to tell.
        let _ = fs::remove_file(beside);
        return Err(e);
    }
    sync_parent(path)
}

/// Makes `dir` and its missing parents, mode 0700, and syncs the folder that each new one appears in.
pub fn create_folder(dir: &Path) -> io::Result<()> {
    let mut missing: Vec<PathBuf> = Vec::new();
    let mut at = Some(dir);
    while let Some(d) = at {
        match fs::metadata(d) {
            Ok(m) if m.is_dir() => break,
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(d.to_owned()),
            Err(e) => return Err(e),
        }
        at = d.parent();
    }
    for d in missing.iter().rev() {
        match fs::DirBuilder::new().mode(0o700).create(d) {
            // Another process may have been quicker.
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => sync_parent(d)?,
        }
    }
    Ok(())
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn replaces_in_full_over_leftovers_and_planted_links() {
        let dir = tempfile::tempdir().unwrap();
        let (path, beside) = (dir.path().join("a"), dir.path().join("new"));
        let victim = dir.path().join("victim");
        fs::write(&victim, "keep").unwrap();
        std::os::unix::fs::symlink(&victim, &beside).unwrap();
        replace(&path, &beside, b"one").unwrap();
        fs::write(&beside, "torn leftover of a killed writer").unwrap();
        replace(&path, &beside, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read(&victim).unwrap(), b"keep");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!beside.exists());
    }

    #[test]
    fn a_held_lock_ends_in_a_time_out_and_a_dropped_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let held = FolderLock::take(dir.path(), Duration::ZERO).unwrap();
        let refused = FolderLock::take(dir.path(), Duration::from_millis(20)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
        drop(held);
        FolderLock::take(dir.path(), Duration::ZERO).unwrap();
    }

    #[test]
    fn new_folders_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("x/y/z");
        create_folder(&deep).unwrap();
        create_folder(&deep).unwrap();
        for d in ["x", "x/y", "x/y/z"] {
            assert_eq!(fs::metadata(dir.path().join(d)).unwrap().permissions().mode() & 0o777, 0o700);
        }
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(create_folder(&dir.path().join("file/below")).is_err());
    }
}
