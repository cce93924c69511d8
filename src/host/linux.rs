//! The real host, for one volume: catalog, keeper, loop device, filesystem tools, mounts.

mod stop;
mod unmount;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::MntFlags;
use zeroize::Zeroizing;

use super::programs::Program;
use super::{
    ClaimRequest, Claimed, ConnectRequest, Content, DeviceView, Host, KeeperOptions, KeeperView, Life,
    MountEntry, Observe, Signature, StopOptions, TargetView, Tenure, Transport, User, access, bind,
    companion, device, loopdev, mounts, old_logs, signature, users, utab,
};
use crate::atomic_file::{FolderLock, replace};
use crate::background::Background;
use crate::catalog::{
    Catalog, ClaimOptions, ClaimedAs, DataPrefix, Family, Owner, Relation, Release, StorageUrl, Tag,
    VolumeRecord, Written,
};
use crate::error::{Doing, Error, Kind, Result};
use crate::file_lock::is_dying;
use crate::host::{CheckResult, Device};
use crate::journal::{private_folder, volume_folder};
use crate::keeper::client::KeeperClient;
use crate::keeper::control::{self, State, Status};
use crate::keeper::device::{RECORD, Record};
use crate::keeper::log;
use crate::keeper::path::LogState;
use crate::keeper::process::boot_id;
use crate::keeper::{self, KeeperConfig, OWN_EXE, taken};
use crate::password::{PasswordCheck, Secret};
use crate::settings::{self, S3Settings, Settings, Sources};
use crate::values::{ByteSize, FsType, Slice, TargetPath, VolumeId};
use crate::zerofs::config::{self, ConfigInput};
use crate::zerofs::ninep;
use crate::zerofs::versions::{Format, Profile, Version, compatible};

/// The NBD export of every volume, as existing installations have it.
pub const EXPORT: &str = "disk";

/// The default size of a new volume.
const DEFAULT_SIZE: ByteSize = ByteSize(ByteSize::GIB);

/// How long the quick programs may take.
const QUICK: Duration = Duration::from_secs(120);

/// How long ZeroFS may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How long a killed keeper may take to be gone.
const DYING: Duration = Duration::from_secs(20);

/// The two roots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// Configs, caches, logs, the embedded store: `/var/lib/zerofsctl`.
    pub state: PathBuf,
    /// Journals, locks, sockets: `/run/zerofsctl`.
    pub run: PathBuf,
}

impl Dirs {
    /// The volume's folder below the state root: config, access, cache.
    pub fn volume_state(&self, volume: &VolumeId) -> PathBuf {
        self.state.join("volumes").join(volume.as_str())
    }

    /// The volume's folder below the run root: journal, sockets, replay log, FUSE mount.
    pub fn volume_run(&self, volume: &VolumeId) -> PathBuf {
        volume_folder(&self.run, volume)
    }

    /// The volume's logs, which stay after a detach.
    pub fn volume_logs(&self, volume: &VolumeId) -> PathBuf {
        self.state.join("logs").join(volume.as_str())
    }

    /// The store that volumes live in when no storage URL is given.
    pub fn embedded_store(&self) -> Result<StorageUrl> {
        StorageUrl::from_dir(&self.state.join("store"))
    }

    /// The FUSE mount of a volume, and the file in it.
    pub fn fuse(&self, volume: &VolumeId) -> (PathBuf, PathBuf) {
        let folder = self.volume_run(volume).join("fuse");
        let file = folder.join("disk");
        (folder, file)
    }

    fn config(&self, volume: &VolumeId) -> PathBuf {
        self.volume_state(volume).join("config.toml")
    }
}

/// Where a volume's data is and how to reach it.
#[derive(Debug, Clone)]
pub struct Storage {
    /// The store.
    pub url: StorageUrl,
    /// Access to it.
    pub s3: S3Settings,
}

/// Told how a long operation proceeds: what, done, of how much.
pub type Progress = Box<dyn Fn(&str, u64, Option<u64>)>;

/// See the module.
pub struct LinuxHost {
    dirs: Dirs,
    storage: Storage,
    settings: Settings,
    password: Option<Secret>,
    zerofs: PathBuf,
    program: PathBuf,
    owner: Owner,
    catalog: Box<dyn Catalog>,
    /// The record as we last read or wrote it.
    known: RefCell<Option<(VolumeRecord, Tag)>>,
    version: RefCell<Asked>,
    /// Whether the password was checked against the record.
    checked: RefCell<bool>,
    progress: Progress,
    /// What this command was told of how to stop; none of its own for one that only goes on with what others began.
    stop: Option<StopOptions>,
    /// The device was failed by force.
    failed: RefCell<bool>,
    /// Starts the next keeper of the volume that we are at work on.
    companion: RefCell<Option<Background>>,
}

/// The version of the zerofs program, which takes a run of that program to learn.
enum Asked {
    NotYet,
    OnItsWay(std::thread::JoinHandle<Result<Version>>),
    Answered(Version),
}

impl Asked {
    fn ask(zerofs: &Path) -> Asked {
        let zerofs = zerofs.to_owned();
        let asking = std::thread::Builder::new().name("zerofs-version".into()).stack_size(128 * 1024);
        asking.spawn(move || version_of(&zerofs)).map_or(Asked::NotYet, Asked::OnItsWay)
    }
}

/// What a [`LinuxHost`] is made of.
pub struct Parts {
    /// The roots.
    pub dirs: Dirs,
    /// Where the volume's data is.
    pub storage: Storage,
    /// The operator's settings.
    pub settings: Settings,
    /// The encryption password, if it is known; starting a volume needs it.
    pub password: Option<Secret>,
    /// The zerofs program, or an error when a start needs it.
    pub zerofs: PathBuf,
    /// The zerofsctl program, for the keeper: `/proc/self/exe` but in tests.
    pub program: PathBuf,
    /// The name of this node.
    pub node: String,
    /// Only looks: a state folder that is not there is not made.
    pub only_looks: bool,
    /// For long operations.
    pub progress: Progress,
}

impl LinuxHost {
    /// Puts the parts together. Nothing is looked at yet but this machine's identity.
    pub fn new(parts: Parts) -> Result<LinuxHost> {
        let Parts { dirs, storage, settings, password, zerofs, program, node, only_looks, progress } = parts;
        // Who starts something needs the answer, and there is enough to do until it comes.
        let version = if only_looks { Asked::NotYet } else { Asked::ask(&zerofs) };
        let owner = owner(&dirs, node, only_looks)?;
        let catalog: Box<dyn Catalog> = if only_looks {
            // What is attached is mostly looked at without asking the store.
            Box::new(crate::catalog::LazyCatalog::new(storage.url.clone(), storage.s3.clone()))
        } else {
            crate::catalog::open(&storage.url, &storage.s3)?
        };
        Ok(LinuxHost {
            dirs,
            storage,
            settings,
            password,
            zerofs,
            program,
            owner,
            catalog,
            known: RefCell::new(None),
            version: RefCell::new(version),
            checked: RefCell::new(false),
            progress,
            stop: None,
            failed: RefCell::new(false),
            companion: RefCell::new(None),
        })
    }

    /// The host of a volume that is attached here, with nothing but what its attach left: neither settings nor password.
    pub fn saved(dirs: &Dirs, node: &str, volume: &VolumeId) -> Result<LinuxHost> {
        let none = Sources { config: None, secrets: &[], storage_url: None, env: &|_| None };
        let storage = match LinuxHost::saved_storage(dirs, volume)? {
            Some(storage) => storage,
            None => Storage { url: dirs.embedded_store()?, s3: S3Settings::default() },
        };
        LinuxHost::new(Parts {
            dirs: dirs.clone(),
            storage,
            settings: settings::load(&none)?.0,
            password: None,
            // Named by keeper.json.
            zerofs: "zerofs".into(),
            program: OWN_EXE.into(),
            node: node.to_owned(),
            only_looks: true,
            progress: Box::new(|_, _, _| {}),
        })
    }

    /// How a volume that we hold was reached when it was attached; none when we hold no such volume.
    pub fn saved_storage(dirs: &Dirs, volume: &VolumeId) -> Result<Option<Storage>> {
        Ok(access::load(&dirs.volume_state(volume))?.map(|(url, s3)| Storage { url, s3 }))
    }

    /// The store's records.
    pub fn catalog(&self) -> &dyn Catalog {
        &*self.catalog
    }

    /// The version of the zerofs program, asked once.
    pub fn zerofs_version(&self) -> Result<Version> {
        let version = match self.version.replace(Asked::NotYet) {
            Asked::Answered(version) => version,
            Asked::NotYet => version_of(&self.zerofs)?,
            Asked::OnItsWay(thread) => {
                thread.join().unwrap_or_else(|_| Err(Error::failed("the thread that asked zerofs died")))?
            }
        };
        self.version.replace(Asked::Answered(version));
        Ok(version)
    }

    /// Starts the companion, unless there is one.
    fn accompany(&self, volume: &VolumeId) -> Result<()> {
        let mut at_work = self.companion.borrow_mut();
        if at_work.is_none() {
            *at_work = Some(companion::start(&self.dirs, &self.owner.node, volume)?);
        }
        Ok(())
    }

    fn client(&self, volume: &VolumeId) -> Result<KeeperClient> {
        KeeperClient::connect(&self.dirs.volume_run(volume))
    }

    /// The status of the keeper; none when there is no keeper.
    pub fn status(&self, volume: &VolumeId) -> Result<Option<Status>> {
        let begun = Instant::now();
        loop {
            match self.client(volume) {
                Ok(mut client) => match client.status() {
                    // One that was killed is not gone before the last of its threads is; until then its socket
                    // still takes connections.
                    Err(e) if e.kind() == Kind::NotFound && begun.elapsed() < DYING => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    other => break other.map(Some),
                },
                Err(e) if e.kind() == Kind::NotFound => break Ok(None),
                Err(e) => break Err(e),
            }
        }
    }

    fn fetch(&self, volume: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>> {
        let found = self.catalog.get(volume)?;
        self.known.borrow_mut().clone_from(&found);
        Ok(found)
    }

    fn known_or_fetch(&self, volume: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>> {
        let known = self.known.borrow().clone();
        match known {
            Some((record, tag)) if record.id == *volume => Ok(Some((record, tag))),
            _ => self.fetch(volume),
        }
    }

    /// Changes the record of a volume that is ours.
    fn change_record(
        &self,
        volume: &VolumeId,
        change: impl Fn(&VolumeRecord) -> Result<VolumeRecord>,
    ) -> Result<()> {
        for attempt in 0..8 {
            let current = if attempt == 0 { self.known_or_fetch(volume)? } else { self.fetch(volume)? };
            let (record, tag) = current.ok_or_else(|| {
                Error::refused("its catalog record has disappeared")
                    .hint("nothing was changed; look for another tool that deletes from the bucket")
            })?;
            if !record.owner.as_ref().is_some_and(|o| o.relation(&self.owner) == Relation::Us) {
                return Err(Error::refused("the volume is no longer ours in the catalog")
                    .hint(format!("take it down here: zerofsctl detach {volume}")));
            }
            let wanted = change(&record)?;
            if wanted == record {
                return Ok(());
            }
            if let Written::Done(tag) = self.catalog.update(&wanted, &tag)? {
                *self.known.borrow_mut() = Some((wanted, tag));
                return Ok(());
            }
        }
        Err(Error::new(Kind::Busy, "its catalog record keeps changing under us").hint("try again"))
    }

    fn claimed(&self, record: &VolumeRecord, how: ClaimedAs) -> Claimed {
        let mut notes = Vec::new();
        if record.adopted && record.content == Content::Unknown {
            notes.push("made by an older driver and adopted: it is never formatted".to_owned());
        }
        match how {
            ClaimedAs::BeforeReboot => {
                notes.push("it was attached here before a reboot; what was not flushed then is gone".into());
            }
            ClaimedAs::TakenOver => {
                notes.push("taken over from another node, whose server is fenced off now".into())
            }
            ClaimedAs::Abandoned => {
                notes.push("taken from another state folder on this node that no longer runs it".into())
            }
            ClaimedAs::Free | ClaimedAs::Already => {}
        }
        // A record of an adopted volume starts without a size.
        let capacity = Some(record.capacity).filter(|c| c.bytes() > 0);
        Claimed { epoch: record.epoch, capacity, fs: record.filesystem, content: record.content, notes }
    }

    /// Refuses a wrong password before ZeroFS is started with it: trying it there fences a running server.
    fn check_password(&self, record: &VolumeRecord) -> Result<()> {
        let (Some(check), Some(password)) = (&record.password_check, &self.password) else { return Ok(()) };
        if !*self.checked.borrow() {
            check.require(password)?;
            *self.checked.borrow_mut() = true;
        }
        Ok(())
    }

    fn check_version(&self, record: &VolumeRecord) -> Result<()> {
        match record.zerofs_version.as_deref().map(str::parse::<Version>) {
            Some(Ok(written_by)) => compatible(written_by, self.zerofs_version()?),
            Some(Err(_)) => {
                Err(Error::refused("its catalog record names a ZeroFS version that we cannot read")
                    .hint("attach it with the version of zerofsctl that wrote it"))
            }
            None => Ok(()),
        }
    }

    /// Claims, once there is what it takes to release; `asked` tells whether the claim may have been taken.
    fn take_claim_saved(
        &self,
        volume: &VolumeId,
        request: &ClaimRequest,
        asked: &mut bool,
    ) -> Result<Claimed> {
        for _ in 0..8 {
            let Some((mut record, tag)) = self.fetch(volume)? else {
                // Made as ours at once: there is no moment at which it is there and nobody's.
                let first = self.first_record(volume, request)?;
                let claim = first.claim(&self.owner, &self.claim_options(&first, request)?)?;
                *asked = true;
                if let Written::Done(tag) = self.catalog.create(&claim.record)? {
                    let claimed = self.claimed(&claim.record, claim.how);
                    *self.known.borrow_mut() = Some((claim.record, tag));
                    return Ok(claimed);
                }
                *asked = false;
                continue;
            };
            self.check_version(&record)?;
            self.check_password(&record)?;
            // Made without a password at hand, as by a controller: the first start decides which one it has.
            if let (Content::Never, None, 0, Some(password)) =
                (record.content, &record.password_check, record.epoch, &self.password)
            {
                record.password_check = Some(PasswordCheck::new(password)?);
                *self.checked.borrow_mut() = true;
            }
            if record.content == Content::Never {
                // Nothing was ever written to it, so its size and filesystem are whatever is asked for last.
                record.capacity = request.size.unwrap_or(record.capacity);
                record.filesystem = request.fs.or(record.filesystem).filter(|_| !request.block);
            }
            let ask = self.claim_options(&record, request)?;
            let claim = record.claim(&self.owner, &ask)?;
            if self.known.borrow().as_ref().is_some_and(|(known, _)| *known == claim.record) {
                return Ok(self.claimed(&claim.record, claim.how));
            }
            *asked = true;
            if let Written::Done(tag) = self.catalog.update(&claim.record, &tag)? {
                let claimed = self.claimed(&claim.record, claim.how);
                *self.known.borrow_mut() = Some((claim.record, tag));
                return Ok(claimed);
            }
            // Somebody else was first: this one was certainly not taken.
            *asked = false;
        }
        Err(Error::new(Kind::Busy, "its catalog record keeps changing under us").hint("try again"))
    }

    /// A record for a volume that has none: new, or made by an older driver.
    fn first_record(&self, volume: &VolumeId, request: &ClaimRequest) -> Result<VolumeRecord> {
        let profile = Profile::of(self.zerofs_version()?)?;
        let now = jiff::Timestamp::now();
        let mut record = match self.catalog.data_prefix(volume)? {
            DataPrefix::Empty if request.must_exist => {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("there is no such volume in {}", self.storage.url),
                )
                .hint(format!(
                    "see what there is: zerofsctl list --storage-url {}; or say where it is: --config or --storage-url",
                    self.storage.url
                )));
            }
            DataPrefix::Empty | DataPrefix::ZeroFs(Family::Unstarted) => {
                let fs = if request.block { None } else { Some(request.fs.unwrap_or(FsType::Ext4)) };
                VolumeRecord::new(volume.clone(), request.size.unwrap_or(DEFAULT_SIZE), fs, now)
            }
            DataPrefix::ZeroFs(family) => {
                let ours = if profile.format == Format::Unknown { None } else { Some(family_of(&profile)) };
                if ours.is_some_and(|f| f != family) {
                    return Err(Error::refused(format!(
                        "ZeroFS {} cannot open it: another family of ZeroFS versions wrote it",
                        profile.version
                    ))
                    .hint("use the ZeroFS version that wrote it: --zerofs-bin PATH; see: zerofsctl zerofs versions"));
                }
                VolumeRecord::adopted(volume.clone(), ByteSize(0), now)
            }
            DataPrefix::Foreign(name) => {
                return Err(Error::refused(format!(
                    "under {} there is something that is not a ZeroFS volume: {name}",
                    self.storage.url.volume_url(volume)
                ))
                .hint("choose another volume name, or another storage URL"));
            }
        };
        // An adopted volume's password is proven by its first start, not before.
        if let (false, Some(password)) = (record.adopted, &self.password) {
            record.password_check = Some(PasswordCheck::new(password)?);
            *self.checked.borrow_mut() = true;
        }
        Ok(record)
    }

    fn claim_options(&self, record: &VolumeRecord, request: &ClaimRequest) -> Result<ClaimOptions> {
        let mut ask = ClaimOptions {
            take_over: request.take_over,
            zerofs_version: Some(self.zerofs_version()?.to_string()),
            ..ClaimOptions::default()
        };
        if record.content != Content::Never && record.capacity.bytes() > 0 {
            ask.capacity = request.size;
        }
        ask.filesystem = request.fs;
        if let Some(owner) = &record.owner
            && owner.relation(&self.owner) == Relation::OtherRoot
        {
            let theirs = volume_folder(&owner.run_dir, &record.id);
            ask.other_alive = match KeeperClient::connect(&theirs).and_then(|mut c| c.ping()) {
                Ok(_) => true,
                Err(e) if e.kind() == Kind::NotFound => !keeper::find_zerofs(&theirs).is_empty(),
                // A keeper that does not answer is no proof that it is gone.
                Err(_) => true,
            };
            ask.other_log_left = theirs.join(log::FILE_NAME).exists();
        }
        Ok(ask)
    }

    /// The settings, with the volume's own over them as its record last said.
    fn tuned(&self, volume: &VolumeId) -> Result<Settings> {
        match &*self.known.borrow() {
            Some((record, _)) if record.id == *volume => self.settings.tuned(&record.tuning),
            _ => Ok(self.settings.clone()),
        }
    }

    fn render(&self, volume: &VolumeId, capacity: Option<ByteSize>) -> Result<Zeroizing<String>> {
        let profile = Profile::of(self.zerofs_version()?)?;
        let password = self.password.as_ref().ok_or_else(|| {
            Error::usage("no encryption password was given").hint(
                "set ZEROFS_ENCRYPTION_PASSWORD_FILE to a file that holds it, or name its Secret with --config and --secret",
            )
        })?;
        let s = &self.tuned(volume)?;
        let own_cache = self.dirs.volume_state(volume).join("cache");
        let cache_dir = s.cache.dir.as_ref().map_or(own_cache, |dir| dir.join(format!("zerofs-{volume}")));
        let secret = |s: &Secret| Zeroizing::new(s.expose().to_owned());
        let credentials = self.storage.s3.credentials.as_ref();
        let input = ConfigInput {
            storage_url: self.storage.url.volume_url(volume),
            password: secret(password),
            cache_dir,
            cache_disk_gb: s.cache.disk_gb.unwrap_or(1.0),
            cache_memory_gb: s.cache.memory_gb.or(Some(1.0)),
            device_size: capacity.unwrap_or(DEFAULT_SIZE).bytes(),
            max_size_gb: s.filesystem_max_size_gb,
            lsm: config::Lsm {
                l0_max_ssts: s.lsm.l0_max_ssts,
                max_unflushed_gb: s.lsm.max_unflushed_gb,
                max_concurrent_compactions: s.lsm.max_concurrent_compactions,
                flush_interval_secs: s.lsm.flush_interval_secs,
            },
            aws: if self.storage.url.is_s3() {
                config::Aws {
                    endpoint: self.storage.s3.endpoint.clone(),
                    region: self.storage.s3.region.clone(),
                    allow_http: self.storage.s3.allow_http,
                    access_key_id: credentials.map(|c| c.access_key_id.expose().to_owned()),
                    secret_access_key: credentials.map(|c| secret(&c.secret_access_key)),
                    session_token: credentials.and_then(|c| c.session_token.as_ref()).map(secret),
                }
            } else {
                config::Aws::default()
            },
            read_only: false,
        };
        config::render(&input, &profile)
    }

    fn keeper_config(&self, volume: &VolumeId, epoch: u64, options: &KeeperOptions) -> Result<KeeperConfig> {
        let settings = self.tuned(volume)?;
        let resources = &settings.resources;
        let limits = super::cgroup::Limits {
            cpu_millis: resources.cpu_limit.as_ref().map(|q| u32::try_from(q.millis()).unwrap_or(u32::MAX)),
            memory_bytes: resources.memory_limit.as_ref().map(|q| q.units()),
        };
        Ok(KeeperConfig {
            format: KeeperConfig::FORMAT,
            volume: volume.clone(),
            run_dir: self.dirs.volume_run(volume),
            log_dir: self.dirs.volume_logs(volume),
            zerofs_bin: self.zerofs.clone(),
            zerofs_version: self.zerofs_version()?,
            config_path: self.dirs.config(volume),
            rust_log: settings.rust_log.clone(),
            export: EXPORT.into(),
            connections: options.connections,
            log_bytes: options.log_size.bytes(),
            io_timeout_ms: options.io_timeout.map(|t| t.as_millis() as u64),
            epoch,
            limits,
            limits_required: false,
            boot_id: boot_id(),
            start_limit_seconds: START_LIMIT.as_secs(),
            stop_grace_seconds: 120,
            replay_log: std::env::var_os("ZEROFSCTL_TEST_NO_REPLAY_LOG").is_none() || !cfg!(debug_assertions),
        })
    }

    /// For how long cached data may take to be written out before an unmount, and a stop to flush; two minutes unless
    /// told. With force the device is failed after that, and ZeroFS killed.
    pub fn stopping(mut self, how: StopOptions) -> LinuxHost {
        self.stop = Some(how);
        self
    }

    fn patience(&self) -> Duration {
        self.stop.unwrap_or_default().timeout
    }

    fn force(&self) -> bool {
        self.stop.is_some_and(|s| s.force)
    }

    fn nbd_device(&self, volume: &VolumeId) -> Result<Device> {
        device::nbd_device(&self.dirs.volume_run(volume), volume)?.ok_or_else(|| {
            Error::failed("the keeper connected an NBD device, but the kernel does not show it as ours")
                .hint("see what the kernel says: dmesg | tail")
        })
    }

    /// Takes loop device and FUSE mount away, if they are there.
    fn disconnect_fuse(&self, volume: &VolumeId, dead: bool) -> Result<()> {
        let (folder, file) = self.dirs.fuse(volume);
        // What an earlier keeper served is as dead as that keeper, even if another one runs by now.
        let status = if dead { None } else { self.status(volume)? };
        let mut dead = !status.is_some_and(|s| s.fuse_mounted);
        let device = loopdev::find(&file)?;
        // Early, while nothing is taken away yet. The stop flushes again, and decides what a failure means; here it can
        // only be that of a server that is away for too long.
        let limit = self.stop.map_or(stop::REPLAY_LIMIT, |stop| stop.timeout);
        if !dead && let Err(e) = self.client(volume)?.within(limit).flush() {
            tracing::warn!(%volume, "{e}");
            if let (true, Some(device)) = (self.force(), &device) {
                self.fail_device(device.path.to_str())?;
                dead = true;
            }
        }
        if let Some(device) = device {
            loopdev::detach(&device.path, &file, dead)?;
        }
        if mounts::at(&mounts::table("self")?, &folder).is_some() {
            if dead {
                nix::mount::umount2(&folder, MntFlags::MNT_DETACH).doing("unmount", &folder)?;
            } else {
                // The kernel lets go of the file a moment after the loop device is gone.
                let begun = Instant::now();
                loop {
                    match self.client(volume)?.within(Duration::from_secs(60)).unmount() {
                        Err(e) if e.kind() == Kind::Busy && begun.elapsed() < Duration::from_secs(5) => {
                            std::thread::sleep(Duration::from_millis(5));
                        }
                        other => break other?,
                    }
                }
            }
        }
        remove(std::fs::remove_dir(&folder), &folder)
    }

    /// Starts the keeper, which starts ZeroFS, and waits until both answer.
    fn serve(&self, volume: &VolumeId, epoch: u64, options: &KeeperOptions, limit: Duration) -> Result<()> {
        let config = self.keeper_config(volume, epoch, options)?;
        keeper::spawn(&self.program, &config, Duration::from_secs(20))?;
        self.client(volume)?.wait_ready(limit).map(drop)
    }

    /// Asks ZeroFS; where it has just died and its keeper starts it again, waits for that and asks once more. Only
    /// for what may be done twice.
    fn served<T>(&self, volume: &VolumeId, ask: impl Fn() -> Result<T>) -> Result<T> {
        for _ in 0..3 {
            let error = match ask() {
                Err(e) if e.kind() == Kind::Unreachable => e,
                other => return other,
            };
            let Ok(mut client) = self.client(volume) else { return Err(error) };
            // The keeper needs a moment to notice the death, too.
            std::thread::sleep(Duration::from_millis(20));
            client.wait_ready(START_LIMIT)?;
        }
        ask()
    }

    /// What a keeper makes in the run folder, by name; not the log, which may hold what nobody else has.
    fn keeper_names() -> Vec<String> {
        const WRITTEN: [&str; 4] = [RECORD, keeper::CONFIG, keeper::PID_FILE, "zerofs.pid"];
        const OTHERS: [&str; 6] = [
            "keeper.lock",
            control::SOCKET,
            taken::FILE_NAME,
            config::NINEP_SOCKET,
            config::NBD_SOCKET,
            config::RPC_SOCKET,
        ];
        // A writer that was killed has left what it had not put in its place.
        let beside = WRITTEN.iter().map(|name| keeper::process::beside(Path::new(name)));
        WRITTEN.iter().chain(&OTHERS).map(|name| (*name).to_owned()).chain(beside).collect()
    }

    /// The log, and what is noted of it, which goes first: without a log it says nothing.
    fn log_names() -> Vec<String> {
        vec![keeper::process::beside(Path::new(stop::HELD)), stop::HELD.to_owned(), log::FILE_NAME.to_owned()]
    }

    /// Removes what a stopped keeper leaves in the run folder; each by its name, nothing else.
    fn clean_run_folder(&self, volume: &VolumeId) -> Result<()> {
        let folder = self.dirs.volume_run(volume);
        let (fuse, _) = self.dirs.fuse(volume);
        remove(std::fs::remove_dir(&fuse), &fuse)?;
        // Nobody else has what the log holds, or may hold.
        let goes = matches!(self.peek_log(volume)?, log::Peeked::Nothing | log::Peeked::Void { .. });
        let log = if goes { Self::log_names() } else { vec![] };
        for name in Self::keeper_names().into_iter().chain(log) {
            let path = folder.join(name);
            remove(std::fs::remove_file(&path), &path)?;
        }
        Ok(())
    }
}

/// Absent is as good as removed.
fn remove(result: std::io::Result<()>, path: &Path) -> Result<()> {
    match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).doing("remove", path),
        _ => Ok(()),
    }
}

fn family_of(profile: &Profile) -> Family {
    if profile.version < (Version { major: 2, minor: 0, patch: 0 }) { Family::Old } else { Family::New }
}

/// Asks the zerofs program for its version.
pub fn version_of(program: &Path) -> Result<Version> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|e| {
            Error::environment(format!("cannot run {}: {e}", program.display()))
                .hint("install ZeroFS, or say where it is with --zerofs-bin or ZEROFS_BIN")
        })?;
    String::from_utf8_lossy(&output.stdout).trim().parse().map_err(|_| {
        Error::environment(format!("{} --version does not tell a ZeroFS version", program.display()))
            .hint("say where the zerofs program is with --zerofs-bin or ZEROFS_BIN")
    })
}

/// Who we are in the catalog: one state root on one machine.
fn owner(dirs: &Dirs, node: String, only_looks: bool) -> Result<Owner> {
    let path = dirs.state.join("instance");
    let instance = match std::fs::read_to_string(&path) {
        Ok(text) if text.trim().len() == 32 => text.trim().to_owned(),
        Ok(_) => {
            return Err(Error::refused(format!("{} is damaged", path.display()))
                .hint("without it we cannot tell our volumes from others': restore it from a backup"));
        }
        // Nothing can be ours yet: an id that nobody has says so.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && only_looks => new_instance(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => make_instance(dirs, &path)?,
        Err(e) => return Err(e).doing("read", &path),
    };
    let read = |path: &str| std::fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default();
    Ok(Owner {
        node,
        machine_id: read("/etc/machine-id"),
        boot_id: boot_id(),
        instance,
        state_dir: dirs.state.clone(),
        run_dir: dirs.run.clone(),
        since: jiff::Timestamp::now(),
    })
}

fn new_instance() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn make_instance(dirs: &Dirs, path: &Path) -> Result<String> {
    private_folder(&dirs.state)?;
    let id = new_instance();
    let _lock = FolderLock::take(&dirs.state, Duration::from_secs(10)).doing("lock", &dirs.state)?;
    match std::fs::read_to_string(path) {
        // Another command was quicker: its id is the one.
        Ok(text) => Ok(text.trim().to_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            replace(path, &path.with_extension("new"), id.as_bytes()).doing("write", path)?;
            Ok(id)
        }
        Err(e) => Err(e).doing("read", path),
    }
}

impl Observe for LinuxHost {
    fn claim(&self, volume: &VolumeId) -> Result<Option<Claimed>> {
        let Some((record, _)) = self.fetch(volume)? else { return Ok(None) };
        match &record.owner {
            Some(owner) if owner.relation(&self.owner) == Relation::Us => {
                self.check_password(&record)?;
                Ok(Some(self.claimed(&record, ClaimedAs::Already)))
            }
            _ => Ok(None),
        }
    }

    fn tenure(&self, volume: &VolumeId, epoch: u64) -> Result<Tenure> {
        let Some((record, _)) = self.fetch(volume)? else {
            return Ok(Tenure::Unclear("its catalog record is not there".into()));
        };
        let by = match &record.owner {
            Some(owner) if owner.relation(&self.owner) == Relation::Us => return Ok(Tenure::Ours),
            _ if record.epoch > epoch => return Ok(Tenure::Over),
            Some(owner) => owner.to_string(),
            None => "nobody".into(),
        };
        Ok(Tenure::Unclear(format!("the catalog says that {by} has it, and we are {}", self.owner)))
    }

    fn claim_absent(&self, volume: &VolumeId) -> Result<bool> {
        if self.dirs.volume_state(volume).exists() {
            return Ok(false);
        }
        match self.fetch(volume) {
            Ok(found) => {
                let owner = found.and_then(|(record, _)| record.owner);
                Ok(owner.is_none_or(|owner| owner.relation(&self.owner) != Relation::Us))
            }
            // The folder is the first thing that a claim makes and the last that a release removes.
            Err(e) if e.kind() == Kind::Unreachable => Ok(true),
            Err(e) => Err(e),
        }
    }

    fn store(&self) -> Option<String> {
        Some(self.storage.url.to_string())
    }

    fn config_present(&self, volume: &VolumeId) -> Result<bool> {
        let path = self.dirs.config(volume);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).doing("read", &path),
        };
        // Under a running ZeroFS the config stays as it was started with; and without a password at hand, the
        // one on disk is the best there is.
        if self.password.is_none() || !matches!(self.keeper(volume)?, KeeperView::Dead { orphan: false, .. })
        {
            return Ok(true);
        }
        let capacity = self.known.borrow().as_ref().map(|(r, _)| r.capacity).filter(|c| c.bytes() > 0);
        Ok(*self.render(volume, capacity)? == *text)
    }

    fn config_absent(&self, volume: &VolumeId) -> Result<bool> {
        let folder = self.dirs.volume_state(volume);
        Ok(!self.dirs.config(volume).exists() && !folder.join("cache").exists())
    }

    fn keeper(&self, volume: &VolumeId) -> Result<KeeperView> {
        let Some(status) = self.status(volume)? else {
            let orphan = !keeper::find_zerofs(&self.dirs.volume_run(volume)).is_empty();
            return Ok(KeeperView::Dead { orphan, left_behind: self.left_behind(volume)? });
        };
        let left_behind = match status.log {
            LogState::LeftBehind { entries, .. } if !status.data_path => entries,
            LogState::Foreign { .. } => 1,
            _ => 0,
        };
        Ok(KeeperView::Alive {
            usable: matches!(status.state, State::Starting | State::Ready | State::Stalled),
            state: status.state.name().into(),
            reason: status.reason,
            left_behind,
        })
    }

    fn keeper_files(&self, volume: &VolumeId) -> Result<bool> {
        let folder = self.dirs.volume_run(volume);
        let (fuse, _) = self.dirs.fuse(volume);
        let mut names = Self::keeper_names().into_iter().chain(Self::log_names());
        Ok(fuse.exists() || names.any(|name| folder.join(name).exists()))
    }

    fn disk_size(&self, volume: &VolumeId) -> Result<Option<ByteSize>> {
        let folder = self.dirs.volume_run(volume);
        Ok(self.served(volume, || ninep::disk_size(&folder, EXPORT))?.map(ByteSize))
    }

    fn device(&self, volume: &VolumeId) -> Result<DeviceView> {
        let mut view = device::view(&self.dirs, volume, || self.status(volume))?;
        if *self.failed.borrow() && !view.is_absent() {
            view.life = Life::Dead;
        }
        Ok(view)
    }

    fn transport(&self, wanted: Transport) -> Result<Transport> {
        device::transport(wanted)
    }

    fn signature(&self, device: &Path, recorded: Option<FsType>) -> Result<Signature> {
        if let Some(fs) = recorded
            && let Some(found) = signature::glance(device, fs)?
        {
            return Ok(found);
        }
        signature::probe(device)
    }

    fn mounts_of(&self, device: &Path) -> Result<Vec<MountEntry>> {
        Ok(mounts::table("self")?.into_iter().filter(|m| Path::new(&m.source) == device).collect())
    }

    fn target(&self, target: &TargetPath) -> Result<TargetView> {
        let path = target.as_path();
        if let Some(mut entry) = mounts::at(&mounts::table("self")?, path) {
            // An XFS that gave up after an error still calls itself read-write.
            let gave_up = std::fs::metadata(path).is_err_and(|e| e.raw_os_error() == Some(libc::EIO));
            entry.read_only |= gave_up;
            return Ok(TargetView::MountPoint(entry));
        }
        let meta = match std::fs::symlink_metadata(path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(TargetView::Missing),
            Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => {
                return Err(Error::usage(format!("a parent of the target {target} is not a folder"))
                    .hint("choose another target"));
            }
            Err(e) => return Err(e).doing("look at the target", path),
        };
        if meta.is_symlink() {
            return Ok(TargetView::Other { link: std::fs::read_link(path).ok() });
        }
        if !meta.is_dir() {
            return Ok(TargetView::Other { link: None });
        }
        let mut entries = std::fs::read_dir(path).doing("read the target", path)?;
        Ok(if entries.next().is_none() { TargetView::EmptyFolder } else { TargetView::FullFolder })
    }

    fn device_users(&self, device: &Path) -> Result<Vec<User>> {
        let begun = Instant::now();
        loop {
            let users = users::of_device(device)?;
            // Whoever was killed may still have to write out what it wrote: it ends when that is done, or the device is gone.
            if users.is_empty() || !users.iter().all(|user| is_dying(user.pid as i32)) {
                return Ok(users);
            }
            if begun.elapsed() >= self.patience() {
                return Ok(if self.force() { vec![] } else { users });
            }
            let left = Some(self.patience().as_secs());
            (self.progress)("wait for the end of who was killed", begun.elapsed().as_secs(), left);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn can_grow_mounted(&self, fs: FsType) -> Result<()> {
        const CAP_SYS_RESOURCE: u64 = 1 << 24;
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|l| l.strip_prefix("CapEff:"))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
            .unwrap_or(u64::MAX);
        if fs == FsType::Ext4 && effective & CAP_SYS_RESOURCE == 0 {
            return Err(Error::environment(
                "growing an ext4 while it is mounted needs CAP_SYS_RESOURCE, which this process lacks",
            )
            .hint("detach it, then resize it: a detached volume grows without that"));
        }
        Ok(())
    }

    fn is_node_of(&self, target: &TargetPath, device: &Path) -> Result<bool> {
        bind::is_node_of(target.as_path(), device)
    }

    fn is_empty_file(&self, target: &TargetPath) -> Result<bool> {
        bind::is_empty_file(target.as_path())
    }

    fn group_granted(&self, target: &TargetPath, gid: u32) -> Result<bool> {
        bind::group_granted(target.as_path(), gid)
    }

    fn filesystem_fills_device(&self, device: &Device, fs: FsType, target: &Path) -> Result<bool> {
        super::fssize::fills(device, fs, target)
    }
}

impl Host for LinuxHost {
    fn take_claim(&self, volume: &VolumeId, request: &ClaimRequest) -> Result<Claimed> {
        // First of all: without it, nobody could ever release what we claim.
        let folder = self.dirs.volume_state(volume);
        let first = access::load(&folder)?.is_none();
        private_folder(&folder)?;
        access::save(&folder, &self.storage.url, &self.storage.s3)?;
        let mut asked = false;
        let result = self.take_claim_saved(volume, request, &mut asked);
        if result.is_err() && first && !asked {
            // Refused before the catalog was asked for anything: nothing is ours, and nothing of it stays.
            access::remove(&folder)?;
            remove(std::fs::remove_dir(&folder), &folder)?;
        }
        result
    }

    fn release_claim(&self, volume: &VolumeId) -> Result<()> {
        for attempt in 0.. {
            let Some((record, tag)) = self.fetch(volume)? else { break };
            match record.release(&self.owner) {
                Release::Done(record) => {
                    self.pass_log_on(volume, &record)?;
                    match self.catalog.update(&record, &tag)? {
                        Written::Done(_) => break,
                        Written::LostRace if attempt > 8 => {
                            return Err(Error::new(Kind::Busy, "its catalog record keeps changing under us")
                                .hint("try again"));
                        }
                        Written::LostRace => {}
                    }
                }
                Release::Already => break,
                Release::Lost(owner) => {
                    tracing::info!(%volume, "it belongs to {owner}; nothing to release");
                    break;
                }
            }
        }
        *self.known.borrow_mut() = None;
        let folder = self.dirs.volume_state(volume);
        access::remove(&folder)?;
        remove(std::fs::remove_dir(&folder), &folder)?;
        // A time as good as any for looking at what earlier ones left; and no reason to fail.
        if let Err(e) = old_logs::remove(&self.dirs, std::time::SystemTime::now()) {
            tracing::warn!("{e}");
        }
        Ok(())
    }

    fn record_content(&self, volume: &VolumeId, content: Content, fs: Option<FsType>) -> Result<()> {
        self.change_record(volume, |record| {
            let fs = fs.or(record.filesystem).unwrap_or(FsType::Ext4);
            match content {
                Content::Formatting => record.begin_format(fs),
                Content::Formatted => record.formatted(fs),
                Content::Raw => Ok(record.handed_out_raw()),
                Content::Never | Content::Unknown => Ok(record.clone()),
            }
        })
    }

    fn record_capacity(&self, volume: &VolumeId, capacity: ByteSize) -> Result<()> {
        self.change_record(volume, |record| record.grown_to(capacity))
    }

    fn write_config(&self, volume: &VolumeId, capacity: Option<ByteSize>) -> Result<()> {
        let text = self.render(volume, capacity)?;
        let folder = self.dirs.volume_state(volume);
        private_folder(&folder)?;
        private_folder(&folder.join("cache"))?;
        let path = self.dirs.config(volume);
        replace(&path, &folder.join(".config.toml.new"), text.as_bytes()).doing("write", &path)
    }

    fn remove_config(&self, volume: &VolumeId) -> Result<()> {
        let folder = self.dirs.volume_state(volume);
        for name in ["config.toml", ".config.toml.new", ".access.json.new"] {
            let path = folder.join(name);
            remove(std::fs::remove_file(&path), &path)?;
        }
        let mut caches = vec![folder.join("cache")];
        caches.extend(self.settings.cache.dir.as_ref().map(|dir| dir.join(format!("zerofs-{volume}"))));
        for cache in caches {
            remove(std::fs::remove_dir_all(&cache), &cache)?;
        }
        Ok(())
    }

    fn start_keeper(&self, volume: &VolumeId, epoch: u64, options: &KeeperOptions) -> Result<()> {
        self.serve(volume, epoch, options, START_LIMIT)
    }

    fn stop_keeper(&self, volume: &VolumeId, options: &StopOptions) -> Result<()> {
        self.companion.take();
        self.stop_and_settle(volume, options)
    }

    fn create_disk(&self, volume: &VolumeId, size: ByteSize) -> Result<()> {
        let folder = self.dirs.volume_run(volume);
        self.served(volume, || ninep::create_disk(&folder, EXPORT, size.bytes()))
    }

    fn remove_disk(&self, volume: &VolumeId) -> Result<()> {
        let folder = self.dirs.volume_run(volume);
        self.served(volume, || ninep::unlink_disk(&folder, EXPORT)).map(drop)
    }

    fn grow_disk(&self, volume: &VolumeId, size: ByteSize) -> Result<()> {
        let folder = self.dirs.volume_run(volume);
        self.served(volume, || ninep::grow_disk(&folder, EXPORT, size.bytes()))
    }

    fn replay(&self, volume: &VolumeId) -> Result<(u64, Option<String>)> {
        self.replay_within(volume, stop::REPLAY_LIMIT)
    }

    fn prepare_transport(&self, wanted: Transport) -> Result<Transport> {
        device::prepare(wanted)
    }

    fn connect(&self, volume: &VolumeId, request: &ConnectRequest) -> Result<Device> {
        // What it says is of a log that is replayed or discarded by now; the next entries are of this attach.
        self.forget_held(volume)?;
        let mut client = self.client(volume)?.within(Duration::from_secs(600));
        if request.transport == Transport::Nbd {
            // Before there is a device: a keeper that dies once the kernel has it leaves one that waits, and what looks
            // at it then, to take it back, would wait as well.
            self.accompany(volume)?;
            let mut options = device::options(request);
            for attempt in 0.. {
                options.index = device::index_that_nobody_means(&self.dirs, volume)?;
                match client.connect_nbd(&options) {
                    // Somebody else was faster.
                    Err(e) if e.kind() == Kind::Busy && options.index.is_some() && attempt < 5 => {}
                    connected => {
                        connected?;
                        break;
                    }
                }
            }
            return self.nbd_device(volume);
        }
        let (folder, file) = self.dirs.fuse(volume);
        if mounts::at(&mounts::table("self")?, &folder).is_none() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).doing("make", &folder)?;
            client.mount()?;
        }
        match loopdev::find(&file)? {
            Some(device) => Ok(device),
            None => loopdev::attach(&file, request.read_only),
        }
    }

    fn take_over(&self, volume: &VolumeId) -> Result<()> {
        let run = self.dirs.volume_run(volume);
        // The very words that the one before was started with: neither settings nor password are at hand here.
        let config = KeeperConfig::read(&run)?;
        if keeper::find_zerofs(&run).is_empty() {
            // A ZeroFS that is started now would fence whoever owns the volume by now.
            let claimed = self.claim(volume)?;
            if claimed.as_ref().map(|c| c.epoch) != Some(config.epoch) {
                return Err(Error::new(Kind::Conflict, "the volume has a new owner in the catalog")
                    .hint(format!("take it down here: zerofsctl detach {volume} --force")));
            }
        }
        let begun = Instant::now();
        keeper::spawn(&self.program, &config, Duration::from_secs(20))?;
        // It takes the device over by itself, once the log is replayed.
        let limit = START_LIMIT.min(self.patience());
        loop {
            let why = match self.client(volume)?.wait_ready(limit.saturating_sub(begun.elapsed())) {
                Ok(status) => status.reason,
                Err(e) => return Err(e),
            };
            match self.device(volume)?.life {
                Life::Served => return Ok(()),
                Life::Dead => {
                    let record = Record::read(&run)?.and_then(|r| r.failed);
                    let why = record.unwrap_or_else(|| "the kernel has let it go".into());
                    return Err(Error::refused(format!("its device cannot be taken over: {why}"))
                        .hint(format!("run: zerofsctl recover {volume}")));
                }
                Life::Waiting if begun.elapsed() >= limit => {
                    let why = why.map(|w| format!(": {w}")).unwrap_or_default();
                    return Err(Error::new(
                        Kind::Unreachable,
                        format!("the next keeper runs, but does not serve the device yet{why}"),
                    )
                    .hint(format!("see what it waits for: zerofsctl show {volume}")));
                }
                Life::Waiting => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn look_after(&self, volume: &VolumeId) -> Result<()> {
        if device::may_be_taken_over(&self.dirs.volume_run(volume), volume)? {
            self.accompany(volume)?;
        }
        Ok(())
    }

    fn let_fail(&self, volume: &VolumeId) -> Result<()> {
        device::let_fail(&self.dirs.volume_run(volume), volume)
    }

    fn disconnect(&self, volume: &VolumeId, dead: bool) -> Result<()> {
        let run = self.dirs.volume_run(volume);
        self.companion.take();
        if Record::read(&run)?.is_some() {
            let keeper = || self.status(volume)?.map(|_| self.client(volume)).transpose();
            match device::disconnect(&run, volume, dead, keeper()?) {
                Err(e)
                    if !dead && self.force() && matches!(e.kind(), Kind::Unreachable | Kind::Interrupted) =>
                {
                    tracing::warn!(%volume, "{}: its device is failed by force; what was cached, but not acknowledged, is lost", e.message());
                    *self.failed.borrow_mut() = true;
                    device::disconnect(&run, volume, true, keeper()?)?;
                }
                other => other?,
            }
        }
        self.disconnect_fuse(volume, dead)
    }

    fn grow_device(&self, volume: &VolumeId) -> Result<Device> {
        let (_, file) = self.dirs.fuse(volume);
        self.client(volume)?.within(Duration::from_secs(60)).resize()?;
        let missing =
            || Error::refused("it has no block device").hint(format!("run: zerofsctl recover {volume}"));
        // The keeper tells the kernel of the size of an NBD device.
        if let Some(device) = device::nbd_device(&self.dirs.volume_run(volume), volume)? {
            return Ok(device);
        }
        let device = loopdev::find(&file)?.ok_or_else(missing)?;
        loopdev::grow(&device.path, &file)?;
        loopdev::find(&file)?.ok_or_else(missing)
    }

    fn format(&self, device: &Device, fs: FsType, _: &VolumeId) -> Result<()> {
        // The device is proven blank, so there is nothing to discard first. What a cut-short mkfs left is
        // overwritten: that is what the force flags are for.
        let (program, args): (_, &[&str]) = match fs {
            FsType::Ext4 => (Program::MkfsExt4, &["-q", "-F", "-E", "nodiscard"]),
            FsType::Xfs => (Program::MkfsXfs, &["-q", "-f", "-K"]),
            FsType::Btrfs => (Program::MkfsBtrfs, &["-q", "-f", "-K"]),
        };
        let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        args.push(device.path.as_os_str());
        program.run(&args, None)?.success()?;
        let file = OpenOptions::new().read(true).open(&device.path).doing("open", &device.path)?;
        file.sync_all().doing("sync", &device.path)
    }

    fn preen(&self, device: &Device, fs: FsType) -> Result<Option<String>> {
        if fs != FsType::Ext4 {
            return Ok(None);
        }
        let output = Program::E2fsck.run(&[OsStr::new("-p"), device.path.as_os_str()], None)?;
        match output.code {
            Some(0) => Ok(None),
            Some(1) => Ok(Some("it was not cleanly unmounted; small faults were repaired".into())),
            _ => Err(Error::refused(output.failure().message())
                .hint("check it, then repair it: zerofsctl fsck VOLUME --repair")),
        }
    }

    fn check(&self, device: &Device, fs: FsType, repair: bool) -> Result<CheckResult> {
        let path = device.path.as_os_str();
        let (program, args): (_, &[&str]) = match (fs, repair) {
            (FsType::Ext4, false) => (Program::E2fsck, &["-fn"]),
            (FsType::Ext4, true) => (Program::E2fsck, &["-fy"]),
            (FsType::Xfs, false) => (Program::XfsRepair, &["-n"]),
            (FsType::Xfs, true) => (Program::XfsRepair, &[]),
            (FsType::Btrfs, false) => (Program::Btrfs, &["check", "--readonly"]),
            (FsType::Btrfs, true) => (Program::Btrfs, &["check", "--repair", "--force"]),
        };
        let mut args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        args.push(path);
        let output = program.run(&args, None)?;
        // e2fsck: 1 and 2 say that everything was repaired. The others say 0 or not.
        let (clean, repaired) = match (fs, output.code) {
            (_, Some(0)) => (true, false),
            (FsType::Ext4, Some(1 | 2)) if repair => (true, true),
            // 4: faults are left; 8 along with it: so bad that it gave up. 16 and more: it was not run at all.
            (FsType::Ext4, Some(code @ 4..16)) if code & 4 != 0 => (false, false),
            (FsType::Xfs | FsType::Btrfs, Some(1)) => (false, false),
            _ => return Err(output.failure()),
        };
        let mut text = output.stdout;
        text.push_str(&output.stderr);
        const KEPT: usize = 8 * 1024;
        if text.len() > KEPT {
            let cut = (0..=KEPT).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(cut);
            text.push_str("\n…");
        }
        Ok(CheckResult { clean, repaired, output: text })
    }

    fn read_data(&self, device: &Device, slice: Slice) -> Result<Vec<(u64, u64)>> {
        let (start, end) = slice.range(device.size.bytes());
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(&device.path)
            .doing("open", &device.path)?;
        read_range(&file, start, end, &|at| (self.progress)("read", at - start, Some(end - start)))
    }

    fn mount(
        &self,
        device: &Device,
        fs: FsType,
        target: &TargetPath,
        options: &[String],
        read_only: bool,
    ) -> Result<()> {
        let mut all = vec![if read_only { "ro" } else { "rw" }.to_owned(), utab::NETDEV.to_owned()];
        all.extend(options.iter().cloned());
        let all = all.join(",");
        let args = [
            OsStr::new("-t"),
            OsStr::new(fs.name()),
            OsStr::new("-o"),
            OsStr::new(&all),
            OsStr::new("--"),
            device.path.as_os_str(),
            target.as_path().as_os_str(),
        ];
        let output = Program::Mount.run(&args, Some(QUICK))?;
        if output.code == Some(0) {
            return Ok(());
        }
        let failure = output.failure();
        let hint = if options.is_empty() {
            "look at what the kernel said: dmesg | tail".to_owned()
        } else {
            format!("check the options ({all}); the kernel says why: dmesg | tail")
        };
        Err(match failure.message() {
            m if m.contains("write-protected") || m.contains("cannot mount") && read_only => failure.hint(
                "its journal must be replayed first: attach it once without --read-only, or add --mount-option noload (ext4) or norecovery (xfs)",
            ),
            _ => failure.hint(hint),
        })
    }

    fn unmount(&self, target: &Path, dead: bool) -> Result<()> {
        self.unmount_patiently(target, dead)
    }

    fn finish_unmount(&self, device: &Device) -> Result<()> {
        self.wait_for_unmount(&device.path)
    }

    fn finish_mount(&self, volume: &VolumeId, device: &Device, target: &TargetPath) -> Result<()> {
        self.wait_for_mount(volume, &device.path, target.as_path())
    }

    fn grow_filesystem(&self, device: &Device, fs: FsType, target: &Path) -> Result<()> {
        let target = target.as_os_str();
        match fs {
            FsType::Ext4 => Program::Resize2fs.run(&[device.path.as_os_str()], None)?,
            FsType::Xfs => Program::XfsGrowfs.run(&[target], None)?,
            FsType::Btrfs => {
                let args = ["filesystem", "resize", "max"].map(OsStr::new);
                Program::Btrfs.run(&[args.as_slice(), &[target]].concat(), None)?
            }
        }
        .success()
        .map(drop)
    }

    fn grow_unmounted(&self, device: &Device) -> Result<()> {
        let path = device.path.as_os_str();
        // resize2fs insists on a fresh full check.
        let check = Program::E2fsck.run(&[OsStr::new("-f"), OsStr::new("-p"), path], None)?;
        if !matches!(check.code, Some(0 | 1)) {
            return Err(Error::refused(check.failure().message())
                .hint("check it, then repair it: zerofsctl fsck VOLUME --repair"));
        }
        Program::Resize2fs.run(&[path], None)?.success().map(drop)
    }

    fn make_folder(&self, target: &TargetPath) -> Result<()> {
        let path = target.as_path();
        match std::fs::create_dir(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let parent = path.parent().unwrap_or(path).display();
                Err(Error::usage(format!(
                    "the folder {parent}, in which the target shall be, does not exist"
                ))
                .hint(format!("make it: mkdir -p {parent}")))
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            other => other.doing("make the target", path),
        }
    }

    fn remove_folder(&self, target: &TargetPath) -> Result<()> {
        match std::fs::remove_dir(target.as_path()) {
            // Somebody put something there, or uses it: then it is no longer ours alone.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY | libc::EEXIST)) => {
                Ok(())
            }
            other => remove(other, target.as_path()),
        }
    }

    fn make_file(&self, target: &TargetPath) -> Result<()> {
        bind::make_file(target.as_path())
    }

    fn clear_target(&self, target: &TargetPath) -> Result<()> {
        bind::clear_target(target.as_path())
    }

    fn bind(&self, source: &Path, target: &TargetPath, read_only: bool) -> Result<()> {
        bind::bind(source, target.as_path(), read_only)
    }

    fn grant_group(&self, target: &TargetPath, gid: u32) -> Result<()> {
        bind::grant_group(target.as_path(), gid)
    }

    fn link(&self, device: &Device, target: &TargetPath) -> Result<()> {
        match std::os::unix::fs::symlink(&device.path, target.as_path()) {
            Err(e)
                if e.kind() == std::io::ErrorKind::AlreadyExists
                    && std::fs::read_link(target.as_path()).is_ok_and(|to| to == device.path) =>
            {
                Ok(())
            }
            other => other.doing("make the link", target.as_path()),
        }
    }

    fn unlink(&self, target: &TargetPath) -> Result<()> {
        remove(std::fs::remove_file(target.as_path()), target.as_path())
    }
}

/// Reads [start, end) and returns what cannot be read, in blocks of 4 KiB, adjacent ones joined.
fn read_range(file: &std::fs::File, start: u64, end: u64, progress: &dyn Fn(u64)) -> Result<Vec<(u64, u64)>> {
    use std::os::unix::fs::FileExt;
    const BLOCK: u64 = 4096;
    let mut buffer = signature::Aligned::new(ByteSize::MIB as usize);
    let mut bad: Vec<(u64, u64)> = Vec::new();
    let mut at = start;
    let mut step = ByteSize::MIB;
    while at < end {
        let length = step.min(end - at);
        match file.read_at(&mut buffer.slice()[..length as usize], at) {
            Ok(0) => return Err(Error::failed(format!("the device ends at {at}, before {end}"))),
            Ok(n) => {
                at += n as u64;
                if at.is_multiple_of(ByteSize::MIB) {
                    step = ByteSize::MIB;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // Once more in small pieces, to say exactly which.
            Err(_) if length > BLOCK => step = BLOCK,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EIO | libc::ENODATA | libc::EREMOTEIO)) => {
                match bad.last_mut() {
                    Some((from, length_before)) if *from + *length_before == at => *length_before += length,
                    _ => bad.push((at, length)),
                }
                at += length;
                if at.is_multiple_of(ByteSize::MIB) {
                    step = ByteSize::MIB;
                }
            }
            Err(e) => return Err(Error::failed(format!("cannot read at {at}: {e}"))),
        }
        progress(at);
    }
    Ok(bad)
}
