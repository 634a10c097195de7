//! `POST /v1/completions`.

use super::{Job, answer, compute, now, target};
use crate::error::ApiError;
use crate::generation::Sequence;
use crate::record::About;
use crate::request::body;
use crate::request::completions::{CompletionRequest, DEFAULT_MAX_TOKENS, parse};
use crate::request::prompt::{self, Prompt};
use crate::request_id::{self, fresh};
use crate::response::completions::CompletionShape;
use crate::response::usage::Usage;
use crate::room::{Extent, Reservation};
use crate::state::{AppState, Loaded};
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use hearth_engine::api::Request;
use std::iter::repeat_n;
use std::sync::Arc;
use std::time::Instant;

pub(crate) async fn completions(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let service = state.service()?;
    let body = body::read(&headers, body, &state).await?;
    let Prepared { request, mut sequences, room, usage } = {
        let (state, service) = (state.clone(), service.clone());
        compute(move || prepare(&state, &service, &body)).await?
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
        Job { about, sequences, room, usage, arrived, per_prompt: request.best_of, keep: request.options.n },
        shape,
        request.options.stream,
    )
    .await
}

/// A request with its sequences, and the room that the answer may need.
struct Prepared {
    request: CompletionRequest,
    sequences: Vec<Sequence>,
    room: Reservation,
    usage: Usage,
}

/// Parses and tokenizes, and checks every prompt before the engine sees any. Prompts are copied for their choices once there
/// is room for all of them.
fn prepare(state: &AppState, service: &Loaded, body: &[u8]) -> Result<Prepared, ApiError> {
    let mut request = parse(body, service.engine.vocab_size())?;
    request.options.settle(service, Some(request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)))?;
    if request.options.needs_text() {
        service.text_tokenizer()?;
    }
    let (count, most) = (request.prompts.len() * request.best_of, state.config().max_sequences_per_request);
    if count > most {
        let message = format!(
            "{count} sequences (prompts times \"n\" or \"best_of\") in one request; at most {most} are allowed"
        );
        return Err(ApiError::field("prompt", message));
    }
    let prompts: Vec<Counted> = request
        .prompts
        .iter()
        .map(|prompt| Counted::new(prompt, &request, service))
        .collect::<Result<_, ApiError>>()?;
    let extents = prompts.iter().flat_map(|prompt| repeat_n(prompt.extent(&request), request.best_of));
    let room = state.room().for_answer(extents, service.engine.retry_after_s())?;
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.ids.len()).collect();
    let choices = |prompt: &Counted| {
        (0..request.best_of).map(|index| sequence(&request, service, prompt, index)).collect::<Vec<_>>()
    };
    let sequences = prompts.iter().flat_map(choices).collect();
    let usage = Usage::new(&lengths, request.best_of);
    Ok(Prepared { request, sequences, room, usage })
}

/// A prompt with what may follow it.
struct Counted {
    ids: Vec<u32>,
    /// The prompt in the client's words, where the answer repeats it.
    text: Option<Arc<str>>,
    max_tokens: usize,
}

impl Counted {
    fn new(prompt: &Prompt, request: &CompletionRequest, service: &Loaded) -> Result<Self, ApiError> {
        let ids = prompt.ids(service, request.add_special_tokens)?;
        let limit = service.engine.context_limit();
        let max_tokens = prompt::budget(ids.len(), request.max_tokens, DEFAULT_MAX_TOKENS, limit)?;
        let text = prompt.text().filter(|_| request.echo).map(Into::into);
        Ok(Self { ids, text, max_tokens })
    }

    fn extent(&self, request: &CompletionRequest) -> Extent {
        let (logprobs, prompt_logprobs) = scored(request);
        // As a value, and as JSON that grows.
        let text = 4 * self.text.as_ref().map_or(0, |text| text.len());
        Extent {
            prompt_tokens: self.ids.len(),
            max_tokens: self.max_tokens,
            logprobs,
            prompt_logprobs,
            copied: request.options.copied() + text,
        }
    }
}

/// Alternatives to generated tokens and to the prompt's that the engine reports.
fn scored(request: &CompletionRequest) -> (Option<usize>, Option<usize>) {
    let options = &request.options;
    // The best are found by their log-probabilities.
    let generated = request.logprobs.or((request.best_of > options.n).then_some(0));
    (generated, options.prompt_logprobs.max(request.logprobs.filter(|_| request.echo)))
}

fn sequence(request: &CompletionRequest, service: &Loaded, prompt: &Counted, index: usize) -> Sequence {
    let options = &request.options;
    let stop_tokens = options.stop_tokens(&service.eos_tokens);
    let scores_prompt = request.echo && request.logprobs.is_some();
    let (stop_tokens, reported_stop_tokens) = match scores_prompt {
        true => (Vec::new(), stop_tokens),
        false => (stop_tokens, Vec::new()),
    };
    let (logprobs, prompt_logprobs) = scored(request);
    let request_to_engine = Request {
        prompt: prompt.ids.clone(),
        max_tokens: prompt.max_tokens,
        stop_tokens,
        sampling: options.sampling_of(index),
        logprobs,
        prompt_logprobs,
        adapter: None,
    };
    Sequence {
        request: request_to_engine,
        echo: request.echo,
        prompt_logprobs: options.prompt_logprobs,
        prompt_text: prompt.text.clone(),
        stops: options.stop.clone(),
        include_stop: options.include_stop,
        standing: options.standing.clone(),
        format: options.format.as_ref().map(|(format, _)| format.clone()),
        reported_stop_tokens,
        skip_special: options.skip_special_tokens,
    }
}
