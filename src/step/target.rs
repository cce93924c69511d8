//! What may be wrong with a target, in words.

use crate::error::{Error, Kind};
use crate::host::MountEntry;
use crate::values::TargetPath;

pub(crate) fn not_empty(target: &TargetPath) -> Error {
    Error::usage(format!("the target {target} is not empty"))
        .hint("a mount would hide what is in it: choose an empty or new folder")
}

pub(crate) fn not_a_folder(target: &TargetPath) -> Error {
    Error::usage(format!("the target {target} is not a folder"))
        .hint("choose an empty or new folder, or --block for a device link")
}

pub(crate) fn mounted(target: &TargetPath, entry: &MountEntry) -> Error {
    Error::new(Kind::Busy, format!("{} is already mounted at {target}", entry.source)).hint(format!(
        "choose another target, or take that away first: zerofsctl detach {target}, or umount {target}"
    ))
}

pub(crate) fn occupied(target: &TargetPath) -> Error {
    Error::usage(format!("the target {target} exists already"))
        .hint("a raw attach makes a link there: choose a path that does not exist yet")
}
