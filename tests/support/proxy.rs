//! A TCP proxy on 127.0.0.1 whose network can be broken and mended while connections are open.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::libc::{self, AF_INET, in_addr, linger, sockaddr_in};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown as Half, SockFlag, SockType, listen, setsockopt, shutdown, socket,
    sockopt,
};

/// What happens to the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything is forwarded both ways.
    Pass,
    /// As when the server's process is gone: new connections are refused, open ones are reset at once.
    Refuse,
    /// As when packets are dropped: connections open and stay open, and no byte passes in either direction.
    /// What was sent meanwhile arrives once the mode is [`Mode::Pass`] again.
    Stall,
}

/// What has passed since the proxy was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections accepted from clients.
    pub accepted: u64,
    /// Connections reset by a change to [`Mode::Refuse`], or because the server refused or reset its half.
    pub reset: u64,
    /// Bytes handed to the server.
    pub to_server: u64,
    /// Bytes handed to clients.
    pub to_client: u64,
}

/// The proxy; it ends, and resets its connections, when dropped.
pub struct FaultProxy {
    address: SocketAddr,
    requests: Sender<Request>,
    // One byte here wakes the loop, so that it looks at `requests`.
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

enum Request {
    Set(Mode, Sender<()>),
    Counts(Sender<Counts>),
    End,
}

impl FaultProxy {
    /// Starts a proxy for the server at `upstream`, in mode [`Mode::Pass`].
    #[track_caller]
    pub fn start(upstream: SocketAddr) -> FaultProxy {
        let listener = listen_on_free_port();
        let address = listener.local_addr().expect("a bound socket has an address");
        let (requests, inbox) = mpsc::channel();
        let (wake, woken) = UnixStream::pair().expect("a socket pair can be made");
        woken.set_nonblocking(true).expect("a socket can be made non-blocking");
        let relay = Relay {
            upstream,
            listener,
            inbox,
            woken,
            mode: Mode::Pass,
            pairs: vec![],
            counts: Counts::default(),
        };
        let thread = std::thread::Builder::new()
            .name("fault-proxy".into())
            .spawn(move || relay.run())
            .expect("a thread can be started");
        FaultProxy { address, requests, wake, thread: Some(thread) }
    }

    /// Where clients connect to. It stays the same through all modes.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the mode. When this returns the change is complete: with [`Mode::Refuse`], for example, the
    /// next connect is refused already.
    pub fn set(&self, mode: Mode) {
        let (done, wait) = mpsc::channel();
        self.ask(Request::Set(mode, done));
        wait.recv().expect("the proxy's thread runs");
    }

    /// Breaks the network for `time`, then mends it.
    pub fn interrupt(&self, mode: Mode, time: Duration) {
        self.set(mode);
        std::thread::sleep(time);
        self.set(Mode::Pass);
    }

    /// What has passed so far.
    pub fn counts(&self) -> Counts {
        let (answer, wait) = mpsc::channel();
        self.ask(Request::Counts(answer));
        wait.recv().expect("the proxy's thread runs")
    }

    fn ask(&self, request: Request) {
        self.requests.send(request).expect("the proxy's thread runs");
        (&self.wake).write_all(&[0]).expect("the proxy's thread runs");
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        let _ = self.requests.send(Request::End);
        let _ = (&self.wake).write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the proxy's thread panicked");
        }
    }
}

/// Listens on a port that no other program can take while the proxy refuses connections.
///
/// Linux keeps the port for a socket that stops listening only if it was bound by its number, and keeps others
/// off it only if reuse of the address was forbidden when it was bound (the standard library allows it).
fn listen_on_free_port() -> TcpListener {
    for _ in 0..20 {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr());
        let Ok(SocketAddr::V4(free)) = free else { continue };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket =
            socket(AddressFamily::Inet, SockType::Stream, flags, None).expect("a socket can be made");
        let address = sockaddr_in {
            sin_family: AF_INET as u16,
            sin_port: free.port().to_be(),
            sin_addr: in_addr { s_addr: u32::from(*free.ip()).to_be() },
            sin_zero: [0; 8],
        };
        // SAFETY: the address is a whole sockaddr_in that lives until the call returns, and its size is told.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<sockaddr_in>() as u32)
        };
        if bound == 0 {
            share_port(&socket, true);
            listen(&socket, Backlog::MAXCONN).expect("a bound socket can listen");
            return socket.into();
        }
    }
    panic!("no free port on 127.0.0.1");
}

/// Whether others may bind the port too. While we listen nobody can, and it must be allowed, so that our own
/// closed connections, which linger in TIME_WAIT, are no obstacle to listening again. While we do not listen it
/// keeps others off.
fn share_port(socket: &impl AsFd, share: bool) {
    setsockopt(&socket.as_fd(), sockopt::ReuseAddr, &share).expect("a socket takes this option");
}

/// As much as one direction of a connection holds before the sender has to wait.
const BUFFER: usize = 256 * 1024;

/// One direction of a connection.
#[derive(Default)]
struct Flow {
    bytes: VecDeque<u8>,
    // The sender has closed its side; the receiver is told so once `bytes` is empty.
    ended: bool,
    told: bool,
}

impl Flow {
    fn wants_input(&self) -> bool {
        !self.ended && self.bytes.len() < BUFFER
    }

    fn wants_output(&self) -> bool {
        !self.bytes.is_empty() || (self.ended && !self.told)
    }

    fn read(&mut self, mut from: &TcpStream) -> io::Result<()> {
        let mut chunk = [0; 64 * 1024];
        match from.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(n) => self.bytes.extend(&chunk[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    fn write(&mut self, mut to: &TcpStream) -> io::Result<u64> {
        let mut sent = 0;
        while !self.bytes.is_empty() {
            match to.write(self.bytes.as_slices().0) {
                Ok(n) => {
                    self.bytes.drain(..n);
                    sent += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(sent),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.ended && !self.told {
            self.told = true;
            to.shutdown(Shutdown::Write)?;
        }
        Ok(sent)
    }
}

/// A client's connection, and ours to the server in its name. The latter is made when bytes may pass.
struct Pair {
    client: TcpStream,
    server: Option<TcpStream>,
    up: Flow,
    down: Flow,
}

impl Pair {
    fn finished(&self) -> bool {
        self.up.told && self.down.told
    }

    /// Closes both halves so that the other ends see a reset, not an orderly end.
    fn reset(self) {
        for stream in [Some(self.client), self.server].into_iter().flatten() {
            let _ = setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 });
        }
    }
}

/// The thread's own state: one loop around poll(2), so that nothing happens behind a mode's back.
struct Relay {
    upstream: SocketAddr,
    listener: TcpListener,
    inbox: Receiver<Request>,
    woken: UnixStream,
    mode: Mode,
    pairs: Vec<Pair>,
    counts: Counts,
}

impl Relay {
    fn run(mut self) {
        loop {
            self.wait();
            if !self.obey() {
                break;
            }
            if self.mode != Mode::Refuse {
                self.accept();
            }
            if self.mode == Mode::Pass {
                self.forward();
            }
        }
        self.reset_all();
    }

    /// Sleeps until there is something to do in this mode.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
        if self.mode != Mode::Refuse {
            fds.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        if self.mode == Mode::Pass {
            for pair in &self.pairs {
                fds.extend(watch(&pair.client, &pair.up, &pair.down));
                fds.extend(pair.server.as_ref().and_then(|server| watch(server, &pair.down, &pair.up)));
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
    }

    /// Carries out what was asked for; false when it was the end.
    fn obey(&mut self) -> bool {
        let mut bytes = [0; 64];
        while matches!((&self.woken).read(&mut bytes), Ok(n) if n == bytes.len()) {}
        while let Ok(request) = self.inbox.try_recv() {
            match request {
                Request::Set(mode, done) => {
                    self.change(mode);
                    let _ = done.send(());
                }
                Request::Counts(answer) => {
                    let _ = answer.send(self.counts);
                }
                Request::End => return false,
            }
        }
        true
    }

    fn change(&mut self, mode: Mode) {
        match (self.mode, mode) {
            (Mode::Refuse, Mode::Refuse) => {}
            (_, Mode::Refuse) => {
                // Ends the listening, resets what waits to be accepted, and keeps the port.
                shutdown(self.listener.as_raw_fd(), Half::Both).expect("a listener can stop");
                share_port(&self.listener, false);
                self.reset_all();
            }
            (Mode::Refuse, _) => {
                share_port(&self.listener, true);
                listen(&self.listener, Backlog::MAXCONN).expect("the kept port can be listened on again");
            }
            _ => {}
        }
        self.mode = mode;
    }

    fn reset_all(&mut self) {
        for pair in self.pairs.drain(..) {
            self.counts.reset += 1;
            pair.reset();
        }
    }

    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            self.counts.accepted += 1;
            client.set_nonblocking(true).expect("a socket can be made non-blocking");
            let _ = client.set_nodelay(true);
            self.pairs.push(Pair { client, server: None, up: Flow::default(), down: Flow::default() });
        }
    }

    fn forward(&mut self) {
        for mut pair in std::mem::take(&mut self.pairs) {
            match forward_pair(self.upstream, &mut pair, &mut self.counts) {
                Ok(()) if pair.finished() => {}
                Ok(()) => self.pairs.push(pair),
                Err(_) => {
                    self.counts.reset += 1;
                    pair.reset();
                }
            }
        }
    }
}

/// What to wait for on a connection that feeds `input` and is fed by `output`. None when there is nothing:
/// a descriptor without events would still report a hang-up, again and again.
fn watch<'a>(stream: &'a TcpStream, input: &Flow, output: &Flow) -> Option<PollFd<'a>> {
    let mut events = PollFlags::empty();
    events.set(PollFlags::POLLIN, input.wants_input());
    events.set(PollFlags::POLLOUT, output.wants_output());
    (!events.is_empty()).then(|| PollFd::new(stream.as_fd(), events))
}

fn forward_pair(upstream: SocketAddr, pair: &mut Pair, counts: &mut Counts) -> io::Result<()> {
    let server = match &pair.server {
        Some(server) => server,
        None => {
            // On loopback a connect succeeds or fails at once.
            let server = TcpStream::connect_timeout(&upstream, Duration::from_secs(1))?;
            server.set_nonblocking(true)?;
            server.set_nodelay(true)?;
            pair.server.insert(server)
        }
    };
    if pair.up.wants_input() {
        pair.up.read(&pair.client)?;
    }
    if pair.down.wants_input() {
        pair.down.read(server)?;
    }
    counts.to_server += pair.up.write(server)?;
    counts.to_client += pair.down.write(&pair.client)?;
    Ok(())
}
