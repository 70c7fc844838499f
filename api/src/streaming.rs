//! Content that a reply streams: its type, its errors, and the log line when it breaks off.

use actix_web::body::{BodySize, MessageBody, SizedStream};
use bytes::Bytes;
use futures::TryStreamExt as _;
use futures::stream::BoxStream;
use tunesmith_core::weights::BeyondType;
use tunesmith_store::StoreError;

/// Content in pieces.
pub(crate) type Content = BoxStream<'static, Result<Bytes, ContentError>>;

/// Why content that had begun to flow broke off. The client sees a body that is too short.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContentError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{name} has {found} bytes where {expected} are noted")]
    Size { name: String, expected: u64, found: u64 },
    #[error("{name} has the SHA-256 {found} where {expected} is noted")]
    Hash { name: String, expected: String, found: String },
    #[error("{name} cannot be merged: {reason}")]
    Merge { name: String, reason: String },
    #[error("{name} cannot be stored as asked for: {beyond}")]
    Beyond { name: String, beyond: BeyondType },
}

/// A reply's body of exactly `bytes` bytes. `what` names it in the log if it breaks off: by then
/// the status is sent, so nothing else can tell.
pub(crate) fn body<S, E>(what: String, bytes: u64, content: S) -> impl MessageBody + use<S, E>
where
    S: futures::Stream<Item = Result<Bytes, E>> + 'static,
    E: std::error::Error + 'static,
{
    let content = content.inspect_err(move |error| {
        tracing::error!(%error, content = what, "a download broke off");
    });
    let body = SizedStream::new(bytes, Box::pin(content));
    debug_assert!(matches!(body.size(), BodySize::Sized(_)));
    body
}
