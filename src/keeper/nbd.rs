//! The NBD front end: serves the sockets that the kernel's nbd driver was given, from the data path.
//!
//! The I/O thread reads the requests of all sockets and hands them to the guard itself, so a request crosses no thread
//! on its way in; a reply is written by whoever has the answer, and what the I/O thread answers in one round goes out
//! in one system call per socket. The data of a large write is received straight into the replay log, from where it is
//! sent. Nothing here ever waits: what a socket does not take is queued, and a socket whose
//! requests take too much memory is not read until some of them are answered.
//!
//! The peer is the kernel, but nothing that it sends is trusted: lengths are bounded, an unknown request is answered
//! with EINVAL, and a broken stream ends that socket alone.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv, recvmsg, sendmsg};

use super::guard::{Action, Guard, Now, Op};
use super::path::{Completion, Joint, Shared, lock};
use super::pipe::Pipe;
use super::taken::Taken;
use crate::zerofs::nbd::{Command, FLAG_FAST_ZERO, FLAG_FUA, MAX_PAYLOAD, RequestHeader, SimpleReply};

/// What is received at once, and the size of an idle socket's buffer.
const RECEIVE: usize = 128 << 10;
/// Data from this length on is received in the replay log, unless it is here already.
const LAND: u64 = 32 << 10;
/// What is received beyond such data: the next request's header, and little that must be moved.
const AHEAD: usize = 4 << 10;
/// A socket is not read while its unanswered requests take more than this, in bytes.
const HELD: u64 = 16 << 20;
/// What a request takes beside its data.
const OVERHEAD: u64 = 256;
/// Replies up to this length are gathered, longer ones are sent from where they are.
const GATHER: usize = 32 << 10;
/// How often a socket is read before another one has its turn.
const TURNS: usize = 8;

thread_local! {
    /// On the I/O thread: the sockets with gathered replies.
    static GATHERED: RefCell<Option<Vec<Arc<Front>>>> = const { RefCell::new(None) };
}

/// From now on replies of this thread are gathered until [`send_gathered`].
pub(super) fn gather_here() {
    GATHERED.with(|g| *g.borrow_mut() = Some(Vec::new()));
}

/// Sends what was gathered.
pub(super) fn send_gathered() {
    let fronts = GATHERED.with(|g| g.borrow_mut().as_mut().map(std::mem::take)).unwrap_or_default();
    for front in fronts {
        let mut tx = lock(&front.tx);
        tx.gathered = false;
        front.send(&mut tx, &[]);
    }
}

/// One socket.
pub(super) struct Front {
    /// Its event number.
    pub(super) id: u64,
    stream: UnixStream,
    epoll: Arc<Epoll>,
    read_only: bool,
    /// Where its requests are noted for the next keeper.
    taken: Option<Arc<Taken>>,
    tx: Mutex<Tx>,
    /// What its unanswered requests take, in bytes.
    held: AtomicU64,
    closed: AtomicBool,
}

#[derive(Default)]
struct Tx {
    /// Replies, of which `sent` bytes are gone.
    out: Vec<u8>,
    sent: usize,
    /// The socket is full: the I/O thread goes on.
    blocked: bool,
    /// Not read for now.
    paused: bool,
    /// It is in the list of the I/O thread.
    gathered: bool,
}

impl Front {
    /// A socket that is not watched yet.
    pub(super) fn new(
        id: u64,
        stream: UnixStream,
        epoll: Arc<Epoll>,
        read_only: bool,
        taken: Option<Arc<Taken>>,
    ) -> Arc<Front> {
        Arc::new(Front {
            id,
            stream,
            epoll,
            read_only,
            taken,
            tx: Mutex::default(),
            held: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        })
    }

    /// Whether it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Starts to listen to it: from here on events come.
    pub(super) fn watch(&self) -> nix::Result<()> {
        self.epoll.add(&self.stream, EpollEvent::new(EpollFlags::EPOLLIN, self.id))
    }

    /// Ends it; what is not answered is answered to nobody.
    pub(super) fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            let _ = self.epoll.delete(&self.stream);
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    fn interest(&self, tx: &Tx, also: EpollFlags) {
        let mut flags = also;
        flags.set(EpollFlags::EPOLLIN, !tx.paused);
        if tx.blocked {
            flags |= EpollFlags::EPOLLOUT;
        }
        // One that is closed is not watched any more.
        let _ = self.epoll.modify(&self.stream, &mut EpollEvent::new(flags, self.id));
    }

    fn is_full(&self, tx: &Tx) -> bool {
        self.held.load(Ordering::Relaxed) + (tx.out.len() - tx.sent) as u64 > HELD
    }

    /// Answers a request that took `cost`.
    pub(super) fn reply(self: &Arc<Self>, cookie: u64, result: Result<&[u8], i32>, cost: u64) {
        self.note(|taken| taken.answered(cookie));
        let (error, data) = match result {
            Ok(data) => (0, data),
            Err(errno) => (wire_errno(errno), &[][..]),
        };
        let header = SimpleReply { error, cookie }.encode();
        let mut tx = lock(&self.tx);
        self.held.fetch_sub(cost, Ordering::Relaxed);
        let gathers = data.len() <= GATHER && GATHERED.with(|g| g.borrow().is_some());
        if tx.blocked || gathers {
            tx.out.extend_from_slice(&header);
            tx.out.extend_from_slice(data);
            if gathers && !tx.gathered {
                tx.gathered = true;
                GATHERED.with(|g| g.borrow_mut().as_mut().map(|list| list.push(Arc::clone(self))));
            }
        } else {
            self.send(&mut tx, &[&header, data]);
        }
        self.resume(&mut tx);
    }

    /// Answers a read that took `cost` with `head` and what is in the pipe.
    fn reply_from(&self, cookie: u64, head: &[u8], pipe: &mut Pipe, cost: u64) -> io::Result<()> {
        self.note(|taken| taken.answered(cookie));
        let header = SimpleReply { error: 0, cookie }.encode();
        let mut tx = lock(&self.tx);
        self.held.fetch_sub(cost, Ordering::Relaxed);
        if tx.blocked {
            tx.out.extend_from_slice(&header);
            tx.out.extend_from_slice(head);
        } else {
            self.send(&mut tx, &[&header, head]);
        }
        while pipe.held() > 0 && !tx.blocked {
            match pipe.pour(&self.stream) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => {
                    tx.blocked = true;
                    self.interest(&tx, EpollFlags::empty());
                }
                // The reading side tells.
                Err(e) => return Err(e.into()),
            }
        }
        if pipe.held() > 0 {
            pipe.read_to(&mut tx.out)?;
        }
        self.resume(&mut tx);
        Ok(())
    }

    /// Goes on reading when less is held.
    fn resume(&self, tx: &mut Tx) {
        if tx.paused && !self.is_full(tx) {
            tx.paused = false;
            // Writable at once, so that the I/O thread looks after what was received and not yet understood.
            self.interest(tx, EpollFlags::EPOLLOUT);
        }
    }

    /// Sends what is queued and then `more`; what the socket does not take is queued.
    fn send(&self, tx: &mut Tx, more: &[&[u8]]) {
        if self.closed.load(Ordering::Relaxed) {
            tx.out = Vec::new();
            tx.sent = 0;
            return;
        }
        let mut skip = 0;
        let mut broken = false;
        while !tx.blocked {
            let queued = &tx.out[tx.sent..];
            let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(1 + more.len());
            if !queued.is_empty() {
                parts.push(IoSlice::new(queued));
            }
            let mut left = skip;
            for part in more {
                let gone = left.min(part.len());
                left -= gone;
                if gone < part.len() {
                    parts.push(IoSlice::new(&part[gone..]));
                }
            }
            if parts.is_empty() {
                break;
            }
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.stream.as_raw_fd(), &parts, &[], flags, None) {
                Ok(n) => {
                    let of_queue = n.min(queued.len());
                    tx.sent += of_queue;
                    skip += n - of_queue;
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => {
                    tx.blocked = true;
                    self.interest(tx, EpollFlags::empty());
                }
                // The reading side tells; the kernel sends the requests again elsewhere, or fails them.
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        if tx.sent == tx.out.len() || broken {
            tx.out.clear();
            tx.sent = 0;
            if tx.out.capacity() > 4 * GATHER {
                tx.out.shrink_to(GATHER);
            }
        } else if tx.sent > 1 << 20 {
            tx.out.drain(..tx.sent);
            tx.sent = 0;
        }
        if tx.blocked && !broken {
            let mut left = skip;
            for part in more {
                let gone = left.min(part.len());
                tx.out.extend_from_slice(&part[gone..]);
                left -= gone;
            }
        }
    }

    /// The socket takes more.
    fn unblock(&self) {
        let mut tx = lock(&self.tx);
        tx.blocked = false;
        self.send(&mut tx, &[]);
        if !tx.blocked {
            self.interest(&tx, EpollFlags::empty());
        }
        // What it held back may be all that it was paused for: then no answer comes that would end the pause.
        self.resume(&mut tx);
    }

    fn note(&self, what: impl FnOnce(&Taken)) {
        if let Some(taken) = &self.taken {
            what(taken);
        }
    }

    /// Takes a request in; a socket with too much of that is not read any further.
    fn take(&self, cost: u64) {
        self.held.fetch_add(cost, Ordering::Relaxed);
    }

    /// Whether it must not be read now.
    fn pauses(&self) -> bool {
        let mut tx = lock(&self.tx);
        if !tx.paused && self.is_full(&tx) {
            tx.paused = true;
            self.interest(&tx, EpollFlags::empty());
        }
        tx.paused
    }
}

/// The numbers that the protocol has.
fn wire_errno(errno: i32) -> u32 {
    match errno {
        libc::EPERM
        | libc::EIO
        | libc::ENOMEM
        | libc::EINVAL
        | libc::ENOSPC
        | libc::EOVERFLOW
        | libc::ENOTSUP
        | libc::ESHUTDOWN => errno as u32,
        _ => libc::EIO as u32,
    }
}

/// What the I/O thread has received from a socket and not yet understood.
pub(super) struct FrontReader {
    pub(super) front: Arc<Front>,
    bytes: Vec<u8>,
    filled: usize,
    /// Where in `bytes` the next request begins.
    at: usize,
    write: Option<Writing>,
}

/// A write of which part of the payload is still to come.
struct Writing {
    cookie: u64,
    offset: u64,
    left: u64,
    fua: bool,
    cost: u64,
    /// It is refused with this errno; its payload is skipped.
    refused: Option<i32>,
    /// For one that is carried out in pieces.
    joint: Option<Arc<Joint>>,
    /// The piece that comes next is being received in the replay log; so many bytes of it are still to come.
    landing: Option<u64>,
}

impl Writing {
    /// What answers the next piece.
    fn done(&self, front: &Arc<Front>) -> Completion {
        match &self.joint {
            Some(joint) => joint.piece(0),
            None => answer(front, self.cookie, self.cost),
        }
    }

    /// The entry of the piece; one of several says nothing about the whole.
    fn logged(&self, front: &Front, entry: Option<u64>) {
        if let (None, Some(entry)) = (&self.joint, entry) {
            front.note(|taken| taken.logged(self.cookie, entry));
        }
    }
}

/// What came of reading.
pub(super) enum Heard {
    /// All is well.
    On,
    /// The peer has ended it, or talks nonsense.
    End(String),
}

impl FrontReader {
    pub(super) fn new(front: Arc<Front>) -> FrontReader {
        FrontReader { front, bytes: vec![0; RECEIVE], filled: 0, at: 0, write: None }
    }

    /// It is not read any more: what it was receiving will not become complete.
    pub(super) fn end(self, shared: &Shared) {
        if self.write.is_some_and(|w| w.landing.is_some()) {
            shared.with_guard(|guard, _| guard.end_landing());
        }
    }

    /// Gives memory back that a large request needed.
    pub(super) fn shrink(&mut self) {
        if self.filled == 0 && self.bytes.len() > RECEIVE {
            self.bytes.truncate(RECEIVE);
            self.bytes.shrink_to_fit();
        }
    }

    /// The socket has something for us, or takes something from us.
    pub(super) fn event(&mut self, shared: &Shared, flags: EpollFlags) -> Heard {
        if flags.contains(EpollFlags::EPOLLOUT) {
            self.front.unblock();
            // Requests may wait in the buffer since a pause.
            if let Err(why) = self.understand(shared) {
                return Heard::End(why);
            }
        }
        if !flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            return Heard::On;
        }
        for _ in 0..TURNS {
            // The rest of a write that has begun is read in any case: it may be the very one that takes too much.
            if self.write.is_none() && self.front.pauses() {
                return Heard::On;
            }
            let (n, wanted) = match self.receive(shared) {
                Ok(Some(done)) => done,
                Ok(None) => return Heard::On,
                Err(why) => return Heard::End(why),
            };
            if n < wanted {
                return Heard::On;
            }
        }
        Heard::On
    }

    /// Receives once, and hands in every request that is whole. How many bytes came and could have come; none when
    /// nothing is there.
    fn receive(&mut self, shared: &Shared) -> Result<Option<(usize, usize)>, String> {
        let fd = self.front.stream.as_raw_fd();
        if self.write.as_ref().is_some_and(|w| w.landing.is_some()) {
            return self.receive_landing(shared);
        }
        let need = match &self.write {
            Some(w) => w.left.min(shared.max_write()) as usize,
            None => RequestHeader::LEN,
        };
        if self.at > 0 {
            self.bytes.copy_within(self.at..self.filled, 0);
            self.filled -= self.at;
            self.at = 0;
        }
        if self.bytes.len() < need.max(self.filled + 1) {
            self.bytes.resize(need.max(2 * RECEIVE), 0);
        }
        let room = &mut self.bytes[self.filled..];
        let wanted = room.len();
        let Some(n) = received(recv(fd, room, MsgFlags::MSG_DONTWAIT))? else { return Ok(None) };
        self.filled += n;
        self.understand(shared)?;
        Ok(Some((n, wanted)))
    }

    /// The same while data comes in that goes to the replay log. The guard stays locked meanwhile, so that nobody else
    /// needs the place; who is late there has to wait for a copy at most.
    fn receive_landing(&mut self, shared: &Shared) -> Result<Option<(usize, usize)>, String> {
        let mut out = Vec::new();
        let done = shared.with_guard(|guard, now| {
            let fd = self.front.stream.as_raw_fd();
            let room = guard.landing_room();
            let data = room.len();
            let mut parts = [IoSliceMut::new(room), IoSliceMut::new(&mut self.bytes[..AHEAD])];
            let message = recvmsg::<()>(fd, &mut parts, None, MsgFlags::MSG_DONTWAIT).map(|m| m.bytes);
            let Some(n) = received(message)? else { return Ok(None) };
            let left = guard.landed(n.min(data)).ok_or("the replay log was replaced")?;
            // All that was here before has gone into the log too.
            (self.at, self.filled) = (0, n.saturating_sub(data));
            if let Some(write) = &mut self.write {
                write.landing = Some(left);
            }
            self.parse(shared, guard, now, &mut out)?;
            Ok(Some((n, data + AHEAD)))
        });
        shared.act(out);
        done.unwrap_or_else(|| Err("the data path has no replay log".into()))
    }

    /// Hands in every request that is whole.
    fn understand(&mut self, shared: &Shared) -> Result<(), String> {
        let mut out = Vec::new();
        let done = shared.with_guard(|guard, now| self.parse(shared, guard, now, &mut out));
        shared.act(out);
        done.unwrap_or_else(|| Err("the data path has no replay log".into()))
    }

    fn parse(
        &mut self,
        shared: &Shared,
        guard: &mut Guard<Completion>,
        now: Now,
        out: &mut Vec<Action<Completion>>,
    ) -> Result<(), String> {
        let limit = shared.max_write();
        loop {
            if let Some(write) = &mut self.write {
                let piece = write.left.min(limit);
                let available = self.filled - self.at;
                if let Some(left) = write.landing {
                    if left > 0 {
                        return Ok(());
                    }
                    let op = Op::Landed { offset: write.offset, fua: write.fua };
                    let entry = guard.submit(now, op, write.done(&self.front), out);
                    write.logged(&self.front, entry);
                    write.landing = None;
                    write.offset = write.offset.saturating_add(piece);
                    write.left -= piece;
                    if write.left > 0 {
                        continue;
                    }
                } else if write.refused.is_some() {
                    let skipped = write.left.min(available as u64);
                    self.at += skipped as usize;
                    write.left -= skipped;
                    if write.left > 0 {
                        return Ok(());
                    }
                } else {
                    if (available as u64) < piece {
                        if piece >= LAND && guard.land(write.offset, piece) {
                            let data = &self.bytes[self.at..self.filled];
                            guard.landing_room()[..available].copy_from_slice(data);
                            write.landing = guard.landed(available);
                            self.at = self.filled;
                        }
                        return Ok(());
                    }
                    let data = &self.bytes[self.at..self.at + piece as usize];
                    let op = Op::Write { offset: write.offset, data, fua: write.fua };
                    let entry = guard.submit(now, op, write.done(&self.front), out);
                    write.logged(&self.front, entry);
                    self.at += piece as usize;
                    write.offset = write.offset.saturating_add(piece);
                    write.left -= piece;
                    if write.left > 0 {
                        continue;
                    }
                }
                if let Some(Writing { cookie, cost, refused: Some(errno), .. }) = self.write.take() {
                    self.front.reply(cookie, Err(errno), cost);
                }
                continue;
            }
            let Some(header) = self.bytes[self.at..self.filled].first_chunk::<{ RequestHeader::LEN }>()
            else {
                return Ok(());
            };
            if self.front.pauses() {
                return Ok(());
            }
            let request = Request::decode(header)?;
            self.at += RequestHeader::LEN;
            let Request { flags, command, cookie, offset, len } = request;
            let fua = flags & FLAG_FUA != 0;
            let data_len =
                if matches!(command, Some(Command::Read | Command::Write)) { u64::from(len) } else { 0 };
            let cost = OVERHEAD + data_len.min(MAX_PAYLOAD.into());
            self.front.take(cost);
            if let Some(command) = command {
                self.front.note(|taken| taken.take(cookie, command, offset, len));
            }
            let refused = match command {
                Some(Command::Write) if len > MAX_PAYLOAD => {
                    return Err(format!("a write of {len} bytes"));
                }
                Some(Command::Read) if len > MAX_PAYLOAD => Some(libc::EINVAL),
                Some(Command::Write | Command::Trim | Command::WriteZeroes) if self.front.read_only => {
                    Some(libc::EPERM)
                }
                Some(Command::WriteZeroes) if flags & FLAG_FAST_ZERO != 0 => Some(libc::ENOTSUP),
                Some(Command::Cache | Command::BlockStatus) | None => Some(libc::EINVAL),
                _ => None,
            };
            let op = match (command, refused) {
                (Some(Command::Disc), _) => return Err(DISCONNECTED.into()),
                (Some(Command::Write), _) if len > 0 => {
                    let left = u64::from(len);
                    let joint = (refused.is_none() && left > limit).then(|| {
                        Joint::new(left.div_ceil(limit) as usize, 0, answer(&self.front, cookie, cost))
                    });
                    self.write =
                        Some(Writing { cookie, offset, left, fua, cost, refused, joint, landing: None });
                    continue;
                }
                (_, Some(errno)) => {
                    self.front.reply(cookie, Err(errno), cost);
                    continue;
                }
                (Some(Command::Read), _) => Op::Read { offset, len },
                (Some(Command::Write), _) => Op::Write { offset, data: &[], fua },
                (Some(Command::Flush), _) => Op::Flush,
                (Some(Command::Trim), _) => Op::Trim { offset, len: len.into() },
                (Some(Command::WriteZeroes), _) => Op::Zero { offset, len: len.into(), fua },
                (Some(Command::Cache | Command::BlockStatus) | None, None) => continue,
            };
            shared.submit_pieces(guard, now, op, answer(&self.front, cookie, cost), out);
        }
    }
}

/// What a receive gave; none when nothing is there.
fn received(n: nix::Result<usize>) -> Result<Option<usize>, String> {
    match n {
        Ok(0) => Err("the kernel has closed its socket".into()),
        Ok(n) => Ok(Some(n)),
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(None),
        Err(e) => Err(format!("cannot receive from the kernel: {e}")),
    }
}

/// Why a socket has ended when the kernel was told to disconnect the device, by whomever.
pub(super) const DISCONNECTED: &str = "the kernel has disconnected";

/// What answers a request.
fn answer(front: &Arc<Front>, cookie: u64, cost: u64) -> Completion {
    Completion::nbd(Answer { front: Arc::clone(front), cookie, cost })
}

/// Answers a request.
pub(super) struct Answer {
    front: Arc<Front>,
    cookie: u64,
    cost: u64,
}

impl Answer {
    /// With these bytes, or an errno.
    pub(super) fn give(self, result: Result<&[u8], i32>) {
        self.front.reply(self.cookie, result, self.cost);
    }

    /// With `head` and then all that is in the pipe, which is empty afterwards; if that fails, the socket has ended.
    pub(super) fn give_from(self, head: &[u8], pipe: &mut Pipe) -> io::Result<()> {
        self.front.reply_from(self.cookie, head, pipe, self.cost)
    }
}

/// A request of any command, known or not.
struct Request {
    flags: u16,
    command: Option<Command>,
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Request {
    fn decode(raw: &[u8; RequestHeader::LEN]) -> Result<Request, String> {
        match RequestHeader::decode(raw) {
            Ok(h) => Ok(Request {
                flags: h.flags,
                command: Some(h.command),
                cookie: h.cookie,
                offset: h.offset,
                len: h.len,
            }),
            Err(e) => {
                // An unknown command is answered; a stream out of step cannot be.
                let mut known = *raw;
                known[6..8].copy_from_slice(&(Command::Cache as u16).to_be_bytes());
                let h = RequestHeader::decode(&known).map_err(|_| e.message().to_owned())?;
                Ok(Request { flags: h.flags, command: None, cookie: h.cookie, offset: h.offset, len: h.len })
            }
        }
    }
}
