use super::*;
use crate::base_models::BaseModel;
use crate::fixtures::{World, checkpoint, once, resolved};
use crate::jobs::{Job, NewJob};
use crate::models::Model;
use crate::validation::Validated;
use bytes::Bytes;
use serde_json::json;
use tunesmith_core::ids::{BaseModelId, checkpoint_model_name};
use tunesmith_core::weights::{CheckpointPlace, MANIFEST_NAME, Manifest, ManifestFile};

/// A job on `base` that starts from `model`, where that is a tuned one.
async fn job(world: &World, base: &BaseModelId, model: Option<&Model>) -> Result<Job, StoreError> {
    let new = NewJob {
        model: model.map_or("smol".to_owned(), |model| model.name.clone()),
        is_tuned: model.is_some(),
        base_model_id: base.clone(),
        ..world.new_job()
    };
    Ok(world.store().create_job(&world.caller, &new, &once(0)).await?.job)
}

/// The model that such a job makes, whose weights are a directory.
async fn tuned(world: &World, base: &BaseModelId, model: Option<&Model>) -> Model {
    let (store, job) = (world.store(), job(world, base, model).await.expect("job"));
    let validated = Validated { resolved: resolved(), events: Vec::new() };
    store.accept_files(&job.id, validated).await.expect("accepted");
    let claimed = world.claim("first").await.expect("a job waits");
    assert_eq!(claimed.job.id, job.id);
    for step in [6, 12] {
        let place = CheckpointPlace { job: job.id.clone(), attempt: 1, step };
        put_directory(world, &place.into()).await;
        store.record_checkpoint(&claimed.lease, &checkpoint(step)).await.expect("checkpoint");
    }
    let completed = world.completed().await;
    store.complete_job(&claimed.lease, &completed).await.expect("complete");
    store.model(&world.caller.project_id, &job.model_name).await.expect("model")
}

async fn put_directory(world: &World, place: &WeightsPlace) {
    let (prefix, config) = (place.clone().into(), Bytes::from_static(b"{\"hidden_size\": 8}"));
    let prefix: crate::objects::ObjectPrefix = prefix;
    let described = ManifestFile::measure("config.json", &*config).expect("measure");
    let manifest = serde_json::to_vec(&Manifest { files: vec![described] }).expect("json");
    for (name, content) in [("config.json", config), (MANIFEST_NAME, manifest.into())] {
        world.store().objects().put_bytes(&prefix.file(name), content).await.expect("put");
    }
}

async fn are_there(world: &World, place: &WeightsPlace) -> bool {
    !world.store().objects().list(&place.clone().into()).await.expect("list").is_empty()
}

async fn delete(world: &World, name: &str) {
    world.store().delete_model(&world.caller.project_id, name).await.expect("delete");
}

#[tokio::test]
async fn a_tuned_model_is_a_base_model_that_no_list_shows_and_no_name_finds() {
    let world = World::new().await;
    let store = world.store();
    let full = tuned(&world, &world.base_model, None).await;
    let calls = (0..4).map(|_| store.tuned_base(&full));
    let made: Vec<BaseModel> = futures::future::join_all(calls)
        .await
        .into_iter()
        .map(|made| made.expect("made"))
        .collect();
    assert!(made.iter().all(|base| base == &made[0]), "one for all");
    let base = &made[0];
    assert_eq!((base.prefix(), &base.name), (full.weights(), &full.name));
    assert_eq!((base.config["hidden_size"].as_u64(), base.context_length), (Some(8), 2048));
    assert_eq!(base.origin_name(), "smol");
    let config = store.objects().read(&base.file("config.json")).await.expect("object");
    assert_eq!(config.len() as u64, base.bytes());
    assert_eq!(&store.base_model_by_id(&base.id).await.expect("by id"), base);

    let listed = store.list_base_models().await.expect("list");
    assert_eq!(listed.iter().map(|model| &*model.name).collect::<Vec<_>>(), ["smol"]);
    assert_eq!(listed[0].origin_name(), "smol");
    let by_name = store.base_model(&full.name).await;
    assert!(matches!(by_name, Err(StoreError::NotFound { .. })), "{by_name:?}");
    assert_eq!(store.default_base_model().await.expect("asked"), Some(world.base_model.clone()));

    // Over however many jobs, it comes from what was imported, and is as fast.
    let again = tuned(&world, &base.id, Some(&full)).await;
    assert_eq!(again.base_model_id, base.id);
    let second = store.tuned_base(&again).await.expect("made");
    let origin = second.tuned.map(|tuned| (tuned.origin, tuned.origin_name));
    assert_eq!(origin, Some((world.base_model.clone(), "smol".to_owned())));
    let done = "UPDATE jobs SET last_step = 12";
    sqlx::query(done).execute(&store.pool).await.expect("steps");
    sqlx::query(
        "INSERT INTO job_metrics (job_id, step, epoch, train_loss, train_mean_token_accuracy,
             learning_rate, grad_norm, tokens, tokens_per_second, elapsed_seconds)
         SELECT id, last_step, 1, 1, 1, 1, 1, 100, 1, 4 FROM jobs",
    )
    .execute(&store.pool)
    .await
    .expect("metrics");
    for base in [&world.base_model, &base.id, &second.id] {
        let speed = store.training_speed(base, &resolved()).await.expect("asked");
        assert_eq!(speed.map(|speed| (speed.jobs, speed.tokens_per_second)), Some((2, 25.0)));
    }
}

#[tokio::test]
async fn weights_that_an_adapter_goes_on_stay_for_as_long_as_anything_does() {
    let world = World::new().await;
    let store = world.store();
    let full = tuned(&world, &world.base_model, None).await;
    let base = store.tuned_base(&full).await.expect("base");
    let adapter = tuned(&world, &base.id, Some(&full)).await;
    let running = job(&world, &base.id, Some(&adapter)).await.expect("job");
    delete(&world, &full.name).await;
    let gone = job(&world, &base.id, Some(&full)).await;
    assert!(matches!(gone, Err(StoreError::NotFound { kind: "model", .. })), "{gone:?}");

    // The model, its other checkpoint, and a job: whichever goes last takes them along.
    delete(&world, &adapter.name).await;
    assert!(!are_there(&world, &adapter.place).await, "nothing needs the adapter");
    for go in 0..2 {
        assert_eq!(store.purge_weights().await.expect("purged"), 0, "{go}");
        assert!(are_there(&world, &full.place).await, "{go}");
        match go {
            0 => delete(&world, &checkpoint_model_name(&adapter.name, 6)).await,
            _ => {
                let cancelled = store.request_cancel(&world.caller.project_id, &running.id).await;
                cancelled.expect("cancel");
            }
        }
    }
    assert_eq!(store.purge_weights().await.expect("purged"), 1);
    assert!(!are_there(&world, &full.place).await);
    assert_eq!(store.purge_weights().await.expect("purged"), 0);
    assert_eq!(&store.base_model_by_id(&base.id).await.expect("the job's history"), &base);
}

#[tokio::test]
async fn a_model_on_which_nothing_stands_takes_its_weights_along_at_once() {
    let world = World::new().await;
    let store = world.store();
    let full = tuned(&world, &world.base_model, None).await;
    store.tuned_base(&full).await.expect("base");
    delete(&world, &full.name).await;
    assert!(!are_there(&world, &full.place).await);

    let full = tuned(&world, &world.base_model, None).await;
    delete(&world, &full.name).await;
    let base = store.tuned_base(&full).await;
    assert!(matches!(base, Err(StoreError::NotFound { kind: "model", .. })), "{base:?}");
    assert_eq!(store.list_base_models().await.expect("list").len(), 1);
}

#[tokio::test]
async fn weights_of_a_deleted_checkpoint_that_its_job_may_need_go_when_it_has_ended() {
    let world = World::new().await;
    let (store, claimed) = (world.store(), world.running_job().await);
    let place = CheckpointPlace { job: claimed.job.id.clone(), attempt: 1, step: 6 }.into();
    put_directory(&world, &place).await;
    store.record_checkpoint(&claimed.lease, &checkpoint(6)).await.expect("checkpoint");
    delete(&world, &checkpoint_model_name(&claimed.job.model_name, 6)).await;
    assert_eq!(store.purge_weights().await.expect("purged"), 0);
    assert!(are_there(&world, &place).await);
    put_directory(
        &world,
        &CheckpointPlace { job: claimed.job.id.clone(), attempt: 1, step: 12 }.into(),
    )
    .await;
    store.record_checkpoint(&claimed.lease, &checkpoint(12)).await.expect("checkpoint");
    let completed = world.completed().await;
    store.complete_job(&claimed.lease, &completed).await.expect("complete");
    assert_eq!(store.purge_weights().await.expect("purged"), 1);
    assert!(!are_there(&world, &place).await);
    let kept: String = claimed.job.model_name;
    let model = store.model(&world.caller.project_id, &kept).await.expect("model");
    assert!(are_there(&world, &model.place).await);
    assert_eq!(json!(model.place)["checkpoint"]["step"], 12);
}
