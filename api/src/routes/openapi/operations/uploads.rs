//! Files that come in parts.

use super::super::operation::Operation;
use super::super::requests;
use super::{AS_BEFORE, UPLOADS, example, of};
use crate::routes::uploads::{PartObject, UploadObject};
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 4] {
    let at = |operation: Operation| {
        operation
            .at("id", example::UPLOAD, "The upload's id.")
            .errors([ErrorCode::UploadNotFound, ErrorCode::InvalidUploadState])
    };
    [
        Operation::post("/v1/uploads", (UPLOADS, "createUpload"), "Begin an upload")
            .text("An upload that is not completed within an hour ends by itself.")
            .once(AS_BEFORE)
            .body(
                requests::upload(),
                json!({
                    "bytes": 1024,
                    "filename": "rows.jsonl",
                    "mime_type": "text/jsonl",
                    "purpose": "fine-tune",
                }),
            )
            .errors([ErrorCode::InsufficientQuota])
            .reply(of::<UploadObject>(generator)),
        at(Operation::post(
            "/v1/uploads/{id}/parts",
            (UPLOADS, "addUploadPart"),
            "Add a part to an upload",
        ))
        .once(AS_BEFORE)
        .form(requests::part())
        .reply(of::<PartObject>(generator)),
        at(Operation::post(
            "/v1/uploads/{id}/complete",
            (UPLOADS, "completeUpload"),
            "Make a file of an upload's parts",
        ))
        .body(requests::complete(), json!({ "part_ids": [example::PART] }))
        .reply(of::<UploadObject>(generator)),
        at(Operation::post(
            "/v1/uploads/{id}/cancel",
            (UPLOADS, "cancelUpload"),
            "Cancel an upload",
        ))
        .reply(of::<UploadObject>(generator)),
    ]
}
