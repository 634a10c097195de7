//! Decoder architectures over shared layers. Single-device: no ranks, tiers or formats in here.
//!
//! # Layout
//! - [`arch`]: one file per architecture family, one registry.
//! - [`layers`]: linear (dense, packed, LoRA), norm, embedding, head, attention, gated MLP.
//! - [`source`]: [`WeightSource`], where a block gets its layers from; recorders and loaders.
//! - [`panels`]: opens models, and knows how bundles store matrices.
//! - [`rope`]: RoPE frequencies for every scaling in use.
//! - [`context`]: [`AttentionContext`], how a block reaches its keys and values; the training one.
//! - [`device`]: the one place that opens a device.
//!
//! # Invariants
//! The caller owns the loop over transformer blocks:
//! ```text
//! let mut x = embedding.forward(ids);
//! for i in 0..arch.num_blocks() { x = arch.block(i, source)?.forward(x, &mut context); }
//! let logits = head.logits(x);
//! ```
//! Training and inference run exactly these lines with different sources and contexts.
#![forbid(unsafe_code)]

pub mod arch;
pub mod context;
pub mod device;
pub mod layers;
pub mod panels;
pub mod rope;
pub mod source;

mod error;

pub use arch::{Architecture, Block, architecture};
pub use context::{AttentionContext, DocumentContext, RowPosition};
pub use error::Error;
pub use hearth_kernels::{AttentionSpec, PackedMatrix, RotaryTable};
pub use layers::{Embedding, Head, Linear, Lora, Matrix};
pub use panels::open;
pub use source::{Group, ParamSpec, WeightSource, params, uses};
