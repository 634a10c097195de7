//! Attention of a few rows over long caches: the work of [`super::attention::attend`], cut finer.
//!
//! While sequences generate there are few rows and long lines of keys, fewer units of work than threads. So the keys of
//! a row are cut into stretches whose products are computed side by side; whoever finishes a line takes its softmax;
//! then the outputs are computed by groups of lanes. Every number is made by the same chain as in one piece.

use super::attention::{AttentionSpec, Keys, SequenceRows, products, softmax};
use super::kv::{KV_BLOCK, KvLayout};
use super::pool;
use super::simd::{LANES, Lanes, fma, load};
use crate::multiversion;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Query heads computed side by side.
const HEADS: usize = 4;
/// Groups of lanes per unit of work on the values, and the dimensions they are.
const GROUPS: usize = 2;
const SIDE: usize = GROUPS * LANES;
/// Blocks of keys per stretch.
const STRETCH: usize = 16;
/// Floats of scratch memory, unless a single line needs more.
const SCRATCH: usize = 1 << 18;

/// A row's query heads that share a KV head, and the keys they see.
struct Line<'a> {
    keys: Keys<'a>,
    range: Range<usize>,
    q: &'a [f32],
}

/// As [`super::attention::attend`]. `scratch` keeps its memory from call to call.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    layout: KvLayout,
    data: &[f32],
    sequences: &[SequenceRows],
    q: &[f32],
    heads: usize,
    spec: AttentionSpec,
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    let group = heads / layout.kv_heads;
    let lines = lines(layout, data, sequences, q, group, spec);
    let (mut lines, mut out) = (&lines[..], out);
    while !lines.is_empty() {
        // As many lines at a time as the scratch memory is meant to hold, but one at least.
        let mut floats = 0;
        let fits = |l: &&Line| {
            floats += group * (l.keys.line() + 1);
            floats <= SCRATCH
        };
        let count = lines.iter().take_while(fits).count().max(1);
        let (now, rest) = out.split_at_mut(count * group * layout.head_dim);
        attend_lines(&lines[..count], group, spec.scale, scratch, now);
        (lines, out) = (&lines[count..], rest);
    }
}

/// Bytes that [`attend`] keeps for a model of `heads` query heads whose sequences reach `context` tokens.
pub fn scratch_bytes(heads: usize, kv_heads: usize, context: usize) -> usize {
    let line = heads / kv_heads * (context.next_multiple_of(KV_BLOCK) + 1);
    line.max(SCRATCH) * size_of::<f32>()
}

fn attend_lines(lines: &[Line], group: usize, scale: f32, scratch: &mut Vec<f32>, out: &mut [f32]) {
    let layout = lines[0].keys.layout;
    // Scores of each line's heads, and one more float per head: the inverse of the softmax's sum.
    let starts: Vec<usize> = lines
        .iter()
        .scan(0, |next, line| Some(std::mem::replace(next, *next + group * line.keys.line())))
        .collect();
    let total = starts[lines.len() - 1] + group * lines[lines.len() - 1].keys.line();
    if scratch.len() < total + lines.len() * group {
        scratch.reserve_exact(total + lines.len() * group - scratch.len());
        scratch.resize(total + lines.len() * group, 0.0);
    }
    let (scores, inverses) = scratch.split_at_mut(total);
    let (scores, inverses) = (Shared(scores.as_mut_ptr()), Shared(inverses.as_mut_ptr()));

    let stretches: Vec<(usize, Range<usize>)> = lines.iter().enumerate().flat_map(cut).collect();
    let left: Vec<AtomicUsize> =
        lines.iter().map(|l| AtomicUsize::new(l.keys.blocks.len().div_ceil(STRETCH))).collect();
    pool::for_each(stretches.len(), |i| {
        let (number, blocks) = (stretches[i].0, stretches[i].1.clone());
        let line = &lines[number];
        let len = line.keys.line();
        let offset = (blocks.start - line.keys.blocks.start) * KV_BLOCK;
        let keys = Keys { blocks, ..line.keys.clone() };
        let mut products = [0.0; HEADS * STRETCH * KV_BLOCK];
        for first in (0..group).step_by(HEADS) {
            let count = HEADS.min(group - first);
            let products = &mut products[..count * keys.line()];
            stretch(&keys, line.heads(first..first + count), count, products);
            for (head, products) in (first..).zip(products.chunks_exact(keys.line())) {
                // SAFETY: this stretch's own places in the scores of this line and head.
                let own = unsafe { scores.part(starts[number] + head * len + offset, keys.line()) };
                own.copy_from_slice(products);
            }
        }
        // Acquire: the products of the other stretches are seen by whoever is last.
        if left[number].fetch_sub(1, Ordering::AcqRel) == 1 {
            for head in 0..group {
                // SAFETY: all stretches of this line are done, and nobody else is the last of it.
                let (p, inverse) = unsafe {
                    (scores.part(starts[number] + head * len, len), inverses.part(number * group + head, 1))
                };
                inverse[0] = 1.0 / weights(&line.keys, &line.range, scale, p);
            }
        }
    });

    let (d, padded) = (layout.head_dim, layout.padded());
    let sides = padded.div_ceil(SIDE);
    let out = Shared(out.as_mut_ptr());
    pool::for_each(lines.len() * sides, |i| {
        let (number, from) = (i / sides, i % sides * SIDE);
        let line = &lines[number];
        let len = line.keys.line();
        for first in (0..group).step_by(HEADS) {
            let count = HEADS.min(group - first);
            // SAFETY: the scores are only read from here on.
            let p = unsafe { scores.read(starts[number] + first * len, count * len) };
            let sums = combine(&line.keys, &line.range, p, from, count);
            for (h, sums) in sums[..count].iter().enumerate() {
                let width = SIDE.min(d - from);
                let head = number * group + first + h;
                // SAFETY: these dimensions of this head of this row belong to this unit of work alone.
                let (y, inverse) = unsafe { (out.part(head * d + from, width), inverses.read(head, 1)[0]) };
                for (y, sum) in y.iter_mut().zip(sums.as_flattened()) {
                    *y = sum * inverse;
                }
            }
        }
    });
}

fn lines<'a>(
    layout: KvLayout,
    data: &'a [f32],
    sequences: &'a [SequenceRows],
    q: &'a [f32],
    group: usize,
    spec: AttentionSpec,
) -> Vec<Line<'a>> {
    let width = group * layout.head_dim;
    let mut lines: Vec<Line> = Vec::new();
    let rows = sequences.iter().flat_map(|s| (0..s.rows.len()).map(move |i| (s, s.first_position + i)));
    for (sequence, position) in rows {
        let range = spec.keys(position);
        for head in 0..layout.kv_heads {
            let keys = Keys { layout, data, table: &sequence.table, head, blocks: Keys::blocks_of(&range) };
            let q = &q[lines.len() * width..][..width];
            lines.push(Line { keys, range: range.clone(), q });
        }
    }
    lines
}

impl Line<'_> {
    fn heads(&self, heads: Range<usize>) -> &[f32] {
        let d = self.keys.layout.head_dim;
        &self.q[heads.start * d..heads.end * d]
    }
}

/// A line's stretches of blocks.
fn cut<'a>((number, line): (usize, &'a Line)) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
    let blocks = line.keys.blocks.clone();
    blocks.clone().step_by(STRETCH).map(move |b| (number, b..(b + STRETCH).min(blocks.end)))
}

/// Memory written by several threads at disjoint places.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: parts are taken by units of work that do not share them, see the calls.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// The part lies within the memory, which outlives the result, and nobody else writes it meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part<'a>(&self, from: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }

    /// # Safety
    /// The part lies within the memory, which outlives the result, and nobody writes it meanwhile.
    unsafe fn read<'a>(&self, from: usize, len: usize) -> &'a [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(from), len) }
    }
}

multiversion! {
    /// Products of up to four heads with a stretch of keys.
    fn stretch(keys: &Keys, q: &[f32], heads: usize, p: &mut [f32]) {
        let d = keys.layout.head_dim;
        match heads {
            4 => products::<4>(keys, q, d, p),
            3 => products::<3>(keys, q, d, p),
            2 => products::<2>(keys, q, d, p),
            _ => products::<1>(keys, q, d, p),
        }
    }
}

multiversion! {
    /// [`softmax`] of one line; the sum.
    fn weights(keys: &Keys, range: &Range<usize>, scale: f32, p: &mut [f32]) -> f32 {
        softmax(keys, range, scale, p)
    }
}

/// Sums of up to four heads over the dimensions of a unit of work.
type Sums = [[Lanes; GROUPS]; HEADS];

multiversion! {
    /// `Σ_j p[h][j]·value_j` over the range, ascending, for the dimensions from `from` on.
    fn combine(keys: &Keys, range: &Range<usize>, p: &[f32], from: usize, heads: usize) -> Sums {
        let wide = from + SIDE <= keys.layout.padded();
        match (heads, wide) {
            (4, true) => combine_heads::<4, GROUPS>(keys, range, p, from),
            (3, true) => combine_heads::<3, GROUPS>(keys, range, p, from),
            (2, true) => combine_heads::<2, GROUPS>(keys, range, p, from),
            (_, true) => combine_heads::<1, GROUPS>(keys, range, p, from),
            (4, false) => combine_heads::<4, 1>(keys, range, p, from),
            (3, false) => combine_heads::<3, 1>(keys, range, p, from),
            (2, false) => combine_heads::<2, 1>(keys, range, p, from),
            (_, false) => combine_heads::<1, 1>(keys, range, p, from),
        }
    }
}

#[inline(always)]
fn combine_heads<const H: usize, const G: usize>(
    keys: &Keys,
    range: &Range<usize>,
    p: &[f32],
    from: usize,
) -> Sums {
    let (line, padded, first) = (keys.line(), keys.layout.padded(), keys.blocks.start * KV_BLOCK);
    let mut acc = [[[0.0; LANES]; G]; H];
    for block in keys.blocks.clone() {
        let values = keys.layout.values(keys.data, keys.table[block], keys.head);
        let (begin, end) = (range.start.max(block * KV_BLOCK), range.end.min((block + 1) * KV_BLOCK));
        for j in begin..end {
            for g in 0..G {
                let v = load(&values[(j % KV_BLOCK) * padded + from + g * LANES..]);
                for h in 0..H {
                    acc[h][g] = fma([p[h * line + j - first]; LANES], v, acc[h][g]);
                }
            }
        }
    }
    let mut out = [[[0.0; LANES]; GROUPS]; HEADS];
    for h in 0..H {
        out[h][..G].copy_from_slice(&acc[h]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::attention;
    use super::*;

    #[test]
    fn a_row_in_pieces_has_the_bits_of_a_row_in_one() {
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (4, 4, 16), (8, 1, 24), (5, 1, 32)] {
            let layout = KvLayout { kv_heads, head_dim };
            let wave = |n: usize, f: f32| (0..n).map(|i| (i as f32 * f).sin()).collect::<Vec<f32>>();
            // Enough of them to fill the scratch memory more than once.
            let positions = [0, 15, 16, 300, 777].repeat(20);
            let blocks = 60;
            let data = wave(blocks * layout.block_len(), 0.37);
            let table: std::sync::Arc<[u32]> = (0..blocks as u32).rev().collect();
            let sequences: Vec<SequenceRows> = positions
                .iter()
                .enumerate()
                .map(|(i, p)| SequenceRows { rows: i..i + 1, first_position: *p, table: table.clone() })
                .collect();
            let q = wave(positions.len() * heads * head_dim, 0.11);
            for window in [None, Some(100)] {
                let spec = AttentionSpec { scale: 0.2, window };
                let (mut got, mut want) = (vec![0.0; q.len()], vec![1.0; q.len()]);
                attend(layout, &data, &sequences, &q, heads, spec, &mut Vec::new(), &mut got);
                attention::attend(layout, &data, &sequences, &q, heads, spec, &mut want);
                assert_eq!(got, want, "{heads} {kv_heads} {head_dim} {window:?}");
            }
        }
    }
}
