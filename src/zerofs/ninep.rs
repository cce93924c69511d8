//! A small 9P2000.L client: enough to make, grow, look at and remove ZeroFS's devices, which are regular
//! files in its folder `.nbd`, and to ask whether its database is still open.
//!
//! Promises: a device never shrinks; making one twice is the same as making it once; every change is
//! followed by an fsync, without which ZeroFS may forget it; nothing is followed (names are looked up one
//! by one, and what is not a regular file is refused); every answer is bounded and checked.
//!
//! The message numbers and layouts are those of the 9P2000.L protocol (diod, protocol.md; Linux v9fs).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::zerofs::sock;

/// The name of ZeroFS's 9P socket in a volume's run folder.
pub const SOCKET: &str = "9p.sock";

/// ZeroFS's folder of devices.
pub const DEVICES: &str = ".nbd";

/// How long making or growing a device may take: its fsync waits for the object store.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

const VERSION: &str = "9P2000.L";
const MSIZE: u32 = 64 << 10;
const NO_TAG: u16 = u16::MAX;
const NO_FID: u32 = u32::MAX;
const ROOT_FID: u32 = 0;

const RLERROR: u8 = 7;
const TLOPEN: u8 = 12;
const TLCREATE: u8 = 14;
const TGETATTR: u8 = 24;
const TSETATTR: u8 = 26;
const TREADDIR: u8 = 40;
const TFSYNC: u8 = 50;
const TUNLINKAT: u8 = 76;
const TVERSION: u8 = 100;
const TATTACH: u8 = 104;
const TWALK: u8 = 110;
const TCLUNK: u8 = 120;

const QID_DIR: u8 = 0x80;
const GETATTR_BASIC: u64 = 0x7ff;
const SETATTR_SIZE: u32 = 8;
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

/// The most names in one walk (a limit of the protocol).
const MAX_WALK: usize = 16;
/// The longest name, in bytes.
const MAX_NAME: usize = 255;
/// The most entries that [`Ninep::readdir`] collects.
const MAX_ENTRIES: usize = 100_000;

const PEER_HINT: &str = "check that the socket belongs to ZeroFS, then look into the volume's zerofs.log (zerofsctl show VOLUME names it)";

/// What the server calls a file: two files with the same `path` are the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qid {
    /// The type bits: 0x80 is a folder, 0 a regular file.
    pub kind: u8,
    /// Changes with the content, on servers that track it.
    pub version: u32,
    /// The file's number.
    pub path: u64,
}

impl Qid {
    /// Whether it is a folder.
    pub const fn is_dir(&self) -> bool {
        self.kind & QID_DIR != 0
    }
}

/// What [`Ninep::stat`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// The file's identity.
    pub qid: Qid,
    /// Type and permission bits, as in stat(2).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
}

impl Stat {
    /// Whether it is a regular file.
    pub const fn is_file(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }
}

/// One entry of a folder, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// The file's identity.
    pub qid: Qid,
}

/// A request that did not work: the server said so, or the connection is useless.
#[derive(Debug)]
enum Failure {
    Errno(u32),
    Broken(Error),
}

type Reply<T> = std::result::Result<T, Failure>;

impl Failure {
    fn explain(self, what: &str, path: &str) -> Error {
        let errno = match self {
            Failure::Broken(e) => return e.context(format!("cannot {what} {path}")),
            Failure::Errno(errno) => errno,
        };
        let known = nix::errno::Errno::from_raw(i32::try_from(errno).unwrap_or(0));
        let message = format!("cannot {what} {path} over 9P: {known} ({errno})");
        match known {
            nix::Error::ENOENT => {
                Error::new(Kind::NotFound, message).hint("attach the volume with --size to make its device")
            }
            nix::Error::EEXIST => Error::new(Kind::Conflict, message)
                .hint("another program makes the same device; run the command again"),
            nix::Error::ENOSPC => Error::environment(message)
                .hint("raise filesystemMaxSizeGB above the volume's size, or leave it out"),
            nix::Error::EROFS => Error::new(Kind::Conflict, message)
                .hint("attach the volume once without --read-only: only that makes a new volume"),
            nix::Error::EIO => Error::new(Kind::Unreachable, message)
                .hint("ZeroFS has lost its store or was fenced; look into its log (zerofsctl show VOLUME)"),
            _ => Error::failed(message).hint(PEER_HINT),
        }
    }
}

fn violation(what: impl std::fmt::Display) -> Failure {
    Failure::Broken(Error::failed(format!("the 9P server breaks the protocol: {what}")).hint(PEER_HINT))
}

fn broken(e: io::Error) -> Failure {
    let why = match e.kind() {
        io::ErrorKind::UnexpectedEof => "the 9P server closed the connection".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "no answer of the 9P server within the time limit".to_owned()
        }
        _ => format!("9P connection: {e}"),
    };
    Failure::Broken(
        Error::new(Kind::Unreachable, why)
            .hint("look whether ZeroFS is still running, and into its log (zerofsctl show VOLUME)"),
    )
}

/// A message in the making: little-endian numbers and counted strings.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u8, tag: u16) -> Self {
        let mut raw = vec![0, 0, 0, 0, kind];
        raw.extend(tag.to_le_bytes());
        Message(raw)
    }
    fn u16(mut self, v: u16) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    /// The callers keep strings below [`MAX_NAME`] bytes.
    fn text(mut self, s: &str) -> Self {
        self.0.extend((s.len() as u16).to_le_bytes());
        self.0.extend(s.as_bytes());
        self
    }
    fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_le_bytes());
        self.0
    }
}

/// The body of an answer; every read checks that there is enough of it.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn bytes(&mut self, n: usize) -> Reply<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or_else(|| violation("an answer is too short"))?;
        self.0 = rest;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Reply<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }
    fn u8(&mut self) -> Reply<u8> {
        Ok(self.array::<1>()?[0])
    }
    fn u16(&mut self) -> Reply<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> Reply<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn u64(&mut self) -> Reply<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    fn text(&mut self) -> Reply<&'a [u8]> {
        let len = self.u16()?;
        self.bytes(usize::from(len))
    }
    fn qid(&mut self) -> Reply<Qid> {
        Ok(Qid { kind: self.u8()?, version: self.u32()?, path: self.u64()? })
    }
}

/// A connection, attached as root. One request at a time.
#[derive(Debug)]
pub struct Ninep<S> {
    stream: S,
    msize: u32,
    next_fid: u32,
    in_step: bool,
}

impl Ninep<UnixStream> {
    /// Connects to the 9P socket in the run folder `dir`; `limit` bounds the connect and each answer.
    pub fn open(dir: &Path, limit: Duration) -> Result<Self> {
        open(dir, limit).map_err(|e| e.explain("connect to", SOCKET))
    }
}

fn open(dir: &Path, limit: Duration) -> Reply<Ninep<UnixStream>> {
    let stream = sock::connect_within(dir, SOCKET, limit).map_err(|e| {
        let message = format!("cannot connect to ZeroFS at {}: {e}", dir.join(SOCKET).display());
        Failure::Broken(
            Error::new(Kind::Unreachable, message)
                .hint("look whether ZeroFS runs: zerofsctl list; its log: zerofsctl show VOLUME"),
        )
    })?;
    Ninep::start(stream)
}

impl<S: Read + Write> Ninep<S> {
    /// Agrees on 9P2000.L and attaches to the root folder as root. Time limits are the stream's.
    pub fn connect(stream: S) -> Result<Self> {
        Self::start(stream).map_err(|e| e.explain("attach to", "/"))
    }

    fn start(stream: S) -> Reply<Self> {
        let mut me = Ninep { stream, msize: MSIZE, next_fid: ROOT_FID + 1, in_step: true };
        let hello = me.call(Message::new(TVERSION, NO_TAG).u32(MSIZE).text(VERSION))?;
        let mut body = Body(&hello);
        let (msize, version) = (body.u32()?, body.text()?);
        if version != VERSION.as_bytes() {
            return Err(violation(format!("it speaks {:?}", String::from_utf8_lossy(version))));
        }
        if !(4096..=MSIZE).contains(&msize) {
            return Err(violation(format!("messages of {msize} bytes")));
        }
        me.msize = msize;
        let attach = Message::new(TATTACH, 0).u32(ROOT_FID).u32(NO_FID).text("root").text("").u32(0);
        let root = me.call(attach)?;
        if !Body(&root).qid()?.is_dir() {
            return Err(violation("its root is not a folder"));
        }
        Ok(me)
    }

    /// Sends one message and returns the body of its answer.
    fn call(&mut self, message: Message) -> Reply<Vec<u8>> {
        if !self.in_step {
            return Err(Failure::Broken(
                Error::new(Kind::Unreachable, "the 9P connection failed before").hint("connect again"),
            ));
        }
        self.in_step = false;
        let raw = message.finish();
        let (kind, tag) = (raw[4], u16::from_le_bytes([raw[5], raw[6]]));
        self.stream.write_all(&raw).and_then(|()| self.stream.flush()).map_err(broken)?;

        let mut head = [0; 7];
        self.stream.read_exact(&mut head).map_err(broken)?;
        let mut fields = Body(&head);
        let (len, answered, its_tag) = (fields.u32()?, fields.u8()?, fields.u16()?);
        if !(7..=self.msize).contains(&len) {
            return Err(violation(format!("an answer of {len} bytes")));
        }
        if its_tag != tag {
            return Err(violation("an answer to another request"));
        }
        let mut body = vec![0; len as usize - 7];
        self.stream.read_exact(&mut body).map_err(broken)?;
        if answered == RLERROR {
            let errno = Body(&body).u32()?;
            self.in_step = true;
            return Err(if errno == 0 {
                violation("an error with the number 0")
            } else {
                Failure::Errno(errno)
            });
        }
        if answered != kind + 1 {
            return Err(violation(format!("an answer of type {answered} to a request of type {kind}")));
        }
        self.in_step = true;
        Ok(body)
    }

    /// A fresh handle on `path`, or none where a name does not exist.
    fn handle(&mut self, path: &str) -> Reply<Option<(u32, Qid)>> {
        let names: Vec<&str> = path.split('/').filter(|n| !n.is_empty()).collect();
        if names.len() > MAX_WALK || names.iter().any(|n| bad_name(n)) {
            return Err(Failure::Broken(
                Error::usage(format!("invalid path {path:?} for 9P")).hint("use plain, short names"),
            ));
        }
        let fid = self.next_fid;
        // 2³² handles on one connection will not happen; zero and the last are taken.
        self.next_fid = self.next_fid.checked_add(1).filter(|f| *f != NO_FID).unwrap_or(ROOT_FID + 1);
        let mut walk = Message::new(TWALK, 0).u32(ROOT_FID).u32(fid).u16(names.len() as u16);
        for name in &names {
            walk = walk.text(name);
        }
        let answer = match self.call(walk) {
            Err(Failure::Errno(errno)) if errno == libc::ENOENT as u32 => return Ok(None),
            other => other?,
        };
        let mut body = Body(&answer);
        let found = usize::from(body.u16()?);
        if found > names.len() {
            return Err(violation("it walked further than asked"));
        }
        if found < names.len() {
            // Only part of the path exists; the server has made no handle.
            return Ok(None);
        }
        let mut qid = Qid { kind: QID_DIR, version: 0, path: 0 };
        for _ in 0..found {
            qid = body.qid()?;
        }
        Ok(Some((fid, qid)))
    }

    /// Runs `work` on a handle of `path`, and lets the handle go. None where the path does not exist.
    fn with<T>(
        &mut self,
        path: &str,
        work: impl FnOnce(&mut Self, u32, Qid) -> Reply<T>,
    ) -> Reply<Option<T>> {
        let Some((fid, qid)) = self.handle(path)? else { return Ok(None) };
        let result = work(self, fid, qid);
        if self.in_step {
            let clunked = self.call(Message::new(TCLUNK, 0).u32(fid));
            if result.is_ok() {
                clunked?;
            }
        }
        result.map(Some)
    }

    fn existing<T>(&mut self, path: &str, work: impl FnOnce(&mut Self, u32, Qid) -> Reply<T>) -> Reply<T> {
        self.with(path, work)?.ok_or(Failure::Errno(libc::ENOENT as u32))
    }

    /// The identity of `path` (names separated by `/`), or none.
    pub fn walk(&mut self, path: &str) -> Result<Option<Qid>> {
        self.with(path, |_, _, qid| Ok(qid)).map_err(|e| e.explain("look up", path))
    }

    /// The attributes of `path`, or none.
    pub fn stat(&mut self, path: &str) -> Result<Option<Stat>> {
        self.with(path, |me, fid, _| {
            let answer = me.call(Message::new(TGETATTR, 0).u32(fid).u64(GETATTR_BASIC))?;
            let mut body = Body(&answer);
            let (_valid, qid) = (body.u64()?, body.qid()?);
            let (mode, uid, gid) = (body.u32()?, body.u32()?, body.u32()?);
            let (_nlink, _rdev, size) = (body.u64()?, body.u64()?, body.u64()?);
            Ok(Stat { qid, mode, uid, gid, size })
        })
        .map_err(|e| e.explain("look at", path))
    }

    /// Makes the empty file `path`, mode 0600; one that exists already is [`Kind::Conflict`].
    pub fn create_file(&mut self, path: &str) -> Result<()> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let made = if bad_name(name) {
            Err(Failure::Errno(libc::EINVAL as u32))
        } else {
            self.existing(folder, |me, fid, _| {
                let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32;
                me.call(Message::new(TLCREATE, 0).u32(fid).text(name).u32(flags).u32(0o600).u32(0))?;
                // The handle stands for the new file now.
                me.call(Message::new(TFSYNC, 0).u32(fid).u32(0))
            })
        };
        made.map(drop).map_err(|e| e.explain("create", path))
    }

    /// Sets the size of the file `path` in bytes, and makes it durable.
    pub fn set_size(&mut self, path: &str, size: u64) -> Result<()> {
        self.existing(path, |me, fid, _| {
            let mut message = Message::new(TSETATTR, 0).u32(fid).u32(SETATTR_SIZE);
            message = message.u32(0).u32(0).u32(0).u64(size);
            message = message.u64(0).u64(0).u64(0).u64(0);
            me.call(message)?;
            me.call(Message::new(TFSYNC, 0).u32(fid).u32(0))
        })
        .map(drop)
        .map_err(|e| e.explain("set the size of", path))
    }

    /// Makes everything that ZeroFS has acknowledged durable, `path`'s content among it.
    pub fn fsync(&mut self, path: &str) -> Result<()> {
        self.existing(path, |me, fid, _| me.call(Message::new(TFSYNC, 0).u32(fid).u32(0)))
            .map(drop)
            .map_err(|e| e.explain("fsync", path))
    }

    /// Removes the file `path`; false when it is not there. Never for a device in use.
    pub fn unlink(&mut self, path: &str) -> Result<bool> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let removed = if bad_name(name) {
            Err(Failure::Errno(libc::EINVAL as u32))
        } else {
            self.with(folder, |me, fid, _| {
                match me.call(Message::new(TUNLINKAT, 0).u32(fid).text(name).u32(0)) {
                    Err(Failure::Errno(errno)) if errno == libc::ENOENT as u32 => return Ok(false),
                    other => other?,
                };
                me.call(Message::new(TFSYNC, 0).u32(fid).u32(0))?;
                Ok(true)
            })
        };
        removed.map(|r| r.unwrap_or(false)).map_err(|e| e.explain("remove", path))
    }

    /// The entries of the folder `path`; at most 100,000, more are an error.
    pub fn readdir(&mut self, path: &str) -> Result<Vec<Entry>> {
        let room = self.msize - 11;
        self.existing(path, |me, fid, _| {
            me.call(Message::new(TLOPEN, 0).u32(fid).u32(libc::O_RDONLY as u32))?;
            let mut entries = Vec::new();
            let mut offset = 0;
            for _ in 0..MAX_ENTRIES {
                let answer = me.call(Message::new(TREADDIR, 0).u32(fid).u64(offset).u32(room))?;
                let mut body = Body(&answer);
                let count = body.u32()? as usize;
                let mut data = Body(body.bytes(count)?);
                if data.0.is_empty() {
                    return Ok(entries);
                }
                let start = offset;
                while !data.0.is_empty() {
                    let qid = data.qid()?;
                    offset = data.u64()?;
                    let (_kind, name) = (data.u8()?, data.text()?);
                    if name != b"." && name != b".." {
                        entries.push(Entry { name: String::from_utf8_lossy(name).into_owned(), qid });
                    }
                }
                if offset == start || entries.len() > MAX_ENTRIES {
                    break;
                }
            }
            Err(violation("a folder without end"))
        })
        .map_err(|e| e.explain("list", path))
    }

    /// The size of the device `export` in bytes, or none. What is not a regular file is [`Kind::Refused`].
    pub fn disk_size(&mut self, export: &str) -> Result<Option<u64>> {
        let path = device(export)?;
        match self.stat(&path)? {
            None => Ok(None),
            Some(stat) if stat.is_file() => Ok(Some(stat.size)),
            Some(_) => Err(Error::refused(format!("{path} in ZeroFS is not a regular file"))
                .hint("move it away by hand: zerofsctl never touches what it did not make")),
        }
    }

    /// Makes the device `export` with `size` bytes. One of that size is left as it is, an empty one (a
    /// killed run's) is completed; any other size is [`Kind::Conflict`], and nothing changes.
    pub fn create_disk(&mut self, export: &str, size: u64) -> Result<()> {
        let path = device(export)?;
        check_size(size)?;
        match self.disk_size(export)? {
            Some(now) if now == size => return self.fsync(&path),
            Some(0) => {}
            Some(now) => {
                return Err(Error::new(
                    Kind::Conflict,
                    format!("the volume's device has {now} bytes, not the {size} asked for"),
                )
                .hint(
                    "leave --size out to take it as it is; to make it larger: zerofsctl resize VOLUME SIZE",
                ));
            }
            None => self.create_file(&path)?,
        }
        self.set_size(&path, size)?;
        self.verify(export, size)
    }

    /// Makes the device `export` larger. `size` bytes already is fine; shrinking is [`Kind::Refused`].
    pub fn grow_disk(&mut self, export: &str, size: u64) -> Result<()> {
        let path = device(export)?;
        check_size(size)?;
        match self.disk_size(export)? {
            None => {
                return Err(Error::new(Kind::NotFound, format!("the volume has no device {export:?}"))
                    .hint("attach the volume with --size to make it"));
            }
            Some(now) if now > size => {
                return Err(Error::refused(format!(
                    "the volume's device has {now} bytes: making it {size} would cut data off"
                ))
                .hint("volumes only grow; copy the data to a new, smaller volume"));
            }
            Some(now) if now == size => return self.fsync(&path),
            Some(_) => {}
        }
        self.set_size(&path, size)?;
        self.verify(export, size)
    }

    fn verify(&mut self, export: &str, size: u64) -> Result<()> {
        match self.disk_size(export)? {
            Some(now) if now == size => Ok(()),
            now => Err(Error::failed(format!("ZeroFS set the device to {now:?} bytes instead of {size}"))
                .hint(PEER_HINT)),
        }
    }

    /// Whether ZeroFS's database is still open. A server that lost its store or was fenced lives on and
    /// answers from its caches, so the question is one that no cache can answer: a name that never existed.
    pub fn database_open(&mut self) -> Result<bool> {
        let name = format!(".zerofsctl-probe-{:016x}", rand::random::<u64>());
        match self.with(&format!("{DEVICES}/{name}"), |_, _, _| Ok(())) {
            Ok(_) => Ok(true),
            Err(Failure::Errno(errno)) if errno == libc::EIO as u32 => Ok(false),
            Err(e) => Err(e.explain("look up a name in", DEVICES)),
        }
    }
}

fn bad_name(name: &str) -> bool {
    name.is_empty()
        || name.len() > MAX_NAME
        || name == "."
        || name == ".."
        || name.bytes().any(|b| b == b'/' || b == 0)
}

fn device(export: &str) -> Result<String> {
    if bad_name(export) {
        return Err(Error::usage(format!("invalid export name {export:?}")).hint("the usual name is: disk"));
    }
    Ok(format!("{DEVICES}/{export}"))
}

fn check_size(size: u64) -> Result<()> {
    if size == 0 || size > i64::MAX as u64 {
        return Err(
            Error::usage(format!("a device of {size} bytes is impossible")).hint("give a size such as 10Gi")
        );
    }
    Ok(())
}

/// The size of the device `export` of the ZeroFS in run folder `dir`, or none.
pub fn disk_size(dir: &Path, export: &str) -> Result<Option<u64>> {
    Ninep::open(dir, sock::CONTROL_TIMEOUT)?.disk_size(export)
}

/// See [`Ninep::create_disk`].
pub fn create_disk(dir: &Path, export: &str, size: u64) -> Result<()> {
    Ninep::open(dir, CHANGE_TIMEOUT)?.create_disk(export, size)
}

/// See [`Ninep::grow_disk`].
pub fn grow_disk(dir: &Path, export: &str, size: u64) -> Result<()> {
    Ninep::open(dir, CHANGE_TIMEOUT)?.grow_disk(export, size)
}

/// Removes the device `export`; false when there is none. Never while it is attached.
pub fn unlink_disk(dir: &Path, export: &str) -> Result<bool> {
    let path = device(export)?;
    Ninep::open(dir, CHANGE_TIMEOUT)?.unlink(&path)
}

/// Whether the database of the ZeroFS in run folder `dir` is still open; see [`Ninep::database_open`].
/// No answer within [`sock::CONTROL_TIMEOUT`] is an error, not a "no".
pub fn database_open(dir: &Path) -> Result<bool> {
    database_open_within(dir, sock::CONTROL_TIMEOUT)
}

/// [`database_open`] with its own time limit.
pub fn database_open_within(dir: &Path, limit: Duration) -> Result<bool> {
    match open(dir, limit) {
        Ok(mut server) => server.database_open(),
        // Even attaching needs the root folder's record.
        Err(Failure::Errno(errno)) if errno == libc::EIO as u32 => Ok(false),
        Err(e) => Err(e.explain("connect to", SOCKET)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A server that gives prepared answers, whatever it is asked, and keeps the questions.
    struct Script {
        answers: io::Cursor<Vec<u8>>,
        asked: Vec<Vec<u8>>,
    }

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.answers.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.asked.push(buf.to_vec());
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const DIR: [u8; 13] = [0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    const FILE: [u8; 13] = [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];

    fn answer(request: u8, body: &[u8]) -> Vec<u8> {
        Message(Message::new(request + 1, 0).0.into_iter().chain(body.iter().copied()).collect()).finish()
    }

    fn error(errno: i32) -> Vec<u8> {
        answer(RLERROR - 1, &(errno as u32).to_le_bytes())
    }

    fn version(msize: u32, text: &str) -> Vec<u8> {
        Message::new(TVERSION + 1, NO_TAG).u32(msize).text(text).finish()
    }

    fn hello() -> Vec<u8> {
        [version(MSIZE, VERSION), answer(TATTACH, &DIR)].concat()
    }

    fn walked(qids: &[[u8; 13]]) -> Vec<u8> {
        answer(TWALK, &[&(qids.len() as u16).to_le_bytes()[..], &qids.concat()].concat())
    }

    fn attr(mode: u32, size: u64) -> Vec<u8> {
        let mut body = GETATTR_BASIC.to_le_bytes().to_vec();
        body.extend(FILE);
        body.extend([mode, 0, 0].map(u32::to_le_bytes).concat());
        body.extend([1, 0, size].map(u64::to_le_bytes).concat());
        body.extend([0; 96]);
        answer(TGETATTR, &body)
    }

    fn client(answers: &[Vec<u8>]) -> Result<Ninep<Script>> {
        let answers = io::Cursor::new(answers.concat());
        Ninep::connect(Script { answers, asked: Vec::new() })
    }

    fn looked(mode: u32, size: u64) -> Vec<u8> {
        [walked(&[DIR, FILE]), attr(mode, size), answer(TCLUNK, &[])].concat()
    }

    fn done(request: u8) -> Vec<u8> {
        answer(request, &[])
    }

    /// The types of the messages that were sent, without the first two.
    fn asked(c: &Ninep<Script>) -> Vec<u8> {
        c.stream.asked[2..].iter().map(|m| m[4]).collect()
    }

    #[test]
    fn messages_have_the_wire_form_of_the_protocol() {
        let mut c =
            client(&[hello(), walked(&[DIR, FILE]), done(TSETATTR), done(TFSYNC), done(TCLUNK)]).unwrap();
        c.set_size(".nbd/disk", 0x0102_0304_0506).unwrap();
        let sent = &c.stream.asked;
        let mut want = vec![21, 0, 0, 0, 100, 0xff, 0xff, 0, 0, 1, 0, 8, 0];
        want.extend(b"9P2000.L");
        assert_eq!(sent[0], want);
        let mut want = vec![27, 0, 0, 0, 104, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 4, 0];
        want.extend(b"root\0\0\0\0\0\0");
        assert_eq!(sent[1], want);
        let mut want = vec![29, 0, 0, 0, 110, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 4, 0];
        want.extend(b".nbd\x04\0disk");
        assert_eq!(sent[2], want);
        let mut want = vec![67, 0, 0, 0, 26, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0];
        want.extend([0; 12]);
        want.extend([6, 5, 4, 3, 2, 1, 0, 0]);
        want.extend([0; 32]);
        assert_eq!(sent[3], want);
        assert_eq!(sent[4], [15, 0, 0, 0, 50, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(sent[5], [11, 0, 0, 0, 120, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn what_is_not_there_is_none_and_not_an_error() {
        for nothing in [error(libc::ENOENT), walked(&[DIR]), walked(&[])] {
            let mut c = client(&[hello(), nothing]).unwrap();
            assert_eq!(c.stat(".nbd/disk").unwrap(), None);
        }
        let mut c = client(&[hello(), error(libc::ENOENT)]).unwrap();
        assert_eq!(c.set_size(".nbd/disk", 1).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn making_a_device_is_idempotent_and_never_shrinks() {
        let made =
            [walked(&[DIR]), answer(TLCREATE, &[&FILE[..], &[0; 4]].concat()), done(TFSYNC), done(TCLUNK)];
        let sized = [walked(&[DIR, FILE]), done(TSETATTR), done(TFSYNC), done(TCLUNK)];
        let synced = [walked(&[DIR, FILE]), done(TFSYNC), done(TCLUNK)];
        let disk = S_IFREG | 0o600;

        let fresh = [hello(), error(libc::ENOENT), made.concat(), sized.concat(), looked(disk, 4096)];
        let mut c = client(&fresh).unwrap();
        c.create_disk("disk", 4096).unwrap();
        let setattr = asked(&c).iter().position(|k| *k == TSETATTR).unwrap();
        assert_eq!(asked(&c)[setattr + 1], TFSYNC, "an fsync follows the change");

        let mut half = client(&[hello(), looked(disk, 0), sized.concat(), looked(disk, 4096)]).unwrap();
        half.create_disk("disk", 4096).unwrap();
        assert!(!asked(&half).contains(&TLCREATE));

        let mut again = client(&[hello(), looked(disk, 4096), synced.concat()]).unwrap();
        again.create_disk("disk", 4096).unwrap();
        assert!(!asked(&again).contains(&TSETATTR) && asked(&again).contains(&TFSYNC));

        for (size, mode, kind) in [
            (8192, disk, Kind::Conflict),
            (1, disk, Kind::Conflict),
            (4096, 0o040_755, Kind::Refused),
            (4096, 0o120_777, Kind::Refused),
        ] {
            let mut c = client(&[hello(), looked(mode, size)]).unwrap();
            let e = c.create_disk("disk", 4096).unwrap_err();
            assert!(e.kind() == kind && e.hint_text().is_some(), "{e}");
            assert!(!asked(&c).contains(&TSETATTR));
        }

        let mut c = client(&[hello(), looked(disk, 8192)]).unwrap();
        assert_eq!(c.grow_disk("disk", 4096).unwrap_err().kind(), Kind::Refused);
        assert!(!asked(&c).contains(&TSETATTR));
        let mut c = client(&[hello(), looked(disk, 4096), sized.concat(), looked(disk, 8192)]).unwrap();
        c.grow_disk("disk", 8192).unwrap();
        let mut c = client(&[hello(), error(libc::ENOENT)]).unwrap();
        assert_eq!(c.grow_disk("disk", 8192).unwrap_err().kind(), Kind::NotFound);
        let mut liar = client(&[hello(), looked(disk, 0), sized.concat(), looked(disk, 1)]).unwrap();
        assert_eq!(liar.create_disk("disk", 4096).unwrap_err().kind(), Kind::Failed);
    }

    #[test]
    fn bad_names_and_sizes_are_never_sent() {
        let mut c = client(&[hello()]).unwrap();
        for name in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
            assert_eq!(c.create_disk(name, 1).unwrap_err().kind(), Kind::Usage, "{name:?}");
            assert_eq!(c.disk_size(name).unwrap_err().kind(), Kind::Usage, "{name:?}");
        }
        for size in [0, u64::MAX] {
            assert_eq!(c.create_disk("disk", size).unwrap_err().kind(), Kind::Usage);
            assert_eq!(c.grow_disk("disk", size).unwrap_err().kind(), Kind::Usage);
        }
        assert_eq!(c.stat("a/../b").unwrap_err().kind(), Kind::Usage);
        assert_eq!(c.stat(&"x/".repeat(17)).unwrap_err().kind(), Kind::Usage);
        assert!(asked(&c).is_empty());
    }

    #[test]
    fn a_closed_database_is_told_from_a_missing_name() {
        for (given, open) in [(error(libc::ENOENT), true), (walked(&[DIR]), true), (error(libc::EIO), false)]
        {
            assert_eq!(client(&[hello(), given]).unwrap().database_open().unwrap(), open);
        }
        let e = client(&[hello(), error(libc::EACCES)]).unwrap().database_open().unwrap_err();
        assert_eq!(e.kind(), Kind::Failed);
        assert_eq!(client(&[hello()]).unwrap().database_open().unwrap_err().kind(), Kind::Unreachable);
    }

    #[test]
    fn a_folder_is_listed_to_its_end() {
        let entry = |qid: &[u8], offset: u64, name: &[u8]| {
            [qid, &offset.to_le_bytes(), &[8], &(name.len() as u16).to_le_bytes(), name].concat()
        };
        let page = |entries: &[Vec<u8>]| {
            let data = entries.concat();
            answer(TREADDIR, &[&(data.len() as u32).to_le_bytes()[..], &data].concat())
        };
        let opened = [walked(&[DIR]), answer(TLOPEN, &[&DIR[..], &[0; 4]].concat())].concat();
        let first = page(&[entry(&DIR, 1, b"."), entry(&DIR, 2, b".."), entry(&FILE, 3, b"disk")]);
        let second = page(&[entry(&FILE, 4, b"other")]);
        let mut c =
            client(&[hello(), opened.clone(), first.clone(), second, page(&[]), done(TCLUNK)]).unwrap();
        let names: Vec<_> = c.readdir(".nbd").unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["disk", "other"]);
        let stuck = page(&[entry(&FILE, 3, b"disk")]);
        let mut c = client(&[hello(), opened, first, stuck, done(TCLUNK)]).unwrap();
        assert!(c.readdir(".nbd").unwrap_err().message().contains("without end"));
    }

    #[test]
    fn a_server_that_talks_nonsense_is_left() {
        for (answers, what) in [
            (vec![version(MSIZE, "unknown")], "another protocol"),
            (vec![version(MSIZE + 1, VERSION)], "larger messages than asked for"),
            (vec![version(100, VERSION)], "tiny messages"),
            (vec![version(MSIZE, VERSION), answer(TATTACH, &FILE)], "a root that is a file"),
            (vec![version(MSIZE, VERSION), answer(TATTACH, &[1])], "too short"),
            (vec![version(MSIZE, VERSION), answer(TWALK, &DIR)], "an answer to something else"),
            (vec![version(MSIZE, VERSION), version(MSIZE, VERSION)], "a wrong tag"),
            (vec![version(MSIZE, VERSION), error(0)], "no error after all"),
            (vec![vec![0xff; 64]], "a huge message"),
            (vec![vec![0; 64]], "an empty message"),
        ] {
            let e = client(&answers).err().unwrap_or_else(|| panic!("{what}"));
            assert!(e.kind() == Kind::Failed && e.hint_text().is_some(), "{what}: {e}");
        }
        assert_eq!(client(&[]).err().unwrap().kind(), Kind::Unreachable);
    }

    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let bytes = proptest::collection::vec(any::<u8>(), 0..60);
        prop_oneof![
            bytes.clone(),
            (any::<u8>(), bytes).prop_map(|(kind, body)| answer(kind & 0x7e, &body)),
            proptest::collection::vec(Just(FILE), 0..4).prop_map(|q| walked(&q)),
            any::<u64>().prop_map(|size| attr(S_IFREG, size)),
            (0i32..140).prop_map(error),
            prop_oneof![Just(TCLUNK), Just(TFSYNC), Just(TSETATTR), Just(TLOPEN), Just(TREADDIR)]
                .prop_map(done),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn a_hostile_server_never_causes_a_panic(
            greeted in any::<bool>(),
            pieces in proptest::collection::vec(piece(), 0..16),
        ) {
            let start = if greeted { hello() } else { Vec::new() };
            let answers = [start, pieces.concat()];
            for what in 0..5 {
                let Ok(mut c) = client(&answers) else { continue };
                match what {
                    0 => drop(c.create_disk("disk", 4096)),
                    1 => drop(c.grow_disk("disk", 4096)),
                    2 => drop(c.readdir(".nbd")),
                    3 => drop(c.unlink(".nbd/disk")),
                    _ => drop(c.database_open()),
                }
            }
        }
    }
}
