//! Which Kubernetes cluster new volumes belong to. Their records say it, and the collector deletes what no cluster that it
//! asked refers to: a volume that belongs to no cluster is never one of these.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::k8s::Cluster;

/// How long the API server may take for its one answer. A provisioner waits for 15 s and more.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a driver is told of its cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterId {
    /// There is none.
    None,
    /// By its UID.
    Named(String),
    /// It asks the cluster around its pod.
    Asked,
}

impl ClusterId {
    /// In a pod the cluster around it, elsewhere none. `variable` reads the environment.
    pub fn auto(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> ClusterId {
        // Every pod has it, with or without a service account.
        match variable("KUBERNETES_SERVICE_HOST") {
            Some(host) if !host.is_empty() => ClusterId::Asked,
            _ => ClusterId::None,
        }
    }
}

impl FromStr for ClusterId {
    type Err = Error;
    /// `none`, or a UID.
    fn from_str(s: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        match s {
            "none" => Ok(ClusterId::None),
            s if !s.is_empty() && s.len() <= 128 && s.chars().all(plain) => {
                Ok(ClusterId::Named(s.to_owned()))
            }
            _ => Err(Error::usage(format!(
                "\"{}\" is not the UID of a cluster",
                s.chars().take(40).flat_map(char::escape_debug).collect::<String>()
            ))
            .hint(HOW_TO_NAME)),
        }
    }
}

const HOW_TO_NAME: &str =
    "give auto, none, or what this prints: kubectl get namespace kube-system -o jsonpath={.metadata.uid}";

/// The cluster, once it is known.
pub struct OurCluster {
    id: ClusterId,
    ask: Box<dyn Fn() -> Result<String> + Send + Sync>,
    asked: Mutex<Asked>,
}

/// What the last question came to.
#[derive(Default)]
enum Asked {
    #[default]
    Never,
    Failed(Instant, Error),
    Answered(String),
}

impl fmt::Debug for OurCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OurCluster").field("id", &self.id).finish_non_exhaustive()
    }
}

impl OurCluster {
    /// Asks nobody yet.
    pub fn new(id: ClusterId) -> OurCluster {
        // The client is made for the question and dropped after it: a driver that is idle needs none.
        OurCluster::asking(id, || {
            Cluster::around_this_pod()?.allowed_by("csi-rbac.yaml").patient(PATIENCE).identity()
        })
    }

    fn asking(id: ClusterId, ask: impl Fn() -> Result<String> + Send + Sync + 'static) -> OurCluster {
        OurCluster { id, ask: Box::new(ask), asked: Mutex::default() }
    }

    /// Its UID; none without a cluster. It is asked for until it was answered once.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] when the API server cannot be asked.
    pub fn uid(&self) -> Result<Option<String>> {
        match &self.id {
            ClusterId::None => return Ok(None),
            ClusterId::Named(uid) => return Ok(Some(uid.clone())),
            ClusterId::Asked => {}
        }
        self.uid_for(Instant::now())
    }

    /// The answer for somebody who `came` then. Who comes while it is asked for waits, so that one question serves all.
    fn uid_for(&self, came: Instant) -> Result<Option<String>> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        match &*asked {
            Asked::Answered(uid) => return Ok(Some(uid.clone())),
            Asked::Failed(at, e) if *at >= came => return Err(e.clone()),
            _ => {}
        }
        match (self.ask)() {
            Ok(uid) => {
                tracing::info!(cluster = uid, "new volumes belong to this cluster");
                *asked = Asked::Answered(uid.clone());
                Ok(Some(uid))
            }
            Err(e) => {
                let e = unknown(&e);
                *asked = Asked::Failed(Instant::now(), e.clone());
                Err(e)
            }
        }
    }
}

fn unknown(e: &Error) -> Error {
    let hint = e.hint_text().map(|hint| format!("{hint}; or ")).unwrap_or_default();
    Error::new(
        Kind::Unreachable,
        format!(
            "cannot learn which cluster this is, and a volume without one is never collected: {}",
            e.message()
        ),
    )
    .hint(format!("{hint}start the driver with --cluster-id: {HOW_TO_NAME}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn words() {
        assert_eq!("none".parse::<ClusterId>().unwrap(), ClusterId::None);
        let uid = "0e1c3f0e-7d3a-4a53-9b64-1f2d3c4b5a69";
        assert_eq!(uid.parse::<ClusterId>().unwrap(), ClusterId::Named(uid.into()));
        for bad in ["", "a b", "a\nb", "a/b", &"x".repeat(129)] {
            let e = bad.parse::<ClusterId>().unwrap_err();
            assert!(e.kind() == Kind::Usage && e.hint_text().unwrap().contains("kubectl"), "{e}");
        }
        assert_eq!(ClusterId::auto(|_| None), ClusterId::None);
        assert_eq!(ClusterId::auto(|_| Some("".into())), ClusterId::None);
        assert_eq!(ClusterId::auto(|_| Some("10.0.0.1".into())), ClusterId::Asked);
    }

    #[test]
    fn nobody_is_asked_where_it_is_known() {
        let known = |id| OurCluster::asking(id, || panic!("nobody was to be asked")).uid().unwrap();
        assert_eq!(known(ClusterId::None), None);
        assert_eq!(known(ClusterId::Named("c-1".into())).as_deref(), Some("c-1"));
    }

    #[test]
    fn it_is_asked_until_it_answers_and_never_again() {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let cluster =
            OurCluster::asking(ClusterId::Asked, move || match counted.fetch_add(1, Ordering::Relaxed) {
                0 => Err(Error::new(Kind::Environment, "no answer").hint("look at it")),
                _ => Ok("c-1".into()),
            });
        let e = cluster.uid().unwrap_err();
        assert_eq!(e.kind(), Kind::Unreachable);
        assert!(e.message().ends_with(": no answer"), "{e}");
        let hint = e.hint_text().unwrap();
        assert!(hint.starts_with("look at it; or ") && hint.contains("--cluster-id"), "{hint}");
        for _ in 0..3 {
            assert_eq!(cluster.uid().unwrap().as_deref(), Some("c-1"));
        }
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn those_who_waited_share_a_failure() {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let cluster = OurCluster::asking(ClusterId::Asked, move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Err(Error::new(Kind::Unreachable, "no answer"))
        });
        let before = Instant::now();
        cluster.uid().unwrap_err();
        for _ in 0..5 {
            cluster.uid_for(before).unwrap_err();
        }
        assert_eq!(count.load(Ordering::Relaxed), 1, "they came before it failed");
        std::thread::sleep(Duration::from_millis(1));
        cluster.uid().unwrap_err();
        assert_eq!(count.load(Ordering::Relaxed), 2, "who comes later asks anew");
    }
}
