//! Reads a body within its limits.

use crate::error::ApiError;
use crate::state::AppState;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, header};

/// The whole body, which has its room until it is dropped.
///
/// # Errors
/// 413 when it is larger than `max_body_bytes`, 429 when there is no room for it now, 408 when it takes longer than `body_timeout`, 400 when it breaks off.
pub(crate) async fn read(headers: &HeaderMap, body: Body, state: &AppState) -> Result<Bytes, ApiError> {
    let config = state.config();
    let limit = config.max_body_bytes;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit as u64) {
        return Err(ApiError::body_too_large(limit));
    }
    // A body that does not say how long it is may become as long as is allowed.
    let room = state.room().for_body(length.unwrap_or(limit as u64), state.retry_after_s())?;
    match tokio::time::timeout(config.body_timeout, to_bytes(body, limit)).await {
        Err(_) => Err(ApiError::body_timeout(config.body_timeout)),
        Ok(Ok(bytes)) => Ok(room.hold(bytes)),
        Ok(Err(error)) if is_length_limit(&error) => Err(ApiError::body_too_large(limit)),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the request body broke off: {error}"))),
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.to_string().contains("length limit exceeded") {
            return true;
        }
        cause = error.source();
    }
    false
}
