//! The kernel's nbd driver as it really is: the facts that the transport relies on, and our netlink commands, with
//! nbdkit as the server and nbd-client as the foreigner. Runs where the nbd module is: scripts/vm-test, make test-nbd.
//!
//! Those with `smoke` in their names run on Debian's stock kernel too, in slow emulation.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::dir::TestDir;
use support::fio::FioJob;
use support::forgetful::{Asks, Disk, Server};
use support::vm::{
    Baseline, Block, Device, LONG, Mounted, Nbdkit, disconnect, free_index, require_nbd, run, try_run,
};
use support::wait_until;
use zerofsctl::error::Kind;
use zerofsctl::host::nbd::{self, Support, netlink, sysfs};
use zerofsctl::keeper::control::NbdPath;
use zerofsctl::keeper::device::{GUARDED_SOCKETS, queue, server_flags, sockets_of};
use zerofsctl::keeper::path::{DataEvent, DataPath, DataPathConfig};

const MIB: u64 = 1 << 20;

/// Runs a test where NBD is, and shows that it left the kernel's devices as they were.
fn with_nbd(test: impl FnOnce(&TestDir)) {
    require_nbd();
    let before = Baseline::take();
    let dir = TestDir::new();
    test(&dir);
    before.assert_back();
}

/// What somebody else says of a device: nbd-client's answer, and the size and read-only state in the block layer.
fn outside_view(device: &Device) -> (bool, u64, bool) {
    let path = device.path();
    let path = path.to_str().unwrap();
    let number = |what| run("blockdev", &[what, path]).trim().parse::<u64>().unwrap();
    (try_run("nbd-client", &["-c", path]).status.success(), number("--getsize64"), number("--getro") == 1)
}

fn assert_free(index: u32) {
    let state = sysfs::one(index).unwrap().unwrap();
    assert!(!state.connected && state.backend.is_none() && state.size.0 == 0, "{state:?}");
    let path = sysfs::path(index);
    assert!(!try_run("nbd-client", &["-c", path.to_str().unwrap()]).status.success());
}

#[test]
fn nbd_smoke_the_kernel_offers_netlink_and_devices() {
    with_nbd(|_| {
        assert_eq!(nbd::supported().unwrap(), Support::Fine);
        let shown: BTreeSet<u32> = sysfs::all().unwrap().iter().map(|d| d.index).collect();
        let told: BTreeSet<u32> = netlink::status(None).unwrap().iter().map(|s| s.index).collect();
        assert!(!shown.is_empty());
        assert_eq!(shown, told);
    });
}

#[test]
fn nbd_smoke_a_device_on_four_sockets_takes_data_and_goes_away() {
    with_nbd(|dir| {
        let server = Nbdkit::file(dir, "server", 64 * MIB);
        let device = Device::connect(&server, 4, |c| {
            c.backend = Some("zerofs:smoke");
            c.block_size = 4096;
        });
        let index = device.index();
        let state = device.state();
        assert!(state.connected && !state.read_only, "{state:?}");
        assert_eq!((state.size.0, state.backend.as_deref()), (64 * MIB, Some("zerofs:smoke")));
        assert_eq!(outside_view(&device), (true, 64 * MIB, false));
        let queue = format!("/sys/block/nbd{index}/queue");
        assert_eq!(fs::read_to_string(format!("{queue}/logical_block_size")).unwrap().trim(), "4096");
        assert_eq!(netlink::status(Some(index)).unwrap(), [netlink::Status { index, connected: true }]);
        assert_eq!(sysfs::named("zerofs:smoke").unwrap(), [state]);

        let file = device.open_direct();
        for n in [0, 7, 16383] {
            Block::of(n as u8 | 0x40).write(&file, n).unwrap();
        }
        file.sync_all().unwrap();
        drop(file);
        let served = File::open(server.served()).unwrap();
        for n in [0, 7, 16383] {
            assert!(Block::read(&served, n).unwrap().is(n as u8 | 0x40), "block {n}");
        }
        device.disconnect();
        assert_free(index);
        assert_eq!(netlink::status(Some(index)).unwrap(), [netlink::Status { index, connected: false }]);
        assert_eq!(sysfs::named("zerofs:smoke").unwrap(), []);
        // What is free is no error.
        netlink::disconnect(index).unwrap();
    });
}

#[test]
fn nbd_smoke_a_foreign_device_shows_no_backend_and_keeps_its_index() {
    with_nbd(|dir| {
        let server = Nbdkit::memory(dir, "foreign", 16 * MIB);
        let foreign = Device::foreign(&server, 2);
        let state = foreign.state();
        assert!(state.connected, "{state:?}");
        assert_eq!((state.size.0, &state.backend), (16 * MIB, &None));

        let other = Nbdkit::memory(dir, "other", 32 * MIB);
        let taken = Device::try_connect(&other, 1, |c| c.index = Some(foreign.index()));
        assert_eq!(taken.err().map(|e| e.kind()), Some(Kind::Busy));
        let device = Device::connect(&other, 1, |_| ());
        assert_ne!(device.index(), foreign.index());
        device.disconnect();
        assert_eq!(foreign.state(), state);
        assert_eq!(outside_view(&foreign), (true, 16 * MIB, false));

        let path = foreign.path();
        run("nbd-client", &["-d", path.to_str().unwrap()]);
        wait_until("nbd-client's disconnect takes effect", LONG, || !foreign.state().connected);
    });
}

#[test]
fn nbd_kernel_refuses_another_backend_and_the_device_works_on() {
    with_nbd(|dir| {
        let server = Nbdkit::file(dir, "server", 16 * MIB);
        let device = Device::connect(&server, 1, |c| c.backend = Some("zerofs:a"));
        for other in ["zerofs:b", "zerofs:", "zerofs:a ", "zerofs:aa"] {
            let change = netlink::Reconfigure { backend: Some(other), ..Default::default() };
            let e = netlink::reconfigure(device.index(), &change).unwrap_err();
            assert_eq!(e.kind(), Kind::Conflict, "{other:?}: {e}");
        }
        // Nor does it take a command that does not say which.
        assert!(netlink::reconfigure(device.index(), &netlink::Reconfigure::default()).is_err());
        let same = netlink::Reconfigure { backend: Some("zerofs:a"), ..Default::default() };
        netlink::reconfigure(device.index(), &same).unwrap();
        assert_eq!(device.state().backend.as_deref(), Some("zerofs:a"));
        let file = device.open_direct();
        Block::of(9).write(&file, 1).unwrap();
        assert!(Block::read(&file, 1).unwrap().is(9));
        drop(file);
        device.disconnect();
    });
}

#[test]
fn nbd_kernel_does_not_know_a_device_that_is_not_connected() {
    with_nbd(|_| {
        let e = netlink::reconfigure(free_index(), &netlink::Reconfigure::default()).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound, "{e}");
    });
}

#[test]
fn nbd_kernel_holds_io_of_a_dead_connection_until_new_sockets_come() {
    with_nbd(|dir| {
        let mut server = Nbdkit::file(dir, "server", 16 * MIB);
        let dead = netlink::LinkDead::listen().unwrap();
        let device = Device::connect(&server, 4, |c| {
            c.backend = Some("zerofs:held");
            c.dead_conn_timeout = Duration::from_secs(120);
        });
        let file = device.open_direct();
        Block::of(1).write(&file, 1).unwrap();
        server.server().kill();
        // The kernel tells of each dead socket; all of them are this device's.
        for _ in 0..4 {
            assert_eq!(dead.next(LONG).unwrap(), Some(device.index()));
        }
        let writer = thread::spawn({
            let file = file.try_clone().unwrap();
            move || Block::of(2).write(&file, 2)
        });
        thread::sleep(Duration::from_secs(2));
        assert!(!writer.is_finished(), "the write does not wait");
        assert!(device.state().connected, "a dead device still looks connected");

        server.restart();
        device.reconnect(&server, 4);
        writer.join().unwrap().expect("the write that waited is done without an error");
        assert!(Block::read(&file, 1).unwrap().is(1) && Block::read(&file, 2).unwrap().is(2));
        drop(file);
        assert!(Block::read(&File::open(server.served()).unwrap(), 2).unwrap().is(2));
        device.disconnect();
    });
}

#[test]
fn nbd_kernel_fails_held_io_when_nobody_comes_in_time() {
    with_nbd(|dir| {
        let mut server = Nbdkit::memory(dir, "server", 16 * MIB);
        let device = Device::connect(&server, 2, |c| c.dead_conn_timeout = Duration::from_secs(3));
        let file = device.open_direct();
        Block::of(1).write(&file, 1).unwrap();
        server.server().kill();
        let e = Block::of(2).write(&file, 2).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
        drop(file);
        assert!(device.state().connected, "it stays set up until somebody disconnects it");
        device.disconnect();
    });
}

#[test]
fn nbd_kernel_without_a_time_out_fails_io_at_once_and_the_index_stays_taken() {
    with_nbd(|dir| {
        let mut server = Nbdkit::memory(dir, "server", 16 * MIB);
        let dead = netlink::LinkDead::listen().unwrap();
        let device = Device::connect(&server, 1, |_| ());
        server.server().kill();
        assert_eq!(dead.next(LONG).unwrap(), Some(device.index()));
        let file = device.open_direct();
        assert_eq!(Block::read(&file, 0).err().and_then(|e| e.raw_os_error()), Some(libc::EIO));
        drop(file);
        // Neither sysfs nor the kernel's own answer tells a dead device from a live one.
        let state = device.state();
        assert!(state.connected && state.size.0 == 16 * MIB, "{state:?}");
        assert!(netlink::status(Some(device.index())).unwrap()[0].connected);
        server.restart();
        let again = Device::try_connect(&server, 1, |c| c.index = Some(device.index()));
        assert_eq!(again.err().map(|e| e.kind()), Some(Kind::Busy));
        let index = device.index();
        device.disconnect();
        Device::connect(&server, 1, |c| c.index = Some(index)).disconnect();
        let told = dead.next(Duration::from_millis(200)).unwrap();
        assert!(told.is_none_or(|of| of == index), "of another device: {told:?}");
    });
}

#[test]
fn nbd_kernel_a_server_that_is_stopped_is_waited_for_without_an_error() {
    with_nbd(|dir| {
        let mut server = Nbdkit::memory(dir, "server", 16 * MIB);
        let device = Device::connect(&server, 2, |_| ());
        let file = device.open_direct();
        server.server().stop();
        let writer = thread::spawn({
            let file = file.try_clone().unwrap();
            move || Block::of(5).write(&file, 5)
        });
        thread::sleep(Duration::from_secs(2));
        assert!(!writer.is_finished(), "a stopped server answers: {:?}", writer.join());
        server.server().signal(Signal::SIGCONT);
        writer.join().unwrap().unwrap();
        assert!(Block::read(&file, 5).unwrap().is(5));
        drop(file);
        device.disconnect();
    });
}

#[test]
fn nbd_kernel_disconnects_a_mounted_device_so_only_we_can_refuse() {
    with_nbd(|dir| {
        let server = Nbdkit::memory(dir, "server", 64 * MIB);
        let device = Device::connect(&server, 2, |c| c.backend = Some("zerofs:mounted"));
        let index = device.index();
        let mounted = Mounted::make(&device.path(), dir.join("mnt"), "ext4");
        fs::write(mounted.join("before"), "kept").unwrap();
        netlink::disconnect(index).expect("the kernel asks nobody");
        // The mount holds the device, so it looks connected for as long as that lasts.
        assert!(device.state().connected);
        let lost = File::create(mounted.join("after")).and_then(|mut file| {
            file.write_all(b"lost")?;
            file.sync_all()
        });
        assert!(lost.is_err(), "data reaches a device that is gone");
        mounted.unmount();
        wait_until("the device is free once nothing holds it", LONG, || !device.state().connected);
        assert_free(index);
    });
}

#[test]
fn nbd_kernel_grows_a_mounted_device_by_reconfigure_and_shrinks_it_without_a_word() {
    with_nbd(|dir| {
        let server = Nbdkit::memory(dir, "server", 256 * MIB);
        let device = Device::connect(&server, 2, |c| c.size = 128 * MIB);
        let mounted = Mounted::make(&device.path(), dir.join("mnt"), "ext4");
        fs::write(mounted.join("kept"), vec![7; MIB as usize]).unwrap();
        let resize = |size| {
            netlink::reconfigure(
                device.index(),
                &netlink::Reconfigure { size: Some(size), ..Default::default() },
            )
            .unwrap();
            wait_until("the new size shows", LONG, || device.state().size.0 == size);
            assert_eq!(outside_view(&device).1, size);
        };
        resize(256 * MIB);
        run("resize2fs", &[device.path().to_str().unwrap()]);
        assert!(nix::sys::statvfs::statvfs(&mounted.join("")).unwrap().blocks() * 1024 > 200 * MIB);
        assert_eq!(fs::read(mounted.join("kept")).unwrap(), vec![7; MIB as usize]);
        mounted.unmount();
        resize(64 * MIB);
        device.disconnect();
    });
}

#[test]
fn nbd_kernel_keeps_a_read_only_device_from_being_written() {
    with_nbd(|dir| {
        let server = Nbdkit::start(
            dir,
            "server",
            vec!["--readonly".into(), "memory".into(), format!("size={}", 16 * MIB)],
        );
        let device = Device::connect(&server, 1, |_| ());
        assert!(device.state().read_only);
        assert_eq!(outside_view(&device), (true, 16 * MIB, true));
        let refused =
            File::options().write(true).open(device.path()).and_then(|f| f.write_all_at(&[1; 512], 0));
        let errno = refused.unwrap_err().raw_os_error();
        assert!([Some(libc::EROFS), Some(libc::EPERM), Some(libc::EACCES)].contains(&errno), "{errno:?}");
        assert!(Block::read(&device.open_direct(), 0).unwrap().is(0));
        let index = device.index();
        device.disconnect();
        // A device forgets what it was: the next one on the same index can be written.
        let writable = Nbdkit::memory(dir, "writable", 16 * MIB);
        let device = Device::connect(&writable, 1, |c| c.index = Some(index));
        assert!(!device.state().read_only);
        Block::of(3).write(&device.open_direct(), 0).unwrap();
        device.disconnect();
    });
}

#[test]
fn nbd_kernel_makes_an_index_that_is_asked_for_and_takes_it_away_again() {
    with_nbd(|dir| {
        let server = Nbdkit::memory(dir, "server", 16 * MIB);
        let index = free_index();
        let device = Device::connect(&server, 1, |c| c.index = Some(index));
        assert_eq!(device.index(), index);
        device.disconnect();

        // Beyond nbds_max, by name.
        let beyond = sysfs::all().unwrap().last().unwrap().index + 5;
        let device = Device::connect(&server, 1, |c| {
            c.index = Some(beyond);
            c.client_flags = netlink::CLIENT_DESTROY_ON_DISCONNECT;
        });
        assert_eq!(device.index(), beyond);
        Block::of(1).write(&device.open_direct(), 0).unwrap();
        netlink::disconnect(beyond).unwrap();
        wait_until("the index is gone", LONG, || sysfs::one(beyond).unwrap().is_none());
    });
}

#[test]
fn nbd_kernel_carries_64_devices_at_once_and_each_keeps_its_own_data() {
    const DEVICES: u64 = 64;
    with_nbd(|dir| {
        let server = Nbdkit::memory(dir, "server", 16 * MIB);
        let names: Vec<&str> = (0..DEVICES).map(|n| &*format!("zerofs:vol-{n}").leak()).collect();
        let devices: Vec<Device> =
            names.iter().map(|name| Device::connect(&server, 1, |c| c.backend = Some(name))).collect();
        let indices: BTreeSet<u32> = devices.iter().map(Device::index).collect();
        assert_eq!(indices.len() as u64, DEVICES);
        for (n, (device, name)) in devices.iter().zip(names).enumerate() {
            assert_eq!(sysfs::named(name).unwrap(), [device.state()]);
            Block::of(n as u8 + 1).write(&device.open_direct(), n as u64).unwrap();
        }
        let connected: BTreeSet<u32> =
            netlink::status(None).unwrap().iter().filter(|s| s.connected).map(|s| s.index).collect();
        assert!(connected.is_superset(&indices), "{connected:?}");
        // They are one memory: what went in by one comes out by another.
        for n in 0..DEVICES {
            let other = &devices[(DEVICES - 1 - n) as usize];
            assert!(Block::read(&other.open_direct(), n).unwrap().is(n as u8 + 1), "block {n}");
        }
        for device in devices {
            device.disconnect();
        }
        for index in indices {
            assert_free(index);
        }
    });
}

#[test]
fn nbd_kernel_survives_kills_of_the_server_under_a_verifying_load() {
    with_nbd(|dir| {
        let mut server = Nbdkit::file(dir, "server", 32 * MIB);
        let device = Device::connect(&server, 4, |c| c.dead_conn_timeout = Duration::from_secs(120));
        let mut load = FioJob::new(dir.path(), "load")
            .set("filename", device.path().display())
            .set("ioengine", "libaio")
            .set("direct", 1)
            .set("rw", "randwrite")
            .set("bs", "4k")
            .set("iodepth", 16)
            .set("size", "32m")
            .set("loops", 2)
            .set("verify", "crc32c")
            .set("rate_iops", 2500)
            .start();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(500));
            assert!(load.running(), "the load was over before the server was killed");
            server.restart();
            device.reconnect(&server, 4);
        }
        load.finish(LONG * 2).assert_clean();
        device.disconnect();
    });
}

/// Large reads of a server whose zeros are true go to the kernel in the pages in which they came: what it gets is what
/// the server has, also when that is killed in the middle of replies.
#[test]
fn nbd_kernel_takes_replies_in_pages_that_came_from_another_socket() {
    with_nbd(|dir| {
        let size = 32 * MIB as usize;
        let mut truth = vec![0; size];
        let mut rng = StdRng::seed_from_u64(3);
        rng.fill(&mut truth[..]);
        let disk = Disk { volatile: truth.clone(), durable: truth.clone(), size, ..Disk::default() };
        let disk = Arc::new(Mutex::new(disk));
        let mut server = Server::start(dir.path(), &disk);
        let config = DataPathConfig {
            run_dir: dir.path().to_owned(),
            export: "vol".into(),
            connections: 4,
            log_bytes: 8 * MIB,
            io_timeout: None,
            volume: "vol".parse().unwrap(),
            epoch: 1,
            zeros_when_closed: false,
            replay_log: true,
        };
        let (tell, events) = mpsc::channel();
        let data = DataPath::new(config, Arc::new(Asks(Arc::clone(&disk))), tell).unwrap();
        data.server_up().unwrap();
        let sockets = sockets_of(&data, GUARDED_SOCKETS, false, &[]).unwrap();
        let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let index = netlink::connect(&netlink::Connect {
            index: None,
            size: data.size(),
            block_size: 512,
            server_flags: server_flags(data.flags().unwrap(), NbdPath::Guarded, false),
            client_flags: 0,
            dead_conn_timeout: LONG,
            backend: Some("zerofs:vol"),
            sockets: &sockets,
        })
        .unwrap();
        sysfs::set_queue(index, &queue(NbdPath::Guarded)).unwrap();
        let device = sysfs::path(index);
        for round in 0..4 {
            // Through the page cache, with read-ahead.
            let same = thread::scope(|scope| {
                // Its last user's end empties the device's page cache.
                let reader = scope.spawn(|| fs::read(&device).unwrap() == truth);
                if round % 2 == 1 {
                    thread::sleep(Duration::from_millis(rng.random_range(1..40)));
                    let dead = std::mem::replace(&mut server, Server::start(dir.path(), &disk));
                    dead.kill();
                    while !matches!(events.recv_timeout(LONG).unwrap(), DataEvent::ServerLost(_)) {}
                    data.server_up().unwrap();
                }
                reader.join().unwrap()
            });
            assert!(same, "round {round}: other data than the server has");
        }
        let job = FioJob::new(dir.path(), "verify").set("filename", device.display());
        job.set("ioengine", "libaio")
            .set("direct", 1)
            .set("iodepth", 8)
            .set("rw", "randwrite")
            .set("bsrange", "4k-1m")
            .set("size", "32m")
            .set("verify", "crc32c")
            .run(LONG)
            .assert_clean();
        disconnect(index);
        data.close_nbd();
        data.flush().unwrap();
        assert_eq!(data.stats().errors, 0);
        data.server_down();
        server.kill();
    });
}
