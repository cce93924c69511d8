//! A server that answers as a test says, for what no real one would.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A request as the scripted server saw it.
pub struct Request {
    /// `GET`.
    pub method: String,
    /// With its query.
    pub path: String,
    /// What it wants the answer to be, `Accept`; empty if it does not say.
    pub accept: String,
    /// What it sends.
    pub body: Vec<u8>,
    /// How many came before it.
    pub number: usize,
}

/// An answer in full; none closes the connection without one.
pub type Answer = Option<String>;

/// A whole answer with this status and body.
pub fn answer(status: u16, body: &str) -> Answer {
    Some(format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()))
}

/// An HTTP server that answers as a test says.
pub struct Script {
    /// Where it listens.
    pub address: SocketAddr,
}

impl Script {
    /// Starts it; it ends with the test's process.
    pub fn new(mut script: impl FnMut(&Request) -> Answer + Send + 'static) -> Script {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // It ends with the test's process; it holds nothing but a port.
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { continue };
                let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
                if let Some(mut request) = read_request(&stream) {
                    request.number = number;
                    if let Some(text) = script(&request) {
                        let _ = (&stream).write_all(text.as_bytes());
                    }
                }
            }
        });
        Script { address }
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut accept) = (0, String::new());
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        if header.trim().is_empty() {
            break;
        }
        let Some((name, value)) = header.split_once(':') else { continue };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok()?;
        } else if name.eq_ignore_ascii_case("accept") {
            value.trim().clone_into(&mut accept);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, accept, body, number: 0 })
}
