//! What the blocks of device and host hold, for tests: a position's cell stands for the tokens up to it.

use super::{Part, Running, Scheduler};
use crate::kv::Move;
use std::ops::Range;

/// The tokens that a cell's keys and values were computed from; nothing where they come from a wrong guess.
type Cell = Option<Box<[u32]>>;

/// The memory that a scheduler's plans are carried out in.
#[derive(Clone, Debug)]
pub struct Cells {
    block_tokens: usize,
    device: Vec<Cell>,
    host: Vec<Cell>,
}

impl Cells {
    pub fn new(scheduler: &Scheduler) -> Self {
        let cells = |blocks: usize| vec![None; blocks * scheduler.block_tokens];
        let (device, host) = (cells(scheduler.pool.total()), cells(scheduler.pool.host().0));
        Self { block_tokens: scheduler.block_tokens, device, host }
    }

    fn of(&self, block: u32) -> Range<usize> {
        block as usize * self.block_tokens..(block as usize + 1) * self.block_tokens
    }

    /// Makes the copies a scheduler asks for.
    pub fn make(&mut self, moves: &[Move]) {
        for one in moves {
            match *one {
                Move::Out { block, slot } => {
                    let (to, from) = (self.of(slot), self.of(block));
                    self.host[to].clone_from_slice(&self.device[from]);
                }
                Move::Back { slot, block } => {
                    let (to, from) = (self.of(block), self.of(slot));
                    self.device[to].clone_from_slice(&self.host[from]);
                }
                Move::Swap { block, slot } => {
                    let (a, b) = (self.of(block), self.of(slot));
                    self.device[a].swap_with_slice(&mut self.host[b]);
                }
            }
        }
    }

    /// Carries out a part of a step: all before it must have been computed, from this sequence's own tokens.
    pub fn compute(&mut self, part: &Part, sequence: &Running) {
        let at =
            |p: usize| part.table[p / self.block_tokens] as usize * self.block_tokens + p % self.block_tokens;
        let tokens = &sequence.tokens;
        for p in 0..part.positions.start {
            assert_eq!(self.device[at(p)].as_deref(), Some(&tokens[..=p]), "position {p} of {}", part.id);
        }
        for p in part.positions.start..part.positions.end + part.proposed {
            self.device[at(p)] = (p < part.positions.end).then(|| tokens[..=p].into());
        }
    }

    /// The guesses that were right were computed, too; `sequence` has them now.
    pub fn accept(&mut self, part: &Part, sequence: &Running, right: usize) {
        for p in part.positions.end..part.positions.end + right {
            let cell = part.table[p / self.block_tokens] as usize * self.block_tokens + p % self.block_tokens;
            self.device[cell] = Some(sequence.tokens[..=p].into());
        }
    }

    /// Whether every block and slot that is known for some tokens holds them, once what is asked for is copied.
    pub fn check(&self, scheduler: &Scheduler) {
        let mut after = self.clone();
        after.make(&scheduler.pool.clone().take_moves());
        for (known, cells) in scheduler.pool.contents().iter().zip([&after.device, &after.host]) {
            for (known, cells) in known.iter().zip(cells.chunks(self.block_tokens)) {
                let Some(tokens) = known else { continue };
                let held: Vec<Option<u32>> =
                    cells.iter().map(|cell| cell.as_ref().and_then(|c| c.last().copied())).collect();
                let expected: Vec<Option<u32>> = tokens.iter().copied().map(Some).collect();
                assert_eq!(held, expected, "a block holds what it is known for");
            }
        }
    }
}
