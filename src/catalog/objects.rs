//! The objects of a store, for those who count and delete them.
//!
//! Keys are relative to the storage URL. What is listed is always a folder, with its slash ([`Below`]), and only what
//! lies below `<volumeID>/` can be deleted: no caller can name `vol10` by asking for `vol1`, and nobody can reach the
//! catalog or another's objects.

use std::fmt;

use jiff::Timestamp;

use crate::error::{Error, Result};
use crate::values::VolumeId;

/// The most keys of one deletion; also the most objects of a page.
pub const MAX_BATCH: usize = 1000;

/// A folder of the store: empty for the store itself, else with a slash at its end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Below(String);

impl Below {
    /// The whole store.
    pub fn root() -> Below {
        Below(String::new())
    }

    /// The folder of the catalog's records.
    pub fn records() -> Below {
        Below(format!("{}/volumes/", super::FOLDER))
    }

    /// All objects of a volume.
    pub fn volume(id: &VolumeId) -> Below {
        Below(format!("{id}/"))
    }

    /// The folder `name` in it, with or without its slash.
    pub fn folder(&self, name: &str) -> Below {
        Below(format!("{}{}/", self.0, name.trim_end_matches('/')))
    }

    /// The beginning of every key in it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Below {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Below({:?})", self.0)
    }
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Relative to the storage URL.
    pub key: String,
    /// In bytes.
    pub size: u64,
    /// When it was written, by the store's clock.
    pub modified: Timestamp,
}

/// A part of a listing, in the order of the keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// The objects.
    pub objects: Vec<Object>,
    /// The folders, each with its slash, relative to what was listed; only when folders were asked for.
    pub folders: Vec<String>,
    /// Where the next page begins; none after the last.
    pub next: Option<String>,
}

/// An upload in parts that was neither completed nor aborted: its parts cost money and are in no listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upload {
    /// Relative to the storage URL.
    pub key: String,
    /// The server's name for it.
    pub id: String,
}

/// The objects of one store. Requests are answered or fail within about a minute; a server that asks for less haste
/// is given it, inside.
///
/// Errors are those of [`Catalog`](super::Catalog). A listing that ends early is an error, never a short answer.
pub trait Objects: Send + Sync {
    /// One page of what is below; with `folders`, only the first level, each folder once.
    fn page(&self, below: &Below, folders: bool, next: Option<&str>) -> Result<Page>;

    /// The first page of what is below and not before `key`. A store that cannot begin there begins at the beginning, so
    /// earlier keys may come too.
    fn page_from(&self, below: &Below, key: &str) -> Result<Page> {
        let _ = key;
        self.page(below, false, None)
    }

    /// Deletes objects of `volume`, at most [`MAX_BATCH`]; one that is not there any more counts as deleted. What could
    /// not be deleted is in the answer, each with its reason. A key of anything else is an error, and nothing is deleted.
    fn delete(&self, volume: &VolumeId, keys: &[String]) -> Result<Vec<(String, Error)>>;

    /// The unfinished uploads of a volume.
    fn uploads(&self, volume: &VolumeId) -> Result<Vec<Upload>>;

    /// Aborts an upload of `volume`; one that is not there any more counts as aborted.
    fn abort(&self, volume: &VolumeId, upload: &Upload) -> Result<()>;

    /// Removes what a store keeps besides objects, such as empty folders. Only for a volume without objects.
    fn tidy(&self, volume: &VolumeId) -> Result<()>;

    /// When the record of a volume was last written; none without one.
    fn record_written(&self, volume: &VolumeId) -> Result<Option<Timestamp>>;

    /// Whether deleted objects stay as old versions; none when the server does not tell.
    fn keeps_versions(&self) -> Result<Option<bool>>;

    /// The store's time: that of the last answer, which is asked for when it is not recent.
    fn now(&self) -> Result<Timestamp>;
}

/// Fails unless every key is one of the volume's objects.
pub(super) fn only_of<'a>(volume: &VolumeId, keys: impl IntoIterator<Item = &'a str>) -> Result<()> {
    let below = Below::volume(volume);
    for key in keys {
        let inside = key
            .strip_prefix(below.as_str())
            .is_some_and(|rest| !rest.is_empty() && !rest.split('/').any(|part| matches!(part, "." | "..")));
        if !inside {
            return Err(
                Error::refused("an object of something else was about to be deleted; nothing was").on(volume)
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_its_folder_with_the_slash_and_nothing_else_can_be_deleted() {
        let vol1: VolumeId = "vol1".parse().unwrap();
        assert_eq!(Below::volume(&vol1).as_str(), "vol1/");
        assert_eq!(Below::volume(&vol1).folder("manifest/").as_str(), "vol1/manifest/");
        assert!(only_of(&vol1, ["vol1/a", "vol1/manifest/1"]).is_ok());
        for key in [
            "vol10/a",
            "vol1",
            "vol1/",
            "vol/a",
            ".zerofsctl/volumes/vol1.json",
            "vol1/../vol2/a",
            "vol1/./a",
            "",
            "/vol1/a",
        ] {
            assert!(only_of(&vol1, ["vol1/a", key]).is_err(), "{key}");
        }
    }
}
