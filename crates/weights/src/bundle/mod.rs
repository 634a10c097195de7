//! The serving artifact: one directory, complete or invisible, every byte of it hashed.
//!
//! ```text
//! config.json           as in a Hugging Face directory
//! tokenizer.json …      or vocabulary.json, from a GGUF file
//! chat_template.jinja
//! weights.bin           tensors in execution order, each at a multiple of 4096 bytes, matrices in a [`Layout`]
//! golden.json           prompts with the logits they must give
//! manifest.json         written last: version, length and sha256 of each part, tensor table, its own sha256
//! ```

mod layout;
mod manifest;
mod reader;
mod writer;

pub use layout::Layout;
pub use reader::{BundleSource, golden, is_bundle, open_bundle};
pub use writer::BundleWriter;

/// Tensors start at multiples of this, so that they can be read with direct I/O.
pub const ALIGNMENT: u64 = 4096;
/// The weights.
const WEIGHTS: &str = "weights.bin";
/// Golden prompts.
const GOLDEN: &str = "golden.json";
/// The manifest.
const MANIFEST: &str = "manifest.json";
