//! The mount table, exactly: `/proc/self/mountinfo`, decoded. Never "the filesystem that holds this path".

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::{MountEntry, loopdev};
use crate::error::{Doing, Result};
use crate::keeper::fuse;

/// All mounts of a process's namespace: `self`, or a pid.
pub fn table(of: &str) -> Result<Vec<MountEntry>> {
    let path = format!("/proc/{of}/mountinfo");
    let text = std::fs::read(&path).doing("read", &path)?;
    Ok(parse(&String::from_utf8_lossy(&text)))
}

/// Parses mountinfo; lines that make no sense are left out.
pub fn parse(text: &str) -> Vec<MountEntry> {
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(4);
            let (target, options) = (left.next()?, left.next()?);
            let mut right = right.split(' ');
            let (fs, source, super_options) = (right.next()?, right.next()?, right.next().unwrap_or(""));
            // What a kernel says of a filesystem that gave up after an error counts as read-only, too.
            let off = |o: &str| matches!(o, "ro" | "emergency_ro" | "shutdown");
            let read_only = [options, super_options].iter().any(|o| o.split(',').any(off));
            Some(MountEntry {
                target: PathBuf::from(decode(target)),
                source: decode(source),
                fs: decode(fs),
                read_only,
            })
        })
        .collect()
}

/// One line of mountinfo as the kernel numbers it: for those who look for a device, whatever it is called there. Most
/// lines are of no interest to them, so nothing is decoded yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceLine<'a> {
    /// The device's number; one without a device for btrfs and pseudo filesystems.
    pub dev: u64,
    /// Which part of the filesystem is mounted.
    pub root: &'a str,
    /// `ext4`, `nsfs`, …
    pub fs: &'a str,
    /// `/dev/loop3`, or the filesystem's own name.
    pub source: &'a str,
    target: &'a str,
}

impl DeviceLine<'_> {
    /// Parses a line; none when it makes no sense.
    pub fn parse(line: &str) -> Option<DeviceLine<'_>> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let (number, root, target) = (left.next()?, left.next()?, left.next()?);
        let (major, minor) = number.split_once(':')?;
        let dev = nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?);
        let mut right = right.split(' ');
        Some(DeviceLine { dev, root, fs: right.next()?, source: right.next()?, target })
    }

    /// Mount point.
    pub fn target(&self) -> PathBuf {
        PathBuf::from(decode(self.target))
    }
}

/// What is mounted exactly at `target`: the topmost, when several are stacked.
pub fn at(table: &[MountEntry], target: &Path) -> Option<MountEntry> {
    table.iter().rfind(|m| m.target == target).cloned()
}

/// What is mounted on a folder of the filesystem that `target` shows, if anything is: by the kernel's numbers, as the path of
/// what an earlier mount there had below it is the same.
pub fn below(table: &str, target: &Path) -> Option<PathBuf> {
    let lines: Vec<(&str, &str, PathBuf)> = table
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (id, parent, place) = (words.next()?, words.next()?, words.nth(2)?);
            Some((id, parent, PathBuf::from(decode(place))))
        })
        .collect();
    let (id, ..) = lines.iter().rfind(|(.., place)| place == target)?;
    lines.iter().find(|(_, parent, _)| parent == id).map(|(.., place)| place.clone())
}

/// Gives the calling thread, and what it starts, a view of the mounts without any keeper's disk and the filesystems on
/// it, so that a program that asks about every mounted loop device cannot fail or hang for a keeper that is gone or
/// stuck. For the rest of the thread's life: call it in one of its own. The mounts of everybody else stay as they are:
/// nothing is taken out of the view before the kernel has said that this does not spread.
pub fn leave_disks_out() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).doing("make", "a mount namespace")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none).doing("keep apart", "its mounts")?;
    // `self` is the process, whose view did not change.
    let table = table("thread-self")?;
    let is_disk = |m: &&MountEntry| m.fs == fuse::FS_NAME;
    let disks: Vec<_> = table.iter().filter(is_disk).collect();
    let on_disk = |m: &&MountEntry| {
        let file = m.source.strip_prefix("/dev/").and_then(|name| loopdev::backing(name).ok());
        file.is_some_and(|f| disks.iter().any(|disk| Path::new(&f).starts_with(&disk.target)))
    };
    // Filesystems first: while one is here, no detach elsewhere can end it. One that is gone by now is no matter.
    for m in table.iter().filter(on_disk).rev().chain(disks.iter().rev().copied()) {
        let _ = umount2(&m.target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    Ok(())
}

/// Space, tab, newline and backslash are three octal digits in the table.
pub(super) fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|d| bytes[at] == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                let value = d.iter().fold(0u32, |v, b| v * 8 + u32::from(b - b'0'));
                out.push(value as u8);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
36 35 98:0 / / rw,noatime master:1 - ext4 /dev/root rw,errors=continue
40 36 7:0 / /mnt/a\\040b rw - ext4 /dev/loop0 rw
41 36 7:1 / /mnt/c ro,relatime shared:2 master:3 - xfs /dev/loop1 rw
42 36 7:2 / /mnt/d rw - btrfs /dev/loop2 ro,space_cache
44 36 7:4 / /mnt/e rw - ext4 /dev/nbd0 rw,emergency_ro
43 40 7:3 / /mnt/a\\040b rw - ext4 /dev/loop3 rw
garbage
";

    #[test]
    fn paths_are_decoded_and_matched_exactly() {
        let table = parse(TABLE);
        assert_eq!(table.len(), 6);
        assert!(at(&table, Path::new("/mnt/e")).unwrap().read_only);
        assert_eq!(at(&table, Path::new("/mnt/a b")).unwrap().source, "/dev/loop3", "the topmost counts");
        assert_eq!(at(&table, Path::new("/mnt/a b/below")), None, "never the parent");
        assert_eq!(at(&table, Path::new("/mnt")), None);
        assert!(at(&table, Path::new("/mnt/c")).unwrap().read_only);
        assert!(at(&table, Path::new("/mnt/d")).unwrap().read_only);
        assert!(!at(&table, Path::new("/")).unwrap().read_only);
    }

    #[test]
    fn only_what_is_mounted_on_it_is_below() {
        let table = "\
36 35 98:0 / / rw - ext4 /dev/root rw
40 36 7:0 / /mnt/a rw - ext4 /dev/loop0 rw
41 40 7:1 / /mnt/a/b rw - ext4 /dev/loop1 rw
42 36 7:2 / /mnt/c rw - ext4 /dev/loop2 rw
43 42 7:3 / /mnt/c/d\\040e rw - ext4 /dev/loop3 rw
44 40 7:4 / /mnt/a rw - ext4 /dev/loop4 rw
";
        let below = |target: &str| below(table, Path::new(target));
        assert_eq!(below("/mnt/c"), Some("/mnt/c/d e".into()));
        assert_eq!(below("/mnt/c/d e"), None);
        assert_eq!(below("/mnt/a"), None, "what is below the mount that this one covers is not in its way");
        assert_eq!(below("/elsewhere"), None);
    }

    #[test]
    fn the_own_table_has_a_root() {
        assert!(at(&table("self").unwrap(), Path::new("/")).is_some());
    }
}
