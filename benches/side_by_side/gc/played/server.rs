//! Just enough of S3 for listings, bulk deletes and catalog records. An object is no more than a bit: whether it is still there.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;

use crate::gc::BUCKET;
use crate::gc::store::Volumes;

/// When all objects were written.
const WRITTEN: &str = "2026-01-01T00:00:00.000Z";
const PAGE: usize = 1000;
const PREFIX: &str = "vols/";
const RECORDS: &str = "vols/.zerofsctl/volumes/";

/// The running store; it ends with the last of its connections once this is dropped.
pub struct Played {
    address: SocketAddr,
    store: Arc<Store>,
}

struct Store {
    volumes: Volumes,
    /// Where each volume's objects begin, in the order of all keys; the records come before them. One more at the end.
    starts: Vec<usize>,
    /// What is there, a bit for each key.
    there: Vec<AtomicU64>,
    records: Mutex<HashMap<usize, Record>>,
    delay_us: AtomicU64,
    in_flight: AtomicUsize,
    most_in_flight: AtomicUsize,
    writes: AtomicU64,
    ended: AtomicBool,
}

struct Record {
    text: Vec<u8>,
    tag: u64,
    written: Timestamp,
}

struct Request {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    if_match: Option<String>,
    if_none_match: bool,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    tag: Option<u64>,
    body: Vec<u8>,
}

impl Played {
    /// Plays these volumes, without records.
    pub fn start(volumes: Volumes) -> Played {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it has an address");
        let mut starts = vec![volumes.count];
        for n in 0..volumes.count {
            starts.push(starts[n] + volumes.size(n) as usize);
        }
        let total = starts[volumes.count];
        let there: Vec<_> = (0..total.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        (volumes.count..total).for_each(|at| {
            there[at / 64].fetch_or(1 << (at % 64), Ordering::Relaxed);
        });
        let store = Arc::new(Store {
            volumes,
            starts,
            there,
            records: Mutex::default(),
            delay_us: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            most_in_flight: AtomicUsize::new(0),
            writes: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let served = store.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if served.ended.load(Ordering::Relaxed) {
                    return;
                }
                let served = served.clone();
                std::thread::spawn(move || served.serve(&stream));
            }
        });
        Played { address, store }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How late each answer is.
    pub fn set_delay(&self, delay: Duration) {
        self.store.delay_us.store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// The most requests that were unanswered at one time since the last call.
    pub fn take_most_in_flight(&self) -> usize {
        self.store.most_in_flight.swap(0, Ordering::Relaxed)
    }

    /// How many objects are left in the first or the second half of the volumes.
    pub fn objects_in(&self, first: bool) -> usize {
        let store = &self.store;
        let middle = store.starts[store.volumes.count / 2];
        let range = if first { store.volumes.count..middle } else { middle..store.total() };
        range.filter(|at| store.is_there(*at)).count()
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        self.store.ended.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Store {
    fn serve(&self, stream: &TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader) {
            let now = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_in_flight.fetch_max(now, Ordering::Relaxed);
            let delay = self.delay_us.load(Ordering::Relaxed);
            if delay > 0 {
                std::thread::sleep(Duration::from_micros(delay));
            }
            let answer = self.answer(&request);
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            let date = Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT");
            let mut bytes = format!(
                "HTTP/1.1 {} X\r\nDate: {date}\r\nContent-Length: {}\r\n",
                answer.status,
                answer.body.len()
            );
            if let Some(tag) = answer.tag {
                let _ = write!(bytes, "ETag: \"{tag}\"\r\nLast-Modified: {date}\r\n");
            }
            bytes += "\r\n";
            let mut bytes = bytes.into_bytes();
            bytes.extend(answer.body);
            let mut stream = stream;
            if stream.write_all(&bytes).is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: &Request) -> Answer {
        let query =
            |name: &str| request.query.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let bucket = format!("/{BUCKET}");
        let rest = request.path.strip_prefix(&bucket).unwrap_or_default().trim_start_matches('/');
        match (request.method.as_str(), rest) {
            ("GET", "") if query("versioning").is_some() => ok("<VersioningConfiguration/>".into()),
            ("GET", "") if query("uploads").is_some() => ok(
                "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
                    .into(),
            ),
            ("GET", "") if query("list-type") == Some("2") => {
                let from = query("continuation-token").and_then(|t| t.parse().ok());
                ok(self.list(query("prefix").unwrap_or_default(), query("delimiter") == Some("/"), from))
            }
            ("POST", "") if query("delete").is_some() => self.delete(&request.body),
            ("GET" | "PUT" | "DELETE", key) => match self.place(key) {
                Some(at) if at < self.volumes.count => self.record(request, at),
                _ => refusal(404, "NoSuchKey"),
            },
            _ => refusal(501, "NotImplemented"),
        }
    }

    fn total(&self) -> usize {
        self.starts[self.volumes.count]
    }

    fn is_there(&self, at: usize) -> bool {
        self.there[at / 64].load(Ordering::Relaxed) & 1 << (at % 64) != 0
    }

    fn set(&self, at: usize, there: bool) {
        if there {
            self.there[at / 64].fetch_or(1 << (at % 64), Ordering::Relaxed);
        } else {
            self.there[at / 64].fetch_and(!(1 << (at % 64)), Ordering::Relaxed);
        }
    }

    /// The first key from `at` on that is there.
    fn next(&self, mut at: usize) -> usize {
        while at < self.total() {
            let word = self.there[at / 64].load(Ordering::Relaxed) >> (at % 64);
            if word != 0 {
                return (at + word.trailing_zeros() as usize).min(self.total());
            }
            at = (at / 64 + 1) * 64;
        }
        self.total()
    }

    fn key(&self, at: usize) -> String {
        if at < self.volumes.count {
            return format!("{RECORDS}{}.json", self.volumes.name(at));
        }
        let n = self.starts.partition_point(|start| *start <= at) - 1;
        format!("{PREFIX}{}/{}", self.volumes.name(n), self.volumes.key(n, (at - self.starts[n]) as u64))
    }

    /// The first place whose key is not before `text`.
    fn lower(&self, text: &str) -> usize {
        let (mut low, mut high) = (0, self.total());
        while low < high {
            let middle = low.midpoint(high);
            if self.key(middle).as_str() < text { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// The first place after all keys that begin with `prefix`.
    fn upper(&self, prefix: &str) -> usize {
        self.lower(&format!("{prefix}\u{7f}"))
    }

    fn place(&self, key: &str) -> Option<usize> {
        let inside = key.strip_prefix(PREFIX)?;
        let (name, object) = inside.split_once('/')?;
        if let Some(record) = key.strip_prefix(RECORDS) {
            let n = record.strip_suffix(".json")?.get(2..)?.parse().ok()?;
            return (n < self.volumes.count && self.key(n) == key).then_some(n);
        }
        let (n, i) = self.volumes.find(name, object)?;
        Some(self.starts[n] + i as usize)
    }

    fn list(&self, prefix: &str, folders: bool, from: Option<usize>) -> String {
        let end = self.upper(prefix);
        let mut at = self.next(from.unwrap_or_else(|| self.lower(prefix)));
        let mut text = String::with_capacity(300 * PAGE);
        text += "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult>";
        let mut count = 0;
        while at < end && count < PAGE {
            let key = self.key(at);
            count += 1;
            let inside = key[prefix.len()..].find('/').filter(|_| folders);
            if let Some(slash) = inside {
                let folder = &key[..=prefix.len() + slash];
                let _ = write!(text, "<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
                at = self.next(self.upper(folder));
                continue;
            }
            let record = (at < self.volumes.count).then(|| {
                let records = self.records.lock().expect("no other thread fails");
                records.get(&at).map(|r| (r.text.len(), r.written.to_string()))
            });
            let (size, written) = record.flatten().unwrap_or_else(|| (1000 + at % 1000, WRITTEN.to_owned()));
            let _ = write!(
                text,
                "<Contents><Key>{key}</Key><LastModified>{written}</LastModified>\
                 <ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><Size>{size}</Size>\
                 <StorageClass>STANDARD</StorageClass></Contents>"
            );
            at = self.next(at + 1);
        }
        let more = at < end;
        let _ = write!(text, "<KeyCount>{count}</KeyCount><IsTruncated>{more}</IsTruncated>");
        if more {
            let _ = write!(text, "<NextContinuationToken>{at}</NextContinuationToken>");
        }
        text + "</ListBucketResult>"
    }

    fn delete(&self, body: &[u8]) -> Answer {
        let Ok(body) = std::str::from_utf8(body) else { return refusal(400, "MalformedXML") };
        let quiet = body.contains("<Quiet>true</Quiet>");
        let keys: Vec<&str> =
            body.split("<Key>").skip(1).filter_map(|rest| Some(rest.split_once("</Key>")?.0)).collect();
        if keys.is_empty() || keys.len() > PAGE {
            return refusal(400, "MalformedXML");
        }
        let mut text = String::from("<DeleteResult>");
        for key in keys {
            if let Some(at) = self.place(key) {
                self.set(at, false);
                if at < self.volumes.count {
                    self.records.lock().expect("no other thread fails").remove(&at);
                }
            }
            if !quiet {
                let _ = write!(text, "<Deleted><Key>{key}</Key></Deleted>");
            }
        }
        ok(text + "</DeleteResult>")
    }

    fn record(&self, request: &Request, at: usize) -> Answer {
        let mut records = self.records.lock().expect("no other thread fails");
        let tag = records.get(&at).map(|r| r.tag);
        match request.method.as_str() {
            "GET" => match records.get(&at) {
                Some(record) => Answer { status: 200, tag, body: record.text.clone() },
                None => refusal(404, "NoSuchKey"),
            },
            "DELETE" => {
                records.remove(&at);
                self.set(at, false);
                Answer { status: 204, tag: None, body: Vec::new() }
            }
            _ => {
                let expected = match &request.if_match {
                    Some(wanted) => tag.is_some_and(|tag| format!("\"{tag}\"") == *wanted),
                    None => !request.if_none_match || tag.is_none(),
                };
                if !expected {
                    return refusal(412, "PreconditionFailed");
                }
                let tag = self.writes.fetch_add(1, Ordering::Relaxed);
                records.insert(at, Record { text: request.body.clone(), tag, written: Timestamp::now() });
                self.set(at, true);
                Answer { status: 200, tag: Some(tag), body: Vec::new() }
            }
        }
    }
}

fn ok(text: String) -> Answer {
    Answer { status: 200, tag: None, body: text.into_bytes() }
}

fn refusal(status: u16, code: &str) -> Answer {
    Answer { status, tag: None, body: format!("<Error><Code>{code}</Code></Error>").into_bytes() }
}

fn read_request(reader: &mut BufReader<&TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut if_match, mut if_none_match, mut waits) = (0, None, false, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        let Some((name, value)) = header.split_once(':') else { continue };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "if-match" => if_match = Some(value.to_owned()),
            "if-none-match" => if_none_match = true,
            "expect" => waits = true,
            _ => {}
        }
    }
    if waits {
        let mut stream = *reader.get_ref();
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (name.to_owned(), plain(value)))
        .collect();
    Some(Request { method, path: plain(path), query, if_match, if_none_match, body })
}

/// Without percent signs; keys here are plain otherwise.
fn plain(text: &str) -> String {
    text.replace("%2F", "/").replace("%2f", "/")
}
