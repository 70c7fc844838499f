use crate::testing::{BASE, TestApi, chat_rows};
use serde_json::{Value, json};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_store::objects::ObjectKey;

const JOBS: &str = "/v1/fine_tuning/jobs";

impl TestApi {
    /// The job on `training` once its files are read.
    async fn outcome(&self, training: impl Into<Vec<u8>>) -> Value {
        let file = self.upload(training).await;
        self.outcome_of(json!({"model": BASE, "training_file": file})).await
    }

    async fn outcome_of(&self, body: Value) -> Value {
        let job = self.post(JOBS, &body).await.ok();
        assert_eq!(job["status"], "validating_files");
        self.validated(job["id"].as_str().expect("id")).await
    }

    async fn messages(&self, job: &Value) -> Vec<String> {
        let id = job["id"].as_str().expect("id");
        let events = self.get(&format!("{JOBS}/{id}/events")).await.ok();
        let events = events["data"].as_array().expect("data").iter().rev();
        events.map(|event| event["message"].as_str().expect("message").to_owned()).collect()
    }
}

fn tokenizers(api: &TestApi) -> std::sync::Arc<crate::tokenizers::Tokenizers> {
    std::sync::Arc::new(crate::tokenizers::Tokenizers::new(api.store.clone()))
}

async fn start() -> TestApi {
    TestApi::with_validator().await.with_base_model().await
}

#[tokio::test]
async fn a_job_whose_rows_are_in_order_is_queued_with_everything_resolved() {
    let api = start().await;
    let job = api.outcome(chat_rows(12)).await;
    assert_eq!((&job["status"], &job["error"]), (&json!("queued"), &Value::Null));
    assert_eq!(job["hyperparameters"]["n_epochs"], 8);
    assert_eq!(job["method"]["supervised"]["hyperparameters"]["max_seq_length"], 64);
    let messages = api.messages(&job).await;
    assert_eq!(messages[2], "Training file: 12 rows read as JSON Lines of chat rows");
    assert_eq!(messages.last().expect("one"), "Files validated, moving job to queued state");
}

#[tokio::test]
async fn a_job_with_nine_rows_fails_naming_the_minimum() {
    let api = start().await;
    let job = api.outcome(chat_rows(9)).await;
    assert_eq!(job["status"], "failed");
    assert_eq!(
        job["error"],
        json!({
            "code": "invalid_n_examples",
            "message": "Training file has 9 example(s), but must have at least 10 examples",
            "param": "training_file",
        })
    );
    assert!(job["finished_at"].is_i64());
    assert!(api.messages(&job).await.last().expect("one").contains("at least 10 examples"));
}

#[tokio::test]
async fn a_job_whose_seventh_row_is_broken_fails_naming_the_line() {
    let api = start().await;
    let mut rows: Vec<String> = chat_rows(12).lines().map(str::to_owned).collect();
    rows[6] = r#"{"messages": [{"role": "wizard", "content": "hm"}]}"#.to_owned();
    let job = api.outcome(rows.join("\n")).await;
    assert_eq!(job["error"]["code"], "invalid_file_format");
    assert_eq!(job["error"]["param"], "training_file");
    let message = job["error"]["message"].as_str().expect("message");
    assert!(message.contains('7') && message.contains("messages[0].role"), "{message}");
}

#[tokio::test]
async fn a_broken_validation_file_is_named_as_such() {
    let api = start().await;
    let training = api.upload(chat_rows(10)).await;
    let validation = api.upload("{\"messages\": []}\n").await;
    let body = json!({"model": BASE, "training_file": training, "validation_file": validation});
    let job = api.outcome_of(body).await;
    assert_eq!(job["error"]["code"], "invalid_file_format");
    assert_eq!(job["error"]["param"], "validation_file");
}

#[tokio::test]
async fn a_file_of_any_size_will_do_for_validation() {
    let api = start().await;
    let training = api.upload(chat_rows(10)).await;
    let validation = api.upload(chat_rows(1)).await;
    let body = json!({"model": BASE, "training_file": training, "validation_file": validation});
    let job = api.outcome_of(body).await;
    assert_eq!(job["status"], "queued");
    assert!(api.messages(&job).await[3].starts_with("Validation file: 1 rows"));
}

/// `rows` preference pairs.
fn pair_rows(rows: usize) -> String {
    let answer = |text: String| json!([{"role": "assistant", "content": text}]);
    let row = |n: usize| {
        json!({
            "input": {"messages": [{"role": "user", "content": format!("question {n}")}]},
            "preferred_output": answer(format!("good {n}")),
            "non_preferred_output": answer(format!("bad {n}")),
        })
    };
    (0..rows).map(|n| format!("{}\n", row(n))).collect()
}

fn dpo(training: &str) -> Value {
    json!({"model": BASE, "training_file": training,
           "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}})
}

#[tokio::test]
async fn pairs_are_queued_for_dpo_with_everything_resolved() {
    let api = start().await;
    let file = api.upload(pair_rows(12)).await;
    let job = api.outcome_of(dpo(&file)).await;
    assert_eq!((&job["status"], &job["error"]), (&json!("queued"), &Value::Null));
    assert_eq!(job["method"]["type"], "dpo");
    assert!(job["method"].get("supervised").is_none());
    let hyperparameters = &job["method"]["dpo"]["hyperparameters"];
    assert_eq!(hyperparameters["beta"], 0.1);
    assert_eq!(hyperparameters["learning_rate"], 1e-5);
    assert_eq!(hyperparameters["preference_loss"], "dpo");
    let messages = api.messages(&job).await;
    assert_eq!(messages[2], "Training file: 12 rows read as JSON Lines of preference rows");
}

#[tokio::test]
async fn a_file_for_another_method_fails_naming_both_methods() {
    let api = start().await;
    let file = api.upload(chat_rows(12)).await;
    let job = api.outcome_of(dpo(&file)).await;
    assert_eq!(job["error"]["code"], "invalid_file_format");
    let message = job["error"]["message"].as_str().expect("message");
    assert!(message.starts_with("Line 1: the row is a chat row, but method \"dpo\""), "{message}");
    assert!(message.ends_with("belong to method \"supervised\"."), "{message}");
    let job = api.outcome(pair_rows(12)).await;
    let message = job["error"]["message"].as_str().expect("message");
    assert!(message.starts_with("Line 1: the row is a preference pair"), "{message}");
    assert!(message.ends_with("belong to method \"dpo\"."), "{message}");
}

#[tokio::test]
async fn long_texts_train_in_windows_and_these_are_the_examples() {
    let api = start().await;
    let text = "word ".repeat(1000);
    let rows: String = (0..2).map(|_| format!("{}\n", json!({"text": text}))).collect();
    let job = api.outcome(rows).await;
    assert_eq!((&job["status"], &job["error"]), (&json!("queued"), &Value::Null));
    let messages = api.messages(&job).await;
    let windows = messages.iter().find(|message| message.contains("windows of at most 64"));
    assert!(windows.expect("a message").starts_with("The 2 text(s) of the training file train in"));
    assert!(!messages.iter().any(|message| message.contains("are cut")), "{messages:?}");
    // Short ones are as many examples as there are texts.
    let job = api.outcome("{\"text\": \"abc\"}\n".repeat(9)).await;
    assert_eq!(job["error"]["code"], "invalid_n_examples");
}

#[tokio::test]
async fn an_empty_file_fails() {
    let api = start().await;
    let job = api.outcome("").await;
    assert_eq!(job["error"]["code"], "invalid_file_format");
}

#[tokio::test]
async fn rows_that_are_cut_are_counted_in_a_warning() {
    let api = start().await;
    let long = "answer ".repeat(80);
    let row = json!({"messages": [{"role": "user", "content": "question"},
                                  {"role": "assistant", "content": long}]});
    let job = api.outcome(format!("{}{row}\n", chat_rows(10))).await;
    assert_eq!(job["status"], "queued");
    let warning = "1 row(s) of the training file are longer than max_seq_length = 64 tokens and \
                   are cut at that length";
    assert!(api.messages(&job).await.contains(&warning.to_owned()));
}

#[tokio::test]
async fn a_row_whose_every_target_is_cut_away_fails_by_its_line() {
    let api = start().await;
    let row = json!({"messages": [{"role": "user", "content": "question ".repeat(80)},
                                  {"role": "assistant", "content": "answer"}]});
    let job = api.outcome(format!("{}{row}\n", chat_rows(10))).await;
    assert_eq!(job["error"]["code"], "invalid_file_format");
    assert!(job["error"]["message"].as_str().expect("message").contains("11"), "{job}");
}

#[tokio::test]
async fn a_file_whose_content_is_gone_is_the_jobs_error() {
    let api = start().await;
    let file = api.upload(chat_rows(10)).await;
    let key = ObjectKey::File(file.as_str().into());
    api.store.objects().delete(&key).await.expect("deleted");
    let job = api.outcome_of(json!({"model": BASE, "training_file": file})).await;
    assert_eq!(job["error"]["code"], "invalid_training_file");
}

#[tokio::test]
async fn a_job_that_came_before_the_validator_is_found() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.start_job().await;
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(super::run(api.store.clone(), tokenizers(&api), stopped));
    assert_eq!(api.validated(&job).await["status"], "queued");
}

#[tokio::test]
async fn what_a_slower_validator_finds_counts_no_more() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let claimed = api.store.claim_for_validation().await.expect("claim").expect("a job");
    assert!(api.store.claim_for_validation().await.expect("claim").is_none());
    api.accept(&id).await;
    let error = ApiError::new(ErrorCode::InvalidFileFormat, "too late");
    let told = api.store.refuse_files(&claimed.id, error).await;
    assert!(matches!(told, Err(super::StoreError::Superseded { .. })), "{told:?}");
    assert_eq!(api.get(&format!("{JOBS}/{id}")).await.ok()["status"], "queued");
}

#[tokio::test]
async fn the_validator_ends_when_the_server_stops() {
    let api = TestApi::start().await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let task = tokio::spawn(super::run(api.store.clone(), tokenizers(&api), stopped));
    stop.send_replace(true);
    tokio::time::timeout(super::LOOK_EVERY * 2, task).await.expect("it ended").expect("no panic");
}
