//! The objects of a `file://` store: the files below a folder. Links are never followed.

use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::objects::only_of;
use super::{Below, MAX_BATCH, Object, Objects, Page, Scheme, StorageUrl, Upload};
use crate::error::{Doing, Error, Kind, Result};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug)]
pub struct LocalObjects {
    root: PathBuf,
}

impl LocalObjects {
    /// Names the store; touches nothing.
    pub fn new(url: &StorageUrl) -> Result<Self> {
        match url.scheme() {
            Scheme::File(root) => Ok(LocalObjects { root: root.to_owned() }),
            Scheme::S3 { .. } => Err(Error::usage(format!("{url} is not a folder of this machine"))
                .hint("write file:///ABSOLUTE/FOLDER")),
        }
    }

    /// The entries of a folder by name, folders with a slash as in keys, so that they sort as a bucket's do. A folder that
    /// is not there is empty; a link or a file in its place holds nothing.
    fn entries(&self, below: &str) -> Result<Vec<(String, DirEntry)>> {
        // Without the slash: a path that ends with one follows a link.
        let folder = self.root.join(below.trim_end_matches('/'));
        // The store itself may be reached by a link; what is in it may not.
        if !below.is_empty() && !fs::symlink_metadata(&folder).is_ok_and(|m| m.is_dir()) {
            return match fs::symlink_metadata(&folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound && e.kind() != io::ErrorKind::NotADirectory => {
                    Err(e).doing("examine", &folder)
                }
                _ => Ok(Vec::new()),
            };
        }
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).doing("list", &folder),
        };
        let mut named = Vec::new();
        for entry in entries {
            let entry = entry.doing("list", &folder)?;
            let Some(mut name) = entry.file_name().to_str().map(str::to_owned) else {
                return Err(Error::refused(format!("{} holds a name that is not UTF-8", folder.display()))
                    .hint("ZeroFS makes no such names: move the file away"));
            };
            if entry.file_type().doing("examine", entry.path())?.is_dir() {
                name.push('/');
            }
            named.push((name, entry));
        }
        named.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(named)
    }

    /// Adds the objects of a folder that come after `after`, until the page is full; whether it is.
    fn walk(&self, below: &str, after: &str, page: &mut Page) -> Result<bool> {
        for (name, entry) in self.entries(below)? {
            let key = format!("{below}{name}");
            if name.ends_with('/') {
                // The whole folder lies before the place where this page begins.
                if key.as_str() < after && !after.starts_with(&key) {
                    continue;
                }
                if self.walk(&key, after, page)? {
                    return Ok(true);
                }
            } else if key.as_str() > after && push(page, key, &entry)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Adds an object; whether the page is full now. One that has just gone is left out.
fn push(page: &mut Page, key: String, entry: &DirEntry) -> Result<bool> {
    let meta = match entry.metadata() {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e).doing("examine", entry.path()),
    };
    let modified = meta.modified().doing("examine", entry.path())?;
    let modified = Timestamp::try_from(modified).unwrap_or(Timestamp::MAX);
    page.objects.push(Object { key, size: meta.len(), modified });
    if page.objects.len() == MAX_BATCH {
        page.next = page.objects.last().map(|o| o.key.clone());
    }
    Ok(page.next.is_some())
}

impl Objects for LocalObjects {
    fn page(&self, below: &Below, folders: bool, next: Option<&str>) -> Result<Page> {
        let mut page = Page::default();
        if !folders {
            self.walk(below.as_str(), next.unwrap_or(""), &mut page)?;
            return Ok(page);
        }
        for (name, entry) in self.entries(below.as_str())? {
            if name.ends_with('/') {
                page.folders.push(name);
            } else {
                push(&mut page, format!("{}{name}", below.as_str()), &entry)?;
            }
        }
        // One level is one page here, however long.
        page.next = None;
        Ok(page)
    }

    fn delete(&self, volume: &VolumeId, keys: &[String]) -> Result<Vec<(String, Error)>> {
        only_of(volume, keys.iter().map(String::as_str))?;
        if fs::symlink_metadata(self.root.join(volume.as_str())).is_ok_and(|m| !m.is_dir()) {
            return Err(Error::refused(
                "its folder is a link or a file, so what is behind it is not its own",
            )
            .on(volume)
            .hint("look at it, and remove it by hand"));
        }
        let mut failed = Vec::new();
        for key in keys {
            let path = self.root.join(key);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    let e = Err::<(), _>(e).doing("remove", &path).expect_err("it was an error");
                    failed.push((key.clone(), e));
                }
            }
        }
        Ok(failed)
    }

    fn uploads(&self, _: &VolumeId) -> Result<Vec<Upload>> {
        Ok(Vec::new())
    }

    fn abort(&self, _: &VolumeId, _: &Upload) -> Result<()> {
        Ok(())
    }

    fn tidy(&self, volume: &VolumeId) -> Result<()> {
        fn remove_empty(folder: &Path) -> io::Result<()> {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    remove_empty(&entry.path())?;
                }
            }
            // Only empty ones can be removed so.
            fs::remove_dir(folder)
        }
        let folder = self.root.join(volume.as_str());
        match fs::symlink_metadata(&folder) {
            Ok(meta) if meta.is_dir() => remove_empty(&folder).doing("remove", &folder),
            Ok(_) => Err(Error::new(Kind::Refused, format!("{} is not a folder", folder.display()))
                .on(volume)
                .hint("move it away: it is not of ZeroFS")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e).doing("examine", &folder),
        }
    }

    fn record_written(&self, volume: &VolumeId) -> Result<Option<Timestamp>> {
        let path = self.root.join(super::key(volume));
        match fs::symlink_metadata(&path).and_then(|m| m.modified()) {
            Ok(time) => Ok(Some(Timestamp::try_from(time).unwrap_or(Timestamp::MAX))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).doing("examine", &path),
        }
    }

    fn keeps_versions(&self) -> Result<Option<bool>> {
        Ok(Some(false))
    }

    fn now(&self) -> Result<Timestamp> {
        // The kernel that answers also dates the files.
        Ok(Timestamp::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(keys: &[&str]) -> (tempfile::TempDir, LocalObjects) {
        let dir = tempfile::tempdir().unwrap();
        for key in keys {
            let path = dir.path().join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let objects = LocalObjects::new(&StorageUrl::from_dir(dir.path()).unwrap()).unwrap();
        (dir, objects)
    }

    fn id(text: &str) -> VolumeId {
        text.parse().unwrap()
    }

    fn keys(objects: &LocalObjects, below: &Below) -> Vec<String> {
        let (mut all, mut next) = (Vec::new(), None);
        loop {
            let page = objects.page(below, false, next.as_deref()).unwrap();
            all.extend(page.objects.into_iter().map(|o| o.key));
            next = page.next;
            if next.is_none() {
                return all;
            }
        }
    }

    #[test]
    fn pages_follow_on_each_other_in_the_order_of_keys() {
        let names: Vec<String> =
            (0..2500).map(|n| format!("vol1/{}/{n:04}", ["a", "a-b", "b"][n % 3])).collect();
        let (_dir, objects) = store(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(keys(&objects, &Below::volume(&id("vol1"))), sorted);
        assert_eq!(keys(&objects, &Below::volume(&id("vol"))), Vec::<String>::new());
        let top = objects.page(&Below::root(), true, None).unwrap();
        assert_eq!(top.folders, ["vol1/"]);
    }

    #[test]
    fn deleting_takes_only_the_volume_and_follows_no_link() {
        let (dir, objects) = store(&["vol1/manifest/1", "vol10/manifest/1", "other/file"]);
        std::os::unix::fs::symlink(dir.path().join("other"), dir.path().join("vol1/link")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("vol10"), dir.path().join("vol2")).unwrap();
        let vol1 = id("vol1");
        let found = keys(&objects, &Below::volume(&vol1));
        assert_eq!(found, ["vol1/link", "vol1/manifest/1"]);
        assert!(objects.delete(&vol1, &["vol10/manifest/1".into()]).is_err());
        assert!(objects.delete(&id("vol2"), &["vol2/manifest/1".into()]).is_err(), "it is a link to vol10");
        assert_eq!(keys(&objects, &Below::volume(&id("vol2"))), Vec::<String>::new());
        assert!(objects.tidy(&vol1).is_err(), "it is not empty");
        assert!(objects.delete(&vol1, &found).unwrap().is_empty());
        assert!(objects.delete(&vol1, &found).unwrap().is_empty(), "again");
        objects.tidy(&vol1).unwrap();
        assert!(!dir.path().join("vol1").exists());
        assert!(dir.path().join("vol10/manifest/1").exists() && dir.path().join("other/file").exists());
    }
}
