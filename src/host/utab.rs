//! libmount's own table, `/run/mount/utab`: the options of mounts that the kernel does not know, such as `_netdev`. What `mount`
//! wrote there stays until it is told otherwise, and each further mount of the machine reads and writes all of it.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use super::mounts;
use super::programs::{Output, Program};
use crate::error::Result;

const TABLE: &str = "/run/mount/utab";

/// For the init system: it must be unmounted before the network goes, and before what serves the device.
pub const NETDEV: &str = "_netdev";

/// For the programs that only write into libmount's table.
const NOTE_LIMIT: Duration = Duration::from_secs(10);

/// Takes the mount out of libmount's table, as `umount` would with the mount itself. Without that the mount goes as well.
pub fn forget(target: &Path) {
    let args = ["--fake", "--no-canonicalize", "--internal-only", "--"].map(OsStr::new);
    warn_of(
        target,
        Program::Umount.run(&[&args, [target.as_os_str()].as_slice()].concat(), Some(NOTE_LIMIT)),
    );
}

/// Notes it there again: it is still mounted.
pub fn note(target: &Path) {
    let Some(entry) = mounts::table("self").ok().and_then(|table| mounts::at(&table, target)) else { return };
    let args = ["--fake", "-t", &entry.fs, "-o", NETDEV, "--", &entry.source].map(OsStr::new);
    warn_of(target, Program::Mount.run(&[&args, [target.as_os_str()].as_slice()].concat(), Some(NOTE_LIMIT)));
}

fn warn_of(target: &Path, result: Result<Output>) {
    if let Err(e) = result.and_then(Output::success) {
        tracing::warn!("libmount's table is wrong about {}: {e}", target.display());
    }
}

/// Whether something is noted about a mount at `target`.
pub fn is_noted(target: &Path) -> bool {
    std::fs::read(TABLE).is_ok_and(|text| names(&String::from_utf8_lossy(&text), target))
}

fn names(text: &str, target: &Path) -> bool {
    text.split_ascii_whitespace()
        .filter_map(|field| field.strip_prefix("TARGET="))
        .any(|noted| Path::new(&mounts::decode(noted)) == target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_found_exactly() {
        let text =
            "SRC=/dev/loop0 TARGET=/mnt/a\\040b ROOT=/ OPTS=_netdev\nSRC=/dev/loop1 TARGET=/mnt/c ROOT=/\n";
        assert!(names(text, Path::new("/mnt/a b")));
        assert!(names(text, Path::new("/mnt/c")));
        for other in ["/mnt", "/mnt/c/d", "/mnt/a", "/dev/loop0", "_netdev"] {
            assert!(!names(text, Path::new(other)), "{other}");
        }
    }
}
