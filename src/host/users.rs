//! Who uses a device or a mount: the answer to "busy", and the proof that nobody does.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::makedev;

use super::nbd::{claim, sysfs};
use super::{User, loopdev, mounts};
use crate::error::{Doing, Kind, Result};

/// Who holds the device besides the mounts of this namespace: openers, mounts in other mount namespaces,
/// devices built on it. The kernel itself is asked last, by an exclusive open, and has the last word.
pub fn of_device(device: &Path) -> Result<Vec<User>> {
    let rdev = std::fs::metadata(device).doing("stat", device)?.rdev();
    let mut users = BTreeMap::new();
    for pid in pids() {
        let opened = open_files(pid, |file| block_number(file) == Some(rdev));
        if opened || mounted_in_namespace_of(pid, device) {
            users.insert(pid, name(pid));
        }
    }
    let mut users: Vec<User> = users.into_iter().map(|(pid, name)| User { pid, name }).collect();
    if users.is_empty() && is_taken(device) {
        users.push(User {
            pid: 0,
            name: "the kernel: another mount namespace, a device built on it, or an unmount that is not over"
                .into(),
        });
    }
    Ok(users)
}

/// Whether the kernel refuses an exclusive open: a mount, a holder, a swap, or a filesystem that is still being unmounted.
pub(super) fn is_taken(device: &Path) -> bool {
    match sysfs::index_of(device) {
        // Not by waiting: one that waits for a server is nobody's, and it may be our task to take it away.
        Some(index) => matches!(claim::device(index), Err(e) if e.kind() == Kind::Busy),
        None => matches!(loopdev::open_exclusively(device), Err(Errno::EBUSY)),
    }
}

/// Which processes keep a mount busy: a file, working folder or root on it.
pub fn of_mount(target: &Path) -> Vec<User> {
    let on = |path: &Path| stat(path).map(|s| (s.stx_dev_major, s.stx_dev_minor));
    let Some(dev) = on(target) else { return Vec::new() };
    let on_it = |path: String| on(Path::new(&path)) == Some(dev);
    pids()
        .filter(|pid| {
            on_it(format!("/proc/{pid}/cwd"))
                || on_it(format!("/proc/{pid}/root"))
                || open_files(*pid, |file| on(file) == Some(dev))
        })
        .map(|pid| User { pid, name: name(pid) })
        .collect()
}

pub(super) fn pids() -> impl Iterator<Item = u32> {
    let own = std::process::id();
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(move |pid| *pid != own)
}

fn open_files(pid: u32, wanted: impl Fn(&Path) -> bool) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|e| wanted(&e.path()))
}

/// What the kernel knows of a file, asked without waiting for a filesystem that may be dead.
fn stat(path: &Path) -> Option<libc::statx> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: a zeroed statx is a valid one; the kernel fills it, and the path is a C string.
    let (result, stat) = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let flags = libc::AT_STATX_DONT_SYNC;
        (libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, &raw mut stat), stat)
    };
    (result == 0).then_some(stat)
}

/// The number of the block device that a path leads to, asked in the same way.
pub(super) fn block_number(path: &Path) -> Option<u64> {
    let stat = stat(path)?;
    let is_block = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    is_block.then(|| makedev(u64::from(stat.stx_rdev_major), u64::from(stat.stx_rdev_minor)))
}

fn mounted_in_namespace_of(pid: u32, device: &Path) -> bool {
    let namespace = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
    let theirs = namespace(&pid.to_string());
    theirs.is_some()
        && theirs != namespace("self")
        && mounts::table(&pid.to_string())
            .is_ok_and(|table| table.iter().any(|m| Path::new(&m.source) == device))
}

fn name(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .map_or_else(|_| "?".into(), |n| n.trim_end().to_owned())
}

/// A short list for an error: `dd (42), bash (43)`.
pub fn list(users: &[User]) -> String {
    let mut names: Vec<_> = users.iter().take(5).map(|u| format!("{} ({})", u.name, u.pid)).collect();
    if users.len() > 5 {
        names.push(format!("{} more", users.len() - 5));
    }
    names.join(", ")
}
