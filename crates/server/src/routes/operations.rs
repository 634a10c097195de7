//! `GET /health` and `GET /metrics`.

use crate::error::ApiError;
use crate::state::AppState;
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// 200 when requests are taken, 503 while loading, while shutting down and while the engine cannot answer.
pub(crate) async fn health(State(state): State<AppState>) -> Response {
    let unavailable = |body| (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    match state.service() {
        Ok(service) => match service.engine.fault() {
            None => Json(json!({"status": "ok"})).into_response(),
            Some(fault) => unavailable(json!({"status": "failing", "error": fault})),
        },
        Err(ApiError { code, .. }) => unavailable(json!({"status": code.unwrap_or("unavailable")})),
    }
}

/// Prometheus' text format.
pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    let text = state.metrics().render(&state.config().model_id, state.loaded().as_deref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
