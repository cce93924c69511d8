//! What the integration tests share: a folder that proves it was left clean, a fault proxy, an S3
//! stand-in, a runner for fio. A test file begins with `mod support;`.
//!
//! Nothing here skips a test. A program or a privilege that is not there fails the test that asked for it,
//! with the command that brings it.
#![allow(dead_code, reason = "each test file is a program of its own and uses only a part of this")]

pub mod cli;
pub mod dir;
pub mod fio;
pub mod http;
pub mod keeper;
pub mod kube;
pub mod moto;
pub mod proxy;
pub mod script;
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

/// How many rounds a crash test runs: `ZEROFSCTL_ROUNDS`, which `make test-long` raises, or `usual`.
pub fn rounds(usual: u32) -> u32 {
    from_env("ZEROFSCTL_ROUNDS").unwrap_or(usual)
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
