//! Tensors by canonical name, read one at a time.

use crate::Error;
use crate::config::ModelConfig;
use crate::quant::{self, FormatRef};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a file says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    /// Canonical (Hugging Face) name.
    pub name: String,
    /// Row-major shape, outermost first: `[out, in]` for a linear weight.
    pub shape: Vec<usize>,
    /// Storage format of the bytes [`TensorSource::bytes`] returns.
    pub format: FormatRef,
}

impl TensorMeta {
    /// Number of elements. Sources only hand out shapes whose product fits.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in storage. Sources only hand out shapes of whole blocks.
    pub fn byte_len(&self) -> usize {
        self.elements() / self.format.block_len() * self.format.block_bytes()
    }
}

/// Where a tensor's bytes lie in a file, in its own storage format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// The file.
    pub path: PathBuf,
    /// From the first byte to after the last.
    pub range: Range<u64>,
}

/// A tensor in a layout of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// What the layout is called.
    pub layout: &'static str,
    /// As in the file.
    pub bytes: &'a [u8],
    /// Where in the file.
    pub place: FileRange,
}

/// A set of named tensors that can be read lazily. Implementations are cheap to hold: memory-mapped files.
pub trait TensorSource: Send + Sync {
    /// Every tensor, sorted by name.
    fn tensors(&self) -> &[TensorMeta];

    /// The tensor's bytes in its own storage format, rows in canonical order.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::Tensor`] when it is stored in a way hearth does not read.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error>;

    /// Says that the tensor's bytes will not be wanted again soon, so that walking through a model does not leave
    /// all of it resident. Reading it again still works.
    fn release(&self, _name: &str) {}

    /// Where exactly the bytes lie that [`TensorSource::bytes`] gives, for those who read them past the page cache.
    /// `None` when they are put together on the way, or lie in no file.
    fn place(&self, _name: &str) -> Option<FileRange> {
        None
    }

    /// The tensor as it lies in the file where that is a [`Layout`](crate::Layout) of its own, and the layout's name;
    /// [`TensorSource::bytes`] puts it back into rows then.
    fn image(&self, _name: &str) -> Option<Image<'_>> {
        None
    }

    /// File or directory the tensors come from, for messages.
    fn origin(&self) -> &Path {
        Path::new("(memory)")
    }

    /// What the source says about one tensor.
    ///
    /// # Errors
    /// As [`TensorSource::bytes`].
    fn meta(&self, name: &str) -> Result<&TensorMeta, Error> {
        find(self.tensors(), name).ok_or_else(|| missing(self.origin(), self.tensors(), name))
    }

    /// The tensor decoded to f32.
    ///
    /// # Errors
    /// As [`TensorSource::bytes`].
    fn read_f32(&self, name: &str) -> Result<Vec<f32>, Error> {
        let format = self.meta(name)?.format;
        Ok(decode(format, &self.bytes(name)?))
    }
}

macro_rules! forward {
    ($($pointer:ty),*) => {$(
        impl<T: TensorSource + ?Sized> TensorSource for $pointer {
            fn tensors(&self) -> &[TensorMeta] {
                (**self).tensors()
            }
            fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
                (**self).bytes(name)
            }
            fn release(&self, name: &str) {
                (**self).release(name);
            }
            fn place(&self, name: &str) -> Option<FileRange> {
                (**self).place(name)
            }
            fn image(&self, name: &str) -> Option<Image<'_>> {
                (**self).image(name)
            }
            fn origin(&self) -> &Path {
                (**self).origin()
            }
            fn meta(&self, name: &str) -> Result<&TensorMeta, Error> {
                (**self).meta(name)
            }
            fn read_f32(&self, name: &str) -> Result<Vec<f32>, Error> {
                (**self).read_f32(name)
            }
        }
    )*};
}
forward!(Box<T>, Arc<T>, &T);

/// Elements decoded by one task; a multiple of every block length.
const DECODE_CHUNK: usize = 1 << 16;

/// Decodes whole blocks to f32, on all cores.
pub fn decode(format: FormatRef, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0f32; bytes.len() / format.block_bytes() * format.block_len()];
    let chunk_bytes = DECODE_CHUNK / format.block_len() * format.block_bytes();
    out.par_chunks_mut(DECODE_CHUNK)
        .zip(bytes.par_chunks(chunk_bytes))
        .for_each(|(values, bytes)| format.dequantize(bytes, values));
    out
}

/// Looks a name up in a sorted table.
pub(crate) fn find<'a>(sorted: &'a [TensorMeta], name: &str) -> Option<&'a TensorMeta> {
    position(sorted, name).map(|i| &sorted[i])
}

pub(crate) fn position(sorted: &[TensorMeta], name: &str) -> Option<usize> {
    sorted.binary_search_by(|meta| meta.name.as_str().cmp(name)).ok()
}

/// The error for a name no table has, with the nearest one it does have.
pub(crate) fn missing(origin: &Path, sorted: &[TensorMeta], name: &str) -> Error {
    let nearest = sorted
        .iter()
        .map(|meta| (strsim::damerau_levenshtein(name, &meta.name), meta.name.as_str()))
        .min()
        .filter(|(distance, _)| *distance <= 6);
    Error::MissingTensor {
        path: origin.to_owned(),
        tensor: name.to_owned(),
        hint: nearest.map(|(_, n)| format!("; the nearest name there is {n}")).unwrap_or_default(),
    }
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

impl ModelFiles {
    /// What the files say about a tensor the model needs in this shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::WrongShape`] or [`Error::Tensor`], naming file and tensor.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&TensorMeta, Error> {
        let meta = self.tensors.meta(name)?;
        if meta.shape == shape {
            return Ok(meta);
        }
        Err(Error::WrongShape {
            path: self.path.clone(),
            tensor: name.to_owned(),
            found: meta.shape.clone(),
            expected: shape.to_vec(),
        })
    }

    /// The commonest float format among the matrices (`f32` when they are all quantized): what the model's
    /// author thought enough.
    pub fn float_format(&self) -> FormatRef {
        let count = |format: FormatRef| {
            let stored = self.tensors.tensors().iter();
            stored
                .filter(|m| m.format == format && m.shape.len() > 1)
                .map(TensorMeta::elements)
                .sum::<usize>()
        };
        let mut best = (0, quant::F32);
        for format in [quant::F32, quant::BF16, quant::F16] {
            if count(format) > best.0 {
                best = (count(format), format);
            }
        }
        best.1
    }
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
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
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
