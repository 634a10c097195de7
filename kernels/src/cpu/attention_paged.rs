//! Attention through the paged KV cache: the arithmetic of [`super::attention::attend`], cut for inference.
//!
//! The cache stores f32 or 16-bit numbers; they are widened as they are read, so the arithmetic is the same. Numbers of 8
//! bits have a scale per token: a key's multiplies its product, a value's its weight.
//!
//! - *A prompt* has many rows. Some of them and all query heads that share a KV head are a *tile*: keys and values are
//!   loaded once for all of its vectors.
//! - *While sequences generate* there are few rows and long lines of keys, fewer tiles than threads. So the keys of a
//!   tile are cut into stretches whose products are computed side by side; whoever finishes a tile takes its softmax;
//!   then the outputs are computed by groups of lanes.
//!
//! Every number is made by the same chain either way: a row's result depends neither on the rows beside it nor on the
//! way it was cut.

use super::attention::{AttentionSpec, Keys, SequenceRows, softmax};
use super::kv::{KV_BLOCK, KvLayout};
use super::lanes::{Load, leveled};
use super::pool;
use super::shared::Shared;
use super::simd::{LANES, Lanes, fma};
use super::stored::Stored;
use crate::multiversion;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most vectors (query heads of rows) per tile.
const TILE: usize = 8;
/// Groups of lanes of the values at a time, and the dimensions they are.
const GROUPS: usize = 2;
const SIDE: usize = GROUPS * LANES;
/// Blocks of keys per stretch.
const STRETCH: usize = 16;
/// Floats of scores that all threads share, unless a single tile needs more.
const SCORES: usize = 1 << 15;

/// Memory that attention keeps from call to call.
#[derive(Debug, Default)]
pub struct Scratch {
    shared: Vec<f32>,
    /// One per thread at work.
    own: Mutex<Vec<Vec<f32>>>,
}

/// Most bytes that a [`Scratch`] comes to when sequences reach `context` tokens.
pub fn scratch_bytes(context: usize) -> usize {
    let tile = TILE * (context.next_multiple_of(KV_BLOCK) + KV_BLOCK + 1);
    (tile.max(SCORES) + pool::threads() * tile) * size_of::<f32>()
}

/// KV blocks, and the scales of their numbers: none where these are as they are.
#[derive(Clone, Copy)]
pub struct Blocks<'a, T> {
    /// As [`KvLayout`] has them.
    pub layout: KvLayout,
    /// The numbers.
    pub data: &'a [T],
    /// Their scales, or nothing.
    pub scales: &'a [f32],
}

/// Attention of every row over its sequence's keys up to itself. `q`, `out`: `[rows, heads, head_dim]`; in `kv` the rows'
/// own keys are written already. The sequences' rows follow one another from 0.
pub fn attend<T: Stored>(
    kv: Blocks<T>,
    sequences: &[SequenceRows],
    q: &[f32],
    heads: usize,
    spec: AttentionSpec,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let Blocks { layout, data, scales } = kv;
    assert_eq!((q.len(), heads % layout.kv_heads), (out.len(), 0), "attention: shapes");
    let problem =
        Problem { layout, data, scales, q, group: heads / layout.kv_heads, heads, scale: spec.scale };
    let rows: usize = sequences.iter().map(|s| s.rows.len()).sum();
    assert!(rows * heads * layout.head_dim <= q.len(), "attention: more rows than queries");
    let tiles = problem.tiles(sequences, spec);
    let out = Shared::new(out);
    if tiles.len() >= 4 * pool::threads() && tiles.len() >= 64 {
        pool::for_each(tiles.len(), |i| {
            let mut own =
                scratch.own.lock().expect("nothing panics while it is held").pop().unwrap_or_default();
            problem.whole(&tiles[i], &mut own, out);
            scratch.own.lock().expect("nothing panics while it is held").push(own);
        });
        return;
    }
    let mut rest = &tiles[..];
    while !rest.is_empty() {
        // As many tiles at a time as the shared scores are meant to hold, but one at least.
        let mut floats = 0;
        let fits = |tile: &&Tile| {
            floats += tile.vectors.len() * (tile.line() + 1);
            floats <= SCORES
        };
        let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        problem.cut(now, &mut scratch.shared, out);
        rest = later;
    }
}

/// Some rows of a sequence and the query heads that share a KV head.
struct Tile<'a> {
    table: &'a [u32],
    kv_head: usize,
    vectors: Vec<Vector>,
    /// Blocks that any of the vectors sees.
    blocks: Range<usize>,
}

/// A query head of a row.
struct Vector {
    /// Where it begins in the queries, and its result in the output.
    at: usize,
    /// Positions it sees.
    range: Range<usize>,
}

impl Tile<'_> {
    /// Positions in the blocks: the length of a line of scores.
    fn line(&self) -> usize {
        self.blocks.len() * KV_BLOCK
    }
}

/// What all tiles share.
#[derive(Clone, Copy)]
struct Problem<'a, T> {
    layout: KvLayout,
    data: &'a [T],
    /// Scales of the numbers, or nothing.
    scales: &'a [f32],
    q: &'a [f32],
    /// Query heads per KV head.
    group: usize,
    heads: usize,
    scale: f32,
}

impl<T: Stored> Problem<'_, T> {
    fn tiles<'s>(&self, sequences: &'s [SequenceRows], spec: AttentionSpec) -> Vec<Tile<'s>> {
        let rows_per_tile = (TILE / self.group).max(1);
        let mut tiles = Vec::new();
        let mut first_row = 0;
        for s in sequences {
            for from in (0..s.rows.len()).step_by(rows_per_tile) {
                let rows = from..(from + rows_per_tile).min(s.rows.len());
                for kv_head in 0..self.layout.kv_heads {
                    for heads in (0..self.group).step_by(TILE) {
                        let heads = heads..(heads + TILE).min(self.group);
                        let vector = |row: usize, head: usize| Vector {
                            at: ((first_row + row) * self.heads + kv_head * self.group + head)
                                * self.layout.head_dim,
                            range: spec.keys(s.first_position + row),
                        };
                        let vectors: Vec<Vector> =
                            rows.clone().flat_map(|r| heads.clone().map(move |h| vector(r, h))).collect();
                        let start = vectors[0].range.start / KV_BLOCK;
                        let end = vectors[vectors.len() - 1].range.end.div_ceil(KV_BLOCK);
                        tiles.push(Tile { table: &s.table, kv_head, vectors, blocks: start..end });
                    }
                }
            }
            first_row += s.rows.len();
        }
        tiles
    }

    /// A tile in one piece.
    fn whole(&self, tile: &Tile, scores: &mut Vec<f32>, out: Shared) {
        let line = tile.line();
        scores.clear();
        scores.resize(tile.vectors.len() * line, 0.0);
        products(self, tile, tile.blocks.clone(), scores);
        let mut inverses = [0.0; TILE];
        for (i, inverse) in inverses[..tile.vectors.len()].iter_mut().enumerate() {
            *inverse = 1.0 / self.weights(tile, i, &mut scores[i * line..][..line]);
        }
        for from in (0..self.layout.padded()).step_by(SIDE) {
            self.put(tile, from, &values(self, tile, from, scores), &inverses, out);
        }
    }

    /// Tiles side by side, each in pieces.
    fn cut(&self, tiles: &[Tile], scratch: &mut Vec<f32>, out: Shared) {
        // Scores of each tile's vectors, and one more float per vector: the inverse of the softmax's sum.
        let sizes = tiles.iter().map(|t| t.vectors.len() * t.line());
        let starts: Vec<usize> =
            sizes.clone().scan(0, |next, size| Some(std::mem::replace(next, *next + size))).collect();
        let total: usize = sizes.sum();
        if scratch.len() < total + tiles.len() * TILE {
            scratch.reserve_exact(total + tiles.len() * TILE - scratch.len());
            scratch.resize(total + tiles.len() * TILE, 0.0);
        }
        let (scores, inverses) = scratch.split_at_mut(total);
        let (scores, inverses) = (Shared::new(scores), Shared::new(inverses));
        let stretches: Vec<(usize, Range<usize>)> = tiles.iter().enumerate().flat_map(stretches).collect();
        let left: Vec<AtomicUsize> =
            tiles.iter().map(|t| AtomicUsize::new(t.blocks.len().div_ceil(STRETCH))).collect();
        pool::for_each(stretches.len(), |i| {
            let (number, blocks) = (stretches[i].0, stretches[i].1.clone());
            let (tile, line) = (&tiles[number], tiles[number].line());
            let offset = (blocks.start - tile.blocks.start) * KV_BLOCK;
            let mut buffer = [0.0; TILE * STRETCH * KV_BLOCK];
            let width = blocks.len() * KV_BLOCK;
            products(self, tile, blocks, &mut buffer);
            for (v, products) in buffer.chunks_exact(width).take(tile.vectors.len()).enumerate() {
                // SAFETY: this stretch's own places in the scores of this vector.
                let own = unsafe { scores.part(starts[number] + v * line + offset, width) };
                own.copy_from_slice(products);
            }
            // Acquire: the products of the other stretches are seen by whoever is last.
            if left[number].fetch_sub(1, Ordering::AcqRel) == 1 {
                for v in 0..tile.vectors.len() {
                    // SAFETY: all stretches of this tile are done, and nobody else is the last of it.
                    let (p, inverse) = unsafe {
                        (scores.part(starts[number] + v * line, line), inverses.part(number * TILE + v, 1))
                    };
                    inverse[0] = 1.0 / self.weights(tile, v, p);
                }
            }
        });
        let sides = self.layout.padded().div_ceil(SIDE);
        pool::for_each(tiles.len() * sides, |i| {
            let (tile, from) = (&tiles[i / sides], i % sides * SIDE);
            // SAFETY: the scores and sums are only read from here on.
            let (p, inverses) = unsafe {
                let len = tile.vectors.len() * tile.line();
                (scores.read(starts[i / sides], len), inverses.read(i / sides * TILE, TILE))
            };
            self.put(tile, from, &values(self, tile, from, p), inverses, out);
        });
    }

    /// Turns a vector's line of products into weights and returns their sum.
    fn weights(&self, tile: &Tile, vector: usize, p: &mut [f32]) -> f32 {
        let blocks = tile.blocks.clone();
        let keys = Keys { layout: self.layout, data: &[], table: tile.table, head: tile.kv_head, blocks };
        line_softmax(&keys, &tile.vectors[vector].range, self.scale, p)
    }

    /// Writes sums of values, divided by the sums of their weights, to dimensions `from..` of the output.
    fn put(&self, tile: &Tile, from: usize, sums: &Sums, inverses: &[f32], out: Shared) {
        let width = SIDE.min(self.layout.head_dim - from);
        for ((v, sums), inverse) in tile.vectors.iter().zip(sums).zip(inverses) {
            // SAFETY: these dimensions of this vector belong to this unit of work alone; `attend` checked the length.
            let y = unsafe { out.part(v.at + from, width) };
            for (y, sum) in y.iter_mut().zip(sums.as_flattened()) {
                *y = sum * inverse;
            }
        }
    }
}

/// A tile's stretches of blocks.
fn stretches<'a>((number, tile): (usize, &'a Tile)) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
    let end = tile.blocks.end;
    tile.blocks.clone().step_by(STRETCH).map(move |b| (number, b..(b + STRETCH).min(end)))
}

multiversion! {
    fn line_softmax(keys: &Keys, range: &Range<usize>, scale: f32, p: &mut [f32]) -> f32 {
        softmax(keys, range, scale, p)
    }
}

leveled! {
    /// Dot products of a tile's vectors with all keys of some blocks, `[vectors][positions]`: a chain over the head
    /// dimension.
    fn products(problem: &Problem<T>, tile: &Tile, blocks: Range<usize>, p: &mut [f32]) = products_body
}

leveled! {
    /// `Σ_j p[j]·value_j` over each vector's range, ascending, for the dimensions from `from` on.
    fn values(problem: &Problem<T>, tile: &Tile, from: usize, p: &[f32]) -> Sums = values_body
}

/// Sums of a tile's vectors over the dimensions of a side.
type Sums = [[Lanes; GROUPS]; TILE];

#[inline(always)]
fn products_body<T: Stored, L: Load>(problem: &Problem<T>, tile: &Tile, blocks: Range<usize>, p: &mut [f32]) {
    let mut v = 0;
    while v < tile.vectors.len() {
        v += match tile.vectors.len() - v {
            8.. => products_of::<T, L, 8>(problem, tile, v, &blocks, p),
            6.. => products_of::<T, L, 6>(problem, tile, v, &blocks, p),
            4.. => products_of::<T, L, 4>(problem, tile, v, &blocks, p),
            3 => products_of::<T, L, 3>(problem, tile, v, &blocks, p),
            2 => products_of::<T, L, 2>(problem, tile, v, &blocks, p),
            _ => products_of::<T, L, 1>(problem, tile, v, &blocks, p),
        };
    }
}

#[inline(always)]
fn products_of<T: Stored, L: Load, const H: usize>(
    problem: &Problem<T>,
    tile: &Tile,
    first: usize,
    blocks: &Range<usize>,
    p: &mut [f32],
) -> usize {
    let mut block = blocks.start;
    while block < blocks.end {
        // Up to three vectors alone are too few chains to hide how long an addition takes.
        block += match H <= 3 && block + 2 <= blocks.end {
            true => products_with::<T, L, H, 2>(problem, tile, first, blocks, block, p),
            false => products_with::<T, L, H, 1>(problem, tile, first, blocks, block, p),
        };
    }
    H
}

/// `H` vectors with `B` blocks of keys from `block` on. Returns `B`.
#[inline(always)]
fn products_with<T: Stored, L: Load, const H: usize, const B: usize>(
    problem: &Problem<T>,
    tile: &Tile,
    first: usize,
    blocks: &Range<usize>,
    block: usize,
    p: &mut [f32],
) -> usize {
    let (line, d) = (blocks.len() * KV_BLOCK, problem.layout.head_dim);
    let q: [&[f32]; H] = std::array::from_fn(|h| &problem.q[tile.vectors[first + h].at..][..d]);
    let keys: [&[T]; B] = std::array::from_fn(|b| {
        &problem.layout.keys(problem.data, tile.table[block + b], tile.kv_head)[..d * LANES]
    });
    let mut acc = [[[0.0; LANES]; B]; H];
    for i in 0..d {
        for b in 0..B {
            // SAFETY: the instruction set that the caller was compiled for and runs on.
            let k = unsafe { L::lanes(&keys[b][i * LANES..][..LANES]) };
            for h in 0..H {
                acc[h][b] = fma([q[h][i]; LANES], k, acc[h][b]);
            }
        }
    }
    if !problem.scales.is_empty() {
        for b in 0..B {
            let scales = problem.layout.key_scales(problem.scales, tile.table[block + b], tile.kv_head);
            for h in 0..H {
                for (product, scale) in acc[h][b].iter_mut().zip(scales) {
                    *product *= scale;
                }
            }
        }
    }
    for h in 0..H {
        let at = (first + h) * line + (block - blocks.start) * KV_BLOCK;
        p[at..at + B * LANES].copy_from_slice(acc[h].as_flattened());
    }
    B
}

#[inline(always)]
fn values_body<T: Stored, L: Load>(problem: &Problem<T>, tile: &Tile, from: usize, p: &[f32]) -> Sums {
    let mut sums = [[[0.0; LANES]; GROUPS]; TILE];
    let wide = from + SIDE <= problem.layout.padded();
    let mut v = 0;
    while v < tile.vectors.len() {
        let sums = &mut sums[v..];
        v += match (tile.vectors.len() - v, wide) {
            (4.., true) => values_of::<T, L, 4, GROUPS>(problem, tile, v, from, p, sums),
            (3, true) => values_of::<T, L, 3, GROUPS>(problem, tile, v, from, p, sums),
            (2, true) => values_of::<T, L, 2, GROUPS>(problem, tile, v, from, p, sums),
            (_, true) => values_of::<T, L, 1, GROUPS>(problem, tile, v, from, p, sums),
            (4.., false) => values_of::<T, L, 4, 1>(problem, tile, v, from, p, sums),
            (3, false) => values_of::<T, L, 3, 1>(problem, tile, v, from, p, sums),
            (2, false) => values_of::<T, L, 2, 1>(problem, tile, v, from, p, sums),
            (_, false) => values_of::<T, L, 1, 1>(problem, tile, v, from, p, sums),
        };
    }
    sums
}

#[inline(always)]
fn values_of<T: Stored, L: Load, const H: usize, const G: usize>(
    problem: &Problem<T>,
    tile: &Tile,
    first: usize,
    from: usize,
    p: &[f32],
    sums: &mut [[Lanes; GROUPS]],
) -> usize {
    let (line, padded, origin) = (tile.line(), problem.layout.padded(), tile.blocks.start * KV_BLOCK);
    let vectors = &tile.vectors[first..first + H];
    let mut acc = [[[0.0; LANES]; G]; H];
    for block in tile.blocks.clone() {
        let values = problem.layout.values(problem.data, tile.table[block], tile.kv_head);
        let mut scales = [1.0; KV_BLOCK];
        if !problem.scales.is_empty() {
            let stored = problem.layout.value_scales(problem.scales, tile.table[block], tile.kv_head);
            scales.copy_from_slice(stored);
        }
        let positions = block * KV_BLOCK..(block + 1) * KV_BLOCK;
        // Where a vector's range begins or ends, what it does not see must not be touched: it may be anything.
        let mut whole = true;
        for v in vectors {
            whole &= v.range.start <= positions.start && positions.end <= v.range.end;
        }
        for j in positions {
            let value = &values[j % KV_BLOCK * padded + from..];
            for g in 0..G {
                // SAFETY: the instruction set that the caller was compiled for and runs on.
                let value = unsafe { L::lanes(&value[g * LANES..]) };
                for h in 0..H {
                    if whole || vectors[h].range.contains(&j) {
                        // Times 1 where there are no scales: the same bits.
                        let weight = p[(first + h) * line + j - origin] * scales[j % KV_BLOCK];
                        acc[h][g] = fma([weight; LANES], value, acc[h][g]);
                    }
                }
            }
        }
    }
    for h in 0..H {
        sums[h][..G].copy_from_slice(&acc[h]);
    }
    H
}

#[cfg(test)]
mod tests;
