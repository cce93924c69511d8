//! A storage that takes nothing, while a filesystem is mounted or unmounted.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cli::{Answer, Node, Victim, assert_holds, pattern, write_durably};
use super::wait_until;

/// Long enough for any machine.
const LONG: Duration = Duration::from_secs(60);

/// The filesystem has nothing left to write, and yet writes that it is clean when it is unmounted: the detach is
/// given up, the next one finds what it left under way, and it ends by itself, or by force.
pub fn an_unmount_without_storage(node: &Node, transport: &str) {
    let target = node.target("m");
    let attach =
        || node.ok(&["attach", "vol1", "--target", &target, "--size", "64Mi", "--transport", transport]);
    attach();
    let (file, bytes) = (Path::new(&target).join("data"), pattern(4, 1 << 20));
    write_durably(&file, &bytes);
    // A sync that finds nothing to do.
    let (programs, path) = own_programs(node);
    std::os::unix::fs::symlink("/bin/true", programs.join("sync")).expect("a new link");
    let detach = |what: &str, words: &[&str]| {
        let words = [&["detach", what, "--stop-timeout", "3s"], words].concat();
        Answer::of(node.command(&words).env("PATH", &path))
    };
    let stop = || {
        let zerofs = Pid::from_raw(node.processes().1[0]);
        kill(zerofs, Signal::SIGSTOP).expect("it runs");
        zerofs
    };
    let zerofs = stop();
    let refused = detach(&target, &[]);
    // The mount is in no table any more, but by its place the volume is still known.
    let again = [detach("vol1", &[]), detach(&target, &[])];
    kill(zerofs, Signal::SIGCONT).expect("it still runs");
    refused.expect_error(130, &["is not unmounted within 3 s", "m"]);
    for again in again {
        again.expect_error(130, &["/dev/", "is not unmounted within 3 s"]);
    }
    // A command waits for an unmount that an earlier one began.
    node.ok(&["detach", "vol1"]);
    node.assert_nothing_left("after an unmount in two goes");

    for given_up in [false, true] {
        attach();
        assert_holds(&file, &bytes, "after an unmount in two goes");
        stop();
        if given_up {
            detach("vol1", &[]).expect_code(130);
        }
        let forced = detach(&target, &["--force"]).expect_code(0);
        assert!(forced.stderr.contains("is failed by force"), "{given_up}: {forced:?}");
        if transport == "fuse" {
            node.assert_nothing_left("by force");
        } else {
            // What was acknowledged may wait in the replay log for the next attach.
            node.dir.assert_unused();
        }
    }
    attach();
    assert_holds(&file, &bytes, "after an unmount by force");
    node.ok(&["detach", "vol1"]);
}

/// A command is killed while its mount(8) waits for the storage: the program goes on without it, and whatever comes next
/// waits for its end, as the mount would otherwise appear behind its back.
pub fn a_mount_that_outlives_its_command(node: &Node, transport: &str) {
    let target = node.target("m");
    let words = ["attach", "vol1", "--target", &target, "--size", "64Mi", "--transport", transport];
    node.ok(&words);
    let (file, bytes) = (Path::new(&target).join("data"), pattern(5, 1 << 20));
    write_durably(&file, &bytes);
    node.ok(&["detach", "vol1"]);
    // It is held up until the storage is stopped.
    let (programs, path) = own_programs(node);
    let (here, go, mount) = (programs.join("here"), programs.join("go"), programs.join("mount"));
    let script = format!(
        "#!/bin/sh\n: > {}\nwhile [ ! -e {} ]; do sleep 0.01; done\nexec /bin/mount \"$@\"\n",
        here.display(),
        go.display()
    );
    fs::write(&mount, script).expect("a new file");
    fs::set_permissions(&mount, fs::Permissions::from_mode(0o755)).expect("it is ours");
    // An attach that is killed in its mount, which waits for the storage: that ZeroFS.
    let killed = |words: &[&str]| {
        let mut command = node.command(words);
        let mut command = command.env("PATH", &path).stderr(Stdio::null()).spawn().expect("it starts");
        wait_until("it mounts", LONG, || here.exists());
        let zerofs = Pid::from_raw(node.processes().1[0]);
        kill(zerofs, Signal::SIGSTOP).expect("it runs");
        fs::write(&go, "").expect("a new file");
        wait_until("its mount waits in the kernel", LONG, || waits_in_mount(&target));
        command.kill().expect("it waits");
        command.wait().expect("it was killed");
        fs::remove_file(&here).and_then(|()| fs::remove_file(&go)).expect("they are ours");
        zerofs
    };
    let whole = || {
        node.ok(&words);
        node.assert_attached("vol1", &[&target], "after a mount that went on alone");
        assert_holds(&file, &bytes, "after a mount that went on alone");
        node.ok(&["detach", "vol1"]);
        node.assert_nothing_left("after a mount that went on alone");
    };
    for next in [&["recover", "vol1"][..], &words, &["detach", "vol1"]] {
        let zerofs = killed(&words);
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| node.run(next));
            std::thread::sleep(Duration::from_millis(700));
            let waits = !answer.is_finished();
            kill(zerofs, Signal::SIGCONT).expect("it still runs");
            let answer = answer.join().expect("no panic").expect_code(0);
            assert!(waits, "{answer:?}");
        });
        whole();
    }
    // By force nothing is waited for any longer than was said, although the attach, which is undone, was told nothing of that:
    // neither the mount, nor the ZeroFS that is still stopped.
    let force = ["detach", "vol1", "--force", "--stop-timeout", "2s"];
    for keeper_too in [false, true] {
        killed(&words);
        assert!(!keeper_too || node.kill(Victim::Keeper));
        let begun = Instant::now();
        let answer = node.run(&force).expect_code(0);
        assert!(answer.stderr.contains("ZeroFS is killed now"), "{keeper_too}: {answer:?}");
        assert!(keeper_too || answer.stderr.contains("is failed by force"), "{answer:?}");
        // Far less than anything waits for that was told nothing.
        assert!(begun.elapsed() < LONG, "{keeper_too}: {:?}, {answer:?}", begun.elapsed());
        whole();
    }
    if transport == "nbd" {
        // The kernel would hold the I/O of a dead device for a while yet.
        for path in ["guarded", "direct"] {
            killed(&[&words[..], &["--path", path]].concat());
            assert!(node.kill(Victim::Both));
            node.ok(&["recover", "vol1"]);
            whole();
        }
    }
}

/// A new folder for programs that come before those of the system, and the PATH for that.
fn own_programs(node: &Node) -> (PathBuf, String) {
    let programs = node.dir.join("programs");
    fs::create_dir(&programs).expect("a new folder");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").expect("there is one"));
    (programs, path)
}

/// Whether a mount(8) at this place is in the kernel, and waits there.
fn waits_in_mount(target: &str) -> bool {
    let all = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    all.map(|entry| entry.path()).any(|process| {
        let line = fs::read_to_string(process.join("cmdline")).unwrap_or_default();
        let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
        line.starts_with("/bin/mount\0") && line.ends_with(&format!("\0{target}\0")) && stat.contains(") D ")
    })
}
