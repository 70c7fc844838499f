//! What each training row showed when it was last trained on.

use crate::page::{Page, PageRequest};
use crate::{Store, StoreError, rows};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use tunesmith_core::ids::{JobId, ProjectId};
use tunesmith_core::metrics::RowLoss;

/// Which rows come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// Those with the highest loss.
    Loss,
    /// Those that stand first in the file.
    Line,
}

impl Store {
    /// The losses of a job's rows, up to `limit` of them after the row of number `after`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if `project` has no such job, [`StoreError::UnknownCursor`] if the
    /// job has no loss of the row `after`.
    pub async fn list_row_losses(
        &self,
        project: &ProjectId,
        job: &JobId,
        order: RowOrder,
        after: Option<u64>,
        limit: u32,
    ) -> Result<Page<RowLoss>, StoreError> {
        self.require_job(project, job).await?;
        let loss_after: Option<f64> = match after {
            None => None,
            Some(after) => Some(
                sqlx::query_scalar(
                    "SELECT loss FROM job_row_losses WHERE job_id = $1 AND row_number = $2",
                )
                .bind(job.as_str())
                .bind(rows::bigint(after))
                .fetch_optional(&self.pool)
                .await?
                .ok_or_else(|| StoreError::UnknownCursor { after: after.to_string() })?,
            ),
        };
        let statement = match order {
            RowOrder::Loss => {
                "SELECT row_number, line, step, loss FROM job_row_losses
                 WHERE job_id = $1
                   AND ($2::bigint IS NULL OR loss < $3 OR loss = $3 AND row_number > $2)
                 ORDER BY loss DESC, row_number LIMIT $4"
            }
            RowOrder::Line => {
                "SELECT row_number, line, step, loss FROM job_row_losses
                 WHERE job_id = $1 AND ($2::bigint IS NULL OR row_number > $2)
                   AND ($3::double precision IS NULL OR true)
                 ORDER BY row_number LIMIT $4"
            }
        };
        let request = PageRequest::first(limit);
        let found = sqlx::query(statement)
            .bind(job.as_str())
            .bind(after.map(rows::bigint))
            .bind(loss_after)
            .bind(request.fetch())
            .fetch_all(&self.pool)
            .await?;
        let items = found.iter().map(row_loss).collect::<sqlx::Result<Vec<_>>>()?;
        Ok(Page::cut(items, &request))
    }
}

fn row_loss(row: &PgRow) -> sqlx::Result<RowLoss> {
    Ok(RowLoss {
        row: rows::count(row, "row_number")?,
        line: rows::count(row, "line")?,
        step: rows::count(row, "step")?,
        loss: row.try_get("loss")?,
    })
}
