//! Ids: `x-request-id` and the ids of responses.

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

const HEADER: &str = "x-request-id";
const LONGEST: usize = 256;

/// Gives the client's `x-request-id` back, or a fresh one.
pub(crate) async fn echo(request: Request, next: Next) -> Response {
    let given = request.headers().get(HEADER).filter(|id| id.len() <= LONGEST).cloned();
    let mut response = next.run(request).await;
    let id = given.or_else(|| HeaderValue::try_from(fresh("req-")).ok());
    if let Some(id) = id {
        response.headers_mut().insert(HEADER, id);
    }
    response
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
