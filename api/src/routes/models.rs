//! `/v1/models`: the base models of the installation and the tuned ones of the caller's project.

use crate::auth::Authenticated;
use crate::failure::{Failure, no_such_model};
use crate::page::Page;
use crate::server::AppState;
use actix_web::{HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_store::StoreError;
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::models::Model;

/// The owner of base models: they belong to the installation.
const INSTALLATION: &str = "tunesmith";

/// A model on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ModelObject {
    id: String,
    object: &'static str,
    created: i64,
    owned_by: String,
}

impl From<&Model> for ModelObject {
    fn from(model: &Model) -> Self {
        Self {
            id: model.name.clone(),
            object: "model",
            created: model.created_at.unix_timestamp(),
            owned_by: model.organization_id.to_string(),
        }
    }
}

impl From<&BaseModel> for ModelObject {
    fn from(model: &BaseModel) -> Self {
        Self {
            id: model.name.clone(),
            object: "model",
            created: model.created_at.unix_timestamp(),
            owned_by: INSTALLATION.to_owned(),
        }
    }
}

/// `GET /v1/models`: all of them; OpenAI's clients ask for no pages here.
pub(crate) async fn list(
    state: web::Data<AppState>,
    caller: Authenticated,
) -> Result<web::Json<Page<ModelObject>>, Failure> {
    let base = state.store.list_base_models().await?;
    let tuned = state.store.list_models(&caller.project_id).await?;
    // Names that stand for a base model that is there are models like any other.
    let aliases = state.model_aliases.iter().filter_map(|(alias, target)| {
        let target = base.iter().find(|model| model.name == *target)?;
        Some(ModelObject { id: alias.clone(), ..ModelObject::from(target) })
    });
    let models = base
        .iter()
        .map(ModelObject::from)
        .chain(aliases)
        .chain(tuned.iter().map(ModelObject::from))
        .collect();
    Ok(web::Json(Page::new(models, false, |model| &model.id)))
}

/// `GET /v1/models/{name}`: also a checkpoint by its model name.
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    caller: Authenticated,
    name: web::Path<String>,
) -> Result<web::Json<ModelObject>, Failure> {
    let model = match state.store.model(&caller.project_id, &name).await {
        Err(StoreError::NotFound { .. }) => ModelObject::from(&base_model(&state, &name).await?),
        found => ModelObject::from(&found?),
    };
    Ok(web::Json(model))
}

/// `DELETE /v1/models/{name}`: a tuned model or a checkpoint.
pub(crate) async fn delete(
    state: web::Data<AppState>,
    caller: Authenticated,
    name: web::Path<String>,
) -> Result<HttpResponse, Failure> {
    match state.store.delete_model(&caller.project_id, &name).await {
        Err(StoreError::NotFound { .. }) => {
            let base = base_model(&state, &name).await?;
            Err(ApiError::new(
                ErrorCode::InvalidValue,
                format!(
                    "The model '{}' is a base model, which every project shares. Only tuned \
                     models can be deleted here.",
                    base.name
                ),
            )
            .with_param("model")
            .into())
        }
        deleted => {
            deleted?;
            let name = name.into_inner();
            Ok(HttpResponse::Ok().json(json!({ "id": name, "object": "model", "deleted": true })))
        }
    }
}

/// The base model that a path names, by the name that the path gives it.
pub(crate) async fn base_model(state: &AppState, name: &str) -> Result<BaseModel, Failure> {
    match state.store.base_model(state.base_model_name(name)).await {
        Err(StoreError::NotFound { .. }) => Err(no_such_model(name).into()),
        found => Ok(BaseModel { name: name.to_owned(), ..found? }),
    }
}

#[cfg(test)]
mod tests;
