//! The storage URL: where the volumes of an installation live.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::values::VolumeId;

/// `file:///absolute/path` or `s3://bucket/prefix`: checked, and always without a slash at the end.
///
/// Its parts are plain ASCII, so that ZeroFS (which decodes `%` and expands `$`) and we read the same name.
/// It never holds a credential: a URL with `user:password@` or a query is refused without being repeated.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StorageUrl(String);

/// Which kind of store a [`StorageUrl`] names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme<'a> {
    /// A folder on this machine.
    File(&'a Path),
    /// A bucket, and the prefix in it (empty, or `a/b`).
    S3 {
        /// The bucket.
        bucket: &'a str,
        /// The prefix without slashes at its ends.
        prefix: &'a str,
    },
}

const HINT: &str = "write s3://BUCKET/PREFIX or file:///ABSOLUTE/FOLDER";

impl StorageUrl {
    /// The folder `dir` as a storage URL.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        match dir.to_str() {
            Some(text) if dir.is_absolute() => format!("file://{text}").parse(),
            _ => Err(Error::usage(format!("the store folder {dir:?} is not an absolute plain path"))
                .hint("choose an absolute path of letters, digits and - _ . ~ + = @ , :")),
        }
    }

    /// The URL as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Which store, and where in it.
    pub fn scheme(&self) -> Scheme<'_> {
        if let Some(path) = self.0.strip_prefix("file://") {
            Scheme::File(Path::new(path))
        } else {
            let rest = &self.0["s3://".len()..];
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            Scheme::S3 { bucket, prefix }
        }
    }

    /// Where the data of `volume` lives: `<storageURL>/<volumeID>`, as ZeroFS takes it.
    pub fn volume_url(&self, volume: &VolumeId) -> String {
        format!("{}/{volume}", self.0)
    }

    /// Whether it is in a bucket, and so needs credentials and a password that others can share.
    pub fn is_s3(&self) -> bool {
        matches!(self.scheme(), Scheme::S3 { .. })
    }
}

impl FromStr for StorageUrl {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let wrong = |why: String| Error::usage(format!("invalid storage URL: {why}"));
        let Some((scheme, rest)) = s.split_once("://") else {
            return Err(if s.starts_with('/') && s.len() < 200 && s.chars().all(plain_or_slash) {
                wrong("it is a path, not a URL".into()).hint(format!("write file://{s}"))
            } else {
                wrong("it has no scheme such as s3://".into()).hint(HINT)
            });
        };
        match scheme {
            "file" | "s3" => {}
            "gs" | "gcs" | "az" | "azure" | "abfs" | "abfss" | "adl" | "wasb" | "wasbs" => {
                return Err(wrong(format!("{scheme}:// is not supported by this version"))
                    .hint("supported now: s3://BUCKET/PREFIX and file:///ABSOLUTE/FOLDER"));
            }
            "s3a" | "s3n" => return Err(wrong(format!("{scheme}:// is not supported")).hint("write s3://")),
            "http" | "https" => {
                return Err(wrong("it names an HTTP server, not a bucket".into())
                    .hint("write s3://BUCKET/PREFIX, and the server as awsEndpoint in --config"));
            }
            _ => return Err(wrong("its scheme is unknown".into()).hint(HINT)),
        }
        if s.len() > 900 {
            return Err(wrong(format!("it has {} bytes, the limit is 900", s.len())).hint(HINT));
        }
        if rest.contains('?') || rest.contains('#') {
            return Err(wrong("it has a query or fragment".into())
                .hint("give credentials by --secret or the environment, other settings by --config"));
        }
        let authority = rest.split('/').next().unwrap_or_default();
        if authority.contains('@') {
            return Err(wrong("it has a user name or password".into())
                .hint("give credentials by --secret or the environment, never in the URL"));
        }
        // What follows may be repeated in a message: no part of it can be a credential.
        if let Some(c) = rest.chars().find(|c| !plain_or_slash(*c)) {
            return Err(wrong(format!("the character {c:?} is not allowed"))
                .hint("use letters, digits and - _ . ~ + = @ , : in it"));
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let path = if scheme == "file" {
            if rest.is_empty() {
                return Err(wrong("it names the root folder".into())
                    .hint("choose a folder of its own, such as file:///var/lib/zerofsctl/store"));
            }
            rest.strip_prefix('/').ok_or_else(|| {
                wrong("the folder is not absolute".into())
                    .hint("write three slashes: file:///ABSOLUTE/FOLDER")
            })?
        } else {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let letters = bucket
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
            let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
            let ends = edge(bucket.as_bytes().first()) && edge(bucket.as_bytes().last());
            if !(3..=63).contains(&bucket.len()) || !letters || !ends || bucket.contains("..") {
                return Err(wrong(format!("{bucket:?} is not a bucket name")).hint(
                    "a bucket name has 3 to 63 lower-case letters, digits, '-' or '.', and starts and ends with a letter or digit",
                ));
            }
            if prefix.is_empty() && rest.contains('/') {
                return Err(wrong("it has an empty path component".into()).hint("remove the second slash"));
            }
            prefix
        };
        if !path.is_empty() {
            for part in path.split('/') {
                match part {
                    "" => {
                        return Err(
                            wrong("it has an empty path component".into()).hint("remove the second slash")
                        );
                    }
                    "." | ".." => {
                        return Err(wrong(format!("it contains {part:?}")).hint("write the path out in full"));
                    }
                    super::FOLDER => {
                        return Err(wrong(format!("{part} in it is the catalog's own folder"))
                            .hint("name the folder or prefix above it"));
                    }
                    _ => {}
                }
            }
        }
        Ok(StorageUrl(format!("{scheme}://{rest}")))
    }
}

fn plain_or_slash(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/-_.~+=@,:".contains(c)
}

impl TryFrom<String> for StorageUrl {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<StorageUrl> for String {
    fn from(url: StorageUrl) -> String {
        url.0
    }
}

impl fmt::Display for StorageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for StorageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorageUrl({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_urls_lose_only_their_last_slash() {
        for (text, kept) in [
            ("s3://zerofs", "s3://zerofs"),
            ("s3://zerofs/", "s3://zerofs"),
            ("s3://vols/csi/a_b=c", "s3://vols/csi/a_b=c"),
            ("file:///var/lib/zerofsctl/store/", "file:///var/lib/zerofsctl/store"),
            ("file:///tmp/x.Y~1/a@b", "file:///tmp/x.Y~1/a@b"),
        ] {
            let url: StorageUrl = text.parse().expect(text);
            assert_eq!(url.as_str(), kept);
            assert_eq!(kept.parse::<StorageUrl>().unwrap(), url);
        }
    }

    #[test]
    fn parts() {
        let volume: VolumeId = "vol1".parse().unwrap();
        let url: StorageUrl = "s3://zerofs/a/b".parse().unwrap();
        assert_eq!(url.scheme(), Scheme::S3 { bucket: "zerofs", prefix: "a/b" });
        assert_eq!(url.volume_url(&volume), "s3://zerofs/a/b/vol1");
        assert!(url.is_s3());
        let url: StorageUrl = "s3://zerofs".parse().unwrap();
        assert_eq!(url.scheme(), Scheme::S3 { bucket: "zerofs", prefix: "" });
        let url = StorageUrl::from_dir(Path::new("/srv/store/")).unwrap();
        assert_eq!(url.scheme(), Scheme::File(Path::new("/srv/store")));
        assert!(StorageUrl::from_dir(Path::new("store")).is_err());
    }

    #[test]
    fn bad_urls_are_usage_errors_with_a_hint_and_repeat_no_secret() {
        for bad in [
            "",
            "zerofs",
            "/srv/store",
            "file://",
            "file:///",
            "file://store",
            "file://localhost/store",
            "file:///a/../b",
            "file:///a/./b",
            "file:///a//b",
            "file:///a b",
            "file:///a%20b",
            "file:///ä",
            "file:///a$HOME",
            "file:///a\nb",
            "file:///store/.zerofsctl",
            "s3://",
            "s3:///x",
            "s3://ab",
            "s3://Bucket",
            "s3://-bucket",
            "s3://buc..ket",
            "s3://bucket//x",
            "s3://bucket//",
            "s3://bucket/x//",
            "s3://bucket/../x",
            "s3://key:hunter22@bucket/x",
            "s3://bucket/x?secret=hunter22",
            "s3://bucket/x#hunter22",
            "S3://bucket",
            "s3a://bucket",
            "gs://bucket",
            "az://bucket",
            "memory://",
            "https://hunter22@server/bucket",
            &format!("s3://bucket/{}", "x/".repeat(500)),
        ] {
            let e = bad.parse::<StorageUrl>().expect_err(bad);
            assert_eq!(e.kind(), crate::error::Kind::Usage, "{bad}");
            assert!(e.hint_text().is_some(), "{bad}");
            let all = format!("{e} {e:?}");
            assert!(!all.contains("hunter22") && all.len() < 600, "{all}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics_and_is_stable(s in "(s3|file)://[ -~]{0,40}|\\PC{0,30}") {
            if let Ok(url) = s.parse::<StorageUrl>() {
                proptest::prop_assert_eq!(url.as_str().parse::<StorageUrl>().unwrap(), url);
            }
        }
    }
}
