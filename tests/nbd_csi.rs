//! The CSI driver on NBD devices of the kernel: the conformance tests of the CSI authors, as `tests/csi_sanity.rs` runs
//! them on the FUSE transport. Run by scripts/vm-test.

mod support;

use support::sanity;

#[test]
fn nbd_every_spec_of_csi_sanity_with_mounts() {
    sanity::all_specs("mount", &["--transport", "nbd"]);
}

#[test]
fn nbd_every_spec_of_csi_sanity_with_raw_devices() {
    sanity::all_specs("block", &["--transport", "nbd"]);
}
