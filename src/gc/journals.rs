//! The journals of this node as a witness: what is attached here, or was when a command was killed.

use std::path::PathBuf;

use super::evidence::{Reference, ReferenceKind, Testimony, Witness};
use crate::catalog::StorageUrl;
use crate::error::Result;
use crate::journal::{self, Journal, Standing};
use crate::values::VolumeId;

/// See the module.
#[derive(Debug, Clone)]
pub struct Journals {
    /// The run folder.
    pub run_dir: PathBuf,
    /// The store in question: a volume of the same name elsewhere is another one.
    pub url: StorageUrl,
}

impl Witness for Journals {
    fn name(&self) -> String {
        format!("the journals in {}", self.run_dir.display())
    }

    fn testify(&self) -> Result<Testimony> {
        let mut testimony = Testimony::default();
        for volume in journal::volumes(&self.run_dir)? {
            let references = self.refers(&volume)?;
            if !references.is_empty() {
                testimony.references.insert(volume, references);
            }
        }
        Ok(testimony)
    }

    fn refers(&self, volume: &VolumeId) -> Result<Vec<Reference>> {
        let Some(runs) = Journal::peek(&self.run_dir, volume)? else { return Ok(Vec::new()) };
        let standing = Standing::of(&runs);
        let here = standing.claim.as_ref().is_some_and(|c| c.storage_url == self.url.as_str());
        // Of a claim that is in doubt, too.
        let standing = standing.claimed && (here || standing.claim.is_none());
        let name = format!("this node in {}", self.run_dir.display());
        Ok(if standing { vec![Reference { kind: ReferenceKind::Journal, name }] } else { Vec::new() })
    }
}
