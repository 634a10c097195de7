//! CUDA kernels as sources, and what turns them into code for the card at hand.
//!
//! # Layout
//! - `*.cu` beside this crate's manifest: the kernels, one idea per file; `*.cuh`: what they share. No header of
//!   CUDA's is included: users have a driver and NVRTC, not a toolkit.
//! - [`sources`]: those files, carried in the binary.
//! - [`nvrtc`]: the compiler, found at run time.
//! - [`cache`]: what it made, in the user's cache.
//! - [`driver`]: which cards there are.
//! - [`runtime`]: a card's memory, streams and code; copies that overlap with computing.
//! - [`ops`]: the kernels as functions.
//! - [`decoder`]: a Llama-shaped model whose weights and KV cache lie on a card.
//! - [`trainer`]: such a model trained on a card, optimizer state and blocks on the host where they do not fit.
//! - [`usage`]: registers, spills and shared memory of each kernel, out of the compiler's log.
//! - `tests/emulated/`: the same sources compiled as C++ and run on the CPU; `stand-in/`: a driver made of them, which
//!   tests what launches them.
//!
//! # Invariants
//! - Every kernel is compiled with [`nvrtc::OPTIONS`], whatever the card: nothing is contracted, so the emulation on the
//!   CPU computes the bits of the GPU wherever no tensor core takes part.
//! - No kernel adds floats atomically: a result depends on its inputs alone, and a row on no other row.

pub mod cache;
pub mod decoder;
pub mod driver;
pub mod nvrtc;
pub mod ops;
pub mod runtime;
pub mod sources;
pub mod trainer;
pub mod usage;

/// What may lie on a card: any type whose bits are all values.
pub use bytemuck::{Pod, bytes_of};

/// Architectures that every kernel is compiled for in CI: Ampere (data centre and consumer), Ada, Hopper, Blackwell.
pub const ARCHITECTURES: &[&str] = &["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a"];
