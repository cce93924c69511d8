//! The Identity service.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::proto::identity_server::Identity;
use super::proto::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};
use super::proto::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};
use super::{DRIVER, Driver, Rpc};

/// See the module.
pub struct IdentityService(pub Arc<Driver>);

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: [("spec".to_owned(), "1.12".to_owned())].into(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| Type::Service(Service { r#type: kind as i32 });
        let mut all = Vec::new();
        if self.0.config.role.has_controller() {
            all.push(service(service::Type::ControllerService));
        }
        if self.0.config.node_local {
            all.push(service(service::Type::VolumeAccessibilityConstraints));
        }
        all.push(Type::VolumeExpansion(VolumeExpansion { r#type: volume_expansion::Type::Online as i32 }));
        let capabilities = all.into_iter().map(|kind| PluginCapability { r#type: Some(kind) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        match self.0.probe().await {
            Ok(()) => Ok(Response::new(ProbeResponse { ready: Some(true) })),
            Err(refusal) => {
                let status = refusal.status();
                tracing::warn!(rpc = Rpc::Probe.name(), "not ready: {}", status.message());
                // The codes that CSI has for it: what an operator must put right, and what may come back by itself.
                Err(Status::new(tonic::Code::FailedPrecondition, status.message()))
            }
        }
    }
}
