//! Reads a body within its limits.

use crate::error::ApiError;
use crate::state::AppState;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;

/// The whole body, which has its room until it is dropped.
///
/// # Errors
/// 413 when it is larger than `max_body_bytes`, 429 when there is no room for it now, 408 when it takes longer than
/// `body_timeout`, 400 when it breaks off.
pub(crate) async fn read(headers: &HeaderMap, body: Body, state: &AppState) -> Result<Bytes, ApiError> {
    let limit = state.config().body_timeout;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    match tokio::time::timeout(limit, collect(body, length, state)).await {
        Ok(read) => read,
        Err(_) => Err(ApiError::body_timeout(limit)),
    }
}

/// Room for all that is announced comes before its first byte. A body that does not say how long it is has room for what
/// came and a step more.
async fn collect(body: Body, length: Option<u64>, state: &AppState) -> Result<Bytes, ApiError> {
    let limit = state.config().max_body_bytes;
    let within = |bytes: u64| match bytes <= limit as u64 {
        true => Ok(bytes),
        false => Err(ApiError::body_too_large(limit)),
    };
    let mut room = state.room().for_body(length.map(within).transpose()?, state.retry_after_s())?;
    let mut parts = body.into_data_stream();
    // Copied: a part of a few bytes keeps the connection's whole buffer.
    let mut read = Vec::new();
    while let Some(part) = parts.next().await {
        let broke_off = |error| ApiError::bad_request(format!("the request body broke off: {error}"));
        let part = part.map_err(broke_off)?;
        room.cover(within((read.len() + part.len()) as u64)?, state.retry_after_s())?;
        read.extend_from_slice(&part);
    }
    room.settle(read.len() as u64);
    Ok(room.hold(read.into()))
}
