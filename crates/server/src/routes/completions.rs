//! `POST /v1/completions`.

use super::{Job, answer, compute, now, target};
use crate::error::ApiError;
use crate::generation::Sequence;
use crate::record::About;
use crate::request::completions::{CompletionRequest, DEFAULT_MAX_TOKENS, parse};
use crate::request::{body, prompt};
use crate::request_id::{self, fresh};
use crate::response::completions::CompletionShape;
use crate::response::usage::Usage;
use crate::state::{AppState, Loaded};
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use hearth_engine::api::Request;
use std::time::Instant;

pub(crate) async fn completions(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    let most = state.config().max_sequences_per_request;
    let (request, mut sequences, usage) = {
        let service = service.clone();
        compute(move || prepare(&service, &body, most)).await?
    };
    let target = target(&state, &service, request.model.as_deref())?;
    sequences.iter_mut().for_each(|s| s.request.adapter = target.adapter.clone());
    let shape = CompletionShape {
        id: fresh("cmpl-"),
        created: now(),
        model: target.name,
        service: service.clone(),
        logprobs: request.logprobs.is_some(),
        token_ids: request.options.return_token_ids || service.tokenizer.is_none(),
    };
    let about = About {
        request_id: request_id::of(&headers),
        response_id: shape.id.clone(),
        api: "completions",
        model: shape.model.clone(),
        stream: request.options.stream.is_some(),
        trace_parent: request_id::header(&headers, "traceparent"),
    };
    answer(
        &state,
        &service,
        Job { about, sequences, usage, arrived, per_prompt: request.best_of, keep: request.options.n },
        shape,
        request.options.stream,
    )
    .await
}

/// Parses and tokenizes, and checks every prompt before the engine sees any.
fn prepare(
    service: &Loaded,
    body: &[u8],
    most: usize,
) -> Result<(CompletionRequest, Vec<Sequence>, Usage), ApiError> {
    let mut request = parse(body, service.engine.vocab_size())?;
    request.options.settle(service, Some(request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)))?;
    if request.options.needs_text() {
        service.text_tokenizer()?;
    }
    let count = request.prompts.len() * request.best_of;
    if count > most {
        let message = format!(
            "{count} sequences (prompts times \"n\" or \"best_of\") in one request; at most {most} are allowed"
        );
        return Err(ApiError::field("prompt", message));
    }
    let mut sequences = Vec::with_capacity(count);
    let mut lengths = Vec::with_capacity(request.prompts.len());
    for prompt in &request.prompts {
        let ids = prompt.ids(service, request.add_special_tokens)?;
        let limit = service.engine.context_limit();
        let max_tokens = prompt::budget(ids.len(), request.max_tokens, DEFAULT_MAX_TOKENS, limit)?;
        lengths.push(ids.len());
        for index in 0..request.best_of {
            let mut sequence = sequence(&request, service, ids.clone(), max_tokens, index);
            sequence.prompt_text = prompt.text().filter(|_| request.echo).map(str::to_owned);
            sequences.push(sequence);
        }
    }
    let usage = Usage::new(&lengths, request.best_of);
    Ok((request, sequences, usage))
}

fn sequence(
    request: &CompletionRequest,
    service: &Loaded,
    prompt: Vec<u32>,
    max_tokens: usize,
    index: usize,
) -> Sequence {
    let options = &request.options;
    let stop_tokens = options.stop_tokens(&service.eos_tokens);
    let scores_prompt = request.echo && request.logprobs.is_some();
    let (stop_tokens, reported_stop_tokens) = match scores_prompt {
        true => (Vec::new(), stop_tokens),
        false => (stop_tokens, Vec::new()),
    };
    let request_to_engine = Request {
        prompt,
        max_tokens,
        stop_tokens,
        sampling: options.sampling_of(index),
        // The best are found by their log-probabilities.
        logprobs: request.logprobs.or((request.best_of > options.n).then_some(0)),
        prompt_logprobs: options.prompt_logprobs.max(request.logprobs.filter(|_| request.echo)),
        adapter: None,
    };
    Sequence {
        request: request_to_engine,
        echo: request.echo,
        prompt_logprobs: options.prompt_logprobs,
        prompt_text: None,
        stops: options.stop.clone(),
        include_stop: options.include_stop,
        standing: options.standing.clone(),
        format: options.format.as_ref().map(|(format, _)| format.clone()),
        reported_stop_tokens,
        skip_special: options.skip_special_tokens,
    }
}
