//! zerofsctl: the life cycle of ZeroFS block volumes.
#![warn(missing_docs)]

pub mod atomic_file;
pub mod error;
pub mod password;
pub mod quantity;
pub mod settings;
pub mod values;

pub mod cli;
pub mod ops;
pub mod plan;
pub mod report;
pub mod step;

pub mod journal;
pub mod run;

pub mod catalog;
pub mod host;
pub mod keeper;
pub mod zerofs;
