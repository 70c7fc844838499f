use super::*;
use crate::events::NewEvent;
use crate::fixtures::{World, resolved, step, step_event, tenant, trainer_failed};
use crate::notify::{Channel, Listener, Woken};
use crate::page::PageRequest;
use crate::validation::Validated;
use std::time::Duration;

async fn woken_by(listener: &mut Listener) -> String {
    let woken = listener.next(Duration::from_secs(30)).await.expect("connection");
    let Woken::By(job) = woken else { panic!("nobody woke it") };
    job
}

fn steps(news: &News) -> Vec<(u64, f64)> {
    news.said
        .iter()
        .map(|(_, said)| match said {
            Said::Step(step) => (step.step, step.train_loss),
            Said::Event(event) => panic!("an event: {event:?}"),
        })
        .collect()
}

#[tokio::test]
async fn events_and_steps_wake_with_the_jobs_id() {
    let world = World::new().await;
    let mut listener = world.store().listen(Channel::Progress).await.expect("listen");
    let job = world.job().await;
    assert_eq!(woken_by(&mut listener).await, job.id.as_str());
    let claimed = {
        let validated = Validated { resolved: resolved(), events: Vec::new() };
        world.store().accept_files(&job.id, validated).await.expect("accept");
        woken_by(&mut listener).await;
        world.claim("first").await.expect("a job waits")
    };
    world.store().record_steps(&claimed.lease, &[step(1, 2.0)], &[]).await.expect("steps");
    assert_eq!(woken_by(&mut listener).await, job.id.as_str());
    // A step that is written again is news as well.
    world.store().record_steps(&claimed.lease, &[step(1, 1.5)], &[]).await.expect("steps");
    assert_eq!(woken_by(&mut listener).await, job.id.as_str());
}

#[tokio::test]
async fn steps_come_as_they_were_written_and_a_repeated_one_comes_again() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let (store, id) = (world.store(), &claimed.job.id);
    let first = [step(1, 3.0), step(2, 2.0), step(3, 1.0)];
    store.record_steps(&claimed.lease, &first, &[]).await.expect("steps");
    let news = store.news(id, Topic::Metrics, 0).await.expect("news");
    assert_eq!(steps(&news), [(1, 3.0), (2, 2.0), (3, 1.0)]);
    assert!(!news.is_complete);
    let place = news.said[2].0;
    let standing = &store.standings(std::slice::from_ref(id)).await.expect("standing")[0];
    assert_eq!((standing.place(Topic::Metrics), standing.has_ended), (place, false));

    store.record_steps(&claimed.lease, &[step(3, 0.5), step(4, 0.25)], &[]).await.expect("steps");
    let news = store.news(id, Topic::Metrics, place).await.expect("news");
    assert_eq!(steps(&news), [(3, 0.5), (4, 0.25)]);
}

#[tokio::test]
async fn news_of_a_job_that_ended_are_complete_once_all_are_read() {
    let world = World::new().await;
    let claimed = world.running_job().await;
    let (store, id) = (world.store(), &claimed.job.id);
    let many: Vec<NewEvent> = (0..BATCH as u64).map(step_event).collect();
    store.record_steps(&claimed.lease, &[step(1, 3.0)], &many).await.expect("steps");
    store.fail_job(&claimed.lease, trainer_failed()).await.expect("failed");
    let first = store.news(id, Topic::Events, 0).await.expect("news");
    assert_eq!((first.said.len(), first.is_complete), (BATCH, false));
    let rest = store.news(id, Topic::Events, first.said[BATCH - 1].0).await.expect("news");
    assert!(rest.is_complete);
    let messages = world.messages(id).await;
    let Some((_, Said::Event(last))) = rest.said.last() else { panic!("no event") };
    assert_eq!(messages.last(), Some(&last.message));
    let (project, page) = (&world.caller.project_id, PageRequest::first(2 * BATCH as u32));
    let all = store.list_events(project, id, &page).await.expect("events");
    assert_eq!(all.items.len(), BATCH + rest.said.len());
}

#[tokio::test]
async fn a_place_is_that_of_an_event_of_the_same_job() {
    let world = World::new().await;
    let (job, other) = (world.job().await, world.job().await);
    let (store, project) = (world.store(), &world.caller.project_id);
    let news = store.news(&job.id, Topic::Events, 0).await.expect("news");
    let (place, Said::Event(event)) = &news.said[0] else { panic!("no event") };
    let id = Some(event.id.as_str());
    assert_eq!(store.place_of_event(project, &job.id, id).await.expect("place"), *place);
    assert_eq!(store.place_of_event(project, &job.id, None).await.expect("place"), 0);
    let error = store.place_of_event(project, &other.id, id).await.expect_err("another job's");
    assert!(matches!(error, StoreError::UnknownCursor { .. }), "{error}");
    let stranger = tenant(store, "stranger").await;
    let error =
        store.place_of_event(&stranger.project_id, &job.id, id).await.expect_err("a stranger");
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
}
