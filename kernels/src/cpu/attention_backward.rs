//! Gradients of causal attention, recomputing the probabilities a block of query rows at a time.

use super::attention::{AttentionSpec, Keys, combine, products, softmax};
use super::kv::{KV_BLOCK, KvLayout};
use super::pool;
use super::simd::{LANES, fma, load, tree_sum};
use crate::multiversion;
use std::ops::Range;
use std::sync::Mutex;

/// Query rows per block.
const ROWS: usize = 16;

/// Dimensions of a packed batch of documents.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// KV heads and head width.
    pub layout: KvLayout,
}

/// Inputs: `q`, `dy`: `[rows, heads, head_dim]`; `k`, `v`: `[rows, kv_heads, head_dim]`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Rotated queries.
    pub q: &'a [f32],
    /// Rotated keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Upstream gradient.
    pub dy: &'a [f32],
}

/// Gradients, shaped as the inputs; zero on entry.
pub struct Gradients<'a> {
    /// Of the queries.
    pub dq: &'a mut [f32],
    /// Of the keys.
    pub dk: &'a mut [f32],
    /// Of the values.
    pub dv: &'a mut [f32],
}

/// Gradients of causal attention within documents of the given lengths.
pub fn attend_backward(shape: Shape, documents: &[usize], spec: AttentionSpec, x: Inputs, g: Gradients) {
    let kv_heads = shape.layout.kv_heads;
    let mut start = 0;
    let tasks: Vec<(usize, usize, usize)> = documents
        .iter()
        .flat_map(|&len| {
            start += len;
            (0..kv_heads).map(move |head| (start - len, len, head))
        })
        .collect();
    // As many workspaces as threads, made before the loop: what is held at most is the same in every run.
    let longest = documents.iter().copied().max().unwrap_or(0);
    let mut spaces: Vec<Workspace> =
        (0..tasks.len().min(pool::threads())).map(|_| Workspace::new(shape, longest)).collect();
    let gradients = Mutex::new(g);
    pool::for_each_with(tasks.len(), &mut spaces, |task, space| {
        let (start, len, head) = tasks[task];
        space.part(shape, spec, x, start, len, head);
        let mut g = gradients.lock().expect("copying does not panic");
        space.out.scatter(shape, start, len, head, &mut g);
    });
}

/// Gradients of one KV head in one document: `dq`: `[len, group, head_dim]`; `dk`, `dv`: `[len, padded]`.
struct Part {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Part {
    fn scatter(&self, s: Shape, start: usize, len: usize, head: usize, g: &mut Gradients) {
        let (d, padded, kv_heads) = (s.layout.head_dim, s.layout.padded(), s.layout.kv_heads);
        let width = s.heads / kv_heads * d;
        for i in 0..len {
            let unit = (start + i) * kv_heads + head;
            g.dq[unit * width..][..width].copy_from_slice(&self.dq[i * width..][..width]);
            g.dk[unit * d..][..d].copy_from_slice(&self.dk[i * padded..][..d]);
            g.dv[unit * d..][..d].copy_from_slice(&self.dv[i * padded..][..d]);
        }
    }
}

/// What a thread needs for one KV head of one document, sized for the longest one.
struct Workspace {
    /// Keys, then values of the head: `[len, head_dim]` each.
    head: [Vec<f32>; 2],
    /// KV blocks: keys transposed beside values, and values transposed beside keys.
    blocks: [Vec<f32>; 2],
    table: Vec<u32>,
    rows: Scratch,
    out: Part,
}

impl Workspace {
    fn new(shape: Shape, longest: usize) -> Self {
        let one = KvLayout { kv_heads: 1, head_dim: shape.layout.head_dim };
        let (d, padded, blocks) = (one.head_dim, one.padded(), longest.div_ceil(KV_BLOCK));
        let group = shape.heads / shape.layout.kv_heads;
        let zeros = |len| vec![0.0; len];
        Self {
            head: [zeros(longest * d), zeros(longest * d)],
            blocks: [zeros(blocks * one.block_len()), zeros(blocks * one.block_len())],
            table: (0..blocks as u32).collect(),
            rows: Scratch::new(padded, blocks * KV_BLOCK),
            out: Part {
                dq: zeros(longest * group * d),
                dk: zeros(longest * padded),
                dv: zeros(longest * padded),
            },
        }
    }

    fn part(&mut self, shape: Shape, spec: AttentionSpec, x: Inputs, start: usize, len: usize, head: usize) {
        let one = KvLayout { kv_heads: 1, head_dim: shape.layout.head_dim };
        let (d, kv_heads) = (one.head_dim, shape.layout.kv_heads);
        for (to, from) in self.head.iter_mut().zip([x.k, x.v]) {
            for (i, to) in to.chunks_exact_mut(d).take(len).enumerate() {
                to.copy_from_slice(&from[((start + i) * kv_heads + head) * d..][..d]);
            }
        }
        let [k, v] = self.head.each_ref().map(|x| &x[..len * d]);
        let table = &self.table[..len.div_ceil(KV_BLOCK)];
        let [kv, vk] = &mut self.blocks;
        for (blocks, k, v) in [(&mut *kv, k, v), (&mut *vk, v, k)] {
            blocks[..table.len() * one.block_len()].fill(0.0);
            one.write(blocks, table, 0, k, v);
        }
        self.out.dk[..len * one.padded()].fill(0.0);
        self.out.dv[..len * one.padded()].fill(0.0);
        let group = shape.heads / kv_heads;
        for first in (0..len).step_by(ROWS) {
            let rows = ROWS.min(len - first);
            let seen = spec.keys(first).start..first + rows;
            let blocks = Keys::blocks_of(&seen);
            let keys = |data| Keys { layout: one, data, table, head: 0, blocks: blocks.clone() };
            for g in 0..group {
                let at = |i: usize| ((start + first + i) * kv_heads + head) * group * d + g * d;
                self.rows.load(rows, d, one.padded(), |i| (&x.q[at(i)..][..d], &x.dy[at(i)..][..d]));
                let block = Rows { first, count: rows, spec, group, g };
                row_block(&keys(kv), &keys(vk), block, &mut self.rows, &mut self.out);
            }
        }
    }
}

/// A block of query rows of one head.
#[derive(Clone, Copy)]
struct Rows {
    first: usize,
    count: usize,
    spec: AttentionSpec,
    group: usize,
    g: usize,
}

/// Queries and upstream gradients of a row block, `[ROWS, padded]`, and its lines of probabilities.
struct Scratch {
    q: Vec<f32>,
    dy: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
}

impl Scratch {
    fn new(padded: usize, line: usize) -> Self {
        let zeros = |len| vec![0.0; ROWS * len];
        Self { q: zeros(padded), dy: zeros(padded), p: zeros(line), ds: zeros(line) }
    }

    fn load<'a>(
        &mut self,
        rows: usize,
        d: usize,
        padded: usize,
        row: impl Fn(usize) -> (&'a [f32], &'a [f32]),
    ) {
        for buffer in [&mut self.q, &mut self.dy] {
            buffer[..ROWS * padded].fill(0.0);
        }
        for i in 0..rows {
            let (q, dy) = row(i);
            self.q[i * padded..][..d].copy_from_slice(q);
            self.dy[i * padded..][..d].copy_from_slice(dy);
        }
    }
}

multiversion! {
    fn row_block(kv: &Keys, vk: &Keys, rows: Rows, scratch: &mut Scratch, out: &mut Part) {
        let (line, padded) = (kv.line(), kv.layout.padded());
        for i in (0..ROWS).step_by(4) {
            let (q, dy) = (&scratch.q[i * padded..], &scratch.dy[i * padded..]);
            products::<4>(kv, q, padded, &mut scratch.p[i * line..]);
            products::<4>(vk, dy, padded, &mut scratch.ds[i * line..]);
        }
        for i in 0..rows.count {
            let range = rows.spec.keys(rows.first + i);
            let (p, ds) = (&mut scratch.p[i * line..][..line], &mut scratch.ds[i * line..][..line]);
            let inverse = 1.0 / softmax(kv, &range, rows.spec.scale, p);
            score_gradients(p, ds, inverse, rows.spec.scale);
        }
        query_gradients(vk, rows, &scratch.ds, out);
        let seen = rows.spec.keys(rows.first).start..rows.first + rows.count;
        let first = kv.blocks.start * KV_BLOCK;
        key_gradients(&scratch.ds, &scratch.q, seen.clone(), first, line, rows.count, padded, &mut out.dk);
        key_gradients(&scratch.p, &scratch.dy, seen, first, line, rows.count, padded, &mut out.dv);
    }
}

/// `p ← p·inverse`, `ds ← p·(dp − Σ p·dp)·scale` where `ds` holds `dp` on entry.
#[inline(always)]
fn score_gradients(p: &mut [f32], ds: &mut [f32], inverse: f32, scale: f32) {
    let mut sum = [0.0; LANES];
    for (p, dp) in p.chunks_exact_mut(LANES).zip(ds.chunks_exact(LANES)) {
        for i in 0..LANES {
            p[i] *= inverse;
        }
        sum = fma(load(p), load(dp), sum);
    }
    let sum = tree_sum(sum);
    for (p, ds) in p.iter().zip(ds) {
        *ds = p * (*ds - sum) * scale;
    }
}

/// `dq_i = Σ_j ds_ij · k_j`, four rows at a time. Where a row does not see a key that another one sees, `ds` is zero.
#[inline(always)]
fn query_gradients(vk: &Keys, rows: Rows, ds: &[f32], out: &mut Part) {
    let (d, line) = (vk.layout.head_dim, vk.line());
    for i in (0..rows.count).step_by(4) {
        let last = (i + 4).min(rows.count) - 1;
        let range = rows.spec.keys(rows.first + i).start..rows.spec.keys(rows.first + last).end;
        combine::<4>(vk, &range, &ds[i * line..], |h, lane, sums| {
            if i + h <= last {
                let dq = &mut out.dq[((rows.first + i + h) * rows.group + rows.g) * d..][..d];
                let count = LANES.min(d - lane);
                dq[lane..][..count].copy_from_slice(&sums[..count]);
            }
        });
    }
}

/// `acc_j += Σ_i w[i][j − first] · x_i` for the keys `seen`: a chain over the rows of the block, in order. `w`:
/// `[rows, line]`, `x`: `[rows, padded]`, `acc`: `[keys, padded]`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn key_gradients(
    w: &[f32],
    x: &[f32],
    seen: Range<usize>,
    first: usize,
    line: usize,
    rows: usize,
    padded: usize,
    acc: &mut [f32],
) {
    let mut j = seen.start;
    while j < seen.end {
        let (w, acc) = (&w[j - first..], &mut acc[j * padded..]);
        let four = j + 4 <= seen.end;
        for lane in (0..padded).step_by(LANES) {
            match four {
                true => rank_update::<4>(w, line, rows, &x[lane..], padded, &mut acc[lane..]),
                false => rank_update::<1>(w, line, rows, &x[lane..], padded, &mut acc[lane..]),
            }
        }
        j += if four { 4 } else { 1 };
    }
}

/// One group of lanes of [`key_gradients`] for `K` keys side by side.
#[inline(always)]
fn rank_update<const K: usize>(
    w: &[f32],
    line: usize,
    rows: usize,
    x: &[f32],
    padded: usize,
    acc: &mut [f32],
) {
    let mut sums = [[0.0; LANES]; K];
    for k in 0..K {
        sums[k] = load(&acc[k * padded..]);
    }
    for i in 0..rows {
        let x = load(&x[i * padded..]);
        let w: &[f32; K] = w[i * line..][..K].try_into().expect("K");
        for k in 0..K {
            sums[k] = fma([w[k]; LANES], x, sums[k]);
        }
    }
    for k in 0..K {
        acc[k * padded..][..LANES].copy_from_slice(&sums[k]);
    }
}
