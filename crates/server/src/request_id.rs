//! Ids: `x-request-id` and the ids of responses.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

const HEADER: &str = "x-request-id";
const LONGEST: usize = 256;

/// Gives the client's `x-request-id` back, or a fresh one.
pub(crate) async fn echo(mut request: Request, next: Next) -> Response {
    let given = request.headers().get(HEADER).filter(|id| id.len() <= LONGEST).cloned();
    let id = given.or_else(|| HeaderValue::try_from(fresh("req-")).ok());
    if let Some(id) = &id {
        request.headers_mut().insert(HEADER, id.clone());
    }
    let mut response = next.run(request).await;
    if let Some(id) = id {
        response.headers_mut().insert(HEADER, id);
    }
    response
}

/// The request's id, or another header's text.
pub(crate) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// The id that [`echo`] made sure of.
pub(crate) fn of(headers: &HeaderMap) -> String {
    header(headers, HEADER).unwrap_or_default()
}

/// An id that no other response of any server is likely to have.
pub(crate) fn fresh(prefix: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // Each `RandomState` is seeded by the system.
    format!("{prefix}{:016x}{:016x}", RandomState::new().hash_one(count), RandomState::new().hash_one(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_ids_differ() {
        let ids: std::collections::HashSet<_> = (0..1000).map(|_| fresh("cmpl-")).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| id.starts_with("cmpl-") && id.len() == 37));
    }
}
