//! From files of text to batches of token ids with labels.
//!
//! # Layout
//! - [`tokenizer`]: `tokenizer.json` or GGUF vocabulary → ids and back, streaming decode.
//! - [`template`]: the model's own Jinja chat template; [`message`]: what it renders.
//! - [`mod@format`]: dataset formats, one file each, one registry: rows → messages, text or tokens;
//!   [`source`]: files, folders and patterns → rows.
//! - [`example`]: rows → [`Example`]s: ids with labels, `−100` where a token is not trained; a preference gives two.
//! - [`pack`]: examples → [`Sequence`]s of bounded length, per-document attention and positions.
//! - [`loader`]: deterministic shuffled order, a cursor that resumes exactly → [`Batch`]es.
//! - [`dataset`]: all of the above from one config; [`inspect`]: what it looks like to the trainer.
//!
//! # Invariants
//! - The same files, config and seed give the same sequences in the same order on every machine.
//! - A token is trained if and only if its label is not [`IGNORE`]; the first label of a document always is.
//! - Nothing is ever padded.
//! - The two halves of a preference pair are neighbours, chosen first, and count as one example everywhere.
#![forbid(unsafe_code)]

pub mod dataset;
pub mod error;
pub mod example;
pub mod format;
pub mod inspect;
pub mod loader;
pub mod message;
pub mod pack;
mod pair;
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One label beside each token (not shifted): the token's own id, or [`IGNORE`].
    pub labels: Vec<i32>,
    /// Which half of a preference pair this is; `None` if it is none.
    pub half: Option<Half>,
}

/// A half of a preference pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The prompt with the better reply.
    Chosen,
    /// The prompt with the worse reply.
    Rejected,
}

/// One row of a micro-batch: one example, several packed documents, or half of a preference pair. Never padded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    /// Token ids of all documents, one after another.
    pub ids: Vec<u32>,
    /// Labels beside the tokens. The first label of each document is [`IGNORE`]: nothing predicts it.
    pub labels: Vec<i32>,
    /// Length of each document; sums to `ids.len()`. Attention and positions restart at each.
    pub documents: Vec<usize>,
    /// Place among the training (or the validation) examples, before they are shuffled; the halves of a pair share
    /// it. The same files and settings give the same places, so what was computed for one can be looked up.
    pub example: u64,
    /// Which half of a preference pair this is; `None` if it is none.
    pub half: Option<Half>,
}

/// One micro-batch: `global micro-batch index` within its step and its sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The rows.
    pub sequences: Vec<Sequence>,
}
