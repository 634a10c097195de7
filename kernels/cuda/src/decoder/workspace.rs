//! What a step computes in.

use super::weights::Matrix;
use super::{Capacity, HEAD_ROWS, Layout, Part, Shape, Wanted, blocks_of, query};
use crate::ops::paged::{Query, Stretch};
use crate::ops::quant::{PIECE, Quantized, quantize_rows};
use crate::runtime::{DeviceBuffer, Error, PinnedBuffer, Stream, View};
use bytemuck::Pod;
use hearth_memory::Kind;
use std::marker::PhantomData;

/// Values between kernels, for as many rows as the capacity says.
pub(super) struct Workspace {
    pub x: DeviceBuffer<f32>,
    pub normed: DeviceBuffer<f32>,
    pub q: DeviceBuffer<f32>,
    pub k: DeviceBuffer<f32>,
    pub v: DeviceBuffer<f32>,
    pub heads: DeviceBuffer<f32>,
    pub parts: DeviceBuffer<f32>,
    pub gate: DeviceBuffer<f32>,
    pub up: DeviceBuffer<f32>,
    pub act: DeviceBuffer<f32>,
    pub logits: DeviceBuffer<f32>,
    /// Rows of `x` that something is wanted of, and their numbers.
    pub chosen: DeviceBuffer<f32>,
    pub picked: DeviceBuffer<u32>,
    pub quantized: Bytes,
    pub queries: DeviceBuffer<Query>,
    pub stretches: DeviceBuffer<Stretch>,
    pub tables: DeviceBuffer<u32>,
    pub cos: DeviceBuffer<f32>,
    pub sin: DeviceBuffer<f32>,
    /// What a step brings to the card passes through here, so that no copy is waited for.
    inbox: PinnedBuffer,
    /// What it gives comes here.
    outbox: PinnedBuffer,
}

/// Most bytes that the parts of long sequences take: attention goes through fewer rows at a time rather than hold more.
const PARTS_BYTES: usize = 64 << 20;

/// How long each of its buffers is.
pub(super) struct Lens {
    hidden: usize,
    q: usize,
    kv: usize,
    parts: usize,
    inner: usize,
    logits: usize,
    chosen: usize,
    picked: usize,
    quants: usize,
    queries: usize,
    stretches: usize,
    tables: usize,
    half: usize,
}

impl Lens {
    pub fn of(shape: &Shape, capacity: &Capacity) -> Self {
        let Capacity { rows, sequences, context, .. } = *capacity;
        let q = shape.heads * shape.head_dim;
        let of_row = shape.attention(0).parts_len(1, context);
        let at_once = (PARTS_BYTES / (of_row * size_of::<f32>())).clamp(1, sequences);
        let picked = rows.min(HEAD_ROWS);
        Self {
            hidden: rows * shape.hidden,
            q: rows * q,
            kv: rows * shape.kv_heads * shape.head_dim,
            parts: at_once * of_row,
            inner: rows * shape.inner,
            logits: picked * shape.vocab,
            chosen: picked * shape.hidden,
            picked,
            quants: rows * shape.hidden.max(q).max(shape.inner),
            queries: rows,
            stretches: shape.attention(0).stretches(rows) + sequences,
            tables: sequences * blocks_of(context),
            half: rows * (shape.head_dim / 2),
        }
    }

    /// Of what a step brings to the card.
    fn inbox(&self) -> usize {
        let words = self.hidden + 2 * self.half + self.tables;
        4 * words + size_of::<Query>() * self.queries + size_of::<Stretch>() * self.stretches
    }

    pub fn bytes(&self) -> u64 {
        let floats = 2 * self.hidden
            + 3 * self.q
            + self.kv
            + self.parts
            + 3 * self.inner
            + self.logits
            + self.chosen
            + 2 * self.half;
        let words = self.picked + self.tables + 2 * self.quants.div_ceil(PIECE);
        let places = size_of::<Query>() * self.queries + size_of::<Stretch>() * self.stretches;
        (4 * (floats + words) + self.quants + places) as u64
    }
}

impl Workspace {
    pub fn new(stream: &Stream, shape: &Shape, capacity: &Capacity) -> Result<Self, Error> {
        let device = stream.device();
        let lens = Lens::of(shape, capacity);
        let floats = |len| DeviceBuffer::new(device, Kind::Activations, len);
        Ok(Self {
            x: floats(lens.hidden)?,
            normed: floats(lens.hidden)?,
            q: floats(lens.q)?,
            // As wide as the queries: norms of heads swap these buffers.
            k: floats(lens.q)?,
            v: floats(lens.kv)?,
            heads: floats(lens.q)?,
            parts: floats(lens.parts)?,
            gate: floats(lens.inner)?,
            up: floats(lens.inner)?,
            act: floats(lens.inner)?,
            logits: floats(lens.logits)?,
            chosen: floats(lens.chosen)?,
            picked: DeviceBuffer::new(device, Kind::Activations, lens.picked)?,
            quantized: Bytes::new(stream, lens.quants)?,
            queries: DeviceBuffer::new(device, Kind::Activations, lens.queries)?,
            stretches: DeviceBuffer::new(device, Kind::Activations, lens.stretches)?,
            // Entries that no row reaches are read by nobody, and are valid all the same.
            tables: DeviceBuffer::zeros(stream, Kind::Activations, lens.tables)?,
            cos: floats(lens.half)?,
            sin: floats(lens.half)?,
            inbox: PinnedBuffer::new(device, Kind::Staging, lens.inbox())?,
            outbox: PinnedBuffer::new(device, Kind::Staging, 4 * lens.logits.max(lens.chosen))?,
        })
    }

    /// Brings a step's rows to the card.
    pub fn upload(
        &mut self,
        stream: &Stream,
        shape: &Shape,
        capacity: &Capacity,
        parts: &[Part<'_>],
        layout: &Layout,
    ) -> Result<(), Error> {
        check(shape, capacity, parts)?;
        let stride = blocks_of(capacity.context);
        let parts: Vec<&Part<'_>> = layout.order.iter().map(|&number| &parts[number]).collect();
        let mut tables = vec![0; parts.len() * stride];
        let mut queries = Vec::with_capacity(layout.rows);
        for (i, part) in parts.iter().enumerate() {
            let rows = part.rows(shape);
            let used = blocks_of(part.position + rows);
            tables[i * stride..][..used].copy_from_slice(&part.table[..used]);
            queries.extend((part.position..part.position + rows).map(|position| query(position, i * stride)));
        }
        let mut inbox = Inbox::new(&mut self.inbox)?;
        let embeddings = inbox.put(&joined(&parts, |part| part.embeddings));
        let cos = inbox.put(&joined(&parts, |part| part.cos));
        let sin = inbox.put(&joined(&parts, |part| part.sin));
        let (queries, tables) = (inbox.put(&queries), inbox.put(&tables));
        let stretches = inbox.put(&layout.stretches);
        embeddings.send(&mut self.inbox, stream, &mut self.x)?;
        cos.send(&mut self.inbox, stream, &mut self.cos)?;
        sin.send(&mut self.inbox, stream, &mut self.sin)?;
        queries.send(&mut self.inbox, stream, &mut self.queries)?;
        tables.send(&mut self.inbox, stream, &mut self.tables)?;
        stretches.send(&mut self.inbox, stream, &mut self.stretches)
    }

    /// The first `len` values that something wanted has, after everything the stream was sent.
    pub fn read(&mut self, stream: &Stream, what: Wanted, len: usize) -> Result<&[f32], Error> {
        let from = match what {
            Wanted::Logits => &self.logits,
            Wanted::Vectors => &self.normed,
        };
        self.outbox.fetch(stream, len, from, 0)?;
        Ok(bytemuck::cast_slice(&self.outbox.bytes()?[..4 * len]))
    }

    /// Why copies are slower than they could be, if they are.
    pub fn refusal(&self) -> Option<&str> {
        self.inbox.refusal().or(self.outbox.refusal())
    }
}

/// Fills pinned memory from its start.
struct Inbox<'a> {
    bytes: &'a mut [u8],
    used: usize,
}

/// Elements that lie in pinned memory.
struct Lying<T> {
    first: usize,
    len: usize,
    _element: PhantomData<T>,
}

impl<'a> Inbox<'a> {
    /// Waits until the last step's copies are done.
    fn new(memory: &'a mut PinnedBuffer) -> Result<Self, Error> {
        Ok(Self { bytes: memory.bytes()?, used: 0 })
    }

    fn put<T: Pod>(&mut self, values: &[T]) -> Lying<T> {
        let (first, bytes) = (self.used, bytemuck::cast_slice(values));
        self.used += bytes.len();
        self.bytes[first..self.used].copy_from_slice(bytes);
        Lying { first, len: values.len(), _element: PhantomData }
    }
}

impl<T: Pod> Lying<T> {
    fn send(self, from: &mut PinnedBuffer, stream: &Stream, to: &mut DeviceBuffer<T>) -> Result<(), Error> {
        match self.len {
            0 => Ok(()),
            len => from.send_from(stream, self.first, len, to, 0),
        }
    }
}

fn joined<'a>(parts: &[&Part<'a>], of: impl Fn(&Part<'a>) -> &'a [f32]) -> Vec<f32> {
    parts.iter().flat_map(|part| of(part)).copied().collect()
}

fn wrong(argument: &'static str, value: usize, limit: String) -> Result<(), Error> {
    Err(Error::Value { op: "decode", argument, value, limit })
}

/// What kernels cannot check: that every row stays within the cache.
fn check(shape: &Shape, capacity: &Capacity, parts: &[Part<'_>]) -> Result<(), Error> {
    let rows: usize = parts.iter().map(|part| part.rows(shape)).sum();
    if rows > capacity.rows {
        return wrong("rows", rows, format!("at most {}", capacity.rows));
    }
    if parts.len() > capacity.sequences {
        return wrong("sequences", parts.len(), format!("at most {}", capacity.sequences));
    }
    parts.iter().try_for_each(|part| check_part(shape, capacity, part))
}

fn check_part(shape: &Shape, capacity: &Capacity, part: &Part<'_>) -> Result<(), Error> {
    let (rows, half) = (part.rows(shape), shape.head_dim / 2);
    let end = part.position + rows;
    let used = blocks_of(end);
    let lengths = [
        ("embeddings", part.embeddings.len(), rows * shape.hidden),
        ("cosines", part.cos.len(), rows * half),
        ("sines", part.sin.len(), rows * half),
        ("a block table", part.table.len().min(used), used),
    ];
    if end > capacity.context {
        return wrong("a position", end - 1, format!("below {}", capacity.context));
    }
    for (argument, len, needed) in lengths {
        if len != needed {
            return Err(Error::Length { op: "decode", argument, len, needed });
        }
    }
    if part.wanted.end > rows {
        return wrong("a wanted row", part.wanted.end, format!("at most {rows}"));
    }
    match part.table[..used].iter().find(|&&block| block as usize >= capacity.blocks) {
        Some(&block) => wrong("a KV block", block as usize, format!("below {}", capacity.blocks)),
        None => Ok(()),
    }
}

/// Rows of activations as bytes.
pub(super) struct Bytes {
    quants: DeviceBuffer<i8>,
    scales: DeviceBuffer<f32>,
    sums: DeviceBuffer<u32>,
}

impl Bytes {
    fn new(stream: &Stream, n: usize) -> Result<Self, Error> {
        let device = stream.device();
        let pieces = n.div_ceil(PIECE);
        Ok(Self {
            quants: DeviceBuffer::new(device, Kind::Activations, n)?,
            scales: DeviceBuffer::new(device, Kind::Activations, pieces)?,
            sums: DeviceBuffer::new(device, Kind::Activations, pieces)?,
        })
    }

    /// What the matrices multiply: `values`, and as bytes where one of them is quantized.
    pub fn rows<'a>(
        &'a mut self,
        stream: &Stream,
        values: View<'a, f32>,
        width: usize,
        wanted_by: &[&Matrix],
    ) -> Result<Input<'a>, Error> {
        let (n, pieces) = (values.len(), values.len() / PIECE);
        debug_assert!(n.is_multiple_of(width), "whole rows");
        if !wanted_by.iter().any(|matrix| matrix.is_quantized()) {
            return Ok(Input { values, quantized: None });
        }
        let mut bytes = Quantized {
            quants: self.quants.part_mut(0..n)?,
            scales: self.scales.part_mut(0..pieces)?,
            sums: self.sums.part_mut(0..pieces)?,
        };
        quantize_rows(stream, values, bytes.again())?;
        Ok(Input { values, quantized: Some(bytes) })
    }
}

/// Rows of activations.
pub(super) struct Input<'a> {
    pub values: View<'a, f32>,
    pub quantized: Option<Quantized<'a>>,
}

impl Input<'_> {
    /// The same rows for a shorter time.
    pub fn again(&mut self) -> Input<'_> {
        Input { values: self.values, quantized: self.quantized.as_mut().map(Quantized::again) }
    }
}
