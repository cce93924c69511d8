//! Just enough HTTP/1.1 to make a bucket, put an object and read it back from moto.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// An answer: the status code and the body.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// For example 200.
    pub status: u16,
    /// Everything after the headers.
    pub body: Vec<u8>,
}

/// moto lets nobody read anonymously, but looks at no signature.
const SIGNED: &str =
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";

/// Sends one request on a connection of its own and reads the answer to its end.
///
/// # Errors
/// Whatever the connection says; `InvalidData` when the answer is not HTTP; `TimedOut` or `WouldBlock` when
/// the server says nothing for `limit`.
pub fn request(
    server: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
    limit: Duration,
) -> io::Result<Answer> {
    send(server, &format!("{method} {path} HTTP/1.1\r\nAuthorization: {SIGNED}"), body, limit)
}

/// The same, for a server that takes a signature amiss. In the old version of HTTP, so that the answer comes in one piece.
///
/// # Errors
/// As for [`request`].
pub fn unsigned(
    server: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
    limit: Duration,
) -> io::Result<Answer> {
    send(server, &format!("{method} {path} HTTP/1.0"), body, limit)
}

/// The same with headers of one's own, such as a signature; each line ends with CR LF.
///
/// # Errors
/// As for [`request`].
pub fn signed(
    server: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
    limit: Duration,
) -> io::Result<Answer> {
    let head = format!("{method} {path} HTTP/1.0\r\n{headers}");
    send(server, head.trim_end(), body, limit)
}

fn send(server: SocketAddr, head: &str, body: &[u8], limit: Duration) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let head = format!(
        "{head}\r\nHost: {server}\r\nConnection: close\r\n\
         Content-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer"))
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { status, body: answer[end + 4..].to_vec() })
}
