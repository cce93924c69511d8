//! How large a mounted filesystem believes it is: asked of the filesystem itself, not of `df`, which leaves out
//! what the filesystem needs for itself.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Doing, Result};
use crate::host::Device;
use crate::values::FsType;

/// Whether the filesystem takes all of the device, but for less than one of its own units.
pub fn fills(device: &Device, fs: FsType, target: &Path) -> Result<bool> {
    let (size, unit) = match fs {
        FsType::Ext4 => ext4(&device.path)?,
        FsType::Xfs => xfs(target)?,
        FsType::Btrfs => btrfs(target)?,
    };
    Ok(size.saturating_add(unit) > device.size.bytes())
}

/// The superblock, through the page cache that the mounted filesystem writes it to.
fn ext4(device: &Path) -> Result<(u64, u64)> {
    let mut block = [0u8; 1024];
    File::open(device).doing("open", device)?.read_exact_at(&mut block, 1024).doing("read", device)?;
    let number =
        |at: usize| u64::from(u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]));
    let unit = 1024 << number(0x18).min(16);
    let has_64bit = number(0x60) & 0x80 != 0;
    let blocks = number(0x4) | if has_64bit { number(0x150) << 32 } else { 0 };
    Ok((blocks * unit, unit))
}

const fn ioctl_read(kind: u8, number: u8, size: usize) -> u64 {
    (2 << 30) | ((size as u64) << 16) | ((kind as u64) << 8) | number as u64
}

const fn ioctl_read_write(kind: u8, number: u8, size: usize) -> u64 {
    ioctl_read(kind, number, size) | (1 << 30)
}

/// XFS_IOC_FSGEOMETRY_V1: 112 bytes; block size at 0, data blocks at 32.
fn xfs(target: &Path) -> Result<(u64, u64)> {
    let mut geometry = [0u64; 14];
    ask(target, ioctl_read(b'X', 100, 112), &mut geometry)?;
    let unit = geometry[0] & 0xffff_ffff;
    Ok((geometry[4] * unit, unit))
}

/// BTRFS_IOC_DEV_INFO: 4096 bytes; device id at 0 (ours is always 1), total bytes at 32.
fn btrfs(target: &Path) -> Result<(u64, u64)> {
    let mut info = vec![0u64; 512];
    info[0] = 1;
    ask(target, ioctl_read_write(0x94, 30, 4096), &mut info)?;
    Ok((info[4], 64 * 1024))
}

fn ask(target: &Path, request: u64, buffer: &mut [u64]) -> Result<()> {
    let folder = File::open(target).doing("open", target)?;
    // SAFETY: the size in the request number is that of the buffer.
    let done = unsafe { libc::ioctl(folder.as_raw_fd(), request, buffer.as_mut_ptr()) };
    if done < 0 {
        return Err(std::io::Error::last_os_error()).doing("ask the size of the filesystem at", target);
    }
    Ok(())
}
