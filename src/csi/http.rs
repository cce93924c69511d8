//! `/metrics`, `/healthz` and `/readyz`, for Prometheus and the kubelet.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use super::Driver;
use crate::error::{Error, Result};

/// Reads `:8080`, `127.0.0.1:8080`, `[::1]:8080`; none for an empty text or `0`, which turn it off.
pub fn address(text: &str) -> Result<Option<SocketAddr>> {
    if text.is_empty() || text == "0" {
        return Ok(None);
    }
    let full = if text.starts_with(':') { format!("[::]{text}") } else { text.to_owned() };
    full.parse().map(Some).map_err(|_| {
        Error::usage(format!("the metrics address {text:?} is not HOST:PORT")).hint(
            "write :8080 for every address of this machine, 127.0.0.1:8080 for itself only, or 0 for none",
        )
    })
}

/// Listens.
pub async fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = match TcpListener::bind(address).await {
        // A machine without IPv6 has no [::].
        Err(e) if address.ip().is_unspecified() && e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], address.port()))).await
        }
        other => other,
    };
    listener.map_err(|e| {
        Error::environment(format!("cannot listen on {address}: {e}"))
            .hint("give another --metrics-bind-address; see who has it: ss -ltnp")
    })
}

/// Answers until it is dropped.
pub async fn serve(driver: Arc<Driver>, listener: TcpListener) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!("cannot accept a connection for metrics: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let driver = driver.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(driver.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .keep_alive(false)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(Duration::from_secs(60), connection).await;
        });
    }
}

async fn answer(
    driver: Arc<Driver>,
    request: Request<Incoming>,
) -> std::result::Result<Response<Full<Bytes>>, Infallible> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => (
            StatusCode::OK,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            driver.metrics.text(driver.flights.count()),
        ),
        (&Method::GET | &Method::HEAD, "/healthz") => plain(healthy().await),
        (&Method::GET | &Method::HEAD, "/readyz") => {
            plain(driver.probe().await.map_err(|e| e.status().message().to_owned()))
        }
        (_, "/metrics" | "/healthz" | "/readyz") => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".to_owned())
        }
        _ => (StatusCode::NOT_FOUND, TEXT, "there are /metrics, /healthz and /readyz\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    Ok(response)
}

const TEXT: &str = "text/plain; charset=utf-8";

fn plain(result: std::result::Result<(), String>) -> (StatusCode, &'static str, String) {
    match result {
        Ok(()) => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
    }
}

/// Whether threads for operations are to be had: a driver that answers but can do nothing is to be started again.
async fn healthy() -> std::result::Result<(), String> {
    match tokio::time::timeout(Duration::from_secs(10), tokio::task::spawn_blocking(|| ())).await {
        Ok(Ok(())) => Ok(()),
        _ => Err("no thread is free for operations".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(address(":8080").unwrap().unwrap().port(), 8080);
        assert!(address(":8080").unwrap().unwrap().ip().is_unspecified());
        assert_eq!(address("127.0.0.1:0").unwrap().unwrap().to_string(), "127.0.0.1:0");
        assert_eq!(address("0").unwrap(), None);
        assert_eq!(address("").unwrap(), None);
        for bad in ["8080", "localhost:8080", ":", ":99999", "1.2.3.4"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
