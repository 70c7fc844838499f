//! Who may use a tuned model.

use super::super::operation::{Access, Operation};
use super::super::requests::{self, deleted};
use super::{PERMISSIONS, example, of, order};
use crate::page::Page;
use crate::routes::checkpoint_permissions::{self, PermissionObject};
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 3] {
    const PATH: &str = "/v1/fine_tuning/checkpoints/{name}/permissions";
    let at = |operation: Operation| {
        operation
            .at("name", example::TUNED, "The name of a tuned model or of a checkpoint.")
            .access(Access::ProjectOrAdmin)
            .errors([ErrorCode::NoSuchModel])
    };
    [
        at(Operation::get(PATH, (PERMISSIONS, "listPermissions"), "Who may use a model"))
            .query("project_id", json!({ "type": "string" }), "Only this project's.")
            .query("order", order("descending", "ascending"), "By the time they were given.")
            .page(checkpoint_permissions::DEFAULT_LIST, checkpoint_permissions::MAX_LIST)
            .reply(of::<Page<PermissionObject>>(generator)),
        at(Operation::post(
            PATH,
            (PERMISSIONS, "createPermissions"),
            "Let projects of the organisation use a model",
        ))
        .body(
            requests::projects(checkpoint_permissions::MAX_PROJECTS),
            json!({ "project_ids": [example::PROJECT] }),
        )
        .reply(of::<Page<PermissionObject>>(generator)),
        at(Operation::delete(
            "/v1/fine_tuning/checkpoints/{name}/permissions/{permission}",
            (PERMISSIONS, "deletePermission"),
            "Take a permission back",
        ))
        .at("permission", example::PERMISSION, "The permission's id.")
        .errors([ErrorCode::PermissionNotFound])
        .reply(deleted("checkpoint.permission")),
    ]
}
