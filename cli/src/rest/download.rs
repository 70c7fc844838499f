//! A download that goes on where it broke off.

use super::{Client, RestError};
use bytes::Bytes;
use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use reqwest::header::{ETAG, IF_RANGE, RANGE};
use reqwest::{RequestBuilder, Response, StatusCode};
use std::time::Duration;

/// Tries in a row that bring nothing before the download is given up.
const MAX_TRIES: u32 = 6;
/// The wait before the second try; each further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// A reply whose content comes in pieces.
pub(crate) struct Download {
    client: Client,
    content: BoxStream<'static, reqwest::Result<Bytes>>,
    /// Its size, where the server says so.
    size: Option<u64>,
    /// The request, and what tells its content from any other; without these it cannot be asked for
    /// again.
    again: Option<(RequestBuilder, String)>,
    received: u64,
    /// Tries since the last piece came.
    tries: u32,
    first_wait: Duration,
}

impl Client {
    /// Sends `request` for content that may be long.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub(crate) async fn download(&self, request: RequestBuilder) -> Result<Download, RestError> {
        let again = request.try_clone();
        let reply = self.send(request).await?;
        let tag = reply.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        Ok(Download {
            client: self.clone(),
            again: again.zip(tag),
            size: reply.content_length(),
            content: pieces(reply),
            received: 0,
            tries: 0,
            first_wait: FIRST_WAIT,
        })
    }
}

fn pieces(reply: Response) -> BoxStream<'static, reqwest::Result<Bytes>> {
    reply.bytes_stream().boxed()
}

impl Download {
    /// The size of the content, where the server says so.
    pub(crate) fn size(&self) -> Option<u64> {
        self.size
    }

    /// The content, asked for again from where it breaks off.
    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<Bytes, RestError>> {
        stream::try_unfold(self, |mut download| async {
            Ok(download.next().await?.map(|piece| (piece, download)))
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, RestError> {
        loop {
            let error = match self.content.next().await {
                None => return Ok(None),
                Some(Ok(piece)) => {
                    self.received += piece.len() as u64;
                    self.tries = 0;
                    return Ok(Some(piece));
                }
                Some(Err(error)) => RestError::transport(&self.client.base, &error),
            };
            self.resume(error).await?;
        }
    }

    /// Asks for the rest, if need be again and again; `error` is why.
    async fn resume(&mut self, mut error: RestError) -> Result<(), RestError> {
        let Some((request, tag)) = &self.again else { return Err(error) };
        while error.is_transient() && self.tries < MAX_TRIES {
            tokio::time::sleep(self.first_wait * 2u32.pow(self.tries)).await;
            self.tries += 1;
            let Some(request) = request.try_clone() else { break };
            let range = format!("bytes={}-", self.received);
            let request = request.header(RANGE, range).header(IF_RANGE, tag);
            match self.client.send(request).await {
                Ok(reply) if reply.status() == StatusCode::PARTIAL_CONTENT => {
                    self.content = pieces(reply);
                    return Ok(());
                }
                Ok(reply) => {
                    return Err(RestError::Reply {
                        url: super::without_query(reply.url()),
                        reason: "what is downloaded has changed meanwhile: download it again"
                            .to_owned(),
                    });
                }
                Err(next) => error = next,
            }
        }
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::TryStreamExt as _;
    use reqwest::Method;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    const CONTENT: &[u8] = b"0123456789";

    /// A server that breaks off after three bytes each time; gives its address and the ranges that
    /// it was asked for. `tags` are what it calls its content, one reply after another.
    async fn breaking(tags: Vec<&'static str>) -> (Client, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let base = format!("http://{}/v1", listener.local_addr().expect("address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let ranges = Arc::clone(&asked);
        tokio::spawn(async move {
            for tag in tags {
                let (mut socket, _) = listener.accept().await.expect("accept");
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(socket.read_u8().await.expect("a request"));
                }
                let request = String::from_utf8(request).expect("text").to_lowercase();
                let header = |name: &str| {
                    let line = request.lines().find_map(|line| line.strip_prefix(name))?;
                    Some(line.trim().to_owned())
                };
                let from =
                    header("range: bytes=").filter(|_| header("if-range:") == Some(tag.to_owned()));
                let start: usize = from
                    .as_ref()
                    .map_or(0, |from| from.trim_end_matches('-').parse().expect("range"));
                ranges.lock().expect("lock").push(from.unwrap_or_default());
                let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
                let rest = &CONTENT[start..];
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\netag: {tag}\r\n\r\n",
                    rest.len()
                );
                socket.write_all(head.as_bytes()).await.expect("write");
                socket.write_all(&rest[..rest.len().min(3)]).await.expect("write");
            }
        });
        let _ = rustls::crypto::ring::default_provider().install_default();
        (Client::new(base.parse().expect("url"), Some("sk-test")).expect("client"), asked)
    }

    async fn downloaded(client: &Client) -> Result<Vec<u8>, RestError> {
        let mut download = client.download(client.request(Method::GET, &["models"])).await?;
        assert_eq!(download.size(), Some(CONTENT.len() as u64));
        download.first_wait = Duration::ZERO;
        let pieces: Vec<Bytes> = download.into_stream().try_collect().await?;
        Ok(pieces.concat())
    }

    #[tokio::test]
    async fn what_breaks_off_is_asked_for_from_there() {
        let (client, asked) = breaking(vec!["\"a\""; 4]).await;
        assert_eq!(downloaded(&client).await.expect("whole"), CONTENT);
        assert_eq!(*asked.lock().expect("lock"), ["", "3-", "6-", "9-"]);
    }

    #[tokio::test]
    async fn what_has_changed_meanwhile_is_not_patched_together() {
        let (client, _) = breaking(vec!["\"a\"", "\"b\""]).await;
        let error = downloaded(&client).await.expect_err("another content").to_string();
        assert!(error.contains("changed meanwhile"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_stays_away_ends_the_download() {
        let (client, asked) = breaking(vec!["\"a\""]).await;
        let error = downloaded(&client).await.expect_err("nobody listens any more");
        assert!(error.is_transient(), "{error}");
        assert_eq!(asked.lock().expect("lock").len(), 1);
    }
}
