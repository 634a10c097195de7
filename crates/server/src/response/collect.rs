//! Waits for all sequences of a request.

use super::usage::Usage;
use crate::error::ApiError;
use crate::generation::{Echo, Finish, ScoredToken, Update, Updates};
use hearth_engine::api::TokenLogprobs;

/// One finished sequence.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Log-probabilities of the prompt.
    pub(crate) scored: Option<Vec<Option<TokenLogprobs>>>,
    pub(crate) echo: Option<Echo>,
    pub(crate) text: String,
    pub(crate) tokens: Vec<ScoredToken>,
    pub(crate) finish: Option<Finish>,
}

/// All sequences, in order. The first failure ends (and so cancels) the others.
///
/// # Errors
/// What the failing sequence reported.
pub(crate) async fn collect(
    mut updates: Updates,
    usage: &mut Usage,
    sequences: usize,
) -> Result<Vec<Outcome>, ApiError> {
    let mut outcomes: Vec<Outcome> = (0..sequences).map(|_| Outcome::default()).collect();
    while let Some((index, update)) = updates.recv().await {
        match update {
            Update::Scored(rows) => outcomes[index].scored = Some(rows),
            Update::Echo(echo) => outcomes[index].echo = Some(echo),
            Update::Piece(piece) => {
                usage.note(index, &piece);
                let outcome = &mut outcomes[index];
                outcome.text.push_str(&piece.text);
                outcome.tokens.extend(piece.tokens);
                outcome.finish = piece.finish;
            }
            Update::Failed(error) => return Err(error),
        }
    }
    match outcomes.iter().all(|outcome| outcome.finish.is_some()) {
        true => Ok(outcomes),
        false => Err(ApiError::internal("a sequence ended without a result")),
    }
}

/// Of each `per_prompt` outcomes the `keep` with the highest log-probability per token, best first.
pub(crate) fn best(outcomes: Vec<Outcome>, per_prompt: usize, keep: usize) -> Vec<Outcome> {
    let mut kept = Vec::new();
    let mut outcomes = outcomes.into_iter().peekable();
    while outcomes.peek().is_some() {
        let mut group: Vec<Outcome> = outcomes.by_ref().take(per_prompt).collect();
        // Stable: among equals the first stays first.
        group.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
        kept.extend(group.into_iter().take(keep));
    }
    kept
}

impl Outcome {
    /// Nothing at all is worse than anything.
    fn mean_logprob(&self) -> f64 {
        let logprobs =
            self.tokens.iter().filter_map(|token| Some(f64::from(token.logprobs.as_ref()?.logprob)));
        let (count, sum) = logprobs.fold((0, 0.0), |(count, sum), logprob| (count + 1, sum + logprob));
        if count == 0 { f64::NEG_INFINITY } else { sum / f64::from(count) }
    }
}
