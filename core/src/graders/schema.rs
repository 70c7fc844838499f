//! The JSON Schema of a grader that can be computed here.

use super::{MAX_GRADERS, OPERATIONS, similarity};
use serde_json::{Value, json};

/// The schema (JSON Schema 2020-12) of a grader of a request.
#[must_use]
pub fn schema() -> Value {
    let operations = OPERATIONS.map(|(word, _)| word);
    let metrics = similarity::METRICS.map(|(word, _)| word);
    let template = json!({
        "type": "string",
        "description": "Text with `{{item.…}}`, `{{sample.output_text}}` and \
                        `{{sample.output_json.…}}` in it.",
    });
    let comparison = |kind: &str, how: &str, words: &[&str]| {
        json!({
            "type": "object",
            "title": kind,
            "required": ["type", "name", how, "input", "reference"],
            "properties": {
                "type": { "const": kind },
                "name": { "type": "string" },
                how: { "type": "string", "enum": words },
                "input": template,
                "reference": template,
            },
        })
    };
    let string_check = comparison("string_check", "operation", &operations);
    let text_similarity = comparison("text_similarity", "evaluation_metric", &metrics);
    let multi = json!({
        "type": "object",
        "title": "multi",
        "required": ["type", "name", "graders", "calculate_output"],
        "properties": {
            "type": { "const": "multi" },
            "name": { "type": "string" },
            "graders": {
                "type": "object",
                "description": "Graders by the keys that the formula names.",
                "minProperties": 1,
                "maxProperties": MAX_GRADERS,
                "additionalProperties": { "anyOf": [&string_check, &text_similarity] },
            },
            "calculate_output": {
                "type": "string",
                "description": "A formula of the graders' keys.",
            },
        },
    });
    json!({ "anyOf": [string_check, text_similarity, multi] })
}
