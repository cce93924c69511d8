//! For tests on real NBD devices of the kernel: an nbdkit server to connect them to, foreign devices made by nbd-client,
//! and the proof that a test leaves the kernel's devices as it found them.
//!
//! Such tests run in a machine of scripts/vm (`make test-vm`), or on any machine with the module (`make test-nbd`). They
//! disconnect only devices that they connected themselves.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zerofsctl::host::nbd::{self, netlink, sysfs};
use zerofsctl::zerofs::nbd::{Export, handshake};

use super::dir::TestDir;
use super::{require_program, require_root, wait_until};

/// Against hangs.
pub const LONG: Duration = Duration::from_secs(60);

/// Fails, with what to do about it, unless the kernel has NBD devices that this test may use.
#[track_caller]
pub fn require_nbd() {
    require_root();
    if let Err(e) = nbd::ensure() {
        panic!(
            "{e} ({}). scripts/vm-test runs this test in a machine that has it",
            e.hint_text().unwrap_or_default()
        );
    }
}

/// Runs a program to its end; fails unless it succeeds. What it printed.
#[track_caller]
pub fn run(program: &str, args: &[&str]) -> String {
    let output = try_run(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Runs a program to its end, however that may be.
#[track_caller]
pub fn try_run(program: &str, args: &[&str]) -> Output {
    Command::new(require_program(program))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// A process that can be stopped, continued and killed; killed when dropped.
pub struct Victim(Child);

impl Victim {
    /// Starts it, with its output in the test's own.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Victim {
        Victim(command.stdin(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")))
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("a child that is not waited for takes signals");
    }

    /// SIGSTOP, and every thread of it stands still when this returns: a thread on its way may answer once more.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let threads = PathBuf::from(format!("/proc/{}/task", self.pid()));
        wait_until("every thread has stopped", LONG, || {
            fs::read_dir(&threads).expect("the process is there").flatten().all(|thread| {
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
            })
        });
    }

    /// Whether it has not ended.
    pub fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("a child can be asked").is_none()
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An nbdkit server on a unix socket of the test's folder, ended when dropped.
pub struct Nbdkit {
    socket: PathBuf,
    args: Vec<String>,
    file: Option<PathBuf>,
    server: Victim,
}

impl Nbdkit {
    /// Serves a file of this many bytes: what was written is still there after a kill and [`Nbdkit::restart`].
    #[track_caller]
    pub fn file(dir: &TestDir, name: &str, size: u64) -> Nbdkit {
        let file = dir.join(format!("{name}.img"));
        File::create(&file).and_then(|f| f.set_len(size)).expect("the test's folder can be written");
        let args = vec!["file".into(), file.display().to_string()];
        Nbdkit { file: Some(file), ..Nbdkit::start(dir, name, args) }
    }

    /// Serves memory of this many bytes.
    #[track_caller]
    pub fn memory(dir: &TestDir, name: &str, size: u64) -> Nbdkit {
        Nbdkit::start(dir, name, vec!["memory".into(), format!("size={size}")])
    }

    /// Serves what these arguments of nbdkit say: filters, a plugin, its parameters.
    #[track_caller]
    pub fn start(dir: &TestDir, name: &str, args: Vec<String>) -> Nbdkit {
        let socket = dir.join(format!("{name}.sock"));
        let server = serve(&socket, &args);
        Nbdkit { socket, args, file: None, server }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The file that it serves, if any.
    #[track_caller]
    pub fn served(&self) -> &Path {
        self.file.as_deref().expect("this server has no file")
    }

    /// The server, to be stopped, continued or killed.
    pub fn server(&mut self) -> &mut Victim {
        &mut self.server
    }

    /// Kills it and starts it again, on the same socket.
    #[track_caller]
    pub fn restart(&mut self) {
        self.server.kill();
        self.server = serve(&self.socket, &self.args);
    }

    /// Connections in the transmission phase, ready for the kernel, and what the server says of its export.
    #[track_caller]
    pub fn connections(&self, count: usize) -> (Vec<UnixStream>, Export) {
        let mut export = None;
        let streams = (0..count)
            .map(|_| {
                let mut stream = UnixStream::connect(&self.socket).expect("nbdkit listens");
                export = Some(handshake(&mut stream, "").expect("nbdkit speaks NBD"));
                stream
            })
            .collect();
        (streams, export.expect("at least one connection"))
    }
}

fn serve(socket: &Path, args: &[String]) -> Victim {
    // It writes this when it listens.
    let ready = socket.with_extension("pid");
    for old in [socket, &ready] {
        let _ = fs::remove_file(old);
    }
    let server = Victim::spawn(
        Command::new(require_program("nbdkit"))
            .args(["--foreground", "--exit-with-parent", "--unix"])
            .arg(socket)
            .arg("--pidfile")
            .arg(&ready)
            .args(args),
    );
    wait_until("nbdkit listens", LONG, || ready.exists());
    server
}

/// Disconnects whatever has this index, and returns when the kernel has let go.
#[track_caller]
pub fn disconnect(index: u32) {
    if let Some(device) = sysfs::one(index).expect("sysfs can be read") {
        nbd::disconnect_and_wait(&device, LONG).expect("the kernel lets go of the device");
    }
}

/// Borrows sockets as the netlink commands want them.
pub fn borrowed(sockets: &[UnixStream]) -> Vec<BorrowedFd<'_>> {
    sockets.iter().map(AsFd::as_fd).collect()
}

/// A device that the test connected. Disconnected when dropped; a test that unmounts nothing before loses data.
pub struct Device {
    index: u32,
}

impl Device {
    /// Connects a device by our own netlink commands; `change` sets what is not as usual: any index, the server's size
    /// and flags, blocks of 512 bytes, no backend identifier, and I/O that fails at once when the server dies.
    #[track_caller]
    pub fn connect(
        server: &Nbdkit,
        connections: usize,
        change: impl FnOnce(&mut netlink::Connect<'_>),
    ) -> Device {
        Device::try_connect(server, connections, change).expect("the kernel connects a device")
    }

    /// The same, for those who expect an error.
    #[track_caller]
    pub fn try_connect(
        server: &Nbdkit,
        connections: usize,
        change: impl FnOnce(&mut netlink::Connect<'_>),
    ) -> zerofsctl::error::Result<Device> {
        let (streams, export) = server.connections(connections);
        let sockets = borrowed(&streams);
        let mut options = netlink::Connect {
            index: None,
            size: export.size,
            block_size: 512,
            server_flags: u64::from(export.flags.bits()),
            client_flags: 0,
            dead_conn_timeout: Duration::ZERO,
            backend: None,
            sockets: &sockets,
        };
        change(&mut options);
        netlink::connect(&options).map(|index| Device { index })
    }

    /// A foreign device: connected by nbd-client, which knows nothing of us, on an index that is free.
    #[track_caller]
    pub fn foreign(server: &Nbdkit, connections: usize) -> Device {
        let index = free_index();
        run(
            "nbd-client",
            &[
                "-unix",
                &server.socket().to_string_lossy(),
                &sysfs::path(index).to_string_lossy(),
                "-connections",
                &connections.to_string(),
            ],
        );
        let device = Device { index };
        wait_until("nbd-client's device has its size", LONG, || device.state().size.0 != 0);
        device
    }

    /// The N of `/dev/nbdN`.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// `/dev/nbdN`
    pub fn path(&self) -> PathBuf {
        sysfs::path(self.index)
    }

    /// What sysfs says.
    #[track_caller]
    pub fn state(&self) -> sysfs::NbdDevice {
        sysfs::one(self.index).expect("sysfs can be read").expect("the device exists")
    }

    /// Gives the device new connections, as after a restart of its server.
    #[track_caller]
    pub fn reconnect(&self, server: &Nbdkit, connections: usize) {
        let (streams, _) = server.connections(connections);
        let backend = self.state().backend;
        let change = netlink::Reconfigure {
            sockets: &borrowed(&streams),
            // A device that has one takes no command without it.
            backend: backend.as_deref(),
            ..netlink::Reconfigure::default()
        };
        netlink::reconfigure(self.index, &change).expect("the kernel takes new connections");
    }

    /// Opened past the page cache.
    #[track_caller]
    pub fn open_direct(&self) -> File {
        File::options()
            .read(true)
            .write(!self.state().read_only)
            .custom_flags(libc::O_DIRECT)
            .open(self.path())
            .expect("the device can be opened")
    }

    /// Disconnects, and waits until the kernel has let go.
    #[track_caller]
    pub fn disconnect(self) {
        disconnect(self.index);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = netlink::disconnect(self.index);
    }
}

/// The lowest index that is not connected.
#[track_caller]
pub fn free_index() -> u32 {
    let devices = sysfs::all().expect("sysfs can be read");
    devices.iter().find(|d| !d.connected).expect("a free NBD device: modprobe nbd nbds_max=64").index
}

/// One block for I/O past the page cache, filled with a byte.
pub struct Block(Box<Aligned>);

#[repr(align(4096))]
struct Aligned([u8; Block::SIZE]);

impl Block {
    /// In bytes.
    pub const SIZE: usize = 4096;

    /// A block of this byte.
    pub fn of(byte: u8) -> Block {
        Block(Box::new(Aligned([byte; Block::SIZE])))
    }

    /// Writes it to the n-th block.
    pub fn write(&self, file: &File, n: u64) -> std::io::Result<()> {
        file.write_all_at(&self.0.0, n * Block::SIZE as u64)
    }

    /// Reads the n-th block.
    pub fn read(file: &File, n: u64) -> std::io::Result<Block> {
        let mut block = Block::of(0);
        file.read_exact_at(&mut block.0.0, n * Block::SIZE as u64)?;
        Ok(block)
    }

    /// Whether every byte of it is this one.
    pub fn is(&self, byte: u8) -> bool {
        self.0.0.iter().all(|&b| b == byte)
    }
}

/// A filesystem on a device, mounted in the test's folder; unmounted when dropped.
pub struct Mounted {
    dir: PathBuf,
    done: bool,
}

impl Mounted {
    /// Mounts a device that has a filesystem.
    #[track_caller]
    pub fn mount(device: &Path, dir: PathBuf, fs: &str) -> Mounted {
        fs::create_dir_all(&dir).expect("the test's folder can be written");
        run("mount", &["-t", fs, &device.to_string_lossy(), &dir.to_string_lossy()]);
        Mounted { dir, done: false }
    }

    /// Makes a filesystem (ext4, xfs or btrfs), and mounts it.
    #[track_caller]
    pub fn make(device: &Path, dir: PathBuf, fs: &str) -> Mounted {
        let device_name = device.to_string_lossy();
        match fs {
            "ext4" => run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", &device_name]),
            "xfs" => run("mkfs.xfs", &["-q", "-f", "-K", &device_name]),
            "btrfs" => run("mkfs.btrfs", &["-q", "-f", "-K", &device_name]),
            other => panic!("no such filesystem here: {other}"),
        };
        Mounted::mount(device, dir, fs)
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Unmounts; fails when that fails.
    #[track_caller]
    pub fn unmount(mut self) {
        self.done = true;
        run("umount", &[&self.dir.to_string_lossy()]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.done {
            let _ = nix::mount::umount2(&self.dir, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// The connected devices at one moment: index, and backend identifier. Whoever gets one of the others next must find its
/// queue as the kernel made it.
#[derive(Debug, PartialEq, Eq)]
pub struct Baseline(BTreeMap<u32, Option<String>>);

impl Baseline {
    /// As they are now.
    #[track_caller]
    pub fn take() -> Baseline {
        let devices = sysfs::all().expect("sysfs can be read");
        Baseline(devices.into_iter().filter(|d| d.connected).map(|d| (d.index, d.backend)).collect())
    }

    /// How many are connected.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Fails unless the same devices are connected again, with a moment for the last disconnect to take effect.
    #[track_caller]
    pub fn assert_back(&self) {
        let began = std::time::Instant::now();
        loop {
            let now = Baseline::take();
            if now == *self {
                for device in sysfs::all().expect("sysfs can be read").iter().filter(|d| !d.connected) {
                    let queue = sysfs::queue(device.index).expect("sysfs can be read");
                    assert_eq!(queue.io_timeout_ms, Some(30_000), "nbd{} has {queue:?}", device.index);
                }
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "connected NBD devices before: {:?}, now: {:?}",
                self.0,
                now.0
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The kernel's messages from one moment on.
pub struct KernelLog {
    mark: String,
}

impl KernelLog {
    /// From now on.
    #[track_caller]
    pub fn from_now() -> KernelLog {
        static MARKS: AtomicU32 = AtomicU32::new(0);
        let n = MARKS.fetch_add(1, Ordering::SeqCst);
        let mark = format!("zerofsctl's test {} looks from here on: {n}.", std::process::id());
        // Nobody reads a line that has not ended.
        fs::write("/dev/kmsg", format!("{mark}\n")).expect("the kernel's log can be written");
        KernelLog { mark }
    }

    /// Those that have come since. Fails when some of them have had to make room.
    #[track_caller]
    pub fn lines(&self) -> Vec<String> {
        let log = run("dmesg", &[]);
        let (_, since) = log.split_once(&self.mark).expect("the kernel's log reaches back to the mark");
        since.lines().skip(1).map(str::to_owned).collect()
    }
}
