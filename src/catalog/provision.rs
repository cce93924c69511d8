//! What CSI adds to a record: what a volume was provisioned with, the node that it is published to, the size that it
//! is to grow to, and settings of its own. The moves are pure, as those of the record are.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{MarkedBy, State, VolumeRecord};
use crate::error::{Error, Kind, Result};
use crate::values::ByteSize;

/// What CreateVolume asked for, so that the same request is known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provision {
    /// The name that was asked for, where the id is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Handed out as a raw device.
    #[serde(default)]
    pub block: bool,
    /// DeleteVolume deletes the data, too.
    #[serde(default)]
    pub delete_data: bool,
    /// Only this many seconds after DeleteVolume; none for what the installation's settings say then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_grace_seconds: Option<u64>,
    /// The ConfigMap with the settings, when one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<String>,
    /// For mount(8), checked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_options: Vec<String>,
}

/// The node that a volume is published to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Its CSI node id.
    pub node: String,
    /// Whether it may only be read there.
    #[serde(default)]
    pub read_only: bool,
    /// The access mode, as CSI spells it.
    pub mode: String,
    /// Since when.
    pub since: Timestamp,
}

impl VolumeRecord {
    /// Whether DeleteVolume was answered with success: whoever asked counts on it that the volume is gone, whatever is
    /// still kept of it.
    pub fn given_up(&self) -> bool {
        self.state == State::Released || self.mark().is_some_and(|m| m.by == MarkedBy::DeleteVolume)
    }

    /// The size that the volume has, or is to grow to the next time that a node has it.
    pub fn size(&self) -> ByteSize {
        self.wanted.map_or(self.capacity, |wanted| wanted.max(self.capacity))
    }

    /// Publishes it; none when it is so already.
    ///
    /// [`Kind::Refused`] when another node has it, [`Kind::Conflict`] when it is published to this one in another way.
    pub fn publish(&self, wanted: &Published) -> Result<Option<VolumeRecord>> {
        match &self.published {
            None => {
                let lost = self.lost.clone().filter(|node| *node != wanted.node);
                Ok(Some(VolumeRecord { published: Some(wanted.clone()), lost, ..self.clone() }))
            }
            Some(has) if has.node != wanted.node => {
                Err(Error::refused(format!("it is published to node {}", has.node)).on(&self.id).hint(format!(
                    "a volume is on one node at a time: delete the pods that use it on {}, or its VolumeAttachment",
                    has.node
                )))
            }
            Some(has) if (has.read_only, &has.mode) != (wanted.read_only, &wanted.mode) => {
                let read = |p: &Published| if p.read_only { "read-only" } else { "read-write" };
                Err(Error::new(
                    Kind::Conflict,
                    format!(
                        "it is published to node {} {} as {}, not {} as {}",
                        has.node,
                        read(has),
                        has.mode,
                        read(wanted),
                        wanted.mode
                    ),
                )
                .on(&self.id)
                .hint("unpublish it first"))
            }
            Some(_) => Ok(None),
        }
    }

    /// Takes it back from `node`, or from whichever has it when that is empty; none when it is not published there.
    /// What is published to another node stays so: a late call must not take a volume from its next node.
    pub fn unpublish(&self, node: &str) -> Option<VolumeRecord> {
        let has = self.published.as_ref()?;
        if !node.is_empty() && has.node != node {
            return None;
        }
        // An orchestrator does this only after the unstage, or when the node is gone for good.
        let lost = self.owner.as_ref().map(|o| o.node.clone()).filter(|owner| *owner == has.node);
        Some(VolumeRecord { published: None, lost, ..self.clone() })
    }

    /// Whether `node` may take it from its owner: the orchestrator has taken it away there, and given it to `node`.
    pub fn may_be_taken_over_by(&self, node: &str) -> bool {
        let owner = self.owner.as_ref().map(|o| &o.node);
        owner.is_some()
            && owner == self.lost.as_ref()
            && self.published.as_ref().is_some_and(|p| p.node == node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> VolumeRecord {
        VolumeRecord::new("vol1".parse().unwrap(), ByteSize(ByteSize::GIB), None, Timestamp::UNIX_EPOCH)
    }

    fn to(node: &str) -> Published {
        Published {
            node: node.into(),
            read_only: false,
            mode: "SINGLE_NODE_WRITER".into(),
            since: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn one_node_at_a_time() {
        let a = record().publish(&to("a")).unwrap().unwrap();
        assert_eq!(a.publish(&to("a")).unwrap(), None);
        let e = a.publish(&to("b")).unwrap_err();
        assert_eq!(e.kind(), Kind::Refused);
        assert!(e.message().contains("node a"), "{e}");
        let e = a.publish(&Published { read_only: true, ..to("a") }).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict);
    }

    #[test]
    fn a_late_unpublish_of_another_node_changes_nothing() {
        let b = record().publish(&to("b")).unwrap().unwrap();
        assert_eq!(b.unpublish("a"), None);
        assert_eq!(b.unpublish("b").unwrap().published, None);
        assert_eq!(b.unpublish("").unwrap().published, None);
        assert_eq!(record().unpublish("a"), None);
    }

    #[test]
    fn a_volume_of_a_lost_node_may_be_taken_over_once_it_is_published_elsewhere() {
        let mut r = record().publish(&to("a")).unwrap().unwrap();
        r.owner = Some(crate::catalog::Owner {
            node: "a".into(),
            machine_id: String::new(),
            boot_id: String::new(),
            instance: String::new(),
            state_dir: "/s".into(),
            run_dir: "/r".into(),
            since: Timestamp::UNIX_EPOCH,
        });
        assert!(!r.may_be_taken_over_by("b"), "a still has it");
        let r = r.unpublish("a").unwrap();
        assert!(!r.may_be_taken_over_by("b"), "b was not given it");
        let b = r.publish(&to("b")).unwrap().unwrap();
        assert!(b.may_be_taken_over_by("b") && !b.may_be_taken_over_by("c"));
        // Published back to where it still is: nothing is lost.
        let a = r.publish(&to("a")).unwrap().unwrap();
        assert!(!a.may_be_taken_over_by("a"));
    }

    #[test]
    fn a_record_of_before_grace_periods_has_none() {
        let old = r#"{"block":true,"delete_data":true,"config_map":"c","mount_options":["noatime"]}"#;
        let old: Provision = serde_json::from_str(old).unwrap();
        assert_eq!(old.delete_grace_seconds, None);
        assert!(!serde_json::to_string(&old).unwrap().contains("grace"));
        let new = Provision { delete_grace_seconds: Some(60), ..old };
        let stored = serde_json::to_string(&new).unwrap();
        assert_eq!(serde_json::from_str::<Provision>(&stored).unwrap(), new);
    }

    #[test]
    fn only_the_word_of_its_owner_gives_a_volume_up() {
        let mark = |by| crate::catalog::Tombstone {
            at: Timestamp::UNIX_EPOCH,
            by,
            why: "because".into(),
            epoch: 0,
            manifest: None,
            grace_seconds: None,
        };
        assert!(!record().given_up());
        assert!(VolumeRecord { state: State::Released, ..record() }.given_up());
        let marked = |by| record().marked(mark(by)).unwrap();
        assert!(marked(MarkedBy::DeleteVolume).given_up());
        assert!(!marked(MarkedBy::Scan).given_up() && !marked(MarkedBy::Name).given_up());
        // An attach since then has made it a volume again.
        assert!(!VolumeRecord { epoch: 1, ..marked(MarkedBy::DeleteVolume) }.given_up());
    }

    #[test]
    fn the_size_is_the_larger_of_what_it_has_and_what_is_wanted() {
        let mut r = record();
        assert_eq!(r.size(), ByteSize(ByteSize::GIB));
        r.wanted = Some(ByteSize(2 * ByteSize::GIB));
        assert_eq!(r.size(), ByteSize(2 * ByteSize::GIB));
        r.capacity = ByteSize(3 * ByteSize::GIB);
        assert_eq!(r.size(), ByteSize(3 * ByteSize::GIB));
    }
}
