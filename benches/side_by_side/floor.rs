//! The floor: the same volume attached by hand, with nothing but what cannot be left out. Spawn ZeroFS, wait
//! until both sockets answer, make the disk, nbdfuse, a loop device, mkfs, mount.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zerofsctl::error::Kind;
use zerofsctl::zerofs::config::{self, Aws, ConfigInput, Lsm};
use zerofsctl::zerofs::versions::Profile;
use zerofsctl::zerofs::{nbd, ninep, sock};

use crate::support;
use crate::support::zerofs::version;

/// The export that zerofsctl uses too.
const EXPORT: &str = "disk";
const LIMIT: Duration = Duration::from_secs(60);
/// How often to ask whether a socket answers. Far below what is measured, and cheap enough for two cores.
const POLL: Duration = Duration::from_millis(2);

/// A ZeroFS server of ours, or another NBD server, that runs; ended when dropped.
pub struct Server {
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// How long each part of the floor took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Until both sockets answered.
    pub server: Duration,
    /// Until the disk was there, or was seen to be there.
    pub disk: Duration,
    /// Until there was a block device.
    pub device: Duration,
    /// mkfs: only for a fresh volume.
    pub mkfs: Duration,
    /// mount.
    pub mount: Duration,
}

impl Times {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.server + self.disk + self.device + self.mkfs + self.mount
    }
}

/// The folders of one volume attached by hand.
pub struct Floor {
    dir: PathBuf,
    size: u64,
    profile: Profile,
}

/// A floor that is attached.
pub struct Attached {
    /// What it took.
    pub times: Times,
    mount: PathBuf,
    device: Device,
    server: Server,
}

impl Attached {
    /// Unmounts and stops everything, in order.
    pub fn detach(self) {
        run("umount", &[self.mount.as_ref()]);
        drop(self.device);
        drop(self.server);
    }
}

impl Floor {
    /// A volume in `dir`, which must have a short path; its data goes to `dir/store`.
    pub fn new(dir: &Path, size: u64) -> Floor {
        fs::create_dir_all(dir.join("mnt")).expect("the bench's folder can be written");
        // Asked here, before any clock runs: by hand one knows the version.
        let profile = Profile::of(version()).expect("a known version of ZeroFS");
        Floor { dir: dir.into(), size, profile }
    }

    /// The whole attach. Whether the volume is fresh shows by itself: by whether the disk exists.
    pub fn attach(&self) -> Attached {
        let began = Instant::now();
        let server = self.start_server();
        let mut times = Times { server: began.elapsed(), ..Times::default() };

        let began = Instant::now();
        let fresh = self.ensure_disk();
        times.disk = began.elapsed();

        let began = Instant::now();
        let device = Device::attach(&self.dir);
        times.device = began.elapsed();

        if fresh {
            let began = Instant::now();
            // With the options of zerofsctl: by hand, too, one knows that there is nothing to discard.
            let options = ["-q", "-F", "-E", "nodiscard"].map(AsRef::as_ref);
            run("mkfs.ext4", &[options.as_slice(), &[device.path.as_ref()]].concat());
            times.mkfs = began.elapsed();
        }

        let began = Instant::now();
        let mount = self.dir.join("mnt");
        run("mount", &["-t".as_ref(), "ext4".as_ref(), device.path.as_ref(), mount.as_ref()]);
        times.mount = began.elapsed();
        Attached { times, mount, device, server }
    }

    /// Makes the disk, unless it is there; true when it was made.
    pub fn ensure_disk(&self) -> bool {
        let missing = ninep::disk_size(&self.dir, EXPORT).expect("ZeroFS answers").is_none();
        if missing {
            ninep::create_disk(&self.dir, EXPORT, self.size).expect("the disk can be made");
        }
        missing
    }

    /// Starts ZeroFS and waits until both sockets answer, not only accept.
    pub fn start_server(&self) -> Server {
        for socket in ["9p.sock", "nbd.sock", "rpc.sock"] {
            let _ = fs::remove_file(self.dir.join(socket));
        }
        fs::write(self.dir.join("config.toml"), self.config()).expect("the bench's folder can be written");
        let log = File::create(self.dir.join("zerofs.log")).expect("the bench's folder can be written");
        let child = Command::new(support::zerofs_bin())
            .args(["run", "--config", "config.toml"])
            .current_dir(&self.dir)
            .env_clear()
            .env("RUST_LOG", self.profile.rust_log(None))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be cloned"))
            .stderr(log)
            .spawn()
            .expect("zerofs can be started");
        let mut server = Server { child };
        self.wait(&mut server, "9P answers", || ninep::Ninep::open(&self.dir, LIMIT).is_ok());
        // A fresh volume has no disk yet: that there is none is an answer, too.
        self.wait(&mut server, "NBD answers", || {
            sock::connect(&self.dir, "nbd.sock").is_ok_and(|mut stream| {
                nbd::handshake(&mut stream, EXPORT).map_or_else(|e| e.kind() == Kind::NotFound, |_| true)
            })
        });
        server
    }

    fn wait(&self, server: &mut Server, what: &str, mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            let ended = server.child.try_wait().expect("a child can be asked");
            assert!(
                ended.is_none() && began.elapsed() < LIMIT,
                "{what}: {ended:?}, see {}",
                self.dir.display()
            );
            std::thread::sleep(POLL);
        }
    }

    /// The very config that zerofsctl renders for the embedded store.
    fn config(&self) -> String {
        let input = ConfigInput {
            storage_url: format!("file://{}/store", self.dir.display()),
            password: "bench-bench-bench".to_owned().into(),
            cache_dir: self.dir.join("cache"),
            cache_disk_gb: 1.0,
            cache_memory_gb: Some(1.0),
            device_size: self.size,
            max_size_gb: None,
            lsm: Lsm::default(),
            aws: Aws::default(),
            read_only: false,
        };
        config::render(&input, &self.profile).expect("a config").to_string()
    }
}

/// A block device by nbdfuse and losetup, on the NBD server at `DIR/nbd.sock`.
pub struct Device {
    /// The loop device.
    pub path: PathBuf,
    fuse: PathBuf,
    nbdfuse: Child,
}

impl Device {
    /// Mounts `DIR/fuse` and puts a loop device with direct I/O on the file in it.
    pub fn attach(dir: &Path) -> Device {
        let fuse = dir.join("fuse");
        fs::create_dir_all(&fuse).expect("the bench's folder can be written");
        let uri = format!("nbd+unix:///{EXPORT}?socket={}/nbd.sock", dir.display());
        let mut nbdfuse = Command::new(support::require_program("nbdfuse"))
            .arg(fuse.join(EXPORT))
            .arg(uri)
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdfuse can be started");
        let file = fuse.join(EXPORT);
        let began = Instant::now();
        while !file.exists() {
            let ended = nbdfuse.try_wait().expect("a child can be asked");
            assert!(
                ended.is_none() && began.elapsed() < LIMIT,
                "nbdfuse does not serve {uri_dir}: {ended:?}",
                uri_dir = dir.display()
            );
            std::thread::sleep(POLL);
        }
        Device { path: attach_loop(&file), fuse, nbdfuse }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run("losetup", &["--detach".as_ref(), self.path.as_ref()]);
        // The loop device lets go of the file a moment after losetup returns.
        let began = Instant::now();
        while !Command::new("fusermount3")
            .arg("-u")
            .arg(&self.fuse)
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|s| s.success())
        {
            assert!(began.elapsed() < LIMIT, "{} stays busy", self.fuse.display());
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.nbdfuse.wait();
    }
}

/// A loop device with direct I/O on `file`.
pub fn attach_loop(file: &Path) -> PathBuf {
    let out =
        run("losetup", &["--find".as_ref(), "--show".as_ref(), "--direct-io=on".as_ref(), file.as_ref()]);
    PathBuf::from(out.trim())
}

/// Runs a program to its end and returns what it printed; any failure ends the bench.
pub fn run(program: &str, args: &[&std::ffi::OsStr]) -> String {
    let out = Command::new(support::require_program(program))
        .args(args)
        .output()
        .expect("a program can be started");
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
