//! The kernel's generic netlink family `nbd`: one function per command.
//!
//! A command runs inside the kernel while it is being sent, so all of them are quick but `disconnect`, which waits for
//! the kernel's receivers. The numbers are those of the kernel's `nbd-netlink.h`.

use std::io::{self, Cursor};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use neli::FromBytesWithInput;
use neli::consts::nl::{NlmF, NlmsgerrAttr};
use neli::consts::socket::NlFamily;
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::synchronous::NlSocketHandle;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::sysfs;
use crate::error::{Error, Kind, Result};

/// The name of the family.
const FAMILY: &str = "nbd";
/// Where the kernel tells of dead connections.
const GROUP: &str = "nbd_mc_group";
/// The version of the family.
const VERSION: u8 = 1;

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const LINK_DEAD: u8 = 4;
const STATUS: u8 = 5;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
const BACKEND_IDENTIFIER: u16 = 10;

const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// The family of families, its command to look one up, and its attributes.
const CTRL: u16 = libc::GENL_ID_CTRL as u16;
const CTRL_GETFAMILY: u8 = libc::CTRL_CMD_GETFAMILY as u8;
const CTRL_FAMILY_ID: u16 = libc::CTRL_ATTR_FAMILY_ID as u16;
const CTRL_FAMILY_NAME: u16 = libc::CTRL_ATTR_FAMILY_NAME as u16;
const CTRL_MCAST_GROUPS: u16 = libc::CTRL_ATTR_MCAST_GROUPS as u16;
const CTRL_MCAST_NAME: u16 = libc::CTRL_ATTR_MCAST_GRP_NAME as u16;
const CTRL_MCAST_ID: u16 = libc::CTRL_ATTR_MCAST_GRP_ID as u16;

/// Client flag: the index goes away at the disconnect.
pub const CLIENT_DESTROY_ON_DISCONNECT: u64 = 1;
/// Client flag: the last close of the device disconnects it.
pub const CLIENT_DISCONNECT_ON_CLOSE: u64 = 2;

/// Server flag: the flags mean something.
pub const SERVER_HAS_FLAGS: u64 = 1;
/// Server flag: the device refuses writes.
pub const SERVER_READ_ONLY: u64 = 1 << 1;
/// Server flag: the device sends flushes.
pub const SERVER_SEND_FLUSH: u64 = 1 << 2;
/// Server flag: the device sends force unit access instead of a flush after the write.
pub const SERVER_SEND_FUA: u64 = 1 << 3;
/// Server flag: the device sends trims.
pub const SERVER_SEND_TRIM: u64 = 1 << 5;
/// Server flag: the device sends zero requests (kernels from 6.14 on).
pub const SERVER_SEND_WRITE_ZEROES: u64 = 1 << 6;
/// Server flag: several sockets may be used.
pub const SERVER_CAN_MULTI_CONN: u64 = 1 << 8;

/// How to connect a device.
#[derive(Debug)]
pub struct Connect<'a> {
    /// The index; none lets the kernel choose a free one, or make one.
    pub index: Option<u32>,
    /// The size in bytes, a multiple of the block size.
    pub size: u64,
    /// The logical block size in bytes.
    pub block_size: u64,
    /// `SERVER_…` flags.
    pub server_flags: u64,
    /// `CLIENT_…` flags.
    pub client_flags: u64,
    /// How long I/O waits for a RECONFIGURE after the last socket has died; with zero it fails at once. Whole seconds.
    pub dead_conn_timeout: Duration,
    /// The backend identifier, `zerofs:<volume id>`.
    pub backend: Option<&'a str>,
    /// Stream sockets in the transmission phase. The kernel keeps hold of them by itself.
    pub sockets: &'a [BorrowedFd<'a>],
}

/// What to change on a connected device; what is none or empty stays.
#[derive(Debug, Default)]
pub struct Reconfigure<'a> {
    /// New sockets. Each takes the place of a dead one; where none is dead, the kernel ignores it without a word.
    pub sockets: &'a [BorrowedFd<'a>],
    /// The new size in bytes. The kernel shrinks a device without complaint, so never give it less than it has.
    pub size: Option<u64>,
    /// Must be what the device was connected with.
    pub backend: Option<&'a str>,
    /// As in [`Connect`].
    pub dead_conn_timeout: Option<Duration>,
}

/// A device in the answer to [`status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// Whether it is set up; the kernel goes on saying so when its server is dead.
    pub connected: bool,
}

type Attr = Nlattr<u16, Buffer>;
type Attrs = GenlBuffer<u16, Buffer>;

/// The id of the netlink family. [`Kind::NotFound`] when the kernel has none.
pub fn family() -> Result<u16> {
    Ok(Socket::open()?.family()?.0)
}

/// Connects a device; gives its index. The I/O time-out is always set to "none", since a device keeps the last one.
///
/// With a backend identifier, the device is checked to show it afterwards, on kernels that know of it.
/// [`Kind::Busy`] when the index is in use; [`Kind::Environment`] when the kernel has no NBD or we no privilege.
pub fn connect(c: &Connect<'_>) -> Result<u32> {
    if c.sockets.is_empty() || c.size == 0 || c.block_size == 0 || !c.size.is_multiple_of(c.block_size) {
        return Err(Error::usage(format!(
            "a device of {} bytes in blocks of {} on {} sockets cannot be connected",
            c.size,
            c.block_size,
            c.sockets.len()
        )));
    }
    let name = c.index.map_or("a free NBD device".to_owned(), |i| format!("/dev/nbd{i}"));
    let attrs = connect_attrs(c)?;
    let replies = match Socket::open()?.nbd(CONNECT, attrs) {
        Ok(replies) => replies,
        Err(Failure::Os { errno: libc::EBUSY, .. }) => {
            return Err(Error::new(Kind::Busy, format!("{name} is in use already"))
                .hint("let the kernel choose one, or see who has it: zerofsctl nbd list --all"));
        }
        Err(Failure::Os { errno: libc::ENOMEM | libc::ENOSPC | libc::EEXIST, .. }) => {
            return Err(Error::environment(format!("the kernel cannot make {name}"))
                .hint("detach a volume, or free leaked devices: zerofsctl nbd gc"));
        }
        Err(Failure::Os { errno: libc::EINVAL, said }) => {
            return Err(Error::failed(format!("the kernel refuses to connect {name}{}", words(&said)))
                .hint("see what it says: dmesg | grep nbd"));
        }
        Err(e) => return Err(e.named(&format!("connect {name}"))),
    };
    let index = replies.iter().filter(|m| *m.cmd() == CONNECT).find_map(|m| u32_in(m.attrs(), INDEX));
    let index = index
        .or(c.index)
        .ok_or_else(|| Error::failed("the kernel does not say which device it connected"))?;
    if let Some(backend) = c.backend {
        // Kernels before 5.14 show nothing.
        let shown = sysfs::one(index)?.and_then(|d| d.backend);
        if let Some(shown) = shown.filter(|b| b != backend) {
            return Err(Error::refused(format!(
                "/dev/nbd{index} was connected as {backend}, and says that it is {shown}"
            ))
            .hint("see who has it: zerofsctl nbd list --all"));
        }
    }
    Ok(index)
}

/// Changes a connected device. [`Kind::NotFound`] when it is not connected (any more); [`Kind::Conflict`] when its
/// backend identifier is another.
pub fn reconfigure(index: u32, r: &Reconfigure<'_>) -> Result<()> {
    let attrs = reconfigure_attrs(index, r)?;
    match Socket::open()?.nbd(RECONFIGURE, attrs) {
        Ok(_) => Ok(()),
        Err(Failure::Os { errno: libc::EINVAL | libc::ENOENT | libc::ENODEV, said }) => {
            let device = sysfs::one(index)?.filter(|d| d.connected);
            Err(match (device, r.backend) {
                (None, _) => Error::new(Kind::NotFound, format!("/dev/nbd{index} is not connected any more"))
                    .hint("detach the volume and attach it again"),
                (Some(d), Some(backend)) if d.backend.as_deref().is_some_and(|shown| shown != backend) => {
                    Error::new(
                        Kind::Conflict,
                        format!("/dev/nbd{index} is {}, not {backend}", d.backend.unwrap_or_default()),
                    )
                    .hint("see who has it: zerofsctl nbd list --all")
                }
                _ => Error::failed(format!(
                    "the kernel refuses to reconfigure /dev/nbd{index}{}",
                    words(&said)
                ))
                .hint("see what it says: dmesg | grep nbd"),
            })
        }
        Err(e) => Err(e.named(&format!("reconfigure /dev/nbd{index}"))),
    }
}

/// Disconnects a device, **also one that is mounted**, which loses what is not written: the caller must have proved that
/// nobody uses it. It may take as long as the kernel's receivers do. A device that is not connected is no error.
pub fn disconnect(index: u32) -> Result<()> {
    match Socket::open()?.nbd(DISCONNECT, vec![number(INDEX, index)?]) {
        Ok(_) => Ok(()),
        Err(Failure::Os { errno: libc::EINVAL | libc::ENOENT | libc::ENODEV, .. })
            if sysfs::one(index)?.is_none_or(|d| !d.connected) =>
        {
            Ok(())
        }
        Err(e) => Err(e.named(&format!("disconnect /dev/nbd{index}"))),
    }
}

/// The state of one device, or of all.
pub fn status(index: Option<u32>) -> Result<Vec<Status>> {
    let attrs = index.map(|i| number(INDEX, i)).transpose()?.into_iter().collect();
    match Socket::open()?.nbd(STATUS, attrs) {
        Ok(replies) => Ok(replies.iter().flat_map(|m| devices(m.attrs())).collect()),
        Err(e) => Err(e.named("ask for the state of the NBD devices")),
    }
}

/// Listens for connections that the kernel has given up.
pub struct LinkDead(NlSocketHandle);

impl LinkDead {
    /// Joins the group.
    pub fn listen() -> Result<LinkDead> {
        let socket = Socket::open()?;
        let (_, group) = socket.family()?;
        let group = group.ok_or_else(|| {
            Error::environment("the kernel does not tell of dead NBD connections").hint(super::MODULE_HINT)
        })?;
        socket
            .0
            .add_mcast_membership(Groups::new_groups(&[group]))
            .map_err(|e| Error::failed(format!("cannot listen for dead NBD connections: {e}")))?;
        Ok(LinkDead(socket.0))
    }

    /// Waits up to `limit` for the next; gives the index of its device. A device with several sockets is told of several
    /// times.
    pub fn next(&self, limit: Duration) -> Result<Option<u32>> {
        set_timeout(&self.0, limit)?;
        let (messages, _) = match self.0.recv::<u16, Buffer>() {
            Ok(got) => got,
            Err(neli::err::SocketError::Io(e)) if is_timeout(&e) => return Ok(None),
            Err(e) => return Err(Error::failed(format!("cannot hear of dead NBD connections: {e}"))),
        };
        for message in messages.flatten() {
            if let Some(body) = body(&message)
                && *body.cmd() == LINK_DEAD
                && let Some(index) = u32_in(body.attrs(), INDEX)
            {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }
}

impl AsFd for LinkDead {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket owns the descriptor, and is borrowed for as long as it is used.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// Why a command failed.
#[derive(Debug)]
enum Failure {
    /// The kernel's answer.
    Os {
        errno: i32,
        said: Option<String>,
    },
    Other(Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Other(e)
    }
}

impl Failure {
    fn named(self, what: &str) -> Error {
        match self {
            Failure::Os { errno: libc::EPERM | libc::EACCES, .. } => {
                Error::environment(format!("no permission to {what}"))
                    .hint("run it as root, in a container with privileged: true")
            }
            Failure::Os { errno, said } => Error::failed(format!(
                "cannot {what}: {}{}",
                io::Error::from_raw_os_error(errno),
                words(&said)
            ))
            .hint("see what the kernel says: dmesg | grep nbd"),
            Failure::Other(e) => e,
        }
    }
}

/// What the kernel added in words.
fn words(said: &Option<String>) -> String {
    said.as_ref().map(|s| format!(" ({s})")).unwrap_or_default()
}

struct Socket(NlSocketHandle);

impl Socket {
    fn open() -> Result<Socket> {
        let socket = NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty()).map_err(|e| {
            Error::environment(format!("cannot open a netlink socket: {e}"))
                .hint("run it outside of a sandbox that forbids AF_NETLINK")
        })?;
        // Older kernels have no words for their errors.
        let _ = socket.enable_ext_ack(true);
        // An answer is there when the command has been sent; this is against a hang that should never be.
        set_timeout(&socket, Duration::from_secs(30))?;
        Ok(Socket(socket))
    }

    /// The id of the family and of its multicast group.
    fn family(&self) -> Result<(u16, Option<u32>)> {
        let name = attr(CTRL_FAMILY_NAME, format!("{FAMILY}\0").into_bytes())?;
        let replies = match self.exchange(CTRL, CTRL_GETFAMILY, 2, vec![name]) {
            Ok(replies) => replies,
            Err(Failure::Os { errno: libc::ENOENT, .. }) => {
                return Err(Error::new(Kind::NotFound, "the kernel has no NBD netlink interface")
                    .hint(super::MODULE_HINT));
            }
            Err(e) => return Err(e.named("look for the NBD netlink interface")),
        };
        let id = replies.iter().find_map(|m| find(m.attrs(), CTRL_FAMILY_ID)?.first_chunk().copied());
        let id = id
            .map(u16::from_ne_bytes)
            .ok_or_else(|| Error::failed("the kernel describes no netlink family"))?;
        let group = replies.iter().find_map(|m| {
            let groups = parse(find(m.attrs(), CTRL_MCAST_GROUPS)?)?;
            groups.iter().find_map(|group| {
                let group = parse(group.nla_payload().as_ref())?;
                let name = find(&group, CTRL_MCAST_NAME)?;
                (name.strip_suffix(b"\0").unwrap_or(name) == GROUP.as_bytes())
                    .then(|| u32_in(&group, CTRL_MCAST_ID))?
            })
        });
        Ok((id, group))
    }

    /// One command to the family; the replies before the acknowledgement.
    fn nbd(&self, cmd: u8, attrs: Vec<Attr>) -> Result<Vec<Genlmsghdr<u8, u16>>, Failure> {
        let (family, _) = self.family().map_err(|e| match e.kind() {
            Kind::NotFound => Error::environment(e.message()).hint(super::MODULE_HINT),
            _ => e,
        })?;
        self.exchange(family, cmd, VERSION, attrs)
    }

    fn exchange(
        &self,
        family: u16,
        cmd: u8,
        version: u8,
        attrs: Vec<Attr>,
    ) -> Result<Vec<Genlmsghdr<u8, u16>>, Failure> {
        let failed = |e: &dyn std::fmt::Display| Error::failed(format!("cannot talk to the kernel: {e}"));
        let seq = u32::from(cmd) + 1;
        let message = message(family, cmd, version, seq, attrs).map_err(|e| failed(&e))?;
        self.0.send(&message).map_err(|e| match e {
            neli::err::SocketError::Io(e) if e.raw_os_error().is_some() => {
                Failure::Os { errno: e.raw_os_error().unwrap_or_default(), said: None }
            }
            e => failed(&e).into(),
        })?;
        let mut replies = Vec::new();
        loop {
            let (messages, _) = self.0.recv::<u16, Buffer>().map_err(|e| failed(&e))?;
            for message in messages {
                let message = message.map_err(|e| failed(&e))?;
                if *message.nl_seq() != seq {
                    continue;
                }
                match message.nl_payload() {
                    NlPayload::Ack(_) => return Ok(replies),
                    NlPayload::Err(e) => {
                        let said = e.ext_ack().iter().find(|a| *a.nla_type().nla_type() == NlmsgerrAttr::Msg);
                        let said = said.map(|a| {
                            let text = a.nla_payload().as_ref();
                            String::from_utf8_lossy(text.strip_suffix(b"\0").unwrap_or(text)).into_owned()
                        });
                        return Err(Failure::Os { errno: -*e.error(), said });
                    }
                    _ => replies.extend(body(&message)),
                }
            }
        }
    }
}

fn set_timeout(socket: &NlSocketHandle, limit: Duration) -> Result<()> {
    // Zero would mean for ever.
    let micros = i64::try_from(limit.as_micros()).unwrap_or(i64::MAX).max(1);
    let limit = TimeVal::new(micros / 1_000_000, micros % 1_000_000);
    // SAFETY: the socket lives longer than this borrow of its descriptor.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)
        .map_err(|e| Error::failed(format!("cannot set a time limit on a netlink socket: {e}")))
}

fn is_timeout(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

type Message = Nlmsghdr<u16, Genlmsghdr<u8, u16>>;

fn message(family: u16, cmd: u8, version: u8, seq: u32, attrs: Vec<Attr>) -> Result<Message> {
    let inner = |e: &dyn std::fmt::Display| Error::failed(format!("cannot encode a netlink message: {e}"));
    let body = GenlmsghdrBuilder::default()
        .cmd(cmd)
        .version(version)
        .attrs(attrs.into_iter().collect::<Attrs>())
        .build()
        .map_err(|e| inner(&e))?;
    NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::REQUEST | NlmF::ACK)
        .nl_seq(seq)
        .nl_pid(0)
        .nl_payload(NlPayload::Payload(body))
        .build()
        .map_err(|e| inner(&e))
}

/// The generic netlink part of a message, if it is one.
fn body(message: &Nlmsghdr<u16, Buffer>) -> Option<Genlmsghdr<u8, u16>> {
    let raw = message.get_payload()?.as_ref();
    Genlmsghdr::from_bytes_with_input(&mut Cursor::new(raw), raw.len()).ok()
}

fn parse(raw: &[u8]) -> Option<Attrs> {
    Attrs::from_bytes_with_input(&mut Cursor::new(raw), raw.len()).ok()
}

fn find(attrs: &Attrs, number: u16) -> Option<&[u8]> {
    attrs.iter().find(|a| *a.nla_type().nla_type() == number).map(|a| a.nla_payload().as_ref())
}

fn u32_in(attrs: &Attrs, number: u16) -> Option<u32> {
    find(attrs, number)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn devices(attrs: &Attrs) -> Vec<Status> {
    let list = find(attrs, DEVICE_LIST).and_then(parse).unwrap_or_default();
    let items = list.iter().filter(|item| *item.nla_type().nla_type() == DEVICE_ITEM);
    let devices = items.filter_map(|item| {
        let item = parse(item.nla_payload().as_ref())?;
        let connected = find(&item, DEVICE_CONNECTED)?.first().is_some_and(|c| *c != 0);
        Some(Status { index: u32_in(&item, DEVICE_INDEX)?, connected })
    });
    devices.collect()
}

fn attr(number: u16, payload: Vec<u8>) -> Result<Attr> {
    let inner = |e: &dyn std::fmt::Display| Error::failed(format!("cannot encode a netlink attribute: {e}"));
    let kind = AttrTypeBuilder::default().nla_type(number).build().map_err(|e| inner(&e))?;
    NlattrBuilder::default().nla_type(kind).nla_payload(Buffer::from(payload)).build().map_err(|e| inner(&e))
}

fn number(kind: u16, value: u32) -> Result<Attr> {
    attr(kind, value.to_ne_bytes().to_vec())
}

fn long(kind: u16, value: u64) -> Result<Attr> {
    attr(kind, value.to_ne_bytes().to_vec())
}

fn sockets(sockets: &[BorrowedFd<'_>]) -> Result<Attr> {
    let inner = |e: &dyn std::fmt::Display| Error::failed(format!("cannot encode a netlink attribute: {e}"));
    let mut list = attr(SOCKETS, Vec::new())?;
    for socket in sockets {
        let item = attr(SOCK_ITEM, Vec::new())?.nest(&number(SOCK_FD, socket.as_fd().as_raw_fd() as u32)?);
        list = list.nest(&item.map_err(|e| inner(&e))?).map_err(|e| inner(&e))?;
    }
    Ok(list)
}

fn text(kind: u16, value: &str) -> Result<Attr> {
    attr(kind, format!("{value}\0").into_bytes())
}

/// Whole seconds, rounded up: half a second is not none.
fn seconds(limit: Duration) -> u64 {
    limit.as_secs() + u64::from(limit.subsec_nanos() > 0)
}

fn connect_attrs(c: &Connect<'_>) -> Result<Vec<Attr>> {
    let mut attrs = Vec::new();
    if let Some(index) = c.index {
        attrs.push(number(INDEX, index)?);
    }
    attrs.push(long(SIZE_BYTES, c.size)?);
    attrs.push(long(BLOCK_SIZE_BYTES, c.block_size)?);
    attrs.push(long(TIMEOUT, 0)?);
    attrs.push(long(SERVER_FLAGS, c.server_flags)?);
    attrs.push(long(CLIENT_FLAGS, c.client_flags)?);
    attrs.push(long(DEAD_CONN_TIMEOUT, seconds(c.dead_conn_timeout))?);
    if let Some(backend) = c.backend {
        attrs.push(text(BACKEND_IDENTIFIER, backend)?);
    }
    attrs.push(sockets(c.sockets)?);
    Ok(attrs)
}

fn reconfigure_attrs(index: u32, r: &Reconfigure<'_>) -> Result<Vec<Attr>> {
    let mut attrs = vec![number(INDEX, index)?];
    if let Some(size) = r.size {
        attrs.push(long(SIZE_BYTES, size)?);
    }
    if let Some(limit) = r.dead_conn_timeout {
        attrs.push(long(DEAD_CONN_TIMEOUT, seconds(limit))?);
    }
    if let Some(backend) = r.backend {
        attrs.push(text(BACKEND_IDENTIFIER, backend)?);
    }
    if !r.sockets.is_empty() {
        attrs.push(sockets(r.sockets)?);
    }
    Ok(attrs)
}

#[cfg(test)]
mod tests {
    use neli::ToBytes;

    use super::*;

    fn bytes(attrs: Vec<Attr>) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        attrs.into_iter().collect::<Attrs>().to_bytes(&mut out).unwrap();
        out.into_inner()
    }

    /// One attribute as the kernel expects it, padded to four bytes.
    fn raw(number: u16, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend((payload.len() as u16 + 4).to_ne_bytes());
        out.extend(number.to_ne_bytes());
        out.extend(payload);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    const NESTED: u16 = 1 << 15;

    fn raw_sockets(fds: &[i32]) -> Vec<u8> {
        let items = fds.iter().map(|fd| raw(SOCK_ITEM | NESTED, &raw(SOCK_FD, &fd.to_ne_bytes())));
        raw(SOCKETS | NESTED, &items.collect::<Vec<_>>().concat())
    }

    #[test]
    fn a_connect_is_encoded_as_the_kernel_expects_it() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let connect = Connect {
            index: Some(7),
            size: 1 << 30,
            block_size: 512,
            server_flags: SERVER_HAS_FLAGS | SERVER_SEND_FLUSH,
            client_flags: 0,
            dead_conn_timeout: Duration::from_millis(600_100),
            backend: Some("zerofs:v"),
            sockets: &[a.as_fd(), b.as_fd()],
        };
        let expected = [
            raw(1, &7u32.to_ne_bytes()),
            raw(2, &(1u64 << 30).to_ne_bytes()),
            raw(3, &512u64.to_ne_bytes()),
            raw(4, &0u64.to_ne_bytes()),
            raw(5, &5u64.to_ne_bytes()),
            raw(6, &0u64.to_ne_bytes()),
            raw(8, &601u64.to_ne_bytes()),
            raw(10, b"zerofs:v\0"),
            raw_sockets(&[a.as_raw_fd(), b.as_raw_fd()]),
        ];
        assert_eq!(bytes(connect_attrs(&connect).unwrap()), expected.concat());
        let any = Connect { index: None, backend: None, sockets: &[a.as_fd()], ..connect };
        let encoded = bytes(connect_attrs(&any).unwrap());
        assert_eq!(encoded[..12], expected[1][..], "no index: the kernel chooses");
        assert!(encoded.ends_with(&raw_sockets(&[a.as_raw_fd()])));
        assert!(!encoded.windows(6).any(|w| w == b"zerofs"));
    }

    #[test]
    fn a_reconfigure_carries_only_what_changes() {
        let bare = reconfigure_attrs(3, &Reconfigure::default()).unwrap();
        assert_eq!(bytes(bare), raw(1, &3u32.to_ne_bytes()));
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let all = Reconfigure {
            sockets: &[a.as_fd()],
            size: Some(4096),
            backend: Some("zerofs:v"),
            dead_conn_timeout: Some(Duration::from_secs(10)),
        };
        let expected = [
            raw(1, &3u32.to_ne_bytes()),
            raw(2, &4096u64.to_ne_bytes()),
            raw(8, &10u64.to_ne_bytes()),
            raw(10, b"zerofs:v\0"),
            raw_sockets(&[a.as_raw_fd()]),
        ];
        assert_eq!(bytes(reconfigure_attrs(3, &all).unwrap()), expected.concat());
    }

    #[test]
    fn a_whole_message_has_the_right_headers() {
        let message = message(33, DISCONNECT, VERSION, 9, vec![number(INDEX, 5).unwrap()]).unwrap();
        let mut out = Cursor::new(Vec::new());
        message.to_bytes(&mut out).unwrap();
        let mut expected = Vec::new();
        expected.extend(28u32.to_ne_bytes());
        expected.extend(33u16.to_ne_bytes());
        expected.extend((1u16 | 4).to_ne_bytes());
        expected.extend(9u32.to_ne_bytes());
        expected.extend(0u32.to_ne_bytes());
        expected.extend([DISCONNECT, VERSION, 0, 0]);
        expected.extend(raw(INDEX, &5u32.to_ne_bytes()));
        assert_eq!(out.into_inner(), expected);
    }

    #[test]
    fn a_status_answer_is_parsed_and_rubbish_gives_nothing() {
        let item = |index: u32, connected: u8| {
            raw(1 | NESTED, &[raw(1, &index.to_ne_bytes()), raw(2, &[connected])].concat())
        };
        let answer = raw(9 | NESTED, &[item(0, 1), item(12, 0)].concat());
        let attrs = parse(&answer).unwrap();
        assert_eq!(
            devices(&attrs),
            [Status { index: 0, connected: true }, Status { index: 12, connected: false }]
        );
        assert_eq!(devices(&parse(&raw(9, b"abc")).unwrap_or_default()), []);
        assert_eq!(devices(&Attrs::default()), []);
    }

    #[test]
    fn the_kernel_answers_a_question_for_a_family_it_has_not_with_not_found() {
        // Needs no module and no privilege: it talks to the family of families.
        let name = attr(CTRL_FAMILY_NAME, b"no-such\0".to_vec()).unwrap();
        let answer = Socket::open().unwrap().exchange(CTRL, CTRL_GETFAMILY, 2, vec![name]);
        assert!(matches!(answer, Err(Failure::Os { errno: libc::ENOENT, .. })), "{answer:?}");
        let name = attr(CTRL_FAMILY_NAME, b"nlctrl\0".to_vec()).unwrap();
        let answer = Socket::open().unwrap().exchange(CTRL, CTRL_GETFAMILY, 2, vec![name]).unwrap();
        let id = answer.iter().find_map(|m| find(m.attrs(), CTRL_FAMILY_ID)?.first_chunk().copied());
        assert_eq!(id.map(u16::from_ne_bytes), Some(CTRL));
    }

    #[test]
    fn nonsense_is_refused_before_the_kernel_sees_it() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let good = Connect {
            index: None,
            size: 1 << 20,
            block_size: 512,
            server_flags: 1,
            client_flags: 0,
            dead_conn_timeout: Duration::ZERO,
            backend: None,
            sockets: &[a.as_fd()],
        };
        for bad in [
            Connect { size: 0, ..good },
            Connect { size: 1000, ..good },
            Connect { block_size: 0, ..good },
            Connect { sockets: &[], ..good },
        ] {
            assert_eq!(connect(&bad).unwrap_err().kind(), Kind::Usage);
        }
    }
}
