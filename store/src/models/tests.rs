use super::*;
use crate::fixtures::{World, checkpoint, resolved, tenant};
use crate::page::PageRequest;
use bytes::Bytes;
use tunesmith_core::ids::checkpoint_model_name;

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
    assert_eq!((model.place.step, &*model.base_model), (12, "smol"));
    assert_eq!(model.hyperparameters, resolved());
    assert_eq!(store.list_models(project).await.expect("list"), std::slice::from_ref(&model));
    let early = store.model(project, &checkpoint_model_name(&name, 6)).await.expect("checkpoint");
    assert_eq!((early.place.step, early.job_id), (6, model.job_id));
    let missing = store.model(project, &checkpoint_model_name(&name, 7)).await;
    assert!(matches!(missing, Err(StoreError::NotFound { .. })));
}

#[tokio::test]
async fn a_deleted_model_takes_its_weights_along_and_leaves_other_checkpoints() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let name = tuned(&world).await;
    let job = store.model(project, &name).await.expect("model").job_id;
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
    let job = store.model(project, &name).await.expect("model").job_id;
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
