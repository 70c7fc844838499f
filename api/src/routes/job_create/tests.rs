use crate::testing::{BASE, Reply, TestApi, chat_rows};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

const JOBS: &str = "/v1/fine_tuning/jobs";

impl TestApi {
    /// A server, a base model and a file to train on.
    async fn ready() -> (Self, String) {
        let api = Self::start().await.with_base_model().await;
        let file = api.upload(chat_rows(10)).await;
        (api, file)
    }

    async fn create_with(&self, headers: &[(&str, &str)], body: &Value) -> Reply {
        let mut request = self.request(Method::POST, JOBS).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Reply::of(request).await
    }

    async fn count_jobs(&self) -> usize {
        self.get(JOBS).await.ok()["data"].as_array().expect("data").len()
    }
}

#[tokio::test]
async fn a_bad_key_is_a_401() {
    let api = TestApi::start().await;
    for key in [None, Some("sk-wrong-wrong-wrong-7890".to_owned())] {
        let error = api.client_with(key.clone()).get(JOBS).await.error(401);
        assert_eq!(error["code"], "invalid_api_key");
        let shows_key = error.to_string().contains("sk-wrong-wrong");
        assert!(!shows_key, "{error}");
        if key.is_some() {
            let message = error["message"].as_str().expect("message");
            assert!(message.starts_with("Incorrect API key provided: sk-****7890."), "{message}");
        }
    }
}

#[tokio::test]
async fn an_unknown_model_is_answered_with_the_models_there_are() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": "gpt-x", "training_file": file});
    assert_eq!(
        api.post(JOBS, &body).await.error(400),
        json!({
            "message": "Model gpt-x is not available for fine-tuning or does not exist. \
                        Available models: tiny, and the tuned models of your project.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        })
    );
    assert_eq!(api.count_jobs().await, 0);
}

#[tokio::test]
async fn a_file_that_is_not_there_or_not_the_callers_is_a_404() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": "file-none"});
    let error = api.post(JOBS, &body).await.error(404);
    assert_eq!(error["message"], "No such File object: file-none");
    assert_eq!(error["param"], "training_file");
    let body = json!({"model": BASE, "training_file": file, "validation_file": "file-none"});
    assert_eq!(api.post(JOBS, &body).await.error(404)["param"], "validation_file");
    let body = json!({"model": BASE, "training_file": file});
    let error = api.stranger().await.post(JOBS, &body).await.error(404);
    assert_eq!(error["message"], format!("No such File object: {file}"));
}

#[tokio::test]
async fn a_file_for_something_else_is_refused() {
    let (api, _) = TestApi::ready().await;
    let form = Form::new().text("purpose", "batch").part("file", Part::bytes(&b"a"[..]));
    let id = api.post_form(form).await.ok()["id"].clone();
    let error = api.post(JOBS, &json!({"model": BASE, "training_file": id})).await.error(400);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("invalid_value"), &json!("training_file"))
    );
}

#[tokio::test]
async fn a_body_that_is_no_json_object_is_a_400() {
    let (api, _) = TestApi::ready().await;
    for body in ["{\"model\": ", "[]", "", "model=tiny"] {
        let request = api.request(Method::POST, JOBS).body(body);
        assert_eq!(Reply::of(request).await.error(400)["code"], "invalid_body", "{body}");
    }
    let request = api.request(Method::POST, JOBS).body(vec![b' '; 2 << 20]);
    assert_eq!(Reply::of(request).await.error(413)["code"], "payload_too_large");
}

#[tokio::test]
async fn a_wrong_hyperparameter_names_parameter_value_and_range() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file, "method": {
        "type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 51}}}});
    assert_eq!(
        api.post(JOBS, &body).await.error(400),
        json!({
            "message": "Invalid value for 'n_epochs': 51. It must be \"auto\" or a whole number \
                        between 1 and 50.",
            "type": "invalid_request_error",
            "param": "method.supervised.hyperparameters.n_epochs",
            "code": "invalid_value",
        })
    );
}

#[tokio::test]
async fn a_retry_of_a_request_that_got_through_makes_no_second_job() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file});
    let first = api.create_with(&[("x-stainless-retry-count", "0")], &body).await.ok();
    for count in ["1", "2"] {
        let again = api.create_with(&[("x-stainless-retry-count", count)], &body).await.ok();
        assert_eq!(again["id"], first["id"]);
    }
    assert_eq!(api.count_jobs().await, 1);
}

#[tokio::test]
async fn retries_that_overtake_their_request_make_one_job() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file});
    let retry = [("x-stainless-retry-count", "1")];
    let replies = futures::future::join_all((0..8).map(|_| api.create_with(&retry, &body))).await;
    let first = replies[0].json()["id"].clone();
    for reply in replies {
        assert_eq!(reply.ok()["id"], first);
    }
    assert_eq!(api.count_jobs().await, 1);
}

#[tokio::test]
async fn a_request_that_was_lost_is_made_by_its_retry() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file});
    api.create_with(&[("x-stainless-retry-count", "1")], &body).await.ok();
    assert_eq!(api.count_jobs().await, 1);
}

#[tokio::test]
async fn the_same_request_meant_twice_makes_two_jobs() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file});
    let first = api.create_with(&[("x-stainless-retry-count", "0")], &body).await.ok();
    let second = api.create_with(&[("x-stainless-retry-count", "0")], &body).await.ok();
    assert_ne!(first["id"], second["id"]);
}

#[tokio::test]
async fn an_idempotency_key_makes_one_job_and_refuses_another_body() {
    let (api, file) = TestApi::ready().await;
    let key = [("idempotency-key", "once")];
    let body = json!({"model": BASE, "training_file": file});
    let first = api.create_with(&key, &body).await.ok();
    assert_eq!(api.create_with(&key, &body).await.ok()["id"], first["id"]);
    let other = json!({"model": BASE, "training_file": file, "seed": 1});
    let reply = api.create_with(&key, &other).await;
    assert_eq!(reply.error(400)["code"], "idempotency_conflict");
    assert_eq!(reply.header("x-should-retry"), Some("false"));
    assert_eq!(api.count_jobs().await, 1);
    let long = "k".repeat(256);
    let error = api.create_with(&[("idempotency-key", &long)], &body).await.error(400);
    assert_eq!(error["param"], "Idempotency-Key");
}

#[tokio::test]
async fn a_learning_rate_that_is_rarely_meant_is_an_event_and_a_header() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file,
                      "hyperparameters": {"learning_rate": 0.5}});
    let reply = api.post(JOBS, &body).await;
    let warning = reply.header("x-tunesmith-warning").expect("a warning").to_owned();
    assert!(warning.starts_with("The learning rate 5e-1 lies outside 1e-7 to 1e-3"), "{warning}");
    let id = reply.ok()["id"].as_str().expect("id").to_owned();
    let events = api.get(&format!("{JOBS}/{id}/events")).await.ok();
    let newest = &events["data"][0];
    assert_eq!((&newest["level"], &newest["message"]), (&json!("warn"), &json!(warning)));
}

#[tokio::test]
async fn unknown_fields_are_named_in_a_warning() {
    let (api, file) = TestApi::ready().await;
    let body = json!({"model": BASE, "training_file": file, "epochs": 3});
    let reply = api.post(JOBS, &body).await;
    assert_eq!(reply.header("x-tunesmith-warning"), Some("Unknown fields were ignored: epochs."));
    let body = json!({"model": BASE, "training_file": file, "integrations": null});
    assert_eq!(api.post(JOBS, &body).await.header("x-tunesmith-warning"), None);
}
