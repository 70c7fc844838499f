use super::*;
use crate::fixtures::{World, checkpoint, once, resolved, tenant};
use crate::jobs::{Job, NewJob};
use crate::page::PageRequest;
use bytes::Bytes;
use tunesmith_core::ids::{JobId, checkpoint_model_name};

/// A job that succeeded with checkpoints at steps 6 and 12, each with an object.
async fn tuned(world: &World) -> String {
    let claimed = world.running_job().await;
    for step in [6, 12] {
        put_weights(world, &claimed.job.id, step).await;
        world
            .store()
            .record_checkpoint(&claimed.lease, &checkpoint(step))
            .await
            .expect("checkpoint");
    }
    let completed = world.completed().await;
    world.store().complete_job(&claimed.lease, &completed).await.expect("complete");
    claimed.job.model_name
}

fn checkpoint_of(model: &Model) -> &CheckpointPlace {
    match &model.place {
        WeightsPlace::Checkpoint(place) => place,
        other => panic!("{other:?} is no checkpoint"),
    }
}

fn step(model: &Model) -> u64 {
    checkpoint_of(model).step
}

fn job_of(model: &Model) -> JobId {
    checkpoint_of(model).job.clone()
}

fn weights(job: &JobId, step: u64) -> ObjectPrefix {
    ObjectPrefix::CheckpointWeights(CheckpointPlace { job: job.clone(), attempt: 1, step })
}

async fn put_weights(world: &World, job: &JobId, step: u64) {
    let key = weights(job, step).file("adapter_model.safetensors");
    world.store().objects().put_bytes(&key, Bytes::from_static(b"w")).await.expect("put");
}

async fn has_weights(world: &World, job: &JobId, step: u64) -> bool {
    !world.store().objects().list(&weights(job, step)).await.expect("list").is_empty()
}

#[tokio::test]
async fn a_model_and_its_checkpoints_are_found_by_name() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let name = tuned(&world).await;
    let model = store.model(project, &name).await.expect("model");
    assert_eq!((step(&model), &model.base_model_id), (12, &world.base_model));
    assert_eq!(model.adapter, resolved().adapter);
    assert_eq!(store.list_models(project).await.expect("list"), std::slice::from_ref(&model));
    let early = store.model(project, &checkpoint_model_name(&name, 6)).await.expect("checkpoint");
    assert_eq!((step(&early), job_of(&early)), (6, job_of(&model)));
    let missing = store.model(project, &checkpoint_model_name(&name, 7)).await;
    assert!(matches!(missing, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn a_deleted_model_takes_its_weights_along_and_leaves_other_checkpoints() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let name = tuned(&world).await;
    let job = job_of(&store.model(project, &name).await.expect("model"));
    store.delete_model(project, &name).await.expect("delete");
    assert!(matches!(store.model(project, &name).await, Err(StoreError::NotFound { .. })));
    assert!(store.model(project, &checkpoint_model_name(&name, 12)).await.is_err());
    assert!(store.model(project, &checkpoint_model_name(&name, 6)).await.is_ok());
    assert!(!has_weights(&world, &job, 12).await);
    assert!(has_weights(&world, &job, 6).await);
    assert!(store.delete_model(project, &name).await.is_err(), "deleted twice");
    assert_eq!(world.get(&job).await.fine_tuned_model(), Some(&*name), "the job keeps the name");
}

#[tokio::test]
async fn a_deleted_checkpoint_leaves_weights_that_the_model_needs() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let name = tuned(&world).await;
    let job = job_of(&store.model(project, &name).await.expect("model"));
    store.delete_model(project, &checkpoint_model_name(&name, 6)).await.expect("early");
    store.delete_model(project, &checkpoint_model_name(&name, 12)).await.expect("last");
    assert!(!has_weights(&world, &job, 6).await);
    assert!(has_weights(&world, &job, 12).await);
    assert!(store.model(project, &name).await.is_ok());
    let page = store.list_checkpoints(project, &job, &PageRequest::first(10)).await.expect("page");
    assert_eq!(page.items, []);
}

#[tokio::test]
async fn a_deleted_checkpoint_leaves_weights_that_its_job_resumes_from() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    let job = &claimed.job.id;
    for step in [6, 12] {
        put_weights(&world, job, step).await;
        store.record_checkpoint(&claimed.lease, &checkpoint(step)).await.expect("checkpoint");
        let name = checkpoint_model_name(&claimed.job.model_name, step);
        store.delete_model(project, &name).await.expect("delete");
        assert!(store.model(project, &name).await.is_err());
        assert!(has_weights(&world, job, step).await);
    }
}

#[tokio::test]
async fn another_project_sees_and_deletes_nothing() {
    let world = World::new().await;
    let store = world.store();
    let name = tuned(&world).await;
    let other = tenant(store, "other").await.project_id;
    assert_eq!(store.list_models(&other).await.expect("list"), []);
    for name in [name.clone(), checkpoint_model_name(&name, 6)] {
        assert!(matches!(store.model(&other, &name).await, Err(StoreError::NotFound { .. })));
        assert!(matches!(
            store.delete_model(&other, &name).await,
            Err(StoreError::NotFound { .. })
        ));
    }
    assert!(store.model(&world.caller.project_id, &name).await.is_ok());
}

/// A job that begins with the weights of `name`.
async fn job_from(world: &World, name: &str) -> Result<Job, StoreError> {
    let (store, caller) = (world.store(), &world.caller);
    let start = store.model(&caller.project_id, name).await?;
    let new = NewJob {
        model: start.name,
        is_tuned: true,
        base_model_id: start.base_model_id,
        start: Some(start.place),
        ..world.new_job()
    };
    store.create_job(caller, &new, &once(1)).await.map(|created| created.job)
}

#[tokio::test]
async fn weights_that_an_unfinished_job_starts_from_outlive_their_model() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let name = tuned(&world).await;
    let start = store.model(project, &name).await.expect("model");
    let job = job_from(&world, &name).await.expect("job");
    assert_eq!((&job.start, &job.model), (&Some(start.place.clone()), &name));
    assert!(job.model_name.starts_with("ft:smol:acme::"), "{}", job.model_name);
    store.delete_model(project, &name).await.expect("delete");
    assert!(has_weights(&world, &job_of(&start), 12).await);

    // A checkpoint that only an ended job has started from goes with its weights.
    let early = checkpoint_model_name(&name, 6);
    let other = job_from(&world, &early).await.expect("job");
    store.request_cancel(project, &other.id).await.expect("cancel");
    store.delete_model(project, &early).await.expect("delete");
    assert!(!has_weights(&world, &job_of(&start), 6).await);
}

#[tokio::test]
async fn a_model_that_is_deleted_meanwhile_starts_no_job() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let name = tuned(&world).await;
    for name in [name.clone(), checkpoint_model_name(&name, 6)] {
        let model = store.model(&caller.project_id, &name).await.expect("model");
        store.delete_model(&caller.project_id, &name).await.expect("delete");
        for start in [Some(model.place), None] {
            let new = NewJob { model: name.clone(), is_tuned: true, start, ..world.new_job() };
            let made = store.create_job(caller, &new, &once(1)).await;
            assert!(matches!(made, Err(StoreError::NotFound { kind: "model", .. })), "{made:?}");
        }
    }
}

#[tokio::test]
async fn an_imported_adapter_is_a_model_of_its_project() {
    let world = World::new().await;
    let (store, caller) = (world.store(), &world.caller);
    let new = NewImportedAdapter {
        id: ImportedAdapterId::generate(&mut rand::rng()),
        base_model_id: world.base_model.clone(),
        tuned: None,
        base_model: "smol".to_owned(),
        suffix: Some("mine".to_owned()),
        adapter: AdapterConfig { r: 3, ..AdapterConfig::default() },
    };
    let prefix = ObjectPrefix::ImportedAdapter(new.id.clone());
    let key = prefix.file("adapter_model.safetensors");
    store.objects().put_bytes(&key, Bytes::from_static(b"w")).await.expect("put");
    let begun = store.begin_import(&Importing::Adapter(new.id.clone())).await;
    begun.expect("begun");
    let model = store.import_adapter(caller, &new, &once(1)).await.expect("imported");
    assert!(model.name.starts_with("ft:smol:acme:mine:"), "{}", model.name);
    assert_eq!((&model.adapter, model.weights()), (&new.adapter, prefix.clone()));
    assert_eq!(store.model(&caller.project_id, &model.name).await.expect("there"), model);
    let made = tuned(&world).await;
    let names: Vec<_> = store.list_models(&caller.project_id).await.expect("list");
    assert_eq!(names.iter().map(|m| &m.name).collect::<Vec<_>>(), [&model.name, &made]);
    let other = tenant(store, "other").await.project_id;
    assert!(store.model(&other, &model.name).await.is_err());
    assert!(store.delete_model(&other, &model.name).await.is_err());

    let job = job_from(&world, &model.name).await.expect("job");
    assert_eq!(job.start, Some(WeightsPlace::Imported(new.id)));
    store.request_cancel(&caller.project_id, &job.id).await.expect("cancel");
    store.delete_model(&caller.project_id, &model.name).await.expect("delete");
    assert!(store.model(&caller.project_id, &model.name).await.is_err());
    assert!(store.objects().list(&prefix).await.expect("list").is_empty());
}
