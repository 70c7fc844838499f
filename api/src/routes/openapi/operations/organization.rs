//! Projects and keys.

use super::super::operation::{Access, Operation};
use super::super::requests::{self, deleted};
use super::{ORGANIZATION, REFUSED, example, flag, of};
use crate::page::Page;
use crate::routes::organization;
use crate::routes::organization::admin_keys::KeyObject as AdminKeyObject;
use crate::routes::organization::project_keys::KeyObject as ProjectKeyObject;
use crate::routes::organization::projects::ProjectObject;
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

fn admin(operation: Operation) -> Operation {
    operation.access(Access::Admin)
}

pub(super) fn of_projects(generator: &mut SchemaGenerator) -> [Operation; 9] {
    const PROJECT: &str = "/v1/organization/projects/{project}";
    const KEY: &str = "/v1/organization/projects/{project}/api_keys/{key}";
    let at = |operation: Operation| {
        admin(operation)
            .at("project", example::PROJECT, "The project's id.")
            .errors([ErrorCode::ProjectNotFound])
    };
    let at_key = |operation: Operation| {
        at(operation).at("key", example::KEY, "The key's id.").errors([ErrorCode::ApiKeyNotFound])
    };
    let project = of::<ProjectObject>(generator);
    [
        admin(Operation::get(
            "/v1/organization/projects",
            (ORGANIZATION, "listProjects"),
            "List projects",
        ))
        .query("include_archived", flag(), "Whether archived ones are shown too.")
        .page(organization::DEFAULT_LIST, organization::MAX_LIST)
        .reply(of::<Page<ProjectObject>>(generator)),
        admin(Operation::post(
            "/v1/organization/projects",
            (ORGANIZATION, "createProject"),
            "Make a project, or give the one that has the name",
        ))
        .body(requests::name(), json!({ "name": "search" }))
        .reply(project.clone()),
        at(Operation::get(PROJECT, (ORGANIZATION, "retrieveProject"), "Retrieve a project"))
            .reply(project.clone()),
        at(Operation::post(PROJECT, (ORGANIZATION, "renameProject"), "Rename a project"))
            .body(requests::name(), json!({ "name": "search and find" }))
            .reply(project.clone()),
        at(Operation::post(
            "/v1/organization/projects/{project}/archive",
            (ORGANIZATION, "archiveProject"),
            "Archive a project",
        ))
        .text("Its keys open nothing any more.")
        .reply(project),
        at(Operation::post(
            "/v1/organization/projects/{project}/service_accounts",
            (ORGANIZATION, "createServiceAccount"),
            "Make a key to a project",
        ))
        .text("The secret is shown here and never again.")
        .once(REFUSED)
        .errors([ErrorCode::SecretAlreadyShown])
        .body(requests::name(), json!({ "name": "ci" }))
        .reply(json!({
            "type": "object",
            "required": ["id", "object", "name", "role", "created_at", "api_key"],
            "properties": {
                "id": { "type": "string" },
                "object": { "const": "organization.project.service_account" },
                "name": { "type": "string" },
                "role": { "type": "string" },
                "created_at": { "type": "integer" },
                "api_key": {
                    "type": "object",
                    "required": ["id", "object", "name", "created_at", "value"],
                    "properties": {
                        "id": { "type": "string" },
                        "object": { "type": "string" },
                        "name": { "type": "string" },
                        "created_at": { "type": "integer" },
                        "value": { "type": "string", "description": "The secret." },
                    },
                },
            },
        })),
        at(Operation::get(
            "/v1/organization/projects/{project}/api_keys",
            (ORGANIZATION, "listProjectKeys"),
            "List a project's keys",
        ))
        .page(organization::DEFAULT_LIST, organization::MAX_LIST)
        .reply(of::<Page<ProjectKeyObject>>(generator)),
        at_key(Operation::get(KEY, (ORGANIZATION, "retrieveProjectKey"), "Retrieve a key"))
            .reply(of::<ProjectKeyObject>(generator)),
        at_key(Operation::delete(KEY, (ORGANIZATION, "deleteProjectKey"), "Revoke a key"))
            .reply(deleted("organization.project.api_key.deleted")),
    ]
}

pub(super) fn of_admin_keys(generator: &mut SchemaGenerator) -> [Operation; 4] {
    const KEYS: &str = "/v1/organization/admin_api_keys";
    const KEY: &str = "/v1/organization/admin_api_keys/{key}";
    let at = |operation: Operation| {
        admin(operation)
            .at("key", example::ADMIN_KEY, "The admin key's id.")
            .errors([ErrorCode::ApiKeyNotFound])
    };
    [
        admin(Operation::get(KEYS, (ORGANIZATION, "listAdminKeys"), "List admin keys"))
            .page(organization::DEFAULT_LIST, organization::MAX_LIST)
            .reply(of::<Page<AdminKeyObject>>(generator)),
        admin(Operation::post(KEYS, (ORGANIZATION, "createAdminKey"), "Make an admin key"))
            .text("The secret is shown here and never again.")
            .once(REFUSED)
            .errors([ErrorCode::SecretAlreadyShown])
            .body(requests::admin_key(), json!({ "name": "ops", "expires_in_seconds": 86_400 }))
            .reply(of::<AdminKeyObject>(generator)),
        at(Operation::get(KEY, (ORGANIZATION, "retrieveAdminKey"), "Retrieve an admin key"))
            .reply(of::<AdminKeyObject>(generator)),
        at(Operation::delete(KEY, (ORGANIZATION, "deleteAdminKey"), "Revoke an admin key"))
            .reply(deleted("organization.admin_api_key.deleted")),
    ]
}
