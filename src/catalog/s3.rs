//! The catalog in an S3 bucket, by conditional puts (If-None-Match, If-Match).
//!
//! The interface is synchronous; inside, a current-thread runtime drives the requests. Every call ends: 5 s to
//! connect, 30 s for a request, few retries; an endpoint that refuses or swallows connections is reported within
//! about ten seconds. What the server writes in its answers is never repeated, only its error code: the texts
//! of signature errors contain key ids and signed strings.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::{HttpClient, HttpConnector, HttpError, HttpErrorKind, ReqwestConnector};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig,
    UpdateVersion,
};
use tokio::runtime::Runtime;

use super::record::MAX_BYTES;
use super::{Catalog, DataPrefix, FOLDER, Scheme, State, StorageUrl, Tag, VolumeRecord, Written};
use crate::error::{Error, Kind, Result};
use crate::settings::S3Settings;
use crate::values::VolumeId;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// No retry starts later than this after the first try, so that two connection time-outs are the worst case.
const RETRY_LIMIT: Duration = Duration::from_secs(4);
/// A node without a role has no metadata service; asking it must not take long.
const ROLE_LIMIT: Duration = Duration::from_secs(8);

/// The catalog of an `s3://` store.
pub struct S3Catalog {
    url: StorageUrl,
    bucket: String,
    prefix: String,
    endpoint: String,
    has_keys: bool,
    pub(super) store: AmazonS3,
    runtime: Runtime,
}

impl fmt::Debug for S3Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The store's own debug output is left out: it is not ours to promise that it shows no key.
        f.debug_struct("S3Catalog")
            .field("url", &self.url)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl S3Catalog {
    /// Makes the client; sends nothing yet.
    ///
    /// Only what `settings` says counts, not `AWS_*` of the environment or `~/.aws`: ZeroFS must see the same.
    /// Without keys, the role of the node is asked (EC2 metadata).
    pub fn new(url: StorageUrl, settings: &S3Settings) -> Result<Self> {
        Self::with_retries(url, settings, 4)
    }

    /// The same, with another number of retries inside the client.
    pub(super) fn with_retries(url: StorageUrl, settings: &S3Settings, max_retries: usize) -> Result<Self> {
        let Scheme::S3 { bucket, prefix } = url.scheme() else {
            return Err(Error::usage(format!("{url} is not a bucket")).hint("write s3://BUCKET/PREFIX"));
        };
        let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
        let allow_http = settings.allow_http.unwrap_or(false);
        let endpoint = settings.endpoint.clone().unwrap_or_else(|| "AWS S3".to_owned());
        if endpoint.starts_with("http://") && !allow_http {
            return Err(plain_http());
        }
        // The process default; a second call changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&bucket)
            .with_allow_http(allow_http)
            .with_client_options(client_options(allow_http))
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(100),
                    max_backoff: Duration::from_secs(1),
                    base: 2.0,
                },
                max_retries,
                retry_timeout: RETRY_LIMIT,
            });
        if let Some(endpoint) = &settings.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &settings.region {
            builder = builder.with_region(region);
        }
        if let Some(keys) = &settings.credentials {
            builder = builder
                .with_access_key_id(keys.access_key_id.expose())
                .with_secret_access_key(keys.secret_access_key.expose());
            if let Some(token) = &keys.session_token {
                builder = builder.with_token(token.expose());
            }
        }
        // The library's message could repeat a setting; ours are all checked already, so none is expected.
        let store = builder.build().map_err(|_| {
            Error::usage("the S3 settings cannot be used")
                .hint("check awsEndpoint and awsDefaultRegion in --config")
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::environment(format!("cannot start the S3 client: {e}")))?;
        let has_keys = settings.credentials.is_some();
        Ok(S3Catalog { url, bucket, prefix, endpoint, has_keys, store, runtime })
    }

    /// One exchange whose only good outcome is success.
    pub(super) fn exchange<T>(
        &self,
        what: &str,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        match self.run(what, work)? {
            Answer::Ok(value) => Ok(value),
            Answer::NoSuchKey | Answer::NotAsExpected => Err(Error::failed(format!(
                "cannot {what} in bucket {}: the server's answer makes no sense",
                self.bucket
            ))
            .hint("check that awsEndpoint is an S3 server")),
        }
    }

    pub(super) fn full_key(&self, below: &str) -> String {
        if self.prefix.is_empty() { below.to_owned() } else { format!("{}/{below}", self.prefix) }
    }

    fn path(&self, id: &VolumeId) -> Result<Path> {
        Path::parse(self.full_key(&super::key(id))).map_err(|_| {
            Error::usage("the storage URL cannot be used as a key prefix").hint("choose a plain prefix")
        })
    }

    /// Runs one exchange with the server. Credentials of a role are fetched first, for an error of their own.
    pub(super) fn run<T>(
        &self,
        what: &str,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<Answer<T>> {
        self.runtime.block_on(async {
            if !self.has_keys {
                let role = tokio::time::timeout(ROLE_LIMIT, self.store.credentials().get_credential()).await;
                if !matches!(role, Ok(Ok(_))) {
                    return Err(no_credentials());
                }
            }
            match work.await {
                Ok(value) => Ok(Answer::Ok(value)),
                Err(e) => self.judge(what, &e),
            }
        })
    }

    /// Tells the outcomes that a caller handles from the errors that nobody can.
    fn judge<T>(&self, what: &str, e: &object_store::Error) -> Result<Answer<T>> {
        let failed =
            |kind, why: &str| Error::new(kind, format!("cannot {what} in bucket {}: {why}", self.bucket));
        if let Some(http) = cause::<HttpError>(e) {
            return Err(self.no_answer(what, http));
        }
        let Some((status, body)) = refusal(e) else {
            return Err(match e {
                object_store::Error::NotFound { .. } => return Ok(Answer::NoSuchKey),
                object_store::Error::Precondition { .. } | object_store::Error::AlreadyExists { .. } => {
                    return Ok(Answer::NotAsExpected);
                }
                _ if chain(e).any(|e| e.to_string().starts_with("Received redirect without LOCATION")) => {
                    failed(Kind::Usage, "the bucket is in another region")
                        .hint("set awsDefaultRegion in --config to the bucket's region")
                }
                _ => failed(Kind::Failed, "the server's answer makes no sense")
                    .hint("check that awsEndpoint is an S3 server"),
            });
        };
        self.refused(what, status, &body)
    }

    /// The same, for an answer that is at hand: its status, and its text.
    pub(super) fn refused<T>(&self, what: &str, status: u16, body: &str) -> Result<Answer<T>> {
        let failed =
            |kind, why: &str| Error::new(kind, format!("cannot {what} in bucket {}: {why}", self.bucket));
        let code = element(body, "Code").unwrap_or_default();
        let says = if code.is_empty() {
            format!("the server answers {status}")
        } else {
            format!("the server answers {status} {code}")
        };
        Err(match (status, code) {
            (404, "NoSuchBucket") => failed(Kind::NotFound, "there is no such bucket")
                .hint("create the bucket, or correct the storage URL"),
            // Some servers say no more than 404; then it is the key.
            (404, "NoSuchKey" | "") => return Ok(Answer::NoSuchKey),
            (412 | 409 | 304, _) => return Ok(Answer::NotAsExpected),
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidSecurity" | "InvalidToken" | "InvalidClientTokenId") => {
                failed(Kind::Usage, &format!("the credentials are wrong ({code})"))
                    .hint("check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in --secret or the environment")
            }
            (_, "ExpiredToken" | "TokenRefreshRequired") => {
                failed(Kind::Usage, &format!("the credentials have expired ({code})")).hint("get new ones")
            }
            (_, "RequestTimeTooSkewed") => failed(Kind::Environment, "this machine's clock is wrong")
                .hint("set the clock: timedatectl set-ntp true"),
            (301 | 307 | 308, _) | (_, "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException") => {
                let region = element(body, "Region").filter(|r| r.len() < 40).unwrap_or("the bucket's region");
                failed(Kind::Usage, &format!("the bucket is in another region, or behind another endpoint ({says})"))
                    .hint(format!("set awsDefaultRegion in --config to {region}, or correct awsEndpoint"))
            }
            (401 | 403, _) => failed(Kind::Environment, &format!("access denied ({says})")).hint(
                "allow these credentials s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject and s3:DeleteObject in it; \
                 without s3:ListBucket a missing record looks like a forbidden one",
            ),
            (501, _) | (_, "NotImplemented") => failed(Kind::Refused, "the server has no conditional writes")
                .hint("use an S3 server that knows If-Match and If-None-Match, such as AWS S3, MinIO or R2"),
            (500.. | 429, _) | (_, "SlowDown") => failed(Kind::Unreachable, &says)
                .hint("the server is in trouble or overloaded; run the same command again later"),
            _ => failed(Kind::Failed, &says).hint("check the storage URL, awsEndpoint and the server's own log"),
        })
    }

    pub(super) fn no_answer(&self, what: &str, http: &HttpError) -> Error {
        // The chain below holds addresses and reasons of the operating system, no headers and no bodies.
        let reason = chain(http).last().map(ToString::to_string).unwrap_or_default();
        let reason: String = reason.chars().take(200).filter(|c| !c.is_control()).collect();
        let why = match http.kind() {
            HttpErrorKind::Timeout => "no answer in time".to_owned(),
            _ if http.to_string().contains("URL scheme is not allowed") => return plain_http(),
            _ => reason,
        };
        Error::new(
            Kind::Unreachable,
            format!("cannot {what} in bucket {}: {} does not answer: {why}", self.bucket, self.endpoint),
        )
        .hint("check that the endpoint (awsEndpoint in --config) is right and up, and that this machine can reach it")
    }

    /// Reads a record's text; none when there is none.
    fn text(&self, id: &VolumeId) -> Result<Option<(Vec<u8>, Tag)>> {
        let path = self.path(id)?;
        let too_large =
            || Error::refused(format!("its catalog record has more than {MAX_BYTES} bytes")).on(id);
        let answer = self.run("read the catalog record", async {
            let got = self.store.get(&path).await?;
            let tag = got.meta.e_tag.clone();
            // Checked before the body is read, so that a huge object costs nothing.
            if got.meta.size > MAX_BYTES {
                return Ok((None, tag));
            }
            Ok((Some(got.bytes().await?), tag))
        });
        match answer.map_err(|e| e.on(id))? {
            Answer::Ok((None, _)) => {
                Err(too_large().hint(format!("look at <storage URL>/{} and restore it", super::key(id))))
            }
            Answer::Ok((Some(bytes), tag)) => {
                let tag = tag.ok_or_else(|| no_tags().on(id))?;
                Ok(Some((bytes.to_vec(), Tag(tag))))
            }
            Answer::NoSuchKey => Ok(None),
            Answer::NotAsExpected => Err(Error::failed(
                "cannot read the catalog record: the server answers a plain read with a conflict",
            )
            .on(id)),
        }
    }

    fn write(&self, record: &VolumeRecord, mode: PutMode) -> Result<Written> {
        let id = &record.id;
        let path = self.path(id)?;
        let nonce = super::nonce()?;
        let text = record.encode(&nonce)?;
        let mut tries = 0;
        loop {
            let options = PutOptions { mode: mode.clone(), ..Default::default() };
            let put = self.store.put_opts(&path, text.clone().into(), options);
            let answer = self.run("write the catalog record", put).map_err(|e| e.on(id))?;
            if let Answer::Ok(put) = answer {
                return Ok(Written::Done(Tag(put.e_tag.ok_or_else(|| no_tags().on(id))?)));
            }
            // The client repeats a request whose answer was lost; then our own first try may be what stands in
            // the way. The nonce tells. (A damaged record is surely not ours.)
            let found = match self.text(id) {
                Ok(found) => found,
                Err(e) if e.kind() == Kind::Refused => return Ok(Written::LostRace),
                Err(e) => return Err(e),
            };
            if let Some((bytes, tag)) = &found
                && let Ok((_, theirs)) = VolumeRecord::decode(id, bytes)
                && theirs == nonce
            {
                return Ok(Written::Done(tag.clone()));
            }
            // AWS answers 409 to a create while another request on the key is in flight, even if that one fails
            // later. Then nothing is there, and the create is worth another try.
            tries += 1;
            if found.is_some() || !matches!(mode, PutMode::Create) || tries >= 5 {
                return Ok(Written::LostRace);
            }
            std::thread::sleep(Duration::from_millis(50 << tries));
        }
    }

    /// One page of names under `prefix`, which ends with a slash; folders end with one too.
    fn page(&self, prefix: &str, token: Option<String>) -> Result<(Vec<String>, Option<String>)> {
        let options = PaginatedListOptions {
            delimiter: Some("/".into()),
            max_keys: Some(1000),
            page_token: token,
            ..Default::default()
        };
        // A listing of nothing is empty, not 404.
        let page = self.exchange("list", self.store.list_paginated(Some(prefix), options))?;
        let result = page.result;
        let files = result.objects.into_iter().map(|o| o.location.to_string());
        let folders = result.common_prefixes.into_iter().map(|p| format!("{p}/"));
        let names = files
            .chain(folders)
            .filter_map(|key| key.strip_prefix(prefix).map(str::to_owned))
            // A console may have made an empty object for the folder itself.
            .filter(|name| !name.is_empty())
            .collect();
        Ok((names, page.page_token))
    }
}

impl S3Catalog {
    /// Whether there is any object whose key begins with `prefix`.
    fn holds_any(&self, prefix: &str) -> Result<bool> {
        let options = PaginatedListOptions { max_keys: Some(1), ..Default::default() };
        let page = self.exchange("list", self.store.list_paginated(Some(prefix), options))?;
        // A page may be empty and not the last.
        Ok(!page.result.objects.is_empty() || page.page_token.is_some())
    }
}

fn client_options(allow_http: bool) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(allow_http)
        .with_connect_timeout(CONNECT_LIMIT)
        .with_timeout(REQUEST_LIMIT)
}

/// A client for requests that object_store has no name for.
pub(super) fn http_client(settings: &S3Settings) -> Result<HttpClient> {
    ReqwestConnector::default().connect(&client_options(settings.allow_http.unwrap_or(false))).map_err(|_| {
        Error::environment("cannot start the S3 client")
            .hint("check the proxy settings and the system's certificates")
    })
}

/// An answer that a caller has to tell apart.
pub(super) enum Answer<T> {
    Ok(T),
    NoSuchKey,
    NotAsExpected,
}

impl Catalog for S3Catalog {
    fn url(&self) -> &StorageUrl {
        &self.url
    }

    fn get(&self, id: &VolumeId) -> Result<Option<(VolumeRecord, Tag)>> {
        let Some((bytes, tag)) = self.text(id)? else { return Ok(None) };
        Ok(Some((VolumeRecord::decode(id, &bytes)?.0, tag)))
    }

    fn create(&self, record: &VolumeRecord) -> Result<Written> {
        self.write(record, PutMode::Create)
    }

    fn update(&self, record: &VolumeRecord, tag: &Tag) -> Result<Written> {
        let version = UpdateVersion { e_tag: Some(tag.0.clone()), version: None };
        self.write(record, PutMode::Update(version))
    }

    fn delete(&self, id: &VolumeId) -> Result<bool> {
        let Some((record, _)) = self.get(id)? else { return Ok(false) };
        if record.state != State::Deleting {
            return Err(super::not_deleting(id));
        }
        let path = self.path(id)?;
        let answer = self.run("remove the catalog record", self.store.delete(&path)).map_err(|e| e.on(id))?;
        Ok(matches!(answer, Answer::Ok(())))
    }

    fn list(&self) -> Box<dyn Iterator<Item = Result<VolumeId>> + '_> {
        Box::new(Listing {
            catalog: self,
            prefix: self.full_key(&format!("{FOLDER}/volumes/")),
            names: VecDeque::new(),
            next: Next::First,
        })
    }

    fn data_prefix(&self, id: &VolumeId) -> Result<DataPrefix> {
        // With the slash at its end: "vol1" must not see "vol10".
        let prefix = self.full_key(&format!("{id}/"));
        let (mut names, mut token) = (Vec::new(), None);
        // ZeroFS has about ten names on this level. More pages hold somebody else's files; a few are enough to
        // find ZeroFS marks among left-over probe files.
        for _ in 0..20 {
            let (page, next) = self.page(&prefix, token).map_err(|e| e.on(id))?;
            names.extend(page);
            token = next;
            if token.is_none() {
                // In a bucket with versions MinIO lists the folders of what was deleted, too.
                let folders_only = names.iter().all(|name| name.ends_with('/'));
                if !names.is_empty() && folders_only && !self.holds_any(&prefix).map_err(|e| e.on(id))? {
                    return Ok(DataPrefix::Empty);
                }
                return Ok(super::judge(names.iter().map(String::as_str)));
            }
        }
        match super::judge(names.iter().map(String::as_str)) {
            found @ DataPrefix::ZeroFs(_) => Ok(found),
            _ => Ok(DataPrefix::Foreign("more than 20,000 objects".to_owned())),
        }
    }
}

/// The listing of records, a page at a time.
struct Listing<'a> {
    catalog: &'a S3Catalog,
    prefix: String,
    names: VecDeque<String>,
    next: Next,
}

enum Next {
    First,
    Page(String),
    End,
}

impl Iterator for Listing<'_> {
    type Item = Result<VolumeId>;
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(name) = self.names.pop_front() {
                return Some(super::id_of(&name));
            }
            let token = match std::mem::replace(&mut self.next, Next::End) {
                Next::First => None,
                Next::Page(token) => Some(token),
                Next::End => return None,
            };
            match self.catalog.page(&self.prefix, token) {
                Ok((names, token)) => {
                    self.names = names.into();
                    self.next = token.map_or(Next::End, Next::Page);
                }
                Err(e) => return Some(Err(e)),
            }
        }
    }
}

fn plain_http() -> Error {
    Error::usage("the endpoint is http://, which sends the data's traffic in the clear, and awsAllowHTTP is not \"true\"")
        .hint("use https://, or set awsAllowHTTP: \"true\" in --config")
}

fn no_credentials() -> Error {
    Error::usage("there are no AWS credentials, and this machine has no role to get some from").hint(
        "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: awsCredentialsSecretName with --secret FILE, or the environment",
    )
}

fn no_tags() -> Error {
    Error::refused("the server gives no ETags, so records cannot be replaced safely")
        .hint("use an S3 server that knows ETag and If-Match, such as AWS S3, MinIO or R2")
}

/// An error and its causes.
fn chain<'a>(
    e: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(e), |e| e.source())
}

/// The nearest error of type `T` in the chain of causes.
fn cause<'a, T: std::error::Error + 'static>(e: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    chain(e).find_map(|e| e.downcast_ref())
}

/// The HTTP status and body of a refusal. object_store keeps the type to itself, so this reads its text; a test
/// against a real server for each answer that matters sees when the text changes.
fn refusal(e: &object_store::Error) -> Option<(u16, String)> {
    chain(e).find_map(|e| {
        let text = e.to_string();
        let rest = text.strip_prefix("Server returned non-2xx status code: ");
        if let Some(rest) = rest {
            return Some((rest.get(..3)?.parse().ok()?, rest.to_owned()));
        }
        // S3 can send an error in an answer that began as a success.
        Some((200, text.strip_prefix("Server returned error response: ")?.to_owned()))
    })
}

/// The text of a simple element of S3's error documents, if it is a plain word.
fn element<'a>(body: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = body.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let word =
        !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    word.then_some(text)
}

// Shared by threads, and the runtime is driven by whichever calls: that must keep compiling.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<S3Catalog>>();
};
