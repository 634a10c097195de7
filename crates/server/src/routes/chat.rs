//! `POST /v1/chat/completions`.

use super::{Job, answer, compute, model_name, now};
use crate::error::ApiError;
use crate::generation::Sequence;
use crate::request::chat::{ChatRequest, parse};
use crate::request::{body, prompt};
use crate::request_id::fresh;
use crate::response::chat::ChatShape;
use crate::response::usage::Usage;
use crate::state::{AppState, Loaded};
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use hearth_engine::api::Request;
use std::time::Instant;

pub(crate) async fn chat(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let service = state.service()?;
    let body = body::read(&headers, body, state.config()).await?;
    let (request, sequences, usage) = {
        let service = service.clone();
        compute(move || prepare(&service, &body)).await?
    };
    let n = request.options.n;
    let shape = ChatShape {
        id: fresh("chatcmpl-"),
        created: now(),
        model: model_name(&state, request.model.as_deref())?,
        service: service.clone(),
        logprobs: request.logprobs.is_some(),
        token_ids: request.options.return_token_ids,
        begun: vec![false; sequences.len()],
    };
    answer(
        &state,
        &service,
        Job { sequences, usage, arrived, per_prompt: n, keep: n },
        shape,
        request.options.stream,
    )
    .await
}

fn prepare(service: &Loaded, body: &[u8]) -> Result<(ChatRequest, Vec<Sequence>, Usage), ApiError> {
    let mut request = parse(body, service.engine.vocab_size())?;
    request.options.settle(service, request.max_tokens)?;
    let prompt = request.conversation.ids(service)?;
    // Without a limit the model may use all the context there is.
    let limit = service.engine.context_limit();
    let max_tokens = prompt::budget(prompt.len(), request.max_tokens, limit, limit)?;
    let options = &request.options;
    let sequences = (0..options.n).map(|index| Sequence {
        request: Request {
            prompt: prompt.clone(),
            max_tokens,
            stop_tokens: options.stop_tokens(&service.eos_tokens),
            sampling: options.sampling_of(index),
            logprobs: request.logprobs,
            prompt_logprobs: None,
        },
        echo: false,
        prompt_text: None,
        stops: options.stop.clone(),
        include_stop: options.include_stop,
        reported_stop_tokens: Vec::new(),
        skip_special: options.skip_special_tokens,
    });
    let sequences = sequences.collect();
    let usage = Usage::new(&[prompt.len()], options.n);
    Ok((request, sequences, usage))
}
