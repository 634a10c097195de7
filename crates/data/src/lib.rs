//! From files of text to batches of token ids with labels.
//!
//! # Layout
//! - `tokenizer`: [`tokenizer.json` or GGUF vocabulary] → ids and back, streaming decode.
//! - `template`: the model's own Jinja chat template.
//! - `format`: dataset formats, one file each, one registry: rows → messages, text or tokens.
//! - `example`: rows → [`Example`]s: ids with labels, `−100` where a token is not trained.
//! - `pack`: examples → [`Sequence`]s of bounded length, per-document attention and positions.
//! - `loader`: deterministic shuffled order, a cursor that resumes exactly → [`Batch`]es.
#![forbid(unsafe_code)]

/// Label of a token that is not trained.
pub const IGNORE: i32 = -100;

/// One tokenized training example.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One label beside each token (not shifted): the token's own id, or [`IGNORE`].
    pub labels: Vec<i32>,
}

/// One row of a micro-batch: one example, or several packed documents. Never padded.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Token ids of all documents, one after another.
    pub ids: Vec<u32>,
    /// Labels beside the tokens. The first label of each document is [`IGNORE`]: nothing predicts it.
    pub labels: Vec<i32>,
    /// Length of each document; sums to `ids.len()`. Attention and positions restart at each.
    pub documents: Vec<usize>,
}

/// One micro-batch: `global micro-batch index` within its step and its sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The rows.
    pub sequences: Vec<Sequence>,
}
