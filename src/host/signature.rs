//! What is on a device, by two independent witnesses: `blkid -p`, and our own table of superblocks. Blank means
//! that both say "nothing" and that the first and last MiB are zeros. Whatever they disagree on is not blank,
//! and whatever cannot be read is an error.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::Signature;
use super::programs::Program;
use crate::error::{Doing, Error, Result};
use crate::values::FsType;

const MIB: u64 = 1 << 20;

/// From either end, all that [`TABLE`] looks at.
const GLANCE: u64 = MIB / 4;

/// Magic numbers by place: offset, bytes, name. Offsets from the end are negative.
const TABLE: &[(i64, &[u8], &str)] = &[
    (0x438, &[0x53, 0xef], "ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0x200, b"LABELONE", "LVM2"),
    (0, b"LABELONE", "LVM2"),
    (0x400, b"LABELONE", "LVM2"),
    (0x600, b"LABELONE", "LVM2"),
    (4086, b"SWAPSPACE2", "swap"),
    (4086, b"SWAP-SPACE", "swap"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (0x36, b"FAT", "FAT"),
    (0x52, b"FAT32", "FAT"),
    (0x200, b"EFI PART", "a GPT partition table"),
    (-512, b"EFI PART", "a GPT partition table"),
    (0x1fe, &[0x55, 0xaa], "an MBR partition table"),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID"),
    (0x1000, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID"),
    (-0x2000, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID"),
    (-0x10000, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID"),
    (0x400, &[0x10, 0x20, 0xf5, 0xf2], "F2FS"),
    (0, b"hsqs", "squashfs"),
    (0x8001, b"CD001", "ISO 9660"),
    (0x1018, &[0xc6, 0x85, 0x73, 0xf6], "bcache"),
    (0x10034, b"ReIsEr", "ReiserFS"),
    (0x8000, b"JFS1", "JFS"),
    (0x400, &[0xe2, 0xe1, 0xf5, 0xe0], "EROFS"),
    (0, b"\x0c\xb1\xba\x00", "ZFS"),
    (0x20000, &[0x0c, 0xb1, 0xba, 0x00], "ZFS"),
];

/// Asks both witnesses.
pub fn probe(device: &Path) -> Result<Signature> {
    // The two witnesses know nothing of each other, so they may look at the same time.
    let (theirs, ours) = std::thread::scope(|scope| {
        let theirs = scope.spawn(|| {
            let _cached = read_ahead(device);
            blkid(device)
        });
        let ours = read_ends(device, MIB);
        let theirs = theirs.join().unwrap_or_else(|_| Err(Error::failed("the thread that asked blkid died")));
        (theirs, ours)
    });
    let (start, end) = ours?;
    judge(theirs?, &start, &end)
}

/// Asks the kernel for the places that blkid is about to read one by one, some fifty of them, each a round trip to
/// ZeroFS: all are on their way at once then. The cache lives as long as the returned file is open, and nobody
/// but blkid reads from it. Where this fails, blkid is only slower.
fn read_ahead(device: &Path) -> Option<File> {
    const BLOCK: u64 = 4096;
    let file = File::open(device).ok()?;
    let size = device_size(&file).ok()?;
    let near_end = size.saturating_sub(MIB / 2) / BLOCK * BLOCK;
    let places = [
        (0, MIB / 2),
        (near_end, size - near_end),
        (MIB, BLOCK),
        (2 * MIB, BLOCK),
        (4 * MIB, BLOCK),
        // A signature of Promise RAIDs, 3087 sectors before the end.
        (size.saturating_sub(3087 * 512) / BLOCK * BLOCK, BLOCK),
    ];
    for (at, length) in places.into_iter().filter(|(at, _)| *at < size) {
        let (at, length) = (at as libc::off_t, length as libc::off_t);
        let _ = posix_fadvise(&file, at, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }
    Some(file)
}

/// Our own table alone, for a device that shall hold a finished `fs`: none unless it sees just that.
pub fn glance(device: &Path, fs: FsType) -> Result<Option<Signature>> {
    let (start, end) = read_ends(device, GLANCE)?;
    let seen = table(&start, &end) == Some(fs.name());
    Ok(seen.then(|| Signature::Filesystem { fs, clean: is_clean(fs, &start) }))
}

/// `blkid`'s word: none for nothing.
fn blkid(device: &Path) -> Result<Option<String>> {
    // -p looks at the device itself, never at blkid's cache.
    let args = ["-p", "-o", "export"].map(AsRef::<std::ffi::OsStr>::as_ref);
    let mut args = args.to_vec();
    args.push(device.as_os_str());
    let output = Program::Blkid.run(&args, Some(Duration::from_secs(120)))?;
    match output.code {
        Some(0) => {
            let value = |key: &str| {
                output.stdout.lines().find_map(|l| l.strip_prefix(key)).map(|v| v.trim().to_owned())
            };
            // Exit 0 without a type: it found something that it cannot name.
            let found = value("TYPE=").or_else(|| value("PTTYPE=").map(|t| format!("partition table {t}")));
            Ok(Some(found.unwrap_or_else(|| "something unnamed".into())))
        }
        Some(2) => Ok(None),
        // 8: several signatures at once, among others.
        _ => Err(Error::refused(format!(
            "nobody can say what is on {}: {}",
            device.display(),
            output.failure()
        ))
        .hint(format!("look at it by hand: wipefs --no-act {}", device.display()))),
    }
}

/// The first and the last `reach` bytes, past the page cache.
fn read_ends(device: &Path, reach: u64) -> Result<(Vec<u8>, Vec<u8>)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(device)
        .doing("open", device)?;
    let size = device_size(&file).doing("find the size of", device)?;
    if size == 0 {
        return Err(Error::failed(format!("{} has no size", device.display())));
    }
    let length = size.min(reach);
    // The last bytes, aligned down: O_DIRECT wants whole blocks.
    let last = (size - length) / 4096 * 4096;
    let read = |from: u64| {
        let mut buffer = Aligned::new(reach as usize + 4096);
        let wanted = (size - from).min(reach + 4096) as usize / 512 * 512;
        read_exact(&file, &mut buffer.slice()[..wanted], from).doing("read", device)?;
        Ok::<_, Error>(buffer.slice()[..wanted].to_vec())
    };
    // Both at once: each takes a round trip to ZeroFS.
    let (start, end) = std::thread::scope(|scope| {
        let end = scope.spawn(|| read(last));
        let start = read(0);
        (start, end.join().unwrap_or_else(|_| Err(Error::failed("the thread that read the end died"))))
    });
    let mut start = start?;
    start.truncate(length as usize);
    Ok((start, end?))
}

/// The size of a block device or file, in bytes.
pub fn device_size(file: &File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

fn read_exact(file: &File, mut buffer: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Memory as O_DIRECT wants it.
pub struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    /// `length` bytes of zeros at a multiple of 4096.
    pub fn new(length: usize) -> Self {
        let memory = vec![0u8; length + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        Aligned(memory, skip, length)
    }

    /// The bytes.
    pub fn slice(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + self.2]
    }
}

/// Weighs both witnesses. `start` is the first MiB, `end` what reaches to the very end of the device.
fn judge(blkid: Option<String>, start: &[u8], end: &[u8]) -> Result<Signature> {
    let ours = table(start, end);
    Ok(match (blkid.as_deref(), ours) {
        (None, None) => match start.iter().chain(end).position(|b| *b != 0) {
            None => Signature::Blank,
            Some(_) => Signature::Other("there is data on it that is no known filesystem".into()),
        },
        (Some(theirs), Some(ours)) if theirs == ours => match ours.parse::<FsType>() {
            Ok(fs) => Signature::Filesystem { fs, clean: is_clean(fs, start) },
            Err(_) => Signature::Other(format!("it holds {ours}")),
        },
        (Some(theirs), None) => Signature::Other(format!("it holds {theirs}")),
        (None, Some(ours)) => Signature::Other(format!("it holds {ours}, although blkid does not see it")),
        (Some(theirs), Some(ours)) => {
            Signature::Other(format!("blkid sees {theirs} on it, our own table sees {ours}"))
        }
    })
}

fn table(start: &[u8], end: &[u8]) -> Option<&'static str> {
    TABLE.iter().find_map(|(offset, magic, name)| {
        let bytes = if *offset < 0 {
            end.get(end.len().checked_sub(offset.unsigned_abs() as usize)?..)?
        } else {
            start.get(*offset as usize..)?
        };
        bytes.starts_with(magic).then_some(*name)
    })
}

/// Whether a filesystem was unmounted cleanly. XFS and Btrfs see to it themselves at the mount.
fn is_clean(fs: FsType, start: &[u8]) -> bool {
    const VALID: u16 = 1;
    const ERRORS: u16 = 2;
    const NEEDS_RECOVERY: u32 = 4;
    if fs != FsType::Ext4 {
        return true;
    }
    let (Some(state), Some(incompat)) = (start.get(0x43a..0x43c), start.get(0x460..0x464)) else {
        return false;
    };
    let state = u16::from_le_bytes([state[0], state[1]]);
    let incompat = u32::from_le_bytes([incompat[0], incompat[1], incompat[2], incompat[3]]);
    state & VALID != 0 && state & ERRORS == 0 && incompat & NEEDS_RECOVERY == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blank() -> (Vec<u8>, Vec<u8>) {
        (vec![0; MIB as usize], vec![0; MIB as usize])
    }

    #[test]
    fn only_two_nothings_and_zeros_are_blank() {
        let (start, end) = blank();
        assert_eq!(judge(None, &start, &end).unwrap(), Signature::Blank);
        assert_ne!(judge(Some("ext4".into()), &start, &end).unwrap(), Signature::Blank);
        for at in [0, 1, 511, 4096, MIB as usize - 1] {
            let (mut start, mut end) = blank();
            start[at] = 1;
            assert!(matches!(judge(None, &start, &end).unwrap(), Signature::Other(_)), "start {at}");
            start[at] = 0;
            end[at] = 1;
            assert!(matches!(judge(None, &start, &end).unwrap(), Signature::Other(_)), "end {at}");
        }
    }

    #[test]
    fn every_magic_of_the_table_is_seen_and_a_disagreement_is_never_blank() {
        for (offset, magic, name) in TABLE {
            let (mut start, mut end) = blank();
            if *offset < 0 {
                let at = end.len() - offset.unsigned_abs() as usize;
                end[at..at + magic.len()].copy_from_slice(magic);
            } else {
                let at = *offset as usize;
                start[at..at + magic.len()].copy_from_slice(magic);
            }
            assert_eq!(table(&start, &end), Some(*name));
            let near = (&start[..GLANCE as usize], &end[end.len() - GLANCE as usize..]);
            assert_eq!(table(near.0, near.1), Some(*name), "a glance sees as much");
            assert!(matches!(judge(None, &start, &end).unwrap(), Signature::Other(_)), "{name}");
            assert!(
                matches!(judge(Some("minix".into()), &start, &end).unwrap(), Signature::Other(_)),
                "{name}"
            );
        }
    }

    /// The real blkid on real files: blank, each filesystem that we make, and something else.
    #[test]
    fn real_blkid_agrees_on_what_mkfs_makes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image");
        let make = |size: u64| {
            let _ = std::fs::remove_file(&file);
            File::create(&file).unwrap().set_len(size).unwrap();
        };
        make(4 << 20);
        assert_eq!(probe(&file).unwrap(), Signature::Blank);
        for (fs, program, args) in [
            (FsType::Ext4, Program::MkfsExt4, vec!["-q", "-F"]),
            (FsType::Xfs, Program::MkfsXfs, vec!["-q"]),
            (FsType::Btrfs, Program::MkfsBtrfs, vec!["-q"]),
        ] {
            make(fs.minimum());
            let mut args: Vec<&std::ffi::OsStr> = args.into_iter().map(AsRef::as_ref).collect();
            args.push(file.as_os_str());
            program
                .run(&args, None)
                .unwrap()
                .success()
                .unwrap_or_else(|e| panic!("{fs} at its minimum: {e}"));
            assert_eq!(probe(&file).unwrap(), Signature::Filesystem { fs, clean: true });
            assert_eq!(glance(&file, fs).unwrap(), Some(Signature::Filesystem { fs, clean: true }));
            let other = FsType::ALL.into_iter().find(|o| *o != fs).unwrap();
            assert_eq!(glance(&file, other).unwrap(), None, "another one is no glance's business");
        }
        make(4 << 20);
        OpenOptions::new().write(true).open(&file).unwrap().write_all_at(b"precious", 1_000_000).unwrap();
        assert!(matches!(probe(&file).unwrap(), Signature::Other(_)));
        assert!(probe(Path::new("/nonexistent")).is_err());
    }
}
