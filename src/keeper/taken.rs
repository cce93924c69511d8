//! The requests that the keeper has taken from the kernel and not answered yet, in a file that outlives it.
//!
//! The kernel sends what a dead keeper had taken to the next one, but only when it looks for late requests, up to 1.8 s
//! after that. So the next keeper answers what it can before the kernel has its new socket: a write that was
//! whole in the replay log, once the log is replayed; a read or a flush, by doing it again. The kernel knows a request
//! by its cookie, also on the socket that comes in the place of the one that it was sent on.
//!
//! It is for speed alone: what is not in here, or cannot be answered at once, the kernel sends again. So a slot may be
//! overwritten, and none is written twice for the sake of a kill in between. These things do matter:
//!
//! - A slot is emptied before its reply goes out. A reply that the kernel has had already would cost the new socket.
//! - A write is done only if the log that is replayed had it. So the slot says which entry it is, and the file says of
//!   which log; the entry is named after it is whole.
//! - A cookie names a request of one connection only. So the file says of which, and a keeper that does not know of this
//!   file names another one in the device's record.
//! - It does so for sure only where a place in the queue stays with its request until the end, which an I/O scheduler
//!   changes: whoever hands the socket over looks after that.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};

use super::log::{Kind, ReplayLog, new_file};
use crate::error::{Doing, Result};
use crate::zerofs::nbd::Command;

/// The name of the file in the run folder.
pub(crate) const FILE_NAME: &str = "taken";
const MAGIC: u64 = u64::from_le_bytes(*b"zfsctlT1");
/// More than the requests that the kernel has in flight on one socket.
const SLOTS: u32 = 512;
const LEN: usize = size_of::<Head>() + SLOTS as usize * size_of::<Slot>();

#[repr(C)]
struct Head {
    magic: AtomicU64,
    /// The log that the entries are of.
    log: AtomicU64,
    /// The connection that the requests came on; 0 as long as nobody has said so.
    connection: AtomicU64,
}

#[repr(C)]
struct Slot {
    /// 0: empty. Stored last.
    cookie: AtomicU64,
    offset: AtomicU64,
    /// The log entry of a write; 0: none.
    seq: AtomicU64,
    len: AtomicU32,
    command: AtomicU32,
}

/// What is owed to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owed {
    pub(super) cookie: u64,
    pub(super) what: Task,
}

/// What must have been done before it can be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// The log, which had this entry, is replayed.
    Replay {
        seq: u64,
    },
    Read {
        offset: u64,
        len: u32,
    },
    Flush,
}

/// The file, mapped.
pub(super) struct Taken(MmapRaw);

impl Taken {
    /// A new file without any request, for the entries of `log`.
    pub(super) fn create(dir: &Path, log: u64) -> Result<Taken> {
        let path = dir.join(FILE_NAME);
        // Never the file that somebody may still have mapped.
        let file = new_file(&path, "create")?;
        // Reserved, so that no store to it is a SIGBUS on a full disk.
        fallocate(&file, FallocateFlags::empty(), 0, LEN as i64)
            .map_err(io::Error::from)
            .doing("reserve room for", &path)?;
        let taken = Taken(MmapOptions::new().len(LEN).map_raw(&file).doing("map", &path)?);
        taken.head().log.store(log, Ordering::Relaxed);
        taken.head().magic.store(MAGIC, Ordering::Release);
        Ok(taken)
    }

    /// The file of an earlier keeper; none if there is none, or it is about another log.
    pub(super) fn open(dir: &Path, log: u64) -> Option<Taken> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(dir.join(FILE_NAME))
            .ok()?;
        if file.metadata().ok()?.len() != LEN as u64 {
            return None;
        }
        let taken = Taken(MmapOptions::new().len(LEN).map_raw(&file).ok()?);
        let head = taken.head();
        (head.magic.load(Ordering::Acquire) == MAGIC && head.log.load(Ordering::Relaxed) == log)
            .then_some(taken)
    }

    fn head(&self) -> &Head {
        // SAFETY: the mapping is longer than that and page-aligned, and consists of atomics, for which every value is valid.
        unsafe { &*self.0.as_ptr().cast() }
    }

    fn slots(&self) -> &[Slot] {
        // SAFETY: as above; LEN says how many there are.
        unsafe {
            let first = self.0.as_ptr().add(size_of::<Head>()).cast();
            std::slice::from_raw_parts(first, SLOTS as usize)
        }
    }

    /// Says which connection its requests come on from now on.
    pub(super) fn name_connection(&self, connection: u64) {
        self.head().connection.store(connection, Ordering::Release);
    }

    /// Whether its requests came on this connection.
    pub(super) fn is_of(&self, connection: u64) -> bool {
        self.head().connection.load(Ordering::Acquire) == connection
    }

    /// The slot of a request. One half of the kernel's cookie is the number of a place in its queue, the other one
    /// counts the requests there; until Linux 6.5 the bytes came in the order of the machine.
    fn slot(&self, cookie: u64) -> Option<&Slot> {
        let (high, low) = ((cookie >> 32) as u32, cookie as u32);
        let (place, uses) = if low < SLOTS { (low, high) } else { (high.swap_bytes(), low) };
        (place < SLOTS && uses != 0).then(|| &self.slots()[place as usize])
    }

    /// A request was taken.
    pub(super) fn take(&self, cookie: u64, command: Command, offset: u64, len: u32) {
        let Some(slot) = self.slot(cookie) else { return };
        // In this order, wherever a kill comes: nobody finds the cookie of one request beside the rest of another.
        slot.cookie.store(0, Ordering::Relaxed);
        slot.offset.store(offset, Ordering::Release);
        slot.seq.store(0, Ordering::Release);
        slot.len.store(len, Ordering::Release);
        slot.command.store(command as u32, Ordering::Release);
        slot.cookie.store(cookie, Ordering::Release);
    }

    /// A write that was taken is whole in the log.
    pub(super) fn logged(&self, cookie: u64, seq: u64) {
        if let Some(slot) = self.slot(cookie)
            && slot.cookie.load(Ordering::Relaxed) == cookie
        {
            slot.seq.store(seq, Ordering::Release);
        }
    }

    /// Its reply is about to go out, or never will.
    pub(super) fn answered(&self, cookie: u64) {
        if let Some(slot) = self.slot(cookie) {
            // The slot may be another one's already.
            let _ = slot.cookie.compare_exchange(cookie, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Forgets all requests.
    pub(super) fn clear(&self) {
        self.slots().iter().for_each(|slot| slot.cookie.store(0, Ordering::Relaxed));
    }

    /// What an earlier keeper took and can still be answered; the rest is forgotten. `log` is as it was found.
    pub(super) fn owed(&self, log: &ReplayLog) -> Vec<Owed> {
        let task = |slot: &Slot| {
            let (offset, len) = (slot.offset.load(Ordering::Relaxed), slot.len.load(Ordering::Relaxed));
            let command = slot.command.load(Ordering::Relaxed);
            if command == Command::Read as u32 {
                Some(Task::Read { offset, len })
            } else if command == Command::Flush as u32 {
                Some(Task::Flush)
            } else if command == Command::Write as u32 {
                let seq = slot.seq.load(Ordering::Relaxed);
                let entry = log.entry(seq)?;
                let is_it = entry.kind == Kind::Write && (entry.offset, entry.len) == (offset, len.into());
                (is_it && entry.is_live()).then_some(Task::Replay { seq })
            } else {
                None
            }
        };
        self.slots()
            .iter()
            .filter_map(|slot| {
                let cookie = slot.cookie.load(Ordering::Acquire);
                let what = (cookie != 0).then(|| task(slot)).flatten();
                if what.is_none() {
                    slot.cookie.store(0, Ordering::Relaxed);
                }
                Some(Owed { cookie, what: what? })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::log::{Identity, MIN_CAPACITY, Opened};

    fn log(dir: &Path) -> ReplayLog {
        let who = Identity { volume: "v".parse().unwrap(), epoch: 1, boot: "b".into() };
        match ReplayLog::open(dir, &who, MIN_CAPACITY).unwrap() {
            Opened::Log(log) => log,
            Opened::Foreign { why } => panic!("{why}"),
        }
    }

    const fn cookie(uses: u64, place: u64) -> u64 {
        uses << 32 | place
    }

    #[test]
    fn the_next_keeper_finds_what_was_taken_and_not_answered() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = log(dir.path());
        let taken = Taken::create(dir.path(), first.id()).unwrap();
        let (read, flush, write) = (cookie(1, 0), cookie(9, 127), cookie(3, 5));
        // As a kernel before 6.5 sends it.
        let old = cookie(7, 6).swap_bytes();
        taken.take(read, Command::Read, 4096, 512);
        taken.take(flush, Command::Flush, 0, 0);
        taken.take(write, Command::Write, 8192, 4);
        let seq = first.append(Kind::Write, 8192, 4, b"data").unwrap();
        taken.logged(write, seq);
        taken.name_connection(77);
        taken.take(old, Command::Read, 0, 1024);
        // Answered ones, one of them in a slot that has been used again; and a late answer to the use before.
        taken.take(cookie(1, 8), Command::Read, 0, 512);
        taken.answered(cookie(1, 8));
        taken.take(cookie(1, 9), Command::Read, 0, 512);
        taken.take(cookie(2, 9), Command::Flush, 0, 0);
        taken.answered(cookie(1, 9));
        taken.take(cookie(1, 10), Command::Trim, 0, 512);
        drop((taken, first));

        let log = log(dir.path());
        let taken = Taken::open(dir.path(), log.id()).unwrap();
        let owed = |taken: &Taken| taken.owed(&log).iter().map(|o| (o.cookie, o.what)).collect::<Vec<_>>();
        let all = vec![
            (read, Task::Read { offset: 4096, len: 512 }),
            (write, Task::Replay { seq }),
            (old, Task::Read { offset: 0, len: 1024 }),
            (cookie(2, 9), Task::Flush),
            (flush, Task::Flush),
        ];
        assert!(taken.is_of(77) && !taken.is_of(78));
        assert_eq!(owed(&taken), all);
        taken.answered(read);
        assert_eq!(owed(&taken), all[1..]);
        taken.clear();
        assert!(owed(&taken).is_empty());
    }

    #[test]
    fn a_write_is_owed_only_if_this_very_log_has_it_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path());
        let taken = Taken::create(dir.path(), log.id()).unwrap();
        let owed = |log: &ReplayLog, seq: Option<u64>, offset: u64| {
            taken.take(cookie(1, 1), Command::Write, offset, 4);
            if let Some(seq) = seq {
                taken.logged(cookie(1, 1), seq);
            }
            !taken.owed(log).is_empty()
        };
        assert!(!owed(&log, None, 0), "received, and not in the log yet");
        let other = log.append(Kind::Write, 0, 4, b"used").unwrap();
        assert!(!owed(&log, None, 0), "the entry of another write to the same place");
        log.void(other);
        assert!(!owed(&log, Some(other), 0), "an entry that is void is not replayed");
        let own = log.append(Kind::Write, 0, 4, b"mine").unwrap();
        assert!(owed(&log, Some(own), 0));
        assert!(!owed(&log, Some(own), 8), "another range");
        log.ack(own);
        log.release(log.mark());
        assert!(!owed(&log, Some(own), 0), "a flush has covered it: the kernel sends it again");
    }

    #[test]
    fn what_cannot_be_understood_is_left_to_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(dir.path());
        assert!(Taken::open(dir.path(), log.id()).is_none());
        let taken = Taken::create(dir.path(), log.id()).unwrap();
        // Too high a place, or a kernel that does not count the uses.
        for foreign in [cookie(1, SLOTS.into()), cookie(0, 3), 0, u64::MAX] {
            taken.take(foreign, Command::Flush, 0, 0);
            taken.answered(foreign);
        }
        assert_eq!(taken.owed(&log), []);
        taken.take(cookie(1, 3), Command::Flush, 0, 0);
        assert!(Taken::open(dir.path(), log.id() ^ 1).is_none(), "of another log");
        let path = dir.path().join(FILE_NAME);
        std::fs::write(&path, vec![0; LEN]).unwrap();
        assert!(Taken::open(dir.path(), log.id()).is_none(), "killed before it was made");
        std::fs::write(&path, b"zfsctlT1").unwrap();
        assert!(Taken::open(dir.path(), log.id()).is_none());
    }
}
