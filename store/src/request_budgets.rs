//! How many requests a project may send, over all front-ends.
//!
//! A bucket a project (token bucket): it holds a minute's requests and refills evenly. Front-ends take
//! some at a time out of it, so that not every request asks the database.

use crate::{Store, StoreError};
use sqlx::Row as _;
use std::time::Duration;
use tunesmith_core::ids::ProjectId;

/// What a bucket that is full holds.
const MINUTE: Duration = Duration::from_secs(60);

/// Requests that a front-end may let through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grant {
    /// How many; 0 where the bucket is empty.
    pub requests: u32,
    /// How long until the bucket is full again, if nobody takes more. A request is back when this has
    /// gone down by the time that it stands for.
    pub full_in: Duration,
}

impl Store {
    /// Takes at most `most` requests out of the bucket of a project that may send `per_minute` in a
    /// minute.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn take_requests(
        &self,
        project: &ProjectId,
        per_minute: u32,
        most: u32,
    ) -> Result<Grant, StoreError> {
        // A millionth, for the clock's microseconds.
        let row = sqlx::query(
            "INSERT INTO request_budgets AS budget (project_id, granted, full_at)
             VALUES ($1, $3, now() + make_interval(secs => $2 * $3))
             ON CONFLICT (project_id) DO UPDATE SET
                 granted = least($3, floor(1e-6 + ($4 - greatest(0,
                     extract(epoch FROM budget.full_at - now())::float8)) / $2)),
                 full_at = greatest(budget.full_at, now()) + make_interval(secs => $2 * greatest(0,
                     least($3, floor(1e-6 + ($4 - greatest(0,
                         extract(epoch FROM budget.full_at - now())::float8)) / $2))))
             RETURNING greatest(0, granted) AS granted,
                 extract(epoch FROM full_at - now())::float8 AS full_in",
        )
        .bind(project.as_str())
        .bind(MINUTE.as_secs_f64() / f64::from(per_minute))
        .bind(f64::from(most.min(per_minute)))
        .bind(MINUTE.as_secs_f64())
        .fetch_one(&self.pool)
        .await?;
        let full_in: f64 = row.try_get("full_in")?;
        Ok(Grant {
            requests: u32::try_from(row.try_get::<i32, _>("granted")?).unwrap_or(0),
            full_in: Duration::try_from_secs_f64(full_in).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{World, tenant};

    async fn pass(store: &Store, seconds: f64) {
        sqlx::query("UPDATE request_budgets SET full_at = full_at - make_interval(secs => $1)")
            .bind(seconds)
            .execute(&store.pool)
            .await
            .expect("time passes");
    }

    #[tokio::test]
    async fn a_minutes_requests_are_given_out_once_and_come_back_evenly() {
        let world = World::new().await;
        let (store, project) = (world.store(), &world.caller.project_id);
        // Two a minute: what the test itself takes brings none back.
        let take = async |most| store.take_requests(project, 2, most).await.expect("database");
        assert_eq!(take(1).await.requests, 1);
        assert_eq!(take(5).await.requests, 1, "what there is");
        let empty = take(1).await;
        assert_eq!(empty.requests, 0);
        assert!(empty.full_in > Duration::from_secs(30), "{empty:?}");
        pass(store, 31.0).await;
        assert_eq!(take(1).await.requests, 1);
        assert_eq!(take(1).await.requests, 0);
        pass(store, 1000.0).await;
        assert_eq!(take(5).await.requests, 2, "a bucket holds a minute's and no more");
        let other = tenant(store, "other").await.project_id;
        assert_eq!(store.take_requests(&other, 2, 2).await.expect("database").requests, 2);
    }

    #[tokio::test]
    async fn many_that_take_at_the_same_time_get_no_more_than_there_is() {
        let world = World::new().await;
        let (store, project) = (world.store(), &world.caller.project_id);
        let takes = (0..8).map(|_| store.take_requests(project, 3, 2));
        let taken = futures::future::try_join_all(takes).await.expect("database");
        assert_eq!(taken.iter().map(|grant| grant.requests).sum::<u32>(), 3);
    }
}
