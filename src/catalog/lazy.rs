//! A catalog that is opened when it is first asked: most operations on what is attached never ask it, and an S3 client
//! is dear.

use std::sync::OnceLock;

use super::{Catalog, DataPrefix, StorageUrl, Tag, VolumeRecord, Written};
use crate::error::Result;
use crate::settings::S3Settings;
use crate::values::VolumeId;

/// See the module.
pub struct LazyCatalog {
    url: StorageUrl,
    settings: S3Settings,
    opened: OnceLock<Box<dyn Catalog>>,
}

impl LazyCatalog {
    /// Names the store; opens nothing.
    pub fn new(url: StorageUrl, settings: S3Settings) -> LazyCatalog {
        LazyCatalog { url, settings, opened: OnceLock::new() }
    }

    fn opened(&self) -> Result<&dyn Catalog> {
        if self.opened.get().is_none() {
            let _ = self.opened.set(super::open(&self.url, &self.settings)?);
        }
        Ok(&**self.opened.get().expect("it was set"))
    }
}

impl Catalog for LazyCatalog {
    fn url(&self) -> &StorageUrl {
        &self.url
    }

    fn get(&self, id: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>> {
        self.opened()?.get(id)
    }

    fn create(&self, record: &VolumeRecord) -> Result<Written> {
        self.opened()?.create(record)
    }

    fn update(&self, record: &VolumeRecord, tag: &Tag) -> Result<Written> {
        self.opened()?.update(record, tag)
    }

    fn delete(&self, id: &VolumeId) -> Result<bool> {
        self.opened()?.delete(id)
    }

    fn list(&self) -> Box<dyn Iterator<Item = Result<VolumeId>> + '_> {
        match self.opened() {
            Ok(catalog) => catalog.list(),
            Err(e) => Box::new(std::iter::once(Err(e))),
        }
    }

    fn data_prefix(&self, id: &VolumeId) -> Result<DataPrefix> {
        self.opened()?.data_prefix(id)
    }
}
