//! The clients of `make bench-api`: HTTP/1.1 over plain sockets, so that the server is what is
//! measured. Each command prints one line of JSON.
//!
//! - `requests ADDRESS KEY CLIENTS SECONDS METHOD PATH [BODY]` sends one request after the other on
//!   each of the connections; `{n}` in the body is another number each time.
//! - `upload ADDRESS KEY FILE PURPOSE` sends a file as a form.
//! - `download ADDRESS KEY PATH` reads a reply to its end.
//! - `streams ADDRESS KEY DATABASE_URL STREAMS SECONDS JOB…` watches the jobs, claims them as a
//!   worker does, has each say something every second, and times every line's way to every watcher.

#[path = "support/http.rs"]
mod http;
#[path = "support/requests.rs"]
mod requests;
#[path = "support/streams.rs"]
mod streams;

use std::error::Error;
use std::time::{Duration, Instant};

use http::{Client, Target};
use requests::Request;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Builder;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Bytes of a file that are sent or read at a time.
const PIECE: usize = 256 << 10;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    Builder::new_multi_thread().enable_all().build()?.block_on(run(&args))
}

async fn run(args: &[String]) -> Outcome<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["requests", address, key, clients, seconds, method, path] => {
            let request = Request { method, path, body: "" };
            requests::run(Target { address, key }, clients.parse()?, seconds.parse()?, &request)?
        }
        ["requests", address, key, clients, seconds, method, path, body] => {
            let request = Request { method, path, body };
            requests::run(Target { address, key }, clients.parse()?, seconds.parse()?, &request)?
        }
        ["upload", address, key, file, purpose] => {
            upload(Target { address, key }, file, purpose).await?
        }
        ["download", address, key, path] => download(Target { address, key }, path).await?,
        ["streams", address, key, database_url, count, seconds, ref jobs @ ..] => {
            let target = Target { address, key };
            streams::run(target, database_url, count.parse()?, seconds.parse()?, jobs).await?
        }
        _ => return Err("see the top of bench_load.rs".into()),
    };
    println!("{result}");
    Ok(())
}

/// The middle, the 99th of a hundred and the longest, in milliseconds.
fn percentiles(times: &mut [Duration]) -> Value {
    times.sort_unstable();
    let at = |share: f64| {
        let rank = (times.len() as f64 * share).ceil() as usize;
        times.get(rank.max(1) - 1).map(|time| time.as_secs_f64() * 1e3)
    };
    json!({"p50": at(0.5), "p99": at(0.99), "max": at(1.0)})
}

async fn upload(target: Target<'_>, file: &str, purpose: &str) -> Outcome<Value> {
    const BOUNDARY: &str = "bench-boundary";
    let mut content = tokio::fs::File::open(file).await?;
    let before = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n\
         --{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"rows.jsonl\"\
         \r\n\r\n"
    );
    let after = format!("\r\n--{BOUNDARY}--\r\n");
    let bytes = content.metadata().await?.len();
    let head = format!(
        "{}Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {}\r\n\r\n",
        target.head("POST", "/v1/files"),
        before.len() as u64 + bytes + after.len() as u64
    );
    let mut client = Client::connect(target.address).await?;
    let began = Instant::now();
    client.socket.write_all(head.as_bytes()).await?;
    client.socket.write_all(before.as_bytes()).await?;
    let mut piece = vec![0; PIECE];
    loop {
        let read = content.read(&mut piece).await?;
        if read == 0 {
            break;
        }
        client.socket.write_all(&piece[..read]).await?;
    }
    client.socket.write_all(after.as_bytes()).await?;
    let reply: Value = serde_json::from_slice(&client.reply().await?)?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(json!({"id": reply["id"], "bytes": bytes, "seconds": seconds}))
}

async fn download(target: Target<'_>, path: &str) -> Outcome<Value> {
    let mut client = Client::connect(target.address).await?;
    let head = format!("{}\r\n", target.head("GET", path));
    let began = Instant::now();
    client.socket.write_all(head.as_bytes()).await?;
    let bytes = client.skip_reply().await?;
    Ok(json!({"bytes": bytes, "seconds": began.elapsed().as_secs_f64()}))
}
