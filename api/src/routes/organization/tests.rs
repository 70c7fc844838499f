use crate::testing::{Client, TestApi};
use serde_json::{Value, json};

const PROJECTS: &str = "/v1/organization/projects";
const ADMIN_KEYS: &str = "/v1/organization/admin_api_keys";

async fn admin_of(api: &TestApi, organization: &str) -> Client {
    let organization = api.store.create_organization(organization).await.expect("organization");
    let key = api.store.create_admin_key(&organization, "test", None).await.expect("key");
    api.client_with(Some(key.secret))
}

fn ids(page: &Value) -> Vec<String> {
    let data = page["data"].as_array().expect("data");
    data.iter().map(|item| item["id"].as_str().expect("id").to_owned()).collect()
}

#[tokio::test]
async fn a_project_is_made_renamed_and_archived_and_then_its_keys_open_nothing() {
    let api = TestApi::start().await;
    let admin = admin_of(&api, "tunesmith").await;
    let made = admin.post(PROJECTS, &json!({"name": "search"})).await.ok();
    assert_eq!(
        (&made["object"], &made["status"], &made["archived_at"]),
        (&json!("organization.project"), &json!("active"), &json!(null))
    );
    let id = made["id"].as_str().expect("id");
    let again = admin.post(PROJECTS, &json!({"name": "search"})).await.ok();
    assert_eq!(again, made, "one project a name");
    let path = format!("{PROJECTS}/{id}");
    let account =
        admin.post(&format!("{path}/service_accounts"), &json!({"name": "ci"})).await.ok();
    assert_eq!(account["object"], "organization.project.service_account");
    let member = api.client_with(account["api_key"]["value"].as_str().map(str::to_owned));
    member.get("/v1/files").await.ok();

    assert_eq!(admin.post(&path, &json!({"name": "find"})).await.ok()["name"], "find");
    let taken = admin.post(&path, &json!({"name": "default"})).await.error(400);
    assert_eq!(taken["param"], "name");
    let archived = admin.post(&format!("{path}/archive"), &json!({})).await.ok();
    assert_eq!(archived["status"], "archived");
    assert!(archived["archived_at"].is_i64());
    member.get("/v1/files").await.error(401);
    assert!(!ids(&admin.get(PROJECTS).await.ok()).contains(&id.to_owned()));
    let all = admin.get(&format!("{PROJECTS}?include_archived=true&limit=1")).await.ok();
    assert_eq!((ids(&all), &all["has_more"]), (vec![id.to_owned()], &json!(true)));
    for body in [json!({}), json!({"name": ""}), json!({"name": "a\u{7}b"}), json!({"name": 1})] {
        assert_eq!(admin.post(PROJECTS, &body).await.error(400)["param"], "name", "{body}");
    }
}

#[tokio::test]
async fn a_projects_keys_are_listed_without_their_secrets_and_a_revoked_one_opens_nothing() {
    let api = TestApi::start().await;
    let admin = admin_of(&api, "tunesmith").await;
    let path = format!("{PROJECTS}/{}", api.project);
    let made = admin.post(&format!("{path}/service_accounts"), &json!({"name": "ci"})).await.ok();
    let secret = made["api_key"]["value"].as_str().expect("secret").to_owned();
    let keys = admin.get(&format!("{path}/api_keys")).await.ok();
    assert!(!keys.to_string().contains(&secret));
    let key = &keys["data"][0];
    assert_eq!((&key["id"], &key["name"]), (&made["id"], &json!("ci")));
    assert_eq!(key["redacted_value"], format!("sk-...{}", &secret[secret.len() - 4..]));
    assert_eq!(key["owner"]["service_account"]["id"], made["id"]);
    let one = format!("{path}/api_keys/{}", made["id"].as_str().expect("id"));
    assert_eq!(&admin.get(&one).await.ok(), key);
    let member = api.client_with(Some(secret));
    member.get("/v1/files").await.ok();
    assert_eq!(admin.delete(&one).await.ok()["object"], "organization.project.api_key.deleted");
    assert_eq!(member.get("/v1/files").await.error(401)["code"], "invalid_api_key");
    assert_eq!(admin.delete(&one).await.error(404)["code"], "api_key_not_found");
    assert_eq!(ids(&admin.get(&format!("{path}/api_keys")).await.ok()).len(), 1);
}

#[tokio::test]
async fn an_admin_key_is_shown_once_and_ends_when_it_is_deleted_or_its_time_is_over() {
    let api = TestApi::start().await;
    let admin = admin_of(&api, "tunesmith").await;
    let made =
        admin.post(ADMIN_KEYS, &json!({"name": "second", "expires_in_seconds": 1})).await.ok();
    let secret = made["value"].as_str().expect("secret").to_owned();
    assert!(secret.starts_with("sk-admin-"), "{made}");
    assert_eq!(
        made["expires_at"].as_i64().expect("time") - made["created_at"].as_i64().expect("time"),
        1
    );
    let lasting = admin.post(ADMIN_KEYS, &json!({"name": "third"})).await.ok();
    let third = api.client_with(lasting["value"].as_str().map(str::to_owned));
    let listed = third.get(ADMIN_KEYS).await.ok();
    assert_eq!(ids(&listed).len(), 3);
    assert!(!listed.to_string().contains(&secret));
    let path = format!("{ADMIN_KEYS}/{}", lasting["id"].as_str().expect("id"));
    assert_eq!(admin.get(&path).await.ok()["name"], "third");
    assert_eq!(admin.delete(&path).await.ok()["deleted"], true);
    third.get(ADMIN_KEYS).await.error(401);
    let second = api.client_with(Some(secret));
    for _ in 0..100 {
        if second.get(ADMIN_KEYS).await.status == 401 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("the key's second is over and it still works");
}

#[tokio::test]
async fn a_key_of_one_kind_does_not_do_for_the_other() {
    let api = TestApi::start().await;
    let admin = admin_of(&api, "tunesmith").await;
    assert_eq!(api.get(PROJECTS).await.error(403)["code"], "insufficient_permissions");
    for path in ["/v1/files", "/v1/fine_tuning/jobs/ftjob-none"] {
        assert_eq!(admin.get(path).await.error(403)["code"], "insufficient_permissions");
        api.client_with(None).get(path).await.error(401);
        api.client_with(Some("sk-wrong".to_owned())).get(path).await.error(401);
    }
    api.client_with(None).get(PROJECTS).await.error(401);
    api.client_with(Some("sk-admin-wrong".to_owned())).get(PROJECTS).await.error(401);
}

#[tokio::test]
async fn another_organisations_projects_and_keys_do_not_exist() {
    let api = TestApi::start().await;
    let admin = admin_of(&api, "tunesmith").await;
    let other = admin_of(&api, "other").await;
    assert_eq!(ids(&other.get(PROJECTS).await.ok()), Vec::<String>::new());
    let path = format!("{PROJECTS}/{}", api.project);
    for reply in [
        other.get(&path).await,
        other.post(&path, &json!({"name": "x"})).await,
        other.post(&format!("{path}/archive"), &json!({})).await,
        other.get(&format!("{path}/api_keys")).await,
        other.post(&format!("{path}/service_accounts"), &json!({"name": "x"})).await,
    ] {
        assert_eq!(reply.error(404)["code"], "project_not_found");
    }
    let key = ids(&admin.get(ADMIN_KEYS).await.ok()).remove(0);
    other.delete(&format!("{ADMIN_KEYS}/{key}")).await.error(404);
    admin.get(&path).await.ok();
}
