//! A client for one cluster, by a context of the kubeconfig or from within.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config};

use super::list;
use super::trouble::{Asked, judge};
use crate::error::{Error, Kind, Result};

/// One request, its answer included. A server under load takes seconds for a page of 500 objects, not a minute.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// The name of the cluster that a pod is in.
const POD: &str = "the cluster around this pod";
/// Objects in one page of a list.
const PAGE: u32 = 500;

/// A cluster that can be asked. Nothing is sent until it is.
pub struct Cluster {
    name: String,
    client: Client,
    runtime: tokio::runtime::Runtime,
    limit: Duration,
    pub(super) page: u32,
    manifest: &'static str,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Cluster {
    /// The cluster of this context; without one that of the kubeconfig's current context, or the cluster around this pod
    /// where there is no kubeconfig. The kubeconfig is that of `KUBECONFIG`, or `~/.kube/config`.
    ///
    /// # Errors
    /// [`Kind::Usage`] when there is no such context, no cluster at all, or the kubeconfig cannot be used.
    pub fn connect(context: Option<&str>) -> Result<Cluster> {
        let runtime = runtime()?;
        let (name, config) = match (context, Kubeconfig::from_env()) {
            // A pod has a service account, and no kubeconfig unless somebody put one there.
            (None, Ok(None)) if !home_has_one() => match Config::incluster() {
                Ok(config) => (POD.to_owned(), config),
                Err(_) => return Err(nobody()),
            },
            (_, kubeconfig) => {
                let kubeconfig = match kubeconfig {
                    Ok(Some(kubeconfig)) => Ok(kubeconfig),
                    Ok(None) => Kubeconfig::read(),
                    Err(e) => Err(e),
                }
                .map_err(|e| unusable(&e))?;
                let name = context.map(str::to_owned).or_else(|| kubeconfig.current_context.clone());
                let options = KubeConfigOptions { context: context.map(str::to_owned), ..Default::default() };
                let known: Vec<String> = kubeconfig.contexts.iter().map(|c| c.name.clone()).collect();
                let load = Config::from_custom_kubeconfig(kubeconfig, &options);
                // It may run a program that fetches credentials.
                let config = runtime
                    .block_on(async { tokio::time::timeout(REQUEST_LIMIT, load).await })
                    .map_err(|_| {
                        Error::new(
                            Kind::Unreachable,
                            "the credentials of the Kubernetes context take too long",
                        )
                    })?
                    .map_err(|e| match e {
                        KubeconfigError::LoadContext(_) => no_context(context, &known),
                        e => unusable(&e),
                    })?;
                (format!("Kubernetes context {}", shown(&name.unwrap_or_default())), config)
            }
        };
        Cluster::new(name, config, runtime)
    }

    /// The cluster around this pod, by its service account.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] when the pod has no service account that can be used.
    pub fn around_this_pod() -> Result<Cluster> {
        let unusable = || {
            Error::new(Kind::Unreachable, "the token of this pod's service account cannot be used").hint(
                "give the pod a service account: serviceAccountName, without automountServiceAccountToken: false",
            )
        };
        let config = Config::incluster().map_err(|_| unusable())?;
        Cluster::new(POD.to_owned(), config, runtime()?).map_err(|_| unusable())
    }

    /// The cluster of a client's configuration, under a name for messages.
    pub fn from_config(name: &str, config: Config) -> Result<Cluster> {
        Cluster::new(name.to_owned(), config, runtime()?)
    }

    fn new(name: String, mut config: Config, runtime: tokio::runtime::Runtime) -> Result<Cluster> {
        // The same everywhere in the program; somebody may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        config.connect_timeout = Some(Duration::from_secs(10));
        let client = {
            // Its worker is a task of the runtime.
            let _inside = runtime.enter();
            Client::try_from(config).map_err(|_| {
                Error::usage(format!("the certificates or credentials of {name} cannot be used"))
                    .hint("check it: kubectl get --raw /readyz")
            })?
        };
        Ok(Cluster { name, client, runtime, limit: REQUEST_LIMIT, page: PAGE, manifest: "gc-rbac.yaml" })
    }

    /// With pages of so many objects.
    pub fn paged(mut self, page: u32) -> Cluster {
        self.page = page.max(1);
        self
    }

    /// With so much time for each request.
    pub fn patient(mut self, limit: Duration) -> Cluster {
        self.limit = limit;
        self
    }

    /// With rights that come from this manifest of `deploy/kubernetes`.
    pub fn allowed_by(mut self, manifest: &'static str) -> Cluster {
        self.manifest = manifest;
        self
    }

    /// What is asked for, for messages.
    pub(super) fn asked(&self, verb: &'static str, what: &'static str) -> Asked {
        Asked { verb, what, manifest: self.manifest }
    }

    /// For messages: `Kubernetes context prod`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who it is: the UID of the namespace `kube-system`, which lives exactly as long as the cluster.
    ///
    /// # Errors
    /// [`Kind::Unreachable`], whatever is in the way.
    pub fn identity(&self) -> Result<String> {
        let asked = self.asked("get", "namespaces");
        let api: Api<Namespace> = Api::all(self.client.clone());
        let namespace =
            self.run(&asked, async { api.get("kube-system").await.map_err(|e| judge(&asked, &e)) })?;
        namespace.metadata.uid.filter(|uid| !uid.is_empty()).ok_or_else(|| {
            Error::new(
                Kind::Unreachable,
                "the namespace kube-system has no UID, so this is no cluster that we know",
            )
            .hint("check the server's address: kubectl config view")
        })
    }

    /// All objects of a kind in all namespaces, or what `keep` wants of them.
    ///
    /// # Errors
    /// [`Kind::Unreachable`], whatever is in the way; never a part of the list.
    pub fn list<K, T>(&self, what: &'static str, keep: impl Fn(K) -> Option<T>) -> Result<Vec<T>>
    where
        K: kube::Resource<DynamicType = ()> + serde::de::DeserializeOwned + Clone + fmt::Debug,
    {
        let api: Api<K> = Api::all(self.client.clone());
        let kind = format!("{}List", K::kind(&()));
        list::all(self, what, &kind, keep, async |page| api.list(&page).await)
    }

    /// The same, of the objects' metadata alone: their specifications are not read.
    ///
    /// # Errors
    /// As for [`Cluster::list`].
    pub fn list_metadata<K, T>(
        &self,
        what: &'static str,
        keep: impl Fn(kube::api::PartialObjectMeta<K>) -> Option<T>,
    ) -> Result<Vec<T>>
    where
        K: kube::Resource<DynamicType = ()> + serde::de::DeserializeOwned + Clone + fmt::Debug,
    {
        let api: Api<K> = Api::all(self.client.clone());
        list::all(self, what, "PartialObjectMetadataList", keep, async |page| api.list_metadata(&page).await)
    }

    /// Runs one exchange with the server, within the time limit.
    pub(super) fn run<T>(&self, asked: &Asked, work: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = self.limit;
        self.runtime.block_on(async { tokio::time::timeout(limit, work).await }).unwrap_or_else(|_| {
            let (verb, what) = (asked.verb, asked.what);
            Err(Error::new(Kind::Unreachable, format!("cannot {verb} {what}: no answer within {limit:?}"))
                .hint("look at the API server: kubectl get --raw /readyz"))
        })
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::environment(format!("cannot start the Kubernetes client: {e}")))
}

fn home_has_one() -> bool {
    std::env::home_dir().is_some_and(|home| Path::new(&home).join(".kube/config").exists())
}

fn shown(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}

fn nobody() -> Error {
    Error::usage("there is no Kubernetes cluster to ask: no kubeconfig, and this is no pod").hint(
        "set KUBECONFIG, or say --no-kubernetes: then no volume of a cluster is an orphan, whatever it looks like",
    )
}

fn no_context(context: Option<&str>, known: &[String]) -> Error {
    let known: Vec<String> = known.iter().map(|k| shown(k)).collect();
    let e = match context {
        Some(context) => Error::usage(format!("the kubeconfig has no context {:?}", shown(context))),
        None => Error::usage("the kubeconfig's current context is not in it"),
    };
    match known.is_empty() {
        true => e.hint("see what there is: kubectl config get-contexts"),
        false => e.hint(format!("choose with --context: {}", known.join(", "))),
    }
}

/// The library's own words could repeat a token from the file.
fn unusable(e: &KubeconfigError) -> Error {
    let why = match e {
        KubeconfigError::CurrentContextNotSet => {
            return Error::usage("the kubeconfig has no current context")
                .hint("choose one with --context; see what there is: kubectl config get-contexts");
        }
        KubeconfigError::ReadConfig(io, path) => format!("{}: {io}", path.display()),
        KubeconfigError::FindPath => "there is none".into(),
        KubeconfigError::LoadClusterOfContext(_) => "the cluster of the context is not in it".into(),
        KubeconfigError::MissingClusterUrl | KubeconfigError::ParseClusterUrl(_) => {
            "the server's address is missing or wrong".into()
        }
        KubeconfigError::LoadCertificateAuthority(_)
        | KubeconfigError::LoadClientCertificate(_)
        | KubeconfigError::LoadClientKey(_)
        | KubeconfigError::ParseCertificates(_) => {
            "a certificate or key of the context cannot be read".into()
        }
        _ => "it is not valid".to_owned(),
    };
    Error::usage(format!("the kubeconfig cannot be used: {why}"))
        .hint("check it: kubectl config view; or set KUBECONFIG")
}
