//! What the keeper does for its clients, and what it tells them: the state that the supervisor keeps, and the FUSE
//! mount. A client's request runs on the client's own thread; only what needs a decision goes to the supervisor.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use super::control::{Answer, ConnectOptions, Handler, Request, State, Status, Transport, WireError};
use super::device::Device;
use super::path::{DataPath, Replayed};
use super::process::Identity;
use super::supervisor::Event;
use super::{KeeperConfig, is_mount_point, lock, try_lock};
use crate::error::{Doing, Error, Kind, Result};

/// The folder of the FUSE mount in the run folder.
pub(crate) const FUSE_DIR: &str = "fuse";

/// For how long a complaint about the storage is worth showing.
const TROUBLE: Duration = Duration::from_secs(30);

/// What the supervisor and the clients' threads share. The supervisor writes the board, everybody reads it.
pub(crate) struct Shared {
    pub(super) config: KeeperConfig,
    own: Identity,
    pub(super) data: Arc<DataPath>,
    pub(super) events: Sender<Event>,
    pub(super) board: Mutex<Board>,
    pub(super) changed: Condvar,
    /// The volume's NBD device.
    pub(super) device: Device,
    /// Held while the FUSE file is mounted or unmounted, or the device is connected or disconnected, and while a stop looks whether it is.
    pub(super) mounting: Mutex<()>,
    /// Whether this keeper has mounted it.
    mounted: AtomicBool,
    pub(super) restarts: AtomicU64,
    /// Clients of `stop` that have not been sent their last line.
    stop_clients: AtomicU64,
}

/// What is known of the server.
#[derive(Clone)]
pub(super) struct Board {
    pub(super) state: State,
    since: Instant,
    pub(super) reason: Option<String>,
    pub(super) error: Option<WireError>,
    pub(super) zerofs: Option<Identity>,
    pub(super) data_path: bool,
    trouble: Option<(Instant, String)>,
    pub(super) warnings: Vec<String>,
    pub(super) stopping: bool,
}

impl Shared {
    pub fn new(config: KeeperConfig, data: Arc<DataPath>, events: Sender<Event>, device: Device) -> Shared {
        Shared {
            config,
            own: Identity::own(),
            data,
            events,
            board: Mutex::new(Board {
                state: State::Starting,
                since: Instant::now(),
                reason: None,
                error: None,
                zerofs: None,
                data_path: false,
                trouble: None,
                warnings: Vec::new(),
                stopping: false,
            }),
            changed: Condvar::new(),
            device,
            mounting: Mutex::new(()),
            mounted: AtomicBool::new(false),
            restarts: AtomicU64::new(0),
            stop_clients: AtomicU64::new(0),
        }
    }

    /// Waits a moment until each client of `stop` has its last line, so that the process may end.
    pub fn wait_for_clients(&self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.stop_clients.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn warn(&self, warning: String) {
        warn!("{warning}");
        self.show(|b| b.warnings.push(warning));
    }

    pub(super) fn show(&self, change: impl FnOnce(&mut Board)) {
        change(&mut lock(&self.board));
        self.changed.notify_all();
    }

    pub(super) fn enter(&self, state: State, reason: Option<String>) {
        self.show(|b| {
            if b.state != state {
                b.since = Instant::now();
            }
            b.state = state;
            b.reason = reason;
        });
    }

    /// ZeroFS complains about its storage, but copes.
    pub(super) fn trouble(&self, line: String) {
        self.show(|b| b.trouble = Some((Instant::now(), line)));
    }

    fn fuse_dir(&self) -> PathBuf {
        self.config.run_dir.join(FUSE_DIR)
    }

    /// Whether we mounted it and nobody has unmounted it since.
    pub(super) fn fuse_mounted(&self) -> bool {
        self.mounted.load(Ordering::Relaxed) && is_mount_point(&self.fuse_dir())
    }

    /// Holds `mounting`, unless somebody else does now.
    pub(super) fn try_mounting(&self) -> Option<MutexGuard<'_, ()>> {
        try_lock(&self.mounting)
    }

    /// The caller holds `mounting`.
    pub(super) fn unmount(&self, force: bool) -> Result<()> {
        let dir = self.fuse_dir();
        if self.fuse_mounted() {
            match self.data.unmount_fuse() {
                Err(e) if force => warn!("{e}; detaching it"),
                result => result?,
            }
        }
        // Ours, detached from its users by force; or one of a keeper that was killed, which answers nobody.
        if is_mount_point(&dir) {
            nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_DETACH).doing("unmount", &dir)?;
        }
        self.mounted.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn status(&self) -> Status {
        let board = lock(&self.board).clone();
        let trouble = board.trouble.filter(|(at, _)| at.elapsed() < TROUBLE);
        let trouble = trouble.map(|(_, line)| format!("ZeroFS has trouble with its storage: {line}"));
        Status {
            volume: self.config.volume.clone(),
            keeper: self.own.clone(),
            zerofs: board.zerofs,
            zerofs_version: self.config.zerofs_version,
            state: board.state,
            reason: board.reason.or(trouble),
            error: board.error,
            state_seconds: board.since.elapsed().as_secs_f64(),
            restarts: self.restarts.load(Ordering::Relaxed),
            epoch: self.config.epoch,
            data_path: board.data_path,
            size: self.data.size(),
            log: self.data.log_state(),
            fuse_mounted: self.fuse_mounted(),
            nbd: self.nbd_status(),
            stats: self.data.stats(),
            warnings: board.warnings,
        }
    }

    fn wait_ready(&self, limit: Duration) -> Result<Status> {
        let board = lock(&self.board);
        let (board, _) = self
            .changed
            .wait_timeout_while(board, limit, |b| matches!(b.state, State::Starting | State::Stalled))
            .unwrap_or_else(PoisonError::into_inner);
        match (board.state, &board.error) {
            (State::Failed, Some(e)) => Err(e.clone().into()),
            (State::Starting | State::Stalled, _) => {
                let why = board.reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
                Err(Error::new(
                    Kind::Unreachable,
                    format!("ZeroFS has not answered within {:.0} s{why}", limit.as_secs_f64()),
                )
                .hint("it is still being tried: zerofsctl show VOLUME"))
            }
            _ => {
                drop(board);
                Ok(self.status())
            }
        }
    }

    pub(super) fn raise(&self) -> Result<Replayed> {
        let (reply, answer) = std::sync::mpsc::channel();
        let _ = self.events.send(Event::Raise(reply));
        answer.recv().unwrap_or_else(|_| Err(stopping_error()))
    }

    fn mount(&self) -> Result<()> {
        self.raise()?;
        let _mounting = lock(&self.mounting);
        if lock(&self.board).stopping {
            return Err(stopping_error());
        }
        if self.device.record().is_some() {
            return Err(Error::new(Kind::Busy, "the volume is attached with the nbd transport")
                .hint("detach it first: zerofsctl detach VOLUME"));
        }
        if self.fuse_mounted() {
            return Ok(());
        }
        // One that a killed keeper left behind, or that somebody unmounted behind our back.
        self.unmount(true)?;
        self.data.unmount_fuse()?;
        let dir = self.fuse_dir();
        std::fs::create_dir_all(&dir).doing("make", &dir)?;
        self.data.mount_fuse(&dir)?;
        self.mounted.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, options: &ConnectOptions) -> Result<Answer> {
        match options.transport {
            Transport::Fuse => self.mount().map(|()| Answer::Done),
            Transport::Nbd => self.connect_nbd(options).map(|(index, bytes)| Answer::Nbd { index, bytes }),
        }
    }
}

/// The side that answers; a type of its own, since some answers start threads that share what we share.
pub(crate) struct Desk(pub Arc<Shared>);

impl std::ops::Deref for Desk {
    type Target = Arc<Shared>;
    fn deref(&self) -> &Arc<Shared> {
        &self.0
    }
}

impl Handler for Desk {
    fn answered(&self, request: &Request) {
        if matches!(request, Request::Stop(_)) {
            self.stop_clients.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn handle(&self, request: Request, progress: &mut dyn FnMut(Answer) -> io::Result<()>) -> Result<Answer> {
        match request {
            Request::Ping => Ok(Answer::Pong { keeper: self.own.clone() }),
            Request::Status => Ok(Answer::Status(Box::new(self.status()))),
            Request::WaitReady { timeout_seconds } => {
                let limit = Duration::try_from_secs_f64(timeout_seconds)
                    .map_err(|_| Error::usage("the time limit is not a number of seconds"))?;
                self.wait_ready(limit).map(|s| Answer::Status(Box::new(s)))
            }
            Request::Connect(options) => self.connect(&options),
            Request::Disconnect(options) => {
                let _mounting = lock(&self.mounting);
                self.disconnect_nbd(options.force)?;
                self.unmount(false).map(|()| Answer::Done)
            }
            Request::Flush => self.data.flush().map(|()| Answer::Done),
            Request::Resize => self.resize_device().map(|bytes| Answer::Size { bytes }),
            Request::Replay => self.raise().map(Answer::Replayed),
            Request::DiscardLog => {
                if lock(&self.board).data_path {
                    return Err(Error::refused("the replay log is in use: it cannot be discarded")
                        .hint("detach the volume first"));
                }
                self.data.discard_log().map(|()| Answer::Done)
            }
            Request::Stop(options) => {
                let (reply, answers) = std::sync::mpsc::channel();
                self.stop_clients.fetch_add(1, Ordering::SeqCst);
                let _ = self.events.send(Event::Stop(options, Instant::now(), reply));
                for answer in answers {
                    match answer {
                        Answer::Progress(_) => {
                            if progress(answer).is_err() {
                                break;
                            }
                        }
                        last => return Ok(last),
                    }
                }
                Err(Error::new(Kind::Interrupted, "the keeper ended in the middle of the stop"))
            }
        }
    }
}

/// For whoever wants to use a fenced volume.
pub(super) fn fenced_error(reason: &str) -> Error {
    Error::new(Kind::Conflict, reason)
        .hint("the other node has it now: zerofsctl show VOLUME; detach it here: zerofsctl detach VOLUME")
}

/// For whoever comes too late.
pub(super) fn stopping_error() -> Error {
    Error::new(Kind::Busy, "the keeper is stopping").hint("wait for it, then attach again")
}
