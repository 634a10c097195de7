//! Which KV blocks are free, shared or remembered. Counts only; the bytes lie in [`hearth_kernels::paged::KvCache`].
//!
//! # Prefix cache
//! A block that is full of computed tokens is registered under its key: the chain of blocks before it and its own
//! tokens. Whoever comes with the same tokens in front acquires it instead of computing it. A block nobody refers to
//! any more stays registered until its room is needed; the one idle longest goes first.
//!
//! # Host tier
//! Where there are host slots (`host`), what goes is moved to one of them, under its key and number, and the slot filled
//! longest ago is forgotten for it. Whoever acquires it gets it back in a block of the device. A block's contents lie in one
//! place at a time. The pool decides; whoever runs the model makes the copies ([`Move`]), in order, before the next step.
//!
//! # Invariants
//! - Every block is in one state: free, idle (registered, no references) or in use (`refs` tables name it).
//! - No block is promised for what lies on the host: to bring one back takes a block as to compute it would.
//! - Only full blocks are registered, and a full block is never written again: sharing needs no copies. A sequence
//!   writes to its own, unregistered blocks alone; where samples of one prompt part ways, each computes the tokens
//!   of its last, partial block itself.
//! - Keys hold the tokens themselves, so a hit is never a collision of hashes. A chain is named by a number that is
//!   never given twice, so what hangs on a forgotten block is unreachable, never wrong.
//! - A table's blocks become idle last first: the tail of a chain is forgotten before what it hangs on.

mod host;

use host::HostSlots;
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

/// What must be copied before the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// A block's contents to a slot.
    Out {
        /// From.
        block: u32,
        /// To.
        slot: u32,
    },
    /// A slot's contents to a block.
    Back {
        /// From.
        slot: u32,
        /// To.
        block: u32,
    },
    /// Each to the other.
    Swap {
        /// Of the device.
        block: u32,
        /// Of the host.
        slot: u32,
    },
}

/// How far to look for a computed block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Among those of the device: to take one that is idle or in use costs no other.
    Device,
    /// On the host too.
    Host,
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

/// Where a registered block's contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Device(u32),
    Host(u32),
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
    cached: HashMap<Arc<Key>, Place>,
    host: HostSlots,
    moves: Vec<Move>,
    /// Counts registrations, releases and moves to the host.
    clock: u64,
    moved_out: u64,
    brought_back: u64,
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
            host: HostSlots::new(0),
            moves: Vec::new(),
            clock: 0,
            moved_out: 0,
            brought_back: 0,
        }
    }

    /// With so many slots on the host for what would be forgotten.
    pub fn with_host(self, slots: usize) -> Self {
        Self { host: HostSlots::new(slots), ..self }
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

    /// Slots of the host, and those that hold something.
    pub fn host(&self) -> (usize, usize) {
        (self.host.total(), self.host.held())
    }

    /// How many blocks were moved to the host, and how many brought back from there.
    pub fn moved(&self) -> (u64, u64) {
        (self.moved_out, self.brought_back)
    }

    /// What was decided to be copied since this was called last. To be done in this order before anything is computed.
    pub fn take_moves(&mut self) -> Vec<Move> {
        std::mem::take(&mut self.moves)
    }

    /// `count` blocks nobody else has, or `None` (and no change) when fewer are available. Forgets the blocks idle
    /// longest if it must.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<u32>> {
        (count <= self.available()).then(|| (0..count).map(|_| self.take()).collect())
    }

    fn take(&mut self) -> u32 {
        let block = self.free.pop().unwrap_or_else(|| self.evict());
        self.blocks[block as usize].refs = 1;
        block
    }

    /// Makes the block idle longest free of what it holds: that goes to the host if there is a place for it.
    fn evict(&mut self) -> u32 {
        let (block, registered) = self.oldest_idle();
        let Some((slot, forgotten)) = self.host.free_slot() else {
            self.cached.remove(&registered.key);
            return block;
        };
        if let Some(forgotten) = forgotten {
            self.cached.remove(&forgotten.key);
        }
        self.moves.push(Move::Out { block, slot });
        self.put_on_host(slot, registered);
        block
    }

    fn oldest_idle(&mut self) -> (u32, Registered) {
        let (_, block) = self.idle.pop_first().expect("counted before");
        let registered = self.blocks[block as usize].registered.take().expect("idle blocks are registered");
        (block, registered)
    }

    fn put_on_host(&mut self, slot: u32, registered: Registered) {
        self.cached.insert(registered.key.clone(), Place::Host(slot));
        self.clock += 1;
        self.host.put(slot, registered, self.clock);
        self.moved_out += 1;
    }

    /// Brings a slot's contents to a block that is free, or in exchange for what an idle one holds.
    fn bring_back(&mut self, slot: u32) -> u32 {
        let registered = self.host.take(slot);
        let block = match self.free.pop() {
            Some(block) => {
                self.moves.push(Move::Back { slot, block });
                self.host.give_back(slot);
                block
            }
            None => {
                let (block, other) = self.oldest_idle();
                self.moves.push(Move::Swap { block, slot });
                self.put_on_host(slot, other);
                block
            }
        };
        self.cached.insert(registered.key.clone(), Place::Device(block));
        self.blocks[block as usize].registered = Some(registered);
        self.brought_back += 1;
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

    /// The block holding `tokens` after `before`, with a reference to it, and the chain it ends. One that lies on the host
    /// is brought back if that is wanted and a block can be had for it.
    pub fn acquire(&mut self, before: Chain, tokens: &[u32], reach: Reach) -> Option<(u32, Chain)> {
        let number = match *self.cached.get(&Key { before, tokens: tokens.into() })? {
            Place::Device(number) => number,
            Place::Host(_) if reach == Reach::Device || self.available() == 0 => return None,
            Place::Host(slot) => self.bring_back(slot),
        };
        let block = &mut self.blocks[number as usize];
        if block.refs == 0 {
            self.idle.remove(&block.idle_since);
        }
        block.refs += 1;
        Some((number, self.chain_of(number)))
    }

    fn chain_of(&self, number: u32) -> Chain {
        let registered = self.blocks[number as usize].registered.as_ref();
        Chain::Block(registered.expect("cached blocks are registered").number)
    }

    /// Remembers a block in use as the one holding `tokens` after `before`, and gives the chain it ends. If another
    /// block is known for that already, it stays the known one; a slot of the host gives way to the block.
    pub fn register(&mut self, number: u32, before: Chain, tokens: &[u32]) -> Chain {
        let key = Arc::new(Key { before, tokens: tokens.into() });
        let registered = match self.cached.get(&key) {
            Some(&Place::Device(known)) => return self.chain_of(known),
            Some(&Place::Host(slot)) => {
                let registered = self.host.take(slot);
                self.host.give_back(slot);
                registered
            }
            None => {
                self.clock += 1;
                Registered { key, number: self.clock }
            }
        };
        let block = &mut self.blocks[number as usize];
        assert!(block.refs > 0 && block.registered.is_none(), "KV block {number} is not being filled");
        self.cached.insert(registered.key.clone(), Place::Device(number));
        block.registered = Some(registered);
        self.chain_of(number)
    }

    /// Who is free, idle and known as what: what a walk over states tells apart.
    #[cfg(test)]
    pub fn shape(&self) -> String {
        let all = || self.blocks.iter().map(|b| b.registered.as_ref()).chain(self.host.slots());
        let place = |chain: Chain| match chain {
            Chain::Root(_) => None,
            Chain::Block(n) => Some(all().position(|known| known.is_some_and(|known| known.number == n))),
        };
        let known: Vec<_> =
            all().map(|known| known.map(|known| (place(known.key.before), &known.key.tokens))).collect();
        let idle: Vec<_> = self.idle.values().collect();
        format!("{:?} {idle:?} {} {known:?}", self.free, self.host.shape())
    }

    /// References to each block, by number: what a test holds against the tables there are.
    #[cfg(test)]
    pub fn references(&self) -> Vec<u32> {
        let counted = self.blocks.iter().filter(|b| b.refs == 0).count();
        assert_eq!(counted, self.available(), "no block is lost");
        assert!(self.idle.values().all(|b| self.blocks[*b as usize].refs == 0));
        assert!(self.free.iter().all(|b| self.blocks[*b as usize].registered.is_none()));
        let registered = self.blocks.iter().filter(|b| b.registered.is_some()).count();
        assert_eq!(self.cached.len(), registered + self.host.held());
        for (key, place) in &self.cached {
            let known = match *place {
                Place::Device(block) => self.blocks[block as usize].registered.as_ref(),
                Place::Host(slot) => self.host.slots().nth(slot as usize).expect("a slot there is"),
            };
            assert_eq!(known.map(|known| &known.key), Some(key), "what is known lies where it is said to");
        }
        self.blocks.iter().map(|b| b.refs).collect()
    }

    /// What each block and each slot is known to hold.
    #[cfg(test)]
    pub fn contents(&self) -> [Vec<Option<&[u32]>>; 2] {
        fn tokens(known: Option<&Registered>) -> Option<&[u32]> {
            known.map(|known| &known.key.tokens[..])
        }
        let blocks = self.blocks.iter().map(|b| tokens(b.registered.as_ref())).collect();
        [blocks, self.host.slots().map(tokens).collect()]
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
        assert_eq!(pool.acquire(ROOT, &[1, 2], Reach::Host), Some((table[0], first)));
        assert_eq!(pool.acquire(first, &[1, 2], Reach::Host), Some((table[1], second)));
        for (before, tokens) in [(ROOT, [1, 3]), (second, [1, 2]), (Chain::Root(1), [1, 2])] {
            assert_eq!(pool.acquire(before, &tokens, Reach::Host), None);
        }
        assert_eq!(pool.references(), [2, 2, 0, 0]);
        pool.release(&table);
        pool.release(&table);
        assert_eq!((pool.used(), pool.idle()), (0, 2));
        assert!(pool.acquire(ROOT, &[1, 2], Reach::Host).is_some(), "idle blocks are found too");
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
        let (head, first) = pool.acquire(ROOT, &[0], Reach::Host).expect("still there");
        assert_eq!((head, pool.allocate(1)), (table[0], Some(vec![table[1]])));
        assert_eq!(
            (pool.acquire(first, &[1], Reach::Host), pool.available()),
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

    /// Registers a chain of one-token blocks and lets it idle; gives the block before each.
    fn idle_chain(pool: &mut BlockPool, tokens: &[u32]) -> Vec<Chain> {
        let table = pool.allocate(tokens.len()).expect("free");
        let mut chains = vec![ROOT];
        for (block, token) in table.iter().zip(tokens) {
            chains.push(pool.register(*block, chains[chains.len() - 1], &[*token]));
        }
        pool.release(&table);
        chains
    }

    #[test]
    fn what_the_device_has_no_room_for_comes_back_from_the_host() {
        let mut pool = BlockPool::new(2).with_host(2);
        let chains = idle_chain(&mut pool, &[5, 6]);
        let others = pool.allocate(2).expect("idle");
        let out = |block, slot| Move::Out { block, slot };
        assert_eq!(pool.take_moves(), [out(1, 0), out(0, 1)], "tails first");
        assert_eq!((pool.host(), pool.idle(), pool.moved()), ((2, 2), 0, (2, 0)));
        assert_eq!(pool.acquire(ROOT, &[5], Reach::Host), None, "no block can be had for it");
        pool.release(&others);
        assert_eq!(pool.acquire(ROOT, &[5], Reach::Device), None);
        assert_eq!(pool.acquire(ROOT, &[5], Reach::Host), Some((1, chains[1])));
        assert_eq!(pool.acquire(chains[1], &[6], Reach::Host), Some((0, chains[2])));
        assert_eq!(pool.take_moves(), [Move::Back { slot: 1, block: 1 }, Move::Back { slot: 0, block: 0 }]);
        assert_eq!((pool.host(), pool.moved(), pool.references()), ((2, 0), (2, 2), vec![1, 1]));
    }

    #[test]
    fn what_comes_back_changes_places_with_what_makes_room_for_it() {
        let mut pool = BlockPool::new(1).with_host(1);
        let first = idle_chain(&mut pool, &[5]);
        let second = idle_chain(&mut pool, &[6]);
        assert_eq!(pool.take_moves(), [Move::Out { block: 0, slot: 0 }]);
        for (token, chains) in [(5, &first), (6, &second), (5, &first)] {
            assert_eq!(pool.acquire(ROOT, &[token], Reach::Host), Some((0, chains[1])));
            assert_eq!(pool.take_moves(), [Move::Swap { block: 0, slot: 0 }], "nothing is lost");
            pool.release(&[0]);
        }
    }

    #[test]
    fn the_host_forgets_what_came_first() {
        let mut pool = BlockPool::new(1).with_host(2);
        (5..9).for_each(|token| drop(idle_chain(&mut pool, &[token])));
        let held = |pool: &BlockPool| {
            pool.contents().concat().iter().map(|tokens| tokens.map(|t| t[0])).collect::<Vec<_>>()
        };
        assert_eq!(held(&pool), [Some(8), Some(7), Some(6)]);
        assert_eq!(pool.acquire(ROOT, &[5], Reach::Host), None);
        assert_eq!(pool.references(), [0]);
    }

    #[test]
    fn what_is_computed_again_is_not_kept_on_the_host_too() {
        let mut pool = BlockPool::new(1).with_host(1);
        let chains = idle_chain(&mut pool, &[5]);
        let table = pool.allocate(1).expect("idle");
        assert_eq!(pool.host(), (1, 1));
        assert_eq!(pool.register(table[0], ROOT, &[5]), chains[1], "what hangs on it still does");
        assert_eq!((pool.host(), pool.references()), ((1, 0), vec![1]));
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
