//! The operator's settings: `--config`, `--secret`, and secrets from the environment.
//!
//! `--config FILE` holds the ConfigMap keys of existing zerofs-csi-driver installations, as a plain YAML map or as
//! Kubernetes manifests (several documents; a `List` too). Secrets come as Secret manifests, in the same file or
//! by `--secret FILE`, under the names that the ConfigMap gives; or from the environment. Never from an
//! argument.
//!
//! Where the same thing is given twice, the more deliberate one wins:
//! - storage URL: `--storage-url`, then `storageURL`;
//! - encryption password: the Secret named by `encryptionPasswordSecretName`, then `ZEROFS_ENCRYPTION_PASSWORD` or
//!   `ZEROFS_ENCRYPTION_PASSWORD_FILE` (both is an error);
//! - AWS credentials: the Secret named by `awsCredentialsSecretName`, then `AWS_ACCESS_KEY_ID`,
//!   `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`, always all from one place; then the node's role.
//!
//! An empty value counts as unset. What is wrong is an error that names the key, never a secret; so this module
//! builds its own tree from the YAML, and tells only the place of a syntax error.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use zeroize::Zeroizing;

use crate::catalog::StorageUrl;
use crate::error::{Doing, Error, Kind, Result};
use crate::password::{self, Secret};
use crate::quantity::Quantity;

mod tuned;

pub use tuned::{MUTABLE_KEYS, check_object_name, check_tuning};

/// No settings file is larger; nor is what its aliases expand to, four times over.
const MAX_BYTES: usize = 1 << 20;

/// Everything that the operator can set, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the volumes live; none for the embedded store.
    pub storage_url: Option<StorageUrl>,
    /// The encryption password; none if nobody gave one.
    pub encryption_password: Option<Secret>,
    /// How to reach S3.
    pub s3: S3Settings,
    /// ZeroFS's cache.
    pub cache: CacheSettings,
    /// ZeroFS's storage engine; none means its version's default.
    pub lsm: LsmSettings,
    /// The largest sum of file sizes that ZeroFS takes, in decimal GB; none means from the volume's size.
    pub filesystem_max_size_gb: Option<f64>,
    /// ZeroFS's log filter (`RUST_LOG`); none means info levels.
    pub rust_log: Option<String>,
    /// Limits of the ZeroFS process or pod.
    pub resources: ResourceSettings,
    /// How long a volume that is deleted with its data can be restored, where its StorageClass does not say; none: not at all.
    pub delete_grace: Option<Duration>,
    /// What only pods need.
    pub pod: PodSettings,
}

/// How to reach S3.
#[derive(Debug, Clone, Default)]
pub struct S3Settings {
    /// `http(s)://host[:port]` without a slash at the end; none for AWS.
    pub endpoint: Option<String>,
    /// The region; none for us-east-1.
    pub region: Option<String>,
    /// Whether plain HTTP is allowed; unset is no.
    pub allow_http: Option<bool>,
    /// The keys; none for the node's role.
    pub credentials: Option<AwsCredentials>,
}

/// AWS keys. The key id is not secret, but nobody needs to see it either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsCredentials {
    /// AWS_ACCESS_KEY_ID
    pub access_key_id: Secret,
    /// AWS_SECRET_ACCESS_KEY
    pub secret_access_key: Secret,
    /// AWS_SESSION_TOKEN
    pub session_token: Option<Secret>,
}

/// ZeroFS's cache.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CacheSettings {
    /// An absolute folder; none for one of the volume's own under the state root.
    pub dir: Option<PathBuf>,
    /// On disk, in decimal GB.
    pub disk_gb: Option<f64>,
    /// In memory, in decimal GB.
    pub memory_gb: Option<f64>,
}

/// ZeroFS's storage engine.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LsmSettings {
    /// SSTs on level 0.
    pub l0_max_ssts: Option<u64>,
    /// Unflushed data, in decimal GB.
    pub max_unflushed_gb: Option<f64>,
    /// Compactions at once.
    pub max_concurrent_compactions: Option<u64>,
    /// Seconds between flushes, at least 5.
    pub flush_interval_secs: Option<u64>,
}

/// Limits of the ZeroFS process or pod. CPU in cores, memory in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ResourceSettings {
    /// cpuRequest
    pub cpu_request: Option<Quantity>,
    /// cpuLimit
    pub cpu_limit: Option<Quantity>,
    /// memoryRequest
    pub memory_request: Option<Quantity>,
    /// memoryLimit
    pub memory_limit: Option<Quantity>,
}

/// What only pods need.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSettings {
    /// The ZeroFS image; none for the pinned default.
    pub zerofs_image: Option<String>,
    /// How long a pod may take to become ready.
    pub ready_timeout: Duration,
    /// Whether an Envoy sidecar is wanted.
    pub envoy_enabled: bool,
    /// Its image; none for the default.
    pub envoy_image: Option<String>,
    /// The ConfigMap with its configuration; none for `envoy-config`.
    pub envoy_config_map: Option<String>,
}

/// The type of a key's value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Text,
    Bool,
    Number,
}

/// The ConfigMap keys; their names are a contract.
const KEYS: [(&str, Type); 25] = [
    ("zerofsImage", Type::Text),
    ("storageURL", Type::Text),
    ("encryptionPasswordSecretName", Type::Text),
    ("awsCredentialsSecretName", Type::Text),
    ("awsEndpoint", Type::Text),
    ("awsDefaultRegion", Type::Text),
    ("awsAllowHTTP", Type::Bool),
    ("cacheDir", Type::Text),
    ("cacheDiskSizeGB", Type::Number),
    ("cacheMemorySizeGB", Type::Number),
    ("lsmL0MaxSsts", Type::Number),
    ("lsmMaxUnflushedGB", Type::Number),
    ("lsmMaxConcurrentCompactions", Type::Number),
    ("lsmFlushIntervalSecs", Type::Number),
    ("filesystemMaxSizeGB", Type::Number),
    ("rustLog", Type::Text),
    ("deleteDataGracePeriod", Type::Text),
    ("podReadyTimeoutSeconds", Type::Number),
    ("cpuRequest", Type::Number),
    ("cpuLimit", Type::Number),
    ("memoryRequest", Type::Number),
    ("memoryLimit", Type::Number),
    ("envoyEnabled", Type::Bool),
    ("envoyImage", Type::Text),
    ("envoyConfigMapRef", Type::Text),
];

/// Where settings come from.
pub struct Sources<'a> {
    /// `--config`
    pub config: Option<&'a Path>,
    /// `--secret`, any number
    pub secrets: &'a [PathBuf],
    /// `--storage-url`
    pub storage_url: Option<StorageUrl>,
    /// The environment: passed in, since a library must not read its host's.
    pub env: &'a dyn Fn(&str) -> Option<OsString>,
}

/// Reads and checks all settings. The texts are warnings for the operator.
pub fn load(sources: &Sources<'_>) -> Result<(Settings, Vec<String>)> {
    let mut documents = Documents::default();
    if let Some(path) = sources.config {
        documents.add_file(path, true)?;
    }
    for path in sources.secrets {
        // One file with everything in it may be given as both.
        if sources.config != Some(path.as_path()) {
            documents.add_file(path, false)?;
        }
    }
    documents.settings(sources.storage_url.clone(), sources.env)
}

/// Settings documents as they were read, before they mean anything.
#[derive(Default)]
pub struct Documents {
    /// The ConfigMap's values and where they were found.
    config: Option<(BTreeMap<&'static str, String>, String)>,
    secrets: BTreeMap<String, BTreeMap<String, Secret>>,
    warnings: Vec<String>,
}

impl Documents {
    /// Adds a file; `config` tells whether a ConfigMap may be in it.
    pub fn add_file(&mut self, path: &Path, config: bool) -> Result<()> {
        let origin = path.display().to_string();
        let file = OpenOptions::new().read(true).open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::usage(format!("there is no file {origin}")).hint("check --config and --secret")
            }
            _ => Err::<(), _>(e).doing("open", path).expect_err("it was an error"),
        })?;
        let meta = file.metadata().doing("examine", path)?;
        if meta.is_dir() {
            return Err(Error::usage(format!("{origin} is a folder"))
                .hint("give a file with settings to --config and --secret"));
        }
        let text = read_text(file, &origin)?;
        let had = self.secrets.len();
        self.add_text(&text, &origin, config)?;
        if self.secrets.len() > had && meta.is_file() && meta.mode() & 0o077 != 0 {
            self.warnings.push(others_may_read(path, meta.mode()));
        }
        Ok(())
    }

    /// Adds the documents of a YAML text; `origin` names it in errors.
    pub fn add_text(&mut self, text: &str, origin: &str, config: bool) -> Result<()> {
        check_depth(text).map_err(|e| e.context(origin))?;
        for document in serde_yaml::Deserializer::from_str(text) {
            let reader = NodeReader::default();
            let node = reader.read(document).map_err(|e| e.context(origin))?;
            self.add_document(node, origin, config)?;
        }
        Ok(())
    }

    fn add_document(&mut self, node: Node, origin: &str, config: bool) -> Result<()> {
        let fields = match node {
            Node::Null => return Ok(()),
            Node::Map(fields) => fields,
            other => {
                return Err(Error::usage(format!(
                    "{origin}: a document is {}, not a map of keys",
                    other.what()
                ))
                .hint("write lines such as storageURL: s3://BUCKET, or a ConfigMap manifest"));
            }
        };
        let kind = match fields.iter().find(|(key, _)| key == "kind").map(|(_, v)| v) {
            None => {
                if !config {
                    return Err(Error::usage(format!("{origin}: a document is not a Kubernetes manifest"))
                        .hint("give --secret a manifest with kind: Secret, metadata.name, and data or stringData"));
                }
                return self.add_config(fields, origin, false);
            }
            Some(Node::Text(kind)) => kind.to_string(),
            Some(_) => {
                return Err(Error::usage(format!("{origin}: the kind of a manifest is not a text"))
                    .hint("write kind: ConfigMap or kind: Secret"));
            }
        };
        match kind.as_str() {
            "ConfigMap" if config => self.add_config_map(fields, origin),
            "ConfigMap" => Err(Error::usage(format!("{origin}: a ConfigMap was given to --secret"))
                .hint("give it to --config")),
            "Secret" => self.add_secret(fields, origin),
            "List" => {
                for (key, value) in fields {
                    if let ("items", Node::List(items)) = (key.as_str(), value) {
                        for item in items {
                            self.add_document(item, origin, config)?;
                        }
                    }
                }
                Ok(())
            }
            _ => {
                self.warnings.push(format!(
                    "{origin}: a {} manifest is not for zerofsctl and was left out",
                    shown(&kind)
                ));
                Ok(())
            }
        }
    }

    fn add_config_map(&mut self, fields: Fields, origin: &str) -> Result<()> {
        let mut data = Vec::new();
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("apiVersion" | "kind" | "metadata" | "immutable", _) => {}
                ("data", Node::Map(map)) => data = map,
                ("data" | "binaryData", Node::Null) => {}
                ("data", other) => {
                    return Err(Error::usage(format!("{origin}: data of the ConfigMap is {}", other.what()))
                        .hint("write the keys indented below data:"));
                }
                (key, _) => {
                    return Err(Error::usage(format!(
                        "{origin}: a ConfigMap has no usable field {:?}",
                        shown(key)
                    ))
                    .hint("put the settings under data:"));
                }
            }
        }
        self.add_config(data, origin, true)
    }

    fn add_config(&mut self, fields: Fields, origin: &str, manifest: bool) -> Result<()> {
        if let Some((_, first)) = &self.config {
            return Err(Error::usage(format!("there are two sets of settings, in {first} and in {origin}"))
                .hint("leave one ConfigMap, or one plain map, in --config"));
        }
        let mut config = BTreeMap::new();
        for (name, value) in fields {
            let (key, kind) = known_key(&name).map_err(|e| e.context(origin))?;
            let wrong = |why: String| Error::usage(format!("{origin}: {key} {why}"));
            let text = match (value, kind) {
                (Node::Null, _) => continue,
                (Node::Text(text), _) => text.to_string(),
                (other @ (Node::List(_) | Node::Map(_)), _) => {
                    return Err(wrong(format!("is {}, not one value", other.what()))
                        .hint(format!("write {key}: \"…\"")));
                }
                (other, _) if manifest => {
                    return Err(wrong(format!("is {}, but a ConfigMap takes only texts", other.what()))
                        .hint(format!("put it in quotes: {key}: \"…\"")));
                }
                (Node::Bool(value), Type::Bool) => value.to_string(),
                (Node::Number(text), Type::Number) => text,
                (other, _) => {
                    return Err(wrong(format!(
                        "is {}, not {}",
                        other.what(),
                        match kind {
                            Type::Bool => "true or false",
                            Type::Number => "a number",
                            // 1.10 without quotes is the number 1.1: guessing would change it.
                            Type::Text => "a text",
                        }
                    ))
                    .hint(format!("put it in quotes: {key}: \"…\"")));
                }
            };
            if !text.is_empty() {
                config.insert(key, text);
            }
        }
        self.config = Some((config, origin.to_owned()));
        Ok(())
    }

    fn add_secret(&mut self, fields: Fields, origin: &str) -> Result<()> {
        let mut name = None;
        let (mut data, mut string_data) = (Vec::new(), Vec::new());
        for (key, value) in fields {
            match (key.as_str(), value) {
                ("metadata", Node::Map(meta)) => {
                    name = meta.into_iter().find_map(|(key, value)| match (key.as_str(), value) {
                        ("name", Node::Text(name)) => Some(name.to_string()),
                        _ => None,
                    });
                }
                ("data", Node::Map(map)) => data = map,
                ("stringData", Node::Map(map)) => string_data = map,
                ("apiVersion" | "kind" | "type" | "immutable", _) | ("data" | "stringData", Node::Null) => {}
                _ => {
                    // Not repeated: with broken indentation a secret may stand in a key's place.
                    return Err(Error::usage(format!("{origin}: a Secret has a field that is not known, or not a map"))
                        .hint("a Secret has apiVersion, kind, metadata, type, and data or stringData with keys below"));
                }
            }
        }
        let name = name.filter(|name| is_object_name(name)).ok_or_else(|| {
            Error::usage(format!("{origin}: a Secret has no valid metadata.name")).hint(
                "the ConfigMap keys encryptionPasswordSecretName and awsCredentialsSecretName refer to it",
            )
        })?;
        let mut values = BTreeMap::new();
        // stringData comes second and wins, as in Kubernetes.
        for (encoded, map) in [(true, data), (false, string_data)] {
            for (key, value) in map {
                let at = if is_secret_key(&key) { format!("key {key}") } else { "a key".to_owned() };
                let wrong = |why: &str| Error::usage(format!("{origin}: Secret {name}: {at} {why}"));
                let Node::Text(text) = value else {
                    return Err(wrong("is not a text").hint("put its value in quotes"));
                };
                let mut text = if encoded {
                    base64(&text).ok_or_else(|| {
                        wrong("is not valid base64")
                            .hint("encode it (base64 -w0), or write it under stringData: as it is")
                    })?
                } else {
                    text
                };
                if text.ends_with('\n') {
                    // The work of `echo … | base64`; as part of a key or password it has never worked.
                    let kept = text.trim_end_matches('\n').trim_end_matches('\r').len();
                    text.truncate(kept);
                    self.warnings.push(format!(
                        "{origin}: Secret {name}: {at} ends with a line break, which was left out"
                    ));
                }
                values.insert(key, Secret::new(text.to_string()));
            }
        }
        if self.secrets.insert(name.clone(), values).is_some() {
            return Err(Error::usage(format!("{origin}: there are two Secrets with the name {name}"))
                .hint("leave one of them"));
        }
        Ok(())
    }

    /// Checks everything and looks the secrets up.
    pub fn settings(
        mut self,
        storage_url: Option<StorageUrl>,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<(Settings, Vec<String>)> {
        let (config, origin) = self.config.take().unwrap_or_default();
        let c = Config { map: &config, origin: &origin };
        let storage_url = match storage_url {
            Some(url) => Some(url),
            None => c.parse("storageURL", |text| text.parse())?,
        };
        let s3 = storage_url.as_ref().is_some_and(StorageUrl::is_s3);
        let password_secret = c.object_name("encryptionPasswordSecretName")?;
        let aws_secret = c.object_name("awsCredentialsSecretName")?;
        for name in self.secrets.keys() {
            if Some(name) != password_secret.as_ref() && Some(name) != aws_secret.as_ref() {
                self.warnings.push(format!(
                    "Secret {name} is not used: neither encryptionPasswordSecretName nor awsCredentialsSecretName names it"
                ));
            }
        }
        let encryption_password = self.encryption_password(password_secret.as_deref(), env)?;
        let credentials = self.credentials(aws_secret.as_deref(), env, s3)?;
        let allow_http = c.boolean("awsAllowHTTP")?;
        let endpoint = c.parse("awsEndpoint", check_endpoint)?;
        if s3 && endpoint.as_ref().is_some_and(|e| e.starts_with("http://")) && allow_http != Some(true) {
            return Err(c
                .wrong("awsEndpoint", "is http://, but awsAllowHTTP is not \"true\"")
                .hint("use https://, or set awsAllowHTTP: \"true\""));
        }
        let resources = c.resources()?;
        c.check_resources(&resources)?;
        let settings = Settings {
            encryption_password,
            s3: S3Settings {
                endpoint,
                region: c.parse("awsDefaultRegion", check_region)?,
                allow_http,
                credentials,
            },
            cache: CacheSettings {
                dir: c.parse("cacheDir", check_folder)?,
                disk_gb: c.gigabytes("cacheDiskSizeGB")?,
                memory_gb: c.gigabytes("cacheMemorySizeGB")?,
            },
            lsm: LsmSettings {
                l0_max_ssts: c.integer("lsmL0MaxSsts", 1, 1_000_000_000)?,
                max_unflushed_gb: c.gigabytes("lsmMaxUnflushedGB")?,
                max_concurrent_compactions: c.integer("lsmMaxConcurrentCompactions", 1, 1024)?,
                flush_interval_secs: c.integer("lsmFlushIntervalSecs", 5, 86_400)?,
            },
            filesystem_max_size_gb: c.gigabytes("filesystemMaxSizeGB")?,
            rust_log: c.parse("rustLog", check_log_filter)?,
            resources,
            delete_grace: c.parse("deleteDataGracePeriod", grace_period)?,
            pod: PodSettings {
                zerofs_image: c.parse("zerofsImage", check_image)?,
                ready_timeout: Duration::from_secs(
                    c.integer("podReadyTimeoutSeconds", 1, 86_400)?.unwrap_or(120),
                ),
                envoy_enabled: c.boolean("envoyEnabled")?.unwrap_or(false),
                envoy_image: c.parse("envoyImage", check_image)?,
                envoy_config_map: c.object_name("envoyConfigMapRef")?,
            },
            storage_url,
        };
        Ok((settings, self.warnings))
    }

    fn encryption_password(
        &mut self,
        secret: Option<&str>,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Option<Secret>> {
        const VAR: &str = "ZEROFS_ENCRYPTION_PASSWORD";
        const FILE: &str = "ZEROFS_ENCRYPTION_PASSWORD_FILE";
        let from = |place: String| {
            move |e: Error| {
                let hint = e.hint_text().unwrap_or_default().to_owned();
                e.context(place).hint(hint)
            }
        };
        if let Some((name, values)) = secret.and_then(|name| self.secrets.get_key_value(name)) {
            let found = values.get("password").ok_or_else(|| {
                Error::usage(format!("Secret {name} has no key password"))
                    .hint("put the encryption password there")
            })?;
            password::check_strength(found).map_err(from(format!("Secret {name}")))?;
            return Ok(Some(found.clone()));
        }
        let file = env(FILE).filter(|v| !v.is_empty());
        if let Some(found) = variable(env, VAR)? {
            if file.is_some() {
                return Err(Error::usage(format!("both {VAR} and {FILE} are set")).hint("unset one of them"));
            }
            password::check_strength(&found).map_err(from(VAR.to_owned()))?;
            return Ok(Some(found));
        }
        if let Some(path) = file {
            let path = PathBuf::from(path);
            let file = File::open(&path)
                .doing(&format!("open the {FILE}"), &path)
                .map_err(|e| e.hint(format!("check {FILE}")))?;
            let meta = file.metadata().doing("examine", &path)?;
            if meta.is_file() && meta.mode() & 0o077 != 0 {
                self.warnings.push(others_may_read(&path, meta.mode()));
            }
            let found = password::read_line(file).doing("read", &path)?.ok_or_else(|| {
                Error::usage(format!("{} holds no password", path.display()))
                    .hint(format!("{FILE} must name a text file with the password in it"))
            })?;
            password::check_strength(&found).map_err(from(path.display().to_string()))?;
            return Ok(Some(found));
        }
        match secret {
            Some(name) => Err(Error::usage(format!(
                "encryptionPasswordSecretName names the Secret {name}, which was not given"
            ))
            .hint(format!("give its manifest by --secret FILE, or the password by {FILE} or {VAR}"))),
            None => Ok(None),
        }
    }

    fn credentials(
        &self,
        secret: Option<&str>,
        env: &dyn Fn(&str) -> Option<OsString>,
        needed: bool,
    ) -> Result<Option<AwsCredentials>> {
        if let Some((name, values)) = secret.and_then(|name| self.secrets.get_key_value(name)) {
            let pick = |first: &str, second: &str| {
                let found =
                    values.get(first).or_else(|| values.get(second)).filter(|v| !v.expose().is_empty());
                found.cloned().ok_or_else(|| {
                    Error::usage(format!("Secret {name} has neither key {first} nor {second}"))
                        .hint(format!("put {first} there"))
                })
            };
            let found = AwsCredentials {
                access_key_id: pick("AWS_ACCESS_KEY_ID", "username")?,
                secret_access_key: pick("AWS_SECRET_ACCESS_KEY", "password")?,
                session_token: values.get("AWS_SESSION_TOKEN").filter(|v| !v.expose().is_empty()).cloned(),
            };
            found.check(&format!("Secret {name}"))?;
            return Ok(Some(found));
        }
        if !needed {
            // What a shell happens to hold does not matter to a store that is not in S3.
            return Ok(None);
        }
        match (variable(env, "AWS_ACCESS_KEY_ID")?, variable(env, "AWS_SECRET_ACCESS_KEY")?) {
            (Some(access_key_id), Some(secret_access_key)) => {
                let session_token = variable(env, "AWS_SESSION_TOKEN")?;
                let found = AwsCredentials { access_key_id, secret_access_key, session_token };
                found.check("the environment")?;
                Ok(Some(found))
            }
            (Some(_), None) => Err(Error::usage("AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not").hint("set both")),
            (None, Some(_)) => Err(Error::usage("AWS_SECRET_ACCESS_KEY is set, but AWS_ACCESS_KEY_ID is not").hint("set both")),
            (None, None) => match secret {
                Some(name) => Err(Error::usage(format!(
                    "awsCredentialsSecretName names the Secret {name}, which was not given"
                ))
                .hint("give its manifest by --secret FILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment")),
                None => Ok(None),
            },
        }
    }
}

impl AwsCredentials {
    fn check(&self, place: &str) -> Result<()> {
        let plain = |s: &Secret| s.expose().bytes().all(|b| b.is_ascii_graphic());
        for (name, value) in [
            ("access key id", Some(&self.access_key_id)),
            ("secret access key", Some(&self.secret_access_key)),
            ("session token", self.session_token.as_ref()),
        ] {
            if value.is_some_and(|value| !plain(value)) {
                return Err(Error::usage(format!(
                    "{place}: the AWS {name} contains a blank or control character"
                ))
                .hint("copy it again, without line breaks"));
            }
        }
        Ok(())
    }
}

/// The ConfigMap's values, read by key.
struct Config<'a> {
    map: &'a BTreeMap<&'static str, String>,
    origin: &'a str,
}

impl Config<'_> {
    fn wrong(&self, key: &str, why: &str) -> Error {
        Error::usage(format!("{}: {key} {why}", self.origin))
    }

    fn parse<T>(&self, key: &str, parse: impl FnOnce(&str) -> Result<T>) -> Result<Option<T>> {
        debug_assert!(KEYS.iter().any(|(k, _)| *k == key), "{key}");
        let Some(text) = self.map.get(key) else { return Ok(None) };
        parse(text).map(Some).map_err(|e| e.context(key).context(self.origin))
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>> {
        // What Go's ParseBool takes, since the driver that operators come from is written in Go.
        self.parse(key, |text| match text {
            "true" | "True" | "TRUE" | "t" | "T" | "1" => Ok(true),
            "false" | "False" | "FALSE" | "f" | "F" | "0" => Ok(false),
            _ => Err(Error::usage(format!("\"{}\" is not true or false", shown(text)))
                .hint(format!("write {key}: \"true\""))),
        })
    }

    fn integer(&self, key: &str, min: u64, max: u64) -> Result<Option<u64>> {
        self.parse(key, |text| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            match text.parse::<u64>() {
                Ok(n) if digits && (min..=max).contains(&n) => Ok(n),
                _ => Err(Error::usage(format!(
                    "\"{}\" is not a whole number from {min} to {max}",
                    shown(text)
                ))
                .hint(format!("write {key}: \"{}\"", min.max(16).min(max)))),
            }
        })
    }

    fn gigabytes(&self, key: &str) -> Result<Option<f64>> {
        self.parse(key, |text| {
            let digits = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
            match text.parse::<f64>() {
                Ok(n) if digits && n > 0.0 && n <= 1e9 => Ok(n),
                _ => Err(Error::usage(format!("\"{}\" is not a number of gigabytes above 0", shown(text)))
                    .hint(format!("write {key}: \"1.5\", in units of 1,000,000,000 bytes"))),
            }
        })
    }

    fn resources(&self) -> Result<ResourceSettings> {
        let quantity = |key| self.parse(key, |text| text.parse::<Quantity>());
        Ok(ResourceSettings {
            cpu_request: quantity("cpuRequest")?,
            cpu_limit: quantity("cpuLimit")?,
            memory_request: quantity("memoryRequest")?,
            memory_limit: quantity("memoryLimit")?,
        })
    }

    fn check_resources(&self, resources: &ResourceSettings) -> Result<()> {
        for (request, limit, key) in [
            (&resources.cpu_request, &resources.cpu_limit, "cpuLimit"),
            (&resources.memory_request, &resources.memory_limit, "memoryLimit"),
        ] {
            if let (Some(request), Some(limit)) = (request, limit)
                && request > limit
            {
                return Err(self
                    .wrong(key, &format!("is {limit}, less than what is requested ({request})"))
                    .hint("raise the limit or lower the request"));
            }
        }
        for (limit, key) in [(&resources.cpu_limit, "cpuLimit"), (&resources.memory_limit, "memoryLimit")] {
            if limit.as_ref().is_some_and(|limit| limit.nanos() == 0) {
                return Err(self.wrong(key, "is zero").hint(format!("leave {key} out for no limit")));
            }
        }
        Ok(())
    }

    fn object_name(&self, key: &str) -> Result<Option<String>> {
        self.parse(key, |text| {
            if is_object_name(text) {
                return Ok(text.to_owned());
            }
            // Not repeated: somebody may have put the secret itself there.
            Err(Error::usage("it is not the name of a Kubernetes object")
                .hint("give the metadata.name of the object: lower-case letters, digits, '-' and '.'"))
        })
    }
}

fn check_endpoint(text: &str) -> Result<String> {
    // Not repeated in errors: it may have a password in it.
    let hint = "write it as https://HOST or https://HOST:PORT";
    let wrong = |why: &str| Error::usage(why.to_owned()).hint(hint);
    let (scheme, rest) =
        text.split_once("://").ok_or_else(|| wrong("it does not start with https:// or http://"))?;
    if !matches!(scheme, "http" | "https") {
        return Err(wrong("it does not start with https:// or http://"));
    }
    if rest.contains(['@', '?', '#']) {
        return Err(wrong("it has a user name, query or fragment"));
    }
    let rest = rest.trim_end_matches('/');
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let host_ok = match host.strip_prefix('[').map(|h| h.strip_suffix(']')) {
        Some(inner) => inner.is_some_and(|h| h.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
    };
    if !host_ok {
        return Err(wrong("its host name is not valid"));
    }
    if port
        .is_some_and(|p| !p.bytes().all(|b| b.is_ascii_digit()) || p.parse::<u16>().map_or(true, |p| p == 0))
    {
        return Err(wrong("its port is not valid"));
    }
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~".contains(&b)) {
        return Err(wrong("its path is not plain"));
    }
    Ok(format!("{scheme}://{rest}"))
}

/// A value of `deleteDataGracePeriod`, in whole seconds.
pub fn grace_period(text: &str) -> Result<Duration> {
    const LONGEST: Duration = Duration::from_secs(10 * 365 * 86_400);
    match humantime::parse_duration(text) {
        Ok(time) if time <= LONGEST && time.subsec_nanos() == 0 => Ok(time),
        _ => Err(Error::usage(format!(
            "\"{}\" is not a time in whole seconds, of at most ten years",
            shown(text)
        ))
        .hint("write deleteDataGracePeriod: \"24h\", or \"7d\"; \"0s\" deletes at once")),
    }
}

fn check_region(text: &str) -> Result<String> {
    if text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        return Ok(text.to_owned());
    }
    Err(Error::usage(format!("\"{}\" is not a region", shown(text)))
        .hint("write a region such as eu-central-1"))
}

fn check_folder(text: &str) -> Result<PathBuf> {
    let path = Path::new(text);
    if !path.is_absolute()
        || path.components().any(|c| c == Component::ParentDir)
        || text.chars().any(char::is_control)
        || text.len() > 1024
    {
        return Err(Error::usage(format!("\"{}\" is not an absolute plain path", shown(text)))
            .hint("write a path such as /var/cache/zerofs"));
    }
    Ok(path.components().collect())
}

fn check_log_filter(text: &str) -> Result<String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) if text.len() <= 1024 && text.chars().all(|c| c.is_ascii_graphic()) => Ok(text.to_owned()),
        _ => Err(Error::usage(format!("\"{}\" is not a log filter", shown(text)))
            .hint("write a filter such as info or zerofs=debug,slatedb=info")),
    }
}

fn check_image(text: &str) -> Result<String> {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._:@".contains(&b));
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    if plain && text.len() <= 512 && edge(text.as_bytes().first()) && edge(text.as_bytes().last()) {
        return Ok(text.to_owned());
    }
    Err(Error::usage(format!("\"{}\" is not an image reference", shown(text)))
        .hint("write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"))
}

fn is_object_name(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    text.len() <= 253
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        && edge(text.as_bytes().first())
        && edge(text.as_bytes().last())
}

fn is_secret_key(text: &str) -> bool {
    matches!(
        text,
        "password" | "username" | "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" | "AWS_SESSION_TOKEN"
    )
}

/// A variable of the environment as a secret; empty is unset.
fn variable(env: &dyn Fn(&str) -> Option<OsString>, name: &str) -> Result<Option<Secret>> {
    match env(name) {
        None => Ok(None),
        Some(value) => match value.into_string() {
            Ok(text) if text.is_empty() => Ok(None),
            Ok(text) => Ok(Some(Secret::new(text))),
            Err(_) => {
                Err(Error::usage(format!("{name} is not valid UTF-8")).hint(format!("set {name} again")))
            }
        },
    }
}

fn others_may_read(path: &Path, mode: u32) -> String {
    let path = path.display();
    format!("{path} holds secrets and may be read by others (mode {:03o}): chmod 600 {path}", mode & 0o777)
}

/// A text of the operator, cut and escaped for a message.
fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(40).flat_map(char::escape_debug).collect();
    if text.chars().count() > 40 {
        out.push('…');
    }
    out
}

fn read_text(file: File, origin: &str) -> Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).doing("read", origin)?;
    if bytes.len() > MAX_BYTES {
        return Err(
            Error::usage(format!("{origin} has more than 1 MiB")).hint("give a file with settings only")
        );
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(Error::usage(format!("{origin} is not UTF-8 text")).hint("give a YAML file")),
    }
}

/// Refuses texts with brackets a hundred deep before the parser sees them: it takes time that grows with the square
/// of the depth. Quotes are not looked at, so a text may hold a hundred unclosed brackets and no more.
fn check_depth(text: &str) -> Result<()> {
    let mut depth = 0usize;
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => continue,
        }
        if depth > 100 {
            return Err(Error::usage("it has more than 100 nested brackets").hint("correct the file"));
        }
    }
    Ok(())
}

fn known_key(name: &str) -> Result<(&'static str, Type)> {
    if let Some(found) = KEYS.iter().find(|(key, _)| *key == name) {
        return Ok(*found);
    }
    let error = Error::usage(format!("unknown key \"{}\"", shown(name)));
    let squash =
        |s: &str| s.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    let tried = squash(&name.chars().take(64).collect::<String>());
    let nearest = KEYS.iter().map(|(key, _)| (distance(&tried, &squash(key)), *key)).min();
    Err(match (name, nearest) {
        ("apiVersion" | "metadata" | "data" | "stringData", _) => {
            error.hint("a Kubernetes manifest needs kind: ConfigMap or kind: Secret")
        }
        _ if tried.contains("passw") => {
            error.hint("secrets do not belong here: name a Secret by encryptionPasswordSecretName")
        }
        _ if tried.starts_with("awssecret") || tried.starts_with("awsaccess") => {
            error.hint("secrets do not belong here: name a Secret by awsCredentialsSecretName")
        }
        (_, Some((off, key))) if off <= 1 + key.len() / 5 => error.hint(format!("did you mean {key}?")),
        _ => error.hint(format!(
            "the known keys are {}",
            KEYS.iter().map(|(key, _)| *key).collect::<Vec<_>>().join(", ")
        )),
    })
}

/// How many letters have to be changed, added or removed.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let change = corner + usize::from(ca != *cb);
            corner = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

/// Standard base64 with padding; blanks and line breaks, which YAML may leave in, are skipped. None when it is
/// malformed or not UTF-8.
fn base64(text: &str) -> Option<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let (mut bits, mut held, mut padding, mut count) = (0u32, 0u32, 0usize, 0usize);
    for c in text.bytes().filter(|c| !c.is_ascii_whitespace()) {
        count += 1;
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            _ => return None,
        };
        if padding > 0 {
            return None;
        }
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    // Left-over bits must be zero, so that each text has one spelling.
    if count % 4 != 0 || padding > 2 || bits != 0 || held as usize != padding * 2 {
        return None;
    }
    std::str::from_utf8(&bytes).ok().map(|text| Zeroizing::new(text.to_owned()))
}

type Fields = Vec<(String, Node)>;

/// A YAML tree that wipes its texts. Numbers keep a spelling that parses to the same number.
enum Node {
    Null,
    Bool(bool),
    Number(String),
    Text(Zeroizing<String>),
    List(Vec<Node>),
    Map(Fields),
}

impl Node {
    fn what(&self) -> &'static str {
        match self {
            Node::Null => "nothing",
            Node::Bool(_) => "true or false without quotes",
            Node::Number(_) => "a number without quotes",
            Node::Text(_) => "a text",
            Node::List(_) => "a list",
            Node::Map(_) => "a map",
        }
    }
}

/// Reads one document, within bounds: aliases may repeat a large text many times.
struct NodeReader {
    left: Cell<usize>,
    /// Our own word on what is wrong; the YAML library's may repeat what it read.
    said: RefCell<Option<String>>,
}

impl Default for NodeReader {
    fn default() -> Self {
        NodeReader { left: Cell::new(4 * MAX_BYTES), said: RefCell::new(None) }
    }
}

impl NodeReader {
    fn read(&self, document: serde_yaml::Deserializer<'_>) -> Result<Node> {
        Seed(self).deserialize(document).map_err(|e| {
            let at = e
                .location()
                .map(|l| format!(" at line {} column {}", l.line(), l.column()))
                .unwrap_or_default();
            match self.said.take() {
                Some(said) => Error::usage(format!("{said}{at}")).hint("correct the file"),
                None => Error::new(Kind::Usage, format!("it is not valid YAML{at}"))
                    .hint("check the indentation, and quote values with special characters"),
            }
        })
    }

    fn say<E: de::Error>(&self, what: impl Into<String>) -> E {
        self.said.borrow_mut().get_or_insert_with(|| what.into());
        E::custom("")
    }

    fn take<E: de::Error>(&self, bytes: usize) -> std::result::Result<(), E> {
        // Each node costs something, or a million empty ones would be free.
        match self.left.get().checked_sub(bytes + 16) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => Err(self.say("it is too large once its aliases are expanded")),
        }
    }
}

#[derive(Clone, Copy)]
struct Seed<'a>(&'a NodeReader);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Node;
    fn deserialize<D: de::Deserializer<'de>>(self, d: D) -> std::result::Result<Node, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("plain YAML")
    }

    fn visit_unit<E: de::Error>(self) -> std::result::Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E: de::Error>(self) -> std::result::Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> std::result::Result<Node, E> {
        Ok(Node::Bool(v))
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> std::result::Result<Node, E> {
        Ok(Node::Number(v.to_string()))
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> std::result::Result<Node, E> {
        Ok(Node::Number(v.to_string()))
    }

    fn visit_i128<E: de::Error>(self, v: i128) -> std::result::Result<Node, E> {
        Ok(Node::Number(v.to_string()))
    }

    fn visit_u128<E: de::Error>(self, v: u128) -> std::result::Result<Node, E> {
        Ok(Node::Number(v.to_string()))
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> std::result::Result<Node, E> {
        Ok(Node::Number(v.to_string()))
    }

    fn visit_str<E: de::Error>(self, v: &str) -> std::result::Result<Node, E> {
        self.0.take(v.len())?;
        Ok(Node::Text(Zeroizing::new(v.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = seq.next_element_seed(self)? {
            self.0.take(0)?;
            list.push(node);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Node, A::Error> {
        let mut fields: BTreeMap<String, Node> = BTreeMap::new();
        while let Some(key) = map.next_key_seed(self)? {
            let Node::Text(key) = key else {
                return Err(self.0.say("a key is not a text"));
            };
            if fields.contains_key(key.as_str()) {
                // Only a name that we know is surely not a secret in a key's place.
                let known = KEYS.iter().any(|(k, _)| *k == *key)
                    || is_secret_key(&key)
                    || ["kind", "metadata", "data", "stringData", "name", "apiVersion"]
                        .contains(&key.as_str());
                let what = if known { format!("the key {}", *key) } else { "a key".to_owned() };
                return Err(self.0.say(format!("{what} is given twice")));
            }
            let node = map.next_value_seed(self)?;
            fields.insert(key.to_string(), node);
        }
        Ok(Node::Map(fields.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests;
