//! The conformance tests of the CSI authors, with every capability that the driver has, on the real ZeroFS and real
//! devices. Nothing is left out by name. `tests/nbd_csi.rs` runs the same on NBD devices of the kernel.

mod support;

use support::sanity;

#[test]
fn root_every_spec_of_csi_sanity_with_mounts() {
    sanity::all_specs("mount", &[]);
}

#[test]
fn root_every_spec_of_csi_sanity_with_raw_devices() {
    sanity::all_specs("block", &[]);
}

#[test]
fn a_report_with_a_failure_or_a_needless_skip_does_not_pass() {
    sanity::reads_reports();
}
