//! The crash matrix ([`support::matrix`]) on kernel NBD: attach, detach, resize and fsck killed around every step, with the
//! keeper, ZeroFS, or both; connected devices are back at the baseline each time. Needs root and a kernel with the nbd
//! module: it runs in the virtual machine.
//!
//! A boot's usual run takes a sample that reaches every operation, victim and follow-up; `make test-long
//! PART=nbd-matrix` takes the whole product on ext4, and every step and instant on XFS and Btrfs.

mod support;

use support::is_long;
use support::matrix::{Case, Extent, MIB, Operation, matrix};
use support::vm::require_nbd;

const ATTACH_NEW: Case = Case {
    operation: Operation::Attach,
    transport: "nbd",
    fs: "ext4",
    size: 256 * MIB,
    existing: false,
    attached: false,
    grows: 0,
};
const ATTACH_OLD: Case = Case { existing: true, ..ATTACH_NEW };
const DETACH: Case = Case { operation: Operation::Detach, attached: true, ..ATTACH_OLD };
const FSCK: Case = Case { operation: Operation::Fsck, ..ATTACH_OLD };
const RESIZE_DETACHED: Case = Case { operation: Operation::Resize, grows: 64 * MIB, ..ATTACH_OLD };
const RESIZE_ATTACHED: Case = Case { attached: true, ..RESIZE_DETACHED };

/// A usual run takes every so-manyth point, and its number chooses victim and follow-up: together they reach all of these.
fn of_ext4(case: &Case, every: usize) {
    require_nbd();
    matrix(case, &Extent { every, product: true });
}

#[test]
fn nbd_attach_of_a_new_volume_killed_at_every_step() {
    of_ext4(&ATTACH_NEW, 11);
}

#[test]
fn nbd_attach_of_an_old_volume_killed_at_every_step() {
    of_ext4(&ATTACH_OLD, 12);
}

#[test]
fn nbd_detach_killed_at_every_step() {
    of_ext4(&DETACH, 8);
}

#[test]
fn nbd_online_resize_killed_at_every_step() {
    of_ext4(&RESIZE_ATTACHED, 6);
}

#[test]
fn nbd_resize_of_a_detached_volume_killed_at_every_step() {
    of_ext4(&RESIZE_DETACHED, 30);
}

#[test]
fn nbd_fsck_killed_at_every_step() {
    of_ext4(&FSCK, 19);
}

/// Every step and instant of all operations in the long run, a round of the one that differs most otherwise.
fn of_others(fs: &'static str, size: u64, every: usize) {
    require_nbd();
    let all = [ATTACH_NEW, ATTACH_OLD, DETACH, FSCK, RESIZE_DETACHED, RESIZE_ATTACHED];
    let cases = if is_long() { &all[..] } else { &all[5..] };
    for case in cases {
        matrix(&Case { fs, size, ..*case }, &Extent { every, product: false });
    }
}

#[test]
fn nbd_xfs_killed_at_some_steps() {
    of_others("xfs", 512 * MIB, 7);
}

#[test]
fn nbd_btrfs_killed_at_some_steps() {
    of_others("btrfs", 256 * MIB, 11);
}
