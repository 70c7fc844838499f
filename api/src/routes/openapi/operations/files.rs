//! Files, and reports on them.

use super::super::operation::Operation;
use super::super::requests::{self, deleted};
use super::{AS_BEFORE, FILES, example, expires_in, flag, of, order};
use crate::page::Page;
use crate::routes::files::{self, FileObject};
use schemars::{JsonSchema as _, SchemaGenerator};
use serde_json::{Value, json};
use tunesmith_core::dataset::FileReport;
use tunesmith_core::errors::ErrorCode;

/// A report that is made, or that could not be.
fn file_report(generator: &mut SchemaGenerator) -> Value {
    let about = |status: &str| {
        json!({
            "object": { "const": "file.report" },
            "file_id": { "type": "string" },
            "status": { "const": status },
        })
    };
    let required = ["object", "file_id", "status"];
    let mut properties = about("completed");
    properties["created_at"] = json!({ "type": "integer" });
    let mut done = json!({ "type": "object", "required": required, "properties": properties });
    let found = FileReport::json_schema(generator).to_value();
    if let (Some(all), Some(found)) =
        (done["properties"].as_object_mut(), found["properties"].as_object())
    {
        all.extend(found.clone());
    }
    if let (Some(all), Some(found)) =
        (done["required"].as_array_mut(), found["required"].as_array())
    {
        all.push(json!("created_at"));
        all.extend(found.clone());
    }
    let mut properties = about("failed");
    properties["error"] = json!({ "type": "string", "description": "What to do about it." });
    let required = ["object", "file_id", "status", "error"];
    let failed = json!({ "type": "object", "required": required, "properties": properties });
    json!({ "oneOf": [done, failed] })
}

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 6] {
    const FILE: (&str, &str) = ("id", "The file's id.");
    let at = |operation: Operation| {
        operation.at(FILE.0, example::FILE, FILE.1).errors([ErrorCode::FileNotFound])
    };
    [
        Operation::get("/v1/files", (FILES, "listFiles"), "List files")
            .query("purpose", json!({ "type": "string" }), "Only files of this purpose.")
            .query("order", order("desc", "asc"), "By the time at which they were made.")
            .page(files::MAX_LIST, files::MAX_LIST)
            .reply(of::<Page<FileObject>>(generator)),
        Operation::post("/v1/files", (FILES, "createFile"), "Upload a file")
            .once(AS_BEFORE)
            .form(requests::file())
            .errors([ErrorCode::InsufficientQuota])
            .reply(of::<FileObject>(generator)),
        at(Operation::get("/v1/files/{id}", (FILES, "retrieveFile"), "Retrieve a file"))
            .reply(of::<FileObject>(generator)),
        at(Operation::delete("/v1/files/{id}", (FILES, "deleteFile"), "Delete a file"))
            .errors([ErrorCode::FileInUse])
            .reply(deleted("file")),
        at(Operation::get(
            "/v1/files/{id}/content",
            (FILES, "downloadFile"),
            "Download a file's content",
        ))
        .query(
            "redirect",
            flag(),
            "Whether to answer with 307 and an address at the object store, where it signs such: \
             whoever has it reads the file, until it runs out.",
        )
        .query("expires_in", expires_in(), "Seconds until the address of `redirect` runs out.")
        .errors([ErrorCode::UnsupportedParameter])
        .parts("application/octet-stream"),
        at(Operation::get(
            "/v1/files/{id}/report",
            (FILES, "reportFile"),
            "What a file to train on is found to be",
        ))
        .text("Of files of purpose `fine-tune`. A report that is not made yet is asked for.")
        .query(
            "model",
            json!({ "type": "string" }),
            "The base model that tokens are counted for; the one that was imported first where \
             none is given.",
        )
        .errors([ErrorCode::ModelNotFound])
        .reply(file_report(generator))
        .content(
            202,
            "application/json",
            json!({
                "type": "object",
                "required": ["object", "file_id", "status"],
                "properties": {
                    "object": { "const": "file.report" },
                    "file_id": { "type": "string" },
                    "status": { "const": "in_progress" },
                },
            }),
        ),
    ]
}
