//! What models say.

use super::super::completions;
use super::super::operation::Operation;
use super::super::requests::reference;
use super::{ANSWERS, example, of};
use crate::serving::{ChatCompletion, ChatCompletionChunk, Completion};
use schemars::SchemaGenerator;
use serde_json::{Value, json};
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 2] {
    let answered = |operation: Operation| {
        operation.errors([
            ErrorCode::NoSuchModel,
            ErrorCode::ContextLengthExceeded,
            ErrorCode::UnsupportedParameter,
            ErrorCode::ModelNotServed,
            ErrorCode::SamplerFailed,
        ])
    };
    let (chunk, completion) = (of::<ChatCompletionChunk>(generator), of::<Completion>(generator));
    // What goes wrong after the first event is the last one.
    let or_error = |chunk: &Value| json!({ "anyOf": [chunk, reference("Error")] });
    [
        answered(
            Operation::post(
                "/v1/chat/completions",
                (ANSWERS, "createChatCompletion"),
                "Answer a conversation",
            )
            .text("With `stream` the answer comes as server-sent events.")
            .body(
                completions::chat(),
                json!({
                    "model": example::TUNED,
                    "messages": [{ "role": "user", "content": "Hello" }],
                    "max_completion_tokens": 16,
                }),
            )
            .reply(of::<ChatCompletion>(generator))
            .events(&or_error(&chunk)),
        ),
        answered(
            Operation::post(
                "/v1/completions",
                (ANSWERS, "createCompletion"),
                "Go on from a plain prompt",
            )
            .text("With `stream` the answer comes as server-sent events.")
            .body(
                completions::completion(),
                json!({ "model": example::TUNED, "prompt": "Hello", "max_tokens": 16 }),
            )
            .reply(completion.clone())
            .events(&or_error(&completion)),
        ),
    ]
}
