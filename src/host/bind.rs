//! Bind mounts: of a mounted filesystem onto a folder, or of a device's node onto a file.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::MsFlags;

use crate::error::{Doing, Error, Result};

/// Whether the file at `path` is a node of the block device `device`.
pub fn is_node_of(path: &Path, device: &Path) -> Result<bool> {
    let look = |path: &Path| match fs::metadata(path) {
        Ok(meta) => Ok(meta.file_type().is_block_device().then(|| meta.rdev())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).doing("look at", path),
    };
    let at = look(path)?;
    Ok(at.is_some() && at == look(device)?)
}

/// Whether there is a plain file without content.
pub fn is_empty_file(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(meta.is_file() && meta.len() == 0),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).doing("look at the target", path),
    }
}

/// Makes an empty file; one that is there already stays.
pub fn make_file(path: &Path) -> Result<()> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let parent = path.parent().unwrap_or(path).display();
            Err(Error::usage(format!("the folder {parent}, in which the target shall be, does not exist"))
                .hint(format!("make it: mkdir -p {parent}")))
        }
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e).doing("make the target", path),
        _ => Ok(()),
    }
}

/// Removes an empty folder or an empty file; whatever has something in it, or is something else, stays.
pub fn clear_target(path: &Path) -> Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).doing("look at the target", path),
    };
    let removed = if meta.is_dir() {
        fs::remove_dir(path)
    } else if meta.is_file() && meta.len() == 0 {
        fs::remove_file(path)
    } else {
        return Ok(());
    };
    match removed {
        Err(e)
            if !matches!(
                e.raw_os_error(),
                Some(libc::ENOENT | libc::ENOTEMPTY | libc::EBUSY | libc::EEXIST)
            ) =>
        {
            Err(e).doing("remove the target", path)
        }
        _ => Ok(()),
    }
}

/// Binds `source` at `target`. A read-only one is never there read-write, not even for an instant, where the kernel
/// can do that (5.12); on older ones it is for that instant.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    match bind_at_once(source, target, read_only) {
        Err(Errno::ENOSYS) => {}
        other => return other.doing("bind mount at", target),
    }
    let none: Option<&str> = None;
    nix::mount::mount(Some(source), target, none, MsFlags::MS_BIND, none).doing("bind mount at", target)?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(e) = nix::mount::mount(none, target, none, flags, none) {
            let _ = nix::mount::umount(target);
            return Err(e).doing("make read-only", target);
        }
    }
    Ok(())
}

/// `struct mount_attr` of the kernel.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

fn bind_at_once(source: &Path, target: &Path, read_only: bool) -> nix::Result<()> {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL);
    let (source, target) = (text(source)?, text(target)?);
    // SAFETY: a path that lives during the call; a result that is not negative is a new descriptor of ours.
    let tree = unsafe {
        let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint;
        let fd = Errno::result(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, source.as_ptr(), flags))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    if read_only {
        let attr = MountAttr { set: MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, userns_fd: 0 };
        // SAFETY: an empty path and a struct of the given size, both of which live during the call.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                &raw const attr,
                size_of::<MountAttr>(),
            )
        })?;
    }
    // SAFETY: paths that live during the call.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Opens the volume's files to a group, as a pod's fsGroup asks: group `gid`, read and write for it, and folders hand
/// the group on to what is made in them. The root comes last, so that a cut-short walk is seen and done again.
pub fn grant_group(root: &Path, gid: u32) -> Result<()> {
    fn walk(path: &Path, device: u64, gid: u32) -> Result<()> {
        let meta = fs::symlink_metadata(path).doing("look at", path)?;
        // Something else that is mounted below is not ours.
        if meta.dev() != device {
            return Ok(());
        }
        if meta.is_dir() {
            for entry in fs::read_dir(path).doing("read", path)? {
                walk(&entry.doing("read", path)?.path(), device, gid)?;
            }
        }
        std::os::unix::fs::lchown(path, None, Some(gid)).doing("change the group of", path)?;
        if meta.is_symlink() {
            return Ok(());
        }
        let mode = granted(meta.mode(), meta.is_dir());
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode & 0o7777);
        fs::set_permissions(path, permissions).doing("change the mode of", path)
    }
    let device = fs::metadata(root).doing("look at", root)?.dev();
    walk(root, device, gid)
}

/// Whether the root says that [`grant_group`] was done.
pub fn group_granted(root: &Path, gid: u32) -> Result<bool> {
    let meta = fs::metadata(root).doing("look at", root)?;
    Ok(meta.gid() == gid && granted(meta.mode(), true) == meta.mode())
}

fn granted(mode: u32, folder: bool) -> u32 {
    let mode = mode | 0o060 | if mode & 0o100 != 0 { 0o010 } else { 0 };
    if folder { mode | 0o2070 } else { mode }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_what_is_empty_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("empty")).unwrap();
        fs::create_dir(at("full")).unwrap();
        fs::write(at("full/x"), "x").unwrap();
        fs::write(at("file"), "").unwrap();
        fs::write(at("data"), "x").unwrap();
        std::os::unix::fs::symlink(at("empty"), at("link")).unwrap();
        for name in ["empty", "full", "file", "data", "link", "missing"] {
            clear_target(&at(name)).unwrap();
        }
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["data", "full", "link"]);
    }

    #[test]
    fn root_a_read_only_bind_refuses_writes_and_leaves_the_source_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("target"));
        fs::create_dir(&source).unwrap();
        fs::create_dir(&target).unwrap();
        bind(&source, &target, true).expect("needs root");
        let refused = fs::write(target.join("x"), "x");
        fs::write(source.join("y"), "y").unwrap();
        let seen = target.join("y").exists();
        nix::mount::umount(&target).unwrap();
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EROFS));
        assert!(seen);
    }

    #[test]
    fn root_a_group_gets_everything_and_the_root_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("f"), "x").unwrap();
        fs::set_permissions(sub.join("f"), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!group_granted(dir.path(), 4711).unwrap());
        grant_group(dir.path(), 4711).expect("needs root");
        assert!(group_granted(dir.path(), 4711).unwrap());
        let meta = fs::metadata(sub.join("f")).unwrap();
        assert_eq!((meta.gid(), meta.mode() & 0o7777), (4711, 0o770));
        assert_eq!(fs::metadata(&sub).unwrap().mode() & 0o2070, 0o2070);
    }
}
