//! Looks at single jobs, the request that clients repeat most: many in one statement.
//!
//! What a statement costs (a connection taken and given back, a trip to the database, a plan set
//! up) is the same for one job as for many. So whoever asks while a statement is on its way is
//! answered by the next one, together with all who ask meanwhile. Before a statement goes, the tasks
//! go that can run now, as long as some of them are looks: nobody waits for time to pass. Each sees
//! what was there after it asked, and those that ask for the same thing with the same key see the
//! same row.
//!
//! The statement tells whose the key is and which version of the job there is. What is
//! [remembered](super::seen) of that version is not read again.

use super::seen::{Remembered, SeenJob, seen_job};
use crate::tenants::{Caller, hash};
use crate::{Store, StoreError, rows};
use futures::future::BoxFuture;
use sqlx::{PgPool, Row as _};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::select;
use tokio::sync::{Mutex as Turn, oneshot};
use tokio::task::yield_now;
use tunesmith_core::ids::JobId;
use tunesmith_core::state::JobStatus;

/// Jobs that one statement reads at most.
const MAX_LOOKS: usize = 64;
/// How often other tasks go before a statement, at most: whoever asks all the time holds up nobody.
const MAX_YIELDS: usize = 8;

/// What a look reads of the key's owner and of the job.
macro_rules! seen_columns {
    () => {
        "api_keys.id AS api_key_id, projects.id AS project_id, projects.organization_id,
         uuid_send(jobs.version) AS version"
    };
}

/// From `api_keys` on: the key's project, and its job of the id `$job` if there is one.
macro_rules! seen_joins {
    ($job:literal) => {
        concat!(
            "JOIN projects ON projects.id = api_keys.project_id AND projects.archived_at IS NULL
             LEFT JOIN jobs ON jobs.project_id = projects.id AND jobs.id = ",
            $job
        )
    };
}

/// Whose the key is if it is known, and the job if that project has it.
type Seen = Option<(Arc<Caller>, Option<Arc<SeenJob>>)>;

/// What is asked for.
#[derive(Debug, PartialEq)]
struct Look {
    secret_sha256: Vec<u8>,
    job: JobId,
}

/// The looks that are to go next.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    waiting: Mutex<Vec<(Look, oneshot::Sender<Seen>)>>,
    /// Held by whoever has a statement on its way.
    turn: Turn<()>,
    remembered: Mutex<Remembered>,
}

impl Looks {
    fn add(&self, look: Look) -> oneshot::Receiver<Seen> {
        let (sender, seen) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push((look, sender));
        seen
    }

    /// Lets the tasks go that can run now, again and again while that brings more looks.
    async fn gather(&self) {
        let count = || self.waiting.lock().unwrap_or_else(PoisonError::into_inner).len();
        let mut before = count();
        for _ in 0..MAX_YIELDS {
            yield_now().await;
            let now = count();
            if now == before || now >= MAX_LOOKS {
                return;
            }
            before = now;
        }
    }

    /// Those that have waited longest, but for who has hung up.
    fn next(&self) -> (Vec<Look>, Vec<oneshot::Sender<Seen>>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let next = waiting.len().min(MAX_LOOKS);
        waiting.drain(..next).filter(|(_, asker)| !asker.is_closed()).unzip()
    }

    /// What each of `looks` sees, in their order. Boxed, as most who look never come here, and what
    /// each of them waits with is to stay small.
    fn read_all<'a>(
        &'a self,
        pool: &'a PgPool,
        looks: Vec<Look>,
    ) -> BoxFuture<'a, Result<Vec<Seen>, StoreError>> {
        Box::pin(async move {
            let (mut different, mut places) = (Vec::new(), Vec::with_capacity(looks.len()));
            for look in looks {
                let place = different.iter().position(|other| *other == look);
                places.push(place.unwrap_or(different.len()));
                if place.is_none() {
                    different.push(look);
                }
            }
            let seen = self.read(pool, &different).await?;
            Ok(places.into_iter().map(|place| seen[place].clone()).collect())
        })
    }

    /// What each of `looks` sees, in their order; no two are alike.
    async fn read(&self, pool: &PgPool, looks: &[Look]) -> Result<Vec<Seen>, StoreError> {
        let found = match looks {
            // Most are alone, or like all others: a statement about one is the cheapest.
            [look] => {
                sqlx::query(concat!(
                    "SELECT 1::bigint AS place, ",
                    seen_columns!(),
                    " FROM api_keys ",
                    seen_joins!("$2"),
                    " WHERE api_keys.secret_sha256 = $1 AND api_keys.revoked_at IS NULL"
                ))
                .bind(&look.secret_sha256)
                .bind(look.job.as_str())
                .fetch_all(pool)
                .await?
            }
            looks => {
                let secrets: Vec<&[u8]> = looks.iter().map(|look| &*look.secret_sha256).collect();
                let jobs: Vec<&str> = looks.iter().map(|look| look.job.as_str()).collect();
                sqlx::query(concat!(
                    "SELECT look.place, ",
                    seen_columns!(),
                    " FROM unnest($1::bytea[], $2::text[]) WITH ORDINALITY AS look (secret, job, place)
                     JOIN api_keys
                       ON api_keys.secret_sha256 = look.secret AND api_keys.revoked_at IS NULL ",
                    seen_joins!("look.job")
                ))
                .bind(secrets)
                .bind(jobs)
                .fetch_all(pool)
                .await?
            }
        };
        let mut seen = vec![None; looks.len()];
        let mut changed = Vec::new();
        for row in &found {
            let place: i64 = row.try_get("place")?;
            let Some(place) = usize::try_from(place - 1).ok().filter(|at| *at < looks.len()) else {
                continue;
            };
            let caller = Arc::new(Caller {
                organization_id: rows::text(row, "organization_id")?,
                project_id: rows::text(row, "project_id")?,
                api_key_id: rows::text(row, "api_key_id")?,
            });
            let job = match row.try_get::<Option<&[u8]>, _>("version")? {
                None => None,
                Some(version) => {
                    let known = self.remembered().of_version(&looks[place].job, version);
                    // A project is not known to move, and its job's row would not tell of it.
                    let known = known.filter(|it| it.job.organization_id == caller.organization_id);
                    if known.is_none() {
                        changed.push(place);
                    }
                    known
                }
            };
            seen[place] = Some((caller, job));
        }
        if !changed.is_empty() {
            self.read_again(pool, looks, &changed, &mut seen).await?;
        }
        Ok(seen)
    }

    /// Reads the jobs of the looks at the places `changed` and remembers them.
    async fn read_again(
        &self,
        pool: &PgPool,
        looks: &[Look],
        changed: &[usize],
        seen: &mut [Seen],
    ) -> Result<(), StoreError> {
        let ids: Vec<&str> = changed.iter().map(|&place| looks[place].job.as_str()).collect();
        let found = sqlx::query(concat!(seen_job!(), "WHERE jobs.id = ANY($1)"))
            .bind(ids)
            .bind(JobStatus::Running.as_str())
            .fetch_all(pool)
            .await?;
        for row in &found {
            let read = Arc::new(SeenJob::from_row(row)?);
            for &place in changed {
                if let Some((caller, job)) = &mut seen[place]
                    && looks[place].job == read.job.id
                    && caller.project_id == read.job.project_id
                {
                    *job = Some(Arc::clone(&read));
                }
            }
            self.remembered().keep(read);
        }
        Ok(())
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Whose key `secret` is, as [`authenticate`](Self::authenticate) tells it, and the job `id` of
    /// that caller's project if there is one.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn authenticate_for_job(&self, secret: &str, id: &JobId) -> Result<Seen, StoreError> {
        let look = || Look { secret_sha256: hash(secret), job: id.clone() };
        let mut seen = self.looks.add(look());
        loop {
            select! {
                biased;
                seen = &mut seen => match seen {
                    Ok(seen) => return Ok(seen),
                    // The statement failed, or whoever had it on its way was dropped.
                    Err(_) => {
                        let alone = self.looks.read_all(&self.look_pool, vec![look()]);
                        return Ok(alone.await?.pop().flatten());
                    }
                },
                _turn = self.looks.turn.lock() => {
                    self.looks.gather().await;
                    let (looks, askers) = self.looks.next();
                    // Who hears nothing asks alone, and hears what is wrong.
                    let found = self.looks.read_all(&self.look_pool, looks);
                    let Ok(found) = found.await else { continue };
                    for (asker, seen) in askers.into_iter().zip(found) {
                        // Who has hung up meanwhile needs no answer.
                        let _ = asker.send(seen);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{World, tenant};
    use futures::future::join_all;

    #[tokio::test]
    async fn looks_at_the_same_time_see_each_its_own_job_and_nobody_elses() {
        let world = World::new().await;
        let store = world.store();
        let project = &world.caller.project_id;
        let key = store.create_api_key(project, "mine").await.expect("key").secret;
        let other = tenant(store, "other").await;
        let foreign = store.create_api_key(&other.project_id, "theirs").await.expect("key").secret;
        let mut jobs = Vec::new();
        for _ in 0..3 {
            jobs.push(world.job().await);
        }
        // More than one statement takes, so that some wait for a second turn.
        let asked: Vec<_> = (0..MAX_LOOKS + 5).map(|number| &jobs[number % jobs.len()]).collect();
        let mine = join_all(asked.iter().map(|job| store.authenticate_for_job(&key, &job.id)));
        let none = JobId::from("ftjob-none".to_owned());
        let others = join_all([
            store.authenticate_for_job(&foreign, &jobs[0].id),
            store.authenticate_for_job("sk-nobody", &jobs[0].id),
            store.authenticate_for_job(&key, &none),
        ]);
        let (mine, others) = futures::join!(mine, others);
        for (seen, job) in mine.into_iter().zip(asked) {
            let (caller, seen) = seen.expect("database").expect("known");
            assert_eq!((&caller.project_id, &seen.expect("job").job), (project, job));
        }
        let mut others = others.into_iter().map(|seen| seen.expect("database"));
        let theirs = others.next().flatten().expect("known");
        assert_eq!(theirs.0.project_id, other.project_id);
        assert!(theirs.1.is_none(), "a job of others");
        assert!(others.next().expect("answered").is_none(), "a key that nobody has");
        let none = others.next().flatten().expect("known").1;
        assert!(none.is_none(), "a job that is not there");
    }

    #[tokio::test]
    async fn a_look_sees_what_was_done_before_it_asked() {
        let world = World::new().await;
        let store = world.store();
        let project = &world.caller.project_id;
        let key = store.create_api_key(project, "mine").await.expect("key").secret;
        let job = world.queued_job().await;
        let before = join_all((0..8).map(|_| store.authenticate_for_job(&key, &job.id)));
        let cancelled_and_seen = async {
            store.request_cancel(project, &job.id).await.expect("cancelled");
            store.authenticate_for_job(&key, &job.id).await
        };
        let (_, seen) = futures::join!(before, cancelled_and_seen);
        let (_, seen) = seen.expect("database").expect("known");
        assert_eq!(seen.expect("job").job.status, JobStatus::Cancelled);
    }

    #[tokio::test]
    async fn who_waits_is_answered_though_whoever_asked_for_all_hangs_up() {
        let world = World::new().await;
        let store = world.store();
        let key = store.create_api_key(&world.caller.project_id, "mine").await.expect("key").secret;
        let job = world.job().await;
        // The connection for looks is taken: the first look has its turn and waits for it.
        let store = store.of_thread(1);
        let held = store.look_pool.acquire().await;
        let mut first = Box::pin(store.authenticate_for_job(&key, &job.id));
        // It lets others go first, and then waits for a connection.
        assert!(futures::poll!(&mut first).is_pending());
        assert!(futures::poll!(&mut first).is_pending());
        let mut second = Box::pin(store.authenticate_for_job(&key, &job.id));
        assert!(futures::poll!(&mut second).is_pending());
        drop((first, held));
        let seen = second.await.expect("database").expect("known");
        assert_eq!(seen.1.expect("job").job, job);
    }

    #[tokio::test]
    async fn each_hears_why_the_database_does_not_answer() {
        let world = World::new().await;
        let store = world.store().of_thread(1);
        store.look_pool.close().await;
        let id = JobId::from("ftjob-none".to_owned());
        for seen in join_all((0..3).map(|_| store.authenticate_for_job("sk-x", &id))).await {
            assert!(seen.is_err(), "{seen:?}");
        }
    }
}
