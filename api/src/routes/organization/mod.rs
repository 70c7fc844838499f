//! `/v1/organization`: projects and keys, for whoever has an admin key.

pub(super) mod admin_keys;
pub(super) mod project_keys;
pub(super) mod projects;

use crate::failure::invalid_value;
use crate::fields;
use crate::routes::path;
use actix_web::web::ServiceConfig;
use serde_json::{Map, Value};
use tunesmith_core::errors::ApiError;

/// OpenAI's limits of lists here.
pub(super) const DEFAULT_LIST: u64 = 20;
pub(super) const MAX_LIST: u64 = 100;
pub(super) const MAX_NAME: usize = 255;

/// The paths of this group.
pub(crate) fn configure(config: &mut ServiceConfig) {
    const PROJECT: &str = "/v1/organization/projects/{project}";
    config
        .service(path("/v1/organization/projects").get(projects::list).post(projects::create))
        .service(path(PROJECT).get(projects::retrieve).post(projects::rename))
        .service(path(&format!("{PROJECT}/archive")).post(projects::archive))
        .service(path(&format!("{PROJECT}/service_accounts")).post(project_keys::create))
        .service(path(&format!("{PROJECT}/api_keys")).get(project_keys::list))
        .service(
            path(&format!("{PROJECT}/api_keys/{{key}}"))
                .get(project_keys::retrieve)
                .delete(project_keys::delete),
        )
        .service(
            path("/v1/organization/admin_api_keys").get(admin_keys::list).post(admin_keys::create),
        )
        .service(
            path("/v1/organization/admin_api_keys/{key}")
                .get(admin_keys::retrieve)
                .delete(admin_keys::delete),
        );
}

/// The field `name`, which a person reads.
fn name(fields: &Map<String, Value>) -> Result<String, ApiError> {
    let name = fields::required(fields, "name")?;
    if name.chars().count() > MAX_NAME || name.chars().any(char::is_control) {
        let rule = format!("1 to {MAX_NAME} characters, none of them a control character");
        return Err(invalid_value("name", "not as it should be", &rule));
    }
    Ok(name)
}

#[cfg(test)]
mod tests;
