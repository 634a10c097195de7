//! The inner loop: a tile of the result in registers, one chain of multiply-adds per element.

use super::Side;
use crate::cpu::simd::{LANES, Level};

/// Computes a tile of `R` rows by `P` panels of columns; see [`Micro::tile`].
type TileFn = unsafe fn(kb: usize, a: *const f32, b: *const f32, c: *mut f32, stride: usize, fresh: bool);

/// The tile functions of an instruction set: `[rows − 1][panels − 1]`.
#[derive(Clone, Copy)]
pub(super) struct Micro {
    tiles: &'static [&'static [TileFn]],
}

impl Micro {
    /// The best that an instruction set offers.
    pub(super) fn at(level: Level) -> Self {
        let tiles: &[&[TileFn]] = match level {
            Level::Portable => PORTABLE,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => AVX2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => AVX512,
        };
        Self { tiles }
    }

    /// Rows or columns of a full tile.
    pub(super) fn unit(self, side: Side) -> usize {
        match side {
            Side::Rows => self.tiles.len(),
            Side::Columns => self.tiles[0].len() * LANES,
        }
    }

    /// `C[..rows, ..columns] += A-tile · B-panels`; if `fresh`, what `C` held is not read and counts as zero.
    ///
    /// # Safety
    /// The instruction set is there. `c` points to `rows` rows of `columns` floats, `stride` apart, that nothing else
    /// touches, initialised unless `fresh`. `rows` and `columns` are at most a unit's, and not zero.
    #[allow(clippy::too_many_arguments, reason = "the innermost call: a tile is all of these")]
    #[inline]
    pub(super) unsafe fn tile(
        self,
        kb: usize,
        a: &[f32],
        b: &[f32],
        c: *mut f32,
        stride: usize,
        rows: usize,
        columns: usize,
        fresh: bool,
    ) {
        let panels = columns.div_ceil(LANES);
        let tile = self.tiles[rows - 1][panels - 1];
        assert!(a.len() >= rows * kb && b.len() >= panels * LANES * kb, "gemm: packed operands too short");
        if columns == panels * LANES {
            // SAFETY: the caller's promise, and the operands' lengths were looked at.
            return unsafe { tile(kb, a.as_ptr(), b.as_ptr(), c, stride, fresh) };
        }
        let mut edge = [0.0; MAX_TILE];
        let width = panels * LANES;
        for i in 0..rows {
            if !fresh {
                // SAFETY: row `i` of the caller's tile.
                let row = unsafe { std::slice::from_raw_parts(c.add(i * stride), columns) };
                edge[i * width..][..columns].copy_from_slice(row);
            }
        }
        // SAFETY: `edge` is a full tile of its own.
        unsafe { tile(kb, a.as_ptr(), b.as_ptr(), edge.as_mut_ptr(), width, fresh) };
        for i in 0..rows {
            // SAFETY: row `i` of the caller's tile; `edge` does not overlap it.
            unsafe { std::ptr::copy_nonoverlapping(edge[i * width..].as_ptr(), c.add(i * stride), columns) };
        }
    }
}

/// Columns of the largest tile.
pub(super) const MAX_COLUMNS: usize = 3 * LANES;
/// Elements of the largest tile.
pub(super) const MAX_TILE: usize = 16 * MAX_COLUMNS;

const PORTABLE: &[&[TileFn]] = &[
    &[portable::<1>],
    &[portable::<2>],
    &[portable::<3>],
    &[portable::<4>],
    &[portable::<5>],
    &[portable::<6>],
];

/// # Safety
/// As [`Micro::tile`], for full tiles of `R` rows by one panel.
unsafe fn portable<const R: usize>(
    kb: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    stride: usize,
    fresh: bool,
) {
    let mut acc = [[0.0f32; LANES]; R];
    // SAFETY: `kb` steps of `R` floats, `kb` of `LANES`, and `R` rows of `LANES`: the caller's promise.
    unsafe {
        if !fresh {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = c.add(i * stride).cast::<[f32; LANES]>().read();
            }
        }
        for k in 0..kb {
            let (a, b) =
                (a.add(k * R).cast::<[f32; R]>().read(), b.add(k * LANES).cast::<[f32; LANES]>().read());
            for i in 0..R {
                for j in 0..LANES {
                    acc[i][j] = a[i].mul_add(b[j], acc[i][j]);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            c.add(i * stride).cast::<[f32; LANES]>().write(*acc);
        }
    }
}

/// One version per instruction set: registers of `$width` floats, `$per` of them to a panel.
macro_rules! simd_tile {
    ($name:ident, $features:literal, $per:literal, $width:literal, $vector:ty, $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
        /// # Safety
        /// As [`Micro::tile`], for full tiles of `R` rows by `P` panels.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const P: usize>(
            kb: usize,
            a: *const f32,
            b: *const f32,
            c: *mut f32,
            stride: usize,
            fresh: bool,
        ) {
            use std::arch::x86_64::*;
            let (mut a, mut b) = (a, b);
            let mut acc: [[[$vector; $per]; P]; R] = [[[$zero(); $per]; P]; R];
            // SAFETY: `kb` steps of `R` floats, of `LANES` in each panel, and `R` rows of `P` panels: the caller's
            // promise. A prefetch may point anywhere.
            unsafe {
                for i in 0..R {
                    for p in 0..P {
                        for v in 0..$per {
                            let at = c.wrapping_add(i * stride + p * LANES + v * $width);
                            if fresh {
                                _mm_prefetch::<_MM_HINT_T0>(at.cast());
                            } else {
                                acc[i][p][v] = $load(at);
                            }
                        }
                    }
                }
                for _ in 0..kb {
                    let mut columns: [[$vector; $per]; P] = [[$zero(); $per]; P];
                    for p in 0..P {
                        for v in 0..$per {
                            columns[p][v] = $load(b.add(p * kb * LANES + v * $width));
                        }
                    }
                    for i in 0..R {
                        let x = $splat(*a.add(i));
                        for p in 0..P {
                            for v in 0..$per {
                                acc[i][p][v] = $fma(x, columns[p][v], acc[i][p][v]);
                            }
                        }
                    }
                    (a, b) = (a.add(R), b.add(LANES));
                }
                for i in 0..R {
                    for p in 0..P {
                        for v in 0..$per {
                            $store(c.add(i * stride + p * LANES + v * $width), acc[i][p][v]);
                        }
                    }
                }
            }
        }
    };
}

simd_tile!(
    avx2,
    "avx2,fma",
    2,
    8,
    __m256,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps
);
simd_tile!(
    avx512,
    "avx512f",
    1,
    16,
    __m512,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps
);

/// 12 accumulators of 16 registers.
#[cfg(target_arch = "x86_64")]
const AVX2: &[&[TileFn]] =
    &[&[avx2::<1, 1>], &[avx2::<2, 1>], &[avx2::<3, 1>], &[avx2::<4, 1>], &[avx2::<5, 1>], &[avx2::<6, 1>]];

/// 24 accumulators of 32 registers.
#[cfg(target_arch = "x86_64")]
const AVX512: &[&[TileFn]] = &[
    &[avx512::<1, 1>, avx512::<1, 2>],
    &[avx512::<2, 1>, avx512::<2, 2>],
    &[avx512::<3, 1>, avx512::<3, 2>],
    &[avx512::<4, 1>, avx512::<4, 2>],
    &[avx512::<5, 1>, avx512::<5, 2>],
    &[avx512::<6, 1>, avx512::<6, 2>],
    &[avx512::<7, 1>, avx512::<7, 2>],
    &[avx512::<8, 1>, avx512::<8, 2>],
    &[avx512::<9, 1>, avx512::<9, 2>],
    &[avx512::<10, 1>, avx512::<10, 2>],
    &[avx512::<11, 1>, avx512::<11, 2>],
    &[avx512::<12, 1>, avx512::<12, 2>],
];
