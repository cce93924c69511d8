//! The Node service. Staging is the attach of the command line at the staging path, publishing a bind mount of it;
//! unpublishing and unstaging go the same way back.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response, Status};

use super::controller::{CONTEXT_READ_ONLY, print_of};
use super::proto::node_server::Node;
use super::proto::node_service_capability::{Rpc as RpcCapability, Type, rpc::Type as Offered};
use super::proto::volume_capability::access_mode::Mode;
use super::proto::*;
use super::request::{self, Capability, Parameters, missing};
use super::{Driver, Job, Need, Refusal, Rpc, condition};
use crate::catalog::{DataPrefix, Family, State, VolumeRecord};
use crate::error::{Error, Kind, Result as OurResult};
use crate::host::StopOptions;
use crate::journal::{Journal, Standing, place, volume_folder};
use crate::ops::{self, AttachSpec, PublishSpec, Scope};
use crate::step::Step;
use crate::values::{ByteSize, TargetPath, VolumeId};

/// See the module.
pub struct NodeService(pub Arc<Driver>);

type Answer<T> = Result<Response<T>, Status>;

/// The name, in the staging folder, of the link to a raw device.
const DEVICE_LINK: &str = "device";

/// Where a volume is staged: at the folder itself, or for a raw device at a link in it.
fn staged_at(folder: &TargetPath, block: bool) -> OurResult<TargetPath> {
    if block {
        TargetPath::new(&folder.as_path().join(DEVICE_LINK), folder.as_path())
    } else {
        Ok(folder.clone())
    }
}

/// What a stage asks for, checked.
struct Stage {
    folder: TargetPath,
    capability: Capability,
    parameters: Parameters,
}

impl Stage {
    fn parse(req: &NodeStageVolumeRequest) -> OurResult<Stage> {
        let folder = request::path("staging_target_path", &req.staging_target_path)?;
        let capability = request::capability(req.volume_capability.as_ref())?;
        let parameters = request::parameters(&req.volume_context)?;
        if capability.block && !capability.mount_flags.is_empty() {
            return Err(Error::usage("a raw device has no mount options").hint("leave mountOptions out"));
        }
        Ok(Stage { folder, capability, parameters })
    }
}

fn standing(driver: &Driver, volume: &VolumeId) -> OurResult<Standing> {
    Ok(Standing::of(&Journal::peek(&driver.config.run_dir, volume)?.unwrap_or_default()))
}

impl Driver {
    fn stage(&self, job: &Job, req: &NodeStageVolumeRequest) -> Result<NodeStageVolumeResponse, Refusal> {
        let volume = &job.volume;
        let Stage { folder, capability, parameters } = Stage::parse(req)?;
        let record = self.record_to_stage(volume, &capability)?;
        let target = staged_at(&folder, capability.block)?;
        let elsewhere = standing(self, volume)?;
        if let Some(at) = elsewhere.all_places().filter(|p| !matches!(p, Step::Bind(_))).find_map(place)
            && *at != target
        {
            return Err(Error::refused(format!("it is attached at {at} on this node already"))
                .on(volume)
                .hint(format!("take it away there first: zerofsctl detach {at}"))
                .into());
        }
        let mut options = parameters.mount_options.clone();
        options
            .extend(capability.mount_flags.iter().filter(|f| !parameters.mount_options.contains(f)).cloned());
        let fs = request::agreed_filesystem(&parameters, &capability)?.filter(|_| !capability.block);
        let spec = |storage_url: String| AttachSpec {
            fs,
            mount_options: if capability.block { Vec::new() } else { options },
            read_only: capability.read_only(),
            block: capability.block,
            transport: self.config.made.transport,
            path: self.config.made.path,
            reconnect_timeout: self.config.made.reconnect_timeout,
            take_over: record.may_be_taken_over_by(&self.config.node_id),
            ..AttachSpec::plain(volume.clone(), target, storage_url)
        };
        self.with_engine(job, Need::Start, |engine, host| {
            let run_dir = &self.config.run_dir;
            let spec = spec(host.store().unwrap_or_default());
            // Grown by the controller while no node had it: before it is mounted, where it could not be later.
            let later = record.filesystem.is_none_or(|fs| host.can_grow_mounted(fs).is_ok());
            if !later && !spec.read_only && record.size() > record.capacity && elsewhere.connect.is_none() {
                let place = TargetPath::new(&volume_folder(run_dir, volume).join("grow"), run_dir)?;
                let own = AttachSpec { target: place, ..spec.clone() };
                ops::resize::resize(engine, run_dir, &own, record.size())?;
            }
            let run = ops::attach::attach(engine, run_dir, &spec)?;
            for note in &run.facts.notes {
                tracing::info!(%volume, request = job.request, "{note}");
            }
            let has = run.facts.device.as_ref().map_or(ByteSize(0), |d| d.size);
            if !spec.read_only && record.size() > has && has.bytes() > 0 {
                ops::resize::resize(engine, run_dir, &spec, record.size())?;
            }
            Ok(())
        })?;
        Ok(NodeStageVolumeResponse {})
    }

    /// The record of a volume that may be staged here. Refuses what another node was given.
    fn record_to_stage(&self, volume: &VolumeId, capability: &Capability) -> Result<VolumeRecord, Refusal> {
        let catalog = self.backend.catalog()?;
        let Some((record, _)) = catalog.get(volume)? else {
            return match catalog.data_prefix(volume)? {
                // Made by an older driver: it is adopted.
                DataPrefix::ZeroFs(family) if family != Family::Unstarted => {
                    Ok(VolumeRecord::adopted(volume.clone(), ByteSize(0), jiff::Timestamp::now()))
                }
                _ => Err(Error::new(Kind::NotFound, format!("there is no such volume in {}", catalog.url()))
                    .on(volume)
                    .hint("see what there is: zerofsctl list --config FILE")
                    .into()),
            };
        };
        if record.state == State::Deleting {
            return Err(Error::refused("it is being deleted")
                .on(volume)
                .hint("wait until it is gone")
                .into());
        }
        if let Some(published) = record.published.as_ref().filter(|p| p.node != self.config.node_id) {
            return Err(Error::refused(format!(
                "it is published to node {}, not to this one",
                published.node
            ))
            .on(volume)
            .hint("a volume is on one node at a time: wait until it is unpublished there")
            .into());
        }
        if let Some(p) = record.provision.as_ref().filter(|p| p.block != capability.block) {
            let (is, asked) =
                if p.block { ("a raw device", "a filesystem") } else { ("a filesystem", "a raw device") };
            return Err(Error::usage(format!("it was made as {is}, not {asked}"))
                .on(volume)
                .hint("use it with the volumeMode that it was made with")
                .into());
        }
        Ok(record)
    }

    fn unstage(
        &self,
        job: &Job,
        req: &NodeUnstageVolumeRequest,
    ) -> Result<NodeUnstageVolumeResponse, Refusal> {
        let volume = &job.volume;
        let folder = request::path("staging_target_path", &req.staging_target_path)?;
        let done = Ok(NodeUnstageVolumeResponse {});
        if Journal::peek(&self.config.run_dir, volume)?.is_none() {
            return done;
        }
        let standing = standing(self, volume)?;
        let bound: Vec<String> = standing
            .all_places()
            .filter(|p| matches!(p, Step::Bind(_)))
            .filter_map(place)
            .map(ToString::to_string)
            .collect();
        if !bound.is_empty() {
            return Err(Error::refused(format!("it is still published at {}", bound.join(", ")))
                .on(volume)
                .hint("unpublish it there first")
                .into());
        }
        let link = staged_at(&folder, true)?;
        let here = standing.all_places().filter_map(place).find(|p| **p == folder || **p == link);
        let scope = match here {
            Some(at) => Scope::Target(at.clone()),
            // Somebody attached it elsewhere by hand: that stays.
            None if standing.all_places().next().is_some() => return done,
            // An attach that was cut short: all of it goes.
            None => Scope::Volume,
        };
        self.with_engine(job, Need::Settle, |engine, _| {
            ops::detach::detach(engine, &self.config.run_dir, volume, &scope, StopOptions::default())
        })?;
        done
    }

    fn publish(
        &self,
        job: &Job,
        req: &NodePublishVolumeRequest,
    ) -> Result<NodePublishVolumeResponse, Refusal> {
        let volume = &job.volume;
        let target = request::path("target_path", &req.target_path)?;
        let capability = request::capability(req.volume_capability.as_ref())?;
        let folder = request::path("staging_target_path", &req.staging_target_path)?;
        request::parameters(&req.volume_context)?;
        let (at, from) = (target.as_path(), folder.as_path());
        if at.starts_with(from) || from.starts_with(at) {
            return Err(Error::usage("target_path is at, in or around staging_target_path")
                .on(volume)
                .hint("give each pod a folder of its own")
                .into());
        }
        let read_only = req.readonly
            || capability.read_only()
            || req.publish_context.get(CONTEXT_READ_ONLY).is_some_and(|v| v == "true");
        let spec = PublishSpec {
            volume: volume.clone(),
            staged: staged_at(&folder, capability.block)?,
            target,
            read_only,
            block: capability.block,
            alone: capability.mode == Mode::SingleNodeSingleWriter,
            group: capability.group,
        };
        self.with_engine(job, Need::Settle, |engine, _| {
            ops::publish::publish(engine, &self.config.run_dir, &spec)
        })?;
        Ok(NodePublishVolumeResponse {})
    }

    fn unpublish(
        &self,
        job: &Job,
        req: &NodeUnpublishVolumeRequest,
    ) -> Result<NodeUnpublishVolumeResponse, Refusal> {
        let volume = &job.volume;
        let target = request::path("target_path", &req.target_path)?;
        self.with_engine(job, Need::Settle, |engine, host| {
            let run_dir = &self.config.run_dir;
            if ops::publish::unpublish(engine, run_dir, volume, &target)?.is_some() {
                return Ok(());
            }
            // It is not ours, as after a reboot: what is left of the place goes, if that is empty.
            match host.target(&target)? {
                crate::host::TargetView::MountPoint(entry) => {
                    Err(Error::refused(format!("at {target} something else is mounted: {}", entry.source))
                        .on(volume)
                        .hint(format!("look at it (findmnt {target}) and unmount it by hand")))
                }
                _ => host.clear_target(&target),
            }
        })?;
        Ok(NodeUnpublishVolumeResponse {})
    }

    fn expand_here(
        &self,
        job: &Job,
        req: &NodeExpandVolumeRequest,
    ) -> Result<NodeExpandVolumeResponse, Refusal> {
        let volume = &job.volume;
        if req.volume_path.is_empty() {
            return Err(missing("volume_path").into());
        }
        let not_here = || {
            Error::new(Kind::NotFound, "it is not on this node")
                .on(volume)
                .hint("it grows when it is staged; see what is here: zerofsctl list")
        };
        let standing = standing(self, volume)?;
        let connect = standing.connect.as_ref().ok_or_else(not_here)?;
        let at = request::path("volume_path", &req.volume_path)?;
        let link = staged_at(&at, true)?;
        if !standing.places.iter().filter_map(place).any(|p| *p == at || *p == link) {
            return Err(not_here().context(format!("nothing of it is at {at}")).into());
        }
        let (required, limit) = request::bounds(req.capacity_range.as_ref())?;
        let has = standing.facts.device.as_ref().map_or(ByteSize(0), |d| d.size);
        let wanted = if required > 0 {
            request::grown_size(req.capacity_range.as_ref())?.0
        } else {
            self.backend.catalog()?.get(volume)?.map_or(has, |(record, _)| record.size())
        };
        // What is larger already, and its filesystem too, is as good.
        let size = wanted.max(has);
        if let Some(limit) = limit.filter(|limit| size > *limit) {
            let text = format!("it has {} bytes, more than the limit of {}", size.bytes(), limit.bytes());
            return Err(Refusal::out_of_range(text));
        }
        if connect.read_only {
            return Ok(NodeExpandVolumeResponse { capacity_bytes: has.bytes() as i64 });
        }
        let spec = AttachSpec::plain(volume.clone(), at, String::new());
        let run = self.with_engine(job, Need::Reopen, |engine, _| {
            ops::resize::resize(engine, &self.config.run_dir, &spec, size)
        })?;
        let size = run.facts.device.as_ref().map_or(size, |d| d.size);
        Ok(NodeExpandVolumeResponse { capacity_bytes: i64::try_from(size.bytes()).unwrap_or(i64::MAX) })
    }

    fn stats(&self, req: &NodeGetVolumeStatsRequest) -> Result<NodeGetVolumeStatsResponse, Refusal> {
        let volume = request::volume(&req.volume_id)?;
        if req.volume_path.is_empty() {
            return Err(missing("volume_path").into());
        }
        // Where no volume can be, there is none.
        let at = request::path("volume_path", &req.volume_path).map_err(|e| {
            Error::new(Kind::NotFound, e.message())
                .on(&volume)
                .hint(format!("it is not there; see where it is: zerofsctl show {volume}"))
        })?;
        let stats = condition::stats(&self.config.run_dir, &volume, &at)?;
        Ok(NodeGetVolumeStatsResponse { usage: stats.usage, volume_condition: Some(stats.condition) })
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Answer<NodeStageVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &Job| driver.stage(job, &req);
        self.0.call(Rpc::NodeStageVolume, id, print, work).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Answer<NodeUnstageVolumeResponse> {
        let req = request.into_inner();
        let (id, print) = (request::volume(&req.volume_id), req.encode_to_vec());
        let work = move |driver: &Driver, job: &Job| driver.unstage(job, &req);
        self.0.call(Rpc::NodeUnstageVolume, id, print, work).await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Answer<NodePublishVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &Job| driver.publish(job, &req);
        self.0.call(Rpc::NodePublishVolume, id, print, work).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Answer<NodeUnpublishVolumeResponse> {
        let req = request.into_inner();
        let (id, print) = (request::volume(&req.volume_id), req.encode_to_vec());
        let work = move |driver: &Driver, job: &Job| driver.unpublish(job, &req);
        self.0.call(Rpc::NodeUnpublishVolume, id, print, work).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Answer<NodeGetVolumeStatsResponse> {
        let req = request.into_inner();
        let volume = req.volume_id.clone();
        self.0.look(Rpc::NodeGetVolumeStats, &volume, move |driver| driver.stats(&req)).await
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Answer<NodeExpandVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &Job| driver.expand_here(job, &req);
        self.0.call(Rpc::NodeExpandVolume, id, print, work).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Answer<NodeGetCapabilitiesResponse> {
        let capabilities = [
            Offered::StageUnstageVolume,
            Offered::GetVolumeStats,
            Offered::ExpandVolume,
            Offered::VolumeCondition,
            Offered::SingleNodeMultiWriter,
            Offered::VolumeMountGroup,
        ]
        .map(|kind| NodeServiceCapability { r#type: Some(Type::Rpc(RpcCapability { r#type: kind as i32 })) });
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Answer<NodeGetInfoResponse> {
        let driver = &self.0;
        Ok(Response::new(NodeGetInfoResponse {
            node_id: driver.config.node_id.clone(),
            // 0 lets the orchestrator decide.
            max_volumes_per_node: driver.config.max_volumes.map_or(0, i64::from),
            accessible_topology: driver.config.topology(),
        }))
    }
}
