//! The shapes clients rely on.
//!
//! - [`completions`], [`chat`]: one file per API, whole answers and chunks.
//! - [`calls`]: tool calls.
//! - [`logprobs`]: the two ways OpenAI writes log-probabilities.
//! - [`usage`]: token counts.
//! - [`collect`]: waits for all sequences of a request; [`sse`]: streams them.

mod calls;
pub(crate) mod chat;
pub(crate) mod collect;
pub(crate) mod completions;
pub(crate) mod logprobs;
pub(crate) mod sse;
pub(crate) mod usage;

use crate::generation::{Echo, Piece};
use crate::response::usage::Usage;
use serde_json::Value;

/// Named in every answer, so that a change of build can be seen.
pub(crate) const FINGERPRINT: &str = concat!("hearth-", env!("CARGO_PKG_VERSION"));

/// An API's way to write what sequences produce.
pub(crate) trait Shape: Sized + Send + 'static {
    /// The chunk for a prompt given back.
    fn echo_chunk(&mut self, index: usize, echo: &Echo) -> Value;

    /// The chunk for a piece; `None` when there is nothing to tell.
    fn piece_chunk(&mut self, index: usize, piece: &Piece) -> Option<Value>;

    /// The chunk without choices that ends a stream.
    fn usage_chunk(&self, usage: &Usage) -> Value;

    /// The whole answer.
    fn answer(self, sequences: Vec<collect::Outcome>, usage: &Usage) -> Value;
}
