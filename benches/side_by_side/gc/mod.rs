//! The collector beside s5cmd: on a real MinIO, and on a store that the bench plays itself, which is never what limits.
//!
//! s5cmd counts (`du`), lists (`ls`) and deletes (`rm`) the very objects that `gc-s3` counts and deletes, through the same
//! server in the same run.

mod minio;
mod played;
mod process;
mod store;

use std::fs;
use std::path::Path;
use std::process::Command;

use zerofsctl::settings::S3Settings;

use crate::Scale;
use crate::command::Zerofsctl;
use crate::support::minio::{ACCESS_KEY, SECRET_KEY, program};

/// The bucket; the store is the folder `vols` in it, so that both sides have a prefix to mind.
const BUCKET: &str = "bench";
const URL: &str = "s3://bench/vols";

/// All of it.
pub fn compare(scale: &Scale) {
    minio::compare(scale);
    played::far_away(scale);
    played::many_keys(scale);
}

/// Both command lines for one server.
struct Sides {
    endpoint: String,
    zerofsctl: Zerofsctl,
    config: String,
    s5cmd: std::path::PathBuf,
}

impl Sides {
    fn new(dir: &Path, settings: &S3Settings) -> Sides {
        let endpoint = settings.endpoint.clone().expect("a server of the bench has an endpoint");
        let config = dir.join("config.yaml");
        let text = format!("storageURL: {URL}\nawsEndpoint: {endpoint}\nawsAllowHTTP: \"true\"\n");
        fs::write(&config, text).expect("the bench's folder can be written");
        Sides {
            endpoint,
            zerofsctl: Zerofsctl::new(dir),
            config: config.display().to_string(),
            s5cmd: program("s5cmd"),
        }
    }

    /// `zerofsctl gc-s3 …` that asks no cluster: those of the bench are gone for good.
    fn gc(&self, args: &[&str]) -> Command {
        let all = ["--no-kubernetes", "--min-age", "0s", "--quiet", "0s", "--config", &self.config];
        let mut command = self.zerofsctl.command(&[&["gc-s3"], args, &all].concat());
        command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
        command
    }

    /// `s5cmd …`.
    fn s5cmd(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.s5cmd);
        command
            .args(["--endpoint-url", &self.endpoint])
            .args(args)
            .env_clear()
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .env("AWS_REGION", "us-east-1");
        command
    }
}

/// What an answer in JSON says.
fn data(answer: &str) -> serde_json::Value {
    let mut answer: serde_json::Value = serde_json::from_str(answer).expect("an answer in JSON");
    answer["data"].take()
}

/// How many objects `gc-s3 scan -o json` counted, and in how many volumes with any.
fn counted(answer: &str) -> (u64, usize) {
    let answer = data(answer);
    let volumes = answer["volumes"].as_array().expect("it has volumes");
    let objects = |v: &serde_json::Value| v["objects"].as_u64().expect("each volume was counted");
    (volumes.iter().map(objects).sum(), volumes.iter().filter(|v| objects(v) > 0).count())
}

/// How many objects `s5cmd du` counted: `12 bytes in 3 objects: s3://…`.
fn counted_by_s5cmd(answer: &str) -> u64 {
    let words: Vec<&str> = answer.split_whitespace().collect();
    let at = words.iter().position(|w| w.starts_with("objects")).expect("s5cmd du counts objects");
    words[at - 1].parse().expect("a number")
}
