//! Connecting to a unix socket in a folder, however long the folder's path is, and never for longer than
//! the caller wants to wait.
//!
//! The address of a unix socket holds 107 bytes. A volume's run folder may well be deeper, so the folder
//! is opened first and the socket is named through that handle.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_fd, setsockopt};
use nix::sys::socket::{socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

/// How long a control operation waits for an answer, unless its caller says otherwise.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to the socket `name` in the folder `dir`, with [`CONTROL_TIMEOUT`] for connecting and for each
/// read and write afterwards.
pub fn connect(dir: &Path, name: &str) -> io::Result<UnixStream> {
    connect_within(dir, name, CONTROL_TIMEOUT)
}

/// Connects to the socket `name` in the folder `dir`. `limit` bounds the connect itself (a server that
/// listens but does not accept can make it wait) and, on the returned stream, each single read and write:
/// they fail with `WouldBlock`. A zero limit is an error.
pub fn connect_within(dir: &Path, name: &str, limit: Duration) -> io::Result<UnixStream> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} names no socket")));
    }
    if limit.is_zero() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a time limit of zero"));
    }
    let folder = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir)?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()).as_str())?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // The send time-out also bounds connect(2) on a unix socket, which otherwise waits for ever while the
    // queue of the listener is full.
    let limit_micros = i64::try_from(limit.as_micros().max(1)).unwrap_or(i64::MAX);
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(limit_micros))?;
    loop {
        match connect_fd(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e.into()),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use nix::sys::socket::{Backlog, bind, listen};

    use super::*;

    #[test]
    fn a_socket_in_a_very_long_folder_is_reached() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&dir).unwrap();
        // Binding has the same limit, so the listener is made in a short place and moved.
        let short = root.path().join("s");
        let listener = UnixListener::bind(&short).unwrap();
        std::fs::rename(&short, dir.join("nbd.sock")).unwrap();
        let mut client = connect(&dir, "nbd.sock").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
    }

    #[test]
    fn a_silent_server_times_out() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let limit = Duration::from_millis(50);
        let start = Instant::now();
        let mut client = connect_within(dir.path(), "s", limit).unwrap();
        let e = client.read(&mut [0]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
        assert!(start.elapsed() >= limit && start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_full_queue_times_out() {
        let dir = tempfile::tempdir().unwrap();
        // Made by hand, since the standard library's listener has a long queue.
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&dir.path().join("s")).unwrap()).unwrap();
        listen(&fd, Backlog::new(1).unwrap()).unwrap();
        let mut open = Vec::new();
        let limit = Duration::from_millis(20);
        let e = loop {
            match connect_within(dir.path(), "s", limit) {
                Ok(stream) => open.push(stream),
                Err(e) => break e,
            }
            assert!(open.len() < 10, "the queue never fills");
        };
        assert_eq!(e.kind(), io::ErrorKind::TimedOut, "{e}");
    }

    #[test]
    fn names_and_missing_things() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", ".", "..", "a/b", "/etc"] {
            assert_eq!(connect(dir.path(), bad).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{bad}");
        }
        assert_eq!(connect(dir.path(), "s").unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(UnixListener::bind(dir.path().join("s")).unwrap());
        assert_eq!(connect(dir.path(), "s").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
