//! A real Kubernetes control plane, as far as it stores, checks and answers: etcd and kube-apiserver on loopback, with RBAC.
//! No controller runs, so nothing happens that the test does not do.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, Config};
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};

use super::dir::TestDir;
use super::{http, require_program, tools_dir};

/// Its start takes seconds on an idle machine, and minutes on one whose cores all build something.
const START_LIMIT: Duration = Duration::from_secs(300);
const AUDIENCE: &str = "https://kubernetes.default.svc.cluster.local";

/// What stands before the point of a P-256 key in a SubjectPublicKeyInfo.
const SPKI_P256: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// A running control plane. Dropping it ends both processes, and everything that was stored in it is gone.
pub struct Kube {
    etcd: Child,
    server: Child,
    etcd_address: SocketAddr,
    address: SocketAddr,
    admin_token: String,
    /// PKCS#8 of the key that signs the tokens of service accounts.
    key: Vec<u8>,
    runtime: tokio::runtime::Runtime,
    client: Client,
    // After the processes.
    _store: tempfile::TempDir,
    dir: TestDir,
}

impl Kube {
    /// The one that the tests of this process share, for as long as one of them has it.
    #[track_caller]
    pub fn shared() -> Arc<Kube> {
        static SHARED: Mutex<Weak<Kube>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(kube) = shared.upgrade() {
            return kube;
        }
        let kube = Arc::new(Kube::start());
        *shared = Arc::downgrade(&kube);
        kube
    }

    /// Starts one and waits until it is ready.
    #[track_caller]
    pub fn start() -> Kube {
        let _ = rustls::crypto::ring::default_provider().install_default();
        for _ in 0..5 {
            if let Some(kube) = Kube::try_start() {
                return kube;
            }
            // Somebody else took a port in between.
        }
        panic!("no free ports for etcd and kube-apiserver");
    }

    /// None when a port was taken.
    fn try_start() -> Option<Kube> {
        let dir = TestDir::new();
        // In memory where there is such a place: etcd waits for the disk at every write.
        let memory = Path::new("/dev/shm");
        let store = tempfile::Builder::new()
            .prefix("zc-etcd-")
            .tempdir_in(if memory.is_dir() { memory } else { Path::new("/tmp") })
            .expect("a folder for etcd");
        let [client_port, peer_port, port] = free_ports();
        let etcd_address = SocketAddr::from((Ipv4Addr::LOCALHOST, client_port));
        let (client_url, peer_url) =
            (format!("http://{etcd_address}"), format!("http://127.0.0.1:{peer_port}"));
        let mut etcd = Running::start(
            Command::new(require_program("etcd"))
                .args(["--name=default", "--log-outputs=stderr", "--logger=zap", "--snapshot-count=100000"])
                .arg(format!("--data-dir={}", store.path().display()))
                .args([
                    format!("--listen-client-urls={client_url}"),
                    format!("--advertise-client-urls={client_url}"),
                ])
                .args([
                    format!("--listen-peer-urls={peer_url}"),
                    format!("--initial-advertise-peer-urls={peer_url}"),
                ])
                .arg(format!("--initial-cluster=default={peer_url}")),
            &dir.join("etcd.log"),
        );
        etcd.wait("etcd", || {
            http::unsigned(etcd_address, "GET", "/health", b"", Duration::from_secs(5))
                .is_ok_and(|a| a.status == 200 && String::from_utf8_lossy(&a.body).contains("true"))
        })?;

        let random = ring::rand::SystemRandom::new();
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        let key = key.as_ref().to_vec();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key, &random).expect("a key");
        let pem = |what: &str, der: &[u8]| {
            format!("-----BEGIN {what} KEY-----\n{}\n-----END {what} KEY-----\n", STANDARD.encode(der))
        };
        fs::write(dir.join("service-account.key"), pem("PRIVATE", &key)).unwrap();
        let public = [&SPKI_P256[..], ring::signature::KeyPair::public_key(&pair).as_ref()].concat();
        fs::write(dir.join("service-account.pub"), pem("PUBLIC", &public)).unwrap();
        let mut bytes = [0; 24];
        ring::rand::SecureRandom::fill(&random, &mut bytes).expect("random bytes");
        let admin_token = URL_SAFE_NO_PAD.encode(bytes);
        fs::write(dir.join("tokens.csv"), format!("{admin_token},admin,admin,system:masters\n")).unwrap();
        let certificates = dir.join("certificates");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let file = |name: &str| dir.join(name).display().to_string();
        let mut server = Running::start(
            Command::new(apiserver()).args([
                format!("--etcd-servers={client_url}"),
                format!("--secure-port={port}"),
                "--bind-address=127.0.0.1".into(),
                // With no controller there is nobody to reach it by its service.
                "--advertise-address=127.0.0.1".into(),
                "--endpoint-reconciler-type=none".into(),
                // It makes a certificate of its own there.
                format!("--cert-dir={}", certificates.display()),
                "--authorization-mode=RBAC".into(),
                format!("--token-auth-file={}", file("tokens.csv")),
                format!("--service-account-issuer={AUDIENCE}"),
                format!("--service-account-key-file={}", file("service-account.pub")),
                format!("--service-account-signing-key-file={}", file("service-account.key")),
                "--service-cluster-ip-range=10.0.0.0/24".into(),
                // Both wait for controllers that are not there.
                "--disable-admission-plugins=ServiceAccount,StorageObjectInUseProtection".into(),
                // Otherwise it remembers moments that etcd has forgotten, as older servers do not.
                "--feature-gates=ListFromCacheSnapshot=false".into(),
                "--etcd-compaction-interval=0".into(),
                "--profiling=false".into(),
            ]),
            &dir.join("apiserver.log"),
        );
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let mut client = None;
        server.wait("kube-apiserver", || {
            let Ok(ca) = fs::read_to_string(certificates.join("apiserver.crt")) else { return false };
            let text = kubeconfig(address, Some(&ca), "ready", &admin_token);
            runtime.block_on(async {
                let Ok(found) = client_of(&text).await else { return false };
                // The namespace by which a cluster is known is made a moment after it answers.
                let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(found.clone());
                let ready = matches!(
                    tokio::time::timeout(Duration::from_secs(10), api.get_opt("kube-system")).await,
                    Ok(Ok(Some(_)))
                );
                client = Some(found);
                ready
            })
        })?;
        let client = client.expect("it was asked");
        Some(Kube {
            etcd: etcd.keep(),
            server: server.keep(),
            etcd_address,
            address,
            admin_token,
            key,
            runtime,
            client,
            _store: store,
            dir,
        })
    }

    /// Where the API server listens, with TLS.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate that it shows.
    pub fn certificate(&self) -> String {
        fs::read_to_string(self.dir.join("certificates/apiserver.crt")).expect("it was read before")
    }

    /// Who may do everything.
    pub fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// Runs a request of the test's own, as administrator.
    pub fn run<T>(&self, work: impl AsyncFnOnce(Client) -> T) -> T {
        self.runtime.block_on(work(self.client.clone()))
    }

    /// What names the cluster: the UID of the namespace kube-system.
    #[track_caller]
    pub fn identity(&self) -> String {
        let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(self.client.clone());
        self.runtime.block_on(api.get("kube-system")).expect("it is there").metadata.uid.expect("a UID")
    }

    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let (group, version) = match text(&object["apiVersion"]).split_once('/') {
            Some((group, version)) => (group.to_owned(), version.to_owned()),
            None => (String::new(), text(&object["apiVersion"])),
        };
        let kind = GroupVersionKind { group, version, kind: text(&object["kind"]) };
        let resource = ApiResource::from_gvk(&kind);
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// Makes an object, its status too.
    #[track_caller]
    pub fn create(&self, object: &Value) {
        let api = self.api(object);
        let typed: DynamicObject = serde_json::from_value(object.clone()).expect("an object");
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        let made = self.runtime.block_on(async {
            api.create(&PostParams::default(), &typed).await?;
            if object.get("status").is_some() {
                let status = json!({"apiVersion": object["apiVersion"], "kind": object["kind"], "status": object["status"]});
                api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
            }
            Ok::<_, kube::Error>(())
        });
        made.unwrap_or_else(|e| panic!("{object:#}: {e}"));
    }

    /// Server-side apply, as `kubectl apply --server-side`, unknown fields being errors; only on trial with `dry_run`.
    #[track_caller]
    pub fn apply(&self, object: &Value, dry_run: bool) -> Result<(), kube::Error> {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let mut how = PatchParams::apply("zerofsctl-test").validation_strict();
        how.dry_run = dry_run;
        self.runtime.block_on(self.api(object).patch(name, &how, &Patch::Apply(object))).map(|_| ())
    }

    /// Deletes an object that is there.
    #[track_caller]
    pub fn delete(&self, object: &Value) {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let gone = self.runtime.block_on(self.api(object).delete(name, &DeleteParams::default()));
        gone.map(|_| ()).unwrap_or_else(|e| panic!("{object:#}: {e}"));
    }

    /// A token of a service account, by TokenRequest.
    #[track_caller]
    pub fn token(&self, namespace: &str, name: &str) -> String {
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let spec = TokenRequestSpec {
            audiences: vec![AUDIENCE.into()],
            expiration_seconds: Some(3600),
            ..Default::default()
        };
        let request = TokenRequest { spec, ..Default::default() };
        let answer = self.runtime.block_on(api.create_token_request(name, &PostParams::default(), &request));
        answer.expect("a token").status.expect("a token").token
    }

    /// A token of a service account that was good until some minutes ago. Signed with the server's own key, so nothing else is
    /// wrong with it.
    #[track_caller]
    pub fn expired_token(&self, namespace: &str, name: &str) -> String {
        self.token_until(namespace, name, jiff::Timestamp::now().as_second() - 600)
    }

    /// A token of a service account that is good until this second of the epoch. A server takes it for another minute.
    #[track_caller]
    pub fn token_until(&self, namespace: &str, name: &str, end: i64) -> String {
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let account = self.runtime.block_on(api.get(name)).expect("the account is there");
        let claims = json!({
            "iss": AUDIENCE, "aud": [AUDIENCE], "iat": end - 3600, "nbf": end - 3600, "exp": end,
            "sub": format!("system:serviceaccount:{namespace}:{name}"),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": name, "uid": account.metadata.uid.expect("a UID")},
            },
        });
        self.sign(&claims)
    }

    fn sign(&self, claims: &Value) -> String {
        let random = ring::rand::SystemRandom::new();
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.key, &random).expect("our key");
        let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let text = format!("{}.{}", part(&json!({"alg": "ES256", "typ": "JWT"})), part(claims));
        let signature = key.sign(&random, text.as_bytes()).expect("a signature");
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// A kubeconfig in `dir` with one context, `name`, that is also the current one.
    #[track_caller]
    pub fn kubeconfig(&self, dir: &Path, name: &str, token: &str) -> PathBuf {
        self.kubeconfig_at(self.address, dir, name, token)
    }

    /// The same, by way of a proxy that forwards bytes.
    #[track_caller]
    pub fn kubeconfig_at(&self, address: SocketAddr, dir: &Path, name: &str, token: &str) -> PathBuf {
        save(&kubeconfig(address, Some(&self.certificate()), name, token), dir, name)
    }

    /// Forgets all moments of the past, as etcd does every few minutes of a cluster that lives longer than ours.
    #[track_caller]
    pub fn forget_the_past(&self) {
        let ask = |path: &str, body: &Value| {
            let limit = Duration::from_secs(30);
            let answer = http::unsigned(self.etcd_address, "POST", path, body.to_string().as_bytes(), limit)
                .expect("etcd answers");
            assert_eq!(answer.status, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
            serde_json::from_slice::<Value>(&answer.body).expect("JSON")
        };
        // A write first, so that the moment of a list that is being read lies in the past.
        let word = STANDARD.encode("zerofsctl-test");
        let written = ask("/v3/kv/put", &json!({"key": word, "value": word}));
        let now = written["header"]["revision"].clone();
        ask("/v3/kv/compaction", &json!({"revision": now, "physical": true}));
    }
}

impl Drop for Kube {
    fn drop(&mut self) {
        // Neither has anything to save.
        for child in [&mut self.server, &mut self.etcd] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A kubeconfig for a plain HTTP server: a test's own, in the place of an API server.
#[track_caller]
pub fn plain_kubeconfig(address: SocketAddr, dir: &Path, name: &str) -> PathBuf {
    save(&kubeconfig(address, None, name, "none"), dir, name)
}

/// The client's configuration of a kubeconfig.
pub async fn config_of(text: &str) -> Result<Config, String> {
    let parsed = Kubeconfig::from_yaml(text).map_err(|e| e.to_string())?;
    Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await.map_err(|e| e.to_string())
}

async fn client_of(text: &str) -> Result<Client, String> {
    Client::try_from(config_of(text).await?).map_err(|e| e.to_string())
}

fn kubeconfig(address: SocketAddr, ca: Option<&str>, name: &str, token: &str) -> String {
    let cluster = match ca {
        Some(ca) => json!({
            "server": format!("https://{address}"),
            "certificate-authority-data": STANDARD.encode(ca),
        }),
        None => json!({"server": format!("http://{address}")}),
    };
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": name,
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
    });
    config.to_string()
}

fn save(text: &str, dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(format!("{name}.kubeconfig"));
    fs::write(&path, text).expect("the test's folder can be written");
    path
}

fn apiserver() -> PathBuf {
    let module = include_str!("../k8s/go.mod");
    let version = module.split("k8s.io/kubernetes v").nth(1).and_then(|rest| rest.split_whitespace().next());
    let version = version.expect("go.mod names a version");
    let program = tools_dir().join(format!("kube-apiserver-{version}/kube-apiserver"));
    assert!(program.is_file(), "{} is not there; scripts/setup k8s builds it", program.display());
    program
}

/// Ports that nobody has now.
fn free_ports<const N: usize>() -> [u16; N] {
    let held = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port"));
    held.map(|listener| listener.local_addr().expect("a bound socket has an address").port())
}

/// A server on its way; it is ended unless it is kept.
struct Running {
    child: Option<Child>,
    log: PathBuf,
}

impl Running {
    #[track_caller]
    fn start(command: &mut Command, log: &Path) -> Running {
        let out = File::create(log).expect("the test's folder can be written");
        let child = command
            .current_dir("/")
            .env_clear()
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a file can be cloned"))
            .stderr(out)
            // So that a ^C at the terminal does not end it before the test has looked around.
            .process_group(0)
            .spawn()
            .expect("a server can be started");
        Running { child: Some(child), log: log.to_owned() }
    }

    /// Until it is ready; none when another program has its port.
    #[track_caller]
    fn wait(&mut self, what: &str, mut ready: impl FnMut() -> bool) -> Option<()> {
        let began = Instant::now();
        loop {
            let child = self.child.as_mut().expect("it is on its way");
            if let Some(status) = child.try_wait().expect("a child can be asked") {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                assert!(
                    log.contains("address already in use"),
                    "{what} ended with {status}:\n{}",
                    tail(&log)
                );
                return None;
            }
            if ready() {
                return Some(());
            }
            if began.elapsed() > START_LIMIT {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                panic!("{what} is not ready after {START_LIMIT:?}:\n{}", tail(&log));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn keep(mut self) -> Child {
        self.child.take().expect("it is on its way")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
