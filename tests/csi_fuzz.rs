//! Random calls on the driver's handlers, in any order, with right and wrong fields, twice at the same time, with callers
//! that go away and changes that fail: each is answered as a small model of the rules says, and afterwards the node and the
//! catalog are what that model says. The machine is the one of the crash tests, which panics on what must never happen.

mod support;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use support::csi::{Mode, at_least, block, mount, parameters};
use support::model::{Ask, Model, NODE, runtime};
use tonic::{Code, Status};
use zerofsctl::catalog::{Catalog, State};
use zerofsctl::csi::Driver;
use zerofsctl::csi::proto::*;

const MIB: i64 = 1 << 20;
const VOLUMES: [&str; 2] = ["vol1", "vol10"];
const NODES: [&str; 3] = [NODE, "n2", "n9"];
const STAGINGS: [&str; 2] = ["/kubelet/staging/a", "/kubelet/staging/b"];
const PODS: [&str; 3] = ["/kubelet/pods/1", "/kubelet/pods/2", "/kubelet/pods/3"];
const SIZES: [i64; 3] = [64 * MIB, 128 * MIB, 192 * MIB];
const MODES: [Mode; 3] = [Mode::SingleNodeWriter, Mode::SingleNodeMultiWriter, Mode::SingleNodeSingleWriter];
/// The data is kept, deleted at once, or later.
const DELETIONS: [&[(&str, &str)]; 3] = [
    &[],
    &[("deleteDataOnPVCDelete", "true")],
    &[("deleteDataOnPVCDelete", "true"), ("deleteDataGracePeriod", "1h")],
];
const LOGS: [&str; 3] = ["", "info", "warn"];

/// What the rules know of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Volume {
    raw: bool,
    delete_data: bool,
    /// It is deleted only after a while.
    grace: bool,
    /// Deleted, with its data kept.
    released: bool,
    /// Deleted, and its data goes later.
    marked: bool,
    /// A node had it.
    started: bool,
    size: i64,
    log: String,
    published: Option<(String, bool, i32)>,
    staged: Option<String>,
    pods: BTreeMap<String, bool>,
}

type World = BTreeMap<String, Volume>;

/// How a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Once,
    /// A second time while the first one may be at work.
    Twice,
    /// The caller goes away at once, and asks again.
    Impatient,
    /// This change of the operation fails, and the caller asks again.
    Failing(u64),
}

/// What is wrong with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoilt {
    Nothing,
    Id(&'static str),
    Path(&'static str),
    Capability(i32),
    Parameter(&'static str),
}

impl Spoilt {
    /// Spoils the call; false when it has no such field.
    fn spoil(self, ask: &mut Ask) -> bool {
        let spoilt = match self {
            Spoilt::Nothing => None,
            Spoilt::Id(id) => id_of(ask).map(|field| *field = id.into()),
            Spoilt::Path(path) => path_of(ask).map(|field| *field = path.into()),
            Spoilt::Parameter(key) => parameters_of(ask).map(|field| *field = parameters(&[(key, "x y")])),
            Spoilt::Capability(mode) => capability_of(ask).map(|field| {
                field.access_mode = Some(volume_capability::AccessMode { mode });
            }),
        };
        spoilt.is_some()
    }
}

fn path_of(ask: &mut Ask) -> Option<&mut String> {
    match ask {
        Ask::NodeStageVolume(r) => Some(&mut r.staging_target_path),
        Ask::NodeUnstageVolume(r) => Some(&mut r.staging_target_path),
        Ask::NodePublishVolume(r) => Some(&mut r.target_path),
        Ask::NodeUnpublishVolume(r) => Some(&mut r.target_path),
        _ => None,
    }
}

fn parameters_of(ask: &mut Ask) -> Option<&mut BTreeMap<String, String>> {
    match ask {
        Ask::CreateVolume(r) => Some(&mut r.parameters),
        Ask::ControllerPublishVolume(r) => Some(&mut r.volume_context),
        Ask::NodeStageVolume(r) => Some(&mut r.volume_context),
        Ask::NodePublishVolume(r) => Some(&mut r.volume_context),
        _ => None,
    }
}

fn capability_of(ask: &mut Ask) -> Option<&mut VolumeCapability> {
    match ask {
        Ask::CreateVolume(r) => r.volume_capabilities.first_mut(),
        Ask::ControllerPublishVolume(r) => r.volume_capability.as_mut(),
        Ask::NodeStageVolume(r) => r.volume_capability.as_mut(),
        Ask::NodePublishVolume(r) => r.volume_capability.as_mut(),
        _ => None,
    }
}

fn id_of(ask: &mut Ask) -> Option<&mut String> {
    Some(match ask {
        Ask::CreateVolume(r) => &mut r.name,
        Ask::DeleteVolume(r) => &mut r.volume_id,
        Ask::ControllerPublishVolume(r) => &mut r.volume_id,
        Ask::ControllerUnpublishVolume(r) => &mut r.volume_id,
        Ask::ValidateVolumeCapabilities(r) => &mut r.volume_id,
        Ask::ListVolumes(_) => return None,
        Ask::ControllerGetVolume(r) => &mut r.volume_id,
        Ask::ControllerExpandVolume(r) => &mut r.volume_id,
        Ask::ControllerModifyVolume(r) => &mut r.volume_id,
        Ask::NodeStageVolume(r) => &mut r.volume_id,
        Ask::NodeUnstageVolume(r) => &mut r.volume_id,
        Ask::NodePublishVolume(r) => &mut r.volume_id,
        Ask::NodeUnpublishVolume(r) => &mut r.volume_id,
        Ask::NodeGetVolumeStats(r) => &mut r.volume_id,
        Ask::NodeExpandVolume(r) => &mut r.volume_id,
    })
}

fn is_raw(capability: Option<&VolumeCapability>) -> bool {
    let access = capability.and_then(|c| c.access_type.as_ref());
    matches!(access, Some(volume_capability::AccessType::Block(_)))
}

fn mode_of(capability: Option<&VolumeCapability>) -> i32 {
    capability.and_then(|c| c.access_mode.as_ref()).map_or(0, |m| m.mode)
}

fn required(range: Option<&CapacityRange>) -> i64 {
    range.map_or(0, |r| r.required_bytes)
}

/// The rules: how a call with nothing wrong in it is answered, and what it changes.
fn rule(world: &World, ask: &Ask) -> (Code, World) {
    let mut after = world.clone();
    let code = change(&mut after, ask);
    (code, if code == Code::Ok { after } else { world.clone() })
}

fn change(world: &mut World, ask: &Ask) -> Code {
    let mut named = ask.clone();
    let id = id_of(&mut named).cloned().unwrap_or_default();
    let known = world.get_mut(&id);
    match ask {
        Ask::CreateVolume(r) => {
            let raw = is_raw(r.volume_capabilities.first());
            let delete_data = r.parameters.contains_key("deleteDataOnPVCDelete");
            let grace = r.parameters.contains_key("deleteDataGracePeriod");
            let size = required(r.capacity_range.as_ref());
            match known {
                Some(v)
                    if v.released
                        || v.marked
                        || size > v.size
                        || (raw, delete_data, grace) != (v.raw, v.delete_data, v.grace) =>
                {
                    return Code::AlreadyExists;
                }
                Some(_) => {}
                None => {
                    world.insert(id, Volume { raw, delete_data, grace, size, ..Volume::default() });
                }
            }
            Code::Ok
        }
        Ask::DeleteVolume(_) => {
            match known {
                Some(v) if v.staged.is_some() || v.published.is_some() => return Code::FailedPrecondition,
                Some(v) if v.started && !v.delete_data => v.released = true,
                Some(v) if v.started && v.grace => v.marked = true,
                _ => drop(world.remove(&id)),
            }
            Code::Ok
        }
        Ask::ControllerPublishVolume(r) => {
            let Some(v) = known else { return Code::NotFound };
            if r.node_id == NODES[2] {
                return Code::NotFound;
            }
            if is_raw(r.volume_capability.as_ref()) != v.raw {
                return Code::InvalidArgument;
            }
            let wanted = (r.node_id.clone(), r.readonly, mode_of(r.volume_capability.as_ref()));
            match &v.published {
                Some((node, ..)) if *node != r.node_id => return Code::FailedPrecondition,
                Some(has) if *has != wanted => return Code::AlreadyExists,
                None if v.staged.is_some() && r.node_id != NODE => return Code::FailedPrecondition,
                _ => {}
            }
            v.published = Some(wanted);
            Code::Ok
        }
        Ask::ControllerUnpublishVolume(r) => {
            let Some(v) = known else { return Code::Ok };
            if v.staged.is_some() && (r.node_id.is_empty() || r.node_id == NODE) {
                return Code::FailedPrecondition;
            }
            v.published = v.published.take().filter(|(n, ..)| !r.node_id.is_empty() && *n != r.node_id);
            Code::Ok
        }
        Ask::ValidateVolumeCapabilities(_) => known.map_or(Code::NotFound, |_| Code::Ok),
        Ask::ListVolumes(_) => Code::Ok,
        Ask::ControllerGetVolume(_) => {
            known.filter(|v| !v.released && !v.marked).map_or(Code::NotFound, |_| Code::Ok)
        }
        Ask::ControllerExpandVolume(r) => {
            let Some(v) = known else { return Code::NotFound };
            v.size = v.size.max(required(r.capacity_range.as_ref()));
            Code::Ok
        }
        Ask::ControllerModifyVolume(r) => {
            let Some(v) = known else { return Code::NotFound };
            v.log = r.mutable_parameters["rustLog"].clone();
            Code::Ok
        }
        Ask::NodeStageVolume(r) => {
            let Some(v) = known else { return Code::NotFound };
            if v.published.as_ref().is_some_and(|(node, ..)| node != NODE) {
                return Code::FailedPrecondition;
            }
            if is_raw(r.volume_capability.as_ref()) != v.raw {
                return Code::InvalidArgument;
            }
            if v.staged.as_ref().is_some_and(|at| *at != r.staging_target_path) {
                return Code::FailedPrecondition;
            }
            v.staged = Some(r.staging_target_path.clone());
            v.started = true;
            v.marked = false;
            Code::Ok
        }
        Ask::NodeUnstageVolume(r) => {
            let Some(v) = known else { return Code::Ok };
            if !v.pods.is_empty() {
                return Code::FailedPrecondition;
            }
            v.staged = v.staged.take().filter(|at| *at != r.staging_target_path);
            Code::Ok
        }
        Ask::NodePublishVolume(r) => {
            let raw = is_raw(r.volume_capability.as_ref());
            let staged = |v: &&mut Volume| v.staged.as_ref() == Some(&r.staging_target_path) && v.raw == raw;
            let Some(v) = known.filter(staged) else { return Code::FailedPrecondition };
            let alone = mode_of(r.volume_capability.as_ref()) == Mode::SingleNodeSingleWriter as i32;
            if alone && v.pods.keys().any(|pod| *pod != r.target_path) {
                return Code::FailedPrecondition;
            }
            // What is staged read-write is not handed out read-only as a device.
            if raw && r.readonly {
                return Code::FailedPrecondition;
            }
            if v.pods.get(&r.target_path).is_some_and(|read_only| *read_only != r.readonly) {
                return Code::AlreadyExists;
            }
            v.pods.insert(r.target_path.clone(), r.readonly);
            Code::Ok
        }
        Ask::NodeUnpublishVolume(r) => {
            let Some(v) = known else { return Code::Ok };
            // The link of a raw device is in the folder.
            if v.staged.as_ref() == Some(&r.target_path) && !v.raw {
                return Code::FailedPrecondition;
            }
            v.pods.remove(&r.target_path);
            Code::Ok
        }
        Ask::NodeGetVolumeStats(r) => {
            known.filter(|v| v.is_at(&r.volume_path)).map_or(Code::NotFound, |_| Code::Ok)
        }
        Ask::NodeExpandVolume(r) => {
            let Some(v) = known.filter(|v| v.is_at(&r.volume_path)) else { return Code::NotFound };
            v.size = v.size.max(required(r.capacity_range.as_ref()));
            Code::Ok
        }
    }
}

impl Volume {
    fn is_at(&self, path: &str) -> bool {
        self.staged.as_deref() == Some(path) || self.pods.contains_key(path)
    }
}

/// Any call, with nothing wrong in it but that it may come at the wrong time.
fn any_ask() -> impl Strategy<Value = Ask> {
    // Mostly the same ones: at random alone, calls seldom meet.
    let volume = prop::sample::select(vec![VOLUMES[0], VOLUMES[0], VOLUMES[0], VOLUMES[1]]);
    let (staging, pod) = (
        prop::sample::select(vec![STAGINGS[0], STAGINGS[0], STAGINGS[0], STAGINGS[1]]),
        prop::sample::select(vec![PODS[0], PODS[0], PODS[1], PODS[2]]),
    );
    let (node, size) = (
        prop::sample::select(vec![NODES[0], NODES[0], NODES[0], NODES[1], NODES[2]]),
        prop::sample::select(&SIZES[..]),
    );
    let capability = (prop::sample::select(&MODES[..]), prop::bool::weighted(0.2))
        .prop_map(|(mode, raw)| if raw { block(mode) } else { mount(mode) });
    let log = prop::sample::select(&LOGS[..]);
    (
        0..16usize,
        volume,
        (staging, pod, any::<bool>()),
        (node, prop::bool::weighted(0.2)),
        size,
        capability,
        any::<bool>(),
        log,
    )
        .prop_map(
            |(kind, id, (staging, pod, at_staging), (node, anywhere), size, capability, flag, log)| {
                let (volume_id, node) = (id.to_owned(), node.to_owned());
                let (staging, pod) = (staging.to_owned(), pod.to_owned());
                let volume_path = if at_staging { staging.clone() } else { pod.clone() };
                let capacity_range = at_least(size);
                let volume_capability = Some(capability.clone());
                // Those that have no effect are chosen more seldom than the others.
                match kind {
                    0 => Ask::CreateVolume(CreateVolumeRequest {
                        name: volume_id,
                        capacity_range,
                        volume_capabilities: vec![capability],
                        parameters: parameters(DELETIONS[usize::from(flag) * (1 + usize::from(at_staging))]),
                        ..Default::default()
                    }),
                    1 => Ask::DeleteVolume(DeleteVolumeRequest { volume_id, ..Default::default() }),
                    2 => Ask::ControllerPublishVolume(ControllerPublishVolumeRequest {
                        volume_id,
                        node_id: node,
                        volume_capability,
                        readonly: flag && at_staging,
                        ..Default::default()
                    }),
                    3 => Ask::ControllerUnpublishVolume(ControllerUnpublishVolumeRequest {
                        volume_id,
                        node_id: if anywhere { String::new() } else { node },
                        ..Default::default()
                    }),
                    4 if flag => Ask::ValidateVolumeCapabilities(ValidateVolumeCapabilitiesRequest {
                        volume_id,
                        volume_capabilities: vec![capability],
                        ..Default::default()
                    }),
                    4 => Ask::ListVolumes(ListVolumesRequest::default()),
                    5 => Ask::ControllerGetVolume(ControllerGetVolumeRequest { volume_id }),
                    6 => Ask::ControllerExpandVolume(ControllerExpandVolumeRequest {
                        volume_id,
                        capacity_range,
                        ..Default::default()
                    }),
                    7 => Ask::ControllerModifyVolume(ControllerModifyVolumeRequest {
                        volume_id,
                        mutable_parameters: parameters(&[("rustLog", log)]),
                        ..Default::default()
                    }),
                    8 | 9 => Ask::NodeStageVolume(NodeStageVolumeRequest {
                        volume_id,
                        staging_target_path: staging,
                        volume_capability,
                        ..Default::default()
                    }),
                    10 => Ask::NodeUnstageVolume(NodeUnstageVolumeRequest {
                        volume_id,
                        staging_target_path: staging,
                    }),
                    11 | 12 => Ask::NodePublishVolume(NodePublishVolumeRequest {
                        volume_id,
                        staging_target_path: staging,
                        target_path: pod,
                        volume_capability,
                        readonly: anywhere,
                        ..Default::default()
                    }),
                    13 => Ask::NodeUnpublishVolume(NodeUnpublishVolumeRequest {
                        volume_id,
                        target_path: if anywhere { volume_path } else { pod },
                    }),
                    14 => Ask::NodeGetVolumeStats(NodeGetVolumeStatsRequest {
                        volume_id,
                        volume_path,
                        ..Default::default()
                    }),
                    _ => Ask::NodeExpandVolume(NodeExpandVolumeRequest {
                        volume_id,
                        volume_path,
                        capacity_range: if flag { capacity_range } else { None },
                        ..Default::default()
                    }),
                }
            },
        )
}

fn any_spoilt() -> impl Strategy<Value = Spoilt> {
    prop_oneof![
        10 => Just(Spoilt::Nothing),
        1 => prop::sample::select(&["", "..", "../vol1", "vol1/..", "a\nb"][..]).prop_map(Spoilt::Id),
        1 => prop::sample::select(&["", "rel", "/", "/a/../b", "/a\nb"][..]).prop_map(Spoilt::Path),
        1 => prop::sample::select(&[0, 3, 4, 5, 9, -7][..]).prop_map(Spoilt::Capability),
        1 => prop::sample::select(&["colour", "filesystem", "configMapName", "mountOptions"][..])
            .prop_map(Spoilt::Parameter),
    ]
}

fn any_manner() -> impl Strategy<Value = Manner> {
    prop_oneof![
        6 => Just(Manner::Once),
        2 => Just(Manner::Twice),
        2 => Just(Manner::Impatient),
        2 => (1..40u64).prop_map(Manner::Failing),
    ]
}

fn code(result: &Result<(), Status>) -> Code {
    result.as_ref().map_or_else(Status::code, |()| Code::Ok)
}

/// How often which call came to which end.
type Seen = RefCell<BTreeMap<(String, String), u64>>;

/// A driver on a model machine, and what the rules say of both.
struct Case<'a> {
    seen: &'a Seen,
    model: Model,
    driver: Arc<Driver>,
    runtime: tokio::runtime::Runtime,
    world: World,
}

impl Case<'_> {
    fn new(seen: &Seen) -> Case<'_> {
        let model = Model::new();
        Case { seen, driver: model.driver(), model, runtime: runtime(), world: World::new() }
    }

    fn came_to(&self, ask: &Ask, code: Code) {
        // The variant is named as the call is.
        let call = format!("{ask:?}").split('(').next().unwrap_or_default().to_owned();
        *self.seen.borrow_mut().entry((call, format!("{code:?}"))).or_default() += 1;
    }

    /// Makes one call, and compares.
    fn step(&mut self, mut ask: Ask, spoilt: Spoilt, manner: Manner) {
        let wrong = spoilt.spoil(&mut ask);
        let (first, after) =
            if wrong { (Code::InvalidArgument, self.world.clone()) } else { rule(&self.world, &ask) };
        // For whoever asks again.
        let again = if wrong { first } else { rule(&after, &ask).0 };
        let driver = self.driver.clone();
        let (got, said) = self.runtime.block_on(async {
            match manner {
                Manner::Once => {
                    let result = ask.ask(&driver).await;
                    (vec![code(&result)], vec![result])
                }
                Manner::Twice => {
                    let (a, b) = tokio::join!(ask.ask(&driver), ask.ask(&driver));
                    (vec![code(&a), code(&b)], vec![a, b])
                }
                Manner::Impatient => {
                    let limit = std::time::Duration::ZERO;
                    let _ = tokio::time::timeout(limit, ask.ask(&driver)).await;
                    loop {
                        // What is at work on it may be another's, and then it must be done first.
                        let result = ask.ask(&driver).await;
                        if code(&result) != Code::Aborted {
                            break (vec![code(&result)], vec![result]);
                        }
                        tokio::task::yield_now().await;
                    }
                }
                Manner::Failing(n) => {
                    self.model.fail_at(n);
                    let result = ask.ask(&driver).await;
                    self.model.fail_at(0);
                    if code(&result) == first {
                        (vec![first], vec![result])
                    } else {
                        assert_eq!(code(&result), Code::Internal, "{ask:?}: {result:?}");
                        self.came_to(&ask, Code::Internal);
                        let result = ask.ask(&driver).await;
                        (vec![code(&result)], vec![result])
                    }
                }
            }
        });
        let mut allowed = vec![first];
        match manner {
            Manner::Once => {}
            // One that failed may have done all of it.
            Manner::Impatient | Manner::Failing(_) => allowed.push(again),
            Manner::Twice => allowed.extend([again, Code::Aborted]),
        }
        assert!(got.iter().all(|c| allowed.contains(c)), "{got:?}, not {allowed:?}: {ask:?}\n{said:#?}");
        assert!(got.iter().any(|c| *c != Code::Aborted), "{got:?}: {ask:?}");
        for status in said.iter().filter_map(|r| r.as_ref().err()) {
            assert!(status.message().contains("hint: "), "{status:?}");
        }
        for code in got {
            self.came_to(&ask, code);
        }
        self.world = after;
        self.compare(&ask);
    }

    /// The node and the catalog are what the rules say.
    fn compare(&self, ask: &Ask) {
        assert_eq!(self.driver.flights.count(), 0);
        let here: Vec<String> = self.model.on_node().keys().map(ToString::to_string).collect();
        let staged: Vec<String> =
            self.world.iter().filter(|(_, v)| v.staged.is_some()).map(|(id, _)| id.clone()).collect();
        assert_eq!(here, staged, "after {ask:?}: {:?}", self.model.on_node());
        let mut records = World::new();
        for id in self.model.records() {
            let (record, _) = self.model.catalog().get(&id).unwrap().expect("it was listed");
            let provision = record.provision.clone().expect("it was provisioned");
            let mut volume = self.world.get(id.as_str()).cloned().unwrap_or_default();
            assert_ne!(record.state, State::Deleting);
            assert_eq!(record.owner.is_some(), volume.staged.is_some(), "after {ask:?}: {record:?}");
            volume = Volume {
                raw: provision.block,
                delete_data: provision.delete_data,
                grace: provision.delete_grace_seconds.is_some(),
                marked: record.mark().is_some(),
                released: record.state == State::Released,
                started: record.epoch > 0,
                size: record.size().bytes() as i64,
                log: record.tuning.get("rustLog").cloned().unwrap_or_default(),
                published: record.published.map(|p| {
                    let mode = Mode::from_str_name(&p.mode).expect("CSI's own word");
                    (p.node, p.read_only, mode as i32)
                }),
                ..volume
            };
            records.insert(id.to_string(), volume);
        }
        assert_eq!(records, self.world, "after {ask:?}");
    }

    /// Whatever was left, it can be taken away in order, and then nothing is there.
    fn clear(&mut self) {
        for (id, volume) in self.world.clone() {
            for pod in volume.pods.keys() {
                let ask = NodeUnpublishVolumeRequest { volume_id: id.clone(), target_path: pod.clone() };
                self.step(Ask::NodeUnpublishVolume(ask), Spoilt::Nothing, Manner::Once);
            }
            if let Some(at) = &volume.staged {
                let ask = NodeUnstageVolumeRequest { volume_id: id.clone(), staging_target_path: at.clone() };
                self.step(Ask::NodeUnstageVolume(ask), Spoilt::Nothing, Manner::Once);
            }
            let ask = ControllerUnpublishVolumeRequest { volume_id: id.clone(), ..Default::default() };
            self.step(Ask::ControllerUnpublishVolume(ask), Spoilt::Nothing, Manner::Once);
            let ask = DeleteVolumeRequest { volume_id: id, ..Default::default() };
            self.step(Ask::DeleteVolume(ask), Spoilt::Nothing, Manner::Once);
        }
        assert!(self.model.on_node().is_empty());
        assert!(self.world.values().all(|v| v.released || v.marked), "{:?}", self.world);
    }
}

/// The way of a volume that works, with other calls in between: at random alone, calls seldom get far.
fn any_calls() -> impl Strategy<Value = Vec<(Ask, Spoilt, Manner)>> {
    let deletion = prop::sample::select(&DELETIONS[..]);
    let way = (prop::bool::weighted(0.25), deletion).prop_map(|(raw, deletion)| {
        let capability = if raw { block(MODES[0]) } else { mount(MODES[0]) };
        let volume_id = VOLUMES[0].to_owned();
        vec![
            Ask::CreateVolume(CreateVolumeRequest {
                name: volume_id.clone(),
                capacity_range: at_least(SIZES[0]),
                volume_capabilities: vec![capability.clone()],
                parameters: parameters(deletion),
                ..Default::default()
            }),
            Ask::NodeStageVolume(NodeStageVolumeRequest {
                volume_id: volume_id.clone(),
                staging_target_path: STAGINGS[0].into(),
                volume_capability: Some(capability.clone()),
                ..Default::default()
            }),
            Ask::NodePublishVolume(NodePublishVolumeRequest {
                volume_id,
                staging_target_path: STAGINGS[0].into(),
                target_path: PODS[0].into(),
                volume_capability: Some(capability),
                ..Default::default()
            }),
        ]
    });
    let call = (any_ask(), any_spoilt(), any_manner());
    (way, prop::collection::vec(any_manner(), 3), prop::collection::vec(call, 1..48)).prop_map(
        |(way, manners, calls)| {
            let way = way.into_iter().zip(manners).map(|(ask, manner)| (ask, Spoilt::Nothing, manner));
            let mut all: Vec<_> = way.collect();
            for (n, call) in calls.into_iter().enumerate() {
                // Spread between the steps, and after them.
                let at = if n % 4 == 0 { n.min(all.len()) } else { all.len() };
                all.insert(at, call);
            }
            all
        },
    )
}

#[test]
fn any_calls_in_any_order_are_answered_by_the_rules_and_leave_nothing() {
    let config =
        ProptestConfig { cases: support::cases(128), failure_persistence: None, ..Default::default() };
    let seen = RefCell::new(BTreeMap::new());
    let result = TestRunner::new(config).run(&any_calls(), |calls| {
        let mut case = Case::new(&seen);
        for (ask, spoilt, manner) in calls {
            case.step(ask, spoilt, manner);
        }
        case.clear();
        Ok(())
    });
    if let Err(e) = result {
        panic!("{e}");
    }
    // It is worth something only if every call came to every end.
    let seen = seen.into_inner();
    let with = |code: Code| seen.keys().filter(|(_, c)| *c == format!("{code:?}")).count();
    let ends = [
        (Code::Ok, 15),
        (Code::InvalidArgument, 13),
        (Code::NotFound, 7),
        (Code::FailedPrecondition, 6),
        (Code::AlreadyExists, 3),
        (Code::Aborted, 6),
        (Code::Internal, 3),
    ];
    for (code, calls) in ends {
        assert!(with(code) >= calls, "{} calls came to {code:?}: {seen:#?}", with(code));
    }
}
