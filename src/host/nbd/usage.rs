//! Who uses NBD devices, from one pass over `/proc`: mounts in every mount namespace, swap, open files.
//!
//! A namespace is read once, however many processes share it. What may not be read is told as a doubt, so that
//! "nobody" is never concluded from a closed door.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use nix::sys::stat::major;
use serde::Serialize;

use crate::file_lock::is_dying;
use crate::host::User;
use crate::host::mounts::DeviceLine;
use crate::host::users::block_number;
use crate::keeper::process::MARKER;
use crate::values::VolumeId;

/// The number of the first mount namespace's process namespace: the one in which every process is seen.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// A mount of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mounted {
    /// Where, as its namespace sees it.
    pub target: PathBuf,
    /// A process of that mount namespace; none for our own namespace.
    pub in_namespace_of: Option<u32>,
}

/// What a process that serves a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// By its arguments.
    Keeper,
    /// By its marker.
    Zerofs,
}

/// A process that serves a volume, as it looks from outside: nobody has asked it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Serving {
    /// What it is.
    pub program: Program,
    /// The process.
    pub pid: u32,
    /// The volume's run folder that it works with.
    pub run_dir: PathBuf,
}

impl std::fmt::Display for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let program = match self.program {
            Program::Keeper => "keeper",
            Program::Zerofs => "ZeroFS",
        };
        // Anybody may choose the folder's name, and this goes to a terminal.
        let folder = self.run_dir.to_string_lossy();
        write!(f, "a {program} runs with the run folder {} (pid {})", folder.escape_debug(), self.pid)
    }
}

/// Everything that serves any volume.
#[derive(Debug, Default)]
pub struct Servers {
    /// By volume, the keepers first.
    found: BTreeMap<String, BTreeSet<Serving>>,
    /// What could not be looked at.
    pub doubt: Option<String>,
}

impl Servers {
    /// One that serves the volume; none that works with the same run folder as the process `except`.
    pub fn of(&self, volume: &VolumeId, except: Option<u32>) -> Option<Serving> {
        let all = self.found.get(volume.as_str())?;
        let known = all.iter().find(|s| Some(s.pid) == except).map(|s| &s.run_dir);
        all.iter().find(|s| Some(&s.run_dir) != known).cloned()
    }
}

/// Everything that one pass found.
#[derive(Debug, Default)]
pub struct Processes {
    proc: PathBuf,
    /// Every process.
    pub pids: Vec<u32>,
    /// How many mount namespaces there are.
    pub namespaces: usize,
    /// Mounts of block devices, and where each device's are, by its number and by its name below `/dev`.
    mounts: Vec<Mounted>,
    by_number: HashMap<u64, Vec<usize>>,
    by_name: HashMap<String, Vec<usize>>,
    /// `/proc/swaps`
    swaps: Vec<String>,
    /// What could not be looked at.
    pub doubts: Vec<String>,
}

impl Processes {
    /// Looks at every process once.
    pub fn look(proc: &Path) -> Processes {
        let mut all = Processes { proc: proc.to_owned(), ..Processes::default() };
        match std::fs::read_dir(proc) {
            Ok(entries) => {
                all.pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
                all.pids.sort_unstable();
            }
            Err(e) => all.doubts.push(format!("cannot read {}: {e}", proc.display())),
        }
        let mut spaces: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        let mut closed = 0;
        for pid in &all.pids {
            match namespace(proc, &pid.to_string()) {
                Ok(Some(ns)) => spaces.entry(ns).or_default().push(*pid),
                // It has ended.
                Ok(None) => {}
                Err(_) => closed += 1,
            }
        }
        if closed > 0 {
            all.doubts.push(format!("the mounts of {closed} processes may not be read: run it as root"));
        }
        let own = namespace(proc, "self").ok().flatten();
        if own.is_none() {
            all.doubts.push("our own mount namespace is not known".into());
        }
        all.namespaces = spaces.len();
        let mut pinned = BTreeSet::new();
        for (ns, pids) in &spaces {
            all.read_namespace(pids, own == Some(*ns), &mut pinned);
        }
        for ns in pinned.difference(&spaces.keys().copied().collect()) {
            all.doubts
                .push(format!("mount namespace {ns} is kept without a process: its mounts are not seen"));
        }
        match swaps(proc) {
            Ok(swaps) => all.swaps = swaps,
            Err(e) => all.doubts.push(format!("cannot read {}: {e}", proc.join("swaps").display())),
        }
        all
    }

    fn read_namespace(&mut self, pids: &[u32], own: bool, pinned: &mut BTreeSet<u64>) {
        for pid in pids {
            let path = self.proc.join(pid.to_string()).join("mountinfo");
            let text = match std::fs::read(&path) {
                Ok(text) => text,
                // It ended meanwhile; another process of the namespace will do.
                Err(e) if ended(&e) => continue,
                Err(e) => {
                    self.doubts.push(format!("cannot read {}: {e}", path.display()));
                    return;
                }
            };
            let in_namespace_of = (!own).then_some(*pid);
            for line in String::from_utf8_lossy(&text).lines() {
                let Some(seen) = DeviceLine::parse(line) else { continue };
                if seen.fs == "nsfs" {
                    pinned.extend(number(seen.root));
                } else if major(seen.dev) != 0 || seen.source.starts_with("/dev/") {
                    // Other lines are of pseudo filesystems, which no device is below.
                    let at = self.mounts.len();
                    self.mounts.push(Mounted { target: seen.target(), in_namespace_of });
                    self.by_number.entry(seen.dev).or_default().push(at);
                    if let Some(name) = seen.source.strip_prefix("/dev/") {
                        self.by_name.entry(name.to_owned()).or_default().push(at);
                    }
                }
            }
            return;
        }
    }

    /// The mounts of a device and its partitions, by their numbers and names; those of our own namespace first.
    pub fn mounts_of(&self, numbers: &[u64], names: &[String]) -> Vec<Mounted> {
        let by_number = numbers.iter().filter_map(|n| self.by_number.get(n));
        let by_name = names.iter().filter_map(|n| self.by_name.get(n));
        let places: BTreeSet<usize> = by_number.chain(by_name).flatten().copied().collect();
        let mut found: Vec<Mounted> = places.into_iter().map(|at| self.mounts[at].clone()).collect();
        found.sort_by_key(|m| m.in_namespace_of);
        found
    }

    /// Whether it is swapped to.
    pub fn is_swap(&self, names: &[String]) -> bool {
        self.swaps.iter().any(|s| s.strip_prefix("/dev/").is_some_and(|s| names.iter().any(|n| n == s)))
    }

    /// Who has which of the devices open: asks every process for every open file, which costs, so only when it
    /// matters. `devices` are the numbers of each device and its partitions; the answer has the same order. Our own
    /// process is left out.
    pub fn openers(&self, devices: &[Vec<u64>]) -> (Vec<Vec<User>>, Vec<String>) {
        let mut found = vec![Vec::new(); devices.len()];
        let mut closed = 0;
        for pid in self.pids.iter().filter(|pid| **pid != std::process::id()) {
            let folder = self.proc.join(pid.to_string()).join("fd");
            let entries = match std::fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(e) if ended(&e) => continue,
                Err(_) => {
                    closed += 1;
                    continue;
                }
            };
            let mut here = BTreeSet::new();
            for entry in entries.flatten() {
                let Some(dev) = block_number(&entry.path()) else { continue };
                here.extend(devices.iter().position(|numbers| numbers.contains(&dev)));
            }
            // Whoever was killed does nothing with it any more, and may only be able to end when the device is gone.
            if here.is_empty() || is_dying(*pid as i32) {
                continue;
            }
            for at in here {
                found[at].push(User { pid: *pid, name: self.name(*pid) });
            }
        }
        let doubt = format!("the open files of {closed} processes may not be read: run it as root");
        (found, if closed > 0 { vec![doubt] } else { vec![] })
    }

    fn name(&self, pid: u32) -> String {
        read_small(&self.proc.join(pid.to_string()).join("comm"))
            .map_or_else(|_| "?".into(), |n| n.trim_end().to_owned())
    }

    /// Everything that serves a volume, wherever its run folder is.
    pub fn servers(&self) -> Servers {
        let (mut servers, mut closed) = (Servers::default(), 0);
        for pid in &self.pids {
            let folder = self.proc.join(pid.to_string());
            for file in ["cmdline", "environ"] {
                match std::fs::read(folder.join(file)) {
                    Ok(bytes) => {
                        let Some((program, run_dir)) = serving(&bytes) else { continue };
                        let Some(volume) = run_dir.file_name().and_then(|n| n.to_str()) else { continue };
                        let all = servers.found.entry(volume.to_owned()).or_default();
                        all.insert(Serving { program, pid: *pid, run_dir });
                    }
                    Err(e) if ended(&e) => {}
                    Err(_) => closed += 1,
                }
            }
        }
        servers.doubt = (closed > 0)
            .then(|| format!("{closed} files of other users' processes may not be read: run it as root"));
        servers
    }

    /// Whether we see every process of the machine; in a container that has its own process namespace we do not.
    pub fn sees_all(&self) -> bool {
        std::fs::read_link(self.proc.join("self/ns/pid")).is_ok_and(|l| l == Path::new(FIRST_PID_NAMESPACE))
    }
}

/// What is swapped to; a kernel without swap has no such file.
fn swaps(proc: &Path) -> std::io::Result<Vec<String>> {
    let text = match std::fs::read(proc.join("swaps")) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e),
    };
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().skip(1).filter_map(|l| Some(l.split_whitespace().next()?.to_owned())).collect())
}

/// The volume's run folder that a process's NUL-separated words name: a keeper's arguments, or a ZeroFS's environment.
fn serving(bytes: &[u8]) -> Option<(Program, PathBuf)> {
    let mut words = bytes.split(|b| *b == 0);
    let (program, folder) = words.find_map(|word| match word {
        b"--volume-run-dir" => Some((Program::Keeper, None)),
        _ => {
            let folder = word.strip_prefix(MARKER.as_bytes())?.strip_prefix(b"=")?;
            Some((Program::Zerofs, Some(folder)))
        }
    })?;
    let folder = folder.or_else(|| words.next())?;
    Some((program, PathBuf::from(&*String::from_utf8_lossy(folder))))
}

/// A small file of the kernel's, in one read.
pub(super) fn read_small(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut buffer = [0; 4096];
    let n = std::fs::File::open(path)?.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

/// The kernel's ways to say that a process is no more.
fn ended(e: &std::io::Error) -> bool {
    e.kind() == ErrorKind::NotFound || matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EINVAL))
}

fn namespace(proc: &Path, of: &str) -> std::io::Result<Option<u64>> {
    match std::fs::read_link(proc.join(of).join("ns/mnt")) {
        Ok(link) => Ok(number(&link.to_string_lossy())),
        Err(e) if ended(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// `mnt:[4026531841]`
fn number(link: &str) -> Option<u64> {
    link.strip_prefix("mnt:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_told_by_their_run_folder() {
        let keeper = b"/proc/self/exe\0keeper\0--volume-run-dir\0/run/other/volumes/vol1\0";
        assert_eq!(serving(keeper), Some((Program::Keeper, "/run/other/volumes/vol1".into())));
        let zerofs = b"PATH=/bin\0ZEROFSCTL_RUN_DIR=/run/zerofsctl/volumes/vol2\0TZ=UTC\0";
        assert_eq!(serving(zerofs), Some((Program::Zerofs, "/run/zerofsctl/volumes/vol2".into())));
        for other in [
            &b""[..],
            b"--volume-run-dir",
            b"x--volume-run-dir\0/a/vol1\0",
            b"XZEROFSCTL_RUN_DIR=/a/vol1\0",
            b"ZEROFSCTL_RUN_DIRS=/a/vol1\0",
        ] {
            assert_eq!(serving(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn namespace_numbers() {
        assert_eq!(number("mnt:[4026531841]"), Some(4026531841));
        assert_eq!(number("net:[4026531841]"), None);
        assert_eq!(number("mnt:[]"), None);
    }
}
