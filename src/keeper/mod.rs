//! The keeper: one small process per attached volume, between the block layer and ZeroFS.
//!
//! `zerofsctl keeper --volume-run-dir DIR` runs [`main`]: it reads `keeper.json` in that folder, starts (or
//! adopts) the volume's ZeroFS, watches and restarts it, carries the data path, and answers on `keeper.sock`.
//! [`spawn`] starts it detached, and [`client::KeeperClient`] talks to it.

pub mod guard;
pub mod log;
mod causes;
pub mod client;
pub mod control;
pub mod path;
pub mod process;

/// Starts a thread with a small stack: a keeper has many threads, and none of them recurses.
pub(crate) fn thread(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(256 * 1024).spawn(work)
}
