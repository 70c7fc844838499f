//! What the endpoints that answer have in common: a request that is checked and begun, and answers
//! that are given whole or as server-sent events.

use super::{Serving, event};
use crate::failure::{Failure, wire};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use serde::Serialize;
use serde_json::{Map, Value};
use std::convert::Infallible;
use std::future::Future;
use tunesmith_core::errors::ApiError;
use tunesmith_core::ids::ProjectId;

/// A request of one endpoint.
pub(crate) trait AnswerRequest: Sized + Send + Sync {
    /// The answers to it.
    type Reply: AnswerReply;

    /// Checks a body.
    ///
    /// # Errors
    /// What is wrong, or not done here, by its name.
    fn parse(body: &Map<String, Value>) -> Result<Self, ApiError>;

    /// Whether it asks for a stream.
    fn streams(&self) -> bool;

    /// What was taken, but is probably not what the client meant.
    fn warnings(&self) -> &[String];

    /// Asks samplers.
    ///
    /// # Errors
    /// `no_such_model`, `invalid_value` for a prompt that the model cannot take,
    /// `context_length_exceeded`, and those of asking a sampler.
    fn begin(
        &self,
        serving: &Serving,
        project: &ProjectId,
        low_priority: bool,
    ) -> impl Future<Output = Result<Self::Reply, Failure>> + Send;
}

/// The answers to a request. Dropping them gives up on those that are not complete.
pub(crate) trait AnswerReply: Sized + Send + 'static {
    /// All of them on the wire.
    type Whole: Serialize;

    /// The answers when all are complete.
    ///
    /// # Errors
    /// What goes wrong meanwhile.
    fn whole(self) -> impl Future<Output = Result<Self::Whole, ApiError>> + Send;

    /// Waits a while for the first word, so that what goes wrong before it can be a reply's status.
    ///
    /// # Errors
    /// What goes wrong.
    fn wait_for_first(&mut self) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// The events that a stream begins with, if any.
    fn first_events(&self) -> Bytes;

    /// The next event; none when all answers are complete.
    ///
    /// # Errors
    /// What goes wrong.
    fn next_event(&mut self) -> impl Future<Output = Result<Option<Bytes>, ApiError>> + Send;

    /// The events that a stream ends with.
    fn last_events(&self) -> Bytes;

    /// The answers as server-sent events.
    fn stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        let first = self.first_events();
        let first = stream::iter((!first.is_empty()).then_some(Ok(first)));
        first.chain(stream::unfold(Some(self), |reply| async move {
            let mut reply = reply?;
            Some(match reply.next_event().await {
                Ok(Some(next)) => (Ok(next), Some(reply)),
                Ok(None) => (Ok(reply.last_events()), None),
                Err(error) => (Ok(event(&wire(&error))), None),
            })
        }))
    }
}
