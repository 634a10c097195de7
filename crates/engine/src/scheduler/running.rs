//! A sequence in the batch: which of its tokens are computed, and the blocks that hold them.

use super::{Arrival, Part, RequestId};
use crate::kv::{BlockPool, BlockTable, Chain, Reach};
use std::ops::Range;
use std::sync::Arc;

#[derive(Clone, Debug)]
pub(super) struct Running {
    pub id: RequestId,
    /// Its place in the order of first admissions: the lower, the safer from preemption.
    pub ticket: u64,
    pub client: Arc<str>,
    pub root: u64,
    /// Prompt and output so far.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Most tokens there will ever be.
    pub most: usize,
    /// Tokens whose keys and values are in the cache, or will be once the planned step has run.
    pub computed: usize,
    /// The most it had computed, before a preemption too.
    pub reached: usize,
    pub table: BlockTable,
    /// The blocks known to the prefix cache, those in front of the table.
    pub chain: Chain,
    /// How many these are.
    pub registered: usize,
    /// Whether it may skip what others computed; one whose prompt is scored needs every position's logits.
    pub reuse: bool,
    /// Prompt tokens it found computed.
    pub cached: usize,
    /// Tokens guessed to follow those it knows.
    pub proposed: usize,
}

impl Running {
    /// Without blocks.
    pub fn new(arrival: Arrival, ticket: u64) -> Self {
        let prompt = arrival.tokens.len();
        Self {
            id: arrival.id,
            ticket,
            client: arrival.client,
            root: arrival.root,
            prompt,
            most: prompt + arrival.max_tokens,
            tokens: arrival.tokens,
            computed: 0,
            reached: 0,
            table: [].into(),
            chain: Chain::Root(arrival.root),
            registered: 0,
            reuse: arrival.reuse,
            cached: 0,
            proposed: 0,
        }
    }

    /// Blocks that its known tokens fill or begin.
    pub fn blocks_for_known(&self, block_tokens: usize) -> usize {
        self.tokens.len().div_ceil(block_tokens)
    }

    /// Most blocks it can ever need: the last token it generates is never fed back.
    pub fn blocks_at_most(&self, block_tokens: usize) -> usize {
        self.prompt.max(self.most - 1).div_ceil(block_tokens)
    }

    /// Puts blocks of its own behind those it has.
    pub fn extend(&mut self, own: Vec<u32>) {
        if !own.is_empty() {
            self.table = self.table.iter().copied().chain(own).collect();
        }
    }

    /// Gives its blocks up. It keeps its tokens, to compute them again.
    pub fn give_up_blocks(&mut self, pool: &mut BlockPool) {
        pool.release(&self.table);
        self.table = [].into();
        self.chain = Chain::Root(self.root);
        self.registered = 0;
        self.computed = 0;
        self.proposed = 0;
    }

    /// Takes over blocks the cache has for its next tokens, in place of its own. At least its last token is left to
    /// compute: logits come from computing.
    pub fn adopt(&mut self, pool: &mut BlockPool, block_tokens: usize, reach: Reach) {
        while let Some(next) = self.next_block(block_tokens) {
            let found = pool.acquire(self.chain, &self.tokens[next.clone()], reach);
            let Some((block, chain)) = found else { return };
            let mut table = self.table.to_vec();
            match table.get_mut(self.registered) {
                Some(own) => pool.release(&[std::mem::replace(own, block)]),
                None => table.push(block),
            }
            self.table = table.into();
            self.chain = chain;
            self.registered += 1;
            self.computed = next.end;
            if next.end > self.reached {
                self.cached += next.end.min(self.prompt) - next.start.min(self.prompt);
                self.reached = next.end;
            }
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

    /// How many proposed tokens a step that computes all it knows may hold: none behind its last position.
    pub fn proposed_at_most(&self) -> usize {
        match self.left() {
            0 => self.proposed.min((self.most - 1).saturating_sub(self.tokens.len())),
            _ => 0,
        }
    }

    /// Takes tokens a step gave it; all but the last are computed. Blocks for what was proposed in vain go back.
    pub fn grow(&mut self, tokens: &[u32], pool: &mut BlockPool, block_tokens: usize) {
        self.tokens.extend_from_slice(tokens);
        self.computed += tokens.len() - 1;
        self.reached = self.reached.max(self.computed);
        self.proposed = 0;
        let known = self.blocks_for_known(block_tokens).min(self.table.len());
        pool.release(&self.table[known..]);
        self.table = self.table[..known].into();
    }

    pub fn take(&mut self, count: usize) -> Part {
        let start = self.computed;
        self.computed += count;
        self.reached = self.reached.max(self.computed);
        Part {
            id: self.id,
            positions: start..self.computed,
            proposed: 0,
            table: self.table.clone(),
            cached: self.cached,
        }
    }
}
