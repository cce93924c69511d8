//! Our config, NBD client and 9P client against the real things: ZeroFS on a local store, nbdkit and
//! qemu-nbd, with nbdinfo as a second opinion. Needs those programs and no privilege.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use zerofsctl::error::Kind;
use zerofsctl::zerofs::config::NBD_SOCKET;
use zerofsctl::zerofs::nbd::{Client, Extent, Inquiry, handshake};
use zerofsctl::zerofs::versions::{Profile, Sign};
use zerofsctl::zerofs::{ninep, sock};

mod support;

use support::wait_until;
use support::zerofs::{self, Daemon, Volume};

const MIB: u64 = 1 << 20;
const PASSWORD: &str = "correct horse battery";

fn nbd(dir: &Path) -> Client<UnixStream> {
    Client::connect(sock::connect(dir, NBD_SOCKET).expect("connect"), "disk").expect("handshake")
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

fn read(c: &mut Client<UnixStream>, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xaa; len];
    c.read_at(offset, &mut buf).expect("read");
    buf
}

/// What nbdinfo says about an export on a unix socket.
fn nbdinfo(dir: &Path, socket: &str, export: &str) -> serde_json::Value {
    let uri = format!("nbd+unix:///{export}?socket={}", dir.join(socket).display());
    let out = Command::new("nbdinfo").args(["--json", &uri]).output().expect("this test needs nbdinfo");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let all: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    all["exports"][0].clone()
}

/// Our view of an export agrees with nbdinfo's.
fn agrees_with_nbdinfo(c: &Client<UnixStream>, theirs: &serde_json::Value) {
    let (ours, flags) = (c.export(), c.export().flags);
    assert_eq!(theirs["export-size"], ours.size, "{theirs}");
    for (name, ours) in [
        ("is_read_only", flags.is_read_only()),
        ("can_flush", flags.has_flush()),
        ("can_fua", flags.has_fua()),
        ("can_trim", flags.has_trim()),
        ("can_zero", flags.has_write_zeroes()),
        ("can_fast_zero", flags.has_fast_zero()),
        ("can_cache", flags.has_cache()),
        ("can_multi_conn", flags.can_multi_conn()),
    ] {
        assert_eq!(theirs[name], ours, "{name}: {theirs}");
    }
    if let Some(min) = theirs["block_size_minimum"].as_u64().filter(|min| *min > 0) {
        assert_eq!(min, u64::from(ours.min_block));
        assert_eq!(theirs["block_size_preferred"], ours.preferred_block);
        assert_eq!(theirs["block_size_maximum"], ours.max_block);
    }
}

#[test]
fn a_device_is_made_used_grown_and_found_again() {
    let volume = Volume::new(PASSWORD);
    let server = volume.start("a");
    let dir = server.dir.clone();
    assert_eq!(ninep::disk_size(&dir, "disk").unwrap(), None);
    let e = handshake(&mut sock::connect(&dir, NBD_SOCKET).unwrap(), "disk").unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{e}");

    ninep::create_disk(&dir, "disk", 64 * MIB).unwrap();
    ninep::create_disk(&dir, "disk", 64 * MIB).unwrap();
    assert_eq!(ninep::create_disk(&dir, "disk", 32 * MIB).unwrap_err().kind(), Kind::Conflict);
    assert_eq!(ninep::disk_size(&dir, "disk").unwrap(), Some(64 * MIB));
    assert!(ninep::database_open(&dir).unwrap());

    let mut c = nbd(&dir);
    agrees_with_nbdinfo(&c, &nbdinfo(&dir, NBD_SOCKET, "disk"));
    assert!(c.export().flags.has_flush() && c.export().flags.can_multi_conn());
    assert_eq!(read(&mut c, 0, 8192), vec![0; 8192]);
    let (one, two) = (pattern(1, 700_000), pattern(2, 4096));
    c.write_at(1000, &one, false).unwrap();
    c.write_at(10 * MIB, &two, true).unwrap();
    c.write_at(20 * MIB, &one, false).unwrap();
    c.flush().unwrap();
    c.trim(20 * MIB, 1 << 18).unwrap();
    c.write_zeroes(20 * MIB + (1 << 18), 4096, true).unwrap();
    let check = |c: &mut Client<UnixStream>| {
        assert!(read(c, 1000, one.len()) == one);
        assert!(read(c, 10 * MIB, two.len()) == two);
        let gone = (1 << 18) + 4096;
        assert!(read(c, 20 * MIB, gone) == vec![0; gone]);
        assert!(read(c, 20 * MIB + gone as u64, one.len() - gone) == one[gone..]);
    };
    check(&mut c);
    assert_eq!(c.read_at(64 * MIB - 1, &mut [0; 2]).unwrap_err().kind(), Kind::Usage);

    assert_eq!(ninep::grow_disk(&dir, "disk", 32 * MIB).unwrap_err().kind(), Kind::Refused);
    ninep::grow_disk(&dir, "disk", 96 * MIB).unwrap();
    ninep::grow_disk(&dir, "disk", 96 * MIB).unwrap();
    assert_eq!(c.export().size, 64 * MIB, "an old connection keeps its size");
    let mut grown = nbd(&dir);
    assert_eq!(grown.export().size, 96 * MIB);
    grown.write_at(96 * MIB - 4096, &two, false).unwrap();
    check(&mut grown);
    grown.disconnect().unwrap();
    c.disconnect().unwrap();

    let status = server.stop();
    assert!(status.success(), "a clean stop: {status}");
    let server = volume.start("a");
    let mut c = nbd(&dir);
    assert_eq!(c.export().size, 96 * MIB);
    check(&mut c);
    assert!(read(&mut c, 96 * MIB - 4096, 4096) == two);
    drop(c);
    let names: Vec<_> = ninep::Ninep::open(&dir, sock::CONTROL_TIMEOUT).unwrap().readdir(".nbd").unwrap();
    assert_eq!(names.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["disk"]);
    assert!(ninep::unlink_disk(&dir, "disk").unwrap());
    assert!(!ninep::unlink_disk(&dir, "disk").unwrap());
    assert_eq!(ninep::disk_size(&dir, "disk").unwrap(), None);
    assert!(server.stop().success());
}

#[test]
fn a_hostile_password_is_the_same_password_for_zerofs() {
    let password = "a\"b'c\\d$HOME ${HOME} $$ \n\t{}#=[ü😀]\u{7f}\u{1}\\u0041$";
    let mut volume = Volume::new(password);
    let server = volume.start("a");
    ninep::create_disk(&server.dir, "disk", MIB).unwrap();
    assert!(server.stop().success());

    // The same text opens it again; one that differs in a single dollar does not.
    assert!(volume.start("b").stop().success());
    volume.input.password = zeroize::Zeroizing::new(password.replace("$$", "$"));
    let mut wrong = volume.spawn("c");
    let status = wrong.daemon.wait(Duration::from_secs(30));
    assert_eq!(status.code(), Some(1));
    assert!(wrong.log_text().contains("Invalid password"), "{}", wrong.log_text());
}

#[test]
fn a_fenced_server_is_seen_although_it_answers() {
    let volume = Volume::new(PASSWORD);
    let first = volume.start("first");
    ninep::create_disk(&first.dir, "disk", 4 * MIB).unwrap();
    let mut old = nbd(&first.dir);
    old.write_at(0, &pattern(3, 4096), true).unwrap();
    assert!(ninep::database_open(&first.dir).unwrap());
    let mut inquiry = Inquiry::start(sock::connect(&first.dir, NBD_SOCKET).unwrap()).unwrap();
    assert_eq!(inquiry.info("disk").unwrap().size, 4 * MIB);
    assert_eq!(inquiry.info("other").unwrap_err().kind(), Kind::NotFound);
    assert_eq!(inquiry.info("disk").unwrap().size, 4 * MIB);
    let mut talk = ninep::Ninep::open(&first.dir, sock::CONTROL_TIMEOUT).unwrap();
    assert!(talk.database_open().unwrap());

    let second = volume.start("second");
    wait_until("the first server notices", Duration::from_secs(30), || {
        !ninep::database_open(&first.dir).expect("it still answers")
    });
    // The watchdog would read it in the log.
    let profile = Profile::of(zerofs::version()).unwrap();
    let log = first.log_text();
    assert!(log.lines().any(|l| profile.sign(l) == Some(Sign::Fenced)), "{log}");
    assert!(old.write_at(0, &[1; 512], false).is_err());
    if profile.zeros_when_closed {
        // Looking up what exists is no proof of life, and the data reads as zeros: hence our probe.
        assert_eq!(inquiry.info("disk").unwrap_err().kind(), Kind::NotFound);
        assert!(!talk.database_open().unwrap());
        assert!(talk.walk(".nbd").unwrap().is_some());
        assert_eq!(talk.disk_size("disk").unwrap(), Some(4 * MIB));
        assert_eq!(read(&mut old, 0, 4096), vec![0; 4096]);
        let e = handshake(&mut sock::connect(&first.dir, NBD_SOCKET).unwrap(), "disk").unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound, "a closed database looks like a missing export: {e}");
    }

    assert!(ninep::database_open(&second.dir).unwrap());
    assert!(read(&mut nbd(&second.dir), 0, 4096) == pattern(3, 4096));
    first.kill();
    assert!(second.stop().success());
}

/// The fault that the log signs are for: a read that the store fails is answered with zeros while the
/// database is open, and a partial write stores those zeros for good.
#[test]
fn store_trouble_shows_in_the_log_seconds_before_a_read_turns_to_zeros() {
    let volume = Volume::new(PASSWORD);
    let profile = Profile::of(zerofs::version()).unwrap();
    let server = volume.start("a");
    ninep::create_disk(&server.dir, "disk", 4 * MIB).unwrap();
    let mut c = nbd(&server.dir);
    // Random, so that it is not compressed into the block that ZeroFS reads when it starts.
    let mut data = vec![0; MIB as usize];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut data);
    c.write_at(0, &data, true).unwrap();
    drop(c);
    assert!(server.stop().success());

    let server = volume.start("b");
    let (mut reader, mut writer) = (nbd(&server.dir), nbd(&server.dir));
    let (store, away) = (volume.root().join("store/vol1/compacted"), volume.root().join("away"));
    std::fs::rename(&store, &away).unwrap();
    std::fs::remove_dir_all(volume.root().join("cache/b")).unwrap();
    let reader = std::thread::spawn(move || {
        let mut buf = vec![1; 4096];
        (reader.read_at(8192, &mut buf), buf)
    });
    let writer = std::thread::spawn(move || {
        let result = writer.write_at(512 << 10, &[1; 512], false);
        (result, writer)
    });
    wait_until("the log warns", Duration::from_secs(5), || {
        server.log_text().lines().any(|l| profile.sign(l) == Some(Sign::StoreGivingUp))
    });
    let warned = Instant::now();
    assert!(!reader.is_finished() && !writer.is_finished(), "the warning comes first");
    let (read_result, buf) = reader.join().unwrap();
    let (write_result, mut writer) = writer.join().unwrap();
    assert!(warned.elapsed() > Duration::from_secs(1), "time enough to kill it");
    assert!(!server.log_text().lines().any(|l| profile.sign(l) == Some(Sign::Closed)), "it is still open");
    std::fs::create_dir_all(&store).unwrap();
    for file in std::fs::read_dir(&away).unwrap() {
        let file = file.unwrap();
        std::fs::rename(file.path(), store.join(file.file_name())).unwrap();
    }
    if profile.has_fault("read-errors-are-zeros") {
        read_result.unwrap();
        assert_eq!(buf, vec![0; 4096], "what was random data");
        write_result.unwrap();
        writer.flush().unwrap();
        assert!(server.stop().success());
        let server = volume.start("c");
        let mut c = nbd(&server.dir);
        assert!(read(&mut c, 0, 512 << 10) == data[..512 << 10], "the store itself is unharmed");
        assert_eq!(read(&mut c, (512 << 10) + 512, 4096), vec![0; 4096], "the neighbours are lost for good");
    } else {
        assert!(read_result.is_err() && write_result.is_err());
    }
}

#[test]
fn flushed_writes_survive_sigkill_far_beyond_the_level_0_limit() {
    let volume = Volume::new(PASSWORD);
    let server = volume.start("a");
    ninep::create_disk(&server.dir, "disk", 8 * MIB).unwrap();
    let mut c = nbd(&server.dir);
    for i in 0..60u64 {
        c.write_at(i * 4096, &pattern(i as u8, 4096), false).unwrap();
        c.flush().unwrap();
    }
    server.kill();
    assert_eq!(c.flush().unwrap_err().kind(), Kind::Unreachable);
    let server = volume.start("a");
    let mut c = nbd(&server.dir);
    for i in 0..60u64 {
        assert!(read(&mut c, i * 4096, 4096) == pattern(i as u8, 4096), "write {i} is lost");
    }
}

#[test]
fn nbdkit_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket).args(["memory", "64M"]);
    let _server = Daemon::start(&mut command, &dir.path().join("log"));
    wait_until("nbdkit answers", Duration::from_secs(10), || sock::connect(dir.path(), "nbd.sock").is_ok());

    let mut plain = Client::connect(sock::connect(dir.path(), "nbd.sock").unwrap(), "").unwrap();
    agrees_with_nbdinfo(&plain, &nbdinfo(dir.path(), "nbd.sock", ""));
    assert!(!plain.is_structured());
    let data = pattern(5, 3 << 20);
    plain.write_at(MIB + 7, &data, true).unwrap();
    plain.trim(40 * MIB, MIB).unwrap();
    plain.write_zeroes(41 * MIB, MIB, true).unwrap();
    plain.flush().unwrap();

    let stream = sock::connect(dir.path(), "nbd.sock").unwrap();
    let mut rich = Client::connect_structured(stream, "").unwrap();
    assert!(rich.is_structured() && rich.has_block_status());
    assert!(read(&mut rich, MIB + 7, data.len()) == data);
    let extents = rich.block_status(0, 64 * MIB).unwrap();
    assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), 64 * MIB);
    assert!(extents.windows(2).all(|w| w[0].offset + w[0].len == w[1].offset));
    let data_extent = extents.iter().find(|e| !e.hole).expect("some data");
    assert!(data_extent.offset <= MIB + 7 && extents.last().unwrap().hole, "{extents:?}");
    rich.disconnect().unwrap();
    plain.disconnect().unwrap();
}

#[test]
fn qemu_nbd_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    let data = pattern(9, 1 << 20);
    std::fs::write(&image, &data).unwrap();
    std::fs::File::options().write(true).open(&image).unwrap().set_len(16 * MIB).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=8", "--format=raw", "--export-name=disk", "--socket"]);
    command.arg(dir.path().join("nbd.sock")).arg(&image);
    let _server = Daemon::start(&mut command, &dir.path().join("log"));
    wait_until("qemu-nbd answers", Duration::from_secs(10), || {
        sock::connect(dir.path(), "nbd.sock").is_ok_and(|mut s| handshake(&mut s, "disk").is_ok())
    });

    let connect = || sock::connect(dir.path(), "nbd.sock").unwrap();
    let e = Client::connect(connect(), "other").unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{e}");
    let mut plain = Client::connect(connect(), "disk").unwrap();
    agrees_with_nbdinfo(&plain, &nbdinfo(dir.path(), "nbd.sock", "disk"));
    assert!(read(&mut plain, 0, data.len()) == data);
    let mut rich = Client::connect_structured(connect(), "disk").unwrap();
    assert!(rich.is_structured());
    let mut all = vec![1; 16 << 20];
    rich.read_at(0, &mut all).unwrap();
    assert!(all[..data.len()] == data[..] && all[data.len()..].iter().all(|b| *b == 0));
    let want = |offset, len, hole| Extent { offset, len, hole, zero: hole };
    assert_eq!(rich.block_status(0, 16 * MIB).unwrap(), [want(0, MIB, false), want(MIB, 15 * MIB, true)]);
    plain.write_at(15 * MIB, &data, false).unwrap();
    plain.flush().unwrap();
    let file = std::fs::read(&image).unwrap();
    assert!(file[15 << 20..] == data[..]);
}

// ---------------------------------------------------------------- zerofsctl nbd info

/// What our own nbdinfo says of one export.
fn our_info(dir: &Path, socket: &str, export: &str) -> serde_json::Value {
    let out = Command::new(env!("CARGO_BIN_EXE_zerofsctl"))
        .args(["nbd", "info", "-o", "json", "--export", export])
        .arg(dir.join(socket))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let all: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&all["schema"], &all["kind"]), (&1.into(), &"nbd-info".into()));
    all["data"].clone()
}

/// Size, abilities and block sizes are those that nbdinfo tells.
fn info_agrees_with_nbdinfo(dir: &Path, socket: &str, export: &str) {
    let (theirs, all) = (nbdinfo(dir, socket, export), our_info(dir, socket, export));
    let ours = &all["exports"][0];
    assert_eq!(all["exports"].as_array().unwrap().len(), 1);
    assert_eq!((&ours["name"], &ours["size"]), (&export.into(), &theirs["export-size"]));
    for (name, their_name) in [
        ("read_only", "is_read_only"),
        ("flush", "can_flush"),
        ("fua", "can_fua"),
        ("trim", "can_trim"),
        ("write_zeroes", "can_zero"),
        ("fast_zero", "can_fast_zero"),
        ("cache", "can_cache"),
        ("multi_conn", "can_multi_conn"),
    ] {
        assert_eq!(ours["can"][name], theirs[their_name], "{name}: {ours} {theirs}");
    }
    for (name, their_name) in [
        ("min_block", "block_size_minimum"),
        ("preferred_block", "block_size_preferred"),
        ("max_block", "block_size_maximum"),
    ] {
        if let Some(size) = theirs[their_name].as_u64() {
            assert_eq!(ours[name], size, "{name}: {ours} {theirs}");
        }
    }
    let contexts = theirs["contexts"].as_array().cloned().unwrap_or_default();
    assert_eq!(
        ours["can"]["block_status"],
        contexts.iter().any(|c| *c == "base:allocation"),
        "{ours} {theirs}"
    );
}

#[test]
fn nbd_info_says_what_nbdinfo_says_of_nbdkit_qemu_and_zerofs() {
    let dir = support::dir::TestDir::new();
    let log = dir.join("servers.log");
    let (kit, qemu, image) = (dir.join("kit.sock"), dir.join("qemu.sock"), dir.join("image"));
    std::fs::File::create(&image).unwrap().set_len(24 * MIB).unwrap();
    let _kit = Daemon::start(
        Command::new("nbdkit").args(["--foreground", "--unix"]).arg(&kit).args([
            "--filter=blocksize-policy",
            "memory",
            "16M",
            "blocksize-minimum=512",
            "blocksize-preferred=4096",
            "blocksize-maximum=1M",
        ]),
        &log,
    );
    let _qemu = Daemon::start(
        Command::new("qemu-nbd")
            .args([
                "--persistent",
                "--read-only",
                "--shared=4",
                "--format=raw",
                "--export-name=image",
                "--socket",
            ])
            .arg(&qemu)
            .arg(&image),
        &log,
    );
    for socket in [&kit, &qemu] {
        wait_until("the server listens", Duration::from_secs(20), || UnixStream::connect(socket).is_ok());
    }
    info_agrees_with_nbdinfo(dir.path(), "kit.sock", "");
    info_agrees_with_nbdinfo(dir.path(), "qemu.sock", "image");
    // Without a name: what the server lists.
    let out = Command::new(env!("CARGO_BIN_EXE_zerofsctl"))
        .args(["nbd", "info", "-o", "name"])
        .arg(&qemu)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "image\n");
    // An export that is not there, a socket that is not there.
    for (socket, export, code, word) in
        [(&qemu, "other", 10, "no export \"other\""), (&dir.join("none.sock"), "x", 10, "there is no socket")]
    {
        let out = Command::new(env!("CARGO_BIN_EXE_zerofsctl"))
            .args(["nbd", "info", "--export", export])
            .arg(socket)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{text}");
        assert!(text.contains(word) && text.contains("hint:"), "{text}");
    }
    let volume = Volume::new(PASSWORD);
    let server = volume.start("info");
    ninep::create_disk(&server.dir, "disk", 8 * MIB).unwrap();
    info_agrees_with_nbdinfo(&server.dir, NBD_SOCKET, "disk");
    assert!(server.stop().success());
}
