//! A kubelet, together with the sidecars of the controller, for one volume: it wants the volume in its pods or away, asks
//! for that step by step, and whatever the answer, asks again until it is so. It waits a little longer each time, asks with
//! a new deadline, and may change its mind in the middle, as when a pod is deleted while its volume is being staged.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tonic::{Code, Status};
use zerofsctl::csi::proto::{CreateVolumeRequest, VolumeCapability};

use super::cli::{pattern, write_durably};
use super::csi::{Client, Mode, at_least, block, mount, parameters};

/// How long one step may need, retries and all, before the test gives up: against hangs.
const PATIENCE: Duration = Duration::from_secs(400);

/// The waits between tries; a real kubelet's are from half a second to two minutes.
const WAITS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(640));

/// Files that the pods write in turns.
const FILES: u64 = 3;

/// What one write holds.
const CHUNK: usize = 192 * 1024;

/// See the module.
pub struct Kubelet {
    client: Client,
    volume: String,
    node: String,
    raw: bool,
    staging: PathBuf,
    pods: Vec<PathBuf>,
    random: StdRng,
    /// What the pods wrote, and fsync returned: by file, the seed of its bytes.
    written: Vec<(u64, u64)>,
    writes: u64,
    /// What happened.
    pub tally: Tally,
}

/// What happened to one volume, or to all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Times that it was in its pods.
    pub ups: u64,
    /// Times that it was taken away.
    pub downs: u64,
    /// Calls that were answered with an error, or not at all, and asked again.
    pub retries: u64,
    /// Of these, the ones whose connection broke.
    pub broken: u64,
    /// Times that the mind was changed in the middle.
    pub turns: u64,
    /// Writes that were read back.
    pub writes: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.ups += other.ups;
        self.downs += other.downs;
        self.retries += other.retries;
        self.broken += other.broken;
        self.turns += other.turns;
        self.writes += other.writes;
    }
}

impl Kubelet {
    /// For a volume of this name, on the driver at `socket`; its folders are below `home`. It is used raw or by `pods` pods.
    pub fn new(socket: &Path, home: &Path, volume: &str, raw: bool, pods: usize, seed: u64) -> Kubelet {
        Kubelet {
            client: Client::connect(socket),
            volume: volume.to_owned(),
            node: "n1".to_owned(),
            raw,
            staging: home.join(format!("staging/{volume}")),
            pods: (0..pods).map(|n| home.join(format!("pods/{n}/{volume}"))).collect(),
            random: StdRng::seed_from_u64(seed),
            written: Vec::new(),
            writes: 0,
            tally: Tally::default(),
        }
    }

    /// The places where it appears: the staging folder of a filesystem, and the pods'.
    pub fn mounts(&self) -> usize {
        self.pods.len() + usize::from(!self.raw)
    }

    /// Its name.
    pub fn volume(&self) -> &str {
        &self.volume
    }

    fn capability(&self) -> VolumeCapability {
        if self.raw { block(Mode::SingleNodeWriter) } else { mount(Mode::SingleNodeWriter) }
    }

    /// Has the volume made.
    #[track_caller]
    pub fn create(&mut self, bytes: i64) {
        let request = CreateVolumeRequest {
            name: self.volume.clone(),
            capacity_range: at_least(bytes),
            volume_capabilities: vec![self.capability()],
            parameters: parameters(&[("deleteDataOnPVCDelete", "true")]),
            ..Default::default()
        };
        self.insist("create", false, |k| k.client.create(request.clone()).map(drop));
    }

    /// Has it deleted.
    #[track_caller]
    pub fn delete(&mut self) {
        self.insist("delete", false, |k| k.client.delete(&k.volume));
    }

    /// Brings it to its pods. False when the mind was changed on the way, which only a `fickle` one does.
    #[track_caller]
    pub fn up(&mut self, fickle: bool) -> bool {
        fs::create_dir_all(&self.staging).expect("the kubelet makes its folders");
        let published = self.insist("attach", fickle, |k| {
            k.client.controller_publish(&k.volume, &k.node, k.capability(), false).map(drop)
        });
        if !published
            || !self.insist("stage", fickle, |k| k.client.stage(&k.volume, &k.staging, k.capability()))
        {
            return false;
        }
        for pod in self.pods.clone() {
            fs::create_dir_all(pod.parent().expect("it has one")).expect("the kubelet makes its folders");
            let done = self.insist("publish", fickle, |k| {
                k.client.publish(&k.volume, &k.staging, &pod, k.capability(), false)
            });
            if !done {
                return false;
            }
        }
        self.tally.ups += 1;
        true
    }

    /// Takes it away, from wherever it got.
    #[track_caller]
    pub fn down(&mut self) {
        for pod in self.pods.clone() {
            self.insist("unpublish", false, |k| k.client.unpublish(&k.volume, &pod));
            assert!(!pod.exists(), "{} is there after the unpublish", pod.display());
        }
        self.insist("unstage", false, |k| k.client.unstage(&k.volume, &k.staging));
        match fs::remove_dir(&self.staging) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                panic!("{}: the staging folder after the unstage: {e}", self.volume)
            }
            _ => {}
        }
        self.insist("detach", false, |k| k.client.controller_unpublish(&k.volume, &k.node));
        self.tally.downs += 1;
    }

    /// Asks until it is so. A `fickle` one may give up after a try that failed.
    #[track_caller]
    fn insist(&mut self, what: &str, fickle: bool, call: impl Fn(&Kubelet) -> Result<(), Status>) -> bool {
        let began = Instant::now();
        let mut wait = WAITS.0;
        loop {
            // Now and then a deadline that is too short: what is at work must be found again.
            let short = self.random.random_ratio(1, 6);
            self.client.limit =
                if short { Duration::from_millis(self.random.random_range(5..400)) } else { PATIENCE };
            let Err(status) = call(self) else { return true };
            self.tally.retries += 1;
            // So begin the driver's own words, which must be such that a retry may help.
            let own = status.message().starts_with("volume ") || status.message().contains("hint: ");
            let retryable = [Code::Unavailable, Code::Aborted, Code::DeadlineExceeded];
            assert!(
                !own || retryable.contains(&status.code()),
                "{}: {what} was refused for good: {status:?}",
                self.volume
            );
            self.tally.broken += u64::from(!own && status.code() != Code::DeadlineExceeded);
            assert!(
                began.elapsed() < PATIENCE,
                "{}: {what} is not done after {PATIENCE:?}: {status:?}",
                self.volume
            );
            if fickle && self.random.random_ratio(1, 5) {
                self.tally.turns += 1;
                return false;
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(WAITS.1);
        }
    }

    /// What the pods do: everything that they ever wrote is read back from the device, and something new is written, made
    /// durable and read back. Any I/O error fails the test.
    #[track_caller]
    pub fn work(&mut self) {
        for (file, seed) in &self.written {
            self.assert_holds(*file, *seed);
        }
        self.writes += 1;
        let (file, seed) = (self.writes % FILES, self.writes ^ (self.random.random::<u64>() << 16));
        let bytes = pattern(seed, CHUNK);
        if self.raw {
            let path = &self.pods[0];
            let put = || {
                let mut device = File::options().write(true).open(path)?;
                device.seek(SeekFrom::Start(file * CHUNK as u64))?;
                device.write_all(&bytes)?;
                device.sync_all()
            };
            put().unwrap_or_else(|e: std::io::Error| panic!("{}: {e}", path.display()));
        } else {
            write_durably(&self.pods[0].join(format!("data{file}")), &bytes);
        }
        self.written.retain(|(f, _)| *f != file);
        self.written.push((file, seed));
        self.assert_holds(file, seed);
        self.tally.writes += 1;
    }

    #[track_caller]
    fn assert_holds(&self, file: u64, seed: u64) {
        // Each pod sees the same.
        let pod = self.pods.last().expect("there is one");
        let (path, at) =
            if self.raw { (pod.clone(), file * CHUNK as u64) } else { (pod.join(format!("data{file}")), 0) };
        let get = || {
            let mut source = File::open(&path)?;
            // SAFETY: the descriptor is open; the call takes nothing else of ours.
            unsafe { libc::posix_fadvise(source.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            source.seek(SeekFrom::Start(at))?;
            let mut bytes = vec![0; CHUNK];
            source.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = get().unwrap_or_else(|e: std::io::Error| panic!("{}: {e}", path.display()));
        assert!(bytes == pattern(seed, CHUNK), "{}: other bytes than were written", path.display());
    }
}
