use super::*;
use crate::fixtures::{World, resolved};
use crate::lease::GiveBack;
use crate::validation::Validated;

const LONG: Duration = Duration::from_secs(3600);

async fn woken(listener: &mut Listener) {
    tokio::time::timeout(Duration::from_secs(30), listener.wait(LONG))
        .await
        .expect("nobody woke it")
        .expect("connection");
}

#[tokio::test]
async fn a_new_job_wakes_validators_and_a_queued_one_workers() {
    let world = World::new().await;
    let mut validator = world.store().listen(Channel::Validation).await.expect("listen");
    let mut worker = world.store().listen(Channel::Queue).await.expect("listen");
    let job = world.job().await;
    woken(&mut validator).await;
    let validated = Validated { resolved: resolved(), events: Vec::new() };
    world.store().accept_files(&job.id, validated).await.expect("accept");
    woken(&mut worker).await;
}

#[tokio::test]
async fn a_job_that_is_given_back_or_resumed_wakes_workers() {
    let world = World::new().await;
    let (store, project) = (world.store(), &world.caller.project_id);
    let claimed = world.running_job().await;
    let mut worker = store.listen(Channel::Queue).await.expect("listen");
    store.give_back(&claimed.lease, GiveBack::WorkerStops).await.expect("give back");
    woken(&mut worker).await;
    store.pause_job(project, &claimed.job.id).await.expect("pause");
    let mut worker = store.listen(Channel::Queue).await.expect("listen");
    store.resume_job(project, &claimed.job.id).await.expect("resume");
    woken(&mut worker).await;
}

#[tokio::test]
async fn a_wait_ends_by_itself_and_can_be_cancelled_without_losing_anything() {
    let world = World::new().await;
    let mut validator = world.store().listen(Channel::Validation).await.expect("listen");
    for _ in 0..20 {
        validator.wait(Duration::from_millis(1)).await.expect("connection");
    }
    world.job().await;
    woken(&mut validator).await;
}
