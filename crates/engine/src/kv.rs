//! Which KV blocks are free. Counts only; the bytes lie in [`hearth_kernels::paged::KvCache`].

use std::sync::Arc;

/// A sequence's KV blocks in the order of its tokens.
pub type BlockTable = Arc<[u32]>;

/// Hands out KV blocks by number, most recently freed first.
#[derive(Debug)]
pub struct BlockAllocator {
    free: Vec<u32>,
    /// Whether a block is handed out, by number: what a double free would violate.
    taken: Vec<bool>,
}

impl BlockAllocator {
    /// Blocks `0..total`, all free.
    pub fn new(total: usize) -> Self {
        let count = u32::try_from(total).expect("block numbers are u32");
        Self { free: (0..count).rev().collect(), taken: vec![false; total] }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.taken.len()
    }

    /// Blocks handed out.
    pub fn used(&self) -> usize {
        self.taken.len() - self.free.len()
    }

    /// `count` blocks, or `None` (and no change) when fewer are free.
    pub fn allocate(&mut self, count: usize) -> Option<BlockTable> {
        let start = self.free.len().checked_sub(count)?;
        let table: BlockTable = self.free.drain(start..).rev().collect();
        for &block in table.iter() {
            self.taken[block as usize] = true;
        }
        Some(table)
    }

    /// Takes a table back.
    ///
    /// # Panics
    /// When a block of it is free already.
    pub fn release(&mut self, table: &BlockTable) {
        for &block in table.iter().rev() {
            let taken = &mut self.taken[block as usize];
            assert!(std::mem::take(taken), "KV block {block} is freed twice");
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_handed_out_once_until_they_come_back() {
        let mut blocks = BlockAllocator::new(5);
        let (a, b) = (blocks.allocate(2).expect("5 free"), blocks.allocate(3).expect("3 free"));
        let mut all: Vec<u32> = a.iter().chain(b.iter()).copied().collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        assert_eq!((blocks.used(), blocks.allocate(1)), (5, None));
        blocks.release(&a);
        assert_eq!((blocks.used(), blocks.allocate(3)), (3, None));
        assert_eq!(blocks.allocate(2), Some(a));
    }

    #[test]
    fn an_empty_table_takes_nothing() {
        let mut blocks = BlockAllocator::new(0);
        let table = blocks.allocate(0).expect("nothing is asked for");
        blocks.release(&table);
        assert_eq!((blocks.used(), blocks.total()), (0, 0));
    }

    #[test]
    #[should_panic(expected = "KV block 0 is freed twice")]
    fn a_double_free_is_our_bug_and_says_so() {
        let mut blocks = BlockAllocator::new(1);
        let table = blocks.allocate(1).expect("1 free");
        blocks.release(&table);
        blocks.release(&table);
    }
}
