//! The real ZeroFS for tests: found, started in a run folder of its own, waited for, and ended by its own
//! process id whatever becomes of the test.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use zerofsctl::zerofs::config::{self, Aws, ConfigInput, Lsm, NBD_SOCKET, NINEP_SOCKET};
use zerofsctl::zerofs::versions::{Profile, Version};
use zerofsctl::zerofs::{ninep, sock};

use super::{wait_until, zerofs_bin};

/// What `--version` says.
pub fn version() -> Version {
    let out = Command::new(zerofs_bin()).arg("--version").output().expect("zerofs --version");
    String::from_utf8(out.stdout).expect("UTF-8").parse().expect("a version")
}

/// A process that does not outlive the test.
pub struct Daemon(pub Child);

impl Daemon {
    /// Starts `command` without input, its output and errors in the file `log`.
    pub fn start(command: &mut Command, log: &Path) -> Daemon {
        let log = File::options().create(true).append(true).open(log).expect("log file");
        let errors = log.try_clone().expect("log file");
        let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn();
        Daemon(child.unwrap_or_else(|e| panic!("this test needs {:?}: {e}", command.get_program())))
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("pid")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).expect("kill");
    }

    /// Waits for the end, at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let mut status = None;
        wait_until("the process ends", limit, || {
            status = self.0.try_wait().expect("wait");
            status.is_some()
        });
        status.expect("it has ended")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Our own child, not yet waited for, so the number cannot belong to anybody else.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A volume in folders of its own: a `file://` store, a config, a cache, and one run folder per server.
pub struct Volume {
    root: tempfile::TempDir,
    /// What goes into its config.
    pub input: ConfigInput,
}

impl Volume {
    /// A fresh volume, not started.
    pub fn new(password: &str) -> Volume {
        let root = tempfile::tempdir().expect("temporary folder");
        let store = root.path().join("store/vol1");
        fs::create_dir_all(&store).expect("store folder");
        let input = ConfigInput {
            storage_url: format!("file://{}", store.display()),
            password: zeroize::Zeroizing::new(password.to_owned()),
            cache_dir: root.path().join("cache"),
            cache_disk_gb: 0.5,
            cache_memory_gb: Some(0.064),
            device_size: 1 << 30,
            max_size_gb: None,
            lsm: Lsm::default(),
            aws: Aws::default(),
            read_only: false,
        };
        Volume { root, input }
    }

    /// The folder of everything.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// Starts a server named `name` on the volume, without waiting for it.
    pub fn spawn(&self, name: &str) -> Server {
        let dir = self.root().join(name);
        fs::create_dir_all(&dir).expect("run folder");
        let mut input = self.input.clone();
        input.cache_dir = input.cache_dir.join(name);
        let profile = Profile::of(version()).expect("a known version");
        let text = config::render(&input, &profile).expect("a config");
        let config = dir.join("config.toml");
        fs::write(&config, text.as_bytes()).expect("config file");
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).expect("mode");
        let log = dir.join("zerofs.log");
        let mut command = Command::new(zerofs_bin());
        command.args(["run", "--config"]).arg(&config).current_dir(&dir);
        command.env_clear().env("NO_COLOR", "1").env("RUST_LOG", profile.rust_log(None));
        let daemon = Daemon::start(&mut command, &log);
        Server { dir, log, daemon }
    }

    /// Starts a server named `name` and waits until both of its sockets answer.
    pub fn start(&self, name: &str) -> Server {
        let mut server = self.spawn(name);
        server.wait_ready();
        server
    }
}

/// A running ZeroFS.
pub struct Server {
    /// Its run folder.
    pub dir: PathBuf,
    /// Its log.
    pub log: PathBuf,
    /// The process.
    pub daemon: Daemon,
}

impl Server {
    /// Waits until 9P answers and the NBD socket accepts.
    pub fn wait_ready(&mut self) {
        let (dir, log) = (self.dir.clone(), self.log.clone());
        wait_until("ZeroFS answers", Duration::from_secs(30), || {
            if let Some(status) = self.daemon.0.try_wait().expect("wait") {
                panic!("ZeroFS ended with {status}:\n{}", fs::read_to_string(&log).unwrap_or_default());
            }
            let limit = Duration::from_secs(5);
            ninep::Ninep::open(&dir, limit).is_ok() && sock::connect_within(&dir, NBD_SOCKET, limit).is_ok()
        });
        assert!(dir.join(NINEP_SOCKET).exists(), "the socket is in the run folder");
    }

    /// Its log so far.
    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).expect("log")
    }

    /// SIGTERM, and the exit status.
    pub fn stop(mut self) -> ExitStatus {
        self.daemon.signal(nix::sys::signal::Signal::SIGTERM);
        self.daemon.wait(Duration::from_secs(60))
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.daemon.signal(nix::sys::signal::Signal::SIGKILL);
        self.daemon.wait(Duration::from_secs(10));
    }
}
