//! The guard: decides what may be sent to the server, what may be told to the block layer, and what must be
//! done again, so that a server's crash is a stall and nothing worse.
//!
//! It is a plain state machine: no threads, no sockets, no clock. Inputs are method calls that carry the time;
//! outputs are [`Action`]s, in the order in which they must be carried out. That is why a property test can run it through every
//! interleaving (`tests/guard_model.rs`).
//!
//! The rules:
//!
//! 1. A mutation (write, trim, zero) is in the replay log before it is sent, and mutations that overlap are
//!    never in flight together, so the log's order is the true order.
//! 2. A mutation is answered only after the server's OK. It leaves the log only when a flush that was *sent*
//!    after that OK has succeeded, and the server has not admitted that the flush was a lie.
//! 3. When the server is lost, everything is held. A new server gets the log again, in order, and a flush, before
//!    anything new. Then the held mutations are done, and held reads and flushes are sent again.
//! 4. An I/O error is never passed on before a probe says that the database is still open; else the server
//!    is lost, and the error was its dying word. A flush error is never passed on at all: the log
//!    still has everything, so the server is retried, then replaced.
//! 5. A reply with zeros where a whole chunk's part was asked for is delivered only after a probe that
//!    *started after it arrived* says that the database is open (for servers that answer zeros once closed), and
//!    that the server has told of no trouble with its store since the request was sent; else the read is
//!    repeated. The OK of a flush waits for such a probe too.
//! 6. Force unit access is a write and a flush: one path for durability, and one place where a lie is found.

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::chunks::{Samples, has_zero_chunk};
use super::log::{Kind, Payload, ReplayLog};
use crate::zerofs::nbd::{Command, RequestHeader, TransmissionFlags};

/// Time since any fixed moment.
pub type Now = Duration;

/// A connection, by a number that is never used again.
pub type ConnId = u32;

/// Requests in flight per connection.
const DEPTH: usize = 32;
/// How often an I/O error with an open database is tried again.
const RETRIES: u32 = 5;
/// How often a probe may fail to find anything out before the server counts as lost.
const BLIND_PROBES: u32 = 3;
/// After that long without a mutation, what is in the log is flushed, and then its memory is given back.
const IDLE: Duration = Duration::from_secs(5);
/// Before a read is asked again that gave zeros while the server had trouble with its store.
const TROUBLE_PAUSE: Duration = Duration::from_millis(250);

const EIO: i32 = libc::EIO;

/// An operation of the block layer. Offsets and lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op<'a> {
    /// Reads `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
    },
    /// Writes `data`; with `fua` durably.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes; copied at once.
        data: &'a [u8],
        /// Durable before it is answered.
        fua: bool,
    },
    /// Writes what was received in the log: see [`Guard::land`].
    Landed {
        /// First byte; the same as when it was announced.
        offset: u64,
        /// Durable before it is answered.
        fua: bool,
    },
    /// Discards a range, which reads as zeros afterwards (ZeroFS does that on TRIM).
    Trim {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Zeroes a range.
    Zero {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Durable before it is answered.
        fua: bool,
    },
    /// Makes everything durable that was answered before.
    Flush,
}

/// What the guard wants done.
#[derive(Debug, PartialEq, Eq)]
pub enum Action<T> {
    /// Send a request; the payload of a write is in the log.
    Send {
        /// Where.
        conn: ConnId,
        /// The request.
        header: RequestHeader,
        /// The payload of a write.
        payload: Option<Payload>,
    },
    /// Answer an operation; a read that waited carries its data.
    Done {
        /// Which.
        token: T,
        /// The data of a read, empty for the rest, or a Linux errno.
        result: Result<Vec<u8>, i32>,
    },
    /// Ask whether the database is open, starting now; the answer goes to [`Guard::probed`].
    Probe {
        /// Which probe.
        id: u64,
    },
    /// Ask whether the server has admitted a lie about a flush that was sent at `since`; the answer goes to
    /// [`Guard::flush_checked`].
    CheckFlush {
        /// Which flush.
        id: u64,
        /// When it was sent.
        since: Now,
    },
    /// A retired connection has nothing in flight any more.
    Close {
        /// Which.
        conn: ConnId,
    },
    /// The server must be replaced.
    Lost {
        /// The connections to it, all of which are to be dropped.
        conns: Vec<ConnId>,
        /// Why.
        why: String,
    },
    /// The log is replayed and the volume is in service.
    Up(Replay),
    /// The log could not be replayed; everything stays held.
    ReplayFailed {
        /// The connections to the server, all of which are to be dropped.
        conns: Vec<ConnId>,
        /// Why.
        why: String,
    },
    /// Writers wait for room in the log.
    LogFull,
    /// An operation is answered with an error, for the record.
    Failed {
        /// What it was.
        what: String,
        /// The Linux errno.
        errno: i32,
    },
}

/// What a replay did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replay {
    /// Entries sent again.
    pub entries: u64,
    /// Their device bytes.
    pub bytes: u64,
}

/// Counters since the start, and gauges.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Reads answered.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// Trims answered.
    pub trims: u64,
    /// Zero requests answered.
    pub zeros: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Bytes of answered reads.
    pub bytes_read: u64,
    /// Bytes of answered writes.
    pub bytes_written: u64,
    /// Operations in flight or waiting now.
    pub pending: u64,
    /// Bytes in use in the replay log.
    pub log_used: u64,
    /// Size of the replay log in bytes.
    pub log_capacity: u64,
    /// Entries in the replay log.
    pub log_entries: u64,
    /// Flushes that the guard made by itself.
    pub own_flushes: u64,
    /// Times that the server was lost.
    pub stalls: u64,
    /// Seconds without a server, after the first time it was up.
    pub stall_seconds: f64,
    /// Log entries replayed.
    pub replayed_entries: u64,
    /// Replies with zeros that waited for a probe.
    pub zero_reads_checked: u64,
    /// Requests sent again after an error.
    pub retries: u64,
    /// Operations failed with an errno.
    pub errors: u64,
    /// Whether operations fail now because the stall is longer than the time limit.
    pub timed_out: bool,
}

/// How a guard behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The attach epoch that a replayed log goes over to.
    pub epoch: u64,
    /// After that long an operation fails with EIO; none waits for ever.
    pub io_timeout: Option<Duration>,
    /// Rule 5 applies.
    pub zeros_when_closed: bool,
    /// False only in tests: acknowledged entries are not replayed.
    pub replay_log: bool,
}

/// What the guard needs to know of the server's export.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Size in bytes.
    pub size: u64,
    /// What the server can do.
    pub flags: TransmissionFlags,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OpKind {
    Read,
    Mutation(Kind),
}

#[derive(Debug)]
struct Pending<T> {
    /// None once the caller has its answer, while the server may still be at it.
    token: Option<T>,
    kind: OpKind,
    offset: u64,
    len: u64,
    fua: bool,
    /// The data of a write that has not been started.
    data: Vec<u8>,
    /// Its log entry, once started.
    seq: Option<u64>,
    started: bool,
    born: Now,
    /// When it was sent last, once started.
    sent: Now,
    serial: u64,
    retries: u32,
}

#[derive(Debug)]
struct Waiter<T> {
    token: T,
    born: Now,
    /// A flush from above, or the second half of a FUA mutation.
    count: OpCount,
}

#[derive(Debug, Clone, Copy)]
enum OpCount {
    Flush,
    Write(u64),
    Zero,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Op(usize),
    Replay { seq: u64, retries: u32 },
    Flush,
}

#[derive(Debug)]
struct Request {
    salt: u32,
    conn: ConnId,
    cost: u64,
    who: Who,
}

#[derive(Debug)]
struct Conn {
    id: ConnId,
    in_flight: usize,
    load: u64,
    retired: bool,
}

#[derive(Debug)]
struct Flush<T> {
    id: u64,
    waiters: Vec<Waiter<T>>,
    mark: u64,
    /// It also covers what is not in the log.
    covers: bool,
    since: Now,
    retries: u32,
}

/// A reply that must not be believed before a probe has answered.
#[derive(Debug)]
struct Doubt {
    /// The first probe that will do.
    probe: u64,
    who: Who,
    what: Doubtful,
}

#[derive(Debug)]
enum Doubtful {
    Error(i32),
    Zeros(Vec<u8>),
    /// A flush that succeeded, on a server that might have said so after its end.
    Flushed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Down,
    Replaying { cursor: u64, in_flight: usize, done: Replay },
    Up,
    Failed,
}

/// The state machine. `T` is what an operation is answered with.
#[derive(Debug)]
pub struct Guard<T> {
    settings: Settings,
    log: ReplayLog,
    phase: Phase,
    target: Option<Target>,
    conns: Vec<Conn>,
    ops: Vec<Option<Pending<T>>>,
    free_ops: Vec<usize>,
    requests: Vec<Option<Request>>,
    free_requests: Vec<usize>,
    salt: u32,
    serial: u64,
    /// Not started: for want of a server, a connection with room, room in the log, or because of an overlap.
    waiting: VecDeque<usize>,
    /// The ranges of mutations in flight: start to end.
    ranges: BTreeMap<u64, u64>,
    flush: Option<Flush<T>>,
    flush_waiters: Vec<Waiter<T>>,
    next_flush: u64,
    /// Everything acknowledged up to here has been flushed.
    flushed: u64,
    /// The server may have what was never in the log, and what no flush of ours has covered.
    unsure: bool,
    log_full: bool,
    doubts: Vec<Doubt>,
    probe: Option<u64>,
    next_probe: u64,
    blind: u32,
    probe_again: Option<Now>,
    again: Vec<(Now, Who)>,
    last_mutation: Now,
    shrunk: bool,
    stalled_since: Option<Now>,
    pending: u64,
    stats: Stats,
}

/// The actions that one input led to.
pub type Actions<T> = Vec<Action<T>>;

impl<T> Guard<T> {
    /// A guard without a server; entries in `log` are those of an earlier keeper.
    pub fn new(settings: Settings, log: ReplayLog) -> Self {
        Guard {
            settings,
            log,
            phase: Phase::Down,
            target: None,
            conns: Vec::new(),
            ops: Vec::new(),
            free_ops: Vec::new(),
            requests: Vec::new(),
            free_requests: Vec::new(),
            salt: 0,
            serial: 0,
            waiting: VecDeque::new(),
            ranges: BTreeMap::new(),
            flush: None,
            flush_waiters: Vec::new(),
            next_flush: 1,
            flushed: 0,
            unsure: false,
            log_full: false,
            doubts: Vec::new(),
            probe: None,
            next_probe: 1,
            blind: 0,
            probe_again: None,
            again: Vec::new(),
            last_mutation: Duration::ZERO,
            shrunk: true,
            stalled_since: None,
            pending: 0,
            stats: Stats::default(),
        }
    }

    /// The replay log.
    pub fn log(&self) -> &ReplayLog {
        &self.log
    }

    /// The server may have got writes that were never in the log: the next flush goes to it, whatever the log says.
    pub fn distrust(&mut self) {
        self.unsure = true;
    }

    /// Puts another log in its place; only for a guard without a server and without held operations.
    pub fn set_log(&mut self, log: ReplayLog) {
        assert!(self.is_quiet(), "a log in use is replaced");
        let landing = self.log.take_landing();
        self.log = log;
        self.log.set_landing(landing);
        self.flushed = 0;
    }

    /// No server, and nothing held that is in the log.
    pub fn is_quiet(&self) -> bool {
        self.phase == Phase::Down && self.ops.iter().flatten().all(|o| o.seq.is_none())
    }

    /// In service.
    pub fn is_up(&self) -> bool {
        self.phase == Phase::Up
    }

    /// Failed for ever.
    pub fn is_failed(&self) -> bool {
        self.phase == Phase::Failed
    }

    /// The server's export, once there was one.
    pub fn target(&self) -> Option<Target> {
        self.target
    }

    /// Counters and gauges.
    pub fn stats(&self, now: Now) -> Stats {
        let stalled = self.stalled_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        Stats {
            pending: self.pending,
            log_used: self.log.used(),
            log_capacity: self.log.capacity(),
            log_entries: self.log.len(),
            stall_seconds: self.stats.stall_seconds + stalled.as_secs_f64(),
            timed_out: self.timed_out(now),
            ..self.stats.clone()
        }
    }

    fn timed_out(&self, now: Now) -> bool {
        match (self.settings.io_timeout, self.stalled_since) {
            (Some(limit), Some(since)) => now >= since + limit,
            _ => false,
        }
    }

    // ---- Inputs.

    /// Gets ready to receive the data of a write into the log, for [`Op::Landed`] or [`end_landing`](Self::end_landing).
    /// Nothing is promised by that, and nothing waits for it. False when it must be received elsewhere.
    pub fn land(&mut self, offset: u64, len: u64) -> bool {
        self.phase == Phase::Up
            && !self.log_full
            && len <= self.log.max_payload()
            && self.log.land(offset, len)
    }

    /// Where the rest of the data that is being received goes.
    pub fn landing_room(&mut self) -> &mut [u8] {
        self.log.landing_room()
    }

    /// So many bytes were put there. Gives how many are still to come; none when no data is being received.
    pub fn landed(&mut self, n: usize) -> Option<u64> {
        self.log.landed(n);
        self.log.landing_left()
    }

    /// The data will not become complete.
    pub fn end_landing(&mut self) {
        drop(self.log.end_landing());
    }

    /// An operation from above. A write is at most [`ReplayLog::max_payload`] long, other ranges at most
    /// `u32::MAX`. Gives the log entry of a mutation that need not wait for anything.
    pub fn submit(&mut self, now: Now, op: Op<'_>, token: T, out: &mut Actions<T>) -> Option<u64> {
        let landed = matches!(op, Op::Landed { .. });
        let begun =
            self.admit(now, op, token, out).and_then(|(index, data)| self.begin(now, index, data, out));
        if landed {
            // Whatever became of it, the place is free for the next one.
            self.end_landing();
        }
        begun
    }

    /// Its place among the operations, and its data; none when nothing is left to be done for it.
    fn admit<'a>(
        &mut self,
        now: Now,
        op: Op<'a>,
        token: T,
        out: &mut Actions<T>,
    ) -> Option<(usize, Data<'a>)> {
        if self.phase == Phase::Failed || self.timed_out(now) {
            self.answer_error(token, || "an operation after the end".into(), EIO, out);
            return None;
        }
        let none = Data::Bytes(&[]);
        let (kind, offset, len, fua, data) = match op {
            Op::Read { offset, len } => (OpKind::Read, offset, u64::from(len), false, none),
            Op::Write { offset, data, fua } => {
                (OpKind::Mutation(Kind::Write), offset, data.len() as u64, fua, Data::Bytes(data))
            }
            Op::Landed { .. } if self.log.landing_left() != Some(0) => {
                self.answer_error(token, || "a write that is not here".into(), EIO, out);
                return None;
            }
            Op::Landed { offset, fua } => {
                (OpKind::Mutation(Kind::Write), offset, self.log.landing_len(), fua, Data::Landed)
            }
            Op::Trim { offset, len } => (OpKind::Mutation(Kind::Trim), offset, len, false, none),
            Op::Zero { offset, len, fua } => (OpKind::Mutation(Kind::Zero), offset, len, fua, none),
            Op::Flush => {
                self.pending += 1;
                self.flush_waiters.push(Waiter { token, born: now, count: OpCount::Flush });
                self.start_flush(now, out);
                return None;
            }
        };
        let too_long = match kind {
            OpKind::Mutation(Kind::Write) => len > self.log.max_payload(),
            _ => len > u64::from(u32::MAX),
        };
        let end = offset.checked_add(len);
        let outside = self.target.is_some_and(|t| end.is_none_or(|end| end > t.size));
        if too_long || outside || end.is_none() {
            let errno = if too_long || kind == OpKind::Read { libc::EINVAL } else { libc::ENOSPC };
            self.answer_error(token, || describe(kind, offset, len), errno, out);
            return None;
        }
        let able = self.target.is_none_or(|t| match kind {
            OpKind::Mutation(Kind::Trim) => t.flags.has_trim(),
            OpKind::Mutation(Kind::Zero) => t.flags.has_write_zeroes(),
            _ => true,
        });
        if !able {
            self.answer_error(token, || describe(kind, offset, len), libc::ENOTSUP, out);
            return None;
        }
        if len == 0 {
            out.push(Action::Done { token, result: Ok(Vec::new()) });
            return None;
        }
        self.pending += 1;
        self.serial += 1;
        let op = Pending {
            token: Some(token),
            kind,
            offset,
            len,
            fua,
            data: Vec::new(),
            seq: None,
            started: false,
            born: now,
            sent: now,
            serial: self.serial,
            retries: 0,
        };
        let index = match self.free_ops.pop() {
            Some(i) => {
                self.ops[i] = Some(op);
                i
            }
            None => {
                self.ops.push(Some(op));
                self.ops.len() - 1
            }
        };
        Some((index, data))
    }

    /// Starts it, or has it wait. Gives the log entry of a mutation that was started.
    fn begin(&mut self, now: Now, index: usize, data: Data<'_>, out: &mut Actions<T>) -> Option<u64> {
        let &mut Pending { kind, offset, len, .. } = self.op(index);
        let first = self.phase == Phase::Up
            && (kind == OpKind::Read
                || !(self.log_full || self.waiting.iter().any(|&w| self.collides(w, offset, offset + len))));
        if !first || !matches!(self.start(now, index, data, out), Start::Started) {
            self.op(index).data = match data {
                Data::Bytes(data) => data.to_vec(),
                Data::Landed => self.log.end_landing(),
            };
            self.waiting.push_back(index);
        }
        let entry = self.op(index).seq;
        self.own_flush_if_needed(now, out);
        entry
    }

    /// How long the payload of a successful reply to this request is; none when there is no such request.
    pub fn reply_len(&self, conn: ConnId, cookie: u64) -> Option<u32> {
        let request = self.request(conn, cookie)?;
        Some(match request.who {
            Who::Op(i) => match self.ops[i].as_ref() {
                Some(op) if op.kind == OpKind::Read => op.len as u32,
                _ => 0,
            },
            _ => 0,
        })
    }

    /// Who waits for the data of this reply, if nobody has been answered yet and it may be delivered without being looked at
    /// as a whole: a read, of a server whose zeros are always true, or of which each chunk shows that it is not zeros.
    /// Such a reply is told with an empty payload.
    pub(super) fn unseen(&self, conn: ConnId, cookie: u64) -> Option<(&T, Option<Samples>)> {
        let Who::Op(i) = self.request(conn, cookie)?.who else { return None };
        let op = self.ops[i].as_ref().filter(|op| op.kind == OpKind::Read)?;
        let samples = self.settings.zeros_when_closed.then(|| Samples::new(op.offset));
        Some((op.token.as_ref()?, samples))
    }

    /// A reply of the server. When it gives a token, `payload` is the answer to that operation, now.
    pub fn reply(
        &mut self,
        now: Now,
        conn: ConnId,
        cookie: u64,
        errno: u32,
        payload: &[u8],
        out: &mut Actions<T>,
    ) -> Option<T> {
        let request = self.take_request(conn, cookie, out)?;
        let errno = i32::try_from(errno).unwrap_or(EIO);
        let mut inline = None;
        if errno == libc::ESHUTDOWN {
            self.lose(now, "the server is shutting down".into(), out);
        } else if errno == 0 {
            match request.who {
                Who::Op(i) => inline = self.op_succeeded(now, i, payload, out),
                Who::Replay { seq, .. } => self.replay_succeeded(now, seq, out),
                Who::Flush => self.flush_succeeded(out),
            }
        } else if is_answer(errno) && self.answer_directly(now, request.who, errno, out) {
            // Said and done.
        } else {
            self.doubt(request.who, Doubtful::Error(errno), out);
        }
        self.pump(now, out);
        inline
    }

    /// A connection broke. One that is not known (any more) is no loss.
    pub fn conn_lost(&mut self, now: Now, conn: ConnId, why: &str, out: &mut Actions<T>) {
        if self.conns.iter().any(|c| c.id == conn) {
            self.lose(now, why.to_owned(), out);
        }
    }

    /// The answer of a probe: whether the database is open, none when nobody could tell; and when the server
    /// last told of trouble with its store, if that makes it answer with zeros.
    pub fn probed(
        &mut self,
        now: Now,
        id: u64,
        open: Option<bool>,
        troubled: Option<Now>,
        out: &mut Actions<T>,
    ) {
        if self.probe != Some(id) {
            return;
        }
        self.probe = None;
        match open {
            Some(false) => return self.lose(now, "the server's database is closed".into(), out),
            None => {
                self.blind += 1;
                if self.blind >= BLIND_PROBES {
                    return self.lose(now, "the server does not answer the probe".into(), out);
                }
                // The doubts stay; the next probe, a little later, serves them.
                self.probe_again = Some(now + Duration::from_millis(100));
                return;
            }
            Some(true) => self.blind = 0,
        }
        let (settled, rest): (Vec<_>, Vec<_>) =
            mem::take(&mut self.doubts).into_iter().partition(|d| d.probe <= id);
        self.doubts = rest;
        for doubt in settled {
            if !matches!(self.phase, Phase::Up | Phase::Replaying { .. }) {
                // An earlier one cost us the server: the rest is held with everything else.
                return;
            }
            match doubt.what {
                Doubtful::Zeros(_)
                    if let Who::Op(i) = doubt.who
                        && troubled.is_some_and(|at| at >= self.op(i).sent) =>
                {
                    // As often as it takes: either the trouble ends, or the server does.
                    self.again.push((now + TROUBLE_PAUSE, doubt.who));
                }
                Doubtful::Zeros(data) => {
                    if let Who::Op(i) = doubt.who
                        && let Some(token) = self.finish_op(i)
                    {
                        out.push(Action::Done { token, result: Ok(data) });
                    }
                }
                Doubtful::Flushed => self.check_flush(out),
                Doubtful::Error(errno) => self.error_with_open_database(now, doubt.who, errno, out),
            }
        }
        self.start_probe_if_needed(out);
        self.pump(now, out);
    }

    /// Whether the server stood by the flush.
    pub fn flush_checked(&mut self, now: Now, id: u64, honest: bool, out: &mut Actions<T>) {
        if self.flush.as_ref().is_none_or(|f| f.id != id) {
            return;
        }
        if !honest {
            return self.lose(now, "the server admits that a flush was not durable".into(), out);
        }
        let Some(flush) = self.flush.take() else { return };
        self.flushed = self.flushed.max(flush.mark);
        self.log.release(flush.mark);
        self.log_full = false;
        for waiter in flush.waiters {
            self.answer_waiter(waiter, out);
        }
        if let Phase::Replaying { done, .. } = self.phase {
            return self.finish_replay(now, done, out);
        }
        self.pump(now, out);
        self.start_flush(now, out);
        self.own_flush_if_needed(now, out);
    }

    /// A fresh server, reached over `conns`. The log is replayed; [`Action::Up`] tells the end.
    pub fn up(&mut self, now: Now, conns: &[ConnId], target: Target, out: &mut Actions<T>) {
        assert!(self.phase == Phase::Down && !conns.is_empty(), "a server comes up twice");
        self.target = Some(target);
        self.log.set_epoch(self.settings.epoch);
        self.log.set_device_size(target.size);
        self.add_conns(conns);
        let cursor = self.log.seqs().start;
        self.phase = Phase::Replaying { cursor, in_flight: 0, done: Replay::default() };
        self.replay_on(now, out);
    }

    /// Replaces the connections of a live server, to learn a new size: the old ones carry out what they have.
    pub fn replace_conns(&mut self, conns: &[ConnId], target: Target, out: &mut Actions<T>) {
        assert!(self.phase == Phase::Up && !conns.is_empty(), "connections are replaced without a server");
        self.target = Some(target);
        self.log.set_device_size(target.size);
        for conn in &mut self.conns {
            conn.retired = true;
        }
        out.extend(self.conns.extract_if(.., |c| c.in_flight == 0).map(|c| Action::Close { conn: c.id }));
        self.add_conns(conns);
    }

    /// The server is gone by intent: as [`conn_lost`](Self::conn_lost), but nobody needs to be told.
    pub fn down(&mut self, now: Now) {
        self.lose(now, String::new(), &mut Vec::new());
    }

    /// The volume has another owner: all is over.
    pub fn fail(&mut self, now: Now, out: &mut Actions<T>) {
        if self.phase == Phase::Failed {
            return;
        }
        self.lose(now, String::new(), &mut Vec::new());
        self.phase = Phase::Failed;
        let mut ops: Vec<_> = mem::take(&mut self.ops).into_iter().flatten().collect();
        ops.sort_by_key(|op| op.serial);
        let tokens = ops.into_iter().filter_map(|op| op.token);
        let tokens: Vec<_> =
            tokens.chain(mem::take(&mut self.flush_waiters).into_iter().map(|w| w.token)).collect();
        for token in tokens {
            self.answer_error(token, || "an operation at the end".into(), EIO, out);
        }
        self.free_ops.clear();
        self.waiting.clear();
        self.pending = 0;
        self.log.clear();
        self.log.shrink();
    }

    /// Time passes; to be called at [`deadline`](Self::deadline).
    pub fn tick(&mut self, now: Now, out: &mut Actions<T>) {
        if self.phase == Phase::Failed {
            return;
        }
        self.time_out(now, out);
        if self.probe_again.is_some_and(|at| at <= now) {
            self.probe_again = None;
            self.start_probe_if_needed(out);
        }
        let due: Vec<_> = self.again.extract_if(.., |(at, _)| *at <= now).map(|(_, who)| who).collect();
        for who in due {
            self.stats.retries += 1;
            match who {
                Who::Op(i) => {
                    self.op(i).sent = now;
                    let (seq, header) = self.op_header(i);
                    self.send(Who::Op(i), header, seq, out);
                }
                Who::Replay { seq, .. } => {
                    if let Some(header) = self.entry_header(seq) {
                        self.send(who, header, Some(seq), out);
                    }
                }
                Who::Flush => self.send_flush(now, out),
            }
        }
        if self.phase == Phase::Up && now >= self.last_mutation + IDLE {
            if self.wants_idle_flush() {
                self.stats.own_flushes += 1;
                self.force_flush(now, out);
            } else if self.wants_shrink() {
                self.log.shrink();
                self.shrunk = true;
            }
        }
        self.pump(now, out);
    }

    /// When [`tick`](Self::tick) is to be called next; none when nothing can happen by itself.
    pub fn deadline(&self) -> Option<Now> {
        let idle = (self.phase == Phase::Up && (self.wants_idle_flush() || self.wants_shrink()))
            .then_some(self.last_mutation + IDLE);
        let again = self.again.iter().map(|(at, _)| *at).min();
        let limit = self.settings.io_timeout.and_then(|limit| {
            let ops = self.ops.iter().flatten().filter(|o| o.token.is_some()).map(|o| o.born);
            let flushes = self.flush_waiters.iter().map(|w| w.born);
            let flushing = self.flush.iter().flat_map(|f| f.waiters.iter().map(|w| w.born));
            ops.chain(flushes).chain(flushing).min().map(|born| born + limit)
        });
        [idle, again, limit, self.probe_again].into_iter().flatten().min()
    }

    fn wants_idle_flush(&self) -> bool {
        self.flush.is_none() && !self.log.is_empty() && self.log.mark() > self.flushed
    }

    fn wants_shrink(&self) -> bool {
        self.log.is_empty() && !self.shrunk
    }

    // ---- Operations.

    fn op(&mut self, i: usize) -> &mut Pending<T> {
        self.ops[i].as_mut().expect("an operation that is referred to exists")
    }

    /// Whether the operation `w` is a mutation that touches the range.
    fn collides(&self, w: usize, start: u64, end: u64) -> bool {
        self.ops[w]
            .as_ref()
            .is_some_and(|o| o.kind != OpKind::Read && o.offset < end && start < o.offset + o.len)
    }

    fn in_flight(&self, start: u64, end: u64) -> bool {
        self.ranges.range(..end).next_back().is_some_and(|(_, &e)| e > start)
    }

    fn start(&mut self, now: Now, i: usize, data: Data<'_>, out: &mut Actions<T>) -> Start {
        let (kind, offset, len) = {
            let op = self.op(i);
            (op.kind, op.offset, op.len)
        };
        if let OpKind::Mutation(kind) = kind {
            if self.in_flight(offset, offset + len) {
                return Start::Overlap;
            }
            if !self.has_room() {
                return Start::NoConnection;
            }
            let appended = match data {
                Data::Bytes(data) => self.log.append(kind, offset, len, data),
                Data::Landed => self.log.append_landed(),
            };
            match appended {
                Ok(seq) => self.op(i).seq = Some(seq),
                Err(_) => {
                    if !self.log_full {
                        self.log_full = true;
                        out.push(Action::LogFull);
                    }
                    return Start::LogFull;
                }
            }
            self.ranges.insert(offset, offset + len);
            self.last_mutation = now;
            self.shrunk = false;
        } else if !self.has_room() {
            return Start::NoConnection;
        }
        let op = self.op(i);
        (op.started, op.sent) = (true, now);
        let (seq, header) = self.op_header(i);
        self.send(Who::Op(i), header, seq, out);
        Start::Started
    }

    fn op_header(&self, i: usize) -> (Option<u64>, RequestHeader) {
        let op = self.ops[i].as_ref().expect("an operation that is referred to exists");
        let command = match op.kind {
            OpKind::Read => Command::Read,
            OpKind::Mutation(kind) => command(kind),
        };
        let header = RequestHeader { flags: 0, command, cookie: 0, offset: op.offset, len: op.len as u32 };
        (op.seq, header)
    }

    fn entry_header(&self, seq: u64) -> Option<RequestHeader> {
        let e = self.log.entry(seq)?;
        Some(RequestHeader {
            flags: 0,
            command: command(e.kind),
            cookie: 0,
            offset: e.offset,
            len: e.len as u32,
        })
    }

    fn op_succeeded(&mut self, now: Now, i: usize, payload: &[u8], out: &mut Actions<T>) -> Option<T> {
        let op = self.op(i);
        if op.kind == OpKind::Read {
            if self.settings.zeros_when_closed && has_zero_chunk(self.op(i).offset, payload) {
                self.stats.zero_reads_checked += 1;
                self.doubt(Who::Op(i), Doubtful::Zeros(payload.to_vec()), out);
                return None;
            }
            return self.finish_op(i);
        }
        let (seq, fua, kind, offset, len, born) = (op.seq, op.fua, op.kind, op.offset, op.len, op.born);
        self.ranges.remove(&offset);
        if let Some(seq) = seq {
            self.log.ack(seq);
        }
        self.last_mutation = now;
        if fua {
            let count =
                if kind == OpKind::Mutation(Kind::Zero) { OpCount::Zero } else { OpCount::Write(len) };
            if let Some(token) = self.remove_op(i).token {
                self.flush_waiters.push(Waiter { token, born, count });
                self.start_flush(now, out);
            } else {
                self.pending -= 1;
            }
        } else if let Some(token) = self.finish_op(i) {
            out.push(Action::Done { token, result: Ok(Vec::new()) });
        }
        None
    }

    fn remove_op(&mut self, i: usize) -> Pending<T> {
        self.free_ops.push(i);
        self.ops[i].take().expect("an operation that is referred to exists")
    }

    /// Takes a successful operation off the books; its token, if nobody answered it before.
    fn finish_op(&mut self, i: usize) -> Option<T> {
        let op = self.remove_op(i);
        self.pending -= 1;
        match op.kind {
            OpKind::Read => {
                self.stats.reads += 1;
                self.stats.bytes_read += op.len;
            }
            OpKind::Mutation(Kind::Trim) => self.stats.trims += 1,
            OpKind::Mutation(Kind::Zero) => self.stats.zeros += 1,
            OpKind::Mutation(_) => {
                self.stats.writes += 1;
                self.stats.bytes_written += op.len;
            }
        }
        op.token
    }

    /// The operation has failed, and its caller is told so.
    fn fail_op(&mut self, i: usize, errno: i32, out: &mut Actions<T>) {
        let op = self.remove_op(i);
        self.pending -= 1;
        if op.kind != OpKind::Read {
            self.ranges.remove(&op.offset);
        }
        if let Some(seq) = op.seq {
            self.log.void(seq);
        }
        if let Some(token) = op.token {
            self.answer_error(token, || describe(op.kind, op.offset, op.len), errno, out);
        }
    }

    fn answer_error(&mut self, token: T, what: impl Fn() -> String, errno: i32, out: &mut Actions<T>) {
        self.stats.errors += 1;
        out.push(Action::Failed { what: what(), errno });
        out.push(Action::Done { token, result: Err(errno) });
    }

    /// Starts what can be started, oldest first; nothing overtakes an older mutation that it overlaps.
    fn pump(&mut self, now: Now, out: &mut Actions<T>) {
        if self.phase != Phase::Up || self.waiting.is_empty() {
            return;
        }
        let mut left: VecDeque<usize> = VecDeque::new();
        let mut waiting = mem::take(&mut self.waiting);
        let mut full = false;
        while let Some(i) = waiting.pop_front() {
            let op = self.op(i);
            let (kind, start, end) = (op.kind, op.offset, op.offset + op.len);
            let blocked =
                kind != OpKind::Read && (full || left.iter().any(|&w| self.collides(w, start, end)));
            if blocked {
                left.push_back(i);
                continue;
            }
            let data = mem::take(&mut self.op(i).data);
            match self.start(now, i, Data::Bytes(&data), out) {
                Start::Started => continue,
                Start::NoConnection => {
                    self.op(i).data = data;
                    left.push_back(i);
                    break;
                }
                Start::LogFull => full = true,
                Start::Overlap => {}
            }
            self.op(i).data = data;
            left.push_back(i);
        }
        left.extend(waiting);
        self.waiting = left;
        self.own_flush_if_needed(now, out);
    }

    // ---- Flushes.

    /// Starts a flush when somebody waits for one and none is on its way.
    fn start_flush(&mut self, now: Now, out: &mut Actions<T>) {
        if self.phase != Phase::Up || self.flush.is_some() || self.flush_waiters.is_empty() {
            return;
        }
        if !self.log.is_empty() || self.log.mark() > self.flushed || self.unsure {
            return self.force_flush(now, out);
        }
        // All that was ever acknowledged has been flushed, and nothing is on its way: there is nothing to ask the
        // server for. mkfs and fsck flush a device several times that they have not written to.
        for waiter in mem::take(&mut self.flush_waiters) {
            self.answer_waiter(waiter, out);
        }
    }

    fn force_flush(&mut self, now: Now, out: &mut Actions<T>) {
        let id = self.next_flush;
        self.next_flush += 1;
        let waiters = mem::take(&mut self.flush_waiters);
        self.flush = Some(Flush { id, waiters, mark: 0, covers: false, since: now, retries: 0 });
        self.send_flush(now, out);
    }

    /// The half-full rule; nothing to gain when nothing was acknowledged since the last flush.
    fn own_flush_if_needed(&mut self, now: Now, out: &mut Actions<T>) {
        if self.phase == Phase::Up
            && self.flush.is_none()
            && (self.log_full || self.log.used() > self.log.capacity() / 2)
            && self.log.mark() > self.flushed
        {
            self.stats.own_flushes += 1;
            self.force_flush(now, out);
        }
    }

    fn send_flush(&mut self, now: Now, out: &mut Actions<T>) {
        let mark = self.log.mark();
        let Some(flush) = self.flush.as_mut() else { return };
        flush.mark = mark;
        flush.covers |= mem::take(&mut self.unsure);
        flush.since = now;
        if self.target.is_some_and(|t| t.flags.has_flush()) {
            let header = RequestHeader { flags: 0, command: Command::Flush, cookie: 0, offset: 0, len: 0 };
            self.send(Who::Flush, header, None, out);
        } else {
            // A server without FLUSH has no volatile cache.
            self.flush_succeeded(out);
        }
    }

    fn flush_succeeded(&mut self, out: &mut Actions<T>) {
        if self.settings.zeros_when_closed {
            self.doubt(Who::Flush, Doubtful::Flushed, out);
        } else {
            self.check_flush(out);
        }
    }

    fn check_flush(&mut self, out: &mut Actions<T>) {
        if let Some(flush) = &self.flush {
            out.push(Action::CheckFlush { id: flush.id, since: flush.since });
        }
    }

    fn answer_waiter(&mut self, waiter: Waiter<T>, out: &mut Actions<T>) {
        self.pending -= 1;
        match waiter.count {
            OpCount::Flush => self.stats.flushes += 1,
            OpCount::Zero => self.stats.zeros += 1,
            OpCount::Write(len) => {
                self.stats.writes += 1;
                self.stats.bytes_written += len;
            }
        }
        out.push(Action::Done { token: waiter.token, result: Ok(Vec::new()) });
    }

    // ---- Doubts.

    fn doubt(&mut self, who: Who, what: Doubtful, out: &mut Actions<T>) {
        // A probe that is on its way started too early.
        self.doubts.push(Doubt { probe: self.next_probe, who, what });
        self.start_probe_if_needed(out);
    }

    fn start_probe_if_needed(&mut self, out: &mut Actions<T>) {
        if self.probe.is_none() && self.probe_again.is_none() && !self.doubts.is_empty() {
            let id = self.next_probe;
            self.next_probe += 1;
            self.probe = Some(id);
            out.push(Action::Probe { id });
        }
    }

    /// Errors that say what is wrong with the request go up at once. False when this one must be doubted.
    fn answer_directly(&mut self, now: Now, who: Who, errno: i32, out: &mut Actions<T>) -> bool {
        match who {
            Who::Op(i) => self.fail_op(i, errno, out),
            Who::Replay { seq, .. } => {
                // Only what nobody was told to be done may fail in a replay.
                let held = self.ops.iter().position(|o| o.as_ref().is_some_and(|o| o.seq == Some(seq)));
                let Some(i) = held.filter(|_| self.log.entry(seq).is_some_and(|e| !e.is_acked())) else {
                    return false;
                };
                self.fail_op(i, errno, out);
                self.replay_step_done(now, out);
            }
            Who::Flush => return false,
        }
        true
    }

    fn error_with_open_database(&mut self, now: Now, who: Who, errno: i32, out: &mut Actions<T>) {
        let mut later = |retries: u32| {
            let at = now + Duration::from_millis(50 << (2 * retries.min(3)));
            self.again.push((
                at,
                match who {
                    Who::Replay { seq, .. } => Who::Replay { seq, retries: retries + 1 },
                    who => who,
                },
            ));
        };
        match who {
            Who::Op(i) => {
                let op = self.ops[i].as_mut().expect("an operation that is referred to exists");
                if op.retries < RETRIES {
                    later(op.retries);
                    op.retries += 1;
                } else {
                    self.fail_op(i, errno, out);
                }
            }
            Who::Replay { retries, .. } if retries < RETRIES => later(retries),
            Who::Replay { seq, .. } => {
                let what = self.entry_header(seq).map_or_else(String::new, |h| {
                    format!("{:?} of {} bytes at {}", h.command, h.len, h.offset).to_lowercase()
                });
                let conns = self.drop_server(now);
                let why = format!("the server refuses to replay a {what}: errno {errno}");
                out.push(Action::ReplayFailed { conns, why });
            }
            Who::Flush => {
                let Some(flush) = self.flush.as_mut() else { return };
                if flush.retries < RETRIES {
                    later(flush.retries);
                    flush.retries += 1;
                } else {
                    self.lose(now, format!("flush fails with errno {errno}"), out);
                }
            }
        }
    }

    // ---- Loss and replay.

    fn lose(&mut self, now: Now, why: String, out: &mut Actions<T>) {
        if matches!(self.phase, Phase::Up | Phase::Replaying { .. }) {
            let in_service = self.phase == Phase::Up;
            let conns = self.drop_server(now);
            if in_service {
                self.stats.stalls += 1;
                out.push(Action::Lost { conns, why });
            } else {
                out.push(Action::ReplayFailed { conns, why });
            }
        }
    }

    /// Gives the connections that it had.
    fn drop_server(&mut self, now: Now) -> Vec<ConnId> {
        if self.stalled_since.is_none() {
            self.stalled_since = Some(now);
        }
        self.phase = Phase::Down;
        let conns = self.conns.drain(..).map(|c| c.id).collect();
        self.requests.clear();
        self.free_requests.clear();
        self.ranges.clear();
        self.doubts.clear();
        self.again.clear();
        self.probe = None;
        self.probe_again = None;
        self.blind = 0;
        self.log_full = false;
        if let Some(flush) = self.flush.take() {
            self.unsure |= flush.covers;
            let later = mem::replace(&mut self.flush_waiters, flush.waiters);
            self.flush_waiters.extend(later);
        }
        // Reads are asked again; mutations that were started are in the log, and wait for the replay.
        let mut again: Vec<_> = (0..self.ops.len())
            .filter(|&i| self.ops[i].as_ref().is_some_and(|o| o.kind == OpKind::Read && o.started))
            .collect();
        for i in mem::take(&mut again) {
            let op = self.op(i);
            op.started = false;
            op.retries = 0;
            if op.token.is_some() {
                again.push(i);
            } else {
                self.remove_op(i);
                self.pending -= 1;
            }
        }
        again.extend(mem::take(&mut self.waiting));
        again.sort_by_key(|&i| self.ops[i].as_ref().map_or(0, |o| o.serial));
        self.waiting = again.into();
        conns
    }

    fn replay_on(&mut self, now: Now, out: &mut Actions<T>) {
        let Phase::Replaying { mut cursor, mut in_flight, mut done } = self.phase else { return };
        let end = self.log.seqs().end;
        while cursor < end && self.has_room() {
            let Some(entry) = self.log.entry(cursor).copied() else {
                cursor += 1;
                continue;
            };
            let skip = !entry.is_live() || (!self.settings.replay_log && entry.is_acked());
            if !skip {
                if self.in_flight(entry.offset, entry.offset + entry.len) {
                    break;
                }
                let seq = cursor;
                self.ranges.insert(entry.offset, entry.offset + entry.len);
                if let Some(header) = self.entry_header(seq) {
                    self.send(Who::Replay { seq, retries: 0 }, header, Some(seq), out);
                }
                in_flight += 1;
                done.entries += 1;
                done.bytes += entry.len;
                self.stats.replayed_entries += 1;
            }
            cursor += 1;
        }
        self.phase = Phase::Replaying { cursor, in_flight, done };
        if cursor == end && in_flight == 0 && self.flush.is_none() {
            if self.log.is_empty() {
                self.finish_replay(now, done, out);
            } else {
                let waiters = mem::take(&mut self.flush_waiters);
                self.force_flush(now, out);
                // Those who wait for a flush get their own, after the held operations are answered.
                self.flush_waiters = waiters;
            }
        }
    }

    fn replay_succeeded(&mut self, now: Now, seq: u64, out: &mut Actions<T>) {
        if let Some(entry) = self.log.entry(seq).copied() {
            self.ranges.remove(&entry.offset);
            self.log.ack(seq);
        }
        self.replay_step_done(now, out);
    }

    fn replay_step_done(&mut self, now: Now, out: &mut Actions<T>) {
        if let Phase::Replaying { in_flight, .. } = &mut self.phase {
            *in_flight -= 1;
        }
        self.replay_on(now, out);
    }

    fn finish_replay(&mut self, now: Now, done: Replay, out: &mut Actions<T>) {
        self.phase = Phase::Up;
        self.flushed = self.log.mark();
        self.last_mutation = now;
        self.shrunk = false;
        if let Some(since) = self.stalled_since.take() {
            self.stats.stall_seconds += now.saturating_sub(since).as_secs_f64();
        }
        let mut held: Vec<_> =
            (0..self.ops.len()).filter(|&i| self.ops[i].as_ref().is_some_and(|o| o.seq.is_some())).collect();
        held.sort_by_key(|&i| self.ops[i].as_ref().and_then(|o| o.seq));
        for i in held {
            // Durable too, so FUA needs nothing more.
            if let Some(token) = self.finish_op(i) {
                out.push(Action::Done { token, result: Ok(Vec::new()) });
            }
        }
        out.push(Action::Up(done));
        self.pump(now, out);
        self.start_flush(now, out);
    }

    fn time_out(&mut self, now: Now, out: &mut Actions<T>) {
        let Some(limit) = self.settings.io_timeout else { return };
        let late = |born: Now| now >= born + limit;
        for i in 0..self.ops.len() {
            let Some(op) = self.ops[i].as_mut().filter(|o| o.token.is_some() && late(o.born)) else {
                continue;
            };
            let (kind, offset, len) = (op.kind, op.offset, op.len);
            let token = if op.started {
                // The server may still be at it: its range stays taken, and its log entry in force.
                op.token.take()
            } else {
                self.waiting.retain(|&w| w != i);
                self.pending -= 1;
                self.remove_op(i).token
            };
            if let Some(token) = token {
                self.answer_error(token, || describe(kind, offset, len), EIO, out);
            }
        }
        let mut late_waiters: Vec<_> = self.flush_waiters.extract_if(.., |w| late(w.born)).collect();
        if let Some(flush) = self.flush.as_mut() {
            late_waiters.extend(flush.waiters.extract_if(.., |w| late(w.born)));
        }
        for waiter in late_waiters {
            self.pending -= 1;
            self.answer_error(waiter.token, || "a flush".into(), EIO, out);
        }
    }

    // ---- Connections and requests.

    fn add_conns(&mut self, conns: &[ConnId]) {
        self.conns.extend(conns.iter().map(|&id| Conn { id, in_flight: 0, load: 0, retired: false }));
    }

    fn has_room(&self) -> bool {
        self.conns.iter().any(|c| !c.retired && c.in_flight < DEPTH)
    }

    fn send(&mut self, who: Who, mut header: RequestHeader, seq: Option<u64>, out: &mut Actions<T>) {
        // A flush keeps a connection of ZeroFS busy for long, a large transfer for a while.
        let cost = match header.command {
            Command::Flush => 64,
            _ => 1 + u64::from(header.len >> 16),
        };
        let Some(conn) = self.conns.iter_mut().filter(|c| !c.retired).min_by_key(|c| c.load) else { return };
        conn.in_flight += 1;
        conn.load += cost;
        let conn = conn.id;
        self.salt = self.salt.wrapping_add(1);
        let request = Request { salt: self.salt, conn, cost, who };
        let slot = match self.free_requests.pop() {
            Some(slot) => {
                self.requests[slot] = Some(request);
                slot
            }
            None => {
                self.requests.push(Some(request));
                self.requests.len() - 1
            }
        };
        header.cookie = u64::from(self.salt) << 32 | slot as u64;
        let payload = match header.command {
            Command::Write => seq.and_then(|seq| self.log.payload(seq)),
            _ => None,
        };
        out.push(Action::Send { conn, header, payload });
    }

    fn request(&self, conn: ConnId, cookie: u64) -> Option<&Request> {
        let request = self.requests.get((cookie & 0xffff_ffff) as usize)?.as_ref()?;
        (request.salt == (cookie >> 32) as u32 && request.conn == conn).then_some(request)
    }

    fn take_request(&mut self, conn: ConnId, cookie: u64, out: &mut Actions<T>) -> Option<Request> {
        self.request(conn, cookie)?;
        let slot = (cookie & 0xffff_ffff) as usize;
        let request = self.requests[slot].take()?;
        self.free_requests.push(slot);
        if let Some(c) = self.conns.iter().position(|c| c.id == conn) {
            self.conns[c].in_flight -= 1;
            self.conns[c].load -= request.cost;
            if self.conns[c].retired && self.conns[c].in_flight == 0 {
                self.conns.remove(c);
                out.push(Action::Close { conn });
            }
        }
        Some(request)
    }
}

/// Where the data of a write is.
#[derive(Clone, Copy)]
enum Data<'a> {
    Bytes(&'a [u8]),
    /// In the log, where it was received.
    Landed,
}

enum Start {
    Started,
    Overlap,
    NoConnection,
    LogFull,
}

fn command(kind: Kind) -> Command {
    match kind {
        Kind::Trim => Command::Trim,
        Kind::Zero => Command::WriteZeroes,
        Kind::Write | Kind::Pad => Command::Write,
    }
}

fn describe(kind: OpKind, offset: u64, len: u64) -> String {
    let what = match kind {
        OpKind::Read => "read",
        OpKind::Mutation(Kind::Trim) => "trim",
        OpKind::Mutation(Kind::Zero) => "zero",
        OpKind::Mutation(_) => "write",
    };
    format!("{what} of {len} bytes at {offset}")
}

/// Errors that are about the request, not about the server.
fn is_answer(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::EINVAL | libc::ENOSPC | libc::EOVERFLOW | libc::ENOTSUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::log::{Identity, MIN_CAPACITY, Opened};

    fn guard(zeros_when_closed: bool) -> (Guard<u8>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity { volume: "v".parse().unwrap(), epoch: 1, boot: "b".into() };
        let Opened::Log(log) = ReplayLog::open(dir.path(), &identity, MIN_CAPACITY).unwrap() else {
            panic!("a new log is not foreign")
        };
        let settings = Settings { epoch: 1, io_timeout: None, zeros_when_closed, replay_log: true };
        (Guard::new(settings, log), dir)
    }

    #[test]
    fn only_reads_may_be_delivered_unseen_and_with_samples_where_zeros_may_be_false() {
        for zeros_when_closed in [true, false] {
            let (mut guard, _dir) = guard(zeros_when_closed);
            let (mut out, target) = (Vec::new(), Target { size: 1 << 20, flags: TransmissionFlags::new(1) });
            guard.up(Duration::ZERO, &[1], target, &mut out);
            out.clear();
            guard.submit(Duration::ZERO, Op::Read { offset: 4096, len: 8192 }, 7, &mut out);
            guard.submit(Duration::ZERO, Op::Write { offset: 0, data: &[1; 512], fua: false }, 8, &mut out);
            let cookies: Vec<u64> = out
                .iter()
                .map(|action| match action {
                    Action::Send { header, .. } => header.cookie,
                    other => panic!("{other:?}"),
                })
                .collect();
            let (token, samples) = guard.unseen(1, cookies[0]).unwrap();
            assert_eq!((*token, samples.is_some()), (7, zeros_when_closed));
            assert!(guard.unseen(1, cookies[1]).is_none(), "a write");
            assert!(guard.unseen(2, cookies[0]).is_none(), "another connection");
        }
    }

    #[test]
    fn zeros_during_trouble_with_the_store_are_asked_for_again() {
        let (mut guard, _dir) = guard(true);
        let at = Duration::from_millis;
        let (mut out, target) = (Vec::new(), Target { size: 1 << 20, flags: TransmissionFlags::new(1) });
        guard.up(at(0), &[1], target, &mut out);
        out.clear();
        let cookie = |out: &Actions<u8>| match &out[..] {
            [Action::Send { header, .. }] => header.cookie,
            other => panic!("{other:?}"),
        };
        guard.submit(at(10), Op::Read { offset: 0, len: 4096 }, 7, &mut out);
        let first = cookie(&out);
        out.clear();
        assert_eq!(guard.reply(at(20), 1, first, 0, &[0; 4096], &mut out), None);
        assert_eq!(out, [Action::Probe { id: 1 }]);
        out.clear();
        // The trouble began after the request and before the reply: these zeros may be a failed read.
        guard.probed(at(30), 1, Some(true), Some(at(15)), &mut out);
        assert_eq!(out, []);
        let again = guard.deadline().unwrap();
        guard.tick(again, &mut out);
        let second = cookie(&out);
        out.clear();
        guard.reply(again + at(5), 1, second, 0, &[0; 4096], &mut out);
        out.clear();
        // Nothing new since it was asked again: the device really holds zeros.
        guard.probed(again + at(9), 2, Some(true), Some(at(15)), &mut out);
        assert_eq!(out, [Action::Done { token: 7, result: Ok(vec![0; 4096]) }]);
    }
}
