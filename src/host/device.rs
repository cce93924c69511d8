//! The block device of one volume, of either transport: which it is, whether it answers, and what this machine can do.
//!
//! An NBD device is ours if, and only if, the record in our run folder names its index and the process that connected it,
//! and the kernel says that its backend is our volume: of two run folders with a volume of one name, each has a device of
//! its own. Kernels before 5.14 do not tell the backend; there the record alone counts.

use std::path::Path;
use std::time::Duration;

use super::nbd::{self, sysfs};
use super::{ConnectRequest, Device, DeviceView, IoPath, Life, Transport, loopdev, mounts};
use crate::error::{Doing, Error, Kind, Result};
use crate::host::linux::Dirs;
use crate::journal::{self, Journal, Standing};
use crate::keeper;
use crate::keeper::client::KeeperClient;
use crate::keeper::control::{self, ConnectOptions, NbdPath, Status};
use crate::keeper::device::{RECORD, Record};
use crate::keeper::process::Identity;
use crate::values::VolumeId;

/// The connected NBD device that a record means, if the kernel has it and it is ours.
pub(super) fn of_record(record: &Record, volume: &VolumeId) -> Result<Option<Device>> {
    let ours = record.device(&nbd::backend_id(volume))?;
    Ok(ours.map(|d| Device { path: d.path(), read_only: d.read_only, size: d.size }))
}

/// The NBD device of a run folder, if there is one.
pub fn nbd_device(run: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    Record::read(run)?.map_or(Ok(None), |record| of_record(&record, volume))
}

/// Whether a run folder has a device that a keeper could take over. Asks nobody.
pub fn may_be_taken_over(run: &Path, volume: &VolumeId) -> Result<bool> {
    match Record::read(run)? {
        Some(record) if record.failed.is_none() => Ok(of_record(&record, volume)?.is_some()),
        _ => Ok(false),
    }
}

/// What is there. `status` asks the keeper, which is done only when something is there.
pub(super) fn view(
    dirs: &Dirs,
    volume: &VolumeId,
    status: impl FnOnce() -> Result<Option<Status>>,
) -> Result<DeviceView> {
    let run = dirs.volume_run(volume);
    if let Some(record) = Record::read(&run)? {
        let device = of_record(&record, volume)?;
        let told = status()?.and_then(|s| s.nbd);
        // On the direct path the kernel speaks to ZeroFS, and what that had not flushed nobody else has.
        let direct = record.path == NbdPath::Direct;
        let life = match told {
            _ if record.failed.is_some() || device.is_none() => Life::Dead,
            Some(told) if told.failed.is_some() => Life::Dead,
            // A keeper that was just started has handed over no sockets yet.
            Some(told) if direct || told.connections > 0 => Life::Served,
            None if direct && keeper::find_zerofs(&run).is_empty() => Life::Dead,
            _ => Life::Waiting,
        };
        let path = Some(if direct { IoPath::Direct } else { IoPath::Guarded });
        let transport = Some(Transport::Nbd);
        return Ok(DeviceView { fuse: false, device, transport, path, record: true, life });
    }
    let (folder, file) = dirs.fuse(volume);
    let fuse = mounts::at(&mounts::table("self")?, &folder).is_some();
    let device = loopdev::find(&file)?;
    if !fuse && device.is_none() {
        return Ok(DeviceView::default());
    }
    let served = status()?.is_some_and(|s| s.fuse_mounted);
    let life = if served || !fuse { Life::Served } else { Life::Dead };
    Ok(DeviceView { fuse, device, transport: Some(Transport::Fuse), life, ..DeviceView::default() })
}

/// Disconnects a device of the direct path whose keeper and server are gone, so that its users get errors and do not wait.
/// It is free once they have let go.
pub(super) fn let_fail(run: &Path, volume: &VolumeId) -> Result<()> {
    let direct = Record::read(run)?.is_some_and(|r| r.path == NbdPath::Direct);
    // A keeper does it itself.
    let keeper = || Identity::read(&run.join(keeper::PID_FILE)).is_some_and(|i| i.is_alive());
    if direct && !keeper() { end_dead(run, volume) } else { Ok(()) }
}

/// The same of any dead NBD device, whoever serves it.
pub(super) fn end_dead(run: &Path, volume: &VolumeId) -> Result<()> {
    let Some(record) = Record::read(run)? else { return Ok(()) };
    let Some(device) = record.device(&nbd::backend_id(volume))? else { return Ok(()) };
    match nbd::disconnect_and_wait(&device, Duration::from_secs(2)) {
        Err(e) if e.kind() != Kind::Busy => Err(e),
        _ => Ok(()),
    }
}

/// Takes the NBD device of a run folder away, and proves that it is gone. The caller has proved that nobody uses it, or
/// that it is `dead`.
pub(super) fn disconnect(
    run: &Path,
    volume: &VolumeId,
    dead: bool,
    keeper: Option<KeeperClient>,
) -> Result<()> {
    let Some(record) = Record::read(run)? else { return Ok(()) };
    if let Some(keeper) = keeper {
        keeper.within(Duration::from_secs(120)).disconnect(dead)?;
    }
    if let Some(device) = record.device(&nbd::backend_id(volume))? {
        nbd::disconnect_and_wait(&device, if dead { nbd::LET_GO_FAILED_LIMIT } else { nbd::LET_GO_LIMIT })?;
    } else if let Some(index) = record.index
        && sysfs::one(index)?.is_some_and(|d| !d.connected)
    {
        // The kernel took it away by itself. Nobody has the index now, and whoever gets it must not get our settings.
        nbd::give_back_queue(index);
    }
    let path = run.join(RECORD);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).doing("remove", &path),
        _ => Ok(()),
    }
}

/// The index to connect when the lowest free one will not do: that of a device which is gone, and to which the link or bind
/// of another raw volume still leads. Its users would write to whoever has the index next. Mostly none: the kernel chooses.
pub(super) fn index_that_nobody_means(dirs: &Dirs, volume: &VolumeId) -> Result<Option<u32>> {
    let free = |index: u32| Ok::<_, Error>(sysfs::one(index)?.is_none_or(|d| !d.connected));
    let mut meant = Vec::new();
    for other in journal::volumes(&dirs.run)?.iter().filter(|other| *other != volume) {
        // A journal that cannot be read is its own volume's trouble, and nobody else's.
        let standing = Standing::of(&Journal::peek(&dirs.run, other).unwrap_or_default().unwrap_or_default());
        let device = standing.facts.device.as_ref().filter(|_| standing.raw_places().next().is_some());
        if let Some(index) = device.and_then(|d| sysfs::index_of(&d.path))
            && free(index)?
        {
            meant.push(index);
        }
    }
    if meant.is_empty() {
        return Ok(None);
    }
    let mut others = (0..u32::MAX).filter(|index| !meant.contains(index));
    others.find_map(|index| free(index).map(|free| free.then_some(index)).transpose()).transpose()
}

/// What a keeper is asked for.
pub(super) fn options(request: &ConnectRequest) -> ConnectOptions {
    ConnectOptions {
        transport: match request.transport {
            Transport::Nbd => control::Transport::Nbd,
            Transport::Fuse | Transport::Auto => control::Transport::Fuse,
        },
        path: match request.path {
            IoPath::Guarded => NbdPath::Guarded,
            IoPath::Direct => NbdPath::Direct,
        },
        read_only: request.read_only,
        reconnect_timeout_ms: u64::try_from(request.reconnect_timeout.as_millis()).unwrap_or(u64::MAX),
        index: None,
    }
}

/// Which transport to take. Loads nothing; `ready` tells whether kernel NBD can be used.
fn pick(
    wanted: Transport,
    ready: impl FnOnce() -> Result<()>,
    fuse: impl FnOnce() -> Result<()>,
) -> Result<Transport> {
    match wanted {
        Transport::Nbd => ready().map(|()| Transport::Nbd),
        Transport::Fuse => fuse().map(|()| Transport::Fuse),
        Transport::Auto => match ready() {
            Ok(()) => Ok(Transport::Nbd),
            Err(no_nbd) => match fuse() {
                Ok(()) => Ok(Transport::Fuse),
                Err(no_fuse) => Err(Error::environment(format!(
                    "neither kernel NBD nor FUSE works here: {}; {}",
                    no_nbd.message(),
                    no_fuse.message()
                ))
                .hint(no_nbd.hint_text().unwrap_or(nbd::MODULE_HINT).to_owned())),
            },
        },
    }
}

/// Which transport works here, or would once its module is loaded.
pub fn transport(wanted: Transport) -> Result<Transport> {
    let ready = || match nbd::supported()? {
        nbd::Support::NoModule { on_disk: true, .. } => Ok(()),
        support => support.require().and_then(|()| nbd::capacity::require_one()),
    };
    pick(wanted, ready, require_fuse)
}

/// The same, with the module loaded.
pub fn prepare(wanted: Transport) -> Result<Transport> {
    let ready = || nbd::ensure().and_then(|()| nbd::capacity::require_one());
    pick(wanted, ready, require_fuse)
}

/// The one kernel feature that the fuse transport cannot do without.
fn require_fuse() -> Result<()> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    // As the kernel assigns it for good: misc, 229. Some containers have an empty file of that name.
    let number = nix::sys::stat::makedev(10, 229);
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let why = match opened.and_then(|file| file.metadata()) {
        Ok(meta) if meta.file_type().is_char_device() && meta.rdev() == number => return Ok(()),
        Ok(_) => "/dev/fuse is not the FUSE device".to_owned(),
        Err(e) => format!("cannot open /dev/fuse: {e}"),
    };
    Err(Error::environment(why)
        .hint("load the module: modprobe fuse; in a container, mount the host's /dev and run it privileged"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_nbd_where_it_works_and_fuse_elsewhere() {
        let no = |what: &str| Err(Error::environment(format!("no {what}")).hint(format!("get {what}")));
        assert_eq!(pick(Transport::Auto, || Ok(()), || no("fuse")).unwrap(), Transport::Nbd);
        assert_eq!(pick(Transport::Auto, || no("nbd"), || Ok(())).unwrap(), Transport::Fuse);
        assert_eq!(pick(Transport::Fuse, || no("nbd"), || Ok(())).unwrap(), Transport::Fuse);
        let e = pick(Transport::Nbd, || no("nbd"), || Ok(())).unwrap_err();
        assert_eq!((e.message(), e.hint_text()), ("no nbd", Some("get nbd")));
        let e = pick(Transport::Auto, || no("nbd"), || no("fuse")).unwrap_err();
        assert!(e.message().contains("no nbd; no fuse"), "{e}");
        assert_eq!(e.hint_text(), Some("get nbd"));
    }
}
