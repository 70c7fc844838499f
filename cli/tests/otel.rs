//! What an OpenTelemetry collector gets of a running service:
//! `cargo test --workspace --features tunesmith/otel --test otel`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::process::{Pid, Signal, kill_process};

const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT_ID: &str = "b7ad6b7169203331";

#[test]
fn a_request_arrives_as_a_span_of_its_clients_trace_with_its_log_line() {
    let (collector, posts) = collector();
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut up, address) = start(
        dir.path(),
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{collector}")),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
        ],
    );
    let traceparent = format!("traceparent: 00-{TRACE_ID}-{PARENT_ID}-01");
    let reply = get(&address, "/v1/files/file-none", &traceparent);
    assert!(reply.starts_with("HTTP/1.1 401"), "{reply}");
    stop(&mut up);

    let posts: Vec<Post> = posts.try_iter().collect();
    let trace_id = hex::decode(TRACE_ID).expect("digits");
    let of_trace = |path: &str| {
        posts.iter().find(|post| post.path == path && post.holds(&trace_id)).unwrap_or_else(|| {
            panic!(
                "nothing of the trace: {:?}",
                posts.iter().map(|it| &it.path).collect::<Vec<_>>()
            )
        })
    };
    let spans = of_trace("/v1/traces");
    for text in [
        "GET /v1/files/{id}",
        "http.request.method",
        "http.response.status_code",
        "/v1/files/file-none",
        "service.name",
        "tunesmith",
        "deployment.environment.name",
    ] {
        assert!(spans.holds(text.as_bytes()), "{text}");
    }
    assert!(
        spans.holds(&hex::decode(PARENT_ID).expect("digits")),
        "the client's span is its parent"
    );
    assert!(of_trace("/v1/logs").holds(b"request_id"));
}

#[test]
fn nothing_is_exported_unless_a_collector_is_named() {
    let (collector, posts) = collector();
    let endpoint = format!("http://{collector}");
    let dir = tempfile::tempdir().expect("temp dir");
    let disabled = [("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint), ("OTEL_SDK_DISABLED", "true")];
    for environment in [&disabled[..], &[]] {
        let (mut up, address) = start(dir.path(), environment);
        assert!(get(&address, "/healthz", "x: y").starts_with("HTTP/1.1 200"));
        stop(&mut up);
    }
    assert_eq!(posts.try_iter().count(), 0);
}

/// Starts the program; gives the address that it listens on.
fn start(data_dir: &Path, environment: &[(&str, &str)]) -> (Child, String) {
    let mut up = Command::new(env!("CARGO_BIN_EXE_tunesmith"))
        .args(["up", "--no-sampler", "--listen", "127.0.0.1:0", "--device", "cpu", "--data-dir"])
        .arg(data_dir)
        .env_remove("RUST_LOG")
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut line = String::new();
    let stdout = up.stdout.take().expect("a pipe");
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    let address = line.trim().strip_prefix("tunesmith is ready at http://").expect("ready");
    (up, address.trim_end_matches("/v1").to_owned())
}

fn stop(up: &mut Child) {
    kill_process(Pid::from_child(up), Signal::TERM).expect("it runs");
    assert!(up.wait().expect("its status").success());
}

fn get(address: &str, path: &str, header: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connect");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\n{header}\r\nConnection: close\r\n\r\n"
    )
    .expect("write");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("read");
    reply
}

/// What was posted to the collector.
struct Post {
    path: String,
    body: Vec<u8>,
}

impl Post {
    /// Whether these bytes are in it: protobuf writes text and ids as they are.
    fn holds(&self, bytes: &[u8]) -> bool {
        self.body.windows(bytes.len()).any(|window| window == bytes)
    }
}

/// A collector that takes everything.
fn collector() -> (SocketAddr, Receiver<Post>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    let (sender, posts) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            std::thread::spawn(move || take_posts(stream, &sender));
        }
    });
    (address, posts)
}

/// Reads one request after another, until the client hangs up.
fn take_posts(stream: TcpStream, sender: &Sender<Post>) {
    let mut reader = BufReader::new(&stream);
    loop {
        let (mut path, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if let Some(rest) = line.strip_prefix("POST ") {
                path = rest.split(' ').next().expect("a path").to_owned();
            } else if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().expect("a length");
            } else if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("the whole body");
        // Nobody listens any more when the test is over.
        let _ = sender.send(Post { path, body });
        let reply =
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n";
        (&stream).write_all(reply).expect("write");
    }
}
