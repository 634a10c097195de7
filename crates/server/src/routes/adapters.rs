//! `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`, with vLLM's fields.

use super::compute;
use super::models::describe;
use crate::error::ApiError;
use crate::request::body;
use crate::request::fields::Fields;
use crate::state::AppState;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde_json::{Value, json};

pub(crate) async fn load(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    let mut fields = Fields::parse(&body)?;
    let (name, path) = (required(&mut fields, "lora_name")?, required(&mut fields, "lora_path")?);
    let in_place = fields.boolean("load_inplace")?.unwrap_or(false);
    let answer = describe(&state, &service, &name, true);
    let state = state.clone();
    compute(move || service.adapters().load(state.config(), &service, &name, &path, in_place)).await?;
    Ok(Json(answer))
}

pub(crate) async fn unload(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    let name = required(&mut Fields::parse(&body)?, "lora_name")?;
    service.adapters().unload(state.config(), &name)?;
    Ok(Json(json!({"id": name, "object": "model", "deleted": true})))
}

fn required(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    let missing = || ApiError::field(name, format!("{name:?} is missing; it must be a string"));
    fields.string(name)?.ok_or_else(missing)
}
