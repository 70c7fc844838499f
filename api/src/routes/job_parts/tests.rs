use crate::testing::TestApi;
use insta::assert_json_snapshot;
use serde_json::{Value, json};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn messages(page: &Value) -> Vec<&str> {
    let data = page["data"].as_array().expect("data");
    data.iter().map(|event| event["message"].as_str().expect("message")).collect()
}

#[tokio::test]
async fn events_tell_the_job_from_its_end_to_its_beginning() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.succeeded_job(json!({})).await;
    let id = job["id"].as_str().expect("id");
    let events = api.get(&format!("{JOBS}/{id}/events")).await.ok();
    let mut oldest_first = messages(&events);
    oldest_first.reverse();
    let file = job["training_file"].as_str().expect("file");
    let checkpoints = api.get(&format!("{JOBS}/{id}/checkpoints")).await.ok();
    let checkpoint = checkpoints["data"][0]["id"].as_str().expect("id");
    let model = job["fine_tuned_model"].as_str().expect("model");
    assert_eq!(
        oldest_first,
        [
            format!("Created fine-tuning job: {id}"),
            format!("Validating training file: {file}"),
            "Files validated, moving job to queued state".to_owned(),
            "Fine-tuning job started".to_owned(),
            format!("Checkpoint created at step 10 with Snapshot ID: {checkpoint}"),
            format!("New fine-tuned model created: {model}"),
            "The job has successfully completed.".to_owned(),
        ]
    );
    assert_json_snapshot!(events["data"][0], {".id" => "[id]", ".created_at" => "[time]"}, @r#"
    {
      "id": "[id]",
      "object": "fine_tuning.job.event",
      "created_at": "[time]",
      "level": "info",
      "message": "The job has successfully completed.",
      "type": "message",
      "data": null
    }
    "#);
}

#[tokio::test]
async fn events_come_in_pages() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let page = api.get(&format!("{JOBS}/{id}/events?limit=1")).await.ok();
    assert_eq!(page["has_more"], true);
    let last = page["last_id"].as_str().expect("id");
    let rest = api.get(&format!("{JOBS}/{id}/events?limit=1&after={last}")).await.ok();
    assert_eq!(messages(&rest), [format!("Created fine-tuning job: {id}")]);
    assert_eq!(rest["has_more"], false);
}

#[tokio::test]
async fn a_checkpoint_is_shown_as_the_sdks_declare_it() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.succeeded_job(json!({})).await;
    let id = job["id"].as_str().expect("id");
    let page = api.get(&format!("{JOBS}/{id}/checkpoints")).await.ok();
    let model = job["fine_tuned_model"].as_str().expect("model");
    assert_eq!(page["data"][0]["fine_tuned_model_checkpoint"], format!("{model}:ckpt-step-10"));
    assert_json_snapshot!(page, {
        ".data[].id" => "[id]", ".first_id" => "[id]", ".last_id" => "[id]",
        ".data[].created_at" => "[time]", ".data[].fine_tuning_job_id" => "[job]",
        ".data[].fine_tuned_model_checkpoint" => "[model]",
    }, @r#"
    {
      "object": "list",
      "data": [
        {
          "id": "[id]",
          "object": "fine_tuning.job.checkpoint",
          "created_at": "[time]",
          "fine_tuned_model_checkpoint": "[model]",
          "fine_tuning_job_id": "[job]",
          "step_number": 10,
          "metrics": {
            "step": 10,
            "train_loss": 0.4,
            "train_mean_token_accuracy": 0.5,
            "valid_loss": 0.5,
            "valid_mean_token_accuracy": 0.25
          }
        }
      ],
      "first_id": "[id]",
      "last_id": "[id]",
      "has_more": false
    }
    "#);
}

#[tokio::test]
async fn the_curve_comes_whole_with_what_a_picture_needs() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let path = format!("{JOBS}/{id}/metrics");
    let before = api.get(&path).await.ok();
    assert_eq!((&before["data"], &before["total_steps"]), (&json!([]), &Value::Null));
    api.accept(&id).await;
    api.run_for(&id, 2).await;
    let curve = api.get(&path).await.ok();
    assert_json_snapshot!(curve, @r#"
    {
      "object": "list",
      "data": [
        {
          "step": 1,
          "epoch": 0.5,
          "train_loss": 4.0,
          "train_mean_token_accuracy": 0.5,
          "valid_loss": null,
          "valid_mean_token_accuracy": null,
          "full_valid_loss": null,
          "full_valid_mean_token_accuracy": null,
          "learning_rate": 0.0002,
          "grad_norm": 1.5,
          "tokens": 100,
          "tokens_per_second": 50.0,
          "elapsed_seconds": 2.0
        },
        {
          "step": 2,
          "epoch": 1.0,
          "train_loss": 2.0,
          "train_mean_token_accuracy": 0.5,
          "valid_loss": 2.5,
          "valid_mean_token_accuracy": 0.25,
          "full_valid_loss": null,
          "full_valid_mean_token_accuracy": null,
          "learning_rate": 0.0002,
          "grad_norm": 1.5,
          "tokens": 200,
          "tokens_per_second": 50.0,
          "elapsed_seconds": 4.0
        }
      ],
      "has_more": false,
      "total_steps": 10,
      "initial_valid_loss": 5.5,
      "train_rows": 10,
      "valid_rows": 2,
      "truncated_rows": 1,
      "device": "cpu",
      "precision": "fp32"
    }
    "#);
    let rest = api.get(&format!("{path}?after=1")).await.ok();
    assert_eq!(rest["data"].as_array().expect("data").len(), 1);
    assert_eq!(rest["data"][0]["step"], 2);
}
