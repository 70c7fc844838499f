//! Jobs as they were read, remembered until they change.
//!
//! A job that is looked at again and again rarely changes in between. To read it anew costs little in
//! the database, and much here: 29 columns become a job, and the job becomes JSON. So a look asks for
//! the version of the job's row, and reads the rest only where that is another than the one that is
//! remembered. Nobody is ever shown what was true before: every look asks the database.
//!
//! A trigger gives the row another version with every change, and what else a job's owner is shown
//! changes only together with the row: the last step's metrics are written by the statement that
//! notes the step in the job.

use super::Job;
use crate::metrics::LastStep;
use crate::rows;
use bytes::Bytes;
use sqlx::postgres::PgRow;
use sqlx::{FromRow as _, Row as _};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use tunesmith_core::ids::JobId;

/// Jobs that are remembered at most, twice over; some kilobytes each.
const MAX_REMEMBERED: usize = 128;

/// A job at one moment. Everybody who looks while it does not change gets the same one.
#[derive(Debug)]
pub struct SeenJob {
    /// The job.
    pub job: Job,
    /// Of a running job, the last step that it has told of.
    pub last_step: Option<LastStep>,
    /// What the front-end has made of the job and shows to whoever looks next. It may depend on
    /// nothing but the two above.
    pub shown: OnceLock<Bytes>,
    version: Vec<u8>,
}

/// What a [`SeenJob`] is made of, from `jobs` joined with its `projects`.
macro_rules! seen_job {
    () => {
        concat!(
            "SELECT uuid_send(jobs.version) AS version, last.step AS known_step,
                 last.elapsed_seconds, ",
            crate::jobs::job_columns!(),
            " FROM jobs JOIN projects ON projects.id = jobs.project_id
             LEFT JOIN LATERAL (
                 SELECT step, elapsed_seconds FROM job_metrics
                 WHERE job_id = jobs.id ORDER BY step DESC LIMIT 1
             ) AS last ON jobs.status = $2 "
        )
    };
}
pub(super) use seen_job;

impl SeenJob {
    pub(super) fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let last_step = match rows::optional_count(row, "known_step")? {
            None => None,
            Some(step) => Some(LastStep { step, elapsed_seconds: row.try_get("elapsed_seconds")? }),
        };
        Ok(Self {
            job: Job::from_row(row)?,
            last_step,
            shown: OnceLock::new(),
            version: row.try_get("version")?,
        })
    }
}

/// The jobs that were looked at last.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    recent: HashMap<JobId, Arc<SeenJob>>,
    /// Those that were recent before there were too many: they go with the next turn unless they are
    /// looked at.
    before: HashMap<JobId, Arc<SeenJob>>,
}

impl Remembered {
    /// The job, if its row's version is still the one that was read.
    pub(super) fn of_version(&mut self, id: &JobId, version: &[u8]) -> Option<Arc<SeenJob>> {
        if let Some(seen) = self.recent.get(id) {
            return (seen.version == version).then(|| Arc::clone(seen));
        }
        let seen = self.before.remove(id).filter(|seen| seen.version == version)?;
        self.keep(Arc::clone(&seen));
        Some(seen)
    }

    pub(super) fn keep(&mut self, seen: Arc<SeenJob>) {
        if self.recent.len() >= MAX_REMEMBERED {
            self.before = std::mem::take(&mut self.recent);
        }
        self.recent.insert(seen.job.id.clone(), seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;
    use crate::fixtures::{World, checkpoint, resolved, step, trainer_failed};
    use crate::lease::GiveBack;
    use crate::validation::Validated;
    use tunesmith_core::hyperparameters::Precision;
    use tunesmith_core::protocol::Started;
    use tunesmith_core::state::JobStatus;

    struct Watcher<'a> {
        world: &'a World,
        store: Store,
        key: String,
        id: JobId,
    }

    impl<'a> Watcher<'a> {
        async fn of(world: &'a World, id: JobId) -> Self {
            let store = world.store().of_thread(1);
            let key = store.create_api_key(&world.caller.project_id, "mine").await.expect("key");
            Self { world, store, key: key.secret, id }
        }

        async fn look(&self) -> Option<Arc<SeenJob>> {
            let seen = self.store.authenticate_for_job(&self.key, &self.id).await;
            seen.expect("database").and_then(|(_, job)| job)
        }

        /// What is seen must be what there is; gives it.
        async fn sees_what_is(&self, after: &str) -> Arc<SeenJob> {
            let seen = self.look().await.expect("known");
            assert_eq!(seen.job, self.world.get(&self.id).await, "{after}");
            let last = self.world.store().last_metrics(&self.world.caller.project_id, &self.id);
            if seen.job.status == JobStatus::Running {
                let last = last.await.expect("database");
                let last =
                    last.map(|it| LastStep { step: it.step, elapsed_seconds: it.elapsed_seconds });
                assert_eq!(seen.last_step, last, "{after}");
            }
            let again = self.look().await.expect("known");
            assert!(Arc::ptr_eq(&seen, &again), "read again though nothing changed: {after}");
            seen
        }
    }

    fn started(total_steps: u64) -> Started {
        Started {
            total_steps,
            resumed_from_step: 0,
            train_rows: 48,
            valid_rows: 0,
            truncated_rows: 0,
            initial_valid_loss: None,
            device: "cpu".to_owned(),
            precision: Precision::Fp32,
        }
    }

    #[tokio::test]
    async fn every_change_in_a_jobs_life_is_seen_by_the_next_look() {
        let world = World::new().await;
        let store = world.store();
        let project = &world.caller.project_id;
        let watcher = Watcher::of(&world, world.job().await.id).await;
        let id = &watcher.id;
        watcher.sees_what_is("created").await;
        let validated = Validated { resolved: resolved(), events: Vec::new() };
        store.accept_files(id, validated).await.expect("accepted");
        watcher.sees_what_is("validated").await;
        store.pause_job(project, id).await.expect("paused");
        watcher.sees_what_is("paused").await;
        store.resume_job(project, id).await.expect("resumed");
        watcher.sees_what_is("resumed").await;
        let lease = world.claim("first").await.expect("a job waits").lease;
        watcher.sees_what_is("claimed").await;
        store.record_started(&lease, &started(12)).await.expect("started");
        assert_eq!(watcher.sees_what_is("started").await.last_step, None);
        for number in [1, 2] {
            store.record_steps(&lease, &[step(number, 1.0)], &[]).await.expect("steps");
            let seen = watcher.sees_what_is("a step").await;
            assert_eq!(seen.last_step.map(|last| last.step), Some(number));
        }
        let slower = LastStep { step: 2, elapsed_seconds: 9.5 };
        let mut repeated = step(2, 1.0);
        repeated.elapsed_seconds = slower.elapsed_seconds;
        store.record_steps(&lease, &[repeated], &[]).await.expect("the step again");
        assert_eq!(watcher.sees_what_is("a step again").await.last_step, Some(slower));
        store.record_checkpoint(&lease, &checkpoint(2)).await.expect("checkpoint");
        watcher.sees_what_is("a checkpoint").await;
        store.give_back(&lease, GiveBack::WorkerStops).await.expect("given back");
        watcher.sees_what_is("given back").await;
        let lease = world.claim("second").await.expect("a job waits").lease;
        watcher.sees_what_is("claimed again").await;
        store.record_started(&lease, &started(24)).await.expect("started");
        watcher.sees_what_is("started again").await;
        store.request_cancel(project, id).await.expect("asked");
        assert!(watcher.sees_what_is("to be cancelled").await.job.cancel_requested);
        store.cancel_job(&lease).await.expect("cancelled");
        assert_eq!(watcher.sees_what_is("cancelled").await.job.status, JobStatus::Cancelled);
    }

    #[tokio::test]
    async fn the_ends_of_jobs_are_seen_by_the_next_look() {
        let world = World::new().await;
        let store = world.store();
        let refused = Watcher::of(&world, world.job().await.id).await;
        refused.sees_what_is("created").await;
        store.refuse_files(&refused.id, trainer_failed()).await.expect("refused");
        assert!(refused.sees_what_is("refused").await.job.error.is_some());

        for fails in [false, true] {
            let claimed = world.running_job().await;
            let watcher = Watcher::of(&world, claimed.job.id).await;
            let lease = &claimed.lease;
            store.record_started(lease, &started(12)).await.expect("started");
            store.record_checkpoint(lease, &checkpoint(12)).await.expect("checkpoint");
            watcher.sees_what_is("running").await;
            if fails {
                store.fail_job(lease, trainer_failed()).await.expect("failed");
                assert!(watcher.sees_what_is("failed").await.job.error.is_some());
            } else {
                let completed = world.completed().await;
                store.complete_job(lease, &completed).await.expect("completed");
                assert!(watcher.sees_what_is("succeeded").await.job.result_file.is_some());
            }
        }
    }

    #[tokio::test]
    async fn whatever_else_changes_a_jobs_row_is_seen_too() {
        let world = World::new().await;
        let watcher = Watcher::of(&world, world.job().await.id).await;
        for team in ["b", "c"] {
            watcher.sees_what_is(team).await;
            sqlx::query("UPDATE jobs SET metadata = jsonb_build_object('team', $1)")
                .bind(team)
                .execute(&world.store().pool)
                .await
                .expect("an operator's hand");
            assert_eq!(watcher.sees_what_is(team).await.job.metadata["team"], team);
        }
        let other = world.store().create_organization("other").await.expect("organization");
        sqlx::query("UPDATE projects SET organization_id = $1 WHERE id = $2")
            .bind(other.as_str())
            .bind(world.caller.project_id.as_str())
            .execute(&world.store().pool)
            .await
            .expect("an operator's hand");
        assert_eq!(watcher.sees_what_is("moved").await.job.organization_id, other);
    }

    #[tokio::test]
    async fn a_remembered_job_opens_to_nobody_whose_key_does_not() {
        let world = World::new().await;
        let watcher = Watcher::of(&world, world.job().await.id).await;
        watcher.sees_what_is("created").await;
        let store = &watcher.store;
        let other = crate::fixtures::tenant(store, "other").await;
        let foreign = store.create_api_key(&other.project_id, "theirs").await.expect("key");
        let seen = store.authenticate_for_job(&foreign.secret, &watcher.id).await;
        assert!(seen.expect("database").expect("known").1.is_none());
        let project = &world.caller.project_id;
        let mine = store.create_api_key(project, "second").await.expect("key");
        store.revoke_api_key(Some(project), &mine.id).await.expect("revoked");
        let seen = store.authenticate_for_job(&mine.secret, &watcher.id).await;
        assert!(seen.expect("database").is_none());
        store.archive_project(&world.caller.organization_id, project).await.expect("archived");
        assert!(watcher.look().await.is_none());
    }

    #[tokio::test]
    async fn of_many_jobs_those_looked_at_last_are_remembered() {
        let world = World::new().await;
        let job = world.job().await;
        let seen = |id: String| {
            let job = Job { id: JobId::from(id), ..job.clone() };
            Arc::new(SeenJob {
                job,
                last_step: None,
                shown: OnceLock::new(),
                version: b"1".to_vec(),
            })
        };
        let first = JobId::from("first");
        let mut remembered = Remembered::default();
        remembered.keep(seen("first".to_owned()));
        assert!(remembered.of_version(&first, b"2").is_none());
        for number in 0..10 * MAX_REMEMBERED {
            assert!(remembered.of_version(&first, b"1").is_some(), "{number}");
            remembered.keep(seen(format!("{number}")));
            assert!(remembered.recent.len() + remembered.before.len() <= 2 * MAX_REMEMBERED);
        }
        assert!(remembered.of_version(&JobId::from("0"), b"1").is_none());
    }
}
