//! Matrix product with one fixed order of arithmetic.
//!
//! Every element of `C` is `fma(a[i][k−1], b[k−1][j], … fma(a[i][0], b[0][j], c0))`: one chain over ascending
//! `k`, whatever the matrix sizes, blocking, instruction set or number of threads. A row of the result therefore does
//! not depend on the rows beside it, which is what makes decoding equal to prefill and the engine equal to the trainer.
//!
//! The structure follows Goto & van de Geijn: `A` is packed in tiles of a few rows, `B` in panels of [`LANES`] columns
//! (`pack`), and a tile of `C` stays in registers while a block of `k` goes by (`micro`). Between blocks the chain is
//! carried through `C` in memory. The smaller operand is packed once and shared by all tasks; each task packs its own
//! part of the larger one just before it uses it, into memory that stays in the second-level cache.

mod micro;
mod pack;

use super::pool;
use super::simd::{self, LANES, Level};
use super::stored::Stored;
use half::{bf16, f16};
use micro::{MAX_COLUMNS, MAX_TILE, Micro};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Longest block of `k`; blocks are made equally long.
const KC: usize = 768;
/// Blocks of `k` begin at multiples of this, as operands in blocks of their own want.
const K_STEP: usize = 64;
/// Most rows or columns of the shared operand that are packed at a time: they stay in the last-level cache.
const SHARED: usize = 4096;
/// Most floats of its own operand that a task packs: half of a second-level cache of 512 KiB.
const OWN: usize = 1 << 16;
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

/// Part of an operand: `count` of its rows (of `A`) or columns (of `B`) from `first` on, over a block of `k`.
#[derive(Clone, Debug)]
pub(crate) struct Strip {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) k: Range<usize>,
}

/// The right operand, `[k, n]`, wherever it comes from.
pub(crate) trait Columns: Sync {
    /// Packs a strip of at most [`LANES`] columns as `[k][LANES]`, the missing columns zero.
    fn pack(&self, strip: &Strip, level: Level, out: &mut [MaybeUninit<f32>]);
}

impl Columns for View<'_> {
    fn pack(&self, strip: &Strip, level: Level, out: &mut [MaybeUninit<f32>]) {
        pack::pack(self.elems, self.col, self.row, strip, LANES, level, out);
    }
}

/// [`Columns::pack`] for columns `stride` apart whose elements are `k_stride` apart.
pub(super) fn pack_columns(
    elems: Elems,
    stride: usize,
    k_stride: usize,
    strip: &Strip,
    level: Level,
    out: &mut [MaybeUninit<f32>],
) {
    pack::pack(elems, stride, k_stride, strip, LANES, level, out);
}

/// `C = A·B` or, if `accumulate`, `C += A·B`. `a`: `[m, k]`, `b`: `[k, n]`, `c`: row-major `[m, n]`.
pub fn gemm(m: usize, n: usize, k: usize, a: View, b: View, c: &mut [f32], accumulate: bool) {
    gemm_columns(m, n, k, a, &b, c, accumulate);
}

/// [`gemm`] with a right operand that packs itself.
pub(crate) fn gemm_columns(
    m: usize,
    n: usize,
    k: usize,
    a: View,
    b: &impl Columns,
    c: &mut [f32],
    accumulate: bool,
) {
    assert_eq!(c.len(), m * n, "gemm: output has {} elements, wants {m}x{n}", c.len());
    let out = Output { ptr: c.as_mut_ptr(), columns: n };
    Product { m, n, k, a, b, out, rounded: None, accumulate, level: simd::level() }.run();
}

/// `A·B` as a new row-major `[m, n]`.
pub fn product(m: usize, n: usize, k: usize, a: View, b: View) -> Vec<f32> {
    let mut c = Vec::new();
    product_into(m, n, k, a, b, &mut c);
    c
}

/// [`product`] in memory that is there already. What `c` held is gone.
pub fn product_into(m: usize, n: usize, k: usize, a: View, b: View, c: &mut Vec<f32>) {
    c.clear();
    c.reserve_exact(m * n);
    let out = Output { ptr: c.as_mut_ptr(), columns: n };
    Product { m, n, k, a, b: &b, out, rounded: None, accumulate: false, level: simd::level() }.run();
    // SAFETY: the capacity is there, and `run` has written every element.
    unsafe { c.set_len(m * n) };
}

/// [`product`], each element rounded once from its f32 value as it is written.
pub fn product_as<T: Stored>(m: usize, n: usize, k: usize, a: View, b: View) -> Vec<T> {
    let mut c: Vec<T> = Vec::with_capacity(m * n);
    // Between blocks of `k` the chain goes through memory in f32.
    let mut between: Vec<f32> = Vec::with_capacity(if k > KC { m * n } else { 0 });
    let rounded = Rounded { ptr: c.as_mut_ptr().cast(), columns: n, write: write_rounded::<T> };
    let out = Output { ptr: between.as_mut_ptr(), columns: n };
    let (rounded, level) = (Some(rounded), simd::level());
    Product { m, n, k, a, b: &b, out, rounded, accumulate: false, level }.run();
    // SAFETY: the capacity is there, and `run` has written every element.
    unsafe { c.set_len(m * n) };
    c
}

/// Where a product's last block of `k` goes if it is rounded: a row-major result of another element.
#[derive(Clone, Copy)]
struct Rounded {
    ptr: *mut u8,
    columns: usize,
    /// Rounds elements to the result, from this one on.
    write: unsafe fn(from: &[f32], to: *mut u8, first: usize),
}

// SAFETY: as `Output`: it is only written through tiles that no two tasks share.
unsafe impl Send for Rounded {}
// SAFETY: as above.
unsafe impl Sync for Rounded {}

/// # Safety
/// `to` points to more than `first + from.len()` elements of `T`, of which nobody else touches these.
unsafe fn write_rounded<T: Stored>(from: &[f32], to: *mut u8, first: usize) {
    let mut row = [T::zeroed(); MAX_COLUMNS];
    let row = &mut row[..from.len()];
    T::narrow_block(from, row);
    // Copied in groups of a known length: a call of `memmove` for each row took two percent of a training step.
    let (groups, rest) = row.as_chunks::<LANES>();
    // SAFETY: the caller's promise.
    unsafe {
        let to = to.cast::<T>().add(first);
        for (at, group) in groups.iter().enumerate() {
            to.add(at * LANES).cast::<[T; LANES]>().write(*group);
        }
        std::ptr::copy_nonoverlapping(rest.as_ptr(), to.add(groups.len() * LANES), rest.len());
    }
}

/// A row-major result, written by several threads at disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub(super) ptr: *mut f32,
    pub(super) columns: usize,
}

// SAFETY: it is only written through tiles that no two tasks share: `Block::task` here, and in `packed` the columns
// of a task's own panels.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// A product to compute. `out` has `m` rows of `n` elements, to be written by nobody else; they may be uninitialised
/// unless they are accumulated to.
struct Product<'a, B> {
    m: usize,
    n: usize,
    k: usize,
    a: View<'a>,
    b: &'a B,
    out: Output,
    rounded: Option<Rounded>,
    accumulate: bool,
    level: Level,
}

/// Which operand a packed buffer is of.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    /// Rows of `A`.
    Rows,
    /// Columns of `B`.
    Columns,
}

impl<B: Columns> Product<'_, B> {
    fn run(&self) {
        let (own, shared) =
            if self.m > self.n { (Side::Rows, Side::Columns) } else { (Side::Columns, Side::Rows) };
        let micro = Micro::at(self.level);
        let kc = self.k.div_ceil(self.k.div_ceil(KC).max(1)).next_multiple_of(K_STEP);
        let width = self.extent(shared).min(SHARED).next_multiple_of(micro.unit(shared));
        let mut packed = Vec::with_capacity(width * kc);
        // Without a `k` the one empty block still sets the result to zero.
        for k0 in (0..self.k.max(1)).step_by(kc.max(1)) {
            let k = k0..(k0 + kc).min(self.k);
            for first in (0..self.extent(shared)).step_by(width.max(1)) {
                let count = width.min(self.extent(shared) - first);
                let strip = Strip { first, count, k: k.clone() };
                let block = Block { product: self, micro, own, shared, strip };
                block.run(&mut packed.spare_capacity_mut()[..width * k.len()]);
            }
        }
    }

    fn extent(&self, side: Side) -> usize {
        match side {
            Side::Rows => self.m,
            Side::Columns => self.n,
        }
    }

    fn parallel(&self) -> bool {
        self.m * self.n * self.k >= PARALLEL_MIN
    }
}

/// What is done between two synchronisations: a strip of the shared operand times all of the other one, over one block
/// of `k`.
struct Block<'a, B> {
    product: &'a Product<'a, B>,
    micro: Micro,
    own: Side,
    shared: Side,
    strip: Strip,
}

impl<B: Columns> Block<'_, B> {
    fn run(&self, packed: &mut [MaybeUninit<f32>]) {
        let (unit, kb) = (self.micro.unit(self.shared), self.strip.k.len());
        let threads = if self.product.parallel() { pool::threads() } else { 1 };
        let units = self.strip.count.div_ceil(unit);
        let per_task = units.div_ceil(if threads > 1 { 4 * threads } else { 1 }).max(1);
        let len = (units * unit * kb).min(packed.len());
        pool::for_each_chunk(&mut packed[..len], (unit * per_task * kb).max(1), |task, out| {
            let first = self.strip.first + task * per_task * unit;
            let count = (per_task * unit).min(self.strip.first + self.strip.count - first);
            self.pack(self.shared, &Strip { first, count, k: self.strip.k.clone() }, out);
        });
        let written = &packed[..self.packed_len(self.shared, &self.strip)];
        // SAFETY: the tasks have written this much.
        let packed = unsafe { &*(std::ptr::from_ref(written) as *const [f32]) };
        self.multiply(packed, threads);
    }

    fn multiply(&self, shared: &[f32], threads: usize) {
        let (unit, kb) = (self.micro.unit(self.own), self.strip.k.len());
        let units = self.product.extent(self.own).div_ceil(unit);
        let cached = OWN / (unit * kb).max(1);
        let per_task = units.div_ceil(4 * threads).clamp(1, cached.max(1));
        let tasks = units.div_ceil(per_task);
        // Where the own operand has too few units for the threads, several tasks pack the same ones.
        let shares =
            (2 * threads).div_ceil(tasks.max(1)).min(self.strip.count.div_ceil(self.micro.unit(self.shared)));
        // Made before the loop: what is held at most is the same in every run.
        let len = unit * per_task.min(units) * kb;
        let mut spaces: Vec<Vec<f32>> =
            (0..threads.min(tasks * shares)).map(|_| Vec::with_capacity(len)).collect();
        pool::for_each_with(tasks * shares, &mut spaces, |task, packed| {
            self.task(
                task / shares * per_task * unit,
                per_task * unit,
                task % shares,
                shares,
                shared,
                packed,
            );
        });
    }

    /// Packs `width` rows or columns of the own operand from `first` on and multiplies them by one of `shares` parts of
    /// the shared one. The own operand is packed into `packed`; what that held is gone.
    fn task(
        &self,
        first: usize,
        width: usize,
        share: usize,
        shares: usize,
        shared: &[f32],
        packed: &mut Vec<f32>,
    ) {
        let count = width.min(self.product.extent(self.own) - first);
        let own = Strip { first, count, k: self.strip.k.clone() };
        let len = self.packed_len(self.own, &own);
        packed.clear();
        packed.reserve_exact(len);
        self.pack(self.own, &own, &mut packed.spare_capacity_mut()[..len]);
        // SAFETY: the capacity is there and was just written.
        unsafe { packed.set_len(len) };
        let unit = self.micro.unit(self.shared);
        let each = self.strip.count.div_ceil(unit).div_ceil(shares) * unit;
        let end = ((share + 1) * each).min(self.strip.count);
        for at in (share * each..end).step_by(unit) {
            for own_at in (0..count).step_by(self.micro.unit(self.own)) {
                let other = Part { packed: shared, at, first: self.strip.first, count: self.strip.count };
                let own = Part { packed, at: own_at, first, count };
                match self.own {
                    Side::Rows => self.tile(own, other),
                    Side::Columns => self.tile(other, own),
                }
            }
        }
    }

    /// One tile of the result: the unit at `a.at` of packed rows by the one at `b.at` of packed columns.
    fn tile(&self, a: Part, b: Part) {
        let kb = self.strip.k.len();
        let rows = self.micro.unit(Side::Rows).min(a.count - a.at);
        let columns = self.micro.unit(Side::Columns).min(b.count - b.at);
        let fresh = !self.product.accumulate && self.strip.k.start == 0;
        let out = self.product.out;
        if let Some(rounded) = &self.product.rounded
            && self.strip.k.end == self.product.k
        {
            return self.rounded_tile(rounded, a, b, rows, columns, fresh);
        }
        // SAFETY: the rows and columns are clipped to the matrix and belong to this task alone; both packed operands
        // have `kb` steps of them.
        unsafe {
            let c = out.ptr.add((a.first + a.at) * out.columns + b.first + b.at);
            let (a, b) = (&a.packed[a.at * kb..][..rows * kb], &b.packed[b.at * kb..]);
            self.micro.tile(kb, a, b, c, out.columns, rows, columns, fresh);
        }
    }

    /// [`Block::tile`] over the last block of `k`, rounded on its way out of the first-level cache.
    fn rounded_tile(&self, to: &Rounded, a: Part, b: Part, rows: usize, columns: usize, fresh: bool) {
        let (kb, width) = (self.strip.k.len(), columns.next_multiple_of(LANES));
        let (row, column) = (a.first + a.at, b.first + b.at);
        let mut tile = [0.0; MAX_TILE];
        if !fresh {
            for i in 0..rows {
                // SAFETY: as in `tile`; the blocks of `k` before this one have written it.
                let from = unsafe {
                    let out = self.product.out;
                    std::slice::from_raw_parts(out.ptr.add((row + i) * out.columns + column), columns)
                };
                tile[i * width..][..columns].copy_from_slice(from);
            }
        }
        let (a, b) = (&a.packed[a.at * kb..][..rows * kb], &b.packed[b.at * kb..]);
        // SAFETY: the tile is this task's own, and both packed operands have `kb` steps of its rows and columns.
        unsafe { self.micro.tile(kb, a, b, tile.as_mut_ptr(), width, rows, width, fresh) };
        for i in 0..rows {
            let from = &tile[i * width..][..columns];
            // SAFETY: the rows and columns are clipped to the matrix and belong to this task alone.
            unsafe { (to.write)(from, to.ptr, (row + i) * to.columns + column) };
        }
    }

    /// Floats that a packed strip takes.
    fn packed_len(&self, side: Side, strip: &Strip) -> usize {
        let width = if side == Side::Rows { strip.count } else { strip.count.next_multiple_of(LANES) };
        width * strip.k.len()
    }

    /// Packs unit after unit, each `[k][rows of the unit]` or so many panels `[k][LANES]`.
    fn pack(&self, side: Side, strip: &Strip, out: &mut [MaybeUninit<f32>]) {
        let (Product { a, b, level, .. }, kb) = (self.product, strip.k.len());
        let width = if side == Side::Rows { self.micro.unit(Side::Rows) } else { LANES };
        for at in (0..strip.count).step_by(width) {
            let count = width.min(strip.count - at);
            let part = Strip { first: strip.first + at, count, k: strip.k.clone() };
            match side {
                Side::Rows => {
                    pack::pack(
                        a.elems,
                        a.row,
                        a.col,
                        &part,
                        count,
                        *level,
                        &mut out[at * kb..][..count * kb],
                    );
                }
                Side::Columns => b.pack(&part, *level, &mut out[at * kb..][..LANES * kb]),
            }
        }
    }
}

/// A unit of a packed operand.
struct Part<'a> {
    /// Packed rows or columns, from number `first` on, `count` of them.
    packed: &'a [f32],
    /// Where the unit begins, counted from `first`.
    at: usize,
    first: usize,
    count: usize,
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
        for (m, n, k) in [
            (1, 1, 1),
            (1, 17, 5),
            (7, 33, 321),
            (6, 16, 320),
            (13, 50, 1541),
            (3, 4100, 9),
            (5, 8, 0),
            (4200, 20, 5),
        ] {
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
    fn every_instruction_set_computes_the_same_bits() {
        for (m, n, k) in [(1, 50, 30), (25, 70, 790), (200, 33, 100), (12, 64, 1), (13, 20, 0)] {
            let (a, b, c0) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
            let view = View::rows(Elems::F32(&b), n);
            for accumulate in [false, true] {
                let mut want = if accumulate { c0.clone() } else { vec![0.0; m * n] };
                reference(m, n, k, &a, &b, &mut want);
                for level in Level::present() {
                    let mut c = c0.clone();
                    let out = Output { ptr: c.as_mut_ptr(), columns: n };
                    let a = View::rows(Elems::F32(&a), k);
                    Product { m, n, k, a, b: &view, out, rounded: None, accumulate, level }.run();
                    assert_eq!(c, want, "{level:?} {m}x{n}x{k}");
                }
            }
        }
    }

    #[test]
    fn a_rounded_product_is_the_product_rounded_once() {
        for (m, n, k) in [(1, 1, 1), (7, 33, 321), (9, 70, 0), (13, 50, 768), (13, 50, 1541), (70, 4100, 9)] {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let (a, b) = (View::rows(Elems::F32(&a), k), View::rows(Elems::F32(&b), n));
            let exact = product(m, n, k, a, b);
            let brains: Vec<bf16> = exact.iter().map(|v| bf16::from_f32(*v)).collect();
            assert_eq!(product_as::<bf16>(m, n, k, a, b), brains, "{m}x{n}x{k}");
            let halves: Vec<f16> = exact.iter().map(|v| f16::from_f32(*v)).collect();
            assert_eq!(product_as::<f16>(m, n, k, a, b), halves, "{m}x{n}x{k}");
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
