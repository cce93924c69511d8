//! The client side of the NBD protocol: wire forms, the handshake, and a simple blocking client.
//!
//! Nothing that a server sends is trusted: magic numbers, lengths, offsets and cookies are checked, and
//! no allocation is larger than a bound chosen here, whatever a length field says. Time limits are the
//! stream's (see [`super::sock`]): a read or write that times out ends the connection with an error.
//!
//! The numbers are those of the NBD protocol specification (NetworkBlockDevice/nbd, doc/proto.md).

use std::io::{self, Read, Write};

use serde::Serialize;

use crate::error::{Error, Kind, Result};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
const HANDSHAKE_NO_ZEROES: u16 = 2;

const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERROR + 1;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;

const ALLOCATION: &str = "base:allocation";

/// Request flag: the write is durable before it is acknowledged.
pub const FLAG_FUA: u16 = 1;
/// Request flag: write zeroes, but do not make a hole.
pub const FLAG_NO_HOLE: u16 = 2;
/// Request flag: write zeroes only if that is faster than writing data, else fail with ENOTSUP.
pub const FLAG_FAST_ZERO: u16 = 16;

/// The largest payload of one request that we ever send or expect, in bytes; the protocol's default limit.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The longest export name of the protocol, in bytes.
pub const MAX_NAME: usize = 4096;

/// The longest reply to an option that we read, in bytes.
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// The most replies to one option; a server that sends more is talking nonsense for ever.
const MAX_OPTION_REPLIES: usize = 256;
/// The most chunks of one structured reply.
const MAX_CHUNKS: usize = 1 << 16;
/// The longest payload of a chunk that is not data, in bytes (QEMU sends up to 1 MiB of extents).
const MAX_CHUNK: u32 = (1 << 20) + 64;

const PEER_HINT: &str = "check that the socket belongs to ZeroFS, then look into the volume's zerofs.log (zerofsctl show VOLUME names it)";

/// What a server says it can do with an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct TransmissionFlags(u16);

impl TransmissionFlags {
    /// From the 16 bits of the wire; a server that does not set the "has flags" bit offers nothing.
    pub const fn new(bits: u16) -> Self {
        TransmissionFlags(if bits & 1 == 0 { 0 } else { bits })
    }

    /// The bits as on the wire.
    pub const fn bits(self) -> u16 {
        self.0
    }

    const fn bit(self, n: u16) -> bool {
        self.0 & (1 << n) != 0
    }

    /// Writes fail.
    pub const fn is_read_only(self) -> bool {
        self.bit(1)
    }
    /// FLUSH is understood.
    pub const fn has_flush(self) -> bool {
        self.bit(2)
    }
    /// Force unit access is understood.
    pub const fn has_fua(self) -> bool {
        self.bit(3)
    }
    /// TRIM is understood.
    pub const fn has_trim(self) -> bool {
        self.bit(5)
    }
    /// WRITE_ZEROES is understood.
    pub const fn has_write_zeroes(self) -> bool {
        self.bit(6)
    }
    /// A flush on one connection covers the acknowledged writes of all.
    pub const fn can_multi_conn(self) -> bool {
        self.bit(8)
    }
    /// CACHE is understood.
    pub const fn has_cache(self) -> bool {
        self.bit(10)
    }
    /// The fast-zero request flag is understood.
    pub const fn has_fast_zero(self) -> bool {
        self.bit(11)
    }
}

/// An export, as the server describes it in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Export {
    /// Size in bytes, at most `i64::MAX`.
    pub size: u64,
    /// What the server can do.
    pub flags: TransmissionFlags,
    /// The unit that offsets and lengths must be multiples of, in bytes; 1 when the server tells none.
    pub min_block: u32,
    /// The unit that is fast, in bytes; 4096 when the server tells none.
    pub preferred_block: u32,
    /// The largest payload of one request, in bytes; 32 MiB when the server tells none.
    pub max_block: u32,
}

impl Export {
    /// The largest payload that we send in one request: the server's limit, at most [`MAX_PAYLOAD`], and a
    /// multiple of the smallest block.
    pub fn max_request(&self) -> u32 {
        let max = self.max_block.min(MAX_PAYLOAD);
        max - max % self.min_block
    }
}

/// The commands of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u16)]
pub enum Command {
    /// Reads bytes.
    Read = 0,
    /// Writes bytes.
    Write = 1,
    /// Ends the connection; it has no reply.
    Disc = 2,
    /// Makes all acknowledged writes durable.
    Flush = 3,
    /// The bytes are not needed any more.
    Trim = 4,
    /// Reads ahead.
    Cache = 5,
    /// Writes zeroes without sending them.
    WriteZeroes = 6,
    /// Tells holes from data; needs structured replies.
    BlockStatus = 7,
}

impl Command {
    /// Every command, in the order of their numbers.
    pub const ALL: [Command; 8] = [
        Command::Read,
        Command::Write,
        Command::Disc,
        Command::Flush,
        Command::Trim,
        Command::Cache,
        Command::WriteZeroes,
        Command::BlockStatus,
    ];
}

/// The fixed part of a request; the payload of a write follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// [`FLAG_FUA`] and its siblings.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The reply carries the same number.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u32,
}

impl RequestHeader {
    /// The length of an encoded header, in bytes.
    pub const LEN: usize = 28;

    /// The wire form.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&(self.command as u16).to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// The reverse of [`encode`](Self::encode): for servers, which our tests are.
    pub fn decode(raw: &[u8; Self::LEN]) -> Result<Self> {
        let mut r = Bytes(raw);
        let magic = r.u32();
        if magic != REQUEST_MAGIC {
            return Err(violation(format!("a request starts with {magic:#010x}, not {REQUEST_MAGIC:#010x}")));
        }
        let (flags, number) = (r.u16(), r.u16());
        let command = Command::ALL.into_iter().find(|c| *c as u16 == number);
        let command = command.ok_or_else(|| violation(format!("unknown command {number}")))?;
        Ok(RequestHeader { flags, command, cookie: r.u64(), offset: r.u64(), len: r.u32() })
    }
}

/// A simple reply; the data of a successful read follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an error number of the protocol (those of Linux: 5 is EIO).
    pub error: u32,
    /// The number of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// The length of an encoded reply, in bytes.
    pub const LEN: usize = 16;

    /// Checks the magic number. The caller matches the cookie, since it knows what is in flight.
    pub fn decode(raw: &[u8; Self::LEN]) -> Result<Self> {
        let mut r = Bytes(raw);
        let magic = r.u32();
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(violation(format!(
                "a reply starts with {magic:#010x}, not {SIMPLE_REPLY_MAGIC:#010x}"
            )));
        }
        Ok(SimpleReply { error: r.u32(), cookie: r.u64() })
    }

    /// The wire form: for servers, which our tests are.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&self.error.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out
    }
}

/// Reads big-endian numbers off a slice that is known to be long enough: every caller checks or fixes the
/// length first, and a short one gives zeros rather than a panic.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        out[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        out
    }
    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }
}

fn violation(what: impl std::fmt::Display) -> Error {
    Error::failed(format!("the NBD server breaks the protocol: {what}")).hint(PEER_HINT)
}

fn broken(what: &str, e: io::Error) -> Error {
    let why = match e.kind() {
        io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer within the time limit".to_owned(),
        _ => e.to_string(),
    };
    Error::new(Kind::Unreachable, format!("cannot {what} over NBD: {why}"))
        .hint("look whether ZeroFS is still running, and into its log (zerofsctl show VOLUME)")
}

fn get<const N: usize>(s: &mut impl Read, what: &str) -> Result<[u8; N]> {
    let mut raw = [0; N];
    s.read_exact(&mut raw).map_err(|e| broken(what, e))?;
    Ok(raw)
}

/// Opens `export` on a fresh connection: fixed newstyle, no zero padding, `OPT_GO` asking for block sizes,
/// and no structured replies. The stream is in the transmission phase afterwards.
///
/// An export that the server does not know is [`Kind::NotFound`]; a dead or silent server is
/// [`Kind::Unreachable`]; a server that talks something else is [`Kind::Failed`].
pub fn handshake<S: Read + Write>(s: &mut S, export: &str) -> Result<Export> {
    greet(s)?;
    describe(s, OPT_GO, export)
}

/// A connection that stays in the handshake and only asks about exports, as often as wanted.
///
/// ZeroFS answers from its database, not from its caches, and needs nothing from the store for an export in
/// use. So this is the cheapest way to learn that the database is still open: [`Inquiry::info`] succeeds. A
/// closed database looks like a missing export; [`super::ninep::database_open`] can tell the two apart.
#[derive(Debug)]
pub struct Inquiry<S> {
    stream: S,
    in_step: bool,
}

impl<S: Read + Write> Inquiry<S> {
    /// Greets the server on a fresh connection.
    pub fn start(mut stream: S) -> Result<Self> {
        greet(&mut stream)?;
        Ok(Inquiry { stream, in_step: true })
    }

    /// Describes `export`; one that the server does not know is [`Kind::NotFound`], and the connection stays
    /// usable. After any other error it is not.
    pub fn info(&mut self, export: &str) -> Result<Export> {
        if !self.in_step {
            return Err(
                Error::new(Kind::Unreachable, "the NBD connection failed before").hint("connect again")
            );
        }
        let answer = describe(&mut self.stream, OPT_INFO, export);
        self.in_step = match &answer {
            Ok(_) => true,
            Err(e) => e.kind() == Kind::NotFound,
        };
        answer
    }
}

impl<S: Read + Write> Inquiry<S> {
    /// The names of the exports that the server tells; none when it does not tell.
    pub fn list(&mut self) -> Result<Option<Vec<String>>> {
        self.step(|stream| {
            send_option(stream, OPT_LIST, &[])?;
            let mut names = Vec::new();
            for _ in 0..MAX_OPTION_REPLIES {
                match option_reply(stream, OPT_LIST)? {
                    (REP_ACK, _) => return Ok(Some(names)),
                    (REP_SERVER, data) => {
                        let len = Bytes(&data).u32() as usize;
                        let name = data.get(4..).and_then(|rest| rest.get(..len));
                        let name = name.ok_or_else(|| violation("an export name longer than its message"))?;
                        let name = std::str::from_utf8(name);
                        names.push(
                            name.map_err(|_| violation("an export name that is not UTF-8"))?.to_owned(),
                        );
                    }
                    (kind, _) if kind >= REP_ERROR => return Ok(None),
                    (kind, _) => return Err(violation(format!("option reply type {kind}"))),
                }
            }
            Err(violation("it lists exports without end"))
        })
    }

    /// Whether the server agrees to structured replies. They stay agreed on for the connection.
    pub fn structured(&mut self) -> Result<bool> {
        self.step(|stream| structured_replies(stream))
    }

    /// Whether the server tells holes from data for `export`, by `base:allocation`; needs structured replies.
    pub fn has_block_status(&mut self, export: &str) -> Result<bool> {
        check_name(export)?;
        self.step(|stream| allocation_context(stream, export).map(|context| context.is_some()))
    }

    fn step<T>(&mut self, question: impl FnOnce(&mut S) -> Result<T>) -> Result<T> {
        if !self.in_step {
            return Err(
                Error::new(Kind::Unreachable, "the NBD connection failed before").hint("connect again")
            );
        }
        let answer = question(&mut self.stream);
        self.in_step = answer.is_ok();
        answer
    }
}

/// Asks for structured replies; false when the server has none.
fn structured_replies<S: Read + Write>(s: &mut S) -> Result<bool> {
    send_option(s, OPT_STRUCTURED_REPLY, &[])?;
    match option_reply(s, OPT_STRUCTURED_REPLY)? {
        (REP_ACK, _) => Ok(true),
        (kind, _) if kind >= REP_ERROR => Ok(false),
        (kind, _) => Err(violation(format!("option reply type {kind}"))),
    }
}

const OPENING: &str = "open the export";

fn greet<S: Read + Write>(s: &mut S) -> Result<()> {
    let hello: [u8; 18] = get(s, OPENING)?;
    let mut r = Bytes(&hello);
    if (r.u64(), r.u64()) != (NBD_MAGIC, OPTION_MAGIC) {
        return Err(violation("its greeting is not that of a newstyle server"));
    }
    let flags = r.u16();
    let wanted = HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES;
    if flags & wanted != wanted {
        return Err(violation(format!("it is too old (handshake flags {flags:#06x})")));
    }
    s.write_all(&u32::from(wanted).to_be_bytes()).map_err(|e| broken(OPENING, e))
}

fn send_option<S: Write>(s: &mut S, option: u32, data: &[u8]) -> Result<()> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    s.write_all(&out).and_then(|()| s.flush()).map_err(|e| broken(OPENING, e))
}

/// One reply to `option`: its type and payload.
fn option_reply<S: Read>(s: &mut S, option: u32) -> Result<(u32, Vec<u8>)> {
    let head: [u8; 20] = get(s, OPENING)?;
    let mut r = Bytes(&head);
    if r.u64() != OPTION_REPLY_MAGIC {
        return Err(violation("an option reply has a wrong magic number"));
    }
    let (answered, kind, len) = (r.u32(), r.u32(), r.u32());
    if answered != option {
        return Err(violation(format!("it answers option {answered} instead of {option}")));
    }
    if len > MAX_OPTION_REPLY {
        return Err(violation(format!("an option reply of {len} bytes")));
    }
    let mut data = vec![0; len as usize];
    s.read_exact(&mut data).map_err(|e| broken(OPENING, e))?;
    Ok((kind, data))
}

/// `\xNN` and control characters of a foreign text made harmless, at most 200 characters of it.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().take(200).flat_map(char::escape_debug).collect()
}

fn option_error(kind: u32, data: &[u8], export: &str) -> Error {
    let name = match kind - REP_ERROR {
        1 => "it does not know the request",
        2 => "its policy forbids it",
        3 => "it calls the request invalid",
        4 => "not on its platform",
        5 => "it wants TLS",
        6 => {
            return Error::new(Kind::NotFound, format!("the NBD server has no export {export:?}"))
                .hint("list the exports with: nbdinfo --list 'nbd+unix:///?socket=SOCKET'");
        }
        7 => "it is shutting down",
        8 => "it insists on its block sizes",
        9 => "it calls the request too big",
        _ => "an unknown error",
    };
    let said = if data.is_empty() { String::new() } else { format!(" (\"{}\")", printable(data)) };
    Error::new(Kind::Unreachable, format!("the NBD server refuses the export {export:?}: {name}{said}"))
        .hint(PEER_HINT)
}

fn counted(name: &str) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend(name.as_bytes());
    out
}

fn check_name(export: &str) -> Result<()> {
    if export.len() > MAX_NAME {
        return Err(Error::usage(format!(
            "the export name has {} bytes, the NBD protocol allows {MAX_NAME}",
            export.len()
        ))
        .hint("use a shorter name"));
    }
    Ok(())
}

/// What `option` ([`OPT_GO`] or [`OPT_INFO`]) says about `export`.
fn describe<S: Read + Write>(s: &mut S, option: u32, export: &str) -> Result<Export> {
    check_name(export)?;
    let mut data = counted(export);
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    send_option(s, option, &data)?;

    let mut described = None;
    let mut blocks = (1, 4096, MAX_PAYLOAD);
    for _ in 0..MAX_OPTION_REPLIES {
        let (kind, data) = option_reply(s, option)?;
        match kind {
            REP_ACK => {
                let (size, flags) =
                    described.ok_or_else(|| violation("it opens the export without telling its size"))?;
                let (min_block, preferred_block, max_block) = blocks;
                return Ok(Export { size, flags, min_block, preferred_block, max_block });
            }
            REP_INFO => {
                let mut r = Bytes(&data);
                match (r.u16(), data.len()) {
                    (INFO_EXPORT, 12) => {
                        let (size, flags) = (r.u64(), TransmissionFlags::new(r.u16()));
                        if size > i64::MAX as u64 {
                            return Err(violation(format!("an export of {size} bytes")));
                        }
                        described = Some((size, flags));
                    }
                    (INFO_BLOCK_SIZE, 14) => {
                        blocks = (r.u32(), r.u32(), r.u32());
                        let (min, preferred, max) = blocks;
                        let sound = min.is_power_of_two()
                            && min <= 64 << 10
                            && preferred.is_power_of_two()
                            && preferred >= min
                            && max >= min;
                        if !sound {
                            return Err(violation(format!("block sizes {min}/{preferred}/{max}")));
                        }
                    }
                    (INFO_EXPORT | INFO_BLOCK_SIZE, len) => {
                        return Err(violation(format!("an export description of {len} bytes")));
                    }
                    // Names, descriptions and whatever comes later: nothing that we act on.
                    _ => {}
                }
            }
            _ if kind >= REP_ERROR => return Err(option_error(kind, &data, export)),
            _ => return Err(violation(format!("option reply type {kind}"))),
        }
    }
    Err(violation("it describes the export without end"))
}

/// A run of bytes with the same allocation state, from [`Client::block_status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, never 0.
    pub len: u64,
    /// Nothing is stored for it.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

/// A simple client: one request at a time, each waits for its reply. For tools and tests; the data path of
/// the keeper has its own loop over the same wire forms.
///
/// After an error other than one that the server reported for a request, the connection is out of step and
/// every further call fails.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    export: Export,
    structured: bool,
    /// The number of the context `base:allocation`, when the server offers it.
    allocation: Option<u32>,
    cookie: u64,
    in_step: bool,
}

impl<S: Read + Write> Client<S> {
    /// Opens `export` with simple replies, as ZeroFS and the keeper speak.
    pub fn connect(mut stream: S, export: &str) -> Result<Self> {
        let export = handshake(&mut stream, export)?;
        Ok(Client { stream, export, structured: false, allocation: None, cookie: 0, in_step: true })
    }

    /// Opens `export` with structured replies and allocation extents where the server has them, and without
    /// where it has not.
    pub fn connect_structured(mut stream: S, export: &str) -> Result<Self> {
        check_name(export)?;
        greet(&mut stream)?;
        let structured = structured_replies(&mut stream)?;
        let allocation = if structured { allocation_context(&mut stream, export)? } else { None };
        let export = describe(&mut stream, OPT_GO, export)?;
        Ok(Client { stream, export, structured, allocation, cookie: 0, in_step: true })
    }

    /// The export, as told in the handshake.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Whether the server answers with structured replies.
    pub fn is_structured(&self) -> bool {
        self.structured
    }

    /// Whether [`block_status`](Self::block_status) works.
    pub fn has_block_status(&self) -> bool {
        self.allocation.is_some()
    }

    /// The stream, for instance to change its time limits.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Fills `buf` from `offset`, in as many requests as the server's limit makes necessary.
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let max = self.export.max_request() as usize;
        for (i, piece) in buf.chunks_mut(max).enumerate() {
            let at = offset + (i * max) as u64;
            self.send(Command::Read, 0, at, piece.len() as u32, &[])?;
            self.read_reply(at, piece)?;
        }
        Ok(())
    }

    /// Writes `data` at `offset`; with `fua`, durably (refused when the server has no FUA).
    pub fn write_at(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<()> {
        self.check_range(offset, data.len() as u64)?;
        let flags = self.fua_flag(fua)?;
        let max = self.export.max_request() as usize;
        for (i, piece) in data.chunks(max).enumerate() {
            let at = offset + (i * max) as u64;
            self.send(Command::Write, flags, at, piece.len() as u32, piece)?;
            self.plain_reply(Command::Write)?;
        }
        Ok(())
    }

    /// Makes every acknowledged write durable; nothing to do, and no request, when the server has no FLUSH.
    pub fn flush(&mut self) -> Result<()> {
        if !self.export.flags.has_flush() {
            return Ok(());
        }
        self.send(Command::Flush, 0, 0, 0, &[])?;
        self.plain_reply(Command::Flush)
    }

    /// Tells the server that the bytes are not needed any more.
    pub fn trim(&mut self, offset: u64, len: u64) -> Result<()> {
        self.need(self.export.flags.has_trim(), "TRIM")?;
        self.without_data(Command::Trim, 0, offset, len)
    }

    /// Writes zeroes; with `fua`, durably.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.need(self.export.flags.has_write_zeroes(), "WRITE_ZEROES")?;
        let flags = self.fua_flag(fua)?;
        self.without_data(Command::WriteZeroes, flags, offset, len)
    }

    /// The allocation of `len` bytes from `offset`, without gaps. Servers answer with at least one extent
    /// per request, so a finely fragmented export takes many requests.
    pub fn block_status(&mut self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.need(self.has_block_status(), "block status")?;
        self.check_range(offset, len)?;
        let end = offset + len;
        let mut out: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(1 << 30) as u32;
            self.send(Command::BlockStatus, 0, at, piece, &[])?;
            for (len, state) in self.extents_reply()? {
                // The last extent may reach beyond what was asked for.
                let len = u64::from(len).min(end - at);
                if len == 0 {
                    break;
                }
                let (hole, zero) = (state & 1 != 0, state & 2 != 0);
                match out.last_mut() {
                    Some(last) if (last.hole, last.zero) == (hole, zero) => last.len += len,
                    _ => out.push(Extent { offset: at, len, hole, zero }),
                }
                at += len;
            }
        }
        Ok(out)
    }

    /// Says goodbye and closes. The protocol has no answer to it.
    pub fn disconnect(mut self) -> Result<()> {
        self.send(Command::Disc, 0, 0, 0, &[])
    }

    fn without_data(&mut self, command: Command, flags: u16, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        // These carry no payload, so only the 32-bit length field bounds them; a round number below it
        // keeps requests aligned.
        const MAX: u64 = 1 << 30;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let piece = (end - at).min(MAX);
            self.send(command, flags, at, piece as u32, &[])?;
            self.plain_reply(command)?;
            at += piece;
        }
        Ok(())
    }

    fn fua_flag(&self, fua: bool) -> Result<u16> {
        if fua {
            self.need(self.export.flags.has_fua(), "FUA")?;
        }
        Ok(if fua { FLAG_FUA } else { 0 })
    }

    fn need(&self, has: bool, what: &str) -> Result<()> {
        if has {
            return Ok(());
        }
        Err(Error::new(Kind::Conflict, format!("the NBD server does not offer {what} for this export"))
            .hint("connect to the export of a ZeroFS volume"))
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.export.size;
        let min = u64::from(self.export.min_block);
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::usage(format!(
                "{len} bytes at {offset} lie beyond the end of the export, which has {size} bytes"
            ))
            .hint("choose a smaller range"));
        }
        if !offset.is_multiple_of(min) || !len.is_multiple_of(min) {
            return Err(Error::usage(format!(
                "{len} bytes at {offset} are not multiples of the server's block size {min}"
            ))
            .hint("align the range"));
        }
        Ok(())
    }

    fn send(&mut self, command: Command, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Result<()> {
        if !self.in_step {
            return Err(
                Error::new(Kind::Unreachable, "the NBD connection failed before").hint("connect again")
            );
        }
        self.cookie = self.cookie.wrapping_add(1);
        let header = RequestHeader { flags, command, cookie: self.cookie, offset, len };
        // Until the whole reply is in, the connection counts as out of step.
        self.in_step = false;
        self.stream
            .write_all(&header.encode())
            .and_then(|()| self.stream.write_all(payload))
            .and_then(|()| self.stream.flush())
            .map_err(|e| broken(verb(command), e))
    }

    /// The reply to a read of `buf.len()` bytes at `offset`.
    fn read_reply(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        const WHAT: &str = "read";
        let mut parts: Vec<(u64, u64)> = Vec::new();
        let mut failure = None;
        for _ in 0..MAX_CHUNKS {
            let chunk = match self.head(Command::Read)? {
                Head::Simple(0) if self.structured => {
                    return Err(violation("it answers a read with a simple reply after all"));
                }
                Head::Simple(0) => {
                    self.stream.read_exact(buf).map_err(|e| broken(WHAT, e))?;
                    self.in_step = true;
                    return Ok(());
                }
                Head::Simple(error) => {
                    self.in_step = true;
                    return Err(refused(Command::Read, error, ""));
                }
                Head::Chunk(chunk) => chunk,
            };
            match chunk.kind {
                CHUNK_DATA | CHUNK_HOLE => {
                    if chunk.len < 8 {
                        return Err(violation("a chunk of data without its offset"));
                    }
                    let at = u64::from_be_bytes(get(&mut self.stream, WHAT)?);
                    let len = match chunk.kind {
                        CHUNK_DATA => chunk.len - 8,
                        _ if chunk.len == 12 => u32::from_be_bytes(get(&mut self.stream, WHAT)?),
                        _ => return Err(violation(format!("a hole described in {} bytes", chunk.len))),
                    };
                    let start = at.checked_sub(offset).filter(|start| *start <= buf.len() as u64);
                    let range = start.map(|s| s as usize..s as usize + len as usize);
                    let part = range.and_then(|r| buf.get_mut(r)).filter(|_| len > 0);
                    let part = part
                        .ok_or_else(|| violation(format!("{len} bytes at {at}, which nobody asked for")))?;
                    match chunk.kind {
                        CHUNK_DATA => self.stream.read_exact(part).map_err(|e| broken(WHAT, e))?,
                        _ => part.fill(0),
                    }
                    parts.push((at, u64::from(len)));
                }
                CHUNK_NONE if chunk.len == 0 && chunk.done => {}
                kind if kind & CHUNK_ERROR != 0 => failure = Some(self.chunk_error(&chunk, Command::Read)?),
                kind => return Err(violation(format!("a chunk of type {kind} in answer to a read"))),
            }
            if chunk.done {
                self.in_step = true;
                if let Some(e) = failure {
                    return Err(e);
                }
                parts.sort_unstable();
                let end = parts.iter().try_fold(offset, |end, (at, len)| (*at == end).then(|| at + len));
                return match end {
                    Some(end) if end == offset + buf.len() as u64 => Ok(()),
                    _ => Err(violation("its answer to a read has gaps or overlaps")),
                };
            }
        }
        Err(violation("its answer to a read has too many chunks"))
    }

    /// The reply to a request that returns nothing.
    fn plain_reply(&mut self, command: Command) -> Result<()> {
        let mut failure = None;
        for _ in 0..MAX_CHUNKS {
            match self.head(command)? {
                Head::Simple(0) => {
                    self.in_step = true;
                    return Ok(());
                }
                Head::Simple(error) => {
                    self.in_step = true;
                    return Err(refused(command, error, ""));
                }
                Head::Chunk(chunk) => {
                    match chunk.kind {
                        CHUNK_NONE if chunk.len == 0 && chunk.done => {}
                        kind if kind & CHUNK_ERROR != 0 => {
                            failure = Some(self.chunk_error(&chunk, command)?);
                        }
                        kind => {
                            return Err(violation(format!("a chunk of type {kind} for {}", verb(command))));
                        }
                    }
                    if chunk.done {
                        self.in_step = true;
                        return failure.map_or(Ok(()), Err);
                    }
                }
            }
        }
        Err(violation("its answer has too many chunks"))
    }

    /// The reply to a block status request: lengths and states.
    fn extents_reply(&mut self) -> Result<Vec<(u32, u32)>> {
        let mut extents = Vec::new();
        let mut failure = None;
        for _ in 0..MAX_CHUNKS {
            let chunk = match self.head(Command::BlockStatus)? {
                Head::Simple(0) => return Err(violation("an empty answer to block status")),
                Head::Simple(error) => {
                    self.in_step = true;
                    return Err(refused(Command::BlockStatus, error, ""));
                }
                Head::Chunk(chunk) => chunk,
            };
            match chunk.kind {
                CHUNK_BLOCK_STATUS => {
                    let data = self.chunk_payload(&chunk)?;
                    let mut r = Bytes(&data);
                    let context = r.u32();
                    let sound = data.len() > 4
                        && (data.len() - 4) % 8 == 0
                        && Some(context) == self.allocation
                        && extents.is_empty();
                    if !sound {
                        return Err(violation("a malformed answer to block status"));
                    }
                    while !r.0.is_empty() {
                        let (len, state) = (r.u32(), r.u32());
                        if len == 0 {
                            return Err(violation("an empty extent"));
                        }
                        extents.push((len, state));
                    }
                }
                CHUNK_NONE if chunk.len == 0 && chunk.done => {}
                kind if kind & CHUNK_ERROR != 0 => {
                    failure = Some(self.chunk_error(&chunk, Command::BlockStatus)?);
                }
                kind => return Err(violation(format!("a chunk of type {kind} for block status"))),
            }
            if chunk.done {
                self.in_step = true;
                if let Some(e) = failure {
                    return Err(e);
                }
                if extents.is_empty() {
                    return Err(violation("an answer to block status without extents"));
                }
                return Ok(extents);
            }
        }
        Err(violation("its answer to block status has too many chunks"))
    }

    /// The head of a reply, its cookie checked.
    fn head(&mut self, command: Command) -> Result<Head> {
        let what = verb(command);
        let magic: [u8; 4] = get(&mut self.stream, what)?;
        let mine = |cookie: u64, wanted: u64| {
            if cookie == wanted {
                return Ok(());
            }
            Err(violation(format!("it answers request {cookie}, which is not the one in flight")))
        };
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => {
                let rest: [u8; 12] = get(&mut self.stream, what)?;
                let mut r = Bytes(&rest);
                let error = r.u32();
                mine(r.u64(), self.cookie)?;
                Ok(Head::Simple(error))
            }
            CHUNK_MAGIC if self.structured => {
                let rest: [u8; 16] = get(&mut self.stream, what)?;
                let mut r = Bytes(&rest);
                let (flags, kind) = (r.u16(), r.u16());
                mine(r.u64(), self.cookie)?;
                Ok(Head::Chunk(Chunk { done: flags & CHUNK_DONE != 0, kind, len: r.u32() }))
            }
            other => Err(violation(format!("a reply starts with {other:#010x}"))),
        }
    }

    fn chunk_payload(&mut self, chunk: &Chunk) -> Result<Vec<u8>> {
        if chunk.len > MAX_CHUNK {
            return Err(violation(format!("a chunk of type {} with {} bytes", chunk.kind, chunk.len)));
        }
        let mut data = vec![0; chunk.len as usize];
        self.stream.read_exact(&mut data).map_err(|e| broken("read a reply", e))?;
        Ok(data)
    }

    fn chunk_error(&mut self, chunk: &Chunk, command: Command) -> Result<Error> {
        let data = self.chunk_payload(chunk)?;
        if data.len() < 6 {
            return Err(violation("an error without its number"));
        }
        let mut r = Bytes(&data);
        let (error, len) = (r.u32(), usize::from(r.u16()));
        let text = r.0.get(..len).ok_or_else(|| violation("an error text longer than its chunk"))?;
        if error == 0 {
            return Err(violation("an error with the number 0"));
        }
        Ok(refused(command, error, &printable(text)))
    }
}

enum Head {
    Simple(u32),
    Chunk(Chunk),
}

struct Chunk {
    done: bool,
    kind: u16,
    len: u32,
}

/// Asks for `base:allocation`; its number, or none where the server has no such thing.
fn allocation_context<S: Read + Write>(s: &mut S, export: &str) -> Result<Option<u32>> {
    let mut data = counted(export);
    data.extend(1u32.to_be_bytes());
    data.extend(counted(ALLOCATION));
    send_option(s, OPT_SET_META_CONTEXT, &data)?;
    let mut found = None;
    for _ in 0..MAX_OPTION_REPLIES {
        match option_reply(s, OPT_SET_META_CONTEXT)? {
            (REP_ACK, _) => return Ok(found),
            (REP_META_CONTEXT, data) if data.len() >= 4 => {
                let mut r = Bytes(&data);
                let number = r.u32();
                if r.0 == ALLOCATION.as_bytes() {
                    found = Some(number);
                }
            }
            (REP_ERR_UNSUP.., _) => return Ok(None),
            (kind, _) => return Err(violation(format!("option reply type {kind}"))),
        }
    }
    Err(violation("it lists contexts without end"))
}

const fn verb(command: Command) -> &'static str {
    match command {
        Command::Read => "read",
        Command::Write => "write",
        Command::Disc => "disconnect",
        Command::Flush => "flush",
        Command::Trim => "trim",
        Command::Cache => "read ahead",
        Command::WriteZeroes => "write zeroes",
        Command::BlockStatus => "read the block status",
    }
}

/// The name of an error number of the protocol.
pub const fn errno_name(error: u32) -> &'static str {
    match error {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        _ => "an unknown error",
    }
}

/// The server understood a request and refused it.
fn refused(command: Command, error: u32, text: &str) -> Error {
    let said = if text.is_empty() { String::new() } else { format!(" (\"{text}\")") };
    let message =
        format!("cannot {}: the NBD server says {} ({error}){said}", verb(command), errno_name(error));
    match error {
        28 => Error::environment(message)
            .hint("the volume is larger than filesystemMaxSizeGB allows, or the store is full"),
        108 => Error::new(Kind::Unreachable, message).hint("ZeroFS is stopping; try again once it runs"),
        _ => {
            Error::failed(message).hint("look into the volume's zerofs.log (zerofsctl show VOLUME names it)")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A stream whose reads come from a script and whose writes are kept.
    struct Script {
        answers: io::Cursor<Vec<u8>>,
        asked: Vec<u8>,
    }

    impl Script {
        fn new(answers: Vec<u8>) -> Self {
            Script { answers: io::Cursor::new(answers), asked: Vec::new() }
        }
    }

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.answers.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.asked.write(buf)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn hello() -> Vec<u8> {
        let mut out = b"NBDMAGICIHAVEOPT".to_vec();
        out.extend([0, 3]);
        out
    }

    fn option(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut out = vec![0, 3, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9];
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    }

    fn info_export(size: u64, flags: u16) -> Vec<u8> {
        let mut data = vec![0, 0];
        data.extend(size.to_be_bytes());
        data.extend(flags.to_be_bytes());
        option(OPT_GO, REP_INFO, &data)
    }

    fn opened(size: u64, flags: u16) -> Vec<u8> {
        [hello(), info_export(size, flags), option(OPT_GO, REP_ACK, &[])].concat()
    }

    fn structured(size: u64) -> Vec<u8> {
        let mut context = 7u32.to_be_bytes().to_vec();
        context.extend(b"base:allocation");
        [
            hello(),
            option(OPT_STRUCTURED_REPLY, REP_ACK, &[]),
            option(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context),
            option(OPT_SET_META_CONTEXT, REP_ACK, &[]),
            info_export(size, 1),
            option(OPT_GO, REP_ACK, &[]),
        ]
        .concat()
    }

    fn chunk(done: bool, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut out = vec![0x66, 0x8e, 0x33, 0xef, 0, u8::from(done)];
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    }

    fn reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        [&SimpleReply { error, cookie }.encode()[..], data].concat()
    }

    #[test]
    fn requests_have_the_wire_form_of_the_specification() {
        let header = RequestHeader {
            flags: FLAG_FUA,
            command: Command::WriteZeroes,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            len: 0x200,
        };
        let raw = header.encode();
        assert_eq!(
            raw,
            [
                0x25, 0x60, 0x95, 0x13, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0,
                2, 0
            ]
        );
        assert_eq!(RequestHeader::decode(&raw).unwrap(), header);
        for (at, with) in [(0, 0), (7, 9), (6, 1)] {
            let mut bad = raw;
            bad[at] = with;
            assert!(RequestHeader::decode(&bad).is_err(), "{at}");
        }
    }

    #[test]
    fn simple_replies_have_the_wire_form_of_the_specification() {
        let raw = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9];
        let want = SimpleReply { error: 5, cookie: 9 };
        assert_eq!(SimpleReply::decode(&raw).unwrap(), want);
        assert_eq!(want.encode(), raw);
        let mut bad = raw;
        bad[0] = 0x66;
        assert!(SimpleReply::decode(&bad).is_err());
    }

    #[test]
    fn a_handshake_asks_for_go_with_block_sizes() {
        let mut s = Script::new(opened(1 << 20, 0x0ded));
        let export = handshake(&mut s, "disk").unwrap();
        let want = Export {
            size: 1 << 20,
            flags: TransmissionFlags::new(0x0ded),
            min_block: 1,
            preferred_block: 4096,
            max_block: 32 << 20,
        };
        assert_eq!(export, want);
        let mut asked = vec![0, 0, 0, 3];
        asked.extend(b"IHAVEOPT");
        asked.extend([0, 0, 0, 7, 0, 0, 0, 12, 0, 0, 0, 4]);
        asked.extend(b"disk");
        asked.extend([0, 1, 0, 3]);
        assert_eq!(s.asked, asked);
        let f = export.flags;
        assert!(f.has_flush() && f.has_fua() && f.has_trim() && f.has_write_zeroes());
        assert!(f.can_multi_conn() && f.has_cache() && f.has_fast_zero() && !f.is_read_only());
        assert_eq!(TransmissionFlags::new(0x0dec).bits(), 0, "without the has-flags bit nothing counts");
    }

    #[test]
    fn an_inquiry_goes_on_after_an_unknown_export() {
        let known = |size: u64| {
            let mut data = vec![0, 0];
            data.extend(size.to_be_bytes());
            data.extend([0, 1]);
            [option(OPT_INFO, REP_INFO, &data), option(OPT_INFO, REP_ACK, &[])].concat()
        };
        let answers = [hello(), known(4096), option(OPT_INFO, REP_ERROR + 6, &[]), known(8192)].concat();
        let mut i = Inquiry::start(Script::new(answers)).unwrap();
        assert_eq!(i.info("disk").unwrap().size, 4096);
        assert_eq!(i.info("other").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(i.info("disk").unwrap().size, 8192);
        assert_eq!(i.info("disk").unwrap_err().kind(), Kind::Unreachable);
        assert!(i.info("disk").unwrap_err().message().contains("before"));
    }

    #[test]
    fn block_sizes_are_taken_and_checked() {
        let blocks = |min: u32, preferred: u32, max: u32| {
            let mut data = vec![0, 3];
            data.extend([min, preferred, max].map(u32::to_be_bytes).concat());
            let all = [
                hello(),
                info_export(4096, 1),
                option(OPT_GO, REP_INFO, &data),
                option(OPT_GO, REP_ACK, &[]),
            ];
            handshake(&mut Script::new(all.concat()), "x")
        };
        let export = blocks(512, 4096, u32::MAX).unwrap();
        assert_eq!((export.min_block, export.max_block, export.max_request()), (512, u32::MAX, MAX_PAYLOAD));
        assert_eq!(blocks(512, 4096, 1000).unwrap().max_request(), 512);
        for (min, preferred, max) in
            [(0, 4096, 1), (3, 4096, 9), (512, 256, 1024), (512, 512, 256), (1 << 17, 1 << 17, 1 << 20)]
        {
            assert!(blocks(min, preferred, max).is_err(), "{min}/{preferred}/{max}");
        }
    }

    #[test]
    fn a_bad_handshake_is_told_apart() {
        let go = |answers: Vec<u8>| handshake(&mut Script::new(answers), "disk").unwrap_err();
        let unknown = go([hello(), option(OPT_GO, REP_ERROR + 6, b"no \x1b such")].concat());
        assert_eq!(unknown.kind(), Kind::NotFound);
        let policy = go([hello(), option(OPT_GO, REP_ERROR + 2, b"go \x1b away")].concat());
        assert_eq!(policy.kind(), Kind::Unreachable);
        assert!(!policy.message().contains('\x1b'), "{policy}");
        assert_eq!(go(hello()).kind(), Kind::Unreachable);
        assert_eq!(go(Vec::new()).kind(), Kind::Unreachable);
        for (answers, what) in [
            (b"SSH-2.0-OpenSSH_9.2p1 Debian".to_vec(), "another protocol"),
            ([b"NBDMAGICIHAVEOPT".as_slice(), &[0, 0]].concat(), "an old server"),
            ([hello(), option(OPT_GO, REP_ACK, &[])].concat(), "no size"),
            ([hello(), info_export(u64::MAX, 1)].concat(), "an impossible size"),
            ([hello(), option(OPT_GO, REP_INFO, &[])].concat(), "an empty description"),
            ([hello(), option(3, REP_ACK, &[])].concat(), "an answer to something else"),
            ([hello(), vec![0; 20]].concat(), "a wrong magic number"),
            ([hello(), option(OPT_GO, 99, &[])].concat(), "an unknown type"),
        ] {
            let e = go(answers);
            assert_eq!(e.kind(), Kind::Failed, "{what}: {e}");
            assert!(e.hint_text().is_some());
        }
        let mut huge = option(OPT_GO, REP_INFO, &[]);
        huge[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(go([hello(), huge].concat()).message().contains("4294967295"));
        let endless: Vec<u8> = std::iter::repeat_n(info_export(1, 1), 1000).flatten().collect();
        assert!(go([hello(), endless].concat()).message().contains("without end"));
        let mut s = Script::new(opened(1, 1));
        assert_eq!(handshake(&mut s, &"x".repeat(5000)).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_client_reads_writes_and_keeps_step() {
        let answers = [
            opened(8192, 0x0ded),
            reply(0, 1, b"data"),
            reply(0, 2, b""),
            reply(5, 3, b""),
            reply(28, 4, b""),
            reply(0, 5, b""),
            reply(0, 6, b""),
        ]
        .concat();
        let mut c = Client::connect(Script::new(answers), "disk").unwrap();
        let mut buf = [0; 4];
        c.read_at(4096, &mut buf).unwrap();
        assert_eq!(&buf, b"data");
        c.write_at(0, b"xyz", true).unwrap();
        // Errors that the server reports leave the connection usable.
        let e = c.read_at(0, &mut buf).unwrap_err();
        assert!(e.message().contains("EIO"), "{e}");
        assert_eq!(c.write_at(0, b"x", false).unwrap_err().kind(), Kind::Environment);
        c.trim(0, 4096).unwrap();
        c.flush().unwrap();
        let before = c.stream().asked.len();
        assert_eq!(c.read_at(8190, &mut buf).unwrap_err().kind(), Kind::Usage);
        assert_eq!(c.read_at(u64::MAX, &mut buf).unwrap_err().kind(), Kind::Usage);
        assert_eq!(c.block_status(0, 1).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(c.stream().asked.len(), before, "nothing was sent");
        // The script is at its end: the next request loses the connection for good.
        assert_eq!(c.flush().unwrap_err().kind(), Kind::Unreachable);
        assert!(c.flush().unwrap_err().message().contains("before"));
    }

    #[test]
    fn a_server_without_a_feature_is_not_asked_for_it() {
        let mut c = Client::connect(Script::new(opened(4096, 1)), "disk").unwrap();
        let before = c.stream().asked.len();
        c.flush().unwrap();
        assert_eq!(c.trim(0, 1).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(c.write_zeroes(0, 1, false).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(c.write_at(0, b"x", true).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(c.stream().asked.len(), before);
    }

    #[test]
    fn a_reply_to_another_request_ends_the_connection() {
        let mut c =
            Client::connect(Script::new([opened(4096, 5), reply(0, 99, b"")].concat()), "disk").unwrap();
        assert_eq!(c.flush().unwrap_err().kind(), Kind::Failed);
        assert_eq!(c.flush().unwrap_err().kind(), Kind::Unreachable);
    }

    #[test]
    fn structured_reads_are_put_together() {
        let hole = [&4u64.to_be_bytes()[..], &4u32.to_be_bytes()].concat();
        let data = [&0u64.to_be_bytes()[..], b"abcd"].concat();
        let answers = [
            structured(4096),
            chunk(false, CHUNK_HOLE, 1, &hole),
            chunk(false, CHUNK_DATA, 1, &data),
            chunk(true, CHUNK_NONE, 1, &[]),
        ]
        .concat();
        let mut c = Client::connect_structured(Script::new(answers), "disk").unwrap();
        assert!(c.is_structured() && c.has_block_status());
        let mut buf = [9; 8];
        c.read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"abcd\0\0\0\0");
    }

    #[test]
    fn broken_structured_reads_are_refused() {
        let data = |at: u64, bytes: &[u8]| [&at.to_be_bytes()[..], bytes].concat();
        let hole = |at: u64, len: u32| [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
        let read = |chunks: &[Vec<u8>]| {
            let answers = [structured(4096), chunks.concat()].concat();
            let mut c = Client::connect_structured(Script::new(answers), "disk").unwrap();
            c.read_at(16, &mut [0; 8])
        };
        assert!(read(&[chunk(true, CHUNK_DATA, 1, &data(16, b"12345678"))]).is_ok());
        for (chunks, what) in [
            (vec![chunk(true, CHUNK_DATA, 1, &data(16, b"1234"))], "a gap"),
            (vec![chunk(true, CHUNK_DATA, 1, &data(0, b"12345678"))], "the wrong place"),
            (vec![chunk(true, CHUNK_DATA, 1, &data(20, b"12345678"))], "beyond the end"),
            (vec![chunk(true, CHUNK_DATA, 1, &data(u64::MAX, b"1"))], "far beyond the end"),
            (vec![chunk(true, CHUNK_DATA, 1, b"1234")], "no offset"),
            (vec![chunk(true, CHUNK_HOLE, 1, &hole(16, u32::MAX))], "a huge hole"),
            (vec![chunk(true, CHUNK_HOLE, 1, &hole(16, 0))], "an empty hole"),
            (vec![chunk(true, CHUNK_NONE, 1, &[])], "nothing"),
            (vec![chunk(true, CHUNK_NONE, 1, &[1])], "something in nothing"),
            (vec![chunk(true, 4, 1, &[])], "an unknown type"),
            (vec![reply(0, 1, b"12345678")], "a simple reply"),
            (
                vec![
                    chunk(false, CHUNK_DATA, 1, &data(16, b"12345678")),
                    chunk(true, CHUNK_DATA, 1, &data(20, b"1234")),
                ],
                "an overlap",
            ),
        ] {
            assert_eq!(read(&chunks).unwrap_err().kind(), Kind::Failed, "{what}");
        }
        let mut error = 5u32.to_be_bytes().to_vec();
        error.extend([0, 4]);
        error.extend(b"oops");
        let e = read(&[chunk(true, CHUNK_ERROR + 1, 1, &error)]).unwrap_err();
        assert!(e.message().contains("EIO") && e.message().contains("oops"), "{e}");
    }

    #[test]
    fn block_status_has_no_gaps() {
        let mut data = 7u32.to_be_bytes().to_vec();
        for (len, state) in [(1024u32, 0u32), (1024, 3), (512, 3), (9999, 0)] {
            data.extend(len.to_be_bytes());
            data.extend(state.to_be_bytes());
        }
        let answers = [structured(4096), chunk(true, CHUNK_BLOCK_STATUS, 1, &data)].concat();
        let mut c = Client::connect_structured(Script::new(answers), "disk").unwrap();
        let extent = |offset, len, hole| Extent { offset, len, hole, zero: hole };
        assert_eq!(
            c.block_status(0, 4096).unwrap(),
            [extent(0, 1024, false), extent(1024, 1536, true), extent(2560, 1536, false)]
        );
        for bad in [
            &data[..4],
            &data[..9],
            &[0, 0, 0, 8, 0, 0, 1, 0, 0, 0, 0, 0],
            &[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            let answers = [structured(4096), chunk(true, CHUNK_BLOCK_STATUS, 1, bad)].concat();
            let mut c = Client::connect_structured(Script::new(answers), "disk").unwrap();
            assert_eq!(c.block_status(0, 4096).unwrap_err().kind(), Kind::Failed, "{bad:?}");
        }
    }

    /// Pieces of plausible answers, so that random streams get past the first checks.
    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let small = proptest::collection::vec(any::<u8>(), 0..40);
        prop_oneof![
            small.clone(),
            any::<(u64, u16)>().prop_map(|(size, flags)| info_export(size >> 1, flags)),
            (0u32..12, prop_oneof![0u32..6, (REP_ERROR..REP_ERROR + 12)], small.clone())
                .prop_map(|(o, k, d)| option(o, k, &d)),
            Just(option(OPT_GO, REP_ACK, &[])),
            Just(option(OPT_STRUCTURED_REPLY, REP_ACK, &[])),
            Just(option(OPT_SET_META_CONTEXT, REP_ACK, &[])),
            (0u32..2, 0u64..4, small.clone()).prop_map(|(e, c, d)| reply(e, c, &d)),
            (any::<bool>(), prop_oneof![0u16..7, (CHUNK_ERROR..CHUNK_ERROR + 4)], 0u64..4, small)
                .prop_map(|(done, k, c, d)| chunk(done, k, c, &d)),
            // A header that promises more than there is.
            (0u16..7, 0u64..4, any::<u32>()).prop_map(|(k, c, len)| {
                let mut raw = chunk(false, k, c, &[]);
                raw[16..20].copy_from_slice(&len.to_be_bytes());
                raw
            }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn a_hostile_server_never_causes_a_panic(
            start in 0..4usize,
            pieces in proptest::collection::vec(piece(), 0..12),
            offset in 0u64..8192,
            len in 0usize..4096,
        ) {
            let start = [Vec::new(), hello(), opened(8192, 0xffff), structured(8192)][start].clone();
            let answers = [start, pieces.concat()].concat();
            let _ = handshake(&mut Script::new(answers.clone()), "disk");
            for connect in [Client::connect, Client::connect_structured] {
                let Ok(mut c) = connect(Script::new(answers.clone()), "disk") else { continue };
                let mut buf = vec![0; len];
                let _ = c.read_at(offset, &mut buf);
                let _ = c.flush();
                let _ = c.block_status(offset.min(c.export().size), 1);
                let _ = c.write_at(offset, &buf, false);
                let _ = c.trim(offset, len as u64);
                let _ = c.disconnect();
            }
        }
    }
}
