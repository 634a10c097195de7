//! A Llama-shaped model on a card: packed weights, a paged KV cache, one step of a batch at a time.
//!
//! # Layout
//! - [`weights`]: [`Source`], where weights come from; matrices dense or in a block format as they lie in files.
//! - `evicted`: KV blocks in host memory, [`Move`]d there and back.
//! - `layout`: which rows a step has and how they are attended.
//! - `workspace`: what a step computes in, made once.
//! - this file: [`Decoder`] and the order of a transformer block.
//!
//! # Invariants
//! - Embedding rows and rotations come from the host: they depend on nothing on the card. Everything else stays there.
//! - All memory is taken when the decoder is made. A row has the same bits alone, in a batch and in any piece of a prompt;
//!   recorded steps have the bits of those sent kernel by kernel.

pub mod weights;

mod evicted;
mod layout;
mod workspace;

pub use evicted::Move;
pub use layout::{HEAD_ROWS, PROMPT_ROWS};

use crate::ops::embedding::gather_rows;
use crate::ops::norm::rms_norm;
use crate::ops::paged::{
    self, Cache, CacheElement, KV_BLOCK, Query, attention_paged, attention_prompt, write_kv,
};
use crate::ops::pointwise::{Rotations, add, rope, swiglu};
use crate::runtime::{Device, DeviceBuffer, Error, Recorded, Stream, View};
use evicted::Evicted;
use hearth_memory::Kind;
use layout::{Layout, WantedRow};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use weights::{Head, Layer, Source};
use workspace::{Bytes, Workspace};

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
    /// Whether the kernels compute such a model.
    ///
    /// # Errors
    /// [`Error::Value`] naming the dimension that they do not have.
    pub fn check(&self) -> Result<(), Error> {
        self.attention(0).check_for("decode")
    }

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Rows of a step.
    pub rows: usize,
    /// Sequences in a step.
    pub sequences: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// KV blocks of 16 tokens, for all sequences.
    pub blocks: usize,
    /// Slots of host memory for KV blocks that the card has no room for; one more is taken to exchange through.
    pub host_blocks: usize,
}

impl Capacity {
    /// Bytes of what a step of such a model computes in.
    pub fn working_bytes(&self, shape: &Shape) -> u64 {
        workspace::Lens::of(shape, self).bytes()
    }
}

/// What is wanted of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The logits that follow them: `[vocab]`.
    Logits,
    /// The final norm's output: `[hidden]`.
    Vectors,
}

/// A sequence's rows of a step: consecutive tokens. Those before them are in the cache.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// Their embeddings: `[rows, hidden]`.
    pub embeddings: &'a [f32],
    /// Tokens before the first of them in the sequence.
    pub position: usize,
    /// Cosines of their rotations: `[rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// The sequence's KV blocks, at least up to the last row.
    pub table: &'a [u32],
    /// Which of them something is wanted of.
    pub wanted: Range<usize>,
    /// What that is.
    pub what: Wanted,
}

impl Part<'_> {
    fn rows(&self, shape: &Shape) -> usize {
        self.embeddings.len() / shape.hidden
    }
}

/// Receives what is wanted: index of the part, index of the row in it, and the values.
pub type EachRow<'a> = dyn FnMut(usize, usize, &[f32]) + 'a;

/// Keys and values of one layer, and their scales where they have some.
type Layered<T> = (DeviceBuffer<T>, Option<DeviceBuffer<f32>>);

/// A model with its KV cache, whose elements are `T`.
pub struct Decoder<T> {
    shape: Shape,
    capacity: Capacity,
    layers: Vec<Layer>,
    head: Head,
    cache: Vec<Layered<T>>,
    evicted: Option<Evicted>,
    space: Workspace,
    /// Kernels of a step in which each sequence has a row, by their number: `None` until they have all been launched once.
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
        let bytes = [block.block_len() * size_of::<T>(), block.block_scales() * size_of::<f32>()];
        let bytes = [bytes[0], if T::SCALED { bytes[1] } else { 0 }];
        let slots = Some(capacity.host_blocks).filter(|&slots| slots > 0);
        let evicted = slots.map(|slots| Evicted::new(device, slots, cache.len(), bytes)).transpose()?;
        let space = Workspace::new(&stream, &shape, &capacity)?;
        let recorded = HashMap::new();
        let records = true;
        Ok(Self { shape, capacity, layers, head, cache, evicted, space, recorded, records, stream })
    }

    /// Whether steps are recorded and sent with one launch from the second of a size on; they are unless told otherwise.
    pub fn record(&mut self, records: bool) {
        self.records = records;
    }

    /// Copies KV blocks between card and host, in order, before the next step. It does not wait for them.
    ///
    /// # Errors
    /// [`Error::Lost`].
    ///
    /// # Panics
    /// When there is no such block or slot.
    pub fn move_blocks(&mut self, moves: &[Move]) -> Result<(), Error> {
        let Self { evicted, cache, stream, .. } = self;
        match evicted {
            Some(evicted) => moves.iter().try_for_each(|&one| evicted.run(stream, cache, one)),
            None => {
                assert!(moves.is_empty(), "without slots on the host no block is moved");
                Ok(())
            }
        }
    }

    /// Why copies are slower than they could be, if they are.
    pub fn refusal(&self) -> Option<&str> {
        self.evicted.as_ref().and_then(Evicted::refusal).or(self.space.refusal())
    }

    /// Computes a step's rows and hands over what is wanted of them, in order. The output matrix meets no other row.
    ///
    /// # Errors
    /// [`Error::Value`] for rows that do not fit the capacity, [`Error::Length`] for ones of another shape, [`Error::Lost`].
    pub fn step(&mut self, parts: &[Part<'_>], each: &mut EachRow<'_>) -> Result<(), Error> {
        let layout = Layout::of(parts, &self.shape, &self.capacity);
        if layout.rows == 0 {
            return Ok(());
        }
        self.space.upload(&self.stream, &self.shape, &self.capacity, parts, &layout)?;
        match layout.is_plain(parts) {
            true => self.send_recorded(&layout)?,
            false => self.send(&layout)?,
        }
        self.hand_over(parts, &layout, each)
    }

    /// Every sequence has one row and wants its logits: the same kernels as in the last step of that size.
    fn send_recorded(&mut self, layout: &Layout) -> Result<(), Error> {
        let count = layout.rows;
        match self.recorded.get(&count) {
            Some(Some(recorded)) => self.stream.replay(recorded),
            known => {
                // Only now is every kernel compiled and loaded, which no recording survives.
                let again = known.is_some() && self.records;
                let recorded = match again {
                    true => Some(self.record_step(layout)?),
                    false => None,
                };
                match &recorded {
                    Some(recorded) => self.stream.replay(recorded)?,
                    None => self.send(layout)?,
                }
                self.recorded.insert(count, recorded);
                Ok(())
            }
        }
    }

    fn record_step(&mut self, layout: &Layout) -> Result<Recorded, Error> {
        let Self { shape, layers, head, cache, space, stream, capacity, .. } = self;
        stream.record(|| send(stream, (shape, capacity), (layers, head), cache, space, layout))
    }

    fn send(&mut self, layout: &Layout) -> Result<(), Error> {
        let Self { shape, layers, head, cache, space, stream, capacity, .. } = self;
        send(stream, (shape, capacity), (layers, head), cache, space, layout)
    }

    /// Reads what is wanted, first computing what was not part of the step's own kernels.
    fn hand_over(
        &mut self,
        parts: &[Part<'_>],
        layout: &Layout,
        each: &mut EachRow<'_>,
    ) -> Result<(), Error> {
        let Self { shape, head, space, stream, .. } = self;
        let what = |wanted: &WantedRow| parts[wanted.part].what;
        let alike = layout.wanted.chunk_by(|a, b| what(a) == what(b));
        for wanted in alike.flat_map(|rows| rows.chunks(HEAD_ROWS)) {
            let what = what(&wanted[0]);
            if !layout.head_is_sent() {
                finish(stream, shape, head, space, (layout, wanted, what))?;
            }
            let width = match what {
                Wanted::Logits => shape.vocab,
                Wanted::Vectors => shape.hidden,
            };
            let values = space.read(stream, what, wanted.len() * width)?;
            for (row, values) in wanted.iter().zip(values.chunks_exact(width)) {
                each(row.part, row.index, values);
            }
        }
        Ok(())
    }
}

/// Every kernel of a step. What it reads of the host's was uploaded before.
fn send<T: CacheElement>(
    stream: &Stream,
    (shape, capacity): (&Shape, &Capacity),
    (layers, head): (&[Layer], &Head),
    cache: &mut [Layered<T>],
    space: &mut Workspace,
    layout: &Layout,
) -> Result<(), Error> {
    let count = layout.rows;
    for (i, (layer, (data, scales))) in layers.iter().zip(cache).enumerate() {
        let mut cache =
            Cache { data: data.all_mut(), scales: scales.as_mut().map(|scales| scales.all_mut()) };
        let attention = shape.attention(i);
        attend(stream, shape, attention, capacity.context, layer, &mut cache, space, layout)?;
        feed_forward(stream, shape, layer, space, count)?;
    }
    if !layout.head_is_sent() {
        return Ok(());
    }
    let Workspace { x, normed, quantized, logits, .. } = space;
    let x = x.part(0..count * shape.hidden)?;
    project(stream, shape, head, x, (normed, quantized, Some(logits)))
}

/// The final norm and, where logits are wanted, the output matrix over these rows alone.
fn finish(
    stream: &Stream,
    shape: &Shape,
    head: &Head,
    space: &mut Workspace,
    (layout, wanted, what): (&Layout, &[WantedRow], Wanted),
) -> Result<(), Error> {
    let rows: Vec<u32> = wanted.iter().map(|wanted| wanted.row).collect();
    let Workspace { x, normed, quantized, logits, picked, chosen, .. } = space;
    picked.write(stream, &rows)?;
    let (hidden, all) = (shape.hidden, layout.rows * shape.hidden);
    let picked = picked.part(0..rows.len())?;
    gather_rows(stream, x.part(0..all)?, hidden, picked, chosen.part_mut(0..rows.len() * hidden)?)?;
    let (chosen, logits) = (chosen.part(0..rows.len() * hidden)?, (what == Wanted::Logits).then_some(logits));
    project(stream, shape, head, chosen, (normed, quantized, logits))
}

/// `normed = norm(x)`, and from that the logits where they are wanted.
fn project(
    stream: &Stream,
    shape: &Shape,
    head: &Head,
    x: View<'_, f32>,
    (normed, quantized, logits): (&mut DeviceBuffer<f32>, &mut Bytes, Option<&mut DeviceBuffer<f32>>),
) -> Result<(), Error> {
    let (width, count) = (x.len(), x.len() / shape.hidden);
    rms_norm(stream, x, head.norm.all(), shape.eps, normed.part_mut(0..width)?)?;
    let Some(logits) = logits else { return Ok(()) };
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
    layout: &Layout,
) -> Result<(), Error> {
    let Workspace {
        x, normed, quantized, q, k, v, heads, parts, queries, stretches, tables, cos, sin, ..
    } = space;
    let count = layout.rows;
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
    let (row_len, at_once) = (shape.heads * shape.head_dim, parts.len() / attention.parts_len(1, context));
    for first in (0..layout.singles).step_by(at_once) {
        let some = first..layout.singles.min(first + at_once);
        let rows = paged::Rows { queries: queries.part(some.clone())?, tables: tables.all() };
        let parts = parts.part_mut(0..attention.parts_len(some.len(), context))?;
        let range = some.start * row_len..some.end * row_len;
        let into = (parts, heads.part_mut(range.clone())?);
        attention_paged(stream, q.part(range)?, rows, attention, cache, context, into)?;
    }
    let stretches = (stretches.part(0..layout.stretches.len())?, tables.all());
    attention_prompt(stream, q.part(0..q_len)?, stretches, attention, cache, heads.part_mut(0..q_len)?)?;
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
