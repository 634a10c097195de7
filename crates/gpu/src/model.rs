//! A model's files, decoded on a card.

use crate::Error;
use hearth_cuda::decoder::weights::{HostMatrix, Source};
use hearth_cuda::decoder::{Capacity, Decoder, EachRow, Move, Part, Shape, Wanted};
use hearth_cuda::ops::paged::CacheElement;
use hearth_cuda::ops::quant::{FORMATS, Format};
use hearth_cuda::runtime::Device;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::rope::Rope;
use hearth_model::{Group, RotaryTable, RowPosition, architecture, uses};
use hearth_weights::{FormatRef, ModelConfig, ModelFiles, TensorSource, source::decode};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// A model on a card, with a KV cache of `T`. Its embedding stays on the host: a step needs one row of it per token.
pub struct CardModel<T> {
    decoder: Decoder<T>,
    embedding: HostTable,
    rope: Rope,
}

/// Consecutive tokens of a sequence to compute.
#[derive(Clone, Debug)]
pub struct Span<'a> {
    /// Their ids.
    pub tokens: &'a [u32],
    /// Tokens before the first.
    pub position: usize,
    /// The least length that dynamic RoPE scaling sees.
    pub length: usize,
    /// The sequence's KV blocks.
    pub table: &'a [u32],
    /// Which of them something is wanted of.
    pub wanted: Range<usize>,
    /// What that is.
    pub what: Wanted,
}

impl<T: CacheElement> CardModel<T> {
    /// Uploads a model's weights as they lie in their files: block formats as blocks, everything else as f32. The ledger's
    /// host tier is charged for the embedding.
    ///
    /// # Errors
    /// [`Error::Architecture`] for another architecture, [`Error::Weights`] for files that do not hold what the
    /// configuration asks for, [`Error::Card`] when the budget does not hold them.
    pub fn load(device: &Arc<Device>, files: &ModelFiles, capacity: Capacity) -> Result<Self, Error> {
        check_architecture(&files.config)?;
        let embedding = HostTable::read(files, device.ledger())?;
        let decoder = Decoder::new(device, shape_of(&files.config), capacity, &mut Files { files })?;
        Ok(Self { decoder, embedding, rope: Rope::new(&files.config) })
    }

    /// Whether steps are recorded and sent with one launch.
    pub fn record(&mut self, records: bool) {
        self.decoder.record(records);
    }

    /// Copies KV blocks between card and host, in order, before the next step.
    ///
    /// # Errors
    /// [`Error::Card`].
    pub fn move_blocks(&mut self, moves: &[Move]) -> Result<(), Error> {
        Ok(self.decoder.move_blocks(moves)?)
    }

    /// Why copies are slower than they could be, if they are.
    pub fn refusal(&self) -> Option<&str> {
        self.decoder.refusal()
    }

    /// Computes tokens and hands over what is wanted of them: index of the span, index of the token in it, the values.
    ///
    /// # Errors
    /// [`Error::Token`], [`Error::Card`].
    pub fn step(&mut self, spans: &[Span<'_>], each: &mut EachRow<'_>) -> Result<(), Error> {
        let inputs = spans.iter().map(|span| self.inputs(span)).collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<Part<'_>> = spans
            .iter()
            .zip(&inputs)
            .map(|(span, (embeddings, rotations))| Part {
                embeddings,
                position: span.position,
                cos: rotations.cos(),
                sin: rotations.sin(),
                table: span.table,
                wanted: span.wanted.clone(),
                what: span.what,
            })
            .collect();
        Ok(self.decoder.step(&parts, each)?)
    }

    /// Embeddings and rotations of a span.
    fn inputs(&self, span: &Span<'_>) -> Result<(Vec<f32>, RotaryTable), Error> {
        let mut embeddings = Vec::with_capacity(span.tokens.len() * self.embedding.width);
        for &token in span.tokens {
            embeddings.extend(self.embedding.row(token)?);
        }
        let place = |i: usize| {
            let position = span.position + i;
            RowPosition { position: position as u32, length: span.length.max(position + 1) as u32 }
        };
        let places: Vec<RowPosition> = (0..span.tokens.len()).map(place).collect();
        Ok((embeddings, self.rope.table(&places)))
    }
}

/// The embedding's rows in host memory, as they lie in their file.
struct HostTable {
    bytes: Vec<u8>,
    format: FormatRef,
    vocab: usize,
    width: usize,
    _charge: Charge,
}

const EMBEDDING: &str = "model.embed_tokens.weight";

impl HostTable {
    fn read(files: &ModelFiles, ledger: &Ledger) -> Result<Self, Error> {
        let (vocab, width) = (files.config.vocab_size, files.config.hidden_size);
        let format = files.expect(EMBEDDING, &[vocab, width])?.format;
        let row_bytes = width / format.block_len() * format.block_bytes();
        let charge = ledger.charge(Tier::Host, Kind::Weights, (vocab * row_bytes) as u64)?;
        let bytes = files.tensors.bytes(EMBEDDING)?.into_owned();
        Ok(Self { bytes, format, vocab, width, _charge: charge })
    }

    fn row(&self, token: u32) -> Result<Vec<f32>, Error> {
        let row_bytes = self.bytes.len() / self.vocab;
        let row = self.bytes.chunks_exact(row_bytes).nth(token as usize);
        let row = row.ok_or(Error::Token { token, vocab: self.vocab })?;
        Ok(decode(self.format, row))
    }
}

/// Bytes of a model's weights on a card.
///
/// # Errors
/// As [`CardModel::load`], all that can be known from the files' headers.
pub fn weight_bytes(files: &ModelFiles) -> Result<u64, Error> {
    check_architecture(&files.config)?;
    let architecture = architecture(&files.config)?;
    let groups = (0..architecture.num_blocks()).map(Group::Block).chain([Group::Head]);
    let mut bytes = 0;
    for spec in groups.flat_map(|group| uses(architecture.as_ref(), group)) {
        let format = files.expect(&spec.name, &spec.shape)?.format;
        bytes += match format.block_len() {
            1 => spec.len() * size_of::<f32>(),
            values => spec.len() / values * format.block_bytes(),
        };
    }
    Ok(bytes as u64)
}

/// Whether some of a model's matrices multiply 8-bit activations.
pub fn is_quantized(files: &ModelFiles) -> bool {
    files.tensors.tensors().iter().any(|tensor| tensor.format.block_len() > 1)
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
