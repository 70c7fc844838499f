//! Pages of lists.

use crate::StoreError;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgPool};

/// Which end of a list comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Oldest first.
    Ascending,
    /// Newest first.
    #[default]
    Descending,
}

/// Which part of a list is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// The id of the last entry that the client has.
    pub after: Option<String>,
    /// The most entries to return.
    pub limit: u32,
    /// Which end comes first. Lists of a job's parts are newest first, whatever stands here.
    pub order: Order,
}

impl PageRequest {
    /// The newest `limit` entries.
    #[must_use]
    pub fn first(limit: u32) -> Self {
        Self { after: None, limit, order: Order::Descending }
    }

    /// One more than the limit, which shows whether there are more.
    pub(crate) fn fetch(&self) -> i64 {
        i64::from(self.limit) + 1
    }

    /// The page of a list that depends on its owner alone. `cursor` is as for
    /// [`sequence`](Self::sequence); `list` selects the rows by `$1`, whose list it is, `$2`, the
    /// place where it goes on, null for its beginning, and `$3`, the most rows.
    pub(crate) async fn fetch_page<T>(
        &self,
        pool: &PgPool,
        cursor: &'static str,
        list: &'static str,
        owner: Option<&str>,
    ) -> Result<Page<T>, StoreError>
    where
        T: for<'row> FromRow<'row, PgRow> + Send + Unpin,
    {
        let after = self.sequence(pool, cursor, owner).await?;
        let found =
            sqlx::query_as(list).bind(owner).bind(after).bind(self.fetch()).fetch_all(pool).await?;
        Ok(Page::cut(found, self))
    }

    /// Where the list goes on: the `sequence` of `after`, which `statement` selects by `$1`, that
    /// id, and `$2`, whose list it is, null for everybody's. None from the list's beginning.
    pub(crate) async fn sequence(
        &self,
        pool: &PgPool,
        statement: &'static str,
        owner: Option<&str>,
    ) -> Result<Option<i64>, StoreError> {
        let Some(after) = &self.after else { return Ok(None) };
        let found: Option<i64> =
            sqlx::query_scalar(statement).bind(after).bind(owner).fetch_optional(pool).await?;
        found.map(Some).ok_or_else(|| StoreError::UnknownCursor { after: after.clone() })
    }
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    /// The entries.
    pub items: Vec<T>,
    /// Whether there are more after them.
    pub has_more: bool,
}

impl<T> Page<T> {
    /// The page out of up to [`PageRequest::fetch`] rows.
    pub(crate) fn cut(mut items: Vec<T>, request: &PageRequest) -> Self {
        let limit = request.limit as usize;
        let has_more = items.len() > limit;
        items.truncate(limit);
        Self { items, has_more }
    }
}
