//! The crash matrix ([`support::matrix`]) on kernel NBD: attach, detach, resize and fsck killed around every step, with the
//! keeper, ZeroFS, or both; connected devices are back at the baseline each time. Needs root and a kernel with the nbd
//! module: it runs in the virtual machine.
//!
//! A boot's usual run takes a sample that reaches every operation, victim and follow-up; `make test-long
//! PART=nbd-matrix` takes the whole product on ext4, and every step and instant on XFS and Btrfs.

mod support;

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

/// Every how-manyth point a usual run takes. No divisor of the points of a case, so that every step has its turn.
fn of_ext4(case: &Case, every: usize) {
    require_nbd();
    matrix(case, &Extent { every, product: true });
}

#[test]
fn nbd_attach_of_a_new_volume_killed_at_every_step() {
    of_ext4(&ATTACH_NEW, 5);
}

#[test]
fn nbd_attach_of_an_old_volume_killed_at_every_step() {
    of_ext4(&ATTACH_OLD, 5);
}

#[test]
fn nbd_detach_killed_at_every_step() {
    of_ext4(&DETACH, 4);
}

#[test]
fn nbd_online_resize_killed_at_every_step() {
    of_ext4(&RESIZE_ATTACHED, 3);
}

#[test]
fn nbd_resize_of_a_detached_volume_killed_at_every_step() {
    of_ext4(&RESIZE_DETACHED, 9);
}

#[test]
fn nbd_fsck_killed_at_every_step() {
    of_ext4(&FSCK, 7);
}

/// Every step once in the long run; one round each otherwise.
fn of_others(fs: &'static str, size: u64) {
    require_nbd();
    for case in [ATTACH_NEW, ATTACH_OLD, DETACH, FSCK, RESIZE_DETACHED, RESIZE_ATTACHED] {
        matrix(&Case { fs, size, ..case }, &Extent { every: 11, product: false });
    }
}

#[test]
fn nbd_xfs_killed_at_some_steps() {
    of_others("xfs", 512 * MIB);
}

#[test]
fn nbd_btrfs_killed_at_some_steps() {
    of_others("btrfs", 256 * MIB);
}
