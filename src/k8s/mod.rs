//! Kubernetes clusters: who they are, and what is in them.
//!
//! Everything that is read here may decide that something is deleted, so an answer is complete and current, or an error:
//! lists are consistent reads from the server's own store (no `resourceVersion`, never a cache's), of one moment from
//! their first page to their last.

mod client;
mod list;
mod trouble;

pub use client::Cluster;

/// The name of the CSI driver.
pub const DRIVER: &str = "zerofs.csi.driver";
