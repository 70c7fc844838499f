//! A base model small enough to check by hand, and jobs that go on as a worker makes them.

use super::TestApi;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use tunesmith_core::dataset::ChatTokenizer;
use tunesmith_core::hyperparameters::{DataFacts, Hyperparameters, Precision};
use tunesmith_core::ids::{JobId, WorkerId};
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::protocol::Started;
use tunesmith_core::weights::CheckpointPlace;
use tunesmith_core::weights::{MANIFEST_NAME, Manifest, PeftConfig};
use tunesmith_store::base_models::NewBaseModel;
use tunesmith_store::jobs::Job;
use tunesmith_store::lease::{ClaimedJob, Completed, NewCheckpoint};
use tunesmith_store::objects::{ObjectKey, ObjectPrefix};
use tunesmith_store::validation::Validated;

/// The base model's name.
pub(crate) const BASE: &str = "tiny";
/// Its context length.
const CONTEXT: u64 = 64;
/// The weight that the adapter adapts: `[2, 3]`.
pub(crate) const ADAPTED: &str = "model.layers.0.self_attn.q_proj.weight";
/// That weight's numbers.
pub(crate) const WEIGHT: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
/// The same in a model that was trained in full.
pub(crate) const FULL_WEIGHT: [f32; 6] = [2.0, 2.0, 3.0, 4.0, 5.0, 7.0];
/// A, `[1, 3]`, of the adapter; its scale is 2, as alpha is twice the rank.
pub(crate) const LORA_A: [f32; 3] = [1.0, 0.0, -1.0];
/// B, `[2, 1]`.
pub(crate) const LORA_B: [f32; 2] = [0.5, 2.0];

const TEMPLATE: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + \
    '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
    {% endif %}";

/// `count` chat rows, each another.
pub(crate) fn chat_rows(count: usize) -> String {
    let row = |number| {
        json!({"messages": [
            {"role": "user", "content": format!("question {number}")},
            {"role": "assistant", "content": format!("answer {number}")},
        ]})
    };
    (0..count).map(|number| format!("{}\n", row(number))).collect()
}

/// A step's metrics, with a loss that falls.
fn step_metrics(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        epoch: step as f64 / 2.0,
        train_loss: 4.0 / step as f64,
        train_mean_token_accuracy: 0.5,
        valid_loss: step.is_multiple_of(2).then_some(5.0 / step as f64),
        valid_mean_token_accuracy: step.is_multiple_of(2).then_some(0.25),
        full_valid_loss: None,
        full_valid_mean_token_accuracy: None,
        learning_rate: 2e-4,
        grad_norm: 1.5,
        tokens: 100 * step,
        tokens_per_second: 50.0,
        elapsed_seconds: 2.0 * step as f64,
        train_reward_accuracy: None,
        train_reward_margin: None,
        valid_reward_accuracy: None,
        valid_reward_margin: None,
    }
}

/// A file of these tensors: name, shape and numbers of each.
pub(crate) fn safetensors(tensors: &[(&str, &[usize], &[f32])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, numbers)| numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a tensor"))
    });
    safetensors::serialize(views, None).expect("a file")
}

/// The base model's two tokenizer files.
fn tokenizer_files() -> [(&'static str, String); 2] {
    let added = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [added(1, "<|im_start|>"), added(2, "<|im_end|>")],
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "<unk>",
                  "vocab": {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "user": 3,
                            "assistant": 4, "question": 5, "answer": 6}},
    });
    let config = json!({"bos_token": null, "eos_token": "<|im_end|>", "chat_template": TEMPLATE});
    [("tokenizer.json", tokenizer.to_string()), ("tokenizer_config.json", config.to_string())]
}

/// The base model's tokenizer: one token a word, decoded with a space between.
pub(crate) fn tokenizer() -> ChatTokenizer {
    let [tokenizer, config] = tokenizer_files().map(|(_, content)| content.into_bytes());
    ChatTokenizer::from_parts(&tokenizer, &config, None).expect("a tokenizer")
}

fn write_base_model(directory: &Path) {
    let weights = safetensors(&[
        ("model.embed_tokens.weight", &[3, 3], &[0.5; 9]),
        (ADAPTED, &[2, 3], &WEIGHT),
        ("model.norm.weight", &[3], &[1.0; 3]),
    ]);
    let tokenizer = tokenizer_files().map(|(name, content)| (name, content.into_bytes()));
    let files = [
        ("README.md", b"the base model".to_vec()),
        ("config.json", b"{\"model_type\": \"llama\"}".to_vec()),
        ("model.safetensors", weights),
    ];
    for (name, content) in files.into_iter().chain(tokenizer) {
        std::fs::write(directory.join(name), content).expect("write");
    }
}

impl TestApi {
    /// The same with the base model imported.
    pub(crate) async fn with_base_model(self) -> Self {
        let directory = tempfile::tempdir().expect("directory");
        write_base_model(directory.path());
        let new = NewBaseModel {
            name: BASE.to_owned(),
            context_length: CONTEXT,
            config: json!({"model_type": "llama", "num_hidden_layers": 1}),
        };
        self.store.import_base_model(&new, directory.path()).await.expect("import");
        self
    }

    /// The job's row.
    pub(crate) async fn job(&self, id: &str) -> Job {
        self.store.job(&self.project, &JobId::from(id)).await.expect("job")
    }

    /// Lets a job queue, as a validator does that finds ten rows.
    pub(crate) async fn accept(&self, id: &str) {
        let job = self.job(id).await;
        let (asked, _) = Hyperparameters::parse(&job.hyperparameters, "x").expect("valid");
        let resolved = asked.resolve(&DataFacts { examples: 10, context_length: CONTEXT });
        let validated = Validated { resolved, events: Vec::new() };
        self.store.accept_files(&job.id, validated).await.expect("accepted");
    }

    /// Takes the queued job and runs it for `steps` of ten steps, with a checkpoint at the last.
    pub(crate) async fn run_for(&self, id: &str, steps: u64) -> ClaimedJob {
        let worker = WorkerId::generate(&mut rand::rng());
        let claimed = self.store.claim_job(&worker).await.expect("claim").expect("a job");
        assert_eq!(claimed.job.id.as_str(), id);
        let started = Started {
            total_steps: 10,
            resumed_from_step: 0,
            train_rows: 10,
            valid_rows: 2,
            truncated_rows: 1,
            initial_valid_loss: Some(5.5),
            device: "cpu".to_owned(),
            precision: Precision::Fp32,
        };
        self.store.record_started(&claimed.lease, &started).await.expect("started");
        let metrics: Vec<StepMetrics> = (1..=steps).map(step_metrics).collect();
        self.store.record_steps(&claimed.lease, &metrics, &[]).await.expect("steps");
        self.put_weights(&claimed, steps).await;
        let checkpoint =
            NewCheckpoint { step: steps, metrics: metrics.last().cloned(), for_resume_only: false };
        self.store.record_checkpoint(&claimed.lease, &checkpoint).await.expect("checkpoint");
        claimed
    }

    /// Stores the weights of a checkpoint, as a worker does.
    async fn put_weights(&self, claimed: &ClaimedJob, step: u64) {
        let directory = tempfile::tempdir().expect("directory");
        let adapter = &claimed.job.resolved.as_ref().expect("resolved").adapter;
        let config = PeftConfig {
            base_model: Some(BASE.to_owned()),
            adapter: adapter.clone(),
            fused_projections: false,
            layers: None,
        };
        let files: HashMap<&str, Vec<u8>> = match config.to_json() {
            Ok(config) => HashMap::from([
                ("adapter_config.json", config.into_bytes()),
                (
                    "adapter_model.safetensors",
                    safetensors(&[
                        (&lora_name("A"), &[1, 3], &LORA_A),
                        (&lora_name("B"), &[2, 1], &LORA_B),
                    ]),
                ),
                ("README.md", b"the job's facts".to_vec()),
            ]),
            // Trained in full: a model and no adapter.
            Err(_) => HashMap::from_iter(
                [
                    ("config.json", b"{}".to_vec()),
                    ("model.safetensors", safetensors(&[(ADAPTED, &[2, 3], &FULL_WEIGHT)])),
                ]
                .into_iter()
                .chain(tokenizer_files().map(|(name, content)| (name, content.into_bytes()))),
            ),
        };
        for (name, content) in files {
            std::fs::write(directory.path().join(name), content).expect("write");
        }
        let manifest = Manifest::of_dir(directory.path()).expect("manifest");
        let place =
            CheckpointPlace { job: claimed.job.id.clone(), attempt: claimed.lease.attempt, step };
        let weights = ObjectPrefix::CheckpointWeights(place);
        let objects = self.store.objects();
        for file in &manifest.files {
            let path = directory.path().join(&file.name);
            objects.put_file(&weights.file(file.name.as_str()), &path).await.expect("put");
        }
        let json = serde_json::to_vec(&manifest).expect("json");
        objects.put_bytes(&weights.file(MANIFEST_NAME), json.into()).await.expect("put");
    }

    /// A job that has succeeded after ten steps; gives it as the API shows it.
    pub(crate) async fn succeeded_job(&self, hyperparameters: Value) -> Value {
        self.succeeded_job_from(BASE, hyperparameters).await
    }

    /// The same of a job that starts from `model`.
    pub(crate) async fn succeeded_job_from(&self, model: &str, hyperparameters: Value) -> Value {
        let file = self.client.upload(chat_rows(10)).await;
        let body = json!({"model": model, "training_file": file, "suffix": "acme",
                          "hyperparameters": hyperparameters});
        let job = self.client.post("/v1/fine_tuning/jobs", &body).await.ok();
        let id = job["id"].as_str().expect("id");
        self.accept(id).await;
        let claimed = self.run_for(id, 10).await;
        let result_file = self.store.begin_file(&self.project).await.expect("begin");
        let csv = bytes::Bytes::from_static(b"step,train_loss\n1,4.0\n");
        let key = ObjectKey::File(result_file.clone());
        let completed = Completed {
            trained_tokens: 1000,
            steps: 10,
            model_step: 10,
            result_file,
            result_filename: "step_metrics.csv".to_owned(),
            result_stored: self.store.objects().put_bytes(&key, csv).await.expect("put"),
        };
        self.store.complete_job(&claimed.lease, &completed).await.expect("completed");
        self.client.get(&format!("/v1/fine_tuning/jobs/{id}")).await.ok()
    }
}

/// PEFT's name of a matrix, `A` or `B`, of the adapter.
pub(crate) fn lora_name(matrix: &str) -> String {
    let module = ADAPTED.strip_suffix(".weight").unwrap_or(ADAPTED);
    format!("base_model.model.{module}.lora_{matrix}.weight")
}

/// PEFT's configuration of an adapter of rank 1 on the query projection, with `changes`.
pub(crate) fn peft_config(changes: Value) -> String {
    let mut config = json!({
        "peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"],
        "base_model_name_or_path": "/somewhere/else", "task_type": "CAUSAL_LM",
    });
    let fields = config.as_object_mut().expect("object");
    fields.extend(changes.as_object().expect("object").clone());
    config.to_string()
}

/// Its file of tensors.
pub(crate) fn adapter_weights() -> Vec<u8> {
    safetensors(&[(&lora_name("A"), &[1, 3], &LORA_A), (&lora_name("B"), &[2, 1], &LORA_B)])
}
