//! Options for mount(8): what an operator, a StorageClass or a PersistentVolume may give.

use crate::error::{Error, Result};

/// Options that would make it another kind of mount, or reach outside the target.
const REFUSED: [&str; 18] = [
    "bind",
    "rbind",
    "move",
    "remount",
    "loop",
    "offset",
    "sizelimit",
    "encryption",
    "user",
    "users",
    "owner",
    "helper",
    "uhelper",
    // Other devices of the machine.
    "device",
    "journal_dev",
    "journal_path",
    "logdev",
    "rtdev",
];

/// Splits at commas and checks each. Errors are [`Kind::Usage`](crate::error::Kind::Usage) and name the option.
pub fn check(given: &[String]) -> Result<Vec<String>> {
    let mut options = Vec::new();
    for option in given.iter().flat_map(|o| o.split(',')) {
        let name = option.split('=').next().unwrap_or_default();
        let wrong = |why: &str| {
            let shown: String = option.chars().take(80).flat_map(char::escape_debug).collect();
            Err(Error::usage(format!("mount option \"{shown}\" {why}"))
                .hint("see mount(8) and the manual of the filesystem, such as ext4(5)"))
        };
        if name.is_empty() {
            return wrong("is empty");
        }
        if !option.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            return wrong("does not begin as a mount option does");
        }
        if option.len() > 200 || !option.chars().all(|c| c.is_ascii_alphanumeric() || "-_.=:@/+".contains(c))
        {
            return wrong("has characters that no mount option has");
        }
        if matches!(name, "ro" | "rw") {
            return wrong("is decided by --read-only");
        }
        if REFUSED.contains(&name) || name.starts_with("x-") || name.starts_with("X-") {
            return wrong("is not for volumes");
        }
        if option.ends_with("=panic") {
            return wrong("would stop the whole machine for the fault of one volume");
        }
        options.push(option.to_owned());
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_are_split_and_checked() {
        let given = |o: &[&str]| check(&o.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(given(&["noatime,commit=5", "discard"]).unwrap(), ["noatime", "commit=5", "discard"]);
        for bad in [
            "",
            "a,,b",
            "ro",
            "rw",
            "bind",
            "remount",
            "loop",
            "x-mount.mkdir",
            "a b",
            "a;b",
            "a\nb",
            "context=\"x\"",
            "-o",
            "--bind",
            "logdev=/dev/sda",
            "device=/dev/sda",
            "journal_path=/dev/sda",
            "errors=panic",
        ] {
            assert!(given(&[bad]).is_err(), "{bad}");
        }
    }
}
