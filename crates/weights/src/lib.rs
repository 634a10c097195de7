//! Tensors at rest: every file a language model comes in, read lazily under one set of names.
//!
//! # Layout
//! - [`config`]: one [`config::ModelConfig`], from HF `config.json` (both dialects) or GGUF metadata.
//! - [`source`]: [`source::TensorSource`], tensors by canonical name, read one at a time.
//! - `safetensors`, `gguf`, `torch_bin`: the three file families, one file each.
//! - [`quant`]: storage formats (`f32` … `q6_k`), one file each, one registry.
//! - `key_map`: GGUF names and permutations → HF names, one table per architecture.
//! - `open`: a path (HF directory, `.gguf`, bundle) → [`source::ModelFiles`].
//! - `bundle`: the serving artifact: writer (complete or invisible) and verified reader.
//! - `merge`: LoRA adapters folded into base tensors.
//!
//! # Invariants
//! Files are hostile: every length and offset is checked before it is used to allocate or to slice.
//! Nothing here executes anything found in a file.
pub mod config;
pub mod encode;
mod error;
pub mod gguf;
pub mod key_map;
mod mapped;
pub mod open;
pub mod quant;
pub mod safetensors;
pub mod source;
mod staged;

pub use config::{ModelConfig, RopeConfig, RopeScaling};
pub use encode::{encode, storage_format};
pub use error::Error;
pub use open::open;
pub use quant::{Format, FormatRef};
pub use source::{GgufVocabulary, ModelFiles, TensorMeta, TensorSource, TokenizerFiles};
