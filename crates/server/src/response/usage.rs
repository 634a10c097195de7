//! Token counts.

use crate::generation::Piece;
use serde_json::{Value, json};

/// Counts the tokens of a request's sequences as they come.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    /// Tokens of all prompts, each counted once however many choices it has.
    prompt_tokens: usize,
    /// Tokens generated so far, by sequence.
    generated: Vec<usize>,
    cached_tokens: usize,
    /// Choices per prompt.
    n: usize,
}

impl Usage {
    /// `prompts` are the lengths of the prompts, `n` the choices for each.
    pub(crate) fn new(prompts: &[usize], n: usize) -> Self {
        Self {
            prompt_tokens: prompts.iter().sum(),
            generated: vec![0; prompts.len() * n],
            cached_tokens: 0,
            n,
        }
    }

    /// Takes note of a piece of sequence `index`.
    pub(crate) fn note(&mut self, index: usize, piece: &Piece) {
        self.generated[index] = piece.generated;
        // The prompt is counted once, so is what was cached of it.
        if let Some(finish) = piece.finish
            && index.is_multiple_of(self.n)
        {
            self.cached_tokens += finish.cached_tokens;
        }
    }

    /// `usage` as OpenAI writes it.
    pub(crate) fn json(&self) -> Value {
        let completion_tokens: usize = self.generated.iter().sum();
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}
