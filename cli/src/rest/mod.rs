//! The REST client of the commands that talk to a server.

mod download;
mod upload;
pub(crate) mod wire;

pub(crate) use download::Download;
pub(crate) use upload::file_part;

use anyhow::Context as _;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::time::Duration;

/// Time for a connection, and for each read of a reply.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const READ_TIMEOUT: Duration = Duration::from_secs(120);

/// Where the server is and who calls.
#[derive(Debug, clap::Args)]
pub(crate) struct ServerArgs {
    /// The server's address, /v1 included
    #[arg(
        long,
        env = "TUNESMITH_BASE_URL",
        value_name = "URL",
        default_value = "http://127.0.0.1:8080/v1"
    )]
    base_url: Url,
    /// An API key; `tunesmith up` writes the first one to DATA-DIR/api-key
    #[arg(long, env = "TUNESMITH_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
}

impl ServerArgs {
    /// A client for that server.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        Client::new(self.base_url.clone(), self.api_key.as_deref())
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestError {
    /// The server answered with an error.
    #[error("{message}")]
    Server {
        /// The HTTP status.
        status: StatusCode,
        /// Which error of the table, where the server says so.
        code: Option<String>,
        /// The server's own words.
        message: String,
    },
    /// There was no answer, or it broke off.
    #[error("{url} cannot be reached: {reason}")]
    Transport {
        /// The address without its query.
        url: String,
        /// The innermost cause.
        reason: String,
    },
    /// The answer is not what the contract says.
    #[error("{url} sent a reply that is not in the contract: {reason}")]
    Reply {
        /// The address without its query.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl RestError {
    /// Whether the same call may succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Server { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Transport { .. } => true,
            Self::Reply { .. } => false,
        }
    }

    fn transport(url: &Url, error: &reqwest::Error) -> Self {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Self::Transport { url: without_query(url), reason: cause.to_string() }
    }
}

fn without_query(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

/// A server, as one API key sees it.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    key: String,
}

impl Client {
    /// A client for the server at `base`.
    ///
    /// # Errors
    /// When there is no key, or `base` is not an HTTP address.
    pub(crate) fn new(base: Url, key: Option<&str>) -> anyhow::Result<Self> {
        let key = key.map(str::trim).filter(|key| !key.is_empty()).context(
            "no API key: set TUNESMITH_API_KEY or give --api-key \
             (`tunesmith up` writes the first key to DATA-DIR/api-key)",
        )?;
        anyhow::ensure!(
            matches!(base.scheme(), "http" | "https"),
            "{base} is not a server's address: it begins with http:// or https:// and ends with /v1"
        );
        let http = reqwest::Client::builder()
            .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .context("the HTTP client does not start")?;
        Ok(Self { http, base, key: key.to_owned() })
    }

    /// The address of `path`; each segment is escaped, so that an id may hold anything.
    pub(crate) fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        url
    }

    /// A request to `path` with the key.
    pub(crate) fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        self.http.request(method, self.url(path)).bearer_auth(&self.key)
    }

    /// GET, read as JSON.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<T, RestError> {
        self.json(self.request(Method::GET, path).query(query)).await
    }

    /// POST with a JSON body, or with none, read as JSON.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<T, RestError> {
        let request = self.request(Method::POST, path);
        self.json(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
    }

    /// Sends `request` and reads the reply as JSON.
    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
    ) -> Result<T, RestError> {
        let reply = self.send(request).await?;
        let url = reply.url().clone();
        let body = reply.bytes().await.map_err(|error| RestError::transport(&url, &error))?;
        serde_json::from_slice(&body).map_err(|error| RestError::Reply {
            url: without_query(&url),
            reason: error.to_string(),
        })
    }

    /// Sends `request`; a reply with an error status becomes the server's error.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, RestError> {
        let reply = request
            .send()
            .await
            .map_err(|error| RestError::transport(error.url().unwrap_or(&self.base), &error))?;
        let status = reply.status();
        if status.is_success() {
            return Ok(reply);
        }
        let url = without_query(reply.url());
        let body = reply.bytes().await.unwrap_or_default();
        let (code, message) = error_of(&body, status, &url);
        Err(RestError::Server { status, code, message })
    }
}

/// The contract's error code and message in `body`, on one line; without one, what is known of the
/// reply.
fn error_of(body: &[u8], status: StatusCode, url: &str) -> (Option<String>, String) {
    serde_json::from_slice::<wire::ErrorBody>(body).map_or_else(
        |_| (None, format!("{url} answered {status} without the contract's error object")),
        |body| (body.error.code, crate::table::one_line(&body.error.message)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(base: &str) -> anyhow::Result<Client> {
        Client::new(base.parse().expect("url"), Some("sk-test\n"))
    }

    #[test]
    fn a_model_name_with_colons_and_slashes_stays_one_segment() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        for base in ["http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1/"] {
            let url = client(base).expect("client").url(&["models", "ft:a/b:org::x y", "weights"]);
            assert_eq!(url.as_str(), "http://127.0.0.1:1/v1/models/ft:a%2Fb:org::x%20y/weights");
        }
    }

    #[test]
    fn a_missing_key_and_a_wrong_scheme_say_what_to_do() {
        let url: Url = "http://127.0.0.1:1/v1".parse().expect("url");
        for key in [None, Some(" \n")] {
            let error = Client::new(url.clone(), key).expect_err("no key").to_string();
            assert!(error.contains("TUNESMITH_API_KEY"), "{error}");
        }
        let error = client("ftp://host/v1").expect_err("scheme").to_string();
        assert!(error.contains("http://"), "{error}");
    }

    #[test]
    fn the_servers_message_is_one_line_and_a_foreign_reply_is_named() {
        let ours = br#"{"error":{"message":"No such\nfile","type":"x","param":null,"code":null}}"#;
        let (code, message) = error_of(ours, StatusCode::NOT_FOUND, "http://h/");
        assert_eq!((code, message.as_str()), (None, "No such file"));
        let (_, foreign) = error_of(b"<html>", StatusCode::BAD_GATEWAY, "http://h/v1/files");
        assert!(foreign.contains("http://h/v1/files answered 502"), "{foreign}");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_and_worth_another_try() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let base = format!("http://{}/v1", listener.local_addr().expect("address"));
        drop(listener);
        let error = client(&base)
            .expect("client")
            .get::<Value>(&["files"], &[("limit", "1")])
            .await
            .expect_err("nobody listens");
        assert!(error.is_transient());
        assert!(error.to_string().starts_with(&format!("{base}/files cannot")), "{error}");
    }
}
