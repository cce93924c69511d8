//! The objects of an `s3://` store.
//!
//! Bulk deletes go through object_store. Listings do not: it would take an answer that says "truncated" without a
//! place to go on for the last page, and it keeps the server's Date to itself.
//!
//! A server that answers 503, 429 or `SlowDown` is asked again, with fewer requests in flight, for up to
//! [`PATIENCE`]; everything else has a few tries.

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use jiff::{SignedDuration, Timestamp};
use object_store::ObjectStore;
use object_store::aws::AwsAuthorizer;
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody};
use object_store::multipart::MultipartStore;
use object_store::path::Path;

use super::objects::only_of;
use super::pace::Pace;
use super::s3::{Answer, S3Catalog, http_client};
use super::{Below, MAX_BATCH, Object, Objects, Page, StorageUrl, Upload};
use crate::error::{Error, Kind, Result};
use crate::settings::S3Settings;
use crate::values::VolumeId;

/// How many requests may be in flight.
const IN_FLIGHT: usize = 100;
/// How long a server may ask for less haste before that is an error.
const PATIENCE: Duration = Duration::from_secs(300);
/// Tries of a request that is not answered, and the longest pause between two.
const TRIES: u32 = 4;
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The time that the last answer told is carried forward for this long.
const RECENT: Duration = Duration::from_secs(20);

/// See the module.
#[derive(Debug)]
pub struct S3Objects {
    client: S3Catalog,
    http: HttpClient,
    /// Of the bucket, without a slash at the end.
    endpoint: String,
    region: String,
    pace: Pace,
    clock: Mutex<Option<(Timestamp, Instant)>>,
    /// Whether its answers say that it is a MinIO.
    minio: AtomicBool,
}

impl S3Objects {
    /// Makes the client; sends nothing yet.
    pub fn new(url: StorageUrl, settings: &S3Settings) -> Result<Self> {
        let super::Scheme::S3 { bucket, .. } = url.scheme() else {
            return Err(Error::usage(format!("{url} is not a bucket")).hint("write s3://BUCKET/PREFIX"));
        };
        let region = settings.region.clone().unwrap_or_else(|| "us-east-1".to_owned());
        let server =
            settings.endpoint.clone().unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let endpoint = format!("{}/{bucket}", server.trim_end_matches('/'));
        // Retries are ours, so that the pace hears of every refusal.
        let client = S3Catalog::with_retries(url, settings, 0)?;
        let http = http_client(settings)?;
        Ok(S3Objects {
            client,
            http,
            endpoint,
            region,
            pace: Pace::new(IN_FLIGHT),
            clock: Mutex::new(None),
            minio: AtomicBool::new(false),
        })
    }

    /// Repeats `once` while the server is in trouble.
    fn patiently<T>(&self, once: impl Fn() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            let result = {
                let _permit = self.pace.enter();
                once()
            };
            tries += 1;
            match result {
                Ok(value) => {
                    self.pace.served();
                    return Ok(value);
                }
                Err(e) if e.kind() == Kind::Unreachable => {
                    let hasty = asks_for_less_haste(&e);
                    if hasty {
                        self.pace.slow_down();
                    }
                    if if hasty { begun.elapsed() > PATIENCE } else { tries >= TRIES } {
                        return Err(e);
                    }
                    std::thread::sleep(
                        (Duration::from_millis(100) * 2u32.pow(tries.min(8))).min(LONGEST_PAUSE),
                    );
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// One GET of the bucket itself: the text of the answer.
    fn ask(&self, what: &str, query: &[(&str, &str)]) -> Result<String> {
        self.patiently(|| {
            let request = self.request(query);
            let sent = self.client.run(what, async {
                let credential = self.client.store.credentials().get_credential().await?;
                let mut request = request.clone();
                AwsAuthorizer::new(&credential, "s3", &self.region).try_authorize(&mut request, None)?;
                let answer = match self.http.execute(request).await {
                    Ok(answer) => answer,
                    Err(e) => return Ok(Err(e)),
                };
                let (head, body) = answer.into_parts();
                Ok(match body.bytes().await {
                    Ok(bytes) => Ok((head, bytes)),
                    Err(e) => Err(e),
                })
            })?;
            let Answer::Ok(sent) = sent else { return Err(no_sense(what)) };
            let (head, bytes) = sent.map_err(|e| self.client.no_answer(what, &e))?;
            if let Some(date) = head.headers.get("date").and_then(|v| v.to_str().ok()) {
                self.tell_time(date);
            }
            if head.headers.get("server").is_some_and(|name| name == "MinIO") {
                self.minio.store(true, Ordering::Relaxed);
            }
            // Nobody else has these bytes, so they are not copied.
            let text = String::from_utf8(bytes.into()).map_err(|_| no_sense(what))?;
            if head.status.is_success() && !text.contains("<Error>") {
                return Ok(text);
            }
            match self.client.refused::<()>(what, head.status.as_u16(), &text) {
                Err(e) => Err(e),
                // A bucket is there or it is not; a listing has no key that could be missing.
                Ok(_) => Err(no_sense(what)),
            }
        })
    }

    fn request(&self, query: &[(&str, &str)]) -> HttpRequest {
        let mut uri = self.endpoint.clone();
        for (n, (name, value)) in query.iter().enumerate() {
            uri.push(if n == 0 { '?' } else { '&' });
            let _ = write!(uri, "{name}=");
            for byte in value.bytes() {
                if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
                    uri.push(char::from(byte));
                } else {
                    let _ = write!(uri, "%{byte:02X}");
                }
            }
        }
        let mut request = hyper::Request::new(HttpRequestBody::empty());
        // The endpoint was checked with the settings, and the rest is plain.
        *request.uri_mut() = uri.parse().unwrap_or_default();
        if let Some(host) = request.uri().authority().map(ToString::to_string)
            && let Ok(value) = host.parse()
        {
            request.headers_mut().insert("host", value);
        }
        request
    }

    fn tell_time(&self, date: &str) {
        if let Ok(date) = jiff::fmt::rfc2822::parse(date) {
            let mut clock = self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *clock = Some((date.timestamp(), Instant::now()));
        }
    }

    /// Keys below the storage URL from here on.
    fn relative(&self, what: &str, key: &str) -> Result<String> {
        let prefix = self.client.full_key("");
        key.strip_prefix(&prefix).map(str::to_owned).ok_or_else(|| no_sense(what))
    }

    fn path(&self, key: &str) -> Result<Path> {
        let full = self.client.full_key(key);
        match Path::parse(&full) {
            Ok(path) if path.as_ref() == full => Ok(path),
            _ => Err(Error::refused("its key is none that ZeroFS makes, so it is left alone")
                .hint("look at it, and remove it by hand")),
        }
    }
}

/// Whether it is the server that wants fewer requests, or one that is about to restart: both pass.
fn asks_for_less_haste(e: &Error) -> bool {
    ["SlowDown", "answers 503", "answers 429"].iter().any(|word| e.message().contains(word))
}

fn no_sense(what: &str) -> Error {
    Error::failed(format!("cannot {what}: the server's answer makes no sense"))
        .hint("check that awsEndpoint is an S3 server")
}

impl S3Objects {
    /// One page of what is below; `after` begins behind that key, and only the first page needs it.
    fn list(&self, below: &str, folders: bool, next: Option<&str>, after: Option<&str>) -> Result<Page> {
        let what = "list";
        let prefix = self.client.full_key(below);
        let mut query = Vec::new();
        // In the order of their names, as the signature wants them.
        query.extend(next.map(|token| ("continuation-token", token)));
        query.extend(folders.then_some(("delimiter", "/")));
        query.extend([
            ("encoding-type", "url"),
            ("list-type", "2"),
            ("max-keys", "1000"),
            ("prefix", &prefix),
        ]);
        query.extend(after.map(|key| ("start-after", key)));
        let text = self.ask(what, &query)?;
        let mut page = Page::default();
        for object in elements(&text, "Contents") {
            let key = element(object, "Key").and_then(|k| decoded(&k)).ok_or_else(|| no_sense(what))?;
            let key = self.relative(what, &key)?;
            // A console may have made an empty object for the folder itself: it is nobody's data.
            if key == below && folders {
                continue;
            }
            let size = element(object, "Size").and_then(|s| s.parse().ok()).ok_or_else(|| no_sense(what))?;
            let modified =
                element(object, "LastModified").and_then(|t| t.parse().ok()).ok_or_else(|| no_sense(what))?;
            page.objects.push(Object { key, size, modified });
        }
        for folder in elements(&text, "CommonPrefixes") {
            let name = element(folder, "Prefix").and_then(|p| decoded(&p)).ok_or_else(|| no_sense(what))?;
            let name = name.strip_prefix(&prefix).ok_or_else(|| no_sense(what))?;
            page.folders.push(name.to_owned());
        }
        page.next = element(&text, "NextContinuationToken").map(|t| unescaped(&t));
        // Not the last page, and no next one: whatever comes after it would be lost.
        let truncated = element(&text, "IsTruncated");
        match (truncated.as_deref(), &page.next) {
            (Some("true"), Some(_)) => Ok(page),
            (Some("false"), _) => Ok(Page { next: None, ..page }),
            _ => Err(Error::new(Kind::Unreachable, "cannot list: the server's answer is cut short")
                .hint("run the same command again; if it stays so, the server does not speak ListObjectsV2")),
        }
    }
}

impl Objects for S3Objects {
    fn page(&self, below: &Below, folders: bool, next: Option<&str>) -> Result<Page> {
        self.list(below.as_str(), folders, next, None)
    }

    fn page_from(&self, below: &Below, key: &str) -> Result<Page> {
        // S3 begins behind a key, which need not be there: its own beginning is before it, and after most others.
        let mut after = self.client.full_key(key);
        if !key.starts_with(below.as_str()) || after.pop().is_none() {
            return self.page(below, false, None);
        }
        self.list(below.as_str(), false, None, Some(&after))
    }

    fn delete(&self, volume: &VolumeId, keys: &[String]) -> Result<Vec<(String, Error)>> {
        only_of(volume, keys.iter().map(String::as_str))?;
        debug_assert!(keys.len() <= MAX_BATCH);
        let mut failed = Vec::new();
        let mut paths = Vec::with_capacity(keys.len());
        for key in keys {
            match self.path(key) {
                Ok(path) => paths.push(path),
                Err(e) => failed.push((key.clone(), e)),
            }
        }
        let refusals: Vec<(usize, object_store::Error)> = self.patiently(|| {
            let what = "delete objects";
            let batch: Vec<_> = paths.iter().cloned().map(Ok).collect();
            // Every result in its turn: the stream goes on after the error of one object.
            let answer = self.client.run(what, async {
                Ok(self.client.store.delete_stream(stream::iter(batch).boxed()).collect::<Vec<_>>().await)
            })?;
            let Answer::Ok(results) = answer else { return Err(no_sense(what)) };
            // The error of a request as a whole comes alone.
            if results.len() != paths.len()
                || results.iter().any(|r| r.as_ref().is_err_and(|e| !is_of_one_object(e)))
            {
                let Some(e) = results.into_iter().find_map(Result::err) else { return Err(no_sense(what)) };
                self.client.run::<()>(what, async { Err(e) })?;
                return Err(no_sense(what));
            }
            Ok(results.into_iter().enumerate().filter_map(|(n, r)| Some((n, r.err()?))).collect())
        })?;
        for (n, e) in refusals {
            let Some(path): Option<&Path> = paths.get(n) else { continue };
            let key = self.relative("delete objects", path.as_ref())?;
            if !says(&e, &["NoSuchKey"]) {
                failed.push((key, refusal_of_one(&e)));
            }
        }
        Ok(failed)
    }

    fn uploads(&self, volume: &VolumeId) -> Result<Vec<Upload>> {
        let what = "list unfinished uploads";
        let prefix = self.client.full_key(Below::volume(volume).as_str());
        // MinIO takes the prefix for the whole key of one object, and answers that there is nothing. Without one it tells
        // all uploads of the bucket that it has seen begin. (An answer to something came before this.)
        let asked = if self.minio.load(Ordering::Relaxed) { "" } else { prefix.as_str() };
        let (mut uploads, mut marker) = (Vec::new(), None::<(String, String)>);
        loop {
            let mut query = vec![("encoding-type", "url")];
            if let Some((key, _)) = &marker {
                query.push(("key-marker", key));
            }
            query.extend([("max-uploads", "1000"), ("prefix", asked)]);
            if let Some((_, id)) = &marker {
                query.push(("upload-id-marker", id));
            }
            query.push(("uploads", ""));
            let text = match self.ask(what, &query) {
                Ok(text) => text,
                // A server without them has none.
                Err(e) if e.message().contains("NotImplemented") || e.message().contains("answers 501") => {
                    return Ok(Vec::new());
                }
                Err(e) => return Err(e),
            };
            for upload in elements(&text, "Upload") {
                let key = element(upload, "Key").and_then(|k| decoded(&k)).ok_or_else(|| no_sense(what))?;
                let id = element(upload, "UploadId").map(|i| unescaped(&i)).ok_or_else(|| no_sense(what))?;
                // Some servers ignore the prefix: another's upload must not be touched.
                if key.starts_with(&prefix) {
                    uploads.push(Upload { key: self.relative(what, &key)?, id });
                }
            }
            if element(&text, "IsTruncated").as_deref() != Some("true") {
                return Ok(uploads);
            }
            let key =
                element(&text, "NextKeyMarker").and_then(|k| decoded(&k)).ok_or_else(|| no_sense(what))?;
            let id = element(&text, "NextUploadIdMarker").map(|i| unescaped(&i)).unwrap_or_default();
            let following = Some((key, id));
            if following == marker {
                return Err(no_sense(what));
            }
            marker = following;
        }
    }

    fn abort(&self, volume: &VolumeId, upload: &Upload) -> Result<()> {
        only_of(volume, [upload.key.as_str()])?;
        let path = self.path(&upload.key)?;
        self.patiently(|| {
            let aborted =
                self.client.run("abort an upload", self.client.store.abort_multipart(&path, &upload.id));
            match aborted {
                Ok(Answer::Ok(()) | Answer::NoSuchKey) => Ok(()),
                Ok(Answer::NotAsExpected) => Err(no_sense("abort an upload")),
                Err(e) if e.message().contains("NoSuchUpload") => Ok(()),
                Err(e) => Err(e),
            }
        })
    }

    fn tidy(&self, _: &VolumeId) -> Result<()> {
        Ok(())
    }

    fn record_written(&self, volume: &VolumeId) -> Result<Option<Timestamp>> {
        // By a listing, since that has the server's time and an answer of its own for "none". The key may be the
        // beginning of others, but comes before them.
        let key = super::key(volume);
        let page = self.list(&key, false, None, None)?;
        Ok(page.objects.into_iter().find(|o| o.key == key).map(|o| o.modified))
    }

    fn keeps_versions(&self) -> Result<Option<bool>> {
        match self.ask("ask for versioning", &[("versioning", "")]) {
            Ok(text) => {
                Ok(Some(element(&text, "Status").is_some_and(|s| s == "Enabled" || s == "Suspended")))
            }
            // Not everybody may ask, and not every server knows.
            Err(e) if matches!(e.kind(), Kind::Environment | Kind::Refused | Kind::Failed) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn now(&self) -> Result<Timestamp> {
        let carried = || {
            let clock = self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            clock.and_then(|(date, at)| {
                let since = at.elapsed();
                let sum = date.checked_add(SignedDuration::try_from(since).ok()?).ok()?;
                (since < RECENT).then_some(sum)
            })
        };
        if let Some(now) = carried() {
            return Ok(now);
        }
        self.page(&Below::records(), true, None)?;
        carried().ok_or_else(|| {
            Error::refused("the server's answers have no Date, so nobody knows how old anything is")
                .hint("use an S3 server that sends a Date header, and no proxy that removes it")
        })
    }
}

/// Whether any cause of it has one of these words; object_store keeps its types to itself.
fn says(e: &object_store::Error, words: &[&str]) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(e);
    while let Some(e) = cause {
        let text = e.to_string();
        if words.iter().any(|w| text.contains(w)) {
            return true;
        }
        cause = e.source();
    }
    false
}

/// An error that the server has for a single object of a batch, in an answer that is a success as a whole.
fn is_of_one_object(e: &object_store::Error) -> bool {
    says(e, &["DeleteObjects request failed for key"])
}

fn refusal_of_one(e: &object_store::Error) -> Error {
    // Only codes that we know: what else the server writes is not repeated.
    let code =
        ["AccessDenied", "InternalError", "SlowDown", "InvalidObjectState", "ObjectLocked", "InvalidRequest"]
            .into_iter()
            .find(|code| says(e, &[code]));
    let why = code.unwrap_or("no known reason");
    match code {
        Some("AccessDenied") => Error::environment(format!("the server refuses to delete it ({why})"))
            .hint("allow these credentials s3:DeleteObject, and look for an object lock"),
        _ => Error::new(Kind::Unreachable, format!("the server did not delete it ({why})"))
            .hint("run the same command again"),
    }
}

/// The text of the first element `name`.
fn element<'a>(text: &'a str, name: &str) -> Option<std::borrow::Cow<'a, str>> {
    elements(text, name).next().map(std::borrow::Cow::Borrowed)
}

/// The contents of all elements `name`, which contain none of their own name.
fn elements<'a>(text: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, after) = rest.split_once(&open)?;
        let (inside, after) = after.split_once(&close)?;
        rest = after;
        Some(inside)
    })
}

/// A key as it came: percent signs, since that was asked for, after the escapes of XML.
fn decoded(text: &str) -> Option<String> {
    let text = unescaped(text);
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16);
                bytes.push(u8::try_from(digit(rest.next())? * 16 + digit(rest.next())?).ok()?);
            }
            // As in forms; a plus itself is %2B.
            b'+' => bytes.push(b' '),
            _ => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).ok()
}

fn unescaped(text: &str) -> String {
    if !text.contains('&') {
        return text.to_owned();
    }
    // The ampersand last, or what it brings would be taken for another escape.
    [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&apos;", "'"),
        ("&#39;", "'"),
        ("&amp;", "&"),
    ]
    .into_iter()
    .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        let text = "<R><Contents><Key>a%2Fb+c%2B&amp;</Key><Size>7</Size></Contents><Contents><Key>d</Key></Contents></R>";
        let keys: Vec<_> =
            elements(text, "Contents").map(|c| decoded(&element(c, "Key").unwrap()).unwrap()).collect();
        assert_eq!(keys, ["a/b c+&", "d"]);
        assert_eq!(element(text, "Size").as_deref(), Some("7"));
        assert_eq!(element(text, "Missing"), None);
        assert_eq!(decoded("%zz"), None);
        assert_eq!(decoded("%F"), None);
        assert_eq!(decoded("%ff"), None, "not UTF-8");
        assert_eq!(unescaped("&amp;lt;"), "&lt;");
    }
}
