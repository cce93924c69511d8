//! The keeper's control socket: what is said on it, and the side that answers.
//!
//! `keeper.sock` in the volume's run folder; one JSON object per line in each direction, each with the protocol
//! version in `v`. A request gets one final answer; `stop` and `wait-ready` may send `progress` lines before it.
//!
//! What is asked and told about kernel NBD (each field has a default, so that older peers still understand):
//!
//! ```text
//! {"request":"connect"}                                           mounts the FUSE file; answer "done"
//! {"request":"connect","transport":"nbd","path":"guarded","read_only":false,
//!  "reconnect_timeout_ms":600000}                                 answer {"answer":"nbd","index":3,"bytes":…}
//! {"request":"disconnect","force":false}                          whichever is connected; the caller has proved that
//!                                                                 nobody uses it; force: without the flush
//! {"request":"resize"}                                            grows the NBD device too
//! status: "nbd": null | {"index","path","read_only","connected","connections","reconnects",…}, see NbdStatus
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::path::{LogState, Replayed, Stats};
use super::process::Identity;
use crate::error::{Doing, Error, Kind, Result};
use crate::values::VolumeId;
use crate::zerofs::versions::Version;

/// The name of the socket in the run folder.
pub const SOCKET: &str = "keeper.sock";

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The longest accepted line, in bytes.
pub(crate) const MAX_LINE: u64 = 256 * 1024;

/// The name of the threads that answer clients.
pub(crate) const CLIENT_THREAD: &str = "client";

/// How many clients are answered at once; a further one is turned away.
const MAX_CLIENTS: usize = 32;

/// One line of the protocol.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Line<T> {
    pub v: u32,
    #[serde(flatten)]
    pub body: T,
}

/// What a client may ask for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Are you there?
    Ping,
    /// Everything there is to know.
    Status,
    /// Waits until ZeroFS answers; an error when it cannot start, or not within the time limit.
    WaitReady {
        /// The time limit.
        timeout_seconds: f64,
    },
    /// Replays the log if need be, and makes the volume a file or a device.
    Connect(ConnectOptions),
    /// Flushes, and undoes that: unmounts the FUSE file, or disconnects the NBD device. The caller has proved that
    /// nobody uses it.
    Disconnect(DisconnectOptions),
    /// Makes everything durable that was acknowledged.
    Flush,
    /// Learns a larger size of the device.
    Resize,
    /// Connects the data path and replays what an earlier keeper left behind in the log.
    Replay,
    /// Throws away what an earlier keeper left behind in the log.
    DiscardLog,
    /// Ends ZeroFS and the keeper.
    Stop(StopOptions),
}

/// How the volume becomes a block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A file of a FUSE mount, `fuse/disk` in the run folder, for a loop device.
    #[default]
    Fuse,
    /// A device of the kernel's nbd driver.
    Nbd,
}

/// What an NBD device's sockets lead to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NbdPath {
    /// The keeper, which makes good what a crash of ZeroFS loses.
    #[default]
    Guarded,
    /// ZeroFS itself: a crash of it fails the device.
    Direct,
}

impl NbdPath {
    /// The name, as in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            NbdPath::Guarded => "guarded",
            NbdPath::Direct => "direct",
        }
    }
}

/// How to connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectOptions {
    /// What kind of device.
    pub transport: Transport,
    /// For NBD: what its sockets lead to.
    pub path: NbdPath,
    /// For NBD: the device refuses writes.
    pub read_only: bool,
    /// For NBD: how long the kernel holds I/O while no keeper is there, in milliseconds.
    pub reconnect_timeout_ms: u64,
    /// For NBD: this index; a free one of the kernel's choice when none.
    pub index: Option<u32>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        ConnectOptions {
            transport: Transport::Fuse,
            path: NbdPath::Guarded,
            read_only: false,
            reconnect_timeout_ms: DEFAULT_RECONNECT_TIMEOUT_MS,
            index: None,
        }
    }
}

/// How to disconnect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DisconnectOptions {
    /// For NBD: without a flush, for a device whose server is gone for good. What was acknowledged is still in the
    /// replay log; what the kernel has not written yet is lost.
    pub force: bool,
}

/// How long the kernel holds the I/O of an NBD device without a server, unless told otherwise, in milliseconds.
pub const DEFAULT_RECONNECT_TIMEOUT_MS: u64 = 600_000;

/// What the keeper knows of the volume's NBD device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NbdStatus {
    /// The N of `/dev/nbdN`; none while it is not known yet.
    pub index: Option<u32>,
    /// What its sockets lead to.
    pub path: NbdPath,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether it works, or only waits: false when it has failed or has gone.
    pub connected: bool,
    /// Sockets between the kernel and this keeper (guarded) or ZeroFS (direct) that are alive.
    pub connections: u64,
    /// How long the kernel holds I/O without a server, in milliseconds.
    pub reconnect_timeout_ms: u64,
    /// How often the device was given new sockets, by all keepers of this attach.
    pub reconnects: u64,
    /// Sockets of the device that have died, with all keepers of this attach; those that have been replaced count too.
    pub dead_connections: u64,
    /// Why the device does not work and never will again.
    pub failed: Option<String>,
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StopOptions {
    /// How long the client waits for a clean stop. The keeper goes on stopping after that.
    pub timeout_seconds: f64,
    /// Kills ZeroFS instead of waiting for it; what was not flushed stays in the replay log.
    #[serde(default)]
    pub force: bool,
    /// Also when the FUSE file is still mounted, or the NBD device connected.
    #[serde(default)]
    pub even_if_mounted: bool,
}

/// What the keeper answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// To `ping`.
    Pong {
        /// The keeper's process.
        keeper: Identity,
    },
    /// To `status` and `wait-ready`.
    Status(Box<Status>),
    /// To `replay`.
    Replayed(Replayed),
    /// To `resize`.
    Size {
        /// The size of the device in bytes.
        bytes: u64,
    },
    /// To `connect` with the transport `nbd`.
    Nbd {
        /// The N of `/dev/nbdN`.
        index: u32,
        /// Its size in bytes.
        bytes: u64,
    },
    /// To `connect`, `disconnect`, `flush` and `discard-log`.
    Done,
    /// Still at it; another line follows.
    Progress(Progress),
    /// To `stop`: ZeroFS has ended; the keeper ends now.
    Stopped(Stopped),
    /// It failed.
    Error(WireError),
}

/// How far a `stop` is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being waited for, in words.
    pub stage: String,
    /// Seconds since the stop began.
    pub elapsed_seconds: f64,
    /// Bytes that no flush has covered yet.
    pub log_bytes: u64,
}

/// How a `stop` ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stopped {
    /// Everything acknowledged is durable.
    pub clean: bool,
    /// Entries kept in the replay log for the next attach on this node; 0 after a clean stop.
    pub kept_entries: u64,
    /// Their payload in bytes.
    pub kept_bytes: u64,
    /// What deserves a word all the same.
    pub warnings: Vec<String>,
    /// How long it took.
    pub elapsed_seconds: f64,
}

/// An [`Error`] on its way through the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    /// The label of its kind.
    pub kind: String,
    /// The sentence.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl From<&Error> for WireError {
    fn from(e: &Error) -> Self {
        WireError {
            kind: e.kind().row().label.to_owned(),
            message: e.message().to_owned(),
            hint: e.hint_text().map(str::to_owned),
        }
    }
}

impl From<WireError> for Error {
    fn from(e: WireError) -> Self {
        let kind = Kind::ALL.into_iter().find(|k| k.row().label == e.kind).unwrap_or(Kind::Failed);
        let error = Error::new(kind, e.message);
        match e.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// The state of the volume's server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// ZeroFS has not answered yet.
    Starting,
    /// ZeroFS answers.
    Ready,
    /// ZeroFS was lost or does not answer; I/O waits until it is back.
    Stalled,
    /// The volume has a new owner; I/O fails.
    Fenced,
    /// ZeroFS cannot start.
    Failed,
    /// Flushing, and ending ZeroFS.
    Stopping,
}

impl State {
    /// The name, as in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Ready => "ready",
            State::Stalled => "stalled",
            State::Fenced => "fenced",
            State::Failed => "failed",
            State::Stopping => "stopping",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Everything that the keeper knows about its volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The volume.
    pub volume: VolumeId,
    /// The keeper's process.
    pub keeper: Identity,
    /// ZeroFS's process, while there is one.
    pub zerofs: Option<Identity>,
    /// The version of ZeroFS, as configured.
    pub zerofs_version: Version,
    /// The state.
    pub state: State,
    /// Why it is so, when it is not plainly well.
    pub reason: Option<String>,
    /// The error behind [`State::Failed`].
    pub error: Option<WireError>,
    /// How long it has been in this state, in seconds.
    pub state_seconds: f64,
    /// How often ZeroFS was started again.
    pub restarts: u64,
    /// The attach epoch that the keeper was started with.
    pub epoch: u64,
    /// Whether the data path is connected (after `replay` or `connect`).
    pub data_path: bool,
    /// The size of the device in bytes; 0 before the data path was connected.
    pub size: u64,
    /// The replay log.
    pub log: LogState,
    /// Whether the FUSE file is mounted.
    pub fuse_mounted: bool,
    /// The NBD device, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<NbdStatus>,
    /// Counters of the data path.
    pub stats: Stats,
    /// What is not as asked, but no reason to stop.
    pub warnings: Vec<String>,
}

/// The side that knows the answers. Called on a thread of its own for each client; it may block.
pub(crate) trait Handler: Send + Sync + 'static {
    /// Answers `request`; `progress` sends a line at once, and fails when the client has gone.
    fn handle(&self, request: Request, progress: &mut dyn FnMut(Answer) -> io::Result<()>) -> Result<Answer>;

    /// The last line of the answer to `request` has been sent, or the client has gone.
    fn answered(&self, _request: &Request) {}
}

/// Makes the socket in `dir`, 0600; a stale one is replaced, so the caller must hold the folder's lock.
pub(crate) fn bind(dir: &Path) -> Result<UnixListener> {
    let path = dir.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).doing("remove the stale", &path),
        _ => {}
    }
    let folder = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(dir)
        .doing("open", dir)?;
    // Through the handle, since an address holds 107 bytes only.
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
        .doing("listen on", &path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .doing("set the mode of", &path)?;
    Ok(listener)
}

/// Answers clients for ever.
pub(crate) fn serve(listener: &UnixListener, handler: &Arc<dyn Handler>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: they come back.
                tracing::warn!("cannot accept a client: {e}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::Relaxed);
            let e = Error::new(Kind::Busy, "the keeper is answering too many clients").hint("try again");
            let _ = send(&stream, &Answer::Error((&e).into()));
            continue;
        }
        let (handler, mine) = (handler.clone(), clients.clone());
        let spawned = super::thread(CLIENT_THREAD, move || {
            if let Err(e) = converse(&stream, handler.as_ref()) {
                tracing::debug!("a client went away: {e}");
            }
            mine.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = spawned {
            clients.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("cannot start a thread for a client: {e}");
        }
    }
}

/// Answers one client until it hangs up or says nothing for a while.
fn converse(stream: &UnixStream, handler: &dyn Handler) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::with_capacity(1024, stream);
    loop {
        let mut line = Vec::new();
        let read = Read::by_ref(&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        let request = match parse(&line) {
            Ok(request) => request,
            Err(e) => {
                send(stream, &Answer::Error((&e).into()))?;
                continue;
            }
        };
        let answer = handler.handle(request.clone(), &mut |answer| send(stream, &answer));
        let sent = send(stream, &answer.unwrap_or_else(|e| Answer::Error((&e).into())));
        handler.answered(&request);
        sent?;
    }
}

fn parse(line: &[u8]) -> Result<Request> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let wrong = |e| Error::usage(format!("the keeper does not understand this request: {e}"));
    let Version { v } = serde_json::from_slice(line).map_err(wrong)?;
    if v != VERSION {
        return Err(Error::usage(format!("this keeper speaks version {VERSION} of its protocol, not {v}"))
            .hint("use the zerofsctl that started it, or detach and attach again"));
    }
    serde_json::from_slice::<Line<Request>>(line).map(|l| l.body).map_err(wrong)
}

/// Sends one line.
pub(crate) fn send(mut stream: &UnixStream, body: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(&Line { v: VERSION, body })?;
    text.push(b'\n');
    stream.write_all(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_look_as_documented() {
        let stop = Request::Stop(StopOptions { timeout_seconds: 2.5, force: false, even_if_mounted: false });
        assert_eq!(
            serde_json::to_string(&Line { v: 1, body: &stop }).unwrap(),
            r#"{"v":1,"request":"stop","timeout_seconds":2.5,"force":false,"even_if_mounted":false}"#
        );
        assert_eq!(parse(br#"{"v":1,"request":"stop","timeout_seconds":2.5}"#).unwrap(), stop);
        assert_eq!(parse(br#"{"v":1,"request":"discard-log"}"#).unwrap(), Request::DiscardLog);
        let e = Error::usage("no").hint("yes");
        assert_eq!(
            serde_json::to_string(&Line { v: 1, body: Answer::Error((&e).into()) }).unwrap(),
            r#"{"v":1,"answer":"error","kind":"usage","message":"no","hint":"yes"}"#
        );
    }

    #[test]
    fn a_connect_of_an_older_client_means_fuse_and_a_new_one_says_all() {
        let old = parse(br#"{"v":1,"request":"connect"}"#).unwrap();
        assert_eq!(old, Request::Connect(ConnectOptions::default()));
        let new = ConnectOptions {
            transport: Transport::Nbd,
            path: NbdPath::Direct,
            read_only: true,
            reconnect_timeout_ms: 1500,
            index: Some(4),
        };
        let text = serde_json::to_string(&Line { v: 1, body: &Request::Connect(new.clone()) }).unwrap();
        assert_eq!(
            text,
            r#"{"v":1,"request":"connect","transport":"nbd","path":"direct","read_only":true,"reconnect_timeout_ms":1500,"index":4}"#
        );
        assert_eq!(parse(text.as_bytes()).unwrap(), Request::Connect(new));
        let few = parse(br#"{"v":1,"request":"connect","transport":"nbd"}"#).unwrap();
        let nbd = ConnectOptions { transport: Transport::Nbd, ..ConnectOptions::default() };
        assert_eq!(few, Request::Connect(nbd));
        assert!(parse(br#"{"v":1,"request":"connect","transport":"ublk"}"#).is_err());
    }

    #[test]
    fn the_state_of_a_device_survives_peers_that_know_less_or_more() {
        let answer = Line { v: 1, body: Answer::Nbd { index: 3, bytes: 4096 } };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"v":1,"answer":"nbd","index":3,"bytes":4096}"#
        );
        let status: NbdStatus = serde_json::from_str(r#"{"index":3,"path":"direct","later":1}"#).unwrap();
        let expected = NbdStatus { index: Some(3), path: NbdPath::Direct, ..NbdStatus::default() };
        assert_eq!(status, expected);
        let text = serde_json::to_string(&expected).unwrap();
        assert_eq!(serde_json::from_str::<NbdStatus>(&text).unwrap(), expected);
    }

    #[test]
    fn other_versions_and_rubbish_are_refused_with_words() {
        for (line, word) in [
            (&br#"{"v":2,"request":"ping"}"#[..], "version 1"),
            (br#"{"request":"ping"}"#, "does not understand"),
            (br#"{"v":1,"request":"dance"}"#, "does not understand"),
            (b"\xff\n", "does not understand"),
        ] {
            let e = parse(line).unwrap_err();
            assert!(e.message().contains(word), "{e}");
        }
    }

    #[test]
    fn an_error_keeps_its_kind_and_hint_on_the_wire() {
        for kind in Kind::ALL {
            let e = Error::new(kind, "m").hint("h");
            let back = Error::from(WireError::from(&e));
            assert_eq!((back.kind(), back.message(), back.hint_text()), (kind, "m", Some("h")));
        }
    }
}
