//! `/v1/fine_tuning/checkpoints/{name}/permissions`: which other projects of the organisation may
//! use a tuned model or a checkpoint.
//!
//! OpenAI asks for an admin key here. A key of the model's own project does as well: whoever holds
//! it could download the weights and hand them on.

use crate::auth::Sharer;
use crate::body::read_json;
use crate::failure::{Failure, invalid_value, missing};
use crate::fields;
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::{HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tunesmith_core::ids::{PermissionId, ProjectId};
use tunesmith_store::StoreError;
use tunesmith_store::page::{Order, PageRequest};
use tunesmith_store::permissions::Permission;

/// OpenAI's default; the maxima are ours.
pub(super) const DEFAULT_LIST: u64 = 10;
pub(super) const MAX_LIST: u64 = 1000;
pub(super) const MAX_PROJECTS: usize = 100;

/// A permission on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct PermissionObject {
    id: String,
    object: &'static str,
    created_at: i64,
    project_id: String,
}

impl From<&Permission> for PermissionObject {
    fn from(permission: &Permission) -> Self {
        Self {
            id: permission.id.to_string(),
            object: "checkpoint.permission",
            created_at: permission.created_at.unix_timestamp(),
            project_id: permission.project_id.to_string(),
        }
    }
}

/// Lets projects use the model.
pub(crate) async fn create(
    state: web::Data<AppState>,
    sharer: Sharer,
    name: web::Path<String>,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let body = read_json(payload).await?;
    let projects = fields::texts(&body.fields, "project_ids")?;
    let projects = projects.ok_or_else(|| missing("project_ids"))?;
    if !(1..=MAX_PROJECTS).contains(&projects.len()) {
        let rule = format!("a list of 1 to {MAX_PROJECTS} projects");
        return Err(invalid_value("project_ids", projects.len(), &rule).into());
    }
    let projects: Vec<ProjectId> = projects.into_iter().map(ProjectId::from).collect();
    let made = match state.store.grant_checkpoint(&sharer.0, &name, &projects).await {
        Err(StoreError::NotFound { kind: "project", id }) => {
            let rule = "a list of ids of projects of this organisation";
            return Err(invalid_value("project_ids", id, rule).into());
        }
        made => made?,
    };
    let permissions = made.iter().map(PermissionObject::from).collect();
    let page = Page::new(permissions, false, |permission: &PermissionObject| &permission.id);
    Ok(body.reply(&["project_ids"]).json(page))
}

/// Who may use the model.
pub(crate) async fn list(
    state: web::Data<AppState>,
    sharer: Sharer,
    name: web::Path<String>,
    query: Query,
) -> Result<web::Json<Page<PermissionObject>>, Failure> {
    let order = match query.word("order", &["descending", "ascending"])? {
        "ascending" => Order::Ascending,
        _ => Order::Descending,
    };
    let request = PageRequest { order, ..query.page(DEFAULT_LIST, MAX_LIST)? };
    let project = query.text("project_id").map(ProjectId::from);
    let page = state
        .store
        .list_checkpoint_permissions(&sharer.0, &name, project.as_ref(), &request)
        .await?;
    let permissions = page.items.iter().map(PermissionObject::from).collect();
    Ok(web::Json(Page::new(permissions, page.has_more, |permission| &permission.id)))
}

/// Takes a permission back.
pub(crate) async fn delete(
    state: web::Data<AppState>,
    sharer: Sharer,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Failure> {
    let (name, id) = path.into_inner();
    let id = PermissionId::from(id);
    state.store.revoke_checkpoint_permission(&sharer.0, &name, &id).await?;
    Ok(HttpResponse::Ok().json(json!({
        "id": id, "object": "checkpoint.permission", "deleted": true
    })))
}

#[cfg(test)]
mod tests {
    use crate::testing::TestApi;
    use insta::assert_json_snapshot;
    use serde_json::{Value, json};
    use tunesmith_core::ids::ProjectId;

    async fn model(api: &TestApi) -> String {
        let job = api.succeeded_job(json!({"n_epochs": 1})).await;
        job["fine_tuned_model"].as_str().expect("name").to_owned()
    }

    /// Another project of the same organisation: its id and a key to it.
    async fn sibling(api: &TestApi, name: &str) -> (ProjectId, String) {
        let project = api.store.create_project("tunesmith", name).await.expect("project");
        let key = api.store.create_api_key(&project, "test").await.expect("key").secret;
        (project, key)
    }

    #[tokio::test]
    async fn a_project_sees_a_model_for_as_long_as_it_has_leave() {
        let api = TestApi::start().await.with_base_model().await;
        let name = model(&api).await;
        let (project, key) = sibling(&api, "sibling").await;
        let sibling = api.client_with(Some(key));
        let seen = format!("/v1/models/{name}");
        sibling.get(&seen).await.error(404);

        let path = format!("/v1/fine_tuning/checkpoints/{name}/permissions");
        let made = api.post(&path, &json!({"project_ids": [project]})).await.ok();
        assert_json_snapshot!(made["data"], {
            "[].id" => "[id]", "[].created_at" => "[time]", "[].project_id" => "[project]"
        }, @r#"
        [
          {
            "id": "[id]",
            "object": "checkpoint.permission",
            "created_at": "[time]",
            "project_id": "[project]"
          }
        ]
        "#);
        assert_eq!(made["has_more"], false);
        assert_eq!(sibling.get(&seen).await.ok()["id"], name);
        assert_eq!(sibling.get(&format!("{seen}/weights")).await.status, 200);
        // To use it is not to own it.
        sibling.delete(&seen).await.error(404);
        sibling.get(&path).await.error(404);
        let again = api.post(&path, &json!({"project_ids": [project]})).await.ok();
        assert_eq!(again["data"], made["data"], "asked twice, there is one permission");
        assert_eq!(api.get(&path).await.ok()["data"], made["data"]);

        let id = made["data"][0]["id"].as_str().expect("id");
        let gone = api.delete(&format!("{path}/{id}")).await.ok();
        assert_eq!(gone, json!({"id": id, "object": "checkpoint.permission", "deleted": true}));
        sibling.get(&seen).await.error(404);
        let error = api.delete(&format!("{path}/{id}")).await.error(404);
        assert_eq!(error["code"], "permission_not_found");
    }

    #[tokio::test]
    async fn permissions_are_listed_in_pages_in_either_order_and_by_project() {
        let api = TestApi::start().await.with_base_model().await;
        let name = model(&api).await;
        let path = format!("/v1/fine_tuning/checkpoints/{name}/permissions");
        let mut projects = Vec::new();
        for sibling_name in ["a", "b", "c"] {
            projects.push(sibling(&api, sibling_name).await.0.to_string());
        }
        api.post(&path, &json!({"project_ids": projects})).await.ok();
        let ids = |page: &Value| -> Vec<String> {
            let data = page["data"].as_array().expect("data");
            data.iter().map(|it| it["project_id"].as_str().expect("id").to_owned()).collect()
        };
        let newest = api.get(&format!("{path}?limit=2")).await.ok();
        assert_eq!(ids(&newest), [projects[2].clone(), projects[1].clone()]);
        assert_eq!(newest["has_more"], true);
        let after = newest["last_id"].as_str().expect("id");
        let rest = api.get(&format!("{path}?after={after}")).await.ok();
        assert_eq!((ids(&rest), &rest["has_more"]), (vec![projects[0].clone()], &json!(false)));
        assert_eq!(ids(&api.get(&format!("{path}?order=ascending")).await.ok()), projects);
        let one = api.get(&format!("{path}?project_id={}", projects[1])).await.ok();
        assert_eq!(ids(&one), [projects[1].clone()]);
    }

    #[tokio::test]
    async fn nobody_shares_what_is_not_theirs_nor_with_another_organisation() {
        let api = TestApi::start().await.with_base_model().await;
        let name = model(&api).await;
        let path = format!("/v1/fine_tuning/checkpoints/{name}/permissions");
        let foreign = api.store.create_project("other", "far").await.expect("project");
        let error = api.post(&path, &json!({"project_ids": [foreign]})).await.error(400);
        assert_eq!(error["param"], "project_ids");
        api.post(&path, &json!({"project_ids": []})).await.error(400);
        assert_eq!(api.get(&path).await.ok()["data"], json!([]));
        let stranger = api.stranger().await;
        let error = stranger.post(&path, &json!({"project_ids": [foreign]})).await.error(404);
        assert_eq!(error["code"], "no_such_model");
        let organization = api.store.create_organization("tunesmith").await.expect("there");
        let admin = api.store.create_admin_key(&organization, "a", None).await.expect("key");
        let admin = api.client_with(Some(admin.secret));
        let (project, _) = sibling(&api, "sibling").await;
        admin.post(&path, &json!({"project_ids": [project]})).await.ok();
        let other = api.store.create_organization("other").await.expect("there");
        let other = api.store.create_admin_key(&other, "a", None).await.expect("key");
        api.client_with(Some(other.secret)).get(&path).await.error(404);
    }
}
