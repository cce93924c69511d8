//! What the driver needs of its surroundings.

use std::sync::Arc;
use std::time::Duration;

use super::Role;
use crate::catalog::{Catalog, Objects};
use crate::error::Result;
use crate::host::Host;
use crate::values::VolumeId;

/// What a host is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The volume may be started, for the first time even: settings, password and program are needed.
    Start,
    /// The same, for a volume that was started here before.
    Reopen,
    /// What is there is looked at, or taken down.
    Settle,
}

/// The surroundings: the real machine with its settings, or a model.
///
/// The settings of a volume can one day come from a cluster's ConfigMap and Secrets: then it is this that reads them.
pub trait Backend: Send + Sync + 'static {
    /// Opens the host for one volume and works with it, on the calling thread.
    fn with_host(
        &self,
        volume: &VolumeId,
        need: Need,
        work: &mut dyn FnMut(&dyn Host) -> Result<()>,
    ) -> Result<()>;

    /// The records of the store.
    fn catalog(&self) -> Result<Arc<dyn Catalog>>;

    /// The objects of the same store, for a deletion.
    fn objects(&self) -> Result<Arc<dyn Objects>>;

    /// The cluster that new volumes belong to; none where there is none.
    fn cluster(&self) -> Result<Option<String>>;

    /// How long a volume that is deleted with its data can be restored, where it does not say itself; none: not at all.
    fn delete_grace(&self) -> Result<Option<Duration>>;

    /// An error that says what is missing: settings, program, devices, store.
    fn probe(&self, role: Role) -> Result<()>;
}
