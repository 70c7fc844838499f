//! Pages of lists.

use crate::StoreError;
use sqlx::PgPool;

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

    /// Where the list goes on: the `sequence` of `after`, which `statement` selects by `$1`, that
    /// id, and `$2`, whose list it is. None from the list's beginning.
    pub(crate) async fn sequence(
        &self,
        pool: &PgPool,
        statement: &'static str,
        owner: &str,
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
