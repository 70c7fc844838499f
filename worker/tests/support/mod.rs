//! A store with a base model and files in it, workers that run, and looks at what they left.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tunesmith_core::hyperparameters::{DataFacts, Hyperparameters, Method};
use tunesmith_core::ids::{BaseModelId, FileId, JobId, ProjectId};
use tunesmith_core::metrics::StepMetrics;
use tunesmith_core::state::JobStatus;
use tunesmith_core::weights::WeightsPlace;
use tunesmith_store::Store;
use tunesmith_store::base_models::{BaseModel, NewBaseModel};
use tunesmith_store::events::{Event, EventType};
use tunesmith_store::files::{FileFacts, Purpose};
use tunesmith_store::idempotency::Idempotency;
use tunesmith_store::jobs::{Job, NewJob};
use tunesmith_store::models::Model;
use tunesmith_store::objects::ObjectKey;
use tunesmith_store::page::PageRequest;
use tunesmith_store::tenants::Caller;
use tunesmith_store::test_db::TestDb;
use tunesmith_store::validation::Validated;
use tunesmith_worker::{ChildCommand, Worker, WorkerConfig, WorkerError};

/// How long a test waits for something that should come soon. Only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A database, an object store and directories, each of this test alone.
pub(crate) struct World {
    pub(crate) db: TestDb,
    pub(crate) store: Store,
    pub(crate) project: ProjectId,
    caller: Caller,
    pub(crate) base_model: BaseModelId,
    training_file: FileId,
    /// For files that a script waits for or writes.
    pub(crate) dir: TempDir,
}

/// A request that was not sent before.
fn once() -> Idempotency {
    Idempotency { key: None, is_retry: false, request_sha256: [0; 32] }
}

impl World {
    pub(crate) async fn new() -> Self {
        let db = TestDb::new().await;
        let store = db.store().clone();
        let dir = tempfile::tempdir().expect("temp dir");
        let project = store.ensure_default_project().await.expect("project");
        let key = store.create_api_key(&project, "test").await.expect("key");
        let caller = store.authenticate(&key.secret).await.expect("look-up").expect("caller");
        let model_dir = dir.path().join("base-model");
        std::fs::create_dir(&model_dir).expect("create");
        std::fs::write(model_dir.join("config.json"), "{}").expect("write");
        std::fs::write(model_dir.join("model.safetensors"), "weights").expect("write");
        let new = NewBaseModel { name: "tiny".to_owned(), context_length: 64, config: json!({}) };
        let base_model = store.import_base_model(&new, &model_dir).await.expect("import").id;
        let training_file = store.begin_file(&project).await.expect("file");
        let content = "{\"messages\": []}\n".repeat(12);
        let key = ObjectKey::File(training_file.clone());
        let stored = store.objects().put_bytes(&key, content.into()).await.expect("put");
        let facts = FileFacts {
            filename: "rows.jsonl".to_owned(),
            purpose: Purpose::FineTune,
            expires_after: None,
        };
        store.finish_file(&caller, &training_file, &facts, &stored, &once()).await.expect("finish");
        Self { db, store, project, caller, base_model, training_file, dir }
    }

    /// A job that waits for a worker.
    pub(crate) async fn queued_job(&self) -> JobId {
        self.queued(&self.base_model, "tiny", None).await
    }

    /// One that begins with the weights of `model`.
    pub(crate) async fn queued_job_from(&self, model: &Model) -> JobId {
        self.queued(&self.base_model, &model.name, Some(model.place.clone())).await
    }

    /// One that makes an adapter on `base`.
    pub(crate) async fn queued_job_on(&self, base: &BaseModel) -> JobId {
        self.queued(&base.id, &base.name, None).await
    }

    async fn queued(&self, base: &BaseModelId, model: &str, start: Option<WeightsPlace>) -> JobId {
        let new = NewJob {
            model: model.to_owned(),
            is_tuned: start.is_some(),
            base_model_id: base.clone(),
            base_model: "tiny".to_owned(),
            start,
            training_file: self.training_file.clone(),
            validation_file: None,
            suffix: None,
            seed: 7,
            metadata: BTreeMap::new(),
            method: Method::Supervised,
            hyperparameters: serde_json::Map::new(),
            most_unfinished: None,
            events: Vec::new(),
        };
        let created = self.store.create_job(&self.caller, &new, &once()).await.expect("job");
        let facts = DataFacts { examples: 12, context_length: 64 };
        let resolved = Hyperparameters::default().resolve(&facts);
        let validated = Validated { resolved, events: Vec::new() };
        self.store.accept_files(&created.job.id, validated).await.expect("accept");
        created.job.id
    }

    /// A worker's configuration whose trainer follows `script`; all workers of a test share the
    /// cache and the work directory.
    pub(crate) fn config(&self, script: &Value) -> WorkerConfig {
        let trainer = ChildCommand {
            program: PathBuf::from(env!("CARGO_BIN_EXE_scripted-trainer")),
            args: vec![script.to_string().into()],
            env: Vec::new(),
        };
        let mut config =
            WorkerConfig::new(self.cache_dir(), self.dir.path().join("work"), "cpu", trainer);
        config.poll_interval = Duration::from_millis(50);
        config.renew_interval = Duration::from_millis(100);
        config.flush_interval = Duration::from_millis(20);
        config
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// A worker at work.
    pub(crate) fn start(&self, config: WorkerConfig) -> Running {
        let shutdown = CancellationToken::new();
        let worker = Worker::new(self.store.clone(), config);
        Running { task: tokio::spawn(worker.run(shutdown.clone())), shutdown }
    }

    pub(crate) async fn job(&self, id: &JobId) -> Job {
        self.store.job(&self.project, id).await.expect("job")
    }

    /// The job, once `holds` is true of it.
    pub(crate) async fn job_when(&self, id: &JobId, holds: impl Fn(&Job) -> bool) -> Job {
        eventually(async || Some(self.job(id).await).filter(&holds)).await
    }

    /// The job, once it has ended.
    pub(crate) async fn ended(&self, id: &JobId) -> Job {
        self.job_when(id, |job| job.status.is_terminal()).await
    }

    /// The job, once it has that step on record.
    pub(crate) async fn reached(&self, id: &JobId, step: u64) -> Job {
        self.job_when(id, |job| job.last_step >= step).await
    }

    pub(crate) async fn curve(&self, id: &JobId) -> Vec<StepMetrics> {
        self.store.metrics(&self.project, id, 0).await.expect("metrics")
    }

    /// The events, oldest first.
    pub(crate) async fn events(&self, id: &JobId) -> Vec<Event> {
        let request = PageRequest::first(1000);
        let page = self.store.list_events(&self.project, id, &request).await.expect("events");
        assert!(!page.has_more);
        page.items.into_iter().rev().collect()
    }

    pub(crate) async fn messages(&self, id: &JobId) -> Vec<String> {
        self.events(id).await.into_iter().map(|event| event.message).collect()
    }

    /// The steps of the checkpoints that people see, oldest first.
    pub(crate) async fn checkpoint_steps(&self, id: &JobId) -> Vec<u64> {
        let request = PageRequest::first(1000);
        let page = self.store.list_checkpoints(&self.project, id, &request).await.expect("list");
        page.items.iter().rev().map(|checkpoint| checkpoint.step).collect()
    }

    /// The curve of a run that nothing disturbs.
    pub(crate) async fn undisturbed_curve(&self, script: Value) -> Vec<StepMetrics> {
        let id = self.queued_job().await;
        let worker = self.start(self.config(&script));
        assert_eq!(self.ended(&id).await.status, JobStatus::Succeeded);
        worker.drain().await;
        self.curve(&id).await
    }

    /// Checks that every step is there once, in the curve and in the events.
    pub(crate) async fn assert_each_step_once(&self, id: &JobId, total: u64) {
        let curve: Vec<u64> = self.curve(id).await.iter().map(|step| step.step).collect();
        let all: Vec<u64> = (1..=total).collect();
        assert_eq!(curve, all, "the curve");
        let mut told: Vec<u64> = self
            .events(id)
            .await
            .iter()
            .filter(|event| event.kind == EventType::Metrics)
            .filter_map(|event| event.data.as_ref()?["step"].as_u64())
            .collect();
        told.sort_unstable();
        assert_eq!(told, all, "the events");
    }

    /// The ids of the trainers that were started with this test's `pid_file`.
    pub(crate) fn trainer_pids(&self) -> Vec<u32> {
        let Ok(text) = std::fs::read_to_string(self.pid_file()) else { return Vec::new() };
        text.lines().map(|line| line.parse().expect("pid")).collect()
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.dir.path().join("pids")
    }

    /// A file for a script to wait for.
    pub(crate) fn gate(&self) -> PathBuf {
        self.dir.path().join("gate")
    }

    pub(crate) fn open_gate(&self) {
        std::fs::write(self.gate(), "").expect("write");
    }
}

/// A worker in a task.
pub(crate) struct Running {
    task: JoinHandle<Result<(), WorkerError>>,
    shutdown: CancellationToken,
}

impl Running {
    /// Stops it as SIGTERM does.
    pub(crate) async fn drain(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.task)
            .await
            .expect("the worker stops")
            .expect("it does not panic")
            .expect("it worked");
    }

    /// Ends it in the middle of whatever it does, as a crash would.
    pub(crate) async fn crash(self) {
        self.task.abort();
        assert!(self.task.await.expect_err("aborted").is_cancelled());
    }
}

/// What `look` finds, as soon as it finds something.
pub(crate) async fn eventually<T>(look: impl AsyncFn() -> Option<T>) -> T {
    let waiting = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it happens in time")
}

/// Whether a process runs; one that has ended and waits to be reaped does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    match std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")) {
        Ok(stat) => !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])),
        Err(_) => false,
    }
}
