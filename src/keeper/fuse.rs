//! The FUSE front end: one file, `disk`, that is the device. A loop device with direct I/O makes a block
//! device of it.
//!
//! We mount ourselves (as root, no helper program) and answer from whatever thread has the answer. Every open is
//! direct I/O: no page cache, parallel writes, so that the loop device's requests come to us as they are.
//! A write that was answered may be lost in a power cut until FSYNC, which the loop device sends for a flush or
//! force unit access; it sends FALLOCATE for a discard.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use nix::mount::{MntFlags, MsFlags, umount2};

use super::guard::Op;
use super::path::{Completion, Shared};
use crate::error::{Doing, Error, Kind, Result};

/// The name of the file.
pub const FILE: &str = "disk";
/// The filesystem's name in the mount table.
pub const FS_NAME: &str = "fuse.zerofsctl";

const DISK: u64 = 2;
const MAX_TRANSFER: u32 = 1 << 20;
/// Requests that the kernel gives us at once in the background; the loop device has 128.
const BACKGROUND: u16 = 128;
/// Readers of /dev/fuse. Each does little, and more than the processors only add switches.
const THREADS: usize = 2;

/// How long a session may take to end after its unmount; it takes a millisecond.
const LINGER: Duration = Duration::from_secs(1);

/// A mounted file.
pub(super) struct Mount {
    dir: PathBuf,
    session: JoinHandle<io::Result<()>>,
}

/// Mounts on `dir` and serves it from threads.
pub(super) fn mount(path: Arc<Shared>, dir: &Path) -> Result<Mount> {
    let device = "/dev/fuse";
    let fuse: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(device)
        .doing("open", device)
        .map_err(|e| e.hint("load the module with modprobe fuse"))?
        .into();
    // SAFETY: no arguments, no failure.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    let options = format!(
        "fd={},rootmode=40000,user_id={uid},group_id={gid},max_read={MAX_TRANSFER}",
        fuse.as_raw_fd()
    );
    nix::mount::mount(
        Some("zerofsctl"),
        dir,
        Some(FS_NAME),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME,
        Some(options.as_str()),
    )
    .doing("mount the FUSE file on", dir)?;
    let served = (|| {
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        let disk = Disk { path, made: SystemTime::now(), uid, gid };
        // The kernel lets only the mounting user in, so this need not be checked again here.
        let session = Session::from_fd(disk, fuse, SessionACL::All, config)?;
        std::thread::Builder::new().name("fuse".into()).stack_size(128 << 10).spawn(move || session.run())
    })();
    match served {
        Ok(session) => Ok(Mount { dir: dir.to_owned(), session }),
        Err(e) => {
            let _ = umount2(dir, MntFlags::MNT_DETACH);
            Err(e).doing("serve the FUSE file on", dir)
        }
    }
}

impl Mount {
    /// Unmounts and waits for the threads. On failure the mount comes back.
    pub(super) fn unmount(self) -> Result<(), (Mount, Error)> {
        match umount2(&self.dir, MntFlags::UMOUNT_NOFOLLOW) {
            // EINVAL: somebody has unmounted it before us.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(nix::Error::EBUSY) => {
                let e = Error::new(Kind::Busy, format!("{} is in use", self.dir.join(FILE).display()))
                    .hint("detach the loop device first: losetup -j FILE, losetup -d DEVICE");
                return Err((self, e));
            }
            Err(e) => {
                let e = Err::<(), _>(e).doing("unmount", &self.dir).expect_err("it is one");
                return Err((self, e));
            }
        }
        // Nobody has the file open any more. A copy of the mount in another mount namespace, as any container that starts
        // may get one, still keeps the session: it is left to that, and ends with this process at the latest.
        let until = Instant::now() + LINGER;
        while !self.session.is_finished() {
            if Instant::now() >= until {
                tracing::warn!(
                    "{} is unmounted, but another mount namespace has a copy of it",
                    self.dir.display()
                );
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Ok(Err(e)) = self.session.join() {
            tracing::warn!("the FUSE session on {} ended with: {e}", self.dir.display());
        }
        Ok(())
    }

    /// Takes the mount out of sight; its threads end when the last user of the file is gone.
    pub(super) fn abandon(self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

struct Disk {
    path: Arc<Shared>,
    made: SystemTime,
    uid: u32,
    gid: u32,
}

impl Disk {
    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, nlink, size) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o700, 2, 0),
            INodeNo(DISK) => (FileType::RegularFile, 0o600, 1, self.path.size()),
            _ => return None,
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind,
            perm,
            nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

/// The size may change, so attributes are not cached.
const TTL: Duration = Duration::ZERO;

fn empty(reply: ReplyEmpty) -> Completion {
    Completion::new(move |result| match result {
        Ok(_) => reply.ok(),
        Err(errno) => reply.error(Errno::from_i32(errno)),
    })
}

impl Filesystem for Disk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What an old kernel cannot do, it does without.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_write(MAX_TRANSFER);
        let _ = config.set_max_readahead(MAX_TRANSFER);
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_congestion_threshold(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(INodeNo(DISK)) {
            Some(attr) if parent == INodeNo::ROOT && name == FILE => {
                reply.entry(&TTL, &attr, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match ino {
            INodeNo(DISK) => reply.opened(
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO
                    | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
                    | FopenFlags::FOPEN_NOFLUSH,
            ),
            _ => reply.error(Errno::EISDIR),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if ino != INodeNo(DISK) {
            return reply.error(Errno::EISDIR);
        }
        let len = self.path.size().saturating_sub(offset).min(size.into()) as u32;
        self.path.submit(
            Op::Read { offset, len },
            Completion::new(move |result| match result {
                Ok(data) => reply.data(data),
                Err(errno) => reply.error(Errno::from_i32(errno)),
            }),
        );
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if ino != INodeNo(DISK) {
            return reply.error(Errno::EISDIR);
        }
        let len = data.len() as u32;
        self.path.submit(
            Op::Write { offset, data, fua: false },
            Completion::new(move |result| match result {
                Ok(_) => reply.written(len),
                Err(errno) => reply.error(Errno::from_i32(errno)),
            }),
        );
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.path.submit(Op::Flush, empty(reply));
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if ino != INodeNo(DISK) {
            return reply.error(Errno::EISDIR);
        }
        let end = self.path.size();
        let len = end.saturating_sub(offset).min(length);
        let op = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => Op::Trim { offset, len },
            libc::FALLOC_FL_ZERO_RANGE => Op::Zero { offset, len, fua: false },
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        self.path.submit(op, empty(reply));
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let all = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (INodeNo(DISK), FileType::RegularFile, FILE),
        ];
        for (i, (ino, kind, name)) in all.into_iter().enumerate().skip(offset as usize) {
            if reply.add(ino, i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(self.path.size() / 512, 0, 0, 1, 0, 512, 255, 512);
    }
}
