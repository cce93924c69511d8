//! The data path: connections to ZeroFS, threads, and the FUSE front end around the [guard](super::guard).
//!
//! Who does what:
//!
//! - A thread that submits (FUSE's) lets the guard decide, and sends on the socket itself, without ever
//!   waiting: what the socket does not take at once is queued, and the I/O thread goes on with it. Two threads that
//!   want to send on one connection do not wait for each other either: the first takes the other's requests along.
//! - One I/O thread receives from all connections, as much as there is at once, and answers upwards. It never
//!   waits for anything but events, so a server that is blocked on its replies is always drained.
//! - One thread asks the [`Prober`], which may take its time.
//!
//! No thread wakes up while nothing happens.

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, sendmsg, setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::chunks::Samples;
use super::fuse;
use super::guard::{Action, ConnId, Guard, Now, Replay, Settings, Target};
pub use super::guard::{Op, Stats};
use super::log::{self, Identity, LogMap, Opened, Payload, ReplayLog};
use super::nbd::{self, Front, FrontReader, Heard, gather_here, send_gathered};
use super::pipe::Pipe;
use super::taken::{Owed, Taken, Task};
use super::try_lock;
use crate::error::{Doing, Error, Kind, Result};
use crate::values::{ByteSize, VolumeId};
use crate::zerofs::nbd::{Command, Export, RequestHeader, SimpleReply, TransmissionFlags, handshake};
use crate::zerofs::sock;

/// The name of the server's socket in the run folder.
const SOCKET: &str = "nbd.sock";
/// Trims and zeros are sent in pieces of at most this, so that none keeps a connection busy for long.
const MAX_RANGE: u64 = 32 * ByteSize::MIB;
/// What is received at once, and the size of an idle connection's buffer.
const RECEIVE: usize = 128 << 10;
/// Threads that do little on the stack.
const STACK: usize = 256 << 10;
/// Requests that go into one system call.
const BATCH: usize = 32;
/// Why a connection is lost that has ended.
const CLOSED: &str = "the server closed the connection";
/// After that long without I/O the memory that it needed is given back to the system.
const QUIET: Duration = Duration::from_secs(1);
/// Data of which at least so much is still to come stays in the kernel, if nobody has to look at it.
const PIPED: usize = 64 << 10;
/// What is received at once while such data may come.
const AHEAD: usize = 4 << 10;
/// How much of a chunk is looked at before the rest may pass.
const SAMPLE: usize = 256;
/// How many chunks of such data are taken before another connection has its turn.
const TURNS: usize = 8;
/// Data that is read at once for an earlier keeper's requests, in bytes.
const OWED_DATA: u64 = 4 << 20;
/// The event number of the wake-up call.
const WAKE: u64 = u64::MAX;
/// The first event number of the kernel's sockets; below are the connections to the server.
const FRONTS: u64 = 1 << 32;

/// What a data path is made of.
#[derive(Debug, Clone)]
pub struct DataPathConfig {
    /// The volume's run folder: `nbd.sock` is in it, and `replay.log` goes there.
    pub run_dir: PathBuf,
    /// The NBD export name.
    pub export: String,
    /// Connections to the server; one is used when the server cannot share an export.
    pub connections: usize,
    /// Size of the replay log in bytes.
    pub log_bytes: u64,
    /// After that long without an answer an operation fails with EIO; none waits for ever.
    pub io_timeout: Option<Duration>,
    /// The volume: a log of another one is foreign.
    pub volume: VolumeId,
    /// The attach epoch of the catalog, which a log goes over to when it is replayed.
    pub epoch: u64,
    /// Whether this server may answer reads with zeros once its database is closed.
    pub zeros_when_closed: bool,
    /// False only in tests, which then must see data lost.
    pub replay_log: bool,
}

/// What the data path asks about the server. Both are called from a thread of the data path, one at a time,
/// and may block for a while; I/O that needs the answer waits.
pub trait Prober: Send + Sync {
    /// Whether the server's database is open now. An error means that nobody can tell; it is asked again a
    /// few times, then the server counts as lost.
    fn database_open(&self) -> Result<bool>;
    /// Whether the server has *not* admitted, since `since`, that a flush was not durable.
    fn flush_was_honest(&self, since: Instant) -> bool;
    /// When the server last told of trouble with its object store; always none for a server whose reads then fail
    /// instead of giving zeros.
    fn store_trouble(&self) -> Option<Instant> {
        None
    }
}

/// What the data path tells its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataEvent {
    /// A connection broke, or the server lies: it must be killed and started again, then
    /// [`DataPath::server_up`]. The text says why. Told once per loss; a loss during `server_up` is that call's
    /// error instead.
    ServerLost(String),
    /// Writers wait, since the replay log is full; told again after each flush that did not help.
    LogFull,
    /// All of the kernel's sockets have ended: the device was disconnected, or has gone.
    DeviceGone(String),
    /// An operation was failed with this errno.
    ErrorDelivered {
        /// What it was, in words.
        what: String,
        /// The Linux errno that the caller got.
        errno: i32,
    },
}

/// The replay log as it was found or as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum LogState {
    /// It holds nothing.
    Clean,
    /// It holds entries which no flush has covered yet; after an open, those of an earlier keeper.
    LeftBehind {
        /// How many would be replayed.
        entries: u64,
        /// Their device bytes.
        bytes: u64,
        /// The attach epoch that wrote them.
        epoch: u64,
    },
    /// It is of another volume, another boot or another format: it can only be discarded.
    Foreign {
        /// Which, in words.
        why: String,
    },
}

/// The result of [`DataPath::server_up`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// Entries written again.
    pub entries: u64,
    /// Their device bytes.
    pub bytes: u64,
    /// The size of the device in bytes.
    pub size: u64,
}

/// A reply to a request that an earlier keeper took from the kernel.
pub struct OwedReply {
    cookie: u64,
    data: Vec<u8>,
}

/// Takes the answer to an operation.
pub struct Completion(Taker);

type Call = Box<dyn FnOnce(Result<&[u8], i32>) + Send>;

enum Taker {
    Call(Call),
    /// The front end that can also take data which stays in a pipe.
    Nbd(nbd::Answer),
}

impl Completion {
    /// Calls `done` once with the read data (empty for all others) or a Linux errno; maybe before
    /// [`DataPath::submit`] returns. It must not block.
    pub fn new(done: impl FnOnce(Result<&[u8], i32>) + Send + 'static) -> Self {
        Completion(Taker::Call(Box::new(done)))
    }

    pub(super) fn nbd(answer: nbd::Answer) -> Self {
        Completion(Taker::Nbd(answer))
    }

    fn answer(self, result: Result<&[u8], i32>) {
        match self.0 {
            Taker::Call(done) => done(result),
            Taker::Nbd(answer) => answer.give(result),
        }
    }

    fn takes_a_pipe(&self) -> bool {
        matches!(self.0, Taker::Nbd(_))
    }

    /// The data is `head` and then all that is in the pipe.
    fn answer_from(self, head: &[u8], pipe: &mut Pipe) -> io::Result<()> {
        match self.0 {
            Taker::Nbd(answer) => answer.give_from(head, pipe),
            Taker::Call(done) => {
                let mut data = head.to_vec();
                pipe.read_to(&mut data)?;
                done(Ok(&data));
                Ok(())
            }
        }
    }
}

/// The data path of one volume. Dropping it ends its threads; the log stays as it is.
pub struct DataPath {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    mount: Mutex<Option<fuse::Mount>>,
    /// One at a time: server_up, resize, discard_log.
    control: Mutex<()>,
}

/// What the threads share.
pub(super) struct Shared {
    config: DataPathConfig,
    start: Instant,
    state: Mutex<State>,
    conns: RwLock<Vec<Arc<Conn>>>,
    next_conn: AtomicU32,
    size: AtomicU64,
    /// The kernel's sockets.
    fronts: RwLock<Vec<Arc<Front>>>,
    next_front: AtomicU64,
    /// Their requests, for the next keeper; none as long as there is no file for that.
    taken: Mutex<Option<Arc<Taken>>>,
    /// What the earlier keeper took from the kernel and did not answer.
    owed: Mutex<Vec<Owed>>,
    epoll: Arc<Epoll>,
    wake: EventFd,
    stop: AtomicBool,
    jobs: mpsc::Sender<Job>,
    events: mpsc::Sender<DataEvent>,
    outcome: Mutex<Option<Result<Replay, String>>>,
    outcome_told: Condvar,
}

struct State {
    /// None while the log is foreign.
    guard: Option<Guard<Completion>>,
    foreign: Option<String>,
    /// When the I/O thread wakes up by itself.
    armed: Option<Now>,
}

enum Job {
    Probe(u64),
    CheckFlush(u64, Now),
    Stop,
}

struct Conn {
    id: ConnId,
    stream: UnixStream,
    map: Arc<LogMap>,
    tx: Mutex<Tx>,
}

#[derive(Default)]
struct Tx {
    queue: std::collections::VecDeque<Frame>,
    /// Somebody is sending, and will take along what is queued meanwhile.
    sending: bool,
    /// The socket is full: the I/O thread goes on.
    blocked: bool,
}

struct Frame {
    header: [u8; RequestHeader::LEN],
    payload: Option<Payload>,
    sent: usize,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these protect is whole at every instant.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DataPath {
    /// Opens or creates the replay log and starts the threads. Nothing is replayed yet.
    ///
    /// [`Kind::Busy`] when another keeper has the log; [`Kind::Environment`] when the disk is full.
    pub fn new(
        config: DataPathConfig,
        prober: Arc<dyn Prober>,
        events: mpsc::Sender<DataEvent>,
    ) -> Result<Arc<DataPath>> {
        let opened = ReplayLog::open(&config.run_dir, &identity(&config)?, config.log_bytes)
            .map_err(|e| e.on(&config.volume))?;
        let (mut taken, mut owed) = (None, Vec::new());
        let (guard, foreign) = match opened {
            Opened::Log(log) => {
                taken = Taken::open(&config.run_dir, log.id());
                owed = taken.as_ref().map(|taken| taken.owed(&log)).unwrap_or_default();
                (Some(Guard::new(settings(&config), log)), None)
            }
            Opened::Foreign { why } => (None, Some(why)),
        };
        let failed = |what: &str, e: nix::Error| Error::failed(format!("cannot {what}: {e}"));
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| failed("make an epoll", e))?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| failed("make an event descriptor", e))?;
        epoll
            .add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))
            .map_err(|e| failed("watch an event descriptor", e))?;
        let (jobs, todo) = mpsc::channel();
        let shared = Arc::new(Shared {
            config,
            start: Instant::now(),
            state: Mutex::new(State { guard, foreign, armed: None }),
            conns: RwLock::default(),
            next_conn: AtomicU32::new(0),
            size: AtomicU64::new(0),
            fronts: RwLock::default(),
            next_front: AtomicU64::new(FRONTS),
            taken: Mutex::new(taken.map(Arc::new)),
            owed: Mutex::new(owed),
            epoll: Arc::new(epoll),
            wake,
            stop: AtomicBool::new(false),
            jobs,
            events,
            outcome: Mutex::new(None),
            outcome_told: Condvar::new(),
        });
        let mut path = DataPath {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
            mount: Mutex::new(None),
            control: Mutex::new(()),
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .stack_size(STACK)
                .spawn(body)
                .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))
        };
        // A thread that is gone would be a silent hang for ever; a keeper that is gone is noticed and replaced.
        struct AbortOnPanic;
        impl Drop for AbortOnPanic {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    std::process::abort();
                }
            }
        }
        let io = Arc::clone(&shared);
        path.threads.push(spawn(
            "io",
            Box::new(move || {
                let _end = AbortOnPanic;
                Receiver::default().run(&io);
            }),
        )?);
        path.threads.push(spawn(
            "probe",
            Box::new(move || {
                let _end = AbortOnPanic;
                run_jobs(&shared, &*prober, &todo);
            }),
        )?);
        Ok(Arc::new(path))
    }

    /// Whether a server is connected, and all that was owed to it has been replayed.
    pub fn is_up(&self) -> bool {
        self.shared.state().guard.as_ref().is_some_and(Guard::is_up)
    }

    /// The state of the log now.
    pub fn log_state(&self) -> LogState {
        let state = self.shared.state();
        match &state.guard {
            None => LogState::Foreign { why: state.foreign.clone().unwrap_or_default() },
            Some(guard) if guard.log().live() == 0 => LogState::Clean,
            Some(guard) => LogState::LeftBehind {
                entries: guard.log().live(),
                bytes: guard.log().live_bytes(),
                epoch: guard.log().epoch(),
            },
        }
    }

    /// Empties the log, whatever is in it. Refused while a server is up or mutations are held.
    pub fn discard_log(&self) -> Result<()> {
        let _one = lock(&self.control);
        let config = &self.shared.config;
        let mut state = self.shared.state();
        if state.guard.as_ref().is_some_and(|g| !g.is_quiet()) {
            return Err(Error::refused("the replay log is in use")
                .hint("detach the volume first: zerofsctl detach VOLUME")
                .on(&config.volume));
        }
        self.forget_requests();
        // It is about the old log.
        *lock(&self.shared.taken) = None;
        let log = ReplayLog::discard(&config.run_dir, &identity(config)?, config.log_bytes)
            .map_err(|e| e.on(&config.volume))?;
        state.foreign = None;
        match state.guard.as_mut() {
            Some(guard) => guard.set_log(log),
            None => state.guard = Some(Guard::new(settings(config), log)),
        }
        Ok(())
    }

    /// Connects to a freshly started server, replays the log, flushes, and resumes all held I/O. Blocks until
    /// that is done; [`server_down`](Self::server_down) and [`fail`](Self::fail) from another thread end it.
    ///
    /// The server that was used before must be dead: one that lives on could carry out old requests after
    /// the replay. On failure everything stays held, and it may be called again.
    /// [`Kind::Refused`] when the log is foreign, the volume failed, or the device is smaller than it was.
    pub fn server_up(&self) -> Result<Replayed> {
        let _one = lock(&self.control);
        self.up().map_err(|e| e.on(&self.shared.config.volume))
    }

    fn up(&self) -> Result<Replayed> {
        let shared = &*self.shared;
        let (map, size_before, entries) = {
            let state = shared.state();
            let Some(guard) = &state.guard else {
                let why = state.foreign.clone().unwrap_or_default();
                return Err(Error::refused(format!("the replay log cannot be used: {why}")).hint(
                    "discard it if the volume's data elsewhere is what you want: zerofsctl recover VOLUME",
                ));
            };
            if guard.is_failed() {
                return Err(Error::refused("the volume has a new owner; this device has failed for good")
                    .hint("detach it here: zerofsctl detach VOLUME"));
            }
            if guard.is_up() {
                return Err(Error::failed("the data path has a server already"));
            }
            (guard.log().mapped(), guard.log().device_size(), guard.log().live())
        };
        shared.drop_conns();
        // From here on, a server that is taken down is one that this was about.
        *lock(&shared.outcome) = None;
        let (streams, export) = self.connect()?;
        let known = shared.size.load(Ordering::Relaxed).max(if entries > 0 { size_before } else { 0 });
        if export.size < known {
            return Err(Error::refused(format!(
                "the device has {} bytes now and had {known}: it must never shrink",
                export.size
            ))
            .hint("look at the volume's record with zerofsctl show VOLUME"));
        }
        if entries > 0 && export.flags.is_read_only() {
            return Err(Error::refused(format!(
                "the server is read-only, and {entries} acknowledged mutations wait to be replayed"
            ))
            .hint("attach the volume read-write once: zerofsctl attach VOLUME --target DIR"));
        }
        let ids = shared.add_conns(streams, &map)?;
        let mut out = Vec::new();
        {
            let mut state = shared.state();
            let Some(guard) = state.guard.as_mut().filter(|g| !g.is_failed()) else {
                drop(state);
                shared.drop_conns();
                return Err(Error::refused("the volume failed meanwhile"));
            };
            shared.size.store(export.size, Ordering::Relaxed);
            guard.up(shared.now(), &ids, Target { size: export.size, flags: export.flags }, &mut out);
        }
        shared.act(out);
        shared.check_conns(&ids);
        shared.wake_io();
        let mut outcome = lock(&shared.outcome);
        loop {
            match outcome.take() {
                Some(Ok(done)) => {
                    return Ok(Replayed { entries: done.entries, bytes: done.bytes, size: export.size });
                }
                Some(Err(why)) => {
                    drop(outcome);
                    self.server_down();
                    return Err(Error::new(
                        Kind::Unreachable,
                        format!("the server was lost during the replay: {why}"),
                    )
                    .hint("nothing is lost; look into the volume's zerofs.log (zerofsctl show VOLUME)"));
                }
                None => {
                    outcome = shared.outcome_told.wait(outcome).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn connect(&self) -> Result<(Vec<UnixStream>, Export)> {
        let config = &self.shared.config;
        let one = || -> Result<(UnixStream, Export)> {
            let mut stream = sock::connect(&config.run_dir, SOCKET).map_err(|e| {
                Error::new(Kind::Unreachable, format!("cannot connect to ZeroFS's NBD socket: {e}"))
                    .hint("look whether ZeroFS runs, and into its log (zerofsctl show VOLUME)")
            })?;
            let export = handshake(&mut stream, &config.export)?;
            Ok((stream, export))
        };
        let (first, export) = one()?;
        let mut streams = vec![first];
        let wanted = if export.flags.can_multi_conn() { config.connections.max(1) } else { 1 };
        while streams.len() < wanted {
            let (stream, again) = one()?;
            if again != export {
                return Err(Error::new(Kind::Unreachable, "the export changes between two connections")
                    .hint("run the same command again"));
            }
            streams.push(stream);
        }
        Ok((streams, export))
    }

    /// Forgets the connections; everything in flight stays held.
    pub fn server_down(&self) {
        let shared = &self.shared;
        if let Some(guard) = shared.state().guard.as_mut() {
            guard.down(shared.now());
        }
        shared.drop_conns();
        shared.tell(Err("it was taken down".into()));
    }

    /// The volume has a new owner: everything held, and everything later, gets EIO; the log is void.
    pub fn fail(&self, why: &str) {
        let shared = &self.shared;
        let mut out = Vec::new();
        if let Some(guard) = shared.state().guard.as_mut() {
            guard.fail(shared.now(), &mut out);
        }
        shared.drop_conns();
        shared.tell(Err(why.to_owned()));
        shared.act(out);
    }

    /// The server may have got writes by another way: the next flush goes to it, also when the log knows of nothing.
    pub fn distrust(&self) {
        if let Some(guard) = self.shared.state().guard.as_mut() {
            guard.distrust();
        }
    }

    /// Makes everything durable that was answered before, also what was written on the direct path. Waits for as long
    /// as the server is away.
    pub fn flush(&self) -> Result<()> {
        self.distrust();
        let (tell, told) = mpsc::sync_channel(1);
        self.submit(
            Op::Flush,
            Completion::new(move |result| {
                let _ = tell.send(result.map(|_| ()));
            }),
        );
        match told.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(errno)) => {
                Err(Error::failed(format!("cannot flush: {}", io::Error::from_raw_os_error(errno)))
                    .on(&self.shared.config.volume))
            }
            Err(_) => Err(Error::failed("the data path ended during a flush").on(&self.shared.config.volume)),
        }
    }

    /// The size of the device in bytes; 0 before the first server.
    pub fn size(&self) -> u64 {
        self.shared.size.load(Ordering::Relaxed)
    }

    /// Learns a larger size on fresh connections, and moves all I/O to them. The FUSE file has the new size
    /// at the next stat(2).
    pub fn resize(&self) -> Result<u64> {
        let shared = &*self.shared;
        let resized = (|| {
            let away = || {
                Error::new(Kind::Busy, "the volume has no server just now")
                    .hint("wait until it is ready (zerofsctl show VOLUME), then run the same command again")
            };
            // Not waited for: a replay may take any time, and the caller keeps others from detaching the device.
            let _one = try_lock(&self.control).ok_or_else(away)?;
            let map = match &shared.state().guard {
                Some(guard) if guard.is_up() => guard.log().mapped(),
                _ => return Err(away()),
            };
            let (streams, export) = self.connect()?;
            let before = self.size();
            if export.size < before {
                return Err(Error::refused(format!(
                    "the device has {} bytes now and had {before}: it must never shrink",
                    export.size
                ))
                .hint("set the size back: zerofsctl resize VOLUME SIZE"));
            }
            let ids = shared.add_conns(streams, &map)?;
            let mut out = Vec::new();
            {
                let mut state = shared.state();
                let Some(guard) = state.guard.as_mut().filter(|g| g.is_up()) else {
                    drop(state);
                    ids.iter().for_each(|id| shared.close(*id, false));
                    return Err(away());
                };
                shared.size.store(export.size, Ordering::Relaxed);
                guard.replace_conns(&ids, Target { size: export.size, flags: export.flags }, &mut out);
            }
            shared.act(out);
            shared.check_conns(&ids);
            Ok(export.size)
        })();
        resized.map_err(|e: Error| e.on(&shared.config.volume))
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        self.shared.state().guard.as_ref().map(|g| g.stats(self.shared.now())).unwrap_or_default()
    }

    /// Hands an operation in. It may wait for as long as the server is away.
    pub fn submit(&self, op: Op<'_>, done: Completion) {
        self.shared.submit(op, done);
    }

    /// What the server can do; none before the first server.
    pub fn flags(&self) -> Option<TransmissionFlags> {
        self.shared.state().guard.as_ref()?.target().map(|t| t.flags)
    }

    /// Forgets the requests of an earlier keeper, which are about another device, or cannot be answered.
    pub fn forget_requests(&self) {
        lock(&self.shared.owed).clear();
        if let Some(taken) = &*lock(&self.shared.taken) {
            taken.clear();
        }
    }

    /// The kernel's requests come on this connection from now on, by a number that no other one has.
    pub fn name_connection(&self, connection: u64) {
        if let Some(taken) = &*lock(&self.shared.taken) {
            taken.name_connection(connection);
        }
    }

    /// The replies that an earlier keeper owes to the kernel for requests on this connection, as far as they can be given
    /// within that time; the kernel sends the other requests again.
    pub fn owed_replies(&self, connection: u64, limit: Duration) -> Vec<OwedReply> {
        if !lock(&self.shared.taken).as_ref().is_some_and(|taken| taken.is_of(connection)) {
            self.forget_requests();
        }
        let until = Instant::now() + limit;
        let owed = std::mem::take(&mut *lock(&self.shared.owed));
        let (tell, told) = mpsc::channel();
        let (mut replies, mut asked, mut bytes) = (Vec::new(), 0, 0);
        for Owed { cookie, what } in &owed {
            let (cookie, tell) = (*cookie, tell.clone());
            let op = match *what {
                Task::Replay { seq } => {
                    let is_done = |guard: &mut Guard<Completion>, _| {
                        guard.is_up() && guard.log().entry(seq).is_none_or(|entry| !entry.is_live())
                    };
                    if self.shared.with_guard(is_done) == Some(true) {
                        replies.push(OwedReply { cookie, data: Vec::new() });
                    }
                    continue;
                }
                Task::Read { len, .. } if bytes + u64::from(len) > OWED_DATA => continue,
                Task::Read { offset, len } => {
                    bytes += u64::from(len);
                    Op::Read { offset, len }
                }
                Task::Flush => Op::Flush,
            };
            asked += 1;
            let done = move |result: Result<&[u8], i32>| {
                let _ = tell.send((cookie, result.map(<[u8]>::to_vec)));
            };
            self.submit(op, Completion::new(done));
        }
        for _ in 0..asked {
            match told.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((cookie, Ok(data))) => replies.push(OwedReply { cookie, data }),
                // An error may be about us alone: the request comes again.
                Ok((_, Err(_))) => {}
                Err(_) => break,
            }
        }
        if let Some(taken) = &*lock(&self.shared.taken) {
            owed.iter().for_each(|owed| taken.answered(owed.cookie));
        }
        replies
    }

    /// The file that notes the kernel's requests. It is not worth failing for.
    fn taken(&self) -> Option<Arc<Taken>> {
        let shared = &self.shared;
        let log = shared.state().guard.as_ref()?.log().id();
        let mut taken = lock(&shared.taken);
        if taken.is_none() {
            match Taken::create(&shared.config.run_dir, log) {
                Ok(made) => *taken = Some(Arc::new(made)),
                Err(e) => tracing::warn!("the next keeper would have to wait for the kernel: {e}"),
            }
        }
        taken.clone()
    }

    /// Serves these sockets, whose other ends the kernel's nbd driver has or will be given (or a test that plays the
    /// kernel): stream sockets in the transmission phase. Earlier ones go on. The first one begins with these replies.
    pub fn serve_nbd(&self, sockets: Vec<UnixStream>, read_only: bool, replies: &[OwedReply]) -> Result<()> {
        let shared = &self.shared;
        let taken = self.taken();
        let mut made = Vec::new();
        for socket in sockets {
            // Room for a large reply; the default is 208 KiB. Best effort.
            let _ = setsockopt(&socket, sockopt::SndBufForce, &(2 << 20));
            // For what is poured from a pipe; everything else says so by itself.
            socket.set_nonblocking(true).doing("set up", "a socket of the kernel")?;
            let id = shared.next_front.fetch_add(1, Ordering::Relaxed);
            made.push(Front::new(id, socket, Arc::clone(&shared.epoll), read_only, taken.clone()));
        }
        // All are known before the first event, so that the first that ends is not taken for the last.
        shared.fronts.write().unwrap_or_else(PoisonError::into_inner).extend(made.iter().cloned());
        for front in &made {
            if let Err(e) = front.watch() {
                self.close_nbd();
                return Err(Error::failed(format!("cannot watch a socket of the kernel: {e}")));
            }
        }
        if let Some(first) = made.first() {
            replies.iter().for_each(|reply| first.reply(reply.cookie, Ok(&reply.data), 0));
        }
        Ok(())
    }

    /// Closes all sockets of [`serve_nbd`](Self::serve_nbd), without a word to anybody.
    pub fn close_nbd(&self) {
        let fronts = &self.shared.fronts;
        for front in std::mem::take(&mut *fronts.write().unwrap_or_else(PoisonError::into_inner)) {
            front.close();
        }
    }

    /// How many of the sockets of [`serve_nbd`](Self::serve_nbd) are alive.
    pub fn nbd_sockets(&self) -> usize {
        self.shared.fronts.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Mounts the file `disk` in `dir`, which must exist. A server must have been up.
    pub fn mount_fuse(&self, dir: &Path) -> Result<()> {
        let mut mount = lock(&self.mount);
        let volume = &self.shared.config.volume;
        if mount.is_some() {
            return Err(Error::new(Kind::Busy, "the FUSE file is mounted already").on(volume));
        }
        if self.size() == 0 {
            return Err(
                Error::failed("the size of the device is not known before the first server").on(volume)
            );
        }
        *mount = Some(fuse::mount(Arc::clone(&self.shared), dir).map_err(|e| e.on(volume))?);
        Ok(())
    }

    /// Unmounts it. [`Kind::Busy`] while the file is open (a loop device holds it open); nothing to do when
    /// it is not mounted.
    pub fn unmount_fuse(&self) -> Result<()> {
        let mut slot = lock(&self.mount);
        if let Some(mount) = slot.take()
            && let Err((mount, e)) = mount.unmount()
        {
            *slot = Some(mount);
            return Err(e.on(&self.shared.config.volume));
        }
        Ok(())
    }
}

impl Drop for DataPath {
    fn drop(&mut self) {
        self.server_down();
        self.close_nbd();
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_io();
        let _ = self.shared.jobs.send(Job::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // What is held is answered, so that nobody above waits for ever; the log keeps what was acknowledged.
        let guard = self.shared.state().guard.take();
        drop(guard);
        if let Some(mount) = lock(&self.mount).take() {
            mount.abandon();
        }
    }
}

fn identity(config: &DataPathConfig) -> Result<Identity> {
    Ok(Identity { volume: config.volume.clone(), epoch: config.epoch, boot: log::boot_id()? })
}

fn settings(config: &DataPathConfig) -> Settings {
    Settings {
        epoch: config.epoch,
        io_timeout: config.io_timeout,
        zeros_when_closed: config.zeros_when_closed,
        replay_log: config.replay_log,
    }
}

/// An operation that is carried out in pieces.
pub(super) struct Joint {
    left: AtomicUsize,
    errno: AtomicI32,
    data: Mutex<Vec<u8>>,
    done: Mutex<Option<Completion>>,
}

impl Joint {
    /// One of so many pieces, which give `len` bytes of data together.
    pub(super) fn new(pieces: usize, len: usize, done: Completion) -> Arc<Joint> {
        Arc::new(Joint {
            left: AtomicUsize::new(pieces),
            errno: AtomicI32::new(0),
            data: Mutex::new(vec![0; len]),
            done: Mutex::new(Some(done)),
        })
    }

    /// The answer to the piece whose data begins `at`.
    pub(super) fn piece(self: &Arc<Self>, at: usize) -> Completion {
        let joint = Arc::clone(self);
        Completion::new(move |result| {
            match result {
                Ok(bytes) => lock(&joint.data)[at..at + bytes.len()].copy_from_slice(bytes),
                Err(errno) => joint.errno.store(errno, Ordering::SeqCst),
            }
            if joint.left.fetch_sub(1, Ordering::SeqCst) == 1
                && let Some(done) = lock(&joint.done).take()
            {
                match joint.errno.load(Ordering::SeqCst) {
                    0 => done.answer(Ok(&lock(&joint.data))),
                    errno => done.answer(Err(errno)),
                }
            }
        })
    }
}

impl Shared {
    fn now(&self) -> Now {
        self.start.elapsed()
    }

    /// The guard, locked.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|_| {
            // A panic in the middle of a decision: nobody knows which promises hold. The log does, and the next
            // keeper goes by it.
            tracing::error!("the guard of volume {} is broken; the keeper ends", self.config.volume);
            std::process::abort()
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// As [`DataPath::submit`]; what is too long for one request goes in pieces.
    pub(super) fn submit(&self, op: Op<'_>, done: Completion) {
        let now = self.now();
        let mut out = Vec::with_capacity(2);
        let wake = {
            let mut state = self.state();
            let State { guard, armed, .. } = &mut *state;
            let Some(guard) = guard else {
                drop(state);
                return done.answer(Err(libc::EIO));
            };
            self.submit_pieces(guard, now, op, done, &mut out);
            // Other deadlines are due to replies, which the I/O thread sees itself.
            self.config.io_timeout.is_some_and(|limit| armed.is_none_or(|at| at > now + limit))
        };
        self.act(out);
        if wake {
            self.wake_io();
        }
    }

    /// The guard, locked, and the time; none when there is no guard. The caller acts on what comes out.
    pub(super) fn with_guard<R>(&self, work: impl FnOnce(&mut Guard<Completion>, Now) -> R) -> Option<R> {
        let now = self.now();
        self.state().guard.as_mut().map(|guard| work(guard, now))
    }

    /// Hands an operation to the guard, in pieces if it is too long for one request.
    pub(super) fn submit_pieces(
        &self,
        guard: &mut Guard<Completion>,
        now: Now,
        op: Op<'_>,
        done: Completion,
        out: &mut Vec<Action<Completion>>,
    ) {
        let (len, limit) = match op {
            Op::Flush | Op::Landed { .. } => (0, 1),
            Op::Read { len, .. } => (u64::from(len), ByteSize::MIB),
            Op::Write { data, .. } => (data.len() as u64, self.max_write()),
            Op::Trim { len, .. } | Op::Zero { len, .. } => (len, MAX_RANGE),
        };
        if len <= limit {
            guard.submit(now, op, done, out);
            return;
        }
        let reads = matches!(op, Op::Read { .. });
        let joint = Joint::new(len.div_ceil(limit) as usize, if reads { len as usize } else { 0 }, done);
        let mut at = 0;
        while at < len {
            let n = limit.min(len - at);
            let piece = match op {
                Op::Flush | Op::Landed { .. } => op,
                Op::Read { offset, .. } => Op::Read { offset: offset.saturating_add(at), len: n as u32 },
                Op::Write { offset, data, fua } => Op::Write {
                    offset: offset.saturating_add(at),
                    data: &data[at as usize..(at + n) as usize],
                    fua,
                },
                Op::Trim { offset, .. } => Op::Trim { offset: offset.saturating_add(at), len: n },
                Op::Zero { offset, fua, .. } => Op::Zero { offset: offset.saturating_add(at), len: n, fua },
            };
            guard.submit(now, piece, joint.piece(if reads { at as usize } else { 0 }), out);
            at += n;
        }
    }

    pub(super) fn max_write(&self) -> u64 {
        log::MAX_PAYLOAD.min(self.config.log_bytes.max(log::MIN_CAPACITY) / 4)
    }

    fn front(&self, id: u64) -> Option<Arc<Front>> {
        let fronts = self.fronts.read().unwrap_or_else(PoisonError::into_inner);
        fronts.iter().find(|f| f.id == id).cloned()
    }

    /// One of the kernel's sockets has ended.
    fn front_ended(&self, front: &Front, why: &str) {
        let gone = {
            let mut fronts = self.fronts.write().unwrap_or_else(PoisonError::into_inner);
            let before = fronts.len();
            fronts.retain(|f| f.id != front.id);
            // One that we closed ourselves is not in the list any more, and no news.
            before > 0 && fronts.len() < before && fronts.is_empty()
        };
        front.close();
        if gone {
            let _ = self.events.send(DataEvent::DeviceGone(why.to_owned()));
        }
    }

    fn wake_io(&self) {
        let _ = self.wake.write(1);
    }

    fn tell(&self, outcome: Result<Replay, String>) {
        let mut told = lock(&self.outcome);
        // What was lost is not made good by what came of it before.
        if outcome.is_err() || !matches!(*told, Some(Err(_))) {
            *told = Some(outcome);
        }
        drop(told);
        self.outcome_told.notify_all();
    }

    /// Carries out what the guard wants, with no lock held.
    pub(super) fn act(&self, actions: Vec<Action<Completion>>) {
        let mut busy: Vec<Arc<Conn>> = Vec::new();
        let mut gone = Vec::new();
        for action in actions {
            match action {
                Action::Send { conn, header, payload } => {
                    let conn = match busy.iter().find(|c| c.id == conn) {
                        Some(conn) => conn,
                        None => {
                            let Some(found) = self.conn(conn) else {
                                gone.push(conn);
                                continue;
                            };
                            busy.push(found);
                            &busy[busy.len() - 1]
                        }
                    };
                    let frame = Frame { header: header.encode(), payload, sent: 0 };
                    lock(&conn.tx).queue.push_back(frame);
                }
                Action::Done { token, result } => match &result {
                    Ok(data) => token.answer(Ok(data)),
                    Err(errno) => token.answer(Err(*errno)),
                },
                Action::Probe { id } => drop(self.jobs.send(Job::Probe(id))),
                Action::CheckFlush { id, since } => drop(self.jobs.send(Job::CheckFlush(id, since))),
                Action::Close { conn } => self.close(conn, true),
                // Those that it had, since this may come late, when the next server has some.
                Action::Lost { conns, why } => {
                    conns.iter().for_each(|id| self.close(*id, false));
                    self.tell(Err(why.clone()));
                    let _ = self.events.send(DataEvent::ServerLost(why));
                }
                Action::ReplayFailed { conns, why } => {
                    conns.iter().for_each(|id| self.close(*id, false));
                    self.tell(Err(why));
                }
                Action::Up(done) => self.tell(Ok(done)),
                Action::LogFull => drop(self.events.send(DataEvent::LogFull)),
                Action::Failed { what, errno } => {
                    let _ = self.events.send(DataEvent::ErrorDelivered { what, errno });
                }
            }
        }
        for conn in busy {
            self.push(&conn, false);
        }
        // Most often the guard knows, or is just being told. If it does not, it would wait for answers for ever.
        gone.iter().for_each(|id| self.lost(*id, CLOSED));
    }

    /// The guard has just been told of these: one that ended before that was no news to it.
    fn check_conns(&self, ids: &[ConnId]) {
        ids.iter().filter(|id| self.conn(**id).is_none()).for_each(|id| self.lost(*id, CLOSED));
    }

    fn conn(&self, id: ConnId) -> Option<Arc<Conn>> {
        let conns = self.conns.read().unwrap_or_else(PoisonError::into_inner);
        conns.iter().find(|c| c.id == id).cloned()
    }

    fn add_conns(&self, streams: Vec<UnixStream>, map: &Arc<LogMap>) -> Result<Vec<ConnId>> {
        let mut ids = Vec::new();
        for stream in streams {
            let id = self.next_conn.fetch_add(1, Ordering::Relaxed);
            // Room for a large write, so that it goes in one go; the default is 208 KiB. Best effort.
            let _ = setsockopt(&stream, sockopt::SndBufForce, &(2 << 20));
            let conn = Arc::new(Conn { id, stream, map: Arc::clone(map), tx: Mutex::default() });
            self.conns.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&conn));
            ids.push(id);
            let event = EpollEvent::new(EpollFlags::EPOLLIN, id.into());
            if let Err(e) = self.epoll.add(&conn.stream, event) {
                ids.iter().for_each(|id| self.close(*id, false));
                return Err(Error::failed(format!("cannot watch a connection: {e}")));
            }
        }
        Ok(ids)
    }

    /// Ends one connection; politely when nothing is in flight on it.
    fn close(&self, id: ConnId, politely: bool) {
        let Some(conn) = self.conn(id) else { return };
        if politely {
            let bye = RequestHeader { flags: 0, command: Command::Disc, cookie: 0, offset: 0, len: 0 };
            lock(&conn.tx).queue.push_back(Frame { header: bye.encode(), payload: None, sent: 0 });
            self.push(&conn, false);
        }
        self.conns.write().unwrap_or_else(PoisonError::into_inner).retain(|c| c.id != id);
        let _ = self.epoll.delete(&conn.stream);
        let _ = conn.stream.shutdown(Shutdown::Both);
    }

    fn drop_conns(&self) {
        let conns = std::mem::take(&mut *self.conns.write().unwrap_or_else(PoisonError::into_inner));
        for conn in conns {
            let _ = self.epoll.delete(&conn.stream);
            // From here on nothing of ours reaches the server, whoever is about to send.
            let _ = conn.stream.shutdown(Shutdown::Both);
        }
    }

    fn lost(&self, id: ConnId, why: &str) {
        // First, so that whoever tells the guard of it later finds out: see `check_conns`.
        self.close(id, false);
        let mut out = Vec::new();
        if let Some(guard) = self.state().guard.as_mut() {
            guard.conn_lost(self.now(), id, why, &mut out);
        }
        self.act(out);
    }

    /// Sends what is queued, without waiting.
    fn push(&self, conn: &Arc<Conn>, unblocked: bool) {
        let mut tx = lock(&conn.tx);
        if unblocked {
            tx.blocked = false;
        }
        if tx.sending || tx.blocked {
            return;
        }
        tx.sending = true;
        let mut batch: Vec<Frame> = Vec::new();
        loop {
            let n = tx.queue.len().min(BATCH);
            if n == 0 {
                tx.sending = false;
                if unblocked {
                    self.watch(conn, EpollFlags::EPOLLIN);
                }
                return;
            }
            batch.extend(tx.queue.drain(..n));
            drop(tx);
            let result = conn.send(&batch);
            tx = lock(&conn.tx);
            match result {
                Ok(mut sent) => batch.retain_mut(|frame| {
                    let n = sent.min(frame.len() - frame.sent);
                    sent -= n;
                    frame.sent += n;
                    frame.sent < frame.len()
                }),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => {
                    for frame in batch.drain(..).rev() {
                        tx.queue.push_front(frame);
                    }
                    tx.sending = false;
                    tx.blocked = true;
                    // Under the lock, lest somebody who has just finished takes the interest back.
                    self.watch(conn, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT);
                    return;
                }
                Err(e) => {
                    // Stays "sending": nobody else tries.
                    tx.queue.clear();
                    drop(tx);
                    return self.lost(conn.id, &format!("cannot send to the server: {e}"));
                }
            }
            for frame in batch.drain(..).rev() {
                tx.queue.push_front(frame);
            }
        }
    }

    fn watch(&self, conn: &Conn, flags: EpollFlags) {
        // A connection that is not watched any more has been dropped.
        let _ = self.epoll.modify(&conn.stream, &mut EpollEvent::new(flags, conn.id.into()));
    }
}

impl Frame {
    fn len(&self) -> usize {
        self.header.len() + self.payload.map_or(0, |p| p.len())
    }
}

impl Conn {
    /// As many bytes of the frames as the socket takes now.
    fn send(&self, frames: &[Frame]) -> nix::Result<usize> {
        let mut parts = Vec::with_capacity(2 * frames.len());
        for frame in frames {
            let header = &frame.header[frame.sent.min(frame.header.len())..];
            if !header.is_empty() {
                parts.push(IoSlice::new(header));
            }
            if let Some(payload) = frame.payload {
                // SAFETY: the request has not been answered, so its entry is not released; if the connection
                // was dropped meanwhile, the socket is shut down, and these bytes go nowhere.
                let payload = unsafe { self.map.payload(payload) };
                parts.push(IoSlice::new(&payload[frame.sent.saturating_sub(frame.header.len())..]));
            }
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.stream.as_raw_fd(), &parts, &[], flags, None)
    }
}

/// The I/O thread: what it has received and not yet understood, per connection.
#[derive(Default)]
struct Receiver {
    buffers: Vec<Buffer>,
    fronts: Vec<FrontReader>,
    /// The last I/O, until the memory that it needed is given back.
    worked: Option<Now>,
}

struct Buffer {
    conn: ConnId,
    bytes: Vec<u8>,
    /// What is received and not consumed.
    filled: usize,
    /// What the reply at its beginning takes, if that is known and it is not whole.
    need: usize,
    /// What a pipe takes of that reply: the bytes here are its header and the first of its data.
    piped: Option<Piped>,
    pipe: Option<Pipe>,
    /// The last reply went through the pipe, and so may the next one: little is received ahead.
    large: bool,
}

struct Piped {
    cookie: u64,
    /// Bytes that are still to come.
    left: usize,
    /// What has been seen of them, if they must be looked at.
    samples: Option<Samples>,
}

fn cannot_receive(e: nix::Error) -> String {
    format!("cannot receive from the server: {e}")
}

/// What came of taking data into the pipe.
#[derive(Debug, PartialEq)]
enum Filled {
    Some,
    Whole,
    /// Nothing more is there now.
    Drained,
    /// The pipe takes no more, or what comes next must be looked at.
    Unfit,
}

impl Receiver {
    fn run(&mut self, shared: &Shared) {
        gather_here();
        let mut events = [EpollEvent::empty(); 16];
        let mut deadline: Option<Now> = None;
        while !shared.stop.load(Ordering::SeqCst) {
            let quiet = self.worked.map(|at| at + QUIET);
            let next = [deadline, quiet].into_iter().flatten().min();
            let timeout = match next.map(|at| at.saturating_sub(shared.now())) {
                None => EpollTimeout::NONE,
                // Rounded up, so that the deadline has passed when it wakes.
                Some(left) => {
                    EpollTimeout::try_from(left.as_millis().saturating_add(1).min(i32::MAX as u128) as i32)
                        .unwrap_or(EpollTimeout::MAX)
                }
            };
            let n = match shared.epoll.wait(&mut events, timeout) {
                Ok(n) => n,
                Err(nix::Error::EINTR) => 0,
                Err(e) => {
                    // It cannot happen; if it does, a slow loop is better than a hang.
                    tracing::error!("epoll: {e}");
                    std::thread::sleep(Duration::from_millis(100));
                    0
                }
            };
            let now = shared.now();
            if events[..n].iter().any(|e| e.data() != WAKE) {
                self.worked = Some(now);
            } else if quiet.is_some_and(|at| at <= now) {
                self.worked = None;
                self.shrink(shared);
            }
            let (mut current, mut woken) = (false, n == 0);
            for event in &events[..n] {
                if event.data() == WAKE {
                    let _ = shared.wake.read();
                    woken = true;
                    continue;
                }
                if event.data() >= FRONTS {
                    self.front_event(shared, event);
                    // A request may have brought a nearer deadline.
                    woken = true;
                    continue;
                }
                let id = event.data() as ConnId;
                let Some(conn) = shared.conn(id) else { continue };
                if event.events().contains(EpollFlags::EPOLLOUT) {
                    shared.push(&conn, true);
                }
                if event
                    .events()
                    .intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
                {
                    current = false;
                    if let Some(at) = self.receive(shared, &conn, deadline) {
                        deadline = at;
                        current = true;
                    }
                }
            }
            send_gathered();
            let now = shared.now();
            if woken || !current || deadline.is_some_and(|at| at <= now) {
                deadline = self.tick(shared, now);
            }
        }
    }

    fn front_event(&mut self, shared: &Shared, event: &EpollEvent) {
        let i = match self.fronts.iter().position(|f| f.front.id == event.data()) {
            Some(i) => i,
            None => {
                // Gone meanwhile.
                let Some(front) = shared.front(event.data()) else { return };
                self.fronts.push(FrontReader::new(front));
                self.fronts.len() - 1
            }
        };
        if let Heard::End(why) = self.fronts[i].event(shared, event.events()) {
            let reader = self.fronts.swap_remove(i);
            shared.front_ended(&reader.front, &why);
            reader.end(shared);
        }
    }

    fn tick(&mut self, shared: &Shared, now: Now) -> Option<Now> {
        let mut out = Vec::new();
        let deadline = {
            let mut state = shared.state();
            let State { guard, armed, .. } = &mut *state;
            if let Some(guard) = guard {
                if guard.deadline().is_some_and(|at| at <= now) {
                    guard.tick(now, &mut out);
                }
                *armed = guard.deadline();
            }
            *armed
        };
        shared.act(out);
        send_gathered();
        for reader in self.fronts.extract_if(.., |f| f.front.is_closed()) {
            reader.end(shared);
        }
        deadline
    }

    /// Gives back what large requests needed, and what they left in the allocator's hands.
    fn shrink(&mut self, shared: &Shared) {
        self.fronts.iter_mut().for_each(FrontReader::shrink);
        self.buffers.retain(|b| shared.conn(b.conn).is_some());
        for buffer in self.buffers.iter_mut().filter(|b| b.filled == 0 && b.bytes.len() > RECEIVE) {
            buffer.bytes.truncate(RECEIVE);
            buffer.bytes.shrink_to_fit();
        }
        #[cfg(target_env = "gnu")]
        // SAFETY: it only gives unused pages back, and may be called from any thread.
        unsafe {
            libc::malloc_trim(0);
        }
    }

    /// Receives once and answers what is whole. Gives the next deadline, unless the connection is lost or nothing came.
    fn receive(&mut self, shared: &Shared, conn: &Conn, deadline: Option<Now>) -> Option<Option<Now>> {
        let i = match self.buffers.iter().position(|b| b.conn == conn.id) {
            Some(i) => i,
            None => {
                self.buffers.push(Buffer {
                    conn: conn.id,
                    bytes: vec![0; RECEIVE],
                    filled: 0,
                    need: 0,
                    piped: None,
                    pipe: None,
                    large: false,
                });
                self.buffers.len() - 1
            }
        };
        let buffer = &mut self.buffers[i];
        if buffer.piped.is_some() {
            return Self::receive_piped(shared, conn, buffer, deadline);
        }
        // What comes after a large reply is left for the next time, since it would have to be moved then.
        let end = match buffer.need {
            0 if buffer.large => buffer.filled + AHEAD,
            need if need > RECEIVE => buffer.bytes.len().min(need + SimpleReply::LEN),
            _ => buffer.bytes.len(),
        };
        let room = &mut buffer.bytes[buffer.filled..end];
        match nix::sys::socket::recv(conn.stream.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => {
                shared.lost(conn.id, CLOSED);
                return None;
            }
            Ok(n) => buffer.filled += n,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return None,
            Err(e) => {
                shared.lost(conn.id, &cannot_receive(e));
                return None;
            }
        }
        buffer.large = false;
        let now = shared.now();
        let mut out = Vec::new();
        let mut inline: Vec<(Completion, std::ops::Range<usize>)> = Vec::with_capacity(32);
        let mut at = 0;
        let (mut need, mut piped) = (0, None);
        let mut wrong = None;
        let deadline = {
            let mut state = shared.state();
            let State { guard, armed, .. } = &mut *state;
            let guard = guard.as_mut()?;
            while let Some(header) = buffer.bytes[at..buffer.filled].first_chunk() {
                let reply = match SimpleReply::decode(header) {
                    Ok(reply) => reply,
                    Err(e) => {
                        wrong = Some(e.message().to_owned());
                        break;
                    }
                };
                let Some(len) = guard.reply_len(conn.id, reply.cookie) else {
                    wrong = Some("the server answers a request that it did not get".to_owned());
                    break;
                };
                let len = if reply.error == 0 { len as usize } else { 0 };
                let payload = at + SimpleReply::LEN..at + SimpleReply::LEN + len;
                if payload.end > buffer.filled {
                    need = SimpleReply::LEN + len;
                    let left = payload.end - buffer.filled;
                    let here = &buffer.bytes[at + SimpleReply::LEN..buffer.filled];
                    if left >= PIPED
                        && let Some((token, mut samples)) = guard.unseen(conn.id, reply.cookie)
                        && token.takes_a_pipe()
                        && samples.as_mut().is_none_or(|s| s.see_and_pass(here))
                    {
                        piped = Some(Piped { cookie: reply.cookie, left, samples });
                    }
                    break;
                }
                let data = &buffer.bytes[payload.clone()];
                if let Some(token) = guard.reply(now, conn.id, reply.cookie, reply.error, data, &mut out) {
                    inline.push((token, payload.clone()));
                }
                at = payload.end;
            }
            *armed = guard.deadline();
            *armed
        };
        for (token, range) in inline {
            token.answer(Ok(&buffer.bytes[range]));
        }
        buffer.bytes.copy_within(at..buffer.filled, 0);
        buffer.filled -= at;
        buffer.need = need;
        if let Some(piped) = piped
            && (buffer.pipe.is_some() || Pipe::new().map(|pipe| buffer.pipe = Some(pipe)).is_ok())
        {
            (buffer.piped, buffer.large) = (Some(piped), true);
        } else if need > buffer.bytes.len() {
            buffer.bytes.resize(need.max(2 * RECEIVE), 0);
        }
        shared.act(out);
        if let Some(wrong) = wrong {
            shared.lost(conn.id, &wrong);
            return None;
        }
        Some(deadline)
    }

    /// The same for data that goes through the pipe.
    fn receive_piped(
        shared: &Shared,
        conn: &Conn,
        buffer: &mut Buffer,
        deadline: Option<Now>,
    ) -> Option<Option<Now>> {
        for turn in 0..TURNS {
            match Self::fill_pipe(&conn.stream, buffer, turn == 0) {
                Ok(Filled::Some) => {}
                Ok(Filled::Whole) => return Self::piped(shared, conn, buffer),
                Ok(Filled::Drained) => break,
                // From here on the data comes here after all.
                Ok(Filled::Unfit) => {
                    buffer.piped = None;
                    buffer.bytes.truncate(buffer.filled);
                    if let Some(pipe) = &mut buffer.pipe
                        && let Err(e) = pipe.read_to(&mut buffer.bytes)
                    {
                        shared.lost(conn.id, &format!("cannot read from a pipe: {e}"));
                        return None;
                    }
                    buffer.filled = buffer.bytes.len();
                    buffer.bytes.resize(buffer.need.max(2 * RECEIVE), 0);
                    break;
                }
                Err(why) => {
                    shared.lost(conn.id, &why);
                    return None;
                }
            }
        }
        Some(deadline)
    }

    /// Takes a part of the data; `sure` says that there is some, or the end of the connection.
    fn fill_pipe(stream: &UnixStream, buffer: &mut Buffer, mut sure: bool) -> Result<Filled, String> {
        let (Some(piped), Some(pipe)) = (&mut buffer.piped, &mut buffer.pipe) else {
            return Ok(Filled::Drained);
        };
        let mut most = piped.left;
        if let Some(samples) = &mut piped.samples {
            if samples.may_pass() == 0 {
                let mut sample = [0; SAMPLE];
                let len = SAMPLE.min(samples.left_in_chunk() as usize).min(piped.left);
                let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
                match nix::sys::socket::recv(stream.as_raw_fd(), &mut sample[..len], flags) {
                    Ok(0) => return Err(CLOSED.into()),
                    Ok(n) if samples.see(&sample[..n]) => sure = true,
                    Ok(_) => return Ok(Filled::Unfit),
                    Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(Filled::Drained),
                    Err(e) => return Err(cannot_receive(e)),
                }
            }
            most = most.min(samples.may_pass() as usize);
        }
        let n = match pipe.fill(stream, most) {
            Ok(0) => return Err(CLOSED.into()),
            Ok(n) => n,
            // The pipe is full.
            Err(nix::Error::EAGAIN) if sure => return Ok(Filled::Unfit),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(Filled::Drained),
            Err(e) => return Err(cannot_receive(e)),
        };
        piped.left -= n;
        if let Some(samples) = &mut piped.samples {
            samples.pass(n as u64);
        }
        Ok(match piped.left {
            0 => Filled::Whole,
            _ if n < most => Filled::Drained,
            _ => Filled::Some,
        })
    }

    /// All of it is in the pipe.
    fn piped(shared: &Shared, conn: &Conn, buffer: &mut Buffer) -> Option<Option<Now>> {
        let (Some(piped), Some(pipe)) = (&mut buffer.piped, &mut buffer.pipe) else { return None };
        let mut out = Vec::new();
        let (token, deadline) = {
            let mut state = shared.state();
            let State { guard, armed, .. } = &mut *state;
            let guard = guard.as_mut()?;
            let token = guard.reply(shared.now(), conn.id, piped.cookie, 0, &[], &mut out);
            *armed = guard.deadline();
            (token, *armed)
        };
        let head = &buffer.bytes[SimpleReply::LEN..buffer.filled];
        let emptied = token.is_some_and(|token| token.answer_from(head, pipe).is_ok());
        if !emptied {
            // Nobody wants it any more.
            buffer.pipe = None;
        }
        (buffer.filled, buffer.need, buffer.piped) = (0, 0, None);
        shared.act(out);
        Some(deadline)
    }
}

fn run_jobs(shared: &Shared, prober: &dyn Prober, todo: &mpsc::Receiver<Job>) {
    while let Ok(job) = todo.recv() {
        let mut out = Vec::new();
        match job {
            Job::Stop => return,
            Job::Probe(id) => {
                let open = prober.database_open().ok();
                let troubled = prober.store_trouble().map(|at| at.saturating_duration_since(shared.start));
                if let Some(guard) = shared.state().guard.as_mut() {
                    guard.probed(shared.now(), id, open, troubled, &mut out);
                }
            }
            Job::CheckFlush(id, since) => {
                let honest = prober.flush_was_honest(shared.start + since);
                if let Some(guard) = shared.state().guard.as_mut() {
                    guard.flush_checked(shared.now(), id, honest, &mut out);
                }
            }
        }
        shared.act(out);
        // A new deadline may be nearer than what the I/O thread sleeps for.
        shared.wake_io();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::chunks::CHUNK;
    use super::*;

    /// A reply of which so many bytes are still to come, from this place of the device on.
    fn coming(left: usize, from: Option<u64>, pipe: Pipe) -> Buffer {
        let piped = Piped { cookie: 1, left, samples: from.map(Samples::new) };
        Buffer {
            conn: 1,
            bytes: vec![0; RECEIVE],
            filled: SimpleReply::LEN,
            need: SimpleReply::LEN + left,
            piped: Some(piped),
            pipe: Some(pipe),
            large: true,
        }
    }

    fn fill(ours: &UnixStream, buffer: &mut Buffer, sure: bool) -> Filled {
        Receiver::fill_pipe(ours, buffer, sure).unwrap()
    }

    #[test]
    fn data_that_shows_what_it_is_passes_chunk_by_chunk() {
        let (mut server, ours) = UnixStream::pair().unwrap();
        let len = 2 * CHUNK as usize + 100;
        let mut buffer = coming(len, Some(CHUNK - 100), Pipe::new().unwrap());
        assert_eq!(fill(&ours, &mut buffer, false), Filled::Drained, "nothing is there");
        server.write_all(&vec![1; len + 16]).unwrap();
        assert_eq!(fill(&ours, &mut buffer, true), Filled::Some, "the part of the first chunk");
        assert_eq!(buffer.pipe.as_ref().unwrap().held(), 100);
        assert_eq!(fill(&ours, &mut buffer, false), Filled::Some);
        assert_eq!(fill(&ours, &mut buffer, false), Filled::Whole);
        assert_eq!(buffer.pipe.as_ref().unwrap().held(), len, "and nothing of the next reply");
        drop(server);
        let mut buffer = coming(len, None, Pipe::new().unwrap());
        assert_eq!(fill(&ours, &mut buffer, true), Filled::Drained, "the last bytes");
        assert!(Receiver::fill_pipe(&ours, &mut buffer, true).is_err(), "the end");
    }

    /// What comes behind it is never taken for a part of it.
    #[test]
    fn zeros_at_the_end_of_a_chunk_or_of_the_reply_must_be_looked_at() {
        for (left, from) in [(100, 0), (2 * CHUNK as usize, CHUNK - 100)] {
            let (mut server, ours) = UnixStream::pair().unwrap();
            let mut buffer = coming(left, Some(from), Pipe::new().unwrap());
            server.write_all(&[&[0; 100][..], &[1; 4096]].concat()).unwrap();
            assert_eq!(fill(&ours, &mut buffer, true), Filled::Unfit, "{left} bytes from {from}");
            assert_eq!(buffer.pipe.as_ref().unwrap().held(), 0);
        }
    }

    #[test]
    fn a_full_pipe_is_told_from_an_empty_socket() {
        let mut pipe = Pipe::new().unwrap();
        let (mut server, ours) = UnixStream::pair().unwrap();
        // One byte in each place.
        let mut places = 0;
        loop {
            server.write_all(&[1]).unwrap();
            if pipe.fill(&ours, 1).is_err() {
                break;
            }
            places += 1;
        }
        for from in [None, Some(0)] {
            let mut buffer = coming(4096, from, pipe);
            assert_eq!(fill(&ours, &mut buffer, true), Filled::Unfit, "{places} places, {from:?}");
            pipe = buffer.pipe.take().unwrap();
        }
        assert_eq!(pipe.held(), places);
    }
}
