//! The other side of the control socket: what the command line uses to talk to a keeper.
//!
//! Nothing here waits for ever: each call has a time limit, and a keeper that is gone is an error at once.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::control::{
    Answer, ConnectOptions, DisconnectOptions, Line, MAX_LINE, Progress, Request, SOCKET, Status,
    StopOptions, Stopped, Transport, VERSION,
};
use super::path::Replayed;
use super::process::{Identity, Process};
use crate::error::{Error, Kind, Result};
use crate::zerofs::sock;

/// A connection to one keeper.
pub struct KeeperClient {
    reader: BufReader<UnixStream>,
    run_dir: PathBuf,
    limit: Duration,
}

impl KeeperClient {
    /// Connects to the keeper of the volume with this run folder. [`Kind::NotFound`] when none runs there.
    pub fn connect(run_dir: &Path) -> Result<KeeperClient> {
        KeeperClient::connect_within(run_dir, sock::CONTROL_TIMEOUT)
    }

    /// The same, with another time limit for connecting and for each answer.
    pub fn connect_within(run_dir: &Path, limit: Duration) -> Result<KeeperClient> {
        let stream = sock::connect_within(run_dir, SOCKET, limit).map_err(|e| {
            let socket = run_dir.join(SOCKET);
            match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    Error::new(Kind::NotFound, format!("no keeper answers on {}", socket.display()))
                        .hint("see what is left of the volume: zerofsctl list; settle it: zerofsctl recover")
                }
                io::ErrorKind::TimedOut => silent(run_dir, limit),
                _ => Error::failed(format!("cannot connect to {}: {e}", socket.display())),
            }
        })?;
        Ok(KeeperClient { reader: BufReader::new(stream), run_dir: run_dir.to_owned(), limit })
    }

    /// The same connection with another time limit for each answer; the default is 10 s.
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Who the keeper is.
    pub fn ping(&mut self) -> Result<Identity> {
        match self.ask(&Request::Ping)? {
            Answer::Pong { keeper } => Ok(keeper),
            other => Err(unexpected(&other)),
        }
    }

    /// Everything that it knows.
    pub fn status(&mut self) -> Result<Status> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks for the status and does not wait for it: for those who ask many keepers at once.
    /// [`status_by`](Self::status_by) reads the answer.
    pub fn ask_status(&mut self) -> Result<()> {
        self.send(&Request::Status)
    }

    /// The answer to [`ask_status`](Self::ask_status), waited for until `deadline`.
    pub fn status_by(&mut self, deadline: Instant) -> Result<Status> {
        // A moment at least: what has arrived already is read also when others took all the time.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match self.receive(left)? {
            Answer::Status(status) => Ok(*status),
            Answer::Error(e) => Err(e.into()),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits until ZeroFS answers on its sockets. Fails with the cause when it cannot start, and with
    /// [`Kind::Unreachable`] when it has not answered within `limit`.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Status> {
        let request = Request::WaitReady { timeout_seconds: limit.as_secs_f64() };
        match self.ask_within(&request, limit + self.limit)? {
            Answer::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Replays the log if need be, and mounts the FUSE file `<run>/fuse/disk`.
    pub fn mount(&mut self) -> Result<()> {
        self.done(&Request::Connect(ConnectOptions::default()))
    }

    /// Replays the log if need be, and connects an NBD device; gives its index and its size in bytes. One that is
    /// connected already is left as it is.
    pub fn connect_nbd(&mut self, options: &ConnectOptions) -> Result<(u32, u64)> {
        let options = ConnectOptions { transport: Transport::Nbd, ..options.clone() };
        match self.ask(&Request::Connect(options))? {
            Answer::Nbd { index, bytes } => Ok((index, bytes)),
            other => Err(unexpected(&other)),
        }
    }

    /// Flushes, disconnects the NBD device and waits until the kernel has let go. The caller has proved that nobody uses
    /// it: the kernel would not refuse.
    /// With `force` without the flush, which a server that is gone for good would never answer. It may take a minute.
    pub fn disconnect(&mut self, force: bool) -> Result<()> {
        self.done(&Request::Disconnect(DisconnectOptions { force }))
    }

    /// Unmounts the FUSE file; [`Kind::Busy`] while something holds it open.
    pub fn unmount(&mut self) -> Result<()> {
        self.done(&Request::Disconnect(DisconnectOptions::default()))
    }

    /// Makes everything durable that was acknowledged.
    pub fn flush(&mut self) -> Result<()> {
        self.done(&Request::Flush)
    }

    /// Lets the keeper learn a larger size; tells that size in bytes.
    pub fn resize(&mut self) -> Result<u64> {
        match self.ask(&Request::Resize)? {
            Answer::Size { bytes } => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    /// Connects the data path, and writes again what an earlier keeper left behind in the log.
    pub fn replay(&mut self) -> Result<Replayed> {
        match self.ask(&Request::Replay)? {
            Answer::Replayed(replayed) => Ok(replayed),
            other => Err(unexpected(&other)),
        }
    }

    /// Throws away what an earlier keeper left behind in the log. Refused once the data path is connected.
    pub fn discard_log(&mut self) -> Result<()> {
        self.done(&Request::DiscardLog)
    }

    /// Ends ZeroFS and the keeper, and waits until the keeper's process is gone. `progress` is called about
    /// once a second. After the time limit it fails with [`Kind::Interrupted`], and the keeper goes on stopping.
    pub fn stop(&mut self, options: StopOptions, progress: &mut dyn FnMut(&Progress)) -> Result<Stopped> {
        let keeper = self.ping()?;
        let held = Process::open(&keeper)?;
        self.send(&Request::Stop(options))?;
        // A line comes about every second, so the time limit is for one line, not for all. The last one may take
        // as long as the kernel needs to end a killed process.
        let stopped = loop {
            match self.receive(self.limit.max(Duration::from_secs(30)))? {
                Answer::Progress(p) => progress(&p),
                Answer::Stopped(stopped) => break stopped,
                Answer::Error(e) => return Err(e.into()),
                other => return Err(unexpected(&other)),
            }
        };
        if let Some(held) = held
            && held.wait(Duration::from_secs(10)).is_none()
        {
            return Err(Error::failed(format!("the keeper ({keeper}) has stopped ZeroFS, but does not end"))
                .hint(format!("look at its log, then end it: kill {}", keeper.pid)));
        }
        Ok(stopped)
    }

    fn done(&mut self, request: &Request) -> Result<()> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Answer> {
        self.ask_within(request, self.limit)
    }

    fn ask_within(&mut self, request: &Request, limit: Duration) -> Result<Answer> {
        self.send(request)?;
        match self.receive(limit)? {
            Answer::Error(e) => Err(e.into()),
            answer => Ok(answer),
        }
    }

    fn send(&mut self, request: &Request) -> Result<()> {
        super::control::send(self.reader.get_ref(), request).map_err(|e| self.lost(&e))
    }

    fn receive(&mut self, limit: Duration) -> Result<Answer> {
        let deadline = Instant::now() + limit;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(silent(&self.run_dir, limit));
            }
            let timeout = self.reader.get_ref().set_read_timeout(Some(left));
            timeout.map_err(|e| self.lost(&e))?;
            match Read::by_ref(&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut line) {
                Ok(0) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(self.lost(&e)),
            }
            if line.len() as u64 > MAX_LINE {
                return Err(Error::failed("the keeper's answer is too long"));
            }
        }
        let line: Line<Answer> = serde_json::from_slice(&line).map_err(|e| {
            Error::failed(format!("cannot understand the keeper's answer: {e}"))
                .hint("use the zerofsctl that started it, or detach and attach again")
        })?;
        if line.v != VERSION {
            return Err(Error::failed(format!("the keeper speaks version {} of its protocol", line.v))
                .hint("use the zerofsctl that started it"));
        }
        Ok(line.body)
    }

    fn lost(&self, e: &io::Error) -> Error {
        let why = match e.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "it ended before it answered".to_owned()
            }
            _ => e.to_string(),
        };
        Error::new(Kind::NotFound, format!("the keeper of {} is gone: {why}", self.run_dir.display()))
            .hint("settle what it left: zerofsctl recover")
    }
}

fn silent(run_dir: &Path, limit: Duration) -> Error {
    let message =
        format!("the keeper of {} did not answer within {:.0} s", run_dir.display(), limit.as_secs_f64());
    // Somebody may have stopped it, and nothing of ours ends what may only be slow.
    let hint = match Identity::read(&run_dir.join(super::PID_FILE)).filter(Identity::is_alive) {
        Some(Identity { pid, .. }) => format!(
            "see whether it is stopped: ps -o stat= -p {pid} (T: go on with kill -CONT {pid}); or end it, which loses nothing that was acknowledged: kill -KILL {pid}, then: zerofsctl recover"
        ),
        None => "settle what it left: zerofsctl recover".to_owned(),
    };
    Error::new(Kind::Unreachable, message).hint(hint)
}

fn unexpected(answer: &Answer) -> Error {
    let text = serde_json::to_string(answer).unwrap_or_default();
    Error::failed(format!("the keeper answered something else than asked: {text:.200}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::control::{Handler, bind, serve};
    use super::*;

    struct Fake;

    impl Handler for Fake {
        fn handle(
            &self,
            request: Request,
            progress: &mut dyn FnMut(Answer) -> io::Result<()>,
        ) -> Result<Answer> {
            match request {
                Request::Ping => Ok(Answer::Pong { keeper: Identity { pid: 1, start: 2, boot: "b".into() } }),
                Request::Flush => {
                    std::thread::sleep(Duration::from_millis(300));
                    Ok(Answer::Done)
                }
                Request::Resize => Ok(Answer::Size { bytes: 7 }),
                Request::Stop(_) => {
                    for n in 0..3 {
                        let _ = progress(Answer::Progress(Progress {
                            stage: "flushing".into(),
                            elapsed_seconds: f64::from(n),
                            log_bytes: 0,
                        }));
                    }
                    Ok(Answer::Stopped(Stopped { clean: true, ..Stopped::default() }))
                }
                _ => Err(Error::new(Kind::Busy, "not now").hint("later")),
            }
        }
    }

    fn fake() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let listener = bind(dir.path()).unwrap();
        let handler: Arc<dyn Handler> = Arc::new(Fake);
        std::thread::spawn(move || serve(&listener, &handler));
        dir
    }

    #[test]
    fn questions_get_their_answers_and_errors_their_kind() {
        use std::os::unix::fs::PermissionsExt;
        let dir = fake();
        let mode = std::fs::metadata(dir.path().join(SOCKET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut client = KeeperClient::connect(dir.path()).unwrap();
        assert_eq!(client.resize().unwrap(), 7);
        let e = client.mount().unwrap_err();
        assert_eq!((e.kind(), e.message(), e.hint_text()), (Kind::Busy, "not now", Some("later")));
        // The connection is good for more after an error.
        assert_eq!(client.ping().unwrap().pid, 1);
        let mut seen = Vec::new();
        let options = StopOptions { timeout_seconds: 1.0, force: false, even_if_mounted: false };
        let stopped = client.stop(options, &mut |p| seen.push(p.elapsed_seconds)).unwrap();
        assert!(stopped.clean);
        assert_eq!(seen, [0.0, 1.0, 2.0]);
    }

    #[test]
    fn a_missing_a_dead_and_a_slow_keeper_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(KeeperClient::connect(dir.path()).err().unwrap().kind(), Kind::NotFound);
        drop(bind(dir.path()).unwrap());
        assert_eq!(KeeperClient::connect(dir.path()).err().unwrap().kind(), Kind::NotFound);

        let dir = fake();
        let client = KeeperClient::connect(dir.path()).unwrap();
        let e = client.within(Duration::from_millis(50)).flush().unwrap_err();
        assert_eq!(e.kind(), Kind::Unreachable);

        // One that ends in the middle.
        let dir = tempfile::tempdir().unwrap();
        let listener = bind(dir.path()).unwrap();
        let mut client = KeeperClient::connect(dir.path()).unwrap();
        drop(listener.accept().unwrap());
        let e = client.ping().unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound, "{e}");
    }
}
