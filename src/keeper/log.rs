//! The replay log: every mutation that was sent to the server and is not yet known to be durable there.
//!
//! It is a ring in a file of the run folder, mapped shared. Promises, and how they are kept:
//!
//! - **It survives a SIGKILL of the keeper at any instruction.** The pages belong to the kernel, so what was
//!   stored is there. An entry counts when its checksum over header and payload is right and its sequence
//!   number is the next one; a torn append is simply not an entry. The header exists twice and is written
//!   in turns, so one of the two is always whole.
//! - **It is worthless after a power cut**, when pages may have reached the disk in any order, and says so:
//!   a log of another boot is [`Opened::Foreign`]. So is one of another volume. Replaying either could put old
//!   data over new.
//! - **Order is truth.** Entries are appended in the order in which overlapping mutations reach the server,
//!   and are released only from the oldest on, so the log is always a suffix of the history. An entry that
//!   is durable or void but stuck behind an older one is marked, and not replayed.
//! - **A payload may be received in place.** The free part of the ring behind the last entry can take one as it comes
//!   in ([`ReplayLog::land`]). Until its header is stored it is no more than stale bytes there: nothing in the file
//!   knows of it, so one that is never completed is never replayed and holds nothing up. Whatever else is appended
//!   meanwhile takes the place, and the payload goes on beside the ring. Order is the order of the appends.
//! - **A full disk is an error code and never a SIGBUS**: blocks are reserved with fallocate before they are
//!   touched, 1 MiB at a time, as the ring grows. Reserving the whole file at once would cost its
//!   whole size in memory for every volume, since the run folder is mostly a tmpfs. The first 4 MiB stay
//!   reserved for ever, so that a log that cannot grow still works, only with more flushes. [`ReplayLog::shrink`]
//!   gives the rest back.
//!
//! The layout is that of this machine (little endian is required at open), since it never leaves the boot.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::error::{Doing, Error, Kind as ErrorKind, Result};
use crate::values::{ByteSize, VolumeId};

/// The name of the log in the run folder.
pub const FILE_NAME: &str = "replay.log";

const MAGIC: &[u8; 8] = b"zfsctlRL";
const FORMAT: u32 = 1;
/// Where the ring starts in the file.
const DATA: u64 = 4096;
const SLOT: usize = 512;
const UNIT: u64 = 64;
/// What is reserved or given back at a time.
const CHUNK: u64 = ByteSize::MIB;
/// What stays reserved.
const KEPT: u64 = 4 * ByteSize::MIB;
/// The longest payload of one entry in bytes, if the log has [`MIN_CAPACITY`] or more.
pub const MAX_PAYLOAD: u64 = ByteSize::MIB;
/// The smallest ring in bytes.
pub const MIN_CAPACITY: u64 = 64 << 10;

/// Who a log belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The volume.
    pub volume: VolumeId,
    /// The attach epoch that new entries are written under.
    pub epoch: u64,
    /// The kernel's boot id, see [`boot_id`].
    pub boot: String,
}

/// The kernel's random id of this boot.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).doing("read", path)?.trim().to_owned())
}

/// What an entry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Writes the payload.
    Write = 1,
    /// Discards the range.
    Trim = 2,
    /// Zeroes the range.
    Zero = 3,
    /// Nothing: it fills the ring's end.
    Pad = 4,
}

impl Kind {
    fn from_byte(b: u8) -> Option<Self> {
        [Kind::Write, Kind::Trim, Kind::Zero, Kind::Pad].into_iter().find(|k| *k as u8 == b)
    }
}

/// An entry of the log, in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it does.
    pub kind: Kind,
    /// First byte on the device.
    pub offset: u64,
    /// Number of bytes on the device.
    pub len: u64,
    /// Where it starts, counted over all laps of the ring.
    pos: u64,
    /// What it takes in the ring, in bytes.
    total: u64,
    /// When it was acknowledged: the log's acknowledgement counter, 0 for not yet.
    acked: u64,
    /// Durable, void or padding: it is not replayed and leaves as soon as it is the oldest.
    settled: bool,
}

impl Entry {
    /// Whether a replay must carry it out.
    pub fn is_live(&self) -> bool {
        !self.settled
    }
    /// Whether the caller was told that it is done (always so for an entry of an earlier keeper).
    pub fn is_acked(&self) -> bool {
        self.acked != 0
    }
}

/// Where the payload of an entry is: valid until the entry is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    at: usize,
    len: usize,
}

impl Payload {
    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty payload is never made")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// The mapped file, for those that send payloads from it.
#[derive(Debug)]
pub struct LogMap(MmapRaw);

impl LogMap {
    /// The bytes of a payload.
    ///
    /// # Safety
    /// The entry must not be released while the slice lives. The guard releases an entry only after
    /// the server has answered it, or after all connections that could still be sending it are gone.
    pub unsafe fn payload(&self, payload: Payload) -> &[u8] {
        debug_assert!(payload.at + payload.len <= self.0.len());
        // SAFETY: in bounds, as every payload is made by ReplayLog::payload; not written to, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().add(payload.at), payload.len) }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        assert!(at + bytes.len() <= self.0.len(), "a write past the end of the replay log");
        // SAFETY: in bounds. Slices of this memory exist only over payloads of unreleased entries, which are
        // never written to again, and for a moment, under a borrow of the log, over one that is being received.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_mut_ptr().add(at), bytes.len()) }
    }

    fn write_byte(&self, at: u64, byte: u8) {
        assert!((at as usize) < self.0.len(), "a write past the end of the replay log");
        // SAFETY: in bounds; one byte is stored whole or not at all.
        unsafe { self.0.as_mut_ptr().add(at as usize).write_volatile(byte) }
    }
}

/// A payload that is being received: see [`ReplayLog::land`].
#[derive(Debug)]
pub struct Landing {
    kind: Kind,
    offset: u64,
    len: u64,
    /// How much of it is here.
    filled: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Where its entry will be.
    Ring {
        /// What the ring's end is filled with before it, in bytes.
        pad: u64,
        /// The entry's header, and the checksum over it and over the payload as far as it is here.
        header: [u8; UNIT as usize],
        crc: u32,
        /// Where the payload starts in the file.
        at: usize,
    },
    Beside(Vec<u8>),
}

impl Landing {
    /// The bytes so far; `map` is that of the log that it is in.
    fn bytes<'a>(&'a self, map: &'a LogMap) -> &'a [u8] {
        match &self.place {
            // SAFETY: nothing is stored there while this is borrowed, since that needs the log.
            Place::Ring { at, .. } => unsafe { map.payload(Payload { at: *at, len: self.filled }) },
            Place::Beside(bytes) => &bytes[..self.filled],
        }
    }
}

/// Why an entry cannot be appended now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The ring is full: a flush makes room.
    Ring,
    /// The file system has no room for the ring to grow, and the reserved part is full: a flush makes room.
    Disk,
}

/// What [`ReplayLog::open`] found.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "made once per process")]
pub enum Opened {
    /// A log, empty or with the entries that an earlier keeper left.
    Log(ReplayLog),
    /// A file that must not be replayed; [`ReplayLog::discard`] replaces it.
    Foreign {
        /// Why not.
        why: String,
    },
}

/// What [`peek`] sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peeked {
    /// There is no log, or none of its entries would be replayed.
    Nothing,
    /// What a replay would carry out.
    Left {
        /// The number of entries.
        entries: u64,
        /// Their bytes on the device.
        bytes: u64,
        /// The attach epoch that they were written under.
        epoch: u64,
    },
    /// It is of another boot or volume: a replay could put old data over new.
    Void {
        /// Which of these.
        why: String,
    },
    /// Whether it holds anything cannot be told.
    Damaged {
        /// Why not.
        why: String,
    },
}

/// Looks at the log in `dir` and leaves it as it is: nothing is stored, made or reserved, so a full disk is no matter.
///
/// [`ErrorKind::Busy`] while a keeper has it. As long as the look takes, a keeper that starts would find it busy too:
/// whoever can keep operations on the volume away should do so.
pub fn peek(dir: &Path, volume: &VolumeId, boot: &str) -> Result<Peeked> {
    let path = dir.join(FILE_NAME);
    let file = match OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(&path)
    {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Peeked::Nothing),
        Err(e) => return Err(e).doing("open the replay log", &path),
    };
    locked(file.try_lock_shared(), &path)?;
    let header = match Known::of(&file, &path, volume, boot)? {
        Known::Ours(header) => header,
        Known::Void(why) => return Ok(Peeked::Void { why }),
        Known::Damaged(why) => return Ok(Peeked::Damaged { why }),
    };
    let found = scan(&file, &header).doing("read the replay log", &path)?;
    let (entries, bytes) =
        found.iter().filter(|e| e.is_live()).fold((0, 0), |(n, bytes), e| (n + 1, bytes + e.len));
    Ok(if entries == 0 { Peeked::Nothing } else { Peeked::Left { entries, bytes, epoch: header.epoch } })
}

/// The header, which exists in two slots.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Header {
    generation: u64,
    /// A random number that all entries since the last initialisation carry.
    id: u64,
    epoch: u64,
    device_size: u64,
    capacity: u64,
    tail: u64,
    tail_seq: u64,
    boot: String,
    volume: String,
}

impl Header {
    fn encode(&self) -> [u8; SLOT] {
        let mut out = Vec::with_capacity(SLOT);
        out.extend(MAGIC);
        out.extend(FORMAT.to_le_bytes());
        out.extend([0; 4]);
        for n in
            [self.generation, self.id, self.epoch, self.device_size, self.capacity, self.tail, self.tail_seq]
        {
            out.extend(n.to_le_bytes());
        }
        for text in [&self.boot, &self.volume] {
            let text = &text.as_bytes()[..text.len().min(160)];
            out.push(text.len() as u8);
            out.extend(text);
        }
        out.resize(SLOT, 0);
        let crc = crc32c::crc32c(&out);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out.try_into().expect("the size was just set")
    }

    fn decode(slot: &[u8; SLOT]) -> Result<Self, &'static str> {
        let mut plain = *slot;
        plain[12..16].fill(0);
        if &slot[..8] != MAGIC {
            return Err("it is no replay log");
        }
        if slot[12..16] != crc32c::crc32c(&plain).to_le_bytes() {
            return Err("its header is damaged");
        }
        if slot[8..12] != FORMAT.to_le_bytes() {
            return Err("its format is of another version of zerofsctl");
        }
        let number =
            |i: usize| u64::from_le_bytes(slot[16 + i * 8..24 + i * 8].try_into().expect("eight bytes"));
        let mut rest = &slot[16 + 7 * 8..];
        let mut text = || {
            let (n, tail) = rest.split_first().ok_or("its header is damaged")?;
            let (text, tail) = tail.split_at_checked(*n as usize).ok_or("its header is damaged")?;
            rest = tail;
            String::from_utf8(text.to_vec()).map_err(|_| "its header is damaged")
        };
        let (boot, volume) = (text()?, text()?);
        Ok(Header {
            generation: number(0),
            id: number(1),
            epoch: number(2),
            device_size: number(3),
            capacity: number(4),
            tail: number(5),
            tail_seq: number(6),
            boot,
            volume,
        })
    }
}

/// What a file says that it is.
enum Known {
    /// A log of this volume and boot.
    Ours(Header),
    /// A log of another one, and of which.
    Void(String),
    /// Nothing that could be read as a log, and why not.
    Damaged(String),
}

impl Known {
    fn of(file: &File, path: &Path, volume: &VolumeId, boot: &str) -> Result<Known> {
        let mut best: Result<Header, &str> = Err("it is no replay log");
        for i in 0..2 {
            let mut slot = [0; SLOT];
            match file.read_exact_at(&mut slot, i * SLOT as u64) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(e).doing("read the replay log", path),
            }
            best = match (Header::decode(&slot), best) {
                (Ok(new), Ok(old)) if new.generation < old.generation => Ok(old),
                (Ok(new), _) => Ok(new),
                (Err(_), Ok(old)) => Ok(old),
                (Err(why), Err(_)) => Err(why),
            };
        }
        let header = match best {
            Ok(header) => header,
            Err(why) => return Ok(Known::Damaged(why.to_owned())),
        };
        if header.volume != volume.as_str() {
            return Ok(Known::Void(format!("it belongs to volume {:?}", header.volume)));
        }
        if header.boot != boot {
            return Ok(Known::Void("it is from before the last reboot".to_owned()));
        }
        let len = file.metadata().doing("read", path)?.len();
        if !(MIN_CAPACITY..=1 << 40).contains(&header.capacity)
            || !header.capacity.is_multiple_of(UNIT)
            || len != DATA + header.capacity
        {
            return Ok(Known::Damaged("its size is wrong".to_owned()));
        }
        Ok(Known::Ours(header))
    }
}

/// The entries from the tail on, up to the first that is not whole.
fn scan(file: &File, header: &Header) -> io::Result<VecDeque<Entry>> {
    let (capacity, tail) = (header.capacity, header.tail);
    let mut ring = Ring { file, end: DATA + capacity, at: DATA, bytes: Vec::new() };
    let mut found = VecDeque::new();
    let (mut pos, mut seq) = (tail, header.tail_seq);
    loop {
        let at = pos % capacity;
        if at + UNIT > capacity || pos - tail + UNIT > capacity {
            break;
        }
        let raw: [u8; UNIT as usize] = ring.get(at, UNIT)?.try_into().expect("sixty-four bytes");
        let number = |i: usize| u64::from_le_bytes(raw[i..i + 8].try_into().expect("eight bytes"));
        let Some(kind) = Kind::from_byte(raw[36]) else { break };
        let entry = Entry {
            kind,
            offset: number(16),
            len: number(24),
            pos,
            total: number(40),
            acked: 1,
            settled: raw[FLAGS_AT as usize] == SETTLED || kind == Kind::Pad,
        };
        let wanted = match kind {
            Kind::Pad => capacity - at,
            Kind::Write if entry.len > MAX_PAYLOAD => break,
            kind => entry_total(kind, entry.len),
        };
        if number(0) != header.id
            || number(8) != seq
            || entry.total != wanted
            || at + wanted > capacity
            || pos - tail + wanted > capacity
        {
            break;
        }
        let payload = match kind {
            Kind::Write => ring.get(at + UNIT, entry.len)?,
            _ => &[],
        };
        let crc = checksum(&entry_header(header.id, seq, &entry), payload);
        if raw[CRC_AT..CRC_AT + 4] != crc.to_le_bytes() {
            break;
        }
        found.push_back(entry);
        pos += wanted;
        seq += 1;
    }
    Ok(found)
}

/// The ring, read in large pieces. Not through a mapping: that would take a page of a tmpfs for each hole it looks at.
struct Ring<'a> {
    file: &'a File,
    end: u64,
    /// Where the piece that is here starts in the file.
    at: u64,
    bytes: Vec<u8>,
}

impl Ring<'_> {
    /// `len` bytes from `pos` of the ring on, which end within it.
    fn get(&mut self, pos: u64, len: u64) -> io::Result<&[u8]> {
        let at = DATA + pos;
        if at < self.at || at + len > self.at + self.bytes.len() as u64 {
            // Any header comes together with its payload.
            self.bytes.resize(len.max(UNIT + MAX_PAYLOAD).min(self.end - at) as usize, 0);
            self.at = at;
            self.file.read_exact_at(&mut self.bytes, at)?;
        }
        let start = (at - self.at) as usize;
        Ok(&self.bytes[start..start + len as usize])
    }
}

/// What is known of the blocks of one chunk of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// Perhaps there, left by an earlier keeper.
    Unknown,
    Hole,
    Reserved,
}

/// An open replay log. Dropping it leaves the file as it is.
#[derive(Debug)]
pub struct ReplayLog {
    path: PathBuf,
    file: File,
    map: Arc<LogMap>,
    header: Header,
    head: u64,
    next_seq: u64,
    entries: VecDeque<Entry>,
    acks: u64,
    chunks: Vec<Chunk>,
    live_bytes: u64,
    landing: Option<Landing>,
}

fn entry_total(kind: Kind, payload: u64) -> u64 {
    match kind {
        Kind::Write => (UNIT + payload).next_multiple_of(UNIT),
        _ => UNIT,
    }
}

const SETTLED: u8 = b'V';
const FLAGS_AT: u64 = 37;
const CRC_AT: usize = 56;

fn entry_header(id: u64, seq: u64, entry: &Entry) -> [u8; UNIT as usize] {
    let mut out = [0; UNIT as usize];
    for (i, n) in [id, seq, entry.offset, entry.len].into_iter().enumerate() {
        out[i * 8..i * 8 + 8].copy_from_slice(&n.to_le_bytes());
    }
    out[36] = entry.kind as u8;
    out[40..48].copy_from_slice(&entry.total.to_le_bytes());
    out
}

impl ReplayLog {
    /// Opens `replay.log` in `dir`, or makes one with a ring of `capacity` bytes.
    ///
    /// An empty log of the wrong capacity is made anew; one with entries keeps its capacity.
    /// [`ErrorKind::Busy`] when another process has it open.
    pub fn open(dir: &Path, who: &Identity, capacity: u64) -> Result<Opened> {
        if cfg!(target_endian = "big") {
            return Err(Error::environment("the replay log needs a little-endian machine"));
        }
        let path = dir.join(FILE_NAME);
        let file = match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path)
        {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Self::create(dir, who, capacity).map(Opened::Log);
            }
            Err(e) => return Err(e).doing("open the replay log", &path),
        };
        locked(file.try_lock(), &path)?;
        let header = match Known::of(&file, &path, &who.volume, &who.boot)? {
            Known::Ours(header) => header,
            Known::Void(why) | Known::Damaged(why) => return Ok(Opened::Foreign { why }),
        };
        let found = scan(&file, &header).doing("read the replay log", &path)?;
        let mut log = Self::map(path, file, header)?;
        log.take_in(found);
        if log.is_empty() && log.header.capacity != rounded(capacity) {
            drop(log);
            return Self::create(dir, who, capacity).map(Opened::Log);
        }
        if log.is_empty() {
            log.set_epoch(who.epoch);
        }
        // What an earlier keeper reserved is not known for sure: a tmpfs may have been punched meanwhile.
        log.reserve(0, KEPT.min(log.header.capacity), false).map_err(|e| no_room(&log.path, e))?;
        Ok(Opened::Log(log))
    }

    /// Replaces whatever is there by an empty log.
    pub fn discard(dir: &Path, who: &Identity, capacity: u64) -> Result<ReplayLog> {
        Self::create(dir, who, capacity)
    }

    fn create(dir: &Path, who: &Identity, capacity: u64) -> Result<ReplayLog> {
        let path = dir.join(FILE_NAME);
        let capacity = rounded(capacity);
        // Made beside and renamed, so that a kill in the middle leaves no half a log.
        let new = dir.join(".replay.log.new");
        let file = new_file(&new, "create the replay log")?;
        locked(file.try_lock(), &new)?;
        file.set_len(DATA + capacity).doing("size the replay log", &new)?;
        let header = Header {
            generation: 0,
            id: rand::random(),
            epoch: who.epoch,
            device_size: 0,
            capacity,
            tail: 0,
            tail_seq: 1,
            boot: who.boot.clone(),
            volume: who.volume.as_str().to_owned(),
        };
        let made = (|| {
            let mut log = Self::map(path.clone(), file, header)?;
            log.reserve(0, KEPT.min(capacity), false).map_err(|e| no_room(&path, e))?;
            // Both slots, so that neither holds anything else.
            log.write_header();
            log.write_header();
            std::fs::rename(&new, &path).doing("put the replay log in place", &path)?;
            Ok(log)
        })();
        if made.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        made
    }

    fn map(path: PathBuf, file: File, header: Header) -> Result<ReplayLog> {
        // The header page must be there before it is stored to.
        fallocate(&file, FallocateFlags::empty(), 0, DATA as i64).map_err(|e| no_room(&path, e.into()))?;
        let len = (DATA + header.capacity) as usize;
        let map = MmapOptions::new().len(len).map_raw(&file).doing("map the replay log", &path)?;
        // A mapping holds the file, and with it our lock: a child that outlives us would keep the next keeper out.
        map.advise(memmap2::Advice::DontFork).doing("keep to this process", &path)?;
        let chunks = header.capacity.div_ceil(CHUNK) as usize;
        Ok(ReplayLog {
            path,
            file,
            map: Arc::new(LogMap(map)),
            head: header.tail,
            next_seq: header.tail_seq,
            header,
            entries: VecDeque::new(),
            acks: 1,
            chunks: vec![Chunk::Unknown; chunks],
            live_bytes: 0,
            landing: None,
        })
    }

    /// The entries that an earlier keeper left.
    fn take_in(&mut self, found: VecDeque<Entry>) {
        self.head += found.iter().map(|e| e.total).sum::<u64>();
        self.next_seq += found.len() as u64;
        self.live_bytes = found.iter().filter(|e| e.is_live()).map(|e| e.len).sum();
        self.entries = found;
        self.pop_settled();
    }

    /// Appends an entry; `data` is the payload of a write and empty otherwise. Gives its sequence number.
    ///
    /// # Panics
    /// When the payload is longer than [`max_payload`](Self::max_payload): callers split.
    pub fn append(&mut self, kind: Kind, offset: u64, len: u64, data: &[u8]) -> Result<u64, Full> {
        assert!(data.len() as u64 <= self.max_payload() && (kind != Kind::Write || data.len() as u64 == len));
        self.step_aside();
        let total = entry_total(kind, data.len() as u64);
        let pad = self.make_room(total)?;
        self.pad(pad);
        let entry = Entry { kind, offset, len, pos: self.head, total, acked: 0, settled: false };
        self.live_bytes += len;
        Ok(self.store(entry, data))
    }

    /// Room for an entry of so many bytes in all: gives what the ring's end must be filled with before.
    fn make_room(&mut self, total: u64) -> Result<u64, Full> {
        let capacity = self.header.capacity;
        if self.entries.is_empty() && !self.head.is_multiple_of(capacity) {
            // Empty: start over at the ring's beginning, whose pages are there and warm.
            self.restart();
        }
        let at = self.head % capacity;
        let pad = if at + total > capacity { capacity - at } else { 0 };
        if self.head - self.header.tail + pad + total > capacity {
            return Err(Full::Ring);
        }
        let start = if pad > 0 { 0 } else { at };
        if pad > 0 {
            self.reserve(at, UNIT, true).map_err(|_| Full::Disk)?;
        }
        self.reserve(start, total, true).map_err(|_| Full::Disk)?;
        Ok(pad)
    }

    fn pad(&mut self, pad: u64) {
        if pad > 0 {
            let filler = Entry {
                kind: Kind::Pad,
                offset: 0,
                len: 0,
                pos: self.head,
                total: pad,
                acked: 1,
                settled: true,
            };
            self.store(filler, &[]);
            self.pop_settled();
        }
    }

    // ---- A payload that is being received.

    /// Gets ready to receive the payload of a write, which [`append_landed`](Self::append_landed) or
    /// [`end_landing`](Self::end_landing) ends. False when one is being received already, or there is no room.
    ///
    /// # Panics
    /// When it is longer than [`max_payload`](Self::max_payload): callers split.
    pub fn land(&mut self, offset: u64, len: u64) -> bool {
        assert!(len <= self.max_payload());
        if self.landing.is_some() {
            return false;
        }
        let total = entry_total(Kind::Write, len);
        let Ok(pad) = self.make_room(total) else { return false };
        let (kind, pos) = (Kind::Write, self.head + pad);
        let entry = Entry { kind, offset, len, pos, total, acked: 0, settled: false };
        let header = entry_header(self.header.id, self.next_seq + u64::from(pad > 0), &entry);
        let crc = crc32c::crc32c(&header[..CRC_AT]);
        let at = (DATA + pos % self.header.capacity + UNIT) as usize;
        self.landing =
            Some(Landing { kind, offset, len, filled: 0, place: Place::Ring { pad, header, crc, at } });
        true
    }

    /// Where the rest of the payload goes; empty when nothing more is to come.
    pub fn landing_room(&mut self) -> &mut [u8] {
        match &mut self.landing {
            None => &mut [],
            Some(Landing { len, filled, place: Place::Ring { at, .. }, .. }) => {
                let (at, len) = (*at + *filled, *len as usize - *filled);
                assert!(at + len <= self.map.0.len(), "a payload past the end of the replay log");
                // SAFETY: in bounds, reserved, and behind the last entry, where no payload slice is; whatever else
                // is stored there moves the landing first, which needs the log that this borrows.
                unsafe { std::slice::from_raw_parts_mut(self.map.0.as_mut_ptr().add(at), len) }
            }
            Some(Landing { filled, place: Place::Beside(bytes), .. }) => &mut bytes[*filled..],
        }
    }

    /// So many bytes were put there.
    pub fn landed(&mut self, n: usize) {
        let Some(landing) = &mut self.landing else { return };
        let before = landing.filled;
        landing.filled += n;
        assert!(landing.filled as u64 <= landing.len);
        if let Place::Ring { at, crc, .. } = &mut landing.place {
            // SAFETY: as above; only read, while it is still in the processor's cache.
            let new = unsafe { self.map.payload(Payload { at: *at + before, len: n }) };
            *crc = crc32c::crc32c_append(*crc, new);
        }
    }

    /// Whether a payload is being received, and how much of it is still to come, in bytes.
    pub fn landing_left(&self) -> Option<u64> {
        self.landing.as_ref().map(|l| l.len - l.filled as u64)
    }

    /// How long the payload that is being received is, in bytes.
    pub fn landing_len(&self) -> u64 {
        self.landing.as_ref().map_or(0, |l| l.len)
    }

    /// Appends the payload that was received, as [`append`](Self::append) would. On failure it stays.
    ///
    /// # Panics
    /// When it is not complete.
    pub fn append_landed(&mut self) -> Result<u64, Full> {
        assert_eq!(self.landing_left(), Some(0), "a write is appended before it is received");
        let Some(landing) = self.landing.take() else { unreachable!("it was just looked at") };
        let Landing { kind, offset, len, place, .. } = landing;
        let (pad, mut header, crc) = match place {
            Place::Ring { pad, header, crc, .. } => (pad, header, crc),
            Place::Beside(bytes) => {
                return self.append(kind, offset, len, &bytes).inspect_err(|_| {
                    let filled = bytes.len();
                    self.landing = Some(Landing { kind, offset, len, filled, place: Place::Beside(bytes) });
                });
            }
        };
        self.pad(pad);
        let total = entry_total(kind, len);
        let entry = Entry { kind, offset, len, pos: self.head, total, acked: 0, settled: false };
        let seq = self.next_seq;
        debug_assert_eq!(header, entry_header(self.header.id, seq, &entry));
        header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        // The payload is there already.
        self.map.write(DATA + entry.pos % self.header.capacity, &header);
        self.live_bytes += len;
        self.keep(entry);
        Ok(seq)
    }

    /// Gives the payload up, and what is here of it.
    pub fn end_landing(&mut self) -> Vec<u8> {
        self.landing.take().map(|l| l.bytes(&self.map).to_vec()).unwrap_or_default()
    }

    /// For a log that replaces this one: what is being received goes on there.
    pub fn take_landing(&mut self) -> Option<Landing> {
        self.step_aside();
        self.landing.take()
    }

    /// Goes on with what another log was receiving.
    pub fn set_landing(&mut self, landing: Option<Landing>) {
        self.landing = landing;
    }

    /// The place is needed for something else: what is being received goes on beside the ring.
    fn step_aside(&mut self) {
        if let Some(landing) = &mut self.landing
            && matches!(landing.place, Place::Ring { .. })
        {
            let mut bytes = Vec::with_capacity(landing.len as usize);
            bytes.extend_from_slice(landing.bytes(&self.map));
            bytes.resize(landing.len as usize, 0);
            landing.place = Place::Beside(bytes);
        }
    }

    fn store(&mut self, entry: Entry, data: &[u8]) -> u64 {
        let seq = self.next_seq;
        let at = DATA + entry.pos % self.header.capacity;
        let mut header = entry_header(self.header.id, seq, &entry);
        let crc = checksum(&header, data);
        header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        if entry.settled {
            header[FLAGS_AT as usize] = SETTLED;
        }
        self.map.write(at + UNIT, data);
        self.map.write(at, &header);
        self.keep(entry);
        seq
    }

    fn keep(&mut self, entry: Entry) {
        self.head += entry.total;
        self.next_seq += 1;
        self.entries.push_back(entry);
    }

    /// A number that no other log has.
    pub fn id(&self) -> u64 {
        self.header.id
    }

    /// The longest payload that one entry takes, in bytes.
    pub fn max_payload(&self) -> u64 {
        MAX_PAYLOAD.min(self.header.capacity / 4)
    }

    /// The sequence numbers of all entries, the oldest first.
    pub fn seqs(&self) -> std::ops::Range<u64> {
        self.next_seq - self.entries.len() as u64..self.next_seq
    }

    fn index(&self, seq: u64) -> Option<usize> {
        let range = self.seqs();
        range.contains(&seq).then(|| (seq - range.start) as usize)
    }

    /// An entry that has not been released.
    pub fn entry(&self, seq: u64) -> Option<&Entry> {
        self.entries.get(self.index(seq)?)
    }

    /// Where the payload of a write is.
    pub fn payload(&self, seq: u64) -> Option<Payload> {
        let entry = self.entry(seq)?;
        let at = DATA + entry.pos % self.header.capacity + UNIT;
        (entry.kind == Kind::Write).then_some(Payload { at: at as usize, len: entry.len as usize })
    }

    /// The mapped file, from which payloads are sent.
    pub fn mapped(&self) -> Arc<LogMap> {
        Arc::clone(&self.map)
    }

    /// The server has acknowledged this entry.
    pub fn ack(&mut self, seq: u64) {
        if let Some(i) = self.index(seq)
            && self.entries[i].acked == 0
        {
            self.acks += 1;
            self.entries[i].acked = self.acks;
        }
    }

    /// The moment of now, for [`release`](Self::release).
    pub fn mark(&self) -> u64 {
        self.acks
    }

    /// Everything that was acknowledged up to `mark` is durable.
    pub fn release(&mut self, mark: u64) {
        self.pop_while(|e| e.settled || (e.acked != 0 && e.acked <= mark));
        for i in 0..self.entries.len() {
            let e = &self.entries[i];
            if !e.settled && e.acked != 0 && e.acked <= mark {
                self.settle(i);
            }
        }
    }

    /// The caller was told that this entry failed: it is not replayed.
    pub fn void(&mut self, seq: u64) {
        if let Some(i) = self.index(seq)
            && !self.entries[i].settled
        {
            self.settle(i);
            self.pop_settled();
        }
    }

    fn settle(&mut self, i: usize) {
        self.entries[i].settled = true;
        self.live_bytes -= self.entries[i].len;
        self.map.write_byte(DATA + self.entries[i].pos % self.header.capacity + FLAGS_AT, SETTLED);
    }

    fn pop_settled(&mut self) {
        self.pop_while(|e| e.settled);
    }

    fn pop_while(&mut self, leaves: impl Fn(&Entry) -> bool) {
        let mut changed = false;
        while let Some(e) = self.entries.front()
            && leaves(e)
        {
            if !e.settled {
                self.live_bytes -= e.len;
            }
            self.entries.pop_front();
            changed = true;
        }
        if changed {
            self.header.tail = self.entries.front().map_or(self.head, |e| e.pos);
            self.header.tail_seq = self.seqs().start;
            self.write_header();
        }
    }

    /// Moves the empty ring to the beginning of its next lap.
    fn restart(&mut self) {
        self.head = self.head.next_multiple_of(self.header.capacity);
        self.header.tail = self.head;
        self.header.tail_seq = self.next_seq;
        self.write_header();
    }

    fn write_header(&mut self) {
        self.header.generation += 1;
        let slot = self.header.generation % 2 * SLOT as u64;
        self.map.write(slot, &self.header.encode());
    }

    /// No entry is left that was not released.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many entries a replay would carry out.
    pub fn live(&self) -> u64 {
        self.entries.iter().filter(|e| e.is_live()).count() as u64
    }

    /// The device bytes of the entries that a replay would carry out.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// The number of entries, settled ones included.
    pub fn len(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Bytes of the ring in use.
    pub fn used(&self) -> u64 {
        self.head - self.header.tail
    }

    /// Where the next entry goes, in bytes over all laps of the ring.
    pub fn used_end(&self) -> u64 {
        self.head
    }

    /// Size of the ring in bytes.
    pub fn capacity(&self) -> u64 {
        self.header.capacity
    }

    /// The attach epoch under which the log is written.
    pub fn epoch(&self) -> u64 {
        self.header.epoch
    }

    /// From now on the log belongs to this epoch: done before its entries are replayed under it.
    pub fn set_epoch(&mut self, epoch: u64) {
        if self.header.epoch != epoch {
            self.header.epoch = epoch;
            self.write_header();
        }
    }

    /// The size of the device when the log was last in use, in bytes; 0 when it was never.
    pub fn device_size(&self) -> u64 {
        self.header.device_size
    }

    /// Records the size of the device.
    pub fn set_device_size(&mut self, size: u64) {
        if self.header.device_size != size {
            self.header.device_size = size;
            self.write_header();
        }
    }

    /// Releases everything, whatever it is: the volume has a new owner.
    pub fn clear(&mut self) {
        self.pop_while(|_| true);
    }

    /// Makes sure that storing to this part of the ring cannot fail; `now` says that it is about to happen.
    fn reserve(&mut self, at: u64, len: u64, now: bool) -> io::Result<()> {
        for chunk in at / CHUNK..=(at + len - 1) / CHUNK {
            let state = &mut self.chunks[chunk as usize];
            if *state != Chunk::Reserved {
                let start = chunk * CHUNK;
                let len = CHUNK.min(self.header.capacity - start);
                loop {
                    match fallocate(&self.file, FallocateFlags::empty(), (DATA + start) as i64, len as i64) {
                        Ok(()) => break,
                        Err(nix::Error::EINTR) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                *state = Chunk::Reserved;
                if now {
                    // One call instead of a page fault for every write; if it is not to be had, faults do.
                    // SAFETY: inside the map and page-aligned; it changes no contents.
                    unsafe {
                        let start = self.map.0.as_mut_ptr().add((DATA + start) as usize);
                        libc::madvise(start.cast(), len as usize, libc::MADV_POPULATE_WRITE);
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives memory and disk blocks back that the entries of now do not need. For quiet moments.
    pub fn shrink(&mut self) {
        self.step_aside();
        let capacity = self.header.capacity;
        let (from, to) = (self.header.tail, self.head);
        for chunk in 0..self.chunks.len() as u64 {
            let (start, end) = (chunk * CHUNK, capacity.min((chunk + 1) * CHUNK));
            // The used range may wrap, so it is looked at in both laps that it can touch.
            let lap = from - from % capacity;
            let in_use = from < to
                && [lap, lap + capacity].into_iter().any(|lap| lap + start < to && from < lap + end);
            if in_use {
                continue;
            }
            let (at, len) = ((DATA + start) as usize, (end - start) as usize);
            // SAFETY: inside the map and page-aligned; for a shared file mapping it only drops page table
            // entries of a part where no entry, and so no payload slice, is.
            unsafe {
                libc::madvise(self.map.0.as_mut_ptr().add(at).cast(), len, libc::MADV_DONTNEED);
            }
            if start >= KEPT && self.chunks[chunk as usize] != Chunk::Hole {
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                // A file system without holes keeps the blocks: no harm.
                if fallocate(&self.file, punch, at as i64, len as i64).is_ok() {
                    self.chunks[chunk as usize] = Chunk::Hole;
                }
            }
        }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn checksum(header: &[u8; UNIT as usize], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..CRC_AT]), payload)
}

fn rounded(capacity: u64) -> u64 {
    capacity.max(MIN_CAPACITY).next_multiple_of(DATA)
}

/// What came of an attempt at the lock of a log.
fn locked(tried: Result<(), std::fs::TryLockError>, path: &Path) -> Result<()> {
    tried.map_err(|e| match e {
        std::fs::TryLockError::WouldBlock => Error::new(
            ErrorKind::Busy,
            format!("the replay log {} is in use by another keeper", path.display()),
        )
        .hint("the volume is attached already: look at it with zerofsctl list"),
        std::fs::TryLockError::Error(e) => Error::failed(format!("cannot lock {}: {e}", path.display())),
    })
}

fn no_room(path: &Path, e: io::Error) -> Error {
    let folder = path.parent().unwrap_or(path).display();
    Error::environment(format!("cannot reserve {} for the replay log in {folder}: {e}", ByteSize(KEPT)))
        .hint(format!("free some room there (df -h {folder}), or choose another folder with --run-dir"))
}

/// A new file to be mapped, in the place of any other.
pub(super) fn new_file(path: &Path, doing: &'static str) -> Result<File> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).doing("remove", path),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .doing(doing, path)?;
    no_copy_on_write(&file);
    Ok(file)
}

/// On Btrfs a reserved block is only safe to overwrite when the file is not copied on write.
fn no_copy_on_write(file: &File) {
    const BTRFS: libc::c_long = 0x9123_683e;
    const NOCOW: libc::c_long = 0x0080_0000;
    const SET_FLAGS: libc::c_ulong = 0x4008_6602;
    // SAFETY: plain system calls on a file that we own, with memory of the right size. It is best effort.
    unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &mut fs) == 0 && fs.f_type == BTRFS {
            libc::ioctl(file.as_raw_fd(), SET_FLAGS, &NOCOW);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who() -> Identity {
        Identity { volume: "vol1".parse().unwrap(), epoch: 3, boot: "boot-a".into() }
    }

    fn open(dir: &Path, who: &Identity) -> ReplayLog {
        match ReplayLog::open(dir, who, MIN_CAPACITY).unwrap() {
            Opened::Log(log) => log,
            Opened::Foreign { why } => panic!("foreign: {why}"),
        }
    }

    fn contents(log: &ReplayLog) -> Vec<(Kind, u64, u64, Vec<u8>)> {
        log.seqs()
            .filter_map(|seq| {
                let e = log.entry(seq).unwrap();
                // SAFETY: copied at once.
                let data = log.payload(seq).map(|p| unsafe { log.map.payload(p) }.to_vec());
                e.is_live().then(|| (e.kind, e.offset, e.len, data.unwrap_or_default()))
            })
            .collect()
    }

    #[test]
    fn entries_come_back_after_the_process_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        log.append(Kind::Write, 4096, 5, b"hello").unwrap();
        let trim = log.append(Kind::Trim, 0, 1 << 33, &[]).unwrap();
        log.append(Kind::Zero, 512, 512, &[]).unwrap();
        log.append(Kind::Write, 0, 0, &[]).unwrap();
        log.void(trim);
        log.set_device_size(77);
        let before = contents(&log);
        assert_eq!(before.len(), 3);
        assert_eq!(log.live_bytes(), 517);
        drop(log);
        let log = open(dir.path(), &who());
        assert_eq!(contents(&log), before);
        assert_eq!((log.device_size(), log.epoch(), log.live(), log.live_bytes()), (77, 3, 3, 517));
    }

    #[test]
    fn a_child_that_outlives_the_keeper_does_not_keep_the_next_one_out() {
        let dir = tempfile::tempdir().unwrap();
        let log = open(dir.path(), &who());
        let (short, long) = (std::time::Duration::from_millis(20), std::time::Duration::from_secs(2));
        let stuck = crate::apart::run("sleep", short, || {
            std::thread::sleep(long);
            Ok(())
        });
        assert_eq!(stuck.unwrap_err().kind(), ErrorKind::Unreachable);
        drop(log);
        open(dir.path(), &who());
    }

    #[test]
    fn only_a_settled_prefix_leaves_and_what_is_stuck_behind_is_not_replayed() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        let seqs: Vec<_> = (0..4).map(|i| log.append(Kind::Write, i, 1, &[i as u8]).unwrap()).collect();
        log.ack(seqs[1]);
        log.ack(seqs[2]);
        let mark = log.mark();
        log.ack(seqs[0]);
        log.release(mark);
        assert_eq!(contents(&log).iter().map(|e| e.1).collect::<Vec<_>>(), [0, 3]);
        assert_eq!(log.len(), 4);
        drop(log);
        let mut log = open(dir.path(), &who());
        assert_eq!(contents(&log).iter().map(|e| e.1).collect::<Vec<_>>(), [0, 3]);
        log.release(log.mark());
        assert!(log.is_empty());
        assert_eq!(log.live_bytes(), 0);
    }

    #[test]
    fn a_full_ring_says_so_and_wraps_after_a_release() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        let mut lap = 0u8;
        for _ in 0..50 {
            let mut seqs = Vec::new();
            let full = loop {
                match log.append(Kind::Write, lap.into(), 5000, &[lap; 5000]) {
                    Ok(seq) => seqs.push(seq),
                    Err(full) => break full,
                }
                lap = lap.wrapping_add(1);
            };
            assert_eq!(full, Full::Ring);
            assert!(log.used() <= log.capacity());
            let before = contents(&log);
            drop(log);
            log = open(dir.path(), &who());
            assert_eq!(contents(&log), before);
            // All but the last few leave, so that the ring goes round instead of starting over.
            let stay = log.seqs().end - 3;
            for seq in log.seqs().start..stay {
                log.void(seq);
            }
            assert_eq!(contents(&log).len(), 3);
        }
    }

    #[test]
    fn entries_of_an_earlier_lap_do_not_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        for lap in 0..3 {
            for i in 0..4 {
                let seq = log.append(Kind::Write, i, 1, &[lap]).unwrap();
                log.ack(seq);
            }
            log.release(log.mark());
            assert!(log.is_empty());
        }
        // It starts over at the beginning, and behind it lie whole entries.
        log.append(Kind::Write, 9, 1, &[9]).unwrap();
        drop(log);
        let mut log = open(dir.path(), &who());
        assert_eq!(contents(&log), [(Kind::Write, 9, 1, vec![9])]);
        log.clear();
        drop(log);
        assert!(open(dir.path(), &who()).is_empty());
    }

    #[test]
    fn a_torn_append_at_any_byte_is_no_entry_and_hurts_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        log.append(Kind::Write, 1, 100, &[1; 100]).unwrap();
        let before = std::fs::read(log.path()).unwrap();
        let two = log.append(Kind::Write, 2, 100, &[2; 100]).unwrap();
        let after = std::fs::read(log.path()).unwrap();
        let (start, end) = (DATA as usize + 192, DATA as usize + 192 + 192);
        assert_eq!(log.entry(two).unwrap().pos, 192);
        for cut in start..end {
            // Stores up to `cut` arrived, or those from `cut` on: copies need not run forwards.
            for forwards in [true, false] {
                let mut torn = before.clone();
                let range = if forwards { start..cut } else { cut..end };
                torn[range.clone()].copy_from_slice(&after[range]);
                let whole = torn == after;
                let copy = tempfile::tempdir().unwrap();
                std::fs::write(copy.path().join(FILE_NAME), &torn).unwrap();
                let found = contents(&open(copy.path(), &who()));
                assert_eq!(found.len(), 1 + usize::from(whole), "cut at {cut}, forwards {forwards}");
            }
        }
    }

    fn land(log: &mut ReplayLog, bytes: &[u8]) {
        for piece in bytes.chunks(bytes.len().div_ceil(3).max(1)) {
            log.landing_room()[..piece.len()].copy_from_slice(piece);
            log.landed(piece.len());
        }
    }

    #[test]
    fn a_payload_received_in_place_is_no_entry_at_any_byte_until_it_is_appended() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        log.append(Kind::Write, 1, 100, &[1; 100]).unwrap();
        let found = |bytes: &[u8]| {
            let copy = tempfile::tempdir().unwrap();
            std::fs::write(copy.path().join(FILE_NAME), bytes).unwrap();
            contents(&open(copy.path(), &who()))
        };
        let path = log.path().to_owned();
        let read = || std::fs::read(&path).unwrap();
        let mut before = read();
        assert!(log.land(2, 100));
        assert!(!log.land(3, 100), "two in one place");
        for i in 0..100 {
            log.landing_room()[0] = i as u8;
            log.landed(1);
            assert_eq!(found(&read()).len(), 1, "{i} bytes are an entry");
        }
        assert_eq!(log.landing_left(), Some(0));
        let received = read();
        log.append_landed().unwrap();
        let after = read();
        assert_eq!(found(&after)[1], (Kind::Write, 2, 100, (0..100).collect()));
        let (start, end) = (DATA as usize + 192, DATA as usize + 192 + 192);
        assert_eq!(received[start..start + UNIT as usize], before[start..start + UNIT as usize]);
        for cut in start..end {
            for forwards in [true, false] {
                let mut torn = received.clone();
                let range = if forwards { start..cut } else { cut..end };
                torn[range.clone()].copy_from_slice(&after[range]);
                assert_eq!(found(&torn).len(), 1 + usize::from(torn == after), "cut at {cut}, {forwards}");
            }
        }
        // An append beside it gives the very same bytes.
        before[start + UNIT as usize..end].copy_from_slice(&received[start + UNIT as usize..end]);
        assert_eq!(before, received);
    }

    #[test]
    fn random_appends_and_landings_equal_a_model_after_a_crash_between_any_two() {
        use rand::rngs::StdRng;
        use rand::{Rng, SeedableRng};
        let rounds: u64 = std::env::var("ZEROFSCTL_CASES").ok().map_or(40, |n| n.parse().unwrap());
        let (mut in_place, mut beside) = (0, 0);
        for seed in 0..rounds {
            let mut rng = StdRng::seed_from_u64(seed);
            let dir = tempfile::tempdir().unwrap();
            let mut log = open(dir.path(), &who());
            let mut model: VecDeque<(Kind, u64, u64, Vec<u8>)> = VecDeque::new();
            let mut landing: Option<(u64, Vec<u8>)> = None;
            for step in 0..120u64 {
                match rng.random_range(0..10) {
                    0 | 1 => {
                        let data = vec![rng.random(); rng.random_range(0..9000)];
                        if log.append(Kind::Write, step, data.len() as u64, &data).is_ok() {
                            model.push_back((Kind::Write, step, data.len() as u64, data));
                        }
                    }
                    2 => {
                        if log.append(Kind::Trim, step, 7, &[]).is_ok() {
                            model.push_back((Kind::Trim, step, 7, vec![]));
                        }
                    }
                    3 | 4 => {
                        let data = vec![rng.random(); rng.random_range(1..16000)];
                        if log.land(step, data.len() as u64) {
                            assert!(landing.is_none());
                            landing = Some((step, data));
                        }
                    }
                    5 => {
                        if let Some((_, data)) = &landing {
                            let at = data.len() - log.landing_left().unwrap() as usize;
                            let n = rng.random_range(0..=data.len() - at);
                            log.landing_room()[..n].copy_from_slice(&data[at..at + n]);
                            log.landed(n);
                        }
                    }
                    6 | 7 => {
                        if let Some((offset, data)) = landing.take() {
                            let at = data.len() - log.landing_left().unwrap() as usize;
                            land(&mut log, &data[at..]);
                            match log.landing.as_ref().unwrap().place {
                                Place::Ring { .. } => in_place += 1,
                                Place::Beside(_) => beside += 1,
                            }
                            match log.append_landed() {
                                Ok(_) => model.push_back((Kind::Write, offset, data.len() as u64, data)),
                                Err(_) => assert!(log.end_landing() == data),
                            }
                        }
                    }
                    8 => {
                        for _ in 0..rng.random_range(0..4) {
                            log.void(log.seqs().start);
                            // Padding that is the oldest has left with what was before it.
                            model.pop_front();
                        }
                        if rng.random_bool(0.2) {
                            log.shrink();
                        }
                    }
                    _ => {
                        log.end_landing();
                        landing = None;
                    }
                }
                assert!(model == contents(&log), "seed {seed}, step {step}");
                if step % 7 == 0 || rng.random_bool(0.1) {
                    let copy = tempfile::tempdir().unwrap();
                    std::fs::copy(log.path(), copy.path().join(FILE_NAME)).unwrap();
                    let (entries, bytes) = (model.len() as u64, model.iter().map(|e| e.2).sum());
                    let left = match entries {
                        0 => Peeked::Nothing,
                        _ => Peeked::Left { entries, bytes, epoch: who().epoch },
                    };
                    assert_eq!(look(copy.path(), &who()), left, "seed {seed}, step {step}");
                    assert!(
                        model == contents(&open(copy.path(), &who())),
                        "seed {seed}, step {step}, reopened"
                    );
                }
            }
        }
        assert!(in_place > rounds && beside > rounds, "{in_place} and {beside}");
    }

    #[test]
    fn a_torn_header_update_leaves_the_other_slot() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), &who());
        let one = log.append(Kind::Write, 1, 100, &[1; 100]).unwrap();
        log.append(Kind::Write, 2, 100, &[2; 100]).unwrap();
        let before = std::fs::read(log.path()).unwrap();
        log.void(one);
        let after = std::fs::read(log.path()).unwrap();
        let mut seen = [false; 2];
        for cut in (0..2 * SLOT).step_by(3) {
            let mut torn = after.clone();
            torn[cut..2 * SLOT].copy_from_slice(&before[cut..2 * SLOT]);
            let copy = tempfile::tempdir().unwrap();
            std::fs::write(copy.path().join(FILE_NAME), &torn).unwrap();
            let log = open(copy.path(), &who());
            assert_eq!(contents(&log).len(), 1, "cut at {cut}");
            seen[usize::from(log.seqs().start == one)] = true;
        }
        assert!(seen[0], "the new header was never in force");
    }

    #[test]
    fn a_log_that_is_not_ours_is_foreign_and_can_only_be_discarded() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &who()).append(Kind::Write, 1, 1, &[1]).unwrap();
        let good = std::fs::read(dir.path().join(FILE_NAME)).unwrap();
        let foreign = |who: &Identity, needle: &str| match ReplayLog::open(dir.path(), who, MIN_CAPACITY) {
            Ok(Opened::Foreign { why }) => assert!(why.contains(needle), "{why}"),
            other => panic!("{other:?}"),
        };
        foreign(&Identity { boot: "boot-b".into(), ..who() }, "reboot");
        foreign(&Identity { volume: "vol2".parse().unwrap(), ..who() }, "vol1");
        for (bad, needle) in [
            (b"short".to_vec(), "no replay log"),
            (vec![7; 8192], "no replay log"),
            (good[..good.len() - 1].to_vec(), "size"),
            ([&good[..20], &[9; 400], &good[420..532], &[9; 400], &good[932..]].concat(), "damaged"),
        ] {
            std::fs::write(dir.path().join(FILE_NAME), bad).unwrap();
            foreign(&who(), needle);
        }
        let log = ReplayLog::discard(dir.path(), &who(), MIN_CAPACITY).unwrap();
        assert!(log.is_empty());
        drop(log);
        assert!(open(dir.path(), &who()).is_empty());
    }

    /// What a look says, which leaves everything as it is.
    fn look(dir: &Path, who: &Identity) -> Peeked {
        use std::os::unix::fs::MetadataExt;
        let names = || {
            let all = std::fs::read_dir(dir).unwrap();
            all.map(|e| e.unwrap().file_name()).collect::<std::collections::BTreeSet<_>>()
        };
        let path = dir.join(FILE_NAME);
        let state = || {
            let meta = std::fs::metadata(&path).ok()?;
            Some((
                meta.ino(),
                meta.len(),
                meta.blocks(),
                meta.modified().unwrap(),
                std::fs::read(&path).unwrap(),
            ))
        };
        if let Ok(file) = File::options().write(true).open(&path) {
            // So that any change after it shows, however soon it comes.
            file.set_modified(std::time::UNIX_EPOCH).unwrap();
        }
        let before = (names(), state());
        let seen = peek(dir, &who.volume, &who.boot).unwrap();
        assert!(before == (names(), state()), "a look has changed the log: {seen:?}");
        seen
    }

    #[test]
    fn a_look_tells_what_is_left_and_leaves_the_file_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path(), &who()), Peeked::Nothing);
        let other_epoch = Identity { epoch: 8, ..who() };
        drop(open(dir.path(), &other_epoch));
        assert_eq!(look(dir.path(), &who()), Peeked::Nothing);
        // The ring of a real volume, of which most is a hole.
        let Opened::Log(mut log) = ReplayLog::open(dir.path(), &who(), 256 << 20).unwrap() else { panic!() };
        let one = log.append(Kind::Write, 0, 5, b"first").unwrap();
        log.append(Kind::Write, 4096, 5, b"hello").unwrap();
        let trim = log.append(Kind::Trim, 0, 1 << 33, &[]).unwrap();
        log.append(Kind::Zero, 512, 512, &[]).unwrap();
        log.void(trim);
        log.void(one);
        drop(log);
        assert_eq!(look(dir.path(), &who()), Peeked::Left { entries: 2, bytes: 517, epoch: 3 });
        let Opened::Log(mut log) = ReplayLog::open(dir.path(), &who(), MIN_CAPACITY).unwrap() else {
            panic!()
        };
        log.clear();
        drop(log);
        assert_eq!(look(dir.path(), &who()), Peeked::Nothing, "an empty log of another capacity");
    }

    #[test]
    fn a_look_tells_a_log_that_is_void_from_one_that_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &who()).append(Kind::Write, 1, 1, &[1]).unwrap();
        let path = dir.path().join(FILE_NAME);
        let good = std::fs::read(&path).unwrap();
        let void = |who: &Identity, needle: &str| match look(dir.path(), who) {
            Peeked::Void { why } => assert!(why.contains(needle), "{why}"),
            other => panic!("{other:?}"),
        };
        void(&Identity { boot: "boot-b".into(), ..who() }, "reboot");
        void(&Identity { volume: "vol2".parse().unwrap(), ..who() }, "vol1");
        for (bad, needle) in [
            (vec![], "no replay log"),
            (b"short".to_vec(), "no replay log"),
            (good[..good.len() - 1].to_vec(), "size"),
            ([&good[..20], &[9; 400], &good[420..532], &[9; 400], &good[932..]].concat(), "damaged"),
        ] {
            std::fs::write(&path, bad).unwrap();
            match look(dir.path(), &who()) {
                Peeked::Damaged { why } => assert!(why.contains(needle), "{why}"),
                other => panic!("{other:?}"),
            }
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(peek(dir.path(), &who().volume, &who().boot).is_err(), "a folder is no log");
    }

    #[test]
    fn a_look_at_a_log_that_a_keeper_has_is_busy_and_takes_nothing_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let peek = || peek(dir.path(), &who().volume, &who().boot);
        let mut log = open(dir.path(), &who());
        log.append(Kind::Trim, 0, 1, &[]).unwrap();
        let busy = peek().unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy);
        let second = ReplayLog::open(dir.path(), &who(), MIN_CAPACITY).unwrap_err();
        assert_eq!(busy.to_string(), second.to_string(), "a look has taken the keeper's lock away");
        drop(log);
        let other_look = File::open(dir.path().join(FILE_NAME)).unwrap();
        other_look.lock_shared().unwrap();
        assert_eq!(peek().unwrap(), Peeked::Left { entries: 1, bytes: 1, epoch: 3 });
    }

    #[test]
    fn two_keepers_cannot_share_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let _first = open(dir.path(), &who());
        let e = ReplayLog::open(dir.path(), &who(), MIN_CAPACITY).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Busy);
    }

    #[test]
    fn memory_and_blocks_come_back_when_the_log_is_empty() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let Opened::Log(mut log) = ReplayLog::open(dir.path(), &who(), 64 << 20).unwrap() else { panic!() };
        let block = vec![1; 1 << 20];
        while log.append(Kind::Write, 0, 1 << 20, &block).is_ok() {}
        let blocks = |log: &ReplayLog| log.file.metadata().unwrap().blocks() * 512;
        assert!(blocks(&log) > 60 << 20);
        log.shrink();
        assert!(blocks(&log) > 60 << 20, "entries in use were punched out");
        let keep = log.seqs().end - 2;
        for seq in log.seqs().start..keep {
            log.ack(seq);
        }
        let before = contents(&log).split_off((keep - log.seqs().start) as usize);
        log.release(log.mark());
        log.shrink();
        assert_eq!(contents(&log), before);
        assert!(blocks(&log) < 10 << 20, "{}", blocks(&log));
        log.clear();
        log.shrink();
        assert!(blocks(&log) <= KEPT + (64 << 10), "{}", blocks(&log));
        log.append(Kind::Write, 0, 1 << 20, &block).unwrap();
        assert_eq!(contents(&log).len(), 1);
    }

    #[test]
    fn an_empty_log_of_another_capacity_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &who()));
        let Opened::Log(mut log) = ReplayLog::open(dir.path(), &who(), 1 << 20).unwrap() else { panic!() };
        assert_eq!(log.capacity(), 1 << 20);
        log.append(Kind::Trim, 0, 1, &[]).unwrap();
        drop(log);
        assert_eq!(open(dir.path(), &who()).capacity(), 1 << 20);
    }
}
