//! Orders over HTTP to a sampler with real child processes, over a real PostgreSQL.

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::export_check::{CHECK_PATH, CheckOrder, CheckReply, ExportForm};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::ids::BaseModelId;
use tunesmith_core::sampling::Sampling;
use tunesmith_core::serving::{SAMPLE_PATH, SampleLine, SampleOrder, TunedWeights};
use tunesmith_core::weights::CheckpointPlace;
use tunesmith_core::weights::{MANIFEST_NAME, Manifest, ManifestFile};
use tunesmith_sampler::{Sampler, SamplerConfig, SamplerError};
use tunesmith_store::base_models::NewBaseModel;
use tunesmith_store::objects::ObjectPrefix;
use tunesmith_store::samplers::Sampler as Row;
use tunesmith_store::test_db::TestDb;
use tunesmith_worker::{ChildCommand, ModelCache};

/// What the scripted child does on these tokens.
const DIE: u32 = 9001;
const HANG: u32 = 9002;
const FAIL: u32 = 9003;
const TELL: u32 = 9004;

/// A sampler that runs.
struct World {
    db: TestDb,
    base: BaseModelId,
    dir: TempDir,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), SamplerError>>,
    http: reqwest::Client,
}

impl World {
    async fn new(change: impl FnOnce(&mut SamplerConfig)) -> Self {
        // Fails only when it was installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (db, dir) = (TestDb::new().await, tempfile::tempdir().expect("temp dir"));
        let base = base_model(&db, "tiny").await;
        let child = ChildCommand {
            program: PathBuf::from(env!("CARGO_BIN_EXE_scripted-sampler")),
            args: Vec::new(),
            env: Vec::new(),
        };
        let (cache, work) = (cache_dir(&dir), dir.path().join("work"));
        let mut config = SamplerConfig::new("127.0.0.1:0", cache, work, "cpu", child);
        change(&mut config);
        let sampler = Sampler::bind(db.store().clone(), config).expect("a free port");
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(sampler.run(shutdown.clone()));
        Self { db, base, dir, shutdown, task, http: reqwest::Client::new() }
    }

    /// The sampler as front-ends find it.
    async fn row(&self) -> Row {
        for _ in 0..600 {
            if let [row] = self.db.store().live_samplers().await.expect("rows").as_slice() {
                return row.clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the sampler does not say that it is there");
    }

    fn order(&self, prompt: &[u32]) -> SampleOrder {
        SampleOrder {
            base_model: self.base.clone(),
            tuned: None,
            prompt: prompt.to_vec(),
            n: 1,
            sampling: Sampling::greedy(5),
            low_priority: false,
        }
    }

    async fn send(&self, order: &SampleOrder) -> reqwest::Response {
        let row = self.row().await;
        let request = self.http.post(format!("{}{SAMPLE_PATH}", row.url)).bearer_auth(row.token);
        request.json(order).send().await.expect("a reply")
    }

    /// What is said of an order that never ends, from its first token on.
    async fn hang(&self) -> impl Stream<Item = reqwest::Result<Bytes>> {
        let mut said = self.send(&self.order(&[HANG])).await.bytes_stream();
        loop {
            let line = said.next().await.expect("a line").expect("bytes");
            if line.starts_with(b"{\"type\":\"token\"") {
                return said;
            }
            // The child is not ready yet.
            assert_eq!(line, "{\"type\":\"waiting\"}\n");
        }
    }

    /// All that is said of an order.
    async fn lines(&self, order: &SampleOrder) -> Vec<SampleLine> {
        let reply = self.send(order).await;
        assert_eq!(reply.status(), 200);
        let text = reply.text().await.expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("a line")).collect()
    }

    /// The tokens of an order that comes to its end.
    async fn tokens(&self, order: &SampleOrder) -> Vec<u32> {
        let mut tokens = Vec::new();
        let lines = self.lines(order).await;
        assert!(matches!(lines.last(), Some(SampleLine::End { .. })), "{lines:?}");
        for line in lines {
            if let SampleLine::Token { token, .. } = line {
                tokens.push(token.id);
            }
        }
        tokens
    }

    /// What is said of an archive of these files.
    async fn check(&self, tuned: &TunedWeights, token: u32, files: &[&str]) -> CheckReply {
        let mut archive = tar::Builder::new(Vec::new());
        for name in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(2);
            // Unlike `set_path`, this takes names that no archive of ours has.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, b"{}".as_slice()).expect("append");
        }
        let order = CheckOrder {
            base_model: self.base.clone(),
            tuned: tuned.clone(),
            form: ExportForm::Model,
            prompts: vec![vec![token]],
        };
        let mut body = serde_json::to_vec(&order).expect("json");
        body.push(b'\n');
        body.extend(archive.into_inner().expect("archive"));
        let row = self.row().await;
        let request = self.http.post(format!("{}{CHECK_PATH}", row.url)).bearer_auth(row.token);
        let reply = request.body(body).send().await.expect("a reply");
        assert_eq!(reply.status(), 200);
        reply.json().await.expect("a reply in JSON")
    }

    /// How often the child was told to cancel and to unload, and its process id.
    async fn told(&self) -> Vec<u32> {
        self.tokens(&self.order(&[TELL])).await
    }

    /// Weights in the object store that consist of one file.
    async fn weights(&self, job: &str, file: &str, kind: AdapterType) -> TunedWeights {
        let place = CheckpointPlace { job: job.into(), attempt: 1, step: 2 };
        let prefix = ObjectPrefix::CheckpointWeights(place.clone());
        let objects = self.db.store().objects();
        let manifest = Manifest {
            files: vec![ManifestFile::measure(file, b"{}".as_slice()).expect("measure")],
        };
        objects.put_bytes(&prefix.file(file), "{}".into()).await.expect("put");
        let manifest = serde_json::to_vec(&manifest).expect("json");
        objects.put_bytes(&prefix.file(MANIFEST_NAME), manifest.into()).await.expect("put");
        TunedWeights { place: place.into(), kind }
    }

    /// Asks a tuned base model from now on, in a cache that has room for one.
    async fn on_tuned_base() -> (Self, PathBuf) {
        // Its only file is `{}`.
        let mut world = Self::new(|config| config.tuned_cache_bytes = 2).await;
        let base = world.db.tuned_base("ftjob-base", &world.base).await;
        assert_eq!(base.bytes(), 2);
        let dir = cache_dir(&world.dir).join("tuned-models").join(base.id.as_str());
        world.base = base.id;
        (world, dir)
    }

    /// Fetches another tuned base model, as a worker beside the sampler does, and lets go of it.
    async fn fetch_another(&self, job: &str) {
        let other = self.db.tuned_base(job, &self.base).await;
        let cache = ModelCache::new(&cache_dir(&self.dir), other.bytes());
        let cached = cache.model(self.db.store().objects(), &other).await.expect("a model");
        assert!(cached.path().join("config.json").exists());
    }

    /// The directory with which the child of a check says that it waits.
    async fn waiting_check(&self) -> PathBuf {
        let below = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
        for _ in 0..600 {
            let samplers = below(self.dir.path().join("work"));
            let mut scratch = samplers
                .flat_map(|sampler| below(sampler.path()))
                .map(|job| job.path().join("imported"));
            if let Some(found) = scratch.find(|dir| dir.exists()) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no check waits");
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("no panic").expect("stopped");
        assert!(self.db.store().live_samplers().await.expect("rows").is_empty());
        let work = std::fs::read_dir(self.dir.path().join("work")).expect("work directory");
        let left: Vec<_> = work.flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["sweep"], "nothing of it is left but the sweep's lock");
    }
}

async fn base_model(db: &TestDb, name: &str) -> BaseModelId {
    let files = tempfile::tempdir().expect("temp dir");
    std::fs::write(files.path().join("config.json"), "{}").expect("write");
    let new = NewBaseModel { name: name.to_owned(), context_length: 64, config: json!({}) };
    db.store().import_base_model(&new, files.path()).await.expect("import").id
}

fn cache_dir(dir: &TempDir) -> PathBuf {
    dir.path().join("cache")
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn failed(lines: &[SampleLine]) -> (ErrorCode, String) {
    match lines.last() {
        Some(SampleLine::Failed { error }) => (error.code, error.message.clone()),
        other => panic!("it did not fail: {other:?}"),
    }
}

#[tokio::test]
async fn base_model_and_adapters_answer_and_the_least_used_adapter_goes() {
    let world = World::new(|config| config.max_adapters = 2).await;
    assert_eq!(world.tokens(&world.order(&[1, 2, 3])).await, [2, 3, 4]);
    let mut twice = world.order(&[5]);
    twice.n = 2;
    assert_eq!(world.tokens(&twice).await, [6, 6]);
    for job in ["ftjob-a", "ftjob-b", "ftjob-c", "ftjob-a"] {
        let mut order = world.order(&[1, 2]);
        order.tuned = Some(world.weights(job, "adapter_config.json", AdapterType::Lora).await);
        assert_eq!(world.tokens(&order).await, [101, 102], "{job}");
    }
    // c takes a's place and a takes b's.
    let [cancelled, unloaded, _] = world.told().await[..] else { panic!("three") };
    assert_eq!((cancelled, unloaded), (0, 2));
    assert_eq!(world.row().await.models, [world.base.to_string()]);
    let mut order = world.order(&[1]);
    order.tuned = Some(world.weights("ftjob-d", "other.json", AdapterType::Lora).await);
    let (code, message) = failed(&world.lines(&order).await);
    assert_eq!(code, ErrorCode::SamplerFailed);
    assert!(message.ends_with("there is no adapter_config.json"), "{message}");
    assert_eq!(failed(&world.lines(&world.order(&[FAIL])).await).0, ErrorCode::OutOfMemory);
    world.stop().await;
}

#[tokio::test]
async fn one_model_makes_room_for_another_and_a_full_one_is_a_model_of_its_own() {
    let world = World::new(|_| ()).await;
    let first = world.told().await[2];
    assert_eq!(world.told().await[2], first, "the same process");
    let mut full = world.order(&[TELL]);
    full.tuned = Some(world.weights("ftjob-full", "config.json", AdapterType::Full).await);
    let second = world.tokens(&full).await[2];
    assert_ne!(second, first);
    assert!(!is_alive(first), "one model at a time");
    for _ in 0..600 {
        if world.row().await.models == ["ftjob-full-1-2"] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.row().await.models, ["ftjob-full-1-2"]);
    assert_ne!(world.told().await[2], second);
    let mut gone = world.order(&[1]);
    gone.base_model = "basemodel_gone".into();
    let (code, message) = failed(&world.lines(&gone).await);
    assert_eq!(code, ErrorCode::SamplerFailed);
    assert!(message.starts_with("The model cannot be loaded: no base model"), "{message}");
    world.stop().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_cancels_and_a_full_house_refuses() {
    let world = World::new(|config| config.max_orders = 1).await;
    let said = world.hang().await;
    let refused = world.send(&world.order(&[1])).await;
    assert_eq!(refused.status(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    drop(said);
    let mut cancelled = 0;
    for _ in 0..600 {
        // The place is free when the hang-up is seen.
        let reply = world.send(&world.order(&[TELL])).await;
        if reply.status() == 200 {
            let text = reply.text().await.expect("text");
            let line = text.lines().next().expect("a line");
            cancelled =
                serde_json::from_str::<serde_json::Value>(line).expect("json")["token"]["id"]
                    .as_u64()
                    .expect("a count");
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(cancelled, 1);
    world.stop().await;
}

#[tokio::test]
async fn a_child_that_dies_fails_its_orders_and_the_next_one_starts_it_again() {
    let world = World::new(|_| ()).await;
    let hanging = world.send(&world.order(&[HANG])).await;
    let before = world.told().await[2];
    let (code, message) = failed(&world.lines(&world.order(&[DIE])).await);
    assert_eq!(code, ErrorCode::SamplerFailed);
    assert!(message.contains("exited with status 9"), "{message}");
    let text = hanging.text().await.expect("text");
    assert!(text.lines().last().is_some_and(|line| line.contains("\"failed\"")), "{text}");
    assert_ne!(world.told().await[2], before);
    world.stop().await;
}

#[tokio::test]
async fn only_who_shows_the_token_is_let_in() {
    let world = World::new(|_| ()).await;
    let row = world.row().await;
    let url = format!("{}{SAMPLE_PATH}", row.url);
    let order = world.order(&[1]);
    for token in ["", "wrong", &row.token[1..]] {
        let reply = world.http.post(&url).bearer_auth(token).json(&order).send().await;
        assert_eq!(reply.expect("a reply").status(), 401, "{token}");
    }
    let reply = world.http.post(&url).bearer_auth(&row.token).body("{}").send().await;
    assert_eq!(reply.expect("a reply").status(), 400);
    let mut empty = world.order(&[1]);
    empty.prompt.clear();
    assert_eq!(world.send(&empty).await.status(), 400);
    world.stop().await;
}

#[tokio::test]
async fn a_drain_lets_an_order_come_to_its_end() {
    let world = World::new(|_| ()).await;
    let mut said = world.send(&world.order(&[HANG])).await.bytes_stream();
    said.next().await.expect("a line").expect("bytes");
    world.shutdown.cancel();
    // The row goes at once; the order never ends by itself.
    for _ in 0..600 {
        if world.db.store().live_samplers().await.expect("rows").is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!world.task.is_finished(), "the order is still under way");
    drop(said);
    world.stop().await;
}

#[tokio::test]
async fn a_tuned_base_stays_while_its_child_runs_and_may_go_then() {
    let (mut world, dir) = World::on_tuned_base().await;
    let said = world.hang().await;
    world.fetch_another("ftjob-b").await;
    assert!(dir.exists(), "its child answers");
    drop(said);
    let child = world.told().await[2];
    world.fetch_another("ftjob-c").await;
    assert!(is_alive(child));
    assert!(dir.exists(), "its child may be asked again");

    world.base = base_model(&world.db, "other").await;
    assert_ne!(world.told().await[2], child);
    assert!(!is_alive(child), "one model at a time");
    world.fetch_another("ftjob-d").await;
    assert!(!dir.exists(), "nobody uses it");
    world.stop().await;
}

#[tokio::test]
async fn a_tuned_base_whose_child_has_died_may_go() {
    let (world, dir) = World::on_tuned_base().await;
    failed(&world.lines(&world.order(&[DIE])).await);
    assert!(dir.exists());
    world.fetch_another("ftjob-b").await;
    assert!(!dir.exists(), "nobody uses it");
    world.stop().await;
}

#[tokio::test]
async fn a_tuned_base_stays_while_an_export_is_checked_beside_it_and_may_go_then() {
    let (world, dir) = World::on_tuned_base().await;
    let lora = world.weights("ftjob-a", "adapter_config.json", AdapterType::Lora).await;
    let meanwhile = async {
        let scratch = world.waiting_check().await;
        world.fetch_another("ftjob-b").await;
        assert!(dir.exists(), "the check reads it");
        std::fs::remove_dir(scratch).expect("remove");
    };
    let (reply, ()) = tokio::join!(world.check(&lora, HANG, &["a.gguf"]), meanwhile);
    let seen = "a.gguf as model beside config.json and adapter_config.json";
    assert_eq!(reply, CheckReply::Unfit { reason: seen.to_owned() });
    world.fetch_another("ftjob-c").await;
    assert!(!dir.exists(), "nobody uses it");
    world.stop().await;
}

#[tokio::test]
async fn an_export_is_checked_by_a_process_of_its_own_beside_what_is_served() {
    let world = World::new(|_| ()).await;
    let answering = world.told().await[2];
    let lora = world.weights("ftjob-a", "adapter_config.json", AdapterType::Lora).await;
    let full = world.weights("ftjob-b", "config.json", AdapterType::Full).await;
    let (export, reply) = (["a.gguf", "manifest.json"], |seen: &str| CheckReply::Unfit {
        reason: format!("a.gguf+manifest.json as model beside config.json and {seen}"),
    });
    assert_eq!(world.check(&lora, 1, &export).await, reply("adapter_config.json"));
    assert_eq!(world.check(&full, 1, &export).await, reply("nothing"));

    let CheckReply::NotMade { reason } = world.check(&lora, DIE, &export).await else {
        panic!("its process has ended")
    };
    assert_eq!(reason, "the check of the export exited with status 9 without a result");
    for name in ["../out", "/etc/out"] {
        let CheckReply::NotMade { reason } = world.check(&lora, 1, &[name]).await else {
            panic!("{name} is no file of an export")
        };
        assert!(reason.contains("is no file of an export"), "{reason}");
    }
    assert_eq!(world.told().await[2], answering, "who answers is not asked");

    // Another object under the name of the stored weights.
    let key = ObjectPrefix::from(lora.place.clone()).file("adapter_config.json");
    let objects = world.db.store().objects();
    objects.delete(&key).await.expect("delete");
    objects.put_bytes(&key, "[]".into()).await.expect("put");
    let CheckReply::Unfit { reason } = world.check(&lora, 1, &export).await else {
        panic!("what is served is damaged")
    };
    assert!(reason.contains("damaged in the object store"), "{reason}");
    world.stop().await;
}
