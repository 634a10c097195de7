//! `GET /v1/models` and `GET /v1/models/{id}`.

use crate::adapters::Target;
use crate::error::ApiError;
use crate::state::{AppState, Loaded};
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let mut models = vec![describe(&state, &service, &state.config().model_id, false)];
    models.extend(service.adapters().names().iter().map(|name| describe(&state, &service, name, true)));
    Ok(Json(json!({"object": "list", "data": models})))
}

pub(crate) async fn one(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let target = Target::of(state.config(), service.adapters(), Some(&id))?;
    Ok(Json(describe(&state, &service, &target.name, target.adapter.is_some())))
}

/// A model as it is listed; an adapter names the model it is laid over as its parent.
pub(crate) fn describe(state: &AppState, service: &Loaded, id: &str, is_adapter: bool) -> Value {
    let base = &state.config().model_id;
    json!({
        "id": id, "object": "model", "created": state.created(), "owned_by": "hearth",
        "root": base, "parent": is_adapter.then_some(base),
        "max_model_len": service.engine.context_limit(),
    })
}
