//! `POST /v1/embeddings`.

use super::{compute, target};
use crate::adapters::Target;
use crate::error::ApiError;
use crate::request::embeddings::{EmbeddingsRequest, Encoding, parse};
use crate::request::{body, prompt};
use crate::state::{AppState, Loaded, Phase};
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::{StreamExt, TryStreamExt};
use hearth_engine::api::{Adapter, Event, Generation, Pooling, SubmitError};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// Pause before an input of a batch knocks again at a full queue.
const KNOCK_AGAIN: Duration = Duration::from_millis(20);

pub(crate) async fn embeddings(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    let most = state.config().max_sequences_per_request;
    let (request, inputs) = {
        let service = service.clone();
        compute(move || prepare(&service, &body, most)).await?
    };
    let Target { name: model, adapter } = target(&state, &service, request.model.as_deref())?;
    let components = service.engine.hidden_size();
    let shape = (components, request.dimensions.unwrap_or(components), request.encoding);
    let lengths = inputs.iter().map(Vec::len);
    let room = state.room().for_vectors(lengths, shape, service.engine.retry_after_s())?;
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    let _guard = state.count_sequence();
    let vectors = within_limits(&state, all(&state, &service, inputs, request.pooling, adapter)).await?;
    let data: Vec<Value> = vectors
        .into_iter()
        .enumerate()
        .map(|(index, vector)| {
            let vector = finish(vector, &request);
            json!({"object": "embedding", "index": index, "embedding": encode(&vector, request.encoding)})
        })
        .collect();
    let answer = json!({
        "object": "list", "data": data, "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    });
    Ok(super::held(&answer, room))
}

/// Parses and tokenizes, and checks every input before the engine sees any.
fn prepare(
    service: &Loaded,
    body: &[u8],
    most: usize,
) -> Result<(EmbeddingsRequest, Vec<Vec<u32>>), ApiError> {
    let request = parse(body, service.engine.vocab_size(), service.engine.hidden_size())?;
    if request.inputs.len() > most {
        let message = format!("{} inputs in one request; at most {most} are allowed", request.inputs.len());
        return Err(ApiError::field("input", message));
    }
    let limit = service.engine.context_limit();
    let ids = request.inputs.iter().map(|input| {
        let ids = input.ids(service, request.add_special_tokens)?;
        prompt::budget(ids.len(), Some(0), 0, limit)?;
        Ok(ids)
    });
    let ids = ids.collect::<Result<_, ApiError>>().map_err(|error| error.about("input"))?;
    Ok((request, ids))
}

/// Ends with an error when the request's time is up or the server ends.
async fn within_limits<T>(
    state: &AppState,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let mut phase = state.phase();
    let limit = state.config().request_timeout;
    let timeout = async {
        match limit {
            Some(limit) => {
                tokio::time::sleep(limit).await;
                limit
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        _ = phase.wait_for(|phase| *phase == Phase::Ending) => Err(ApiError::shutting_down()),
        limit = timeout => Err(ApiError::request_timeout(limit)),
        done = work => done,
    }
}

/// Every input's vector, in order; a few at a time are with the engine, and all of them are cancelled when this is
/// dropped. Only the first may be refused for want of room.
async fn all(
    state: &AppState,
    service: &Arc<Loaded>,
    inputs: Vec<Vec<u32>>,
    pooling: Pooling,
    adapter: Option<Arc<Adapter>>,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let mut inputs = inputs.into_iter();
    let Some(first) = inputs.next() else { return Ok(Vec::new()) };
    let mut vectors = vec![vector(service.engine.embed(first, pooling, adapter.clone())?).await?];
    let adapter = &adapter;
    let one = |input: Vec<u32>| async move {
        loop {
            match service.engine.embed(input.clone(), pooling, adapter.clone()) {
                Err(SubmitError::Busy { .. }) => tokio::time::sleep(KNOCK_AGAIN).await,
                result => return vector(result?).await,
            }
        }
    };
    let rest = futures_util::stream::iter(inputs.map(one)).buffered(state.config().max_seqs.max(1));
    vectors.extend(rest.try_collect::<Vec<_>>().await?);
    Ok(vectors)
}

async fn vector(mut generation: Generation) -> Result<Vec<f32>, ApiError> {
    while let Some(event) = generation.next().await {
        match event {
            Event::Embedding(vector) => return Ok(vector),
            Event::Failed(why) => return Err(ApiError::internal(why)),
            _ => {}
        }
    }
    Err(ApiError::internal("the engine ended without a vector"))
}

/// Cut to the dimensions asked for, then scaled to length 1.
fn finish(mut vector: Vec<f32>, request: &EmbeddingsRequest) -> Vec<f32> {
    vector.truncate(request.dimensions.unwrap_or(vector.len()));
    if request.normalize {
        let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
    }
    vector
}

fn encode(vector: &[f32], encoding: Encoding) -> Value {
    match encoding {
        Encoding::Float => json!(vector),
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(BASE64_STANDARD.encode(bytes))
        }
    }
}
