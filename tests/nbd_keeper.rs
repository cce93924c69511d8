//! The NBD front end without a kernel: the test itself plays the kernel's client on the sockets, against a server that
//! forgets what was not flushed when it is killed.

mod support;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::forgetful::{Asks, Disk, Server};
use support::{cases, wait_until};
use tempfile::TempDir;
use zerofsctl::error::Kind;
use zerofsctl::keeper::path::{DataEvent, DataPath, DataPathConfig, LogState};
use zerofsctl::zerofs::nbd::{Command, FLAG_FUA, RequestHeader, SimpleReply};

const MIB: usize = 1 << 20;
const SIZE: usize = 16 * MIB;
const BLOCK: usize = 4096;

/// One socket, from the kernel's side.
struct Kernel {
    stream: UnixStream,
    cookie: u64,
    /// Requests in flight, and how long the data of their replies is.
    flying: HashMap<u64, usize>,
}

impl Kernel {
    fn new(stream: UnixStream) -> Kernel {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        Kernel { stream, cookie: 0, flying: HashMap::new() }
    }

    /// The bytes of a request, noted as in flight.
    fn request(&mut self, command: Command, flags: u16, offset: usize, len: usize, data: &[u8]) -> Vec<u8> {
        self.cookie += 1;
        let header =
            RequestHeader { flags, command, cookie: self.cookie, offset: offset as u64, len: len as u32 };
        let expected = if command == Command::Read { len } else { 0 };
        self.flying.insert(self.cookie, expected);
        [&header.encode()[..], data].concat()
    }

    fn send(&mut self, command: Command, flags: u16, offset: usize, len: usize, data: &[u8]) -> u64 {
        let bytes = self.request(command, flags, offset, len, data);
        self.stream.write_all(&bytes).unwrap();
        self.cookie
    }

    /// The next reply: which request, and its data or errno.
    fn reply(&mut self) -> (u64, Result<Vec<u8>, u32>) {
        let mut raw = [0; SimpleReply::LEN];
        self.stream.read_exact(&mut raw).expect("a reply within a minute");
        let reply = SimpleReply::decode(&raw).unwrap();
        let len = self.flying.remove(&reply.cookie).expect("a reply to a request in flight");
        if reply.error != 0 {
            return (reply.cookie, Err(reply.error));
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data).unwrap();
        (reply.cookie, Ok(data))
    }

    fn ask(&mut self, command: Command, offset: usize, len: usize, data: &[u8]) -> Result<Vec<u8>, u32> {
        let cookie = self.send(command, 0, offset, len, data);
        let (answered, result) = self.reply();
        assert_eq!(answered, cookie);
        result
    }

    /// Whether the other side has closed the socket.
    fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(0) => true,
            Ok(_) => panic!("a byte that nobody asked for"),
            Err(e) => e.kind() != ErrorKind::WouldBlock,
        }
    }
}

struct Bench {
    dir: TempDir,
    disk: Arc<Mutex<Disk>>,
    path: Arc<DataPath>,
    events: mpsc::Receiver<DataEvent>,
}

impl Bench {
    fn new() -> Bench {
        Bench::with(true)
    }

    /// Data of a server whose zeros are always true need not be looked at.
    fn with(zeros_when_closed: bool) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk { volatile: vec![0; SIZE], durable: vec![0; SIZE], size: SIZE, ..Disk::default() };
        Bench::of(dir, Arc::new(Mutex::new(disk)), zeros_when_closed, None)
    }

    fn of(
        dir: TempDir,
        disk: Arc<Mutex<Disk>>,
        zeros_when_closed: bool,
        io_timeout: Option<Duration>,
    ) -> Bench {
        let config = DataPathConfig {
            run_dir: dir.path().to_owned(),
            export: "vol".into(),
            connections: 4,
            log_bytes: 8 << 20,
            io_timeout,
            volume: "vol".parse().unwrap(),
            epoch: 1,
            zeros_when_closed,
            replay_log: true,
        };
        let (tell, events) = mpsc::channel();
        let path = DataPath::new(config, Arc::new(Asks(Arc::clone(&disk))), tell).unwrap();
        Bench { dir, disk, path, events }
    }

    /// The keeper and the server are gone; the next ones find what they left.
    fn killed(self, server: Server) -> Bench {
        server.kill();
        let Bench { dir, disk, path, .. } = self;
        drop(path);
        Bench::of(dir, disk, true, None)
    }

    /// Waits until so many operations are in flight.
    fn wait_for_pending(&self, n: u64) {
        wait_until("the operations are in flight", Duration::from_secs(30), || {
            self.path.stats().pending >= n
        });
    }

    fn server(&self) -> Server {
        let server = Server::start(self.dir.path(), &self.disk);
        self.path.server_up().unwrap();
        server
    }

    fn sockets(&self, n: usize, read_only: bool) -> Vec<Kernel> {
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..n).map(|_| UnixStream::pair().unwrap()).unzip();
        self.path.serve_nbd(ours, read_only, &[]).unwrap();
        theirs.into_iter().map(Kernel::new).collect()
    }

    /// The next event of this kind.
    fn told(&self, which: impl Fn(&DataEvent) -> bool) -> DataEvent {
        loop {
            let event = self.events.recv_timeout(Duration::from_secs(30)).expect("it is told");
            if which(&event) {
                return event;
            }
        }
    }
}

/// An operation of the model: which, its first block, how many, and the byte that is written.
type Step = (u8, usize, usize, u8);

/// Runs batches of operations that do not overlap, over all sockets at once, with the server killed in the middle of
/// some; in the end the device holds what a model holds.
fn run_model(batches: &[(bool, Vec<Step>)], seed: u64) {
    let bench = Bench::with(seed.is_multiple_of(2));
    let mut server = Some(bench.server());
    let mut kernels = bench.sockets(4, false);
    let mut truth = vec![0u8; SIZE];
    let mut rng = StdRng::seed_from_u64(seed);
    for (kill, steps) in batches {
        let before = truth.clone();
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut bytes = vec![Vec::new(); kernels.len()];
        let mut reads = vec![HashMap::new(); kernels.len()];
        for &(kind, first, blocks, value) in steps {
            let (start, len) = (first * BLOCK, blocks.min(SIZE / BLOCK - first) * BLOCK);
            let k = rng.random_range(0..kernels.len());
            let kernel = &mut kernels[k];
            if kind == 4 {
                bytes[k].extend(kernel.request(Command::Flush, 0, 0, 0, &[]));
                continue;
            }
            if taken.iter().any(|&(s, e)| start < e && s < start + len) {
                continue;
            }
            taken.push((start, start + len));
            let request = match kind {
                0 | 1 => {
                    truth[start..start + len].fill(value);
                    kernel.request(
                        Command::Write,
                        if kind == 1 { FLAG_FUA } else { 0 },
                        start,
                        len,
                        &vec![value; len],
                    )
                }
                2 => {
                    truth[start..start + len].fill(0);
                    let command = if value % 2 == 0 { Command::Trim } else { Command::WriteZeroes };
                    kernel.request(command, 0, start, len, &[])
                }
                _ => {
                    let request = kernel.request(Command::Read, 0, start, len, &[]);
                    reads[k].insert(kernel.cookie, start);
                    request
                }
            };
            bytes[k].extend(request);
        }
        std::thread::scope(|scope| {
            for ((kernel, bytes), reads) in kernels.iter_mut().zip(&bytes).zip(&reads) {
                let (before, seed) = (&before, rng.random());
                scope.spawn(move || {
                    // Sent in pieces of any length while replies are being read, as the kernel does it.
                    let mut out = kernel.stream.try_clone().unwrap();
                    std::thread::scope(|inner| {
                        inner.spawn(move || {
                            let mut rng = StdRng::seed_from_u64(seed);
                            let mut rest = &bytes[..];
                            while !rest.is_empty() {
                                let n = rng.random_range(1..=rest.len().min(200_000));
                                out.write_all(&rest[..n]).unwrap();
                                rest = &rest[n..];
                            }
                        });
                        while !kernel.flying.is_empty() {
                            let (cookie, result) = kernel.reply();
                            let data = result.expect("a stall is no error");
                            if let Some(&start) = reads.get(&cookie) {
                                assert!(data == before[start..start + data.len()], "a read at {start}");
                            }
                        }
                    });
                });
            }
            if *kill {
                std::thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
                server.take().expect("there is one").kill();
                bench.told(|e| matches!(e, DataEvent::ServerLost(_)));
                server = Some(bench.server());
            }
        });
    }
    let kernel = &mut kernels[0];
    for at in (0..SIZE).step_by(MIB) {
        let found = kernel.ask(Command::Read, at, MIB, &[]).unwrap();
        assert!(found == truth[at..at + MIB], "the MiB at {at}");
    }
    kernel.ask(Command::Flush, 0, 0, &[]).unwrap();
    assert!(bench.disk.lock().unwrap().durable == truth, "flushed and not durable");
    assert_eq!(bench.path.stats().errors, 0);
    server.expect("there is one").kill();
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = prop_oneof![4 => 1usize..8, 2 => 8usize..64, 1 => 200usize..700];
    (0u8..5, 0..SIZE / BLOCK, blocks, 1u8..=255)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(12), ..ProptestConfig::default() })]

    #[test]
    fn interleaved_requests_equal_a_model_with_the_server_killed_in_between(
        batches in prop::collection::vec((prop::bool::weighted(0.3), prop::collection::vec(step(), 1..40)), 1..6),
        seed in any::<u64>(),
    ) {
        run_model(&batches, seed);
    }
}

#[test]
fn large_requests_force_unit_access_and_unknown_commands_are_answered_as_they_should_be() {
    let bench = Bench::new();
    let server = bench.server();
    let mut kernels = bench.sockets(2, false);
    let kernel = &mut kernels[0];
    let data: Vec<u8> = (0..3 * MIB + 512).map(|i| (i % 251) as u8).collect();
    kernel.ask(Command::Write, MIB, data.len(), &data).unwrap();
    assert!(kernel.ask(Command::Read, MIB, data.len(), &[]).unwrap() == data);
    assert!(bench.disk.lock().unwrap().durable.iter().all(|b| *b == 0));
    kernel.send(Command::Write, FLAG_FUA, 0, 512, &[9; 512]);
    assert_eq!(kernel.reply().1, Ok(Vec::new()));
    assert_eq!(bench.disk.lock().unwrap().durable[..512], [9; 512]);
    // A flush on one socket covers what was answered on another.
    kernels[1].ask(Command::Write, 8 * MIB, 512, &[7; 512]).unwrap();
    kernels[0].ask(Command::Flush, 0, 0, &[]).unwrap();
    assert_eq!(bench.disk.lock().unwrap().durable[8 * MIB], 7);

    let kernel = &mut kernels[0];
    let mut unknown = kernel.request(Command::Cache, 0, 0, 512, &[]);
    assert_eq!(kernel.ask(Command::BlockStatus, 0, 512, &[]), Err(libc::EINVAL as u32));
    unknown[6..8].copy_from_slice(&99u16.to_be_bytes());
    kernel.stream.write_all(&unknown).unwrap();
    assert_eq!(kernel.reply().1, Err(libc::EINVAL as u32));
    assert_eq!(kernel.ask(Command::Read, SIZE, 512, &[]), Err(libc::EINVAL as u32));
    assert_eq!(kernel.ask(Command::Write, SIZE, 512, &[1; 512]), Err(libc::ENOSPC as u32));
    assert_eq!(kernel.ask(Command::Read, 0, 33 * MIB, &[]), Err(libc::EINVAL as u32));
    assert_eq!(kernel.ask(Command::Read, 0, 0, &[]), Ok(Vec::new()));
    assert!(kernel.ask(Command::Read, 0, 512, &[]).unwrap() == [9; 512], "it is still in step");
    server.kill();

    // As much as a socket holds unanswered, and more.
    let size = 32 * MIB;
    let disk = Disk { volatile: vec![0; size], durable: vec![0; size], size, ..Disk::default() };
    let bench = Bench::of(tempfile::tempdir().unwrap(), Arc::new(Mutex::new(disk)), true, None);
    let server = bench.server();
    let kernel = &mut bench.sockets(1, false)[0];
    for (len, byte) in [(16 * MIB, 1), (17 * MIB, 2), (32 * MIB, 3)] {
        kernel.ask(Command::Write, 0, len, &vec![byte; len]).unwrap();
        assert!(kernel.ask(Command::Read, 0, len, &[]).unwrap() == vec![byte; len]);
    }
    server.kill();
}

#[test]
fn hostile_streams_end_their_own_socket_and_no_other() {
    let bench = Bench::new();
    let server = bench.server();
    let mut kernels = bench.sockets(5, false);
    let good = RequestHeader { flags: 0, command: Command::Write, cookie: 1, offset: 0, len: u32::MAX };
    let (mut garbage, mut rng) = (vec![0u8; 300_000], StdRng::seed_from_u64(5));
    rng.fill(&mut garbage[..]);
    let too_long = good.encode().to_vec();
    let half = RequestHeader { len: 4096, ..good }.encode()[..20].to_vec();
    let torn = [&RequestHeader { len: 1 << 20, ..good }.encode()[..], &[1; 5000]].concat();
    for (kernel, bytes) in kernels.iter_mut().zip([garbage, too_long, half, torn]) {
        // It may be closed before all of that is sent.
        let _ = kernel.stream.write_all(&bytes);
    }
    for kernel in &mut kernels[..2] {
        assert!(kernel.is_closed());
    }
    // Those that stop in the middle hold nobody up, and what they began is not done.
    let kernel = &mut kernels[4];
    kernel.ask(Command::Write, 0, 4096, &[3; 4096]).unwrap();
    assert!(kernel.ask(Command::Read, 0, 4096, &[]).unwrap() == [3; 4096]);
    kernels.drain(2..4);
    let kernel = &mut kernels[2];
    assert!(kernel.ask(Command::Read, 0, 8192, &[]).unwrap() == [[3; 4096], [0; 4096]].concat());
    kernel.ask(Command::Flush, 0, 0, &[]).unwrap();
    assert_eq!(bench.path.log_state(), LogState::Clean);
    // The last one that ends is told of.
    let bye = kernel.request(Command::Disc, 0, 0, 0, &[]);
    kernel.stream.write_all(&bye).unwrap();
    bench.told(|e| matches!(e, DataEvent::DeviceGone(_)));
    assert_eq!(bench.path.nbd_sockets(), 0);
    server.kill();
}

/// The next keeper answers what the one before had taken, on the new socket and before anything that is asked there.
#[test]
fn the_next_keeper_answers_what_the_one_before_had_taken() {
    let bench = Bench::new();
    let server = bench.server();
    let kernel = &mut bench.sockets(1, false)[0];
    // What the kernel counts is in the upper half.
    kernel.cookie = 1 << 32;
    bench.path.name_connection(7);
    kernel.ask(Command::Write, 0, BLOCK, &[1; BLOCK]).unwrap();
    kernel.ask(Command::Write, MIB, 9 * BLOCK, &[2; 9 * BLOCK]).unwrap();
    server.stop(true);
    let small = kernel.send(Command::Write, 0, 4 * BLOCK, BLOCK, &[3; BLOCK]);
    let landed = kernel.send(Command::Write, FLAG_FUA, 2 * MIB, 64 * BLOCK, &[4; 64 * BLOCK]);
    let read = kernel.send(Command::Read, 0, MIB, 9 * BLOCK, &[]);
    let flush = kernel.send(Command::Flush, 0, 0, 0, &[]);
    let overlaps = kernel.send(Command::Write, 0, 4 * BLOCK, BLOCK, &[5; BLOCK]);
    let torn = kernel.request(Command::Write, 0, 6 * MIB, BLOCK, &[6; BLOCK]);
    kernel.stream.write_all(&torn[..torn.len() - 1]).unwrap();
    bench.wait_for_pending(5);

    let bench = bench.killed(server);
    let server = bench.server();
    let replies = bench.path.owed_replies(7, Duration::from_secs(30));
    let (ours, theirs) = UnixStream::pair().unwrap();
    bench.path.serve_nbd(vec![ours], false, &replies).unwrap();
    let mut next = Kernel::new(theirs);
    next.flying = [(small, 0), (landed, 0), (read, 9 * BLOCK), (flush, 0)].into();
    while !next.flying.is_empty() {
        let (cookie, result) = next.reply();
        assert_eq!(result.unwrap(), vec![2; if cookie == read { 9 * BLOCK } else { 0 }]);
    }
    // Those two had not got into the log: the kernel sends them again, and nothing is said of them meanwhile.
    next.cookie = overlaps + (1 << 32);
    assert!(next.ask(Command::Read, 4 * BLOCK, BLOCK, &[]).unwrap() == [3; BLOCK]);
    let disk = bench.disk.lock().unwrap();
    assert!(
        disk.durable[4 * BLOCK..5 * BLOCK] == [3; BLOCK]
            && disk.durable[2 * MIB..][..64 * BLOCK] == [4; 64 * BLOCK]
    );
    assert!(disk.durable[6 * MIB..][..BLOCK] == [0; BLOCK]);
    drop(disk);

    // All that was owed has been said: a third keeper has nothing to add, nor has one of another device.
    let third = bench.killed(server);
    let server = third.server();
    assert!(third.path.owed_replies(7, Duration::from_secs(30)).is_empty());
    server.kill();
}

/// What was taken on another connection, or with a log that has been discarded, is nobody's to answer.
#[test]
fn what_was_taken_under_other_circumstances_is_not_answered() {
    let mut bench = Bench::new();
    let mut server = bench.server();
    for discards in [false, true, false] {
        let kernel = &mut bench.sockets(1, false)[0];
        kernel.cookie = 1 << 32;
        bench.path.name_connection(7);
        server.stop(true);
        kernel.send(Command::Write, 0, 0, BLOCK, &[1; BLOCK]);
        kernel.send(Command::Read, 0, MIB, BLOCK, &[]);
        kernel.send(Command::Flush, 0, 0, 0, &[]);
        bench.wait_for_pending(3);
        bench = bench.killed(server);
        if discards {
            bench.path.discard_log().unwrap();
        }
        server = bench.server();
        let replies = bench.path.owed_replies(if discards { 7 } else { 8 }, Duration::from_secs(30));
        assert!(replies.is_empty(), "discarded: {discards}");
        assert!(bench.path.owed_replies(7, Duration::from_secs(30)).is_empty());
    }
    server.kill();
}

/// What the server does not answer in time is left to the kernel, and stays unsaid when it is answered after all.
#[test]
fn a_late_answer_to_what_an_earlier_keeper_had_taken_is_not_given() {
    let bench = Bench::new();
    let server = bench.server();
    let kernel = &mut bench.sockets(1, false)[0];
    kernel.cookie = 1 << 32;
    bench.path.name_connection(7);
    server.stop(true);
    kernel.send(Command::Read, 0, MIB, BLOCK, &[]);
    bench.wait_for_pending(1);
    let bench = bench.killed(server);
    let server = bench.server();
    server.stop(true);
    let replies = bench.path.owed_replies(7, Duration::from_millis(50));
    assert!(replies.is_empty());
    let mut next = bench.sockets(1, false).remove(0);
    next.cookie = 2 << 32;
    let again = next.send(Command::Read, 0, MIB, BLOCK, &[]);
    bench.wait_for_pending(2);
    server.stop(false);
    let (cookie, data) = next.reply();
    assert!(cookie == again && data.unwrap() == [0; BLOCK]);
    assert!(next.ask(Command::Read, 0, BLOCK, &[]).unwrap() == [0; BLOCK], "nothing else was said");
    // The device of another attach: none of that is about it.
    server.stop(true);
    next.send(Command::Flush, 0, 0, 0, &[]);
    next.send(Command::Read, 0, 0, BLOCK, &[]);
    bench.wait_for_pending(1);
    let bench = bench.killed(server);
    bench.path.forget_requests();
    let server = bench.server();
    assert!(bench.path.owed_replies(7, Duration::from_secs(30)).is_empty());
    server.kill();
}

#[test]
fn a_read_only_device_refuses_every_change_and_stays_in_step() {
    let bench = Bench::new();
    let server = bench.server();
    let kernel = &mut bench.sockets(1, true)[0];
    let eperm = Err(libc::EPERM as u32);
    assert_eq!(kernel.ask(Command::Write, 0, 2 * MIB, &vec![1; 2 * MIB]), eperm);
    assert_eq!(kernel.ask(Command::Trim, 0, 4096, &[]), eperm);
    assert_eq!(kernel.ask(Command::WriteZeroes, 0, 4096, &[]), eperm);
    assert_eq!(kernel.ask(Command::Flush, 0, 0, &[]), Ok(Vec::new()));
    assert!(kernel.ask(Command::Read, 0, 4096, &[]).unwrap() == [0; 4096]);
    server.kill();
}

#[test]
fn a_peer_that_reads_no_replies_costs_bounded_memory_and_holds_nobody_up() {
    deaf(Bench::new());
    deaf(Bench::with(false));
}

fn deaf(bench: Bench) {
    let server = bench.server();
    let mut kernels = bench.sockets(2, false);
    // 4 GiB of reads, and nobody takes the data. Sent until the front end has had enough of it.
    let deaf = &mut kernels[0];
    deaf.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let request = deaf.request(Command::Read, 0, 0, MIB, &[]);
    let mut sent = 0;
    while sent < 100_000 && deaf.stream.write_all(&request).is_ok() {
        sent += 1;
    }
    assert!(sent < 100_000, "it takes requests without end");
    let other = &mut kernels[1];
    other.ask(Command::Write, 0, 4096, &[3; 4096]).unwrap();
    assert!(other.ask(Command::Read, 0, 4096, &[]).unwrap() == [3; 4096]);
    let asked = bench.path.stats().reads;
    assert!(asked < 200, "{asked} reads of 1 MiB were done for a peer that takes none");
    // Once it takes them, it gets the others too: more than were held for it.
    let deaf = &mut kernels[0];
    let mut reply = vec![0; SimpleReply::LEN + MIB];
    for n in 0..sent.min(300) {
        deaf.stream.read_exact(&mut reply).unwrap_or_else(|e| panic!("reply {n}: {e}"));
    }
    server.kill();
}

/// The data of large reads goes through a pipe: reads of all lengths, several in flight, taken in fits and starts, and
/// the server killed in the middle of replies.
#[test]
fn large_reads_are_whole_also_when_the_server_dies_in_the_middle_of_one() {
    large_reads(false);
}

/// The same of a server that gives zeros once its database is closed, which it is for a while before each kill: also with
/// data that cannot be told from such zeros, or only by a closer look.
#[test]
fn large_reads_are_whole_also_when_the_database_is_closed_in_the_middle_of_one() {
    large_reads(true);
}

fn large_reads(zeros_when_closed: bool) {
    let bench = Bench::with(zeros_when_closed);
    let mut rng = StdRng::seed_from_u64(11);
    let mut truth = vec![0; SIZE];
    rng.fill(&mut truth[..]);
    // Zeros that are true: at the start of a chunk, around an edge, some chunks; and a chunk that has one other byte.
    for (at, len) in [(MIB, 4096), (2 * MIB - 5000, 10_000), (3 * MIB, 300 << 10), (5 * MIB, 32 << 10)] {
        truth[at..at + len].fill(0);
    }
    truth[5 * MIB + 20_000] = 7;
    {
        let mut disk = bench.disk.lock().unwrap();
        disk.volatile.copy_from_slice(&truth);
        disk.durable.copy_from_slice(&truth);
    }
    let mut server = Some(bench.server());
    let mut kernels = bench.sockets(2, false);
    for round in 0..18 {
        bench.disk.lock().unwrap().in_pieces = round % 2 == 1;
        let mut asked = [HashMap::new(), HashMap::new()];
        for (kernel, asked) in kernels.iter_mut().zip(&mut asked) {
            for _ in 0..24 {
                let most = if rng.random_bool(0.3) { 8 << 10 } else { MIB };
                let len = rng.random_range(1..=most);
                let offset = rng.random_range(0..=SIZE - len);
                asked.insert(kernel.send(Command::Read, 0, offset, len, &[]), offset);
            }
        }
        let (seed, truth, kill) = (rng.random(), &truth, round % 3 == 2);
        std::thread::scope(|scope| {
            for (kernel, asked) in kernels.iter_mut().zip(&asked) {
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed);
                    while !kernel.flying.is_empty() {
                        let (cookie, data) = kernel.reply();
                        let (offset, data) = (asked[&cookie], data.expect("a stall is no error"));
                        assert!(data == truth[offset..offset + data.len()], "a read at {offset}");
                        if rng.random_bool(0.2) {
                            std::thread::sleep(Duration::from_millis(2));
                        }
                    }
                });
            }
            if kill {
                std::thread::sleep(Duration::from_micros(rng.random_range(0..10_000)));
                if zeros_when_closed {
                    let mut disk = bench.disk.lock().unwrap();
                    (disk.closed, disk.cached) = (true, rng.random_range(0..20));
                    drop(disk);
                    std::thread::sleep(Duration::from_micros(rng.random_range(0..10_000)));
                }
                server.take().expect("there is one").kill();
                bench.told(|e| matches!(e, DataEvent::ServerLost(_)));
                server = Some(bench.server());
            }
        });
    }
    let stats = bench.path.stats();
    assert_eq!((stats.errors, stats.zero_reads_checked > 0), (0, zeros_when_closed));
    server.expect("there is one").kill();
}

/// A read that is given up in the middle of its reply: what came of it goes to nobody, least of all to the next one.
#[test]
fn the_rest_of_a_large_read_that_was_given_up_is_dropped() {
    for zeros_when_closed in [false, true] {
        let disk = Disk { volatile: vec![1; SIZE], durable: vec![1; SIZE], size: SIZE, ..Disk::default() };
        let (dir, disk) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(disk)));
        let bench = Bench::of(dir, disk, zeros_when_closed, Some(Duration::from_secs(1)));
        {
            let mut disk = bench.disk.lock().unwrap();
            disk.in_pieces = true;
            disk.volatile[8 * MIB..].fill(2);
        }
        let server = bench.server();
        let mut kernels = bench.sockets(1, false);
        let kernel = &mut kernels[0];
        for sent in [5000, 500_000, MIB - 700] {
            bench.disk.lock().unwrap().stop_after = Some(sent);
            let given_up = kernel.ask(Command::Read, 0, MIB, &[]).map(|data| data.len());
            assert_eq!(given_up, Err(libc::EIO as u32), "after {sent} bytes");
            server.stop(false);
            for (offset, byte) in [(8 * MIB, 2), (0, 1)] {
                let data = kernel.ask(Command::Read, offset, MIB, &[]).unwrap();
                assert!(data == [byte; MIB], "after {sent} bytes, then {offset}");
            }
        }
        server.kill();
    }
}

/// Whoever resizes a device keeps others from changing it, from detaching it above all.
#[test]
fn a_resize_does_not_wait_for_a_replay() {
    let bench = Bench::new();
    let server = bench.server();
    let kernel = &mut bench.sockets(1, false)[0];
    kernel.ask(Command::Write, 0, BLOCK, &[1; BLOCK]).unwrap();
    server.kill();
    bench.told(|e| matches!(e, DataEvent::ServerLost(_)));
    let server = Server::start(bench.dir.path(), &bench.disk);
    server.stop(true);
    let (path, other) = (Arc::clone(&bench.path), Arc::clone(&bench.path));
    let replay = std::thread::spawn(move || path.server_up());
    wait_until("the replay is under way", Duration::from_secs(30), || {
        bench.path.stats().replayed_entries > 0
    });
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(other.resize().map_err(|e| e.kind())));
    let resized = told.recv_timeout(Duration::from_secs(1));
    server.stop(false);
    replay.join().unwrap().unwrap();
    assert_eq!(resized, Ok(Err(Kind::Busy)));
    assert_eq!(bench.path.resize().unwrap(), SIZE as u64);
    server.kill();
}

#[test]
fn a_connection_that_ends_as_soon_as_it_is_made_is_a_lost_server_and_no_hang() {
    let bench = Bench::new();
    let server = bench.server();
    let kernel = &mut bench.sockets(1, false)[0];
    for block in 0..8 {
        kernel.ask(Command::Write, block * BLOCK, BLOCK, &[1; BLOCK]).unwrap();
    }
    server.kill();
    for round in 0..100 {
        let server = Server::start(bench.dir.path(), &bench.disk);
        // Another one of the four each time.
        bench.disk.lock().unwrap().hang_up_after = Some(round % 4);
        let (path, (tell, told)) = (Arc::clone(&bench.path), mpsc::channel());
        std::thread::spawn(move || tell.send(path.server_up()));
        let up = told.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("round {round} hangs"));
        assert_eq!(up.unwrap_err().kind(), Kind::Unreachable, "round {round}");
        server.kill();
    }
    let server = bench.server();
    assert!(kernel.ask(Command::Read, 0, 8 * BLOCK, &[]).unwrap() == [1; 8 * BLOCK]);
    server.kill();
}

#[test]
fn while_the_server_is_away_requests_wait_and_are_done_when_it_is_back() {
    let bench = Bench::new();
    let server = bench.server();
    let mut kernels = bench.sockets(4, false);
    kernels[0].ask(Command::Write, 0, 4096, &[1; 4096]).unwrap();
    server.kill();
    bench.told(|e| matches!(e, DataEvent::ServerLost(_)));
    for (i, kernel) in kernels.iter_mut().enumerate() {
        kernel.send(Command::Write, 0, (i + 1) * MIB, 4096, &[2; 4096]);
    }
    kernels[0].stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let began = Instant::now();
    assert_eq!(kernels[0].stream.read(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(began.elapsed() >= Duration::from_millis(200));
    kernels[0].stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let server = bench.server();
    for kernel in &mut kernels {
        assert_eq!(kernel.reply().1, Ok(Vec::new()));
    }
    assert!(kernels[3].ask(Command::Read, 0, 4096, &[]).unwrap() == [1; 4096], "it was forgotten");
    // A new owner: everything fails, at once and for good.
    bench.path.fail("another node has it");
    assert_eq!(kernels[1].ask(Command::Read, 0, 4096, &[]), Err(libc::EIO as u32));
    assert_eq!(kernels[1].ask(Command::Write, 0, 512, &[1; 512]), Err(libc::EIO as u32));
    server.kill();
}
