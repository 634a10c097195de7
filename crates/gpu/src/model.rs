//! A model's files, decoded on a card.

use crate::Error;
use hearth_cuda::decoder::weights::{HostMatrix, Source};
use hearth_cuda::decoder::{Capacity, Decoder, Row, Shape};
use hearth_cuda::ops::paged::CacheElement;
use hearth_cuda::ops::quant::{FORMATS, Format};
use hearth_cuda::runtime::Device;
use hearth_model::RowPosition;
use hearth_model::rope::Rope;
use hearth_weights::{ModelConfig, ModelFiles, TensorSource, source::decode};
use std::borrow::Cow;
use std::sync::Arc;

/// A model on a card, with a KV cache of `T`. Its embedding stays on the host: a step needs one row of it per token.
pub struct CardModel<'a, T> {
    files: &'a ModelFiles,
    decoder: Decoder<T>,
    rope: Rope,
}

/// A token of a sequence to compute.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Its id.
    pub id: u32,
    /// Tokens before it.
    pub position: usize,
    /// Length that dynamic RoPE scaling sees.
    pub length: usize,
    /// Its sequence's KV blocks.
    pub table: &'a [u32],
}

impl<'a, T: CacheElement> CardModel<'a, T> {
    /// Uploads a model's weights as they lie in their files: block formats as blocks, everything else as f32.
    ///
    /// # Errors
    /// [`Error::Architecture`] for another architecture, [`Error::Weights`] for files that do not hold what the
    /// configuration asks for, [`Error::Card`] when the budget does not hold them.
    pub fn load(device: &Arc<Device>, files: &'a ModelFiles, capacity: Capacity) -> Result<Self, Error> {
        check_architecture(&files.config)?;
        let decoder = Decoder::new(device, shape_of(&files.config), capacity, &mut Files { files })?;
        Ok(Self { files, decoder, rope: Rope::new(&files.config) })
    }

    /// Whether steps are recorded and sent with one launch.
    pub fn record(&mut self, records: bool) {
        self.decoder.record(records);
    }

    /// Computes tokens and gives the logits that follow each: `[tokens, vocab]`.
    ///
    /// # Errors
    /// [`Error::Token`], [`Error::Card`].
    pub fn step(&mut self, tokens: &[Token<'_>]) -> Result<Vec<f32>, Error> {
        let embeddings = tokens.iter().map(|token| self.embed(token.id)).collect::<Result<Vec<_>, _>>()?;
        let place = |token: &Token<'_>| RowPosition {
            position: token.position as u32,
            length: token.length.max(token.position + 1) as u32,
        };
        let rotations = self.rope.table(&tokens.iter().map(place).collect::<Vec<_>>());
        let half = rotations.half();
        let mut rows = Vec::with_capacity(tokens.len());
        for (i, token) in tokens.iter().enumerate() {
            rows.push(Row {
                embedding: &embeddings[i],
                position: token.position,
                cos: &rotations.cos()[i * half..][..half],
                sin: &rotations.sin()[i * half..][..half],
                table: token.table,
            });
        }
        Ok(self.decoder.step(&rows)?)
    }

    /// One row of the embedding.
    fn embed(&self, token: u32) -> Result<Vec<f32>, Error> {
        let config = &self.files.config;
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        if token as usize >= vocab {
            return Err(Error::Token { token, vocab });
        }
        let meta = self.files.expect("model.embed_tokens.weight", &[vocab, width])?;
        let row_bytes = width / meta.format.block_len() * meta.format.block_bytes();
        let bytes = self.files.tensors.bytes(&meta.name)?;
        Ok(decode(meta.format, &bytes[token as usize * row_bytes..][..row_bytes]))
    }
}

/// What [`Decoder`] computes: pre-norm blocks with RMSNorm and a SiLU gate.
pub(crate) const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

pub(crate) fn check_architecture(config: &ModelConfig) -> Result<(), Error> {
    match MODEL_TYPES.contains(&config.model_type.as_str()) {
        true => Ok(()),
        false => {
            Err(Error::Architecture { model_type: config.model_type.clone(), known: MODEL_TYPES.join(", ") })
        }
    }
}

pub(crate) fn shape_of(config: &ModelConfig) -> Shape {
    Shape {
        hidden: config.hidden_size,
        inner: config.intermediate_size,
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        vocab: config.vocab_size,
        eps: config.rms_norm_eps,
        windows: config.sliding_window.iter().map(|window| window.unwrap_or(0)).collect(),
    }
}

/// Weights by their names in files.
pub(crate) struct Files<'a> {
    pub files: &'a ModelFiles,
}

impl Files<'_> {
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        self.files.expect(name, &[len])?;
        Ok(self.files.tensors.read_f32(name)?)
    }
}

impl Source<Error> for Files<'_> {
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<HostMatrix<'_>, Error> {
        let name = match name {
            "lm_head" if self.files.config.tie_word_embeddings => "model.embed_tokens.weight".to_owned(),
            other => format!("{other}.weight"),
        };
        let meta = self.files.expect(&name, &shape)?;
        if meta.format.block_len() == 1 {
            return Ok(HostMatrix::F32(Cow::Owned(self.files.tensors.read_f32(&name)?)));
        }
        let format = Format::by_name(meta.format.name()).ok_or_else(|| Error::Format {
            name: name.clone(),
            format: meta.format.name(),
            known: FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", "),
        })?;
        Ok(HostMatrix::Blocks { format, bytes: self.files.tensors.bytes(&name)? })
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        let of_heads = name.ends_with("q_norm") || name.ends_with("k_norm");
        if of_heads && !self.files.config.qk_norm {
            return Ok(None);
        }
        self.vector(&format!("{name}.weight"), len).map(Some)
    }

    fn bias(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        let config = &self.files.config;
        let has = match name.rsplit('.').next() {
            Some("q_proj" | "k_proj" | "v_proj") => config.qkv_bias,
            Some("o_proj") => config.attention_out_bias,
            Some("gate_proj" | "up_proj" | "down_proj") => config.mlp_bias,
            _ => false,
        };
        has.then(|| self.vector(&format!("{name}.bias"), len)).transpose()
    }
}
