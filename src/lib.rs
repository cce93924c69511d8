//! zerofsctl: the life cycle of ZeroFS block volumes.
#![warn(missing_docs)]

pub mod error;
pub mod values;

pub mod plan;
pub mod step;
pub mod ops;

pub mod run;
pub mod journal;

pub mod host;
pub mod zerofs;
pub mod keeper;
pub mod catalog;
