//! What lies under a volume's prefix: counted page by page, so in memory that does not depend on how much it is.

use super::Watch;
use super::evidence::Facts;
use crate::catalog::{self, Below, DataPrefix, Object, Objects};
use crate::error::{Error, Kind, Result};
use crate::values::VolumeId;

/// The folder of manifests.
const MANIFEST: &str = "manifest/";

/// So many pages are read one after the other before a volume counts as large: sharing out costs requests, too.
const PAGES: usize = 4;

/// Counts all objects of a volume. `threads` shares the rest of a large volume out by folder.
pub(super) fn measure(
    objects: &dyn Objects,
    volume: &VolumeId,
    threads: usize,
    watch: &dyn Watch,
) -> Result<Facts> {
    let below = Below::volume(volume);
    let mut tally = Tally::new(&below);
    let (mut last, mut next) = (String::new(), None);
    for page in 0..if threads <= 1 { 1 } else { PAGES } {
        let found = objects.page(&below, false, next.as_deref()).map_err(|e| e.on(volume))?;
        tally.take(&found.objects, watch);
        let stays = found.next.is_some() && found.next == next;
        next = found.next;
        if next.is_none() {
            return Ok(tally.facts());
        }
        if stays {
            return Err(no_progress().on(volume));
        }
        // What is not a volume may have any size, and is nobody's to count here.
        if page == 0 && tally.names.iter().any(|n| !catalog::is_of_zerofs(n)) {
            return Ok(Facts { objects: None, bytes: 0, ..tally.facts() });
        }
        if let Some(object) = found.objects.last() {
            last.clone_from(&object.key);
        }
    }
    if threads <= 1 {
        tally.rest(objects, &below, None, next, watch).map_err(|e| e.on(volume))?;
        return Ok(tally.facts());
    }
    // A folder each, after the one that was reached; and the rest of that.
    let (mut parts, mut level) = (vec![Part::Rest(next)], None);
    loop {
        let page = objects.page(&below, true, level.as_deref()).map_err(|e| e.on(volume))?;
        let after: Vec<Object> = page.objects.into_iter().filter(|o| o.key > last).collect();
        tally.take(&after, watch);
        let folders = page.folders.into_iter().filter(|f| format!("{}{f}", below.as_str()) > last);
        parts.extend(folders.map(Part::Folder));
        let stays = page.next.is_some() && page.next == level;
        level = page.next;
        if level.is_none() {
            break;
        }
        if stays {
            return Err(no_progress().on(volume));
        }
    }
    let reached = folder_of(&below, &last);
    let whole = std::sync::Mutex::new(tally);
    super::in_parallel(threads, parts, |part| {
        let mut tally = Tally::new(&below);
        match part {
            Part::Folder(name) => tally.rest(objects, &below.folder(&name), None, None, watch),
            // Without a folder all that comes after it is in the parts already.
            Part::Rest(next) => match reached {
                Some(folder) => tally.rest(objects, &below, Some(folder), next, watch),
                None => Ok(()),
            },
        }
        .map_err(|e| e.on(volume))?;
        whole.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(tally);
        Ok(())
    })?;
    Ok(whole.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).facts())
}

/// A part of a large volume.
enum Part {
    /// What comes in the folder that was reached, from this place of the listing on.
    Rest(Option<String>),
    /// A whole folder.
    Folder(String),
}

/// The beginning of all keys in the first folder below `below` that the key is in; none if it is in no folder.
fn folder_of<'a>(below: &Below, key: &'a str) -> Option<&'a str> {
    let slash = key.strip_prefix(below.as_str())?.find('/')?;
    key.get(..=below.as_str().len() + slash)
}

fn no_progress() -> Error {
    Error::new(Kind::Unreachable, "the listing does not get on").hint("run the same command again")
}

/// Only what it is and what was written last, by a look at the first level and at the manifests: for a last look.
pub(super) fn glance(objects: &dyn Objects, volume: &VolumeId, watch: &dyn Watch) -> Result<Facts> {
    glance_since(objects, volume, None, watch)
}

/// The same, of manifests only at this one and those that came later: ZeroFS numbers them in their order.
pub(super) fn glance_since(
    objects: &dyn Objects,
    volume: &VolumeId,
    manifest: Option<&str>,
    watch: &dyn Watch,
) -> Result<Facts> {
    let below = Below::volume(volume);
    let mut tally = Tally::new(&below);
    let mut next = None;
    loop {
        let page = objects.page(&below, true, next.as_deref()).map_err(|e| e.on(volume))?;
        tally.take(&page.objects, &super::Unwatched);
        page.folders.iter().for_each(|f| tally.name(f));
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    if tally.names.iter().any(|n| n == MANIFEST) {
        let folder = below.folder(MANIFEST);
        let first = match manifest {
            Some(key) => objects.page_from(&folder, key),
            None => objects.page(&folder, false, None),
        };
        let first = first.map_err(|e| e.on(volume))?;
        tally.take(&first.objects, &super::Unwatched);
        if let Some(next) = first.next {
            tally.rest(objects, &folder, None, Some(next), &super::Unwatched).map_err(|e| e.on(volume))?;
        }
    }
    // In a bucket with versions MinIO lists the folders of what was deleted, too.
    if tally.count == 0 && !tally.names.is_empty() {
        let page = objects.page(&below, false, None).map_err(|e| e.on(volume))?;
        if page.objects.is_empty() && page.next.is_none() {
            return Ok(Facts { objects: None, ..Facts::EMPTY });
        }
    }
    if watch.interrupted() {
        return Err(Error::new(Kind::Interrupted, "stopped as asked"));
    }
    Ok(Facts { objects: None, bytes: 0, ..tally.facts() })
}

/// A sum that grows page by page.
struct Tally {
    below: String,
    /// The names of the first level, but of probe files only one.
    names: Vec<String>,
    facts: Facts,
    count: u64,
}

impl Tally {
    fn new(below: &Below) -> Tally {
        Tally { below: below.as_str().to_owned(), names: Vec::new(), facts: Facts::EMPTY, count: 0 }
    }

    fn name(&mut self, name: &str) {
        // Of names that are alike one is enough; ZeroFS leaves a probe file at each start.
        let known = |n: &String| {
            n == name
                || !n.ends_with('/')
                    && !name.ends_with('/')
                    && catalog::is_of_zerofs(n) == catalog::is_of_zerofs(name)
        };
        if name == "zerofs.key" && !self.names.iter().any(|n| n == name) || !self.names.iter().any(known) {
            self.names.push(name.to_owned());
        }
    }

    fn take(&mut self, objects: &[Object], watch: &dyn Watch) {
        let mut bytes = 0;
        for object in objects {
            let Some(inside) = object.key.strip_prefix(&self.below) else { continue };
            let first = inside.find('/').map_or(inside, |slash| &inside[..=slash]);
            if !self.names.iter().any(|n| n == first) {
                self.name(first);
            }
            if first == MANIFEST && self.facts.manifest.as_ref().is_none_or(|m| *m < object.key) {
                self.facts.manifest = Some(object.key.clone());
            }
            self.facts.newest = self.facts.newest.max(Some(object.modified));
            bytes += object.size;
        }
        self.count += objects.len() as u64;
        self.facts.bytes += bytes;
        watch.objects(objects.len() as u64, bytes);
    }

    /// Counts what is below, from this place on; with `within`, which begins all keys of a folder, only until that ends.
    fn rest(
        &mut self,
        objects: &dyn Objects,
        below: &Below,
        within: Option<&str>,
        from: Option<String>,
        watch: &dyn Watch,
    ) -> Result<()> {
        let mut next = from;
        loop {
            let page = objects.page(below, false, next.as_deref())?;
            let inside = within.map_or(page.objects.len(), |folder| {
                page.objects.iter().take_while(|o| o.key.starts_with(folder)).count()
            });
            self.take(&page.objects[..inside], watch);
            if inside < page.objects.len() {
                return Ok(());
            }
            if watch.interrupted() {
                return Err(Error::new(Kind::Interrupted, "stopped as asked"));
            }
            match page.next {
                None => return Ok(()),
                // Otherwise it would never end.
                Some(same) if Some(&same) == next.as_ref() => return Err(no_progress()),
                other => next = other,
            }
        }
    }

    fn add(&mut self, part: Tally) {
        for name in part.names {
            self.name(&name);
        }
        self.count += part.count;
        self.facts.bytes += part.facts.bytes;
        self.facts.newest = self.facts.newest.max(part.facts.newest);
        self.facts.manifest = self.facts.manifest.take().max(part.facts.manifest);
    }

    fn facts(mut self) -> Facts {
        let foreign = self.names.iter().find(|n| !catalog::is_of_zerofs(n));
        self.facts.content = match foreign {
            Some(name) => DataPrefix::Foreign(name.chars().take(80).flat_map(char::escape_debug).collect()),
            None => catalog::judge(self.names.iter().map(String::as_str)),
        };
        self.facts.objects = Some(self.count);
        self.facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{Family, LocalObjects, StorageUrl};
    use crate::gc::Unwatched;

    fn store(keys: &[String]) -> (tempfile::TempDir, LocalObjects) {
        let dir = tempfile::tempdir().unwrap();
        for key in keys {
            let path = dir.path().join(key);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "abc").unwrap();
        }
        let objects = LocalObjects::new(&StorageUrl::from_dir(dir.path()).unwrap()).unwrap();
        (dir, objects)
    }

    #[test]
    fn a_volume_of_many_pages_is_counted_the_same_in_every_way() {
        let id = "vol1".parse().unwrap();
        // The last page that is read in order ends before, in, at the end of, and after the first folder.
        for tables in [1500, 3998, 3999, 4000, 5200] {
            let mut keys: Vec<String> = (0..tables).map(|n| format!("vol1/compacted/{n:05}.sst")).collect();
            keys.extend((0..1200).map(|n| format!("vol1/manifest/{n:05}.manifest")));
            keys.extend([".zerofs_bucket_id", "zerofs.key"].map(|name| format!("vol1/{name}")));
            keys.push("vol1/segments/a/b".into());
            keys.push("vol10/manifest/99999.manifest".into());
            let (_dir, objects) = store(&keys);
            let one = measure(&objects, &id, 1, &Unwatched).unwrap();
            let many = measure(&objects, &id, 4, &Unwatched).unwrap();
            assert_eq!(one, many, "{tables}");
            let count = tables + 1203;
            assert_eq!((one.objects, one.bytes), (Some(count), 3 * count));
            assert_eq!(one.manifest.as_deref(), Some("vol1/manifest/01199.manifest"));
        }
        let mut keys: Vec<String> = (0..1500).map(|n| format!("vol1/compacted/{n:05}.sst")).collect();
        keys.extend((0..1200).map(|n| format!("vol1/manifest/{n:05}.manifest")));
        let (_dir, objects) = store(&keys);
        let one = measure(&objects, &id, 4, &Unwatched).unwrap();
        assert_eq!(one.content, DataPrefix::ZeroFs(Family::Old));
        let glance = glance(&objects, &id, &Unwatched).unwrap();
        assert_eq!((&glance.manifest, &glance.content), (&one.manifest, &one.content));
        let none = measure(&objects, &"vol".parse().unwrap(), 4, &Unwatched).unwrap();
        assert_eq!(none, Facts::EMPTY);
    }

    #[test]
    fn one_strange_name_among_zerofs_ones_makes_it_foreign() {
        let (_dir, objects) =
            store(&["vol1/manifest/1".into(), "vol1/zerofs.key".into(), "vol1/notes.txt".into()]);
        let id = "vol1".parse().unwrap();
        for facts in
            [measure(&objects, &id, 1, &Unwatched).unwrap(), glance(&objects, &id, &Unwatched).unwrap()]
        {
            assert_eq!(facts.content, DataPrefix::Foreign("notes.txt".into()));
        }
    }
}
