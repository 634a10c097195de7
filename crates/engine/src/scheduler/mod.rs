//! Which tokens of which sequences the next forward pass holds. Knows no tensors and no time.
//!
//! # Policy
//! - **Admission** is first come, first served, and reserves the most KV blocks a sequence can ever need
//!   (prompt and `max_tokens`). So an admitted sequence never waits for memory, and nothing is ever evicted.
//! - **A step** holds at most `max_batch_tokens` tokens: one for each sequence that is generating, then prompts
//!   in order of admission, split where the budget ends (Dynamic SplitFuse).
//!
//! # Why nothing can get stuck
//! 1. A request is only taken if it fits an empty cache ([`Scheduler::largest_request`]), so with nothing running
//!    the first in the queue is admitted.
//! 2. Every running sequence that generates moves in every step, as `max_batch_tokens ≥ max_seqs`; if one is still
//!    in its prompt, at most `max_seqs − 1` generate, so at least one token of the oldest prompt is computed too.
//! 3. Hence every running sequence ends after finitely many steps, gives back its blocks, and the queue moves on
//!    in order: no request is overtaken.

use crate::kv::{BlockAllocator, BlockTable};
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
}

#[derive(Debug)]
struct Waiting {
    id: RequestId,
    prompt: usize,
    max_tokens: usize,
}

#[derive(Debug)]
struct Running {
    id: RequestId,
    table: BlockTable,
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens of prompt and output so far.
    known: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Most tokens there will ever be.
    most: usize,
}

/// The queue, the running sequences and their KV blocks.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    block_tokens: usize,
    blocks: BlockAllocator,
    waiting: VecDeque<Waiting>,
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
        Self {
            limits,
            block_tokens,
            blocks: BlockAllocator::new(blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
        }
    }

    /// The bounds it keeps.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Most positions a request may take: all blocks at once.
    pub fn largest_request(&self) -> usize {
        self.blocks.total() * self.block_tokens
    }

    /// Puts a request in the queue, and runs it at once if there is room. `prompt ≥ 1`, and together they are
    /// at most [`Scheduler::largest_request`].
    ///
    /// # Errors
    /// [`QueueFull`] when it would have to wait and too many do.
    pub fn enqueue(&mut self, id: RequestId, prompt: usize, max_tokens: usize) -> Result<(), QueueFull> {
        assert!(prompt > 0 && prompt + max_tokens <= self.largest_request(), "request {id} can never run");
        self.waiting.push_back(Waiting { id, prompt, max_tokens });
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
        let mut left = self.limits.max_batch_tokens;
        let (decoding, prefilling): (Vec<_>, Vec<_>) =
            self.running.iter_mut().partition(|sequence| sequence.computed >= sequence.prompt);
        let mut parts = Vec::with_capacity(decoding.len() + prefilling.len());
        for sequence in decoding.into_iter().chain(prefilling) {
            let count = left.min(sequence.known - sequence.computed);
            if count > 0 {
                left -= count;
                parts.push(sequence.take(count));
            }
        }
        parts
    }

    /// A running sequence whose known tokens are all computed got one more.
    pub fn append(&mut self, id: RequestId) {
        let sequence = self.running.iter_mut().find(|s| s.id == id).expect("only running sequences grow");
        assert!(
            sequence.known == sequence.computed && sequence.known < sequence.most,
            "request {id} outgrew"
        );
        sequence.known += 1;
    }

    /// Takes a request out, finished or not: its blocks are free at once and go to whoever waits longest.
    /// Unknown ids are ignored.
    pub fn remove(&mut self, id: RequestId) {
        self.waiting.retain(|w| w.id != id);
        if let Some(i) = self.running.iter().position(|s| s.id == id) {
            self.blocks.release(&self.running.remove(i).table);
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
    pub fn blocks(&self) -> &BlockAllocator {
        &self.blocks
    }

    fn admit(&mut self) {
        while let Some(next) = self.waiting.front() {
            let count = worst_case(next.prompt, next.max_tokens).div_ceil(self.block_tokens);
            if self.running.len() == self.limits.max_seqs {
                return;
            }
            let Some(table) = self.blocks.allocate(count) else { return };
            let Waiting { id, prompt, max_tokens } = self.waiting.pop_front().expect("there is a front");
            self.running.push(Running {
                id,
                table,
                prompt,
                known: prompt,
                computed: 0,
                most: prompt + max_tokens,
            });
        }
    }
}

impl Running {
    fn take(&mut self, count: usize) -> Part {
        let start = self.computed;
        self.computed += count;
        Part { id: self.id, positions: start..self.computed, table: self.table.clone() }
    }
}

/// Most positions whose keys and values are ever stored: the last token generated is never fed back.
fn worst_case(prompt: usize, max_tokens: usize) -> usize {
    prompt + max_tokens.saturating_sub(1)
}

#[cfg(test)]
mod tests;
