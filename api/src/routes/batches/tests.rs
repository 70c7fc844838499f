use crate::testing::{BASE, Client, FakeSampler, TestApi};
use insta::assert_json_snapshot;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use std::time::Duration;

const BATCHES: &str = "/v1/batches";
const ENDPOINT: &str = "/v1/chat/completions";

fn line(custom_id: &str, model: &str) -> String {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
    format!(
        "{}\n",
        json!({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body})
    )
}

async fn upload(client: &Client, content: String) -> String {
    let part = Part::bytes(content.into_bytes()).file_name("requests.jsonl");
    let file = client.post_form(Form::new().text("purpose", "batch").part("file", part)).await.ok();
    file["id"].as_str().expect("id").to_owned()
}

fn asked(file: &str) -> Value {
    json!({"input_file_id": file, "endpoint": ENDPOINT, "completion_window": "24h"})
}

async fn ended(api: &TestApi, id: &str) -> Value {
    for _ in 0..600 {
        let batch = api.get(&format!("{BATCHES}/{id}")).await.ok();
        if ["completed", "failed", "cancelled"].contains(&batch["status"].as_str().expect("status"))
        {
            return batch;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("batch {id} does not end");
}

#[tokio::test]
async fn a_new_batch_is_shown_as_the_sdks_declare_it() {
    let api = TestApi::start().await;
    let file = upload(&api, line("a", "m")).await;
    let mut body = asked(&file);
    body["metadata"] = json!({"team": "x"});
    let made = api.post(BATCHES, &body).await.ok();
    assert_json_snapshot!(made, {
        ".id" => "[id]", ".input_file_id" => "[file]", ".created_at" => "[time]",
        ".expires_at" => "[time]"
    }, @r#"
    {
      "id": "[id]",
      "object": "batch",
      "endpoint": "/v1/chat/completions",
      "model": null,
      "errors": null,
      "input_file_id": "[file]",
      "completion_window": "24h",
      "status": "validating",
      "output_file_id": null,
      "error_file_id": null,
      "created_at": "[time]",
      "in_progress_at": null,
      "expires_at": "[time]",
      "finalizing_at": null,
      "completed_at": null,
      "failed_at": null,
      "expired_at": null,
      "cancelling_at": null,
      "cancelled_at": null,
      "request_counts": {
        "total": 0,
        "completed": 0,
        "failed": 0
      },
      "metadata": {
        "team": "x"
      }
    }
    "#);
    let path = format!("{BATCHES}/{}", made["id"].as_str().expect("id"));
    assert_eq!(api.get(&path).await.ok(), made);
    assert_eq!(api.get(BATCHES).await.ok()["data"], json!([made]));
    let cancelling = api.post(&format!("{path}/cancel"), &json!({})).await.ok();
    assert_eq!(cancelling["status"], "cancelling");
    assert!(cancelling["cancelling_at"].is_i64());
}

/// The lines of a file that a batch has written.
async fn lines_of(api: &TestApi, file: &Value) -> Vec<Value> {
    let file = format!("/v1/files/{}", file.as_str().expect("a file"));
    assert_eq!(api.get(&file).await.ok()["purpose"], "batch_output");
    let content = api.get(&format!("{file}/content")).await;
    let content = String::from_utf8(content.body).expect("text");
    content.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test]
async fn every_request_is_answered_or_told_why_not() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let streamed = line("d", BASE).replace("\"messages\"", "\"stream\":true,\"messages\"");
    let lines = [line("a", BASE), line("b", "m"), line("c", BASE), streamed];
    let file = upload(&api, lines.join("\n")).await;
    let made = api.post(BATCHES, &asked(&file)).await.ok();
    let done = ended(&api, made["id"].as_str().expect("id")).await;
    assert_eq!(done["status"], "completed");
    assert_eq!(done["request_counts"], json!({"total": 4, "completed": 2, "failed": 2}));
    let answers = lines_of(&api, &done["output_file_id"]).await;
    for (answer, custom_id) in answers.iter().zip(["a", "c"]) {
        assert_eq!(answer["custom_id"], custom_id);
        assert_eq!(answer["response"]["status_code"], 200);
        let body = &answer["response"]["body"];
        assert_eq!(body["object"], "chat.completion");
        assert_eq!(body["choices"][0]["message"]["content"], "answer");
    }
    assert!(sampler.last_order().low_priority);
    let errors = lines_of(&api, &done["error_file_id"]).await;
    for (error, (custom_id, status, param)) in
        errors.iter().zip([("b", 404, "model"), ("d", 400, "stream")])
    {
        assert_eq!(error["custom_id"], custom_id);
        assert_eq!(error["response"]["status_code"], status);
        assert_eq!(error["response"]["body"]["error"]["param"], param);
    }
    assert_eq!((answers.len(), errors.len()), (2, 2));
    let ended = format!("{BATCHES}/{}/cancel", done["id"].as_str().expect("id"));
    assert_eq!(api.post(&ended, &json!({})).await.error(400)["code"], "invalid_batch_state");
}

#[tokio::test]
async fn a_batch_waits_for_a_sampler() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let file = upload(&api, line("a", BASE)).await;
    let made = api.post(BATCHES, &asked(&file)).await.ok();
    let batch = format!("{BATCHES}/{}", made["id"].as_str().expect("id"));
    while api.get(&batch).await.ok()["status"] != "in_progress" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    FakeSampler::start(&api.store).await;
    let done = ended(&api, made["id"].as_str().expect("id")).await;
    assert_eq!(done["request_counts"], json!({"total": 1, "completed": 1, "failed": 0}));
    assert_eq!((&done["model"], &done["error_file_id"]), (&json!(BASE), &json!(null)));
}

#[tokio::test]
async fn a_file_that_is_not_in_order_fails_the_batch_with_its_lines() {
    let api = TestApi::with_validator().await;
    let content = format!("{}no json\n{}", line("a", "m"), line("a", "m"));
    let file = upload(&api, content).await;
    let made = api.post(BATCHES, &asked(&file)).await.ok();
    let failed = ended(&api, made["id"].as_str().expect("id")).await;
    assert_eq!(failed["status"], "failed");
    let errors = failed["errors"]["data"].as_array().expect("errors");
    let told: Vec<(&str, u64)> = errors
        .iter()
        .map(|e| (e["code"].as_str().expect("code"), e["line"].as_u64().expect("line")))
        .collect();
    assert_eq!(told, [("invalid_json_line", 2), ("duplicate_custom_id", 3)]);
    let empty = upload(&api, "\n\n".to_owned()).await;
    let made = api.post(BATCHES, &asked(&empty)).await.ok();
    let failed = ended(&api, made["id"].as_str().expect("id")).await;
    assert_eq!(failed["errors"]["data"][0]["code"], "empty_file");
}

#[tokio::test]
async fn a_wrong_request_is_refused_by_field() {
    let api = TestApi::start().await;
    let file = upload(&api, line("a", "m")).await;
    let rows = api.upload("x").await;
    for (change, param, status) in [
        (json!({"input_file_id": null}), "input_file_id", 400),
        (json!({"input_file_id": rows}), "input_file_id", 400),
        (json!({"input_file_id": "file-none"}), "input_file_id", 404),
        (json!({"endpoint": "/v1/embeddings"}), "endpoint", 400),
        (json!({"completion_window": "1h"}), "completion_window", 400),
        (json!({"metadata": {"a": 1}}), "metadata", 400),
        (json!({"output_expires_after": {"seconds": 1}}), "output_expires_after", 400),
    ] {
        let mut body = asked(&file);
        for (name, value) in change.as_object().expect("object") {
            body[name] = value.clone();
        }
        assert_eq!(api.post(BATCHES, &body).await.error(status)["param"], param, "{body}");
    }
}

#[tokio::test]
async fn another_projects_batch_does_not_exist() {
    let api = TestApi::start().await;
    let file = upload(&api, line("a", "m")).await;
    let made = api.post(BATCHES, &asked(&file)).await.ok();
    let path = format!("{BATCHES}/{}", made["id"].as_str().expect("id"));
    let stranger = api.stranger().await;
    for reply in
        [stranger.get(&path).await, stranger.post(&format!("{path}/cancel"), &json!({})).await]
    {
        assert_eq!(reply.error(404)["code"], "batch_not_found");
    }
    assert_eq!(stranger.post(BATCHES, &asked(&file)).await.error(404)["param"], "input_file_id");
    assert_eq!(stranger.get(BATCHES).await.ok()["data"], json!([]));
    assert_eq!(api.delete(&format!("/v1/files/{file}")).await.error(400)["code"], "file_in_use");
}
