//! Which tokens of which sequences the next forward pass holds. Knows no tensors and no time.
//!
//! # Layout
//! - here: the policy.
//! - `queue`: who is admitted next.
//! - `running`: a sequence in the batch, its blocks and what the prefix cache has of it.
//!
//! # Policy
//! - **The queue** ([`Limits::max_overtaken`], `queue`): a higher priority first; among equals the client for whom
//!   fewest tokens were computed; within one client and priority the order of arrival. A request at the front of
//!   its line that was overtaken by `max_overtaken` younger ones is overtaken no more.
//! - **Admission** reserves the most KV blocks a sequence can ever need, if all that run and it fit with theirs.
//!   Otherwise it is admitted on trust when its known tokens fit now, with a block to spare for every sequence; so a
//!   chat without `max_tokens` does not hold the whole cache. It gets blocks as it grows.
//! - **Preemption**: when a sequence needs a block and none is left, the one admitted last gives up its blocks and
//!   goes back in front of the queue. It keeps its tokens and its place in the order; admitted again it computes them
//!   once more, less what the prefix cache still has, and goes on where it was: a token depends on those before it
//!   and on its position alone, so it generates what it would have.
//! - **A step** holds at most `max_batch_tokens` tokens: one for each sequence that is generating, then prompts
//!   in order of admission, split where the budget ends (Dynamic SplitFuse).
//! - **Guessed tokens** ([`Scheduler::propose`], `speculation`): what a step has left goes to tokens guessed to follow those
//!   of generating sequences. They lie in blocks within the most a sequence may need, taken when everyone has theirs and
//!   given back after the step, so nobody is preempted or kept waiting for a guess.
//! - **Prefix cache**: a prompt skips the full blocks another sequence computed before, and looks again at each
//!   block's start. If a sequence admitted earlier computes in this very step the block it needs next, it waits for
//!   that instead of computing the same: so samples of one prompt compute it once. What was moved to the host is brought
//!   back into a block that would have been taken to compute it, so a host tier changes nobody's admission.
//!
//! # Why nothing can get stuck
//! 1. A request is only taken if it fits an empty cache ([`Scheduler::largest_request`]), so with nothing running
//!    the next in the queue is admitted.
//! 2. The oldest running sequence (lowest ticket) is never preempted: the victim is always the youngest, and once
//!    it is alone all blocks but its own can be had, which are enough by 1.
//! 3. It moves in every step. If it generates, as `max_batch_tokens ≥ max_seqs`; if it is in its prompt, at most
//!    `max_seqs − 1` others generate, its prompt is the first after them, and it waits for no other's block: one
//!    waits only for older sequences that move in this step.
//! 4. Hence the oldest ends after finitely many steps, and the next is the oldest. Preempted sequences come before the
//!    queue, the oldest first, so every admitted sequence becomes the oldest one day, and ends.
//! 5. A request in the queue moves up its line as those before it are admitted; at the front it is overtaken at most
//!    `max_overtaken` times before only older ones can come first. So it is admitted one day.
//!
//! `model_check` walks through every state that a few requests can lead to and finds these claims kept.

mod queue;
mod running;

use crate::kv::{BlockPool, BlockTable, Move, Reach};
use queue::Queue;
use running::Running;
use std::ops::Range;
use std::sync::Arc;

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
    /// Younger requests that may be admitted before one at the front of its line.
    pub max_overtaken: usize,
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
    /// Positions of the known tokens to compute.
    pub positions: Range<usize>,
    /// How many of the tokens it proposed come behind these.
    pub proposed: usize,
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
    /// Who asks; each client gets its turn.
    pub client: Arc<str>,
    /// A higher one is admitted first.
    pub priority: i32,
}

impl Arrival {
    /// Of nobody in particular, nothing special.
    pub fn new(id: RequestId, tokens: Vec<u32>, max_tokens: usize) -> Self {
        Self { id, tokens, max_tokens, root: 0, reuse: true, client: "".into(), priority: 0 }
    }
}

/// The queue, the running sequences and their KV blocks.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    block_tokens: usize,
    pool: BlockPool,
    queue: Queue,
    /// Preempted, by ticket.
    parked: Vec<Running>,
    /// By ticket.
    running: Vec<Running>,
    next_ticket: u64,
    preemptions: u64,
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
            pool: BlockPool::new(blocks),
            queue: Queue::new(limits.max_overtaken),
            parked: Vec::new(),
            running: Vec::new(),
            next_ticket: 0,
            preemptions: 0,
        }
    }

    /// With so many slots on the host for KV blocks that the device has no room for.
    pub fn with_host(self, slots: usize) -> Self {
        Self { pool: self.pool.with_host(slots), ..self }
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
        let active = self.running.iter().chain(&self.parked).map(|s| s.client.clone()).collect();
        self.queue.push(arrival, &active);
        self.admit();
        let waiting = self.queue.len();
        if waiting > self.limits.max_waiting && self.queue.remove(id) {
            return Err(QueueFull { waiting: waiting - 1 });
        }
        Ok(())
    }

    /// The next step's tokens: generating sequences first, then prompts, each in order of admission. They count as
    /// computed from now on. Empty when nothing runs.
    pub fn plan(&mut self) -> Vec<Part> {
        self.admit();
        self.secure_blocks();
        for sequence in &mut self.running {
            sequence.adopt(&mut self.pool, self.block_tokens, Reach::Host);
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
                self.queue.charge(&self.running[i].client, count);
                parts.push(self.running[i].take(count));
            }
        }
        self.add_proposed(&mut parts, &moving, left);
        parts
    }

    /// The copies to make before the step planned last is run.
    pub fn take_moves(&mut self) -> Vec<Move> {
        self.pool.take_moves()
    }

    /// Gives what is left of a step to proposed tokens.
    fn add_proposed(&mut self, parts: &mut [Part], moving: &[usize], mut left: usize) {
        for (part, &i) in parts.iter_mut().zip(moving) {
            let sequence = &mut self.running[i];
            let wanted = sequence.proposed_at_most().min(left);
            let positions = sequence.tokens.len() + wanted;
            let missing = positions.div_ceil(self.block_tokens).saturating_sub(sequence.table.len());
            // Fewer fit into the blocks it has when no more are to be had.
            let own = self.pool.allocate(missing).unwrap_or_default();
            sequence.extend(own);
            let room = sequence.table.len() * self.block_tokens - sequence.tokens.len();
            part.proposed = wanted.min(room);
            part.table = sequence.table.clone();
            left -= part.proposed;
        }
    }

    /// Gives every running sequence blocks for the tokens it knows, the oldest first, at the expense of the youngest.
    fn secure_blocks(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &mut self.running[i];
            let missing = sequence.blocks_for_known(self.block_tokens).saturating_sub(sequence.table.len());
            match self.pool.allocate(missing) {
                Some(own) => {
                    sequence.extend(own);
                    i += 1;
                }
                None => self.preempt_youngest(),
            }
        }
    }

    fn preempt_youngest(&mut self) {
        let mut victim = self.running.pop().expect("somebody needs a block");
        assert!(!self.running.is_empty(), "request {} alone outgrew the cache", victim.id);
        victim.give_up_blocks(&mut self.pool);
        let place = self.parked.partition_point(|s| s.ticket < victim.ticket);
        self.parked.insert(place, victim);
        self.preemptions += 1;
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

    /// A running sequence whose known tokens are all computed got more: those it had proposed and that were right, which
    /// are computed too, and one. Must come before [`Scheduler::stored`].
    pub fn append(&mut self, id: RequestId, tokens: &[u32]) {
        let sequence = self.running.iter_mut().find(|s| s.id == id).expect("only running sequences grow");
        assert!(sequence.left() == 0 && !tokens.is_empty(), "request {id} has not come so far");
        assert!(sequence.tokens.len() + tokens.len() <= sequence.most, "request {id} outgrew");
        sequence.grow(tokens, &mut self.pool, self.block_tokens);
        let client = sequence.client.clone();
        self.queue.charge(&client, tokens.len() - 1);
    }

    /// A running sequence has a guess at the tokens that follow those it knows.
    pub fn propose(&mut self, id: RequestId, count: usize) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            sequence.proposed = count;
        }
    }

    /// Takes a request out, finished or not: its blocks are free at once and go to whoever is next.
    /// Unknown ids are ignored.
    pub fn remove(&mut self, id: RequestId) {
        self.queue.remove(id);
        self.parked.retain(|s| s.id != id);
        if let Some(i) = self.running.iter().position(|s| s.id == id) {
            self.pool.release(&self.running.remove(i).table);
        }
        if self.running.is_empty() && self.waiting() == 0 {
            self.queue.forget();
        }
        self.admit();
    }

    /// Requests in the batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests waiting for admission, for the first time or again.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.parked.len()
    }

    /// Whether a request was never admitted so far.
    pub fn is_queued(&self, id: RequestId) -> bool {
        self.queue.contains(id)
    }

    /// How often a sequence had to give its blocks up.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The KV blocks.
    pub fn blocks(&self) -> &BlockPool {
        &self.pool
    }

    /// Lets in who can be, preempted sequences first. Nobody passes one that finds no room.
    fn admit(&mut self) {
        while self.running.len() < self.limits.max_seqs {
            let next = match (self.parked.first(), self.queue.next()) {
                (Some(parked), _) => parked.clone(),
                (None, Some(arrival)) => Running::new(arrival.clone(), self.next_ticket),
                (None, None) => return,
            };
            let Some(placed) = self.place(next) else { return };
            if self.parked.is_empty() {
                self.queue.pop();
                self.next_ticket += 1;
            } else {
                self.parked.remove(0);
            }
            let place = self.running.partition_point(|s| s.ticket < placed.ticket);
            self.running.insert(place, placed);
        }
    }

    /// The sequence with blocks for its known tokens, if there is room.
    fn place(&mut self, mut sequence: Running) -> Option<Running> {
        let at_most = |s: &Running| s.blocks_at_most(self.block_tokens);
        let reserved: usize = self.running.iter().map(at_most).sum();
        let safe = reserved + at_most(&sequence) <= self.pool.total();
        let spare = if safe || self.running.is_empty() { 0 } else { self.running.len() + 1 };
        sequence.adopt(&mut self.pool, self.block_tokens, Reach::Device);
        let known = sequence.blocks_for_known(self.block_tokens);
        if self.pool.available() < known - sequence.table.len() + spare {
            sequence.give_up_blocks(&mut self.pool);
            return None;
        }
        // Only now, and one by one: what is brought back changes places with what makes room for it.
        sequence.adopt(&mut self.pool, self.block_tokens, Reach::Host);
        let missing = known - sequence.table.len();
        let own = self.pool.allocate(missing).expect("counted just now");
        sequence.extend(own);
        Some(sequence)
    }
}

#[cfg(test)]
mod cells;
#[cfg(test)]
mod model_check;
#[cfg(test)]
mod tests;
