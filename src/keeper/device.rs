//! The volume's device of the kernel's nbd driver: connected, taken over from a keeper that died, grown, disconnected.
//!
//! The keeper never does I/O on its own device, nor anything else that waits for it ([`apart`] says why).
//!
//! The record `nbd.json` in the run folder says what the next keeper needs to know. It is written before the device is
//! connected and removed after it has gone, so a device without a record is one that was never used. A device is ours
//! only when the record fits it: the index, the process that connected it, and on kernels from 5.14 on the backend
//! identifier, which alone proves nothing, since another run folder may have a volume of the same name.
//!
//! When a keeper dies, the kernel sees its sockets close and holds all I/O. The next keeper makes the server safe and
//! replays the log ([`super::supervisor`]) before it hands new sockets over, so nothing that the kernel sends again is
//! served too early. The direct path has no log: after anything but a clean exit of a server that closes safely, its
//! device is disconnected, which the filesystem above sees as I/O errors; it is never connected to another server.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::control::{ConnectOptions, NbdPath, NbdStatus, State};
use super::nbd::DISCONNECTED;
use super::path::{DataPath, OwedReply};
use super::process::{Exit, boot_id, write_json};
use super::service::{Shared, stopping_error};
use super::{lock, thread};
use crate::apart;
use crate::error::{Doing, Error, Kind, Result};
use crate::host::nbd::sysfs::NbdDevice;
use crate::host::nbd::{self, netlink, sysfs};
use crate::zerofs::nbd::{Export, TransmissionFlags, handshake};
use crate::zerofs::sock;

/// The name of the record in the run folder.
pub const RECORD: &str = "nbd.json";

/// The logical block size of a device: 512 as with the other transports, so that filesystems move between them.
const BLOCK_SIZE: u64 = 512;
/// The sockets of a guarded device. With one, the kernel only looks after requests that are not answered in time; with
/// several it would give up the socket of a slow request, and send that request again while the first is still held.
pub const GUARDED_SOCKETS: usize = 1;
/// How often the kernel looks after requests without an answer on a guarded device: those that a dead keeper had taken
/// are sent to the next one no sooner than that, unless that one can answer them at once.
const LOOK_AFTER: Duration = Duration::from_millis(500);
/// The same on the direct path, where a request that is sent again may overtake itself in ZeroFS: practically never.
const LOOK_AFTER_DIRECT: Duration = Duration::from_secs(24 * 3600);
/// How often within a minute a device may lose its sockets, before it is given up.
const MENDS: usize = 20;
/// How long a flush before a disconnect may take.
const FLUSH_LIMIT: Duration = Duration::from_secs(30);
/// How long new I/O waits for what an earlier keeper owes to the kernel.
const OWED_LIMIT: Duration = Duration::from_millis(500);
/// How long a look at the queue may take before a hand-over.
const LOOK_LIMIT: Duration = Duration::from_millis(200);
/// How long the kernel may take to see that the sockets of a dead keeper are dead.
const TAKE_LIMIT: Duration = Duration::from_secs(20);
/// How long the kernel may take to change a device's settings, for which it lets all I/O in flight end.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// What the next keeper of the volume must know of its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of this format.
    format: u32,
    /// The boot that the device was connected in; after another one there is no device.
    boot: String,
    /// The N of `/dev/nbdN`; none between the decision to connect and the kernel's answer.
    pub index: Option<u32>,
    /// What the kernel shows as the process that connected it, by which a connection is known again. Before the kernel's
    /// answer, what it will show; none where nobody can tell, in a pid namespace of our own.
    #[serde(default)]
    pub pid: Option<i32>,
    /// Devices that had the same backend identifier before: those of other run folders, or leaked ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    others: Vec<u32>,
    /// What the sockets lead to.
    pub path: NbdPath,
    read_only: bool,
    reconnect_timeout_ms: u64,
    /// How many sockets it has.
    sockets: usize,
    reconnects: u64,
    /// Sockets that had died when others took their place.
    #[serde(default)]
    dead_connections: u64,
    /// Why the device works no more, and never will again.
    pub failed: Option<String>,
}

impl Record {
    const FORMAT: u32 = 1;

    /// The record of a device of this boot.
    pub fn read(run_dir: &Path) -> Result<Option<Record>> {
        let path = run_dir.join(RECORD);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).doing("read", &path),
        };
        let record: Record = serde_json::from_slice(&text)
            .map_err(|e| Error::refused(format!("cannot understand {}: {e}", path.display())))?;
        if record.format != Self::FORMAT {
            return Err(Error::refused(format!("{} is of a newer zerofsctl", path.display()))
                .hint("use the zerofsctl that attached the volume"));
        }
        Ok((record.boot == boot_id()).then_some(record))
    }

    /// A number that no other connection of the device has, nor of the volume in this boot, as far as the process is known;
    /// a new connection forgets the requests of an earlier one in any case.
    fn connection(&self) -> u64 {
        u64::from(self.pid.unwrap_or(0).cast_unsigned()) << 32 | self.reconnects & u64::from(u32::MAX)
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.reconnect_timeout_ms)
    }

    /// The device that this record means, as it is now; none when it has gone. One that another run folder connected is
    /// never it, whatever its name.
    ///
    /// [`Kind::Refused`] when the keeper was killed before it wrote the index down, and more than one device may be it.
    pub fn device(&self, backend: &str) -> Result<Option<NbdDevice>> {
        match self.index {
            Some(index) => Ok(sysfs::one(index)?.filter(|d| self.fits(d, backend))),
            None => self.among(sysfs::named(backend)?, backend),
        }
    }

    /// Whether a device of the recorded index is the recorded connection. A kernel without identifiers shows none.
    fn fits(&self, device: &NbdDevice, backend: &str) -> bool {
        device.connected
            && device.backend.as_ref().is_none_or(|b| b == backend)
            && self.pid.is_none_or(|pid| device.pid == Some(pid))
    }

    /// Of the devices with our identifier, the one that was connected by a keeper that did not come to write its index down.
    fn among(&self, devices: Vec<NbdDevice>, backend: &str) -> Result<Option<NbdDevice>> {
        let mut fitting =
            devices.into_iter().filter(|d| self.fits(d, backend) && !self.others.contains(&d.index));
        let first = fitting.next();
        if let (Some(first), Some(second)) = (&first, fitting.next()) {
            return Err(Error::refused(format!(
                "/dev/nbd{} and /dev/nbd{} both say that they are {backend}, and either may be ours",
                first.index, second.index
            ))
            .hint("see which is in use: zerofsctl nbd list --all; free the other: zerofsctl nbd gc"));
        }
        Ok(first)
    }
}

/// The device, as far as this keeper knows. It is changed by whoever holds [`Shared::mounting`].
#[derive(Default)]
pub(super) struct Device {
    record: Mutex<Option<Record>>,
    /// Dead sockets that the kernel has told of since the device got those that it has.
    told_dead: AtomicU64,
    /// When it lost its sockets lately.
    mends: Mutex<Vec<Instant>>,
    /// The direct path: our hold on the sockets, so that they can be shut down.
    direct: Mutex<Vec<UnixStream>>,
    /// The direct path: the server has ended cleanly, and its successor may have the device.
    clean: std::sync::atomic::AtomicBool,
    listening: std::sync::atomic::AtomicBool,
}

impl Device {
    /// One that an earlier keeper connected.
    pub fn of(record: Option<Record>) -> Device {
        Device { record: Mutex::new(record), ..Device::default() }
    }

    /// The record, if there is a device.
    pub fn record(&self) -> Option<Record> {
        lock(&self.record).clone()
    }

    /// Whether there is a device that works or waits.
    pub fn is_connected(&self) -> bool {
        lock(&self.record).as_ref().is_some_and(|r| r.failed.is_none())
    }
}

impl Shared {
    fn backend(&self) -> String {
        nbd::backend_id(&self.config.volume)
    }

    fn record_path(&self) -> PathBuf {
        self.config.run_dir.join(RECORD)
    }

    /// Remembers, on the disk first.
    fn remember(&self, record: &Record) -> Result<()> {
        write_json(&self.record_path(), record)?;
        *lock(&self.device.record) = Some(record.clone());
        Ok(())
    }

    fn forget_device(&self) -> Result<()> {
        let path = self.record_path();
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).doing("remove", &path),
            _ => {}
        }
        *lock(&self.device.record) = None;
        lock(&self.device.direct).clear();
        self.device.clean.store(false, Ordering::SeqCst);
        self.device.told_dead.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// How many of the device's sockets are dead. The kernel tells of each, but of those that die with their keeper it
    /// tells nobody.
    fn dead_sockets(&self, record: &Record) -> u64 {
        let ended = match record.path {
            NbdPath::Guarded => record.sockets.saturating_sub(self.data.nbd_sockets()),
            NbdPath::Direct if record.failed.is_some() => record.sockets,
            NbdPath::Direct => 0,
        };
        self.device.told_dead.load(Ordering::Relaxed).max(ended as u64)
    }

    /// Counts what others have taken the place of.
    fn count_replaced(&self, record: &mut Record, dead: u64) {
        record.reconnects += 1;
        record.dead_connections += dead.max(self.device.told_dead.swap(0, Ordering::Relaxed));
    }

    /// What to tell of the device.
    pub(super) fn nbd_status(&self) -> Option<NbdStatus> {
        let record = self.device.record()?;
        let connected = record.failed.is_none() && record.index.is_some();
        let dead_connections = record.dead_connections + self.dead_sockets(&record);
        Some(NbdStatus {
            index: record.index,
            path: record.path,
            read_only: record.read_only,
            connected,
            connections: match record.path {
                NbdPath::Guarded => self.data.nbd_sockets() as u64,
                NbdPath::Direct if connected => record.sockets as u64,
                NbdPath::Direct => 0,
            },
            reconnect_timeout_ms: record.reconnect_timeout_ms,
            reconnects: record.reconnects,
            dead_connections,
            failed: record.failed,
        })
    }

    // --- connecting -------------------------------------------------------------------------------------

    /// Makes the volume an NBD device, replaying the log before if need be. Gives index and size.
    pub(super) fn connect_nbd(self: &Arc<Self>, options: &ConnectOptions) -> Result<(u32, u64)> {
        nbd::ensure()?;
        self.raise()?;
        let _mounting = lock(&self.mounting);
        if lock(&self.board).stopping {
            return Err(stopping_error());
        }
        if self.fuse_mounted() {
            return Err(Error::new(Kind::Busy, "the volume is attached with the fuse transport")
                .hint("detach it first: zerofsctl detach VOLUME"));
        }
        let size = self.data.size();
        if let Some(record) = self.device.record() {
            return match record {
                Record { failed: Some(why), .. } => {
                    Err(Error::refused(format!("the device has failed: {why}"))
                        .hint("detach the volume, then attach it again"))
                }
                Record { index: Some(index), path, read_only, .. } => {
                    if (path, read_only) == (options.path, options.read_only) {
                        return Ok((index, size));
                    }
                    Err(Error::new(
                        Kind::Conflict,
                        format!("/dev/nbd{index} is connected with other settings"),
                    )
                    .hint("detach the volume first: zerofsctl detach VOLUME"))
                }
                Record { index: None, .. } => {
                    Err(Error::new(Kind::Busy, "the device of an earlier keeper is being looked for")
                        .hint("run the same command again"))
                }
            };
        }
        if !size.is_multiple_of(BLOCK_SIZE) {
            return Err(Error::refused(format!("the volume has {size} bytes, which is no multiple of 512"))
                .hint("grow it: zerofsctl resize VOLUME SIZE"));
        }
        let backend = self.backend();
        let others: Vec<u32> = sysfs::named(&backend)?.iter().map(|d| d.index).collect();
        if !others.is_empty() {
            warn!("there are other devices that say they are {backend}: {others:?}; they are left alone");
        }
        let mut record = Record {
            format: Record::FORMAT,
            boot: boot_id(),
            index: None,
            pid: pid_for_the_kernel(),
            others,
            path: options.path,
            read_only: options.read_only,
            reconnect_timeout_ms: options.reconnect_timeout_ms,
            sockets: 0,
            reconnects: 0,
            dead_connections: 0,
            failed: None,
        };
        self.data.forget_requests();
        let made = match options.path {
            NbdPath::Guarded => self.guarded_sockets(GUARDED_SOCKETS, record.read_only),
            NbdPath::Direct => self.direct_sockets(),
        };
        let (kernel_ends, flags) = made?;
        record.sockets = kernel_ends.len();
        let connected = self.remember(&record).and_then(|()| {
            let sockets: Vec<_> = kernel_ends.iter().map(AsFd::as_fd).collect();
            netlink::connect(&netlink::Connect {
                index: options.index,
                size,
                block_size: BLOCK_SIZE,
                server_flags: server_flags(flags, record.path, record.read_only),
                client_flags: 0,
                dead_conn_timeout: record.limit(),
                backend: Some(&backend),
                sockets: &sockets,
            })
        });
        let index = match connected {
            Ok(index) => index,
            Err(e) => {
                self.data.close_nbd();
                self.forget_device()?;
                return Err(e);
            }
        };
        record.index = Some(index);
        let shown = sysfs::one(index)?.and_then(|d| d.pid);
        if record.pid.is_some() && record.pid != shown {
            warn!("/dev/nbd{index} was connected by {shown:?} and not by {:?}", record.pid);
        }
        record.pid = shown;
        self.remember(&record)?;
        self.data.name_connection(record.connection());
        if record.path == NbdPath::Direct {
            *lock(&self.device.direct) = kernel_ends;
        }
        info!("/dev/nbd{index} is connected, {} path, {size} bytes", record.path.name());
        self.tune(index, record.path, true);
        self.listen_for_dead_links();
        Ok((index, size))
    }

    fn guarded_sockets(&self, n: usize, read_only: bool) -> Result<(Vec<UnixStream>, TransmissionFlags)> {
        let flags = self.data.flags().ok_or_else(|| Error::failed("no server has been up yet"))?;
        Ok((sockets_of(&self.data, n, read_only, &[])?, flags))
    }

    /// Connections to ZeroFS, in the transmission phase.
    fn direct_sockets(&self) -> Result<(Vec<UnixStream>, TransmissionFlags)> {
        let one = || direct_socket(&self.config.run_dir, &self.config.export);
        let (first, export) = one()?;
        if export.size != self.data.size() {
            return Err(Error::new(Kind::Unreachable, "the export changes between two connections")
                .hint("run the same command again"));
        }
        let mut streams = vec![first];
        let wanted = if export.flags.can_multi_conn() { self.config.connections.max(1) } else { 1 };
        while streams.len() < wanted {
            streams.push(one()?.0);
        }
        Ok((streams, export.flags))
    }

    /// Sets the queue for the job; a device works without that too. One that is not `fresh` an earlier keeper has set already,
    /// unless it ended before, and is left alone then: a change waits for all I/O in flight.
    fn tune(&self, index: u32, path: NbdPath, fresh: bool) {
        let wanted = queue(path);
        let is_as_wanted = |is: sysfs::Queue| {
            (is.scheduler, is.io_timeout_ms, is.read_ahead_kib)
                == (wanted.scheduler.clone(), wanted.io_timeout_ms, wanted.read_ahead_kib)
        };
        // Looked at in the child, too: see `is_unscheduled`.
        let set = || {
            if !fresh && sysfs::queue(index).is_ok_and(is_as_wanted) {
                return Ok(());
            }
            sysfs::set_queue(index, &wanted).map_err(|_| libc::EIO)
        };
        if let Err(e) = apart::run(&format!("set the queue of /dev/nbd{index}"), CHANGE_LIMIT, set) {
            warn!("the queue of /dev/nbd{index} is left as it is: {e}");
        }
    }

    /// Counts and logs what the kernel tells of dead sockets, from now on.
    fn listen_for_dead_links(self: &Arc<Self>) {
        if self.device.listening.swap(true, Ordering::SeqCst) {
            return;
        }
        let shared = Arc::clone(self);
        let spawned = netlink::LinkDead::listen().and_then(|links| {
            thread("link-dead", move || {
                loop {
                    match links.next(Duration::from_secs(3600)) {
                        Ok(Some(index)) if shared.device.record().is_some_and(|r| r.index == Some(index)) => {
                            shared.device.told_dead.fetch_add(1, Ordering::Relaxed);
                            warn!("the kernel has lost a socket of /dev/nbd{index}");
                        }
                        Ok(_) => {}
                        Err(e) => {
                            warn!("{e}");
                            std::thread::sleep(Duration::from_secs(5));
                        }
                    }
                }
            })
            .doing("start a thread of", "the keeper")
        });
        if let Err(e) = spawned {
            warn!("dead sockets of the device are not heard of: {e}");
        }
    }

    // --- taking over ------------------------------------------------------------------------------------

    /// Gives the device of an earlier keeper new sockets, as soon as the log is replayed. Returns when that is done, or
    /// will never be. `adopted` says that the server of that keeper lives and is ours now.
    pub(super) fn take_over_device(self: &Arc<Self>, adopted: bool) {
        let Some(record) = self.device.record() else { return };
        self.listen_for_dead_links();
        if record.failed.is_some() {
            return;
        }
        if record.path == NbdPath::Direct {
            if !adopted {
                self.fail_device("its ZeroFS has ended together with its keeper");
            }
            return;
        }
        loop {
            let fenced = match self.wait_for_data_path() {
                Some(fenced) => fenced,
                None => return,
            };
            match self.hand_over(fenced) {
                Ok(()) => {
                    if let Some(Record { index: Some(index), path, .. }) = self.device.record() {
                        self.tune(index, path, false);
                    }
                    return;
                }
                Err(e) if e.kind() == Kind::NotFound => {
                    error!("{e}");
                    self.data.close_nbd();
                    self.device_failed(e.message());
                    return;
                }
                Err(e) => {
                    warn!("the device cannot be taken over yet: {e}");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    /// Waits until the data path is connected (false) or the volume has a new owner (true); none when all is over.
    fn wait_for_data_path(&self) -> Option<bool> {
        let board = lock(&self.board);
        let waits = |b: &mut super::service::Board| {
            !b.data_path && !matches!(b.state, State::Fenced | State::Failed) && !b.stopping
        };
        let board = self.changed.wait_while(board, waits).unwrap_or_else(std::sync::PoisonError::into_inner);
        match board.state {
            State::Fenced => Some(true),
            _ if board.data_path => Some(false),
            _ => None,
        }
    }

    /// [`Kind::NotFound`] when the device is not there any more, or does not come back to life.
    fn hand_over(&self, fenced: bool) -> Result<()> {
        let _mounting = lock(&self.mounting);
        let Some(mut record) = self.device.record() else { return Ok(()) };
        let backend = self.backend();
        let device = record.device(&backend)?;
        let Some(device) = device else {
            if record.index.is_none() {
                info!("the earlier keeper ended before it had connected a device");
                return self.forget_device();
            }
            return Err(Error::new(Kind::NotFound, "the kernel has disconnected the device"));
        };
        let index = device.index;
        if !fenced && self.data.size() < device.size.0 {
            return Err(Error::refused(format!(
                "/dev/nbd{index} has {} bytes and the volume only {}",
                device.size.0,
                self.data.size()
            )));
        }
        // A scheduler gives the place of a request that is to be sent again to another one, with a count of its own. With
        // one socket, a reply comes on the right one.
        let mut replies = if fenced || record.sockets != 1 || !knows_its_requests() || !is_unscheduled(index)
        {
            self.data.forget_requests();
            Vec::new()
        } else {
            self.data.owed_replies(record.connection(), OWED_LIMIT)
        };
        let mut given = 0;
        let dead = self.dead_sockets(&record);
        let begun = Instant::now();
        loop {
            let missing = record.sockets.saturating_sub(self.data.nbd_sockets());
            if missing == 0 {
                break;
            }
            if begun.elapsed() > TAKE_LIMIT {
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "the kernel does not take {missing} of {} new sockets for /dev/nbd{index}",
                        record.sockets
                    ),
                ));
            }
            // Once only: the kernel ends a socket with a reply to what it has just sent again, or has had.
            let replies = std::mem::take(&mut replies);
            given += replies.len();
            let sockets = sockets_of(&self.data, missing, record.read_only, &replies)?;
            let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
            netlink::reconfigure(
                index,
                &netlink::Reconfigure {
                    sockets: &fds,
                    size: None,
                    backend: device.backend.is_some().then_some(&backend),
                    dead_conn_timeout: Some(record.limit()),
                },
            )?;
            // A socket that the kernel has not taken, since it thinks that an old one is alive, is closed by this.
            drop(fds);
            drop(sockets);
            std::thread::sleep(Duration::from_millis(10));
        }
        (record.index, record.pid) = (Some(index), device.pid);
        self.count_replaced(&mut record, dead);
        self.remember(&record)?;
        self.data.name_connection(record.connection());
        info!(
            "/dev/nbd{index} has new sockets, and the replies to {given} requests that an earlier keeper had taken"
        );
        Ok(())
    }

    // --- growing, ending --------------------------------------------------------------------------------

    /// Learns a larger size, and tells the kernel.
    pub(super) fn resize_device(&self) -> Result<u64> {
        let _mounting = lock(&self.mounting);
        let record = self.device.record().filter(|r| r.failed.is_none());
        if record.as_ref().is_some_and(|r| r.path == NbdPath::Direct) {
            return Err(Error::refused("a device with the direct path cannot grow while it is connected")
                .hint("detach the volume, resize it, and attach it again"));
        }
        let bytes = self.data.resize()?;
        let Some((record, index)) = record.and_then(|r| r.index.map(|i| (r, i))) else { return Ok(bytes) };
        let shown = record.device(&self.backend())?;
        let shown =
            shown.ok_or_else(|| Error::new(Kind::NotFound, format!("/dev/nbd{index} is not connected")))?;
        if bytes < shown.size.0 {
            return Err(Error::refused(format!(
                "/dev/nbd{index} has {} bytes and would have {bytes}: it must never shrink",
                shown.size.0
            )));
        }
        let bytes_in_blocks = bytes - bytes % BLOCK_SIZE;
        if bytes_in_blocks > shown.size.0 {
            let grow = netlink::Reconfigure {
                sockets: &[],
                size: Some(bytes_in_blocks),
                backend: shown.backend.as_deref(),
                dead_conn_timeout: Some(record.limit()),
            };
            let what = format!("grow /dev/nbd{index} to {bytes_in_blocks} bytes");
            apart::run(&what, CHANGE_LIMIT, || netlink::reconfigure(index, &grow).map_err(|_| libc::EIO))?;
            let now = sysfs::one(index)?.map_or(0, |d| d.size.0);
            if now != bytes_in_blocks {
                return Err(Error::failed(format!(
                    "/dev/nbd{index} has {now} bytes after it was grown to {bytes}"
                ))
                .hint("see what the kernel says: dmesg | grep nbd"));
            }
            info!("/dev/nbd{index} has {bytes} bytes now");
        }
        Ok(bytes)
    }

    /// Disconnects the device; with `force` without a flush. The caller holds [`Shared::mounting`].
    pub(super) fn disconnect_nbd(&self, force: bool) -> Result<()> {
        let Some(record) = self.device.record() else { return Ok(()) };
        match (record.device(&self.backend())?, record.index) {
            (Some(device), _) => {
                let index = device.index;
                if !force && record.failed.is_none() {
                    self.flush_device(index)?;
                }
                let limit =
                    if record.failed.is_some() { nbd::LET_GO_FAILED_LIMIT } else { nbd::LET_GO_LIMIT };
                nbd::disconnect_and_wait(&device, limit)?;
                info!("/dev/nbd{index} is disconnected");
            }
            (None, Some(index)) => info!("/dev/nbd{index} is not ours any more"),
            (None, None) => {}
        }
        self.data.close_nbd();
        self.forget_device()
    }

    /// Makes everything durable that was acknowledged. What the kernel cached of the device it has written when the last
    /// user closed it. Never by way of the device itself: see [`apart`].
    fn flush_device(&self, index: u32) -> Result<()> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let data = Arc::clone(&self.data);
        let spawned = thread("flush-device", move || {
            let _ = tell.send(data.flush());
        });
        spawned.doing("start a thread of", "the keeper")?;
        let slow = |_| {
            Error::new(
                Kind::Unreachable,
                format!("/dev/nbd{index} could not be flushed within {} s", FLUSH_LIMIT.as_secs()),
            )
            .hint("see whether ZeroFS is well: zerofsctl show VOLUME; give up what is not written: zerofsctl detach VOLUME --force")
        };
        match told.recv_timeout(FLUSH_LIMIT).map_err(slow)? {
            // A fenced volume takes nothing more, and what it has is not ours.
            Err(e) if lock(&self.board).state == State::Fenced => {
                warn!("{e}");
                Ok(())
            }
            flushed => flushed,
        }
    }

    /// All of the kernel's sockets have ended, and it was not we who did it.
    pub(super) fn device_gone(&self, why: &str) {
        // A disconnect of our own holds this, and then there is no record when it is over.
        let mounting = lock(&self.mounting);
        let Some(record) = self.device.record().filter(|r| r.failed.is_none()) else { return };
        let Some(index) = record.index else { return };
        if self.data.nbd_sockets() > 0 || record.path != NbdPath::Guarded {
            return;
        }
        // It says so only when it was told to, by whomever. One that is still in use is shown until its last user lets go, and
        // older kernels would take new sockets for it.
        let told = why == DISCONNECTED;
        if told || record.device(&self.backend()).ok().flatten().is_none() {
            error!("/dev/nbd{index} was disconnected, and not by its keeper: {why}");
            return self.device_failed("it was disconnected, and not by its keeper");
        }
        drop(mounting);
        self.mend_device(index, why);
    }

    /// The kernel has dropped our sockets and kept the device. That happens when requests that had waited for a dead
    /// keeper for too long give up one after the other, and each takes the sockets down that are there by then.
    fn mend_device(&self, index: u32, why: &str) {
        {
            let mut mends = lock(&self.device.mends);
            mends.retain(|at| at.elapsed() < Duration::from_secs(60));
            if mends.len() >= MENDS {
                error!("/dev/nbd{index} has lost its sockets again and again: it is given up");
                return self.device_failed("the kernel has given it up: nobody took it over in time");
            }
            mends.push(Instant::now());
        }
        warn!("/dev/nbd{index} has lost its sockets ({why}): it gets new ones");
        std::thread::sleep(Duration::from_millis(200));
        let fenced = lock(&self.board).state == State::Fenced;
        if let Err(e) = self.hand_over(fenced) {
            error!("{e}");
            self.device_failed(e.message());
        }
    }

    fn device_failed(&self, why: &str) {
        if let Some(mut record) = self.device.record() {
            record.failed = Some(why.to_owned());
            if let Err(e) = self.remember(&record) {
                error!("{e}");
                *lock(&self.device.record) = Some(record);
            }
        }
    }

    /// Disconnects a device of the direct path, so that its users get errors instead of wrong data.
    fn fail_device(&self, why: &str) {
        // Remembered before it is done: the next keeper must not think better of it.
        self.device_failed(why);
        self.end_device(why);
    }

    fn end_device(&self, why: &str) {
        let _mounting = lock(&self.mounting);
        let Some(record) = self.device.record() else { return };
        for socket in lock(&self.device.direct).drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        let device = record.device(&self.backend()).unwrap_or_else(|e| {
            error!("{e}");
            None
        });
        let Some(device) = device else { return };
        error!(
            "/dev/nbd{} fails: {why}; what was not flushed is lost. Detach the volume, and attach it again",
            device.index
        );
        if let Err(e) = nbd::disconnect_and_wait(&device, nbd::LET_GO_FAILED_LIMIT) {
            error!("{e}");
        }
    }

    /// The server has ended. What that means to a device of the direct path.
    pub(super) fn server_ended(self: &Arc<Self>, exit: Exit, zeros_when_closed: bool) {
        let Some(record) = self.device.record().filter(|r| r.failed.is_none()) else { return };
        if record.path != NbdPath::Direct {
            return;
        }
        if exit == Exit::Code(0) && !zeros_when_closed {
            info!("ZeroFS has ended cleanly: its successor gets the device");
            self.device.clean.store(true, Ordering::SeqCst);
            return;
        }
        let why = match exit {
            Exit::Code(0) => {
                "its ZeroFS ended, and this version may have answered with zeros before".to_owned()
            }
            exit => format!("its ZeroFS {exit}"),
        };
        // Now, so that no successor is started before it is remembered; the rest takes a while.
        self.device_failed(&why);
        let shared = Arc::clone(self);
        let spawned = thread("fail-device", move || shared.end_device(&why));
        if let Err(e) = spawned {
            error!("cannot start a thread: {e}");
        }
    }

    /// A server serves. After a clean end of the one before, a device of the direct path gets new sockets.
    pub(super) fn server_serves(self: &Arc<Self>) {
        if !self.device.clean.swap(false, Ordering::SeqCst) {
            return;
        }
        let shared = Arc::clone(self);
        let spawned = thread("reconnect", move || {
            let done = (|| {
                // Not held while the device is failed, which takes it too.
                let _mounting = lock(&shared.mounting);
                let Some(mut record) = shared.device.record().filter(|r| r.failed.is_none()) else {
                    return Ok(());
                };
                let backend = shared.backend();
                let Some(NbdDevice { index, backend: shown, .. }) = record.device(&backend)? else {
                    return Err(Error::new(Kind::NotFound, "the kernel has disconnected the device"));
                };
                for socket in lock(&shared.device.direct).drain(..) {
                    let _ = socket.shutdown(std::net::Shutdown::Both);
                }
                let (sockets, _) = shared.direct_sockets()?;
                let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
                netlink::reconfigure(
                    index,
                    &netlink::Reconfigure {
                        sockets: &fds,
                        size: None,
                        backend: shown.as_deref(),
                        dead_conn_timeout: Some(record.limit()),
                    },
                )?;
                let dead = std::mem::replace(&mut record.sockets, sockets.len());
                shared.count_replaced(&mut record, dead as u64);
                shared.remember(&record)?;
                *lock(&shared.device.direct) = sockets;
                info!("/dev/nbd{index} has new sockets");
                Ok::<_, Error>(())
            })();
            if let Err(e) = done {
                shared.fail_device(&format!("it could not be connected to the restarted ZeroFS: {e}"));
            }
        });
        if let Err(e) = spawned {
            error!("cannot start a thread: {e}");
        }
    }
}

/// Whom the kernel will show as the maker of a connection that this thread makes: the thread itself, by its number in the
/// first pid namespace. None in another namespace, where nobody tells.
fn pid_for_the_kernel() -> Option<i32> {
    // The number of the first pid namespace is fixed in the kernel.
    let first = std::fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns == Path::new("pid:[4026531836]"));
    first.then(|| nix::unistd::gettid().as_raw())
}

/// Whether the device has no scheduler, for sure. Not asked by this process: a change of the queue that waits for the
/// device lets the question wait, too.
fn is_unscheduled(index: u32) -> bool {
    let look = || match sysfs::scheduler(index) {
        Ok(Some(scheduler)) if scheduler == "none" => Ok(()),
        _ => Err(libc::EIO),
    };
    apart::run(&format!("look at the scheduler of /dev/nbd{index}"), LOOK_LIMIT, look).is_ok()
}

/// Whether the kernel tells a late reply from one that it waits for, also while it sends the request again.
fn knows_its_requests() -> bool {
    let Ok(uts) = nix::sys::utsname::uname() else { return false };
    is_since_5_16(&uts.release().to_string_lossy())
}

fn is_since_5_16(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (5, 16))
}

/// Pairs of sockets, of which the data path serves one end each, and says these replies on the first; gives the other
/// ends, for the kernel.
pub fn sockets_of(
    data: &DataPath,
    n: usize,
    read_only: bool,
    replies: &[OwedReply],
) -> Result<Vec<UnixStream>> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let (a, b) = UnixStream::pair().doing("make", "a pair of sockets")?;
        // Room for a large request, so that the kernel's sender need not wait for us in its middle.
        let _ = setsockopt(&b, sockopt::SndBufForce, &(2 << 20));
        ours.push(a);
        theirs.push(b);
    }
    data.serve_nbd(ours, read_only, replies)?;
    Ok(theirs)
}

/// A connection to the NBD server in `run_dir` that the kernel may have: in the transmission phase, and without a
/// time limit.
pub fn direct_socket(run_dir: &Path, export: &str) -> Result<(UnixStream, Export)> {
    let mut stream = sock::connect(run_dir, "nbd.sock").map_err(|e| {
        Error::new(Kind::Unreachable, format!("cannot connect to ZeroFS's NBD socket: {e}"))
            .hint("look whether ZeroFS runs, and into its log (zerofsctl show VOLUME)")
    })?;
    let export = handshake(&mut stream, export)?;
    // The kernel waits for as long as it takes.
    stream
        .set_read_timeout(None)
        .and_then(|()| stream.set_write_timeout(None))
        .doing("set up", "a socket")?;
    let _ = setsockopt(&stream, sockopt::SndBufForce, &(2 << 20));
    Ok((stream, export))
}

/// How the queue of a device is set.
pub fn queue(path: NbdPath) -> sysfs::Queue {
    let look_after = match path {
        NbdPath::Guarded => LOOK_AFTER,
        NbdPath::Direct => LOOK_AFTER_DIRECT,
    };
    sysfs::Queue {
        // The guard and ZeroFS order requests themselves.
        scheduler: Some("none".into()),
        read_ahead_kib: Some(4096),
        max_request_kib: Some(1024),
        io_timeout_ms: Some(look_after.as_millis() as u64),
    }
}

/// What the kernel is told that the server can do.
pub fn server_flags(server: TransmissionFlags, path: NbdPath, read_only: bool) -> u64 {
    let mut flags = netlink::SERVER_HAS_FLAGS;
    let mut offer = |yes: bool, flag: u64| flags |= if yes { flag } else { 0 };
    let guarded = path == NbdPath::Guarded;
    // The guard makes a flush of force unit access, and orders what comes over several sockets.
    offer(server.has_flush() || guarded, netlink::SERVER_SEND_FLUSH);
    offer(server.has_fua() || guarded, netlink::SERVER_SEND_FUA);
    offer(server.has_trim(), netlink::SERVER_SEND_TRIM);
    offer(server.has_write_zeroes(), netlink::SERVER_SEND_WRITE_ZEROES);
    offer(server.can_multi_conn() || guarded, netlink::SERVER_CAN_MULTI_CONN);
    offer(read_only, netlink::SERVER_READ_ONLY);
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_know_their_requests_are_told_by_their_release() {
        for release in ["5.16.0", "6.1.0-18-amd64", "6.12.117+deb12-amd64", "10.0", "7.2.7"] {
            assert!(is_since_5_16(release), "{release}");
        }
        for release in ["5.15.167.4-generic", "4.18.0-553.el8.x86_64", "5", "", "x.y"] {
            assert!(!is_since_5_16(release), "{release}");
        }
    }

    #[test]
    fn each_hand_over_makes_another_connection() {
        let mut record = record();
        (record.pid, record.reconnects) = (Some(4711), 0);
        let first = record.connection();
        record.reconnects = 1;
        assert_ne!(first, record.connection());
        (record.pid, record.reconnects) = (Some(4712), 0);
        assert_ne!(first, record.connection());
        record.pid = None;
        assert_ne!(first, record.connection());
    }

    fn record() -> Record {
        Record {
            format: 1,
            boot: boot_id(),
            index: Some(3),
            pid: None,
            others: vec![4],
            path: NbdPath::Direct,
            read_only: true,
            reconnect_timeout_ms: 5000,
            sockets: 4,
            reconnects: 2,
            dead_connections: 3,
            failed: Some("why".into()),
        }
    }

    #[test]
    fn a_record_survives_its_file_and_not_a_reboot_or_a_newer_format() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), None);
        let write = |record: &Record| write_json(&dir.path().join(RECORD), record).unwrap();
        write(&record());
        assert_eq!(Record::read(dir.path()).unwrap(), Some(record()));
        write(&Record { boot: "another".into(), ..record() });
        assert_eq!(Record::read(dir.path()).unwrap(), None);
        write(&Record { format: 2, ..record() });
        assert_eq!(Record::read(dir.path()).unwrap_err().kind(), Kind::Refused);
        std::fs::write(dir.path().join(RECORD), "{").unwrap();
        assert_eq!(Record::read(dir.path()).unwrap_err().kind(), Kind::Refused);
    }

    #[test]
    fn a_record_without_the_fields_that_came_later_still_parses() {
        let dir = tempfile::tempdir().unwrap();
        let boot = boot_id();
        let first = format!(
            r#"{{"format":1,"boot":"{boot}","index":3,"path":"guarded","read_only":false,
            "reconnect_timeout_ms":5000,"sockets":1,"reconnects":2,"failed":null}}"#
        );
        std::fs::write(dir.path().join(RECORD), first).unwrap();
        let record = Record::read(dir.path()).unwrap().unwrap();
        assert_eq!((record.index, record.reconnects, record.dead_connections), (Some(3), 2, 0));
        assert_eq!((record.pid, record.others), (None, vec![]));
    }

    #[test]
    fn a_device_is_ours_by_index_process_and_identifier_and_not_by_its_name_alone() {
        let device = |index, pid, backend: Option<&str>| NbdDevice {
            index,
            size: crate::values::ByteSize(1 << 20),
            read_only: false,
            connected: true,
            pid: Some(pid),
            backend: backend.map(str::to_owned),
        };
        let ours = Some("zerofs:vol1");
        let known = Record { pid: Some(7), ..record() };
        assert!(known.fits(&device(3, 7, ours), "zerofs:vol1"));
        assert!(known.fits(&device(3, 7, None), "zerofs:vol1"), "an older kernel");
        assert!(!known.fits(&device(3, 7, Some("zerofs:vol2")), "zerofs:vol1"));
        assert!(!known.fits(&device(3, 8, ours), "zerofs:vol1"), "connected by another keeper");
        assert!(!known.fits(&NbdDevice { connected: false, ..device(3, 7, ours) }, "zerofs:vol1"));

        let killed = Record { index: None, pid: Some(7), ..record() };
        let found = |record: &Record, devices: &[NbdDevice]| {
            record.among(devices.to_vec(), "zerofs:vol1").map(|d| d.map(|d| d.index))
        };
        let all = [device(1, 9, ours), device(2, 8, ours), device(4, 7, ours), device(5, 7, ours)];
        assert_eq!(found(&killed, &all).unwrap(), Some(5), "4 was there before");
        assert_eq!(found(&killed, &all[..3]).unwrap(), None);
        let nobody_knows = Record { pid: None, ..killed };
        assert_eq!(found(&nobody_knows, &all).unwrap_err().kind(), Kind::Refused);
        assert_eq!(found(&nobody_knows, &all[2..]).unwrap(), Some(5));
    }

    #[test]
    fn the_kernel_is_offered_what_the_server_has_and_the_guard_adds() {
        let bare = TransmissionFlags::new(1);
        assert_eq!(server_flags(bare, NbdPath::Direct, false), 1);
        assert_eq!(server_flags(bare, NbdPath::Guarded, false), 1 | 4 | 8 | 256);
        let all = TransmissionFlags::new(1 | 4 | 8 | 32 | 64 | 256);
        assert_eq!(server_flags(all, NbdPath::Direct, true), 1 | 2 | 4 | 8 | 32 | 64 | 256);
        assert_eq!(server_flags(all, NbdPath::Guarded, false), 1 | 4 | 8 | 32 | 64 | 256);
    }
}
