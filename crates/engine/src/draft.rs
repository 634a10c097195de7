//! A second, smaller model that guesses the tokens of the first one.
//!
//! Its keys and values lie in a cache of its own with as many blocks, under the same block tables: before each step it
//! computes the tokens that the step computes, then goes on token by token as far as the step has room for guesses. So
//! whatever happens to a sequence's blocks (shared through the prefix cache, given up, taken by another) happens to both.
//! Guesses are drawn by the sequence's own sampler with the position's own random number: where the models agree about the
//! distribution they agree about the token, at any temperature.
//!
//! The last guess of a step is never computed here; if it was right, that position is made up for in the sequence's next
//! step. Should the sequence have ended meanwhile, whoever shares the block reads an older value there: a worse guess, never
//! another answer.

use crate::error::Error;
use crate::kv::Move;
use crate::runner::{EachRow, Forward, SequenceStep};
use crate::scheduler::{Part, RequestId};
use crate::sequence::Sequence;
use std::collections::HashMap;

/// The model that guesses.
pub(crate) struct Draft(Box<dyn Forward + Send>);

impl Draft {
    pub(crate) fn new(forward: impl Forward + Send + 'static) -> Self {
        Self(Box::new(forward))
    }

    /// Its blocks go where those of the model go.
    pub(crate) fn move_blocks(&mut self, moves: &[Move]) {
        self.0.move_blocks(moves);
    }

    /// Computes a step's known tokens, and gives its sequences as many guesses as it has room for.
    ///
    /// # Errors
    /// When its weights could not be had.
    pub(crate) fn guess<'p>(
        &mut self,
        parts: &'p [Part],
        sequences: &mut HashMap<RequestId, Sequence>,
    ) -> Result<(), Error> {
        let mut steps: Vec<SequenceStep> = Vec::new();
        let mut guessing: Vec<&'p Part> = Vec::new();
        for part in parts {
            let sequence = sequences.get_mut(&part.id).expect("only accepted sequences are planned");
            if let Some(step) = sequence.draft_step(part) {
                steps.push(step);
                guessing.push(part);
            }
        }
        while !steps.is_empty() {
            let each: &mut EachRow = &mut |i, _, logits| {
                sequences.get_mut(&guessing[i].id).expect("found before").push_guess(logits);
            };
            self.0.forward(&steps, each)?;
            let next = |part: &'p Part| Some((sequences[&part.id].next_draft_step(part)?, part));
            (steps, guessing) = guessing.into_iter().filter_map(next).unzip();
        }
        Ok(())
    }

    /// As [`Forward::check`].
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        self.0.check()
    }
}
