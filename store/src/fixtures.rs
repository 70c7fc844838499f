//! What most tests of this crate begin with.

use crate::Store;
use crate::base_models::NewBaseModel;
use crate::events::NewEvent;
use crate::files::{File, FileFacts, Purpose};
use crate::idempotency::Idempotency;
use crate::jobs::{Job, NewJob};
use crate::lease::{ClaimedJob, Completed, NewCheckpoint};
use crate::objects::ObjectKey;
use crate::page::PageRequest;
use crate::tenants::Caller;
use crate::test_db::TestDb;
use crate::validation::Validated;
use bytes::Bytes;
use serde_json::{Map, json};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::{
    DataFacts, Hyperparameters, Method, ResolvedHyperparameters,
};
use tunesmith_core::ids::{BaseModelId, JobId, WorkerId};
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::state::JobStatus;

/// An installation with one project, one base model and one training file.
pub(crate) struct World {
    pub(crate) db: TestDb,
    pub(crate) caller: Caller,
    pub(crate) training_file: File,
    pub(crate) base_model: BaseModelId,
}

impl World {
    pub(crate) async fn new() -> Self {
        let db = TestDb::new().await;
        let store = db.store();
        let caller = tenant(store, "default").await;
        let directory = tempfile::tempdir().expect("directory");
        std::fs::write(directory.path().join("config.json"), "{}").expect("config");
        let new = NewBaseModel {
            name: "smol".to_owned(),
            context_length: 2048,
            config: json!({"model_type": "llama"}),
        };
        let base_model = store.import_base_model(&new, directory.path()).await.expect("import").id;
        let training_file = upload(store, &caller, "train.jsonl").await;
        Self { db, caller, training_file, base_model }
    }

    pub(crate) fn store(&self) -> &Store {
        self.db.store()
    }

    pub(crate) fn new_job(&self) -> NewJob {
        NewJob {
            model: "smol".to_owned(),
            is_tuned: false,
            base_model_id: self.base_model.clone(),
            base_model: "smol".to_owned(),
            start: None,
            training_file: self.training_file.id.clone(),
            validation_file: None,
            suffix: None,
            seed: 7,
            metadata: [("team".to_owned(), "a".to_owned())].into(),
            method: Method::Supervised,
            hyperparameters: Map::from_iter([("n_epochs".to_owned(), json!("auto"))]),
            most_unfinished: None,
            events: Vec::new(),
        }
    }

    /// A job in `validating_files`.
    pub(crate) async fn job(&self) -> Job {
        self.store().create_job(&self.caller, &self.new_job(), &once(0)).await.expect("job").job
    }

    /// A job in `queued`.
    pub(crate) async fn queued_job(&self) -> Job {
        let job = self.job().await;
        let validated = Validated { resolved: resolved(), events: Vec::new() };
        self.store().accept_files(&job.id, validated).await.expect("accepted");
        self.get(&job.id).await
    }

    /// A job in `running`, and its lease.
    pub(crate) async fn running_job(&self) -> ClaimedJob {
        let job = self.queued_job().await;
        let claimed = self.claim("first").await.expect("a job waits");
        assert_eq!(claimed.job.id, job.id);
        claimed
    }

    pub(crate) async fn claim(&self, worker: &str) -> Option<ClaimedJob> {
        self.store().claim_job(&WorkerId::from(worker)).await.expect("claim")
    }

    pub(crate) async fn get(&self, id: &JobId) -> Job {
        self.store().job(&self.caller.project_id, id).await.expect("job")
    }

    pub(crate) async fn status(&self, id: &JobId) -> JobStatus {
        self.get(id).await.status
    }

    /// What the job's owner reads, oldest first.
    pub(crate) async fn messages(&self, id: &JobId) -> Vec<String> {
        let page = self
            .store()
            .list_events(&self.caller.project_id, id, &PageRequest::first(100))
            .await
            .expect("events");
        page.items.into_iter().rev().map(|event| event.message).collect()
    }

    /// A result file, as a worker makes it.
    pub(crate) async fn completed(&self) -> Completed {
        let id = self.store().begin_file(&self.caller.project_id).await.expect("file");
        let content = Bytes::from_static(b"step,train_loss\n");
        let key = ObjectKey::File(id.clone());
        let stored = self.store().objects().put_bytes(&key, content).await.expect("stored");
        Completed {
            trained_tokens: 1234,
            steps: 12,
            model_step: 12,
            result_file: id,
            result_filename: "step_metrics.csv".to_owned(),
            result_stored: stored,
        }
    }
}

/// A project of its own, and a key to it.
pub(crate) async fn tenant(store: &Store, project: &str) -> Caller {
    let project = store.create_project("acme", project).await.expect("project");
    let key = store.create_api_key(&project, "test").await.expect("key");
    store.authenticate(&key.secret).await.expect("database").expect("a known key")
}

/// A whole file with a few bytes in it.
pub(crate) async fn upload(store: &Store, caller: &Caller, filename: &str) -> File {
    let id = store.begin_file(&caller.project_id).await.expect("file");
    let content = Bytes::from(format!("content of {filename}"));
    let stored =
        store.objects().put_bytes(&ObjectKey::File(id.clone()), content).await.expect("stored");
    let facts = FileFacts {
        filename: filename.to_owned(),
        purpose: Purpose::FineTune,
        expires_after: None,
    };
    store.finish_file(caller, &id, &facts, &stored, &once(0)).await.expect("finished")
}

/// A request that was not sent before; `body` stands for its content.
pub(crate) fn once(body: u8) -> Idempotency {
    Idempotency { key: None, is_retry: false, request_sha256: [body; 32] }
}

pub(crate) fn resolved() -> ResolvedHyperparameters {
    Hyperparameters::default().resolve(&DataFacts { examples: 48, context_length: 2048 })
}

pub(crate) fn step(step: u64, train_loss: f64) -> StepMetrics {
    StepMetrics {
        step,
        epoch: 0.1 * step as f64,
        train_loss,
        train_mean_token_accuracy: 1.0 / 3.0,
        valid_loss: step.is_multiple_of(2).then_some(0.1 + 0.2),
        valid_mean_token_accuracy: None,
        full_valid_loss: None,
        full_valid_mean_token_accuracy: None,
        learning_rate: 1.234_567_890_123_456_7e-7,
        grad_norm: 1e300,
        tokens: 100 * step,
        tokens_per_second: 99.9,
        elapsed_seconds: 0.5,
        train_reward_accuracy: None,
        train_reward_margin: None,
        valid_reward_accuracy: None,
        valid_reward_margin: None,
    }
}

pub(crate) fn step_event(step: u64) -> NewEvent {
    NewEvent::step(step, format!("Step {step}"), json!({"step": step}))
}

pub(crate) fn checkpoint(step: u64) -> NewCheckpoint {
    NewCheckpoint { step, metrics: Some(self::step(step, 1.0)), for_resume_only: false }
}

pub(crate) fn trainer_failed() -> ApiError {
    ApiError::new(ErrorCode::TrainerFailed, "the trainer was killed")
}
