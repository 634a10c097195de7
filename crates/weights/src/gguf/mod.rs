//! GGUF files, versions 2 and 3.
//!
//! ```text
//! "GGUF" | u32 version | u64 tensor count | u64 key count | keys | tensor table | padding | tensor bytes
//! ```
//! - `parse`: the header as it is;
//! - `source`: tensors under canonical names, rows in canonical order;
//! - `rows`: the q/k row order of `llama` files; - `writer`: files llama.cpp reads.

mod parse;
mod rows;
mod source;
mod writer;

pub use parse::{Gguf, Tensor, Value};
pub use source::GgufSource;
pub use writer::{GgufHeader, GgufWriter, WriteValue};
