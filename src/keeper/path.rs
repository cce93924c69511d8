//! The data path: connections to ZeroFS, threads and the FUSE front end around the guard.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use super::guard::{Op, Stats};
use crate::error::{Error, Result};
use crate::values::VolumeId;

/// What a data path is made of.
#[derive(Debug, Clone)]
pub struct DataPathConfig {
    /// The volume's run folder: `nbd.sock` is in it, and `replay.log` goes there.
    pub run_dir: PathBuf,
    /// The NBD export name.
    pub export: String,
    /// Connections to the server; one is used when the server cannot share an export.
    pub connections: usize,
    /// Size of the replay log in bytes.
    pub log_bytes: u64,
    /// After that long without an answer an operation fails with EIO; none waits for ever.
    pub io_timeout: Option<Duration>,
    /// The volume: a log of another one is foreign.
    pub volume: VolumeId,
    /// The attach epoch of the catalog, which new log entries belong to.
    pub epoch: u64,
    /// Whether this server may answer reads with zeros once its database is closed.
    pub zeros_when_closed: bool,
    /// False only in tests, which then must see data lost.
    pub replay_log: bool,
}

/// What the data path asks about the server. Both may be called from a thread of the data path at any time
/// and may block for a while; I/O that needs the answer waits.
pub trait Prober: Send + Sync {
    /// Whether the server's database is open now. An error means that nobody can tell; it is asked again.
    fn database_open(&self) -> Result<bool>;
    /// Whether the server has *not* admitted, since `since`, that a flush was not durable.
    fn flush_was_honest(&self, since: Instant) -> bool;
}

/// What the data path tells its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataEvent {
    /// A connection broke, or the server lies: it must be killed and started again, then
    /// [`DataPath::server_up`]. The text says why. Told once per loss.
    ServerLost(String),
    /// Writers wait, since the replay log is full.
    LogFull,
    /// An operation was failed with this errno.
    ErrorDelivered {
        /// What it was, in words.
        what: String,
        /// The Linux errno that the caller got.
        errno: i32,
    },
}

/// The replay log as it was found or as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum LogState {
    /// It holds nothing.
    Clean,
    /// It holds entries which no flush has covered yet; after an open, those of an earlier keeper.
    LeftBehind {
        /// How many would be replayed.
        entries: u64,
        /// Their payload in bytes.
        bytes: u64,
        /// The attach epoch that wrote them.
        epoch: u64,
    },
    /// It is of another volume, another boot or another format: it can only be discarded.
    Foreign {
        /// Which, in words.
        why: String,
    },
}

/// The result of [`DataPath::server_up`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// Entries written again.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The size of the device in bytes.
    pub size: u64,
}

/// Called once with the read data (empty for all others) or a Linux errno; maybe before
/// [`DataPath::submit`] returns. It must not block.
pub type Completion = Box<dyn FnOnce(Result<&[u8], i32>) + Send>;

/// The data path of one volume.
pub struct DataPath {
    config: DataPathConfig,
}

fn missing<T>() -> Result<T> {
    Err(Error::failed("the data path is not built yet"))
}

impl DataPath {
    /// Opens or creates the replay log. Nothing is replayed yet.
    pub fn new(
        config: DataPathConfig,
        _prober: Arc<dyn Prober>,
        _events: mpsc::Sender<DataEvent>,
    ) -> Result<Arc<DataPath>> {
        Ok(Arc::new(DataPath { config }))
    }

    /// The state of the log now.
    pub fn log_state(&self) -> LogState {
        LogState::Clean
    }

    /// Empties the log, whatever is in it. Refused while a server is up or operations are held.
    pub fn discard_log(&self) -> Result<()> {
        missing()
    }

    /// Connects to a freshly started server, replays the log, flushes, and resumes all held I/O.
    ///
    /// The server that was used before must be dead: one that lives on could carry out old requests after
    /// the replay. On failure everything stays held, and it may be called again.
    pub fn server_up(&self) -> Result<Replayed> {
        missing()
    }

    /// Forgets the connections; everything in flight stays held.
    pub fn server_down(&self) {}

    /// The volume has a new owner: everything held, and everything later, gets EIO; the log is void.
    pub fn fail(&self, _why: &str) {}

    /// Makes everything durable that was answered before.
    pub fn flush(&self) -> Result<()> {
        missing()
    }

    /// The size of the device in bytes; 0 before the first server.
    pub fn size(&self) -> u64 {
        0
    }

    /// Learns a larger size on fresh connections, and moves all I/O to them.
    pub fn resize(&self) -> Result<u64> {
        missing()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        Stats { log_capacity: self.config.log_bytes, ..Stats::default() }
    }

    /// Hands an operation in. It may wait for as long as the server is away.
    pub fn submit(&self, _op: Op<'_>, done: Completion) {
        done(Err(libc::EIO));
    }

    /// Mounts the file `disk` in `dir`, which must exist. A server must have been up.
    pub fn mount_fuse(self: &Arc<Self>, _dir: &Path) -> Result<()> {
        missing()
    }

    /// Unmounts it. Busy while the file is open (a loop device holds it open).
    pub fn unmount_fuse(&self) -> Result<()> {
        missing()
    }
}
