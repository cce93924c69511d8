//! What requests say, checked once; past this point values are valid. What is wrong is named, and nothing is guessed.

use std::collections::BTreeMap;
use std::path::Path;

use super::Refusal;
use super::proto::{
    CapacityRange, VolumeCapability, volume_capability::AccessType, volume_capability::access_mode::Mode,
};
use crate::error::{Error, Result};
use crate::values::{ByteSize, FsType, TargetPath, VolumeId};

/// The longest node id.
pub const LONGEST_NODE_ID: usize = 256;

/// What is required and missing.
pub fn missing(field: &str) -> Error {
    Error::usage(format!("{field} is missing")).hint("this is a fault of the caller, such as a CSI sidecar")
}

/// A volume id.
pub fn volume(id: &str) -> Result<VolumeId> {
    if id.is_empty() { Err(missing("volume_id")) } else { id.parse() }
}

/// The id of the volume with this name: the name itself where it can be one, as every name that Kubernetes gives; else
/// its plain characters and a hash of it. The record keeps such a name, so that two that meet in one id are told apart.
pub fn volume_of_name(name: &str) -> Result<VolumeId> {
    if name.is_empty() {
        return Err(missing("name"));
    }
    if name.len() > VolumeId::MAX || name.contains("..") || name.chars().any(|c| c.is_control() || c == '/') {
        // Says what is wrong with it.
        return name.parse().and_then(|_: VolumeId| Err(Error::usage("the name cannot be used")));
    }
    name.parse().or_else(|_| {
        let plain: String =
            name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
        // FNV-1a, which is the same everywhere and for ever.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("v-{}-{hash:016x}", plain.trim_matches('-')).parse()
    })
}

/// An absolute path.
pub fn path(field: &str, text: &str) -> Result<TargetPath> {
    if text.is_empty() {
        return Err(missing(field));
    }
    if !text.starts_with('/') {
        return Err(Error::usage(format!("{field} is not an absolute path")).hint("give it from the root on"));
    }
    TargetPath::new(Path::new(text), Path::new("/")).map_err(|e| e.context(field))
}

/// A node id.
pub fn node(id: &str) -> Result<String> {
    if id.is_empty() {
        return Err(missing("node_id"));
    }
    if id.len() > LONGEST_NODE_ID || id.chars().any(char::is_control) {
        return Err(Error::usage("node_id is too long or has control characters")
            .hint(format!("a node id has at most {LONGEST_NODE_ID} plain characters")));
    }
    Ok(id.to_owned())
}

/// How a volume is to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// As a raw device.
    pub block: bool,
    /// The filesystem that is asked for.
    pub fs: Option<FsType>,
    /// For mount(8).
    pub mount_flags: Vec<String>,
    /// The group that its files are opened to.
    pub group: Option<u32>,
    /// By how many.
    pub mode: Mode,
}

impl Capability {
    /// Only to be read.
    pub fn read_only(&self) -> bool {
        self.mode == Mode::SingleNodeReaderOnly
    }
}

/// One capability.
pub fn capability(given: Option<&VolumeCapability>) -> Result<Capability> {
    let given = given.ok_or_else(|| missing("volume_capability"))?;
    let mode = given.access_mode.as_ref().map(|m| m.mode).ok_or_else(|| missing("access_mode"))?;
    let mode = match Mode::try_from(mode) {
        Ok(
            mode @ (Mode::SingleNodeWriter
            | Mode::SingleNodeReaderOnly
            | Mode::SingleNodeSingleWriter
            | Mode::SingleNodeMultiWriter),
        ) => mode,
        Ok(Mode::Unknown) => return Err(missing("access_mode")),
        Ok(mode) => {
            return Err(Error::usage(format!("the access mode {} is not served: a volume is on one node", mode.as_str_name()))
                .hint("use ReadWriteOnce or ReadWriteOncePod; for one writer and many nodes, export it over NFS from a pod"));
        }
        Err(_) => {
            return Err(Error::usage(format!("the access mode {mode} is not known"))
                .hint("use ReadWriteOnce or ReadWriteOncePod"));
        }
    };
    let plain = Capability { block: false, fs: None, mount_flags: Vec::new(), group: None, mode };
    match given.access_type.as_ref().ok_or_else(|| missing("access_type"))? {
        AccessType::Block(_) => Ok(Capability { block: true, ..plain }),
        AccessType::Mount(mount) => Ok(Capability {
            fs: filesystem("fs_type", &mount.fs_type)?,
            mount_flags: flags(&mount.mount_flags)?,
            group: group(&mount.volume_mount_group)?,
            ..plain
        }),
    }
}

/// Several, of which none may contradict another.
pub fn capabilities(given: &[VolumeCapability]) -> Result<Vec<Capability>> {
    if given.is_empty() {
        return Err(missing("volume_capabilities"));
    }
    let all = given.iter().map(|c| capability(Some(c))).collect::<Result<Vec<_>>>()?;
    if all.iter().any(|c| c.block != all[0].block) {
        return Err(Error::usage("a volume is either a filesystem or a raw device, not both")
            .hint("ask for one volumeMode"));
    }
    let mut fs = all.iter().filter_map(|c| c.fs);
    if let Some(first) = fs.next()
        && let Some(other) = fs.find(|fs| *fs != first)
    {
        return Err(Error::usage(format!("a volume has one filesystem, not {first} and {other}"))
            .hint("ask for one fs_type"));
    }
    Ok(all)
}

fn filesystem(field: &str, text: &str) -> Result<Option<FsType>> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(|e: Error| e.context(field)) }
}

/// Mount options of a PersistentVolume. It may spell out that it is read-write; everything else is checked.
fn flags(given: &[String]) -> Result<Vec<String>> {
    let given: Vec<String> = given.iter().filter(|f| *f != "rw").cloned().collect();
    if given.is_empty() { Ok(given) } else { crate::mount_options::check(&given) }
}

fn group(text: &str) -> Result<Option<u32>> {
    if text.is_empty() {
        return Ok(None);
    }
    let digits = text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit());
    // The last number means "no change" to the kernel.
    match text.parse::<u32>() {
        Ok(gid) if digits && gid != u32::MAX => Ok(Some(gid)),
        _ => {
            Err(Error::usage("volume_mount_group is not the number of a group")
                .hint("give fsGroup as a number"))
        }
    }
}

/// What a StorageClass says, and what PersistentVolumes keep of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `filesystem`
    pub filesystem: Option<FsType>,
    /// `configMapName`
    pub config_map: Option<String>,
    /// `deleteDataOnPVCDelete`
    pub delete_data: bool,
    /// `deleteDataGracePeriod`, in seconds
    pub delete_grace: Option<u64>,
    /// `mountOptions`
    pub mount_options: Vec<String>,
}

/// What Kubernetes itself adds, and what we leave alone.
fn is_of_kubernetes(key: &str) -> bool {
    key.starts_with("csi.storage.k8s.io/") || key.starts_with("storage.kubernetes.io/")
}

/// Parameters of a StorageClass, or the volume context that came of them.
pub fn parameters(given: &BTreeMap<String, String>) -> Result<Parameters> {
    let mut parameters = Parameters::default();
    for (key, value) in given {
        match key.as_str() {
            "filesystem" => parameters.filesystem = filesystem(key, value)?,
            "configMapName" if value.is_empty() => {}
            "configMapName" => {
                crate::settings::check_object_name(key, value)?;
                parameters.config_map = Some(value.clone());
            }
            "deleteDataOnPVCDelete" => {
                parameters.delete_data = match value.as_str() {
                    "true" => true,
                    "false" | "" => false,
                    _ => {
                        return Err(Error::usage("deleteDataOnPVCDelete is neither \"true\" nor \"false\"")
                            .hint(
                                "write deleteDataOnPVCDelete: \"true\" to delete the data with the claim",
                            ));
                    }
                }
            }
            "deleteDataGracePeriod" if value.is_empty() => {}
            "deleteDataGracePeriod" => {
                let time = crate::settings::grace_period(value).map_err(|e| e.context(key))?;
                parameters.delete_grace = Some(time.as_secs());
            }
            "mountOptions" if value.is_empty() => {}
            "mountOptions" => {
                parameters.mount_options =
                    flags(&value.split(',').map(|o| o.trim().to_owned()).collect::<Vec<_>>())
                        .map_err(|e| e.context(key))?;
            }
            key if is_of_kubernetes(key) => {}
            key => {
                let shown: String = key.chars().take(60).flat_map(char::escape_debug).collect();
                return Err(Error::usage(format!("the parameter \"{shown}\" is not known")).hint(
                    "known are filesystem, configMapName, deleteDataOnPVCDelete, deleteDataGracePeriod and mountOptions; \
                     other settings are keys of the ConfigMap",
                ));
            }
        }
    }
    Ok(parameters)
}

/// The filesystem that parameters and capabilities ask for together.
pub fn agreed_filesystem(parameters: &Parameters, capability: &Capability) -> Result<Option<FsType>> {
    match (parameters.filesystem, capability.fs) {
        (Some(a), Some(b)) if a != b => {
            Err(Error::usage(format!("the parameter filesystem says {a}, but fs_type says {b}"))
                .hint("leave csi.storage.k8s.io/fstype out, or let both say the same"))
        }
        (a, b) => Ok(a.or(b)),
    }
}

/// The size for a new volume: what is required, rounded up to whole blocks of 4 KiB and to what the filesystem needs; without a
/// requirement 1 GiB, or the limit if that is less.
pub fn new_size(range: Option<&CapacityRange>, least: ByteSize) -> Result<ByteSize, Refusal> {
    let (required, limit) = bounds(range)?;
    let default =
        ByteSize(ByteSize::GIB).min(limit.map_or(ByteSize::LARGEST, |l| ByteSize(l.0 / 4096 * 4096)));
    let size = match required {
        0 => default.max(least),
        required => rounded(required)?.max(least),
    };
    within(size, limit, required)?;
    Ok(size)
}

/// The size to grow to; a requirement is needed.
pub fn grown_size(range: Option<&CapacityRange>) -> Result<(ByteSize, Option<ByteSize>), Refusal> {
    if range.is_none() {
        return Err(missing("capacity_range").into());
    }
    let (required, limit) = bounds(range)?;
    let size = match (required, limit) {
        (0, None) => return Err(missing("capacity_range.required_bytes").into()),
        (0, Some(limit)) => ByteSize(limit.0 / 4096 * 4096),
        (required, _) => rounded(required)?,
    };
    within(size, limit, required)?;
    Ok((size, limit))
}

/// Required bytes (0 for none) and limit.
pub fn bounds(range: Option<&CapacityRange>) -> Result<(u64, Option<ByteSize>), Refusal> {
    let Some(range) = range else { return Ok((0, None)) };
    let (required, limit) = match (u64::try_from(range.required_bytes), u64::try_from(range.limit_bytes)) {
        (Ok(required), Ok(limit)) => (required, (limit > 0).then_some(ByteSize(limit))),
        _ => {
            return Err(Error::usage("capacity_range is negative")
                .hint("give sizes in bytes, 0 for none")
                .into());
        }
    };
    if limit.is_some_and(|limit| required > limit.0) {
        return Err(Error::usage(format!(
            "capacity_range requires {required} bytes, but its limit is {}",
            range.limit_bytes
        ))
        .hint("give a limit that is not below the requirement, or none")
        .into());
    }
    Ok((required, limit))
}

fn rounded(required: u64) -> Result<ByteSize, Refusal> {
    match required.checked_next_multiple_of(4096).map(ByteSize) {
        Some(size) if size <= ByteSize::LARGEST => Ok(size),
        _ => Err(Refusal::out_of_range(format!("{required} bytes are more than the largest volume, 1Pi"))),
    }
}

fn within(size: ByteSize, limit: Option<ByteSize>, required: u64) -> Result<(), Refusal> {
    match limit {
        Some(limit) if size > limit || size.0 == 0 => Err(Refusal::out_of_range(format!(
            "{required} bytes become {} (whole blocks of 4 KiB, and at least what the filesystem needs), which the limit of {} bytes forbids",
            size.0, limit.0
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::proto::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use crate::error::Kind;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn range(required: i64, limit: i64) -> Option<CapacityRange> {
        Some(CapacityRange { required_bytes: required, limit_bytes: limit })
    }

    #[test]
    fn sizes_are_rounded_up_and_never_past_the_limit() {
        const GIB: i64 = 1 << 30;
        let least = ByteSize(16 * ByteSize::MIB);
        let size = |r: Option<CapacityRange>| new_size(r.as_ref(), least).map(|s| s.0 as i64);
        assert_eq!(size(None).unwrap(), GIB);
        assert_eq!(size(range(GIB, 0)).unwrap(), GIB);
        assert_eq!(size(range(1_000_000_000, 0)).unwrap(), 1_000_001_536);
        assert_eq!(size(range(1, 0)).unwrap(), 16 << 20);
        assert_eq!(size(range(0, 100 << 20)).unwrap(), 100 << 20);
        for (r, code) in [
            (range(1_000_000_000, 1_000_000_000), tonic::Code::OutOfRange),
            (range(0, 1 << 20), tonic::Code::OutOfRange),
            (range(i64::MAX, 0), tonic::Code::OutOfRange),
            (range((1 << 50) + 1, 0), tonic::Code::OutOfRange),
            (range(2 * GIB, GIB), tonic::Code::InvalidArgument),
            (range(-1, 0), tonic::Code::InvalidArgument),
            (range(0, -1), tonic::Code::InvalidArgument),
        ] {
            assert_eq!(size(r).unwrap_err().code(), code, "{r:?}");
        }
        assert_eq!(grown_size(None).unwrap_err().code(), tonic::Code::InvalidArgument);
        assert_eq!(grown_size(range(0, 0).as_ref()).unwrap_err().code(), tonic::Code::InvalidArgument);
        assert_eq!(grown_size(range(4097, 0).as_ref()).unwrap().0, ByteSize(8192));
    }

    #[test]
    fn parameters_are_known_by_name() {
        let p = parameters(&map(&[
            ("filesystem", "xfs"),
            ("configMapName", "zerofs-config"),
            ("deleteDataOnPVCDelete", "true"),
            ("deleteDataGracePeriod", "1d 12h"),
            ("mountOptions", "noatime, discard"),
            ("csi.storage.k8s.io/pvc/name", "whatever"),
        ]))
        .unwrap();
        assert_eq!(p.filesystem, Some(FsType::Xfs));
        assert_eq!(p.config_map.as_deref(), Some("zerofs-config"));
        assert!(p.delete_data);
        assert_eq!(p.delete_grace, Some(36 * 3600));
        assert_eq!(p.mount_options, ["noatime", "discard"]);
        for (key, value) in [
            ("fileSystem", "ext4"),
            ("filesystem", "zfs"),
            ("deleteDataOnPVCDelete", "yes"),
            ("deleteDataGracePeriod", "24"),
            ("deleteDataGracePeriod", "soon"),
            ("deleteDataGracePeriod", "-1h"),
            ("configMapName", "../x"),
            ("mountOptions", "bind"),
            ("mountOptions", "noatime,remount"),
            ("colour\n", "red"),
        ] {
            let e = parameters(&map(&[(key, value)])).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{key}");
            assert!(e.message().contains(key.trim()) && e.hint_text().is_some(), "{e}");
        }
    }

    #[test]
    fn only_single_node_modes_are_served() {
        let with = |mode: i32, access_type| VolumeCapability {
            access_mode: Some(AccessMode { mode }),
            access_type: Some(access_type),
        };
        let mount = || AccessType::Mount(MountVolume::default());
        for mode in [1, 2, 6, 7] {
            assert!(capability(Some(&with(mode, mount()))).is_ok(), "{mode}");
            assert!(capability(Some(&with(mode, AccessType::Block(BlockVolume {})))).unwrap().block);
        }
        for mode in [0, 3, 4, 5, 8, -1] {
            let e = capability(Some(&with(mode, mount()))).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{mode}");
        }
        assert!(capability(None).is_err());
        assert!(capability(Some(&VolumeCapability::default())).is_err());
        let both = [with(1, mount()), with(1, AccessType::Block(BlockVolume {}))];
        assert!(capabilities(&both).is_err());
        for (gid, good) in
            [("0", true), ("1000", true), ("4294967295", false), ("-1", false), ("root", false)]
        {
            let m = MountVolume { volume_mount_group: gid.into(), ..Default::default() };
            assert_eq!(capability(Some(&with(1, AccessType::Mount(m)))).is_ok(), good, "{gid}");
        }
        let m = MountVolume {
            mount_flags: vec!["rw".into(), "suid".into(), "bind".into()],
            ..Default::default()
        };
        assert!(capability(Some(&with(1, AccessType::Mount(m)))).is_err());
    }

    #[test]
    fn every_name_has_one_id() {
        assert_eq!(volume_of_name("pvc-1").unwrap().as_str(), "pvc-1");
        let plus = volume_of_name("vol+1").unwrap();
        assert!(plus.as_str().starts_with("v-vol1-"), "{plus}");
        assert_ne!(plus, volume_of_name("vol*1").unwrap());
        assert!(volume_of_name(&"ä".repeat(64)).is_ok());
        for bad in ["", "../x", "a/b", "a\nb", &"x".repeat(129)] {
            assert!(volume_of_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn paths_and_ids_stay_in_their_place() {
        for bad in ["", "relative", "/", "/a/../b", "/a\nb", "..", "/a/.."] {
            assert!(path("target_path", bad).is_err(), "{bad:?}");
        }
        assert!(path("target_path", "/var/lib/kubelet/pods/x/mount").is_ok());
        for bad in ["", "..", "a/b", "../a", "%2e", &"x".repeat(129)] {
            assert!(volume(bad).is_err(), "{bad:?}");
        }
        assert!(node("").is_err() && node("a\nb").is_err() && node(&"x".repeat(257)).is_err());
    }
}
