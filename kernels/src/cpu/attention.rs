//! Causal attention over KV blocks, one query row at a time.
//!
//! For one row the scores of all its keys lie in a scratch line; nothing of size rows × rows exists. The order of
//! arithmetic depends only on the key's position in its document: scores are a chain over the head dimension,
//! the softmax sum runs over blocks of 16 keys lane by lane and then by the fixed tree, outputs are a chain over
//! ascending keys. The query heads that share a KV head are computed side by side.

use super::kv::{KV_BLOCK, KvLayout};
use super::simd::{LANES, Lanes, exp, fma, load, tree_sum};
use crate::multiversion;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Constants of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Multiplies the scores: `head_dim^(−1/2)` as a rule.
    pub scale: f32,
    /// A query sees itself and `window − 1` tokens before it; `None` = all.
    pub window: Option<usize>,
}

impl AttentionSpec {
    /// Keys that the query at `position` sees.
    #[inline(always)]
    pub fn keys(self, position: usize) -> Range<usize> {
        let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        first..position + 1
    }
}

/// Consecutive rows of a forward pass that belong to one sequence.
#[derive(Clone, Debug)]
pub struct SequenceRows {
    /// Rows of the forward pass.
    pub rows: Range<usize>,
    /// Position of the first of them in its sequence.
    pub first_position: usize,
    /// The sequence's KV blocks in order, at least up to its last position.
    pub table: Arc<[u32]>,
}

/// Attention of every row over its sequence's keys up to itself. `q`, `out`: `[rows, heads, head_dim]`; `data`:
/// KV blocks in which the rows' own keys are written already. The sequences' rows follow one another from 0.
pub fn attend(
    layout: KvLayout,
    data: &[f32],
    sequences: &[SequenceRows],
    q: &[f32],
    heads: usize,
    spec: AttentionSpec,
    out: &mut [f32],
) {
    let group = heads / layout.kv_heads;
    let width = group * layout.head_dim;
    let owners: Vec<(&SequenceRows, usize)> =
        sequences.iter().flat_map(|s| (0..s.rows.len()).map(move |i| (s, s.first_position + i))).collect();
    // One unit of work is a row and a KV head: `group · head_dim` consecutive floats of the output.
    out.par_chunks_mut(width).enumerate().with_min_len(layout.kv_heads.min(4)).for_each_init(
        Vec::new,
        |scratch, (i, out)| {
            let (row, head) = (i / layout.kv_heads, i % layout.kv_heads);
            let (sequence, position) = owners[row];
            let range = spec.keys(position);
            let keys = Keys { layout, data, table: &sequence.table, head, blocks: Keys::blocks_of(&range) };
            attend_group(&keys, range, &q[i * width..][..width], spec.scale, scratch, out);
        },
    );
}

/// The keys and values of one KV head of one sequence, as far as some query rows see them.
#[derive(Clone)]
pub(crate) struct Keys<'a> {
    /// Block dimensions.
    pub layout: KvLayout,
    /// KV blocks.
    pub data: &'a [f32],
    /// Blocks of the sequence.
    pub table: &'a [u32],
    /// KV head.
    pub head: usize,
    /// Blocks looked at, numbered from the sequence's start.
    pub blocks: Range<usize>,
}

impl Keys<'_> {
    /// Blocks that hold a range of positions.
    pub fn blocks_of(range: &Range<usize>) -> Range<usize> {
        range.start / KV_BLOCK..range.end.div_ceil(KV_BLOCK)
    }

    /// Positions in the blocks: the length of a line of scores.
    #[inline(always)]
    pub fn line(&self) -> usize {
        self.blocks.len() * KV_BLOCK
    }
}

multiversion! {
    /// All query heads of one row that share a KV head: `q`, `out`: `[group, head_dim]`.
    fn attend_group(keys: &Keys, range: Range<usize>, q: &[f32], scale: f32, scratch: &mut Vec<f32>, out: &mut [f32]) {
        let d = keys.layout.head_dim;
        scratch.resize(4 * keys.line(), 0.0);
        let (mut q, mut out) = (q, out);
        while !q.is_empty() {
            let count = (q.len() / d).min(4);
            let (now, rest) = out.split_at_mut(count * d);
            match count {
                4 => attend_heads::<4>(keys, &range, &q[..4 * d], scale, scratch, now),
                3 => attend_heads::<3>(keys, &range, &q[..3 * d], scale, scratch, now),
                2 => attend_heads::<2>(keys, &range, &q[..2 * d], scale, scratch, now),
                _ => attend_heads::<1>(keys, &range, &q[..d], scale, scratch, now),
            }
            (q, out) = (&q[count * d..], rest);
        }
    }
}

#[inline(always)]
fn attend_heads<const H: usize>(
    keys: &Keys,
    range: &Range<usize>,
    q: &[f32],
    scale: f32,
    p: &mut [f32],
    out: &mut [f32],
) {
    let (d, line) = (keys.layout.head_dim, keys.line());
    products::<H>(keys, q, d, p);
    let mut inverse = [0.0; H];
    for h in 0..H {
        inverse[h] = 1.0 / softmax(keys, range, scale, &mut p[h * line..][..line]);
    }
    combine::<H>(keys, range, p, |h, lane, sums| {
        let count = LANES.min(d - lane);
        for (o, a) in out[h * d + lane..][..count].iter_mut().zip(&sums) {
            *o = a * inverse[h];
        }
    });
}

/// Dot products of `H` vectors, `stride` apart, with every key of the blocks, into lines of `p`: a chain over the
/// head dimension.
#[inline(always)]
pub(crate) fn products<const H: usize>(keys: &Keys, q: &[f32], stride: usize, p: &mut [f32]) {
    let line = keys.line();
    for (t, block) in keys.blocks.clone().enumerate() {
        let k = keys.layout.keys(keys.data, keys.table[block], keys.head);
        let mut acc = [[0.0; LANES]; H];
        for (i, k) in k.chunks_exact(LANES).enumerate() {
            let k = load(k);
            for h in 0..H {
                acc[h] = fma([q[h * stride + i]; LANES], k, acc[h]);
            }
        }
        for h in 0..H {
            p[h * line + t * KV_BLOCK..][..LANES].copy_from_slice(&acc[h]);
        }
    }
}

/// `Σ_j p[h][j]·value_j` over the range, ascending, a group of lanes at a time: `put(h, first lane, sums)`.
#[inline(always)]
pub(crate) fn combine<const H: usize>(
    keys: &Keys,
    range: &Range<usize>,
    p: &[f32],
    mut put: impl FnMut(usize, usize, Lanes),
) {
    let (line, padded, first) = (keys.line(), keys.layout.padded(), keys.blocks.start * KV_BLOCK);
    for lane in (0..padded).step_by(LANES) {
        let mut acc = [[0.0; LANES]; H];
        for block in keys.blocks.clone() {
            let values = keys.layout.values(keys.data, keys.table[block], keys.head);
            let begin = range.start.max(block * KV_BLOCK);
            let end = range.end.min((block + 1) * KV_BLOCK);
            for j in begin..end {
                let v = load(&values[(j % KV_BLOCK) * padded + lane..]);
                for h in 0..H {
                    acc[h] = fma([p[h * line + j - first]; LANES], v, acc[h]);
                }
            }
        }
        for h in 0..H {
            put(h, lane, acc[h]);
        }
    }
}

/// Turns a line of products into `exp(scale·product − max)`, 0 outside the range, and returns their sum.
#[inline(always)]
pub(crate) fn softmax(keys: &Keys, range: &Range<usize>, scale: f32, p: &mut [f32]) -> f32 {
    let first = keys.blocks.start * KV_BLOCK;
    for (j, x) in p.iter_mut().enumerate() {
        let seen = first + j >= range.start && first + j < range.end;
        *x = if seen { *x * scale } else { f32::NEG_INFINITY };
    }
    let mut lanes: Lanes = [f32::NEG_INFINITY; LANES];
    for x in p.chunks_exact(LANES) {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    let max = lanes.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let mut sum = [0.0; LANES];
    for x in p.chunks_exact_mut(LANES) {
        for i in 0..LANES {
            x[i] = exp(x[i] - max);
            sum[i] += x[i];
        }
    }
    tree_sum(sum)
}
