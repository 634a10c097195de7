//! What became of each sequence: for logs, traces and replays.

use crate::constrain::format::Format;
use hearth_engine::api::{Request, Sampling};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Is told of every sequence that ends, from the server's own threads: what takes long belongs elsewhere.
pub trait Observer: Send + Sync {
    /// A sequence has ended.
    fn ended(&self, record: &Record);

    /// Whether records shall hold prompts and outputs.
    fn wants_content(&self) -> bool {
        false
    }
}

/// Observers of a server.
#[derive(Clone, Default)]
pub struct Observers(Vec<Arc<dyn Observer>>);

impl Observers {
    /// Adds one.
    pub fn push(&mut self, observer: impl Observer + 'static) {
        self.0.push(Arc::new(observer));
    }

    pub(crate) fn tell(&self, record: &Record) {
        self.0.iter().for_each(|observer| observer.ended(record));
    }

    pub(crate) fn want_content(&self) -> bool {
        self.0.iter().any(|observer| observer.wants_content())
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} observers", self.0.len())
    }
}

/// The request a sequence belongs to.
#[derive(Clone, Debug)]
pub struct About {
    /// The client's `x-request-id`, or the server's.
    pub request_id: String,
    /// The `id` in the answer.
    pub response_id: String,
    /// `completions` or `chat`.
    pub api: &'static str,
    /// The model's name as asked for.
    pub model: String,
    /// Whether the answer was streamed.
    pub stream: bool,
    /// The W3C `traceparent` that came with the request.
    pub trace_parent: Option<String>,
}

/// One sequence from arrival to end.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its request.
    pub about: About,
    /// Its number in the request.
    pub sequence: usize,
    /// When the request arrived.
    pub arrived: SystemTime,
    /// From arrival to the first forward pass.
    pub queue: Duration,
    /// From there to the first token.
    pub prefill: Duration,
    /// From there to the end.
    pub decode: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Prompt tokens taken from a prefix cache.
    pub cached_tokens: usize,
    /// `stop`, `length`, `cancelled` or `failed`.
    pub end: &'static str,
    /// What failed.
    pub error: Option<String>,
    /// What it was about, where an observer wants it.
    pub content: Option<Content>,
}

/// Everything that a sequence's tokens depend on besides the weights, and the tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Token ids that were generated, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Most tokens that were allowed.
    pub max_tokens: usize,
    /// Least tokens that were demanded.
    #[serde(default)]
    pub min_tokens: usize,
    /// Tokens that end a generation.
    pub stop_tokens: Vec<u32>,
    /// The seed, also where the client gave none.
    pub seed: u64,
    /// See [`Sampling`] for this and what follows.
    pub temperature: f32,
    /// Nucleus.
    pub top_p: f32,
    /// Most likely tokens kept.
    pub top_k: usize,
    /// Least share of the most likely token's probability.
    pub min_p: f32,
    /// Multiplicative penalty.
    pub repetition_penalty: f32,
    /// Additive penalty.
    pub presence_penalty: f32,
    /// Additive penalty per occurrence.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Digest of the adapter that was laid over the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// What the output had to conform to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
}

impl Content {
    pub(crate) fn new(request: &Request, format: Option<&Format>, tokens: Vec<u32>) -> Self {
        let s = &request.sampling;
        Self {
            prompt: request.prompt.clone(),
            tokens,
            max_tokens: request.max_tokens,
            min_tokens: s.min_tokens,
            stop_tokens: request.stop_tokens.clone(),
            seed: s.seed.unwrap_or_default(),
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            logit_bias: s.logit_bias.clone(),
            adapter: request.adapter.as_ref().map(|adapter| adapter.digest().to_owned()),
            format: format.cloned(),
        }
    }

    /// The request that the engine had, without its grammar and its adapter.
    pub(crate) fn request(&self) -> Request {
        Request {
            prompt: self.prompt.clone(),
            max_tokens: self.max_tokens,
            stop_tokens: self.stop_tokens.clone(),
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                logit_bias: self.logit_bias.clone(),
                seed: Some(self.seed),
                min_tokens: self.min_tokens,
                grammar: None,
            },
            logprobs: None,
            prompt_logprobs: None,
            adapter: None,
        }
    }
}

/// A record in the making.
pub(crate) struct Recording {
    pub(crate) about: Arc<About>,
    pub(crate) sequence: usize,
    pub(crate) arrived: Instant,
    pub(crate) started: Option<Instant>,
    pub(crate) first: Option<Instant>,
    pub(crate) generated: usize,
    pub(crate) cached_tokens: usize,
    /// Tokens, where an observer wants them.
    pub(crate) tokens: Option<Vec<u32>>,
}

impl Recording {
    /// The record, at the end.
    pub(crate) fn finish(
        self,
        request: &Request,
        format: Option<&Format>,
        end: &'static str,
        error: Option<String>,
    ) -> Record {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let first = self.first.unwrap_or(now).max(started);
        Record {
            about: (*self.about).clone(),
            sequence: self.sequence,
            arrived: SystemTime::now() - now.duration_since(self.arrived),
            queue: started.duration_since(self.arrived),
            prefill: first.duration_since(started),
            decode: now.duration_since(first),
            prompt_tokens: request.prompt.len(),
            generated_tokens: self.generated,
            cached_tokens: self.cached_tokens,
            end,
            error,
            content: self.tokens.map(|tokens| Content::new(request, format, tokens)),
        }
    }
}
