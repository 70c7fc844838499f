//! One request to a client's server.

use super::address::{AddressPolicy, Forbidden};
use super::signature;
use reqwest::header::CONTENT_TYPE;
use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode};
use std::time::Duration;
use time::OffsetDateTime;
use url::Url;

/// The time that a receiver has to answer.
const TIMEOUT: Duration = Duration::from_secs(15);

/// What is sent where.
#[derive(Debug)]
pub(crate) struct Message<'a> {
    /// The receiver.
    pub(crate) url: &'a str,
    /// The event's id.
    pub(crate) id: &'a str,
    /// The event as JSON.
    pub(crate) body: &'a str,
    /// Sign it with each of these.
    pub(crate) secrets: &'a [String],
}

/// Why nothing was answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    #[error("the URL cannot be read: {0}")]
    Url(#[from] url::ParseError),
    #[error("no answer: {0}")]
    Request(#[from] reqwest::Error),
}

/// Sends a message, signed now; gives the status of the answer, whose body is not read.
///
/// The connection goes to an address that was checked just before, and to no other: the name is not
/// resolved again, redirects are not followed, and no proxy of the environment is used.
///
/// # Errors
/// No answer, or a URL that leads where it may not.
pub(crate) async fn send(
    policy: &AddressPolicy,
    message: &Message<'_>,
) -> Result<StatusCode, SendError> {
    let url = Url::parse(message.url)?;
    let addresses = tokio::time::timeout(TIMEOUT, policy.resolve(&url)).await;
    let addresses = addresses.unwrap_or_else(|_| {
        let host = url.host_str().unwrap_or_default().to_owned();
        Err(Forbidden::NoAddress { host })
    })?;
    let client = Client::builder()
        .no_proxy()
        .redirect(Policy::none())
        .timeout(TIMEOUT)
        .user_agent(concat!("tunesmith/", env!("CARGO_PKG_VERSION")))
        .resolve_to_addrs(url.host_str().unwrap_or_default(), &addresses)
        .build()?;
    let timestamp = OffsetDateTime::now_utc().unix_timestamp();
    let signature = signature::header(message.secrets, message.id, timestamp, message.body);
    let reply = client
        .post(url)
        .header(CONTENT_TYPE, "application/json")
        .header("webhook-id", message.id)
        .header("webhook-timestamp", timestamp.to_string())
        .header("webhook-signature", signature)
        .body(message.body.to_owned())
        .send()
        .await
        // The URL may hold a secret of the receiver, which no log needs.
        .map_err(reqwest::Error::without_url)?;
    Ok(reply.status())
}
