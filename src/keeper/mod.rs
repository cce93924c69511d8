//! The keeper: one small process per attached volume, between the block layer and ZeroFS.
//!
//! `zerofsctl keeper --volume-run-dir DIR` runs [`main`]: it reads `keeper.json` in that folder, starts (or
//! adopts) the volume's ZeroFS, watches and restarts it, carries the data path, and answers on `keeper.sock`.
//! [`spawn`] starts it detached, and [`client::KeeperClient`] talks to it.

pub mod path;
pub mod process;
