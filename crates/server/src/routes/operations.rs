//! `GET /health` and `GET /metrics`.

use crate::error::ApiError;
use crate::state::AppState;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// 200 when requests are taken, 503 while loading and while shutting down.
pub(crate) async fn health(State(state): State<AppState>) -> Response {
    let (code, status) = match state.service() {
        Ok(_) => (StatusCode::OK, "ok"),
        Err(ApiError { code, .. }) => (StatusCode::SERVICE_UNAVAILABLE, code.unwrap_or("unavailable")),
    };
    (code, Json(json!({"status": status}))).into_response()
}

/// Prometheus' text format.
pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    let text = state.metrics().render(&state.config().model_id, state.loaded().as_deref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
