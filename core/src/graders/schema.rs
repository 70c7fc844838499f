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
    let string_check = json!({
        "type": "object",
        "title": "string_check",
        "required": ["type", "name", "operation", "input", "reference"],
        "properties": {
            "type": { "const": "string_check" },
            "name": { "type": "string" },
            "operation": { "type": "string", "enum": operations },
            "input": template,
            "reference": template,
        },
    });
    let text_similarity = json!({
        "type": "object",
        "title": "text_similarity",
        "required": ["type", "name", "evaluation_metric", "input", "reference"],
        "properties": {
            "type": { "const": "text_similarity" },
            "name": { "type": "string" },
            "evaluation_metric": { "type": "string", "enum": metrics },
            "input": template,
            "reference": template,
        },
    });
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
