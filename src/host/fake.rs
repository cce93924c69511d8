//! A model of one machine and its bucket, for exhaustive crash tests: it can die before or after any
//! change, refuse any change, and it remembers every acknowledged write, so that a test sees a loss.
//!
//! It checks the "must never happen" list by itself: formatting over data, taking away a device that is in
//! use, a second ZeroFS beside a living one, reading before the replay. Each is a panic.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{
    ClaimRequest, Claimed, ConnectRequest, Content, DeviceView, Host, IoPath, KeeperOptions, KeeperView,
    Life, MountEntry, Observe, Signature, StopOptions, TargetView, Tenure, Transport, User,
};
use crate::error::{Error, Kind, Result};
use crate::host::{CheckResult, Device};
use crate::values::{ByteSize, FsType, Slice, TargetPath, VolumeId};

/// What a kill is in the model: a panic with this payload, which nothing on the way may handle.
#[derive(Debug)]
pub struct Killed;

/// A disk's filesystem, with everything that was written into it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Filesystem {
    fs: FsType,
    clean: bool,
    size: ByteSize,
    data: Vec<u64>,
}

/// What a ZeroFS disk holds durably.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Disk {
    size: u64,
    filesystem: Option<Filesystem>,
}

/// The catalog's record in the model.
#[derive(Debug, Clone)]
struct Record {
    capacity: ByteSize,
    fs: Option<FsType>,
    content: Content,
    epoch: u64,
    owned: bool,
}

/// The kernel's side of an NBD device.
#[derive(Debug, Clone, Copy)]
struct KernelDevice {
    path: IoPath,
    /// It only gives errors: its server crashed on the direct path, or it was failed by force.
    given_up: bool,
}

/// One volume's part of the machine.
#[derive(Debug, Default)]
struct World {
    record: Option<Record>,
    config: bool,
    keeper: bool,
    zerofs: bool,
    /// Acknowledged, but not yet flushed: only the replay log has them.
    log: Vec<u64>,
    log_epoch: u64,
    disk: Option<Disk>,
    fuse: bool,
    nbd: Option<KernelDevice>,
    device: Option<Device>,
    /// The keeper that runs serves the device.
    served: bool,
    /// The keeper that runs has replayed what was left behind.
    raised: bool,
    /// The kernel can do NBD.
    nbd_works: bool,
    /// The store is away: no ZeroFS can start, and one that dies stays dead.
    store_away: bool,
    /// A detach was told --force.
    force: bool,
    /// Without a store an unmount gets stuck in the kernel, after it has left the mount table.
    last_writes_stick: bool,
    /// One is stuck there.
    unmounting: bool,
    /// One whose command was killed goes on in the kernel, and after so many instants it is in the mount table.
    mounting: Option<(MountEntry, u64)>,
    mounts: Vec<MountEntry>,
    links: BTreeMap<PathBuf, PathBuf>,
    folders: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    group: Option<u32>,
    users: Vec<User>,
    /// Everything that was ever acknowledged.
    acknowledged: Vec<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct FakeHost {
    world: RefCell<World>,
    /// Counts the instants at which a kill or an error can strike: two per change.
    instants: RefCell<u64>,
    kill_at: RefCell<Option<u64>>,
    fail_at: RefCell<Option<u64>>,
    /// For how many instants a mount goes on whose command is killed, if nobody waits for it; without end if not told.
    mount_takes: RefCell<Option<u64>>,
    /// Where the volumes' locks are, if a test cares.
    run_dir: RefCell<Option<PathBuf>>,
}

impl FakeHost {
    /// A machine with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// A machine whose kernel can do NBD, as most can.
    pub fn with_nbd() -> Self {
        let host = Self::default();
        host.world.borrow_mut().nbd_works = true;
        host
    }

    /// Tells it of a volume that a catalog has a record of. What it knows better stays as it is.
    pub fn know(&self, capacity: ByteSize, fs: Option<FsType>, content: Content, epoch: u64) {
        let mut w = self.world.borrow_mut();
        match &mut w.record {
            // Grown in the catalog while nobody had it.
            Some(record) if !record.owned => record.capacity = record.capacity.max(capacity),
            Some(_) => {}
            None => w.record = Some(Record { capacity, fs, content, epoch, owned: false }),
        }
    }

    /// From now on panics when the next keeper is started for a device without the volume's lock in this run folder: a
    /// collector of leaks must never meet one that is on its way.
    pub fn watch_locks(&self, run_dir: &Path) {
        *self.run_dir.borrow_mut() = Some(run_dir.to_owned());
    }

    fn require_lock(&self, volume: &VolumeId) {
        if let Some(run_dir) = &*self.run_dir.borrow() {
            let holder = crate::journal::holder(run_dir, volume);
            assert_eq!(holder, Some(std::process::id() as i32), "a take-over without the volume's lock");
        }
    }

    /// Dies at the `n`th instant from now: even numbers before a change, odd ones after it.
    pub fn kill_at(&self, n: Option<u64>) {
        *self.kill_at.borrow_mut() = n.map(|n| *self.instants.borrow() + n);
    }

    /// Refuses the change at the `n`th instant from now.
    pub fn fail_at(&self, n: Option<u64>) {
        *self.fail_at.borrow_mut() = n.map(|n| *self.instants.borrow() + n);
    }

    /// A mount whose command is killed goes on for `n` instants, if nobody waits for its end; without end if not told.
    pub fn let_mounts_take(&self, n: Option<u64>) {
        *self.mount_takes.borrow_mut() = n;
    }

    /// Whether that is still to come.
    pub fn is_to_fail(&self) -> bool {
        self.fail_at.borrow().is_some()
    }

    /// How many instants have passed.
    pub fn instants(&self) -> u64 {
        *self.instants.borrow()
    }

    fn instant(&self) -> Result<()> {
        let now = *self.instants.borrow();
        *self.instants.borrow_mut() += 1;
        self.world.borrow_mut().mount_goes_on();
        if *self.kill_at.borrow() == Some(now) {
            *self.kill_at.borrow_mut() = None;
            std::panic::panic_any(Killed);
        }
        if *self.fail_at.borrow() == Some(now) {
            *self.fail_at.borrow_mut() = None;
            return Err(Error::failed("the model was told to fail here"));
        }
        Ok(())
    }

    /// A change with an instant before and after it. An injected failure after the change leaves it done,
    /// as a program does that is killed after its work.
    fn change<T>(&self, change: impl FnOnce(&mut World) -> Result<T>) -> Result<T> {
        self.instant()?;
        let value = change(&mut self.world.borrow_mut())?;
        self.instant()?;
        Ok(value)
    }

    /// An application writes `value` into the mounted filesystem and its fsync returns.
    pub fn write(&self, value: u64) {
        let mut w = self.world.borrow_mut();
        assert!(!w.mounts.is_empty(), "the test writes only while mounted");
        w.acknowledged.push(value);
        if w.nbd.is_some_and(|n| n.path == IoPath::Direct) {
            // Nobody remembers it for ZeroFS: the fsync returned because ZeroFS has it durably.
            w.disk.as_mut().and_then(|d| d.filesystem.as_mut()).expect("it is mounted").data.push(value);
            return;
        }
        w.log.push(value);
        if let Some(record) = &w.record {
            w.log_epoch = record.epoch;
        }
    }

    /// The keeper flushes by itself.
    pub fn flush(&self) {
        self.world.borrow_mut().flush();
    }

    /// SIGKILL to the keeper; ZeroFS lives on. A FUSE device is dead with it, an NBD device waits.
    pub fn kill_keeper(&self) {
        self.world.borrow_mut().lose_keeper();
    }

    /// Nobody starts the next keeper for so long that the kernel lets the I/O of its device fail: a filesystem that is
    /// mounted turns read-only. The device itself can be served again.
    pub fn time_out(&self) {
        let mut w = self.world.borrow_mut();
        if w.life() == Life::Waiting {
            w.harm_filesystem();
            w.unmounting = false;
        }
    }

    /// The store goes away, or comes back.
    pub fn set_store_away(&self, away: bool) {
        let mut w = self.world.borrow_mut();
        w.store_away = away;
        // Sooner or later ZeroFS ends without its store; a keeper starts it again once it can.
        w.zerofs = !away && (w.zerofs || w.keeper);
        if away {
            w.lose_direct_path();
        } else if w.keeper && w.raised {
            w.flush();
        }
    }

    /// Whether a detach may give up what no server takes.
    pub fn set_force(&self, force: bool) {
        self.world.borrow_mut().force = force;
    }

    /// From now on an unmount without a store is given up when it has left the mount table already.
    pub fn let_last_writes_stick(&self) {
        self.world.borrow_mut().last_writes_stick = true;
    }

    /// Whether the device answers.
    pub fn life(&self) -> Life {
        self.world.borrow().life()
    }

    /// SIGKILL to ZeroFS: a living keeper restarts it and replays, which ends in a flush.
    pub fn kill_zerofs(&self) {
        let mut w = self.world.borrow_mut();
        w.lose_direct_path();
        if w.keeper {
            // What an earlier keeper left waits for the replay step.
            if w.raised && !w.store_away {
                w.flush();
            }
        } else {
            w.zerofs = false;
        }
    }

    /// Someone opens the device, or lets go of it.
    pub fn set_users(&self, users: Vec<User>) {
        self.world.borrow_mut().users = users;
    }

    /// Somebody put a file into a folder, or mounted something there.
    pub fn mount_foreign(&self, target: &str) {
        let entry = MountEntry {
            target: target.into(),
            source: "/dev/other".into(),
            fs: "ext4".into(),
            read_only: false,
        };
        self.world.borrow_mut().mounts.push(entry);
    }

    /// What an application would read: everything it wrote, in order. None while nothing is mounted.
    pub fn read(&self) -> Option<Vec<u64>> {
        let w = self.world.borrow();
        let writable = w.mounts.iter().any(|m| m.source != "/dev/other" && !m.read_only);
        if !writable || !w.keeper || w.life() != Life::Served {
            return None;
        }
        let mut data = w.disk.as_ref()?.filesystem.as_ref()?.data.clone();
        data.extend(&w.log);
        Some(data)
    }

    /// Everything that was ever acknowledged.
    pub fn acknowledged(&self) -> Vec<u64> {
        self.world.borrow().acknowledged.clone()
    }

    /// Where the volume is mounted or bound, oldest first.
    pub fn mounted_at(&self) -> Vec<String> {
        let w = self.world.borrow();
        let ours = w.mounts.iter().filter(|m| m.source != "/dev/other");
        ours.map(|m| m.target.display().to_string()).collect()
    }

    /// The size of device and filesystem.
    pub fn sizes(&self) -> (Option<ByteSize>, Option<ByteSize>) {
        let w = self.world.borrow();
        (
            w.device.as_ref().map(|d| d.size),
            w.disk.as_ref().and_then(|d| d.filesystem.as_ref()).map(|f| f.size),
        )
    }

    /// What is left on the node, in words; empty when nothing is.
    pub fn leftovers(&self) -> Vec<&'static str> {
        let w = self.world.borrow();
        let mut left = Vec::new();
        let mut note = |is: bool, what| {
            if is {
                left.push(what);
            }
        };
        note(w.record.as_ref().is_some_and(|r| r.owned), "claim");
        note(w.config, "config");
        note(w.keeper, "keeper");
        note(w.zerofs, "zerofs");
        note(!w.log.is_empty(), "log");
        note(w.fuse, "fuse");
        note(w.nbd.is_some(), "nbd");
        note(w.device.is_some(), "device");
        note(w.mounts.iter().any(|m| m.source != "/dev/other"), "mount");
        note(w.is_mounting(), "mount under way");
        note(!w.links.is_empty(), "link");
        note(!w.folders.is_empty(), "folder");
        note(!w.files.is_empty(), "file");
        left
    }
}

impl World {
    fn new_device(&self, path: &str, read_only: bool) -> Device {
        Device { path: path.into(), read_only, size: ByteSize(self.disk.as_ref().map_or(0, |d| d.size)) }
    }

    fn flush(&mut self) {
        let log = std::mem::take(&mut self.log);
        if let Some(fs) = self.disk.as_mut().and_then(|d| d.filesystem.as_mut()) {
            fs.data.extend(log);
        } else {
            assert!(log.is_empty(), "acknowledged writes without a filesystem");
        }
    }

    fn disk(&self) -> Result<Option<&Disk>> {
        if !self.keeper || !self.zerofs {
            return Err(Error::new(Kind::Unreachable, "ZeroFS does not answer"));
        }
        Ok(self.disk.as_ref())
    }

    fn alive(&self) -> bool {
        self.keeper && self.zerofs
    }

    fn life(&self) -> Life {
        match self.nbd {
            Some(nbd) if nbd.given_up => Life::Dead,
            Some(_) if !self.served => Life::Waiting,
            None if self.fuse && !self.served => Life::Dead,
            _ => Life::Served,
        }
    }

    /// An I/O error got to the filesystem: it takes no more writes.
    fn harm_filesystem(&mut self) {
        let device = self.device.as_ref().map(|d| d.path.to_string_lossy().into_owned());
        for mount in self.mounts.iter_mut().filter(|m| Some(&m.source) == device.as_ref()) {
            mount.read_only = true;
        }
        self.mounting = None;
    }

    /// ZeroFS has ended: a device of the direct path fails.
    fn lose_direct_path(&mut self) {
        if let Some(nbd) = self.nbd.as_mut().filter(|n| n.path == IoPath::Direct) {
            nbd.given_up = true;
            self.harm_filesystem();
        }
    }

    fn lose_keeper(&mut self) {
        self.keeper = false;
        self.served = false;
        self.raised = false;
    }

    /// No server takes what is cached.
    fn is_stuck(&self) -> bool {
        self.life() == Life::Waiting || self.life() == Life::Served && self.store_away
    }

    /// The errors of a dead device end an unmount.
    fn is_unmounting(&self) -> bool {
        self.unmounting && self.life() != Life::Dead
    }

    /// The errors of a dead device end a mount.
    fn is_mounting(&self) -> bool {
        self.mounting.is_some() && self.life() != Life::Dead
    }

    /// Neither mounted nor unmounted at this moment.
    fn is_at_rest(&self) -> bool {
        !self.is_mounting() && !self.is_unmounting()
    }

    fn mount_goes_on(&mut self) {
        if !self.is_mounting() {
            self.mounting = None;
        } else if let Some((_, left)) = &mut self.mounting {
            *left = left.saturating_sub(1);
            if *left == 0 && !self.is_stuck() {
                self.end_mount();
            }
        }
    }

    fn end_mount(&mut self) {
        let Some((entry, _)) = self.mounting.take() else { return };
        assert!(self.folders.contains(&entry.target), "a mount comes to its end on nothing");
        let f = self.disk.as_mut().and_then(|d| d.filesystem.as_mut()).expect("it is being mounted");
        f.clean &= entry.read_only;
        self.mounts.push(entry);
    }

    /// By force.
    fn let_device_fail(&mut self) {
        match &mut self.nbd {
            Some(nbd) => nbd.given_up = true,
            None => self.lose_keeper(),
        }
    }

    fn mark_clean(&mut self) {
        if let Some(f) = self.disk.as_mut().and_then(|d| d.filesystem.as_mut()) {
            f.clean = true;
        }
    }

    fn require_store(&self) -> Result<()> {
        if self.store_away {
            return Err(Error::new(Kind::Unreachable, "ZeroFS cannot reach its store"));
        }
        Ok(())
    }

    fn require_claim(&self) {
        assert!(self.config, "started without a config");
        assert!(self.record.as_ref().is_some_and(|r| r.owned), "started without the claim");
    }
}

const LOOP: &str = "/dev/loop0";
const NBD: &str = "/dev/nbd0";

/// What the mount table calls the filesystem of device nodes.
const NODES: &str = "devtmpfs";

impl Observe for FakeHost {
    fn claim(&self, _: &VolumeId) -> Result<Option<Claimed>> {
        Ok(self.world.borrow().record.as_ref().filter(|r| r.owned).map(claimed))
    }

    fn tenure(&self, _: &VolumeId, epoch: u64) -> Result<Tenure> {
        let w = self.world.borrow();
        w.require_store()?;
        Ok(match &w.record {
            Some(record) if record.owned => Tenure::Ours,
            Some(record) if record.epoch > epoch => Tenure::Over,
            _ => Tenure::Unclear("it is nobody's".into()),
        })
    }

    fn claim_absent(&self, volume: &VolumeId) -> Result<bool> {
        self.claim(volume).map(|c| c.is_none())
    }

    fn config_present(&self, _: &VolumeId) -> Result<bool> {
        Ok(self.world.borrow().config)
    }

    fn config_absent(&self, _: &VolumeId) -> Result<bool> {
        Ok(!self.world.borrow().config)
    }

    fn keeper(&self, _: &VolumeId) -> Result<KeeperView> {
        let w = self.world.borrow();
        Ok(if w.keeper {
            let left_behind = if w.raised { 0 } else { w.log.len() as u64 };
            KeeperView::Alive { usable: true, state: "ready".into(), reason: None, left_behind }
        } else {
            KeeperView::Dead { orphan: w.zerofs, left_behind: w.log.len() as u64 }
        })
    }

    fn disk_size(&self, _: &VolumeId) -> Result<Option<ByteSize>> {
        Ok(self.world.borrow().disk()?.map(|d| ByteSize(d.size)))
    }

    fn device(&self, _: &VolumeId) -> Result<DeviceView> {
        let w = self.world.borrow();
        let transport = match (w.nbd, w.fuse) {
            (Some(_), _) => Some(Transport::Nbd),
            (None, true) => Some(Transport::Fuse),
            (None, false) => None,
        };
        let path = w.nbd.map(|n| n.path);
        let (device, record) = (w.device.clone(), w.nbd.is_some());
        Ok(DeviceView { fuse: w.fuse, device, transport, path, record, life: w.life() })
    }

    fn transport(&self, wanted: Transport) -> Result<Transport> {
        match (wanted, self.world.borrow().nbd_works) {
            (Transport::Fuse, _) | (Transport::Auto, false) => Ok(Transport::Fuse),
            (_, true) => Ok(Transport::Nbd),
            (Transport::Nbd, false) => Err(Error::environment("this kernel has no module nbd")),
        }
    }

    fn signature(&self, _: &Path, _: Option<FsType>) -> Result<Signature> {
        let w = self.world.borrow();
        assert!(w.raised || w.log.is_empty(), "the device is looked at before the log is replayed");
        assert!(w.is_at_rest(), "the device is looked at while it is mounted or unmounted");
        if !w.alive() || w.life() != Life::Served {
            return Err(Error::failed("cannot read the device"));
        }
        Ok(match w.disk.as_ref().and_then(|d| d.filesystem.as_ref()) {
            None => Signature::Blank,
            Some(f) => Signature::Filesystem { fs: f.fs, clean: f.clean },
        })
    }

    fn mounts_of(&self, device: &Path) -> Result<Vec<MountEntry>> {
        let source = device.to_string_lossy();
        Ok(self.world.borrow().mounts.iter().filter(|m| m.source == source).cloned().collect())
    }

    fn target(&self, target: &TargetPath) -> Result<TargetView> {
        let w = self.world.borrow();
        let path = target.as_path();
        if let Some(entry) = w.mounts.iter().find(|m| m.target == path) {
            return Ok(TargetView::MountPoint(entry.clone()));
        }
        if let Some(to) = w.links.get(path) {
            return Ok(TargetView::Other { link: Some(to.clone()) });
        }
        if w.files.contains(path) {
            return Ok(TargetView::Other { link: None });
        }
        Ok(if w.folders.contains(path) { TargetView::EmptyFolder } else { TargetView::Missing })
    }

    fn device_users(&self, _: &Path) -> Result<Vec<User>> {
        let w = self.world.borrow();
        let kernel = (!w.is_at_rest()).then(|| User { pid: 0, name: "the kernel".into() });
        Ok(w.users.iter().cloned().chain(kernel).collect())
    }

    fn can_grow_mounted(&self, _: FsType) -> Result<()> {
        Ok(())
    }

    fn is_node_of(&self, target: &TargetPath, device: &Path) -> Result<bool> {
        let w = self.world.borrow();
        let node = w.mounts.iter().any(|m| m.target == target.as_path() && m.source == NODES);
        Ok(node && w.device.as_ref().is_some_and(|d| d.path == device))
    }

    fn is_empty_file(&self, target: &TargetPath) -> Result<bool> {
        Ok(self.world.borrow().files.contains(target.as_path()))
    }

    fn group_granted(&self, _: &TargetPath, gid: u32) -> Result<bool> {
        Ok(self.world.borrow().group == Some(gid))
    }

    fn filesystem_fills_device(&self, device: &Device, _: FsType, _: &Path) -> Result<bool> {
        let w = self.world.borrow();
        Ok(w.disk.as_ref().and_then(|d| d.filesystem.as_ref()).is_some_and(|f| f.size == device.size))
    }
}

fn claimed(record: &Record) -> Claimed {
    Claimed {
        epoch: record.epoch,
        capacity: Some(record.capacity),
        fs: record.fs,
        content: record.content,
        notes: vec![],
    }
}

impl Host for FakeHost {
    fn take_claim(&self, _: &VolumeId, request: &ClaimRequest) -> Result<Claimed> {
        self.change(|w| {
            let default = ByteSize(ByteSize::GIB);
            if w.record.is_none() && request.must_exist {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("there is no such volume in {}", request.storage_url),
                )
                .hint(format!("see what there is: zerofsctl list --storage-url {}", request.storage_url)));
            }
            let record = w.record.get_or_insert_with(|| Record {
                capacity: request.size.unwrap_or(default),
                fs: request.fs,
                content: Content::Never,
                epoch: 0,
                owned: false,
            });
            if !record.owned {
                record.epoch += 1;
                record.owned = true;
            }
            if record.content == Content::Never {
                record.capacity = request.size.unwrap_or(record.capacity);
                record.fs = request.fs.or(record.fs);
            }
            Ok(claimed(record))
        })
    }

    fn release_claim(&self, _: &VolumeId) -> Result<()> {
        self.change(|w| {
            assert!(!w.zerofs && !w.keeper, "released while ZeroFS still runs");
            w.require_store()?;
            if let Some(record) = &mut w.record {
                if !w.log.is_empty() && w.log_epoch == record.epoch && !w.force {
                    return Err(Error::refused("acknowledged writes wait in the log"));
                }
                // Nobody else had it since.
                w.log_epoch = record.epoch;
                record.owned = false;
            }
            Ok(())
        })
    }

    fn record_content(&self, _: &VolumeId, content: Content, fs: Option<FsType>) -> Result<()> {
        self.change(|w| {
            let record = w.record.as_mut().ok_or_else(|| Error::failed("no record"))?;
            record.content = content;
            record.fs = fs.or(record.fs);
            Ok(())
        })
    }

    fn record_capacity(&self, _: &VolumeId, capacity: ByteSize) -> Result<()> {
        self.change(|w| {
            w.record.as_mut().ok_or_else(|| Error::failed("no record"))?.capacity = capacity;
            Ok(())
        })
    }

    fn write_config(&self, _: &VolumeId, _: Option<ByteSize>) -> Result<()> {
        self.change(|w| {
            w.config = true;
            Ok(())
        })
    }

    fn remove_config(&self, _: &VolumeId) -> Result<()> {
        self.change(|w| {
            assert!(!w.zerofs, "the config is removed under a running ZeroFS");
            w.config = false;
            Ok(())
        })
    }

    fn start_keeper(&self, _: &VolumeId, epoch: u64, _: &KeeperOptions) -> Result<()> {
        self.change(|w| {
            w.require_claim();
            assert_eq!(w.record.as_ref().map(|r| r.epoch), Some(epoch), "started with another epoch");
            assert!(!w.keeper, "a second keeper");
            w.require_store()?;
            // An orphan is adopted, not doubled.
            w.keeper = true;
            w.zerofs = true;
            Ok(())
        })
    }

    fn stop_keeper(&self, _: &VolumeId, options: &StopOptions) -> Result<()> {
        self.change(|w| {
            assert!(!w.fuse || !w.keeper, "stopped under a live device");
            assert!(w.nbd.is_none(), "stopped under a device");
            let own = w.record.as_ref().is_some_and(|r| r.epoch == w.log_epoch);
            // A keeper that has replayed flushes; one that is started for the stop replays, and so does one that has not.
            let settles = !w.keeper || w.raised || own && !options.may_leave_log;
            let store = if w.log.is_empty() || !settles { Ok(()) } else { w.require_store() };
            if store.is_err() && !w.force {
                return store;
            }
            if settles && store.is_ok() && w.disk.is_some() {
                assert!(w.config || w.log.is_empty(), "replayed without a config");
                w.flush();
            }
            w.lose_keeper();
            w.zerofs = false;
            store
        })
    }

    fn create_disk(&self, _: &VolumeId, size: ByteSize) -> Result<()> {
        self.change(|w| {
            w.disk()?;
            let disk = w.disk.get_or_insert_default();
            assert!(size.0 >= disk.size, "a disk shrinks");
            disk.size = size.0;
            Ok(())
        })
    }

    fn remove_disk(&self, _: &VolumeId) -> Result<()> {
        self.change(|w| {
            assert!(!w.fuse && w.nbd.is_none(), "the disk is removed under a device");
            assert!(w.disk.as_ref().is_none_or(|d| d.filesystem.is_none()), "a written disk is removed");
            w.disk = None;
            Ok(())
        })
    }

    fn grow_disk(&self, _: &VolumeId, size: ByteSize) -> Result<()> {
        self.change(|w| {
            w.disk()?;
            let disk = w.disk.as_mut().ok_or_else(|| Error::failed("no disk"))?;
            assert!(size.0 >= disk.size, "a disk shrinks");
            disk.size = size.0;
            Ok(())
        })
    }

    fn replay(&self, _: &VolumeId) -> Result<(u64, Option<String>)> {
        self.change(|w| {
            assert!(!w.fuse && w.nbd.is_none(), "replayed under a device");
            w.disk()?;
            let epoch = w.record.as_ref().map_or(0, |r| r.epoch);
            let is_true = [epoch, epoch.saturating_sub(1)].contains(&w.log_epoch);
            assert!(w.log.is_empty() || is_true, "a log of another attach would be replayed");
            let entries = w.log.len() as u64;
            w.flush();
            w.raised = true;
            Ok((entries, None))
        })
    }

    fn prepare_transport(&self, wanted: Transport) -> Result<Transport> {
        self.transport(wanted)
    }

    fn connect(&self, _: &VolumeId, request: &ConnectRequest) -> Result<Device> {
        let nbd = request.transport == Transport::Nbd;
        assert_ne!(request.transport, Transport::Auto, "nobody picked a transport");
        self.change(|w| {
            assert!(w.alive(), "connected without ZeroFS");
            assert!(w.raised || w.log.is_empty(), "connected before the replay");
            assert_ne!(w.life(), Life::Dead, "a dead device is connected again");
            w.raised = true;
            w.served = true;
            if nbd {
                w.nbd.get_or_insert(KernelDevice { path: request.path, given_up: false });
                w.device = Some(w.new_device(NBD, request.read_only));
            } else {
                w.fuse = true;
            }
            Ok(())
        })?;
        self.change(|w| {
            let device = w.device.clone().unwrap_or_else(|| w.new_device(LOOP, request.read_only));
            w.device = Some(device.clone());
            Ok(device)
        })
    }

    // A step of this host is done in an instant: nothing waits.
    fn look_after(&self, _: &VolumeId) -> Result<()> {
        Ok(())
    }

    fn take_over(&self, volume: &VolumeId) -> Result<()> {
        self.require_lock(volume);
        assert_eq!(self.life(), Life::Waiting, "only a device that waits is taken over");
        if !self.world.borrow().keeper {
            self.change(|w| {
                w.require_claim();
                w.require_store()?;
                w.keeper = true;
                w.zerofs = true;
                Ok(())
            })?;
        }
        self.change(|w| {
            w.disk()?;
            w.flush();
            w.raised = true;
            Ok(())
        })?;
        self.change(|w| {
            w.served = true;
            Ok(())
        })?;
        // Up to here, since only now the device is served again.
        self.require_lock(volume);
        Ok(())
    }

    fn let_fail(&self, _: &VolumeId) -> Result<()> {
        self.change(|w| {
            assert_eq!(w.life(), Life::Dead, "a live device is let fail");
            Ok(())
        })
    }

    fn disconnect(&self, _: &VolumeId, dead: bool) -> Result<()> {
        self.change(|w| {
            let in_use = w.device.is_some() && !w.users.is_empty();
            assert!(dead || !in_use, "a device in use is disconnected");
            let ours = |m: &MountEntry| m.source == LOOP || m.source == NBD || m.source == NODES;
            assert!(!w.mounts.iter().any(ours), "a mounted device is disconnected");
            assert!(!dead || w.life() == Life::Dead, "a live device is taken down as if it were dead");
            assert!(w.is_at_rest(), "a device is disconnected while it is mounted or unmounted");
            if w.nbd.is_some() && !w.users.is_empty() {
                // The kernel lets go of it only after them.
                return Err(Error::new(Kind::Busy, "somebody still holds the failed device"));
            }
            (w.unmounting, w.mounting) = (false, None);
            w.device = None;
            w.nbd = None;
            // Whoever held a dead one holds none that comes after it.
            w.users.clear();
            Ok(())
        })?;
        self.change(|w| {
            w.fuse = false;
            w.served = false;
            Ok(())
        })
    }

    fn grow_device(&self, _: &VolumeId) -> Result<Device> {
        self.change(|w| {
            let size = ByteSize(w.disk()?.map_or(0, |d| d.size));
            let device = w.device.as_mut().ok_or_else(|| Error::failed("no device"))?;
            device.size = size;
            Ok(device.clone())
        })
    }

    fn format(&self, device: &Device, fs: FsType, _: &VolumeId) -> Result<()> {
        let make = |clean| {
            move |w: &mut World| {
                assert!(
                    w.record.as_ref().is_some_and(|r| r.content == Content::Formatting),
                    "mkfs unannounced"
                );
                assert!(w.acknowledged.is_empty(), "mkfs over acknowledged data");
                assert!(w.is_at_rest(), "mkfs while it is mounted");
                let disk = w.disk.as_mut().ok_or_else(|| Error::failed("no disk"))?;
                disk.filesystem = Some(Filesystem { fs, clean, size: device.size, data: vec![] });
                Ok(())
            }
        };
        // Half a mkfs may look like a filesystem already.
        self.change(make(false))?;
        self.change(make(true))
    }

    fn preen(&self, _: &Device, _: FsType) -> Result<Option<String>> {
        self.change(|w| {
            assert!(w.is_at_rest(), "repaired while it is mounted or unmounted");
            w.mark_clean();
            Ok(None)
        })
    }

    fn read_data(&self, _: &Device, _: Slice) -> Result<Vec<(u64, u64)>> {
        self.change(|w| if w.alive() { Ok(vec![]) } else { Err(Error::failed("cannot read the device")) })
    }

    fn check(&self, _: &Device, _: FsType, repair: bool) -> Result<CheckResult> {
        self.change(|w| {
            assert!(w.mounts.is_empty() && w.is_at_rest(), "checked while mounted");
            Ok(CheckResult { clean: true, repaired: repair, output: String::new() })
        })
    }

    fn mount(
        &self,
        device: &Device,
        fs: FsType,
        target: &TargetPath,
        _: &[String],
        read_only: bool,
    ) -> Result<()> {
        let takes = self.mount_takes.borrow().unwrap_or(u64::MAX);
        self.change(|w| {
            assert_eq!(
                w.record.as_ref().map(|r| r.content),
                Some(Content::Formatted),
                "mounted before it was recorded"
            );
            assert!(w.folders.contains(target.as_path()), "mounted on nothing");
            assert!(w.is_at_rest(), "mounted while another mount or unmount is not over");
            let f =
                w.disk.as_mut().and_then(|d| d.filesystem.as_mut()).expect("mounted without a filesystem");
            assert!(f.clean || !w.mounts.is_empty(), "mounted without a preen");
            assert_eq!(f.fs, fs);
            let entry = MountEntry {
                target: target.as_path().into(),
                source: device.path.to_string_lossy().into_owned(),
                fs: fs.name().into(),
                read_only,
            };
            w.mounting = Some((entry, takes));
            Ok(())
        })
        .inspect_err(|_| self.world.borrow_mut().mounting = None)?;
        self.world.borrow_mut().end_mount();
        self.instant()
    }

    fn unmount(&self, target: &Path, dead: bool) -> Result<()> {
        self.change(|w| {
            assert!(!dead || w.life() == Life::Dead, "a live mount is detached lazily");
            assert!(!w.is_mounting(), "unmounted while a mount is not over");
            let stuck = w.is_stuck();
            if stuck && !w.force {
                let harmed = |m: &MountEntry| m.target == target && m.read_only;
                if w.last_writes_stick && !w.mounts.iter().any(harmed) {
                    w.mounts.retain(|m| m.target != target);
                    w.unmounting = w.mounts.is_empty();
                }
                return Err(Error::new(Kind::Interrupted, "what is cached could not be written out"));
            }
            if stuck {
                w.let_device_fail();
            }
            let harmed = w.mounts.iter().any(|m| m.target == target && m.read_only);
            w.mounts.retain(|m| m.target != target);
            if w.mounts.is_empty() && w.alive() && w.life() == Life::Served && !harmed {
                w.mark_clean();
            }
            Ok(())
        })
    }

    fn finish_mount(&self, _: &VolumeId, device: &Device, target: &TargetPath) -> Result<()> {
        let is_it = |m: &MountEntry| m.target == target.as_path() && Path::new(&m.source) == device.path;
        if !self.world.borrow().mounting.as_ref().is_some_and(|(m, _)| is_it(m)) {
            return Ok(());
        }
        self.change(|w| {
            if w.is_mounting() && w.is_stuck() {
                if !w.force {
                    return Err(Error::new(Kind::Interrupted, "the mount is not over"));
                }
                w.let_device_fail();
            }
            if w.is_mounting() {
                w.end_mount();
            }
            w.mounting = None;
            Ok(())
        })
    }

    fn finish_unmount(&self, _: &Device) -> Result<()> {
        if !self.world.borrow().is_unmounting() {
            return Ok(());
        }
        self.change(|w| {
            if w.is_stuck() {
                if !w.force {
                    return Err(Error::new(Kind::Interrupted, "the unmount is not over"));
                }
                w.let_device_fail();
            } else {
                w.mark_clean();
            }
            w.unmounting = false;
            Ok(())
        })
    }

    fn grow_filesystem(&self, device: &Device, _: FsType, _: &Path) -> Result<()> {
        self.change(|w| {
            if let Some(f) = w.disk.as_mut().and_then(|d| d.filesystem.as_mut()) {
                f.size = device.size;
            }
            Ok(())
        })
    }

    fn grow_unmounted(&self, device: &Device) -> Result<()> {
        self.change(|w| {
            assert!(w.mounts.is_empty() && w.is_at_rest(), "grown as if it were unmounted");
            if let Some(f) = w.disk.as_mut().and_then(|d| d.filesystem.as_mut()) {
                f.size = device.size;
            }
            Ok(())
        })
    }

    fn make_folder(&self, target: &TargetPath) -> Result<()> {
        self.change(|w| {
            w.folders.insert(target.as_path().into());
            Ok(())
        })
    }

    fn remove_folder(&self, target: &TargetPath) -> Result<()> {
        self.change(|w| {
            assert!(!w.mounts.iter().any(|m| m.target == target.as_path()), "a mount point is removed");
            assert!(!w.is_mounting(), "a mount point is removed while a mount is not over");
            w.folders.remove(target.as_path());
            Ok(())
        })
    }

    fn make_file(&self, target: &TargetPath) -> Result<()> {
        self.change(|w| {
            w.files.insert(target.as_path().into());
            Ok(())
        })
    }

    fn clear_target(&self, target: &TargetPath) -> Result<()> {
        self.change(|w| {
            assert!(!w.mounts.iter().any(|m| m.target == target.as_path()), "a mount point is removed");
            assert!(!w.is_mounting(), "a mount point is removed while a mount is not over");
            w.folders.remove(target.as_path());
            w.files.remove(target.as_path());
            Ok(())
        })
    }

    fn bind(&self, source: &Path, target: &TargetPath, read_only: bool) -> Result<()> {
        self.change(|w| {
            let path = target.as_path();
            assert!(w.keeper && w.life() == Life::Served, "bound on a dead device");
            assert!(!w.mounts.iter().any(|m| m.target == path), "bound over a mount");
            let device = w.device.as_ref().map(|d| d.path.clone());
            let mut entry = if Some(source) == device.as_deref() {
                assert!(w.files.contains(path), "a device is bound on nothing");
                let (source, fs) = (NODES.into(), NODES.into());
                MountEntry { target: path.into(), source, fs, read_only }
            } else {
                assert!(w.folders.contains(path), "bound on nothing");
                let ours = |m: &&MountEntry| device.as_deref() == Some(Path::new(&m.source));
                let staged = w.mounts.iter().filter(ours).find(|m| m.target == source);
                staged.expect("what is bound is not mounted").clone()
            };
            entry.target = path.into();
            entry.read_only |= read_only;
            w.mounts.push(entry);
            Ok(())
        })
    }

    fn grant_group(&self, target: &TargetPath, gid: u32) -> Result<()> {
        self.change(|w| {
            assert!(
                w.mounts.iter().any(|m| m.target == target.as_path()),
                "granted where nothing is mounted"
            );
            w.group = Some(gid);
            Ok(())
        })
    }

    fn link(&self, device: &Device, target: &TargetPath) -> Result<()> {
        self.change(|w| {
            w.links.insert(target.as_path().into(), device.path.clone());
            Ok(())
        })
    }

    fn unlink(&self, target: &TargetPath) -> Result<()> {
        self.change(|w| {
            w.links.remove(target.as_path());
            Ok(())
        })
    }
}
