//! An NBD server in the test's own process that is as bad as ZeroFS can be: it forgets what was not flushed when it is
//! killed, stalls, lies and grows.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zerofsctl::error::Result;
use zerofsctl::keeper::path::Prober;
use zerofsctl::zerofs::nbd::{Command, RequestHeader, SimpleReply};

/// A closed database gives a chunk as a whole or zeros in its place.
const CHUNK: usize = 32 << 10;

/// What it serves; it outlives the server.
#[derive(Default)]
pub struct Disk {
    pub volatile: Vec<u8>,
    pub durable: Vec<u8>,
    /// The size that new connections are told.
    pub size: usize,
    pub counts: HashMap<u16, u64>,
    pub open_streams: Vec<UnixStream>,
    /// Reads give zeros, the rest EIO; flush says OK.
    pub closed: bool,
    /// How many chunks of 32 KiB such a read still has, at its beginning.
    pub cached: usize,
    /// Replies go out in pieces of all sizes.
    pub in_pieces: bool,
    /// The server stops by itself when so much of a reply has gone out, once.
    pub stop_after: Option<usize>,
    /// Flush says OK and does nothing, and admits it.
    pub lies: bool,
    pub admitted: Option<Instant>,
    pub errors: Vec<u32>,
    /// The connection after so many others is closed as soon as its handshake is over, once.
    pub hang_up_after: Option<u32>,
}

/// One life of a server.
pub struct Server {
    disk: Arc<Mutex<Disk>>,
    listener: UnixListener,
    alive: Arc<AtomicBool>,
    /// Requests wait while this is true, as those of a stopped process do.
    stopped: Arc<(Mutex<bool>, Condvar)>,
}

impl Server {
    /// Listens on `DIR/nbd.sock`.
    pub fn start(dir: &Path, disk: &Arc<Mutex<Disk>>) -> Server {
        let path = dir.join("nbd.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        {
            let mut disk = disk.lock().unwrap();
            (disk.closed, disk.lies, disk.admitted) = (false, false, None);
        }
        let server = Server {
            disk: Arc::clone(disk),
            listener,
            alive: Arc::new(AtomicBool::new(true)),
            stopped: Arc::default(),
        };
        let (listener, disk) = (server.listener.try_clone().unwrap(), Arc::clone(disk));
        let (alive, stopped) = (Arc::clone(&server.alive), Arc::clone(&server.stopped));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if !alive.load(Ordering::SeqCst) {
                    break;
                }
                disk.lock().unwrap().open_streams.push(stream.try_clone().unwrap());
                let (disk, alive, stopped) = (Arc::clone(&disk), Arc::clone(&alive), Arc::clone(&stopped));
                std::thread::spawn(move || serve(stream, &disk, &alive, &stopped));
            }
        });
        server
    }

    /// SIGKILL: what was not flushed is forgotten.
    pub fn kill(self) {
        let mut disk = self.disk.lock().unwrap();
        self.alive.store(false, Ordering::SeqCst);
        disk.volatile = disk.durable.clone();
        for stream in disk.open_streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(disk);
        *self.stopped.0.lock().unwrap() = false;
        self.stopped.1.notify_all();
        // SAFETY: a plain call on our own descriptor; it ends the accepting thread.
        unsafe { libc::shutdown(std::os::fd::AsRawFd::as_raw_fd(&self.listener), libc::SHUT_RDWR) };
    }

    /// SIGSTOP and SIGCONT.
    pub fn stop(&self, stopped: bool) {
        *self.stopped.0.lock().unwrap() = stopped;
        self.stopped.1.notify_all();
    }
}

fn serve(
    mut s: UnixStream,
    disk: &Mutex<Disk>,
    alive: &AtomicBool,
    stopped: &(Mutex<bool>, Condvar),
) -> Option<()> {
    // Fixed newstyle, OPT_GO only: all that our client asks for.
    s.write_all(b"NBDMAGICIHAVEOPT\0\x03").ok()?;
    let mut head = [0; 4 + 16];
    s.read_exact(&mut head).ok()?;
    let len = u32::from_be_bytes(head[16..].try_into().unwrap());
    s.read_exact(&mut vec![0; len as usize]).ok()?;
    let size = disk.lock().unwrap().size as u64;
    let reply = |kind: u32, data: &[u8]| {
        let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        out.extend([7u32, kind, data.len() as u32].iter().flat_map(|n| n.to_be_bytes()));
        out.extend(data);
        out
    };
    // Has flags, flush, FUA, trim, zeroes, multi-conn.
    let info = [&[0, 0][..], &size.to_be_bytes(), &0b1_0110_1101_u16.to_be_bytes()].concat();
    s.write_all(&[reply(3, &info), reply(1, &[])].concat()).ok()?;
    {
        let mut disk = disk.lock().unwrap();
        if disk.hang_up_after.take_if(|n| *n == 0).is_some() {
            return s.shutdown(Shutdown::Both).ok();
        }
        disk.hang_up_after = disk.hang_up_after.map(|n| n - 1);
    }
    loop {
        let mut raw = [0; RequestHeader::LEN];
        s.read_exact(&mut raw).ok()?;
        let request = RequestHeader::decode(&raw).ok()?;
        let range = request.offset as usize..request.offset as usize + request.len as usize;
        let mut data = Vec::new();
        if request.command == Command::Write {
            data.resize(request.len as usize, 0);
            s.read_exact(&mut data).ok()?;
        }
        wait_while_stopped(stopped);
        let mut disk = disk.lock().unwrap();
        if !alive.load(Ordering::SeqCst) {
            return None;
        }
        *disk.counts.entry(request.command as u16).or_default() += 1;
        let mut error = disk.errors.pop().unwrap_or(0);
        if disk.closed && !matches!(request.command, Command::Read | Command::Flush) {
            error = libc::EIO as u32;
        }
        let mut out = Vec::new();
        if error == 0 {
            match request.command {
                Command::Read if disk.closed => {
                    let zeros_from = (range.start / CHUNK + disk.cached) * CHUNK;
                    out = disk.volatile[range.clone()].to_vec();
                    out[zeros_from.saturating_sub(range.start).min(range.len())..].fill(0);
                }
                Command::Read => out = disk.volatile[range].to_vec(),
                Command::Write => disk.volatile[range].copy_from_slice(&data),
                Command::Trim | Command::WriteZeroes => disk.volatile[range].fill(0),
                Command::Flush if disk.closed => {}
                Command::Flush if disk.lies => disk.admitted = Some(Instant::now()),
                Command::Flush => disk.durable = disk.volatile.clone(),
                _ => return None,
            }
        }
        let in_pieces = disk.in_pieces;
        let stop_after = disk.stop_after.take_if(|n| *n < out.len());
        drop(disk);
        let reply = SimpleReply { error, cookie: request.cookie };
        let bytes = [&reply.encode()[..], &out].concat();
        let (mut rest, mut sent) = (&bytes[..], 0);
        let mut rng = StdRng::seed_from_u64(request.cookie);
        while !rest.is_empty() {
            let most = [1, 300, CHUNK, 8 * CHUNK][rng.random_range(0..4)];
            let mut len = if in_pieces { rng.random_range(1..=most).min(rest.len()) } else { rest.len() };
            if let Some(stop) = stop_after
                && sent < stop
            {
                len = len.min(stop - sent);
            }
            let (piece, next) = rest.split_at(len);
            s.write_all(piece).ok()?;
            (rest, sent) = (next, sent + len);
            if stop_after == Some(sent) {
                *stopped.0.lock().unwrap() = true;
            }
            wait_while_stopped(stopped);
        }
    }
}

fn wait_while_stopped(stopped: &(Mutex<bool>, Condvar)) {
    let mut wait = stopped.0.lock().unwrap();
    while *wait {
        wait = stopped.1.wait(wait).unwrap();
    }
}

/// Asks the disk itself.
pub struct Asks(pub Arc<Mutex<Disk>>);

impl Prober for Asks {
    fn database_open(&self) -> Result<bool> {
        Ok(!self.0.lock().unwrap().closed)
    }
    fn flush_was_honest(&self, since: Instant) -> bool {
        self.0.lock().unwrap().admitted.is_none_or(|at| at < since)
    }
}
