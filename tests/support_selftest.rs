//! The tests' own tools: a fault proxy that did not break the network, or a fio run that overlooked a bad
//! block, would make every test that trusts them worthless.

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::dir::{Leftover, TestDir, leftovers};
use support::fio::FioJob;
use support::http;
use support::moto::Moto;
use support::proxy::{Counts, FaultProxy, Mode};
use support::zerofs::{Server, Volume};
use zerofsctl::zerofs::config::NBD_SOCKET;
use zerofsctl::zerofs::nbd::Client;
use zerofsctl::zerofs::{ninep, sock};

const LIMIT: Duration = Duration::from_secs(10);
/// How long nothing must arrive for us to believe that nothing does.
const SILENCE: Duration = Duration::from_millis(300);

/// A server that sends every byte back, for as long as the test program runs.
fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    address
}

fn connect(proxy: &FaultProxy) -> TcpStream {
    let stream = TcpStream::connect_timeout(&proxy.address(), LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn echoes(mut stream: &TcpStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, text);
}

#[test]
fn proxy_forwards_both_ways_and_counts() {
    let proxy = FaultProxy::start(echo_server());
    let (one, two) = (connect(&proxy), connect(&proxy));
    echoes(&one, b"one");
    echoes(&two, b"two and a bit");
    assert_eq!(proxy.counts(), Counts { accepted: 2, reset: 0, to_server: 16, to_client: 16 });
}

#[test]
fn proxy_passes_more_than_it_buffers_and_the_end_of_a_stream() {
    let proxy = FaultProxy::start(echo_server());
    let stream = connect(&proxy);
    let sent: Vec<u8> = (0..8_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        });
        (&stream).read_to_end(&mut received).unwrap();
    });
    assert!(received == sent, "{} bytes came back of {}", received.len(), sent.len());
}

#[test]
fn proxy_refuses_and_resets_then_passes_on_the_same_port() {
    let proxy = FaultProxy::start(echo_server());
    for round in 1..=3 {
        let open = connect(&proxy);
        echoes(&open, b"before");
        proxy.set(Mode::Refuse);
        assert_eq!((&open).read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        for _ in 0..3 {
            let refused = TcpStream::connect_timeout(&proxy.address(), LIMIT).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
        // While it refuses, no other program can take the port.
        assert_eq!(TcpListener::bind(proxy.address()).unwrap_err().kind(), ErrorKind::AddrInUse);
        proxy.set(Mode::Pass);
        echoes(&connect(&proxy), b"after");
        assert!(proxy.counts().reset >= round);
    }
}

#[test]
fn proxy_stalls_open_and_new_connections_and_loses_nothing() {
    let proxy = FaultProxy::start(echo_server());
    let open = connect(&proxy);
    echoes(&open, b"before");
    proxy.set(Mode::Stall);
    let before = proxy.counts();
    let new = connect(&proxy);
    for stream in [&open, &new] {
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        (&*stream).write_all(b"held").unwrap();
        assert_eq!((&*stream).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    let during = proxy.counts();
    assert_eq!((during.to_server, during.to_client), (before.to_server, before.to_client));
    proxy.set(Mode::Pass);
    for stream in [&open, &new] {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut back = [0; 4];
        (&*stream).read_exact(&mut back).unwrap();
        assert_eq!(&back, b"held");
    }
    assert_eq!(proxy.counts().reset, 0);
}

#[test]
fn proxy_resets_its_clients_when_nobody_listens_behind_it() {
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let proxy = FaultProxy::start(nobody);
    let lost = connect(&proxy);
    assert_eq!((&lost).read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn moto_stores_objects_behind_the_proxy_and_ends_with_its_handle() {
    let dir = TestDir::new();
    let moto = Moto::start(dir.path());
    moto.create_bucket("vols");
    let proxy = FaultProxy::start(moto.address());
    let ask = |method, path, body| http::request(proxy.address(), method, path, body, LIMIT);
    assert_eq!(ask("PUT", "/vols/a/one", b"first").unwrap().status, 200);
    assert_eq!(ask("PUT", "/vols/b", b"second").unwrap().status, 200);
    assert_eq!(ask("GET", "/vols/a/one", b"").unwrap().body, b"first");
    assert_eq!(moto.keys("vols", "a/"), ["a/one"]);
    proxy.set(Mode::Refuse);
    assert_eq!(ask("GET", "/vols/a/one", b"").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    proxy.set(Mode::Pass);
    assert_eq!(ask("GET", "/vols/b", b"").unwrap().body, b"second");

    let address = moto.address();
    assert!(matches!(&leftovers(dir.path())[..], [Leftover::Process(pid, _)] if *pid as u32 == moto.pid()));
    drop(moto);
    assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    dir.assert_unused();
}

#[test]
fn zerofs_keeps_its_data_in_moto_through_a_network_that_breaks() {
    let dir = TestDir::new();
    let moto = Moto::start(dir.path());
    moto.create_bucket("vols");
    let proxy = FaultProxy::start(moto.address());
    let mut volume = Volume::new("correct horse battery");
    volume.input.storage_url = "s3://vols/vol1".into();
    volume.input.aws = Moto::access(proxy.address());
    let server = volume.start("first");
    ninep::create_disk(&server.dir, "disk", 64 << 20).unwrap();
    let open = |server: &Server| {
        let stream = sock::connect_within(&server.dir, NBD_SOCKET, Duration::from_secs(60)).unwrap();
        Client::connect(stream, "disk").unwrap()
    };
    let mut nbd = open(&server);
    nbd.write_at(4096, &[0xa5; 4096], false).unwrap();
    nbd.flush().unwrap();
    let before = proxy.counts();
    assert!(moto.keys("vols", "vol1/manifest/").len() > 1 && before.to_server > 4096, "{before:?}");

    // ZeroFS 0.19.1 survives two seconds of this, and no more than a few.
    proxy.set(Mode::Refuse);
    nbd.write_at(8192, &[0x5a; 4096], false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| nbd.flush().unwrap());
        std::thread::sleep(Duration::from_secs(1));
        proxy.set(Mode::Pass);
    });
    server.kill();

    let again = volume.start("again");
    let mut back = [0; 8192];
    open(&again).read_at(4096, &mut back).unwrap();
    assert!(back[..4096] == [0xa5; 4096] && back[4096..] == [0x5a; 4096]);
    assert!(again.stop().success());
}

fn verifying_job(dir: &TestDir, rw: &str) -> FioJob {
    FioJob::new(dir.path(), "verify")
        .set("filename", dir.join("data").display())
        .set("rw", rw)
        .set("bs", "4k")
        .set("size", "1m")
        .set("verify", "crc32c")
}

#[test]
fn fio_sees_a_good_file_and_a_damaged_one() {
    let dir = TestDir::new();
    let written = verifying_job(&dir, "randwrite").set("do_verify", 0).run(LIMIT);
    written.assert_clean();
    assert_eq!((written.writes.ios, written.writes.bytes), (256, 1 << 20));
    assert!(written.writes.iops > 0.0 && written.writes.worst_ns > 0);

    let good = verifying_job(&dir, "randread").run(LIMIT);
    good.assert_clean();
    assert_eq!(good.reads.ios, 256);

    // A block in the middle reads as zeros, as it would from a server that lost it.
    fs::File::options()
        .write(true)
        .open(dir.join("data"))
        .unwrap()
        .write_all_at(&[0; 4096], 100 * 4096)
        .unwrap();
    let bad = verifying_job(&dir, "randread").run(LIMIT);
    assert!(!bad.status.success() && bad.errors >= 1 && bad.errno == 84, "{bad:#?}");
    assert!(bad.verify_failures[0].contains("offset 409600"), "{bad:#?}");
    assert!(std::panic::catch_unwind(|| bad.assert_clean()).is_err());
}

#[test]
fn fio_counts_every_error_of_a_job_that_goes_on() {
    let dir = TestDir::new();
    verifying_job(&dir, "write").set("do_verify", 0).run(LIMIT).assert_clean();
    let file = fs::File::options().write(true).open(dir.join("data")).unwrap();
    for block in [3, 50, 200] {
        file.write_all_at(&[0; 4096], block * 4096).unwrap();
    }
    let bad = verifying_job(&dir, "read").set("continue_on_error", "verify").run(LIMIT);
    assert_eq!(bad.errors, 3, "{bad:#?}");
}

#[test]
fn fio_that_runs_is_ended_with_its_handle() {
    let dir = TestDir::new();
    let job = FioJob::new(dir.path(), "long")
        .set("filename", dir.join("data").display())
        .set("rw", "write")
        .set("size", "1m")
        .set("time_based", 1)
        .set("runtime", 60);
    let mut run = job.start();
    support::wait_until("fio writes", LIMIT, || dir.join("data").exists());
    assert!(run.running());
    drop(run);
    dir.assert_unused();
}

#[test]
fn a_process_that_uses_the_folder_fails_its_test_and_is_ended() {
    let dir = TestDir::new().patience(SILENCE);
    let path = dir.path().to_owned();
    let mut child = Command::new("sleep")
        .arg("600")
        .current_dir(&path)
        .stdin(Stdio::null())
        .spawn()
        .expect("sleep starts");
    let left = leftovers(&path);
    assert!(matches!(&left[..], [Leftover::Process(pid, _)] if *pid as u32 == child.id()), "{left:?}");
    let failed = std::panic::catch_unwind(move || drop(dir)).unwrap_err();
    let said = failed.downcast_ref::<String>().expect("a message");
    assert!(said.contains("the test left behind") && said.contains("sleep 600"), "{said}");
    let began = Instant::now();
    assert!(!child.wait().unwrap().success());
    assert!(began.elapsed() < LIMIT);
    assert!(!path.exists());
}

#[test]
fn root_a_mount_and_its_loop_device_are_found_and_cleaned() {
    support::require_root();
    let dir = TestDir::new().patience(SILENCE);
    let path = dir.path().to_owned();
    let (image, point) = (dir.join("image"), dir.join("mount point"));
    fs::create_dir(&point).unwrap();
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let run = |program: &str, args: &[&std::ffi::OsStr]| {
        let out = Command::new(support::require_program(program)).args(args).output().unwrap();
        assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
    };
    run("mkfs.ext4", &["-q".as_ref(), image.as_ref()]);
    run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), point.as_ref()]);
    fs::write(point.join("kept"), "x").unwrap();

    let left = leftovers(&path);
    assert!(left.contains(&Leftover::Mount(point.clone())), "{left:?}");
    assert!(left.iter().any(|l| matches!(l, Leftover::Loop(_, file) if *file == image)), "{left:?}");
    let failed = std::panic::catch_unwind(move || drop(dir)).unwrap_err();
    assert!(failed.downcast_ref::<String>().is_some_and(|said| said.contains("the test left behind")));
    assert!(leftovers(&path).is_empty() && !path.exists());
}
