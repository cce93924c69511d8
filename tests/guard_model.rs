//! The guard and its replay log against a model server that forgets, lies, closes and breaks.
//!
//! A case is a list of events that proptest chooses and shrinks. The model knows, for every 512-byte block,
//! which contents the block layer has been promised; after every crash and replay, and in every read, the device
//! must hold one of them. `ZEROFSCTL_CASES` sets the number of cases (120 by default).

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};
use tempfile::TempDir;
use zerofsctl::keeper::guard::{Action, Guard, Op, Settings, Target};
use zerofsctl::keeper::log::{FILE_NAME, Identity, MIN_CAPACITY, Opened, ReplayLog};
use zerofsctl::zerofs::nbd::{Command, RequestHeader, TransmissionFlags};

const BLOCK: usize = 512;
/// Three chunks of 256 KiB, so that replies span them, but only a few blocks around their edges are used, so
/// that overlaps are many.
const BLOCKS: usize = 3 * 512;
const CONNS: u32 = 3;

/// What a block holds: the same number in all its words; 0 is zeros.
type Tag = u64;

#[derive(Debug, Clone)]
enum Event {
    Write {
        at: u16,
        blocks: u8,
        fua: bool,
    },
    Trim {
        at: u16,
        blocks: u16,
    },
    Zero {
        at: u16,
        blocks: u16,
        fua: bool,
    },
    Read {
        at: u16,
        blocks: u16,
    },
    Flush,
    /// The data of a write begins to come in, for the replay log to take.
    Land {
        at: u16,
        blocks: u8,
    },
    /// Some bytes of it.
    Receive {
        bytes: u16,
    },
    /// The rest of it, and the write is submitted.
    Landed {
        fua: bool,
    },
    /// The rest of it will never come.
    Abandon,
    /// The server carries out the n-th request it has, in any order.
    Serve {
        nth: u8,
    },
    /// The n-th reply arrives.
    Reply {
        nth: u8,
    },
    /// The server carries out and answers all it has.
    ServeAll,
    Probe {
        blind: bool,
    },
    CheckFlush,
    Pass {
        millis: u16,
    },
    /// The server makes some blocks durable by itself.
    Persist {
        which: u64,
    },
    /// The next request that the server carries out fails with this.
    Error {
        errno: i32,
    },
    /// The database closes: reads are zeros in any chunk, mutations fail, flush says OK.
    Close,
    /// Flushes do nothing, and the server says so in its log.
    Lie,
    /// A connection breaks; what the server has not read of it is lost.
    Cut {
        conn: u8,
    },
    /// The server dies; any of its unflushed blocks may be lost.
    Kill {
        kept: u64,
    },
    /// A server is started, if there is none.
    Start,
    /// The keeper is killed in the middle of an append of a write, and a new one takes over.
    KillKeeper {
        at: u16,
        blocks: u8,
        header: u16,
        data: u16,
        garbage: u16,
        kept: u64,
    },
    /// Fresh connections replace the old ones.
    Replace,
}

fn event() -> impl Strategy<Value = Event> {
    use Event::*;
    // Near the edges of chunks, mostly.
    let at = || prop_oneof![0..24u16, 500..524u16, 1020..1030u16];
    let count = || prop_oneof![4 => 1..12u16, 1 => 500..1100u16];
    prop_oneof![
        // Many of one size, so that entries of an earlier lap of the ring lie where the next is looked for.
        12 => (at(), prop_oneof![2 => Just(1), 2 => Just(8), 1 => 1..20u8], prop::bool::weighted(0.15))
            .prop_map(|(at, blocks, fua)| Write { at, blocks, fua }),
        2 => (at(), count()).prop_map(|(at, blocks)| Trim { at, blocks }),
        2 => (at(), count(), any::<bool>()).prop_map(|(at, blocks, fua)| Zero { at, blocks, fua }),
        6 => (at(), count()).prop_map(|(at, blocks)| Read { at, blocks }),
        4 => Just(Flush),
        5 => (at(), 1..30u8).prop_map(|(at, blocks)| Land { at, blocks }),
        5 => (0..6000u16).prop_map(|bytes| Receive { bytes }),
        5 => prop::bool::weighted(0.15).prop_map(|fua| Landed { fua }),
        1 => Just(Abandon),
        12 => any::<u8>().prop_map(|nth| Serve { nth }),
        12 => any::<u8>().prop_map(|nth| Reply { nth }),
        6 => Just(ServeAll),
        4 => prop::bool::weighted(0.1).prop_map(|blind| Probe { blind }),
        4 => Just(CheckFlush),
        2 => (0..9000u16).prop_map(|millis| Pass { millis }),
        1 => any::<u64>().prop_map(|which| Persist { which }),
        1 => prop::sample::select(vec![libc::EIO, libc::ENOSPC, libc::EINVAL, libc::ESHUTDOWN, libc::ENOMEM])
            .prop_map(|errno| Error { errno }),
        1 => Just(Close),
        1 => Just(Lie),
        1 => any::<u8>().prop_map(|conn| Cut { conn }),
        1 => any::<u64>().prop_map(|kept| Kill { kept }),
        3 => Just(Start),
        1 => (at(), 1..20u8, any::<u16>(), any::<u16>(), any::<u16>(), any::<u64>()).prop_map(
            |(at, blocks, header, data, garbage, kept)| KillKeeper { at, blocks, header, data, garbage, kept }
        ),
        1 => Just(Replace),
    ]
}

/// A server with a volatile cache.
struct Server {
    volatile: Vec<Tag>,
    durable: Vec<Tag>,
    inbox: VecDeque<(u32, RequestHeader, Vec<u8>)>,
    outbox: Vec<(u32, RequestHeader, i32, Vec<u8>)>,
    closed: bool,
    lies: bool,
    /// When it admitted a lie.
    admitted: Option<Duration>,
    next_error: Option<i32>,
}

impl Server {
    fn new(durable: Vec<Tag>) -> Self {
        Server {
            volatile: durable.clone(),
            durable,
            inbox: VecDeque::new(),
            outbox: Vec::new(),
            closed: false,
            lies: false,
            admitted: None,
            next_error: None,
        }
    }

    fn serve(&mut self, nth: usize, now: Duration) {
        if self.inbox.is_empty() {
            return;
        }
        let (conn, header, payload) = self.inbox.remove(nth % self.inbox.len()).unwrap();
        let first = header.offset as usize / BLOCK;
        let range = first..first + header.len as usize / BLOCK;
        let mut errno = self.next_error.take().unwrap_or(0);
        if errno == libc::ENOSPC && header.command == Command::Flush {
            errno = libc::EIO;
        }
        if self.closed && !matches!(header.command, Command::Read | Command::Flush) {
            errno = libc::EIO;
        }
        let mut data = Vec::new();
        if errno == 0 {
            match header.command {
                Command::Read if self.closed => {
                    // Some chunks after the first may still be in a cache.
                    data = bytes(&self.volatile[range.clone()]);
                    for (i, block) in range.enumerate() {
                        if block < 512 || !((header.cookie >> 32) + (block / 512) as u64).is_multiple_of(3) {
                            data[i * BLOCK..(i + 1) * BLOCK].fill(0);
                        }
                    }
                }
                Command::Read => data = bytes(&self.volatile[range]),
                Command::Write => {
                    for (block, bytes) in range.zip(payload.chunks(BLOCK)) {
                        self.volatile[block] = tag(bytes).expect("a torn block was sent");
                    }
                }
                Command::Trim | Command::WriteZeroes => self.volatile[range].fill(0),
                Command::Flush if self.closed => {}
                Command::Flush if self.lies => self.admitted = Some(now),
                Command::Flush => self.durable.clone_from(&self.volatile),
                other => panic!("the guard sends {other:?}"),
            }
        }
        self.outbox.push((conn, header, errno, data));
    }

    /// What is left after a kill: each block is as flushed, or as last written.
    fn killed(mut self, kept: u64) -> Vec<Tag> {
        for (i, durable) in self.durable.iter_mut().enumerate() {
            if !self.closed && kept.rotate_left(i as u32 * 7) & 1 == 1 {
                *durable = self.volatile[i];
            }
        }
        self.durable
    }
}

fn bytes(tags: &[Tag]) -> Vec<u8> {
    tags.iter().flat_map(|t| t.to_le_bytes().repeat(BLOCK / 8)).collect()
}

fn tag(block: &[u8]) -> Option<Tag> {
    let first: [u8; 8] = block[..8].try_into().unwrap();
    block.chunks(8).all(|w| w == first).then(|| u64::from_le_bytes(first))
}

enum Sent {
    /// With the moment when it was submitted; a durable one with the versions of its blocks then.
    Mutation { start: usize, end: usize, tag: Tag, born: u64, durable: Option<Vec<u64>> },
    /// With the versions of the blocks when it was submitted.
    Read { start: usize, end: usize, versions: Vec<u64> },
    /// With the versions of all blocks when it was submitted.
    Flush { versions: Vec<u64> },
}

/// A write whose data is coming in.
struct Landing {
    start: usize,
    end: usize,
    tag: Tag,
    data: Vec<u8>,
    filled: usize,
}

struct World {
    dir: TempDir,
    guard: Guard<u64>,
    server: Option<Server>,
    /// The disk without a server.
    disk: Vec<Tag>,
    conns: Vec<u32>,
    next_conn: u32,
    now: Duration,
    next: u64,
    sent: HashMap<u64, Sent>,
    /// What each block may hold when nothing is in flight on it.
    /// Each with the moment when its operation was answered: two that were in flight together may have been
    /// carried out in either order.
    promised: Vec<Vec<(Tag, u64)>>,
    moment: u64,
    versions: Vec<u64>,
    /// With what is true when they start.
    probes: VecDeque<(u64, Option<bool>)>,
    checks: VecDeque<(u64, Duration)>,
    replay_log: bool,
    zeros_when_closed: bool,
    reads_checked: u64,
    /// I/O errors of a server in good health.
    io_errors: u64,
    replays: u64,
    landing: Option<Landing>,
}

fn identity() -> Identity {
    Identity { volume: "model".parse().unwrap(), epoch: 1, boot: "boot".into() }
}

fn settings(zeros_when_closed: bool, replay_log: bool) -> Settings {
    Settings { epoch: 1, io_timeout: None, zeros_when_closed, replay_log }
}

fn open(dir: &Path) -> ReplayLog {
    match ReplayLog::open(dir, &identity(), MIN_CAPACITY).unwrap() {
        Opened::Log(log) => log,
        Opened::Foreign { why } => panic!("our own log is foreign: {why}"),
    }
}

impl World {
    fn new(zeros_when_closed: bool, replay_log: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let guard = Guard::new(settings(zeros_when_closed, replay_log), open(dir.path()));
        World {
            dir,
            guard,
            server: None,
            disk: vec![0; BLOCKS],
            conns: Vec::new(),
            next_conn: 0,
            now: Duration::ZERO,
            next: 0,
            sent: HashMap::new(),
            promised: vec![vec![(0, 0)]; BLOCKS],
            moment: 0,
            versions: vec![0; BLOCKS],
            probes: VecDeque::new(),
            checks: VecDeque::new(),
            replay_log,
            zeros_when_closed,
            reads_checked: 0,
            io_errors: 0,
            replays: 0,
            landing: None,
        }
    }

    fn range(at: u16, blocks: usize) -> (usize, usize) {
        let start = at as usize % BLOCKS;
        (start, (start + blocks.max(1)).min(BLOCKS))
    }

    fn submit(&mut self, op: Op<'_>, sent: Sent) {
        let token = self.next;
        let mut sent = sent;
        if let Sent::Mutation { start, end, durable, .. } = &mut sent {
            self.versions[*start..*end].iter_mut().for_each(|v| *v += 1);
            if matches!(
                op,
                Op::Write { fua: true, .. } | Op::Landed { fua: true, .. } | Op::Zero { fua: true, .. }
            ) {
                *durable = Some(self.versions[*start..*end].to_vec());
            }
        }
        self.sent.insert(token, sent);
        let mut out = Vec::new();
        self.guard.submit(self.now, op, token, &mut out);
        self.act(out);
    }

    fn mutation(&mut self, start: usize, end: usize, zero: bool) -> (Sent, Vec<u8>) {
        self.next += 1;
        let tag = if zero { 0 } else { self.next };
        (Sent::Mutation { start, end, tag, born: self.moment, durable: None }, bytes(&vec![tag; end - start]))
    }

    /// So many more bytes of the landing, or what is left of it.
    fn receive(&mut self, bytes: usize) {
        let Some(landing) = &mut self.landing else { return };
        let n = bytes.min(landing.data.len() - landing.filled);
        let room = self.guard.landing_room();
        assert_eq!(room.len(), landing.data.len() - landing.filled);
        room[..n].copy_from_slice(&landing.data[landing.filled..landing.filled + n]);
        landing.filled += n;
        assert_eq!(self.guard.landed(n), Some((landing.data.len() - landing.filled) as u64));
    }

    fn act(&mut self, out: Vec<Action<u64>>) {
        for action in out {
            match action {
                Action::Send { conn, header, payload } => {
                    assert!(self.conns.contains(&conn), "a request on a dead connection");
                    let map = self.guard.log().mapped();
                    // SAFETY: the guard has just said to send it, and is not touched meanwhile.
                    let data = payload.map_or(Vec::new(), |p| unsafe { map.payload(p) }.to_vec());
                    self.no_overlap(&header);
                    self.server
                        .as_mut()
                        .expect("a request without a server")
                        .inbox
                        .push_back((conn, header, data));
                }
                Action::Done { token, result } => self.answered(token, result),
                Action::Probe { id } => {
                    self.probes.push_back((id, self.server.as_ref().map(|s| !s.closed)));
                }
                Action::CheckFlush { id, since } => self.checks.push_back((id, since)),
                Action::Close { conn } => self.conns.retain(|c| *c != conn),
                // The supervisor kills it at once; which unflushed blocks survive is up to the number.
                Action::Lost { conns, .. } | Action::ReplayFailed { conns, .. } => {
                    assert!(self.conns.iter().all(|c| conns.contains(c)), "a connection is kept");
                    self.kill(self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                }
                Action::Up(_) => {
                    self.replays += 1;
                    self.check_device();
                }
                Action::LogFull | Action::Failed { .. } => {}
            }
        }
    }

    /// Rule 1: what the server has not answered does not overlap.
    fn no_overlap(&self, new: &RequestHeader) {
        if !matches!(new.command, Command::Write | Command::Trim | Command::WriteZeroes) {
            return;
        }
        let server = self.server.as_ref().unwrap();
        for old in server.inbox.iter().map(|r| &r.1).chain(server.outbox.iter().map(|r| &r.1)) {
            if matches!(old.command, Command::Write | Command::Trim | Command::WriteZeroes) {
                let apart = old.offset + u64::from(old.len) <= new.offset
                    || new.offset + u64::from(new.len) <= old.offset;
                assert!(apart, "{old:?} and {new:?} are in flight together");
            }
        }
    }

    fn answered(&mut self, token: u64, result: Result<Vec<u8>, i32>) {
        if matches!(result, Err(libc::EIO | libc::ENOMEM | libc::ESHUTDOWN)) {
            assert!(self.io_errors > 5, "an error that no retry would have met is passed on");
        }
        match (self.sent.remove(&token).expect("an operation is answered twice"), result) {
            (Sent::Mutation { start, end, tag, born, durable }, result) => {
                self.moment += 1;
                if let (Some(versions), Ok(_)) = (durable, &result) {
                    for block in start..end {
                        if versions[block - start] == self.versions[block] && !self.in_flight(block) {
                            assert_eq!(self.durable(block), tag, "block {block} is not durable");
                        }
                    }
                }
                for block in start..end {
                    self.versions[block] += 1;
                    if result.is_ok() {
                        self.promised[block].retain(|(_, answered)| *answered > born);
                    }
                    self.promised[block].push((tag, self.moment));
                }
            }
            (Sent::Read { start, end, versions }, Ok(data)) => {
                assert_eq!(data.len(), (end - start) * BLOCK);
                for (i, bytes) in data.chunks(BLOCK).enumerate() {
                    let block = start + i;
                    // A block that was written meanwhile may show anything of before or after.
                    if versions[i] == self.versions[block] && !self.in_flight(block) {
                        let found = tag(bytes).expect("a torn block was read");
                        assert!(
                            self.promised[block].iter().any(|p| p.0 == found),
                            "block {block} reads {found}, promised was {:?}",
                            self.promised[block]
                        );
                        self.reads_checked += 1;
                    }
                }
            }
            (Sent::Flush { versions }, Ok(_)) => {
                for (block, version) in versions.into_iter().enumerate() {
                    if version == self.versions[block] && !self.in_flight(block) {
                        let found = self.durable(block);
                        assert!(
                            self.promised[block].iter().any(|p| p.0 == found),
                            "after a flush block {block} is durable as {found}, promised was {:?}",
                            self.promised[block]
                        );
                    }
                }
            }
            (Sent::Read { .. } | Sent::Flush { .. }, Err(_)) => {}
        }
    }

    fn durable(&self, block: usize) -> Tag {
        self.server.as_ref().expect("a flush is answered without a server").durable[block]
    }

    fn in_flight(&self, block: usize) -> bool {
        self.sent
            .values()
            .any(|s| matches!(s, Sent::Mutation { start, end, .. } if (*start..*end).contains(&block)))
    }

    /// After a replay, the server holds what was promised.
    fn check_device(&mut self) {
        let Some(server) = &self.server else { return };
        for (block, found) in server.volatile.iter().enumerate() {
            let possible = |s: &Sent| matches!(s, Sent::Mutation { start, end, tag, .. } if (*start..*end).contains(&block) && tag == found);
            assert!(
                self.promised[block].iter().any(|p| p.0 == *found) || self.sent.values().any(possible),
                "after a replay block {block} holds {found}, promised was {:?}",
                self.promised[block]
            );
        }
    }

    fn start(&mut self) {
        if self.server.is_some() || self.guard.is_failed() {
            return;
        }
        self.server = Some(Server::new(self.disk.clone()));
        self.conns = self.fresh_conns();
        let mut out = Vec::new();
        self.guard.up(self.now, &self.conns.clone(), target(), &mut out);
        self.act(out);
    }

    fn fresh_conns(&mut self) -> Vec<u32> {
        self.next_conn += CONNS;
        (self.next_conn - CONNS..self.next_conn).collect()
    }

    fn kill(&mut self, kept: u64) {
        if let Some(server) = self.server.take() {
            self.disk = server.killed(kept);
            self.conns.clear();
            self.probes.clear();
            self.checks.clear();
        }
    }

    fn reply(&mut self, nth: usize) {
        let Some(server) = self.server.as_mut().filter(|s| !s.outbox.is_empty()) else { return };
        let nth = nth % server.outbox.len();
        let (conn, header, errno, data) = server.outbox.remove(nth);
        if !self.conns.contains(&conn) {
            return;
        }
        if errno == 0 {
            assert_eq!(self.guard.reply_len(conn, header.cookie), Some(data.len() as u32));
        }
        let mut out = Vec::new();
        let token = self.guard.reply(self.now, conn, header.cookie, errno as u32, &data, &mut out);
        if let Some(token) = token {
            self.answered(token, Ok(data));
        }
        self.act(out);
    }

    fn probe(&mut self, blind: bool) {
        if let Some((id, open)) = self.probes.pop_front() {
            let open = open.filter(|_| !blind);
            let mut out = Vec::new();
            self.guard.probed(self.now, id, open, None, &mut out);
            self.act(out);
        }
    }

    fn check_flush(&mut self) {
        if let Some((id, since)) = self.checks.pop_front() {
            let lied = self.server.as_ref().and_then(|s| s.admitted).is_some_and(|at| at >= since);
            let mut out = Vec::new();
            self.guard.flush_checked(self.now, id, !lied, &mut out);
            self.act(out);
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let mut out = Vec::new();
        self.guard.tick(self.now, &mut out);
        self.act(out);
    }

    fn event(&mut self, event: &Event) {
        // Time moves a little with everything.
        self.now += Duration::from_micros(10);
        match *event {
            Event::Write { at, blocks, fua } => {
                let (start, end) = Self::range(at, blocks.into());
                let (sent, data) = self.mutation(start, end, false);
                self.submit(Op::Write { offset: (start * BLOCK) as u64, data: &data, fua }, sent);
            }
            Event::Trim { at, blocks } | Event::Zero { at, blocks, .. } => {
                let (start, end) = Self::range(at, blocks.into());
                let (sent, _) = self.mutation(start, end, true);
                let (offset, len) = ((start * BLOCK) as u64, ((end - start) * BLOCK) as u64);
                let op = match *event {
                    Event::Zero { fua, .. } => Op::Zero { offset, len, fua },
                    _ => Op::Trim { offset, len },
                };
                self.submit(op, sent);
            }
            Event::Read { at, blocks } => {
                let (start, end) = Self::range(at, blocks.into());
                self.next += 1;
                let versions = self.versions[start..end].to_vec();
                let op = Op::Read { offset: (start * BLOCK) as u64, len: ((end - start) * BLOCK) as u32 };
                self.submit(op, Sent::Read { start, end, versions });
            }
            Event::Flush => {
                self.next += 1;
                let versions = self.versions.clone();
                self.submit(Op::Flush, Sent::Flush { versions });
            }
            Event::Land { at, blocks } => {
                let (start, end) = Self::range(at, blocks.into());
                let len = ((end - start) * BLOCK) as u64;
                if self.guard.land((start * BLOCK) as u64, len) {
                    assert!(self.landing.is_none(), "two are received in one place");
                    self.next += 1;
                    let (tag, data) = (self.next, bytes(&vec![self.next; end - start]));
                    self.landing = Some(Landing { start, end, tag, data, filled: 0 });
                }
            }
            Event::Receive { bytes } => self.receive(bytes.into()),
            Event::Landed { fua } => {
                self.receive(usize::MAX);
                if let Some(Landing { start, end, tag, .. }) = self.landing.take() {
                    self.next += 1;
                    let sent = Sent::Mutation { start, end, tag, born: self.moment, durable: None };
                    self.submit(Op::Landed { offset: (start * BLOCK) as u64, fua }, sent);
                    assert!(self.guard.landing_room().is_empty(), "a landing that has ended goes on");
                }
            }
            Event::Abandon => {
                self.guard.end_landing();
                self.landing = None;
            }
            Event::Serve { nth } => {
                if let Some(server) = &mut self.server {
                    server.serve(nth.into(), self.now);
                }
            }
            Event::Reply { nth } => self.reply(nth.into()),
            Event::ServeAll => {
                for _ in 0..1000 {
                    let Some(server) = self.server.as_mut() else { break };
                    if server.inbox.is_empty() && server.outbox.is_empty() {
                        break;
                    }
                    server.serve(0, self.now);
                    self.reply(0);
                }
            }
            Event::Probe { blind } => self.probe(blind),
            Event::CheckFlush => self.check_flush(),
            Event::Pass { millis } => self.pass(Duration::from_millis(millis.into())),
            Event::Persist { which } => {
                if let Some(server) = self.server.as_mut().filter(|s| !s.closed) {
                    for block in 0..BLOCKS {
                        if which.rotate_left(block as u32 * 3) & 1 == 1 {
                            server.durable[block] = server.volatile[block];
                        }
                    }
                }
            }
            Event::Error { errno } => {
                if let Some(server) = &mut self.server {
                    server.next_error = Some(errno);
                    self.io_errors += u64::from(matches!(errno, libc::EIO | libc::ENOMEM));
                }
            }
            Event::Close if self.zeros_when_closed => {
                if let Some(server) = &mut self.server {
                    // What was unflushed dies with the database, though a cache may still show it.
                    server.closed = true;
                }
            }
            Event::Close => {}
            Event::Lie => {
                if let Some(server) = &mut self.server {
                    server.lies = true;
                }
            }
            Event::Cut { conn } => {
                if !self.conns.is_empty() {
                    let conn = self.conns[conn as usize % self.conns.len()];
                    let mut out = Vec::new();
                    self.guard.conn_lost(self.now, conn, "cut", &mut out);
                    self.act(out);
                }
            }
            Event::Kill { kept } => {
                if self.server.is_some() {
                    let conn = self.conns[0];
                    self.kill(kept);
                    let mut out = Vec::new();
                    self.guard.conn_lost(self.now, conn, "killed", &mut out);
                    self.act(out);
                }
            }
            Event::Start => self.start(),
            Event::KillKeeper { at, blocks, header, data, garbage, kept } => {
                self.kill_keeper(at, blocks, header, data, garbage, kept);
            }
            Event::Replace => {
                if self.guard.is_up() {
                    let fresh = self.fresh_conns();
                    self.conns.extend(&fresh);
                    let mut out = Vec::new();
                    self.guard.replace_conns(&fresh, target(), &mut out);
                    self.act(out);
                }
            }
        }
    }

    /// The keeper dies while it appends; its server too, as its child.
    fn kill_keeper(&mut self, at: u16, blocks: u8, header: u16, data: u16, garbage: u16, kept: u64) {
        let path = self.dir.path().join(FILE_NAME);
        let before = std::fs::read(&path).unwrap();
        let head = 4096 + (self.guard.log().used_end() % MIN_CAPACITY) as usize;
        let free = (MIN_CAPACITY - self.guard.log().used()) as usize;
        let (start, end) = Self::range(at, blocks.into());
        let (mut sent, payload) = self.mutation(start, end, false);
        let mut op = Op::Write { offset: (start * BLOCK) as u64, data: &payload, fua: false };
        // In the middle of what was being received, if it is that.
        self.receive(usize::MAX);
        if let Some(Landing { start, end, tag, .. }) = self.landing.take() {
            sent = Sent::Mutation { start, end, tag, born: self.moment, durable: None };
            op = Op::Landed { offset: (start * BLOCK) as u64, fua: false };
        }
        // Its requests go nowhere: the process is dead before.
        let mut out = Vec::new();
        self.sent.insert(self.next, sent);
        self.guard.submit(self.now, op, self.next, &mut out);
        let after = std::fs::read(&path).unwrap();
        let mut torn = before.clone();
        for (part, cut) in [(0..4096, header), (4096..torn.len(), data)] {
            let changed: Vec<usize> = part.filter(|&i| before[i] != after[i]).collect();
            let cut = cut as usize * (changed.len() + 1) / 65536;
            for &i in &changed[..cut] {
                torn[i] = after[i];
            }
        }
        // Stale bytes of any kind after the head.
        let noise = (garbage as usize % 600).min(free);
        if before == torn {
            for i in 0..noise {
                let at = 4096 + (head - 4096 + i) % MIN_CAPACITY as usize;
                torn[at] = (garbage as usize * (i + 1)).to_le_bytes()[1];
            }
        }
        self.kill(kept);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), &torn).unwrap();
        self.guard = Guard::new(settings(self.zeros_when_closed, self.replay_log), open(dir.path()));
        self.dir = dir;
        // What was in flight may have happened or not.
        self.moment += 1;
        for (_, sent) in self.sent.drain() {
            if let Sent::Mutation { start, end, tag, .. } = sent {
                for block in start..end {
                    self.versions[block] += 1;
                    self.promised[block].push((tag, self.moment));
                }
            }
        }
        self.probes.clear();
        self.checks.clear();
    }

    /// Lets everything come to rest on an honest server; then nothing may be left undone.
    fn settle(&mut self) {
        for round in 0..4000 {
            self.start();
            let server = self.server.as_mut().unwrap();
            server.next_error = None;
            if server.lies || server.closed {
                self.event(&Event::Kill { kept: round });
                continue;
            }
            if self.sent.is_empty() && self.guard.is_up() {
                return self.read_back();
            }
            self.event(&Event::ServeAll);
            self.probe(false);
            self.check_flush();
            if let Some(at) = self.guard.deadline()
                && round % 8 == 7
            {
                self.pass(at.saturating_sub(self.now));
            }
        }
        panic!("{} operations never end: {:?}", self.sent.len(), self.guard.stats(self.now));
    }

    fn read_back(&mut self) {
        let before = self.reads_checked;
        for at in (0..BLOCKS).step_by(256) {
            self.event(&Event::Read { at: at as u16, blocks: 256 });
        }
        for _ in 0..100 {
            self.event(&Event::ServeAll);
            self.probe(false);
        }
        assert_eq!(self.reads_checked - before, BLOCKS as u64, "some blocks could not be read");
        self.check_device();
    }
}

fn target() -> Target {
    // All that ZeroFS can do.
    Target { size: (BLOCKS * BLOCK) as u64, flags: TransmissionFlags::new(0b1101_0110_1101) }
}

fn run(events: &[Event], zeros_when_closed: bool, replay_log: bool) {
    let mut world = World::new(zeros_when_closed, replay_log);
    world.start();
    for event in events {
        world.event(event);
    }
    world.settle();
}

fn cases(default: u32) -> u32 {
    std::env::var("ZEROFSCTL_CASES").ok().map_or(default, |n| n.parse().expect("ZEROFSCTL_CASES is a number"))
}

fn runner(cases: u32, max_shrink_iters: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, max_shrink_iters, ..Config::default() })
}

fn holds(zeros_when_closed: bool) {
    let events = prop::collection::vec(event(), 1..250);
    let result = runner(cases(120), 2000).run(&events, |events| {
        run(&events, zeros_when_closed, true);
        Ok(())
    });
    if let Err(TestError::Fail(why, events)) = result {
        panic!("{why}\nwith {} events: {events:#?}", events.len());
    }
    result.unwrap();
}

#[test]
fn the_device_holds_what_was_acknowledged() {
    holds(false);
}

#[test]
fn the_device_holds_what_was_acknowledged_by_a_server_that_serves_zeros_when_closed() {
    holds(true);
}

/// The test sees what it claims to see: without the replay, or with a probe's rule off, it fails.
#[test]
fn without_the_replay_acknowledged_writes_are_lost() {
    let lost = || {
        run(
            &[
                Event::Write { at: 3, blocks: 4, fua: false },
                Event::ServeAll,
                Event::Kill { kept: 0 },
                Event::Start,
            ],
            false,
            false,
        );
    };
    let why = *std::panic::catch_unwind(lost).unwrap_err().downcast::<String>().unwrap();
    assert!(why.contains("after a replay block 3 holds 0, promised was [(1, 1)]"), "{why}");
    let events = prop::collection::vec(event(), 1..250);
    let found = runner(300, 0).run(&events, |events| {
        run(&events, false, false);
        Ok(())
    });
    assert!(matches!(found, Err(TestError::Fail(..))), "300 random cases did not notice");
}

#[test]
fn zeros_of_a_closed_server_get_through_only_when_the_rule_is_off() {
    let events = [
        Event::Write { at: 3, blocks: 4, fua: true },
        Event::ServeAll,
        Event::CheckFlush,
        Event::Probe { blind: false },
        Event::CheckFlush,
        Event::Close,
        Event::Read { at: 3, blocks: 4 },
        Event::ServeAll,
    ];
    let mut world = World::new(true, true);
    world.start();
    events.iter().for_each(|e| world.event(e));
    assert_eq!(world.sent.len(), 1, "the read is held");
    world.settle();
    assert!(world.replays > 1, "the server was replaced");
    let unruly = || {
        let mut world = World::new(true, true);
        world.guard = Guard::new(settings(false, true), open_anew(&mut world));
        world.start();
        events.iter().for_each(|e| world.event(e));
    };
    let why = *std::panic::catch_unwind(unruly).unwrap_err().downcast::<String>().unwrap();
    assert!(why.contains("block 3 reads 0, promised was [(1, 1)]"), "{why}");
}

fn open_anew(world: &mut World) -> ReplayLog {
    world.dir = tempfile::tempdir().unwrap();
    open(world.dir.path())
}

#[test]
fn a_fenced_volume_fails_everything_for_ever() {
    let mut world = World::new(true, true);
    world.start();
    for event in [
        Event::Write { at: 0, blocks: 4, fua: false },
        Event::Write { at: 2, blocks: 4, fua: true },
        Event::Read { at: 0, blocks: 4 },
        Event::Flush,
        Event::Serve { nth: 0 },
    ] {
        world.event(&event);
    }
    let mut out = Vec::new();
    world.guard.fail(world.now, &mut out);
    let failed = out.iter().filter(|a| matches!(a, Action::Done { result: Err(libc::EIO), .. })).count();
    assert_eq!(failed, 4);
    let mut later = Vec::new();
    for op in [Op::Flush, Op::Read { offset: 0, len: 512 }, Op::Trim { offset: 0, len: 512 }] {
        world.guard.submit(world.now, op, 99, &mut later);
    }
    let failed = later.iter().filter(|a| matches!(a, Action::Done { result: Err(libc::EIO), .. })).count();
    assert_eq!(failed, 3);
    assert!(world.guard.log().is_empty(), "the log of a fenced volume is void");
    assert!(!later.iter().any(|a| matches!(a, Action::Send { .. })));
    drop(world.guard);
    assert!(open(world.dir.path()).is_empty());
}

#[test]
fn a_time_limit_ends_the_wait_with_an_error_and_the_state_says_so() {
    let mut world = World::new(false, true);
    let limited = Settings { io_timeout: Some(Duration::from_secs(3)), ..settings(false, true) };
    world.io_errors = u64::MAX;
    world.guard = Guard::new(limited, open_anew(&mut world));
    world.start();
    world.event(&Event::Write { at: 0, blocks: 1, fua: false });
    world.event(&Event::ServeAll);
    world.event(&Event::Write { at: 1, blocks: 1, fua: false });
    world.event(&Event::Kill { kept: 0 });
    world.event(&Event::Read { at: 0, blocks: 1 });
    world.event(&Event::Flush);
    assert_eq!(world.sent.len(), 3);
    assert!(world.guard.deadline().is_some_and(|at| at <= Duration::from_secs(4)));
    world.pass(Duration::from_secs(2));
    assert_eq!(world.sent.len(), 3);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.sent.len(), 0, "all are answered");
    let stats = world.guard.stats(world.now);
    assert!(stats.timed_out && stats.errors == 3, "{stats:?}");
    world.event(&Event::Read { at: 0, blocks: 1 });
    assert_eq!(world.sent.len(), 0, "answered at once");
    // The acknowledged write is still safe.
    world.settle();
    assert!(!world.guard.stats(world.now).timed_out);
}

#[test]
fn a_flush_goes_to_the_server_when_it_may_have_got_writes_by_another_way() {
    let mut world = World::new(false, true);
    world.start();
    let asked = |world: &World| world.server.as_ref().unwrap().inbox.len();
    world.event(&Event::Flush);
    assert_eq!((world.sent.len(), asked(&world)), (0, 0), "there is nothing to ask the server for");
    // As the direct path does: past the guard. A flush that is on its way already does not cover it.
    world.event(&Event::Write { at: 0, blocks: 1, fua: false });
    world.event(&Event::ServeAll);
    world.event(&Event::Flush);
    world.guard.distrust();
    world.event(&Event::Flush);
    world.event(&Event::ServeAll);
    world.check_flush();
    assert_eq!((world.sent.len(), asked(&world)), (1, 1));
    // What it was for is not forgotten when the server dies before it answers.
    world.event(&Event::Kill { kept: 0 });
    world.start();
    assert_eq!((world.sent.len(), asked(&world)), (1, 1));
    world.event(&Event::ServeAll);
    world.check_flush();
    assert_eq!(world.sent.len(), 0);
    world.event(&Event::Flush);
    assert_eq!((world.sent.len(), asked(&world)), (0, 0), "it is not asked for ever");
}

#[test]
fn data_that_never_becomes_complete_holds_nobody_up_and_is_never_replayed() {
    let mut world = World::new(false, true);
    world.start();
    world.event(&Event::Land { at: 0, blocks: 8 });
    world.event(&Event::Receive { bytes: 4000 });
    // More than the log holds, all of it written while that stays as it is.
    for i in 0..40 {
        world.event(&Event::Write { at: 20 + i * 19, blocks: 19, fua: i % 8 == 7 });
        world.event(&Event::ServeAll);
        world.check_flush();
    }
    world.settle();
    assert!(world.landing.is_some());
    world.event(&Event::Write { at: 30, blocks: 1, fua: false });
    world.event(&Event::Kill { kept: 0 });
    world.settle();
    // It is complete after all, and its bytes are the right ones.
    world.event(&Event::Landed { fua: false });
    world.settle();
    assert!(world.promised[..8].iter().all(|p| p.len() == 1 && p[0].0 != 0));
}

#[test]
fn a_full_log_lets_writers_wait_and_flushes_by_itself() {
    let mut world = World::new(false, true);
    world.start();
    for i in 0..60 {
        world.event(&Event::Write { at: i * 19, blocks: 19, fua: false });
    }
    let stats = world.guard.stats(world.now);
    assert!(stats.log_used > MIN_CAPACITY / 2 && stats.log_used <= MIN_CAPACITY, "{stats:?}");
    assert_eq!(stats.pending, 60);
    world.settle();
    let stats = world.guard.stats(world.now);
    assert_eq!((stats.writes, stats.pending), (60, 0), "{stats:?}");
    assert!(stats.own_flushes >= 1 && stats.flushes == 0, "{stats:?}");
}

#[test]
fn overlapping_mutations_keep_their_order() {
    let mut world = World::new(false, true);
    world.start();
    for (at, blocks) in [(0, 4), (2, 4), (4, 4), (20, 1)] {
        world.event(&Event::Write { at, blocks, fua: false });
    }
    let sent = |world: &World| {
        let inbox = &world.server.as_ref().unwrap().inbox;
        inbox.iter().map(|r| r.1.offset / BLOCK as u64).collect::<Vec<_>>()
    };
    // The third overlaps only the second, which waits for the first: it does not overtake.
    assert_eq!(sent(&world), [0, 20]);
    for (nth, rest) in [(1, &[0][..]), (0, &[2]), (0, &[4])] {
        world.event(&Event::Serve { nth });
        world.event(&Event::Reply { nth: 0 });
        assert_eq!(sent(&world), rest);
    }
    world.settle();
}

#[test]
fn an_idle_log_is_flushed_and_then_nothing_is_due_any_more() {
    let mut world = World::new(false, true);
    world.start();
    world.event(&Event::Write { at: 0, blocks: 1, fua: false });
    world.event(&Event::ServeAll);
    assert!(!world.guard.log().is_empty());
    for _ in 0..10 {
        let Some(at) = world.guard.deadline() else { break };
        world.pass(at.saturating_sub(world.now));
        world.event(&Event::ServeAll);
        world.check_flush();
    }
    assert!(world.guard.log().is_empty());
    assert_eq!(world.guard.deadline(), None, "an idle volume wakes nobody up");
}
