//! What scores an answer.

use super::super::operation::Operation;
use super::super::requests;
use super::GRADERS;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations() -> [Operation; 2] {
    let grader = json!({
        "type": "string_check",
        "name": "capital",
        "operation": "eq",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    });
    [
        Operation::post(
            "/v1/fine_tuning/alpha/graders/run",
            (GRADERS, "runGrader"),
            "Try a grader on an answer",
        )
        .body(
            requests::graded(),
            json!({ "grader": grader, "model_sample": "Paris", "item": { "answer": "Paris" } }),
        )
        .errors([ErrorCode::GraderNotAvailable])
        .reply(json!({
            "type": "object",
            "required": ["reward", "metadata", "sub_rewards", "model_grader_token_usage_per_model"],
            "properties": {
                "reward": { "type": "number", "description": "0 where there is an error." },
                "metadata": {
                    "type": "object",
                    "required": ["name", "type", "errors", "execution_time", "scores"],
                    "properties": {
                        "name": { "type": "string" },
                        "type": { "type": "string" },
                        "errors": { "type": "object" },
                        "execution_time": { "type": "number", "description": "Seconds." },
                        "scores": {
                            "type": "object", "additionalProperties": { "type": "number" },
                        },
                    },
                },
                "sub_rewards": {
                    "type": "object", "additionalProperties": { "type": "number" },
                },
                "model_grader_token_usage_per_model": { "type": "object" },
            },
        })),
        Operation::post(
            "/v1/fine_tuning/alpha/graders/validate",
            (GRADERS, "validateGrader"),
            "Check a grader",
        )
        .body(requests::grader(), json!({ "grader": grader }))
        .errors([ErrorCode::GraderNotAvailable])
        .reply(requests::grader()),
    ]
}
