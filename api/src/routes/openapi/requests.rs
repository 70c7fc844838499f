//! Schemas of what is read by hand, made of the constants that it is checked against.

use super::words;
use crate::fields::{MAX_METADATA_KEY, MAX_METADATA_PAIRS, MAX_METADATA_VALUE};
use crate::job_request::{MAX_SEED, MAX_SUFFIX};
use crate::routes::adapter_import;
use crate::routes::batches::{ENDPOINTS, WINDOW};
use crate::routes::file_upload::{EXPIRES_AFTER_SECONDS, UPLOAD_PURPOSES};
use crate::routes::organization::MAX_NAME;
use crate::routes::organization::admin_keys::MAX_LIFETIME_SECONDS;
use crate::routes::uploads::{MAX_MIME_TYPE, MAX_UPLOAD_BYTES};
use crate::routes::webhook_endpoints;
use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::graders;
use tunesmith_core::hyperparameters::{Method, request_schema};
use tunesmith_store::files::Purpose;
use tunesmith_store::webhooks::WebhookEvent;

/// A reference to a schema of [`named`].
pub(super) fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// The schemas that operations refer to by name.
pub(super) fn named(generator: &mut SchemaGenerator) -> Map<String, Value> {
    let mut kinds: Vec<&str> = ErrorCode::ALL.iter().map(|code| code.kind()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let error = json!({
        "type": "object",
        "description": "Every reply that is no success: the message names the place, the rule and \
                        the way out.",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": { "type": "string", "description": "For a person." },
                    "type": { "type": "string", "enum": kinds },
                    "param": {
                        "type": ["string", "null"],
                        "description": "The parameter at fault, by its path in the request.",
                    },
                    "code": generator.subschema_for::<ErrorCode>(),
                },
            },
        },
    });
    let metadata = json!({
        "type": ["object", "null"],
        "description": "The client's own notes.",
        "maxProperties": MAX_METADATA_PAIRS,
        "propertyNames": { "maxLength": MAX_METADATA_KEY },
        "additionalProperties": { "type": "string", "maxLength": MAX_METADATA_VALUE },
    });
    let schemas = [
        ("Error", error),
        ("Metadata", metadata),
        ("SupervisedHyperparameters", request_schema(Method::Supervised)),
        ("DpoHyperparameters", request_schema(Method::Dpo)),
        ("Grader", graders::schema()),
        ("CreateJob", create_job()),
    ];
    schemas.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect()
}

fn create_job() -> Value {
    let of_method = |name: &str| json!({ "type": ["object", "null"], "properties": { "hyperparameters": reference(name) } });
    json!({
        "type": "object",
        "required": ["model", "training_file"],
        "properties": {
            "model": { "type": "string", "minLength": 1, "description": "The name of the base model, or of the tuned model or checkpoint whose \
                                weights train further." },
            "training_file": {
                "type": "string",
                "minLength": 1,
                "description": "The id of a file of purpose `fine-tune`.",
            },
            "validation_file": {
                "type": ["string", "null"],
                "minLength": 1,
                "description": "The id of a file of purpose `fine-tune`, which no step trains on.",
            },
            "suffix": suffix(json!(["string", "null"])),
            "seed": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": MAX_SEED,
                "description": "Where everything random begins; random itself where none is given.",
            },
            "metadata": reference("Metadata"),
            "method": {
                "type": ["object", "null"],
                "description": "What the job learns from, and how.",
                "required": ["type"],
                "properties": {
                    "type": { "type": "string", "enum": Method::ALL.map(Method::as_str) },
                    Method::Supervised.as_str(): of_method("SupervisedHyperparameters"),
                    Method::Dpo.as_str(): of_method("DpoHyperparameters"),
                },
            },
            "hyperparameters": {
                "description": "The place of older clients; `method` has them now.",
                "deprecated": true,
                "$ref": "#/components/schemas/SupervisedHyperparameters",
            },
            "integrations": {
                "description": "OpenAI's reports to other services, which are not offered: ignored, \
                                with a warning.",
            },
        },
    })
}

fn suffix(kind: Value) -> Value {
    json!({
        "type": kind,
        "minLength": 1,
        "maxLength": MAX_SUFFIX,
        "pattern": "^[A-Za-z0-9._-]+$",
        "description": "A part of the tuned model's name. Letters and digits of other scripts are \
                        taken too.",
    })
}

/// `expires_after` of a JSON body.
fn expires_after() -> Value {
    json!({
        "type": ["object", "null"],
        "description": "When the file goes by itself.",
        "required": ["anchor", "seconds"],
        "properties": { "anchor": { "const": "created_at" }, "seconds": seconds() },
    })
}

fn seconds() -> Value {
    let (low, high) = EXPIRES_AFTER_SECONDS.into_inner();
    json!({ "type": "integer", "minimum": low, "maximum": high })
}

fn purpose() -> Value {
    json!({ "type": "string", "enum": UPLOAD_PURPOSES.map(Purpose::as_str) })
}

/// The form of a file.
pub(super) fn file() -> Value {
    json!({
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {
            "file": { "type": "string", "contentMediaType": "application/octet-stream" },
            "purpose": purpose(),
            "expires_after[anchor]": { "const": "created_at" },
            "expires_after[seconds]": seconds(),
        },
    })
}

/// The form of an adapter.
pub(super) fn adapter() -> Value {
    let file = |kind: &str| json!({ "type": "string", "contentMediaType": kind });
    json!({
        "type": "object",
        "required": [adapter_import::MODEL, adapter_import::CONFIG, adapter_import::WEIGHTS],
        "properties": {
            adapter_import::MODEL: {
                "type": "string", "description": "The base model that the adapter goes on.",
            },
            adapter_import::SUFFIX: suffix(json!("string")),
            adapter_import::CONFIG: file("application/json"),
            adapter_import::WEIGHTS: file("application/octet-stream"),
        },
    })
}

pub(super) fn upload() -> Value {
    json!({
        "type": "object",
        "required": ["bytes", "filename", "mime_type", "purpose"],
        "properties": {
            "bytes": {
                "type": "integer",
                "minimum": 0,
                "maximum": MAX_UPLOAD_BYTES,
                "description": "How long the whole file will be.",
            },
            "filename": { "type": "string", "minLength": 1 },
            "mime_type": { "type": "string", "minLength": 1, "maxLength": MAX_MIME_TYPE },
            "purpose": purpose(),
            "expires_after": expires_after(),
        },
    })
}

pub(super) fn part() -> Value {
    json!({
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": { "type": "string", "contentMediaType": "application/octet-stream" },
        },
    })
}

pub(super) fn complete() -> Value {
    json!({
        "type": "object",
        "required": ["part_ids"],
        "properties": {
            "part_ids": {
                "type": "array",
                "items": { "type": "string" },
                "description": "The parts in the order of the file.",
            },
            "md5": {
                "type": ["string", "null"],
                "pattern": "^[0-9a-fA-F]{32}$",
                "description": "The MD5 sum of the whole file, to be checked.",
            },
        },
    })
}

pub(super) fn projects(most: usize) -> Value {
    json!({
        "type": "object",
        "required": ["project_ids"],
        "properties": {
            "project_ids": {
                "type": "array",
                "minItems": 1,
                "maxItems": most,
                "items": { "type": "string" },
            },
        },
    })
}

pub(super) fn name() -> Value {
    json!({ "type": "object", "required": ["name"], "properties": { "name": name_field() } })
}

fn name_field() -> Value {
    json!({
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_NAME,
        "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$",
    })
}

pub(super) fn admin_key() -> Value {
    json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": name_field(),
            "expires_in_seconds": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": MAX_LIFETIME_SECONDS,
            },
        },
    })
}

pub(super) fn grader() -> Value {
    json!({
        "type": "object", "required": ["grader"], "properties": { "grader": reference("Grader") },
    })
}

pub(super) fn graded() -> Value {
    json!({
        "type": "object",
        "required": ["grader", "model_sample"],
        "properties": {
            "grader": reference("Grader"),
            "model_sample": { "type": "string", "description": "The answer." },
            "item": { "description": "What templates call `item`." },
        },
    })
}

pub(super) fn batch() -> Value {
    let mut output_expires_after = expires_after();
    output_expires_after["description"] = json!("When the answers go by themselves.");
    json!({
        "type": "object",
        "required": ["input_file_id", "endpoint", "completion_window"],
        "properties": {
            "input_file_id": {
                "type": "string", "minLength": 1, "description": "A file of purpose `batch`.",
            },
            "endpoint": { "type": "string", "enum": ENDPOINTS },
            "completion_window": { "const": WINDOW },
            "metadata": reference("Metadata"),
            "output_expires_after": output_expires_after,
        },
    })
}

fn event_type() -> Value {
    json!({ "type": "string", "enum": words(WebhookEvent::ALL, WebhookEvent::as_str) })
}

/// The events that an endpoint may be told of.
pub(super) fn event_types() -> Value {
    json!({
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": { "const": "list" }, "data": { "type": "array", "items": event_type() },
        },
    })
}

/// A webhook endpoint, of which a new one needs all; null leaves as it is what is there.
pub(super) fn webhook_endpoint(required: &[&str]) -> Value {
    let of_type =
        |kind: &str| if required.is_empty() { json!([kind, "null"]) } else { json!(kind) };
    json!({
        "type": "object",
        "required": required,
        "properties": {
            "name": {
                "type": of_type("string"),
                "minLength": 1,
                "maxLength": webhook_endpoints::MAX_NAME,
            },
            "url": {
                "type": of_type("string"),
                "format": "uri",
                "description": "By `https`, and on the internet unless the server was told more.",
            },
            "event_types": {
                "type": of_type("array"), "minItems": 1, "items": event_type(),
            },
        },
    })
}

pub(super) fn rotation() -> Value {
    json!({
        "type": "object",
        "properties": {
            webhook_endpoints::KEEP: { "type": ["boolean", "null"], "default": false },
        },
    })
}

pub(super) fn webhook_test() -> Value {
    json!({
        "type": "object",
        "required": ["event_type"],
        "properties": { "event_type": event_type() },
    })
}

/// The reply to a DELETE.
pub(super) fn deleted(object: &str) -> Value {
    json!({
        "type": "object",
        "required": ["id", "object", "deleted"],
        "properties": {
            "id": { "type": "string" },
            "object": { "const": object },
            "deleted": { "const": true },
        },
    })
}
