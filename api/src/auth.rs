//! Who is asking: the API key of the `Authorization` header.

use crate::failure::Failure;
use crate::server::AppState;
use actix_web::http::header::AUTHORIZATION;
use actix_web::{FromRequest, HttpMessage as _, HttpRequest, dev::Payload, web};
use futures::future::LocalBoxFuture;
use std::ops::Deref;
use std::sync::Arc;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::ids::{ADMIN_KEY_PREFIX, JobId};
use tunesmith_store::StoreError;
use tunesmith_store::jobs::SeenJob;
use tunesmith_store::permissions::Granter;
use tunesmith_store::tenants::{Administrator, Caller};

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
        let shown = Shown::of(request);
        let request = request.clone();
        Box::pin(async move {
            let Shown { state, secret } = shown?;
            match state.store.authenticate(&secret).await? {
                Some(caller) => {
                    count(&state, &request, &caller).await?;
                    Ok(Self(caller))
                }
                None => Err(no_project_key(&state, &secret).await),
            }
        })
    }
}

/// The job `id` of the caller's project. Nobody else sees it: this stands for [`Authenticated`].
///
/// # Errors
/// Those of [`Authenticated`], or `not_found`.
pub(crate) async fn authenticated_job(
    request: &HttpRequest,
    id: &JobId,
) -> Result<Arc<SeenJob>, Failure> {
    let Shown { state, secret } = Shown::of(request)?;
    match state.store.authenticate_for_job(&secret, id).await? {
        Some((caller, job)) => {
            count(&state, request, &caller).await?;
            let missing = || StoreError::NotFound { kind: "job", id: id.to_string() };
            Ok(job.ok_or_else(missing)?)
        }
        None => Err(no_project_key(&state, &secret).await),
    }
}

/// Why a key that is no project's is refused.
async fn no_project_key(state: &AppState, secret: &str) -> Failure {
    match administrator(state, secret).await {
        Ok(Some(_)) => admin_key_in_a_project().into(),
        Ok(None) => wrong_key(secret).into(),
        Err(failure) => failure,
    }
}

/// Counts the request against its project's limit; the reply will say how that stands.
async fn count(state: &AppState, request: &HttpRequest, caller: &Caller) -> Result<(), Failure> {
    let Some(rate) = &state.rate else { return Ok(()) };
    let standing = rate.take(&state.store, &caller.project_id).await?;
    request.extensions_mut().insert(standing);
    match (standing.refusal(), standing.retry_after) {
        (Some(refusal), Some(wait)) => Err(Failure::retry_after(refusal, wait)),
        _ => Ok(()),
    }
}

/// A caller with an admin key: to an organisation's projects and keys, not to what is in them.
#[derive(Debug, Clone)]
pub(crate) struct Admin(Administrator);

impl Deref for Admin {
    type Target = Administrator;

    fn deref(&self) -> &Administrator {
        &self.0
    }
}

impl FromRequest for Admin {
    type Error = Failure;
    type Future = LocalBoxFuture<'static, Result<Self, Failure>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let shown = Shown::of(request);
        Box::pin(async move {
            let Shown { state, secret } = shown?;
            match administrator(&state, &secret).await? {
                Some(administrator) => Ok(Self(administrator)),
                None if state.store.authenticate(&secret).await?.is_some() => {
                    Err(project_key_for_an_organization().into())
                }
                None => Err(wrong_key(&secret).into()),
            }
        })
    }
}

/// Whoever may share a model: its project, or who looks after the organisation.
#[derive(Debug, Clone)]
pub(crate) struct Sharer(pub(crate) Granter);

impl FromRequest for Sharer {
    type Error = Failure;
    type Future = LocalBoxFuture<'static, Result<Self, Failure>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let shown = Shown::of(request);
        let request = request.clone();
        Box::pin(async move {
            let Shown { state, secret } = shown?;
            if let Some(administrator) = administrator(&state, &secret).await? {
                return Ok(Self(Granter::Organization(administrator.organization_id)));
            }
            match state.store.authenticate(&secret).await? {
                Some(caller) => {
                    count(&state, &request, &caller).await?;
                    Ok(Self(Granter::Project(caller.project_id)))
                }
                None => Err(wrong_key(&secret).into()),
            }
        })
    }
}

/// A key that a request shows, whosesoever it is.
struct Shown {
    state: web::Data<AppState>,
    secret: String,
}

impl Shown {
    fn of(request: &HttpRequest) -> Result<Self, Failure> {
        let header = request.headers().get(AUTHORIZATION);
        let secret = header.and_then(|header| bearer(header.to_str().ok()?)).ok_or_else(no_key)?;
        let state = request.app_data::<web::Data<AppState>>().cloned();
        let state = state.ok_or_else(|| Failure::internal("the server has no state"))?;
        Ok(Self { state, secret: secret.to_owned() })
    }
}

async fn administrator(state: &AppState, secret: &str) -> Result<Option<Administrator>, Failure> {
    if !secret.starts_with(ADMIN_KEY_PREFIX) {
        return Ok(None);
    }
    Ok(state.store.authenticate_administrator(secret).await?)
}

fn admin_key_in_a_project() -> ApiError {
    ApiError::new(
        ErrorCode::InsufficientPermissions,
        "This is an admin key, which opens an organisation's projects and keys alone. Use a key \
         of the project.",
    )
}

fn project_key_for_an_organization() -> ApiError {
    ApiError::new(
        ErrorCode::InsufficientPermissions,
        "This key opens a project alone, and this needs an admin key. Whoever runs this server \
         makes one with `tunesmith keys create --admin`.",
    )
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
