//! Byte budgets and the ledger that keeps them.
//!
//! # Layout
//! - [`size`]: [`Size`], a number of bytes as users write it: `600MiB`, `2GiB`.
//! - [`tier`]: [`Tier`], where bytes lie; [`tier::Storage`], entries by key in host memory or on a disk.
//! - [`kind`]: [`Kind`], what bytes are used for.
//! - [`budget`]: [`Budget`], the hard limit of each tier: `device=600MiB,host=1GiB`.
//! - [`ledger`]: [`Ledger`], who holds which bytes; refuses what does not fit.
//! - [`buffer`]: [`AlignedBuffer`], memory that a disk writes into directly.
//! - [`nvme`]: [`NvmeFile`], a file past the page cache; io_uring, or positioned I/O where there is none.
//! - [`heap`]: what the process really allocates, to hold against the ledger.
//! - [`probe`]: what this machine's disk and memory can do.
//! - [`stream`]: tiles that are read, changed and written back, and blocks that are read ahead of their use.
//!
//! # Invariants
//! This crate counts and moves bytes, never tensors. A large allocation is charged *before* it is made and
//! refunded when its [`Charge`] is dropped, so that the sum of live charges never exceeds the budget.
#![deny(unsafe_code)]

pub mod budget;
pub mod buffer;
pub mod heap;
pub mod kind;
pub mod ledger;
pub mod nvme;
pub mod probe;
pub mod size;
pub mod stream;
pub mod tier;

mod error;
#[cfg(target_os = "linux")]
mod reuse;

pub use budget::Budget;
pub use buffer::AlignedBuffer;
pub use error::Error;
pub use kind::Kind;
pub use ledger::{Charge, Ledger};
pub use nvme::NvmeFile;
pub use size::Size;
pub use tier::Tier;
