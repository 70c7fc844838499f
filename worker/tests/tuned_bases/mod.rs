//! Tuned models that adapters go on, in a cache that has room for one.

use crate::support::{Running, World, is_alive};
use serde_json::json;
use std::path::PathBuf;
use tunesmith_core::state::JobStatus;
use tunesmith_store::base_models::BaseModel;
use tunesmith_worker::ModelCache;

/// A worker whose trainer waits for the gate after its first step.
fn start(world: &World, base: &BaseModel) -> Running {
    let script = json!({
        "total_steps": 2, "checkpoint_steps": 2, "pid_file": world.pid_file(),
        "wait_at_step": 1, "wait_for": world.gate(), "ignore_stop": true,
    });
    let mut config = world.config(&script);
    config.tuned_cache_bytes = base.bytes();
    world.start(config)
}

/// Where the cache has it.
fn dir(world: &World, base: &BaseModel) -> PathBuf {
    world.cache_dir().join("tuned-models").join(base.id.as_str())
}

/// Fetches another model, as a sampler beside the worker does, and lets go of it.
async fn fetch_another(world: &World, job: &str) {
    let other = world.db.tuned_base(job, &world.base_model).await;
    let cache = ModelCache::new(&world.cache_dir(), other.bytes());
    let cached = cache.model(world.store.objects(), &other).await.expect("a model");
    assert!(cached.path().join("config.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tuned_base_stays_while_a_trainer_reads_it_and_may_go_after_the_job() {
    let world = World::new().await;
    let base = world.db.tuned_base("ftjob-a", &world.base_model).await;
    let worker = start(&world, &base);
    let id = world.queued_job_on(&base).await;
    world.reached(&id, 1).await;
    fetch_another(&world, "ftjob-b").await;
    let [pid] = world.trainer_pids()[..] else { panic!("one trainer") };
    assert!(is_alive(pid));
    assert!(dir(&world, &base).exists(), "the trainer reads it");

    world.open_gate();
    assert_eq!(world.ended(&id).await.status, JobStatus::Succeeded);
    // The worker does one job after the other: with this one it has let go of the first.
    let next = world.queued_job().await;
    assert_eq!(world.ended(&next).await.status, JobStatus::Succeeded);
    fetch_another(&world, "ftjob-c").await;
    assert!(!dir(&world, &base).exists(), "nobody uses it");
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tuned_base_may_go_when_its_job_was_cancelled() {
    let world = World::new().await;
    let base = world.db.tuned_base("ftjob-a", &world.base_model).await;
    let worker = start(&world, &base);
    let id = world.queued_job_on(&base).await;
    world.reached(&id, 1).await;
    assert!(dir(&world, &base).exists());
    world.store.request_cancel(&world.project, &id).await.expect("cancel");
    assert_eq!(world.ended(&id).await.status, JobStatus::Cancelled);
    worker.drain().await;
    fetch_another(&world, "ftjob-b").await;
    assert!(!dir(&world, &base).exists(), "nobody uses it");
}
