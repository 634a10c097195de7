//! API keys.

use crate::error::ApiError;
use crate::state::AppState;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Paths that probes, scrapers and people without a key reach. The page asks for the key itself.
const OPEN: [&str; 4] = ["/health", "/metrics", "/", "/openapi.json"];

/// Lets a request through if it carries the key, or none is asked for.
pub(crate) async fn check(State(state): State<AppState>, request: Request, next: Next) -> Response {
    if let Some(key) = &state.config().api_key
        && !OPEN.contains(&request.uri().path())
        && let Err(error) = check_key(request.headers(), key)
    {
        return error.into_response();
    }
    next.run(request).await
}

fn check_key(headers: &HeaderMap, key: &str) -> Result<(), ApiError> {
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
    let Some(given) = given.and_then(bearer) else {
        return Err(ApiError::unauthorized("an API key is required: send \"Authorization: Bearer <key>\""));
    };
    match equal(given, key.as_bytes()) {
        true => Ok(()),
        false => Err(ApiError::unauthorized("the API key is not valid")),
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Compares in a time that depends on the lengths alone, so that a key cannot be guessed byte by byte.
fn equal(given: &[u8], key: &[u8]) -> bool {
    let difference = given.iter().zip(key).fold(0u8, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    given.len() == key.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_is_accepted() {
        for (value, accepted) in [
            ("Bearer secret", true),
            ("bearer secret", true),
            ("Bearer secre", false),
            ("Bearer secrets", false),
            ("Bearer ", false),
            ("Bearer", false),
            ("Basic secret", false),
            ("secret", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            assert_eq!(check_key(&headers, "secret").is_ok(), accepted, "{value:?}");
        }
        assert!(check_key(&HeaderMap::new(), "secret").is_err());
    }
}
