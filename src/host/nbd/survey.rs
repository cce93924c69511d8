//! What there is of NBD devices on this machine, and what each is to us.
//!
//! One pass: the devices' own files, `/proc` once, and a question to each keeper. Costly looks (every open file of
//! every process) are taken only where the answer could change a verdict. Nothing is opened but files of the kernel,
//! so nothing here waits for a device or a filesystem that is dead.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::sys::stat::makedev;
use serde::Serialize;

use super::capacity::{self, Capacity};
use super::sysfs;
use super::usage::{Mounted, Processes, Serving, read_small};
use super::verdict::{Backend, Evidence, Ownership, Proof, Recorded, Served, Verdict, judge, ownership};
use crate::error::{Doing, Result};
use crate::host::User;
use crate::values::{ByteSize, VolumeId};

/// Where the kernel shows things; tests have trees of their own.
#[derive(Debug, Clone)]
pub struct Roots {
    /// `/sys`
    pub sys: PathBuf,
    /// `/proc`
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots { sys: "/sys".into(), proc: "/proc".into() }
    }
}

impl Roots {
    /// `sys` and `proc` in a folder.
    pub fn below(folder: &Path) -> Roots {
        Roots { sys: folder.join("sys"), proc: folder.join("proc") }
    }
}

/// What stands behind a volume's device; of several devices that the volume has, the one that its keeper names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Server {
    /// The keeper's process, while it runs.
    pub keeper: Option<u32>,
    /// Whether it answers.
    pub answers: bool,
    /// ZeroFS's process, while it runs.
    pub zerofs: Option<u32>,
    /// One word of the keeper's: ready, stalled, …
    pub state: Option<String>,
    /// The N of `/dev/nbdN` that the keeper has, if it tells.
    pub index: Option<u32>,
    /// Whether the device works, or waits for a server that is on its way: false once it has failed; if the keeper tells.
    pub connected: Option<bool>,
    /// How often the device was given new sockets since its attach, if the keeper tells.
    pub reconnects: Option<u64>,
    /// Sockets of the device that have died since its attach, if the keeper tells.
    pub dead_links: Option<u64>,
    /// What else runs of the volume, mostly with another run folder than ours. Nobody has asked it.
    pub elsewhere: Option<Serving>,
}

impl Server {
    /// Whether it may serve the device of this index: a keeper that tells none may have any.
    fn may_serve(&self, index: u32) -> bool {
        self.index.is_none_or(|i| i == index)
    }

    /// What runs there, if anything does.
    fn words(&self) -> Option<String> {
        Some(match (self.keeper, self.answers, self.zerofs, &self.elsewhere) {
            (Some(pid), true, ..) => format!("its keeper answers (pid {pid})"),
            (None, true, ..) => "its keeper answers".into(),
            (Some(pid), false, ..) => format!("its keeper runs, but does not answer (pid {pid})"),
            (None, false, Some(pid), _) => format!("its ZeroFS runs without a keeper (pid {pid})"),
            (None, false, None, elsewhere) => elsewhere.as_ref()?.to_string(),
        })
    }
}

/// What our own records and processes say; [`super::owners::RunDir`] is the real one. What we do ourselves is left out.
pub trait Owners {
    /// What stands behind each of the volumes.
    fn servers(&self, volumes: &[VolumeId]) -> BTreeMap<VolumeId, Server>;
    /// Which volumes our records have at which index, and the process that connected each, as the kernel showed it. For
    /// kernels without identifiers.
    fn recorded(&self) -> BTreeMap<u32, Vec<(VolumeId, Option<u32>)>>;
    /// The process of an operation that holds the volume's lock.
    fn at_work(&self, volume: &VolumeId) -> Option<i32>;
}

/// One connection of a device: what tells it from every other that ever had the same index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Connection {
    /// The number of the kernel's `pid` file, which is made anew at each connect.
    pub id: u64,
    /// Who connected it; mostly a process that has ended.
    pub pid: Option<u32>,
    /// Since when at least it is connected: that file's age.
    pub since: jiff::Timestamp,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Device {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// `/dev/nbdN`
    pub path: PathBuf,
    /// The connection, if it is connected.
    pub connection: Option<Connection>,
    /// In bytes; 0 when it is not connected.
    pub size: ByteSize,
    /// The backend identifier, byte for byte; none where there is none.
    pub backend: Option<String>,
    /// The volume, if it is ours.
    pub volume: Option<VolumeId>,
    /// How we know that it is ours.
    pub proof: Option<Proof>,
    /// What serves it, if it is ours.
    pub server: Option<Server>,
    /// Where it, or a partition of it, is mounted, in every mount namespace.
    pub mounts: Vec<Mounted>,
    /// Devices built on it, swap, filesystems that have it as a further member.
    pub holders: Vec<String>,
    /// Who has it open; none when nobody looked, since it could not matter.
    pub openers: Option<Vec<User>>,
    /// What it is to us; none when it is not connected.
    pub verdict: Option<Verdict>,
    /// Why.
    pub why: String,
    /// For a leak: when it was first seen so.
    pub leaked_since: Option<jiff::Timestamp>,
}

impl Device {
    /// Whether both are the same connection of the same device, as the same volume.
    pub fn is_same_connection(&self, other: &Device) -> bool {
        let id = |d: &Device| d.connection.as_ref().map(|c| (c.id, c.pid));
        self.index == other.index
            && id(self).is_some()
            && id(self) == id(other)
            && self.backend == other.backend
            && self.volume == other.volume
            && self.size == other.size
    }

    /// Whether it is connected.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }
}

/// Everything that a look found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Survey {
    /// By index.
    pub devices: Vec<Device>,
    /// How many there are, and may be.
    pub capacity: Capacity,
    /// Whether the kernel keeps backend identifiers; without them the journal tells what is ours.
    pub identifiers: bool,
    /// How many mount namespaces were looked into.
    pub namespaces: usize,
}

/// What to look at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scope {
    /// Also devices that are not connected.
    pub all: bool,
    /// Who has them open also where no verdict depends on it.
    pub openers: bool,
}

/// One connected device on its way to a verdict.
struct Draft {
    device: Device,
    names: Vec<String>,
    numbers: Vec<u64>,
    ownership: Ownership,
    served: Served,
    doubts: Vec<String>,
}

impl Draft {
    fn is_used(&self) -> bool {
        !self.device.mounts.is_empty()
            || !self.device.holders.is_empty()
            || self.device.openers.as_ref().is_some_and(|o| !o.is_empty())
    }

    fn is_ours(&self) -> bool {
        matches!(self.ownership, Ownership::Ours(..))
    }

    fn used_by(&self) -> Option<String> {
        let d = &self.device;
        if let Some(mount) = d.mounts.first() {
            return Some(match mount.in_namespace_of {
                None => format!("mounted at {}", mount.target.display()),
                Some(pid) => {
                    format!("mounted at {} in the mount namespace of process {pid}", mount.target.display())
                }
            });
        }
        if let Some(holder) = d.holders.first() {
            return Some(format!("held by {holder}"));
        }
        let openers = d.openers.as_ref().filter(|o| !o.is_empty())?;
        Some(format!("open in {}", crate::host::users::list(openers)))
    }
}

/// Takes a look.
///
/// # Errors
/// When not even the list of block devices can be read. Everything else that cannot be read makes the devices that it
/// is about `unknown`.
pub fn take(roots: &Roots, owners: &dyn Owners, scope: Scope) -> Result<Survey> {
    let block = roots.sys.join("block");
    let mut indices = Vec::new();
    let mut loops = Vec::new();
    for entry in std::fs::read_dir(&block).doing("read", &block)? {
        let name = entry.doing("read", &block)?.file_name();
        if let Some(index) = sysfs::index_of(Path::new(&name)) {
            indices.push(index);
        } else if name.to_string_lossy().starts_with("loop") {
            loops.push(block.join(name));
        }
    }
    indices.sort_unstable();
    let identifiers = has_identifiers(&roots.proc);
    let mut drafts = Vec::new();
    let mut devices = Vec::new();
    for index in &indices {
        match connection(&block, *index) {
            Ok(Some(connection)) => drafts.push(draft(*index, connection, vec![])),
            Ok(None) if scope.all => devices.push(blank(*index)),
            Ok(None) => {}
            // In doubt it counts as connected, and is unknown.
            Err(e) => {
                let none = Connection { id: 0, pid: None, since: jiff::Timestamp::UNIX_EPOCH };
                drafts.push(draft(*index, none, vec![format!("cannot read its pid file: {e}")]));
            }
        }
    }
    let connected = drafts.len();
    let capacity = capacity::of(&roots.sys, indices.len(), connected);
    let mut namespaces = 0;
    if connected > 0 {
        whose(&mut drafts, roots, owners, identifiers);
        let processes = Processes::look(&roots.proc);
        namespaces = processes.namespaces;
        in_use(&mut drafts, roots, &processes);
        opened(&mut drafts, roots, &processes, scope, connected);
        served(&mut drafts, owners, &processes, &loops);
        devices.extend(drafts.into_iter().map(|d| finish(d, owners, &block)));
        devices.sort_by_key(|d| d.index);
    }
    Ok(Survey { devices, capacity, identifiers: identifiers != Some(false), namespaces })
}

fn blank(index: u32) -> Device {
    Device {
        index,
        path: sysfs::path(index),
        connection: None,
        size: ByteSize(0),
        backend: None,
        volume: None,
        proof: None,
        server: None,
        mounts: vec![],
        holders: vec![],
        openers: None,
        verdict: None,
        why: "not connected".into(),
        leaked_since: None,
    }
}

fn draft(index: u32, connection: Connection, doubts: Vec<String>) -> Draft {
    let mut device = blank(index);
    device.connection = Some(connection);
    let (ownership, served) = (Ownership::Foreign, Served::Nobody);
    Draft { device, names: vec![], numbers: vec![], ownership, served, doubts }
}

/// None when it is not connected: then there is no such file.
fn connection(block: &Path, index: u32) -> std::io::Result<Option<Connection>> {
    use std::io::Read;
    let mut file = match std::fs::File::open(block.join(format!("nbd{index}/pid"))) {
        Ok(file) => file,
        Err(e) if is_gone(&e) => return Ok(None),
        Err(e) => return Err(e),
    };
    let meta = file.metadata()?;
    let mut text = [0; 32];
    let n = match file.read(&mut text) {
        Ok(n) => n,
        Err(e) if is_gone(&e) => return Ok(None),
        Err(e) => return Err(e),
    };
    let since = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Ok(Some(Connection {
        id: meta.ino(),
        pid: std::str::from_utf8(&text[..n]).ok().and_then(|t| t.trim().parse().ok()),
        since: jiff::Timestamp::try_from(since).unwrap_or(jiff::Timestamp::UNIX_EPOCH),
    }))
}

fn is_gone(e: &std::io::Error) -> bool {
    e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV)
}

/// Whether this kernel (from 5.14 on) has identifiers; none when its release makes no sense.
fn has_identifiers(proc: &Path) -> Option<bool> {
    let release = read_small(&proc.join("sys/kernel/osrelease")).ok()?;
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    let (major, minor): (u32, u32) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some((major, minor) >= (5, 14))
}

/// Size, identifier, and so: whose it is.
fn whose(drafts: &mut [Draft], roots: &Roots, owners: &dyn Owners, identifiers: Option<bool>) {
    // Asked once, and only where no identifier tells.
    let mut recorded = None;
    for draft in drafts {
        let index = draft.device.index;
        let connected_by = draft.device.connection.as_ref().and_then(|c| c.pid);
        let folder = roots.sys.join("block").join(format!("nbd{index}"));
        let backend = match read_small(&folder.join("backend")) {
            Ok(text) => Backend::Text(text.strip_suffix('\n').unwrap_or(&text).to_owned()),
            Err(e) if is_gone(&e) => match identifiers {
                Some(true) => Backend::Absent,
                Some(false) => Backend::Unsupported,
                None => {
                    Backend::Unreadable("it has no identifier, and the kernel's release is not known".into())
                }
            },
            Err(e) => Backend::Unreadable(format!("cannot read its backend identifier: {e}")),
        };
        match read_small(&folder.join("size")).map(|t| t.trim().parse::<u64>()) {
            Ok(Ok(sectors)) => draft.device.size = ByteSize(sectors.saturating_mul(512)),
            _ => draft.doubts.push("cannot read its size".into()),
        }
        let named = (backend == Backend::Unsupported)
            .then(|| recorded.get_or_insert_with(|| owners.recorded()).get(&index))
            .flatten()
            .and_then(|records| Recorded::among(records, connected_by));
        draft.ownership = ownership(&backend, named.as_ref());
        if let Backend::Text(text) = backend {
            draft.device.backend = Some(text);
        }
        if let Ownership::Ours(volume, proof) = &draft.ownership {
            (draft.device.volume, draft.device.proof) = (Some(volume.clone()), Some(*proof));
        }
    }
}

/// Mounts, holders, swap, members of a Btrfs.
fn in_use(drafts: &mut [Draft], roots: &Roots, processes: &Processes) {
    let partitions = partitions(&roots.proc);
    let members = btrfs_members(&roots.sys);
    for draft in drafts {
        let disk = format!("nbd{}", draft.device.index);
        let of_it = |name: &str| {
            name.strip_prefix(disk.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
        };
        match &partitions {
            Ok(all) => {
                for (number, name) in all.iter().filter(|(_, name)| of_it(name)) {
                    draft.numbers.push(*number);
                    draft.names.push(name.clone());
                }
            }
            Err(e) => draft.doubts.push(format!("cannot read the list of partitions: {e}")),
        }
        let folder = roots.sys.join("block").join(&disk);
        if !draft.names.contains(&disk) {
            // The kernel's list leaves out what has no size.
            match read_small(&folder.join("dev")).ok().as_deref().and_then(device_number) {
                Some(number) => draft.numbers.push(number),
                None => draft.doubts.push("cannot read its device number".into()),
            }
            draft.names.push(disk.clone());
        }
        draft.device.mounts = processes.mounts_of(&draft.numbers, &draft.names);
        for name in &draft.names {
            let holders =
                if *name == disk { folder.join("holders") } else { folder.join(name).join("holders") };
            match std::fs::read_dir(&holders) {
                Ok(entries) => {
                    for entry in entries {
                        match entry {
                            Ok(entry) => {
                                draft.device.holders.push(entry.file_name().to_string_lossy().into_owned())
                            }
                            Err(e) => draft.doubts.push(cannot_read(&holders, &e)),
                        }
                    }
                }
                Err(e) => draft.doubts.push(cannot_read(&holders, &e)),
            }
        }
        if processes.is_swap(&draft.names) {
            draft.device.holders.push("swap".into());
        }
        match &members {
            Ok(members) if draft.device.mounts.is_empty() => {
                let held = members.iter().filter(|(name, _)| draft.names.contains(name));
                draft.device.holders.extend(held.map(|(_, id)| format!("btrfs {id}")));
            }
            Ok(_) => {}
            Err(e) => draft.doubts.push(e.clone()),
        }
        draft.doubts.extend(processes.doubts.iter().cloned());
    }
}

/// `/proc/partitions`: the number and name of every block device that has a size.
fn partitions(proc: &Path) -> std::io::Result<Vec<(u64, String)>> {
    let text = std::fs::read_to_string(proc.join("partitions"))?;
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((makedev(major, minor), words.nth(1)?.to_owned()))
    };
    Ok(text.lines().filter_map(line).filter(|(_, name)| name.starts_with("nbd")).collect())
}

fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// The devices of every Btrfs that is mounted anywhere: mount tables only name one of several.
fn btrfs_members(sys: &Path) -> Result<Vec<(String, String)>, String> {
    let mut members = Vec::new();
    let all = sys.join("fs/btrfs");
    for id in names_in(&all)? {
        // What is there beside the filesystems, such as the features, has no devices.
        let devices = names_in(&all.join(&id).join("devices"))?;
        members.extend(devices.into_iter().map(|device| (device, id.clone())));
    }
    Ok(members)
}

/// What is in a folder of the kernel's; nothing when it is not there, or goes meanwhile.
fn names_in(folder: &Path) -> Result<Vec<String>, String> {
    let read = || -> std::io::Result<Vec<String>> {
        std::fs::read_dir(folder)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
    };
    match read() {
        Err(e) if is_gone(&e) => Ok(vec![]),
        names => names.map_err(|e| cannot_read(folder, &e)),
    }
}

fn cannot_read(path: &Path, e: &std::io::Error) -> String {
    format!("cannot read {}: {e}", path.display())
}

/// Who has them open, where that can matter: every process is asked for every file, so only if somebody may.
fn opened(drafts: &mut [Draft], roots: &Roots, processes: &Processes, scope: Scope, connected: usize) {
    let wanted = |d: &Draft| scope.openers || d.is_ours() && !d.is_used();
    if !drafts.iter().any(wanted) {
        return;
    }
    let used = drafts.iter().filter(|d| d.is_used()).count();
    if nobody_else(&roots.sys, connected, used) {
        for draft in drafts.iter_mut() {
            draft.device.openers = Some(vec![]);
        }
        return;
    }
    let devices: Vec<_> = drafts.iter().map(|d| d.numbers.clone()).collect();
    let (openers, doubts) = processes.openers(&devices);
    for (draft, openers) in drafts.iter_mut().zip(openers) {
        draft.device.openers = Some(openers);
        draft.doubts.extend(doubts.iter().cloned());
    }
}

/// Whether the module's own count of its users proves that nobody has any device open beyond what is known: each
/// connected device counts once, and each one in use at least once more. A kernel with NBD built in has no count.
fn nobody_else(sys: &Path, connected: usize, used: usize) -> bool {
    read_small(&sys.join("module/nbd/refcnt"))
        .is_ok_and(|text| text.trim().parse::<usize>().is_ok_and(|count| count <= connected + used))
}

/// Who serves ours; and for what would be a leak, every further look that could prove it is none.
fn served(drafts: &mut [Draft], owners: &dyn Owners, processes: &Processes, loops: &[PathBuf]) {
    let volumes: BTreeSet<VolumeId> = drafts.iter().filter_map(|d| d.device.volume.clone()).collect();
    if volumes.is_empty() {
        return;
    }
    let servers = owners.servers(&Vec::from_iter(volumes));
    // Looked at once, and only where it can matter.
    let (mut running, mut backing) = (None, None);
    for draft in drafts.iter_mut() {
        let Some(volume) = draft.device.volume.clone() else { continue };
        let known = servers.get(&volume).cloned().unwrap_or_default();
        let mut server = if known.may_serve(draft.device.index) { known.clone() } else { Server::default() };
        let mut doubt = None;
        if server.words().is_none() {
            // The same volume may be attached with other folders than ours.
            let running = running.get_or_insert_with(|| processes.servers());
            server.elsewhere = running.of(&volume, known.keeper);
            doubt = running.doubt.clone().or_else(|| {
                (!processes.sees_all())
                    .then(|| "not every process is seen from here: run it on the node itself".into())
            });
        }
        draft.served = match (server.words(), known.index, doubt) {
            (Some(words), ..) => Served::By(words),
            (None, Some(index), _) => {
                let pid = known.keeper.map_or_else(String::new, |pid| format!(" (pid {pid})"));
                Served::Another(format!("its volume's keeper{pid} has /dev/nbd{index}"))
            }
            (None, None, Some(doubt)) => Served::Unknown(doubt),
            (None, None, None) => Served::Nobody,
        };
        draft.device.server = Some(server);
        if !draft.served.is_somebody() && !draft.is_used() {
            let (files, doubts) = backing.get_or_insert_with(|| loop_files(loops));
            for (device, file) in files.iter() {
                if is_of(file, draft) {
                    draft.device.holders.push(device.clone());
                }
            }
            draft.doubts.extend(doubts.iter().cloned());
        }
    }
}

/// The files behind loop devices: one on top of a block device shows in no list of holders. And what could not be looked at.
fn loop_files(loops: &[PathBuf]) -> (Vec<(String, PathBuf)>, Vec<String>) {
    let (mut files, mut doubts) = (Vec::new(), Vec::new());
    for folder in loops {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = folder.join("loop/backing_file");
        match read_small(&path) {
            Ok(file) => files.push((name, PathBuf::from(file.trim_end_matches('\n')))),
            // It has none.
            Err(e) if is_gone(&e) => {}
            Err(e) => doubts.push(cannot_read(&path, &e)),
        }
    }
    (files, doubts)
}

fn is_of(file: &Path, draft: &Draft) -> bool {
    let Ok(name) = file.strip_prefix("/dev") else { return false };
    if draft.names.iter().any(|n| Path::new(n) == name) {
        return true;
    }
    // Another name of it, such as /dev/block/43:0; files in /dev are never on a filesystem that could be dead.
    std::fs::metadata(file).is_ok_and(|m| draft.numbers.contains(&m.rdev()))
}

fn finish(draft: Draft, owners: &dyn Owners, block: &Path) -> Device {
    let used_by = draft.used_by();
    let Draft { mut device, ownership, served, mut doubts, .. } = draft;
    let candidate = matches!(ownership, Ownership::Ours(..)) && used_by.is_none() && !served.is_somebody();
    let mut operation = None;
    if candidate {
        let at_work = device.volume.as_ref().and_then(|v| owners.at_work(v));
        operation = at_work.map(|pid| format!("a command is at work on its volume (pid {pid})"));
        // What was read of it may be of two connections.
        if connection(block, device.index).ok().flatten().map(|c| c.id)
            != device.connection.as_ref().map(|c| c.id)
        {
            doubts.push("it changed while it was looked at".into());
        }
    }
    let (verdict, why) = judge(&Evidence { ownership, used_by, served, operation, doubts });
    (device.verdict, device.why) = (Some(verdict), why);
    device
}
