//! The CSI driver.

pub mod proto;
