//! Why ZeroFS did not start: from the last lines of its log to an error that a person can act on.
//!
//! Promises: no secret of its config is ever quoted, and a cause that no retry cures is told apart from one
//! that may pass.

use std::path::Path;

use crate::error::{Error, Kind};

/// Why a start failed.
#[derive(Debug, Clone)]
pub(crate) struct Cause {
    /// The error for whoever asked for the start.
    pub error: Error,
    /// Whether trying again without changing anything is pointless.
    pub permanent: bool,
}

/// One rule: any of these texts in the output means this.
struct Rule {
    any: &'static [&'static str],
    kind: Kind,
    says: &'static str,
    hint: &'static str,
    permanent: bool,
}

/// The first rule that matches wins, so the more exact one stands first. The texts are those that ZeroFS
/// 0.19.1 and 2.3.0, SlateDB and object_store print.
const RULES: &[Rule] = &[
    Rule {
        any: &["Invalid password", "Failed to unwrap DEK"],
        kind: Kind::Refused,
        says: "the encryption password is wrong for this volume",
        hint: "give the password that the volume was created with",
        permanent: true,
    },
    Rule {
        any: &["segment extractor configuration mismatch", "unsupported manifest version", "invalid version"],
        kind: Kind::Refused,
        says: "the volume was written by a ZeroFS version with another storage format",
        hint: "use the version that wrote it: zerofsctl zerofs versions; choose a binary with --zerofs-bin",
        permanent: true,
    },
    Rule {
        any: &["Fenced", "detected newer DB client", "manifest version exists"],
        kind: Kind::Busy,
        says: "another ZeroFS opened the same volume at the same moment",
        hint: "find out which node uses the volume: zerofsctl show VOLUME",
        permanent: true,
    },
    Rule {
        any: &["does not support conditional writes"],
        kind: Kind::Environment,
        says: "the storage does not support conditional writes, without which two nodes could damage the volume",
        hint: "use a store that has them (AWS S3, MinIO, and most others)",
        permanent: true,
    },
    Rule {
        any: &["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"],
        kind: Kind::Environment,
        says: "the storage refuses the credentials",
        hint: "check the access key and the secret key",
        permanent: true,
    },
    Rule {
        any: &["NoSuchBucket", "The specified bucket does not exist"],
        kind: Kind::NotFound,
        says: "the bucket does not exist",
        hint: "create it, or check --storage-url",
        permanent: true,
    },
    Rule {
        any: &["AccessDenied", "status: 403", "403 Forbidden"],
        kind: Kind::Environment,
        says: "the credentials do not permit what ZeroFS needs",
        hint: "allow GetObject, PutObject, DeleteObject and ListBucket on the bucket's prefix",
        permanent: true,
    },
    Rule {
        any: &["ReadOnlyFilesystem", "Read-only file system"],
        kind: Kind::Environment,
        says: "the storage is read-only",
        hint: "mount it read-write, or choose another --storage-url",
        permanent: true,
    },
    Rule {
        any: &["StorageFull", "No space left on device", "QuotaExceeded"],
        kind: Kind::Environment,
        says: "the storage is full",
        hint: "free some room on it; no acknowledged data is lost",
        permanent: true,
    },
    Rule {
        any: &["Permission denied", "kind: PermissionDenied"],
        kind: Kind::Environment,
        says: "the storage is not writable",
        hint: "check the owner and the mode of the folder",
        permanent: true,
    },
    Rule {
        any: &["Failed to load config", "Failed to parse config", "Failed to read config"],
        kind: Kind::Environment,
        says: "ZeroFS does not accept the config that was written for it",
        hint: "check that the binary has the version that it is taken for: zerofsctl zerofs versions",
        permanent: true,
    },
    Rule {
        any: &[
            "unexpected argument",
            "unrecognized subcommand",
            "error while loading shared libraries",
            "GLIBC_",
        ],
        kind: Kind::Environment,
        says: "the zerofs binary does not run here",
        hint: "check it: zerofsctl zerofs versions; choose another with --zerofs-bin",
        permanent: true,
    },
    Rule {
        any: &["UnableToCreateDir", "Unable to create dir"],
        kind: Kind::Environment,
        says: "the folder of the storage cannot be made",
        hint: "check the path in --storage-url",
        permanent: true,
    },
    Rule {
        any: &["dns error", "failed to lookup address"],
        kind: Kind::Unreachable,
        says: "the name of the storage endpoint cannot be resolved",
        hint: "check the endpoint and the name service",
        permanent: false,
    },
    Rule {
        any: &["ConnectionRefused", "Connection refused"],
        kind: Kind::Unreachable,
        says: "the storage endpoint refuses connections",
        hint: "check that the endpoint runs and that its address is right",
        permanent: false,
    },
    Rule {
        any: &[
            "kind: Connect",
            "of kind Connect",
            "transport error",
            "error sending request",
            "TimedOut",
            "timed out",
            "status: 503",
            "status: 500",
        ],
        kind: Kind::Unreachable,
        says: "the storage cannot be reached",
        hint: "check the endpoint, the network and, for https, the certificates",
        permanent: false,
    },
];

/// Explains `output`, what ZeroFS printed since it was started, and how it `ended`, in words.
pub(crate) fn explain(output: &str, ended: &str, secrets: &[String]) -> Cause {
    // The settings that ZeroFS prints at start hold words such as "timeout"; an error never is an INFO line,
    // except that the storage client reports its retries so.
    let relevant: Vec<&str> =
        output.lines().filter(|l| !is_chatter(l) || l.contains("object_store::client::retry")).collect();
    let text = relevant.join("\n");
    // What it said when it ended outweighs what went wrong on the way.
    let last = text.rfind("Error: ").map_or("", |at| &text[at..]);
    let rule =
        [last, &text].into_iter().find_map(|t| RULES.iter().find(|r| r.any.iter().any(|a| t.contains(a))));
    if let Some(rule) = rule {
        let detail = detail(rule, &text, secrets).map(|d| format!(" ({d})")).unwrap_or_default();
        let error = Error::new(rule.kind, format!("ZeroFS {ended}: {}{detail}", rule.says)).hint(rule.hint);
        return Cause { error, permanent: rule.permanent };
    }
    let said = relevant
        .iter()
        .rev()
        .find(|l| l.starts_with("Error:"))
        .or_else(|| relevant.iter().rev().find(|l| l.contains("ERROR") || l.contains("panicked")))
        .or(relevant.last())
        .map(|l| redact(l, secrets))
        .filter(|l| !l.is_empty());
    let message = match said {
        Some(line) => format!("ZeroFS {ended}; it said: {}", shorten(&line)),
        None => format!("ZeroFS {ended} and said nothing"),
    };
    Cause {
        error: Error::failed(message).hint("read its log, zerofs.log in the volume's log folder"),
        permanent: false,
    }
}

/// What is worth quoting beside a rule's own words: the endpoint, the path, or the config line's number.
fn detail(rule: &Rule, text: &str, secrets: &[String]) -> Option<String> {
    let found = match rule.kind {
        Kind::Unreachable | Kind::NotFound => {
            let at = text.find("http://").or_else(|| text.find("https://"))?;
            let url = text[at..].split(|c: char| c.is_whitespace() || "\",)<>".contains(c)).next()?;
            // Scheme and host say enough; what follows may be a signed query.
            url.splitn(4, '/').take(3).collect::<Vec<_>>().join("/")
        }
        Kind::Environment => {
            let field = text.lines().find(|l| l.trim_start().starts_with("unknown field"));
            let path = || {
                let line = text.lines().rfind(|l| l.trim_start().starts_with("path: \""))?;
                line.split('"').nth(1).map(|p| p.trim_end_matches(|c: char| c == '#' || c.is_ascii_digit()))
            };
            field
                .map(|f| f.trim().split(", expected").next().unwrap_or_default().to_owned())
                .or_else(|| path().map(str::to_owned))?
        }
        _ => return None,
    };
    (!found.is_empty()).then(|| shorten(&redact(&found, secrets)))
}

/// Whether a line of ZeroFS's log is of a level at which nothing is wrong.
pub(crate) fn is_chatter(line: &str) -> bool {
    // `2026-11-20T18:00:00.000000Z  INFO module: text`; what has no such head (a panic, an error) counts.
    let mut words = line.split_ascii_whitespace();
    words.next().is_some_and(|w| w.ends_with('Z') && w.contains('T'))
        && words.next().is_some_and(|level| matches!(level, "INFO" | "DEBUG" | "TRACE"))
}

/// One line of at most 300 characters.
pub(crate) fn shorten(text: &str) -> String {
    let line = text.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(300) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

/// `text` with every secret replaced.
pub(crate) fn redact(text: &str, secrets: &[String]) -> String {
    secrets.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "[secret]"))
}

/// The secrets in a config.toml: the values of all keys that sound like one.
pub(crate) fn secrets_of(config: &Path) -> Vec<String> {
    fn collect(value: &toml::Value, key: &str, into: &mut Vec<String>) {
        match value {
            toml::Value::Table(table) => table.iter().for_each(|(k, v)| collect(v, k, into)),
            toml::Value::Array(all) => all.iter().for_each(|v| collect(v, key, into)),
            toml::Value::String(s) => {
                let key = key.to_ascii_lowercase();
                if s.len() >= 4
                    && ["password", "secret", "key", "token", "sas"].iter().any(|w| key.contains(w))
                {
                    into.push(s.clone());
                    // ZeroFS writes a literal `$` as `$$`; its messages hold the plain one.
                    into.push(s.replace("$$", "$"));
                }
            }
            _ => {}
        }
    }
    let mut secrets = Vec::new();
    if let Some(table) = std::fs::read_to_string(config).ok().and_then(|t| t.parse::<toml::Table>().ok()) {
        collect(&toml::Value::Table(table), "", &mut secrets);
    }
    // A secret that contains another one goes first.
    secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
    secrets.dedup();
    secrets
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ZeroFS 0.19.1 printed, cut to the telling lines.
    const PASSWORD: &str = "2026-11-20T17:58:20.923242Z  INFO slatedb::db::builder: opening [manifest_update_timeout=300s]\n\
        Error: Failed to unwrap DEK: Invalid password or corrupted key\n";
    const REFUSED: &str = "2026-11-20T18:09:43.986228Z  INFO object_store::client::retry: Encountered transport error of kind Connect\n\
        Error: Failed to write bucket ID marker: Generic {\n    uri: Some(\n      http://127.0.0.1:9/vols/csi/v1/.zerofs_bucket_id,\n\
        kind: ConnectionRefused,\n    message: \"Connection refused\",\n";
    const FIELD: &str = "Error: Failed to load config from ../config.toml\n\nCaused by:\n    0: Failed to parse config file: ../config.toml\n\
        1: TOML parse error at line 6, column 1\n         |\n       6 | urx = \"file:///proc/x\"\n         | ^^^\n       unknown field `urx`, expected `url` or `encryption_password`\n";
    const READONLY: &str = "Error: Failed to write bucket ID marker: Generic {\n    code: 30,\n kind: ReadOnlyFilesystem,\n message: \"Read-only file system\",\n  },\n  path: \"/srv/store/.zerofs_bucket_id#1\",\n";
    const KEYID: &str = "Error: Failed to write bucket ID marker: PermissionDenied {\n status: 403,\n body: Some(\"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIAXXX</AWSAccessKeyId></Error>\"\n";

    #[test]
    fn each_cause_has_its_kind_its_words_and_a_hint() {
        let cases = [
            (PASSWORD, Kind::Refused, "the encryption password is wrong", true),
            (REFUSED, Kind::Unreachable, "refuses connections (http://127.0.0.1:9)", false),
            (FIELD, Kind::Environment, "(unknown field `urx`)", true),
            (READONLY, Kind::Environment, "read-only (/srv/store/.zerofs_bucket_id)", true),
            (KEYID, Kind::Environment, "refuses the credentials", true),
            ("Error: something new\n   0: <unknown>\n", Kind::Failed, "it said: Error: something new", false),
            ("", Kind::Failed, "said nothing", false),
        ];
        for (output, kind, words, permanent) in cases {
            let cause = explain(output, "exited with status 1", &[]);
            assert_eq!(cause.error.kind(), kind, "{}", cause.error);
            assert!(cause.error.message().contains(words), "{}", cause.error);
            assert!(cause.error.hint_text().is_some());
            assert_eq!(cause.permanent, permanent, "{}", cause.error);
            assert!(!cause.error.message().contains("AKIAXXX"));
        }
    }

    #[test]
    fn secrets_are_found_in_a_config_and_never_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(
            &path,
            "[storage]\nurl = \"s3://b/p\"\nencryption_password = \"pa$$word\"\n[aws]\nsecret_access_key = \"topsecret\"\nregion = \"eu\"\n",
        )
        .unwrap();
        let secrets = secrets_of(&path);
        let cause = explain("Error: odd: pa$word and topsecret at s3://b/p\n", "exited", &secrets);
        let text = cause.error.message();
        assert!(!text.contains("pa$word") && !text.contains("topsecret"), "{text}");
        assert!(text.contains("s3://b/p"), "{text}");
    }
}
