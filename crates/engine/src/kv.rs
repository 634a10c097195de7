//! Which KV blocks are free, shared or remembered. Counts only; the bytes lie in [`hearth_kernels::paged::KvCache`].
//!
//! # Prefix cache
//! A block that is full of computed tokens is registered under its key: the chain of blocks before it and its own
//! tokens. Whoever comes with the same tokens in front acquires it instead of computing it. A block nobody refers to
//! any more stays registered until its room is needed; the one idle longest goes first.
//!
//! # Invariants
//! - Every block is in one state: free, idle (registered, no references) or in use (`refs` tables name it).
//! - Only full blocks are registered, and a full block is never written again: sharing needs no copies. A sequence
//!   writes to its own, unregistered blocks alone; where samples of one prompt part ways, each computes the tokens
//!   of its last, partial block itself.
//! - Keys hold the tokens themselves, so a hit is never a collision of hashes. A chain is named by a number that is
//!   never given twice, so what hangs on a forgotten block is unreachable, never wrong.
//! - A table's blocks become idle last first: the tail of a chain is forgotten before what it hangs on.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A sequence's KV blocks in the order of its tokens.
pub type BlockTable = Arc<[u32]>;

/// The blocks before a block, as one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Chain {
    /// None. Sequences whose keys and values differ for equal tokens start from different roots.
    Root(u64),
    /// All up to the block registered under this number.
    Block(u64),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    before: Chain,
    tokens: Box<[u32]>,
}

#[derive(Clone, Debug)]
struct Registered {
    key: Arc<Key>,
    number: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// Tables that name it.
    refs: u32,
    registered: Option<Registered>,
    /// Its place in `idle`, while it is there.
    idle_since: u64,
}

/// Hands out KV blocks by number, shares and remembers them.
#[derive(Clone, Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// Blocks without references that are still registered, by when they lost the last one.
    idle: BTreeMap<u64, u32>,
    cached: HashMap<Arc<Key>, u32>,
    /// Counts registrations and releases.
    clock: u64,
}

impl BlockPool {
    /// Blocks `0..total`, all free.
    pub fn new(total: usize) -> Self {
        let count = u32::try_from(total).expect("block numbers are u32");
        Self {
            blocks: vec![Block::default(); total],
            free: (0..count).rev().collect(),
            idle: BTreeMap::new(),
            cached: HashMap::new(),
            clock: 0,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that tables name.
    pub fn used(&self) -> usize {
        self.total() - self.available()
    }

    /// Blocks that can be handed out: free ones, and idle ones once they are forgotten.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks remembered for whoever comes with their tokens.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// `count` blocks nobody else has, or `None` (and no change) when fewer are available. Forgets the blocks idle
    /// longest if it must.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        (count <= self.available()).then(|| (0..count).map(|_| self.take()).collect())
    }

    fn take(&mut self) -> u32 {
        let block = self.free.pop().unwrap_or_else(|| {
            let (_, block) = self.idle.pop_first().expect("counted before");
            let forgotten =
                self.blocks[block as usize].registered.take().expect("idle blocks are registered");
            self.cached.remove(&forgotten.key);
            block
        });
        self.blocks[block as usize].refs = 1;
        block
    }

    /// Gives up one reference to each block of a table.
    ///
    /// # Panics
    /// When a block of it has none.
    pub fn release(&mut self, table: &[u32]) {
        for &number in table.iter().rev() {
            let block = &mut self.blocks[number as usize];
            block.refs =
                block.refs.checked_sub(1).unwrap_or_else(|| panic!("KV block {number} is freed twice"));
            if block.refs > 0 {
                continue;
            }
            if block.registered.is_some() {
                self.clock += 1;
                block.idle_since = self.clock;
                self.idle.insert(self.clock, number);
            } else {
                self.free.push(number);
            }
        }
    }

    /// The block holding `tokens` after `before`, with a reference to it, and the chain it ends.
    pub fn acquire(&mut self, before: Chain, tokens: &[u32]) -> Option<(u32, Chain)> {
        let number = *self.cached.get(&Key { before, tokens: tokens.into() })?;
        let block = &mut self.blocks[number as usize];
        if block.refs == 0 {
            self.idle.remove(&block.idle_since);
        }
        block.refs += 1;
        let registered = block.registered.as_ref().expect("cached blocks are registered");
        Some((number, Chain::Block(registered.number)))
    }

    /// Remembers a block in use as the one holding `tokens` after `before`, and gives the chain it ends. If another
    /// block is known for that already, it stays the known one.
    pub fn register(&mut self, number: u32, before: Chain, tokens: &[u32]) -> Chain {
        let key = Arc::new(Key { before, tokens: tokens.into() });
        if let Some(&known) = self.cached.get(&key) {
            let known =
                self.blocks[known as usize].registered.as_ref().expect("cached blocks are registered");
            return Chain::Block(known.number);
        }
        self.clock += 1;
        let block = &mut self.blocks[number as usize];
        assert!(block.refs > 0 && block.registered.is_none(), "KV block {number} is not being filled");
        block.registered = Some(Registered { key: key.clone(), number: self.clock });
        self.cached.insert(key, number);
        Chain::Block(self.clock)
    }

    /// Who is free, idle and known as what: what a walk over states tells apart.
    #[cfg(test)]
    pub fn shape(&self) -> String {
        let place = |chain: Chain| match chain {
            Chain::Root(_) => None,
            Chain::Block(n) => {
                let holds = |b: &Block| b.registered.as_ref().is_some_and(|r| r.number == n);
                Some(self.blocks.iter().position(holds))
            }
        };
        let known = |b: &Block| b.registered.as_ref().map(|r| (place(r.key.before), r.key.tokens.clone()));
        let known: Vec<_> = self.blocks.iter().map(known).collect();
        format!("{:?} {:?} {known:?}", self.free, self.idle.values().collect::<Vec<_>>())
    }

    /// References to each block, by number: what a test holds against the tables there are.
    #[cfg(test)]
    pub fn references(&self) -> Vec<u32> {
        let counted = self.blocks.iter().filter(|b| b.refs == 0).count();
        assert_eq!(counted, self.available(), "no block is lost");
        assert!(self.idle.values().all(|b| self.blocks[*b as usize].refs == 0));
        assert!(self.free.iter().all(|b| self.blocks[*b as usize].registered.is_none()));
        assert_eq!(self.cached.len(), self.blocks.iter().filter(|b| b.registered.is_some()).count());
        self.blocks.iter().map(|b| b.refs).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Chain = Chain::Root(0);

    #[test]
    fn blocks_are_handed_out_once_until_they_come_back() {
        let mut pool = BlockPool::new(5);
        let (a, b) = (pool.allocate(2).expect("5 free"), pool.allocate(3).expect("3 free"));
        let mut all: Vec<u32> = a.iter().chain(&b).copied().collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        assert_eq!((pool.used(), pool.allocate(1)), (5, None));
        pool.release(&a);
        assert_eq!((pool.used(), pool.allocate(3)), (3, None));
        assert_eq!(pool.allocate(2), Some(a));
        assert_eq!(pool.references(), [1; 5]);
    }

    #[test]
    fn a_registered_block_is_found_by_its_tokens_and_those_before_it() {
        let mut pool = BlockPool::new(4);
        let table = pool.allocate(2).expect("free");
        let first = pool.register(table[0], ROOT, &[1, 2]);
        let second = pool.register(table[1], first, &[1, 2]);
        assert_eq!(pool.acquire(ROOT, &[1, 2]), Some((table[0], first)));
        assert_eq!(pool.acquire(first, &[1, 2]), Some((table[1], second)));
        for (before, tokens) in [(ROOT, [1, 3]), (second, [1, 2]), (Chain::Root(1), [1, 2])] {
            assert_eq!(pool.acquire(before, &tokens), None);
        }
        assert_eq!(pool.references(), [2, 2, 0, 0]);
        pool.release(&table);
        pool.release(&table);
        assert_eq!((pool.used(), pool.idle()), (0, 2));
        assert!(pool.acquire(ROOT, &[1, 2]).is_some(), "idle blocks are found too");
        assert_eq!((pool.used(), pool.idle()), (1, 1));
    }

    #[test]
    fn the_blocks_idle_longest_are_forgotten_first_tails_before_heads() {
        let mut pool = BlockPool::new(3);
        let table = pool.allocate(3).expect("free");
        let mut chain = ROOT;
        for (i, block) in table.iter().enumerate() {
            chain = pool.register(*block, chain, &[i as u32]);
        }
        pool.release(&table);
        assert_eq!(pool.allocate(1), Some(vec![table[2]]));
        let (head, first) = pool.acquire(ROOT, &[0]).expect("still there");
        assert_eq!((head, pool.allocate(1)), (table[0], Some(vec![table[1]])));
        assert_eq!(
            (pool.acquire(first, &[1]), pool.available()),
            (None, 0),
            "what is in use is never forgotten"
        );
        assert_eq!(pool.references(), [1, 1, 1]);
    }

    #[test]
    fn a_block_computed_twice_is_known_once() {
        let mut pool = BlockPool::new(2);
        let table = pool.allocate(2).expect("free");
        let chain = pool.register(table[0], ROOT, &[7]);
        assert_eq!(pool.register(table[1], ROOT, &[7]), chain);
        pool.release(&table[1..]);
        assert_eq!((pool.idle(), pool.used()), (0, 1), "the second is simply free");
    }

    #[test]
    fn an_empty_table_takes_nothing() {
        let mut pool = BlockPool::new(0);
        let table = pool.allocate(0).expect("nothing is asked for");
        pool.release(&table);
        assert_eq!((pool.used(), pool.total(), pool.allocate(1)), (0, 0, None));
    }

    #[test]
    #[should_panic(expected = "KV block 0 is freed twice")]
    fn a_double_free_is_our_bug_and_says_so() {
        let mut pool = BlockPool::new(1);
        let table = pool.allocate(1).expect("1 free");
        pool.release(&table);
        pool.release(&table);
    }
}
