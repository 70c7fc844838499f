use crate::testing::{BASE, Reply, TestApi, chat_rows};
use reqwest::multipart;
use serde_json::{Value, json};
use std::time::Duration;

impl TestApi {
    /// The report on a file once it is made.
    async fn report(&self, file: &str, query: &str) -> Value {
        for _ in 0..600 {
            let reply = self.get(&format!("/v1/files/{file}/report{query}")).await;
            if reply.status == 200 {
                return reply.json();
            }
            assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (202, Some("1")));
            assert_eq!(reply.json()["status"], "in_progress");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("file {file} has no report yet");
    }

    async fn upload_as(&self, name: &str, purpose: &str, content: impl Into<Vec<u8>>) -> Reply {
        let file = multipart::Part::bytes(content.into()).file_name(name.to_owned());
        let form = multipart::Form::new().text("purpose", purpose.to_owned()).part("file", file);
        self.post_form(form).await
    }
}

fn id(file: Reply) -> String {
    file.ok()["id"].as_str().expect("id").to_owned()
}

#[tokio::test]
async fn upload_is_answered_at_once_and_its_report_follows() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let file = api.upload(format!("\u{feff}{}", chat_rows(12))).await;
    let report = api.report(&file, "").await;
    for (key, value) in [
        ("object", json!("file.report")),
        ("file_id", json!(file)),
        ("status", json!("completed")),
        ("model", json!(BASE)),
        ("read_as", json!("JSON Lines of chat rows")),
        ("method", json!("supervised")),
        ("rows", json!(12)),
        ("examples", json!(12)),
        ("problem_count", json!(0)),
    ] {
        assert_eq!(report[key], value, "{key}");
    }
    assert_eq!(report["repairs"][0]["name"], "byte_order_mark");
    assert_eq!(report["tokens"]["max_seq_length"], 64);
    assert!(report["tokens"]["trained"].as_u64() < report["tokens"]["total"].as_u64());
    let shown = api.get(&format!("/v1/files/{file}")).await.ok();
    assert_eq!((&shown["status"], &shown["status_details"]), (&json!("processed"), &Value::Null));
}

#[tokio::test]
async fn file_that_is_wrong_is_kept_and_says_so() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let file = api.upload(format!("{}{{\"messages\": []}}\n[]\n", chat_rows(3))).await;
    let report = api.report(&file, "").await;
    assert_eq!((&report["rows"], &report["faulty_rows"]), (&json!(5), &json!(2)));
    assert_eq!(
        (&report["problems"][0]["line"], &report["problems"][1]["line"]),
        (&json!(4), &json!(5))
    );
    let details = api.get(&format!("/v1/files/{file}")).await.ok()["status_details"].clone();
    let details = details.as_str().expect("details");
    assert!(details.starts_with("Line 4: messages is empty"), "{details}");
    assert!(details.ends_with("There are 1 more problems in 5 rows."), "{details}");
}

#[tokio::test]
async fn report_in_progress_is_a_202_that_says_when_to_look_again() {
    // Nobody makes reports here.
    let api = TestApi::start().await.with_base_model().await;
    let file = api.upload(chat_rows(1)).await;
    let reply = api.get(&format!("/v1/files/{file}/report")).await;
    assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (202, Some("1")));
    assert_eq!(
        reply.json(),
        json!({"object": "file.report", "file_id": file, "status": "in_progress"})
    );
}

#[tokio::test]
async fn tokens_are_counted_by_the_model_that_is_named_or_by_the_first() {
    let api = TestApi::with_validator().await;
    let file = api.upload(chat_rows(2)).await;
    let report = api.report(&file, "").await;
    assert_eq!((&report["model"], &report["tokens"]), (&Value::Null, &Value::Null));
    assert_eq!(report["examples"], 2);
    let api = api.with_base_model().await;
    assert_eq!(api.report(&file, "").await["model"], BASE);
    assert_eq!(api.report(&file, "?model=tiny").await["tokens"]["longest_line"], 1);
    let error = api.get(&format!("/v1/files/{file}/report?model=none")).await.error(400);
    assert_eq!(error["code"], "model_not_found");
}

#[tokio::test]
async fn plain_text_trains_as_text_in_windows() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let text = "question answer. ".repeat(500);
    let file = id(api.upload_as("notes.txt", "fine-tune", text.clone()).await);
    let report = api.report(&file, "").await;
    assert_eq!((&report["container"], &report["shape"]), (&json!("plain_text"), &json!("text")));
    assert!(report["examples"].as_u64().is_some_and(|examples| examples >= 10));
    let job =
        api.post("/v1/fine_tuning/jobs", &json!({"model": BASE, "training_file": file})).await.ok();
    let job = api.validated(job["id"].as_str().expect("id")).await;
    assert_eq!((&job["status"], &job["error"]), (&json!("queued"), &Value::Null));
    // The same under a name that says nothing is refused, saying what to do.
    let file = api.upload(text).await;
    let report = api.report(&file, "").await;
    assert!(report["problems"][0]["hint"].as_str().expect("hint").contains(".txt"));
}

#[tokio::test]
async fn reports_are_for_the_owner_and_for_files_to_train_on() {
    let api = TestApi::start().await.with_base_model().await;
    let file = api.upload(chat_rows(1)).await;
    let stranger = api.stranger().await;
    stranger.get(&format!("/v1/files/{file}/report")).await.error(404);
    let other = id(api.upload_as("a.jsonl", "batch", "{}").await);
    let error = api.get(&format!("/v1/files/{other}/report")).await.error(400);
    assert!(error["message"].as_str().expect("message").contains("'fine-tune'"));
}
