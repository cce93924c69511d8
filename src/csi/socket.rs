//! The driver's socket and its lock.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::error::{Doing, Error, Kind, Result};
use crate::file_lock::{self, Taken};

/// Reads `unix:///csi/csi.sock`, also `unix:/csi/csi.sock` and a bare path, as drivers are given it.
pub fn endpoint(text: &str) -> Result<PathBuf> {
    let wrong = |why: &str| {
        Error::usage(format!("the endpoint {text:?} {why}"))
            .hint("write unix:///var/lib/kubelet/plugins/zerofs.csi.driver/csi.sock")
    };
    let path = match text.split_once(':') {
        Some(("unix", rest)) => rest.strip_prefix("//").unwrap_or(rest),
        Some((scheme, _)) if !scheme.contains('/') => {
            return Err(wrong("is not a unix socket: the driver listens to nobody but this machine"));
        }
        _ => text,
    };
    let path = Path::new(path);
    if !path.is_absolute()
        || path.file_name().is_none()
        || text.chars().any(char::is_control)
        || path.components().any(|c| c == std::path::Component::ParentDir)
    {
        return Err(wrong("is not the absolute path of a socket"));
    }
    Ok(path.to_owned())
}

/// Makes this the only driver of its state root, for as long as the file is held.
pub fn lock(state_dir: &Path) -> Result<File> {
    crate::journal::private_folder(state_dir)?;
    let path = state_dir.join("csi.lock");
    match file_lock::try_take(&path).doing("lock", &path)? {
        Taken::Ours(file) => Ok(file),
        Taken::Held(_) => Err(Error::new(
            Kind::Busy,
            format!("another driver runs with the state folder {}", state_dir.display()),
        )
        .hint(format!(
            "see which: fuser -v {}; or give this one another --state-dir and --run-dir",
            path.display()
        ))),
    }
}

/// A socket that is removed at the end, if it is still the same one.
pub struct Socket {
    path: PathBuf,
    inode: u64,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens at `path`, for root only. A socket that nobody answers on any more is replaced; anything else is not.
pub fn bind(path: &Path) -> Result<(UnixListener, Socket)> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).doing("make the folder", parent)?;
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(parent)
        .doing("open", parent)?;
    let name = path.file_name().unwrap_or_default();
    // Through the handle, since an address holds 107 bytes only.
    let short = |name: &std::ffi::OsStr| {
        let mut text = std::ffi::OsString::from(format!("/proc/self/fd/{}/", folder.as_raw_fd()));
        text.push(name);
        text
    };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).doing("look at", path),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(Error::refused(format!("{} is there, and is not a socket", path.display()))
                .hint("move it away, or give another --endpoint"));
        }
        Ok(_) if UnixStream::connect(short(name)).is_ok() => {
            return Err(Error::new(Kind::Busy, format!("something answers on {} already", path.display()))
                .hint(format!("see what: fuser -v {}; or give another --endpoint", path.display())));
        }
        Ok(_) => {}
    }
    // Made beside it and moved there: at no instant is it there for others, or not there.
    let mut beside = std::ffi::OsString::from(".");
    beside.push(std::ffi::OsStr::from_bytes(name.as_bytes()));
    beside.push(".new");
    let new = parent.join(&beside);
    match fs::remove_file(&new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).doing("remove the stale", &new),
        _ => {}
    }
    let listener = UnixListener::bind(short(&beside)).doing("listen on", &new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).doing("set the mode of", &new)?;
    let inode = fs::symlink_metadata(&new).doing("look at", &new)?.ino();
    fs::rename(&new, path).doing("put in its place", path)?;
    listener.set_nonblocking(true).doing("set up", path)?;
    Ok((listener, Socket { path: path.to_owned(), inode }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for good in ["unix:///csi/csi.sock", "unix:/csi/csi.sock", "/csi/csi.sock"] {
            assert_eq!(endpoint(good).unwrap(), Path::new("/csi/csi.sock"), "{good}");
        }
        for bad in [
            "",
            "csi.sock",
            "unix://csi.sock",
            "tcp://0.0.0.0:10000",
            "unix:///",
            "unix:///a/../b",
            "unix:///a\nb",
        ] {
            let e = endpoint(bad).expect_err(bad);
            assert!(e.hint_text().is_some());
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_or_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than an address.
        let folder = dir.path().join("x".repeat(120));
        let path = folder.join("csi.sock");
        let (listener, socket) = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&path).err().unwrap().kind(), Kind::Busy);
        drop(listener);
        let (second, again) = bind(&path).unwrap();
        // The first one's end does not take the second one's socket.
        drop(socket);
        assert!(path.exists());
        drop((second, again));
        assert!(!path.exists());
        fs::write(&path, "x").unwrap();
        assert_eq!(bind(&path).err().unwrap().kind(), Kind::Refused);
    }

    #[test]
    fn one_driver_per_state_root() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        assert_eq!(lock(dir.path()).err().unwrap().kind(), Kind::Busy);
        drop(held);
        lock(dir.path()).unwrap();
    }
}
