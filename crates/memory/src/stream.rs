//! Bytes on a disk, worked on tile by tile while the neighbours travel.
//!
//! - [`update_tiles`]: read, change, write back: the optimizer's step over state that memory cannot hold.
//!   [`update_parts`]: the same for tiles that lie in several files.
//! - [`Prefetcher`]: a scripted sequence of ranges, read ahead of its use: parameters, block by block.
//! - [`WriteBehind`]: buffers on their way to a file while the caller fills the next one.
//!
//! Neither needs a thread of its own where the kernel has io_uring. An error names the file, the offset and the length,
//! and comes up in the caller's thread; whatever happens, no transfer outlives the call and every buffer comes back.

mod behind;
mod prefetch;
mod tiles;

pub use behind::WriteBehind;
pub use prefetch::{Ahead, Lease, Prefetcher};
pub use tiles::{Access, Part, Throughput, Update, UpdateParts, Written, update_parts, update_tiles};
