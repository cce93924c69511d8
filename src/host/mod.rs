//! Everything outside the process: the catalog, the keeper, devices, filesystems, mounts.
//!
//! [`Observe`] is the read-only half; a dry run gets nothing else, so the types forbid a change.
//! [`Host`] adds the changes. Each change is idempotent: done twice, or done on top of a half-done
//! earlier try, it ends in the same state; recovery relies on it.
//! [`linux::LinuxHost`] is the real one, [`fake::FakeHost`] a model for exhaustive crash tests.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::values::{ByteSize, FsType, Slice, TargetPath, VolumeId};

pub use crate::catalog::Content;

pub mod access;
pub mod bind;
pub mod cgroup;
mod companion;
pub mod device;
pub mod fake;
mod fssize;
pub mod linux;
pub mod loopdev;
pub mod mounts;
pub mod nbd;
pub mod old_logs;
pub mod programs;
pub mod signature;
pub mod users;
mod utab;

/// A block device that shows a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `/dev/loop3`
    pub path: PathBuf,
    /// Whether writes are refused by the device.
    pub read_only: bool,
    /// Its size.
    pub size: ByteSize,
}

/// What a filesystem check said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckResult {
    /// No fault found, or every fault was repaired.
    pub clean: bool,
    /// Whether something was repaired.
    pub repaired: bool,
    /// The program's own words, bounded.
    pub output: String,
}

/// What the catalog gave us with a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// Grows with every change of owner; a replay log of another epoch is void.
    pub epoch: u64,
    /// Unknown for a volume that an older driver made, until its disk was seen.
    pub capacity: Option<ByteSize>,
    /// Likewise.
    pub fs: Option<FsType>,
    /// What is known of its content.
    pub content: Content,
    /// Worth telling the user, such as that a volume was adopted.
    pub notes: Vec<String>,
}

/// What to ask of the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRequest {
    /// Where the data lives.
    pub storage_url: String,
    /// The size asked for, if any.
    pub size: Option<ByteSize>,
    /// The filesystem asked for, if any.
    pub fs: Option<FsType>,
    /// Attached as a raw block device.
    pub block: bool,
    /// A volume must exist already.
    pub must_exist: bool,
    /// Take it from an owner that is gone for good.
    pub take_over: bool,
}

/// What runs of the keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeeperView {
    /// No keeper.
    Dead {
        /// A ZeroFS that a killed keeper left running.
        orphan: bool,
        /// Acknowledged writes in the log that it left.
        left_behind: u64,
    },
    /// A keeper answers.
    Alive {
        /// Whether the data path is ready, or can be: not fenced, not failed.
        usable: bool,
        /// One word: ready, stalled, fenced, failed, …
        state: String,
        /// Why, when not ready.
        reason: Option<String>,
        /// Unreplayed entries of an earlier keeper's log.
        left_behind: u64,
    },
}

/// How the block device is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// The kernel's NBD client where it works, else FUSE.
    #[default]
    Auto,
    /// The kernel's NBD client.
    Nbd,
    /// One file over FUSE, a loop device with direct I/O on it.
    Fuse,
}

impl FromStr for Transport {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Transport::Auto),
            "nbd" => Ok(Transport::Nbd),
            "fuse" => Ok(Transport::Fuse),
            _ => Err(Error::usage(format!("unknown transport {s:?}")).hint("choose one of auto, nbd, fuse")),
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Transport::Auto => "auto",
            Transport::Nbd => "nbd",
            Transport::Fuse => "fuse",
        })
    }
}

/// Where the kernel's NBD connections end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoPath {
    /// At the keeper, which replays what a crashed ZeroFS had not flushed.
    #[default]
    Guarded,
    /// At ZeroFS: a crash of it fails the device.
    Direct,
}

impl FromStr for IoPath {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "guarded" => Ok(IoPath::Guarded),
            "direct" => Ok(IoPath::Direct),
            _ => Err(Error::usage(format!("unknown path {s:?}")).hint("choose guarded or direct")),
        }
    }
}

impl fmt::Display for IoPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            IoPath::Guarded => "guarded",
            IoPath::Direct => "direct",
        })
    }
}

/// How long the kernel holds I/O for a device that no keeper serves, unless told otherwise.
pub const RECONNECT_TIMEOUT: Duration = Duration::from_secs(600);

/// How a user wants block devices made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Made {
    /// How.
    pub transport: Transport,
    /// For [`Transport::Nbd`].
    pub path: IoPath,
    /// How long the kernel holds I/O while no keeper serves the device, for [`Transport::Nbd`].
    pub reconnect_timeout: Duration,
}

impl Default for Made {
    fn default() -> Self {
        let (transport, path) = (Transport::default(), IoPath::default());
        Made { transport, path, reconnect_timeout: RECONNECT_TIMEOUT }
    }
}

/// How to make the block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectRequest {
    /// What was picked: never [`Transport::Auto`].
    pub transport: Transport,
    /// For [`Transport::Nbd`].
    pub path: IoPath,
    /// The device refuses writes.
    pub read_only: bool,
    /// How long the kernel holds I/O while no keeper serves the device, for [`Transport::Nbd`].
    pub reconnect_timeout: Duration,
}

/// Whether a block device answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Life {
    /// It is served, or it is no longer there at all.
    #[default]
    Served,
    /// Its keeper is gone: the kernel holds its I/O until the next keeper takes it over.
    Waiting,
    /// It only gives errors, and always will.
    Dead,
}

/// What is there of the block device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceView {
    /// The FUSE mount is there (alive or dead).
    pub fuse: bool,
    /// The device: an NBD device, or the loop device on the FUSE file.
    pub device: Option<Device>,
    /// How it was made, if anything is there; never [`Transport::Auto`].
    pub transport: Option<Transport>,
    /// The path of an NBD device.
    pub path: Option<IoPath>,
    /// An NBD device is on record, whether the kernel still has it or not.
    pub record: bool,
    /// Whether it answers.
    pub life: Life,
}

impl DeviceView {
    /// Nothing is there.
    pub fn is_absent(&self) -> bool {
        !self.fuse && !self.record && self.device.is_none()
    }

    /// Everything that belongs to the device is there.
    pub fn is_complete(&self) -> bool {
        self.device.is_some() && (self.fuse || self.transport == Some(Transport::Nbd))
    }
}

/// What two independent probes say of the content of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signature {
    /// Both say "nothing", and the first and last MiB are zeros.
    Blank,
    /// A filesystem of ours; `clean` when it was unmounted cleanly.
    Filesystem {
        /// Which.
        fs: FsType,
        /// Needs no preen.
        clean: bool,
    },
    /// Something else; the text says what, for the error.
    Other(String),
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Mount point.
    pub target: PathBuf,
    /// `/dev/loop3`, or the filesystem's own name.
    pub source: String,
    /// `ext4`, `fuse.zerofsctl`, …
    pub fs: String,
    /// Mounted read-only.
    pub read_only: bool,
}

/// What is at a path where a volume shall be mounted or linked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetView {
    /// Nothing.
    Missing,
    /// A folder with nothing in it and nothing mounted on it.
    EmptyFolder,
    /// A folder that has something in it.
    FullFolder,
    /// Not a folder. A symbolic link carries where it leads.
    Other {
        /// Where a symbolic link leads.
        link: Option<PathBuf>,
    },
    /// Something is mounted on it.
    MountPoint(MountEntry),
}

/// Who uses a device or a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct User {
    /// Process id.
    pub pid: u32,
    /// Its short name.
    pub name: String,
}

/// Options for the keeper, all with defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperOptions {
    /// How long I/O may wait for a server that is gone; none: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_timeout: Option<Duration>,
    /// Size of the replay log.
    pub log_size: ByteSize,
    /// NBD connections to ZeroFS, which serves one request at a time on each.
    pub connections: usize,
}

impl Default for KeeperOptions {
    fn default() -> Self {
        KeeperOptions { io_timeout: None, log_size: ByteSize(256 * ByteSize::MIB), connections: 4 }
    }
}

/// How to stop ZeroFS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopOptions {
    /// How long to wait for the flush.
    pub timeout: Duration,
    /// SIGKILL after that.
    pub force: bool,
    /// What was acknowledged, and is not durable yet, may wait in the log for the next keeper: the volume stays ours.
    #[serde(default)]
    pub may_leave_log: bool,
}

impl Default for StopOptions {
    fn default() -> Self {
        StopOptions { timeout: Duration::from_secs(120), force: false, may_leave_log: false }
    }
}

/// What the catalog says of a volume that was attached here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tenure {
    /// It is ours.
    Ours,
    /// Somebody else has had it since.
    Over,
    /// Neither can be told: why not.
    Unclear(String),
}

/// The read-only half of the host.
pub trait Observe {
    /// Our claim on the volume, if we hold it.
    fn claim(&self, volume: &VolumeId) -> Result<Option<Claimed>>;
    /// Whether the volume is ours still, as it was at an attach of this epoch.
    fn tenure(&self, volume: &VolumeId, epoch: u64) -> Result<Tenure>;
    /// Whether nothing is left of a claim: it is not ours in the catalog, and nothing is kept to release it with.
    fn claim_absent(&self, volume: &VolumeId) -> Result<bool>;
    /// The store that this host looks into, where there is more than one in the world.
    fn store(&self) -> Option<String> {
        None
    }
    /// Whether the config on disk is the one that we would write.
    fn config_present(&self, volume: &VolumeId) -> Result<bool>;
    /// Whether anything of the volume's state folder exists.
    fn config_absent(&self, volume: &VolumeId) -> Result<bool>;
    /// The keeper and its ZeroFS.
    fn keeper(&self, volume: &VolumeId) -> Result<KeeperView>;
    /// Whether sockets, pid files or an empty log of a keeper that is gone are still there.
    fn keeper_files(&self, _: &VolumeId) -> Result<bool> {
        Ok(false)
    }
    /// Size of the disk inside ZeroFS; none when there is no disk. Needs a running ZeroFS.
    fn disk_size(&self, volume: &VolumeId) -> Result<Option<ByteSize>>;
    /// The block device, and whether it answers.
    fn device(&self, volume: &VolumeId) -> Result<DeviceView>;
    /// What is on the device. Any doubt is an error.
    ///
    /// `recorded` is the filesystem that the catalog says was finished. Where our own table sees just that, blkid is
    /// not asked: nothing will be formatted, and a second witness is only needed for "blank".
    fn signature(&self, device: &Path, recorded: Option<FsType>) -> Result<Signature>;
    /// All mounts of the device in this mount namespace.
    fn mounts_of(&self, device: &Path) -> Result<Vec<MountEntry>>;
    /// What is at a path.
    fn target(&self, target: &TargetPath) -> Result<TargetView>;
    /// Which transport an attach would take that asks for `wanted`; an error, with what is missing, where that cannot
    /// work. It loads no module, but counts on one that can be loaded.
    fn transport(&self, wanted: Transport) -> Result<Transport>;
    /// Who uses the device besides its mounts in this namespace: openers, other mount namespaces, holders.
    fn device_users(&self, device: &Path) -> Result<Vec<User>>;
    /// An error if this machine cannot grow that filesystem while it is mounted.
    fn can_grow_mounted(&self, fs: FsType) -> Result<()>;
    /// Whether the file at `target` is a node of the device.
    fn is_node_of(&self, target: &TargetPath, device: &Path) -> Result<bool>;
    /// Whether there is a plain file without content at `target`.
    fn is_empty_file(&self, target: &TargetPath) -> Result<bool>;
    /// Whether the files of what is mounted at `target` are open to the group.
    fn group_granted(&self, target: &TargetPath, gid: u32) -> Result<bool>;
    /// Whether the filesystem, mounted at `target` (an ext4 may also be unmounted), has the device's size.
    fn filesystem_fills_device(&self, device: &Device, fs: FsType, target: &Path) -> Result<bool>;
}

/// Observing and changing.
pub trait Host: Observe {
    /// Claims the volume in the catalog; creates or adopts its record when there is none.
    fn take_claim(&self, volume: &VolumeId, request: &ClaimRequest) -> Result<Claimed>;
    /// Gives it back, and removes what was kept to be able to do so.
    fn release_claim(&self, volume: &VolumeId) -> Result<()>;
    /// Records the content state.
    fn record_content(&self, volume: &VolumeId, content: Content, fs: Option<FsType>) -> Result<()>;
    /// Records the capacity.
    fn record_capacity(&self, volume: &VolumeId, capacity: ByteSize) -> Result<()>;
    /// Renders and writes the config for a volume of `capacity`.
    fn write_config(&self, volume: &VolumeId, capacity: Option<ByteSize>) -> Result<()>;
    /// Removes the config and the cache.
    fn remove_config(&self, volume: &VolumeId) -> Result<()>;
    /// Starts the keeper and waits until both sockets of ZeroFS answer.
    fn start_keeper(&self, volume: &VolumeId, epoch: u64, options: &KeeperOptions) -> Result<()>;
    /// Flushes, stops ZeroFS and the keeper, removes the sockets and the empty log. Where a killed keeper left
    /// acknowledged writes in its log, they are replayed first: afterwards ZeroFS has all of them.
    fn stop_keeper(&self, volume: &VolumeId, options: &StopOptions) -> Result<()>;
    /// Creates the disk (idempotent; never shrinks).
    fn create_disk(&self, volume: &VolumeId, size: ByteSize) -> Result<()>;
    /// Removes a disk that was never written.
    fn remove_disk(&self, volume: &VolumeId) -> Result<()>;
    /// Grows the disk.
    fn grow_disk(&self, volume: &VolumeId, size: ByteSize) -> Result<()>;
    /// Replays the log that an earlier keeper left; returns the number of entries, and a note when the log
    /// was void.
    fn replay(&self, volume: &VolumeId) -> Result<(u64, Option<String>)>;
    /// Gets the machine ready for a transport, as by loading a module, and tells which it is.
    fn prepare_transport(&self, wanted: Transport) -> Result<Transport>;
    /// Makes the block device.
    fn connect(&self, volume: &VolumeId, request: &ConnectRequest) -> Result<Device>;
    /// Starts the next keeper for a device that waits ([`Life::Waiting`]), on the run folder of the one that is gone: it
    /// takes over log and device, and what is mounted stays mounted. Without the claim it is an error.
    fn take_over(&self, volume: &VolumeId) -> Result<()>;
    /// From here on until the device is taken away, or this host is dropped: should the keeper of its device die, the next one
    /// is started as by [`take_over`](Self::take_over), since whatever waits for the device can do nothing about it.
    fn look_after(&self, volume: &VolumeId) -> Result<()>;
    /// Lets a dead NBD device ([`Life::Dead`]) whose keeper is gone fail at once: the kernel would hold its I/O for as long as
    /// it may, for a server that must not come back.
    fn let_fail(&self, volume: &VolumeId) -> Result<()>;
    /// Takes the device away again, and proves that it is gone. The caller has proven that nothing uses it, or that it
    /// is `dead`.
    fn disconnect(&self, volume: &VolumeId, dead: bool) -> Result<()>;
    /// Tells keeper and kernel the new size.
    fn grow_device(&self, volume: &VolumeId) -> Result<Device>;
    /// Makes a filesystem. The caller has proven that the device is blank.
    fn format(&self, device: &Device, fs: FsType, volume: &VolumeId) -> Result<()>;
    /// Repairs what is safe to repair without asking.
    fn preen(&self, device: &Device, fs: FsType) -> Result<Option<String>>;
    /// Reads a slice of the device through ZeroFS; returns the ranges that could not be read.
    fn read_data(&self, device: &Device, slice: Slice) -> Result<Vec<(u64, u64)>>;
    /// Checks, and with `repair` repairs, an unmounted filesystem.
    fn check(&self, device: &Device, fs: FsType, repair: bool) -> Result<CheckResult>;
    /// Mounts. The folder exists.
    fn mount(
        &self,
        device: &Device,
        fs: FsType,
        target: &TargetPath,
        options: &[String],
        read_only: bool,
    ) -> Result<()>;
    /// Unmounts; `dead` detaches lazily when a process still holds a dead filesystem. A storage that takes no data makes
    /// it an error after a while, and by force the device is failed; the unmount may be under way then, and in no table.
    fn unmount(&self, target: &Path, dead: bool) -> Result<()>;
    /// Waits for the end of an unmount of the device that an earlier command began, as [`unmount`](Self::unmount) does:
    /// it may be an error, and by force the device is failed. Nothing to do where there is none.
    fn finish_unmount(&self, device: &Device) -> Result<()>;
    /// Waits in the same way for the end of a mount(8) of the device, which goes on when the command that began it is killed:
    /// until then the mount is in no table. A dead device is made to fail first. Nothing to do where there is none.
    fn finish_mount(&self, volume: &VolumeId, device: &Device, target: &TargetPath) -> Result<()>;
    /// Grows the mounted filesystem to the device's size.
    fn grow_filesystem(&self, device: &Device, fs: FsType, target: &Path) -> Result<()>;
    /// Grows an unmounted ext4 to the device's size.
    fn grow_unmounted(&self, device: &Device) -> Result<()>;
    /// Makes an empty folder.
    fn make_folder(&self, target: &TargetPath) -> Result<()>;
    /// Removes it when empty; otherwise leaves it.
    fn remove_folder(&self, target: &TargetPath) -> Result<()>;
    /// Makes an empty file.
    fn make_file(&self, target: &TargetPath) -> Result<()>;
    /// Removes an empty folder or file, and leaves anything else.
    fn clear_target(&self, target: &TargetPath) -> Result<()>;
    /// Lets what is at `source`, a mount or a device's node, appear at `target`, which exists.
    fn bind(&self, source: &Path, target: &TargetPath, read_only: bool) -> Result<()>;
    /// Opens the files of what is mounted at `target` to a group.
    fn grant_group(&self, target: &TargetPath, gid: u32) -> Result<()>;
    /// Links a device at a target.
    fn link(&self, device: &Device, target: &TargetPath) -> Result<()>;
    /// Removes the link.
    fn unlink(&self, target: &TargetPath) -> Result<()>;
}
