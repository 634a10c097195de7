//! What a step computes in.

use super::weights::Matrix;
use super::{Capacity, Row, Shape, blocks_of, query};
use crate::ops::paged::{KV_BLOCK, Query};
use crate::ops::quant::{PIECE, Quantized, quantize_rows};
use crate::runtime::{DeviceBuffer, Error, Stream, View};
use hearth_memory::Kind;

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
    pub quantized: Bytes,
    pub queries: DeviceBuffer<Query>,
    pub tables: DeviceBuffer<u32>,
    pub cos: DeviceBuffer<f32>,
    pub sin: DeviceBuffer<f32>,
}

impl Workspace {
    pub fn new(stream: &Stream, shape: &Shape, capacity: &Capacity) -> Result<Self, Error> {
        let device = stream.device();
        let rows = capacity.rows;
        let floats = |width: usize| DeviceBuffer::new(device, Kind::Activations, rows * width);
        let q_len = shape.heads * shape.head_dim;
        let parts = shape.attention(0).parts_len(rows, capacity.context);
        let widest = shape.hidden.max(q_len).max(shape.inner);
        Ok(Self {
            x: floats(shape.hidden)?,
            normed: floats(shape.hidden)?,
            q: floats(q_len)?,
            // As wide as the queries: norms of heads swap these buffers.
            k: floats(q_len)?,
            v: floats(shape.kv_heads * shape.head_dim)?,
            heads: floats(q_len)?,
            parts: DeviceBuffer::new(device, Kind::Activations, parts)?,
            gate: floats(shape.inner)?,
            up: floats(shape.inner)?,
            act: floats(shape.inner)?,
            logits: floats(shape.vocab)?,
            quantized: Bytes::new(stream, rows * widest)?,
            queries: DeviceBuffer::new(device, Kind::Activations, rows)?,
            // Entries that no row reaches are read by nobody, and are valid all the same.
            tables: DeviceBuffer::zeros(stream, Kind::Activations, rows * blocks_of(capacity.context))?,
            cos: floats(shape.head_dim / 2)?,
            sin: floats(shape.head_dim / 2)?,
        })
    }

    /// Brings a step's rows to the card.
    pub fn upload(
        &mut self,
        stream: &Stream,
        shape: &Shape,
        capacity: &Capacity,
        rows: &[Row<'_>],
    ) -> Result<(), Error> {
        check(shape, capacity, rows)?;
        let stride = blocks_of(capacity.context);
        let embeddings: Vec<f32> = rows.iter().flat_map(|row| row.embedding.iter().copied()).collect();
        let cos: Vec<f32> = rows.iter().flat_map(|row| row.cos.iter().copied()).collect();
        let sin: Vec<f32> = rows.iter().flat_map(|row| row.sin.iter().copied()).collect();
        let mut tables = vec![0; rows.len() * stride];
        let mut queries = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            let used = row.position / KV_BLOCK + 1;
            tables[i * stride..][..used].copy_from_slice(&row.table[..used]);
            queries.push(query(row.position, i * stride));
        }
        self.x.write(stream, &embeddings)?;
        self.cos.write(stream, &cos)?;
        self.sin.write(stream, &sin)?;
        self.queries.write(stream, &queries)?;
        self.tables.write(stream, &tables)
    }
}

/// What kernels cannot check: that every row stays within the cache.
fn check(shape: &Shape, capacity: &Capacity, rows: &[Row<'_>]) -> Result<(), Error> {
    let wrong = |argument, value, limit: String| Err(Error::Value { op: "decode", argument, value, limit });
    if rows.len() > capacity.rows {
        return wrong("rows", rows.len(), format!("at most {}", capacity.rows));
    }
    for row in rows {
        let half = shape.head_dim / 2;
        let lengths = [
            ("an embedding", row.embedding.len(), shape.hidden),
            ("cosines", row.cos.len(), half),
            ("sines", row.sin.len(), half),
        ];
        for (argument, len, needed) in lengths {
            if len != needed {
                return Err(Error::Length { op: "decode", argument, len, needed });
            }
        }
        if row.position >= capacity.context {
            return wrong("a position", row.position, format!("below {}", capacity.context));
        }
        let used = row.position / KV_BLOCK + 1;
        if row.table.len() < used {
            return Err(Error::Length {
                op: "decode",
                argument: "a block table",
                len: row.table.len(),
                needed: used,
            });
        }
        if let Some(&block) = row.table[..used].iter().find(|&&block| block as usize >= capacity.blocks) {
            return wrong("a KV block", block as usize, format!("below {}", capacity.blocks));
        }
    }
    Ok(())
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
