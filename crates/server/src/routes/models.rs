//! `GET /v1/models` and `GET /v1/models/{id}`.

use super::model_name;
use crate::error::ApiError;
use crate::state::AppState;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let model = describe(&state, &state.config().model_id)?;
    Ok(Json(json!({"object": "list", "data": [model]})))
}

pub(crate) async fn one(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let name = model_name(&state, Some(&id))?;
    Ok(Json(describe(&state, &name)?))
}

fn describe(state: &AppState, id: &str) -> Result<Value, ApiError> {
    let service = state.service()?;
    Ok(json!({
        "id": id, "object": "model", "created": state.created(), "owned_by": "hearth",
        "max_model_len": service.engine.context_limit(),
    }))
}
