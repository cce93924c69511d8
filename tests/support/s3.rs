//! The S3 server of the tests that ask for nothing special: moto, or with `ZEROFSCTL_TEST_S3=minio` a real MinIO.

use std::net::SocketAddr;
use std::path::Path;

use zerofsctl::settings::S3Settings;

use super::minio::{self, Minio};
use super::moto::Moto;

/// A running server; dropping it ends it.
pub enum S3 {
    /// See [`Moto`].
    Moto(Moto),
    /// See [`Minio`].
    Minio(Minio),
}

impl S3 {
    /// Starts the one that the environment asks for.
    #[track_caller]
    pub fn start(dir: &Path) -> S3 {
        match std::env::var("ZEROFSCTL_TEST_S3").as_deref() {
            Ok("minio") => S3::Minio(Minio::start(dir)),
            Ok("moto") | Err(_) => S3::Moto(Moto::start(dir)),
            Ok(other) => panic!("ZEROFSCTL_TEST_S3={other}: moto or minio"),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        match self {
            S3::Moto(moto) => moto.address(),
            S3::Minio(minio) => minio.address(),
        }
    }

    /// What the library needs to reach it.
    pub fn settings(&self) -> S3Settings {
        match self {
            S3::Moto(moto) => moto.settings(),
            S3::Minio(minio) => minio.settings(),
        }
    }

    /// Its access key and secret key.
    pub fn keys_of_account(&self) -> [&'static str; 2] {
        match self {
            S3::Moto(_) => ["test", "test"],
            S3::Minio(_) => [minio::ACCESS_KEY, minio::SECRET_KEY],
        }
    }

    /// Makes a bucket.
    #[track_caller]
    pub fn create_bucket(&self, name: &str) {
        match self {
            S3::Moto(moto) => moto.create_bucket(name),
            S3::Minio(minio) => _ = minio.ask("PUT", &format!("/{name}"), &[], b""),
        }
    }

    /// Puts an object.
    #[track_caller]
    pub fn put(&self, bucket: &str, key: &str, body: &[u8]) {
        match self {
            S3::Moto(moto) => moto.put(bucket, key, body),
            S3::Minio(minio) => _ = minio.ask("PUT", &format!("/{bucket}/{key}"), &[], body),
        }
    }

    /// Begins an upload in parts, which is then left alone.
    #[track_caller]
    pub fn begin_upload(&self, bucket: &str, key: &str) {
        match self {
            S3::Moto(moto) => moto.begin_upload(bucket, key),
            S3::Minio(minio) => _ = minio.ask("POST", &format!("/{bucket}/{key}?uploads"), &[], b""),
        }
    }

    /// The text of a plain GET, such as `/vols?uploads`.
    #[track_caller]
    pub fn text(&self, path: &str) -> String {
        match self {
            S3::Moto(moto) => moto.text(path),
            S3::Minio(minio) => minio.ask("GET", path, &[], b""),
        }
    }

    /// The keys of a bucket that begin with `prefix`; at most the 1,000 that one listing holds.
    #[track_caller]
    pub fn keys(&self, bucket: &str, prefix: &str) -> Vec<String> {
        let body = self.text(&format!("/{bucket}?list-type=2&prefix={}", prefix.replace('/', "%2F")));
        assert!(!body.contains("<IsTruncated>true"), "more keys than one listing holds");
        let keys = body.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>"));
        keys.map(|(key, _)| key.to_owned()).collect()
    }
}
