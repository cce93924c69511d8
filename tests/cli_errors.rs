//! Bad input and bad surroundings: each is a clear error with a hint and the exit code of the design; nothing is
//! left behind and nothing that was there is lost.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use support::cli::{Answer, Node, assert_holds, pattern, write_durably};
use support::require_program;

const USAGE: i32 = 2;
const ENVIRONMENT: i32 = 1;
const NOT_FOUND: i32 = 10;
const BUSY: i32 = 11;
const UNREACHABLE: i32 = 20;
const INTERRUPTED: i32 = 130;

/// A command in a mount namespace of its own, after `prepare` has run there.
fn privately(node: &Node, prepare: &str, words: &[&str]) -> Answer {
    require_program("unshare");
    let script = format!("set -e; {prepare}; exec \"$@\"");
    Answer::of(&mut node.wrapped(&["unshare", "--mount", "sh", "-c", &script, "sh"], words))
}

/// A small filesystem in memory, unmounted at the end.
struct SmallDisk(String);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> SmallDisk {
        fs::create_dir_all(at).expect("a folder");
        let at = at.display().to_string();
        mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "small", &at]);
        SmallDisk(at)
    }

    fn grow(&self, size: &str) {
        mount(&["-o", &format!("remount,size={size}"), &self.0]);
    }

    /// Takes all room but `left` bytes.
    fn fill(&self, left: u64) {
        let vfs = nix::sys::statvfs::statvfs(self.0.as_str()).expect("statvfs");
        let free = vfs.blocks_available() * vfs.fragment_size();
        fs::write(Path::new(&self.0).join("filler"), vec![1; (free - left) as usize]).expect("filler");
    }

    fn make_room(&self) {
        fs::remove_file(Path::new(&self.0).join("filler")).expect("filler");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.as_str(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn mount(words: &[&str]) {
    let done = Command::new("mount").args(words).status().expect("mount");
    assert!(done.success(), "mount {words:?}");
}

#[test]
fn root_wrong_words_change_nothing() {
    let node = Node::new();
    let long = "a".repeat(300);
    let attach = ["attach", "vol1", "--target", "m"];
    let cases: &[(&[&str], &[&str])] = &[
        (&["--fs", "zfs"], &["unknown filesystem \"zfs\""]),
        (&["--fs", ""], &["unknown filesystem"]),
        (&["--size", "0"], &["the size is zero"]),
        (&["--size", "-5"], &["-5", "negative"]),
        (&["--size=-1Gi"], &["negative"]),
        (&["--size", "1G1"], &["1G1", "unknown unit"]),
        (&["--size", ""], &["invalid size"]),
        (&["--size", "1Gi "], &["invalid size"]),
        (&["--size", "1.0000001"], &["whole number of bytes"]),
        (&["--size", "4097"], &["4 KiB blocks"]),
        (&["--size", "99999999999Ti"], &["too large"]),
        (&["--size", "1Mi"], &["too small for ext4"]),
        (&["--fs", "xfs", "--size", "100Mi"], &["too small for xfs"]),
        (&["--fs", "btrfs", "--size", "64Mi"], &["too small for btrfs"]),
        (&["--mount-option", "bind"], &["\"bind\""]),
        (&["--mount-option", "loop=/dev/loop0"], &["loop"]),
        (&["--mount-option", "noatime,"], &["is empty"]),
        (&["--mount-option", "a b"], &["characters"]),
        (&["--mount-option", "ro"], &["--read-only"]),
        (&["--block", "--fs", "ext4"], &["--block", "--fs"]),
        (&["--block", "--mount-option", "noatime"], &["--mount-option"]),
        (&["--transport", "usb"], &["unknown transport"]),
        (&["--runtime", "pod"], &["unknown runtime"]),
        (&["--io-timeout", "soon"], &["--io-timeout", "soon"]),
        (&["--io-timeout", "1ms"], &["below 1s"]),
        (&["--replay-log", "1Mi"], &["out of range"]),
        (&["--storage-url", "http://127.0.0.1/b"], &["storage URL"]),
        (&["--storage-url", "file://relative"], &["storage URL"]),
        (&["--storage-url", "s3://"], &["storage URL"]),
        (&["--config", "nowhere.yaml"], &["nowhere.yaml"]),
        (&["--secret", "nowhere.yaml"], &["nowhere.yaml"]),
        (&["--frobnicate"], &["--frobnicate"]),
    ];
    for (more, words) in cases {
        node.run(&[&attach[..], more].concat()).expect_error(USAGE, words);
    }
    for (id, word) in [
        ("a/b", "'/'"),
        ("..", "letter or digit"),
        (".", "letter or digit"),
        ("a..b", "'..'"),
        ("-a", "unexpected argument"),
        ("a b", "' '"),
        ("a\nb", "not allowed"),
        ("ü", "not allowed"),
        ("", "empty"),
        (&long, "300 bytes"),
    ] {
        node.run(&["attach", id, "--target", "m"]).expect_error(USAGE, &[word]);
    }
    for words in [
        &["attach"][..],
        &["attach", "vol1"],
        &["detach"],
        &["detach", "vol1", "--all"],
        &["detach", "vol1", "--stop-timeout", "x"],
        &["resize", "vol1"],
        &["resize", "vol1", "0"],
        &["resize", "vol1", "-1Gi"],
        &["resize", "vol1", "2G2"],
        &["fsck", "vol1", "--read-data", "3/2"],
        &["fsck", "vol1", "--read-data", "0%"],
        &["fsck", "vol1", "--repair"],
        &["list", "-o", "xml"],
        &["attach", "vol1", "--target", ""],
    ] {
        node.run(words).expect_error(USAGE, &[]);
    }
    for words in [
        &["detach", "vol1"][..],
        &["detach", "./nowhere"],
        &["show", "vol1"],
        &["recover", "vol1"],
        &["fsck", "vol1"],
        &["resize", "vol1", "2Gi"],
    ] {
        node.run(words).expect_error(10, &[]);
    }
    node.assert_nothing_left("after all the wrong words");
    assert!(!node.dir.join("m").exists());
    // None of it made a volume.
    assert_eq!(node.json(&["list"]).as_array().expect("a list").len(), 0);
}

#[test]
fn root_wrong_targets_are_left_alone() {
    let node = Node::new();
    fs::write(node.dir.join("file"), "mine").expect("a file");
    fs::create_dir(node.dir.join("full")).expect("a folder");
    fs::write(node.dir.join("full/mine"), "mine").expect("a file");
    let other = SmallDisk::mount(&node.dir.join("other"), "1M");
    std::os::unix::fs::symlink("full", node.dir.join("link")).expect("a link");
    for (target, code, word) in [
        ("file", USAGE, "is not a folder"),
        ("file/below", USAGE, "not a folder"),
        ("full", USAGE, "is not empty"),
        ("link", USAGE, "is not a folder"),
        ("no/such/folder", USAGE, "does not exist"),
        ("other", BUSY, "already mounted"),
    ] {
        node.run(&["attach", "vol1", "--target", target]).expect_error(code, &[word]);
    }
    for target in ["file", "full", "link", "other"] {
        node.run(&["attach", "vol1", "--block", "--target", target]).expect_error(USAGE, &["exists already"]);
    }
    assert_eq!(fs::read_to_string(node.dir.join("file")).expect("the file"), "mine");
    assert_eq!(fs::read_to_string(node.dir.join("full/mine")).expect("the file"), "mine");
    drop(other);
    node.assert_nothing_left("after wrong targets");
    assert_eq!(
        node.json(&["list"]).as_array().expect("a list").len(),
        0,
        "no volume was made for a typing error"
    );
}

/// What is wrong only for the kernel is found at the mount, and everything is taken down again.
#[test]
fn root_a_mount_option_that_the_kernel_refuses() {
    let node = Node::new();
    let answer = node.run(&["attach", "vol1", "--target", "m", "--mount-option", "nonsense"]);
    answer.expect_error(
        ENVIRONMENT,
        &["vol1", "step mount", "nonsense"].map(|w| if w == "nonsense" { "bad option" } else { w }),
    );
    node.assert_nothing_left("after a refused mount option");
    assert!(!node.dir.join("m").exists(), "the folder that was made for it is gone");
    node.ok(&["attach", "vol1", "--target", "m", "--mount-option", "noatime"]);
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("after a detach");
}

#[test]
fn root_no_root() {
    let node = Node::new();
    require_program("setpriv");
    // A user who may read the program and the folder, but is not root.
    let program = node.dir.join("zerofsctl");
    fs::copy(env!("CARGO_BIN_EXE_zerofsctl"), &program).expect("a copy");
    fs::set_permissions(node.dir.path(), fs::Permissions::from_mode(0o777)).expect("mode");
    for words in [
        &["attach", "vol1", "--target", "m"][..],
        &["detach", "vol1"],
        &["detach", "--all"],
        &["resize", "vol1", "2Gi"],
        &["fsck", "vol1"],
        &["recover"],
    ] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).args(words);
        command.env("ZEROFSCTL_STATE_DIR", node.state()).env("ZEROFSCTL_RUN_DIR", node.run_root());
        Answer::of(command.current_dir(node.dir.path())).expect_error(ENVIRONMENT, &["root"]);
        assert!(!node.state().exists(), "{words:?} made the state folder");
    }
}

#[test]
fn root_no_fuse_device() {
    let node = Node::new();
    fs::write(node.dir.join("empty"), "").expect("a file");
    for prepare in ["mount --bind empty /dev/fuse", "mount -t tmpfs none /dev"] {
        privately(&node, prepare, &["attach", "vol1", "--target", "m"])
            .expect_error(ENVIRONMENT, &["/dev/fuse"]);
        node.assert_nothing_left(prepare);
        // Not even a password, for a store in which nothing is.
        assert!(
            !node.state().exists(),
            "{prepare}: {:?}",
            fs::read_dir(node.state()).map(Iterator::collect::<Vec<_>>)
        );
    }
}

#[test]
fn root_missing_programs_are_named_with_their_package() {
    let node = Node::new();
    fs::write(node.dir.join("empty"), "").expect("a file");
    node.ok(&["attach", "ext", "--target", "m"]);
    node.ok(&["detach", "ext"]);
    for (program, package, words) in [
        ("mkfs.ext4", "e2fsprogs", &["attach", "new1", "--target", "m"][..]),
        ("mkfs.xfs", "xfsprogs", &["attach", "new2", "--target", "m", "--fs", "xfs"]),
        ("mkfs.btrfs", "btrfs-progs", &["attach", "new3", "--target", "m", "--fs", "btrfs"]),
        // Only asked about what may be formatted.
        ("blkid", "util-linux", &["attach", "new4", "--target", "m"]),
        ("mount", "mount", &["attach", "ext", "--target", "m"]),
        ("e2fsck", "e2fsprogs", &["fsck", "ext"]),
        ("resize2fs", "e2fsprogs", &["resize", "ext", "2Gi"]),
    ] {
        // Hidden wherever it may be found.
        let places = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        let hide: Vec<String> = places
            .iter()
            .map(|dir| format!("{dir}/{program}"))
            .filter(|path| Path::new(path).exists())
            .map(|path| format!("\"$m\" --bind empty {path}"))
            .collect();
        assert!(!hide.is_empty(), "{program} is not installed");
        // `mount` itself may be what is hidden: a copy of it does the work.
        fs::copy("/usr/bin/mount", node.dir.join("mount")).expect("a copy of mount");
        let prepare = format!("m=./mount; {}", hide.join(" && "));
        let answer = privately(&node, &prepare, words).expect_error(ENVIRONMENT, &[program, "not installed"]);
        assert!(answer.stderr.contains(&format!("apt-get install {package}")), "{answer:#?}");
        node.assert_nothing_left(program);
    }
    // The volume is as it was.
    node.ok(&["fsck", "ext"]);
}

#[test]
fn root_zerofs_that_is_missing_or_no_zerofs() {
    let node = Node::new();
    for (program, word) in
        [("/nowhere/zerofs", "is not a program"), ("/bin/true", "does not tell a ZeroFS version")]
    {
        let words = ["attach", "vol1", "--target", "m", "--zerofs-bin", program];
        node.run(&words).expect_error(ENVIRONMENT, &[program, word]);
    }
    node.assert_nothing_left("without zerofs");
}

#[test]
fn root_an_unreachable_store_is_said_quickly() {
    let node = Node::new();
    let config = "storageURL: s3://bucket/prefix\nawsEndpoint: http://127.0.0.1:1\nawsAllowHTTP: \"true\"\n";
    fs::write(node.dir.join("c.yaml"), config).expect("a config");
    for words in [
        &["attach", "vol1", "--target", "m"][..],
        &["attach", "vol1", "--target", "m", "--dry-run"],
        &["list"],
        &["show", "vol1"],
        &["fsck", "vol1"],
        &["resize", "vol1", "2Gi"],
    ] {
        let began = Instant::now();
        let mut command = node.command(&[words, &["--config", "c.yaml"]].concat());
        command.env("ZEROFS_ENCRYPTION_PASSWORD", "correct horse");
        command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "hidden-key");
        let answer = Answer::of(&mut command).expect_error(UNREACHABLE, &["127.0.0.1:1"]);
        assert!(
            !answer.stderr.contains("hidden-key") && !answer.stderr.contains("correct horse"),
            "{answer:#?}"
        );
        assert!(began.elapsed() < Duration::from_secs(10), "{words:?} took {:?}", began.elapsed());
        node.assert_nothing_left("an unreachable store");
    }
}

#[test]
fn root_read_only_folders() {
    let node = Node::new();
    node.ok(&["attach", "vol1", "--target", "m"]);
    let bytes = pattern(1, 100_000);
    write_durably(&node.dir.join("m/data"), &bytes);
    node.ok(&["detach", "vol1"]);
    for (folder, words) in [
        ("s/store", &["attach", "vol1", "--target", "m"][..]),
        ("s/store", &["attach", "new", "--target", "m"]),
        ("s/store", &["fsck", "vol1"]),
        ("s", &["attach", "vol1", "--target", "m"]),
        ("r", &["attach", "vol1", "--target", "m"]),
    ] {
        let prepare = format!("mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}");
        privately(&node, &prepare, words).expect_error(ENVIRONMENT, &["Read-only file system"]);
        node.assert_nothing_left(folder);
    }
    node.ok(&["attach", "vol1", "--target", "m"]);
    assert_holds(&node.dir.join("m/data"), &bytes, "after read-only folders");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}

/// A wrong password is noticed before ZeroFS is tried with it: there it would fence the running server.
#[test]
fn root_a_wrong_password_disturbs_nobody() {
    let node = Node::new();
    node.ok(&["attach", "vol1", "--target", "m"]);
    let wrong = |words: &[&str]| {
        Answer::of(node.command(words).env("ZEROFS_ENCRYPTION_PASSWORD", "a wrong password"))
            .expect_error(USAGE, &["vol1", "password"])
    };
    let bytes = pattern(2, 100_000);
    write_durably(&node.dir.join("m/data"), &bytes);
    let answer = wrong(&["attach", "vol1", "--target", "m2"]);
    assert!(!answer.stderr.contains("a wrong password"), "{answer:#?}");
    // From another node's folders, too.
    let store = format!("file://{}/store", node.state().display());
    let other =
        ["--state-dir", "s2", "--run-dir", "r2", "attach", "vol1", "--target", "m2", "--storage-url", &store];
    wrong(&other);
    assert!(!node.dir.join("s2/volumes/vol1").exists(), "nothing is kept of a volume that is not ours");
    let found = node.found("vol1");
    assert_eq!((&found["state"], &found["restarts"]), (&"attached".into(), &0.into()), "{found:#}");
    assert_eq!(found["fs"], "ext4", "what is known of the volume stays known: {found:#}");
    write_durably(&node.dir.join("m/data"), &bytes);
    node.ok(&["detach", "vol1"]);
    wrong(&["attach", "vol1", "--target", "m"]);
    wrong(&["fsck", "vol1"]);
    node.assert_nothing_left("after a wrong password");
    node.ok(&["attach", "vol1", "--target", "m"]);
    assert_holds(&node.dir.join("m/data"), &bytes, "after a wrong password");
    node.ok(&["detach", "vol1"]);
}

#[test]
fn root_a_full_disk_under_the_run_folder() {
    let node = Node::new();
    let disk = SmallDisk::mount(&node.run_root(), "16M");
    for left in [0, 4 << 10, 12 << 10, 64 << 10] {
        disk.fill(left);
        let answer = node.run(&["attach", "vol1", "--target", "m"]);
        answer.expect_error(ENVIRONMENT, &["No space left on device"]);
        node.assert_no_files_left(&format!("with {left} bytes left"));
        disk.make_room();
    }
    // It fills up while the volume is in use: that does not keep it from being taken down.
    node.ok(&["attach", "vol1", "--target", "m"]);
    let bytes = pattern(3, 100_000);
    write_durably(&node.dir.join("m/data"), &bytes);
    disk.fill(0);
    // The last block of the journal may have room for a few lines more.
    let refused = (0..8)
        .map(|n| node.run(&["attach", "vol1", "--target", &format!("m{n}")]))
        .find(|a| a.code != Some(0));
    let refused = refused.expect("there is no room for a longer journal");
    refused.expect_error(ENVIRONMENT, &["No space left on device"]);
    write_durably(&node.dir.join("m/more"), &bytes);
    node.ok(&["detach", "vol1"]);
    disk.make_room();
    drop(disk);
    node.assert_nothing_left("after a detach on a full disk");
    node.ok(&["attach", "vol1", "--target", "m"]);
    assert_holds(&node.dir.join("m/data"), &bytes, "after a full disk");
    assert_holds(&node.dir.join("m/more"), &bytes, "after a full disk");
    node.ok(&["detach", "vol1"]);
}

#[test]
fn root_a_full_disk_under_the_state_folder() {
    let node = Node::new();
    let disk = SmallDisk::mount(&node.state(), "16M");
    for left in [0, 8 << 10, 32 << 10] {
        disk.fill(left);
        let answer = node.run(&["attach", "vol1", "--target", "m"]);
        let full =
            ["No space left on device", "the storage is full"].iter().any(|w| answer.stderr.contains(w));
        assert!(full, "{answer:#?}");
        answer.expect_error(ENVIRONMENT, &[]);
        node.assert_no_files_left(&format!("with {left} bytes left"));
        disk.make_room();
    }
    node.ok(&["attach", "vol1", "--target", "m"]);
    node.ok(&["detach", "vol1"]);
    drop(disk);
    node.assert_nothing_left("after a full state folder");
}

/// ZeroFS cannot store anything any more: writers wait, nothing fails, and all goes on once there is room.
#[test]
fn root_a_full_store_stalls_and_then_goes_on() {
    let node = Node::new();
    let disk = SmallDisk::mount(&node.dir.join("store"), "24M");
    let store = format!("file://{}", node.dir.join("store").display());
    let attach = ["attach", "vol1", "--target", "m", "--storage-url", &store];
    let with_password = |words: &[&str]| {
        Answer::of(node.command(words).env("ZEROFS_ENCRYPTION_PASSWORD", "correct horse")).expect_code(0)
    };
    with_password(&attach);
    let bytes = pattern(4, 40 << 20);
    let path = node.dir.join("m/data");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_durably(&path, &bytes));
        support::wait_until("the volume stalls", Duration::from_secs(60), || {
            node.found("vol1")["state"] == "stalled"
        });
        let reason = node.found("vol1")["reason"].as_str().unwrap_or_default().to_owned();
        assert!(reason.contains("No space left on device"), "{reason}");
        assert!(!writer.is_finished(), "a write is not durable on a full store");
        // An unmount would wait in the kernel without end, where nobody can stop it.
        let began = Instant::now();
        let answer = node.run(&["detach", "vol1", "--stop-timeout", "3s"]);
        answer.expect_error(INTERRUPTED, &["vol1", "3 s"]);
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        disk.grow("200M");
        writer.join().expect("the write succeeds in the end");
    });
    assert_holds(&path, &bytes, "after a stall");
    node.ok(&["detach", "vol1"]);
    with_password(&attach);
    assert_holds(&path, &bytes, "after a stall and a detach");
    node.ok(&["detach", "vol1"]);
    drop(disk);
    node.assert_nothing_left("after a full store");
}

#[test]
fn root_wrong_settings_name_file_and_key() {
    let node = Node::new();
    let cases: &[(&str, &[&str])] = &[
        ("nonsense: 1", &["unknown key \"nonsense\""]),
        ("storageURL: [1, 2]", &["storageURL", "a list"]),
        ("storageURL: {a: b}", &["storageURL", "a map"]),
        ("storageURL: s3://b", &["storageURL", "bucket name"]),
        ("cacheDiskSizeGB: much", &["cacheDiskSizeGB", "much"]),
        ("cacheDir: relative", &["cacheDir"]),
        ("lsmL0MaxSsts: \"-4\"", &["lsmL0MaxSsts", "-4"]),
        ("lsmFlushIntervalSecs: \"1\"", &["lsmFlushIntervalSecs"]),
        ("cpuLimit: fast", &["cpuLimit", "fast"]),
        ("memoryLimit: \"0\"", &["memoryLimit", "zero"]),
        ("awsAllowHTTP: maybe", &["awsAllowHTTP", "maybe"]),
        ("awsEndpoint: ftp://x", &["awsEndpoint"]),
        ("encryptionPasswordSecretName: absent", &["absent"]),
        ("- a\n- b", &["a list"]),
        (": : :", &["not valid YAML", "line 1"]),
        ("storageURL: a\nstorageURL: b", &["storageURL"]),
    ];
    for (text, words) in cases {
        fs::write(node.dir.join("c.yaml"), text).expect("a config");
        let attach = ["attach", "vol1", "--target", "m", "--config", "c.yaml"];
        node.run(&attach).expect_error(USAGE, words);
    }
    node.assert_nothing_left("after wrong settings");
    assert!(!node.dir.join("m").exists());
}

#[test]
fn root_a_command_while_another_one_works_is_busy() {
    let node = Node::new();
    node.ok(&["attach", "vol1", "--target", "m"]);
    let lock = fs::File::open(node.run_root().join("locks/vol1.lock")).expect("the lock");
    lock.lock().expect("nobody holds it");
    for words in [
        &["attach", "vol1", "--target", "m2"][..],
        &["detach", "vol1"],
        &["resize", "vol1", "2Gi"],
        &["recover", "vol1"],
        &["fsck", "vol1"],
    ] {
        node.run(words).expect_error(BUSY, &["vol1", "another command"]);
    }
    // To look is always possible.
    assert_eq!(node.found("vol1")["state"], "attached");
    lock.unlock().expect("unlocked");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}

#[test]
fn root_only_a_socket_is_asked_for_what_its_server_has() {
    let node = Node::new();
    let at = |name: &str| node.target(name);
    fs::write(at("file"), "x").expect("a file");
    std::os::unix::fs::symlink(at("file"), at("link")).expect("a link");
    nix::unistd::mkfifo(&*at("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    for path in ["/etc/passwd", "/tmp", "/dev/null", &at("file"), &at("link"), &at("pipe")] {
        let said = format!("{path} is no socket");
        node.run(&["nbd", "info", path]).expect_error(USAGE, &[&said]);
    }
    node.run(&["nbd", "info", "/"]).expect_error(USAGE, &["/ names no socket"]);
    node.run(&["nbd", "info", &at("nothing")]).expect_error(NOT_FOUND, &["there is no socket"]);
    // A socket that nobody has any more, also by a link.
    drop(std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket"));
    std::os::unix::fs::symlink(at("socket"), at("to-socket")).expect("a link");
    for path in [at("socket"), at("to-socket")] {
        node.run(&["nbd", "info", &path]).expect_error(UNREACHABLE, &["nobody answers"]);
    }
}

/// The same run folder with another state folder is another volume of the same name: they are kept apart.
#[test]
fn root_a_volume_of_another_state_folder_is_not_taken_for_ours() {
    let node = Node::new();
    node.ok(&["attach", "vol1", "--target", "m"]);
    for words in [
        &["attach", "vol1", "--target", "m2"][..],
        &["detach", "vol1"],
        &["resize", "vol1", "2Gi"],
        &["recover", "vol1"],
    ] {
        let answer = node.run(&[&["--state-dir", "s2"], words].concat());
        answer.expect_error(ENVIRONMENT, &["vol1", "it is attached from", "s/store"]);
    }
    node.assert_attached("vol1", &[&node.target("m")], "after refusals");
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("in the end");
}
