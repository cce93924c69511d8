//! The catalog in a folder of this machine (`file://`): the embedded store.
//!
//! Writers hold a lock on the catalog's folder (flock: a killed writer holds nothing); readers need none, since
//! records are replaced by rename. The store's folder is made, mode 0700, by the first write; reading makes
//! nothing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::record::MAX_BYTES;
use super::{Catalog, DataPrefix, FOLDER, Scheme, State, StorageUrl, Tag, VolumeRecord, Written};
use crate::atomic_file::{self, FolderLock};
use crate::error::{Doing, Error, Kind, Result};
use crate::values::VolumeId;

/// How long a writer waits for the others. A write takes milliseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

/// The catalog of a `file://` store.
#[derive(Debug)]
pub struct LocalCatalog {
    url: StorageUrl,
    root: PathBuf,
}

impl LocalCatalog {
    /// Names the store; touches nothing.
    pub fn new(url: StorageUrl) -> Result<Self> {
        let Scheme::File(root) = url.scheme() else {
            return Err(Error::usage(format!("{url} is not a folder of this machine"))
                .hint("write file:///ABSOLUTE/FOLDER"));
        };
        Ok(LocalCatalog { root: root.to_owned(), url })
    }

    fn folder(&self) -> PathBuf {
        self.root.join(FOLDER)
    }

    fn path(&self, id: &VolumeId) -> PathBuf {
        self.root.join(super::key(id))
    }

    fn lock(&self) -> Result<FolderLock> {
        let volumes = self.folder().join("volumes");
        atomic_file::create_folder(&volumes).map_err(|e| store_error("make the folder", &volumes, e))?;
        let folder = self.folder();
        FolderLock::take(&folder, LOCK_LIMIT).map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => Error::new(
                Kind::Busy,
                format!("another process has held the catalog {} for 10 s", folder.display()),
            )
            .hint(format!("see who: fuser -v {}", folder.display())),
            _ => store_error("lock", &folder, e),
        })
    }

    /// The record's text as it is now; the caller holds the lock, or only reads.
    fn text(&self, id: &VolumeId) -> Result<Option<Vec<u8>>> {
        let path = self.path(id);
        // Not blocking, so that a FIFO in the record's place cannot hold us.
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(store_error("open the catalog record", &path, e).on(id)),
        };
        let mut bytes = Vec::with_capacity(2048);
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| store_error("read the catalog record", &path, e).on(id))?;
        Ok(Some(bytes))
    }

    /// The caller holds the lock.
    fn write(&self, _: &FolderLock, record: &VolumeRecord) -> Result<Tag> {
        let (path, beside) = (self.path(&record.id), self.folder().join("new.json"));
        let text = record.encode(&super::nonce()?)?;
        // Durable where it is now. That it has gone from where it was may come later: the next writer removes that name.
        atomic_file::replace(&path, &beside, text.as_bytes())
            .map_err(|e| store_error("write the catalog record", &path, e).on(&record.id))?;
        Ok(Tag(text))
    }
}

impl Catalog for LocalCatalog {
    fn url(&self) -> &StorageUrl {
        &self.url
    }

    fn get(&self, id: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>> {
        let Some(bytes) = self.text(id)? else { return Ok(None) };
        let (record, _) = VolumeRecord::decode(id, &bytes)?;
        // Sound records are UTF-8, so nothing is lost here.
        Ok(Some((record, Tag(String::from_utf8_lossy(&bytes).into_owned()))))
    }

    fn create(&self, record: &VolumeRecord) -> Result<Written> {
        let lock = self.lock()?;
        // Anything in its place counts, a damaged record too.
        match fs::symlink_metadata(self.path(&record.id)) {
            Ok(_) => Ok(Written::LostRace),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.write(&lock, record).map(Written::Done),
            Err(e) => Err(store_error("examine", &self.path(&record.id), e).on(&record.id)),
        }
    }

    fn update(&self, record: &VolumeRecord, tag: &Tag) -> Result<Written> {
        let lock = self.lock()?;
        match self.text(&record.id)? {
            Some(bytes) if bytes == tag.0.as_bytes() => self.write(&lock, record).map(Written::Done),
            _ => Ok(Written::LostRace),
        }
    }

    fn delete(&self, id: &VolumeId) -> Result<bool> {
        // Without a record there is no folder to make either.
        if self.text(id)?.is_none() {
            return Ok(false);
        }
        let _lock = self.lock()?;
        let Some((record, _)) = self.get(id)? else { return Ok(false) };
        if record.state != State::Deleting {
            return Err(super::not_deleting(id));
        }
        let path = self.path(id);
        fs::remove_file(&path)
            .and_then(|()| File::open(self.folder().join("volumes"))?.sync_all())
            .map_err(|e| store_error("remove the catalog record", &path, e).on(id))?;
        Ok(true)
    }

    fn list(&self) -> Box<dyn Iterator<Item = Result<VolumeId>> + '_> {
        let dir = self.folder().join("volumes");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Box::new(std::iter::empty()),
            Err(e) => return Box::new(std::iter::once(Err(store_error("list", &dir, e)))),
        };
        let mut failed = false;
        Box::new(entries.map_while(move |entry| {
            if failed {
                return None;
            }
            Some(match entry {
                Ok(entry) => super::id_of(&entry.file_name().to_string_lossy()),
                Err(e) => {
                    failed = true;
                    Err(store_error("list", &dir, e))
                }
            })
        }))
    }

    fn data_prefix(&self, id: &VolumeId) -> Result<DataPrefix> {
        let dir = self.root.join(id.as_str());
        let wrong = |path: &Path, e| store_error("list", path, e).on(id);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(DataPrefix::Empty),
            // Either the prefix itself is a file, or something above it, which is another matter.
            Err(e) if e.kind() == io::ErrorKind::NotADirectory && fs::symlink_metadata(&dir).is_ok() => {
                return Ok(DataPrefix::Foreign(id.to_string()));
            }
            Err(e) => return Err(wrong(&dir, e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| wrong(&dir, e))?;
            let mut name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().map_err(|e| wrong(&dir, e))?.is_dir() {
                // A bucket knows no empty folders; here a killed ZeroFS may leave some.
                if fs::read_dir(entry.path()).map_err(|e| wrong(&entry.path(), e))?.next().is_none() {
                    continue;
                }
                name.push('/');
            }
            names.push(name);
        }
        Ok(super::judge(names.iter().map(String::as_str)))
    }
}

/// An I/O error of the store, with the hint that fits a store.
fn store_error(what: &str, path: &Path, e: io::Error) -> Error {
    let message = format!("cannot {what} {}: {e}", path.display());
    match e.raw_os_error() {
        Some(libc::EROFS) => Error::environment(message)
            .hint("the store is read-only: mount its filesystem read-write, or choose another --storage-url"),
        Some(libc::EACCES | libc::EPERM) => Error::environment(message)
            .hint("run it as root or as the owner of the store, or choose another --storage-url"),
        Some(libc::ENOTDIR | libc::ELOOP) => Error::usage(message)
            .hint("a part of the store's path is not a folder: choose another --storage-url"),
        Some(libc::EISDIR) => {
            Error::refused(message).hint("there must be a plain file; move away what is there")
        }
        _ => Err::<(), _>(e).doing(what, path).expect_err("it was an error"),
    }
}
