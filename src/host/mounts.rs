//! The mount table, exactly: `/proc/self/mountinfo`, decoded. Never "the filesystem that holds this path".

use std::path::{Path, PathBuf};

use super::MountEntry;
use crate::error::{Doing, Result};

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

/// What is mounted exactly at `target`: the topmost, when several are stacked.
pub fn at(table: &[MountEntry], target: &Path) -> Option<MountEntry> {
    table.iter().rfind(|m| m.target == target).cloned()
}

/// Space, tab, newline and backslash are three octal digits in the table.
fn decode(text: &str) -> String {
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
    fn the_own_table_has_a_root() {
        assert!(at(&table("self").unwrap(), Path::new("/")).is_some());
    }
}
