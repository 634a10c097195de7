//! Weights on the card.

use super::Shape;
use super::workspace::Input;
use crate::ops::gemm::{self, gemm_nt};
use crate::ops::pointwise::add;
use crate::ops::quant::{self, Format};
use crate::runtime::{DeviceBuffer, Error, Stream, ViewMut};
use hearth_memory::Kind;
use std::borrow::Cow;

/// A matrix as the host has it, row by row.
pub enum HostMatrix<'a> {
    /// Numbers.
    F32(Cow<'a, [f32]>),
    /// Blocks as they lie in files.
    Blocks {
        /// Their format.
        format: &'static Format,
        /// The blocks.
        bytes: Cow<'a, [u8]>,
    },
}

/// Where weights come from, by their Hugging Face names without `.weight` or `.bias`.
pub trait Source<E> {
    /// A matrix `[rows, columns]`.
    ///
    /// # Errors
    /// When it is missing or of another shape.
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<HostMatrix<'_>, E>;

    /// A norm's weights, `[len]`; `None` where the model has no such norm.
    ///
    /// # Errors
    /// When it is missing or of another shape.
    fn norm(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, E>;

    /// A linear layer's bias, `[len]`; `None` where it has none.
    ///
    /// # Errors
    /// When it is of another shape.
    fn bias(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, E>;
}

/// A linear layer.
pub(super) struct Matrix {
    values: Values,
    bias: Option<DeviceBuffer<f32>>,
    rows: usize,
    columns: usize,
}

enum Values {
    F32(DeviceBuffer<f32>),
    Blocks(&'static Format, DeviceBuffer<u8>),
}

impl Matrix {
    fn load<E: From<Error>>(
        stream: &Stream,
        source: &mut dyn Source<E>,
        name: &str,
        [rows, columns]: [usize; 2],
    ) -> Result<Self, E> {
        let values = match source.matrix(name, [rows, columns])? {
            HostMatrix::F32(values) => {
                length("a matrix", values.len(), rows * columns)?;
                Values::F32(DeviceBuffer::from_host(stream, Kind::Weights, &values)?)
            }
            HostMatrix::Blocks { format, bytes } => {
                let needed = format.bytes_of(rows, columns).ok_or_else(|| Error::Value {
                    op: "load",
                    argument: "columns",
                    value: columns,
                    limit: format!("a multiple of {}", format.values),
                })?;
                length("a matrix of blocks", bytes.len(), needed)?;
                Values::Blocks(format, DeviceBuffer::from_host(stream, Kind::Weights, &bytes)?)
            }
        };
        let bias = source.bias(name, rows)?;
        let bias = bias.map(|bias| upload(stream, "a bias", &bias, rows)).transpose()?;
        Ok(Self { values, bias, rows, columns })
    }

    /// Whether it multiplies 8-bit activations.
    pub fn is_quantized(&self) -> bool {
        matches!(self.values, Values::Blocks(..))
    }

    /// `y = x·wᵀ + b`. `x`: `[m, columns]`, `y`: `[m, rows]`.
    pub fn multiply(
        &self,
        stream: &Stream,
        x: Input<'_>,
        m: usize,
        mut y: ViewMut<'_, f32>,
    ) -> Result<(), Error> {
        let (rows, columns) = (self.rows, self.columns);
        match (&self.values, &x.quantized) {
            (Values::F32(w), _) => {
                let shape = gemm::Shape { m, n: rows, k: columns };
                gemm_nt(stream, x.values, w.all(), shape, false, y.again())?;
            }
            (Values::Blocks(format, bytes), Some(x)) => {
                let w = quant::Matrix { bytes: bytes.all(), format, rows, columns };
                quant::product(stream, w, x, m, y.again())?;
            }
            (Values::Blocks(..), None) => {
                unreachable!("whoever multiplies a quantized matrix quantizes for it")
            }
        }
        self.bias.as_ref().map_or(Ok(()), |bias| add(stream, bias.all(), y))
    }
}

/// A transformer block.
pub(super) struct Layer {
    pub attention_norm: DeviceBuffer<f32>,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    pub qk_norm: Option<(DeviceBuffer<f32>, DeviceBuffer<f32>)>,
    pub mlp_norm: DeviceBuffer<f32>,
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
}

impl Layer {
    pub fn load<E: From<Error>>(
        stream: &Stream,
        shape: &Shape,
        i: usize,
        source: &mut dyn Source<E>,
    ) -> Result<Self, E> {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let (outer, inner, d) = (shape.hidden, shape.inner, shape.head_dim);
        let (q_len, kv_len) = (shape.heads * d, shape.kv_heads * d);
        let mut matrix = |part: &str, shape| Matrix::load(stream, source, &at(part), shape);
        let (q, k) =
            (matrix("self_attn.q_proj", [q_len, outer])?, matrix("self_attn.k_proj", [kv_len, outer])?);
        let (v, o) =
            (matrix("self_attn.v_proj", [kv_len, outer])?, matrix("self_attn.o_proj", [outer, q_len])?);
        let (gate, up) = (matrix("mlp.gate_proj", [inner, outer])?, matrix("mlp.up_proj", [inner, outer])?);
        let down = matrix("mlp.down_proj", [outer, inner])?;
        let q_norm = norm(stream, source, &at("self_attn.q_norm"), d)?;
        let k_norm = norm(stream, source, &at("self_attn.k_norm"), d)?;
        Ok(Self {
            attention_norm: required(stream, source, &at("input_layernorm"), outer)?,
            q,
            k,
            v,
            o,
            qk_norm: q_norm.zip(k_norm),
            mlp_norm: required(stream, source, &at("post_attention_layernorm"), outer)?,
            gate,
            up,
            down,
        })
    }
}

/// The final norm and the output matrix.
pub(super) struct Head {
    pub norm: DeviceBuffer<f32>,
    pub matrix: Matrix,
}

impl Head {
    pub fn load<E: From<Error>>(
        stream: &Stream,
        shape: &Shape,
        source: &mut dyn Source<E>,
    ) -> Result<Self, E> {
        let matrix = Matrix::load(stream, source, "lm_head", [shape.vocab, shape.hidden])?;
        Ok(Self { norm: required(stream, source, "model.norm", shape.hidden)?, matrix })
    }
}

fn norm<E: From<Error>>(
    stream: &Stream,
    source: &mut dyn Source<E>,
    name: &str,
    len: usize,
) -> Result<Option<DeviceBuffer<f32>>, E> {
    let values = source.norm(name, len)?;
    Ok(values.map(|values| upload(stream, "a norm", &values, len)).transpose()?)
}

fn required<E: From<Error>>(
    stream: &Stream,
    source: &mut dyn Source<E>,
    name: &str,
    len: usize,
) -> Result<DeviceBuffer<f32>, E> {
    let missing = Error::Length { op: "load", argument: "a norm", len: 0, needed: len };
    norm(stream, source, name, len)?.ok_or_else(|| missing.into())
}

fn upload(
    stream: &Stream,
    argument: &'static str,
    values: &[f32],
    needed: usize,
) -> Result<DeviceBuffer<f32>, Error> {
    length(argument, values.len(), needed)?;
    DeviceBuffer::from_host(stream, Kind::Weights, values)
}

fn length(argument: &'static str, len: usize, needed: usize) -> Result<(), Error> {
    if len == needed { Ok(()) } else { Err(Error::Length { op: "load", argument, len, needed }) }
}
