//! Tensors at rest: every file a language model comes in, read lazily under one set of names.
//!
//! # Layout
//! - [`config`]: one [`config::ModelConfig`], from HF `config.json` (both dialects) or GGUF metadata.
//! - [`source`]: [`source::TensorSource`], tensors by canonical name, read one at a time.
//! - [`safetensors`], [`gguf`], [`torch_bin`]: the three file families.
//! - [`quant`]: storage formats (`f32` … `q6_k`), one file each, one registry.
//! - [`mod@encode`]: a tensor in another format than its own; which tensors get which.
//! - [`key_map`]: GGUF names and permutations → HF names, one table per architecture.
//! - [`mod@open`]: a path (HF directory, `.gguf`, bundle) → [`source::ModelFiles`].
//! - [`hf_dir`]: HF directories, written.
//! - [`bundle`]: the serving artifact: writer (complete or invisible) and verified reader.
//! - [`adapter`], [`merge`]: LoRA adapters in PEFT's layout, and folded into base tensors.
//!
//! # Invariants
//! Files are hostile: every length and offset is checked before it is used to allocate or to slice.
//! Nothing here executes anything found in a file. Outputs are complete or invisible: written beside their
//! destination, made durable, renamed; nothing is overwritten. `unsafe` stands in `mapped` alone.
//!
//! # Example
//! ```no_run
//! use hearth_weights::{BundleWriter, TensorMeta, encode, open, quant, storage_format};
//!
//! # fn main() -> Result<(), hearth_weights::Error> {
//! let model = open("SmolLM2-135M-Instruct.gguf".as_ref())?;
//! let mut bundle = BundleWriter::create("smollm2-q4".as_ref())?;
//! bundle.model_files(&model)?;
//! for meta in model.tensors.tensors() {
//!     let format = storage_format(meta, Some(quant::Q4_0));
//!     let mut bytes = Vec::new();
//!     encode(&*model.tensors, &meta.name, format, &mut bytes)?;
//!     bundle.tensor(&TensorMeta { format, ..meta.clone() }, &bytes)?;
//! }
//! bundle.finish()
//! # }
//! ```
#![deny(unsafe_code)]

pub mod adapter;
pub mod bundle;
pub mod config;
pub mod encode;
mod error;
pub mod gguf;
pub mod hf_dir;
pub mod key_map;
mod mapped;
pub mod merge;
pub mod open;
pub mod quant;
mod renamed;
pub mod safetensors;
pub mod source;
mod staged;
pub mod torch_bin;
mod vocabulary;

pub use adapter::{Adapter, AdapterSpec, open_adapter, write_adapter};
pub use bundle::{BundleWriter, Layout};
pub use config::{ModelConfig, RopeConfig, RopeScaling};
pub use encode::{encode, storage_format};
pub use error::Error;
pub use gguf::{GgufHeader, GgufWriter};
pub use hf_dir::HfWriter;
pub use merge::Merged;
pub use open::{open, open_with};
pub use quant::{Format, FormatRef};
pub use safetensors::SafetensorsWriter;
pub use source::{FileRange, GgufVocabulary, Image, ModelFiles, TensorMeta, TensorSource, TokenizerFiles};
