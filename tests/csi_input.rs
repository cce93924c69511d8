//! What is wrong in a request: each required field missing, ids and paths that are too long or lead elsewhere, parameters
//! that nobody knows, mount options that would do something else. Each is refused with the right code and a hint, says no
//! secret, and changes nothing: neither a record, nor anything on the node.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use support::csi::{Mode, at_least, block, mount, parameters};
use support::model::{Ask, Model, NODE, runtime};
use tonic::{Code, Request, Status};
use zerofsctl::csi::Driver;
use zerofsctl::csi::controller::ControllerService;
use zerofsctl::csi::proto::controller_server::Controller as _;
use zerofsctl::csi::proto::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use zerofsctl::csi::proto::*;

const MIB: i64 = 1 << 20;
const SECRET: &str = "hunter2-is-the-password";
const STAGING: &str = "/kubelet/staging/vol";
const POD: &str = "/kubelet/pods/a/vol";
const RWO: Mode = Mode::SingleNodeWriter;

fn secrets() -> BTreeMap<String, String> {
    parameters(&[("password", SECRET)])
}

/// For each call, one that the driver of [`Bench::new`] carries out.
fn good() -> Vec<Ask> {
    let (id, capability) = ("vol".to_owned(), Some(mount(RWO)));
    vec![
        Ask::CreateVolume(CreateVolumeRequest {
            name: "new".into(),
            capacity_range: at_least(64 * MIB),
            volume_capabilities: vec![mount(RWO)],
            secrets: secrets(),
            ..Default::default()
        }),
        Ask::DeleteVolume(DeleteVolumeRequest { volume_id: "idle".into(), secrets: secrets() }),
        Ask::ControllerPublishVolume(ControllerPublishVolumeRequest {
            volume_id: id.clone(),
            node_id: NODE.into(),
            volume_capability: capability.clone(),
            secrets: secrets(),
            ..Default::default()
        }),
        Ask::ControllerUnpublishVolume(ControllerUnpublishVolumeRequest {
            volume_id: "idle".into(),
            node_id: NODE.into(),
            secrets: secrets(),
        }),
        Ask::ValidateVolumeCapabilities(ValidateVolumeCapabilitiesRequest {
            volume_id: id.clone(),
            volume_capabilities: vec![mount(RWO)],
            secrets: secrets(),
            ..Default::default()
        }),
        Ask::ListVolumes(ListVolumesRequest::default()),
        Ask::ControllerGetVolume(ControllerGetVolumeRequest { volume_id: id.clone() }),
        Ask::ControllerExpandVolume(ControllerExpandVolumeRequest {
            volume_id: id.clone(),
            capacity_range: at_least(64 * MIB),
            secrets: secrets(),
            ..Default::default()
        }),
        Ask::ControllerModifyVolume(ControllerModifyVolumeRequest {
            volume_id: id.clone(),
            mutable_parameters: parameters(&[("rustLog", "warn")]),
            secrets: secrets(),
        }),
        Ask::NodeStageVolume(NodeStageVolumeRequest {
            volume_id: id.clone(),
            staging_target_path: STAGING.into(),
            volume_capability: capability.clone(),
            secrets: secrets(),
            ..Default::default()
        }),
        Ask::NodeUnstageVolume(NodeUnstageVolumeRequest {
            volume_id: "idle".into(),
            staging_target_path: "/kubelet/staging/idle".into(),
        }),
        Ask::NodePublishVolume(NodePublishVolumeRequest {
            volume_id: id.clone(),
            staging_target_path: STAGING.into(),
            target_path: POD.into(),
            volume_capability: capability,
            secrets: secrets(),
            ..Default::default()
        }),
        Ask::NodeUnpublishVolume(NodeUnpublishVolumeRequest {
            volume_id: id.clone(),
            target_path: "/kubelet/pods/never/vol".into(),
        }),
        Ask::NodeGetVolumeStats(NodeGetVolumeStatsRequest {
            volume_id: id.clone(),
            volume_path: POD.into(),
            ..Default::default()
        }),
        Ask::NodeExpandVolume(NodeExpandVolumeRequest {
            volume_id: id,
            volume_path: POD.into(),
            capacity_range: at_least(64 * MIB),
            secrets: secrets(),
            ..Default::default()
        }),
    ]
}

/// A model with a volume `vol` in a pod and a volume `idle` in none.
struct Bench {
    model: Model,
    driver: Arc<Driver>,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new() -> Bench {
        let model = Model::new();
        let driver = model.driver();
        let bench = Bench { model, driver, runtime: runtime() };
        let create = |name: &str| {
            let Ask::CreateVolume(request) = good().remove(0) else { unreachable!("the first is a create") };
            Ask::CreateVolume(CreateVolumeRequest { name: name.into(), ..request })
        };
        for name in ["vol", "idle"] {
            bench.ask(&create(name)).unwrap();
        }
        for ask in good() {
            if matches!(
                ask,
                Ask::ControllerPublishVolume(_) | Ask::NodeStageVolume(_) | Ask::NodePublishVolume(_)
            ) {
                bench.ask(&ask).unwrap();
            }
        }
        bench
    }

    fn ask(&self, ask: &Ask) -> Result<(), Status> {
        self.runtime.block_on(ask.ask(&self.driver))
    }

    /// Refused with this code, a hint, no secret, and without a change.
    #[track_caller]
    fn refused(&self, ask: &Ask, code: Code) {
        let before = self.model.state();
        let status = self.ask(ask).err().unwrap_or_else(|| panic!("it must be refused: {ask:?}"));
        assert_eq!(status.code(), code, "{status:?} to {ask:?}");
        assert!(status.message().contains("hint: "), "no hint: {status:?} to {ask:?}");
        assert!(!status.message().contains(SECRET), "a secret: {status:?}");
        assert!(status.message().len() <= 2048, "{} bytes of text", status.message().len());
        assert!(!status.message().chars().any(char::is_control), "control characters: {status:?}");
        assert_eq!(self.model.state(), before, "something changed: {ask:?}");
        assert_eq!(self.driver.flights.count(), 0);
    }
}

/// The fields of the calls that the tests change, all by the same name.
macro_rules! fields {
    ($($field:ident: $kind:ty = $($call:ident),*;)*) => {
        $(fn $field(ask: &mut Ask) -> Option<&mut $kind> {
            match ask {
                $(Ask::$call(request) => Some(&mut request.$field),)*
                _ => None,
            }
        })*
    };
}

fields! {
    volume_id: String = DeleteVolume, ControllerPublishVolume, ControllerUnpublishVolume, ValidateVolumeCapabilities,
        ControllerGetVolume, ControllerExpandVolume, ControllerModifyVolume, NodeStageVolume, NodeUnstageVolume,
        NodePublishVolume, NodeUnpublishVolume, NodeGetVolumeStats, NodeExpandVolume;
    name: String = CreateVolume;
    node_id: String = ControllerPublishVolume, ControllerUnpublishVolume;
    staging_target_path: String = NodeStageVolume, NodeUnstageVolume, NodePublishVolume;
    target_path: String = NodePublishVolume, NodeUnpublishVolume;
    volume_path: String = NodeGetVolumeStats, NodeExpandVolume;
    volume_capability: Option<VolumeCapability> = ControllerPublishVolume, NodeStageVolume, NodePublishVolume;
    volume_context: BTreeMap<String, String> = ControllerPublishVolume, NodeStageVolume, NodePublishVolume;
    volume_capabilities: Vec<VolumeCapability> = CreateVolume;
    mutable_parameters: BTreeMap<String, String> = CreateVolume, ControllerModifyVolume;
    capacity_range: Option<CapacityRange> = CreateVolume, ControllerExpandVolume, NodeExpandVolume;
}

/// Gives `field` each of these values, in every call that has it; how many calls that were.
fn each<T: Clone>(
    bench: &Bench,
    field: impl Fn(&mut Ask) -> Option<&mut T>,
    values: &[T],
    code: Code,
) -> usize {
    let mut calls = 0;
    for ask in good() {
        let mut changed = ask.clone();
        if field(&mut changed).is_none() {
            continue;
        }
        calls += 1;
        for value in values {
            let mut changed = ask.clone();
            *field(&mut changed).expect("it has the field") = value.clone();
            bench.refused(&changed, code);
        }
    }
    calls
}

fn texts(given: &[&str]) -> Vec<String> {
    given.iter().map(|s| (*s).to_owned()).collect()
}

#[test]
fn what_is_right_is_done() {
    let bench = Bench::new();
    for ask in good() {
        bench.ask(&ask).unwrap_or_else(|status| panic!("{status:?} to {ask:?}"));
    }
}

#[test]
fn ids_that_are_missing_too_long_or_lead_elsewhere() {
    let bench = Bench::new();
    let mut bad = texts(&[
        "",
        ".",
        "..",
        "../vol",
        "vol/..",
        "a/b",
        "/etc",
        ".zerofsctl",
        "a..b",
        "-vol",
        "vol-",
        "vol ",
        "a\0b",
        "a\nb",
        "vol\u{202e}",
        "völ",
        "%2e%2e",
        "a\\b",
        "$(id)",
        "\u{1b}[2J",
    ]);
    bad.extend(["x".repeat(129), "x".repeat(100_000), "ä".repeat(64)]);
    assert_eq!(each(&bench, volume_id, &bad, Code::InvalidArgument), 13);
    // A name may be nearly any text, but for control characters and what looks like a path.
    bad.retain(|n| {
        n.is_empty() || n.len() > 128 || n.contains(['/', '\n', '\0', '\u{1b}']) || n.contains("..")
    });
    assert!(bad.len() >= 11, "{}", bad.len());
    assert_eq!(each(&bench, name, &bad, Code::InvalidArgument), 1);
}

#[test]
fn nodes_that_are_missing_or_no_names() {
    let bench = Bench::new();
    let bad = [texts(&["a\nb", "\u{1b}[2J"]), vec!["n".repeat(257), "n".repeat(100_000)]].concat();
    assert_eq!(each(&bench, node_id, &bad, Code::InvalidArgument), 2);
    // Without one, an unpublish is for whichever node has it.
    let publish = good().into_iter().find(|a| matches!(a, Ask::ControllerPublishVolume(_)));
    let mut publish = publish.expect("it is in the list");
    *node_id(&mut publish).expect("it has one") = String::new();
    bench.refused(&publish, Code::InvalidArgument);
    *node_id(&mut publish).expect("it has one") = "nobody".into();
    bench.refused(&publish, Code::NotFound);
}

#[test]
fn paths_that_are_missing_relative_or_lead_elsewhere() {
    let bench = Bench::new();
    let mut bad = texts(&[
        "",
        "relative/path",
        ".",
        "..",
        "/",
        "//",
        "/..",
        "/a/../b",
        "/a/..",
        "/kubelet/../etc",
        "/a\nb",
        "/a\0b",
        "/a\u{7f}",
    ]);
    bad.push(format!("/{}", "x".repeat(5000)));
    bad.push("/x".repeat(3000));
    bad.push(format!("/..{}", "/x".repeat(1800)));
    assert_eq!(each(&bench, staging_target_path, &bad, Code::InvalidArgument), 3);
    assert_eq!(each(&bench, target_path, &bad, Code::InvalidArgument), 2);
    let missing = [String::new()];
    assert_eq!(each(&bench, volume_path, &missing, Code::InvalidArgument), 2);
    for ask in good() {
        // A path where no volume can be is one where it is not.
        let code = match ask {
            Ask::NodeGetVolumeStats(_) => Code::NotFound,
            Ask::NodeExpandVolume(_) => Code::InvalidArgument,
            _ => continue,
        };
        for path in &bad[1..] {
            let mut changed = ask.clone();
            *volume_path(&mut changed).expect("it has one") = path.clone();
            bench.refused(&changed, code);
        }
    }
}

#[test]
fn a_pod_is_neither_at_nor_in_nor_around_the_staging_folder() {
    let bench = Bench::new();
    let bad =
        [STAGING.to_owned(), format!("{STAGING}/"), format!("{STAGING}/pod"), "/kubelet/staging".to_owned()];
    for ask in good().into_iter().filter(|a| matches!(a, Ask::NodePublishVolume(_))) {
        for target in &bad {
            let mut changed = ask.clone();
            *target_path(&mut changed).expect("it has one") = target.clone();
            bench.refused(&changed, Code::InvalidArgument);
        }
    }
    // And nothing takes the staged filesystem away but an unstage.
    let unpublish = NodeUnpublishVolumeRequest { volume_id: "vol".into(), target_path: STAGING.into() };
    bench.refused(&Ask::NodeUnpublishVolume(unpublish), Code::FailedPrecondition);
}

/// Capabilities of every kind that is not served, or that is hostile.
fn bad_capabilities() -> Vec<VolumeCapability> {
    let mounted = |m: MountVolume| VolumeCapability { access_type: Some(AccessType::Mount(m)), ..mount(RWO) };
    let mut bad = vec![
        VolumeCapability::default(),
        VolumeCapability { access_mode: None, ..mount(RWO) },
        VolumeCapability { access_type: None, ..mount(RWO) },
    ];
    for mode in [0, 3, 4, 5, 8, 99, -1] {
        bad.push(VolumeCapability { access_mode: Some(AccessMode { mode }), ..mount(RWO) });
    }
    for fs in ["zfs", "ext4;reboot", "EXT4", "ext4 ", "../ext4", "-t", &"x".repeat(50_000)] {
        bad.push(mounted(MountVolume { fs_type: fs.into(), ..Default::default() }));
    }
    let long = "x".repeat(50_000);
    for flag in [
        "bind",
        "rbind",
        "move",
        "remount",
        "remount,rw",
        "loop",
        "offset=4096",
        "x-mount.mkdir",
        "X-mount.idmap=b:0:0:1",
        "noatime,bind",
        "user",
        "",
        ",",
        "a b",
        "$(id)",
        "`id`",
        "noatime\nsuid",
        "-o",
        "--bind",
        "context=\"x\"",
        "ro",
        "logdev=/dev/sda",
        "device=/dev/sda",
        "journal_path=/dev/sda",
        "errors=panic",
        "uhelper=x",
        "\u{1b}[2J",
        &long,
    ] {
        bad.push(mounted(MountVolume { mount_flags: vec![flag.into()], ..Default::default() }));
    }
    for group in ["root", "-1", "4294967295", "4294967296", "1 2", "0x10", "+5", " 5", &long] {
        bad.push(mounted(MountVolume { volume_mount_group: group.into(), ..Default::default() }));
    }
    bad
}

#[test]
fn capabilities_that_are_missing_not_served_or_hostile() {
    let bench = Bench::new();
    let mut bad: Vec<_> = bad_capabilities().into_iter().map(Some).collect();
    bad.push(None);
    assert_eq!(each(&bench, volume_capability, &bad, Code::InvalidArgument), 3);
    let mut lists: Vec<_> = bad_capabilities().into_iter().map(|c| vec![c]).collect();
    lists.extend([vec![], vec![mount(RWO), block(RWO)], vec![mount(RWO), VolumeCapability::default()]]);
    assert_eq!(each(&bench, volume_capabilities, &lists, Code::InvalidArgument), 1);
    // This one is answered with the reason, not refused; without capabilities it is.
    let none = ValidateVolumeCapabilitiesRequest { volume_id: "vol".into(), ..Default::default() };
    bench.refused(&Ask::ValidateVolumeCapabilities(none), Code::InvalidArgument);
    // A raw device has no mount options.
    let raw = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mount(RWO) };
    for ask in good() {
        // A volume with a filesystem is not handed out raw.
        match ask {
            Ask::NodeStageVolume(r) => bench.refused(
                &Ask::NodeStageVolume(NodeStageVolumeRequest { volume_capability: Some(raw.clone()), ..r }),
                Code::InvalidArgument,
            ),
            Ask::ControllerPublishVolume(r) => bench.refused(
                &Ask::ControllerPublishVolume(ControllerPublishVolumeRequest {
                    volume_capability: Some(raw.clone()),
                    ..r
                }),
                Code::InvalidArgument,
            ),
            Ask::NodePublishVolume(r) => bench.refused(
                &Ask::NodePublishVolume(NodePublishVolumeRequest {
                    volume_capability: Some(raw.clone()),
                    ..r
                }),
                Code::FailedPrecondition,
            ),
            _ => {}
        }
    }
}

#[test]
fn parameters_that_nobody_knows() {
    let bench = Bench::new();
    let long = "x".repeat(50_000);
    let bad: Vec<_> = [
        ("colour", "red"),
        ("Filesystem", "ext4"),
        ("filesystem", "zfs"),
        ("filesystem", "ext4,xfs"),
        ("deleteDataOnPVCDelete", "yes"),
        ("deleteDataOnPVCDelete", "TRUE"),
        ("deleteDataGracePeriod", "24"),
        ("deleteDataGracePeriod", "tomorrow"),
        ("configMapName", "../kube-system/secret"),
        ("configMapName", "a b"),
        ("mountOptions", "bind"),
        ("mountOptions", "noatime,,discard"),
        ("storageURL", "s3://elsewhere"),
        ("\u{1b}[2J", ""),
        ("", ""),
        (&long, "x"),
    ]
    .iter()
    .map(|pair| parameters(&[*pair]))
    .collect();
    assert_eq!(each(&bench, volume_context, &bad, Code::InvalidArgument), 3);
    let create = |ask: &mut Ask| match ask {
        Ask::CreateVolume(request) => Some(std::mem::take(&mut request.parameters)),
        _ => None,
    };
    for (ask, value) in good().into_iter().flat_map(|a| bad.iter().map(move |b| (a.clone(), b.clone()))) {
        let mut changed = ask.clone();
        if create(&mut changed).is_some()
            && let Ask::CreateVolume(request) = &mut changed
        {
            request.parameters = value;
            bench.refused(&changed, Code::InvalidArgument);
        }
    }
    let mutable: Vec<_> = [
        ("colour", "red"),
        ("storageURL", "s3://elsewhere"),
        ("encryptionPasswordSecretName", "x"),
        ("rustLog", "a b\n"),
        ("cacheMemorySizeGB", "-1"),
        ("cacheMemorySizeGB", "NaN"),
        ("cacheDiskSizeGB", "1e400"),
        ("cpuLimit", "many"),
        ("memoryLimit", "1 Gi"),
        (&long, "x"),
    ]
    .iter()
    .map(|pair| parameters(&[*pair]))
    .collect();
    assert_eq!(each(&bench, mutable_parameters, &mutable, Code::InvalidArgument), 2);
}

#[test]
fn sizes_that_cannot_be() {
    let bench = Bench::new();
    let range = |required, limit| Some(CapacityRange { required_bytes: required, limit_bytes: limit });
    let wrong = [range(-1, 0), range(0, -1), range(i64::MIN, 0), range(2 * MIB, MIB)];
    assert_eq!(each(&bench, capacity_range, &wrong, Code::InvalidArgument), 3);
    let large = [range(i64::MAX, 0), range((1 << 50) + 1, 0)];
    assert_eq!(each(&bench, capacity_range, &large, Code::OutOfRange), 3);
    for ask in good() {
        if let Ask::ControllerExpandVolume(r) = ask {
            for missing in [None, range(0, 0)] {
                let ask = ControllerExpandVolumeRequest { capacity_range: missing, ..r.clone() };
                bench.refused(&Ask::ControllerExpandVolume(ask), Code::InvalidArgument);
            }
            let ask = ControllerExpandVolumeRequest { capacity_range: range(0, MIB), ..r };
            bench.refused(&Ask::ControllerExpandVolume(ask), Code::OutOfRange);
        }
    }
    // Too small for its filesystem, and not allowed to be larger.
    let create = |range| CreateVolumeRequest {
        name: "new".into(),
        capacity_range: range,
        volume_capabilities: vec![mount(RWO)],
        ..Default::default()
    };
    bench.refused(&Ask::CreateVolume(create(range(1, 4096))), Code::OutOfRange);
}

#[test]
fn a_volume_that_is_not_there() {
    let bench = Bench::new();
    for ask in good() {
        let mut changed = ask.clone();
        let Some(id) = volume_id(&mut changed) else { continue };
        *id = "nobody".into();
        match changed {
            // What is to go is gone.
            Ask::DeleteVolume(_)
            | Ask::ControllerUnpublishVolume(_)
            | Ask::NodeUnstageVolume(_)
            | Ask::NodeUnpublishVolume(_) => {
                let before = bench.model.state();
                bench.ask(&changed).unwrap();
                assert_eq!(bench.model.state(), before, "{changed:?}");
            }
            Ask::NodePublishVolume(_) => bench.refused(&changed, Code::FailedPrecondition),
            _ => bench.refused(&changed, Code::NotFound),
        }
    }
}

#[test]
fn what_comes_from_elsewhere_and_what_pages_begin_with() {
    let bench = Bench::new();
    let source = VolumeContentSource {
        r#type: Some(volume_content_source::Type::Volume(volume_content_source::VolumeSource {
            volume_id: "vol".into(),
        })),
    };
    for ask in good() {
        if let Ask::CreateVolume(r) = ask {
            let ask = CreateVolumeRequest { volume_content_source: Some(source.clone()), ..r };
            bench.refused(&Ask::CreateVolume(ask), Code::InvalidArgument);
        }
    }
    for token in ["x", "after:", "after:../x", &"x".repeat(100_000)] {
        let ask = ListVolumesRequest { starting_token: token.into(), max_entries: 1 };
        bench.refused(&Ask::ListVolumes(ask), Code::Aborted);
    }
    let ask = ListVolumesRequest { max_entries: -1, ..Default::default() };
    bench.refused(&Ask::ListVolumes(ask), Code::InvalidArgument);
}

#[test]
fn a_store_that_is_away_is_unavailable_and_nothing_is_begun() {
    let bench = Bench::new();
    bench.model.away(true);
    for ask in good() {
        let mut idle = ask.clone();
        // Of `vol`, much is settled already; of this one nothing is.
        if let (Some(id), Ask::NodeStageVolume(_)) = (volume_id(&mut idle), &ask) {
            *id = "idle".into();
        }
        match ask {
            // What is on the node is taken down, told of and shown in pods without the store.
            Ask::NodePublishVolume(_)
            | Ask::NodeUnpublishVolume(_)
            | Ask::NodeUnstageVolume(_)
            | Ask::NodeGetVolumeStats(_) => bench.ask(&ask).unwrap(),
            _ => bench.refused(&idle, Code::Unavailable),
        }
    }
    bench.model.away(false);
    for ask in good() {
        bench.ask(&ask).unwrap();
    }
}

#[test]
fn what_is_not_offered_is_never_a_success() {
    let bench = Bench::new();
    let controller = ControllerService(bench.driver.clone());
    let capabilities = bench.runtime.block_on(async {
        let offered =
            controller.controller_get_capabilities(Request::new(ControllerGetCapabilitiesRequest {})).await;
        let answers = [
            controller.create_snapshot(Request::new(Default::default())).await.map(drop),
            controller.delete_snapshot(Request::new(Default::default())).await.map(drop),
            controller.list_snapshots(Request::new(Default::default())).await.map(drop),
            controller.get_snapshot(Request::new(Default::default())).await.map(drop),
            controller.get_capacity(Request::new(Default::default())).await.map(drop),
        ];
        for answer in answers {
            assert_eq!(answer.expect_err("it is not offered").code(), Code::Unimplemented);
        }
        offered.expect("it is answered").into_inner().capabilities
    });
    use controller_service_capability::rpc::Type as Offered;
    let advertised = format!("{capabilities:?}");
    for kind in
        [Offered::CreateDeleteSnapshot, Offered::ListSnapshots, Offered::GetCapacity, Offered::CloneVolume]
    {
        assert!(!advertised.contains(&format!("{kind:?}")), "{kind:?}: {advertised}");
    }
    assert!(advertised.contains(&format!("{:?}", Offered::ExpandVolume)), "{advertised}");
}
