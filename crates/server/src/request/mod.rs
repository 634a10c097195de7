//! From a body's bytes to checked values.
//!
//! - [`fields`]: reads fields of a JSON object one by one, each with its type and range.
//! - [`options`]: what completions and chat have in common: sampling, stops, streaming.
//! - [`completions`], [`chat`], [`embeddings`], [`tokenize`]: one file per API.
//! - [`prompt`]: text, lists and token ids → prompts the engine takes.

pub(crate) mod body;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod fields;
pub(crate) mod options;
pub(crate) mod prompt;
pub(crate) mod tokenize;
