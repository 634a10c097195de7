//! From files of text to batches of token ids with labels.
//!
//! # Layout
//! - [`tokenizer`]: `tokenizer.json` or GGUF vocabulary → ids and back, streaming decode.
//! - [`template`]: the model's own Jinja chat template; [`message`]: what it renders.
//! - [`mod@format`]: dataset formats, one file each, one registry: rows → messages, text or tokens;
//!   [`source`]: files, folders and patterns → rows.
//! - [`example`]: rows → [`Example`]s: ids with labels, `−100` where a token is not trained.
//! - [`pack`]: examples → [`Sequence`]s of bounded length, per-document attention and positions.
//! - [`loader`]: deterministic shuffled order, a cursor that resumes exactly → [`Batch`]es.
//! - [`dataset`]: all of the above from one config; [`inspect`]: what it looks like to the trainer.
//!
//! # Invariants
//! - The same files, config and seed give the same sequences in the same order on every machine.
//! - A token is trained if and only if its label is not [`IGNORE`]; the first label of a document always is.
//! - Nothing is ever padded.
#![forbid(unsafe_code)]

pub mod dataset;
pub mod error;
pub mod example;
pub mod format;
pub mod inspect;
pub mod loader;
pub mod message;
pub mod pack;
mod rng;
pub mod source;
pub mod template;
pub mod tokenizer;
mod turns;

pub use dataset::{DataFile, Dataset, DatasetConfig, Split};
pub use error::Error;
pub use example::TrainOn;
pub use loader::{Cursor, Loader};
pub use message::{Content, Message};
pub use template::ChatTemplate;
pub use tokenizer::{GgufVocab, StreamDecoder, Tokenizer};

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
