//! Values that are checked once, where they enter, and valid from then on.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The name of a volume: the last part of its prefix in the bucket, and of its folders on the node.
///
/// 1 to 128 characters: letters, digits, `-`, `_` and single dots inside; it starts and ends with a letter
/// or digit. That covers Kubernetes PV names (`pvc-<uuid>`) and keeps every path and object key that is
/// made of it one plain component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// The longest accepted id, in bytes.
    pub const MAX: usize = 128;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeId {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let wrong = |why: &str| {
            // A very long or binary id must not flood the terminal.
            let shown: String = s.chars().take(40).flat_map(char::escape_debug).collect();
            let more = if s.chars().count() > 40 { "…" } else { "" };
            Err(Error::usage(format!("invalid volume id \"{shown}{more}\": {why}")).hint(
                "use 1 to 128 letters, digits, '-', '_' or '.', starting and ending with a letter or digit",
            ))
        };
        if s.is_empty() {
            return wrong("it is empty");
        }
        if s.len() > Self::MAX {
            return wrong(&format!("it has {} bytes, the limit is {}", s.len(), Self::MAX));
        }
        if let Some(c) = s.chars().find(|c| !c.is_ascii_alphanumeric() && !"-_.".contains(*c)) {
            return wrong(&format!("the character {c:?} is not allowed"));
        }
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if !edge(s.chars().next()) || !edge(s.chars().last()) {
            return wrong("it must start and end with a letter or digit");
        }
        if s.contains("..") {
            return wrong("it contains '..'");
        }
        Ok(VolumeId(s.to_owned()))
    }
}

impl TryFrom<String> for VolumeId {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<VolumeId> for String {
    fn from(v: VolumeId) -> String {
        v.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeId({})", self.0)
    }
}

/// A size in bytes, written like a Kubernetes quantity: `10Gi` is 10·2³⁰, `10G` is 10·10⁹; also `1e9`,
/// `1.5Gi`. It is exact: what is not a whole number of bytes is refused, not rounded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// One mebibyte.
    pub const MIB: u64 = 1 << 20;
    /// One gibibyte.
    pub const GIB: u64 = 1 << 30;

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The largest volume: one pebibyte.
    pub const LARGEST: ByteSize = ByteSize(1 << 50);

    /// Whether a volume may have this size: a whole number of 4 KiB blocks, not zero, at most [`Self::LARGEST`].
    pub fn check_volume(self) -> Result<()> {
        if self.0 == 0 {
            return Err(Error::usage("the size is zero").hint("give at least 16Mi"));
        }
        if !self.0.is_multiple_of(4096) {
            return Err(Error::usage(format!("{} bytes are not a whole number of 4 KiB blocks", self.0))
                .hint(format!("give {}", self.0.next_multiple_of(4096))));
        }
        if self > Self::LARGEST {
            return Err(Error::usage(format!("{self} is larger than 1Pi")).hint("give a smaller size"));
        }
        Ok(())
    }
}

impl FromStr for ByteSize {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let shown: String = s.chars().take(40).flat_map(char::escape_debug).collect();
            Error::usage(format!("invalid size \"{shown}\": {why}"))
                .hint("write a number with Ki, Mi, Gi, Ti (powers of 1024) or k, M, G, T (powers of 1000), such as 10Gi")
        };
        let number_end =
            s.char_indices().find(|(_, c)| !c.is_ascii_digit() && *c != '.').map_or(s.len(), |(i, _)| i);
        let (number, suffix) = s.split_at(number_end);
        if s.starts_with('-') {
            return Err(wrong("it is negative"));
        }
        if number.is_empty() {
            return Err(wrong("it does not start with a number"));
        }
        let (numerator, decimals) =
            decimal(number).ok_or_else(|| wrong("the number is malformed or too large"))?;
        let factor: u128 = match suffix {
            "" => 1,
            "k" => 1_000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "T" => 1_000_000_000_000,
            "P" => 1_000_000_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            "Pi" => 1 << 50,
            _ => match suffix.strip_prefix(['e', 'E']).and_then(|e| e.parse::<u32>().ok()) {
                Some(e) if e <= 18 => 10u128.pow(e),
                _ => return Err(wrong(&format!("unknown unit {suffix:?}"))),
            },
        };
        let scaled = numerator.checked_mul(factor).ok_or_else(|| wrong("it is too large"))?;
        let divisor = 10u128.pow(decimals);
        if scaled % divisor != 0 {
            return Err(wrong("it is not a whole number of bytes"));
        }
        let bytes = u64::try_from(scaled / divisor).map_err(|_| wrong("it is too large"))?;
        if bytes > i64::MAX as u64 {
            return Err(wrong("it is too large"));
        }
        Ok(ByteSize(bytes))
    }
}

/// `"1.25"` as (125, 2); none when it is malformed or has too many digits to be exact.
fn decimal(s: &str) -> Option<(u128, u32)> {
    let (whole, fraction) = s.split_once('.').unwrap_or((s, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || fraction.len() > 18 {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    if digits.len() > 36 {
        return None;
    }
    Some((digits.parse().ok()?, fraction.len() as u32))
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that shows it exactly, else one decimal of the largest that fits: `1Gi`, `1.5Gi`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 5] =
            [("Pi", 1 << 50), ("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];
        for (name, unit) in UNITS {
            if self.0 >= unit {
                let text = if self.0.is_multiple_of(unit) {
                    format!("{}{name}", self.0 / unit)
                } else {
                    format!("{:.1}{name}", self.0 as f64 / unit as f64)
                };
                return f.pad(&text);
            }
        }
        f.pad(&self.0.to_string())
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ByteSize({})", self.0)
    }
}

/// The filesystems that we make, check, mount and grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    /// ext4
    Ext4,
    /// XFS
    Xfs,
    /// Btrfs
    Btrfs,
}

impl FsType {
    /// All of them, the default first.
    pub const ALL: [FsType; 3] = [FsType::Ext4, FsType::Xfs, FsType::Btrfs];

    /// The name as mount(8), blkid(8) and StorageClasses spell it.
    pub const fn name(self) -> &'static str {
        match self {
            FsType::Ext4 => "ext4",
            FsType::Xfs => "xfs",
            FsType::Btrfs => "btrfs",
        }
    }

    /// The smallest device that its mkfs accepts, in bytes, with the options that we use (measured with
    /// e2fsprogs 1.47, xfsprogs 6.1, btrfs-progs 6.2; ext4 would take less, but not usefully).
    pub const fn minimum(self) -> u64 {
        match self {
            FsType::Ext4 => 16 * ByteSize::MIB,
            FsType::Xfs => 300 * ByteSize::MIB,
            FsType::Btrfs => 112 * ByteSize::MIB,
        }
    }
}

impl fmt::Display for FsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for FsType {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|fs| fs.name() == s).ok_or_else(|| {
            let shown: String = s.chars().take(40).collect();
            Error::usage(format!("unknown filesystem {shown:?}")).hint("choose one of ext4, xfs, btrfs")
        })
    }
}

/// A part of a volume: the `n`th of `t` equal slices, or the first `p` percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Slice {
    /// `3/7`
    Part(u32, u32),
    /// `10%`
    Percent(u32),
}

impl Slice {
    /// Its byte range (start, end) on a device of `size` bytes, in whole mebibytes but for the end.
    pub fn range(self, size: u64) -> (u64, u64) {
        let at = |numerator: u64, denominator: u64| {
            let exact = (u128::from(size) * u128::from(numerator) / u128::from(denominator)) as u64;
            if numerator == denominator { size } else { exact / ByteSize::MIB * ByteSize::MIB }
        };
        match self {
            Slice::Part(n, t) => (at(u64::from(n) - 1, t.into()), at(n.into(), t.into())),
            Slice::Percent(p) => (0, at(p.into(), 100)),
        }
    }
}

impl FromStr for Slice {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let parsed = match (s.strip_suffix('%'), s.split_once('/')) {
            (Some(p), None) => p.parse().ok().filter(|p| (1..=100).contains(p)).map(Slice::Percent),
            (None, Some((n, t))) => n
                .parse()
                .ok()
                .zip(t.parse().ok())
                .filter(|(n, t)| *n >= 1 && n <= t)
                .map(|(n, t)| Slice::Part(n, t)),
            _ => None,
        };
        parsed.ok_or_else(|| {
            Error::usage(format!("invalid slice {s:?}")).hint(
                "write N/T for the Nth of T parts, such as 1/7, or P% for the first P percent, such as 10%",
            )
        })
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slice::Part(1, 1) | Slice::Percent(100) => f.write_str("all"),
            Slice::Part(n, t) => write!(f, "part {n} of {t}"),
            Slice::Percent(p) => write!(f, "the first {p}%"),
        }
    }
}

/// An absolute path without `.` or `..`, where a volume is mounted or linked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TargetPath(PathBuf);

impl TargetPath {
    /// Checks `path`; a relative one is taken from `cwd`.
    pub fn new(path: &Path, cwd: &Path) -> Result<Self> {
        let full = cwd.join(path);
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(full.as_os_str());
        if path.as_os_str().is_empty() {
            return Err(Error::usage("the target is empty")
                .hint("give an existing or new folder, such as --target /mnt/data"));
        }
        if bytes.len() > 4000 || bytes.iter().any(|b| b.is_ascii_control()) || full.to_str().is_none() {
            return Err(Error::usage(
                "the target path is too long, not UTF-8, or contains control characters",
            )
            .hint("choose a plain path, such as /mnt/data"));
        }
        if full.components().any(|c| matches!(c, Component::ParentDir)) {
            return Err(Error::usage(format!("the target {} contains '..'", full.display()))
                .hint("give the path without '..'"));
        }
        let clean: PathBuf = full.components().collect();
        if clean == Path::new("/") {
            return Err(Error::usage("the target is the root folder")
                .hint("choose a folder of its own, such as /mnt/data"));
        }
        Ok(TargetPath(clean))
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_ids() {
        for good in ["a", "vol1", "pvc-0b6f2c1e-1111-4222-8333-444455556666", "a.b_c-d", &"x".repeat(128)] {
            assert!(good.parse::<VolumeId>().is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "-a",
            "a-",
            ".a",
            "a..b",
            "ä",
            "a\n",
            "a\0b",
            "%2e",
            "a:b",
            &"x".repeat(129),
            &"x".repeat(300),
        ] {
            let e = bad.parse::<VolumeId>().expect_err(bad);
            assert!(e.hint_text().is_some(), "{bad}");
            assert!(e.to_string().len() < 200, "{e}");
        }
    }

    #[test]
    fn sizes_are_exact() {
        for (text, bytes) in [
            ("1", 1),
            ("1Ki", 1024),
            ("1k", 1000),
            ("1Gi", 1 << 30),
            ("1G", 1_000_000_000),
            ("1.5Gi", 3 << 29),
            ("1e9", 1_000_000_000),
            ("0.5Ki", 512),
            ("100Mi", 100 << 20),
            ("2Ti", 2 << 40),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
        for bad in [
            "",
            "Gi",
            "1G1",
            "-1Gi",
            "1.5",
            "1..5Gi",
            ".",
            "1 Gi",
            "1gi",
            "1GB",
            "0x10",
            "1e99",
            "99999999999999999999",
            "9223372036854775808",
            "1.0000000000000000001Ki",
            "٣Gi",
            "+1",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes_have_whole_blocks() {
        assert!(ByteSize(ByteSize::GIB).check_volume().is_ok());
        for bad in [0, 1, 4095, 1_000_000_001, (1 << 50) + 4096] {
            assert!(ByteSize(bad).check_volume().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_print_exactly_or_rounded() {
        for (bytes, text) in
            [(0, "0"), (512, "512"), (1 << 30, "1Gi"), (3 << 29, "1.5Gi"), (100 << 20, "100Mi")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn slices_cover_everything_once() {
        let size = 1000 * ByteSize::MIB + 77;
        let mut next = 0;
        for n in 1..=7 {
            let (start, end) = Slice::Part(n, 7).range(size);
            assert_eq!(start, next);
            next = end;
        }
        assert_eq!(next, size);
        assert_eq!("50%".parse::<Slice>().unwrap().range(size), (0, 500 * ByteSize::MIB));
        for bad in ["0/3", "4/3", "1/0", "0%", "101%", "x", "1", "1/2%", ""] {
            assert!(bad.parse::<Slice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn targets() {
        let cwd = Path::new("/work");
        assert_eq!(TargetPath::new(Path::new("mnt/x/"), cwd).unwrap().as_path(), Path::new("/work/mnt/x"));
        assert_eq!(TargetPath::new(Path::new("/a/./b//"), cwd).unwrap().as_path(), Path::new("/a/b"));
        for bad in ["", "/", "../x", "/a/../b", "/a\nb"] {
            assert!(TargetPath::new(Path::new(bad), cwd).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics(s in "\\PC{0,40}") {
            let _ = s.parse::<VolumeId>();
            let _ = s.parse::<ByteSize>();
            let _ = TargetPath::new(Path::new(&s), Path::new("/"));
        }
    }
}
