//! Which tokens of which sequences the next forward pass holds. Knows no tensors and no time.
//!
//! # Layout
//! - here: the policy.
//! - `running`: a sequence in the batch, its blocks and what the prefix cache has of it.
//!
//! # Policy
//! - **Admission** is first come, first served, and reserves the most KV blocks a sequence can ever need
//!   (prompt and `max_tokens`), less those the prefix cache has. So an admitted sequence never waits for memory.
//! - **A step** holds at most `max_batch_tokens` tokens: one for each sequence that is generating, then prompts
//!   in order of admission, split where the budget ends (Dynamic SplitFuse).
//! - **Prefix cache**: a prompt skips the full blocks another sequence computed before, and looks again at each
//!   block's start. If a sequence admitted earlier computes in this very step the block it needs next, it waits for
//!   that instead of computing the same: so samples of one prompt compute it once.
//!
//! # Why nothing can get stuck
//! 1. A request is only taken if it fits an empty cache ([`Scheduler::largest_request`]), so with nothing running
//!    the first in the queue is admitted.
//! 2. Every running sequence that generates moves in every step, as `max_batch_tokens ≥ max_seqs`; if one is still
//!    in its prompt, at most `max_seqs − 1` generate, so at least one token of the oldest prompt is computed too. It
//!    waits for no other's block: one waits only for sequences admitted earlier that move in this step.
//! 3. Hence every running sequence ends after finitely many steps, gives back its blocks, and the queue moves on
//!    in order: no request is overtaken.

mod running;

use crate::kv::{BlockPool, BlockTable};
use running::Running;
use std::collections::VecDeque;
use std::ops::Range;

/// Names a request within one engine; never reused.
pub type RequestId = u64;

/// Bounds of the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences in the batch at once.
    pub max_seqs: usize,
    /// Tokens in one forward pass; at least `max_seqs`.
    pub max_batch_tokens: usize,
    /// Requests that may wait for admission.
    pub max_waiting: usize,
}

/// The waiting queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFull {
    /// Requests in it.
    pub waiting: usize,
}

/// A sequence's share of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Whose.
    pub id: RequestId,
    /// Positions of the tokens to compute.
    pub positions: Range<usize>,
    /// The sequence's KV blocks.
    pub table: BlockTable,
    /// Prompt tokens of it that were found in the prefix cache.
    pub cached: usize,
}

/// A request as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its name.
    pub id: RequestId,
    /// Prompt, at least one token.
    pub tokens: Vec<u32>,
    /// Most tokens it generates.
    pub max_tokens: usize,
    /// Sequences share computed tokens only with those of the same root.
    pub root: u64,
    /// Whether it may skip computed tokens. `false` for one that wants logits of its prompt.
    pub reuse: bool,
}

/// The queue, the running sequences and their KV blocks.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    block_tokens: usize,
    pool: BlockPool,
    waiting: VecDeque<Arrival>,
    /// In order of admission.
    running: Vec<Running>,
}

impl Scheduler {
    /// An idle scheduler over `blocks` KV blocks of `block_tokens` tokens each.
    ///
    /// # Panics
    /// When a limit makes progress impossible: `max_seqs` or `block_tokens` is 0, or
    /// `max_batch_tokens < max_seqs`.
    pub fn new(limits: Limits, blocks: usize, block_tokens: usize) -> Self {
        assert!(limits.max_seqs > 0 && block_tokens > 0, "nothing could ever run");
        assert!(limits.max_batch_tokens >= limits.max_seqs, "a full batch would not fit a step");
        let (waiting, running) = (VecDeque::new(), Vec::new());
        Self { limits, block_tokens, pool: BlockPool::new(blocks), waiting, running }
    }

    /// The bounds it keeps.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Most positions a request may take: all blocks at once.
    pub fn largest_request(&self) -> usize {
        self.pool.total() * self.block_tokens
    }

    /// Puts a request in the queue, and runs it at once if there is room. Prompt and `max_tokens` together are
    /// at most [`Scheduler::largest_request`].
    ///
    /// # Errors
    /// [`QueueFull`] when it would have to wait and too many do.
    pub fn enqueue(&mut self, arrival: Arrival) -> Result<(), QueueFull> {
        let (id, prompt) = (arrival.id, arrival.tokens.len());
        assert!(
            prompt > 0 && prompt + arrival.max_tokens <= self.largest_request(),
            "request {id} can never run"
        );
        self.waiting.push_back(arrival);
        self.admit();
        let waiting = self.waiting.len();
        if waiting > self.limits.max_waiting {
            self.waiting.pop_back();
            return Err(QueueFull { waiting: waiting - 1 });
        }
        Ok(())
    }

    /// The next step's tokens: generating sequences first, then prompts, each in order of admission. They count as
    /// computed from now on. Empty when nothing runs.
    pub fn plan(&mut self) -> Vec<Part> {
        for sequence in &mut self.running {
            sequence.adopt(&mut self.pool, self.block_tokens);
        }
        let (decoding, prefilling): (Vec<usize>, Vec<usize>) =
            (0..self.running.len()).partition(|&i| self.running[i].generates());
        let mut left = self.limits.max_batch_tokens;
        let (mut parts, mut moving) = (Vec::new(), Vec::new());
        for i in decoding.into_iter().chain(prefilling) {
            let count = left.min(self.running[i].left());
            if count > 0 && !self.waits_for_one_of(i, &moving) {
                left -= count;
                moving.push(i);
                parts.push(self.running[i].take(count));
            }
        }
        parts
    }

    /// Whether the block a sequence needs next is being computed in this step for one admitted before it.
    fn waits_for_one_of(&self, i: usize, moving: &[usize]) -> bool {
        let sequence = &self.running[i];
        let fills = |&j: &usize| j < i && self.running[j].fills_next_block_of(sequence, self.block_tokens);
        moving.iter().any(fills)
    }

    /// The step with a sequence's part has run: others may use what it computed.
    pub fn stored(&mut self, id: RequestId) {
        let sequence = self.running.iter_mut().find(|s| s.id == id).expect("only running sequences compute");
        sequence.register(&mut self.pool, self.block_tokens);
    }

    /// A running sequence whose known tokens are all computed got one more.
    pub fn append(&mut self, id: RequestId, token: u32) {
        let sequence = self.running.iter_mut().find(|s| s.id == id).expect("only running sequences grow");
        assert!(sequence.left() == 0 && sequence.tokens.len() < sequence.most, "request {id} outgrew");
        sequence.tokens.push(token);
    }

    /// Takes a request out, finished or not: its blocks are free at once and go to whoever waits longest.
    /// Unknown ids are ignored.
    pub fn remove(&mut self, id: RequestId) {
        self.waiting.retain(|w| w.id != id);
        if let Some(i) = self.running.iter().position(|s| s.id == id) {
            self.pool.release(&self.running.remove(i).table);
        }
        self.admit();
    }

    /// Requests in the batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests waiting for admission.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The KV blocks.
    pub fn blocks(&self) -> &BlockPool {
        &self.pool
    }

    fn admit(&mut self) {
        while self.running.len() < self.limits.max_seqs {
            let Some(next) = self.waiting.front() else { return };
            let count = worst_case(next.tokens.len(), next.max_tokens).div_ceil(self.block_tokens);
            let mut sequence = Running::new(next.clone(), &mut self.pool, self.block_tokens);
            let Some(own) = self.pool.allocate(count - sequence.table.len()) else {
                self.pool.release(&sequence.table);
                return;
            };
            sequence.table = sequence.table.iter().copied().chain(own).collect();
            self.waiting.pop_front();
            self.running.push(sequence);
        }
    }
}

/// Most positions whose keys and values are ever stored: the last token generated is never fed back.
fn worst_case(prompt: usize, max_tokens: usize) -> usize {
    prompt + max_tokens.saturating_sub(1)
}

#[cfg(test)]
mod tests;
