//! Volumes with a keeper of their own, for tests of the keeper as a real process.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zerofsctl::catalog::{self, StorageUrl, VolumeRecord, Written};
use zerofsctl::error::Error;
use zerofsctl::host::access;
use zerofsctl::host::cgroup::Limits;
use zerofsctl::keeper::client::KeeperClient;
use zerofsctl::keeper::control::{Status, StopOptions, Stopped};
use zerofsctl::keeper::process::boot_id;
use zerofsctl::keeper::{KeeperConfig, Spawned, find_zerofs, spawn};
use zerofsctl::password::Secret;
use zerofsctl::settings::{AwsCredentials, S3Settings};
use zerofsctl::values::ByteSize;
use zerofsctl::zerofs::config::{self, Aws, ConfigInput, Lsm};
use zerofsctl::zerofs::versions::{Profile, Version};

use super::dir::TestDir;

pub const VERSION: &str = "0.19.1";
pub const SIZE: u64 = 256 << 20;
pub const LONG: Duration = Duration::from_secs(30);

/// A volume with folders of its own.
pub struct Volume {
    /// Its folders; when dropped, it looks for what is left.
    pub dir: TestDir,
    /// What goes into config.toml.
    pub input: ConfigInput,
    /// What goes into keeper.json.
    pub config: KeeperConfig,
}

impl Volume {
    pub fn new() -> Volume {
        Self::with(|_| ())
    }

    /// A volume whose config is changed before it is written.
    pub fn with(change: impl FnOnce(&mut ConfigInput)) -> Volume {
        let dir = TestDir::new();
        let store = dir.join("store/vol1");
        fs::create_dir_all(&store).unwrap();
        let mut input = ConfigInput {
            storage_url: format!("file://{}", store.display()),
            password: "correct horse battery".to_owned().into(),
            cache_dir: dir.join("cache"),
            cache_disk_gb: 0.5,
            cache_memory_gb: Some(0.064),
            device_size: SIZE,
            max_size_gb: None,
            lsm: Lsm::default(),
            aws: Aws::default(),
            read_only: false,
        };
        change(&mut input);
        // The keeper asks the catalog before it starts ZeroFS again.
        let mut record = VolumeRecord::new("vol1".parse().unwrap(), ByteSize(SIZE), None, Timestamp::now());
        record.epoch = 1;
        let (url, s3) = access_of(&input);
        let written = catalog::open(&url, &s3).unwrap().create(&record).unwrap();
        assert!(matches!(written, Written::Done(_)));
        let config = config_in(&dir, "a", &input);
        Volume { dir, input, config }
    }

    /// Another place (another node, so to say) for the same volume.
    pub fn elsewhere(&self) -> KeeperConfig {
        config_in(&self.dir, "b", &self.input)
    }

    /// Another node takes the volume over in the catalog.
    pub fn taken_over(&self) {
        let (url, s3) = access_of(&self.input);
        let catalog = catalog::open(&url, &s3).unwrap();
        let (mut record, tag) = catalog.get(&self.config.volume).unwrap().unwrap();
        record.epoch += 1;
        assert!(matches!(catalog.update(&record, &tag).unwrap(), Written::Done(_)));
    }

    /// Writes config.toml anew.
    pub fn render(&self) {
        render(&self.config.config_path, &self.input);
    }

    pub fn log(&self, text: &str) {
        let mut log = File::options().append(true).open(self.config.log_dir.join("zerofs.log")).unwrap();
        log.write_all(text.as_bytes()).unwrap();
    }

    pub fn logs(&self) -> String {
        ["keeper.log", "zerofs.log"]
            .map(|f| fs::read_to_string(self.config.log_dir.join(f)).unwrap_or_default())
            .join("\n--- zerofs.log ---\n")
    }
}

pub fn config_in(dir: &TestDir, node: &str, input: &ConfigInput) -> KeeperConfig {
    let path = |name: &str| dir.join(node).join(name);
    fs::create_dir_all(path("state")).unwrap();
    let config = KeeperConfig {
        format: KeeperConfig::FORMAT,
        volume: "vol1".parse().unwrap(),
        run_dir: path("run"),
        log_dir: path("logs"),
        zerofs_bin: super::zerofs_bin(),
        zerofs_version: VERSION.parse().unwrap(),
        config_path: path("state/config.toml"),
        rust_log: None,
        export: "disk".to_owned(),
        connections: 4,
        log_bytes: 16 << 20,
        io_timeout_ms: None,
        epoch: 1,
        limits: Limits::default(),
        limits_required: false,
        boot_id: boot_id(),
        start_limit_seconds: 20,
        stop_grace_seconds: 20,
        replay_log: true,
    };
    let mut input = input.clone();
    input.cache_dir = path("cache");
    render(&config.config_path, &input);
    let (url, s3) = access_of(&input);
    access::save(&path("state"), &url, &s3).unwrap();
    config
}

/// How the store of a volume with this config is reached.
fn access_of(input: &ConfigInput) -> (StorageUrl, S3Settings) {
    let url = input.storage_url.strip_suffix("/vol1").unwrap().parse().unwrap();
    let aws = &input.aws;
    let credentials = aws.access_key_id.as_ref().zip(aws.secret_access_key.as_ref());
    let s3 = S3Settings {
        endpoint: aws.endpoint.clone(),
        region: aws.region.clone(),
        allow_http: aws.allow_http,
        credentials: credentials.map(|(id, key)| AwsCredentials {
            access_key_id: Secret::new(id.clone()),
            secret_access_key: Secret::new(key.to_string()),
            session_token: None,
        }),
    };
    (url, s3)
}

pub fn render(path: &Path, input: &ConfigInput) {
    let profile = Profile::of(VERSION.parse::<Version>().unwrap()).unwrap();
    fs::write(path, config::render(input, &profile).unwrap().as_bytes()).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

pub fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_zerofsctl").into()
}

pub fn start(config: &KeeperConfig) -> Spawned {
    spawn(&program(), config, LONG).unwrap()
}

pub fn client(config: &KeeperConfig) -> KeeperClient {
    KeeperClient::connect(&config.run_dir).unwrap()
}

pub fn ready(config: &KeeperConfig) -> Status {
    start(config);
    client(config).wait_ready(LONG).unwrap()
}

pub fn stop_with(config: &KeeperConfig, seconds: f64, force: bool) -> Result<Stopped, Error> {
    let options = StopOptions { timeout_seconds: seconds, force, even_if_mounted: false };
    client(config).stop(options, &mut |_| ())
}

/// Stops cleanly, and shows that the run folder is empty and no process is left.
pub fn stop(config: &KeeperConfig) -> Stopped {
    let stopped = stop_with(config, 20.0, false).unwrap();
    assert!(stopped.clean, "{stopped:?}");
    assert_eq!(stopped.warnings, Vec::<String>::new());
    nothing_left(config);
    stopped
}

pub fn nothing_left(config: &KeeperConfig) {
    let names: Vec<_> = fs::read_dir(&config.run_dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(names.is_empty(), "{names:?}");
    assert_eq!(find_zerofs(&config.run_dir), vec![]);
}

pub fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}
