//! What callers exchange with the engine.

pub use crate::adapter::Adapter;
pub use crate::engine::EngineHandle;
pub use crate::sampler::constraint::{Constraint, ConstraintSource, Grammar};

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How the next token is chosen. Filters apply in the order: penalties, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// `0` = greedy.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; `1` = off.
    pub top_p: f32,
    /// Most likely tokens kept; `0` = off.
    pub top_k: usize,
    /// Tokens below this fraction of the most likely one's probability are dropped; `0` = off.
    pub min_p: f32,
    /// HF/CTRL multiplicative penalty on tokens of prompt and output; `1` = off.
    pub repetition_penalty: f32,
    /// OpenAI additive penalty on tokens already generated; `0` = off.
    pub presence_penalty: f32,
    /// OpenAI additive penalty per occurrence; `0` = off.
    pub frequency_penalty: f32,
    /// Added to a token's logit.
    pub logit_bias: Vec<(u32, f32)>,
    /// Equal seeds give equal tokens, whoever shares the batch. `None` = a fresh one per request.
    pub seed: Option<u64>,
    /// Tokens to generate before a stop token may come.
    pub min_tokens: usize,
    /// What the output must conform to.
    pub grammar: Option<Grammar>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            min_tokens: 0,
            grammar: None,
        }
    }
}

/// One sequence to be generated.
#[derive(Clone, Debug)]
pub struct Request {
    /// Prompt token ids, at least one, each below the vocabulary size.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; `0` only scores the prompt.
    pub max_tokens: usize,
    /// Tokens that end the generation (they are not emitted). Empty = run to `max_tokens`.
    pub stop_tokens: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Report the log-probability of each generated token and of this many alternatives.
    pub logprobs: Option<usize>,
    /// The same for each prompt token but the first.
    pub prompt_logprobs: Option<usize>,
    /// Laid over the model for this sequence alone.
    pub adapter: Option<Arc<Adapter>>,
}

/// How the vectors of a prompt's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last one: under causal attention the only one that has seen all others.
    Last,
}

/// Whose request it is, and how it stands in the queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Who asks (an API key, a user); each gets its turn. All without a name are one.
    pub client: Option<Arc<str>>,
    /// A higher one is admitted first.
    pub priority: i32,
    /// Longest wait for admission, looked at between steps. `None` = as long as it takes.
    pub max_queue_time: Option<Duration>,
}

/// Log-probability of a token and of the most likely tokens at its position. When the token itself is among
/// `top`, both figures are the same float.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token at this position.
    pub token: u32,
    /// Its natural-log probability under the raw (temperature 1, unfiltered) distribution.
    pub logprob: f32,
    /// Its place among all tokens by likelihood, from 1; among equals the lower id comes first.
    pub rank: usize,
    /// Most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// `max_tokens` or the context limit.
    Length,
}

/// What a generation sends, in order: `Prompt?`, `Token*`, then `Finished` or `Failed`; what an embedding sends:
/// `Embedding`, then `Finished`, or `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Prompt log-probabilities, one per prompt token, the first `None`. Only if asked for; before any token.
    Prompt(Vec<Option<TokenLogprobs>>),
    /// A generated token.
    Token {
        /// Its id.
        id: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// A prompt's vector, `[d_model]`, not normalised. Only of [`EngineHandle::embed`].
    Embedding(Vec<f32>),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens that were not computed again thanks to a prefix cache.
        cached_tokens: usize,
    },
    /// The end of a request that was not admitted within [`Standing::max_queue_time`].
    Overdue {
        /// The limit.
        limit: Duration,
    },
    /// The engine could not go on with this request; the sentence says why.
    Failed(String),
}

/// Why a request was not taken. All but `Stopped` and `Busy` are the caller's to correct.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// No tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// An id outside the vocabulary.
    #[error("token id {id} at position {position} is not below the vocabulary size {vocab}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Where it stands.
        position: usize,
        /// The limit.
        vocab: usize,
    },
    /// Prompt and `max_tokens` can never fit.
    #[error(
        "prompt ({prompt} tokens) plus max_tokens ({max_tokens}) exceed the context limit of {limit} tokens"
    )]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens that fit.
        limit: usize,
    },
    /// A sampling parameter that means nothing.
    #[error("{what}")]
    Sampling {
        /// Parameter, value and limit.
        what: String,
    },
    /// An adapter the engine was not started for.
    #[error("the adapter's rank is {rank}, this engine takes at most {limit}")]
    AdapterRank {
        /// Its rank.
        rank: usize,
        /// The limit; 0 when adapters were not asked for at all.
        limit: usize,
    },
    /// The waiting queue is full; try again later.
    #[error("{waiting} requests are waiting already (limit {limit})")]
    Busy {
        /// Requests in the queue.
        waiting: usize,
        /// Its limit.
        limit: usize,
        /// Seconds until half of them will probably have begun, at least 1.
        retry_after_s: u32,
    },
    /// The engine is draining or gone.
    #[error("the engine is shutting down")]
    Stopped,
}

/// Counters for `/metrics`, a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences in the batch now.
    pub running: usize,
    /// Requests waiting for admission.
    pub waiting: usize,
    /// KV blocks in use.
    pub kv_blocks_used: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// KV blocks nobody uses that are kept for whoever comes with the same tokens in front.
    pub kv_blocks_idle: usize,
    /// KV blocks in all that host memory can keep for the device.
    pub kv_host_blocks_total: usize,
    /// Of these, blocks that hold something.
    pub kv_host_blocks_held: usize,
    /// KV blocks moved from the device to the host since start.
    pub kv_blocks_moved_out: u64,
    /// KV blocks brought back from there since start.
    pub kv_blocks_brought_back: u64,
    /// Prompt tokens computed since start.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the prefix cache since start, of requests that ended.
    pub cached_tokens: u64,
    /// Tokens generated since start.
    pub generated_tokens: u64,
    /// Requests finished since start (stop or length).
    pub finished: u64,
    /// Requests that waited longer than they wanted to, since start.
    pub overdue: u64,
    /// Sequences that had to give up their KV blocks and compute them again, since start.
    pub preemptions: u64,
    /// Requests cancelled by their caller since start.
    pub cancelled: u64,
    /// Forward passes since start.
    pub steps: u64,
    /// Times that tokens were guessed in advance, since start.
    pub drafts: u64,
    /// Tokens guessed.
    pub draft_tokens: u64,
    /// Of these, tokens that were right.
    pub accepted_tokens: u64,
    /// Bytes of weights resident.
    pub weight_bytes: u64,
    /// Bytes of the KV cache on the device.
    pub kv_bytes: u64,
    /// Bytes of the KV cache on the host.
    pub kv_host_bytes: u64,
    /// What was streamed since start; nothing when all weights are resident.
    pub streamed: crate::streaming::Streamed,
}

/// A running generation. Dropping it cancels the request: its blocks are free by the next step.
pub struct Generation {
    pub(crate) events: tokio::sync::mpsc::UnboundedReceiver<Event>,
    pub(crate) cancel: Arc<std::sync::atomic::AtomicBool>,
    pub(crate) started: Arc<OnceLock<Instant>>,
}

impl Generation {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// When its first token was put into a forward pass; `None` while it waits.
    pub fn started(&self) -> Option<Instant> {
        self.started.get().copied()
    }

    /// The same as [`Generation::next`] for callers without an async runtime.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancel.store(true, std::sync::atomic::Ordering::Release);
    }
}
