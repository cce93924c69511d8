//! placeholder until merged
use serde::{Deserialize, Serialize};
/// content
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Content {
    Never,
    Formatting,
    Formatted,
    Raw,
    Unknown,
}
