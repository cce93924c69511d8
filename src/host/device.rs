//! The block device of one volume, of either transport: which it is, whether it answers, and what this machine can do.
//!
//! An NBD device is ours if, and only if, the record in our run folder names its index and the kernel says that its
//! backend is our volume: of two run folders with a volume of one name, each has a device of its own. Kernels before 5.14
//! do not tell the backend; there the record alone counts.

use std::path::Path;
use std::time::Duration;

use super::nbd::{self, sysfs};
use super::{ConnectRequest, Device, DeviceView, IoPath, Life, Transport, loopdev, mounts};
use crate::error::{Error, Result};
use crate::host::linux::Dirs;
use crate::keeper;
use crate::keeper::control::{self, ConnectOptions, NbdPath, Status};
use crate::keeper::nbd::Record;
use crate::values::VolumeId;

/// For how long the kernel may take to let go of an NBD device.
pub(super) const LET_GO: Duration = Duration::from_secs(30);

/// The NBD device that the run folder's record names, if it is still ours.
pub fn ours(run: &Path, volume: &VolumeId) -> Result<Option<(Device, Record)>> {
    let Some(record) = Record::read(run)? else { return Ok(None) };
    let Some(found) = sysfs::one(record.index)?.filter(|d| d.connected) else { return Ok(None) };
    let backend = nbd::backend_id(volume);
    if found.backend.as_ref().is_some_and(|b| *b != backend) {
        return Ok(None);
    }
    let device = Device { path: found.path(), read_only: found.read_only, size: found.size };
    Ok(Some((device, record)))
}

/// What is there. `status` asks the keeper, which is done only when something is there.
pub(super) fn view(
    dirs: &Dirs,
    volume: &VolumeId,
    status: impl FnOnce() -> Result<Option<Status>>,
) -> Result<DeviceView> {
    let run = dirs.volume_run(volume);
    if let Some((device, record)) = ours(&run, volume)? {
        let told = status()?.and_then(|s| s.nbd).filter(|n| n.index == Some(record.index));
        // On the direct path the kernel speaks to ZeroFS, and what that had not flushed nobody else has.
        let crashed = || record.path == NbdPath::Direct && keeper::find_zerofs(&run).is_empty();
        let life = match told {
            Some(n) if n.failed.is_some() => Life::Dead,
            Some(_) => Life::Served,
            None if crashed() => Life::Dead,
            None => Life::Waiting,
        };
        let path = match record.path {
            NbdPath::Guarded => IoPath::Guarded,
            NbdPath::Direct => IoPath::Direct,
        };
        return Ok(DeviceView {
            fuse: false,
            device: Some(device),
            transport: Some(Transport::Nbd),
            path: Some(path),
            life,
        });
    }
    let (folder, file) = dirs.fuse(volume);
    let fuse = mounts::at(&mounts::table("self")?, &folder).is_some();
    let device = loopdev::find(&file)?;
    if !fuse && device.is_none() {
        return Ok(DeviceView::default());
    }
    // A loop device whose FUSE mount was just taken away is half-way down, and answers nobody either.
    let served = !fuse || status()?.is_some_and(|s| s.fuse_mounted);
    let life = if served { Life::Served } else { Life::Dead };
    Ok(DeviceView { fuse, device, transport: Some(Transport::Fuse), path: None, life })
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
fn pick(wanted: Transport, ready: impl FnOnce() -> Result<()>, fuse: impl FnOnce() -> Result<()>) -> Result<Transport> {
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
pub(super) fn transport(wanted: Transport) -> Result<Transport> {
    let ready = || match nbd::supported()? {
        nbd::Support::NoModule { on_disk: true, .. } => Ok(()),
        support => support.require(),
    };
    pick(wanted, ready, require_fuse)
}

/// The same, with the module loaded.
pub(super) fn prepare(wanted: Transport) -> Result<Transport> {
    pick(wanted, nbd::ensure, require_fuse)
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
