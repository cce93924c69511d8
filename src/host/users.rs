//! Who uses a device or a mount: the answer to "busy", and the proof that nobody does.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{User, loopdev, mounts};
use crate::error::{Doing, Result};

/// Who holds the device besides the mounts of this namespace: openers, mounts in other mount namespaces,
/// devices built on it. The kernel itself is asked last, by an exclusive open, and has the last word.
pub fn of_device(device: &Path) -> Result<Vec<User>> {
    let rdev = std::fs::metadata(device).doing("stat", device)?.rdev();
    let mut users = BTreeMap::new();
    for pid in pids() {
        let opened =
            open_files(pid, |meta| meta.rdev() == rdev && meta.mode() & libc::S_IFMT == libc::S_IFBLK);
        if opened || mounted_in_namespace_of(pid, device) {
            users.insert(pid, name(pid));
        }
    }
    let mut users: Vec<User> = users.into_iter().map(|(pid, name)| User { pid, name }).collect();
    if users.is_empty()
        && let Err(nix::errno::Errno::EBUSY) = loopdev::open_exclusively(device)
    {
        users.push(User {
            pid: 0,
            name: "the kernel: another mount namespace, or a device built on it".into(),
        });
    }
    Ok(users)
}

/// Which processes keep a mount busy: a file, working folder or root on it.
pub fn of_mount(target: &Path) -> Vec<User> {
    let Ok(dev) = std::fs::metadata(target).map(|m| m.dev()) else { return Vec::new() };
    let on_it = |path: String| std::fs::metadata(path).is_ok_and(|m| m.dev() == dev);
    pids()
        .filter(|pid| {
            on_it(format!("/proc/{pid}/cwd"))
                || on_it(format!("/proc/{pid}/root"))
                || open_files(*pid, |meta| meta.dev() == dev)
        })
        .map(|pid| User { pid, name: name(pid) })
        .collect()
}

fn pids() -> impl Iterator<Item = u32> {
    let own = std::process::id();
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(move |pid| *pid != own)
}

fn open_files(pid: u32, wanted: impl Fn(&std::fs::Metadata) -> bool) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|e| std::fs::metadata(e.path()).is_ok_and(|m| wanted(&m)))
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
