//! Imports on their way: what is found of one whose importer was lost, and is cleared away.
//!
//! A row is written before the first object and goes in the transaction that registers what was
//! imported, so each object is at any moment that of a registered thing or of a row here. An importer
//! renews its row; one that was not heard of for [`IMPORT_SILENCE`] of the database's time is given up,
//! and from then on cannot register anything, however late it comes back: so nothing that is in use, or
//! may yet come into use, is ever deleted, whatever any clock says.

use crate::objects::ObjectPrefix;
use crate::{Store, StoreError, rows};
use sqlx::{PgConnection, Row as _};
use std::time::Duration;
use tunesmith_core::ids::{BaseModelId, ImportedAdapterId};

/// An importer of which nothing was heard for so long is lost.
pub const IMPORT_SILENCE: Duration = Duration::from_secs(3600);
/// How often an importer is heard of.
const RENEWAL: Duration = Duration::from_secs(60);
/// A lost importer that comes back may go on writing until it hears that it was given up: its objects
/// are looked for again for so long.
const LINGERING: &str = "1 day";

/// What is imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Importing {
    /// A base model.
    BaseModel(BaseModelId),
    /// An adapter.
    Adapter(ImportedAdapterId),
}

impl Importing {
    /// Its objects.
    #[must_use]
    pub fn prefix(&self) -> ObjectPrefix {
        match self {
            Self::BaseModel(id) => ObjectPrefix::BaseModel(id.clone()),
            Self::Adapter(id) => ObjectPrefix::ImportedAdapter(id.clone()),
        }
    }

    fn id(&self) -> &str {
        match self {
            Self::BaseModel(id) => id.as_str(),
            Self::Adapter(id) => id.as_str(),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::BaseModel(_) => "base_model",
            Self::Adapter(_) => "adapter",
        }
    }

    fn parse(kind: &str, id: String) -> Option<Self> {
        match kind {
            "base_model" => Some(Self::BaseModel(id.into())),
            "adapter" => Some(Self::Adapter(id.into())),
            _ => None,
        }
    }
}

impl Store {
    /// Begins an import: to be called before its first object is written.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn begin_import(&self, importing: &Importing) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO imports (id, kind) VALUES ($1, $2)")
            .bind(importing.id())
            .bind(importing.kind())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Does the `work` of an import and keeps it from being given up meanwhile.
    ///
    /// # Errors
    /// Those of the work, and [`StoreError::ImportGivenUp`].
    pub async fn while_importing<T, E: From<StoreError>>(
        &self,
        importing: &Importing,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(RENEWAL, &mut work).await {
                Ok(done) => return done,
                Err(_elapsed) => match self.renew_import(importing).await {
                    Ok(true) => {}
                    Ok(false) => return Err(StoreError::ImportGivenUp.into()),
                    // There is time for many more.
                    Err(error) => tracing::warn!(%error, "an import could not be renewed"),
                },
            }
        }
    }

    /// Says that the importer lives; whether the import was not given up.
    async fn renew_import(&self, importing: &Importing) -> Result<bool, StoreError> {
        let renewed =
            sqlx::query("UPDATE imports SET seen_at = now() WHERE id = $1 AND given_up_at IS NULL")
                .bind(importing.id())
                .execute(&self.pool)
                .await?;
        Ok(renewed.rows_affected() == 1)
    }

    /// Ends an import of which nothing comes, and removes its objects. What fails is done by
    /// [`purge_imports`](Self::purge_imports).
    pub async fn abandon_import(&self, importing: &Importing) {
        let abandoned = async {
            // Registered after all, if the row is gone: what failed was to hear of it.
            let mine = sqlx::query("UPDATE imports SET given_up_at = now() WHERE id = $1")
                .bind(importing.id())
                .execute(&self.pool)
                .await?;
            if mine.rows_affected() == 0 {
                return Ok(());
            }
            self.objects.delete_prefix(&importing.prefix()).await?;
            sqlx::query("DELETE FROM imports WHERE id = $1")
                .bind(importing.id())
                .execute(&self.pool)
                .await?;
            Ok::<_, StoreError>(())
        };
        if let Err(error) = abandoned.await {
            tracing::warn!(%error, id = importing.id(), "objects of a failed import stay for now");
        }
    }

    /// Removes the objects of imports of which nothing was heard for `silence`. Says of how many. To be
    /// called from time to time with [`IMPORT_SILENCE`].
    ///
    /// # Errors
    /// Those of the database and the object store.
    pub async fn purge_imports(&self, silence: Duration) -> Result<usize, StoreError> {
        let lost = sqlx::query(
            "UPDATE imports SET given_up_at = now()
             WHERE given_up_at IS NULL AND seen_at < now() - make_interval(secs => $1)",
        )
        .bind(silence.as_secs_f64())
        .execute(&self.pool)
        .await?
        .rows_affected();
        let given_up = sqlx::query("SELECT id, kind FROM imports WHERE given_up_at IS NOT NULL")
            .fetch_all(&self.pool)
            .await?;
        for row in given_up {
            let kind: String = row.try_get("kind")?;
            let Some(importing) = Importing::parse(&kind, rows::text(&row, "id")?) else {
                continue;
            };
            self.objects.delete_prefix(&importing.prefix()).await?;
            sqlx::query("DELETE FROM imports WHERE id = $1 AND given_up_at < now() - $2::interval")
                .bind(importing.id())
                .bind(LINGERING)
                .execute(&self.pool)
                .await?;
        }
        Ok(usize::try_from(lost).unwrap_or(usize::MAX))
    }
}

/// Ends an import in the transaction that registers what was imported.
///
/// # Errors
/// [`StoreError::ImportGivenUp`]: nothing may be registered.
pub(crate) async fn finish(
    connection: &mut PgConnection,
    importing: &Importing,
) -> Result<(), StoreError> {
    let ended = sqlx::query("DELETE FROM imports WHERE id = $1 AND given_up_at IS NULL")
        .bind(importing.id())
        .execute(connection)
        .await?;
    if ended.rows_affected() == 1 { Ok(()) } else { Err(StoreError::ImportGivenUp) }
}

#[cfg(test)]
mod tests;
