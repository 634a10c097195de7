//! Large blocks, mapped once and used again.
//!
//! A training step allocates and frees the same few sizes over and over. A system allocator maps such blocks anew each
//! time, and every page of them must be faulted in and zeroed: a tenth of a step. Here a freed block waits for the next
//! request that fits into it; neighbours become one block again. Blocks lie on huge pages where the system grants them.
//!
//! # Invariant
//! Kept and used bytes together never exceed the most that was ever used at once, so keeping blocks does not raise the
//! process's peak; and no more is kept than is in use, so that it falls when less is used, unless [`hoard`] says that
//! the same will soon be asked for again.
#![allow(unsafe_code)] // Memory is mapped, unmapped and zeroed by hand.

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mremap, munmap};
use std::alloc::Layout;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks from this size on are mapped here.
const LARGE: usize = 1 << 20;
/// Blocks are whole pages.
const PAGE: usize = 4096;
/// Blocks from this size on begin at a multiple of it.
const HUGE_PAGE: usize = 2 << 20;
/// Most blocks that are kept.
const SLOTS: usize = 2048;

/// A block that nobody uses.
#[derive(Clone, Copy)]
struct Block {
    address: usize,
    bytes: usize,
}

/// What is used and what is kept, the oldest first.
struct Kept {
    blocks: [Block; SLOTS],
    count: usize,
    kept: usize,
    used: usize,
    /// Most that was used at once.
    peak: usize,
    /// Who wants everything kept that was ever used at once.
    hoarders: usize,
}

static KEPT: Mutex<Kept> = Mutex::new(Kept {
    blocks: [Block { address: 0, bytes: 0 }; SLOTS],
    count: 0,
    kept: 0,
    used: 0,
    peak: 0,
    hoarders: 0,
});

/// Nothing panics while it is held.
fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a block of this layout is one of ours.
pub(crate) fn serves(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= PAGE && layout.size() <= isize::MAX as usize - 2 * HUGE_PAGE
}

/// Memory for `bytes`; null if there is none.
pub(crate) fn allocate(bytes: usize, zeroed: bool) -> *mut u8 {
    let bytes = bytes.next_multiple_of(PAGE);
    if let Some(address) = kept().take(bytes) {
        let block = address as *mut u8;
        if zeroed {
            // SAFETY: a block of this size that nobody else uses.
            unsafe { block.write_bytes(0, bytes) };
        }
        return block;
    }
    let block = map(bytes);
    if block.is_null() {
        kept().used -= bytes;
    }
    block
}

/// Takes a block of `bytes` back.
///
/// # Safety
/// It came from [`allocate`] or [`resize`] with this size, and nobody uses it any more.
pub(crate) unsafe fn release(block: *mut u8, bytes: usize) {
    let bytes = bytes.next_multiple_of(PAGE);
    kept().put(Block { address: block as usize, bytes });
}

/// The same bytes in a block of another size; null if there is none, and the old block stays.
///
/// # Safety
/// As [`release`]; the caller goes on with the new block alone.
pub(crate) unsafe fn resize(block: *mut u8, bytes: usize, new_bytes: usize) -> *mut u8 {
    let (bytes, new_bytes) = (bytes.next_multiple_of(PAGE), new_bytes.next_multiple_of(PAGE));
    if bytes == new_bytes {
        return block;
    }
    // SAFETY: pages of ours.
    if let Ok(moved) = unsafe { mremap(block.cast(), bytes, new_bytes, MremapFlags::MAYMOVE) } {
        let mut kept = kept();
        kept.used = kept.used - bytes + new_bytes;
        kept.peak = kept.peak.max(kept.used);
        let allowed = kept.allowed();
        kept.shrink_to(allowed);
        return moved.cast();
    }
    // Pages of several mappings cannot be moved at once.
    let moved = allocate(new_bytes, false);
    if !moved.is_null() {
        // SAFETY: both blocks have that many bytes, and the old one is the caller's to give.
        unsafe {
            moved.copy_from_nonoverlapping(block, bytes.min(new_bytes));
            release(block, bytes);
        }
    }
    moved
}

/// One more, or one less, wants everything kept that was ever used at once.
pub(crate) fn hoard(more: bool) {
    let mut kept = kept();
    if more {
        kept.hoarders += 1;
    } else {
        kept.hoarders -= 1;
        let allowed = kept.allowed();
        kept.shrink_to(allowed);
    }
}

impl Kept {
    /// Counts `bytes` as used and hands them out of the smallest kept block that has as many.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        self.used += bytes;
        let fitting = self.blocks[..self.count].iter().enumerate().filter(|(_, block)| block.bytes >= bytes);
        if let Some((at, block)) = fitting.min_by_key(|(_, block)| block.bytes) {
            let address = block.address;
            if block.bytes == bytes {
                self.remove(at);
            } else {
                self.blocks[at] = Block { address: address + bytes, bytes: block.bytes - bytes };
                self.kept -= bytes;
            }
            return Some(address);
        }
        self.peak = self.peak.max(self.used);
        self.shrink_to(self.allowed());
        None
    }

    /// Counts a block as no longer used and keeps it, if there is room.
    fn put(&mut self, mut block: Block) {
        self.used -= block.bytes;
        let near = |there: &Block, block: &Block| {
            there.address + there.bytes == block.address || block.address + block.bytes == there.address
        };
        while let Some(at) = self.blocks[..self.count].iter().position(|there| near(there, &block)) {
            let there = self.remove(at);
            let address = block.address.min(there.address);
            block = Block { address, bytes: block.bytes + there.bytes };
        }
        if self.count == SLOTS {
            unmap(self.remove(0));
        }
        self.blocks[self.count] = block;
        self.count += 1;
        self.kept += block.bytes;
        self.shrink_to(self.allowed());
    }

    /// Bytes that may be kept.
    fn allowed(&self) -> usize {
        let unused = self.peak - self.used;
        if self.hoarders > 0 { unused } else { unused.min(self.used) }
    }

    /// Unmaps the oldest until no more than `bytes` are kept.
    fn shrink_to(&mut self, bytes: usize) {
        while self.kept > bytes {
            let (excess, oldest) = (self.kept - bytes, self.blocks[0]);
            if oldest.bytes <= excess {
                unmap(self.remove(0));
            } else {
                self.blocks[0].bytes -= excess;
                self.kept -= excess;
                unmap(Block { address: oldest.address + oldest.bytes - excess, bytes: excess });
            }
        }
    }

    fn remove(&mut self, at: usize) -> Block {
        let block = self.blocks[at];
        self.blocks.copy_within(at + 1..self.count, at);
        self.count -= 1;
        self.kept -= block.bytes;
        block
    }
}

/// Fresh zeros; null if the system has none.
fn map(bytes: usize) -> *mut u8 {
    let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
    // SAFETY: a mapping of its own, wherever the system likes.
    let mapped = unsafe {
        mmap_anonymous(null_mut(), bytes + slack, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    };
    let Ok(mapped) = mapped else { return null_mut() };
    if slack == 0 {
        return mapped.cast();
    }
    let start = mapped as usize;
    let aligned = start.next_multiple_of(HUGE_PAGE);
    unmap(Block { address: start, bytes: aligned - start });
    unmap(Block { address: aligned + bytes, bytes: start + slack - aligned });
    // SAFETY: what is left of the mapping. The advice changes how fast it is, not what it holds; where it is refused,
    // ordinary pages serve.
    let _ = unsafe { madvise(aligned as *mut c_void, bytes, Advice::LinuxHugepage) };
    aligned as *mut u8
}

fn unmap(block: Block) {
    if block.bytes > 0 {
        // SAFETY: whole pages of a mapping of ours that nobody uses. Where it fails they are lost, and nothing else.
        let _ = unsafe { munmap(block.address as *mut c_void, block.bytes) };
    }
}
