//! Columns into the types of core.

use serde::de::DeserializeOwned;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{Row as _, error::BoxDynError};

fn undecodable(column: &str, reason: impl Into<BoxDynError>) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: column.to_owned(), source: reason.into() }
}

/// A text column as an id or another type made of text.
pub(crate) fn text<T: From<String>>(row: &PgRow, column: &str) -> sqlx::Result<T> {
    row.try_get::<String, _>(column).map(T::from)
}

/// The same for a column that may be null.
pub(crate) fn optional_text<T: From<String>>(row: &PgRow, column: &str) -> sqlx::Result<Option<T>> {
    Ok(row.try_get::<Option<String>, _>(column)?.map(T::from))
}

/// A `bigint` that CHECK constraints keep from being negative.
pub(crate) fn count(row: &PgRow, column: &str) -> sqlx::Result<u64> {
    u64::try_from(row.try_get::<i64, _>(column)?).map_err(|error| undecodable(column, error))
}

/// The same for a column that may be null.
pub(crate) fn optional_count(row: &PgRow, column: &str) -> sqlx::Result<Option<u64>> {
    row.try_get::<Option<i64>, _>(column)?
        .map(|value| u64::try_from(value).map_err(|error| undecodable(column, error)))
        .transpose()
}

/// An `integer` attempt.
pub(crate) fn attempt(row: &PgRow, column: &str) -> sqlx::Result<u32> {
    u32::try_from(row.try_get::<i32, _>(column)?).map_err(|error| undecodable(column, error))
}

/// A word of a closed list.
pub(crate) fn word<T>(
    row: &PgRow,
    column: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> sqlx::Result<T> {
    let word: String = row.try_get(column)?;
    parse(&word).ok_or_else(|| undecodable(column, format!("unknown word {word}")))
}

/// A `jsonb` column.
pub(crate) fn json<T: DeserializeOwned>(row: &PgRow, column: &str) -> sqlx::Result<T> {
    Ok(row.try_get::<Json<T>, _>(column)?.0)
}

/// The same for a column that may be null.
pub(crate) fn optional_json<T: DeserializeOwned>(
    row: &PgRow,
    column: &str,
) -> sqlx::Result<Option<T>> {
    Ok(row.try_get::<Option<Json<T>>, _>(column)?.map(|json| json.0))
}

/// A count as PostgreSQL's signed `bigint`. Nothing that is counted here comes near 2⁶³.
pub(crate) fn bigint(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// An attempt as PostgreSQL's signed `integer`, which is where it came from.
pub(crate) fn integer(attempt: u32) -> i32 {
    i32::try_from(attempt).unwrap_or(i32::MAX)
}
