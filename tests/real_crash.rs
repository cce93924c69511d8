//! The crash matrix ([`support::matrix`]) on the fuse transport; tests/nbd_crash.rs has it on kernel NBD.
//!
//! By default every step is killed at every instant, or, where that takes long, at one or two of the four. The long run is
//! `make test-long PART=matrix`: on ext4 the whole product, on the other filesystems every step and instant.

mod support;

use support::matrix::{Case, Extent, MIB, Operation, matrix};

const ATTACH_NEW: Case = Case {
    operation: Operation::Attach,
    transport: "fuse",
    fs: "ext4",
    size: 256 * MIB,
    existing: false,
    attached: false,
    grows: 0,
};
const ATTACH_OLD: Case = Case { existing: true, ..ATTACH_NEW };
const DETACH: Case = Case { operation: Operation::Detach, attached: true, ..ATTACH_OLD };
const RESIZE_DETACHED: Case = Case { operation: Operation::Resize, grows: 64 * MIB, ..ATTACH_OLD };
const RESIZE_ATTACHED: Case = Case { fs: "xfs", size: 512 * MIB, attached: true, ..RESIZE_DETACHED };

#[test]
fn root_attach_of_a_new_volume_killed_at_every_step() {
    matrix(&ATTACH_NEW, &Extent { every: 1, product: true });
}

#[test]
fn root_attach_of_an_old_volume_killed_at_every_step() {
    matrix(&ATTACH_OLD, &Extent { every: 3, product: true });
}

#[test]
fn root_detach_killed_at_every_step() {
    matrix(&DETACH, &Extent { every: 1, product: true });
}

#[test]
fn root_resize_of_a_detached_volume_killed_at_every_step() {
    matrix(&RESIZE_DETACHED, &Extent { every: 3, product: true });
}

#[test]
fn root_online_resize_killed_at_every_step() {
    matrix(&RESIZE_ATTACHED, &Extent { every: 1, product: true });
}

/// The other filesystems: some rounds by default, every step in the long run.
#[test]
fn root_xfs_and_btrfs_killed_at_some_steps() {
    let cases = [
        Case { fs: "xfs", size: 512 * MIB, ..ATTACH_NEW },
        Case { fs: "btrfs", ..ATTACH_NEW },
        Case { fs: "btrfs", ..ATTACH_OLD },
        Case { fs: "btrfs", ..DETACH },
        Case { fs: "xfs", size: 512 * MIB, ..RESIZE_DETACHED },
        Case { fs: "btrfs", ..RESIZE_DETACHED },
        Case { fs: "btrfs", ..RESIZE_ATTACHED },
    ];
    for case in &cases {
        matrix(case, &Extent { every: 15, product: false });
    }
}
