use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::context::Purpose;
use super::device::DeviceArgs;
use super::{Context, StorageArgs};
use crate::error::{Error, Result};
use crate::host::{KeeperOptions, StopOptions};
use crate::ops::{self, AttachSpec};
use crate::report::{Report, operation};
use crate::values::{ByteSize, TargetPath};

/// Attach a volume and mount it; a new one is made and formatted
///
/// Attaching again is no error: what is so already stays as it is. At another target it is a second mount. Without
/// --storage-url and --config the volume lives in a store in the state folder of this machine.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  zerofsctl attach vol1 --target /mnt/vol1 --size 10Gi
  zerofsctl attach vol1 --target /mnt/vol1 --config zerofs.yaml --secret secrets.yaml
  zerofsctl attach vol1 --target /srv/vol1.disk --block
  zerofsctl attach vol1 --target /mnt/vol1 --dry-run")]
pub struct AttachArgs {
    /// The volume's name
    volume: String,
    /// The folder to mount it at, or with --block the link to make; an empty or new one
    #[arg(long, value_name = "DIR")]
    target: PathBuf,
    /// The size of a new volume, such as 10Gi [default: 1Gi]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    size: Option<String>,
    /// The filesystem of a new volume: ext4, xfs or btrfs [default: ext4]
    #[arg(long, value_name = "TYPE")]
    fs: Option<String>,
    /// An option for mount(8), such as noatime; repeatable
    #[arg(long, value_name = "OPT")]
    mount_option: Vec<String>,
    /// Never format, repair or write
    #[arg(long)]
    read_only: bool,
    /// Link the raw block device at the target, and mount nothing
    #[arg(long)]
    block: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Where ZeroFS runs: process
    #[arg(long, value_name = "KIND", default_value = "process")]
    runtime: String,
    /// Let I/O fail when ZeroFS is away this long [default: it waits]
    #[arg(long, value_name = "TIME")]
    io_timeout: Option<String>,
    /// Room for writes that ZeroFS has not flushed yet
    #[arg(long, value_name = "SIZE", default_value = "256Mi")]
    replay_log: String,
    /// Take the volume from a node that is gone for good: what that had not flushed is lost
    #[arg(long)]
    take_over: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    storage: StorageArgs,
}

/// Parses `90s`, `2m`, `1h30m`.
pub(super) fn time(flag: &str, text: &str) -> Result<Duration> {
    humantime::parse_duration(text).map_err(|_| {
        Error::usage(format!("{flag}: invalid time {text:?}"))
            .hint("write a number with a unit, such as 90s or 2m")
    })
}

impl AttachArgs {
    /// Checks every value. The storage URL comes from the context.
    pub(super) fn spec(&self, context: &Context, storage_url: String) -> Result<AttachSpec> {
        let made = self.device.check()?;
        if self.runtime != "process" {
            return Err(Error::usage(format!("unknown runtime {:?}", self.runtime))
                .hint("choose process: ZeroFS runs as a process on this node"));
        }
        let size = self.size.as_deref().map(str::parse::<ByteSize>).transpose()?;
        if let Some(size) = size {
            size.check_volume()?;
        }
        let fs = self.fs.as_deref().map(str::parse).transpose()?;
        if self.block && fs.is_some() {
            return Err(Error::usage("--block and --fs exclude each other")
                .hint("a raw device has no filesystem of ours: leave --fs out"));
        }
        if self.block && !self.mount_option.is_empty() {
            return Err(Error::usage("--block and --mount-option exclude each other")
                .hint("a raw device is not mounted"));
        }
        let least = fs.unwrap_or(crate::values::FsType::Ext4).minimum();
        if let (Some(size), false) = (size, self.block)
            && size.bytes() < least
        {
            let fs = fs.unwrap_or(crate::values::FsType::Ext4);
            return Err(Error::usage(format!("{size} is too small for {fs}"))
                .hint(format!("give at least {}", ByteSize(least))));
        }
        let log_size: ByteSize = self.replay_log.parse()?;
        if !(8 * ByteSize::MIB..=64 * ByteSize::GIB).contains(&log_size.bytes()) {
            return Err(Error::usage(format!("a replay log of {log_size} is out of range"))
                .hint("choose between 8Mi and 64Gi; 256Mi suits most volumes"));
        }
        let io_timeout = self.io_timeout.as_deref().map(|t| time("--io-timeout", t)).transpose()?;
        if io_timeout.is_some_and(|t| t < Duration::from_secs(1)) {
            return Err(
                Error::usage("--io-timeout is below 1s").hint("leave it out to let I/O wait for ever")
            );
        }
        Ok(AttachSpec {
            volume: self.volume.parse()?,
            target: TargetPath::new(&self.target, &context.cwd)?,
            storage_url,
            size,
            fs,
            mount_options: crate::mount_options::check(&self.mount_option)?,
            read_only: self.read_only,
            block: self.block,
            transport: made.transport,
            path: made.path,
            reconnect_timeout: made.reconnect_timeout,
            take_over: self.take_over,
            keeper: KeeperOptions { io_timeout, log_size, ..KeeperOptions::default() },
            stop: StopOptions::default(),
        })
    }
}

pub fn run(args: &AttachArgs, context: &Context) -> Result<Report> {
    // Everything that can be wrong in the words themselves, before anything is looked at.
    let mut spec = args.spec(context, String::new())?;
    context.require_root()?;
    let dirs = context.dirs()?;
    if !dirs.volume_state(&spec.volume).exists() {
        // It needs a device for sure. Asked before a password is made for a store that would stay empty.
        crate::host::device::transport(spec.transport).map_err(|e| e.on(&spec.volume))?;
    }
    let host = context.host(&spec.volume, &args.storage, Purpose::Start).map_err(|e| e.on(&spec.volume))?;
    spec.storage_url = host.catalog().url().to_string();
    if args.dry_run {
        let lines = ops::attach::preview(&host, &spec)?;
        return Ok(Report::of_preview("attach", &spec.volume, &lines));
    }
    require_parent(&spec)?;
    let engine = context.engine(&host);
    let run = ops::attach::attach(&engine, &dirs.run, &spec)?;
    Ok(operation::attach(&spec, &run))
}

/// A folder is made for the target, but not a whole path: that would hide a typing error.
fn require_parent(spec: &AttachSpec) -> Result<()> {
    match spec.target.as_path().parent() {
        Some(parent) if !parent.exists() => Err(Error::usage(format!(
            "the folder {}, in which the target shall be, does not exist",
            parent.display()
        ))
        .on(&spec.volume)
        .hint(format!("make it: mkdir -p {}", parent.display()))),
        _ => Ok(()),
    }
}
