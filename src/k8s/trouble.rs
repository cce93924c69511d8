//! What a request that failed means. Words of the client library are not repeated: they may hold a header.

use std::error::Error as _;

use crate::error::{Error, Kind};

/// What was asked for, for messages: `list persistentvolumes`.
pub(super) struct Asked {
    pub(super) verb: &'static str,
    pub(super) what: &'static str,
    /// The file below `deploy/kubernetes` that allows it.
    pub(super) manifest: &'static str,
}

/// What went wrong, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Who we are is not known, or no longer.
    Unauthorized,
    /// We may not.
    Forbidden,
    /// The moment of the list is forgotten.
    Gone,
    /// Too much is asked of the server.
    Busy,
    /// Another refusal.
    Refused,
    /// There was no answer, or not all of it.
    NoAnswer,
    /// The answer is none.
    Nonsense,
    /// Credentials could not be got.
    Credentials,
}

/// The kind of trouble.
pub(super) fn trouble(e: &kube::Error) -> Trouble {
    match e {
        kube::Error::Api(status) => match (status.code, status.reason.as_str()) {
            (410, _) | (_, "Expired" | "Gone") => Trouble::Gone,
            (401, _) => Trouble::Unauthorized,
            (403, _) => Trouble::Forbidden,
            (429 | 503 | 504, _) => Trouble::Busy,
            _ => Trouble::Refused,
        },
        kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => Trouble::Nonsense,
        kube::Error::Auth(_) => Trouble::Credentials,
        // The layer that adds credentials is a service, too.
        kube::Error::Service(inner) if inner.downcast_ref::<kube::client::AuthError>().is_some() => {
            Trouble::Credentials
        }
        _ => Trouble::NoAnswer,
    }
}

/// The error to hand up. All of them are of the kind "unreachable": what was to be learnt is not known.
pub(super) fn judge(asked: &Asked, e: &kube::Error) -> Error {
    let Asked { verb, what, manifest } = asked;
    let (why, hint) = match trouble(e) {
        Trouble::Unauthorized => (
            "the server does not know who we are, or no longer does".to_owned(),
            "the token or certificate is wrong or has expired; get a new one, then: kubectl auth whoami"
                .to_owned(),
        ),
        Trouble::Forbidden => (
            "that is forbidden".to_owned(),
            format!(
                "allow it: kubectl apply -f deploy/kubernetes/{manifest}; check: kubectl auth can-i {verb} {what} --all-namespaces"
            ),
        ),
        Trouble::Gone => {
            ("the server forgot the moment of the list".to_owned(), "run the same command again".to_owned())
        }
        Trouble::Busy => (
            format!("the server is busy ({})", code(e)),
            "try again later; look at it: kubectl get --raw /readyz?verbose".to_owned(),
        ),
        Trouble::Refused => (
            format!("the server refuses ({})", code(e)),
            format!("try it by hand: kubectl {verb} {what} --all-namespaces"),
        ),
        Trouble::NoAnswer => {
            let hint =
                "check that the API server can be reached from here: kubectl get --raw /readyz".to_owned();
            (format!("no whole answer: {}", innermost(e)), hint)
        }
        Trouble::Nonsense => (
            "the answer is not of a Kubernetes API server, or not all of it".to_owned(),
            "see what stands between this machine and the API server: kubectl config view".to_owned(),
        ),
        Trouble::Credentials => (
            "the credentials could not be got".to_owned(),
            "log in again, then: kubectl auth whoami".to_owned(),
        ),
    };
    Error::new(Kind::Unreachable, format!("cannot {verb} {what}: {why}")).hint(hint)
}

fn code(e: &kube::Error) -> String {
    match e {
        kube::Error::Api(status) if status.reason.is_empty() => status.code.to_string(),
        kube::Error::Api(status) => {
            let reason: String = status.reason.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
            format!("{} {reason}", status.code)
        }
        _ => "no code".into(),
    }
}

/// The cause at the bottom, such as `Connection refused (os error 111)`. Only what the system, TLS or HTTP says; that holds
/// no header and no body.
fn innermost(e: &kube::Error) -> String {
    let mut cause = e.source();
    let mut words = "the connection was cut".to_owned();
    while let Some(e) = cause {
        if e.is::<std::io::Error>() || e.is::<rustls::Error>() || e.is::<hyper::Error>() {
            words = e.to_string();
        }
        cause = e.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(code: u16, reason: &str) -> kube::Error {
        let status: kube::core::Status = serde_json::from_value(
            serde_json::json!({"code": code, "reason": reason, "message": "Bearer hunter22"}),
        )
        .unwrap();
        kube::Error::Api(Box::new(status))
    }

    #[test]
    fn every_refusal_is_unreachable_has_a_hint_and_repeats_nothing_of_the_server() {
        for (code, reason, expected) in [
            (401, "Unauthorized", Trouble::Unauthorized),
            (403, "Forbidden", Trouble::Forbidden),
            (410, "Expired", Trouble::Gone),
            (410, "", Trouble::Gone),
            (429, "TooManyRequests", Trouble::Busy),
            (503, "", Trouble::Busy),
            (404, "NotFound", Trouble::Refused),
            (500, "InternalError", Trouble::Refused),
        ] {
            let e = api(code, reason);
            assert_eq!(trouble(&e), expected, "{code}");
            let e = judge(&Asked { verb: "list", what: "pods", manifest: "gc-rbac.yaml" }, &e);
            assert_eq!(e.kind(), Kind::Unreachable, "{code}");
            assert!(e.hint_text().is_some() && e.message().starts_with("cannot list pods: "), "{e}");
            assert!(!format!("{e:?}").contains("hunter22"), "{e:?}");
        }
    }
}
