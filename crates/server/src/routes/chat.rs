//! `POST /v1/chat/completions`.

use super::{Job, answer, compute, now, target};
use crate::constrain::format::Format;
use crate::error::ApiError;
use crate::generation::Sequence;
use crate::record::About;
use crate::request::chat::{ChatRequest, parse};
use crate::request::options::Options;
use crate::request::{body, prompt};
use crate::request_id::{self, fresh};
use crate::response::chat::{Calls, ChatShape};
use crate::response::usage::Usage;
use crate::room::{Extent, Reservation};
use crate::state::{AppState, Loaded};
use crate::tools::reader::Reader;
use crate::tools::request::Tools;
use crate::tools::{Forced, Syntax};
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use hearth_engine::api::Request;
use std::sync::Arc;
use std::time::Instant;

pub(crate) async fn chat(
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
    let n = request.options.n;
    let shape = ChatShape {
        id: fresh("chatcmpl-"),
        created: now(),
        model: target.name,
        service: service.clone(),
        logprobs: request.logprobs.is_some(),
        token_ids: request.options.return_token_ids,
        begun: vec![false; sequences.len()],
        calls: calls(&service, &request, sequences.len()),
    };
    let about = About {
        request_id: request_id::of(&headers),
        response_id: shape.id.clone(),
        api: "chat",
        model: shape.model.clone(),
        stream: request.options.stream.is_some(),
        trace_parent: request_id::header(&headers, "traceparent"),
    };
    answer(
        &state,
        &service,
        Job { about, sequences, room, usage, arrived, per_prompt: n, keep: n },
        shape,
        request.options.stream,
    )
    .await
}

/// A request with its sequences, and the room that the answer may need.
struct Prepared {
    request: ChatRequest,
    sequences: Vec<Sequence>,
    room: Reservation,
    usage: Usage,
}

/// The prompt is copied for its choices once there is room for all of them.
fn prepare(state: &AppState, service: &Loaded, body: &[u8]) -> Result<Prepared, ApiError> {
    let mut request = parse(body, service.engine.vocab_size())?;
    request.options.settle(service, request.max_tokens)?;
    let prompt = request.conversation.ids(service)?;
    // Without a limit the model may use all the context there is.
    let limit = service.engine.context_limit();
    let max_tokens = prompt::budget(prompt.len(), request.max_tokens, limit, limit)?;
    let tools = &request.conversation.tools;
    let syntax = service.tool_syntax().filter(|_| tools.on());
    force_calls(service, tools, syntax, &mut request.options)?;
    let shows_marks =
        syntax.is_some_and(|s| s.has_special_marks(service.tokenizer.as_ref().expect("it rendered")));
    let options = &request.options;
    // One answer has one prompt.
    let prompt_logprobs = |index: usize| options.prompt_logprobs.filter(|_| index == 0);
    let extents = (0..options.n).map(|index| Extent {
        prompt_tokens: prompt.len(),
        max_tokens,
        logprobs: request.logprobs,
        prompt_logprobs: prompt_logprobs(index),
        copied: options.copied(),
    });
    let room = state.room().for_answer(extents, service.engine.retry_after_s())?;
    let sequences = (0..options.n).map(|index| Sequence {
        request: Request {
            prompt: prompt.clone(),
            max_tokens,
            stop_tokens: options.stop_tokens(&service.eos_tokens),
            sampling: options.sampling_of(index),
            logprobs: request.logprobs,
            prompt_logprobs: prompt_logprobs(index),
            adapter: None,
        },
        prompt_logprobs: prompt_logprobs(index),
        echo: false,
        prompt_text: None,
        stops: options.stop.clone(),
        include_stop: options.include_stop,
        standing: options.standing.clone(),
        format: options.format.as_ref().map(|(format, _)| format.clone()),
        reported_stop_tokens: Vec::new(),
        skip_special: options.skip_special_tokens && !shows_marks,
    });
    let sequences = sequences.collect();
    let usage = Usage::new(&[prompt.len()], options.n);
    Ok(Prepared { request, sequences, room, usage })
}

/// Constrains the output to calls where the client demands them.
fn force_calls(
    service: &Loaded,
    tools: &Tools,
    syntax: Option<&'static Syntax>,
    options: &mut Options,
) -> Result<(), ApiError> {
    if !tools.on() || !tools.forced() {
        return Ok(());
    }
    if let Some((_, field)) = &options.format {
        let message =
            format!("\"tool_choice\" demands a call and {field:?} another format; give one of them");
        return Err(ApiError::field("tool_choice", message));
    }
    let Some(syntax) = syntax else {
        let message = "a call cannot be forced: how this model writes calls is not known";
        return Err(ApiError::field("tool_choice", message));
    };
    let tokenizer = service.text_tokenizer()?;
    let forced = Forced { tools: tools.callable(), parallel: tools.parallel, tokenizer };
    let format = Format::Lark((syntax.forced)(&forced));
    options.sampling.grammar = Some(service.grammars()?.compile(&format, "tools")?);
    options.format = Some((Arc::new(format), "tools".into()));
    Ok(())
}

/// A reader per choice, if the answer may hold calls and it is known how they would look.
fn calls(service: &Loaded, request: &ChatRequest, choices: usize) -> Vec<Calls> {
    let tools = &request.conversation.tools;
    let Some(syntax) = service.tool_syntax().filter(|_| tools.on()) else { return Vec::new() };
    let most = if tools.parallel { usize::MAX } else { 1 };
    (0..choices).map(|_| Calls::new(Reader::new(syntax), syntax.id, most)).collect()
}
