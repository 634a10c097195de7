//! From prompts to a stream of text updates: one task per sequence.
//!
//! - [`stops`]: finds stop strings across token boundaries.
//! - [`text`]: tokens → text, offsets, what may be shown already.
//! - [`task`]: drives one sequence: submits, decodes, measures, cancels.

mod stops;
mod task;
mod text;

pub(crate) use task::{Sequence, Updates, start};
pub(crate) use text::ScoredToken;

use crate::error::ApiError;
use hearth_engine::api::{FinishReason, TokenLogprobs};

/// What a sequence's task reports, in order: `Scored?`, `Echo?`, `Piece*`, then a piece with `finish`, or `Failed`.
#[derive(Debug)]
pub(crate) enum Update {
    /// Log-probabilities of the prompt's tokens; the first has none.
    Scored(Vec<Option<TokenLogprobs>>),
    /// The prompt.
    Echo(Echo),
    /// Newly shown text.
    Piece(Piece),
    /// The end by an error.
    Failed(ApiError),
}

/// The prompt, given back.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Echo {
    pub(crate) text: String,
    pub(crate) tokens: Vec<ScoredToken>,
}

/// Text that has become final, and the tokens it came from. Either may be empty: a token may complete no character,
/// and text may be held back because a stop string might begin there.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) tokens: Vec<ScoredToken>,
    /// Tokens generated so far, shown or not.
    pub(crate) generated: usize,
    pub(crate) finish: Option<Finish>,
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    /// Prompt tokens taken from the prefix cache.
    pub(crate) cached_tokens: usize,
}
