//! Who is asking: the API key of the `Authorization` header.

use crate::failure::Failure;
use crate::server::AppState;
use actix_web::http::header::AUTHORIZATION;
use actix_web::{FromRequest, HttpRequest, dev::Payload, web};
use futures::future::LocalBoxFuture;
use std::ops::Deref;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_store::tenants::Caller;

/// A caller whose key is known. A handler that takes one is closed to everybody else.
#[derive(Debug, Clone)]
pub(crate) struct Authenticated(Caller);

impl Deref for Authenticated {
    type Target = Caller;

    fn deref(&self) -> &Caller {
        &self.0
    }
}

impl FromRequest for Authenticated {
    type Error = Failure;
    type Future = LocalBoxFuture<'static, Result<Self, Failure>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let state = request.app_data::<web::Data<AppState>>().cloned();
        let header = request.headers().get(AUTHORIZATION).cloned();
        Box::pin(async move {
            let secret = header.as_ref().and_then(|header| bearer(header.to_str().ok()?));
            let Some(secret) = secret else { return Err(no_key().into()) };
            let state = state.ok_or_else(|| Failure::internal("the server has no state"))?;
            match state.store.authenticate(secret).await? {
                Some(caller) => Ok(Self(caller)),
                None => Err(wrong_key(secret).into()),
            }
        })
    }
}

/// The token of a `Bearer` header; the scheme's case does not matter (RFC 9110 §11.1).
fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn no_key() -> ApiError {
    ApiError::new(
        ErrorCode::InvalidApiKey,
        "You didn't provide an API key. You need to provide your API key in an Authorization \
         header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
    )
}

fn wrong_key(secret: &str) -> ApiError {
    ApiError::new(
        ErrorCode::InvalidApiKey,
        format!(
            "Incorrect API key provided: {}. Use a key of this server; `tunesmith up` writes the \
             first one to the file api-key in its data directory.",
            masked(secret)
        ),
    )
}

/// Enough of a key to tell it from another, too little to use it.
fn masked(secret: &str) -> String {
    let characters: Vec<char> = secret.chars().collect();
    if characters.len() < 12 {
        return "****".to_owned();
    }
    let first: String = characters[..3].iter().collect();
    let last: String = characters[characters.len() - 4..].iter().collect();
    format!("{first}****{last}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_is_a_key() {
        assert_eq!(bearer("Bearer sk-a"), Some("sk-a"));
        assert_eq!(bearer("bearer  sk-a "), Some("sk-a"));
        for other in ["sk-a", "Basic sk-a", "Bearer ", "Bearer", ""] {
            assert_eq!(bearer(other), None, "{other}");
        }
    }

    #[test]
    fn a_wrong_key_is_not_repeated_in_the_reply() {
        assert_eq!(masked("sk-abcdefghijklmnop"), "sk-****mnop");
        assert_eq!(masked("short"), "****");
    }
}
