//! The keeper: one small process per attached volume, between the block layer and ZeroFS.

pub mod log;
pub mod path;
