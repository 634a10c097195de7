//! Tensors by canonical name, read one at a time.

use crate::config::ModelConfig;
use crate::quant::FormatRef;
use std::borrow::Cow;
use std::path::PathBuf;

/// What a file says about one tensor.
#[derive(Clone)]
pub struct TensorMeta {
    /// Canonical (Hugging Face) name.
    pub name: String,
    /// Row-major shape, outermost first: `[out, in]` for a linear weight.
    pub shape: Vec<usize>,
    /// Storage format of the bytes [`TensorSource::bytes`] returns.
    pub format: FormatRef,
}

/// A set of named tensors that can be read lazily. Implementations are cheap to hold: memory-mapped files.
pub trait TensorSource: Send + Sync {
    /// Every tensor, sorted by name.
    fn tensors(&self) -> &[TensorMeta];
    /// The tensor's bytes in its own storage format, rows in canonical order.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, crate::Error>;
    /// The tensor decoded to f32.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>, crate::Error>;
}

/// A model on disk, opened.
pub struct ModelFiles {
    /// Where it was opened from.
    pub path: PathBuf,
    /// Shape and constants.
    pub config: ModelConfig,
    /// `config.json` as a JSON object for writing HF directories; synthesised for GGUF.
    pub hf_config: serde_json::Map<String, serde_json::Value>,
    /// Weights under canonical names.
    pub tensors: Box<dyn TensorSource>,
    /// Where the tokenizer is to be had.
    pub tokenizer: TokenizerFiles,
    /// Jinja chat template, if the model has one.
    pub chat_template: Option<String>,
}

/// Where a model's tokenizer is to be had.
pub enum TokenizerFiles {
    /// `tokenizer.json`, with `tokenizer_config.json` / `special_tokens_map.json` beside it where present.
    Json {
        /// Path of `tokenizer.json`.
        path: PathBuf,
    },
    /// Vocabulary inside a GGUF file.
    Gguf(Box<GgufVocabulary>),
    /// The model has none; only token ids can be used.
    None,
}

/// `tokenizer.ggml.*` metadata, unchanged.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (SentencePiece BPE), …
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer.
    pub pre: Option<String>,
    /// Token strings by id.
    pub tokens: Vec<String>,
    /// Scores by id (SentencePiece).
    pub scores: Vec<f32>,
    /// Token types by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// BPE merges, `"left right"`.
    pub merges: Vec<String>,
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Unknown.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether encoding starts with BOS.
    pub add_bos: Option<bool>,
    /// Whether encoding ends with EOS.
    pub add_eos: Option<bool>,
    /// Whether SentencePiece puts a space first.
    pub add_space_prefix: Option<bool>,
}
