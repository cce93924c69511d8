//! The keeper behind devices of the kernel's nbd driver, with the real ZeroFS. Needs root and a kernel with the nbd
//! module, which most development machines lack: these tests run in the virtual machine.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::keeper::{LONG, SIZE, Volume, client, nothing_left, ready, signal, start, stop, stop_with};
use support::wait_until;
use zerofsctl::error::Kind;
use zerofsctl::host::nbd::{self, netlink, sysfs};
use zerofsctl::keeper::control::{ConnectOptions, NbdPath, NbdStatus, State};
use zerofsctl::keeper::device::queue;
use zerofsctl::zerofs::ninep;

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(support::require_program(program)).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        // Only for a test that fails: the next one shall find the machine as it was.
        if std::thread::panicking() {
            eprintln!("{}", self.v.logs());
            if let Some(dir) = &self.mount {
                let _ = Command::new("umount").arg("-l").arg(dir).status();
            }
            let _ = netlink::disconnect(self.index);
        }
    }
}

/// A volume whose NBD device is connected.
struct Disk<'a> {
    v: &'a Volume,
    index: u32,
    mount: Option<PathBuf>,
}

impl Disk<'_> {
    fn attach<'a>(v: &'a Volume, options: &ConnectOptions) -> Disk<'a> {
        support::require_root();
        nbd::ensure().unwrap();
        ready(&v.config);
        ninep::create_disk(&v.config.run_dir, "disk", SIZE).unwrap();
        let mut client = client(&v.config).within(LONG);
        let (index, size) = client.connect_nbd(options).unwrap();
        assert_eq!(size, SIZE);
        Disk { v, index, mount: None }
    }

    fn device(&self) -> PathBuf {
        sysfs::path(self.index)
    }

    fn status(&self) -> NbdStatus {
        client(&self.v.config).status().unwrap().nbd.unwrap()
    }

    fn mount(&mut self) -> PathBuf {
        let device = self.device();
        run("mkfs.ext4", &["-q", "-E", "nodiscard", device.to_str().unwrap()]);
        let dir = self.v.dir.join("mnt");
        fs::create_dir_all(&dir).unwrap();
        run("mount", &["-t", "ext4", device.to_str().unwrap(), dir.to_str().unwrap()]);
        self.mount = Some(dir.clone());
        dir
    }

    fn unmount(&mut self) {
        if let Some(dir) = self.mount.take() {
            run("umount", &[dir.to_str().unwrap()]);
        }
    }

    /// Takes it all down, and shows that the filesystem is sound and nothing is left.
    fn detach(mut self) {
        if self.mount.is_some() {
            self.unmount();
            run("e2fsck", &["-fn", self.device().to_str().unwrap()]);
        }
        client(&self.v.config).within(Duration::from_secs(90)).disconnect(false).unwrap();
        let free = sysfs::one(self.index).unwrap().unwrap();
        assert!(!free.connected && free.backend.is_none() && free.size.0 == 0, "{free:?}");
        stop(&self.v.config);
    }

    fn zerofs(&self) -> i32 {
        let mut pid = 0;
        wait_until("ZeroFS is there", LONG, || {
            pid = client(&self.v.config).status().unwrap().zerofs.map_or(0, |z| z.pid);
            pid != 0
        });
        pid
    }

    fn kill_zerofs(&self) {
        signal(self.zerofs(), Signal::SIGKILL);
    }

    fn kill_keeper(&self) {
        let pid = client(&self.v.config).ping().unwrap().pid;
        signal(pid, Signal::SIGKILL);
        wait_until("the keeper is gone", LONG, || {
            zerofsctl::keeper::process::Identity::read(&self.v.config.run_dir.join("keeper.pid"))
                .is_none_or(|i| !i.is_alive())
        });
    }

    /// The next keeper, once the device has its sockets.
    fn next_keeper(&self, reconnects: u64) {
        start(&self.v.config);
        wait_until("the device is taken over", LONG, || self.status().reconnects >= reconnects);
    }
}

fn write_and_sync(path: &Path, fill: u8) {
    fs::write(path, vec![fill; 3 << 20]).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

/// Past the page cache.
fn holds(path: &Path, fill: u8) -> bool {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    fs::read(path).unwrap() == vec![fill; 3 << 20]
}

#[test]
fn vm_nbd_the_whole_story_with_every_process_killed_once() {
    let v = Volume::new();
    let mut disk = Disk::attach(&v, &ConnectOptions::default());
    let shown = sysfs::one(disk.index).unwrap().unwrap();
    assert!(shown.connected && !shown.read_only, "{shown:?}");
    assert_eq!((shown.size.0, shown.backend.as_deref()), (SIZE, Some("zerofs:vol1")));
    let status = disk.status();
    assert_eq!((status.index, status.connections, status.connected), (Some(disk.index), 1, true));
    // Asked again, it says the same.
    let again = client(&v.config).within(LONG).connect_nbd(&ConnectOptions::default()).unwrap();
    assert_eq!(again, (disk.index, SIZE));
    // Neither a stop nor the other transport gets it away from under its users.
    assert_eq!(stop_with(&v.config, 5.0, false).unwrap_err().kind(), Kind::Busy);
    assert_eq!(client(&v.config).within(LONG).mount().unwrap_err().kind(), Kind::Busy);

    let dir = disk.mount();
    write_and_sync(&dir.join("a"), 1);
    let killed = disk.zerofs();
    disk.kill_zerofs();
    write_and_sync(&dir.join("b"), 2);
    assert_ne!(disk.zerofs(), killed);
    assert!(holds(&dir.join("a"), 1) && holds(&dir.join("b"), 2));

    // As a keeper leaves it that is killed before it has come to the queue.
    let kernels = sysfs::Queue { io_timeout_ms: Some(30_000), ..sysfs::Queue::default() };
    sysfs::set_queue(disk.index, &kernels).unwrap();
    disk.kill_keeper();
    let (path, writer) = (dir.join("c"), std::thread::spawn);
    let waiting = writer(move || write_and_sync(&path, 3));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished(), "I/O goes on without a keeper");
    disk.next_keeper(1);
    waiting.join().unwrap();
    assert!(holds(&dir.join("a"), 1) && holds(&dir.join("b"), 2) && holds(&dir.join("c"), 3));
    let wanted = queue(NbdPath::Guarded).io_timeout_ms;
    wait_until("the queue is set", LONG, || sysfs::queue(disk.index).unwrap().io_timeout_ms == wanted);

    let (path, zerofs) = (dir.join("d"), disk.zerofs());
    disk.kill_keeper();
    signal(zerofs, Signal::SIGKILL);
    let waiting = std::thread::spawn(move || write_and_sync(&path, 4));
    disk.next_keeper(2);
    waiting.join().unwrap();
    for (name, fill) in [("a", 1), ("b", 2), ("c", 3), ("d", 4)] {
        assert!(holds(&dir.join(name), fill), "{name}");
    }
    let status = client(&v.config).status().unwrap();
    assert_eq!(status.stats.errors, 0, "{status:?}");
    disk.detach();
}

#[test]
fn vm_nbd_a_keeper_killed_while_it_takes_over_is_followed_by_one_that_succeeds() {
    let v = Volume::new();
    let mut disk = Disk::attach(&v, &ConnectOptions::default());
    let dir = disk.mount();
    write_and_sync(&dir.join("a"), 1);
    let mut half_way = 0;
    for millis in [0, 20, 60, 150, 300, 600] {
        let zerofs = disk.zerofs();
        disk.kill_keeper();
        if millis == 0 {
            // So that at least this one is not over too soon.
            signal(zerofs, Signal::SIGSTOP);
        }
        let path = dir.join(format!("f{millis}"));
        let waiting = std::thread::spawn(move || write_and_sync(&path, 7));
        start(&v.config);
        std::thread::sleep(Duration::from_millis(millis));
        half_way += u32::from(disk.status().connections == 0);
        disk.kill_keeper();
        // The second keeper may have ended it meanwhile.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(zerofs), Signal::SIGCONT);
        start(&v.config);
        wait_until("the device is taken over", LONG, || disk.status().connections == 1);
        waiting.join().unwrap();
        assert!(holds(&dir.join(format!("f{millis}")), 7));
    }
    assert!(half_way > 0, "every take-over was over before its keeper was killed");
    assert!(holds(&dir.join("a"), 1));
    disk.detach();
}

#[test]
fn vm_nbd_a_keeper_killed_before_it_knew_the_index_is_followed_by_one_that_knows_its_device_again() {
    let v = Volume::new();
    let disk = Disk::attach(&v, &ConnectOptions::default());
    // What the keeper writes down before it connects is what the kernel shows then.
    assert!(!v.logs().contains("was connected by"), "{}", v.logs());
    let path = v.config.run_dir.join("nbd.json");
    let forget_the_index = |by: i64| {
        let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        record["index"] = serde_json::Value::Null;
        record["pid"] = (record["pid"].as_i64().unwrap() + by).into();
        fs::write(&path, record.to_string()).unwrap();
    };
    disk.kill_keeper();
    forget_the_index(0);
    disk.next_keeper(1);
    assert_eq!(disk.status().index, Some(disk.index));
    // What another process connected is another run folder's, whatever its name.
    disk.kill_keeper();
    forget_the_index(1);
    start(&v.config);
    wait_until("the record is gone", LONG, || !path.exists());
    assert_eq!(client(&v.config).status().unwrap().nbd, None);
    assert!(sysfs::one(disk.index).unwrap().unwrap().connected, "it was left alone");
    let (other, _) = client(&v.config).within(LONG).connect_nbd(&ConnectOptions::default()).unwrap();
    assert_ne!(other, disk.index);
    client(&v.config).within(LONG).disconnect(false).unwrap();
    assert!(sysfs::one(disk.index).unwrap().unwrap().connected, "it was left alone");
    // Nor does anybody disconnect it who means the connection that had the index before.
    let device = sysfs::one(disk.index).unwrap().unwrap();
    let before = sysfs::NbdDevice { pid: device.pid.map(|pid| pid + 1), ..device.clone() };
    nbd::disconnect_and_wait(&before, LONG).unwrap();
    assert!(sysfs::one(disk.index).unwrap().unwrap().connected, "it was left alone");
    nbd::disconnect_and_wait(&device, LONG).unwrap();
    stop(&v.config);
}

#[test]
fn vm_nbd_a_device_grows_while_it_is_mounted() {
    let v = Volume::new();
    let mut disk = Disk::attach(&v, &ConnectOptions::default());
    let dir = disk.mount();
    write_and_sync(&dir.join("a"), 1);
    ninep::grow_disk(&v.config.run_dir, "disk", 2 * SIZE).unwrap();
    assert_eq!(client(&v.config).within(LONG).resize().unwrap(), 2 * SIZE);
    assert_eq!(sysfs::one(disk.index).unwrap().unwrap().size.0, 2 * SIZE);
    run("resize2fs", &[disk.device().to_str().unwrap()]);
    // The new half is there, also after a take-over.
    disk.kill_keeper();
    disk.next_keeper(1);
    let last = File::options().read(true).custom_flags(libc::O_DIRECT).open(disk.device()).unwrap();
    let mut buffer = vec![0u8; 8192];
    let at = buffer.as_ptr().align_offset(4096);
    last.read_exact_at(&mut buffer[at..at + 4096], 2 * SIZE - 4096).unwrap();
    drop(last);
    assert!(holds(&dir.join("a"), 1));
    disk.detach();
}

#[test]
fn vm_nbd_a_device_that_nobody_takes_over_in_time_fails_its_io_and_never_hangs() {
    let v = Volume::new();
    let options = ConnectOptions { reconnect_timeout_ms: 1000, ..ConnectOptions::default() };
    let disk = Disk::attach(&v, &options);
    disk.kill_keeper();
    // This read makes the kernel wait, and give up.
    let begun = Instant::now();
    let file = File::open(disk.device()).unwrap();
    assert!(file.read_exact_at(&mut [0; 512], 0).is_err());
    assert!(begun.elapsed() >= Duration::from_millis(500), "it waited for nobody");
    drop(file);
    start(&v.config);
    // Some kernels give such a device up for good, others take new sockets and go on; either is said, and neither hangs.
    wait_until("the device works or is known to be dead", LONG, || {
        disk.status().failed.is_some() || disk.status().connections == 1
    });
    wait_until("the status says what is", LONG, || {
        // Asked anew each time: the keeper counts a socket a moment before the kernel has it.
        let works = File::open(disk.device()).and_then(|f| f.read_exact_at(&mut [0; 512], 0)).is_ok();
        disk.status().failed.is_none() == works
    });
    client(&v.config).within(Duration::from_secs(90)).disconnect(false).unwrap();
    assert!(!sysfs::one(disk.index).unwrap().unwrap().connected);
    stop(&v.config);
}

#[test]
fn vm_nbd_a_fenced_volume_fails_its_device_and_lets_it_be_detached() {
    let v = Volume::new();
    let disk = Disk::attach(&v, &ConnectOptions::default());
    v.taken_over();
    disk.kill_zerofs();
    wait_until("the volume is fenced", LONG, || client(&v.config).status().unwrap().state == State::Fenced);
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(disk.device()).unwrap();
    let mut buffer = vec![0u8; 8192];
    let at = buffer.as_ptr().align_offset(4096);
    let e = file.read_exact_at(&mut buffer[at..at + 4096], 0).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::EIO));
    drop(file);
    // The next keeper learns of the new owner before it serves anything.
    disk.kill_keeper();
    start(&v.config);
    wait_until("the next keeper knows", LONG, || client(&v.config).status().unwrap().state == State::Fenced);
    wait_until("the device fails", LONG, || disk.status().connections == 1);
    client(&v.config).within(Duration::from_secs(90)).disconnect(false).unwrap();
    assert!(!sysfs::one(disk.index).unwrap().unwrap().connected);
    let _ = stop_with(&v.config, 20.0, true);
    nothing_left(&v.config);
}

/// The program is one whose reads are zeros once it is closed, told as one that has not that fault: so nothing is read
/// while it ends.
#[test]
fn vm_nbd_the_direct_path_is_connected_again_when_its_zerofs_has_ended_cleanly() {
    let mut v = Volume::new();
    v.config.zerofs_version = "2.3.0".parse().unwrap();
    let disk = Disk::attach(&v, &ConnectOptions { path: NbdPath::Direct, ..ConnectOptions::default() });
    let file = File::options().read(true).write(true).open(disk.device()).unwrap();
    file.write_all_at(&[5; 4096], 0).unwrap();
    file.sync_all().unwrap();
    let (ended, sockets) = (disk.zerofs(), disk.status().connections);
    assert_eq!(disk.status().dead_connections, 0);
    signal(ended, Signal::SIGTERM);
    wait_until("the device has new sockets", LONG, || disk.status().reconnects == 1);
    assert_ne!(disk.zerofs(), ended);
    assert_eq!(disk.status().dead_connections, sockets, "each of them died once");
    assert_eq!(disk.status().failed, None);
    file.write_all_at(&[6; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let mut read = [0; 8192];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read[..4096] == [5; 4096] && read[4096..] == [6; 4096]);
    drop(file);
    disk.detach();
}

#[test]
fn vm_nbd_the_direct_path_fails_its_device_when_zerofs_dies_and_outlives_its_keeper() {
    let v = Volume::new();
    let options = ConnectOptions { path: NbdPath::Direct, ..ConnectOptions::default() };
    let disk = Disk::attach(&v, &options);
    assert_eq!(disk.status().connections, 4, "as many as the kernel can use of a server that allows it");
    let file = File::options().read(true).write(true).open(disk.device()).unwrap();
    file.write_all_at(&[5; 4096], 0).unwrap();
    file.sync_all().unwrap();
    // The keeper alone is no loss: the sockets lead to ZeroFS.
    disk.kill_keeper();
    start(&v.config);
    client(&v.config).wait_ready(LONG).unwrap();
    file.write_all_at(&[6; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    assert_eq!(disk.status().failed, None);
    assert_eq!(client(&v.config).within(LONG).resize().unwrap_err().kind(), Kind::Refused);
    // ZeroFS is one.
    disk.kill_zerofs();
    wait_until("the device fails", LONG, || disk.status().failed.is_some());
    // Whoever has it open gets errors; the kernel lets go when they close it.
    assert!(file.write_all_at(&[7; 4096], 0).and_then(|()| file.sync_all()).is_err());
    drop(file);
    wait_until("the kernel lets go", LONG, || !sysfs::one(disk.index).unwrap().unwrap().connected);
    client(&v.config).within(Duration::from_secs(90)).disconnect(false).unwrap();

    // Both at once: the next keeper must not bring it back.
    let (index, _) = client(&v.config).within(LONG).connect_nbd(&options).unwrap();
    let zerofs = disk.zerofs();
    disk.kill_keeper();
    signal(zerofs, Signal::SIGKILL);
    start(&v.config);
    wait_until("the device fails", LONG, || disk.status().failed.is_some());
    wait_until("the kernel lets go", LONG, || !sysfs::one(index).unwrap().unwrap().connected);
    assert_eq!(disk.status().reconnects, 0);
    client(&v.config).within(Duration::from_secs(90)).disconnect(false).unwrap();
    stop(&v.config);
}

#[test]
fn vm_nbd_read_only_a_taken_index_and_a_wrong_backend_are_refused_by_the_kernel() {
    let v = Volume::new();
    let options = ConnectOptions { read_only: true, ..ConnectOptions::default() };
    let disk = Disk::attach(&v, &options);
    assert!(sysfs::one(disk.index).unwrap().unwrap().read_only);
    let file = File::options().write(true).open(disk.device());
    assert!(file.and_then(|f| f.write_all_at(&[1; 512], 0)).is_err());
    assert_eq!(sysfs::named("zerofs:vol1").unwrap()[0].index, disk.index);
    let status = netlink::status(Some(disk.index)).unwrap();
    assert_eq!(status, [netlink::Status { index: disk.index, connected: true }]);
    assert!(netlink::status(None).unwrap().len() >= 16);

    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    let taken = netlink::Connect {
        index: Some(disk.index),
        size: 1 << 20,
        block_size: 512,
        server_flags: 1,
        client_flags: 0,
        dead_conn_timeout: Duration::ZERO,
        backend: Some("zerofs:other"),
        sockets: &[std::os::fd::AsFd::as_fd(&a)],
    };
    let e = netlink::connect(&taken).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    let wrong = netlink::Reconfigure { backend: Some("zerofs:other"), ..netlink::Reconfigure::default() };
    assert_eq!(netlink::reconfigure(disk.index, &wrong).unwrap_err().kind(), Kind::Conflict);
    let free = netlink::status(None).unwrap().iter().find(|s| !s.connected).unwrap().index;
    let e = netlink::reconfigure(free, &netlink::Reconfigure::default()).unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{e}");
    netlink::disconnect(free).unwrap();
    disk.detach();
}
