//! Handlers, one file per group of paths.

pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod documents;
pub(crate) mod embeddings;
pub(crate) mod models;
pub(crate) mod operations;
pub(crate) mod tokenizer;

use crate::adapters::Target;
use crate::error::ApiError;
use crate::generation::{Sequence, start};
use crate::record::About;
use crate::request::options::StreamOptions;
use crate::response::usage::Usage;
use crate::response::{Shape, collect, sse};
use crate::room::Reservation;
use crate::state::{AppState, Loaded};
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Runs CPU-bound work (parsing, tokenizing) where it does not hold up other connections.
pub(crate) async fn compute<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("a request could not be processed: {error}"))),
    }
}

/// What a request's `model` stands for.
pub(crate) fn target(state: &AppState, service: &Loaded, asked: Option<&str>) -> Result<Target, ApiError> {
    Target::of(state.config(), service.adapters(), asked)
}

/// Starts the sequences and answers, at once or as a stream.
pub(crate) async fn answer(
    state: &AppState,
    service: &Arc<Loaded>,
    job: Job,
    shape: impl Shape,
    stream: Option<StreamOptions>,
) -> Result<Response, ApiError> {
    let Job { about, sequences, room, mut usage, arrived, per_prompt, keep } = job;
    let count = sequences.len();
    let updates = start(state, service, sequences, about, arrived)?;
    match stream {
        Some(options) => Ok(sse::stream(updates, shape, usage, options, state.config().keep_alive, room)),
        None => {
            let mut outcomes = collect::collect(updates, &mut usage, count).await?;
            if keep < per_prompt {
                outcomes = collect::best(outcomes, per_prompt, keep);
            }
            Ok(held(&shape.answer(outcomes, &usage), room))
        }
    }
}

/// An answer that has its room until it is taken.
fn held(answer: &Value, room: Reservation) -> Response {
    let kind = HeaderValue::from_static("application/json");
    let body = Body::from(room.hold(answer.to_string().into()));
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}

/// A request, ready for the engine.
pub(crate) struct Job {
    pub(crate) about: About,
    pub(crate) sequences: Vec<Sequence>,
    /// For the answer.
    pub(crate) room: Reservation,
    pub(crate) usage: Usage,
    pub(crate) arrived: Instant,
    /// Sequences per prompt, and how many of them, the best, are given.
    pub(crate) per_prompt: usize,
    pub(crate) keep: usize,
}

/// Unix time.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
