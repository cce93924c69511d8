//! The keeper: one small process per attached volume, between the block layer and ZeroFS.

mod fuse;
pub mod guard;
pub mod log;
pub mod path;
