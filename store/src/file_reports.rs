//! Reports on uploaded files: which are wanted, who makes them, and what they say.

use crate::base_models::default_base_model;
use crate::files::{File, file_columns, is_there};
use crate::notify::Channel;
use crate::{Store, StoreError, rows};
use serde_json::Value;
use sqlx::Row as _;
use sqlx::types::Json;
use std::time::Duration;
use time::OffsetDateTime;
use tunesmith_core::ids::{BaseModelId, FileId};

/// How long a maker has a report to itself. One that needs longer says so in time with
/// [`Store::keep_report`].
pub const REPORT_CLAIM: Duration = Duration::from_secs(60);
/// A report that was begun this often and never done is given up: it takes its maker down.
const MAX_TRIES: i32 = 3;

/// A report as it stands.
#[derive(Debug, Clone, PartialEq)]
pub enum ReportState {
    /// It is being made, or will be.
    InProgress,
    /// It is made.
    Done {
        /// What it says.
        report: Value,
        /// When it was asked for.
        created_at: OffsetDateTime,
    },
    /// Its makers were lost over it, again and again.
    GivenUp,
}

/// A report that is to be made, and the right to make it.
#[derive(Debug, Clone, PartialEq)]
pub struct ReportClaim {
    /// What it is about.
    pub file: File,
    /// Whose tokenizer counts; `None` for nobody's.
    pub base_model_id: Option<BaseModelId>,
}

/// How the table writes that there is no base model.
fn word(base_model: Option<&BaseModelId>) -> &str {
    base_model.map_or("", BaseModelId::as_str)
}

impl Store {
    /// Asks for a report on `file`, with the tokens of `base_model`; asking twice is asking once.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn want_report(
        &self,
        file: &FileId,
        base_model: Option<&BaseModelId>,
    ) -> Result<ReportState, StoreError> {
        sqlx::query(
            "WITH wanted AS (
                INSERT INTO file_reports (file_id, base_model_id) VALUES ($1, $2)
                ON CONFLICT DO NOTHING RETURNING file_id)
             SELECT pg_notify($3, '') FROM wanted",
        )
        .bind(file.as_str())
        .bind(word(base_model))
        .bind(Channel::Reports.as_str())
        .execute(&self.pool)
        .await?;
        let row = sqlx::query(
            "SELECT report, created_at, tries >= $3 AND make_after <= now() AS given_up
             FROM file_reports WHERE file_id = $1 AND base_model_id = $2",
        )
        .bind(file.as_str())
        .bind(word(base_model))
        .bind(MAX_TRIES)
        .fetch_optional(&self.pool)
        .await?
        // Deleted together with its file, just now.
        .ok_or_else(|| StoreError::not_found("file", file))?;
        Ok(match rows::optional_json(&row, "report")? {
            Some(report) => ReportState::Done { report, created_at: row.try_get("created_at")? },
            None if row.try_get("given_up")? => ReportState::GivenUp,
            None => ReportState::InProgress,
        })
    }

    /// Takes the report that has waited longest and that nobody makes.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn claim_report(&self) -> Result<Option<ReportClaim>, StoreError> {
        let row = sqlx::query(concat!(
            "WITH claimed AS (
                UPDATE file_reports
                SET make_after = now() + make_interval(secs => $1), tries = tries + 1
                WHERE (file_id, base_model_id) = (
                    SELECT file_id, base_model_id FROM file_reports
                    WHERE report IS NULL AND make_after <= now() AND tries < $2
                    ORDER BY created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
                RETURNING file_id, base_model_id)
             SELECT ",
            file_columns!(),
            ", base_model_id FROM files JOIN claimed ON file_id = id WHERE ",
            is_there!()
        ))
        .bind(REPORT_CLAIM.as_secs_f64())
        .bind(MAX_TRIES)
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let base_model: String = row.try_get("base_model_id")?;
        let base_model_id = (!base_model.is_empty()).then(|| BaseModelId::from(base_model));
        Ok(Some(ReportClaim { file: sqlx::FromRow::from_row(&row)?, base_model_id }))
    }

    /// Keeps other makers away for another [`REPORT_CLAIM`]. Says whether the report is still
    /// wanted.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn keep_report(&self, claim: &ReportClaim) -> Result<bool, StoreError> {
        let kept = sqlx::query(
            "UPDATE file_reports SET make_after = now() + make_interval(secs => $3)
             WHERE file_id = $1 AND base_model_id = $2 AND report IS NULL",
        )
        .bind(claim.file.id.as_str())
        .bind(word(claim.base_model_id.as_ref()))
        .bind(REPORT_CLAIM.as_secs_f64())
        .execute(&self.pool)
        .await?;
        Ok(kept.rows_affected() == 1)
    }

    /// Gives a report back that could not be made now; the next try is in a few seconds.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn postpone_report(&self, claim: &ReportClaim) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE file_reports SET make_after = now() + interval '5 seconds', tries = tries - 1
             WHERE file_id = $1 AND base_model_id = $2 AND report IS NULL",
        )
        .bind(claim.file.id.as_str())
        .bind(word(claim.base_model_id.as_ref()))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Stores a report, and with the file what it says at a glance. The first of two makers
    /// counts, and one whose file is deleted counts for nothing.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn finish_report(
        &self,
        claim: &ReportClaim,
        report: &Value,
        status_details: Option<&str>,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "WITH made AS (
                UPDATE file_reports SET report = $3
                WHERE file_id = $1 AND base_model_id = $2 AND report IS NULL RETURNING file_id)
             UPDATE files SET status_details = $4 FROM made WHERE files.id = made.file_id",
        )
        .bind(claim.file.id.as_str())
        .bind(word(claim.base_model_id.as_ref()))
        .bind(Json(report))
        .bind(status_details)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The base model with which tokens are counted unless another one is named: the one that was
    /// imported first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn default_base_model(&self) -> Result<Option<BaseModelId>, StoreError> {
        let id: Option<String> =
            sqlx::query_scalar(default_base_model!()).fetch_optional(&self.pool).await?;
        Ok(id.map(BaseModelId::from))
    }
}

#[cfg(test)]
mod tests;
