//! What tells a request that makes something from its own retry.

use crate::failure::invalid_value;
use actix_web::HttpRequest;
use tunesmith_core::errors::ApiError;
use tunesmith_store::idempotency::Idempotency;

/// The standard header of a client that names its own request.
pub(crate) const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// How often the OpenAI SDKs have sent the request before; they send no idempotency key.
const X_STAINLESS_RETRY_COUNT: &str = "x-stainless-retry-count";
pub(crate) const MAX_IDEMPOTENCY_KEY: usize = 255;

/// What tells the request from its own retry; `request_sha256` is the SHA-256 of what it asks for.
///
/// # Errors
/// `invalid_value` for an `Idempotency-Key` that is none.
pub(crate) fn idempotency(
    request: &HttpRequest,
    request_sha256: [u8; 32],
) -> Result<Idempotency, ApiError> {
    let header = |name: &str| request.headers().get(name);
    let key = match header(IDEMPOTENCY_KEY) {
        None => None,
        Some(value) => Some(
            value
                .to_str()
                .ok()
                .filter(|key| (1..=MAX_IDEMPOTENCY_KEY).contains(&key.len()))
                .ok_or_else(|| {
                    let rule = format!("1 to {MAX_IDEMPOTENCY_KEY} characters of ASCII");
                    invalid_value("Idempotency-Key", "the header", &rule)
                })?
                .to_owned(),
        ),
    };
    let retries = header(X_STAINLESS_RETRY_COUNT).and_then(|value| value.to_str().ok());
    let is_retry = retries.and_then(|text| text.parse::<u32>().ok()).is_some_and(|count| count > 0);
    Ok(Idempotency { key, is_retry, request_sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Client, Reply, TestApi};
    use reqwest::{Method, multipart};
    use serde_json::{Value, json};

    async fn post(client: &Client, path: &str, key: &str, body: &Value) -> Reply {
        let request = client.request(Method::POST, path).header(IDEMPOTENCY_KEY, key);
        Reply::of(request.json(body)).await
    }

    async fn post_file(api: &TestApi, header: (&str, &str), content: &'static str) -> Reply {
        let file = multipart::Part::bytes(content.as_bytes()).file_name("requests.jsonl");
        let form = multipart::Form::new().text("purpose", "batch").part("file", file);
        let request = api.request(Method::POST, "/v1/files").header(header.0, header.1);
        Reply::of(request.multipart(form)).await
    }

    #[tokio::test]
    async fn the_same_key_with_the_same_body_gives_what_was_made_the_first_time() {
        let api = TestApi::start().await;
        let key = (IDEMPOTENCY_KEY, "a file");
        let file = post_file(&api, key, "{}\n").await.ok();
        assert_eq!(post_file(&api, key, "{}\n").await.ok(), file);
        let other = post_file(&api, key, "{ }\n").await;
        assert_eq!(other.error(400)["code"], "idempotency_conflict");
        assert_eq!(other.header("x-should-retry"), Some("false"));
        assert_eq!(api.get("/v1/files").await.ok()["data"], json!([file]));

        for (path, body) in [
            (
                "/v1/uploads",
                json!({"bytes": 5, "filename": "a", "mime_type": "text/plain",
                       "purpose": "user_data"}),
            ),
            (
                "/v1/batches",
                json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions",
                       "completion_window": "24h"}),
            ),
            (
                "/v1/webhook_endpoints",
                json!({"name": "a", "url": "https://example.com/hook",
                       "event_types": ["fine_tuning.job.failed"]}),
            ),
        ] {
            let made = post(&api, path, path, &body).await.ok();
            assert_eq!(post(&api, path, path, &body).await.ok(), made, "{path}");
            let mut other = body.clone();
            other["nobody_reads_this"] = json!(1);
            let other = post(&api, path, path, &other).await.error(400);
            assert_eq!(other["code"], "idempotency_conflict", "{path}");
            let another = post(&api, path, &format!("another {path}"), &body).await.ok();
            assert_ne!(another["id"], made["id"], "{path}");
            let long = post(&api, path, &"k".repeat(MAX_IDEMPOTENCY_KEY + 1), &body).await;
            assert_eq!(long.error(400)["param"], "Idempotency-Key", "{path}");
        }
    }

    #[tokio::test]
    async fn parts_and_new_secrets_are_made_once_for_a_key() {
        let api = TestApi::start().await;
        let new = json!({"bytes": 5, "filename": "a", "mime_type": "text/plain",
                         "purpose": "user_data"});
        let upload = api.post("/v1/uploads", &new).await.ok();
        let parts = format!("/v1/uploads/{}/parts", upload["id"].as_str().expect("id"));
        let send = async |key: &str, content: &'static str| {
            let form =
                multipart::Form::new().part("data", multipart::Part::bytes(content.as_bytes()));
            let request = api.request(Method::POST, &parts).header(IDEMPOTENCY_KEY, key);
            Reply::of(request.multipart(form)).await
        };
        let part = send("part", "12345").await.ok();
        assert_eq!(send("part", "12345").await.ok(), part);
        assert_eq!(send("part", "54321").await.error(400)["code"], "idempotency_conflict");
        assert_ne!(send("another part", "12345").await.ok()["id"], part["id"]);
        assert_eq!(send("", "12345").await.error(400)["param"], "Idempotency-Key");

        let new = json!({"name": "a", "url": "https://example.com/hook",
                         "event_types": ["fine_tuning.job.failed"]});
        let endpoint = api.post("/v1/webhook_endpoints", &new).await.ok();
        let id = endpoint["id"].as_str().expect("id");
        let rotate = format!("/v1/webhook_endpoints/{id}/rotate_secret");
        let rotated = post(&api, &rotate, "rotation", &json!({})).await.ok();
        assert_ne!(rotated["signing_secret"], endpoint["signing_secret"]);
        assert_eq!(post(&api, &rotate, "rotation", &json!({})).await.ok(), rotated);
        let other =
            post(&api, &rotate, "rotation", &json!({"keep_old_secret_active_for_24_hours": true}))
                .await;
        assert_eq!(other.error(400)["code"], "idempotency_conflict");
    }

    #[tokio::test]
    async fn a_file_that_the_sdk_sends_again_is_one_file() {
        let api = TestApi::start().await;
        let sent = |count| {
            let api = &api;
            async move { post_file(api, (X_STAINLESS_RETRY_COUNT, count), "{}\n").await.ok() }
        };
        let first = sent("0").await;
        assert_eq!(sent("1").await, first);
        assert_ne!(sent("0").await["id"], first["id"]);
    }

    #[tokio::test]
    async fn a_repeated_request_for_a_key_is_refused_and_names_the_key() {
        let api = TestApi::start().await;
        let organization = api.store.create_organization("tunesmith").await.expect("organization");
        let admin = api.store.create_admin_key(&organization, "test", None).await.expect("key");
        let admin = api.client_with(Some(admin.secret));
        let projects = "/v1/organization/projects";
        let accounts = |project: &Value| {
            format!("{projects}/{}/service_accounts", project["id"].as_str().expect("id"))
        };
        let first = accounts(&admin.post(projects, &json!({"name": "one"})).await.ok());
        let second = accounts(&admin.post(projects, &json!({"name": "two"})).await.ok());
        let body = json!({"name": "ci"});
        for (path, key) in [(first.as_str(), "p"), ("/v1/organization/admin_api_keys", "a")] {
            let made = post(&admin, path, key, &body).await.ok();
            let again = post(&admin, path, key, &body).await;
            let error = again.error(400);
            assert_eq!(error["code"], "secret_already_shown");
            assert_eq!(again.header("x-should-retry"), Some("false"));
            let message = error["message"].as_str().expect("text");
            assert!(message.contains(made["id"].as_str().expect("id")), "{message}");
        }
        // The same body is another wish in another project.
        let other = post(&admin, &second, "p", &body).await.error(400);
        assert_eq!(other["code"], "idempotency_conflict");
    }
}
