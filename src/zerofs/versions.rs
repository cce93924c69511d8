//! What we know about each version of ZeroFS, as data: the config keys it reads, what it needs of the object
//! store, the faults it has and what zerofsctl does about each, the log lines that give a fault away, and
//! which versions can read each other's volumes.
//!
//! Each fact is a row with the first version that has it and the first that has it no more. A [`Profile`]
//! is the cut through these tables at one version. 0.19.1 (as published on crates.io) and 2.3.0 were
//! measured; the rows for the versions between come from reading the source of each release, and where that
//! leaves a doubt, the careful answer is in the table.
//!
//! A version that is older than the table is refused. One that is newer gets the newest knowledge plus every
//! guard that costs only time, and a warning.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// A version number of ZeroFS. What follows the third number (`-rc1`, `+build`) is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

const fn v(major: u32, minor: u32, patch: u32) -> Version {
    Version { major, minor, patch }
}

/// Beyond every version.
const OPEN: Version = v(u32::MAX, 0, 0);
/// The first version that we know anything about.
const OLDEST: Version = v(0, 16, 0);
/// The first version that we know nothing about.
const UNKNOWN: Version = v(2, 4, 0);

impl FromStr for Version {
    type Err = Error;

    /// Reads `0.19.1`, `v0.19.1`, and what `zerofs --version` prints: `zerofs 0.19.1`.
    fn from_str(s: &str) -> Result<Self> {
        let wrong = || {
            let shown: String = s.chars().take(60).flat_map(char::escape_debug).collect();
            Error::usage(format!("\"{shown}\" is not a ZeroFS version"))
                .hint("look at the output of: zerofs --version")
        };
        let word = s.split_whitespace().last().ok_or_else(wrong)?;
        let word = word.strip_prefix('v').unwrap_or(word);
        let core = word.split(['-', '+']).next().unwrap_or(word);
        let mut parts = core.split('.').map(|p| {
            // `parse` alone would take "+1".
            if p.bytes().all(|b| b.is_ascii_digit()) { p.parse::<u32>().ok() } else { None }
        });
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Some(major)), Some(Some(minor)), Some(Some(patch)), None) => Ok(v(major, minor, patch)),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Version {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Version> for String {
    fn from(v: Version) -> String {
        v.to_string()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}.{}.{}", self.major, self.minor, self.patch))
    }
}

/// A row that holds from one version up to, and without, another.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: Version,
    below: Version,
}

impl Span {
    fn has(&self, version: Version) -> bool {
        self.from <= version && version < self.below
    }
}

const fn span(from: Version, below: Version) -> Span {
    Span { from, below }
}

/// A config key, with its section as written in config.toml.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Key {
    /// The section, for instance `servers.nbd`.
    pub section: &'static str,
    /// The key.
    pub key: &'static str,
}

const fn key(section: &'static str, key: &'static str, from: Version, below: Version) -> (Key, Span) {
    (Key { section, key }, span(from, below))
}

/// Every config key of every known version. `[aws]`, `[azure]` and `[gcp]` take any key and check none.
const KEYS: &[(Key, Span)] = &[
    key("cache", "dir", OLDEST, OPEN),
    key("cache", "disk_size_gb", OLDEST, OPEN),
    key("cache", "memory_size_gb", OLDEST, OPEN),
    key("cache", "warm_metadata", v(1, 4, 2), OPEN),
    key("storage", "url", OLDEST, OPEN),
    key("storage", "encryption_password", OLDEST, OPEN),
    key("storage", "storage_class", v(1, 2, 2), OPEN),
    key("filesystem", "max_size_gb", v(0, 17, 0), OPEN),
    key("filesystem", "compression", v(0, 22, 3), OPEN),
    key("filesystem", "ignore_fsync", v(1, 3, 0), OPEN),
    key("lsm", "l0_max_ssts", v(0, 17, 0), OPEN),
    key("lsm", "max_unflushed_gb", v(0, 17, 0), v(2, 3, 0)),
    key("lsm", "max_concurrent_compactions", v(0, 17, 0), OPEN),
    key("lsm", "flush_interval_secs", v(0, 18, 0), OPEN),
    key("lsm", "wal_enabled", v(1, 0, 4), v(2, 3, 0)),
    key("lsm", "sync_writes", v(1, 1, 1), OPEN),
    key("servers.nfs", "addresses", OLDEST, OPEN),
    key("servers.ninep", "addresses", OLDEST, OPEN),
    key("servers.ninep", "unix_socket", OLDEST, OPEN),
    key("servers.nbd", "addresses", OLDEST, OPEN),
    key("servers.nbd", "unix_socket", OLDEST, OPEN),
    key("servers.rpc", "addresses", v(0, 18, 0), OPEN),
    key("servers.rpc", "unix_socket", v(0, 18, 0), OPEN),
    key("servers.webui", "addresses", v(1, 0, 9), OPEN),
    key("telemetry", "enabled", v(1, 0, 7), OPEN),
    key("prometheus", "addresses", v(1, 0, 7), OPEN),
    key("wal", "url", v(1, 0, 5), v(2, 3, 0)),
    key("gc", "interval_secs", v(2, 0, 2), OPEN),
    key("replication", "node_id", v(1, 3, 0), OPEN),
];

/// The keys whose coming and going makes a difference to what we render.
const RENDERED: &[(&str, &str)] = &[
    ("filesystem", "max_size_gb"),
    ("lsm", "l0_max_ssts"),
    ("lsm", "max_unflushed_gb"),
    ("lsm", "flush_interval_secs"),
    ("servers.rpc", "unix_socket"),
    ("telemetry", "enabled"),
];

/// What a volume looks like in the bucket. Versions of different families cannot read each other's volumes,
/// or read them wrongly without noticing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// 256 KiB chunks, folders without cookies.
    Chunks256,
    /// 256 KiB chunks, folders with cookies.
    Chunks256Cookies,
    /// 32 KiB chunks.
    Chunks32,
    /// 32 KiB chunks, renumbered keys.
    Chunks32Renumbered,
    /// Encrypted by blocks instead of values.
    EncryptedBlocks,
    /// Metadata and chunks in key segments of their own.
    KeySegments,
    /// The engine of 2.x: extents in segment objects.
    Extents,
    /// A version that we do not know.
    Unknown,
}

const FORMATS: &[(Format, Span)] = &[
    (Format::Chunks256, span(OLDEST, v(0, 19, 0))),
    (Format::Chunks256Cookies, span(v(0, 19, 0), v(0, 19, 2))),
    (Format::Chunks32, span(v(0, 19, 2), v(0, 21, 0))),
    (Format::Chunks32Renumbered, span(v(0, 21, 0), v(1, 0, 3))),
    (Format::EncryptedBlocks, span(v(1, 0, 3), v(1, 1, 6))),
    (Format::KeySegments, span(v(1, 1, 6), v(2, 0, 0))),
    (Format::Extents, span(v(2, 0, 0), UNKNOWN)),
    (Format::Unknown, span(UNKNOWN, OPEN)),
];

/// What zerofsctl does about a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mitigation {
    /// `l0_max_ssts` is rendered so large that the limit is never reached, and the log line is watched.
    RaiseL0Limit,
    /// The watchdog kills the process when the log shows it, and the keeper restarts it and replays.
    Restart,
    /// The watchdog kills the process and does not restart it: the volume has a new owner.
    EndDevice,
    /// An all-zero answer is delivered only when a probe after it proves that the database was open.
    ProbeZeros,
    /// The process is killed, and the keeper replays, before the object store client runs out of retries.
    RestartBeforeRetriesEnd,
    /// zerofsctl refuses to do what triggers it.
    Never,
    /// zerofsctl checks first.
    CheckFirst,
    /// The setting is rendered so that it does not happen.
    Configure,
    /// Nothing helps from outside; the tools say so where it matters.
    Tell,
}

/// A known fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// A short name, stable for scripts.
    pub name: &'static str,
    /// What happens.
    pub what: &'static str,
    /// What we do.
    pub mitigation: Mitigation,
    /// What we do, as a sentence.
    pub guard: &'static str,
}

const FLUSH_LIES: &str = "flush-lies";
const CLOSED_READS_ZEROS: &str = "closed-reads-zeros";

/// The fault of versions that answer with zeros when the storage fails a read.
pub const READ_ERRORS_ARE_ZEROS: &str = "read-errors-are-zeros";
const FILE_NEVER_FSYNCS: &str = "file-never-fsyncs";

const fn fault(
    name: &'static str,
    what: &'static str,
    mitigation: Mitigation,
    guard: &'static str,
    from: Version,
    below: Version,
) -> (Fault, Span) {
    (Fault { name, what, mitigation, guard }, span(from, below))
}

const FAULTS: &[(Fault, Span)] = &[
    fault(
        FLUSH_LIES,
        "FLUSH, FUA and fsync answer success without durability once level 0 is full",
        Mitigation::RaiseL0Limit,
        "l0_max_ssts is set to 1000000 where the version has the key; the line \"won't flush imm\" means restart and replay",
        OLDEST,
        v(2, 3, 0),
    ),
    fault(
        CLOSED_READS_ZEROS,
        "after its database closed (store refused connections for about 4 s, or fencing) the process lives on and reads succeed with zeros",
        Mitigation::ProbeZeros,
        "an all-zero answer is delivered only after a 9P look-up proves that the database was open; otherwise the server is restarted and the read repeated",
        OLDEST,
        v(0, 19, 2),
    ),
    fault(
        READ_ERRORS_ARE_ZEROS,
        "a read that the store fails (retries used up, broken body, damaged object) counts as a missing chunk: zeros are returned, and a partial write stores them around itself, while the database stays open",
        Mitigation::RestartBeforeRetriesEnd,
        "the log's retry lines are watched; the process is killed before the retries end, nothing of it is flushed, and the replay log repeats the writes",
        OLDEST,
        v(0, 19, 2),
    ),
    fault(
        "closes-on-outage",
        "a store that refuses connections for about 4 s closes the database for good; the process lives on",
        Mitigation::Restart,
        "the watchdog kills and restarts it when the log says so; the replay log keeps what was acknowledged",
        OLDEST,
        v(2, 3, 0),
    ),
    fault(
        "fenced-lives-on",
        "a server whose volume was opened elsewhere stays alive",
        Mitigation::EndDevice,
        "the watchdog kills it and does not restart it; the device fails cleanly",
        OLDEST,
        OPEN,
    ),
    fault(
        "damage-reads-zeros",
        "a damaged object in the store reads as zeros, without an error or a log line",
        Mitigation::Tell,
        "fsck --read-data says that this version hides damage",
        OLDEST,
        v(0, 19, 2),
    ),
    fault(
        "handshake-hides-errors",
        "an NBD handshake on a closed database answers \"unknown export\"",
        Mitigation::CheckFirst,
        "whether a device exists is asked over 9P",
        OLDEST,
        OPEN,
    ),
    fault(
        "shrink-hangs",
        "shrinking or removing a device in use hangs or corrupts its clients",
        Mitigation::Never,
        "devices only grow, and none is removed while attached",
        OLDEST,
        OPEN,
    ),
    fault(
        "wrong-password-fences",
        "a start with a wrong password opens the volume first, and so fences the running server",
        Mitigation::CheckFirst,
        "the password is checked against a recorded value before ZeroFS starts",
        OLDEST,
        OPEN,
    ),
    fault(
        FILE_NEVER_FSYNCS,
        "with file:// storage nothing is ever fsynced: a power cut may lose data",
        Mitigation::Tell,
        "the embedded store is for trying out; zerofsctl says so",
        OLDEST,
        v(1, 4, 5),
    ),
    fault(
        "two-builds",
        "the crate 0.19.1 and the container image 0.19.1 have different chunk sizes (256 and 32 KiB) and cannot read each other's volumes",
        Mitigation::Tell,
        "use one of the two for a volume, and only that",
        v(0, 19, 1),
        v(0, 19, 2),
    ),
    fault(
        "telemetry-on",
        "telemetry is sent unless it is turned off",
        Mitigation::Configure,
        "rendered off",
        v(1, 0, 7),
        OPEN,
    ),
];

/// What a log line gives away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sign {
    /// The store is slow or unreachable, and ZeroFS retries. Answers so far are good.
    StoreTrouble,
    /// The retries are about to end; after that, versions with the fault `read-errors-are-zeros` answer
    /// with zeros although the database is open. At least half a second is left.
    StoreGivingUp,
    /// A flush that was or will be acknowledged is not durable.
    FlushLied,
    /// The database is closed or about to be; only a restart helps.
    Closed,
    /// The volume was opened elsewhere: it has a new owner. Do not restart.
    Fenced,
}

/// Parts of log lines and what they mean; the first match wins, so the gravest come first.
const SIGNS: &[(&str, Sign)] = &[
    ("Fenced", Sign::Fenced),
    ("detected newer DB client", Sign::Fenced),
    ("was fenced or superseded", Sign::Fenced),
    ("background task panicked", Sign::Closed),
    ("background task failed", Sign::Closed),
    ("fatal error loading manifest", Sign::Closed),
    ("error from memtable flush", Sign::Closed),
    ("flush failed", Sign::Closed),
    ("won't flush imm", Sign::FlushLied),
    ("retrying object store operation", Sign::StoreGivingUp),
    ("Encountered error while reading response body", Sign::StoreTrouble),
];

/// Log targets whose lines we need, at least at level info, whatever the user wants to see.
const LOG_TARGETS: [&str; 3] = ["zerofs", "slatedb", "object_store"];

/// How ZeroFS stops (the same for every version that was measured).
pub const STOP: &str = "SIGTERM flushes and exits 0: within 0.1 s when clean, 12 s with 300 MB unwritten; \
                        with the store refusing connections it exits 1 after 20 s; with a hung store it goes on trying";

/// How long a stop should be given before anybody thinks about force.
pub const STOP_GRACE: Duration = Duration::from_secs(120);

/// Where a profile's facts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Knowledge {
    /// Measured on the real program.
    Measured,
    /// Read in the source of the release.
    Source,
    /// Newer than this table.
    Guessed,
}

/// Everything about one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Profile {
    /// The version. In [`profiles`], the first version that the row stands for.
    pub version: Version,
    /// How sure we are.
    pub knowledge: Knowledge,
    /// The config keys that it knows. Any other key is fatal to it, except in `[aws]`, `[azure]`, `[gcp]`.
    pub keys: Vec<Key>,
    /// Its known faults.
    pub faults: Vec<&'static Fault>,
    /// What its volumes look like.
    pub format: Format,
    /// A closed database answers reads with zeros instead of EIO.
    pub zeros_when_closed: bool,
    /// A flush may be acknowledged without durability.
    pub flush_lies: bool,
    /// `file://` storage works read-write.
    pub file_storage: bool,
    /// The store must support `If-Match` besides `If-None-Match: *`.
    pub needs_if_match: bool,
    /// Credentials are also taken from `AWS_*` in the environment.
    pub reads_aws_environment: bool,
    /// Only the whole part of `max_size_gb` counts.
    pub whole_max_size: bool,
    /// What the user should be told about running this version at all.
    pub warning: Option<String>,
}

impl Profile {
    /// The profile of `version`. Older than 0.16.0 is refused; newer than the table comes with a warning
    /// and with every guard on.
    pub fn of(version: Version) -> Result<Profile> {
        if version < OLDEST {
            return Err(Error::refused(format!(
                "ZeroFS {version} is older than zerofsctl knows how to guard"
            ))
            .hint(format!("use ZeroFS {OLDEST} or newer; see: zerofsctl zerofs versions")));
        }
        Ok(Self::cut(version))
    }

    fn cut(version: Version) -> Profile {
        let unknown = version >= UNKNOWN;
        let keys = KEYS.iter().filter(|(_, s)| s.has(version)).map(|(k, _)| *k).collect();
        let faults: Vec<_> = FAULTS.iter().filter(|(_, s)| s.has(version)).map(|(f, _)| f).collect();
        let has = |name: &str| faults.iter().any(|f| f.name == name);
        let format = FORMATS.iter().find(|(_, s)| s.has(version)).map_or(Format::Unknown, |(f, _)| *f);
        let knowledge = if unknown {
            Knowledge::Guessed
        } else if [v(0, 19, 1), v(2, 3, 0)].contains(&version) {
            Knowledge::Measured
        } else {
            Knowledge::Source
        };
        let warning = unknown.then(|| {
            format!(
                "ZeroFS {version} is newer than this zerofsctl knows: its config may differ, and its faults are \
                 not known; all guards are on"
            )
        });
        Profile {
            version,
            knowledge,
            format,
            zeros_when_closed: unknown || has(CLOSED_READS_ZEROS),
            flush_lies: unknown || has(FLUSH_LIES),
            keys,
            file_storage: version < v(2, 0, 5),
            needs_if_match: version >= v(2, 0, 5),
            reads_aws_environment: version >= v(1, 4, 2),
            whole_max_size: version < v(0, 21, 2),
            faults,
            warning,
        }
    }

    /// Whether config.toml may contain `key` in `section`.
    pub fn knows(&self, section: &str, key: &str) -> bool {
        self.keys.iter().any(|k| k.section == section && k.key == key)
    }

    /// Whether it has the fault of that name.
    pub fn has_fault(&self, name: &str) -> bool {
        self.faults.iter().any(|f| f.name == name)
    }

    /// What a log line gives away, if anything. Colour codes in the line do no harm.
    pub fn sign(&self, line: &str) -> Option<Sign> {
        if let Some((_, sign)) = SIGNS.iter().find(|(part, _)| line.contains(part)) {
            return Some(*sign);
        }
        // "…, backing off for 0.3 seconds, retry 5 of 10: …": the pauses grow, so half of the retries leave
        // more than half of the time, and never less than half a second.
        let (_, rest) = line.split_once("backing off for ")?;
        let gave_up_half = rest.split_once(", retry ").and_then(|(_, counts)| {
            let mut words = counts.split(|c: char| !c.is_ascii_digit()).filter(|w| !w.is_empty());
            let (now, of) = (words.next()?.parse::<u64>().ok()?, words.next()?.parse::<u64>().ok()?);
            Some(now.saturating_mul(2) >= of)
        });
        Some(if gave_up_half.unwrap_or(false) { Sign::StoreGivingUp } else { Sign::StoreTrouble })
    }

    /// The value for RUST_LOG: what the user asked for, with the targets that the watchdog cannot do without
    /// raised to info where the user's filter would hide them.
    pub fn rust_log(&self, wanted: Option<&str>) -> String {
        let wanted = wanted.map_or("", str::trim);
        let mut out = if wanted.is_empty() { "info".to_owned() } else { wanted.to_owned() };
        let enough =
            |level: &str| ["info", "debug", "trace"].iter().any(|l| level.trim().eq_ignore_ascii_case(l));
        let directives: Vec<&str> = out.split(',').map(str::trim).collect();
        let general = directives.iter().rev().find(|d| !d.contains(['=', ':']));
        let missing: Vec<String> = LOG_TARGETS
            .iter()
            .filter(|target| {
                let own = directives.iter().rev().find_map(|d| d.strip_prefix(**target)?.strip_prefix('='));
                !own.or(general.copied()).is_some_and(enough)
            })
            .map(|target| format!(",{target}=info"))
            .collect();
        out.push_str(&missing.concat());
        out
    }
}

/// The known versions, oldest first: one profile for each span in which nothing changes that matters here,
/// under the first version of the span.
pub fn profiles() -> Vec<Profile> {
    let mut starts: Vec<Version> = vec![OLDEST, v(0, 19, 1), v(0, 21, 2), v(1, 4, 2), v(2, 0, 5), v(2, 3, 0)];
    let keys = KEYS.iter().filter(|(k, _)| RENDERED.contains(&(k.section, k.key))).map(|(_, s)| s);
    let spans = keys.chain(FAULTS.iter().map(|(_, s)| s)).chain(FORMATS.iter().map(|(_, s)| s));
    starts.extend(spans.flat_map(|s| [s.from, s.below]));
    starts.retain(|start| *start >= OLDEST && *start < UNKNOWN);
    starts.sort_unstable();
    starts.dedup();
    starts.into_iter().map(Profile::cut).collect()
}

/// Whether ZeroFS `running` may open a volume that `written_by` wrote last. An upgrade within one format is
/// fine, and so is a downgrade within one minor version; everything else is refused, since ZeroFS itself may
/// write to the volume before it notices.
pub fn compatible(written_by: Version, running: Version) -> Result<()> {
    let (old, new) = (Profile::of(written_by)?, Profile::of(running)?);
    let same_line = (written_by.major, written_by.minor) == (running.major, running.minor);
    let fits = match (old.format, new.format) {
        // An unknown version of the newest known line is an ordinary upgrade, as far as anybody can tell.
        (Format::Extents, Format::Unknown) => running.major == written_by.major,
        (Format::Unknown, Format::Unknown) => running >= written_by || same_line,
        (old, new) => old == new && (running >= written_by || same_line),
    };
    if fits {
        return Ok(());
    }
    let why = if old.format == new.format { "older" } else { "incompatible" };
    Err(Error::new(
        Kind::Refused,
        format!("the volume was written by ZeroFS {written_by}; {running} is {why} and might damage it"),
    )
    .hint(format!(
        "run it with ZeroFS {written_by} (--zerofs-bin, or zerofsImage), or copy the data to a new volume"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(s: &str) -> Profile {
        Profile::of(s.parse().unwrap()).unwrap()
    }

    #[test]
    fn versions_are_read_as_zerofs_prints_them() {
        for (text, want) in [
            ("zerofs 0.19.1\n", v(0, 19, 1)),
            ("v2.3.0", v(2, 3, 0)),
            ("2.3.0-rc1", v(2, 3, 0)),
            ("1.0.3+abc", v(1, 0, 3)),
        ] {
            assert_eq!(text.parse::<Version>().unwrap(), want, "{text:?}");
        }
        for bad in ["", "zerofs", "1.2", "1.2.3.4", "a.b.c", "1.-2.3", "1.+2.3", "99999999999.0.0", "1..3"] {
            let e = bad.parse::<Version>().expect_err(bad);
            assert!(e.hint_text().is_some());
        }
        assert!(v(0, 9, 0) < v(0, 16, 2) && v(0, 19, 2) < v(0, 19, 10));
    }

    #[test]
    fn keys_come_and_go() {
        for (version, section, key, known) in [
            ("0.16.2", "lsm", "l0_max_ssts", false),
            ("0.16.2", "filesystem", "max_size_gb", false),
            ("0.17.0", "lsm", "l0_max_ssts", true),
            ("0.17.3", "lsm", "flush_interval_secs", false),
            ("0.17.3", "servers.rpc", "unix_socket", false),
            ("0.19.1", "lsm", "flush_interval_secs", true),
            ("0.19.1", "lsm", "max_unflushed_gb", true),
            ("0.19.1", "telemetry", "enabled", false),
            ("2.2.3", "lsm", "max_unflushed_gb", true),
            ("2.3.0", "lsm", "max_unflushed_gb", false),
            ("2.3.0", "telemetry", "enabled", true),
        ] {
            assert_eq!(profile(version).knows(section, key), known, "{version} {section}.{key}");
        }
    }

    #[test]
    fn the_measured_versions() {
        let old = profile("0.19.1");
        assert!(old.zeros_when_closed && old.flush_lies && old.file_storage && old.whole_max_size);
        assert!(!old.needs_if_match && !old.reads_aws_environment && old.warning.is_none());
        assert!(old.has_fault(READ_ERRORS_ARE_ZEROS));
        let new = profile("2.3.0");
        assert!(!new.zeros_when_closed && !new.flush_lies && !new.file_storage && !new.whole_max_size);
        assert!(new.needs_if_match && new.reads_aws_environment && new.warning.is_none());
        assert_eq!((old.knowledge, new.knowledge), (Knowledge::Measured, Knowledge::Measured));
    }

    #[test]
    fn unknown_versions_are_refused_or_guarded() {
        assert_eq!(Profile::of(v(0, 15, 9)).unwrap_err().kind(), Kind::Refused);
        let future = Profile::of(v(3, 0, 0)).unwrap();
        assert!(future.zeros_when_closed && future.flush_lies && future.warning.is_some());
        assert_eq!(future.knowledge, Knowledge::Guessed);
    }

    #[test]
    fn every_known_version_has_one_format_and_every_fault_a_guard() {
        let all = profiles();
        assert!(all.windows(2).all(|w| w[0].version < w[1].version));
        for p in &all {
            assert_ne!(p.format, Format::Unknown, "{}", p.version);
            assert_eq!(FORMATS.iter().filter(|(_, s)| s.has(p.version)).count(), 1);
            assert!(!p.faults.is_empty() && p.warning.is_none());
        }
        assert!(all.iter().any(|p| p.version == v(0, 19, 1)) && all.last().unwrap().version == v(2, 3, 0));
        let names: std::collections::HashSet<_> = FAULTS.iter().map(|(f, _)| f.name).collect();
        assert_eq!(names.len(), FAULTS.len());
    }

    #[test]
    fn volumes_go_up_within_a_format_and_never_across() {
        for (written, running, ok) in [
            ("0.19.1", "0.19.1", true),
            ("0.19.1", "2.3.0", false),
            ("0.19.1", "0.19.2", false),
            ("0.16.2", "0.17.0", true),
            ("0.17.0", "0.16.2", false),
            ("0.17.1", "0.17.0", true),
            ("0.18.0", "0.19.1", false),
            ("2.0.0", "2.3.0", true),
            ("2.3.0", "2.2.3", false),
            ("2.3.0", "0.19.1", false),
            ("2.3.0", "2.4.0", true),
            ("2.3.0", "3.0.0", false),
            ("2.4.0", "2.3.0", false),
            ("2.4.0", "2.4.0", true),
        ] {
            let got = compatible(written.parse().unwrap(), running.parse().unwrap());
            assert_eq!(got.is_ok(), ok, "{written} -> {running}");
            if let Err(e) = got {
                assert!(e.kind() == Kind::Refused && e.hint_text().is_some(), "{e}");
            }
        }
    }

    #[test]
    fn log_lines_give_faults_away() {
        let p = profile("0.19.1");
        for (line, sign) in [
            ("2026-11-20T18:00:00Z  INFO zerofs::nbd: client connected", None),
            (
                "ERROR slatedb: background task failed [name=writer, error=Fenced, panic=None]",
                Some(Sign::Fenced),
            ),
            ("detected newer DB client", Some(Sign::Fenced)),
            (
                "background task panicked unexpectedly. [task_name=memtable_writer, error=x]",
                Some(Sign::Closed),
            ),
            ("panicked at: fatal error loading manifest: ObjectStoreError", Some(Sign::Closed)),
            ("ERROR zerofs: Periodic flush failed: IoError", Some(Sign::Closed)),
            ("NBD write FUA flush failed: IoError", Some(Sign::Closed)),
            ("WARN won't flush imm to l0 because too many l0 files [l0_len=16]", Some(Sign::FlushLied)),
            ("retrying object store operation [error=Generic, duration=1s]", Some(Sign::StoreGivingUp)),
            (
                "Encountered transport error of kind Connect, backing off for 0.1 seconds, retry 1 of 10: x",
                Some(Sign::StoreTrouble),
            ),
            (
                "Encountered transport error of kind Connect, backing off for 0.31 seconds, retry 5 of 10: x 1",
                Some(Sign::StoreGivingUp),
            ),
            (
                "Encountered server error with status 503, backing off for 0.2 seconds, retry 4 of 10",
                Some(Sign::StoreTrouble),
            ),
            ("Encountered error while reading response body: x. Retrying in 0.1s", Some(Sign::StoreTrouble)),
            ("backing off for ", Some(Sign::StoreTrouble)),
        ] {
            assert_eq!(p.sign(line), sign, "{line}");
        }
    }

    #[test]
    fn the_watchdog_sees_its_lines_whatever_the_user_wants() {
        let p = profile("0.19.1");
        for (wanted, got) in [
            (None, "info"),
            (Some(" "), "info"),
            (Some("debug"), "debug"),
            (Some("warn"), "warn,zerofs=info,slatedb=info,object_store=info"),
            (Some("warn,zerofs=debug"), "warn,zerofs=debug,slatedb=info,object_store=info"),
            (Some("zerofs=trace"), "zerofs=trace,slatedb=info,object_store=info"),
            (Some("info,slatedb=off"), "info,slatedb=off,slatedb=info"),
        ] {
            assert_eq!(p.rust_log(wanted), got, "{wanted:?}");
        }
    }
}
