//! How many NBD devices there can be. These tests load the kernel's module with other settings, so they run in a machine of
//! scripts/vm and nowhere else (`machine` in their names). The one that connects every device that can be takes minutes,
//! and runs in the long run only (`long` in its name).

mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use support::cli::Node;
use support::vm::{Baseline, require_nbd, run};
use support::wait_until;
use zerofsctl::host::nbd::{self, netlink, sysfs};

/// The module with these settings; the usual ones come back when this is dropped.
struct Module;

impl Module {
    fn loaded_with(settings: &[&str]) -> Module {
        require_nbd();
        assert!(
            std::env::var_os("ZEROFSCTL_MACHINE").is_some(),
            "this would change the kernel of your machine"
        );
        assert_eq!(Baseline::take().count(), 0, "the module cannot go while a device is connected");
        let module = Module;
        run("modprobe", &["--remove", "nbd"]);
        if !settings.is_empty() {
            run("modprobe", &[&["nbd"], settings].concat());
        }
        module
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            run("modprobe", &["--remove", "nbd"]);
            run("modprobe", &["nbd", "nbds_max=64"]);
        }
    }
}

/// A device of nobody's, with the server's end of its socket.
fn connect(backend: Option<&str>) -> (u32, UnixStream) {
    let (kernel, server) = UnixStream::pair().unwrap();
    let index = netlink::connect(&netlink::Connect {
        index: None,
        size: 1 << 20,
        block_size: 512,
        server_flags: 1,
        client_flags: 0,
        dead_conn_timeout: Duration::ZERO,
        backend,
        sockets: &[kernel.as_fd()],
    });
    (index.expect("the kernel connects one more"), server)
}

const ATTACH: [&str; 6] = ["attach", "vol1", "--size", "128Mi", "--transport", "nbd"];

#[test]
fn nbd_machine_the_module_is_loaded_when_it_is_needed_and_nbds_max_is_no_limit() {
    let _module = Module::loaded_with(&[]);
    assert!(!Path::new("/sys/module/nbd").exists());
    let node = Node::new();
    let m = node.target("m");
    let attach = [&ATTACH[..], &["--target", &m]].concat();
    node.ok(&attach);
    node.ok(&["detach", "vol1"]);

    // Both devices that it was loaded with are taken: the kernel makes a third.
    run("modprobe", &["--remove", "nbd"]);
    run("modprobe", &["nbd", "nbds_max=2"]);
    let taken = [connect(Some("other-1")), connect(Some("other-2"))];
    node.ok(&attach);
    let device = sysfs::named("zerofs:vol1").unwrap().pop().expect("it is connected");
    assert!(device.index >= 2, "{device:?}");
    let answer = node.json(&["nbd", "list"]);
    assert_eq!((&answer["capacity"]["nbds_max"], &answer["capacity"]["existing"]), (&2.into(), &3.into()));
    node.ok(&["detach", "vol1"]);
    for (index, server) in taken {
        drop(server);
        support::vm::disconnect(index);
    }
    node.assert_nothing_left("at the end");
}

#[test]
fn nbd_long_machine_an_attach_beyond_the_last_device_number_fails_at_once_and_says_what_to_do() {
    // With as many partitions as the kernel allows there are the fewest devices.
    let _module = Module::loaded_with(&["nbds_max=1", "max_part=255"]);
    let limit = nbd::capacity().unwrap().limit;
    assert_eq!(limit, 4096);
    let files = u64::from(2 * limit);
    setrlimit(Resource::RLIMIT_NOFILE, files, files).unwrap();
    let begun = Instant::now();
    let mut taken: Vec<_> = (0..limit).map(|_| connect(Some("other"))).collect();
    println!("{limit} devices connected in {:.1?}", begun.elapsed());
    assert_eq!(nbd::capacity().unwrap().remaining(), 0);

    let node = Node::new();
    let m = node.target("m");
    let attach = [&ATTACH[..], &["--target", &m]].concat();
    let begun = Instant::now();
    let refused = node.run(&attach).expect_error(1, &["all 4096 NBD devices"]);
    println!("refused after {:.1?}", begun.elapsed());
    assert!(refused.stderr.contains("nbd list") && refused.stderr.contains("max_part=15"), "{refused:#?}");
    node.assert_nothing_left("after the refusal");
    // One goes, and its place is taken.
    let (index, server) = taken.pop().unwrap();
    drop(server);
    support::vm::disconnect(index);
    node.ok(&attach);
    assert_eq!(nbd::capacity().unwrap().remaining(), 0);
    node.ok(&["detach", "vol1"]);
    let begun = Instant::now();
    for (index, server) in taken {
        drop(server);
        netlink::disconnect(index).unwrap();
    }
    wait_until("all are disconnected", support::vm::LONG, || Baseline::take().count() == 0);
    println!("disconnected in {:.1?}", begun.elapsed());
    node.assert_nothing_left("at the end");
}
