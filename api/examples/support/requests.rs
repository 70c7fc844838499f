//! The same request again and again on many connections, by one thread that waits for all of them.
//!
//! As lean as pgbench, which shares the cores with the server that it measures in the same way: a
//! request is bytes that lie ready, sent in one call, and its reply is read in one. Every reply is read
//! to its end, must be a 200 and must be what was asked for.

use std::io::{ErrorKind, Read as _, Write as _};
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde_json::{Value, json};

use super::http::Target;
use super::{Outcome, percentiles};

/// What clients do before the clock starts, so that connections and caches are there.
const WARM_UP: Duration = Duration::from_secs(1);
/// Replies are shorter.
const MAX_REPLY: usize = 64 << 10;
/// Stands for a number in a body that is another each time.
const NUMBER: &str = "{n}";

/// A request that is sent again and again.
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) body: &'a str,
}

/// How many requests `clients` connections got answered in `seconds`, and how long they took.
pub(crate) fn run(
    target: Target<'_>,
    clients: usize,
    seconds: f64,
    request: &Request<'_>,
) -> Outcome<Value> {
    let mut load = Load::new(target, request);
    let mut poll = Poll::new()?;
    let mut connections = Vec::new();
    for token in 0..clients {
        let mut socket = TcpStream::connect(target.address.parse()?)?;
        poll.registry().register(
            &mut socket,
            Token(token),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        connections.push(Connection::new(socket));
    }
    let begins = Instant::now() + WARM_UP;
    let ends = begins + Duration::from_secs_f64(seconds);
    let (mut events, mut times) = (Events::with_capacity(clients), Vec::new());
    let mut open = clients;
    while open > 0 {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        for event in &events {
            let connection = &mut connections[event.token().0];
            match connection.sent {
                None => connection.socket.set_nodelay(true)?,
                Some(sent) => {
                    if !event.is_readable() || !connection.read(&load.expected)? {
                        continue;
                    }
                    if sent >= begins {
                        times.push(sent.elapsed());
                    }
                }
            }
            if Instant::now() < ends {
                connection.send(load.next())?;
            } else {
                open -= 1;
            }
        }
    }
    let elapsed = begins.elapsed().as_secs_f64();
    Ok(json!({
        "requests": times.len(),
        "per_second": times.len() as f64 / elapsed,
        "milliseconds": percentiles(&mut times),
    }))
}

/// The requests, and what their replies begin with.
struct Load {
    /// The next request, or the only one there is.
    bytes: Vec<u8>,
    head: String,
    /// What lies around the number in the body.
    body: Option<(String, String)>,
    number: u64,
    expected: Vec<u8>,
}

impl Load {
    fn new(target: Target<'_>, request: &Request<'_>) -> Self {
        let Request { method, path, body } = request;
        let head = target.head(method, path);
        let id = path.rsplit('/').next().unwrap_or_default();
        let expected = if *method == "GET" { format!("{{\"id\":\"{id}\",") } else { String::new() };
        let mut load = Self {
            bytes: Vec::new(),
            head,
            body: body.split_once(NUMBER).map(|(before, after)| (before.into(), after.into())),
            number: 0,
            expected: expected.into(),
        };
        load.write(body);
        load
    }

    fn next(&mut self) -> &[u8] {
        if let Some((before, after)) = &self.body {
            let body = format!("{before}{}{after}", self.number);
            self.number += 1;
            self.write(&body);
        }
        &self.bytes
    }

    fn write(&mut self, body: &str) {
        self.bytes.clear();
        self.bytes.extend_from_slice(self.head.as_bytes());
        if !body.is_empty() {
            let lines =
                format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
            self.bytes.extend_from_slice(lines.as_bytes());
        }
        self.bytes.extend_from_slice(b"\r\n");
        self.bytes.extend_from_slice(body.as_bytes());
    }
}

struct Connection {
    socket: TcpStream,
    /// When the request was sent that is not answered yet; none before the first.
    sent: Option<Instant>,
    came: Vec<u8>,
    length: usize,
}

impl Connection {
    fn new(socket: TcpStream) -> Self {
        Self { socket, sent: None, came: vec![0; MAX_REPLY], length: 0 }
    }

    fn send(&mut self, request: &[u8]) -> Outcome<()> {
        self.sent = Some(Instant::now());
        self.socket.write_all(request)?;
        Ok(())
    }

    /// Reads on; true once the reply is there and is the one that is `expected`.
    fn read(&mut self, expected: &[u8]) -> Outcome<bool> {
        loop {
            match self.socket.read(&mut self.came[self.length..]) {
                Ok(0) => return Err("the server hung up, or a reply is too long".into()),
                Ok(read) => self.length += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            let came = &self.came[..self.length];
            let Some(end) = came.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = std::str::from_utf8(&came[..end])?;
            let length: usize = head
                .lines()
                .find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("content-length").then_some(value)
                })
                .ok_or("a reply without a length")?
                .parse()?;
            let body = &came[end + 4..];
            if body.len() < length {
                continue;
            }
            if !head.starts_with("HTTP/1.1 200 ")
                || body.len() != length
                || !body.starts_with(expected)
            {
                return Err(String::from_utf8_lossy(came).into());
            }
            self.length = 0;
            return Ok(true);
        }
    }
}
