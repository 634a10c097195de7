//! Which path leads where.

use crate::error::ApiError;
use crate::routes::{adapters, chat, completions, documents, embeddings, models, operations, tokenizer};
use crate::state::AppState;
use crate::{auth, metrics, request_id};
use axum::Router;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};

/// The whole server as an axum router.
pub fn router(state: AppState) -> Router {
    Router::new()
        .route("/", get(documents::playground))
        .route("/openapi.json", get(documents::openapi))
        .route("/v1/models", get(models::list))
        // A model's name may hold slashes.
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/tokenize", post(tokenizer::tokenize))
        .route("/detokenize", post(tokenizer::detokenize))
        .route("/tokenizer_info", get(tokenizer::tokenizer_info))
        .route("/health", get(operations::health))
        .route("/metrics", get(operations::metrics))
        .fallback(no_such_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(from_fn_with_state(state.metrics().clone(), metrics::count))
        .layer(from_fn(request_id::echo))
        .with_state(state)
}

async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    ApiError::route(StatusCode::NOT_FOUND, format!("there is nothing at {method} {}", short(&uri)))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take the method {method}", short(&uri));
    ApiError::route(StatusCode::METHOD_NOT_ALLOWED, message)
}

fn short(uri: &Uri) -> String {
    uri.path().chars().take(100).collect()
}
