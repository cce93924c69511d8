//! The kernel's NBD devices: made and unmade by generic netlink ([`netlink`]), described by sysfs ([`sysfs`]).
//!
//! The API, for those who build on it:
//!
//! | call | what it does |
//! | --- | --- |
//! | [`backend_id`]`(volume)` | `zerofs:<volume id>`, which marks a device as that volume's |
//! | [`supported`]`()` | which of no module, no netlink family, no privilege, or all fine |
//! | [`ensure`]`()` | the same, after one try at `modprobe nbd` where the module is on the disk; an error unless fine |
//! | [`netlink::connect`], [`netlink::reconfigure`], [`netlink::disconnect`], [`netlink::status`] | one command each |
//! | [`netlink::LinkDead`] | listens for connections that the kernel has given up |
//! | [`disconnect_and_wait`]`(device, limit)` | disconnects, and waits until the kernel has let go |
//! | [`sysfs::all`], [`sysfs::one`], [`sysfs::named`]`(backend)` | what the devices look like now |
//! | [`capacity()`], [`capacity::require_one`]`()` | how many devices there are and can be; whether one more can |
//! | [`survey::take`] | every device, who uses and serves it, and what it is to us |
//!
//! Nothing here asks whether a device is in use: the kernel disconnects a mounted device without a word, so the caller
//! must have proved that it is not. And nothing here trusts `pid` in sysfs: it is the process that made the
//! connection, which has gone in most cases.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::apart;
use crate::error::{Error, Kind, Result};
use crate::values::VolumeId;

pub mod capacity;
pub mod claim;
pub mod marks;
pub mod netlink;
pub mod owners;
pub mod survey;
pub mod sysfs;
pub mod usage;
pub mod verdict;

pub use capacity::capacity;

/// What our backend identifiers start with.
pub const BACKEND_PREFIX: &str = "zerofs:";

/// How to load the module, now and at each boot.
pub const MODULE_HINT: &str = "load it: modprobe nbd nbds_max=64; and at each boot: echo nbd > /etc/modules-load.d/nbd.conf && \
echo 'options nbd nbds_max=64' > /etc/modprobe.d/nbd.conf";

/// How long a device's settings may take to be given back.
const GIVE_BACK: Duration = Duration::from_millis(200);

/// The backend identifier of a volume's device.
pub fn backend_id(volume: &VolumeId) -> String {
    format!("{BACKEND_PREFIX}{volume}")
}

/// The volume in a backend identifier of ours; none when it is somebody else's, however near it looks.
pub fn volume_of(backend: &str) -> Option<VolumeId> {
    backend.strip_prefix(BACKEND_PREFIX)?.parse().ok()
}

/// What this machine's kernel offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// The netlink family is there, and we may use it.
    Fine,
    /// The module is not loaded.
    NoModule {
        /// Whether it is on the disk for the running kernel, so that `modprobe nbd` would help.
        on_disk: bool,
        /// The release of the running kernel.
        release: String,
    },
    /// The module is there, but without netlink (before 4.12), or the netlink family is hidden from us.
    NoNetlink,
    /// Not root.
    NoPrivilege,
}

impl Support {
    /// As an error with a hint, unless all is fine.
    pub fn require(&self) -> Result<()> {
        Err(match self {
            Support::Fine => return Ok(()),
            Support::NoModule { on_disk: true, .. } => {
                Error::environment("the kernel's nbd module is not loaded").hint(MODULE_HINT)
            }
            Support::NoModule { on_disk: false, release } => {
                Error::environment(format!("the kernel {release} has no nbd module"))
                    .hint("install the package with this kernel's extra modules, or use --transport fuse")
            }
            Support::NoNetlink => Error::environment("the kernel's nbd module has no netlink interface")
                .hint("run it outside of a user namespace on a kernel from 4.12 on, or use --transport fuse"),
            Support::NoPrivilege => Error::environment("connecting an NBD device needs CAP_SYS_ADMIN")
                .hint("run it as root, in a container with privileged: true"),
        })
    }
}

/// Finds out what the kernel offers. It loads nothing itself; many a kernel loads the module when it is asked for the
/// netlink family.
pub fn supported() -> Result<Support> {
    match netlink::family() {
        Ok(_) if nix::unistd::geteuid().is_root() => Ok(Support::Fine),
        Ok(_) => Ok(Support::NoPrivilege),
        Err(e) if e.kind() == Kind::NotFound => {
            Ok(without_family(Path::new("/sys"), Path::new("/lib/modules"), release()))
        }
        Err(e) => Err(e),
    }
}

/// Why there are no NBD devices, where the kernel has none.
pub fn absent(capacity: &capacity::Capacity) -> Option<Error> {
    if capacity.available {
        return None;
    }
    supported().and_then(|support| support.require()).err()
}

/// What it is that lacks when there is no netlink family: a module that is there, loaded or built in, has none.
fn without_family(sys: &Path, modules: &Path, release: String) -> Support {
    if ["module/nbd", "block/nbd0"].into_iter().any(|p| sys.join(p).exists()) {
        return Support::NoNetlink;
    }
    Support::NoModule { on_disk: module_in(&modules.join(&release)), release }
}

/// Makes sure that devices can be connected: tries to load the module when it is on the disk and not in the kernel.
pub fn ensure() -> Result<()> {
    let mut support = supported()?;
    if let Support::NoModule { on_disk: true, .. } = support
        && nix::unistd::geteuid().is_root()
    {
        let loaded = std::process::Command::new("modprobe").arg("nbd").env_clear().env("PATH", SBIN).output();
        if let Ok(output) = &loaded
            && !output.status.success()
        {
            tracing::warn!("modprobe nbd: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        support = supported()?;
    }
    support.require()
}

const SBIN: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map(|s| s.trim().to_owned()).unwrap_or_default()
}

/// Whether the folder of a kernel's modules has nbd, loadable or built in.
fn module_in(dir: &Path) -> bool {
    ["modules.dep", "modules.builtin"].into_iter().any(|list| {
        std::fs::read_to_string(dir.join(list)).is_ok_and(|text| {
            text.lines().any(|line| {
                let file = line.split(':').next().unwrap_or_default();
                let name = file.rsplit('/').next().unwrap_or_default();
                name == "nbd.ko" || name.starts_with("nbd.ko.")
            })
        })
    })
}

/// [`sysfs::give_back_queue`] around a disconnect, which must neither fail nor wait for want of it: Linux 6.11 to 6.18 let
/// all I/O end before they change any of these settings, and it may be the disconnect that ends it.
pub fn give_back_queue(index: u32) {
    let work = || sysfs::give_back_queue(index).map_err(|_| libc::EIO);
    if let Err(e) = apart::run(&format!("give back the queue of /dev/nbd{index}"), GIVE_BACK, work) {
        tracing::debug!("{e}");
    }
}

/// Asks the kernel to disconnect an index, and waits up to `limit` for its answer; false when there is none yet. What of the
/// device stays, and for how long, is for the caller to see.
pub fn disconnect_within(index: u32, limit: Duration) -> Result<bool> {
    // First, since it could be somebody else's right after the disconnect.
    give_back_queue(index);
    // On a thread: the call itself waits for the kernel's receivers, and there is no way to end it.
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let spawned = std::thread::Builder::new().name("disconnect".into()).spawn(move || {
        let _ = tell.send(netlink::disconnect(index));
    });
    spawned.map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
    told.recv_timeout(limit).map_or(Ok(false), |done| done.map(|()| true))
}

/// How long the kernel may take to let go of a device that nobody uses.
pub const LET_GO_LIMIT: Duration = Duration::from_secs(30);
/// The same of a device that has failed, which somebody may hold for as long as they like.
pub const LET_GO_FAILED_LIMIT: Duration = Duration::from_secs(10);

/// Disconnects a device and waits up to `limit` until the kernel has let go of this connection: no pid, no backend, no
/// size. Nothing to do when the index is not connected any more, or is somebody else's by now.
///
/// The caller has flushed, and has proved that nobody uses the device. [`Kind::Busy`] when the time is over: somebody
/// still holds it open, and it goes when they close it.
pub fn disconnect_and_wait(device: &sysfs::NbdDevice, limit: Duration) -> Result<()> {
    let begun = Instant::now();
    let index = device.index;
    if !sysfs::one(index)?.is_some_and(|d| d.is_same_connection(device)) {
        return Ok(());
    }
    let held = |what: &str| {
        Error::new(Kind::Busy, format!("/dev/nbd{index} {what} after {:.0} s", begun.elapsed().as_secs_f64()))
            .hint(format!("see who holds it: fuser -vm /dev/nbd{index}; then run the same command again"))
    };
    if !disconnect_within(index, limit)? {
        return Err(held("is still being disconnected"));
    }
    let lingers = |d: &sysfs::NbdDevice| !d.connected && (d.backend.is_some() || d.size.0 != 0);
    while sysfs::one(index)?.is_some_and(|d| d.is_same_connection(device) || lingers(&d)) {
        if begun.elapsed() >= limit {
            return Err(held("is disconnected, but not yet free"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_identifier_is_ours_only_with_prefix_and_a_volume_id() {
        let volume: VolumeId = "vol-1".parse().unwrap();
        assert_eq!(backend_id(&volume), "zerofs:vol-1");
        assert_eq!(volume_of("zerofs:vol-1"), Some(volume));
        for foreign in
            ["", "zerofs:", "zerofs", "Zerofs:vol-1", " zerofs:vol-1", "zerofs:a/b", "zerofsx:vol-1"]
        {
            assert_eq!(volume_of(foreign), None, "{foreign:?}");
        }
    }

    #[test]
    fn the_module_is_found_loadable_compressed_or_built_in() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!module_in(dir.path()));
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("modules.dep", "kernel/drivers/block/loop.ko:\nkernel/drivers/block/znbd.ko: x/nbd/y.ko\n");
        assert!(!module_in(dir.path()));
        write("modules.dep", "kernel/drivers/block/nbd.ko.xz:\n");
        assert!(module_in(dir.path()));
        write("modules.dep", "");
        write("modules.builtin", "kernel/drivers/block/nbd.ko\n");
        assert!(module_in(dir.path()));
    }

    #[test]
    fn a_module_without_netlink_is_told_from_no_module() {
        let dir = tempfile::tempdir().unwrap();
        let (sys, modules) = (dir.path().join("sys"), dir.path().join("modules"));
        let lack = || without_family(&sys, &modules, "6.1".into());
        assert_eq!(lack(), Support::NoModule { on_disk: false, release: "6.1".into() });
        std::fs::create_dir_all(modules.join("6.1")).unwrap();
        std::fs::write(modules.join("6.1/modules.dep"), "kernel/drivers/block/nbd.ko:\n").unwrap();
        assert_eq!(lack(), Support::NoModule { on_disk: true, release: "6.1".into() });
        // A loaded module shows itself in the one, one built in may only show in the other.
        for there in ["module/nbd", "block/nbd0"] {
            std::fs::create_dir_all(sys.join(there)).unwrap();
            assert_eq!(lack(), Support::NoNetlink, "{there}");
            std::fs::remove_dir_all(&sys).unwrap();
        }
    }

    #[test]
    fn each_lack_has_a_hint_of_its_own() {
        let lacks = [
            Support::NoModule { on_disk: true, release: "6.1".into() },
            Support::NoModule { on_disk: false, release: "6.1".into() },
            Support::NoNetlink,
            Support::NoPrivilege,
        ];
        let hints: std::collections::HashSet<_> =
            lacks.iter().map(|l| l.require().unwrap_err().hint_text().unwrap().to_owned()).collect();
        assert_eq!(hints.len(), lacks.len());
        let hint = lacks[0].require().unwrap_err().hint_text().unwrap().to_owned();
        assert!(hint.contains("/etc/modules-load.d") && hint.contains("/etc/modprobe.d"), "{hint}");
        assert!(Support::Fine.require().is_ok());
    }
}
