//! Watching a ZeroFS that runs: what it writes to its log, and whether it still answers.
//!
//! ZeroFS lives on, and answers with zeros or with lies, after faults that end its database. It does say so in its
//! log, so each line is judged by the [`Profile`] of its version as soon as it is written; and it is
//! asked now and then. Silence alone condemns nobody: a server that waits for a slow store is harmless.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::causes::is_chatter;
use super::lock;
use super::path::Prober;
use crate::error::{Doing, Result};
use crate::zerofs::ninep::{Ninep, database_open_within};
use crate::zerofs::versions::{Profile, READ_ERRORS_ARE_ZEROS, Sign};

/// A ZeroFS log larger than that is rotated, in bytes.
pub(crate) const LOG_LIMIT: u64 = 8 << 20;

/// Blocks that are reserved beyond the end of a ZeroFS log, in bytes; renewed when half of them are used. A storm of
/// 500-byte lines needs a second or more for them, and each line wakes us.
const ROOM: u64 = 1 << 20;

/// How many rotated logs are kept beside the current one.
pub(crate) const LOGS_KEPT: usize = 2;

/// How long the 9P server may take for one answer to a probe.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// A line of the log, and what it gives away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub sign: Sign,
    pub line: String,
}

/// What the watchdog tells the supervisor, with the number of the server's start that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Alarm {
    /// A line of its log.
    Log(u64, Finding),
    /// The database is closed, says 9P.
    Closed(u64),
    /// It has not answered for that long.
    Silent(u64, Duration),
    /// It answers again.
    Answers(u64),
    /// Its log has no room left, so its faults would not be seen any more.
    Unseen(u64, String),
}

/// A connection to the 9P server, held while it is asked. A question may take long, so whoever must not wait puts a new one
/// of these in its place, and leaves the old one to whoever is still asking.
type Client = Mutex<Option<Ninep<UnixStream>>>;

/// The eyes of the supervisor; shared with the data path as its [`Prober`].
pub(crate) struct Watch {
    run_dir: PathBuf,
    tail: Mutex<Tail>,
    /// Tells when the file of the tail is written to, once it is followed.
    inotify: OnceLock<Inotify>,
    client: Mutex<Arc<Client>>,
    tell: Box<dyn Fn(Alarm) + Send + Sync>,
    over: Mutex<bool>,
    ended: Condvar,
    /// Set while the server is up, so that the probe has something to ask.
    watching: AtomicBool,
}

impl Watch {
    /// Watches the log file `log` (made when missing) of the server with this run folder. Names in `quiet` (the
    /// volume's id) are taken out of lines before they are compared, for a volume may be called anything.
    pub fn new(
        run_dir: &Path,
        log: &Path,
        profile: Profile,
        quiet: &str,
        tell: Box<dyn Fn(Alarm) + Send + Sync>,
    ) -> Result<Watch> {
        Ok(Watch {
            run_dir: run_dir.to_owned(),
            tail: Mutex::new(Tail::open(log, profile, quiet)?),
            inotify: OnceLock::new(),
            client: Mutex::default(),
            tell,
            over: Mutex::new(false),
            ended: Condvar::new(),
            watching: AtomicBool::new(false),
        })
    }

    /// A new server is about to be started: rotates the log if it is large, and tells where in it the server's own lines
    /// begin. It must be able to say what is wrong with it: no room for that is an error.
    ///
    /// With `adopted`, one that runs: the file that it writes to, and where in it its lines begin.
    pub fn begin(&self, generation: u64, adopted: Option<(&Path, u64)>) -> Result<u64> {
        self.forget_client();
        let mut tail = lock(&self.tail);
        tail.generation = generation;
        let log = adopted.map(|(log, _)| log).filter(|log| log.is_file()).unwrap_or(&tail.path).to_owned();
        tail.reopen(&log)?;
        if let Some(inotify) = self.inotify.get() {
            tail.watch_with(inotify)?;
        }
        tail.begin(adopted.map(|(_, from)| from));
        let reserved = if adopted.is_none() { tail.reserve_room() } else { Ok(()) };
        reserved.doing("reserve room for", &tail.path)?;
        Ok(tail.begin)
    }

    /// The log file, for the server to append to: the very one that is read here, whatever its name is by now.
    pub fn log_for_appending(&self) -> Result<File> {
        // Opened anew, since a copy of the descriptor would move the place from which a rotation reads.
        open_log(&by_descriptor(&lock(&self.tail).file))
    }

    /// Starts or ends the regular question whether the database is open. One that is under way is not waited for.
    pub fn probe_regularly(&self, on: bool) {
        self.watching.store(on, Ordering::Relaxed);
        if !on {
            self.forget_client();
        }
    }

    fn forget_client(&self) {
        *lock(&self.client) = Arc::default();
    }

    /// Reads the log up to its end and reports what it says.
    pub fn drain(&self) {
        let mut tail = lock(&self.tail);
        let generation = tail.generation;
        for finding in tail.drain() {
            (self.tell)(Alarm::Log(generation, finding));
        }
        if let Err(e) = tail.reserve_room() {
            (self.tell)(Alarm::Unseen(generation, format!("no room for {}: {e}", tail.path.display())));
        }
    }

    /// The line by which the server, since its start, admitted to have been fenced. Reads the log first.
    pub fn fenced(&self) -> Option<String> {
        self.drain();
        lock(&self.tail).fenced.clone()
    }

    /// What the server has written since its start, at most the last 64 KiB.
    pub fn output(&self) -> String {
        lock(&self.tail).output()
    }

    /// Reads the log whenever it is written to, for ever.
    pub fn follow(&self) -> Result<()> {
        let inotify = {
            let tail = lock(&self.tail);
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC).doing("watch", &tail.path)?;
            let inotify = self.inotify.get_or_init(|| inotify);
            tail.watch_with(inotify)?;
            inotify
        };
        loop {
            self.drain();
            if *lock(&self.over) {
                return Ok(());
            }
            match inotify.read_events() {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e).doing("watch", &lock(&self.tail).path),
            }
        }
    }

    /// Asks whether the database is open: each second while the volume is `busy`, else every fifth. For ever.
    pub fn probe(&self, mut busy: impl FnMut() -> bool) {
        let mut silent_since: Option<Instant> = None;
        let mut last = 0;
        for round in 0u64.. {
            let over = lock(&self.over);
            let (over, _) = self
                .ended
                .wait_timeout_while(over, Duration::from_secs(1), |over| !*over)
                .unwrap_or_else(PoisonError::into_inner);
            if *over {
                return;
            }
            drop(over);
            let generation = lock(&self.tail).generation;
            if generation != last {
                (silent_since, last) = (None, generation);
            }
            let due = busy() || silent_since.is_some() || round % 5 == 0;
            if !due || !self.watching.load(Ordering::Relaxed) {
                continue;
            }
            let asked = Instant::now();
            let sign = match self.database_open() {
                Ok(true) => silent_since.take().map(|_| Alarm::Answers(generation)),
                Ok(false) => Some(Alarm::Closed(generation)),
                Err(_) => {
                    let since = *silent_since.get_or_insert(asked);
                    Some(Alarm::Silent(generation, since.elapsed()))
                }
            };
            // A server that was given up meanwhile is nobody's concern any more.
            if let Some(sign) = sign.filter(|_| self.watching.load(Ordering::Relaxed)) {
                (self.tell)(sign);
            }
        }
    }

    /// Lets [`Watch::probe`] and, at the next line of the log, [`Watch::follow`] return.
    pub fn end(&self) {
        *lock(&self.over) = true;
        self.ended.notify_all();
        lock(&self.tail).give_room_back();
    }
}

impl Prober for Watch {
    fn database_open(&self) -> Result<bool> {
        let shared = Arc::clone(&*lock(&self.client));
        let mut ninep = lock(&shared);
        let client = match ninep.as_mut() {
            Some(client) => client,
            None => match Ninep::open(&self.run_dir, PROBE_LIMIT) {
                Ok(client) => ninep.insert(client),
                // A closed database may refuse even this; the one-shot question knows that answer.
                Err(_) => return database_open_within(&self.run_dir, PROBE_LIMIT),
            },
        };
        let answer = client.database_open();
        if answer.is_err() {
            // Whatever is on its way on this connection belongs to no later question.
            *ninep = None;
        }
        answer
    }

    fn flush_was_honest(&self, since: Instant) -> bool {
        // ZeroFS writes the line before it answers the flush, so it is in the file by now.
        self.drain();
        lock(&self.tail).last_lie.is_none_or(|lie| lie < since)
    }

    fn store_trouble(&self) -> Option<Instant> {
        self.drain();
        let tail = lock(&self.tail);
        tail.last_trouble.filter(|_| tail.profile.has_fault(READ_ERRORS_ARE_ZEROS))
    }
}

/// The log file, and how far it has been read.
struct Tail {
    path: PathBuf,
    file: File,
    profile: Profile,
    quiet: String,
    generation: u64,
    /// Everything before it has been compared.
    position: u64,
    /// Where the running server's lines begin.
    begin: u64,
    /// The log has blocks up to here, whatever its length is.
    room: u64,
    /// The start of a line whose end has not been written yet.
    partial: Vec<u8>,
    fenced: Option<String>,
    last_lie: Option<Instant>,
    last_trouble: Option<Instant>,
}

fn open_log(path: &Path) -> Result<File> {
    // 0600: the log of a ZeroFS that cannot read its config quotes lines of it.
    File::options().read(true).append(true).create(true).mode(0o600).open(path).doing("open", path)
}

/// A name of the file, also when it was renamed or removed.
fn by_descriptor(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

impl Tail {
    fn open(path: &Path, profile: Profile, quiet: &str) -> Result<Tail> {
        let file = open_log(path)?;
        let position = file.metadata().doing("read", path)?.len();
        Ok(Tail {
            path: path.to_owned(),
            file,
            profile,
            quiet: quiet.to_owned(),
            generation: 0,
            position,
            begin: position,
            room: 0,
            partial: Vec::new(),
            fenced: None,
            last_lie: None,
            last_trouble: None,
        })
    }

    /// Goes over to the file that has this name now. Whoever rotates logs may have put it in the place of ours.
    fn reopen(&mut self, path: &Path) -> Result<()> {
        let file = open_log(path)?;
        let id = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).doing("read", path);
        if id(&file)? != id(&self.file)? {
            self.give_room_back();
            (self.file, self.room) = (file, 0);
        }
        Ok(())
    }

    fn watch_with(&self, inotify: &Inotify) -> Result<()> {
        let added = inotify.add_watch(&by_descriptor(&self.file), AddWatchFlags::IN_MODIFY);
        added.map(drop).doing("watch", &self.path)
    }

    fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.size())
    }

    fn begin(&mut self, from: Option<u64>) {
        let len = self.len();
        self.begin = match from {
            // A rotation has moved what was before.
            Some(from) if from > len => 0,
            Some(from) => from,
            None if len > LOG_LIMIT && self.rotate().is_ok() => {
                self.emptied();
                0
            }
            None => len,
        };
        self.position = self.begin;
        self.partial.clear();
        self.fenced = None;
    }

    /// Judges everything new.
    fn drain(&mut self) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut buffer = [0; 8192];
        if self.len() < self.position {
            // Somebody truncated it, and the blocks went with its end.
            self.emptied();
            self.partial.clear();
        }
        loop {
            match self.file.read_at(&mut buffer, self.position) {
                Ok(0) => break,
                Ok(n) => {
                    self.position += n as u64;
                    self.compare(&buffer[..n], &mut found);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    tracing::warn!("cannot read {}: {e}", self.path.display());
                    break;
                }
            }
        }
        if self.position > LOG_LIMIT && self.position == self.len() {
            match self.rotate() {
                Ok(()) => self.emptied(),
                Err(e) => tracing::warn!("cannot rotate {}: {e}", self.path.display()),
            }
        }
        found
    }

    /// A line that a full disk refuses is one that nobody judges, and ZeroFS panics over it. So the blocks are there
    /// before the lines, and older logs make way for them.
    fn reserve_room(&mut self) -> io::Result<()> {
        let len = self.len();
        if self.room.saturating_sub(len) >= ROOM / 2 {
            return Ok(());
        }
        let mut reserved = self.allocate(len);
        if matches!(&reserved, Err(e) if is_full(e)) {
            for n in 1..=LOGS_KEPT {
                let _ = std::fs::remove_file(numbered(&self.path, n));
            }
            reserved = self.allocate(len);
        }
        if matches!(&reserved, Err(e) if is_full(e)) && len > 0 && self.position == len {
            tracing::warn!("the disk is full: {} is emptied", self.path.display());
            self.file.set_len(0)?;
            self.emptied();
            reserved = self.allocate(0);
        }
        reserved
    }

    fn allocate(&mut self, len: u64) -> io::Result<()> {
        let beyond_the_end = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.room = match fallocate(&self.file, beyond_the_end, len as i64, ROOM as i64) {
            Ok(()) => len + ROOM,
            // A filesystem that cannot promise blocks: nothing is won by asking it again.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => u64::MAX,
            Err(e) => return Err(e.into()),
        };
        Ok(())
    }

    /// The log begins anew, and has no blocks yet.
    fn emptied(&mut self) {
        (self.position, self.begin, self.room) = (0, 0, 0);
    }

    /// Nobody writes to it any more.
    fn give_room_back(&mut self) {
        // Blocks beyond the end go with any truncation, even one to the length that it has. That wakes whoever follows the
        // log, and none shall be reserved then.
        self.room = u64::MAX;
        let _ = self.file.set_len(self.len());
    }

    fn compare(&mut self, mut bytes: &[u8], found: &mut Vec<Finding>) {
        /// A line longer than that is compared in pieces.
        const LONGEST: usize = 64 * 1024;
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            self.partial.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.partial);
            found.extend(self.judge(&line));
        }
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > LONGEST {
            let line = std::mem::take(&mut self.partial);
            found.extend(self.judge(&line));
        }
    }

    fn judge(&mut self, line: &[u8]) -> Option<Finding> {
        let line = String::from_utf8_lossy(line);
        let text = line.replace(&self.quiet, "");
        let sign = self.profile.sign(&text)?;
        // Retries are reported at level INFO; a fault never is, so a path or a setting that happens to hold
        // one of its words does no harm.
        if is_chatter(&line) && !matches!(sign, Sign::StoreTrouble | Sign::StoreGivingUp) {
            return None;
        }
        let line = super::causes::shorten(&line);
        match sign {
            Sign::Fenced => drop(self.fenced.get_or_insert_with(|| line.clone())),
            Sign::FlushLied => self.last_lie = Some(Instant::now()),
            Sign::StoreTrouble | Sign::StoreGivingUp => self.last_trouble = Some(Instant::now()),
            Sign::Closed => {}
        }
        Some(Finding { sign, line })
    }

    fn output(&self) -> String {
        let len = self.len();
        let from = self.begin.max(len.saturating_sub(64 * 1024));
        let mut bytes = vec![0; (len.saturating_sub(from)) as usize];
        let read = self.file.read_at(&mut bytes, from).unwrap_or(0);
        bytes.truncate(read);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Copies the log to `<log>.1` (what is there moves to `.2`, and so on) and empties it. A running server
    /// appends, so it goes on at the new end; what it writes between the last read and the emptying is lost.
    fn rotate(&mut self) -> io::Result<()> {
        make_room(&self.path)?;
        let mut source = self.file.try_clone()?;
        source.seek(SeekFrom::Start(0))?;
        let old = numbered(&self.path, 1);
        let mut copy = File::options().write(true).create_new(true).mode(0o600).open(&old)?;
        if let Err(e) = io::copy(&mut Read::by_ref(&mut source), &mut copy) {
            std::fs::remove_file(&old)?;
            return Err(e);
        }
        self.file.set_len(0)
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

pub(crate) fn numbered(path: &Path, n: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

/// Moves `<log>.1` to `<log>.2` and so on, and removes the oldest.
pub(crate) fn make_room(log: &Path) -> io::Result<()> {
    let missing_is_fine = |r: io::Result<()>| match r {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    missing_is_fine(std::fs::remove_file(numbered(log, LOGS_KEPT)))?;
    for n in (1..LOGS_KEPT).rev() {
        missing_is_fine(std::fs::rename(numbered(log, n), numbered(log, n + 1)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn watch(dir: &Path) -> (Watch, File, Receiver<Alarm>) {
        let (tx, rx) = channel();
        let watch = Watch::new(
            dir,
            &dir.join("zerofs.log"),
            Profile::of("0.19.1".parse().unwrap()).unwrap(),
            "my-Fenced-volume",
            Box::new(move |s| drop(tx.send(s))),
        )
        .unwrap();
        let log = watch.log_for_appending().unwrap();
        watch.begin(1, None).unwrap();
        (watch, log, rx)
    }

    #[test]
    fn lines_are_judged_by_level_and_text_even_in_pieces() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, mut log, signs) = watch(dir.path());
        for piece in [
            "2026-11-20T17:59:02.3Z  INFO a: path=/Fenced/x\n",
            "2026-11-20T17:59:02.3Z ERROR a: cannot write s3://b/my-Fenced-volume\n",
            "2026-11-20T17:59:02.3Z ERROR a: background ta",
        ] {
            log.write_all(piece.as_bytes()).unwrap();
            watch.drain();
        }
        assert!(signs.try_recv().is_err(), "nothing of that is bad news");
        log.write_all(b"sk failed [x]\nthread panicked: Fenced\n").unwrap();
        assert!(watch.fenced().unwrap().contains("panicked"));
        let all: Vec<Alarm> = signs.try_iter().collect();
        assert!(
            matches!(
                &all[..],
                [
                    Alarm::Log(1, Finding { sign: Sign::Closed, .. }),
                    Alarm::Log(1, Finding { sign: Sign::Fenced, .. })
                ]
            ),
            "{all:?}"
        );
        watch.begin(2, None).unwrap();
        assert_eq!(watch.fenced(), None, "another server, another judgement");
    }

    #[test]
    fn a_flush_is_honest_unless_the_log_says_otherwise_since_it_was_sent() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, mut log, _signs) = watch(dir.path());
        let before = Instant::now();
        assert!(watch.flush_was_honest(before));
        log.write_all(b"2026-11-20T17:59:02.3Z  WARN a: won't flush imm to l0\n").unwrap();
        assert!(!watch.flush_was_honest(before));
        assert!(watch.flush_was_honest(Instant::now()));
    }

    #[test]
    fn trouble_with_the_store_is_known_as_soon_as_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, mut log, _signs) = watch(dir.path());
        assert_eq!(watch.store_trouble(), None);
        let before = Instant::now();
        log.write_all(
            b"2026-11-20T17:59:02.3Z  INFO o: error, backing off for 0.1 seconds, retry 1 of 10: x\n",
        )
        .unwrap();
        assert!(watch.store_trouble().is_some_and(|at| at >= before));
    }

    #[test]
    fn a_large_log_is_rotated_and_nothing_in_it_is_missed() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, mut log, signs) = watch(dir.path());
        let line = format!("2026-11-20T17:59:02.3Z  INFO a: {}\n", "x".repeat(1000));
        for _ in 0..3 {
            while log.metadata().unwrap().len() <= LOG_LIMIT {
                log.write_all(line.as_bytes()).unwrap();
            }
            log.write_all(b"ERROR background task failed\n").unwrap();
            watch.drain();
            assert_eq!(log.metadata().unwrap().len(), 0);
            assert!(matches!(signs.try_recv(), Ok(Alarm::Log(1, Finding { sign: Sign::Closed, .. }))));
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["zerofs.log", "zerofs.log.1", "zerofs.log.2"]);
        log.write_all(b"background task failed\n").unwrap();
        watch.drain();
        assert!(matches!(signs.try_recv(), Ok(Alarm::Log(1, Finding { sign: Sign::Closed, .. }))));
        assert!(watch.output().starts_with("background"));
    }

    #[test]
    fn an_adopted_servers_log_is_read_from_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, mut log, signs) = watch(dir.path());
        log.write_all(b"old\n").unwrap();
        let from = watch.begin(2, None).unwrap();
        log.write_all(b"Fenced\n").unwrap();
        let path = dir.path().join("zerofs.log");
        watch.begin(3, Some((&path, from))).unwrap();
        watch.drain();
        assert!(matches!(signs.try_recv(), Ok(Alarm::Log(3, Finding { sign: Sign::Fenced, .. }))));
        // A record from before a rotation points behind the end: then everything is read.
        watch.begin(4, Some((&path, 1 << 30))).unwrap();
        watch.drain();
        assert!(matches!(signs.try_recv(), Ok(Alarm::Log(4, Finding { sign: Sign::Fenced, .. }))));
        // Whatever name the file has by now that it writes to.
        std::fs::remove_file(&path).unwrap();
        watch.begin(5, None).unwrap();
        watch.begin(6, Some((&by_descriptor(&log), from))).unwrap();
        watch.drain();
        assert!(matches!(signs.try_recv(), Ok(Alarm::Log(6, Finding { sign: Sign::Fenced, .. }))));
        watch.begin(7, Some((&dir.path().join("gone"), 0))).unwrap();
        log.write_all(b"Fenced\n").unwrap();
        watch.drain();
        assert!(signs.try_recv().is_err(), "it is another's");
    }

    /// Whoever rotates logs has put another file in the place of ours, or none.
    #[test]
    fn a_log_that_was_renamed_or_removed_hides_nothing_of_the_next_server() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, _first, signs) = watch(dir.path());
        let watch = Arc::new(watch);
        let follower = Arc::clone(&watch);
        std::thread::spawn(move || follower.follow().unwrap());
        let path = dir.path().join("zerofs.log");
        for (generation, removes) in [(2, false), (3, true)] {
            if removes {
                std::fs::remove_file(&path).unwrap();
            } else {
                std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
            }
            let before = Instant::now();
            watch.begin(generation, None).unwrap();
            let mut log = watch.log_for_appending().unwrap();
            log.write_all(b"2026-11-20T17:59:02.3Z  WARN a: won't flush imm to l0\n").unwrap();
            let alarm = signs.recv_timeout(Duration::from_secs(10));
            let lied = |f: &Finding| f.sign == Sign::FlushLied;
            assert!(matches!(&alarm, Ok(Alarm::Log(g, f)) if *g == generation && lied(f)), "{alarm:?}");
            assert!(!watch.flush_was_honest(before));
            assert!(path.exists(), "people look for it there");
        }
    }

    #[test]
    fn a_question_that_waits_for_its_answer_holds_nobody_else_up() {
        let dir = tempfile::tempdir().unwrap();
        let (watch, _log, _signs) = watch(dir.path());
        let silent = UnixListener::bind(dir.path().join("9p.sock")).unwrap();
        std::thread::scope(|scope| {
            let question = scope.spawn(|| watch.database_open());
            let asked = silent.accept().unwrap();
            let begun = Instant::now();
            watch.probe_regularly(false);
            watch.begin(2, None).unwrap();
            let took = begun.elapsed();
            assert!(!question.is_finished());
            drop((asked, silent));
            assert!(question.join().unwrap().is_err());
            assert!(took < Duration::from_secs(1), "{took:?}");
        });
    }

    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }

    #[test]
    fn root_a_full_disk_hides_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        let none = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("test"), dir.path(), Some("tmpfs"), none, Some("size=4m")).unwrap();
        let _mounted = Mounted(dir.path());
        let (watch, mut log, signs) = watch(dir.path());
        let filler = dir.path().join("filler");
        let fill = || {
            let mut file = File::options().append(true).create(true).open(&filler).unwrap();
            while file.write_all(&[1; 4096]).is_ok() {}
        };
        fill();
        let line = format!("2026-11-20T17:59:02.3Z  INFO a: {}\n", "x".repeat(1000));
        // Three times what is reserved, and what is taken by others whenever the log gives some back.
        for n in 0..3 * ROOM as usize / line.len() {
            log.write_all(line.as_bytes()).unwrap_or_else(|e| panic!("line {n}: {e}"));
            watch.drain();
            if n % 64 == 0 {
                fill();
            }
        }
        assert_eq!(signs.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
        log.write_all(b"ERROR background task failed\n").unwrap();
        watch.drain();
        assert!(matches!(signs.try_recv(), Ok(Alarm::Log(1, Finding { sign: Sign::Closed, .. }))));

        // Not even that much is left: nothing is started, and nothing goes on, that could not say what is wrong. Whoever
        // truncates a log takes its blocks, too.
        log.set_len(0).unwrap();
        fill();
        watch.drain();
        assert!(matches!(signs.try_recv(), Ok(Alarm::Unseen(1, why)) if why.contains("No space left")));
        let error = watch.begin(2, None).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Environment);
        std::fs::remove_file(&filler).unwrap();
        watch.begin(3, None).unwrap();
        assert!(log.metadata().unwrap().blocks() * 512 >= ROOM);
        watch.end();
        watch.drain();
        assert_eq!(
            log.metadata().unwrap().blocks(),
            0,
            "what was reserved is given back in the end, and stays so"
        );
    }
}
