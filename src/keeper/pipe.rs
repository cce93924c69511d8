//! Data on its way from one socket to another that the keeper never looks at: it stays in the kernel's pages, and the
//! keeper's processor time does not grow with it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// The most that a pipe of this size can hold: a page is the least that one of its places holds.
const SIZE: usize = 1 << 20;

/// A pipe between two sockets, and what is in it.
#[derive(Debug)]
pub(super) struct Pipe {
    read: File,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    /// An empty one.
    pub(super) fn new() -> nix::Result<Pipe> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // With fewer places it only is full sooner.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(SIZE as i32));
        Ok(Pipe { read: read.into(), write, held: 0 })
    }

    /// How many bytes are in it.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Takes up to `len` bytes out of a socket, without waiting: 0 at its end, EAGAIN when there are none or when the
    /// pipe takes no more.
    pub(super) fn fill(&mut self, from: impl AsFd, len: usize) -> nix::Result<usize> {
        let n = splice(from, None, &self.write, None, len, flags())?;
        self.held += n;
        Ok(n)
    }

    /// Gives some to a socket that is non-blocking, as much as it takes now.
    pub(super) fn pour(&mut self, to: impl AsFd) -> nix::Result<usize> {
        let n = splice(&self.read, None, to, None, self.held, flags())?;
        self.held -= n;
        Ok(n)
    }

    /// Moves all that is in it behind what `bytes` has.
    pub(super) fn read_to(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let before = bytes.len();
        bytes.resize(before + self.held, 0);
        self.read.read_exact(&mut bytes[before..])?;
        self.held = 0;
        Ok(())
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_goes_in_comes_out_on_either_way() {
        let (mut server, ours) = UnixStream::pair().unwrap();
        let (out, mut kernel) = UnixStream::pair().unwrap();
        out.set_nonblocking(true).unwrap();
        let data: Vec<u8> = (0..150_000u32).map(|i| (i % 251) as u8).collect();
        server.write_all(&data).unwrap();
        let mut pipe = Pipe::new().unwrap();
        assert_eq!(pipe.fill(&ours, 100_000), Ok(100_000));
        assert_eq!(pipe.held(), 100_000);
        let mut poured = 0;
        while poured < 60_000 {
            poured += pipe.pour(&out).unwrap();
        }
        let mut rest = b"before".to_vec();
        pipe.read_to(&mut rest).unwrap();
        assert_eq!((pipe.held(), rest.len()), (0, 6 + 100_000 - poured));
        let mut seen = vec![0; poured];
        kernel.read_exact(&mut seen).unwrap();
        assert!(seen == data[..poured] && rest[6..] == data[poured..100_000]);
        assert_eq!(pipe.fill(&ours, 1 << 20), Ok(50_000), "what is there, and not more");
        assert_eq!(pipe.fill(&ours, 1), Err(nix::Error::EAGAIN));
        drop(server);
        assert_eq!(pipe.fill(&ours, 1), Ok(0), "the end");
    }

    #[test]
    fn a_socket_that_takes_no_more_is_not_waited_for() {
        let (out, _kernel) = UnixStream::pair().unwrap();
        out.set_nonblocking(true).unwrap();
        let (mut server, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut pipe = Pipe::new().unwrap();
        let end = loop {
            server.write_all(&[1; 4096]).unwrap();
            assert_eq!(pipe.fill(&ours, 4096), Ok(4096));
            match pipe.pour(&out) {
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert_eq!((end, pipe.held() > 0), (nix::Error::EAGAIN, true));
    }
}
