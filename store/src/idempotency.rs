//! Retries: a request that makes something makes it once, however often it comes.
//!
//! A request is known by the `Idempotency-Key` that its client sends. Where there is none, one that
//! its client marks as a retry is known by its body, as the OpenAI SDKs send a retry.

use crate::StoreError;
use crate::words::words;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use sqlx::PgConnection;

/// How long an idempotency key is remembered.
const KEY_LIFETIME: &str = "24 hours";
/// How long after a request another with the same body, marked as its retry, makes nothing more.
const RETRY_WINDOW: &str = "1 hour";

/// What tells a request from its own retry.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The client's `Idempotency-Key`.
    pub key: Option<String>,
    /// Whether the client says that it has sent this request before, as the OpenAI SDKs do.
    pub is_retry: bool,
    /// The SHA-256 of what was asked for.
    pub request_sha256: [u8; 32],
}

impl Idempotency {
    /// The same for a request of which `asked` is all that it asks for.
    #[must_use]
    pub fn of(&self, asked: &Value) -> Self {
        Self { request_sha256: Sha256::digest(asked.to_string()).into(), ..self.clone() }
    }

    /// The same for a request that asks for this of `what` its path names.
    #[must_use]
    pub fn at(&self, what: &str) -> Self {
        let asked = Sha256::new().chain_update(self.request_sha256).chain_update(what);
        Self { request_sha256: asked.finalize().into(), ..self.clone() }
    }

    /// The same without regard to a client that marks a retry and sends no key.
    pub(crate) fn by_key_alone(&self) -> Self {
        Self { is_retry: false, ..self.clone() }
    }
}

words! {
    /// What a request makes. Its key is good for nothing else.
    Creation {
        /// A job.
        Job = "job",
        /// A batch.
        Batch = "batch",
        /// A file that came whole.
        File = "file",
        /// An upload.
        Upload = "upload",
        /// A part of one.
        UploadPart = "upload_part",
        /// A model, of an adapter that was made elsewhere.
        ImportedAdapter = "imported_adapter",
        /// A webhook endpoint.
        WebhookEndpoint = "webhook_endpoint",
        /// Another secret of an endpoint, which is what was made.
        WebhookSecret = "webhook_secret",
        /// A key to a project.
        ApiKey = "api_key",
        /// A key to an organisation.
        AdminKey = "admin_key",
    }
}

/// A request, within the transaction that makes what it asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    creation: Creation,
    /// The id of the caller's key: the same idempotency key of another caller is another.
    caller: &'a str,
    idempotency: &'a Idempotency,
}

impl<'a> Request<'a> {
    pub(crate) fn new(creation: Creation, caller: &'a str, idempotency: &'a Idempotency) -> Self {
        Self { creation, caller, idempotency }
    }

    /// The id of what this request has made before, if it has. Requests that could be one another's
    /// retry wait for each other until the transaction ends.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`] for a key that came with another request.
    pub(crate) async fn made_before(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Option<String>, StoreError> {
        self.lock(connection).await?;
        match &self.idempotency.key {
            Some(key) => self.made_by_key(connection, key).await,
            None if self.idempotency.is_retry => self.made_by_body(connection).await,
            None => Ok(None),
        }
    }

    async fn lock(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let Self { creation, caller, idempotency } = self;
        let request = match &idempotency.key {
            Some(key) => format!("key {key}"),
            None => format!("{} {}", creation.as_str(), hex::encode(idempotency.request_sha256)),
        };
        sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))")
            .bind(format!("{caller} {request}"))
            .execute(connection)
            .await?;
        Ok(())
    }

    async fn made_by_key(
        &self,
        connection: &mut PgConnection,
        key: &str,
    ) -> Result<Option<String>, StoreError> {
        let seen: Option<(String, Vec<u8>, String)> = sqlx::query_as(
            "SELECT creation, request_sha256, made FROM creations
             WHERE caller = $1 AND key = $2 AND created_at > now() - $3::interval",
        )
        .bind(self.caller)
        .bind(key)
        .bind(KEY_LIFETIME)
        .fetch_optional(connection)
        .await?;
        let Some((creation, request_sha256, made)) = seen else { return Ok(None) };
        if creation != self.creation.as_str() || request_sha256 != self.idempotency.request_sha256 {
            return Err(StoreError::IdempotencyConflict);
        }
        Ok(Some(made))
    }

    /// What was deleted since was another wish: a retry of this one is to make it.
    async fn made_by_body(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Option<String>, StoreError> {
        Ok(sqlx::query_scalar(
            "SELECT made FROM creations
             WHERE caller = $1 AND request_sha256 = $2 AND creation = $3
               AND created_at > now() - $4::interval
               AND CASE creation
                   WHEN 'file' THEN EXISTS (
                       SELECT FROM files WHERE id = made AND deleted_at IS NULL)
                   WHEN 'upload_part' THEN EXISTS (
                       SELECT FROM upload_parts WHERE id = made)
                   WHEN 'imported_adapter' THEN EXISTS (
                       SELECT FROM imported_adapters WHERE name = made)
                   WHEN 'webhook_endpoint' THEN EXISTS (
                       SELECT FROM webhook_endpoints WHERE id = made)
                   ELSE true END
             ORDER BY created_at DESC LIMIT 1",
        )
        .bind(self.caller)
        .bind(self.idempotency.request_sha256.as_slice())
        .bind(self.creation.as_str())
        .bind(RETRY_WINDOW)
        .fetch_optional(connection)
        .await?)
    }

    /// Notes the id of what the request made.
    pub(crate) async fn remember(
        &self,
        connection: &mut PgConnection,
        made: &str,
    ) -> Result<(), StoreError> {
        let statement = concat!("WITH moved AS (SELECT $5 AS id), ", add_creation!(), " SELECT 1");
        self.bind(sqlx::query(statement)).bind(made).execute(connection).await?;
        Ok(())
    }

    /// Binds what [`add_creation`] takes, before all else.
    pub(crate) fn bind<'q>(&self, query: PgQuery<'q>) -> PgQuery<'q>
    where
        'a: 'q,
    {
        query
            .bind(self.caller)
            .bind(self.idempotency.key.as_deref())
            .bind(self.creation.as_str())
            .bind(self.idempotency.request_sha256.as_slice())
    }
}

type PgQuery<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

/// The part of a statement that notes what a request made, whose id a CTE called `moved` returns.
/// [`Request::bind`] fills its placeholders, which are the statement's first.
macro_rules! add_creation {
    () => {
        // A key that was forgotten may still have its row.
        "creation AS (
            INSERT INTO creations (caller, key, creation, request_sha256, made)
            SELECT $1, $2, $3, $4, moved.id FROM moved
            ON CONFLICT (caller, key) WHERE key IS NOT NULL DO UPDATE SET
                creation = EXCLUDED.creation, request_sha256 = EXCLUDED.request_sha256,
                made = EXCLUDED.made, created_at = now()
        )"
    };
}
pub(crate) use add_creation;

impl crate::Store {
    /// Forgets requests whose keys are not remembered any more. To be called from time to time.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn purge_creations(&self) -> Result<u64, StoreError> {
        let gone = sqlx::query("DELETE FROM creations WHERE created_at < now() - $1::interval")
            .bind(KEY_LIFETIME)
            .execute(&self.pool)
            .await?;
        Ok(gone.rows_affected())
    }
}

#[cfg(test)]
mod tests;
