//! A Llama-shaped model on a card: packed weights, a paged KV cache, one step of a batch at a time.
//!
//! # Layout
//! - [`weights`]: [`Source`], where weights come from; matrices dense or in a block format as they lie in files.
//! - `workspace`: what a step computes in, made once.
//! - this file: [`Decoder`] and the order of a transformer block.
//!
//! # Invariants
//! - Embedding rows and rotations come from the host: they depend on nothing on the card. Everything else stays there.
//! - All memory is taken when the decoder is made. A row has the same bits alone and in a batch; recorded steps have the
//!   bits of those sent kernel by kernel.

pub mod weights;
mod workspace;

use crate::ops::norm::rms_norm;
use crate::ops::paged::{self, Cache, CacheElement, KV_BLOCK, Query, attention_paged, write_kv};
use crate::ops::pointwise::{Rotations, add, rope, swiglu};
use crate::runtime::{Device, DeviceBuffer, Error, Recorded, Stream};
use hearth_memory::Kind;
use std::collections::HashMap;
use std::sync::Arc;
use weights::{Head, Layer, Source};
use workspace::Workspace;

/// A model's dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Inner width of the MLP.
    pub inner: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the output matrix.
    pub vocab: usize,
    /// RMSNorm's epsilon.
    pub eps: f32,
    /// Keys that a query sees, by transformer block; 0 = all.
    pub windows: Vec<usize>,
}

impl Shape {
    /// Of one transformer block's attention.
    fn attention(&self, layer: usize) -> paged::Shape {
        paged::Shape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            d: self.head_dim,
            scale: (self.head_dim as f32).powf(-0.5),
            window: self.windows[layer],
        }
    }
}

/// How much of it there is.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Rows of a step.
    pub rows: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// KV blocks of 16 tokens, for all sequences.
    pub blocks: usize,
}

/// One row of a step: a token of a sequence. The tokens before it are in the cache or in rows before it.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Its embedding: `[hidden]`.
    pub embedding: &'a [f32],
    /// Tokens before it in its sequence.
    pub position: usize,
    /// Cosines of its rotation: `[head_dim / 2]`.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Its sequence's KV blocks, at least up to its position.
    pub table: &'a [u32],
}

/// A model with its KV cache, whose elements are `T`.
pub struct Decoder<T> {
    shape: Shape,
    capacity: Capacity,
    layers: Vec<Layer>,
    head: Head,
    cache: Vec<(DeviceBuffer<T>, Option<DeviceBuffer<f32>>)>,
    space: Workspace,
    /// A step's kernels, by its number of rows: `None` until they have all been launched once.
    recorded: HashMap<usize, Option<Recorded>>,
    records: bool,
    // Last: what was made with it goes first.
    stream: Stream,
}

impl<T: CacheElement> Decoder<T> {
    /// Takes all memory and uploads the weights.
    ///
    /// # Errors
    /// [`Error::Budget`] when the ledger's device tier does not hold them, and what the source reports.
    pub fn new<E: From<Error>>(
        device: &Arc<Device>,
        shape: Shape,
        capacity: Capacity,
        source: &mut dyn Source<E>,
    ) -> Result<Self, E> {
        let stream = device.stream()?;
        let block = shape.attention(0);
        let layers = (0..shape.windows.len())
            .map(|i| Layer::load(&stream, &shape, i, source))
            .collect::<Result<Vec<_>, E>>()?;
        let head = Head::load(&stream, &shape, source)?;
        let cache = || -> Result<_, Error> {
            let data = DeviceBuffer::zeros(&stream, Kind::KvCache, capacity.blocks * block.block_len())?;
            let scales = capacity.blocks * block.block_scales();
            let scales =
                T::SCALED.then(|| DeviceBuffer::zeros(&stream, Kind::KvCache, scales)).transpose()?;
            Ok((data, scales))
        };
        let cache = (0..layers.len()).map(|_| cache()).collect::<Result<Vec<_>, Error>>()?;
        let space = Workspace::new(&stream, &shape, &capacity)?;
        let recorded = HashMap::new();
        Ok(Self { shape, capacity, layers, head, cache, space, recorded, records: true, stream })
    }

    /// Whether steps are recorded and sent with one launch from the second of a size on; they are unless told otherwise.
    pub fn record(&mut self, records: bool) {
        self.records = records;
    }

    /// Computes rows and waits: logits, `[rows, vocab]`.
    ///
    /// # Errors
    /// [`Error::Value`] for rows that do not fit the capacity, [`Error::Length`] for ones of another shape, [`Error::Lost`].
    pub fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<f32>, Error> {
        let count = rows.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        self.space.upload(&self.stream, &self.shape, &self.capacity, rows)?;
        match self.recorded.get(&count) {
            Some(Some(recorded)) => self.stream.replay(recorded)?,
            known => {
                // Only now is every kernel compiled and loaded, which no recording survives.
                let again = known.is_some() && self.records;
                let recorded = match again {
                    true => Some(self.record_step(count)?),
                    false => None,
                };
                match &recorded {
                    Some(recorded) => self.stream.replay(recorded)?,
                    None => self.send(count)?,
                }
                self.recorded.insert(count, recorded);
            }
        }
        let mut logits = vec![0.0; count * self.shape.vocab];
        self.space.logits.read(&self.stream, &mut logits)?;
        Ok(logits)
    }

    fn record_step(&mut self, count: usize) -> Result<Recorded, Error> {
        let Self { shape, capacity, layers, head, cache, space, stream, .. } = self;
        stream.record(|| send(stream, (shape, capacity), (layers, head), cache, space, count))
    }

    fn send(&mut self, count: usize) -> Result<(), Error> {
        let Self { shape, capacity, layers, head, cache, space, stream, .. } = self;
        send(stream, (shape, capacity), (layers, head), cache, space, count)
    }
}

/// Every kernel of a step. What it reads of the host's was uploaded before.
fn send<T: CacheElement>(
    stream: &Stream,
    (shape, capacity): (&Shape, &Capacity),
    (layers, head): (&[Layer], &Head),
    cache: &mut [(DeviceBuffer<T>, Option<DeviceBuffer<f32>>)],
    space: &mut Workspace,
    count: usize,
) -> Result<(), Error> {
    for (i, (layer, (data, scales))) in layers.iter().zip(cache).enumerate() {
        let mut cache =
            Cache { data: data.all_mut(), scales: scales.as_mut().map(|scales| scales.all_mut()) };
        let attention = shape.attention(i);
        attend(stream, shape, attention, capacity.context, layer, &mut cache, space, count)?;
        feed_forward(stream, shape, layer, space, count)?;
    }
    let Workspace { x, normed, quantized, logits, .. } = space;
    let width = count * shape.hidden;
    rms_norm(stream, x.part(0..width)?, head.norm.all(), shape.eps, normed.part_mut(0..width)?)?;
    let normed = quantized.rows(stream, normed.part(0..width)?, shape.hidden, &[&head.matrix])?;
    head.matrix.multiply(stream, normed, count, logits.part_mut(0..count * shape.vocab)?)
}

/// `x += o(attention(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))))`.
#[allow(clippy::too_many_arguments)]
fn attend<T: CacheElement>(
    stream: &Stream,
    shape: &Shape,
    attention: paged::Shape,
    context: usize,
    layer: &Layer,
    cache: &mut Cache<'_, T>,
    space: &mut Workspace,
    count: usize,
) -> Result<(), Error> {
    let Workspace { x, normed, quantized, q, k, v, heads, parts, queries, tables, cos, sin, .. } = space;
    let (width, half) = (count * shape.hidden, shape.head_dim / 2);
    let (q_len, kv_len) = (count * shape.heads * shape.head_dim, count * shape.kv_heads * shape.head_dim);
    rms_norm(stream, x.part(0..width)?, layer.attention_norm.all(), shape.eps, normed.part_mut(0..width)?)?;
    let wants = [&layer.q, &layer.k, &layer.v];
    let mut input = quantized.rows(stream, normed.part(0..width)?, shape.hidden, &wants)?;
    layer.q.multiply(stream, input.again(), count, q.part_mut(0..q_len)?)?;
    layer.k.multiply(stream, input.again(), count, k.part_mut(0..kv_len)?)?;
    layer.v.multiply(stream, input, count, v.part_mut(0..kv_len)?)?;
    if let Some((q_norm, k_norm)) = &layer.qk_norm {
        rms_norm(stream, q.part(0..q_len)?, q_norm.all(), shape.eps, heads.part_mut(0..q_len)?)?;
        std::mem::swap(q, heads);
        rms_norm(stream, k.part(0..kv_len)?, k_norm.all(), shape.eps, heads.part_mut(0..kv_len)?)?;
        std::mem::swap(k, heads);
    }
    let by = Rotations { cos: cos.part(0..count * half)?, sin: sin.part(0..count * half)?, half };
    rope(stream, q.part_mut(0..q_len)?, shape.heads, by, false)?;
    rope(stream, k.part_mut(0..kv_len)?, shape.kv_heads, by, false)?;
    let rows = paged::Rows { queries: queries.part(0..count)?, tables: tables.all() };
    write_kv(stream, k.part(0..kv_len)?, v.part(0..kv_len)?, rows, attention, cache)?;
    let parts = parts.part_mut(0..attention.parts_len(count, context))?;
    let into = (parts, heads.part_mut(0..q_len)?);
    attention_paged(stream, q.part(0..q_len)?, rows, attention, cache, context, into)?;
    let y = quantized.rows(stream, heads.part(0..q_len)?, shape.heads * shape.head_dim, &[&layer.o])?;
    layer.o.multiply(stream, y, count, normed.part_mut(0..width)?)?;
    add(stream, normed.part(0..width)?, x.part_mut(0..width)?)
}

/// `x += down(silu(gate(norm(x)))·up(norm(x)))`.
fn feed_forward(
    stream: &Stream,
    shape: &Shape,
    layer: &Layer,
    space: &mut Workspace,
    count: usize,
) -> Result<(), Error> {
    let Workspace { x, normed, quantized, gate, up, act, .. } = space;
    let (width, inner) = (count * shape.hidden, count * shape.inner);
    rms_norm(stream, x.part(0..width)?, layer.mlp_norm.all(), shape.eps, normed.part_mut(0..width)?)?;
    let mut input =
        quantized.rows(stream, normed.part(0..width)?, shape.hidden, &[&layer.gate, &layer.up])?;
    layer.gate.multiply(stream, input.again(), count, gate.part_mut(0..inner)?)?;
    layer.up.multiply(stream, input, count, up.part_mut(0..inner)?)?;
    swiglu(stream, gate.part(0..inner)?, up.part(0..inner)?, act.part_mut(0..inner)?)?;
    let act = quantized.rows(stream, act.part(0..inner)?, shape.inner, &[&layer.down])?;
    layer.down.multiply(stream, act, count, normed.part_mut(0..width)?)?;
    add(stream, normed.part(0..width)?, x.part_mut(0..width)?)
}

/// Blocks that a sequence of so many tokens needs.
pub fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK)
}

/// Where a row's sequence begins in a step's tables.
fn query(position: usize, table: usize) -> Query {
    Query { position: position as u32, table: table as u32 }
}
