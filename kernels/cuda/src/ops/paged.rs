//! Attention through a paged KV cache: single rows of many sequences, and many rows of one.

use super::{Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};
use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

const FILE: &str = "attention_paged.cu";
const THREADS: u32 = 128;
/// Tokens of a KV block.
pub const KV_BLOCK: usize = 16;
/// Keys that one block of threads takes.
const SPLIT: usize = 256;

/// A row: its position in its sequence, and where the sequence's blocks begin in the tables.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Query {
    /// Tokens before it.
    pub position: u32,
    /// Index of its sequence's first block in the tables.
    pub table: u32,
}

/// Consecutive rows of one sequence, and which of their queries a block takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Stretch {
    /// Number of the first row in the step.
    pub row: u32,
    /// How many there are.
    pub rows: u32,
    /// Tokens before the first.
    pub position: u32,
    /// Index of the sequence's first block in the tables.
    pub table: u32,
    /// The block's first query, counted over rows and the query heads of a KV head: a multiple of [`Shape::queries_at_once`].
    pub first: u32,
}

/// A type that the cache may hold.
pub trait CacheElement: Pod {
    /// As kernels are named.
    const NAME: &'static str;
    /// Whether each vector has a scale.
    const SCALED: bool = false;
    /// Whether there are kernels for eight query heads at once.
    const WIDE: bool = true;
}
impl CacheElement for f32 {
    const NAME: &'static str = "f32";
    const WIDE: bool = false;
}
impl CacheElement for f16 {
    const NAME: &'static str = "f16";
}
impl CacheElement for bf16 {
    const NAME: &'static str = "bf16";
}
impl CacheElement for i8 {
    const NAME: &'static str = "i8";
    const SCALED: bool = true;
}

/// What attention is over.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; they divide the query heads.
    pub kv_heads: usize,
    /// Dimension of a head: at most 256, a multiple of 8.
    pub d: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Keys that a query sees, its own among them; 0 = all.
    pub window: usize,
}

impl Shape {
    /// Elements of the cache per KV block.
    pub fn block_len(&self) -> usize {
        self.kv_heads * 2 * KV_BLOCK * self.d
    }

    /// Scales of the cache per KV block.
    pub fn block_scales(&self) -> usize {
        self.kv_heads * 2 * KV_BLOCK
    }

    /// Elements of scratch for `rows` queries of sequences of up to `context` tokens.
    pub fn parts_len(&self, rows: usize, context: usize) -> usize {
        rows * self.heads * splits_of(context) * (self.d + 2)
    }

    /// Queries of one KV head that a block of [`attention_prompt`] takes.
    pub fn queries_at_once(&self) -> usize {
        if self.padded() == 256 { 8 } else { 32 }
    }

    /// Blocks of [`attention_prompt`] for so many rows of one sequence.
    pub fn stretches(&self, rows: usize) -> usize {
        (rows * self.heads / self.kv_heads.max(1)).div_ceil(self.queries_at_once())
    }

    /// The dimension that kernels are made for.
    fn padded(&self) -> usize {
        [64, 128, 256].into_iter().find(|&most| self.d <= most).unwrap_or(256)
    }

    /// Whether there are kernels for it; `op` is who asks.
    ///
    /// # Errors
    /// [`Error::Value`].
    pub fn check_for(&self, op: &'static str) -> Result<(), Error> {
        self.check(Op(op))
    }

    fn check(&self, op: Op) -> Result<(), Error> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return Err(op.wrong("heads", self.heads, &format!("a multiple of {} KV heads", self.kv_heads)));
        }
        if self.d == 0 || self.d > 256 || !self.d.is_multiple_of(8) {
            return Err(op.wrong("head_dim", self.d, "a multiple of 8 up to 256"));
        }
        Ok(())
    }
}

/// Splits of a context.
fn splits_of(context: usize) -> usize {
    context.div_ceil(SPLIT)
}

/// Where the rows of a batch are.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Each row's place.
    pub queries: View<'a, Query>,
    /// The sequences' blocks. Every entry that a position reaches names a block of the cache.
    pub tables: View<'a, u32>,
}

/// Keys and values of one layer: `[blocks, kv_heads, 2, 16, d]`, and for i8 scales `[blocks, kv_heads, 2, 16]`.
pub struct Cache<'a, T> {
    /// Keys before values.
    pub data: ViewMut<'a, T>,
    /// Empty but for i8.
    pub scales: Option<ViewMut<'a, f32>>,
}

impl<T: CacheElement> Cache<'_, T> {
    fn check(&self, op: Op, shape: &Shape) -> Result<(), Error> {
        let blocks = op.rows("cache", self.data.len(), shape.block_len())?;
        op.gives("cache", &self.data, blocks * shape.block_len())?;
        match &self.scales {
            Some(scales) => op.gives("cache scales", scales, blocks * shape.block_scales()),
            None if T::SCALED => {
                let needed = blocks * shape.block_scales();
                Err(Error::Length { op: op.0, argument: "cache scales", len: 0, needed })
            }
            None => Ok(()),
        }
    }

    fn scales(&self) -> Option<View<'_, f32>> {
        self.scales.as_ref().map(|scales| scales.view())
    }
}

/// Writes the rows' keys and values where their positions say. `k`, `v`: `[rows, kv_heads, d]`.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn write_kv<T: CacheElement>(
    stream: &Stream,
    k: View<'_, f32>,
    v: View<'_, f32>,
    rows: Rows<'_>,
    shape: Shape,
    cache: &mut Cache<'_, T>,
) -> Result<(), Error> {
    let op = Op("write_kv");
    shape.check(op)?;
    let count = rows.queries.len();
    op.takes("k", &k, count * shape.kv_heads * shape.d)?;
    op.takes("v", &v, count * shape.kv_heads * shape.d)?;
    cache.check(op, &shape)?;
    if count == 0 {
        return Ok(());
    }
    let grid = op.line((count * shape.kv_heads * 2).div_ceil(4), THREADS)?;
    let (count, kv_heads, d) =
        (op.int("rows", count)?, op.int("kv_heads", shape.kv_heads)?, op.int("d", shape.d)?);
    let arguments =
        arguments![k, v, rows.queries, rows.tables, count, kv_heads, d, cache.data.again(), cache.scales()];
    stream.launch(FILE, &format!("write_kv_{}", T::NAME), grid, arguments)
}

/// `y = softmax(scale·q·kᵀ)·v` over each row's sequence up to its position. `q`, `y`: `[rows, heads, d]`; `parts`:
/// [`Shape::parts_len`] elements of scratch for `context` ≥ every position + 1.
///
/// # Errors
/// As [`write_kv`].
pub fn attention_paged<T: CacheElement>(
    stream: &Stream,
    q: View<'_, f32>,
    rows: Rows<'_>,
    shape: Shape,
    cache: &mut Cache<'_, T>,
    context: usize,
    (mut parts, y): (ViewMut<'_, f32>, ViewMut<'_, f32>),
) -> Result<(), Error> {
    let op = Op("attention_paged");
    shape.check(op)?;
    let (count, splits) = (rows.queries.len(), splits_of(context));
    op.takes("q", &q, count * shape.heads * shape.d)?;
    op.gives("y", &y, count * shape.heads * shape.d)?;
    op.gives("parts", &parts, shape.parts_len(count, context))?;
    cache.check(op, &shape)?;
    if count == 0 {
        return Ok(());
    }
    let share = shape.heads / shape.kv_heads;
    let padded = shape.padded();
    let group = if share > 4 && T::WIDE && padded < 256 { 8 } else { 4 };
    let (heads, d) = (op.int("heads", shape.heads)?, op.int("d", shape.d)?);
    let (kv_heads, used) = (op.int("kv_heads", shape.kv_heads)?, op.int("context", splits)?);
    let window = op.int("window", shape.window)?;
    let grid = op.grid([splits, shape.kv_heads * share.div_ceil(group), count], THREADS, 0)?;
    let (data, scales) = (cache.data.view(), cache.scales());
    let Rows { queries, tables } = rows;
    let arguments = arguments![
        q,
        queries,
        tables,
        data,
        scales,
        heads,
        kv_heads,
        d,
        shape.scale,
        window,
        used,
        parts.again()
    ];
    stream.launch(FILE, &format!("attention_paged_{}_{group}_{padded}", T::NAME), grid, arguments)?;
    let grid = op.grid([shape.heads, count, 1], THREADS, 0)?;
    stream.launch(FILE, "attention_paged_join", grid, arguments![parts, queries, heads, d, used, y])
}

/// `y = softmax(scale·q·kᵀ)·v` for whole stretches of rows, with the bits of [`attention_paged`]. `q`, `y`: `[rows, heads, d]`
/// of the whole step, of which rows in no stretch are left alone. A step's stretches name rows within it.
///
/// # Errors
/// As [`write_kv`].
pub fn attention_prompt<T: CacheElement>(
    stream: &Stream,
    q: View<'_, f32>,
    (stretches, tables): (View<'_, Stretch>, View<'_, u32>),
    shape: Shape,
    cache: &mut Cache<'_, T>,
    y: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let op = Op("attention_prompt");
    shape.check(op)?;
    let rows = op.rows("q", q.len(), shape.heads * shape.d)?;
    op.takes("q", &q, rows * shape.heads * shape.d)?;
    op.gives("y", &y, q.len())?;
    cache.check(op, &shape)?;
    if stretches.is_empty() {
        return Ok(());
    }
    let padded = shape.padded();
    let threads = if padded == 256 { 128 } else { 256 };
    let (heads, d) = (op.int("heads", shape.heads)?, op.int("d", shape.d)?);
    let (kv_heads, window) = (op.int("kv_heads", shape.kv_heads)?, op.int("window", shape.window)?);
    let grid = op.grid([stretches.len(), shape.kv_heads, 1], threads, 0)?;
    let (data, scales) = (cache.data.view(), cache.scales());
    let arguments =
        arguments![q, stretches, tables, data, scales, heads, kv_heads, d, shape.scale, window, y];
    stream.launch(FILE, &format!("attention_prompt_{}_{padded}", T::NAME), grid, arguments)
}
