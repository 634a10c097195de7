//! A sequence in the batch: which of its tokens are computed, and the blocks that hold them.

use super::{Arrival, Part, RequestId};
use crate::kv::{BlockPool, BlockTable, Chain};
use std::ops::Range;

#[derive(Clone, Debug)]
pub(super) struct Running {
    pub id: RequestId,
    /// Prompt and output so far.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Most tokens there will ever be.
    pub most: usize,
    /// Tokens whose keys and values are in the cache, or will be once the planned step has run.
    pub computed: usize,
    pub table: BlockTable,
    /// The blocks known to the prefix cache, those in front of the table.
    pub chain: Chain,
    /// How many these are.
    pub registered: usize,
    /// Whether it may skip what others computed; one whose prompt is scored needs every position's logits.
    pub reuse: bool,
    /// Prompt tokens it found computed.
    pub cached: usize,
}

impl Running {
    /// With the blocks it finds in the cache, and none of its own yet.
    pub fn new(arrival: Arrival, pool: &mut BlockPool, block_tokens: usize) -> Self {
        let prompt = arrival.tokens.len();
        let mut running = Self {
            id: arrival.id,
            prompt,
            most: prompt + arrival.max_tokens,
            tokens: arrival.tokens,
            computed: 0,
            table: [].into(),
            chain: Chain::Root(arrival.root),
            registered: 0,
            reuse: arrival.reuse,
            cached: 0,
        };
        running.adopt(pool, block_tokens);
        running
    }

    /// Takes over blocks the cache has for its next tokens, in place of its own. At least its last token is left to
    /// compute: logits come from computing.
    pub fn adopt(&mut self, pool: &mut BlockPool, block_tokens: usize) {
        while let Some(next) = self.next_block(block_tokens) {
            let Some((block, chain)) = pool.acquire(self.chain, &self.tokens[next.clone()]) else { return };
            let mut table = self.table.to_vec();
            match table.get_mut(self.registered) {
                Some(own) => pool.release(&[std::mem::replace(own, block)]),
                None => table.push(block),
            }
            self.table = table.into();
            self.chain = chain;
            self.registered += 1;
            self.computed = next.end;
            self.cached = self.cached.max(next.end.min(self.prompt));
        }
    }

    /// The positions of the block it could adopt next.
    fn next_block(&self, block_tokens: usize) -> Option<Range<usize>> {
        let next = self.registered * block_tokens..(self.registered + 1) * block_tokens;
        (self.reuse && self.computed == next.start && next.end < self.tokens.len()).then_some(next)
    }

    /// Whether it computes the very block that `other` needs next.
    pub fn fills_next_block_of(&self, other: &Running, block_tokens: usize) -> bool {
        other.next_block(block_tokens).is_some_and(|next| {
            self.chain == other.chain && self.tokens.get(next.clone()) == Some(&other.tokens[next])
        })
    }

    /// Makes the full blocks of computed tokens known.
    pub fn register(&mut self, pool: &mut BlockPool, block_tokens: usize) {
        while (self.registered + 1) * block_tokens <= self.computed {
            let next = self.registered * block_tokens..(self.registered + 1) * block_tokens;
            self.chain = pool.register(self.table[self.registered], self.chain, &self.tokens[next]);
            self.registered += 1;
        }
    }

    /// Tokens known and not computed.
    pub fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether only the token chosen last is left to compute.
    pub fn generates(&self) -> bool {
        self.computed >= self.prompt && self.left() <= 1
    }

    pub fn take(&mut self, count: usize) -> Part {
        let start = self.computed;
        self.computed += count;
        Part { id: self.id, positions: start..self.computed, table: self.table.clone(), cached: self.cached }
    }
}
