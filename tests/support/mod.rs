//! What the integration tests share: a folder that proves it was left clean, a fault proxy, an S3
//! stand-in, a runner for fio. A test file begins with `mod support;`.
//!
//! Nothing here skips a test. A program or a privilege that is not there fails the test that asked for it,
//! with the command that brings it.
#![allow(dead_code, reason = "each test file is a program of its own and uses only a part of this")]

pub mod cli;
pub mod csi;
pub mod dir;
pub mod fio;
pub mod forgetful;
pub mod http;
pub mod keeper;
pub mod kube;
pub mod kubelet;
pub mod ledger;
pub mod matrix;
pub mod minio;
pub mod model;
pub mod moto;
pub mod proxy;
pub mod s3;
pub mod sanity;
pub mod script;
pub mod stuck;
pub mod vm;
pub mod watch;
pub mod zerofs;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Fails unless the test runs as root.
#[track_caller]
pub fn require_root() {
    assert!(nix::unistd::geteuid().is_root(), "this test mounts and attaches devices: run it as root");
}

/// The path of a program that the test needs; fails when it is not installed.
#[track_caller]
pub fn require_program(name: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"])
        .map(|dir| Path::new(dir).join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed; scripts/setup test brings it"))
}

/// The folder into which scripts/setup installs what is not a Debian package.
pub fn tools_dir() -> PathBuf {
    std::env::var_os("ZEROFSCTL_TOOLS").map_or_else(
        || Path::new(&std::env::var_os("HOME").expect("HOME is set")).join(".cache/zerofsctl/tools"),
        PathBuf::from,
    )
}

/// The real ZeroFS server; fails when it is not installed.
#[track_caller]
pub fn zerofs_bin() -> PathBuf {
    let bin = std::env::var_os("ZEROFS_BIN")
        .map_or_else(|| tools_dir().join("zerofs-0.19.1/bin/zerofs"), PathBuf::from);
    assert!(bin.is_file(), "{} is not there; scripts/setup test installs it", bin.display());
    bin
}

/// How many cases a property test tries: `ZEROFSCTL_CASES`, which `make test-long` raises, or `usual`.
pub fn cases(usual: u32) -> u32 {
    from_env("ZEROFSCTL_CASES").unwrap_or(usual)
}

/// Whether this is the long run: `make test-long` sets `ZEROFSCTL_LONG=1`.
pub fn is_long() -> bool {
    from_env("ZEROFSCTL_LONG").is_some_and(|n| n > 0)
}

/// How many rounds a crash test runs: `usual`, or `long` in the long run. `ZEROFSCTL_ROUNDS` overrides both.
pub fn rounds(usual: u32, long: u32) -> u32 {
    from_env("ZEROFSCTL_ROUNDS").unwrap_or(if is_long() { long } else { usual })
}

/// How many independent cases of one test run at once: one, or in the long run two for each processor, since they
/// wait most of the time. `ZEROFSCTL_JOBS` overrides both.
pub fn at_once() -> usize {
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    from_env("ZEROFSCTL_JOBS").map_or_else(|| if is_long() { 2 * processors() } else { 1 }, |n| n as usize)
}

/// Hands the items out, in order, to [`at_once`] threads. Each makes itself a place to work with the first function,
/// and takes items to it, with their number, until none is left. A thread that panics fails the test.
pub fn side_by_side<T: Sync, P>(
    items: &[T],
    place: impl Fn() -> P + Sync,
    work: impl Fn(&mut P, usize, &T) + Sync,
) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..at_once().clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                let mut here = place();
                loop {
                    let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(item) = items.get(n) else { break };
                    work(&mut here, n, item);
                }
            });
        }
    });
}

fn from_env(name: &str) -> Option<u32> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a whole number")))
}

/// Asks every 10 ms until `done` says true; fails, naming `what`, when `limit` has passed.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
