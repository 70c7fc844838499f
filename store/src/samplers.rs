//! Samplers: the processes that answer with models, and where front-ends find them.

use crate::{Store, StoreError, rows};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row as _};
use std::time::Duration;
use tunesmith_core::ids::SamplerId;

/// How often a sampler says that it is there. One that was silent for three times as long, by the
/// database's clock, counts as gone.
pub const SAMPLER_RENEWAL: Duration = Duration::from_secs(5);

/// A sampler.
#[derive(Clone, PartialEq, Eq)]
pub struct Sampler {
    /// Its id.
    pub id: SamplerId,
    /// Where it takes orders, as `http://host:port`.
    pub url: String,
    /// What it lets in: a secret.
    pub token: String,
    /// The models in its memory, as
    /// [`SampleOrder::in_memory`](tunesmith_core::serving::SampleOrder::in_memory) names them.
    pub models: Vec<String>,
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sampler")
            .field("id", &self.id)
            .field("url", &self.url)
            .field("models", &self.models)
            .finish_non_exhaustive()
    }
}

impl FromRow<'_, PgRow> for Sampler {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: rows::text(row, "id")?,
            url: row.try_get("url")?,
            token: row.try_get("token")?,
            models: row.try_get("models")?,
        })
    }
}

impl Store {
    /// Says that a sampler is there, for the first time or again, and forgets those that are long
    /// gone.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn announce_sampler(&self, sampler: &Sampler) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM samplers WHERE seen_at < now() - interval '1 hour' AND id <> $1")
            .bind(sampler.id.as_str())
            .execute(&self.pool)
            .await?;
        sqlx::query(
            "INSERT INTO samplers (id, url, token, models) VALUES ($1, $2, $3, $4)
             ON CONFLICT (id) DO UPDATE
             SET url = $2, token = $3, models = $4, seen_at = now()",
        )
        .bind(sampler.id.as_str())
        .bind(&sampler.url)
        .bind(&sampler.token)
        .bind(&sampler.models)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The samplers that are there.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn live_samplers(&self) -> Result<Vec<Sampler>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT id, url, token, models FROM samplers
             WHERE seen_at > now() - interval '15 seconds' ORDER BY id",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// A sampler takes no more orders.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn remove_sampler(&self, id: &SamplerId) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM samplers WHERE id = $1")
            .bind(id.as_str())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_db::TestDb;

    fn sampler(id: &str) -> Sampler {
        Sampler {
            id: id.into(),
            url: "http://127.0.0.1:1".to_owned(),
            token: "hunter2".to_owned(),
            models: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_sampler_is_there_while_it_says_so_and_until_it_leaves() {
        let db = TestDb::new().await;
        let store = db.store();
        let (mut first, second) = (sampler("sampler_a"), sampler("sampler_b"));
        store.announce_sampler(&first).await.expect("announced");
        store.announce_sampler(&second).await.expect("announced");
        first.models = vec!["basemodel_x".to_owned()];
        store.announce_sampler(&first).await.expect("again");
        assert_eq!(store.live_samplers().await.expect("list"), [first.clone(), second.clone()]);
        let silent = "UPDATE samplers SET seen_at = now() - interval '16 seconds' WHERE id = $1";
        sqlx::query(silent).bind("sampler_a").execute(&store.pool).await.expect("silent");
        let left = store.live_samplers().await.expect("list");
        assert_eq!(left.as_slice(), std::slice::from_ref(&second));
        store.announce_sampler(&first).await.expect("back");
        store.remove_sampler(&second.id).await.expect("left");
        assert_eq!(store.live_samplers().await.expect("list"), [first]);
    }

    #[test]
    fn a_samplers_token_is_not_in_its_debug_text() {
        assert!(!format!("{:?}", sampler("sampler_a")).contains("hunter2"));
    }
}
