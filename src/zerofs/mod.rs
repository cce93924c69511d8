//! ZeroFS itself: its versions, its config, and clients for the protocols that it speaks.

pub mod config;
pub mod nbd;
pub mod ninep;
pub mod sock;
pub mod versions;
