//! The Controller service: the volumes of the store, by their records alone. Nothing here starts a ZeroFS.

use std::sync::Arc;

use prost::Message;
use tonic::{Code, Request, Response, Status};

use super::proto::controller_server::Controller;
use super::proto::controller_service_capability::{Rpc as RpcCapability, Type, rpc::Type as Offered};
use super::proto::validate_volume_capabilities_response::Confirmed;
use super::proto::*;
use super::request::{self, missing};
use super::{Driver, Refusal, Rpc};
use crate::catalog::{Catalog, DataPrefix, Provision, Published, State, Tag, VolumeRecord, Written};
use crate::error::{Error, Kind, Result as OurResult};
use crate::journal::{Journal, Standing};
use crate::values::{ByteSize, FsType, VolumeId};

/// See the module.
pub struct ControllerService(pub Arc<Driver>);

type Answer<T> = Result<Response<T>, Status>;

/// In the publish context: whether the node may only read it.
pub(super) const CONTEXT_READ_ONLY: &str = "readOnly";

/// How often a conditional write is tried again.
pub(super) const TRIES: usize = 12;

fn not_found(volume: &VolumeId) -> Refusal {
    Error::new(Kind::NotFound, "there is no such volume")
        .on(volume)
        .hint("see what there is: zerofsctl list --config FILE")
        .into()
}

/// The record of a volume that is in service, or not yet gone.
fn record(catalog: &dyn Catalog, volume: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>, Refusal> {
    Ok(catalog.get(volume)?)
}

/// The record of a volume that calls may use. One that an older driver made has none until it is adopted.
fn in_service(catalog: &dyn Catalog, volume: &VolumeId) -> Result<(VolumeRecord, Tag), Refusal> {
    for _ in 0..TRIES {
        match record(catalog, volume)? {
            Some((record, _)) if record.state == State::Deleting => {
                return Err(Error::refused("it is being deleted")
                    .on(volume)
                    .hint("wait until it is gone")
                    .into());
            }
            Some(found) => return Ok(found),
            None => {}
        }
        match catalog.data_prefix(volume)? {
            DataPrefix::ZeroFs(family) if family != crate::catalog::Family::Unstarted => {}
            _ => return Err(not_found(volume)),
        }
        // Its data is there, so it is a volume: from now on with a record. Its size is known once its disk was seen.
        let adopted = VolumeRecord::adopted(volume.clone(), ByteSize(0), jiff::Timestamp::now());
        let _ = catalog.create(&adopted)?;
    }
    Err(keeps_changing(volume))
}

pub(super) fn keeps_changing(volume: &VolumeId) -> Refusal {
    Error::new(Kind::Busy, "its catalog record keeps changing under us").on(volume).hint("try again").into()
}

/// Changes a record with a conditional write; `change` answers none when there is nothing to change.
fn change(
    catalog: &dyn Catalog,
    volume: &VolumeId,
    change: impl Fn(&VolumeRecord) -> Result<Option<VolumeRecord>, Refusal>,
) -> Result<VolumeRecord, Refusal> {
    for _ in 0..TRIES {
        let (record, tag) = in_service(catalog, volume)?;
        let Some(wanted) = change(&record)? else { return Ok(record) };
        if let Written::Done(_) = catalog.update(&wanted, &tag)? {
            return Ok(wanted);
        }
    }
    Err(keeps_changing(volume))
}

impl Driver {
    /// As CSI knows a volume.
    fn volume(&self, record: &VolumeRecord) -> Volume {
        let mut context = std::collections::BTreeMap::new();
        if let Some(fs) = record.filesystem {
            context.insert("filesystem".to_owned(), fs.to_string());
        }
        if let Some(p) = &record.provision {
            if p.delete_data {
                context.insert("deleteDataOnPVCDelete".to_owned(), "true".to_owned());
            }
            if let Some(seconds) = p.delete_grace_seconds {
                let time = humantime::format_duration(std::time::Duration::from_secs(seconds));
                context.insert("deleteDataGracePeriod".to_owned(), time.to_string());
            }
            if let Some(name) = &p.config_map {
                context.insert("configMapName".to_owned(), name.clone());
            }
            if !p.mount_options.is_empty() {
                context.insert("mountOptions".to_owned(), p.mount_options.join(","));
            }
        }
        Volume {
            capacity_bytes: i64::try_from(record.size().bytes()).unwrap_or(i64::MAX),
            volume_id: record.id.to_string(),
            volume_context: context,
            content_source: None,
            accessible_topology: self.config.topology().into_iter().collect(),
        }
    }

    fn create(&self, req: &CreateVolumeRequest, id: &VolumeId) -> Result<CreateVolumeResponse, Refusal> {
        let capabilities = request::capabilities(&req.volume_capabilities)?;
        let parameters = request::parameters(&req.parameters)?;
        if parameters.delete_grace.is_some() && !parameters.delete_data {
            return Err(Error::usage("deleteDataGracePeriod says when data is deleted, but it is kept")
                .hint("write deleteDataOnPVCDelete: \"true\" as well, or leave deleteDataGracePeriod out")
                .into());
        }
        crate::settings::check_tuning(&req.mutable_parameters)?;
        if req.volume_content_source.is_some() {
            return Err(Error::usage("a volume cannot be made from a snapshot or another volume")
                .hint("make an empty one and copy the files")
                .into());
        }
        self.check_topology(req.accessibility_requirements.as_ref())?;
        let mut fs = parameters.filesystem;
        for capability in &capabilities {
            fs = fs.or(request::agreed_filesystem(&parameters, capability)?);
            request::agreed_filesystem(&parameters, capability)?;
        }
        let block = capabilities[0].block;
        let fs = (!block).then_some(fs.unwrap_or(FsType::Ext4));
        let least = ByteSize(fs.map_or(ByteSize::MIB, FsType::minimum));
        let size = request::new_size(req.capacity_range.as_ref(), least)?;
        let mut wanted = VolumeRecord::new(id.clone(), size, fs, jiff::Timestamp::now());
        wanted.provision = Some(Provision {
            name: (req.name != id.as_str()).then(|| req.name.clone()),
            block,
            delete_data: parameters.delete_data,
            delete_grace_seconds: parameters.delete_grace,
            config_map: parameters.config_map,
            mount_options: parameters.mount_options,
        });
        wanted.tuning = req.mutable_parameters.clone();
        wanted.cluster = self.backend.cluster()?;
        let catalog = self.backend.catalog()?;
        for _ in 0..TRIES {
            if let Some((has, _)) = record(&*catalog, id)? {
                same(&has, &wanted, req.capacity_range.as_ref())?;
                return Ok(CreateVolumeResponse { volume: Some(self.volume(&has)) });
            }
            if let DataPrefix::ZeroFs(_) | DataPrefix::Foreign(_) = catalog.data_prefix(id)? {
                return Err(Error::new(
                    Kind::Conflict,
                    "there is data under its name already, but no record of it",
                )
                .on(id)
                .hint("choose another name; or attach what is there: zerofsctl attach, with the same name")
                .into());
            }
            if let Written::Done(_) = catalog.create(&wanted)? {
                return Ok(CreateVolumeResponse { volume: Some(self.volume(&wanted)) });
            }
        }
        Err(keeps_changing(id))
    }

    /// A store of this node only cannot serve a volume that is wanted elsewhere.
    fn check_topology(&self, wanted: Option<&TopologyRequirement>) -> Result<(), Refusal> {
        let (Some(wanted), Some(ours)) = (wanted, self.config.topology()) else { return Ok(()) };
        let fits = |t: &Topology| {
            t.segments
                .get(super::TOPOLOGY_KEY)
                .is_none_or(|node| Some(node) == ours.segments.get(super::TOPOLOGY_KEY))
        };
        if wanted.requisite.is_empty() || wanted.requisite.iter().any(fits) {
            return Ok(());
        }
        Err(Refusal::with(
            Code::ResourceExhausted,
            Error::usage(format!(
                "the store is on node {} and cannot be reached from elsewhere",
                self.config.node_id
            ))
            .hint("use a store that all nodes reach: storageURL in --config"),
        ))
    }

    fn publish_to(
        &self,
        req: &ControllerPublishVolumeRequest,
        volume: &VolumeId,
    ) -> Result<ControllerPublishVolumeResponse, Refusal> {
        let capability = request::capability(req.volume_capability.as_ref())?;
        let node = request::node(&req.node_id)?;
        request::parameters(&req.volume_context)?;
        let catalog = self.backend.catalog()?;
        let (has, _) = in_service(&*catalog, volume)?;
        if !self.config.knows_node(&node) {
            return Err(Refusal::with(
                Code::NotFound,
                Error::usage(format!("there is no node {}", plain(&node)))
                    .on(volume)
                    .hint("node ids are those that NodeGetInfo tells; a standalone controller is told of others by --node"),
            ));
        }
        fits(&has, &capability).map_err(|why| Error::usage(why).on(volume).hint("use it as it was made"))?;
        self.check_limit(&*catalog, volume, &node)?;
        let wanted = Published {
            node,
            read_only: req.readonly || capability.read_only(),
            mode: capability.mode.as_str_name().to_owned(),
            since: jiff::Timestamp::now(),
        };
        change(&*catalog, volume, |record| {
            // Where an operator attached it by hand, or a late unstage is not done yet, it is in use there.
            if let Some(owner) = &record.owner
                && record.published.is_none()
                && owner.node != wanted.node
                && record.lost.as_ref() != Some(&owner.node)
            {
                return Err(Refusal::with(
                    Code::FailedPrecondition,
                    Error::refused(format!("it is attached by {owner}"))
                        .on(volume)
                        .hint(format!("detach it there: zerofsctl detach {volume}")),
                ));
            }
            Ok(record.publish(&wanted)?)
        })?;
        let context = [(CONTEXT_READ_ONLY.to_owned(), wanted.read_only.to_string())].into();
        Ok(ControllerPublishVolumeResponse { publish_context: context })
    }

    /// Counts only where it is told a limit: the number of records is the number of reads.
    fn check_limit(&self, catalog: &dyn Catalog, volume: &VolumeId, node: &str) -> Result<(), Refusal> {
        let Some(limit) = self.config.max_volumes.filter(|_| node == self.config.node_id) else {
            return Ok(());
        };
        let mut published = 0u32;
        for id in catalog.list() {
            let Ok(id) = id else { continue };
            if id == *volume {
                continue;
            }
            if let Some((record, _)) = catalog.get(&id)?
                && record.published.is_some_and(|p| p.node == node)
            {
                published += 1;
            }
        }
        if published < limit {
            return Ok(());
        }
        Err(Refusal::with(
            Code::ResourceExhausted,
            Error::new(Kind::Busy, format!("node {node} has {published} volumes, its limit is {limit}"))
                .on(volume)
                .hint("run the pod on another node; or raise --max-volumes, and nbds_max of the nbd module"),
        ))
    }

    fn unpublish_from(
        &self,
        req: &ControllerUnpublishVolumeRequest,
        volume: &VolumeId,
    ) -> Result<ControllerUnpublishVolumeResponse, Refusal> {
        // Without one it is for whichever node has it.
        if !req.node_id.is_empty() {
            request::node(&req.node_id)?;
        }
        let catalog = self.backend.catalog()?;
        let done = Ok(ControllerUnpublishVolumeResponse {});
        // Seen with our own eyes: it is still staged.
        if self.config.role.has_node()
            && (req.node_id.is_empty() || req.node_id == self.config.node_id)
            && let Some(runs) = Journal::peek(&self.config.run_dir, volume)?
            && Standing::of(&runs).connect.is_some()
        {
            return Err(Error::refused("it is still staged on this node")
                .on(volume)
                .hint(format!("unstage it first; see where it is: zerofsctl show {volume}"))
                .into());
        }
        for _ in 0..TRIES {
            let Some((has, tag)) = record(&*catalog, volume)? else { return done };
            let Some(wanted) = has.unpublish(&req.node_id) else { return done };
            if let Written::Done(_) = catalog.update(&wanted, &tag)? {
                return done;
            }
        }
        Err(keeps_changing(volume))
    }

    fn validate(
        &self,
        req: ValidateVolumeCapabilitiesRequest,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Refusal> {
        let volume = request::volume(&req.volume_id)?;
        if req.volume_capabilities.is_empty() {
            return Err(missing("volume_capabilities").into());
        }
        let catalog = self.backend.catalog()?;
        let (has, _) = in_service(&*catalog, &volume)?;
        let judged = request::capabilities(&req.volume_capabilities)
            .and_then(|all| {
                for capability in &all {
                    fits(&has, capability).map_err(Error::usage)?;
                }
                Ok(())
            })
            .and_then(|()| request::parameters(&req.parameters).map(drop))
            .and_then(|()| request::parameters(&req.volume_context).map(drop))
            .and_then(|()| crate::settings::check_tuning(&req.mutable_parameters));
        Ok(match judged {
            Ok(()) => ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: req.volume_context,
                    volume_capabilities: req.volume_capabilities,
                    parameters: req.parameters,
                    mutable_parameters: req.mutable_parameters,
                }),
                message: String::new(),
            },
            Err(why) => {
                ValidateVolumeCapabilitiesResponse { confirmed: None, message: why.message().to_owned() }
            }
        })
    }

    fn condition(&self, record: &VolumeRecord) -> VolumeCondition {
        let (abnormal, message) = match (&record.published, &record.owner) {
            _ if record.state == State::Deleting => (true, "it is being deleted".to_owned()),
            (Some(p), Some(owner)) if p.node != owner.node => {
                (true, format!("it is published to node {}, but attached by {owner}", p.node))
            }
            (_, Some(owner)) => (false, format!("attached by {owner}")),
            (Some(p), None) => (false, format!("published to node {}", p.node)),
            (None, None) => (false, "not in use".to_owned()),
        };
        VolumeCondition { abnormal, message }
    }

    fn list(&self, req: &ListVolumesRequest) -> Result<ListVolumesResponse, Refusal> {
        let wanted = usize::try_from(req.max_entries)
            .map_err(|_| Error::usage("max_entries is negative").hint("give 0 for all"))?;
        let after = match req.starting_token.as_str() {
            "" => None,
            token => Some(token.strip_prefix(TOKEN).and_then(|id| id.parse::<VolumeId>().ok()).ok_or_else(
                || {
                    let e =
                        Error::usage("starting_token is not one of ours").hint("start again without a token");
                    Refusal::with(Code::Aborted, e)
                },
            )?),
        };
        let catalog = self.backend.catalog()?;
        let mut ids = Vec::new();
        for id in catalog.list() {
            match id {
                Ok(id) if after.as_ref().is_none_or(|after| id > *after) => ids.push(id),
                Ok(_) => {}
                // A strange name hides no volume.
                Err(e) if e.kind() == Kind::Refused => tracing::warn!("{e}"),
                Err(e) => return Err(e.into()),
            }
        }
        ids.sort();
        let (mut entries, mut next_token) = (Vec::new(), String::new());
        for id in ids {
            let record = match catalog.get(&id) {
                // Gone since the listing, or no longer a volume of anybody.
                Ok(None) => continue,
                Ok(Some((record, _))) if record.given_up() => continue,
                Ok(Some((record, _))) => record,
                Err(e) if e.kind() == Kind::Refused => {
                    tracing::warn!("{e}");
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            if wanted > 0 && entries.len() == wanted {
                let last: &list_volumes_response::Entry = &entries[wanted - 1];
                let last = last.volume.as_ref().map(|v| v.volume_id.as_str()).unwrap_or_default();
                next_token = format!("{TOKEN}{last}");
                break;
            }
            entries.push(list_volumes_response::Entry {
                volume: Some(self.volume(&record)),
                status: Some(list_volumes_response::VolumeStatus {
                    published_node_ids: published_nodes(&record),
                    volume_condition: Some(self.condition(&record)),
                }),
            });
        }
        Ok(ListVolumesResponse { entries, next_token })
    }

    fn get(&self, volume: &VolumeId) -> Result<ControllerGetVolumeResponse, Refusal> {
        let catalog = self.backend.catalog()?;
        let has = match record(&*catalog, volume)? {
            Some((record, _)) if !record.given_up() => record,
            Some(_) => return Err(not_found(volume)),
            None => in_service(&*catalog, volume)?.0,
        };
        Ok(ControllerGetVolumeResponse {
            status: Some(controller_get_volume_response::VolumeStatus {
                published_node_ids: published_nodes(&has),
                volume_condition: Some(self.condition(&has)),
            }),
            volume: Some(self.volume(&has)),
        })
    }

    fn expand(
        &self,
        req: &ControllerExpandVolumeRequest,
        volume: &VolumeId,
    ) -> Result<ControllerExpandVolumeResponse, Refusal> {
        let (size, limit) = request::grown_size(req.capacity_range.as_ref())?;
        if let Some(capability) = &req.volume_capability {
            request::capability(Some(capability))?;
        }
        let catalog = self.backend.catalog()?;
        let has = change(&*catalog, volume, |record| {
            let has = record.size();
            if let Some(limit) = limit.filter(|limit| has > *limit) {
                let text =
                    format!("it has {} bytes already, more than the limit of {}", has.bytes(), limit.bytes());
                return Err(Refusal::out_of_range(text));
            }
            if size <= has {
                return Ok(None);
            }
            // One that no node ever had simply has the new size; any other grows when a node has it.
            Ok(Some(if record.epoch == 0 && record.owner.is_none() && !record.adopted {
                VolumeRecord { capacity: size, ..record.clone() }
            } else {
                VolumeRecord { wanted: Some(size), ..record.clone() }
            }))
        })?;
        let capacity_bytes = i64::try_from(has.size().bytes()).unwrap_or(i64::MAX);
        Ok(ControllerExpandVolumeResponse {
            capacity_bytes,
            node_expansion_required: has.size() > has.capacity,
        })
    }

    fn modify(
        &self,
        req: &ControllerModifyVolumeRequest,
        volume: &VolumeId,
    ) -> Result<ControllerModifyVolumeResponse, Refusal> {
        let catalog = self.backend.catalog()?;
        change(&*catalog, volume, |record| {
            // What is not named stays as it is; an empty value goes back to the installation's.
            let mut tuning = record.tuning.clone();
            tuning.extend(req.mutable_parameters.clone());
            crate::settings::check_tuning(&req.mutable_parameters)?;
            tuning.retain(|_, value| !value.is_empty());
            crate::settings::check_tuning(&tuning)?;
            Ok((tuning != record.tuning).then(|| VolumeRecord { tuning, ..record.clone() }))
        })?;
        Ok(ControllerModifyVolumeResponse {})
    }
}

/// The start of a paging token: the id of the last volume follows, so that volumes may come and go in between.
const TOKEN: &str = "after:";

fn published_nodes(record: &VolumeRecord) -> Vec<String> {
    record.published.iter().map(|p| p.node.clone()).collect()
}

fn plain(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

/// Whether a volume can be used so; the text says why not.
fn fits(record: &VolumeRecord, capability: &request::Capability) -> Result<(), String> {
    match &record.provision {
        Some(p) if p.block != capability.block => {
            let (is, asked) =
                if p.block { ("a raw device", "a filesystem") } else { ("a filesystem", "a raw device") };
            return Err(format!("it was made as {is}, not {asked}"));
        }
        _ => {}
    }
    match (record.filesystem, capability.fs) {
        (Some(has), Some(asked)) if has != asked => Err(format!("it has the filesystem {has}, not {asked}")),
        _ => Ok(()),
    }
}

/// Whether a record is what the same request made before.
fn same(has: &VolumeRecord, wanted: &VolumeRecord, range: Option<&CapacityRange>) -> Result<(), Refusal> {
    let conflict = |why: String| -> Refusal {
        Error::new(Kind::Conflict, why)
            .on(&has.id)
            .hint("choose another name, or ask for what there is")
            .into()
    };
    match has.state {
        State::Ready => {}
        State::Deleting => {
            return Err(Refusal::with(
                Code::Aborted,
                Error::new(Kind::Busy, "a volume of that name is being deleted")
                    .on(&has.id)
                    .hint("try again later"),
            ));
        }
        State::Released => {
            return Err(conflict("a volume of that name was deleted with its data kept".to_owned()));
        }
    }
    if has.given_up() {
        return Err(Error::new(Kind::Conflict, "a volume of that name was deleted, and its data goes later")
            .on(&has.id)
            .hint(format!(
                "choose another name; see when: zerofsctl gc-s3 status; keep its data: zerofsctl gc-s3 restore {}",
                has.id
            ))
            .into());
    }
    // Clusters that share a bucket share its names.
    if let (Some(theirs), Some(ours)) = (&has.cluster, &wanted.cluster)
        && theirs != ours
    {
        return Err(conflict(format!("a volume of that name belongs to another cluster, {theirs}")));
    }
    let (required, limit) = request::bounds(range)?;
    let size = has.size();
    if required > size.bytes() || limit.is_some_and(|l| size > l) {
        return Err(conflict(format!(
            "it is there with {} bytes, which is not what is asked for",
            size.bytes()
        )));
    }
    // Without a requirement, any size will do.
    match (&has.provision, &wanted.provision) {
        (Some(a), Some(b)) if a == b && has.filesystem == wanted.filesystem => {}
        _ => return Err(conflict("it is there, but made with other parameters".to_owned())),
    }
    // Those may have been modified since.
    if has.epoch == 0 && has.tuning != wanted.tuning && !wanted.tuning.is_empty() {
        return Err(conflict("it is there, but with other mutable parameters".to_owned()));
    }
    Ok(())
}

/// What tells a retry from another request: everything in it but its secrets.
macro_rules! print_of {
    ($request:expr) => {{
        let mut copy = $request.clone();
        copy.secrets.clear();
        copy.encode_to_vec()
    }};
}
pub(super) use print_of;

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Answer<CreateVolumeResponse> {
        let req = request.into_inner();
        let id: OurResult<VolumeId> = request::volume_of_name(&req.name);
        let print = print_of!(req);
        self.0.call(Rpc::CreateVolume, id, print, move |driver, job| driver.create(&req, &job.volume)).await
    }

    async fn delete_volume(&self, request: Request<DeleteVolumeRequest>) -> Answer<DeleteVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        self.0.call(Rpc::DeleteVolume, id, print_of!(req), |driver, job| driver.delete(&job.volume)).await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Answer<ControllerPublishVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &super::Job| driver.publish_to(&req, &job.volume);
        self.0.call(Rpc::ControllerPublishVolume, id, print, work).await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Answer<ControllerUnpublishVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &super::Job| driver.unpublish_from(&req, &job.volume);
        self.0.call(Rpc::ControllerUnpublishVolume, id, print, work).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<ValidateVolumeCapabilitiesResponse> {
        let req = request.into_inner();
        let volume = req.volume_id.clone();
        self.0.look(Rpc::ValidateVolumeCapabilities, &volume, move |driver| driver.validate(req)).await
    }

    async fn list_volumes(&self, request: Request<ListVolumesRequest>) -> Answer<ListVolumesResponse> {
        let req = request.into_inner();
        self.0.look(Rpc::ListVolumes, "", move |driver| driver.list(&req)).await
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Answer<ControllerGetVolumeResponse> {
        let req = request.into_inner();
        let volume = req.volume_id.clone();
        let work = move |driver: &Driver| driver.get(&request::volume(&req.volume_id)?);
        self.0.look(Rpc::ControllerGetVolume, &volume, work).await
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Answer<ControllerExpandVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &super::Job| driver.expand(&req, &job.volume);
        self.0.call(Rpc::ControllerExpandVolume, id, print, work).await
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Answer<ControllerModifyVolumeResponse> {
        let req = request.into_inner();
        let id = request::volume(&req.volume_id);
        let print = print_of!(req);
        let work = move |driver: &Driver, job: &super::Job| driver.modify(&req, &job.volume);
        self.0.call(Rpc::ControllerModifyVolume, id, print, work).await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Answer<ControllerGetCapabilitiesResponse> {
        let capabilities = [
            Offered::CreateDeleteVolume,
            Offered::PublishUnpublishVolume,
            Offered::ListVolumes,
            Offered::ListVolumesPublishedNodes,
            Offered::PublishReadonly,
            Offered::ExpandVolume,
            Offered::VolumeCondition,
            Offered::GetVolume,
            Offered::SingleNodeMultiWriter,
            Offered::ModifyVolume,
        ]
        .map(|kind| ControllerServiceCapability {
            r#type: Some(Type::Rpc(RpcCapability { r#type: kind as i32 })),
        });
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    // A bucket has no size of its own to tell.
    async fn get_capacity(&self, _: Request<GetCapacityRequest>) -> Answer<GetCapacityResponse> {
        Err(Refusal::unimplemented("GetCapacity").status())
    }

    // A checkpoint of ZeroFS covers a whole volume, but nothing restores one.
    async fn create_snapshot(&self, _: Request<CreateSnapshotRequest>) -> Answer<CreateSnapshotResponse> {
        Err(Refusal::unimplemented("CreateSnapshot").status())
    }

    async fn delete_snapshot(&self, _: Request<DeleteSnapshotRequest>) -> Answer<DeleteSnapshotResponse> {
        Err(Refusal::unimplemented("DeleteSnapshot").status())
    }

    async fn list_snapshots(&self, _: Request<ListSnapshotsRequest>) -> Answer<ListSnapshotsResponse> {
        Err(Refusal::unimplemented("ListSnapshots").status())
    }

    async fn get_snapshot(&self, _: Request<GetSnapshotRequest>) -> Answer<GetSnapshotResponse> {
        Err(Refusal::unimplemented("GetSnapshot").status())
    }
}
