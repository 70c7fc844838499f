use crate::testing::{BASE, TestApi, chat_rows};
use insta::assert_json_snapshot;
use serde_json::json;
use tunesmith_store::lease::GiveBack;

const JOBS: &str = "/v1/fine_tuning/jobs";

#[tokio::test]
async fn a_new_job_is_shown_as_the_sdks_declare_it() {
    let api = TestApi::start().await.with_base_model().await;
    let training_file = api.upload(chat_rows(10)).await;
    let job = api
        .post(
            JOBS,
            &json!({
                "model": BASE, "training_file": training_file, "seed": 7, "suffix": "acme",
                "metadata": {"team": "support"},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {
                    "n_epochs": 2, "batch_size": "auto", "learning_rate": 1e-4,
                    "adapter": {"r": 4, "target_modules": ["v_proj", "q_proj"]},
                }}},
            }),
        )
        .await
        .ok();
    assert_json_snapshot!(job, {
        ".id" => "[id]", ".created_at" => "[time]", ".training_file" => "[file]",
        ".organization_id" => "[org]",
    }, @r#"
    {
      "id": "[id]",
      "object": "fine_tuning.job",
      "created_at": "[time]",
      "model": "tiny",
      "status": "validating_files",
      "training_file": "[file]",
      "validation_file": null,
      "fine_tuned_model": null,
      "trained_tokens": null,
      "finished_at": null,
      "estimated_finish": null,
      "organization_id": "[org]",
      "result_files": [],
      "seed": 7,
      "error": null,
      "hyperparameters": {
        "n_epochs": 2,
        "batch_size": "auto",
        "learning_rate_multiplier": "auto"
      },
      "method": {
        "type": "supervised",
        "supervised": {
          "hyperparameters": {
            "n_epochs": 2,
            "batch_size": "auto",
            "learning_rate_multiplier": "auto",
            "learning_rate": 0.0001,
            "lr_scheduler": "auto",
            "warmup_ratio": "auto",
            "min_lr_ratio": "auto",
            "decay_ratio": "auto",
            "optimizer": "auto",
            "adam_beta1": "auto",
            "adam_beta2": "auto",
            "adam_epsilon": "auto",
            "muon_adjust_lr_fn": "auto",
            "weight_decay": "auto",
            "max_grad_norm": "auto",
            "neftune_noise_alpha": "auto",
            "gradient_accumulation_steps": "auto",
            "max_steps": "auto",
            "max_seq_length": "auto",
            "prompt_loss_weight": "auto",
            "packing": "auto",
            "precision": "auto",
            "eval_steps": "auto",
            "checkpoint_steps": "auto",
            "validation_split": "auto",
            "early_stopping_patience": "auto",
            "early_stopping_threshold": "auto",
            "load_best_model_at_end": "auto",
            "on_divergence": "auto",
            "spike_factor": "auto",
            "adapter": {
              "type": "lora",
              "r": 4,
              "alpha": 8.0,
              "dropout": 0.0,
              "target_modules": [
                "q_proj",
                "v_proj"
              ],
              "use_rslora": false,
              "use_dora": false,
              "init_lora_weights": "default",
              "loraplus_lr_ratio": 1.0,
              "trainable_layers": 0,
              "quantization": "none"
            }
          }
        }
      },
      "integrations": [],
      "metadata": {
        "team": "support"
      }
    }
    "#);
    let id = job["id"].as_str().expect("id");
    assert_eq!(api.get(&format!("{JOBS}/{id}")).await.ok(), job);
}

#[tokio::test]
async fn resolved_values_take_the_place_of_auto() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    api.accept(&id).await;
    let job = api.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(job["status"], "queued");
    assert_eq!(
        job["hyperparameters"],
        json!({"n_epochs": 10, "batch_size": 1, "learning_rate_multiplier": 1.0})
    );
    let all = &job["method"]["supervised"]["hyperparameters"];
    assert_eq!((&all["learning_rate"], &all["max_seq_length"]), (&json!(2e-4), &json!(64)));
    let undecided = |job: &serde_json::Value| -> Vec<String> {
        let all = job["method"]["supervised"]["hyperparameters"].as_object().expect("object");
        let auto = all.iter().filter(|(_, value)| *value == "auto");
        auto.map(|(name, _)| name.clone()).collect()
    };
    // The precision is the worker's to decide.
    assert_eq!(undecided(&job), ["precision"]);
    api.run_for(&id, 4).await;
    let job = api.get(&format!("{JOBS}/{id}")).await.ok();
    assert!(undecided(&job).is_empty(), "{job}");
}

#[tokio::test]
async fn a_succeeded_job_names_its_model_and_its_result_file() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.succeeded_job(json!({})).await;
    assert_eq!((&job["status"], &job["trained_tokens"]), (&json!("succeeded"), &json!(1000)));
    let model = job["fine_tuned_model"].as_str().expect("model");
    assert!(model.starts_with(&format!("ft:{BASE}:tunesmith:acme:")), "{model}");
    assert!(job["finished_at"].is_i64());
    assert!(job["estimated_finish"].is_null());
    let file = job["result_files"][0].as_str().expect("file");
    let file = api.get(&format!("/v1/files/{file}")).await.ok();
    assert_eq!(file["purpose"], "fine-tune-results");
}

#[tokio::test]
async fn a_running_job_says_when_it_should_end() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    api.accept(&id).await;
    assert!(api.get(&format!("{JOBS}/{id}")).await.ok()["estimated_finish"].is_null());
    api.run_for(&id, 4).await;
    let job = api.get(&format!("{JOBS}/{id}")).await.ok();
    assert_eq!(job["status"], "running");
    // Six steps are left at two seconds each.
    let created = job["created_at"].as_i64().expect("time");
    assert!(job["estimated_finish"].as_i64().expect("time") >= created + 12, "{job}");
}

#[tokio::test]
async fn jobs_are_listed_newest_first_in_pages() {
    let api = TestApi::start().await.with_base_model().await;
    let (first, second, third) =
        (api.start_job().await, api.start_job().await, api.start_job().await);
    let page = api.get(&format!("{JOBS}?limit=2")).await.ok();
    let ids = |page: &serde_json::Value| -> Vec<String> {
        let data = page["data"].as_array().expect("data");
        data.iter().map(|job| job["id"].as_str().expect("id").to_owned()).collect()
    };
    assert_eq!(ids(&page), [third, second.clone()]);
    assert_eq!(page["has_more"], true);
    let rest = api.get(&format!("{JOBS}?limit=2&after={second}")).await.ok();
    assert_eq!((ids(&rest), &rest["has_more"]), (vec![first], &json!(false)));
    assert_eq!(api.get(&format!("{JOBS}?after=ftjob-no")).await.error(400)["param"], "after");
}

#[tokio::test]
async fn jobs_are_found_by_their_metadata() {
    let api = TestApi::start().await.with_base_model().await;
    let training_file = api.upload(chat_rows(10)).await;
    let body = json!({"model": BASE, "training_file": training_file,
                      "metadata": {"team": "a b", "run": "1"}});
    let id = api.post(JOBS, &body).await.ok()["id"].clone();
    api.start_job().await;
    let found = api.get(&format!("{JOBS}?metadata%5Bteam%5D=a+b")).await.ok();
    assert_eq!(found["data"].as_array().expect("data").len(), 1);
    assert_eq!(found["data"][0]["id"], id);
    let none = api.get(&format!("{JOBS}?metadata[team]=a+b&metadata[run]=2")).await.ok();
    assert_eq!(none["data"], json!([]));
    let bare = api.get(&format!("{JOBS}?metadata=null")).await.ok();
    assert_eq!(bare["data"].as_array().expect("data").len(), 1);
    assert_ne!(bare["data"][0]["id"], id);
    for query in ["metadata=x", "metadata=null&metadata[run]=1"] {
        let error = api.get(&format!("{JOBS}?{query}")).await.error(400);
        assert_eq!(error["param"], "metadata", "{query}");
    }
}

#[tokio::test]
async fn a_job_that_has_ended_cannot_be_cancelled_paused_or_resumed() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let path = format!("{JOBS}/{id}");
    let cancelled = api.post(&format!("{path}/cancel"), &json!({})).await.ok();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(cancelled["finished_at"].is_i64());
    for action in ["cancel", "pause", "resume"] {
        let reply = api.post(&format!("{path}/{action}"), &json!({})).await;
        let error = reply.error(400);
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("invalid_job_state"), &json!("fine_tune_id"))
        );
        assert_eq!(reply.header("x-should-retry"), Some("false"));
    }
}

#[tokio::test]
async fn a_paused_job_is_queued_with_a_word_beside_it() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    api.accept(&id).await;
    let path = format!("{JOBS}/{id}");
    let paused = api.post(&format!("{path}/pause"), &json!({})).await.ok();
    assert_eq!((&paused["status"], &paused["paused"]), (&json!("queued"), &json!(true)));
    let resumed = api.post(&format!("{path}/resume"), &json!({})).await.ok();
    assert_eq!(resumed["status"], "queued");
    assert_eq!(resumed.get("paused"), None);
}

#[tokio::test]
async fn a_running_job_that_is_paused_rests_when_its_worker_gives_it_back() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    api.accept(&id).await;
    let claimed = api.run_for(&id, 2).await;
    let path = format!("{JOBS}/{id}");
    let pausing = api.post(&format!("{path}/pause"), &json!({})).await.ok();
    assert_eq!((&pausing["status"], &pausing["paused"]), (&json!("running"), &json!(true)));
    api.store.give_back(&claimed.lease, GiveBack::Paused).await.expect("given back");
    let paused = api.get(&path).await.ok();
    assert_eq!((&paused["status"], &paused["paused"]), (&json!("queued"), &json!(true)));
}

#[tokio::test]
async fn a_job_that_is_not_there_is_answered_word_for_word() {
    let api = TestApi::start().await;
    let path = format!("{JOBS}/ftjob-none");
    for reply in [
        api.get(&path).await,
        api.post(&format!("{path}/cancel"), &json!({})).await,
        api.post(&format!("{path}/pause"), &json!({})).await,
        api.post(&format!("{path}/resume"), &json!({})).await,
        api.get(&format!("{path}/events")).await,
        api.get(&format!("{path}/checkpoints")).await,
        api.get(&format!("{path}/metrics")).await,
    ] {
        assert_eq!(
            reply.error(404),
            json!({
                "message": "Could not find fine tune: ftjob-none",
                "type": "invalid_request_error",
                "param": "fine_tune_id",
                "code": "fine_tune_not_found",
            })
        );
    }
}

#[tokio::test]
async fn another_projects_job_does_not_exist() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let stranger = api.stranger().await;
    let path = format!("{JOBS}/{id}");
    for reply in [
        stranger.get(&path).await,
        stranger.post(&format!("{path}/cancel"), &json!({})).await,
        stranger.post(&format!("{path}/pause"), &json!({})).await,
        stranger.post(&format!("{path}/resume"), &json!({})).await,
        stranger.get(&format!("{path}/events")).await,
        stranger.get(&format!("{path}/checkpoints")).await,
        stranger.get(&format!("{path}/metrics")).await,
    ] {
        assert_eq!(reply.error(404)["message"], format!("Could not find fine tune: {id}"));
    }
    assert_eq!(stranger.get(JOBS).await.ok()["data"], json!([]));
    assert_eq!(api.get(&path).await.ok()["status"], "validating_files");
}
