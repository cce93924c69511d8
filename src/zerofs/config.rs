//! ZeroFS's config.toml: rendered for one version, with only the keys that this version knows.
//!
//! Promises: every string arrives in ZeroFS exactly as given, whatever quotes, backslashes, line breaks or
//! dollars it contains; what ZeroFS would refuse, or quietly misread, is refused here first, with a hint; no
//! secret shows in a `Debug` output or an error.
//!
//! Sockets are relative names, because ZeroFS is started in the volume's run folder.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::zerofs::versions::Profile;

/// The name of ZeroFS's 9P socket in a volume's run folder.
pub const NINEP_SOCKET: &str = super::ninep::SOCKET;
/// The name of ZeroFS's NBD socket in a volume's run folder.
pub const NBD_SOCKET: &str = "nbd.sock";
/// The name of ZeroFS's RPC socket in a volume's run folder.
pub const RPC_SOCKET: &str = "rpc.sock";

/// Where ZeroFS never stops flushing for lack of room in level 0.
const L0_NEVER_FULL: u64 = 1_000_000;

/// ZeroFS's gigabyte, in bytes.
const GB: u64 = 1_000_000_000;

/// The settings of ZeroFS's storage engine that may be chosen; none of them must be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Lsm {
    /// Files in level 0 before writing stops. Raised by us where a full level 0 makes flush lie.
    pub l0_max_ssts: Option<u64>,
    /// Unflushed data before writers must wait, in decimal GB.
    pub max_unflushed_gb: Option<f64>,
    /// Compactions at the same time.
    pub max_concurrent_compactions: Option<u64>,
    /// Seconds between flushes that nobody asked for.
    pub flush_interval_secs: Option<u64>,
}

/// Access to S3. What is not set is left out of the config.
#[derive(Clone, Default, PartialEq)]
pub struct Aws {
    /// The endpoint's URL, for stores other than AWS.
    pub endpoint: Option<String>,
    /// The region.
    pub region: Option<String>,
    /// Whether an endpoint without TLS is fine.
    pub allow_http: Option<bool>,
    /// Access key.
    pub access_key_id: Option<String>,
    /// Secret key.
    pub secret_access_key: Option<Zeroizing<String>>,
    /// Token of temporary credentials.
    pub session_token: Option<Zeroizing<String>>,
}

impl fmt::Debug for Aws {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aws")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("allow_http", &self.allow_http)
            .field("access_key_id", &self.access_key_id.is_some())
            .field("secret_access_key", &self.secret_access_key.is_some())
            .field("session_token", &self.session_token.is_some())
            .finish()
    }
}

/// Everything that goes into config.toml.
#[derive(Clone, PartialEq)]
pub struct ConfigInput {
    /// Where the volume's data lives: the URL of the volume itself, its id included.
    pub storage_url: String,
    /// The encryption password.
    pub password: Zeroizing<String>,
    /// The cache folder; absolute.
    pub cache_dir: PathBuf,
    /// Disk cache, in decimal GB.
    pub cache_disk_gb: f64,
    /// Memory cache, in decimal GB; ZeroFS's default (0.25) when not set.
    pub cache_memory_gb: Option<f64>,
    /// The size of the device, in bytes.
    pub device_size: u64,
    /// The largest total size of all files, in decimal GB, when the user insists on one; otherwise it is
    /// derived from the device's size so that the device has room to grow.
    pub max_size_gb: Option<f64>,
    /// Storage engine settings.
    pub lsm: Lsm,
    /// Access to S3.
    pub aws: Aws,
    /// Whether ZeroFS will be started with `--read-only`.
    pub read_only: bool,
}

impl fmt::Debug for ConfigInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigInput")
            .field("storage_url", &self.storage_url)
            .field("password", &"…")
            .field("cache_dir", &self.cache_dir)
            .field("cache_disk_gb", &self.cache_disk_gb)
            .field("cache_memory_gb", &self.cache_memory_gb)
            .field("device_size", &self.device_size)
            .field("max_size_gb", &self.max_size_gb)
            .field("lsm", &self.lsm)
            .field("aws", &self.aws)
            .field("read_only", &self.read_only)
            .finish()
    }
}

/// The text of config.toml for the version of `profile`. It contains secrets: write it 0600.
///
/// Wrong input is [`Kind::Usage`](crate::error::Kind::Usage); storage that this version must not be used
/// with is [`Kind::Refused`](crate::error::Kind::Refused).
pub fn render(input: &ConfigInput, profile: &Profile) -> Result<Zeroizing<String>> {
    check_password(&input.password)?;
    check_url(&input.storage_url, profile, input.read_only)?;
    let mut out = Toml::default();

    out.section("cache");
    out.text("dir", cache_dir(&input.cache_dir)?);
    out.number("disk_size_gb", gigabytes("cacheDiskSizeGB", input.cache_disk_gb, 0.01)?);
    if let Some(gb) = input.cache_memory_gb {
        out.number("memory_size_gb", gigabytes("cacheMemorySizeGB", gb, 0.001)?);
    }

    out.section("storage");
    out.text("url", &input.storage_url);
    out.text("encryption_password", &input.password);

    for (server, socket) in [("ninep", NINEP_SOCKET), ("nbd", NBD_SOCKET), ("rpc", RPC_SOCKET)] {
        let section = format!("servers.{server}");
        if profile.knows(&section, "unix_socket") {
            out.section(&section);
            out.text("unix_socket", socket);
        }
    }

    if profile.knows("filesystem", "max_size_gb") {
        out.section("filesystem");
        out.number("max_size_gb", max_size(input, profile)?);
    }
    lsm(&mut out, &input.lsm, profile)?;
    if profile.knows("telemetry", "enabled") {
        out.section("telemetry");
        out.raw("enabled", "false");
    }
    aws(&mut out, &input.aws)?;
    Ok(out.0)
}

/// What the user should hear about how `input` fits the version of `profile`: settings that are left out or
/// changed, and what cannot be guarded.
pub fn notes(input: &ConfigInput, profile: &Profile) -> Vec<String> {
    let version = profile.version;
    let mut out: Vec<String> = profile.warning.iter().cloned().collect();
    let lsm = &input.lsm;
    let chosen = [
        ("l0_max_ssts", "lsmL0MaxSsts", lsm.l0_max_ssts.is_some()),
        ("max_unflushed_gb", "lsmMaxUnflushedGB", lsm.max_unflushed_gb.is_some()),
        (
            "max_concurrent_compactions",
            "lsmMaxConcurrentCompactions",
            lsm.max_concurrent_compactions.is_some(),
        ),
        ("flush_interval_secs", "lsmFlushIntervalSecs", lsm.flush_interval_secs.is_some()),
    ];
    for (key, name, set) in chosen {
        if set && !profile.knows("lsm", key) {
            out.push(format!("{name} is left out: ZeroFS {version} does not know it"));
        }
    }
    if input.max_size_gb.is_some() && !profile.knows("filesystem", "max_size_gb") {
        out.push(format!("filesystemMaxSizeGB is left out: ZeroFS {version} does not know it"));
    }
    if profile.flush_lies {
        if !profile.knows("lsm", "l0_max_ssts") {
            out.push(format!(
                "ZeroFS {version} may acknowledge a flush that is not durable, and has no setting against it"
            ));
        } else if lsm.l0_max_ssts.is_some_and(|n| n < L0_NEVER_FULL) {
            out.push(format!(
                "lsmL0MaxSsts is raised to {L0_NEVER_FULL}: below it, ZeroFS {version} acknowledges flushes that are not durable"
            ));
        }
    }
    if input.storage_url.starts_with("file:") && profile.has_fault("file-never-fsyncs") {
        out.push(format!("ZeroFS {version} never fsyncs file:// storage: a power cut may lose data"));
    }
    out
}

fn lsm(out: &mut Toml, lsm: &Lsm, profile: &Profile) -> Result<()> {
    if !profile.knows("lsm", "l0_max_ssts") {
        return Ok(());
    }
    out.section("lsm");
    let least = if profile.flush_lies { L0_NEVER_FULL } else { 4 };
    if profile.flush_lies || lsm.l0_max_ssts.is_some() {
        let chosen = count("lsmL0MaxSsts", lsm.l0_max_ssts.unwrap_or(least))?;
        out.raw("l0_max_ssts", chosen.max(least));
    }
    if let Some(gb) = lsm.max_unflushed_gb.filter(|_| profile.knows("lsm", "max_unflushed_gb")) {
        out.number("max_unflushed_gb", gigabytes("lsmMaxUnflushedGB", gb, 0.001)?.max(0.1));
    }
    if let Some(n) = lsm.max_concurrent_compactions {
        out.raw("max_concurrent_compactions", count("lsmMaxConcurrentCompactions", n)?);
    }
    if let Some(n) = lsm.flush_interval_secs.filter(|_| profile.knows("lsm", "flush_interval_secs")) {
        out.raw("flush_interval_secs", count("lsmFlushIntervalSecs", n)?.max(5));
    }
    Ok(())
}

fn aws(out: &mut Toml, aws: &Aws) -> Result<()> {
    if let Some(endpoint) = &aws.endpoint {
        let plain = endpoint.starts_with("http://");
        if !plain && !endpoint.starts_with("https://") {
            return Err(Error::usage("awsEndpoint does not start with http:// or https://")
                .hint("write it like https://s3.example.com:9000"));
        }
        if plain && aws.allow_http != Some(true) {
            return Err(Error::usage("awsEndpoint is http://, but awsAllowHTTP is not \"true\"")
                .hint("set awsAllowHTTP: \"true\", or use an https:// endpoint"));
        }
    }
    if aws.access_key_id.is_some() != aws.secret_access_key.is_some() {
        return Err(Error::usage("only one of the access key and the secret key is set").hint(
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither (then the node's role counts)",
        ));
    }
    let allow_http = aws.allow_http.map(|b| b.to_string());
    let values = [
        ("endpoint", aws.endpoint.as_deref()),
        ("region", aws.region.as_deref()),
        ("allow_http", allow_http.as_deref()),
        ("access_key_id", aws.access_key_id.as_deref()),
        ("secret_access_key", aws.secret_access_key.as_deref().map(String::as_str)),
        ("session_token", aws.session_token.as_deref().map(String::as_str)),
    ];
    if values.iter().any(|(_, v)| v.is_some()) {
        out.section("aws");
        for (key, value) in values {
            if let Some(value) = value {
                out.text(key, value);
            }
        }
    }
    Ok(())
}

fn check_password(password: &str) -> Result<()> {
    let why = match password {
        "" => "is empty",
        "CHANGEME" => "is the placeholder CHANGEME",
        // ZeroFS counts bytes.
        p if p.len() < 8 => "has fewer than 8 characters",
        _ => return Ok(()),
    };
    Err(Error::usage(format!("the encryption password {why}; ZeroFS refuses it"))
        .hint("choose a password of at least 8 characters, and keep it: without it the data is lost"))
}

fn check_url(url: &str, profile: &Profile, read_only: bool) -> Result<()> {
    // The URL itself stays out of the messages that are about credentials in it.
    let wrong = |why: &str| {
        Error::usage(format!("the storage URL {why}"))
            .hint("write it like s3://bucket/prefix or file:///var/lib/zerofsctl/store")
    };
    if url.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(wrong("contains spaces or control characters"));
    }
    let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("has no scheme"))?;
    if rest.contains(['?', '#']) {
        return Err(wrong("contains '?' or '#'"));
    }
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    match scheme {
        "file" => {
            if !host.is_empty() || path.trim_matches('/').is_empty() {
                return Err(wrong("is not file:/// and an absolute folder"));
            }
            if !profile.file_storage && !read_only {
                return Err(Error::refused(format!(
                    "ZeroFS {} does not write to file:// storage",
                    profile.version
                ))
                .hint("use ZeroFS 0.19.1 for the embedded store, or an s3:// URL"));
            }
        }
        "s3" | "s3a" | "gs" => {
            if host.is_empty() {
                return Err(wrong("names no bucket"));
            }
            if host.contains('@') {
                return Err(wrong("contains credentials")
                    .hint("take them out and use the Secret named by awsCredentialsSecretName"));
            }
        }
        "abfs" | "abfss" | "adl" | "azure" => {
            if host.is_empty() {
                return Err(wrong("names no container"));
            }
        }
        "az" => {
            // ZeroFS takes the first part of the path for the container there, and drops it from the prefix.
            return Err(Error::refused(format!(
                "ZeroFS {} misreads az:// URLs: volumes would share one prefix",
                profile.version
            ))
            .hint("write it as abfs://container/prefix"));
        }
        "memory" => {
            return Err(Error::refused("memory:// storage is lost with the ZeroFS process")
                .hint("leave the storage URL out for the embedded store"));
        }
        "https" if host.ends_with(".amazonaws.com") || host.ends_with(".r2.cloudflarestorage.com") => {}
        _ => return Err(wrong("has a scheme that ZeroFS does not know")),
    }
    Ok(())
}

fn cache_dir(dir: &Path) -> Result<&str> {
    dir.to_str().filter(|_| dir.is_absolute()).ok_or_else(|| {
        Error::usage("the cache folder is not an absolute UTF-8 path")
            .hint("set cacheDir to a path such as /var/cache/zerofs")
    })
}

/// A size in decimal GB between `least` and a million.
fn gigabytes(name: &str, gb: f64, least: f64) -> Result<f64> {
    if gb.is_finite() && (least..=1e6).contains(&gb) {
        return Ok(gb);
    }
    Err(Error::usage(format!("{name} is {gb} GB, out of the range {least} to 1000000"))
        .hint("give a number of gigabytes (10⁹ bytes), such as 1.0"))
}

fn count(name: &str, n: u64) -> Result<u64> {
    if (1..=1_000_000_000).contains(&n) {
        return Ok(n);
    }
    Err(Error::usage(format!("{name} is {n}, out of the range 1 to 1000000000"))
        .hint("leave it out for the default"))
}

/// The `max_size_gb` to write. ZeroFS counts the device at its full size, and a device above the limit gets
/// ENOSPC; the limit only guards against ourselves, so it leaves much room to grow without a restart.
fn max_size(input: &ConfigInput, profile: &Profile) -> Result<f64> {
    let needed = input.device_size.div_ceil(GB);
    let Some(gb) = input.max_size_gb else {
        return Ok(needed.saturating_mul(16).clamp(1000, u64::MAX / GB) as f64);
    };
    if !gb.is_finite() || !(0.0..=9e9).contains(&gb) {
        return Err(Error::usage(format!("filesystemMaxSizeGB is {gb}, which is no size"))
            .hint("leave filesystemMaxSizeGB out: it is derived from the volume's size"));
    }
    let counts = if profile.whole_max_size { gb.floor() } else { gb };
    if counts * (GB as f64) < input.device_size as f64 {
        return Err(Error::usage(format!(
            "filesystemMaxSizeGB is {gb}, too small for a volume of {} bytes",
            input.device_size
        ))
        .hint(format!("set it to at least {needed}, or leave it out")));
    }
    Ok(gb)
}

/// A config file in the making. Its buffer is wiped when dropped; it starts large enough not to move.
struct Toml(Zeroizing<String>);

impl Default for Toml {
    fn default() -> Self {
        Toml(Zeroizing::new(String::with_capacity(16 << 10)))
    }
}

impl Toml {
    fn section(&mut self, name: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        self.line(format_args!("{gap}[{name}]"));
    }

    fn raw(&mut self, key: &str, value: impl fmt::Display) {
        self.line(format_args!("{key} = {value}"));
    }

    /// A floating point number, recognisable as one.
    fn number(&mut self, key: &str, value: f64) {
        self.line(format_args!("{key} = {value:?}"));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.line(format_args!("{key} = {}", Quoted(value)));
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{line}");
    }
}

/// A TOML basic string that also survives ZeroFS's environment expansion, in which `$$` stands for `$`.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '$' => f.write_str("$$")?,
                c if c.is_control() => write!(f, "\\u{:04X}", c as u32)?,
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;

    fn input() -> ConfigInput {
        ConfigInput {
            storage_url: "s3://vols/csi/vol-1".into(),
            password: Zeroizing::new("correct horse".into()),
            cache_dir: "/var/lib/zerofsctl/volumes/vol-1/cache".into(),
            cache_disk_gb: 0.5,
            cache_memory_gb: Some(0.064),
            device_size: 10 << 30,
            max_size_gb: None,
            lsm: Lsm::default(),
            aws: Aws::default(),
            read_only: false,
        }
    }

    fn profile(version: &str) -> Profile {
        Profile::of(version.parse().unwrap()).unwrap()
    }

    /// What ZeroFS does with `$` in a string, for an environment in which no variable is set: `$$` is `$`,
    /// a name is an error, and a `$` before anything else stays.
    fn expand(s: &str) -> Option<String> {
        let mut out = String::new();
        let mut chars = s.chars().peekable();
        while let Some(c) = chars.next() {
            match (c, chars.peek()) {
                ('$', Some('$')) => {
                    chars.next();
                    out.push('$');
                }
                ('$', Some(n)) if *n == '{' || *n == '_' || n.is_alphanumeric() => return None,
                (c, _) => out.push(c),
            }
        }
        Some(out)
    }

    fn parsed(input: &ConfigInput, profile: &Profile) -> toml::Table {
        render(input, profile).unwrap().parse().expect("valid TOML")
    }

    #[test]
    fn a_config_for_the_measured_old_version() {
        let mut i = input();
        i.aws = Aws {
            endpoint: Some("http://127.0.0.1:9000".into()),
            region: Some("us-east-1".into()),
            allow_http: Some(true),
            access_key_id: Some("AK".into()),
            secret_access_key: Some(Zeroizing::new("s\"e\\c$ret".into())),
            session_token: None,
        };
        insta::assert_snapshot!(render(&i, &profile("0.19.1")).unwrap().as_str(), @r##"
        [cache]
        dir = "/var/lib/zerofsctl/volumes/vol-1/cache"
        disk_size_gb = 0.5
        memory_size_gb = 0.064

        [storage]
        url = "s3://vols/csi/vol-1"
        encryption_password = "correct horse"

        [servers.ninep]
        unix_socket = "9p.sock"

        [servers.nbd]
        unix_socket = "nbd.sock"

        [servers.rpc]
        unix_socket = "rpc.sock"

        [filesystem]
        max_size_gb = 1000.0

        [lsm]
        l0_max_ssts = 1000000

        [aws]
        endpoint = "http://127.0.0.1:9000"
        region = "us-east-1"
        allow_http = "true"
        access_key_id = "AK"
        secret_access_key = "s\"e\\c$$ret"
        "##);
    }

    #[test]
    fn only_known_keys_are_rendered() {
        let mut i = input();
        i.lsm = Lsm {
            l0_max_ssts: Some(32),
            max_unflushed_gb: Some(1.0),
            max_concurrent_compactions: Some(2),
            flush_interval_secs: Some(5),
        };
        i.max_size_gb = Some(100.0);
        for p in crate::zerofs::versions::profiles() {
            let table = parsed(&i, &p);
            for (section, content) in &table {
                for (key, value) in content.as_table().unwrap() {
                    match value {
                        toml::Value::Table(server) => {
                            let section = format!("{section}.{key}");
                            for key in server.keys() {
                                assert!(p.knows(&section, key), "{} {section}.{key}", p.version);
                            }
                        }
                        _ => assert!(p.knows(section, key), "{} {section}.{key}", p.version),
                    }
                }
            }
            assert_eq!(table.contains_key("telemetry"), p.knows("telemetry", "enabled"));
            let notes = notes(&i, &p);
            assert_eq!(notes.iter().any(|n| n.contains("lsmL0MaxSsts")), p.flush_lies, "{notes:?}");
        }
    }

    #[test]
    fn level_0_is_raised_where_flush_would_lie() {
        let mut i = input();
        let l0 = |i: &ConfigInput, v: &str| {
            parsed(i, &profile(v)).get("lsm").and_then(|l| l.get("l0_max_ssts")?.as_integer())
        };
        assert_eq!(l0(&i, "0.19.1"), Some(1_000_000));
        assert_eq!(l0(&i, "2.3.0"), None);
        i.lsm.l0_max_ssts = Some(16);
        assert_eq!(l0(&i, "0.19.1"), Some(1_000_000));
        assert_eq!(l0(&i, "2.3.0"), Some(16));
        assert!(notes(&i, &profile("0.16.2")).iter().any(|n| n.contains("not durable")));
    }

    #[test]
    fn the_device_always_fits() {
        let mut i = input();
        for size in [1, GB, GB + 1, 10 << 30, 1 << 50, i64::MAX as u64] {
            i.device_size = size;
            let gb = parsed(&i, &profile("0.19.1"))["filesystem"]["max_size_gb"].as_float().unwrap();
            assert_eq!(gb, gb.floor());
            assert!(gb as u64 >= size.div_ceil(GB), "{size} {gb}");
        }
        i.device_size = 10 * GB;
        i.max_size_gb = Some(10.9);
        assert!(render(&i, &profile("0.19.1")).is_ok());
        i.device_size = 10 * GB + 1;
        assert_eq!(render(&i, &profile("0.19.1")).unwrap_err().kind(), Kind::Usage, "10.9 counts as 10");
        i.max_size_gb = Some(10.9);
        assert!(render(&i, &profile("2.3.0")).is_ok());
    }

    #[test]
    fn what_zerofs_would_refuse_or_misread_is_refused() {
        let refuse = |change: &dyn Fn(&mut ConfigInput), version: &str, kind: Kind| {
            let mut i = input();
            change(&mut i);
            let e = render(&i, &profile(version)).expect_err("must be refused");
            assert_eq!(e.kind(), kind, "{e}");
            assert!(e.hint_text().is_some(), "{e}");
        };
        for password in ["", "short", "CHANGEME", "1234567"] {
            refuse(&|i| i.password = Zeroizing::new(password.into()), "0.19.1", Kind::Usage);
        }
        for (url, kind) in [
            ("az://container/prefix", Kind::Refused),
            ("memory:///x", Kind::Refused),
            ("file://relative/path", Kind::Usage),
            ("file:///", Kind::Usage),
            ("s3://", Kind::Usage),
            ("s3://key:secret@bucket/x", Kind::Usage),
            ("s3://bucket/x?region=y", Kind::Usage),
            ("s3://bucket/a b", Kind::Usage),
            ("ftp://x/y", Kind::Usage),
            ("https://example.com/x", Kind::Usage),
            ("bucket/x", Kind::Usage),
            ("", Kind::Usage),
        ] {
            refuse(&|i| i.storage_url = url.into(), "0.19.1", kind);
        }
        refuse(&|i| i.storage_url = "file:///srv/x".into(), "2.3.0", Kind::Refused);
        refuse(&|i| i.cache_dir = "cache".into(), "0.19.1", Kind::Usage);
        for gb in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e9] {
            refuse(&|i| i.cache_disk_gb = gb, "0.19.1", Kind::Usage);
            refuse(&|i| i.cache_memory_gb = Some(gb), "0.19.1", Kind::Usage);
            refuse(&|i| i.lsm.max_unflushed_gb = Some(gb), "0.19.1", Kind::Usage);
        }
        for gb in [0.0, -1.0, f64::NAN, f64::INFINITY, 5.0] {
            refuse(&|i| i.max_size_gb = Some(gb), "0.19.1", Kind::Usage);
        }
        refuse(&|i| i.lsm.max_concurrent_compactions = Some(0), "0.19.1", Kind::Usage);
        refuse(&|i| i.aws.endpoint = Some("127.0.0.1:9000".into()), "0.19.1", Kind::Usage);
        refuse(&|i| i.aws.endpoint = Some("http://127.0.0.1:9000".into()), "0.19.1", Kind::Usage);
        refuse(&|i| i.aws.access_key_id = Some("AK".into()), "0.19.1", Kind::Usage);
        let mut i = input();
        (i.storage_url, i.read_only) = ("file:///srv/x".into(), true);
        assert!(render(&i, &profile("2.3.0")).is_ok(), "reading is allowed");
    }

    #[test]
    fn secrets_stay_out_of_debug_output_and_errors() {
        let mut i = input();
        i.password = Zeroizing::new("hunter2hunter2".into());
        i.aws.secret_access_key = Some(Zeroizing::new("hunter2".into()));
        i.aws.session_token = Some(Zeroizing::new("hunter2".into()));
        assert!(!format!("{i:?} {i:#?}").contains("hunter2"));
        let e = render(&i, &profile("0.19.1")).unwrap_err();
        assert!(!format!("{e} {e:?}").contains("hunter2"));
        i.storage_url = "s3://hunter2@bucket/x".into();
        let e = render(&i, &profile("0.19.1")).unwrap_err();
        assert!(!format!("{e} {e:?}").contains("hunter2"));
    }

    proptest! {
        #[test]
        fn strings_arrive_exactly(
            password in "(\\PC|[$\"'\\\\{}\n\r\t\u{0}\u{7f}\u{85}]){8,40}",
            secret in "(\\PC|[$\"'\\\\{}\n\r\t\u{0}-\u{1f}]){0,40}",
            dir in "[a-z$\"'\\\\{} #=\u{e4}\u{1f600}]{0,30}",
            disk in 0.01f64..1e6,
        ) {
            let mut i = input();
            i.password = Zeroizing::new(password.clone());
            i.cache_dir = format!("/{dir}").into();
            i.cache_disk_gb = disk;
            i.aws.access_key_id = Some(secret.clone());
            i.aws.secret_access_key = Some(Zeroizing::new(secret.clone()));
            let table = parsed(&i, &profile("0.19.1"));
            let got = |section: &str, key: &str| expand(table[section][key].as_str().unwrap());
            prop_assert_eq!(got("storage", "encryption_password"), Some(password));
            prop_assert_eq!(got("cache", "dir"), Some(format!("/{dir}")));
            prop_assert_eq!(got("aws", "access_key_id"), Some(secret.clone()));
            prop_assert_eq!(got("aws", "secret_access_key"), Some(secret));
            prop_assert_eq!(table["cache"]["disk_size_gb"].as_float(), Some(disk));
        }
    }
}
