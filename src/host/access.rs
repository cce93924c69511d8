//! How a volume's storage is reached, kept beside its config (0600) for as long as we hold the claim: whoever
//! releases the volume later, a detach without any flag or a recovery, must be able to tell the catalog.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::catalog::StorageUrl;
use crate::error::{Doing, Error, Result};
use crate::password::Secret;
use crate::settings::{AwsCredentials, S3Settings};

/// The stored form. It has secrets, so it is never printed.
#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    storage_url: StorageUrl,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    region: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allow_http: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    access_key_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret_access_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session_token: Option<String>,
}

impl Drop for Stored {
    fn drop(&mut self) {
        use zeroize::Zeroize;
        self.secret_access_key.zeroize();
        self.session_token.zeroize();
    }
}

const FORMAT: u32 = 1;

/// Where it is written before it is put in its place.
const BESIDE: &str = ".access.json.new";

fn path(folder: &Path) -> PathBuf {
    folder.join("access.json")
}

/// Writes it, durably, into the volume's state folder.
pub fn save(folder: &Path, url: &StorageUrl, s3: &S3Settings) -> Result<()> {
    let credentials = s3.credentials.as_ref();
    let stored = Stored {
        format: FORMAT,
        storage_url: url.clone(),
        endpoint: s3.endpoint.clone(),
        region: s3.region.clone(),
        allow_http: s3.allow_http,
        access_key_id: credentials.map(|c| c.access_key_id.expose().to_owned()),
        secret_access_key: credentials.map(|c| c.secret_access_key.expose().to_owned()),
        session_token: credentials.and_then(|c| c.session_token.as_ref()).map(|t| t.expose().to_owned()),
    };
    let bytes = zeroize::Zeroizing::new(
        serde_json::to_vec(&stored)
            .map_err(|e| Error::failed(format!("cannot encode the access file: {e}")))?,
    );
    let path = path(folder);
    crate::atomic_file::replace(&path, &folder.join(BESIDE), &bytes).doing("write", &path)
}

/// Reads it back; none when there is none.
pub fn load(folder: &Path) -> Result<Option<(StorageUrl, S3Settings)>> {
    let path = path(folder);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => zeroize::Zeroizing::new(bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).doing("read", &path),
    };
    // Serde's error could repeat a value.
    let mut stored: Stored = serde_json::from_slice(&bytes).map_err(|_| {
        Error::refused(format!("{} is damaged", path.display()))
            .hint("give the storage again: --config FILE, or --storage-url URL and the credentials in the environment")
    })?;
    if stored.format > FORMAT {
        return Err(Error::refused(format!("{} was written by a newer zerofsctl", path.display()))
            .hint("use that version"));
    }
    let credentials = match (stored.access_key_id.take(), stored.secret_access_key.take()) {
        (Some(id), Some(key)) => Some(AwsCredentials {
            access_key_id: Secret::new(id),
            secret_access_key: Secret::new(key),
            session_token: stored.session_token.take().map(Secret::new),
        }),
        _ => None,
    };
    let s3 = S3Settings {
        endpoint: stored.endpoint.take(),
        region: stored.region.take(),
        allow_http: stored.allow_http,
        credentials,
    };
    Ok(Some((stored.storage_url.clone(), s3)))
}

/// Removes it.
pub fn remove(folder: &Path) -> Result<()> {
    // A save that was killed has left what it wrote beside.
    for path in [path(folder), folder.join(BESIDE)] {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).doing("remove", &path),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_saved_is_read_back_and_nobody_else_can() {
        let dir = tempfile::tempdir().unwrap();
        let url: StorageUrl = "s3://bucket/prefix".parse().unwrap();
        let credentials = AwsCredentials {
            access_key_id: Secret::new("id".into()),
            secret_access_key: Secret::new("k\"e$y\\".into()),
            session_token: None,
        };
        let s3 = S3Settings {
            endpoint: Some("http://127.0.0.1:9000".into()),
            region: None,
            allow_http: Some(true),
            credentials: Some(credentials.clone()),
        };
        assert!(load(dir.path()).unwrap().is_none());
        save(dir.path(), &url, &s3).unwrap();
        let mode = std::fs::metadata(path(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let (url_back, s3_back) = load(dir.path()).unwrap().unwrap();
        assert_eq!((url_back, s3_back.credentials), (url, Some(credentials)));
        // One that was killed while it saved.
        std::fs::write(dir.path().join(BESIDE), "{").unwrap();
        remove(dir.path()).unwrap();
        assert!(load(dir.path()).unwrap().is_none());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
