//! A second, smaller model that guesses the tokens of the first one.
//!
//! Its keys and values lie in a cache of its own with as many blocks, under the same block tables. So whatever happens to a
//! sequence's blocks (shared through the prefix cache, given up, taken by another, moved to the host) happens to both.
//! Guesses are drawn by the sequence's own sampler with the position's own random number: where the models agree about the
//! distribution they agree about the token, at any temperature.
//!
//! It computes nothing for a sequence that no guess is worth in: of each block it knows how many tokens it has computed
//! ([`Filled`]), and before it guesses again it computes what is missing in one go, be that the last guess of the step before,
//! the tokens of a pause, or a prompt that another sequence brought into the prefix cache.

use crate::error::Error;
use crate::kv::Move;
use crate::runner::{EachRow, Forward, SequenceStep};
use crate::scheduler::{Part, RequestId};
use crate::sequence::Sequence;
use std::collections::HashMap;

/// The model that guesses.
pub(crate) struct Draft {
    forward: Box<dyn Forward + Send>,
    filled: Filled,
    /// Most rows of a pass.
    rows: usize,
}

/// The cache of a model that guesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DraftCache {
    /// Its blocks, and those on the host.
    pub(crate) blocks: [usize; 2],
    /// Tokens in each.
    pub(crate) block_tokens: usize,
    /// Most rows of a pass.
    pub(crate) rows: usize,
}

/// A sequence that is guessed for, and the first of its positions that is not computed yet.
struct Behind<'p> {
    part: &'p Part,
    next: usize,
}

impl Draft {
    pub(crate) fn new(forward: impl Forward + Send + 'static, cache: DraftCache) -> Self {
        let DraftCache { blocks, block_tokens, rows } = cache;
        let [device, host] = blocks.map(|blocks| vec![0; blocks]);
        Self { forward: Box::new(forward), filled: Filled { block_tokens, device, host }, rows }
    }

    /// Its blocks go where those of the model go.
    pub(crate) fn move_blocks(&mut self, moves: &[Move]) {
        self.forward.move_blocks(moves);
        self.filled.move_blocks(moves);
    }

    /// Gives the sequences of a step as many guesses as it has room for.
    ///
    /// # Errors
    /// When its weights could not be had.
    pub(crate) fn guess(
        &mut self,
        parts: &[Part],
        sequences: &mut HashMap<RequestId, Sequence>,
    ) -> Result<(), Error> {
        let guessing: Vec<&Part> = parts.iter().filter(|part| part.proposed > 0).collect();
        // What the model computes in this step is not computed here yet.
        parts.iter().for_each(|part| self.filled.cut(&part.table, part.positions.start));
        self.catch_up(&guessing, sequences)?;
        let mut going_on = guessing.clone();
        loop {
            let next = |part: &&Part| sequences[&part.id].next_draft_step(part);
            let (parts, steps): (Vec<&Part>, Vec<SequenceStep>) =
                going_on.into_iter().filter_map(|part| Some((part, next(&part)?))).unzip();
            if steps.is_empty() {
                break;
            }
            let each: &mut EachRow = &mut |i, _, logits| guesser(sequences, parts[i]).push_guess(logits);
            self.forward.forward(&steps, each)?;
            going_on = parts;
        }
        for part in guessing {
            // The last guess is never computed.
            self.filled.reach(&part.table, part.positions.end + part.proposed - 1);
        }
        Ok(())
    }

    /// Computes everything before the guesses, and the first guess of each, as many rows at a time as a pass takes.
    fn catch_up(
        &mut self,
        guessing: &[&Part],
        sequences: &mut HashMap<RequestId, Sequence>,
    ) -> Result<(), Error> {
        let missing = |part: &&Part| self.filled.first_missing(&part.table, part.positions.start);
        let mut behind: Vec<Behind> =
            guessing.iter().map(|part| Behind { part, next: missing(part) }).collect();
        while !behind.is_empty() {
            let (mut room, mut steps) = (self.rows, Vec::new());
            for one in &mut behind {
                let end = one.part.positions.end.min(one.next + room);
                if end > one.next {
                    steps.push(sequences[&one.part.id].draft_step(one.part, one.next..end));
                    room -= end - one.next;
                    one.next = end;
                }
            }
            // Those that got rows are the first ones.
            let each: &mut EachRow =
                &mut |i, _, logits| guesser(sequences, behind[i].part).push_guess(logits);
            self.forward.forward(&steps, each)?;
            behind.retain(|one| one.next < one.part.positions.end);
        }
        Ok(())
    }

    /// As [`Forward::check`].
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        self.forward.check()
    }
}

fn guesser<'s>(sequences: &'s mut HashMap<RequestId, Sequence>, part: &Part) -> &'s mut Sequence {
    sequences.get_mut(&part.id).expect("only accepted sequences are planned")
}

/// How many tokens of each block, from its first, have their keys and values in the draft model's cache.
struct Filled {
    block_tokens: usize,
    device: Vec<usize>,
    host: Vec<usize>,
}

impl Filled {
    /// The first position of a sequence that was not computed, at most `end`.
    fn first_missing(&self, table: &[u32], end: usize) -> usize {
        let reached = |i: usize, block: u32| i * self.block_tokens + self.device[block as usize];
        let is_full = |&(i, block): &(usize, u32)| reached(i, block) == (i + 1) * self.block_tokens;
        let first = table.iter().copied().enumerate().find(|block| !is_full(block));
        first.map_or(end, |(i, block)| reached(i, block).min(end))
    }

    /// From this position on the sequence has other tokens than those that may have been computed.
    fn cut(&mut self, table: &[u32], from: usize) {
        for (i, &block) in table.iter().enumerate().skip(from / self.block_tokens) {
            let most = from.saturating_sub(i * self.block_tokens);
            let filled = &mut self.device[block as usize];
            *filled = most.min(*filled);
        }
    }

    /// Everything before this position was computed, and nothing else.
    fn reach(&mut self, table: &[u32], end: usize) {
        for (i, &block) in table.iter().enumerate() {
            self.device[block as usize] = end.saturating_sub(i * self.block_tokens).min(self.block_tokens);
        }
    }

    fn move_blocks(&mut self, moves: &[Move]) {
        let Self { device, host, .. } = self;
        for one in moves {
            match *one {
                Move::Out { block, slot } => host[slot as usize] = device[block as usize],
                Move::Back { slot, block } => device[block as usize] = host[slot as usize],
                Move::Swap { block, slot } => {
                    std::mem::swap(&mut device[block as usize], &mut host[slot as usize]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Filled {
        Filled { block_tokens: 4, device: vec![0; 6], host: vec![0; 2] }
    }

    #[test]
    fn what_is_missing_is_found_wherever_it_is() {
        let mut filled = filled();
        let table = [3, 1, 5];
        assert_eq!(filled.first_missing(&table, 10), 0);
        filled.reach(&table, 10);
        assert_eq!((filled.first_missing(&table, 9), filled.first_missing(&table, 12)), (9, 10));
        // Another sequence shares the first block, and has tokens of its own behind it that were not computed.
        filled.cut(&[3, 2], 4);
        assert_eq!((filled.first_missing(&[3, 2], 7), filled.first_missing(&table, 12)), (4, 10));
        // A guess was wrong.
        filled.cut(&table, 6);
        assert_eq!(filled.first_missing(&table, 12), 6);
        // A block that is taken by another is begun anew.
        filled.cut(&[1], 0);
        assert_eq!(filled.first_missing(&table, 12), 4);
    }

    #[test]
    fn what_was_computed_goes_where_its_block_goes() {
        let mut filled = filled();
        filled.reach(&[0, 1], 7);
        filled.move_blocks(&[Move::Out { block: 0, slot: 1 }, Move::Back { slot: 1, block: 4 }]);
        assert_eq!(filled.first_missing(&[4, 1], 8), 7);
        filled.move_blocks(&[Move::Swap { block: 4, slot: 0 }]);
        assert_eq!(filled.first_missing(&[4, 1], 8), 0);
    }
}
