//! Mounts and unmounts that come to an end, whatever their storage does.
//!
//! What a filesystem writes at the very end waits for a storage that takes nothing, out of reach of every signal. So
//! the system call is made in a process of its own, which is named after the device: a later command finds it by that
//! name, waits for it, or by force ends what it waits for.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::MntFlags;

use super::LinuxHost;
use crate::apart;
use crate::error::{Doing, Error, Kind, Result};
use crate::host::programs::{self, Program};
use crate::host::{Life, MountEntry, Observe, device, loopdev, mounts, nbd, users, utab};
use crate::keeper;
use crate::keeper::process::{Identity, Process};
use crate::values::VolumeId;

/// How long an unmount may go on after its device has been failed.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);

/// How long the kernel lets the name of a process be.
const NAME_LIMIT: usize = 15;

/// Waits at most that long, tells now and then for how long it has waited, and gives what came of it.
type Wait<'a, T> = &'a mut dyn FnMut(Duration, &mut dyn FnMut(Duration)) -> Result<Option<T>>;

impl LinuxHost {
    /// See [`Host::unmount`](crate::host::Host::unmount).
    pub(super) fn unmount_patiently(&self, target: &Path, dead: bool) -> Result<()> {
        let begun = Instant::now();
        let mut dead = dead;
        not_below(target)?;
        // While it is being unmounted, the table does not have it any more.
        let table = mounts::table("self")?;
        let source = mounts::at(&table, target).map(|m| m.source);
        if !dead && let Err(e) = self.write_out(target, &table) {
            if !self.force() {
                return Err(e);
            }
            self.fail_device(source.as_deref())?;
            dead = true;
        }
        // Before the unmount: a kill in between then leaves nothing that nobody would look for.
        let noted = utab::is_noted(target);
        if noted {
            utab::forget(target);
        }
        // There is little left to write by now, but a second it may always have.
        let left = self.patience().saturating_sub(begun.elapsed()).max(Duration::from_secs(1));
        let result = self.unmount_now(target, source.as_deref(), left, dead);
        let mounted = || mounts::table("self").is_ok_and(|table| mounts::at(&table, target).is_some());
        if noted && result.is_err() && mounted() {
            utab::note(target);
        }
        result
    }

    fn unmount_now(&self, target: &Path, source: Option<&str>, patience: Duration, dead: bool) -> Result<()> {
        let name = source.and_then(|source| CString::new(process_name(Path::new(source))?).ok());
        let unmount = || {
            if let Some(name) = &name {
                let _ = nix::sys::prctl::set_name(name);
            }
            nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW).map_err(|errno| errno as i32)
        };
        let mut apart = apart::start(&format!("unmount {}", target.display()), unmount)?;
        let (result, dead) = self.to_its_end(
            What::Unmount(target),
            source,
            patience,
            dead,
            &|| Ok(()),
            &mut |limit, waits| apart.wait(limit, waits),
        )?;
        unmounted(result, target, dead)
    }

    /// See [`Host::finish_unmount`](crate::host::Host::finish_unmount).
    pub(super) fn wait_for_unmount(&self, device: &Path) -> Result<()> {
        if !users::is_taken(device) {
            return Ok(());
        }
        let Some(pid) = under_way(device) else { return Ok(()) };
        let source = device.to_str();
        let mut wait =
            |limit, waits: &mut dyn FnMut(Duration)| wait_while(&|| is_unmounting(pid, device), limit, waits);
        let may_fail = || may_fail(device);
        self.to_its_end(What::Unmount(device), source, self.patience(), false, &may_fail, &mut wait).map(drop)
    }

    /// See [`Host::finish_mount`](crate::host::Host::finish_mount).
    pub(super) fn wait_for_mount(&self, volume: &VolumeId, device: &Path, target: &Path) -> Result<()> {
        let Some(pid) = users::pids().find(|pid| is_mounting(*pid, device, target)) else { return Ok(()) };
        let dead = self.device(volume)?.life == Life::Dead;
        if dead {
            // The kernel may still hold its I/O.
            device::end_dead(&self.dirs.volume_run(volume), volume)?;
        }
        let mut wait = |limit, waits: &mut dyn FnMut(Duration)| {
            wait_while(&|| is_mounting(pid, device, target), limit, waits)
        };
        let may_fail = || may_fail(device);
        self.to_its_end(What::Mount(target), device.to_str(), self.patience(), dead, &may_fail, &mut wait)
            .map(drop)
    }

    /// Waits for a mount or an unmount, and by force, when it takes too long, ends what it waits for. Gives what came of it,
    /// and whether the device only gave errors by then.
    fn to_its_end<T>(
        &self,
        what: What<'_>,
        source: Option<&str>,
        patience: Duration,
        dead: bool,
        may_fail: &dyn Fn() -> Result<()>,
        wait: Wait<'_, T>,
    ) -> Result<(T, bool)> {
        let limit = if dead { UNMOUNT_LIMIT } else { patience };
        let mut waits = |elapsed: Duration| {
            (self.progress)(what.doing(), elapsed.as_secs(), Some(limit.as_secs()));
        };
        if let Some(result) = wait(limit, &mut waits)? {
            return Ok((result, dead));
        }
        if !dead && !self.force() {
            return Err(what.waits(self.patience()));
        }
        if !dead {
            may_fail()?;
            self.fail_device(source)?;
            if let Some(result) = wait(UNMOUNT_LIMIT, &mut |_| {})? {
                return Ok((result, true));
            }
        }
        Err(Error::new(
            Kind::Interrupted,
            format!(
                "{} within {} s, although its device only gives errors",
                what.undone(),
                UNMOUNT_LIMIT.as_secs()
            ),
        )
        .hint("see what the kernel says: dmesg | tail; then run the same command again"))
    }

    /// Lets the device of a filesystem fail at once, by disconnecting it, or for FUSE by killing its keeper: the only way to
    /// free an unmount from a storage that takes no data. What was acknowledged stays in the replay log; what was only cached is lost.
    pub(super) fn fail_device(&self, source: Option<&str>) -> Result<()> {
        let Some(source) = source else { return Ok(()) };
        if let Some(index) = nbd::sysfs::index_of(Path::new(source)) {
            let Some(device) = nbd::sysfs::one(index)? else { return Ok(()) };
            tracing::warn!("{source} is failed by force: what was cached, but not acknowledged, is lost");
            *self.failed.borrow_mut() = true;
            // The mount still holds it: it is free only after the unmount.
            return match nbd::disconnect_and_wait(&device, Duration::from_secs(2)) {
                Err(e) if e.kind() != Kind::Busy => Err(e),
                _ => Ok(()),
            };
        }
        let name = Path::new(source).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = loopdev::backing(&name).doing("find the file behind", source)?;
        let Some(folder) = file.strip_suffix("/fuse/disk") else { return Ok(()) };
        let Some(keeper) = Identity::read(&Path::new(folder).join(keeper::PID_FILE)) else { return Ok(()) };
        tracing::warn!("{source} is failed by force: what was cached, but not acknowledged, is lost");
        if let Some(process) = Process::open(&keeper)? {
            process.kill(Duration::from_secs(30))?;
        }
        *self.failed.borrow_mut() = true;
        Ok(())
    }

    /// Writes out what is cached of the filesystem at `target`, when this is its last mount. An unmount does that too,
    /// but for a storage that takes no data it would wait without end, out of reach of every signal.
    fn write_out(&self, target: &Path, table: &[MountEntry]) -> Result<()> {
        let Some(source) = mounts::at(table, target).map(|m| m.source) else { return Ok(()) };
        if table.iter().filter(|m| m.source == source).count() > 1 {
            return Ok(());
        }
        // The device too: a filesystem that has nothing to write may leave it alone, and yet write when it is unmounted.
        let begun = Instant::now();
        for words in [&[OsStr::new("--file-system"), target.as_os_str()] as &[&OsStr], &[OsStr::new(&source)]]
        {
            let mut child = Program::Sync.spawn(words)?;
            let left = self.patience().saturating_sub(begun.elapsed());
            let ended = programs::wait(&mut child, Some(left), &mut |_| {
                let elapsed = begun.elapsed();
                (self.progress)(
                    "write out what is cached",
                    elapsed.as_secs(),
                    Some(self.patience().as_secs()),
                );
            });
            // What could not be written is for the unmount to find out.
            if let Ok(None) = ended {
                return Err(Error::new(
                    Kind::Interrupted,
                    format!(
                        "what is cached of {} could not be written out within {} s: its storage does not take it",
                        target.display(),
                        self.patience().as_secs()
                    ),
                )
                .hint("see why: zerofsctl list; nothing is lost: run the same command again once the storage takes data, or lose what is only cached: detach --force"));
            }
        }
        Ok(())
    }
}

/// Refuses while something is mounted below: the kernel refuses, too, but for a dead filesystem, with which it would go.
fn not_below(target: &Path) -> Result<()> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).doing("read", path)?;
    let Some(below) = mounts::below(&String::from_utf8_lossy(&text), target) else { return Ok(()) };
    Err(Error::new(Kind::Busy, format!("{} is mounted below {}", below.display(), target.display()))
        .hint(format!("unmount that first: umount {}; then run the same command again", below.display())))
}

/// An unmount that has come to an end.
fn unmounted(result: Result<(), i32>, target: &Path, dead: bool) -> Result<()> {
    match result.map_err(Errno::from_raw) {
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(Errno::EBUSY) if dead => {
            nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                .doing("unmount", target)
        }
        Err(Errno::EBUSY) => {
            let users = users::of_mount(target);
            let by = if users.is_empty() { String::new() } else { format!(" by {}", users::list(&users)) };
            Err(Error::new(Kind::Busy, format!("{} is in use{by}", target.display())).hint(format!(
                "see who: fuser -vm {}; end them, then run the same command again",
                target.display()
            )))
        }
        Err(e) => Err(e).doing("unmount", target),
    }
}

/// What is waited for: an unmount of a place or a device, or a mount at a place.
#[derive(Clone, Copy)]
enum What<'a> {
    Unmount(&'a Path),
    Mount(&'a Path),
}

impl What<'_> {
    fn doing(self) -> &'static str {
        match self {
            What::Unmount(_) => "unmount it",
            What::Mount(_) => "wait for an earlier mount",
        }
    }

    fn undone(self) -> String {
        match self {
            What::Unmount(what) => format!("{} is not unmounted", what.display()),
            What::Mount(target) => format!("an earlier mount at {} does not end", target.display()),
        }
    }

    /// The storage does not answer.
    fn waits(self, patience: Duration) -> Error {
        let (why, hint) = match self {
            What::Unmount(_) => (
                "its storage does not take the last writes",
                "see why: zerofsctl list; nothing is lost, and the unmount ends by itself once the storage takes data: run the same command again then, or lose what is only cached: detach --force",
            ),
            What::Mount(_) => (
                "its storage does not answer",
                "see why: zerofsctl list; run the same command again once the storage answers, or give the device up: detach --force",
            ),
        };
        let message = format!("{} within {} s: {why}", self.undone(), patience.as_secs());
        Error::new(Kind::Interrupted, message).hint(hint)
    }
}

fn wait_while(
    goes_on: &dyn Fn() -> bool,
    limit: Duration,
    waits: &mut dyn FnMut(Duration),
) -> Result<Option<()>> {
    let begun = Instant::now();
    while goes_on() {
        if begun.elapsed() >= limit {
            return Ok(None);
        }
        waits(begun.elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Some(()))
}

/// A name is no proof, and by force the device is failed: nobody else may have it.
fn may_fail(device: &Path) -> Result<()> {
    let mounted = mounts::table("self")?.into_iter().find(|m| Path::new(&m.source) == device);
    let users: Vec<_> = users::of_device(device)?.into_iter().filter(|u| u.pid != 0).collect();
    let by = match mounted {
        Some(mount) => format!("mounted at {}", mount.target.display()),
        None if !users.is_empty() => format!("in use by {}", users::list(&users)),
        None => return Ok(()),
    };
    Err(Error::new(Kind::Busy, format!("{} is {by}", device.display()))
        .hint(format!("end who uses it, then run the same command again: fuser -vm {}", device.display())))
}

/// What the process is called that unmounts a device.
fn process_name(device: &Path) -> Option<String> {
    let name = format!("umount {}", device.file_name()?.to_str()?);
    (name.len() <= NAME_LIMIT).then_some(name)
}

/// What looks like the process in which a command unmounts the device. A zombie is none: the command that began it may have
/// been killed, and nobody may have collected it.
fn under_way(device: &Path) -> Option<u32> {
    users::pids().find(|pid| is_unmounting(*pid, device))
}

fn is_unmounting(pid: u32, device: &Path) -> bool {
    process_name(device).is_some_and(|name| is_called(pid, &name))
}

/// Whether the process is a mount(8) of this device at this place.
fn is_mounting(pid: u32, device: &Path, target: &Path) -> bool {
    // Asked first: the arguments of a process are read with its help.
    if !is_called(pid, Program::Mount.names().0) {
        return false;
    }
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut args = line.strip_suffix(b"\0").unwrap_or_default().rsplit(|b| *b == 0);
    args.next() == Some(target.as_os_str().as_bytes()) && args.next() == Some(device.as_os_str().as_bytes())
}

/// Whether the process has this name, and is root's and not over.
fn is_called(pid: u32, name: &str) -> bool {
    let is_it = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let over = field("State:")?.starts_with(['Z', 'X']);
        // Real, effective and all the others: no program of another user's that is root for a while.
        let root = field("Uid:")?.split_whitespace().all(|id| id == "0");
        Some(field("Name:")? == name && root && !over)
    };
    is_it() == Some(true)
}
