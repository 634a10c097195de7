//! Log-probabilities under the raw distribution: temperature 1, no filters, no penalties.

use super::{SampleError, best, descending};
use crate::api::TokenLogprobs;

/// The log-softmax of one row of logits, evaluated where asked.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax<'a> {
    logits: &'a [f32],
    best: u32,
    /// `ln Σ exp(logit)`.
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// `logits`: `[vocab]`.
    ///
    /// # Errors
    /// [`SampleError`] when they are not a distribution.
    pub fn new(logits: &'a [f32]) -> Result<Self, SampleError> {
        let best = best(logits)?;
        let max = f64::from(logits[best as usize]);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        Ok(Self { logits, best, log_sum: max + sum.ln() })
    }

    /// Natural-log probability of a token of the vocabulary, in full precision.
    pub fn of(&self, token: u32) -> f64 {
        f64::from(self.logits[token as usize]) - self.log_sum
    }

    /// The `count` most likely tokens, best first, the lower id among equals.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        let count = count.min(self.logits.len());
        let rank = |a: &u32, b: &u32| {
            let logit = |token: &u32| self.logits[*token as usize];
            descending(logit(a), logit(b)).then(a.cmp(b))
        };
        let mut tokens: Vec<u32> = match count {
            0 => Vec::new(),
            1 => vec![self.best],
            _ => (0..self.logits.len() as u32).collect(),
        };
        if count < tokens.len() {
            tokens.select_nth_unstable_by(count, rank);
            tokens.truncate(count);
        }
        tokens.sort_unstable_by(rank);
        tokens.into_iter().map(|token| (token, self.of(token) as f32)).collect()
    }

    /// A token's report with `count` alternatives. Both figures come from the same expression, so a token among
    /// the alternatives has the same float in both places: harnesses compare them for equality.
    pub fn report(&self, token: u32, count: usize) -> TokenLogprobs {
        let (logprob, rank) = (self.of(token) as f32, self.rank(token));
        TokenLogprobs { token, logprob, rank, top: self.top(count) }
    }

    /// A token's place in [`top`](Self::top) of all tokens, counted from 1.
    fn rank(&self, token: u32) -> usize {
        let (own, before) = (self.logits[token as usize], token as usize);
        let better = |(id, x): (usize, &f32)| *x > own || (*x == own && id < before);
        1 + self.logits.iter().enumerate().filter(|row| better(*row)).count()
    }
}
