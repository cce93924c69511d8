//! Loop devices with direct I/O on the FUSE file. A device is ours if, and only if, its backing file is the file
//! in our run folder, as the kernel tells in sysfs; or, once the mount that the file is in was detached lazily, so that
//! the kernel no longer knows a path to it, if it carries the label that [`attach`] gave it.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use linux_raw_sys::loop_device as sys;

use crate::error::{Doing, Error, Kind, Result};
use crate::host::Device;
use crate::values::ByteSize;

/// What the kernel says of the file behind the loop device of this name (`loop3`); free ones have none.
pub fn backing(name: &str) -> std::io::Result<String> {
    let text = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// The loop device whose backing file is `file`, if there is one.
pub fn find(file: &Path) -> Result<Option<Device>> {
    let entries = std::fs::read_dir("/sys/block").doing("read", "/sys/block")?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|n| n.starts_with("loop")) else { continue };
        let Ok(backing) = backing(name) else { continue };
        if Path::new(&backing) == file
            || backing.strip_suffix(" (deleted)").is_some_and(|b| Path::new(b) == file)
            || is_detached(&backing, file) && has_label(name, file)
        {
            return device(name).map(Some);
        }
    }
    Ok(None)
}

/// Whether `backing` is what the kernel says of `file` when its mount is no longer in the tree: its path in that mount.
fn is_detached(backing: &str, file: &Path) -> bool {
    file.file_name().is_some_and(|name| Path::new("/").join(name) == Path::new(backing))
}

/// The bytes that mark a device as that of `file`: a checksum of its path, and as much of its end as there is room for.
fn label(file: &Path) -> [u8; sys::LO_NAME_SIZE as usize] {
    let path = file.as_os_str().as_bytes();
    let mut label = [0; sys::LO_NAME_SIZE as usize];
    // The last byte stays 0: it is a C string.
    let (sum, end) = (format!("{:08x} ", crc32c::crc32c(path)), label.len() - 1);
    let room = end - sum.len();
    let text = [sum.as_bytes(), &path[path.len().saturating_sub(room)..]].concat();
    label[..text.len()].copy_from_slice(&text);
    label
}

/// Whether `loop3` carries the label of `file`. One that cannot be asked is not ours.
fn has_label(name: &str, file: &Path) -> bool {
    let Ok(device) = File::open(Path::new("/dev").join(name)) else { return false };
    // SAFETY: plain integers and arrays, for which zeros are valid.
    let mut info: sys::loop_info64 = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a loop_info64 that lives during the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), u64::from(sys::LOOP_GET_STATUS64), &raw mut info) };
    done >= 0 && info.lo_file_name == label(file)
}

/// What sysfs says of `loop3`.
fn device(name: &str) -> Result<Device> {
    let read = |what: &str| -> Result<u64> {
        let path = format!("/sys/block/{name}/{what}");
        let text = std::fs::read_to_string(&path).doing("read", &path)?;
        text.trim().parse().map_err(|_| Error::failed(format!("{path} holds {text:?}")))
    };
    // sysfs counts in sectors of 512 bytes, whatever the device's own block size is.
    Ok(Device {
        path: Path::new("/dev").join(name),
        read_only: read("ro")? == 1,
        size: ByteSize(read("size")? * 512),
    })
}

/// Puts a loop device on `file`.
pub fn attach(file: &Path, read_only: bool) -> Result<Device> {
    let backing = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(file)
        .doing("open", file)?;
    let control = "/dev/loop-control";
    let control_file = OpenOptions::new().read(true).write(true).open(control).map_err(|e| {
        Error::environment(format!("cannot open {control}: {e}"))
            .hint("load the module: modprobe loop; in a container, mount the host's /dev")
    })?;
    let begun = Instant::now();
    loop {
        // SAFETY: this ioctl takes no argument and returns a number.
        let index = unsafe { libc::ioctl(control_file.as_raw_fd(), u64::from(sys::LOOP_CTL_GET_FREE)) };
        if index < 0 {
            return Err(std::io::Error::last_os_error()).doing("get a free device from", control);
        }
        let path = PathBuf::from(format!("/dev/loop{index}"));
        match configure(&path, &backing, label(file), read_only) {
            Ok(()) => return device(&format!("loop{index}")),
            // Somebody else was quicker, or the node of a new device is not there yet.
            Err(e) if retry(&e) && begun.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(e).doing("configure", &path),
        }
    }
}

fn retry(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENOENT | libc::ENXIO | libc::EAGAIN))
}

fn configure(
    path: &Path,
    backing: &File,
    label: [u8; sys::LO_NAME_SIZE as usize],
    read_only: bool,
) -> std::io::Result<()> {
    let device = OpenOptions::new().read(true).write(!read_only).open(path)?;
    // SAFETY: plain integers and arrays, for which zeros are valid.
    let mut config: sys::loop_config = unsafe { std::mem::zeroed() };
    config.fd = backing.as_raw_fd() as u32;
    // 512 as everywhere else a volume may be attached: XFS refuses a device with larger sectors than its own.
    config.block_size = 512;
    config.info.lo_file_name = label;
    config.info.lo_flags =
        sys::LO_FLAGS_DIRECT_IO as u32 | if read_only { sys::LO_FLAGS_READ_ONLY as u32 } else { 0 };
    // SAFETY: the pointer is to a loop_config that lives during the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), u64::from(sys::LOOP_CONFIGURE), &raw const config) };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the device learn the file's new size.
pub fn grow(device: &Path, file: &Path) -> Result<()> {
    // The kernel's idea of the size of a FUSE file is as old as the last stat.
    std::fs::metadata(file).doing("stat", file)?;
    let opened = OpenOptions::new().read(true).open(device).doing("open", device)?;
    // SAFETY: this ioctl takes no argument.
    let done = unsafe { libc::ioctl(opened.as_raw_fd(), u64::from(sys::LOOP_SET_CAPACITY)) };
    if done < 0 {
        return Err(std::io::Error::last_os_error()).doing("grow", device);
    }
    Ok(())
}

/// Takes the device off `file`, and waits until the kernel has let go. With `dead`, a device that a lazily
/// detached filesystem still holds is left to go by itself when the last holder does.
pub fn detach(device: &Path, file: &Path, dead: bool) -> Result<()> {
    let fd = {
        let opened = OpenOptions::new().read(true).open(device).doing("open", device)?;
        // SAFETY: this ioctl takes no argument.
        let done = unsafe { libc::ioctl(opened.as_raw_fd(), u64::from(sys::LOOP_CLR_FD)) };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        // The device goes when the last opener closes it: that is us, here.
    };
    match fd {
        Err(e) if e.raw_os_error() != Some(libc::ENXIO) => return Err(e).doing("detach", device),
        _ => {}
    }
    let begun = Instant::now();
    let limit = Duration::from_secs(if dead { 2 } else { 30 });
    while find(file)?.is_some_and(|d| d.path == device) {
        if begun.elapsed() > limit {
            if dead {
                return Ok(());
            }
            return Err(Error::new(Kind::Busy, format!("{} is still held by somebody", device.display()))
                .hint(format!("see who: fuser -vm {}", device.display())));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Opens the device exclusively: it fails while anything has it mounted, in whatever mount namespace, or
/// builds another device on it.
pub fn open_exclusively(device: &Path) -> nix::Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_EXCL | nix::fcntl::OFlag::O_CLOEXEC;
    nix::fcntl::open(device, flags, nix::sys::stat::Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_a_file_becomes_a_device_and_goes_again() {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk with space");
        File::create(&file).unwrap().set_len(8 << 20).unwrap();
        assert_eq!(find(&file).unwrap(), None);
        let device = attach(&file, false).unwrap();
        assert_eq!(device.size, ByteSize(8 << 20));
        assert_eq!(find(&file).unwrap(), Some(device.clone()));
        OpenOptions::new().write(true).open(&file).unwrap().set_len(16 << 20).unwrap();
        grow(&device.path, &file).unwrap();
        assert_eq!(find(&file).unwrap().unwrap().size, ByteSize(16 << 20));
        assert!(open_exclusively(&device.path).is_ok());
        detach(&device.path, &file, false).unwrap();
        assert_eq!(find(&file).unwrap(), None);
        let device = attach(&file, true).unwrap();
        assert!(device.read_only);
        detach(&device.path, &file, false).unwrap();
    }

    #[test]
    fn root_a_device_is_found_when_the_mount_of_its_file_was_detached_lazily() {
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir().unwrap();
        // Deep enough that the label has no room for all of it.
        let folder = dir.path().join("volumes".repeat(8)).join("fuse");
        std::fs::create_dir_all(&folder).unwrap();
        mount(Some("test"), &folder, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let file = folder.join("disk");
        File::create(&file).unwrap().set_len(8 << 20).unwrap();
        let device = attach(&file, false).unwrap();
        umount2(&folder, MntFlags::MNT_DETACH).unwrap();
        assert_eq!(find(&file).unwrap(), Some(device.clone()));
        assert_eq!(find(&dir.path().join("fuse/disk")).unwrap(), None, "of another folder");
        detach(&device.path, &file, true).unwrap();
        assert_eq!(find(&file).unwrap(), None);
    }
}
