//! The calls, as a closed list: for logs, metrics and messages.

/// One of CSI's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the call of that name")]
pub enum Rpc {
    GetPluginInfo,
    GetPluginCapabilities,
    Probe,
    CreateVolume,
    DeleteVolume,
    ControllerPublishVolume,
    ControllerUnpublishVolume,
    ValidateVolumeCapabilities,
    ListVolumes,
    ControllerGetVolume,
    ControllerExpandVolume,
    ControllerModifyVolume,
    NodeStageVolume,
    NodeUnstageVolume,
    NodePublishVolume,
    NodeUnpublishVolume,
    NodeGetVolumeStats,
    NodeExpandVolume,
    NodeGetInfo,
    /// Not a call: the driver settles by itself what it found.
    Recovery,
}

impl Rpc {
    /// Those that metrics tell of.
    pub const MEASURED: [Rpc; 16] = [
        Rpc::NodeStageVolume,
        Rpc::NodeUnstageVolume,
        Rpc::NodePublishVolume,
        Rpc::NodeUnpublishVolume,
        Rpc::NodeGetVolumeStats,
        Rpc::NodeExpandVolume,
        Rpc::Recovery,
        Rpc::CreateVolume,
        Rpc::DeleteVolume,
        Rpc::ControllerPublishVolume,
        Rpc::ControllerUnpublishVolume,
        Rpc::ValidateVolumeCapabilities,
        Rpc::ListVolumes,
        Rpc::ControllerGetVolume,
        Rpc::ControllerExpandVolume,
        Rpc::ControllerModifyVolume,
    ];

    /// As CSI spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Rpc::GetPluginInfo => "GetPluginInfo",
            Rpc::GetPluginCapabilities => "GetPluginCapabilities",
            Rpc::Probe => "Probe",
            Rpc::CreateVolume => "CreateVolume",
            Rpc::DeleteVolume => "DeleteVolume",
            Rpc::ControllerPublishVolume => "ControllerPublishVolume",
            Rpc::ControllerUnpublishVolume => "ControllerUnpublishVolume",
            Rpc::ValidateVolumeCapabilities => "ValidateVolumeCapabilities",
            Rpc::ListVolumes => "ListVolumes",
            Rpc::ControllerGetVolume => "ControllerGetVolume",
            Rpc::ControllerExpandVolume => "ControllerExpandVolume",
            Rpc::ControllerModifyVolume => "ControllerModifyVolume",
            Rpc::NodeStageVolume => "NodeStageVolume",
            Rpc::NodeUnstageVolume => "NodeUnstageVolume",
            Rpc::NodePublishVolume => "NodePublishVolume",
            Rpc::NodeUnpublishVolume => "NodeUnpublishVolume",
            Rpc::NodeGetVolumeStats => "NodeGetVolumeStats",
            Rpc::NodeExpandVolume => "NodeExpandVolume",
            Rpc::NodeGetInfo => "NodeGetInfo",
            Rpc::Recovery => "recovery",
        }
    }

    /// Whether it starts or stops things, and so is one of the few that run at once.
    pub const fn is_heavy(self) -> bool {
        matches!(
            self,
            Rpc::NodeStageVolume
                | Rpc::NodeUnstageVolume
                | Rpc::NodeExpandVolume
                | Rpc::DeleteVolume
                | Rpc::Recovery
        )
    }
}
