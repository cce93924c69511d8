//! The host: everything outside the process.

pub mod cgroup;
