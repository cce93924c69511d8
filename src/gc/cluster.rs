//! A Kubernetes cluster as a witness: PersistentVolumes, VolumeAttachments and servers' pods.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::ResourceExt;

use super::evidence::{Reference, ReferenceKind, Testimony, Witness};
use crate::error::{Error, Kind, Result};
use crate::k8s::{Cluster, DRIVER};
use crate::values::VolumeId;

/// The names of the pods that serve volumes begin so.
const POD: &str = "zerofs-volume-";

/// See the module.
///
/// What refers to one volume takes as many requests as what refers to all: a PersistentVolume can have any name, and
/// servers do not select by volume handle. So questions that wait for an answer share the next look.
#[derive(Debug)]
pub struct ClusterWitness {
    cluster: Cluster,
    looks: Mutex<Looks>,
    looked: Condvar,
}

type References = BTreeMap<VolumeId, Vec<Reference>>;

/// One look at a cluster.
#[derive(Debug, Clone)]
struct Look {
    identity: String,
    references: References,
}

#[derive(Debug, Default)]
struct Looks {
    /// How many were begun.
    begun: u64,
    /// Somebody is at it.
    busy: bool,
    /// The last that ended, with its number.
    last: Option<(u64, Result<Arc<Look>>)>,
    /// Who the cluster was when it was first asked.
    identity: Option<String>,
}

impl ClusterWitness {
    /// The witness of this cluster.
    pub fn new(cluster: Cluster) -> ClusterWitness {
        ClusterWitness { cluster, looks: Mutex::default(), looked: Condvar::new() }
    }

    /// A look that began after this call did.
    fn look(&self) -> Result<Arc<Look>> {
        let mut looks = self.lock();
        let wanted = looks.begun + 1;
        loop {
            if let Some((number, look)) = &looks.last
                && *number >= wanted
            {
                return look.clone();
            }
            if !looks.busy {
                break;
            }
            looks = self.looked.wait(looks).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        looks.busy = true;
        looks.begun += 1;
        let mut turn = Turn { witness: self, number: looks.begun, look: None };
        drop(looks);
        let look = self.ask().map(Arc::new);
        turn.look = Some(look.clone());
        look
    }

    fn lock(&self) -> MutexGuard<'_, Looks> {
        self.looks.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn ask(&self) -> Result<Look> {
        let identity = self.cluster.identity()?;
        // An address can lead to another cluster from one moment to the next.
        let known = self.lock().identity.get_or_insert_with(|| identity.clone()).clone();
        if known != identity {
            return Err(Error::new(Kind::Unreachable, "it was another cluster when it was first asked").hint(
                "check where the address of the API server leads: kubectl config view; then run the same command again",
            ));
        }
        // Whatever lasts longest comes last: an attachment needs its PersistentVolume for as long as it lasts.
        let pods = self.cluster.list_metadata::<Pod, _>("pods", |pod| {
            let volume = server_of(&pod.name_any(), pod.labels())?;
            Some((volume, format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any())))
        })?;
        let attachments =
            self.cluster.list::<VolumeAttachment, _>("volumeattachments", |a| Attachment::of(&a))?;
        let volumes = self.cluster.list::<PersistentVolume, _>("persistentvolumes", |pv| Volume::of(&pv))?;
        let references = gather(&identity, &pods, &attachments, &volumes);
        // What was asked in between was asked of whom we think only if it is still the same.
        if self.cluster.identity()? != identity {
            return Err(Error::new(Kind::Unreachable, "it became another cluster while it was asked")
                .hint("check where the address of the API server leads: kubectl config view"));
        }
        Ok(Look { identity, references })
    }
}

/// Ends a look, however it ends: those who wait must not wait for ever.
struct Turn<'a> {
    witness: &'a ClusterWitness,
    number: u64,
    look: Option<Result<Arc<Look>>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let look =
            self.look.take().unwrap_or_else(|| Err(Error::failed("the look at the cluster was broken off")));
        let mut looks = self.witness.lock();
        looks.busy = false;
        looks.last = Some((self.number, look));
        self.witness.looked.notify_all();
    }
}

impl Witness for ClusterWitness {
    fn name(&self) -> String {
        self.cluster.name().to_owned()
    }

    fn testify(&self) -> Result<Testimony> {
        let look = self.look()?;
        Ok(Testimony { cluster: Some(look.identity.clone()), references: look.references.clone() })
    }

    fn refers(&self, volume: &VolumeId) -> Result<Vec<Reference>> {
        Ok(self.look()?.references.get(volume).cloned().unwrap_or_default())
    }
}

/// What matters of a PersistentVolume of ours.
#[derive(Debug, Clone)]
struct Volume {
    name: String,
    handle: String,
    kind: ReferenceKind,
    phase: String,
}

impl Volume {
    fn of(pv: &PersistentVolume) -> Option<Volume> {
        let spec = pv.spec.as_ref()?;
        let csi = spec.csi.as_ref().filter(|csi| csi.driver == DRIVER)?;
        let phase = pv.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
        let retain = spec.persistent_volume_reclaim_policy.as_deref() == Some("Retain");
        // Anything else that is released is about to be deleted by CSI, which has rules of its own.
        let kind = match phase.as_str() {
            "Released" if retain => ReferenceKind::RetainedVolume,
            _ => ReferenceKind::PersistentVolume,
        };
        Some(Volume { name: pv.name_any(), handle: csi.volume_handle.clone(), kind, phase })
    }
}

/// What matters of a VolumeAttachment of ours.
#[derive(Debug, Clone)]
struct Attachment {
    name: String,
    node: String,
    /// The PersistentVolume that it names.
    volume: Option<String>,
    /// The handle that it has itself.
    handle: Option<String>,
}

impl Attachment {
    fn of(a: &VolumeAttachment) -> Option<Attachment> {
        if a.spec.attacher != DRIVER {
            return None;
        }
        let source = &a.spec.source;
        let inline = source.inline_volume_spec.as_ref().and_then(|spec| spec.csi.as_ref());
        Some(Attachment {
            name: a.name_any(),
            node: a.spec.node_name.clone(),
            volume: source.persistent_volume_name.clone(),
            handle: inline.map(|csi| csi.volume_handle.clone()),
        })
    }
}

/// The volume that a pod serves, if it is a pod that does.
fn server_of(name: &str, labels: &BTreeMap<String, String>) -> Option<String> {
    let label = |key: &str| labels.get(key).map(String::as_str);
    let labelled = label("app") == Some("zerofs") && label("type") == Some("volume");
    match name.strip_prefix(POD) {
        // The name has what a label could not hold.
        Some(volume) => Some(volume.to_owned()),
        None if labelled => label("volume").map(str::to_owned),
        None => None,
    }
}

/// Everything by volume. A name that is no volume id names nothing that the collector would ever touch.
fn gather(
    identity: &str,
    pods: &[(String, String)],
    attachments: &[Attachment],
    volumes: &[Volume],
) -> References {
    let mut references = References::new();
    let mut refer = |volume: &str, kind, name: String| {
        if let Ok(id) = volume.parse::<VolumeId>() {
            references
                .entry(id)
                .or_default()
                .push(Reference { kind, name: format!("{name} in cluster {identity}") });
        }
    };
    let mut handles: BTreeMap<&str, &str> = BTreeMap::new();
    for pv in volumes {
        handles.insert(&pv.name, &pv.handle);
        let phase = if pv.phase.is_empty() { String::new() } else { format!(" ({})", pv.phase) };
        refer(&pv.handle, pv.kind, format!("{}{phase}", pv.name));
    }
    for a in attachments {
        let name = format!("{} on node {}", a.name, a.node);
        // A PersistentVolume that has gone since was of the volume of its name, by the driver's custom.
        let by_name = a.volume.as_deref().map(|pv| handles.get(pv).copied().unwrap_or(pv));
        for handle in a.handle.as_deref().into_iter().chain(by_name) {
            refer(handle, ReferenceKind::VolumeAttachment, name.clone());
        }
    }
    for (volume, name) in pods {
        refer(volume, ReferenceKind::Pod, name.clone());
    }
    references
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pv(json: serde_json::Value) -> Option<Volume> {
        Volume::of(&serde_json::from_value(json).unwrap())
    }

    fn of_driver(driver: &str, phase: &str, policy: &str) -> Option<Volume> {
        pv(json!({
            "metadata": {"name": "pv-1"},
            "spec": {"csi": {"driver": driver, "volumeHandle": "vol1"}, "persistentVolumeReclaimPolicy": policy},
            "status": {"phase": phase},
        }))
    }

    #[test]
    fn only_a_released_volume_with_retain_is_kept_and_not_in_use() {
        use ReferenceKind::{PersistentVolume, RetainedVolume};
        for (phase, policy, kind) in [
            ("Released", "Retain", RetainedVolume),
            ("Released", "Delete", PersistentVolume),
            ("Bound", "Retain", PersistentVolume),
            ("Available", "Delete", PersistentVolume),
            ("Failed", "Retain", PersistentVolume),
            ("", "", PersistentVolume),
            ("SomethingNew", "Retain", PersistentVolume),
        ] {
            assert_eq!(of_driver(DRIVER, phase, policy).unwrap().kind, kind, "{phase} {policy}");
        }
        assert!(of_driver("ebs.csi.aws.com", "Bound", "Delete").is_none());
        assert!(
            pv(json!({"metadata": {"name": "nfs"}, "spec": {"nfs": {"server": "s", "path": "/"}}})).is_none()
        );
    }

    #[test]
    fn attachments_and_pods_are_of_the_volume_that_they_serve() {
        let attachment = |source: serde_json::Value, attacher: &str| {
            let a = json!({"metadata": {"name": "a"}, "spec": {"attacher": attacher, "nodeName": "n", "source": source}});
            Attachment::of(&serde_json::from_value(a).unwrap())
        };
        let attachments = [
            attachment(json!({"persistentVolumeName": "pv-1"}), DRIVER),
            attachment(json!({"persistentVolumeName": "vol2"}), DRIVER),
            attachment(
                json!({"inlineVolumeSpec": {"csi": {"driver": DRIVER, "volumeHandle": "vol3"}}}),
                DRIVER,
            ),
            attachment(json!({"persistentVolumeName": "vol4"}), "ebs.csi.aws.com"),
        ];
        let attachments: Vec<Attachment> = attachments.into_iter().flatten().collect();
        let labels = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let ours = labels(&[("app", "zerofs"), ("type", "volume"), ("volume", "vol6")]);
        let pods: Vec<(String, String)> = [
            ("zerofs-volume-vol5", &labels(&[])),
            ("another-name", &ours),
            ("app", &labels(&[("app", "zerofs"), ("volume", "vol7")])),
        ]
        .into_iter()
        .filter_map(|(name, labels)| Some((server_of(name, labels)?, name.to_owned())))
        .collect();
        let volumes = [of_driver(DRIVER, "Bound", "Delete").unwrap()];
        let references = gather("c-1", &pods, &attachments, &volumes);
        let kinds = |v: &str| {
            let all = references.get(&v.parse::<VolumeId>().unwrap());
            all.map(|all| all.iter().map(|r| r.kind).collect::<Vec<_>>()).unwrap_or_default()
        };
        // A PersistentVolume of another name than its volume, and its attachment.
        assert_eq!(kinds("vol1"), [ReferenceKind::PersistentVolume, ReferenceKind::VolumeAttachment]);
        assert!(kinds("pv-1").is_empty());
        for (volume, kind) in [
            ("vol2", ReferenceKind::VolumeAttachment),
            ("vol3", ReferenceKind::VolumeAttachment),
            ("vol5", ReferenceKind::Pod),
            ("vol6", ReferenceKind::Pod),
        ] {
            assert_eq!(kinds(volume), [kind], "{volume}");
        }
        assert!(kinds("vol4").is_empty() && kinds("vol7").is_empty());
    }
}
