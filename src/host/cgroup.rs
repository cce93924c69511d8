//! CPU and memory limits for one process by a control group (version 2) of its own.
//!
//! Limits are a comfort, not a promise: a machine may have no cgroup2, no controllers, or no permission to use
//! them. [`Cgroup::create`] then says so in words, and the caller decides whether that is a warning or an error.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Doing, Error, Result};

/// The folder, below the root of the hierarchy, that holds the groups of all volumes.
const PARENT: &str = "zerofsctl";

/// The length of a period of `cpu.max`, in microseconds (the kernel's own default).
const CPU_PERIOD: u64 = 100_000;

/// What a process may use; none means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// CPU time in thousandths of one CPU: 1500 is one and a half.
    pub cpu_millis: Option<u32>,
    /// Memory in bytes; a process that needs more is killed by the kernel.
    pub memory_bytes: Option<u64>,
}

impl Limits {
    /// Whether there is no limit at all.
    pub fn is_none(&self) -> bool {
        *self == Limits::default()
    }
}

/// One control group that we made.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// Where the cgroup2 hierarchy is mounted, out of the text of `/proc/self/mountinfo`.
pub fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, rest) = line.split_once(" - ")?;
        (rest.split(' ').next() == Some("cgroup2"))
            .then(|| mount.split(' ').nth(4))
            .flatten()
            .map(|point| PathBuf::from(point.replace("\\040", " ")))
    })
}

fn root() -> Result<Option<PathBuf>> {
    let path = "/proc/self/mountinfo";
    Ok(mount_point(&fs::read_to_string(path).doing("read", path)?))
}

impl Cgroup {
    /// Makes the group `zerofsctl/<name>` below the cgroup2 mount point and sets its limits; a group of that name
    /// that was left behind is used again.
    ///
    /// Also tells each limit that could not be set, in words. Fails when there can be no group at all.
    pub fn create(name: &str, limits: Limits) -> Result<(Cgroup, Vec<String>)> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").doing("read", "/proc/self/mountinfo")?;
        let root = mount_point(&mountinfo).ok_or_else(|| {
            Error::environment("no cgroup2 hierarchy is mounted, so CPU and memory cannot be limited")
                .hint("mount one: mount -t cgroup2 none /sys/fs/cgroup/unified; or attach without limits")
        })?;
        Self::create_below(&root, name, limits)
    }

    /// The group of that name, if it was made before and is still there.
    pub fn find(name: &str) -> Option<Cgroup> {
        let path = root().ok()??.join(PARENT).join(name);
        path.is_dir().then_some(Cgroup { path })
    }

    fn create_below(root: &Path, name: &str, limits: Limits) -> Result<(Cgroup, Vec<String>)> {
        let path = root.join(PARENT).join(name);
        fs::create_dir_all(&path).doing("make the control group", &path)?;
        let group = Cgroup { path };
        let mut problems = Vec::new();
        let cpu = limits.cpu_millis.map(|millis| {
            // A quota below 1 ms is refused by the kernel.
            format!("{} {CPU_PERIOD}", (u64::from(millis) * CPU_PERIOD / 1000).max(1000))
        });
        let wanted = [
            ("cpu", "cpu.max", cpu),
            ("memory", "memory.max", limits.memory_bytes.map(|bytes| bytes.to_string())),
        ];
        for (controller, file, value) in wanted {
            let Some(value) = value else { continue };
            // A controller must be handed down at each level above the group; already so is fine.
            for level in [root.to_path_buf(), root.join(PARENT)] {
                let _ = fs::write(level.join("cgroup.subtree_control"), format!("+{controller}"));
            }
            // Opened, not created: without the controller there is no such file.
            let set = File::options()
                .write(true)
                .open(group.path.join(file))
                .and_then(|mut f| io::Write::write_all(&mut f, value.as_bytes()));
            match set {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => problems.push(format!(
                    "the {controller} limit is not in force: this machine's cgroup2 hierarchy does not offer the {controller} controller"
                )),
                Err(e) => problems.push(format!("the {controller} limit is not in force: {e}")),
            }
        }
        Ok((group, problems))
    }

    /// The file to which a process writes `0` to enter the group, open for writing.
    pub fn entrance(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        File::options().write(true).open(&path).doing("open", &path)
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        events.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Removes the group; it must be empty (the kernel may take a moment to notice that).
    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(e).doing("remove the control group", &self.path),
            }
        }
        // The last one out removes the common parent; others still in there make this fail, rightly.
        if let Some(parent) = self.path.parent().filter(|p| p.file_name() == Some(OsStr::new(PARENT))) {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_point_is_found_by_filesystem_type() {
        let text = "30 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                    31 25 0:27 / /sys/fs/cgroup/my\\040unified rw shared:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(text), Some(PathBuf::from("/sys/fs/cgroup/my unified")));
        assert_eq!(mount_point("30 25 0:26 / /x rw - tmpfs cgroup2 rw\n"), None);
    }

    #[test]
    fn limits_are_written_where_the_controllers_are_and_reported_where_not() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("zerofsctl/vol1");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("cpu.max"), "").unwrap();
        let limits = Limits { cpu_millis: Some(1500), memory_bytes: Some(1 << 30) };
        let (_, problems) = Cgroup::create_below(root.path(), "vol1", limits).unwrap();
        assert_eq!(fs::read_to_string(dir.join("cpu.max")).unwrap(), "150000 100000");
        assert!(!dir.join("memory.max").exists());
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("memory controller"), "{problems:?}");
    }

    #[test]
    fn root_a_process_enters_a_real_group_and_the_group_goes() {
        let name = format!("test-{}", std::process::id());
        let (group, _) = Cgroup::create(&name, Limits::default()).expect("needs root and a cgroup2 mount");
        let null = File::options().append(true).open("/dev/null").unwrap();
        let p = crate::keeper::process::Launch {
            program: Path::new("/bin/sleep"),
            name: None,
            args: vec!["60".into()],
            env: vec![],
            cwd: Path::new("/"),
            output: &null,
            answer: None,
            cgroup: Some(&group.entrance().unwrap()),
        }
        .start()
        .unwrap();
        assert!(Cgroup::find(&name).is_some());
        let inside = fs::read_to_string(format!("/proc/{}/cgroup", p.identity().pid)).unwrap();
        p.kill(Duration::from_secs(5)).unwrap().expect("sleep dies");
        assert!(inside.contains(&format!("zerofsctl/{name}")), "{inside}");
        assert_eq!(group.oom_kills(), 0);
        group.remove().unwrap();
        assert!(Cgroup::find(&name).is_none());
    }
}
