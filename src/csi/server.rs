//! The driver's life: it listens, settles what was left, serves, and stops without breaking anything.

use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::controller::ControllerService;
use super::identity::IdentityService;
use super::node::NodeService;
use super::proto::controller_server::ControllerServer;
use super::proto::identity_server::IdentityServer;
use super::proto::node_server::NodeServer;
use super::{Driver, heal, http};
use crate::error::{Doing, Error, Result};

/// What runs may take until they are complete once a stop was asked for. Kubernetes waits 30 s before it kills.
const GRACE: Duration = Duration::from_secs(20);

/// What an interrupted one may take to undo itself.
const UNDO: Duration = Duration::from_secs(100);

/// Requests are small.
const LARGEST_REQUEST: usize = 1 << 20;

/// A service that takes no huge requests.
macro_rules! limited {
    ($server:ident, $service:expr) => {
        $server::new($service).max_decoding_message_size(LARGEST_REQUEST)
    };
}

/// Runs the driver on a runtime of its own until `stop` is ready; `started` is told when it serves, and where its metrics
/// are.
pub fn run<S: Future<Output = ()>>(
    driver: &Arc<Driver>,
    listener: UnixListener,
    metrics: Option<SocketAddr>,
    stop: impl FnOnce() -> S,
    started: impl FnOnce(Option<SocketAddr>),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("operation")
        // Debug builds need more room for the same calls.
        .thread_stack_size(if cfg!(debug_assertions) { 2 << 20 } else { 512 << 10 })
        .thread_keep_alive(Duration::from_secs(2))
        .max_blocking_threads(128)
        .build()
        .map_err(|e| Error::environment(format!("cannot start the server: {e}")))?;
    let result = runtime.block_on(serve(driver, listener, metrics, stop, started));
    // A thread that hangs with a dead filesystem must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve<S: Future<Output = ()>>(
    driver: &Arc<Driver>,
    listener: UnixListener,
    metrics: Option<SocketAddr>,
    stop: impl FnOnce() -> S,
    started: impl FnOnce(Option<SocketAddr>),
) -> Result<()> {
    let stop = stop();
    let listener = tokio::net::UnixListener::from_std(listener).doing("listen on", "the endpoint")?;
    let mut at = None;
    if let Some(address) = metrics {
        let listener = http::listen(address).await?;
        at = listener.local_addr().ok();
        tokio::spawn(http::serve(driver.clone(), listener));
    }
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<IdentityServer<IdentityService>>().await;
    let role = driver.config.role;
    let mut router = Server::builder()
        .add_service(health_service)
        .add_service(limited!(IdentityServer, IdentityService(driver.clone())));
    if role.has_controller() {
        router = router.add_service(limited!(ControllerServer, ControllerService(driver.clone())));
    }
    if role.has_node() {
        router = router.add_service(limited!(NodeServer, NodeService(driver.clone())));
    }
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let serving =
        tokio::spawn(router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            let _ = ended.await;
        }));
    started(at);
    if role.has_node() {
        let driver = driver.clone();
        tokio::spawn(async move {
            heal::settle_all(&driver).await;
            heal::watch(driver).await;
        });
    }
    stop.await;
    tracing::info!("stopping: what runs is finished first; mounted volumes stay as they are");
    driver.stop();
    health.set_not_serving::<IdentityServer<IdentityService>>().await;
    if !driver.flights.idle_within(GRACE).await {
        tracing::warn!("what still runs is ended after its step");
        driver.interrupt();
        if !driver.flights.idle_within(UNDO).await {
            tracing::warn!("{} operations are left to the next start", driver.flights.count());
        }
    }
    let _ = end.send(());
    // Answers are on their way; clients that keep their connection are not waited for.
    let _ = tokio::time::timeout(Duration::from_secs(2), serving).await;
    Ok(())
}
