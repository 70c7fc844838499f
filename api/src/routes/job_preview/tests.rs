use super::*;
use crate::testing::{BASE, TestApi, chat_rows};

const PREVIEW: &str = "/v1/fine_tuning/jobs/preview";

fn codes(preview: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let refusals = preview["refusals"].as_array().expect("refusals");
    refusals.iter().map(|refusal| (text(&refusal["code"]), text(&refusal["param"]))).collect()
}

#[tokio::test]
async fn job_that_would_run_is_told_in_full_and_not_made() {
    let api = TestApi::start().await.with_base_model().await;
    let file = api.upload(chat_rows(20)).await;
    let body = json!({"model": BASE, "training_file": file,
        "hyperparameters": {"n_epochs": 2, "batch_size": 4, "validation_split": 0.2}});
    let preview = api.post(PREVIEW, &body).await.ok();
    assert_eq!((&preview["would_run"], &preview["refusals"]), (&json!(true), &json!([])));
    assert_eq!(preview["object"], "fine_tuning.job.preview");
    assert_eq!(preview["hyperparameters"]["max_seq_length"], 64);
    assert_eq!(preview["hyperparameters"]["n_epochs"], 2);
    assert_eq!(
        preview["steps"],
        json!({"total": 8, "per_epoch": 4, "examples_per_step": 4, "train_examples": 16,
               "held_out_examples": 4})
    );
    assert_eq!(preview["training_file"]["rows"], 20);
    let kept = preview["training_file"]["tokens"]["kept"].as_f64().expect("kept");
    assert_eq!(preview["tokens"]["value"], kept * 0.8 * 2.0);
    // No job has run here, the model's file says no sizes, and nobody has set a price.
    for (part, number) in [("time", "value"), ("memory", "peak_bytes"), ("cost", "amount")] {
        assert_eq!(preview[part][number], Value::Null, "{part}");
        assert!(preview[part]["basis"].as_str().is_some_and(|basis| basis.len() > 20), "{part}");
    }
    let rows = preview["first_rows"].as_array().expect("rows");
    assert_eq!((rows.len(), &rows[2]["line"]), (SHOWN_ROWS, &json!(3)));
    let tokens = rows[0]["tokens"].as_array().expect("tokens");
    assert_eq!(tokens[0]["text"], "<|im_start|>");
    assert!(tokens.iter().any(|token| token["weight"] == json!(1.0)));
    assert_eq!(api.get("/v1/fine_tuning/jobs").await.ok()["data"], json!([]));
}

#[tokio::test]
async fn every_mistake_is_named_and_not_only_the_first() {
    let api = TestApi::start().await.with_base_model().await;
    let file = api.upload(format!("{}{{\"messages\": []}}\n[]\n", chat_rows(3))).await;
    let body = json!({"model": BASE, "training_file": file, "validation_file": "file-none",
        "suffix": "a:b", "seed": -1,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 0, "learning_rate": 7, "adapter": {"r": 0}, "batch_size": 2}}}});
    let preview = api.post(PREVIEW, &body).await.ok();
    assert_eq!(preview["would_run"], false);
    let path = "method.supervised.hyperparameters";
    let mut found = codes(&preview);
    found.sort();
    let pair = |code: &str, param: &str| (code.to_owned(), param.to_owned());
    let mut expected = vec![
        pair("file_not_found", "validation_file"),
        pair("invalid_file_format", "training_file"),
        pair("invalid_file_format", "training_file"),
        pair("invalid_n_examples", "training_file"),
        pair("invalid_value", "seed"),
        pair("invalid_value", "suffix"),
        pair("invalid_value", &format!("{path}.adapter.r")),
        pair("invalid_value", &format!("{path}.learning_rate")),
        pair("invalid_value", &format!("{path}.n_epochs")),
    ];
    expected.sort();
    assert_eq!(found, expected);
    // What is left is still told.
    assert_eq!(preview["hyperparameters"]["batch_size"], 2);
    assert_eq!(preview["training_file"]["faulty_rows"], 2);
    let refusals = preview["refusals"].as_array().expect("refusals");
    assert!(refusals.iter().any(|refusal| {
        refusal["message"]
            .as_str()
            .is_some_and(|text| text.starts_with("Line 4: messages is empty"))
    }));
}

#[tokio::test]
async fn empty_request_misses_a_model_and_a_file() {
    let api = TestApi::start().await.with_base_model().await;
    let preview = api.post(PREVIEW, &json!({})).await.ok();
    let missing = |name: &str| ("missing_required_parameter".to_owned(), name.to_owned());
    assert_eq!(codes(&preview), [missing("model"), missing("training_file")]);
    assert_eq!((&preview["model"], &preview["hyperparameters"]), (&Value::Null, &Value::Null));
    let preview = api.post(PREVIEW, &json!({"model": "x", "training_file": "file-x"})).await.ok();
    let found: Vec<_> = codes(&preview).into_iter().map(|(_, param)| param).collect();
    assert_eq!(found, ["model", "training_file"]);
}

#[tokio::test]
async fn file_of_another_method_is_refused_row_by_row() {
    let api = TestApi::start().await.with_base_model().await;
    let file = api.upload(chat_rows(12)).await;
    let body = json!({"model": BASE, "training_file": file, "method": {"type": "dpo"}});
    let preview = api.post(PREVIEW, &body).await.ok();
    assert_eq!(preview["method"], "dpo");
    assert_eq!(preview["training_file"]["faulty_rows"], 12);
    let first = preview["refusals"][0]["message"].as_str().expect("message");
    assert!(first.starts_with("Line 1: the row is a chat row, but method \"dpo\""), "{first}");
}

#[tokio::test]
async fn time_rests_on_jobs_that_have_run() {
    let api = TestApi::start().await.with_base_model().await;
    api.succeeded_job(json!({})).await;
    let file = api.upload(chat_rows(20)).await;
    let body = json!({"model": BASE, "training_file": file, "hyperparameters": {"n_epochs": 1}});
    let preview = api.post(PREVIEW, &body).await.ok();
    // The job saw 1000 tokens in 20 seconds.
    let tokens = preview["tokens"]["value"].as_f64().expect("tokens");
    let seconds = preview["time"]["value"].as_f64().expect("seconds");
    assert!((seconds - tokens / 50.0).abs() < 1e-9, "{preview}");
    assert!(preview["time"]["basis"].as_str().expect("basis").starts_with("1 earlier job(s)"));
    let other = json!({"model": BASE, "training_file": file,
                       "hyperparameters": {"adapter": {"type": "full"}}});
    assert_eq!(api.post(PREVIEW, &other).await.ok()["time"]["value"], Value::Null);
}

#[tokio::test]
async fn files_of_others_are_not_read() {
    let api = TestApi::start().await.with_base_model().await;
    let file = api.upload(chat_rows(12)).await;
    let stranger = api.stranger().await;
    let preview = stranger.post(PREVIEW, &json!({"model": BASE, "training_file": file})).await.ok();
    assert_eq!(codes(&preview), [("file_not_found".to_owned(), "training_file".to_owned())]);
    assert_eq!(preview["training_file"], Value::Null);
}

#[tokio::test]
async fn more_layers_than_the_base_model_has_are_named_as_the_job_would_name_them() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let body = json!({"model": BASE, "training_file": api.upload(chat_rows(20)).await,
        "hyperparameters": {"adapter": {"trainable_layers": 2}}});
    let preview = api.post(PREVIEW, &body).await.ok();
    assert_eq!(preview["would_run"], false);
    let job = api.post("/v1/fine_tuning/jobs", &body).await.ok();
    let job = api.validated(job["id"].as_str().expect("id")).await;
    for key in ["code", "message", "param"] {
        assert_eq!(preview["refusals"][0][key], job["error"][key], "{job}");
    }
    assert_eq!(job["error"]["param"], "hyperparameters.adapter.trainable_layers");
}
