//! moto, a stand-in for S3 that keeps everything in memory. By itself it does not make conditional writes atomic: with
//! eight writers and a busy interpreter, two of them won in 3 rounds of 60. `moto_server.py` puts a lock around them.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zerofsctl::password::Secret;
use zerofsctl::settings::{AwsCredentials, S3Settings};
use zerofsctl::zerofs::config::Aws;

use super::http;

/// A running moto server. Dropping it ends it, and everything that was stored in it is gone.
pub struct Moto {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
}

/// Python needs a second or two to load it all; a busy machine with two cores much longer.
const START_LIMIT: Duration = Duration::from_secs(60);
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

impl Moto {
    /// Starts a server on a port of its own choice, with its log in `dir`, and waits until it answers.
    #[track_caller]
    pub fn start(dir: &Path) -> Moto {
        let program = super::tools_dir().join("moto/bin/python3");
        let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/moto_server.py");
        assert!(program.is_file(), "{} is not there; scripts/setup test installs it", program.display());
        let log = dir.join("moto.log");
        let out = File::create(&log).expect("the test's folder can be written");
        let child = Command::new(program)
            .arg(server)
            .args(["-H", "127.0.0.1", "-p", "0"])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a file can be cloned"))
            .stderr(out)
            // So that a ^C at the terminal does not end it before the test has looked around.
            .process_group(0)
            .spawn()
            .expect("moto can be started");
        let mut moto = Moto { child, address: SocketAddr::from(([127, 0, 0, 1], 0)), log };
        moto.wait_ready();
        moto
    }

    fn wait_ready(&mut self) {
        let began = Instant::now();
        loop {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            if let Some(address) = announced(&log) {
                self.address = address;
                if http::request(address, "GET", "/", b"", REQUEST_LIMIT).is_ok() {
                    return;
                }
            }
            let ended = self.child.try_wait().expect("a child can be asked");
            assert!(ended.is_none(), "moto ended at once: {ended:?}\n{log}");
            assert!(began.elapsed() < START_LIMIT, "moto is not ready after {START_LIMIT:?}\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where it listens, always on 127.0.0.1.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What ZeroFS needs to reach it at `endpoint`: its own address, or a proxy's in front of it.
    pub fn access(endpoint: SocketAddr) -> Aws {
        Aws {
            endpoint: Some(format!("http://{endpoint}")),
            region: Some("us-east-1".into()),
            allow_http: Some(true),
            access_key_id: Some("test".into()),
            secret_access_key: Some("test".to_owned().into()),
            session_token: None,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the library needs to reach it.
    pub fn settings(&self) -> S3Settings {
        S3Settings {
            endpoint: Some(format!("http://{}", self.address)),
            region: None,
            allow_http: Some(true),
            credentials: Some(AwsCredentials {
                access_key_id: Secret::new("test".into()),
                secret_access_key: Secret::new("test".into()),
                session_token: None,
            }),
        }
    }

    /// Puts an object.
    #[track_caller]
    pub fn put(&self, bucket: &str, key: &str, body: &[u8]) {
        let answer = http::request(self.address, "PUT", &format!("/{bucket}/{key}"), body, REQUEST_LIMIT)
            .expect("moto answers");
        assert_eq!(answer.status, 200, "{key}: {}", String::from_utf8_lossy(&answer.body));
    }

    /// Begins an upload in parts, which is then left alone.
    #[track_caller]
    pub fn begin_upload(&self, bucket: &str, key: &str) {
        let path = format!("/{bucket}/{key}?uploads");
        let answer = http::request(self.address, "POST", &path, b"", REQUEST_LIMIT).expect("moto answers");
        assert_eq!(answer.status, 200, "{key}: {}", String::from_utf8_lossy(&answer.body));
    }

    /// The text of a plain GET, such as `/vols?uploads`.
    #[track_caller]
    pub fn text(&self, path: &str) -> String {
        let answer = http::request(self.address, "GET", path, b"", REQUEST_LIMIT).expect("moto answers");
        assert_eq!(answer.status, 200, "{path}");
        String::from_utf8(answer.body).expect("UTF-8")
    }

    /// Makes a bucket.
    #[track_caller]
    pub fn create_bucket(&self, name: &str) {
        let answer = http::request(self.address, "PUT", &format!("/{name}"), b"", REQUEST_LIMIT)
            .expect("moto answers");
        assert_eq!(answer.status, 200, "bucket {name}: {}", String::from_utf8_lossy(&answer.body));
    }

    /// The keys of a bucket that begin with `prefix`; at most the 1,000 that one listing holds.
    #[track_caller]
    pub fn keys(&self, bucket: &str, prefix: &str) -> Vec<String> {
        let path = format!("/{bucket}?list-type=2&prefix={prefix}");
        let answer = http::request(self.address, "GET", &path, b"", REQUEST_LIMIT).expect("moto answers");
        let body = String::from_utf8_lossy(&answer.body);
        assert_eq!(answer.status, 200, "listing of {bucket}: {body}");
        assert!(!body.contains("<IsTruncated>true"), "more keys than one listing holds");
        body.split("<Key>")
            .skip(1)
            .filter_map(|rest| rest.split_once("</Key>"))
            .map(|(k, _)| k.into())
            .collect()
    }
}

/// The address in the line that the server prints once it listens.
fn announced(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once("Running on http://")?;
    // Only a whole line: the log may be read while it is being written.
    rest.split_once('\n')?.0.trim().parse().ok()
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It has nothing to save, and its own handling of SIGTERM takes seconds.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
