//! Waits for all sequences of a request.

use super::usage::Usage;
use crate::error::ApiError;
use crate::generation::{Echo, Finish, ScoredToken, Update, Updates};

/// One finished sequence.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
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
