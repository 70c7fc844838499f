//! A stored object at its own address: signed by the object store for a while, so that a download
//! does not pass through this process.

use crate::failure::{Failure, invalid_value};
use crate::query::Query;
use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, LOCATION};
use std::ops::RangeInclusive;
use std::time::Duration;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_store::objects::{ObjectKey, Objects};

/// How long an address may be good for: S3 signs none for longer than a week.
pub(crate) const EXPIRES_IN: RangeInclusive<u64> = 60..=7 * 24 * 3600;
/// How long it is good for unless it is said.
pub(crate) const DEFAULT_EXPIRES_IN: u64 = 3600;

/// Where to find the object, by the query's `expires_in`.
///
/// # Errors
/// `unsupported_parameter` where the store signs nothing.
pub(crate) async fn redirect(
    objects: &Objects,
    key: &ObjectKey,
    query: &Query,
) -> Result<HttpResponse, Failure> {
    let expires_in = query.integer("expires_in", EXPIRES_IN, DEFAULT_EXPIRES_IN)?;
    let signed = objects.signed_url(key, Duration::from_secs(expires_in)).await?;
    let url = signed.ok_or_else(|| {
        let message = "This server's object store is a directory or memory, which has no addresses \
                       to give out. Leave out 'redirect' to get the content from here.";
        ApiError::new(ErrorCode::UnsupportedParameter, message).with_param("redirect")
    })?;
    Ok(HttpResponse::TemporaryRedirect()
        .insert_header((LOCATION, url.as_str()))
        // It opens the object to whoever has it.
        .insert_header((CACHE_CONTROL, "no-store"))
        .finish())
}

/// Fails on an `expires_in` that means nothing.
///
/// # Errors
/// `invalid_value`.
pub(crate) fn refuse_expires_in(query: &Query) -> Result<(), ApiError> {
    match query.text("expires_in") {
        Some(value) => {
            Err(invalid_value("expires_in", value, "left out, as it belongs to redirect"))
        }
        None => Ok(()),
    }
}
