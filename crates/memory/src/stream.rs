//! Bytes on a disk, worked on tile by tile while the neighbours travel.
//!
//! - [`update_tiles`]: read, change, write back: the optimizer's step over state that memory cannot hold.
//! - [`Prefetcher`]: a scripted sequence of ranges, read ahead of its use: parameters, block by block.
//!
//! Neither needs a thread of its own where the kernel has io_uring. An error names the file, the offset and the length,
//! and comes up in the caller's thread; whatever happens, no transfer outlives the call and every buffer comes back.

mod prefetch;
mod tiles;

pub use prefetch::{Ahead, Lease, Prefetcher};
pub use tiles::{Throughput, Update, update_tiles};
