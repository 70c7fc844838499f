//! The query string, read with errors that name the parameter.

use crate::failure::invalid_value;
use actix_web::{FromRequest, HttpRequest, dev::Payload};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::ops::RangeInclusive;
use tunesmith_core::errors::ApiError;
use tunesmith_store::page::{Order, PageRequest};

/// The pairs of a query string, decoded, in their order.
#[derive(Debug)]
pub(crate) struct Query(Vec<(String, String)>);

impl FromRequest for Query {
    type Error = actix_web::Error;
    type Future = Ready<Result<Self, Self::Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(Ok::<_, Infallible>(Self::parse(request.query_string())).map_err(Into::into))
    }
}

impl Query {
    fn parse(text: &str) -> Self {
        Self(url::form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    /// The parameter, unless it is absent or empty. The first of several counts.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, v)| v.as_str())
            .filter(|v| !v.is_empty())
    }

    /// A whole number within `range`.
    ///
    /// # Errors
    /// `invalid_value` naming the parameter, the value and the range.
    pub(crate) fn integer(
        &self,
        name: &str,
        range: RangeInclusive<u64>,
        default: u64,
    ) -> Result<u64, ApiError> {
        let Some(text) = self.text(name) else { return Ok(default) };
        text.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| {
            let (low, high) = range.into_inner();
            invalid_value(name, text, &format!("a whole number between {low} and {high}"))
        })
    }

    /// One of `words`; the first is the default.
    ///
    /// # Errors
    /// `invalid_value` naming the parameter, the value and the words.
    pub(crate) fn word<'a>(&self, name: &str, words: &[&'a str]) -> Result<&'a str, ApiError> {
        match self.text(name) {
            None => Ok(words[0]),
            Some(text) => {
                words.iter().copied().find(|word| *word == text).ok_or_else(|| {
                    invalid_value(name, text, &format!("one of {}", words.join(", ")))
                })
            }
        }
    }

    /// `true` or `false`, which is the default.
    ///
    /// # Errors
    /// `invalid_value` naming the parameter and the value.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        Ok(self.word(name, &["false", "true"])? == "true")
    }

    /// The page that `limit` and `after` ask for, newest first. A limit of 0 asks only whether there
    /// is anything.
    ///
    /// # Errors
    /// `invalid_value` for a limit out of its range.
    pub(crate) fn page(&self, default: u64, max: u64) -> Result<PageRequest, ApiError> {
        let limit = self.integer("limit", 0..=max, default)?;
        Ok(PageRequest {
            after: self.text("after").map(str::to_owned),
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
            order: Order::Descending,
        })
    }

    /// The pairs under a bracketed key, as in `metadata[k]=v`.
    pub(crate) fn bracketed(&self, name: &str) -> Vec<(&str, &str)> {
        self.0
            .iter()
            .filter_map(|(key, value)| {
                let inner = key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?;
                Some((inner, value.as_str()))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_out_of_range_is_refused_by_name() {
        let error = Query::parse("limit=0").integer("limit", 1..=100, 20).expect_err("too low");
        assert_eq!(
            error.message,
            "Invalid value for 'limit': 0. It must be a whole number between 1 and 100."
        );
        assert_eq!(error.param.as_deref(), Some("limit"));
        assert_eq!(Query::parse("").integer("limit", 1..=100, 20), Ok(20));
        assert_eq!(Query::parse("limit=7").integer("limit", 1..=100, 20), Ok(7));
        assert!(Query::parse("limit=x").integer("limit", 1..=100, 20).is_err());
    }

    #[test]
    fn bracketed_keys_are_read_encoded_or_not() {
        for text in
            ["metadata[team]=a%20b&metadata[x]=1", "metadata%5Bteam%5D=a+b&metadata%5Bx%5D=1"]
        {
            assert_eq!(Query::parse(text).bracketed("metadata"), [("team", "a b"), ("x", "1")]);
        }
    }

    #[test]
    fn a_word_outside_the_list_is_refused() {
        assert_eq!(Query::parse("").word("order", &["desc", "asc"]), Ok("desc"));
        assert!(Query::parse("order=up").word("order", &["desc", "asc"]).is_err());
    }
}
