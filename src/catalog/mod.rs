//! The volume catalog: one small record per volume, in the bucket, beside the data.
//!
//! A record lives at `<storageURL>/.zerofsctl/volumes/<volumeID>.json` and is only ever written with a
//! condition: create if nothing is there, or replace exactly what was read. Of several racers one wins and the
//! others are told so. A record that cannot be read or understood is an error, never "no record".
//!
//! [`open`] picks the store; both kinds pass one contract test (`tests/catalog.rs`).

mod lazy;
mod local;
mod provision;
mod objects;
mod objects_local;
mod objects_s3;
mod pace;
mod record;
mod s3;
mod tombstone;
mod url;

use rand::TryRngCore;

use crate::error::{Error, Result};
use crate::settings::S3Settings;
use crate::values::VolumeId;

pub use lazy::LazyCatalog;
pub use local::LocalCatalog;
pub use objects::{Below, MAX_BATCH, Object, Objects, Page, Upload};
pub use objects_local::LocalObjects;
pub use objects_s3::S3Objects;
pub use provision::{Provision, Published};
pub use record::{
    Claim, ClaimOptions, ClaimedAs, Content, FORMAT, Owner, Relation, Release, State, VolumeRecord,
};
pub use s3::S3Catalog;
pub use tombstone::{MarkedBy, Sweeper, Tombstone};
pub use url::{Scheme, StorageUrl};

/// The folder of the store that holds what is ours. No volume can have this name.
pub(crate) const FOLDER: &str = ".zerofsctl";

/// The key of a record, below the storage URL.
pub(crate) fn key(id: &VolumeId) -> String {
    format!("{FOLDER}/volumes/{id}.json")
}

/// Opens the catalog of the store at `url`. A `file://` store needs no settings, and touches neither the network
/// nor an async runtime.
pub fn open(url: &StorageUrl, s3: &S3Settings) -> Result<Box<dyn Catalog>> {
    Ok(match url.scheme() {
        Scheme::File(_) => Box::new(LocalCatalog::new(url.clone())?),
        Scheme::S3 { .. } => Box::new(S3Catalog::new(url.clone(), s3)?),
    })
}

/// Opens the objects of the store at `url`, for the collector.
pub fn objects(url: &StorageUrl, s3: &S3Settings) -> Result<Box<dyn Objects>> {
    Ok(match url.scheme() {
        Scheme::File(_) => Box::new(LocalObjects::new(url)?),
        Scheme::S3 { .. } => Box::new(S3Objects::new(url.clone(), s3)?),
    })
}

/// Which write of a record this is; an update says with it what it replaces. It is meaningful only to the
/// catalog that gave it.
#[derive(Clone, PartialEq, Eq)]
pub struct Tag(pub(crate) String);

impl Tag {
    /// A tag of a catalog that is made for tests.
    #[doc(hidden)]
    pub fn of_model(text: String) -> Tag {
        Tag(text)
    }
}

impl std::fmt::Debug for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The tag of a local record is its whole text.
        write!(f, "Tag({} bytes)", self.0.len())
    }
}

/// What became of a conditional write.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Written {
    /// It is stored, durably, under this tag.
    Done(Tag),
    /// Somebody else was quicker: read again and decide again.
    LostRace,
}

/// The on-disk families of ZeroFS, told apart by the names of their keys. Neither can open the other's volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// As 0.19.1 writes it.
    Old,
    /// As 2.3.0 writes it.
    New,
    /// A first start was cut short: no data was written, and either family may go on.
    Unstarted,
}

/// What lies under a volume's prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataPrefix {
    /// Nothing.
    Empty,
    /// A ZeroFS volume.
    ZeroFs(Family),
    /// Something else; one name from it.
    Foreign(String),
}

/// The records of one store.
///
/// Errors: [`Unreachable`](crate::error::Kind::Unreachable) when the store does not answer in time,
/// [`Environment`](crate::error::Kind::Environment) for what the machine lacks (room, permission),
/// [`Usage`](crate::error::Kind::Usage) for wrong settings and credentials,
/// [`Refused`](crate::error::Kind::Refused) for records that cannot be understood.
pub trait Catalog: Send + Sync {
    /// The store.
    fn url(&self) -> &StorageUrl;

    /// The record of `id`, or none if there certainly is none.
    fn get(&self, id: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>>;

    /// Writes a record where none is.
    fn create(&self, record: &VolumeRecord) -> Result<Written>;

    /// Replaces the record that was read with `tag`.
    fn update(&self, record: &VolumeRecord, tag: &Tag) -> Result<Written>;

    /// Removes the record of a volume whose deletion has begun, after its data is gone. False if there was none.
    ///
    /// Only a record in the state `deleting` is removed: no move leads out of it, so this needs no condition.
    fn delete(&self, id: &VolumeId) -> Result<bool>;

    /// The ids of all records, in no order, read page by page. A strange name is an error item, and the
    /// listing goes on after it; after any other error it ends.
    fn list(&self) -> Box<dyn Iterator<Item = Result<VolumeId>> + '_>;

    /// What lies under the volume's prefix: for adoption, and to refuse another family before ZeroFS starts.
    fn data_prefix(&self, id: &VolumeId) -> Result<DataPrefix>;
}

/// Whether ZeroFS makes this name directly under a volume's prefix; folders end with a slash.
pub(crate) fn is_of_zerofs(name: &str) -> bool {
    matches!(name, "zerofs.key" | "segments/" | "compactions/" | "gc/" | "wal/" | "manifest/" | "compacted/")
        || name == ".zerofs_bucket_id"
        || name.starts_with(".zerofs_compatibility_test_")
}

/// Judges the names directly under a volume's prefix; folders end with a slash. ZeroFS marks win over strange
/// names, since a later version may write names that we do not know.
pub(crate) fn judge<'a>(names: impl IntoIterator<Item = &'a str>) -> DataPrefix {
    let (mut old, mut new, mut probe, mut foreign) = (false, false, false, None);
    for name in names {
        match name {
            "zerofs.key" | "segments/" | "compactions/" | "gc/" | "wal/" => new = true,
            "manifest/" | "compacted/" => old = true,
            ".zerofs_bucket_id" => probe = true,
            _ if name.starts_with(".zerofs_compatibility_test_") => probe = true,
            _ => foreign = Some(name.chars().take(80).flat_map(char::escape_debug).collect::<String>()),
        }
    }
    match (new, old, probe, foreign) {
        (true, ..) => DataPrefix::ZeroFs(Family::New),
        (_, true, ..) => DataPrefix::ZeroFs(Family::Old),
        (_, _, _, Some(name)) => DataPrefix::Foreign(name),
        (_, _, true, _) => DataPrefix::ZeroFs(Family::Unstarted),
        _ => DataPrefix::Empty,
    }
}

/// The volume of a record's file name; an error item for the listing when it is not one.
pub(crate) fn id_of(name: &str) -> Result<VolumeId> {
    name.strip_suffix(".json").and_then(|id| id.parse().ok()).ok_or_else(|| {
        let shown: String = name.chars().take(80).flat_map(char::escape_debug).collect();
        Error::refused(format!("the catalog contains {shown:?}, which is not the name of a record"))
            .hint(format!("look at <storage URL>/{FOLDER}/volumes/ and move it away"))
    })
}

/// Makes a write distinct from every other.
pub(crate) fn nonce() -> Result<String> {
    let number = rand::rngs::OsRng
        .try_next_u64()
        .map_err(|e| Error::environment(format!("the kernel gives no random numbers: {e}")))?;
    Ok(format!("{number:016x}"))
}

fn not_deleting(id: &VolumeId) -> Error {
    Error::refused("its record can be removed only after its deletion has begun").on(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_judged_by_their_marks() {
        use DataPrefix::*;
        let old = [".zerofs_bucket_id", "manifest/", "compacted/"];
        let cases: [(&[&str], DataPrefix); 9] = [
            (&[], Empty),
            (&old, ZeroFs(Family::Old)),
            (&["manifest/"], ZeroFs(Family::Old)),
            (&[".zerofs_bucket_id", "manifest/", "compacted/", "zerofs.key"], ZeroFs(Family::New)),
            (&["manifest/", "segments/", "later-idea/"], ZeroFs(Family::New)),
            (&[".zerofs_bucket_id", ".zerofs_compatibility_test_0b6f"], ZeroFs(Family::Unstarted)),
            (&["manifest/", "notes.txt"], ZeroFs(Family::Old)),
            (&["notes.txt"], Foreign("notes.txt".into())),
            (&[".zerofs_bucket_id", "a\u{1b}[2J"], Foreign("a\\u{1b}[2J".into())),
        ];
        for (names, expected) in cases {
            assert_eq!(judge(names.iter().copied()), expected, "{names:?}");
        }
    }
}
