//! zerofsctl: the life cycle of ZeroFS block volumes.
#![warn(missing_docs)]

pub mod error;
pub mod values;

pub mod catalog;
pub mod host;
pub mod keeper;
pub mod zerofs;
