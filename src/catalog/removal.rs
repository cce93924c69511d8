//! The deletion of a volume's data: everything below `<storageURL>/<volumeID>/`, and nothing beside it. The record must
//! say `deleting` before the first object goes; any error ends it with the rest still there, and the next try goes on.

use std::fs;
use std::io;
use std::path::Path;

use futures::StreamExt;
use object_store::ObjectStore;
use object_store::list::{PaginatedListOptions, PaginatedListStore};

use super::local::LocalCatalog;
use super::s3::S3Catalog;
use super::{Catalog, State};
use crate::error::{Doing, Error, Kind, Result};
use crate::values::VolumeId;

/// Refuses unless the record says that the deletion has begun.
pub(super) fn require_deleting(catalog: &dyn Catalog, id: &VolumeId) -> Result<()> {
    match catalog.get(id)? {
        Some((record, _)) if record.state == State::Deleting && record.owner.is_none() => Ok(()),
        _ => Err(super::not_deleting(id)),
    }
}

fn stopped(id: &VolumeId, done: u64) -> Error {
    Error::new(Kind::Interrupted, format!("interrupted with {done} objects deleted"))
        .on(id)
        .hint("ask for the deletion again: it goes on from there")
}

/// Of a local store.
pub(super) fn local(catalog: &LocalCatalog, id: &VolumeId, stop: &dyn Fn() -> bool) -> Result<u64> {
    require_deleting(catalog, id)?;
    let folder = catalog.root().join(id.as_str());
    match fs::symlink_metadata(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e).doing("look at", &folder).map_err(|e| e.on(id)),
        Ok(meta) if !meta.is_dir() => {
            return Err(Error::refused(format!("{} is not a folder", folder.display()))
                .on(id)
                .hint("look at it, and move it away"));
        }
        Ok(_) => {}
    }
    let mut done = 0;
    clear(&folder, id, stop, &mut done)?;
    fs::File::open(catalog.root()).and_then(|f| f.sync_all()).doing("sync", catalog.root())?;
    Ok(done)
}

/// Symbolic links are removed, never followed.
fn clear(folder: &Path, id: &VolumeId, stop: &dyn Fn() -> bool, done: &mut u64) -> Result<()> {
    for entry in fs::read_dir(folder).doing("read", folder)? {
        if stop() {
            return Err(stopped(id, *done));
        }
        let entry = entry.doing("read", folder)?;
        let path = entry.path();
        if entry.file_type().doing("look at", &path)?.is_dir() {
            clear(&path, id, stop, done)?;
        } else {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).doing("remove", &path),
                _ => *done += 1,
            }
        }
    }
    match fs::remove_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).doing("remove", folder),
        _ => Ok(()),
    }
}

/// Of a bucket: page by page, each page in bulk requests, until a listing finds nothing.
pub(super) fn s3(catalog: &S3Catalog, id: &VolumeId, stop: &dyn Fn() -> bool) -> Result<u64> {
    require_deleting(catalog, id)?;
    // With the slash at its end: deleting vol1 must not touch vol10.
    let prefix = catalog.full_key(&format!("{id}/"));
    let mut done = 0;
    loop {
        if stop() {
            return Err(stopped(id, done));
        }
        // Always the first page: what it held before is gone.
        let options = PaginatedListOptions { max_keys: Some(1000), ..Default::default() };
        let page = catalog
            .exchange("list", catalog.store().list_paginated(Some(&prefix), options))
            .map_err(|e| e.on(id))?;
        let paths: Vec<_> = page.result.objects.into_iter().map(|o| o.location).collect();
        if paths.is_empty() {
            check_listing(catalog, id)?;
            return Ok(done);
        }
        if let Some(strange) = paths.iter().find(|p| !p.as_ref().starts_with(&prefix)) {
            return Err(Error::refused(format!("the server lists {strange}, which is not below {prefix}"))
                .on(id)
                .hint("nothing more was deleted; check that awsEndpoint is an S3 server"));
        }
        let count = paths.len() as u64;
        let work = async {
            let locations = futures::stream::iter(paths.into_iter().map(Ok)).boxed();
            let mut results = catalog.store().delete_stream(locations);
            while let Some(result) = results.next().await {
                match result {
                    // Gone is as good as deleted.
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        };
        catalog.exchange("delete the objects of a volume", work).map_err(|e| e.on(id))?;
        done += count;
    }
}

/// What is no listing at all, such as a login page, reads as an empty one. So a volume counts as empty only where a listing
/// shows what is certainly there: the record of the very volume.
fn check_listing(catalog: &S3Catalog, id: &VolumeId) -> Result<()> {
    let record = catalog.full_key(&super::key(id));
    let options = PaginatedListOptions { max_keys: Some(1), ..Default::default() };
    let page = catalog
        .exchange("list", catalog.store().list_paginated(Some(&record), options))
        .map_err(|e| e.on(id))?;
    if page.result.objects.iter().any(|o| o.location.as_ref() == record) {
        return Ok(());
    }
    Err(Error::refused("the server lists nothing of it, but not its record either, which is there")
        .on(id)
        .hint("nothing more was deleted; check that awsEndpoint is an S3 server"))
}
