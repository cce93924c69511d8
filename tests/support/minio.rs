//! A real MinIO, for what a stand-in cannot show. `scripts/setup bench` builds it.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::client::HttpRequestBody;
use zerofsctl::password::Secret;
use zerofsctl::settings::{AwsCredentials, S3Settings};

use super::http::{self, Answer};

/// A running server. Dropping it ends it; what was stored stays in its folder.
pub struct Minio {
    child: Child,
    address: SocketAddr,
}

const START_LIMIT: Duration = Duration::from_secs(15);
/// Long, since an archive of thousands of objects is unpacked within one request.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);
/// MinIO wants at least 3 and 8 characters.
pub const ACCESS_KEY: &str = "test";
/// See [`ACCESS_KEY`].
pub const SECRET_KEY: &str = "test-test-test";

/// The program; fails when it is not installed.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    let tools = super::tools_dir();
    let found = fs::read_dir(&tools)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&format!("{name}-")))
        .map(|e| e.path().join(name))
        .find(|program| program.is_file());
    found.unwrap_or_else(|| panic!("{name} is not in {}; scripts/setup bench installs it", tools.display()))
}

impl Minio {
    /// Starts a server on a free port, with its data in `dir/data` and its log beside, and waits until it answers.
    #[track_caller]
    pub fn start(dir: &Path) -> Minio {
        let program = program("minio");
        let log = dir.join("minio.log");
        // Another program may take the port before MinIO does; then another port is tried.
        for _ in 0..5 {
            let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
            let address = free.expect("there is a free port");
            let out = File::create(&log).expect("the test's folder can be written");
            let child = Command::new(&program)
                .args(["server", "--quiet", "--address", &address.to_string()])
                .arg(dir.join("data"))
                .env_clear()
                .env("HOME", dir)
                .env("MINIO_ROOT_USER", ACCESS_KEY)
                .env("MINIO_ROOT_PASSWORD", SECRET_KEY)
                .env("MINIO_BROWSER", "off")
                .env("MINIO_UPDATE", "off")
                // A folder on the disk of the system is good enough.
                .env("MINIO_CI_CD", "on")
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(out.try_clone().expect("a file can be cloned"))
                .stderr(out)
                .process_group(0)
                .spawn()
                .expect("minio can be started");
            let mut minio = Minio { child, address };
            if minio.wait_ready(&log) {
                return minio;
            }
        }
        panic!("minio does not start: {}", fs::read_to_string(&log).unwrap_or_default());
    }

    /// False if it ended.
    #[track_caller]
    fn wait_ready(&mut self, log: &Path) -> bool {
        let began = Instant::now();
        loop {
            // Signed, since it is alive a moment before it knows its own users.
            let answer = self.request("GET", "/", &[], b"");
            if answer.as_ref().is_ok_and(|a| a.status == 200) {
                return true;
            }
            if self.child.try_wait().expect("a child can be asked").is_some() {
                return false;
            }
            let said = || fs::read_to_string(log).unwrap_or_default();
            let answer = answer.map(|a| (a.status, String::from_utf8_lossy(&a.body).into_owned()));
            assert!(
                began.elapsed() < START_LIMIT,
                "minio is not ready after {START_LIMIT:?}: {answer:?}\n{}",
                said()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Where it listens, always on 127.0.0.1.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the library needs to reach it.
    pub fn settings(&self) -> S3Settings {
        settings(self.address)
    }

    /// Sends one signed request.
    ///
    /// # Errors
    /// What the connection says.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<Answer> {
        let mut request =
            hyper::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(HttpRequestBody::from(body.to_vec())).expect("a plain request");
        let host = self.address.to_string();
        request.headers_mut().insert("host", host.parse().expect("an address is a header"));
        let credential =
            AwsCredential { key_id: ACCESS_KEY.into(), secret_key: SECRET_KEY.into(), token: None };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authorizer = AwsAuthorizer::new(&credential, "s3", "us-east-1");
        authorizer.try_authorize(&mut request, None).expect("a plain request can be signed");
        let mut head = String::new();
        for (name, value) in request.headers().iter().filter(|(name, _)| *name != "host") {
            head += &format!("{name}: {}\r\n", value.to_str().expect("headers are text"));
        }
        http::signed(self.address, method, path, &head, body, REQUEST_LIMIT)
    }

    /// The text of the answer to a request that must succeed.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> String {
        let answer = self.request(method, path, headers, body).expect("minio answers");
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert!((200..300).contains(&answer.status), "{method} {path}: {} {text}", answer.status);
        text
    }

    /// Whether a bucket keeps old versions from here on.
    #[track_caller]
    pub fn set_versioning(&self, bucket: &str, status: &str) {
        let text = format!("<VersioningConfiguration><Status>{status}</Status></VersioningConfiguration>");
        self.ask("PUT", &format!("/{bucket}?versioning"), &[], text.as_bytes());
    }

    /// Puts many small objects by one request: MinIO unpacks the archive.
    #[track_caller]
    pub fn put_many<'a>(&self, bucket: &str, objects: impl IntoIterator<Item = (&'a str, &'a [u8])>) {
        let mut archive = Vec::new();
        for (key, body) in objects {
            archive.extend(tar_head(key, body.len()));
            archive.extend(body);
            archive.resize(archive.len().next_multiple_of(512), 0);
        }
        archive.resize(archive.len() + 1024, 0);
        let extract = [("x-amz-meta-snowball-auto-extract", "true")];
        self.ask("PUT", &format!("/{bucket}/archive.tar"), &extract, &archive);
    }
}

/// What the library needs to reach a server at `address` with MinIO's credentials: its own, or a proxy's in front of it.
pub fn settings(address: SocketAddr) -> S3Settings {
    S3Settings {
        endpoint: Some(format!("http://{address}")),
        region: None,
        allow_http: Some(true),
        credentials: Some(AwsCredentials {
            access_key_id: Secret::new(ACCESS_KEY.into()),
            secret_access_key: Secret::new(SECRET_KEY.into()),
            session_token: None,
        }),
    }
}

/// The 512 bytes before a file in a tar archive (ustar). Without a time, so that MinIO takes its own.
fn tar_head(name: &str, size: usize) -> [u8; 512] {
    assert!(name.len() <= 100, "{name} is too long for a plain archive");
    let mut head = [0; 512];
    let mut set = |at: usize, text: &str| head[at..at + text.len()].copy_from_slice(text.as_bytes());
    set(0, name);
    set(100, "0000644\0");
    set(108, "0000000\0");
    set(116, "0000000\0");
    set(124, &format!("{size:011o}\0"));
    set(136, "00000000000\0");
    set(148, "        ");
    set(156, "0");
    set(257, "ustar\x0000");
    let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    head
}

impl Drop for Minio {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
