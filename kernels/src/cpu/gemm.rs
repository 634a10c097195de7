//! Matrix product with one fixed order of arithmetic.
//!
//! Every element of `C` is `fma(a[i][k−1], b[k−1][j], … fma(a[i][0], b[0][j], c0))`: one chain over ascending
//! `k`, whatever the matrix sizes, blocking or number of threads. A row of the result therefore does not depend
//! on the rows beside it, which is what makes decoding equal to prefill and the engine equal to the trainer.
//!
//! The structure is the usual one (Goto & van de Geijn): `A` packed in tiles of [`MR`] rows, `B` in panels of
//! [`NR`] columns, `k` in blocks that keep one panel in the first-level cache. Between blocks the chain is carried
//! through `C` in memory.

use super::stored::Stored;
use crate::multiversion;
use half::{bf16, f16};
use rayon::prelude::*;

/// Rows per micro-tile.
pub const MR: usize = 6;
/// Columns per micro-tile and per packed panel.
pub const NR: usize = 16;
/// Longest block of `k`; blocks are made equally long.
const KC: usize = 320;
/// Most columns packed at a time: `KC·NC` floats stay in the last-level cache.
const NC: usize = 4096;
/// Below this many multiply-adds a product is not worth waking other threads.
const PARALLEL_MIN: usize = 1 << 16;

/// Elements of an operand: stored as f32, bf16 or f16, computed in f32.
#[derive(Clone, Copy)]
pub enum Elems<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16, widened while packing.
    Bf16(&'a [bf16]),
    /// Half precision, widened while packing.
    F16(&'a [f16]),
}

/// A matrix view: element `(i, j)` lies at `i·row + j·col`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    elems: Elems<'a>,
    row: usize,
    col: usize,
}

impl<'a> View<'a> {
    /// Row-major with `cols` columns.
    pub fn rows(elems: Elems<'a>, cols: usize) -> Self {
        Self { elems, row: cols, col: 1 }
    }

    /// The transpose of a row-major matrix with `cols` columns.
    pub fn transposed(elems: Elems<'a>, cols: usize) -> Self {
        Self { elems, row: 1, col: cols }
    }
}

/// `C = A·B` or, if `accumulate`, `C += A·B`. `a`: `[m, k]`, `b`: `[k, n]`, `c`: row-major `[m, n]`.
pub fn gemm(m: usize, n: usize, k: usize, a: View, b: View, c: &mut [f32], accumulate: bool) {
    assert_eq!(c.len(), m * n, "gemm: output has {} elements, wants {m}x{n}", c.len());
    if m == 0 || n == 0 {
        return;
    }
    if !accumulate {
        c.fill(0.0);
    }
    let blocks = k.div_ceil(KC).max(1);
    let kc = k.div_ceil(blocks);
    let parallel = m * n * k >= PARALLEL_MIN;
    let mut packed_a = vec![0.0; m.div_ceil(MR) * MR * kc];
    let mut packed_b = vec![0.0; n.min(NC).div_ceil(NR) * NR * kc];
    let out = Output { ptr: c.as_mut_ptr(), columns: n };
    for k0 in (0..k).step_by(kc.max(1)) {
        let kb = kc.min(k - k0);
        for_each_chunk(parallel, &mut packed_a, MR * kb, m.div_ceil(MR), |tile, buffer| {
            pack(a.elems, a.row, a.col, tile * MR, m, k0, kb, MR, buffer);
        });
        for j0 in (0..n).step_by(NC) {
            let nb = NC.min(n - j0);
            let panels = nb.div_ceil(NR);
            for_each_chunk(parallel, &mut packed_b, NR * kb, panels, |panel, buffer| {
                pack(b.elems, b.col, b.row, j0 + panel * NR, n, k0, kb, NR, buffer);
            });
            let tiles = Tiles { m, n, kb, j0, panels, a: &packed_a, b: &packed_b, out };
            tiles.run(parallel);
        }
    }
}

/// Calls `f(i, chunk i)` for the first `count` chunks of `len` elements.
fn for_each_chunk(
    parallel: bool,
    buffer: &mut [f32],
    len: usize,
    count: usize,
    f: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    let buffer = &mut buffer[..len * count];
    if parallel {
        let per_task = count.div_ceil(4 * rayon::current_num_threads()).max(1);
        buffer.par_chunks_mut(len * per_task).enumerate().for_each(|(task, chunks)| {
            for (i, chunk) in chunks.chunks_mut(len).enumerate() {
                f(task * per_task + i, chunk);
            }
        });
    } else {
        for (i, chunk) in buffer.chunks_mut(len).enumerate() {
            f(i, chunk);
        }
    }
}

/// A row-major result, written by several threads at disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub(super) ptr: *mut f32,
    pub(super) columns: usize,
}

// SAFETY: it is only written through tiles that no two tasks share: `Tiles::task` here, and in `packed` the columns
// of a task's own panels.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// One block of the product: all rows, up to `NC` columns, `kb` of `k`.
struct Tiles<'a> {
    m: usize,
    n: usize,
    kb: usize,
    j0: usize,
    panels: usize,
    a: &'a [f32],
    b: &'a [f32],
    out: Output,
}

impl Tiles<'_> {
    /// Rows per task: a packed `A` block of this many rows stays in the second-level cache.
    const ROW_TILES: usize = 24;
    /// Panels per task.
    const PANELS: usize = 16;

    fn run(&self, parallel: bool) {
        let row_tasks = self.m.div_ceil(MR * Self::ROW_TILES);
        let panel_tasks = self.panels.div_ceil(Self::PANELS);
        let task = |t: usize| self.task(t % row_tasks, t / row_tasks);
        if parallel {
            (0..row_tasks * panel_tasks).into_par_iter().with_max_len(1).for_each(task);
        } else {
            (0..row_tasks * panel_tasks).for_each(task);
        }
    }

    fn task(&self, row_task: usize, panel_task: usize) {
        let first = row_task * Self::ROW_TILES;
        let last = (first + Self::ROW_TILES).min(self.m.div_ceil(MR));
        for panel in panel_task * Self::PANELS..((panel_task + 1) * Self::PANELS).min(self.panels) {
            let b = &self.b[panel * NR * self.kb..][..NR * self.kb];
            let j = self.j0 + panel * NR;
            for tile in first..last {
                let a = &self.a[tile * MR * self.kb..][..MR * self.kb];
                let i = tile * MR;
                // SAFETY: rows `i..` and columns `j..` belong to this task alone, and both extents are
                // clipped to the matrix.
                unsafe {
                    let c = self.out.ptr.add(i * self.out.columns + j);
                    micro_tile(a, b, c, self.out.columns, MR.min(self.m - i), NR.min(self.n - j));
                }
            }
        }
    }
}

multiversion! {
    /// Packs `width` rows or columns from `first` on, over `kb` of `k` from `k0`, as `[kb][width]`; those past
    /// `limit` are zero. Element `(i, k)` lies at `i·stride + k·k_stride`.
    fn pack(elems: Elems, stride: usize, k_stride: usize, first: usize, limit: usize, k0: usize, kb: usize, width: usize, out: &mut [f32]) {
        let count = width.min(limit - first);
        if count < width {
            out.fill(0.0);
        }
        let start = first * stride + k0 * k_stride;
        match elems {
            Elems::F32(x) => pack_from(&x[start..], stride, k_stride, count, kb, width, out),
            Elems::Bf16(x) => pack_from(&x[start..], stride, k_stride, count, kb, width, out),
            Elems::F16(x) => pack_from(&x[start..], stride, k_stride, count, kb, width, out),
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn pack_from<T: Stored>(
    x: &[T],
    stride: usize,
    k_stride: usize,
    count: usize,
    kb: usize,
    width: usize,
    out: &mut [f32],
) {
    if stride == 1 {
        for (k, row) in out.chunks_exact_mut(width).enumerate() {
            for (o, v) in row[..count].iter_mut().zip(&x[k * k_stride..][..count]) {
                *o = v.widen();
            }
        }
    } else if k_stride == 1 {
        let mut buffer = [0.0; KC];
        for i in 0..count {
            let row = T::floats(&x[i * stride..][..kb], &mut buffer);
            for (k, v) in row.iter().enumerate() {
                out[k * width + i] = *v;
            }
        }
    } else {
        for k in 0..kb {
            for i in 0..count {
                out[k * width + i] = x[i * stride + k * k_stride].widen();
            }
        }
    }
}

/// `C[..rows, ..columns] += A-tile · B-panel`.
///
/// # Safety
/// `c` points to `rows` rows of `columns` writable floats, `stride` apart, that nothing else touches.
pub(crate) unsafe fn micro_tile(
    a: &[f32],
    b: &[f32],
    c: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
) {
    if rows == MR && columns == NR {
        // SAFETY: the full tile is the caller's promise.
        full_tile(a, b, unsafe { TileMut::new(c, stride) });
        return;
    }
    let mut edge = [0.0; MR * NR];
    for i in 0..rows {
        // SAFETY: row `i` of the caller's tile.
        let row = unsafe { std::slice::from_raw_parts(c.add(i * stride), columns) };
        edge[i * NR..][..columns].copy_from_slice(row);
    }
    // SAFETY: `edge` is a full tile of its own.
    full_tile(a, b, unsafe { TileMut::new(edge.as_mut_ptr(), NR) });
    for i in 0..rows {
        // SAFETY: row `i` of the caller's tile.
        let row = unsafe { std::slice::from_raw_parts_mut(c.add(i * stride), columns) };
        row.copy_from_slice(&edge[i * NR..][..columns]);
    }
}

/// A full `MR × NR` tile somewhere in a row-major matrix.
struct TileMut {
    ptr: *mut f32,
    stride: usize,
}

impl TileMut {
    /// # Safety
    /// `ptr` points to `MR` rows of `NR` floats, `stride` apart, exclusively.
    unsafe fn new(ptr: *mut f32, stride: usize) -> Self {
        Self { ptr, stride }
    }

    #[inline(always)]
    fn row(&mut self, i: usize) -> &mut [f32; NR] {
        assert!(i < MR);
        // SAFETY: promised by the caller of `new`; `&mut self` keeps it exclusive.
        unsafe { &mut *self.ptr.add(i * self.stride).cast() }
    }
}

multiversion! {
    /// The inner loop: a full tile in registers, one chain of multiply-adds per element.
    fn full_tile(a: &[f32], b: &[f32], c: TileMut) {
        let mut c = c;
        let mut acc = [[0.0; NR]; MR];
        for i in 0..MR {
            acc[i] = *c.row(i);
        }
        for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
            let a: &[f32; MR] = a.try_into().expect("MR");
            let b: &[f32; NR] = b.try_into().expect("NR");
            for i in 0..MR {
                for j in 0..NR {
                    acc[i][j] = a[i].mul_add(b[j], acc[i][j]);
                }
            }
        }
        for i in 0..MR {
            *c.row(i) = acc[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// The definition: one chain over ascending k.
    fn reference(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        for i in 0..m {
            for j in 0..n {
                for l in 0..k {
                    c[i * n + j] = a[i * k + l].mul_add(b[l * n + j], c[i * n + j]);
                }
            }
        }
    }

    fn transpose(r: usize, c: usize, x: &[f32]) -> Vec<f32> {
        (0..r * c).map(|i| x[(i % r) * c + i / r]).collect()
    }

    #[test]
    fn product_is_the_chain_over_k_bit_for_bit_in_all_transpositions() {
        for (m, n, k) in
            [(1, 1, 1), (1, 17, 5), (7, 33, 321), (6, 16, 320), (13, 50, 641), (3, 4100, 9), (5, 8, 0)]
        {
            let (a, b, c0) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
            let (at, bt) = (transpose(m, k, &a), transpose(k, n, &b));
            let mut want = c0.clone();
            reference(m, n, k, &a, &b, &mut want);
            let views_a = [View::rows(Elems::F32(&a), k), View::transposed(Elems::F32(&at), m)];
            let views_b = [View::rows(Elems::F32(&b), n), View::transposed(Elems::F32(&bt), k)];
            for va in views_a {
                for vb in views_b {
                    let mut c = c0.clone();
                    gemm(m, n, k, va, vb, &mut c, true);
                    assert_eq!(c, want, "{m}x{n}x{k}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        let (m, n, k) = (40, 70, 700);
        let (a, b) = (values(m * k, 4), values(k * n, 5));
        let mut all = vec![0.0; m * n];
        gemm(m, n, k, View::rows(Elems::F32(&a), k), View::rows(Elems::F32(&b), n), &mut all, false);
        for i in 0..m {
            let mut one = vec![0.0; n];
            let row = &a[i * k..][..k];
            gemm(1, n, k, View::rows(Elems::F32(row), k), View::rows(Elems::F32(&b), n), &mut one, false);
            assert_eq!(one, all[i * n..][..n]);
        }
    }

    #[test]
    fn narrow_operands_are_widened_exactly_in_all_transpositions() {
        let (m, n, k) = (9, 20, 333);
        let (a, b) = (values(m * k, 6), values(k * n, 7));
        let brains = |x: &[f32]| x.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>();
        let halves = |x: &[f32]| x.iter().map(|v| f16::from_f32(*v * 1e-4)).collect::<Vec<_>>();
        let (a16, a_half) = (brains(&a), halves(&a));
        let wide = [a16.iter().map(|v| v.to_f32()).collect(), a_half.iter().map(|v| v.to_f32()).collect()];
        let narrow = [Elems::Bf16(&a16), Elems::F16(&a_half)];
        for (narrow, wide) in narrow.into_iter().zip::<[Vec<f32>; 2]>(wide) {
            for view in [View::rows, View::transposed] {
                // Transposed, the m × k elements are those of a k × m matrix.
                let columns = if view(Elems::F32(&wide), k).col == 1 { k } else { m };
                let (mut got, mut want) = (vec![0.0; m * n], vec![0.0; m * n]);
                gemm(m, n, k, view(narrow, columns), View::rows(Elems::F32(&b), n), &mut got, false);
                gemm(
                    m,
                    n,
                    k,
                    view(Elems::F32(&wide), columns),
                    View::rows(Elems::F32(&b), n),
                    &mut want,
                    false,
                );
                assert_eq!(got, want);
            }
        }
    }
}
