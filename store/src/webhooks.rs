//! Webhooks: who is told of the end of jobs, and the deliveries that are still to be made.
//!
//! A trigger in the database notes deliveries in the transaction that ends the job, so none is lost.
//! Whoever delivers claims one for a minute; if it dies, another takes it up: an event arrives at
//! least once, always with the same id.

use crate::idempotency::{Creation, Idempotency, Request};
use crate::page::{Page, PageRequest};
use crate::tenants::Caller;
use crate::words::words;
use crate::{Store, StoreError, database, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use std::time::Duration;
use time::OffsetDateTime;
use tunesmith_core::ids::{ProjectId, WebhookEndpointId};

/// How long one who delivers has a delivery to itself; longer than any attempt takes.
const CLAIM: Duration = Duration::from_secs(60);
/// How long a secret that was replaced still signs, where its owner wants that.
const OLD_SECRET_LIFETIME: &str = "24 hours";
/// When an attempt has failed, the next comes this many seconds later; after the last it is given
/// up. The schedule of the Standard Webhooks specification, three days in all.
const BACKOFF_SECONDS: [f64; 9] =
    [5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0];
/// Deliveries that are done are remembered this long.
const REMEMBERED: &str = "30 days";
/// The most of an error's text that is kept.
const MAX_ERROR: usize = 500;

words! {
    /// What an endpoint may be told.
    WebhookEvent {
        /// A batch was answered.
        BatchCompleted = "batch.completed",
        /// A batch's file could not be read.
        BatchFailed = "batch.failed",
        /// A batch was not done in its time.
        BatchExpired = "batch.expired",
        /// A batch was given up.
        BatchCancelled = "batch.cancelled",
        /// A job has made its model.
        JobSucceeded = "fine_tuning.job.succeeded",
        /// A job has failed.
        JobFailed = "fine_tuning.job.failed",
        /// A job was given up.
        JobCancelled = "fine_tuning.job.cancelled",
    }
}

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookEndpoint {
    /// Its id.
    pub id: WebhookEndpointId,
    /// Its name, for people.
    pub name: String,
    /// Where deliveries go.
    pub url: String,
    /// What it is told.
    pub event_types: Vec<String>,
    /// Signs the deliveries: `whsec_` and Base64.
    pub secret: String,
    /// When it was made.
    pub created_at: OffsetDateTime,
    /// When it was last changed.
    pub updated_at: OffsetDateTime,
}

impl FromRow<'_, PgRow> for WebhookEndpoint {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            name: row.try_get("name")?,
            url: row.try_get("url")?,
            event_types: row.try_get("event_types")?,
            secret: row.try_get("secret")?,
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
        })
    }
}

macro_rules! endpoint_columns {
    () => {
        "id, name, url, event_types, secret, created_at, updated_at"
    };
}

/// An endpoint that a client asks for.
#[derive(Debug, Clone)]
pub struct NewWebhookEndpoint {
    /// Its name, for people.
    pub name: String,
    /// Where deliveries go.
    pub url: String,
    /// What it is told.
    pub event_types: Vec<WebhookEvent>,
    /// Signs the deliveries.
    pub secret: String,
}

/// What is to change; nothing where it is none.
#[derive(Debug, Clone, Default)]
pub struct WebhookChange {
    /// Another name.
    pub name: Option<String>,
    /// Another place.
    pub url: Option<String>,
    /// Other events.
    pub event_types: Option<Vec<WebhookEvent>>,
}

/// A delivery to be attempted now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    id: i64,
    /// Where it goes.
    pub url: String,
    /// The event's id, the same at each attempt.
    pub event_id: String,
    /// What is sent.
    pub body: String,
    /// Sign it with each of these.
    pub secrets: Vec<String>,
    /// Which attempt this is, from 1.
    pub attempt: u32,
}

impl FromRow<'_, PgRow> for Delivery {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let old: Option<String> = row.try_get("old_secret")?;
        Ok(Self {
            id: row.try_get("id")?,
            url: row.try_get("url")?,
            event_id: row.try_get("event_id")?,
            body: row.try_get("body")?,
            secrets: std::iter::once(row.try_get("secret")?).chain(old).collect(),
            attempt: rows::attempt(row, "attempts")?,
        })
    }
}

fn event_words(events: &[WebhookEvent]) -> Vec<&'static str> {
    events.iter().map(|event| event.as_str()).collect()
}

impl Store {
    /// A new endpoint of the caller's project, or the one that the same request has made before,
    /// as it is now.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] for one that was made before and is gone,
    /// [`StoreError::IdempotencyConflict`].
    pub async fn create_webhook_endpoint(
        &self,
        caller: &Caller,
        new: &NewWebhookEndpoint,
        idempotency: &Idempotency,
    ) -> Result<WebhookEndpoint, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let caller_key = caller.api_key_id.as_str();
        let request = Request::new(Creation::WebhookEndpoint, caller_key, idempotency);
        if let Some(made) = request.made_before(&mut transaction).await? {
            drop(transaction);
            let id = WebhookEndpointId::from(made);
            return self.webhook_endpoint(&caller.project_id, &id).await;
        }
        let id = WebhookEndpointId::generate(&mut rand::rng());
        let made = sqlx::query_as(concat!(
            "INSERT INTO webhook_endpoints (id, project_id, name, url, event_types, secret)
             VALUES ($1, $2, $3, $4, $5, $6) RETURNING ",
            endpoint_columns!()
        ))
        .bind(id.as_str())
        .bind(caller.project_id.as_str())
        .bind(&new.name)
        .bind(&new.url)
        .bind(event_words(&new.event_types))
        .bind(&new.secret)
        .fetch_one(&mut *transaction)
        .await?;
        request.remember(&mut transaction, id.as_str()).await?;
        transaction.commit().await?;
        Ok(made)
    }

    /// An endpoint of `project`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], also for an endpoint of another project.
    pub async fn webhook_endpoint(
        &self,
        project: &ProjectId,
        id: &WebhookEndpointId,
    ) -> Result<WebhookEndpoint, StoreError> {
        sqlx::query_as(concat!(
            "SELECT ",
            endpoint_columns!(),
            " FROM webhook_endpoints WHERE id = $1 AND project_id = $2"
        ))
        .bind(id.as_str())
        .bind(project.as_str())
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("webhook endpoint", id))
    }

    /// The endpoints of `project`, newest first.
    ///
    /// # Errors
    /// [`StoreError::UnknownCursor`].
    pub async fn list_webhook_endpoints(
        &self,
        project: &ProjectId,
        request: &PageRequest,
    ) -> Result<Page<WebhookEndpoint>, StoreError> {
        let cursor = "SELECT sequence FROM webhook_endpoints WHERE id = $1 AND project_id = $2";
        let list = concat!(
            "SELECT ",
            endpoint_columns!(),
            " FROM webhook_endpoints
              WHERE project_id = $1 AND ($2::bigint IS NULL OR sequence < $2)
              ORDER BY sequence DESC LIMIT $3"
        );
        request.fetch_page(&self.pool, cursor, list, Some(project.as_str())).await
    }

    /// Changes an endpoint. What is to be delivered already goes to the new place.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn change_webhook_endpoint(
        &self,
        project: &ProjectId,
        id: &WebhookEndpointId,
        change: &WebhookChange,
    ) -> Result<WebhookEndpoint, StoreError> {
        sqlx::query_as(concat!(
            "UPDATE webhook_endpoints SET
                 updated_at = CASE WHEN (name, url, event_types)
                     IS DISTINCT FROM (coalesce($3, name), coalesce($4, url),
                                       coalesce($5, event_types))
                     THEN now() ELSE updated_at END,
                 name = coalesce($3, name), url = coalesce($4, url),
                 event_types = coalesce($5, event_types)
             WHERE id = $1 AND project_id = $2 RETURNING ",
            endpoint_columns!()
        ))
        .bind(id.as_str())
        .bind(project.as_str())
        .bind(change.name.as_deref())
        .bind(change.url.as_deref())
        .bind(change.event_types.as_deref().map(event_words))
        .fetch_optional(&self.pool)
        .await?
        .ok_or_else(|| StoreError::not_found("webhook endpoint", id))
    }

    /// Gives an endpoint another secret, once for a request. The one before it signs too for a day if
    /// it is kept.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::IdempotencyConflict`].
    pub async fn rotate_webhook_secret(
        &self,
        caller: &Caller,
        id: &WebhookEndpointId,
        secret: &str,
        keep_old: bool,
        idempotency: &Idempotency,
    ) -> Result<WebhookEndpoint, StoreError> {
        let mut transaction = database::begin(&self.pool).await?;
        let request =
            Request::new(Creation::WebhookSecret, caller.api_key_id.as_str(), idempotency);
        if request.made_before(&mut transaction).await?.is_some() {
            drop(transaction);
            return self.webhook_endpoint(&caller.project_id, id).await;
        }
        let rotated = sqlx::query_as(concat!(
            "UPDATE webhook_endpoints SET secret = $3, updated_at = now(),
                 old_secret = CASE WHEN $4 THEN secret END,
                 old_secret_until = CASE WHEN $4 THEN now() + $5::interval END
             WHERE id = $1 AND project_id = $2 RETURNING ",
            endpoint_columns!()
        ))
        .bind(id.as_str())
        .bind(caller.project_id.as_str())
        .bind(secret)
        .bind(keep_old)
        .bind(OLD_SECRET_LIFETIME)
        .fetch_optional(&mut *transaction)
        .await?
        .ok_or_else(|| StoreError::not_found("webhook endpoint", id))?;
        request.remember(&mut transaction, id.as_str()).await?;
        transaction.commit().await?;
        Ok(rotated)
    }

    /// Deletes an endpoint, and what it was still to be told.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn delete_webhook_endpoint(
        &self,
        project: &ProjectId,
        id: &WebhookEndpointId,
    ) -> Result<(), StoreError> {
        let gone = sqlx::query("DELETE FROM webhook_endpoints WHERE id = $1 AND project_id = $2")
            .bind(id.as_str())
            .bind(project.as_str())
            .execute(&self.pool)
            .await?;
        if gone.rows_affected() == 1 {
            Ok(())
        } else {
            Err(StoreError::not_found("webhook endpoint", id))
        }
    }

    /// Takes the deliveries that are due, at most `limit`, for a minute.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn claim_deliveries(&self, limit: u32) -> Result<Vec<Delivery>, StoreError> {
        Ok(sqlx::query_as(
            "UPDATE webhook_deliveries AS delivery
             SET attempts = attempts + 1, next_attempt_at = now() + make_interval(secs => $2)
             FROM webhook_endpoints AS endpoint
             WHERE endpoint.id = delivery.endpoint_id AND delivery.id IN (
                 SELECT id FROM webhook_deliveries WHERE next_attempt_at <= now()
                 ORDER BY next_attempt_at LIMIT $1 FOR UPDATE SKIP LOCKED)
             RETURNING delivery.id, delivery.event_id, delivery.body, delivery.attempts,
                 endpoint.url, endpoint.secret,
                 CASE WHEN endpoint.old_secret_until > now() THEN endpoint.old_secret END
                     AS old_secret",
        )
        .bind(i64::from(limit))
        .bind(CLAIM.as_secs_f64())
        .fetch_all(&self.pool)
        .await?)
    }

    /// Notes how an attempt went: whether the receiver has taken it, what it said, and what went
    /// wrong. One that failed comes again later, or is given up.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn record_attempt(
        &self,
        delivery: &Delivery,
        arrived: bool,
        status: Option<u16>,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        let failed = usize::try_from(delivery.attempt.saturating_sub(1)).unwrap_or(usize::MAX);
        let again = BACKOFF_SECONDS.get(failed).copied().filter(|_| !arrived);
        let error: Option<String> = error.map(|text| text.chars().take(MAX_ERROR).collect());
        // Whoever claimed it since has the last word.
        sqlx::query(
            "UPDATE webhook_deliveries
             SET next_attempt_at = now() + make_interval(secs => $3),
                 delivered_at = CASE WHEN $4 THEN now() END, last_status = $5, last_error = $6
             WHERE id = $1 AND attempts = $2 AND delivered_at IS NULL",
        )
        .bind(delivery.id)
        .bind(rows::integer(delivery.attempt))
        .bind(again)
        .bind(arrived)
        .bind(status.map(i32::from))
        .bind(error)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// How long until a delivery is due; none if there is none.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn next_delivery_in(&self) -> Result<Option<Duration>, StoreError> {
        let seconds: Option<f64> = sqlx::query_scalar(
            "SELECT extract(epoch FROM min(next_attempt_at) - clock_timestamp())::float8
             FROM webhook_deliveries WHERE next_attempt_at IS NOT NULL",
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()))
    }

    /// Forgets deliveries that were done long ago. To be called from time to time.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn purge_deliveries(&self) -> Result<u64, StoreError> {
        let gone = sqlx::query(
            "DELETE FROM webhook_deliveries
             WHERE next_attempt_at IS NULL AND created_at < now() - $1::interval",
        )
        .bind(REMEMBERED)
        .execute(&self.pool)
        .await?;
        Ok(gone.rows_affected())
    }
}

#[cfg(test)]
mod tests;
