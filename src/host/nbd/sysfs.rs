//! What sysfs says of NBD devices. Nothing here opens a device, so nothing here waits for one.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Doing, Error, Result};
use crate::values::ByteSize;

/// Where the kernel shows its block devices.
const BLOCK: &str = "/sys/block";

/// One device, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdDevice {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// Its size; 0 when it is not connected.
    pub size: ByteSize,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Whether it is set up: the kernel shows a pid. It says nothing about whether anybody answers.
    pub connected: bool,
    /// Who set it up; mostly a process that has ended, and never a sign of life.
    pub pid: Option<i32>,
    /// The backend identifier; none on kernels before 5.14 and for those who give none.
    pub backend: Option<String>,
}

impl NbdDevice {
    /// `/dev/nbdN`
    pub fn path(&self) -> PathBuf {
        path(self.index)
    }

    /// Whether both are one connection, as far as the kernel tells: another one has another process or another identifier.
    pub fn is_same_connection(&self, other: &NbdDevice) -> bool {
        let id = |d: &NbdDevice| d.connected.then(|| (d.index, d.pid, d.backend.clone()));
        self.connected && id(self) == id(other)
    }
}

/// `/dev/nbdN`
pub fn path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// The N of `nbdN` or `/dev/nbdN`; none for anything else, partitions included.
pub fn index_of(name: &Path) -> Option<u32> {
    let name = name.to_str()?;
    let digits = name.strip_prefix("/dev/").unwrap_or(name).strip_prefix("nbd")?;
    let canonical = digits == "0" || !digits.starts_with('0');
    (canonical && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Every NBD device that the kernel has, connected or not, by index.
pub fn all() -> Result<Vec<NbdDevice>> {
    all_in(Path::new(BLOCK))
}

/// One device; none when the kernel has no device of this index.
pub fn one(index: u32) -> Result<Option<NbdDevice>> {
    read(Path::new(BLOCK), index)
}

/// The connected devices with this backend identifier, byte for byte. Several are no fault: each run folder may have a
/// volume of the name, and only its record tells which device is its own.
pub fn named(backend: &str) -> Result<Vec<NbdDevice>> {
    named_in(Path::new(BLOCK), backend)
}

fn all_in(block: &Path) -> Result<Vec<NbdDevice>> {
    let entries = std::fs::read_dir(block).doing("read", block)?;
    let mut indices: Vec<u32> =
        entries.flatten().filter_map(|e| index_of(Path::new(&e.file_name()))).collect();
    indices.sort_unstable();
    let mut devices = Vec::with_capacity(indices.len());
    for index in indices {
        // One that has gone meanwhile is not there.
        devices.extend(read(block, index)?);
    }
    Ok(devices)
}

fn named_in(block: &Path, backend: &str) -> Result<Vec<NbdDevice>> {
    let mut devices = all_in(block)?;
    devices.retain(|d| d.connected && d.backend.as_deref() == Some(backend));
    Ok(devices)
}

fn read(block: &Path, index: u32) -> Result<Option<NbdDevice>> {
    let dir = block.join(format!("nbd{index}"));
    let number = |name: &str| -> Result<Option<u64>> {
        let path = dir.join(name);
        let Some(text) = text(&path)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| Error::failed(format!("{} holds {text:?}", path.display())))
    };
    let (Some(sectors), Some(ro)) = (number("size")?, number("ro")?) else { return Ok(None) };
    let pid = number("pid")?;
    Ok(Some(NbdDevice {
        index,
        // In sectors of 512 bytes, whatever the device's own block size is.
        size: ByteSize(sectors.saturating_mul(512)),
        read_only: ro != 0,
        connected: pid.is_some(),
        pid: pid.and_then(|pid| i32::try_from(pid).ok()),
        backend: text(&dir.join("backend"))?.filter(|b| !b.is_empty()),
    }))
}

/// The content without its newline; none when there is no such file, or the device has just gone.
fn text(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            Ok(Some(text.strip_suffix('\n').unwrap_or(&text).to_owned()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e).doing("read", path),
    }
}

/// What the kernel gives a new device.
const IO_TIMEOUT_MS: u64 = 30_000;
const READ_AHEAD_KIB: u64 = 128;

/// Settings of a device's queue; what is none stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// The I/O scheduler, such as `none`.
    pub scheduler: Option<String>,
    /// Read-ahead, in KiB.
    pub read_ahead_kib: Option<u64>,
    /// The largest request, in KiB; at most what the kernel allows for the device.
    pub max_request_kib: Option<u64>,
    /// After how long the driver looks after a request without an answer, in milliseconds. A connect that names a time-out
    /// of 0 sets it to 30 s; one that names none, such as nbd-client's, leaves what the index had before.
    ///
    /// With one socket and no I/O time-out, looking after means: sent again if the socket was replaced, else a line in
    /// the kernel's log. With several sockets, the socket is **given up** and the request sent on another one.
    pub io_timeout_ms: Option<u64>,
}

/// What a device's queue is set to.
pub fn queue(index: u32) -> Result<Queue> {
    queue_in(Path::new(BLOCK), index)
}

/// The I/O scheduler of a device, such as `none`.
pub fn scheduler(index: u32) -> Result<Option<String>> {
    scheduler_in(&Path::new(BLOCK).join(format!("nbd{index}/queue")))
}

/// Sets the queue of a device.
pub fn set_queue(index: u32, queue: &Queue) -> Result<()> {
    set_queue_in(Path::new(BLOCK), index, queue)
}

/// Sets the queue of a device that is about to be free, or is free, back to what the kernel made: the index keeps its
/// settings, and a short look-after time would make the kernel give up the sockets of whoever gets it next.
pub fn give_back_queue(index: u32) -> Result<()> {
    let is = queue(index)?;
    if is.io_timeout_ms.is_none_or(|ms| ms == IO_TIMEOUT_MS) {
        return Ok(());
    }
    set_queue(
        index,
        &Queue {
            io_timeout_ms: Some(IO_TIMEOUT_MS),
            read_ahead_kib: is.read_ahead_kib.map(|_| READ_AHEAD_KIB),
            ..Queue::default()
        },
    )
}

fn scheduler_in(queue: &Path) -> Result<Option<String>> {
    // `[mq-deadline] none`: the one in use is in brackets.
    Ok(text(&queue.join("scheduler"))?.map(|t| {
        let marked = t.split(' ').find_map(|w| w.strip_prefix('[')?.strip_suffix(']'));
        marked.unwrap_or(&t).to_owned()
    }))
}

fn queue_in(block: &Path, index: u32) -> Result<Queue> {
    let dir = block.join(format!("nbd{index}/queue"));
    let number = |name: &str| Ok::<_, Error>(text(&dir.join(name))?.and_then(|t| t.parse().ok()));
    Ok(Queue {
        scheduler: scheduler_in(&dir)?,
        read_ahead_kib: number("read_ahead_kb")?,
        max_request_kib: number("max_sectors_kb")?,
        io_timeout_ms: number("io_timeout")?,
    })
}

fn set_queue_in(block: &Path, index: u32, queue: &Queue) -> Result<()> {
    let dir = block.join(format!("nbd{index}/queue"));
    let set = |name: &str, value: Option<String>| match value {
        Some(value) => {
            let path = dir.join(name);
            std::fs::write(&path, value).doing("set", &path)
        }
        None => Ok(()),
    };
    // First: it holds for what is read from now on, and the others may have to wait for what is read already.
    set("io_timeout", queue.io_timeout_ms.map(|n| n.min(u32::MAX.into()).to_string()))?;
    set("scheduler", queue.scheduler.clone())?;
    set("read_ahead_kb", queue.read_ahead_kib.map(|n| n.to_string()))?;
    let limit = text(&dir.join("max_hw_sectors_kb"))?.and_then(|t| t.parse().ok()).unwrap_or(u64::MAX);
    set("max_sectors_kb", queue.max_request_kib.map(|n| n.min(limit).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like the kernel's.
    fn block(devices: &[(&str, &[(&str, &str)])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, files) in devices {
            std::fs::create_dir_all(dir.path().join(name).join("queue")).unwrap();
            for (file, content) in *files {
                std::fs::write(dir.path().join(name).join(file), content).unwrap();
            }
        }
        dir
    }

    #[test]
    fn devices_are_read_as_the_kernel_shows_them() {
        let dir = block(&[
            ("nbd10", &[("size", "2048\n"), ("ro", "1\n"), ("pid", "77\n"), ("backend", "zerofs:a\n")]),
            ("nbd2", &[("size", "0\n"), ("ro", "0\n")]),
            ("nbd3", &[("size", "8\n"), ("ro", "0\n"), ("pid", "78\n")]),
            ("nbd4", &[]),
            ("loop0", &[("size", "8\n"), ("ro", "0\n")]),
        ]);
        let all = all_in(dir.path()).unwrap();
        assert_eq!(all.iter().map(|d| d.index).collect::<Vec<_>>(), [2, 3, 10]);
        assert!(!all[0].connected && all[1].connected);
        assert_eq!(all[1].backend, None);
        let named = named_in(dir.path(), "zerofs:a").unwrap();
        let [found] = &named[..] else { panic!("{named:?}") };
        assert_eq!(
            (found.index, found.size, found.read_only, found.pid),
            (10, ByteSize(1 << 20), true, Some(77))
        );
        assert_eq!(found.path(), Path::new("/dev/nbd10"));
        for other in ["zerofs:", "zerofs:a\n", "zerofs:aa", ""] {
            assert_eq!(named_in(dir.path(), other).unwrap(), [], "{other:?}");
        }
        assert_eq!(read(dir.path(), 99).unwrap(), None);
    }

    #[test]
    fn two_devices_may_have_one_identifier_and_rubbish_is_an_error() {
        let one: &[(&str, &str)] =
            &[("size", "8\n"), ("ro", "0\n"), ("pid", "1\n"), ("backend", "zerofs:a\n")];
        let dir = block(&[("nbd0", one), ("nbd1", one)]);
        let named = named_in(dir.path(), "zerofs:a").unwrap();
        assert_eq!(named.iter().map(|d| d.index).collect::<Vec<_>>(), [0, 1]);
        std::fs::write(dir.path().join("nbd0/size"), "x\n").unwrap();
        assert!(all_in(dir.path()).unwrap_err().message().contains("holds \"x\""));
    }

    #[test]
    fn names_of_devices_are_told_from_partitions_and_others() {
        for (name, index) in [("nbd0", 0), ("/dev/nbd15", 15), ("nbd100", 100)] {
            assert_eq!(index_of(Path::new(name)), Some(index));
        }
        for name in ["nbd", "nbd0p1", "nbd01", "/dev/loop0", "xnbd0", "nbd-1", "nbd99999999999"] {
            assert_eq!(index_of(Path::new(name)), None, "{name}");
        }
    }

    #[test]
    fn the_queue_is_read_and_set_within_what_the_kernel_allows() {
        let dir = block(&[(
            "nbd0",
            &[
                ("queue/scheduler", "none [mq-deadline]\n"),
                ("queue/read_ahead_kb", "128\n"),
                ("queue/max_sectors_kb", "1280\n"),
                ("queue/max_hw_sectors_kb", "32768\n"),
                ("queue/io_timeout", "30000\n"),
            ],
        )]);
        let before = queue_in(dir.path(), 0).unwrap();
        assert_eq!(before.scheduler.as_deref(), Some("mq-deadline"));
        let wanted = Queue {
            scheduler: Some("none".into()),
            read_ahead_kib: Some(4096),
            max_request_kib: Some(1 << 20),
            io_timeout_ms: Some(500),
        };
        set_queue_in(dir.path(), 0, &wanted).unwrap();
        let after = queue_in(dir.path(), 0).unwrap();
        assert_eq!(after, Queue { max_request_kib: Some(32768), ..wanted });
        set_queue_in(dir.path(), 0, &Queue::default()).unwrap();
        assert_eq!(queue_in(dir.path(), 0).unwrap(), after);
    }
}
