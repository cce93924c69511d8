//! Whether a ZeroFS that was just started answers yet.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::process::Process;
use crate::zerofs::config::{NBD_SOCKET, NINEP_SOCKET};
use crate::zerofs::sock;

/// Waits until both sockets answer; false when the process ended before.
pub(super) fn wait_until_it_answers(dir: &Path, process: &Process) -> bool {
    let begun = Instant::now();
    let (mut ninep, mut nbd) = (false, false);
    loop {
        ninep = ninep || ninep_answers(dir).is_ok();
        nbd = nbd || (ninep && nbd_answers(dir).is_ok());
        if ninep && nbd {
            return true;
        }
        // Attach waits for this, so it looks often at first; a slow store is not worth that.
        let pause = match begun.elapsed().as_secs() {
            0..3 => 2,
            3..15 => 20,
            _ => 200,
        };
        if process.ended(Duration::from_millis(pause)) {
            return false;
        }
    }
}

/// Sends a 9P Tversion and reads the answer.
fn ninep_answers(dir: &Path) -> io::Result<()> {
    let mut stream = sock::connect_within(dir, NINEP_SOCKET, Duration::from_secs(2))?;
    stream.write_all(b"\x15\0\0\0\x64\xff\xff\0\x20\0\0\x08\09P2000.L")?;
    expect(&mut stream, 4, b"\x65")
}

/// Reads the greeting of an NBD server.
fn nbd_answers(dir: &Path) -> io::Result<()> {
    let mut stream = sock::connect_within(dir, NBD_SOCKET, Duration::from_secs(2))?;
    expect(&mut stream, 0, b"NBDMAGIC")
}

fn expect(stream: &mut UnixStream, skip: usize, wanted: &[u8]) -> io::Result<()> {
    let mut got = vec![0; skip + wanted.len()];
    stream.read_exact(&mut got)?;
    if &got[skip..] == wanted { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
