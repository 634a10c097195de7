//! Causal attention over packed documents, and its gradients.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};
use bytemuck::{Pod, Zeroable};

const FILE: &str = "attention.cu";
const THREADS: u32 = 128;
/// Rows of a tile.
const ROWS: usize = 64;

/// Rows `first..first + count` of the document `start..end`, as the kernels read it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Tile {
    first: u32,
    count: u32,
    start: u32,
    end: u32,
}

impl Tile {
    /// No rows.
    pub const EMPTY: Tile = Tile { first: 0, count: 0, start: 0, end: 0 };
}

/// The tiles of documents of these lengths, one behind another.
///
/// # Panics
/// When they hold 2³² rows or more together.
pub fn tiles_of(documents: &[usize]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    let mut start = 0;
    let number = |n: usize| u32::try_from(n).expect("fewer than 2³² rows");
    for &length in documents {
        let end = start + length;
        for first in (start..end).step_by(ROWS) {
            let count = number(ROWS.min(end - first));
            tiles.push(Tile { first: number(first), count, start: number(start), end: number(end) });
        }
        start = end;
    }
    tiles
}

/// What attention is over. Shapes: `q`, `y`: `[rows, heads, d]`; `k`, `v`: `[rows, kv_heads, d]`; `logs`: `[heads, rows]`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of all documents.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; they divide the query heads.
    pub kv_heads: usize,
    /// Dimension of a head, at most 128.
    pub d: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Keys that a query sees, its own among them; 0 = all.
    pub window: usize,
}

impl Shape {
    fn q_len(&self) -> usize {
        self.rows * self.heads * self.d
    }

    fn kv_len(&self) -> usize {
        self.rows * self.kv_heads * self.d
    }

    /// Head dimension the kernel is made for.
    fn padded(&self, op: Op) -> Result<usize, Error> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(op.wrong("heads", self.heads, &format!("a multiple of {} KV heads", self.kv_heads)));
        }
        match self.d {
            1..=64 => Ok(64),
            65..=128 => Ok(128),
            d => Err(op.wrong("head_dim", d, "1 to 128")),
        }
    }

    fn numbers(&self, op: Op) -> Result<[i32; 4], Error> {
        Ok([
            op.int("rows", self.rows)?,
            op.int("heads", self.heads)?,
            op.int("kv_heads", self.kv_heads)?,
            op.int("head_dim", self.d)?,
        ])
    }
}

/// Bytes of shared memory: `outer` rows of `d` values and `inner` rows of `keys` values, padded.
fn shared<T: Float>(outer: usize, d: usize, inner: usize, keys: usize) -> usize {
    size_of::<T>() * (outer * (d + T::WIDTH) + inner * (keys + T::WIDTH))
}

/// Keys or queries of a tile of the other side: forward, backward.
fn inner<T: Float>() -> (usize, usize) {
    if size_of::<T>() == 4 { (32, 16) } else { (64, 32) }
}

/// What attention reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a, T> {
    /// Queries.
    pub q: View<'a, T>,
    /// Keys.
    pub k: View<'a, T>,
    /// Values.
    pub v: View<'a, T>,
    /// The documents' tiles, see [`tiles_of`].
    pub tiles: View<'a, Tile>,
}

impl<T: Float> Inputs<'_, T> {
    fn check(&self, op: Op, shape: &Shape) -> Result<(), Error> {
        op.takes("q", &self.q, shape.q_len())?;
        op.takes("k", &self.k, shape.kv_len())?;
        op.takes("v", &self.v, shape.kv_len())
    }
}

/// `y = softmax(scale·q·kᵀ)·v` within each document, and the logarithms of the softmax's sums for the backward pass.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn attention<T: Float>(
    stream: &Stream,
    x: Inputs<'_, T>,
    shape: Shape,
    y: ViewMut<'_, T>,
    logs: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let op = Op("attention");
    let padded = shape.padded(op)?;
    x.check(op, &shape)?;
    op.gives("y", &y, shape.q_len())?;
    op.gives("logs", &logs, shape.heads * shape.rows)?;
    if x.tiles.is_empty() {
        return Ok(());
    }
    let (keys, _) = inner::<T>();
    let shared = shared::<T>(ROWS + 2 * keys, padded, ROWS, keys);
    let grid = op.grid([x.tiles.len(), shape.heads, 1], THREADS, shared)?;
    let [rows, heads, kv_heads, d] = shape.numbers(op)?;
    let window = op.int("window", shape.window)?;
    let arguments =
        arguments![x.q, x.k, x.v, x.tiles, rows, heads, kv_heads, d, shape.scale, window, y, logs];
    stream.launch(FILE, &format!("attention_{}_{padded}", T::NAME), grid, arguments)
}

/// What the backward pass reads beside the inputs.
pub struct Upstream<'a, T> {
    /// What [`attention`] gave.
    pub y: View<'a, T>,
    /// Its logarithms.
    pub logs: View<'a, f32>,
    /// The gradient of `y`.
    pub dy: View<'a, T>,
    /// Scratch: `[heads, rows]`.
    pub deltas: ViewMut<'a, f32>,
}

/// Gradients of [`attention`], each as its input.
///
/// # Errors
/// As [`attention`].
pub fn attention_backward<T: Float>(
    stream: &Stream,
    x: Inputs<'_, T>,
    mut up: Upstream<'_, T>,
    shape: Shape,
    dq: ViewMut<'_, T>,
    (dk, dv): (ViewMut<'_, T>, ViewMut<'_, T>),
) -> Result<(), Error> {
    let op = Op("attention_backward");
    let padded = shape.padded(op)?;
    x.check(op, &shape)?;
    let per_row = shape.heads * shape.rows;
    op.takes("y", &up.y, shape.q_len())?;
    op.takes("dy", &up.dy, shape.q_len())?;
    op.takes("logs", &up.logs, per_row)?;
    op.gives("deltas", &up.deltas, per_row)?;
    op.gives("dq", &dq, shape.q_len())?;
    op.gives("dk", &dk, shape.kv_len())?;
    op.gives("dv", &dv, shape.kv_len())?;
    if x.tiles.is_empty() {
        return Ok(());
    }
    let [rows, heads, kv_heads, d] = shape.numbers(op)?;
    let (scale, window) = (shape.scale, op.int("window", shape.window)?);
    let name = format!("attention_deltas_{}", T::NAME);
    let arguments = arguments![up.y, up.dy, rows, heads, d, up.deltas.again()];
    stream.launch(FILE, &name, op.line(per_row.div_ceil(4), THREADS)?, arguments)?;
    let (_, tile) = inner::<T>();
    let grid = op.grid(
        [x.tiles.len(), shape.heads, 1],
        THREADS,
        shared::<T>(2 * ROWS + 2 * tile, padded, ROWS, tile),
    )?;
    let Inputs { q, k, v, tiles } = x;
    let (dy, logs) = (up.dy, up.logs);
    let deltas = up.deltas.view();
    let arguments = arguments![q, k, v, dy, logs, deltas, tiles, rows, heads, kv_heads, d, scale, window, dq];
    stream.launch(FILE, &format!("attention_backward_queries_{}_{padded}", T::NAME), grid, arguments)?;
    let grid = op.grid(
        [tiles.len(), shape.kv_heads, 1],
        THREADS,
        shared::<T>(2 * ROWS + 2 * tile, padded, 2 * ROWS, tile),
    )?;
    let arguments =
        arguments![q, k, v, dy, logs, deltas, tiles, rows, heads, kv_heads, d, scale, window, dk, dv];
    stream.launch(FILE, &format!("attention_backward_keys_{}_{padded}", T::NAME), grid, arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_end_with_their_document() {
        let tile = |first, count, start, end| Tile { first, count, start, end };
        assert_eq!(
            tiles_of(&[3, 0, 130]),
            [tile(0, 3, 0, 3), tile(3, 64, 3, 133), tile(67, 64, 3, 133), tile(131, 2, 3, 133)]
        );
    }
}
