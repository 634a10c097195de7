//! `POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`: a remote tokenizer for evaluation harnesses.

use super::compute;
use crate::error::ApiError;
use crate::request::tokenize::{TokenizeInput, parse, parse_detokenize};
use crate::request::{body, prompt};
use crate::state::{AppState, Service};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use serde_json::{Value, json};

pub(crate) async fn tokenize(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    compute(move || tokens(&service, &body)).await.map(Json)
}

fn tokens(service: &Service, body: &[u8]) -> Result<Value, ApiError> {
    let tokenizer = service.text_tokenizer()?;
    let request = parse(body)?;
    let tokens = match &request.input {
        TokenizeInput::Prompt { text, add_special_tokens } => {
            prompt::encode(tokenizer, text, *add_special_tokens)?
        }
        TokenizeInput::Conversation(conversation) => conversation.ids(service)?,
    };
    let strings: Option<Vec<_>> = request
        .return_token_strs
        .then(|| tokens.iter().map(|&id| tokenizer.token(id).unwrap_or_default()).collect());
    Ok(json!({
        "count": tokens.len(), "max_model_len": service.engine.context_limit(),
        "tokens": tokens, "token_strs": strings,
    }))
}

pub(crate) async fn detokenize(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    compute(move || {
        let tokenizer = service.text_tokenizer()?;
        let ids = parse_detokenize(&body, service.engine.vocab_size())?;
        // Special tokens are kept: this is the inverse of `/tokenize`.
        let text = tokenizer.decode(&ids, false).map_err(|e| ApiError::field("tokens", e.to_string()))?;
        Ok(json!({"prompt": text}))
    })
    .await
    .map(Json)
}

pub(crate) async fn tokenizer_info(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let service = state.service()?;
    let tokenizer = service.text_tokenizer()?;
    let template = service.template.as_ref().map(|template| template.source());
    let mut info = tokenizer.config(template);
    // Harnesses read these keys whether or not the model has such a token.
    for key in ["bos_token", "eos_token", "pad_token", "unk_token", "chat_template"] {
        if info.get(key).is_none() {
            info[key] = Value::Null;
        }
    }
    Ok(Json(info))
}
