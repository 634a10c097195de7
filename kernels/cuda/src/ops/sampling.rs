//! Logits to tokens.

use super::{Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};
use bytemuck::{Pod, Zeroable};

/// How a row's token is chosen, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Sampling {
    /// 0 = greedy.
    pub temperature: f32,
    /// 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub min_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// Of the request.
    pub seed: u64,
    /// Of the token that is chosen.
    pub position: u64,
}

impl Sampling {
    /// The most likely token.
    pub const GREEDY: Sampling =
        Sampling { temperature: 0.0, top_p: 1.0, min_p: 0.0, top_k: 0, seed: 0, position: 0 };
}

/// `tokens[row]` = the choice; −1 if a logit is NaN or +∞, its lowest token in `wrong[row]`; −2 if every one is −∞.
/// `logits`: `[rows, vocab]`.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn sample(
    stream: &Stream,
    logits: View<'_, f32>,
    samplings: View<'_, Sampling>,
    tokens: ViewMut<'_, i32>,
    wrong: ViewMut<'_, u32>,
) -> Result<(), Error> {
    let op = Op("sample");
    let rows = samplings.len();
    if rows == 0 {
        return Ok(());
    }
    let vocab = op.rows("logits", logits.len(), rows)?;
    op.takes("logits", &logits, rows * vocab)?;
    op.gives("tokens", &tokens, rows)?;
    op.gives("wrong", &wrong, rows)?;
    let arguments = arguments![logits, samplings, op.int("vocab", vocab)?, tokens, wrong];
    stream.launch("sampling.cu", "sample", op.line(rows, 256)?, arguments)
}
