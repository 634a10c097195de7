//! Rows of activations as blocks of 32 signed bytes with one f32 scale each.
//!
//! A block is scaled by its own largest magnitude, so a row's bytes depend on that row alone.

use super::BLOCK;
use crate::cpu::{pool, resize};

/// Fewest rows worth waking other threads for.
const PARALLEL_ROWS: usize = 32;

/// `x ≈ scale · q` with `|q| ≤ 127`, block by block.
#[derive(Debug, Default)]
pub struct Int8Rows {
    /// Rows.
    pub rows: usize,
    /// Blocks per row.
    pub blocks: usize,
    /// `[rows][32·blocks]`.
    pub quants: Vec<i8>,
    /// `[rows][blocks]`.
    pub scales: Vec<f32>,
    /// Sums of the quants of each half of a block, `[rows][blocks][2]`.
    pub sums: Vec<[i16; 2]>,
}

impl Int8Rows {
    /// Quantizes `[rows, columns]`; `columns` is a multiple of 32.
    pub fn quantize(x: &[f32], columns: usize) -> Self {
        let mut rows = Self::default();
        rows.fill(x, columns);
        rows
    }

    /// As [`Self::quantize`], in place of what was here before.
    pub fn fill(&mut self, x: &[f32], columns: usize) {
        self.resize(x.len() / columns.max(1), columns);
        if self.rows < PARALLEL_ROWS {
            return quantize(x, &mut self.quants, &mut self.scales, &mut self.sums);
        }
        let per_task = self.rows.div_ceil(4 * pool::threads());
        let blocks = per_task * self.blocks;
        let mut parts: Vec<_> = self
            .quants
            .chunks_mut(per_task * columns)
            .zip(self.scales.chunks_mut(blocks).zip(self.sums.chunks_mut(blocks)))
            .zip(x.chunks(per_task * columns))
            .collect();
        pool::for_each_chunk(&mut parts, 1, |_, part| {
            let ((quants, (scales, sums)), x) = &mut part[0];
            quantize(x, quants, scales, sums);
        });
    }

    fn resize(&mut self, rows: usize, columns: usize) {
        assert!(columns > 0 && columns.is_multiple_of(BLOCK), "{columns} columns are not whole blocks");
        (self.rows, self.blocks) = (rows, columns / BLOCK);
        resize(&mut self.quants, rows * columns);
        resize(&mut self.scales, rows * self.blocks);
        resize(&mut self.sums, rows * self.blocks);
    }
}

/// Whole blocks of `x`, one after another.
fn quantize(x: &[f32], quants: &mut [i8], scales: &mut [f32], sums: &mut [[i16; 2]]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::simd::avx2() {
        return avx2::quantize(x, quants, scales, sums);
    }
    portable(x, quants, scales, sums);
}

/// The reference.
fn portable(x: &[f32], quants: &mut [i8], scales: &mut [f32], sums: &mut [[i16; 2]]) {
    let blocks = x.chunks_exact(BLOCK).zip(quants.chunks_exact_mut(BLOCK));
    for ((x, q), (scale, sums)) in blocks.zip(scales.iter_mut().zip(sums)) {
        // As integers, magnitudes order like the floats, and what is not a number is the largest of all.
        let most = x.iter().fold(0, |most, v| most.max(v.to_bits() & 0x7fff_ffff));
        let (most, inverse) = range(most);
        *scale = most;
        *sums = [0; 2];
        for (i, (q, v)) in q.iter_mut().zip(x).enumerate() {
            *q = (v * inverse).round_ties_even() as i8;
            sums[i / 16] += i16::from(*q);
        }
    }
}

/// Scale, and what to multiply with instead of dividing by it, of a block whose largest magnitude has these bits. A
/// block with an infinity or a NaN becomes zeros with that scale: every product with it is a NaN.
#[inline(always)]
fn range(most: u32) -> (f32, f32) {
    let most = f32::from_bits(most);
    let inverse = if most > 0.0 && most.is_finite() { 127.0 / most } else { 0.0 };
    (most / 127.0, if inverse.is_finite() { inverse } else { 0.0 })
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{BLOCK, range};
    use crate::cpu::simd::avx2;
    use std::arch::x86_64::*;

    /// As [`super::portable`]; only where AVX2 is.
    pub fn quantize(x: &[f32], quants: &mut [i8], scales: &mut [f32], sums: &mut [[i16; 2]]) {
        assert!(avx2(), "the caller checks");
        let blocks = x.chunks_exact(BLOCK).zip(quants.chunks_exact_mut(BLOCK));
        for ((x, q), (scale, sums)) in blocks.zip(scales.iter_mut().zip(sums)) {
            let (x, q) = (x.try_into().expect("a block"), q.try_into().expect("a block"));
            // SAFETY: AVX2 is there.
            (*scale, *sums) = unsafe { block(x, q) };
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn block(x: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i16; 2]) {
        let mut v = [_mm256_setzero_ps(); 4];
        let mut most = _mm256_setzero_si256();
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        for i in 0..4 {
            // SAFETY: eight of the block's 32 floats; an unaligned load.
            v[i] = unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) };
            most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        let most = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
        let most = _mm_max_epu32(most, _mm_shuffle_epi32::<0b00_00_11_10>(most));
        let most = _mm_max_epu32(most, _mm_shuffle_epi32::<0b00_00_00_01>(most));
        let (scale, inverse) = range(_mm_cvtsi128_si32(most) as u32);
        let inverse = _mm256_set1_ps(inverse);
        let mut n = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            let scaled = _mm256_mul_ps(v[i], inverse);
            let number = _mm256_cmp_ps::<_CMP_ORD_Q>(scaled, scaled);
            n[i] = _mm256_cvtps_epi32(_mm256_and_ps(scaled, number));
        }
        // Packing works within halves of a register; the permutation puts the eight groups of four in order.
        let words = [_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3])];
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order);
        // SAFETY: the block's 32 bytes; an unaligned store.
        unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes) };
        let mut sums = [0; 2];
        for (sum, words) in sums.iter_mut().zip(words) {
            let pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
            let s = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            let s = _mm_add_epi32(s, _mm_shuffle_epi32::<0b00_00_11_10>(s));
            let s = _mm_add_epi32(s, _mm_shuffle_epi32::<0b00_00_00_01>(s));
            *sum = _mm_cvtsi128_si32(s) as i16;
        }
        (scale, sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_rounded_to_the_nearest_of_255_steps() {
        let x: Vec<f32> =
            (0..64).map(|i| (i as f32 * 0.37).sin() * if i < 32 { 3.0 } else { 1e-20 }).collect();
        let rows = Int8Rows::quantize(&x, 64);
        for (i, x) in x.iter().enumerate() {
            let scale = rows.scales[i / 32];
            assert!((scale * f32::from(rows.quants[i]) - x).abs() <= 0.5001 * scale, "element {i}");
        }
        for (b, sums) in rows.sums.iter().enumerate() {
            for h in 0..2 {
                let half = &rows.quants[b * 32 + h * 16..][..16];
                assert_eq!(sums[h], half.iter().map(|q| i16::from(*q)).sum::<i16>());
            }
        }
    }

    #[test]
    fn rows_are_quantized_alone_and_in_company_alike() {
        let x: Vec<f32> = (0..100 * 64).map(|i| ((i * 7919) % 1000) as f32 - 500.0).collect();
        let all = Int8Rows::quantize(&x, 64);
        for (i, row) in x.chunks_exact(64).enumerate() {
            let one = Int8Rows::quantize(row, 64);
            assert_eq!(one.quants, all.quants[i * 64..][..64]);
            assert_eq!(one.scales, all.scales[i * 2..][..2]);
        }
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_reference() {
        let mut x: Vec<f32> = (0..64 * 32).map(|i| ((i * 7919) % 1013) as f32 - 506.0).collect();
        (x[40], x[70], x[100], x[130]) = (f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE);
        x[320..352].fill(1e-45);
        x[352..384].fill(0.0);
        x[384..416].iter_mut().enumerate().for_each(|(i, v)| *v = i as f32 + 0.5 - 127.0);
        let rows = || (vec![1i8; x.len()], vec![1f32; 64], vec![[1i16; 2]; 64]);
        let (mut got, mut want) = (rows(), rows());
        quantize(&x, &mut got.0, &mut got.1, &mut got.2);
        portable(&x, &mut want.0, &mut want.1, &mut want.2);
        let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!((&got.0, &got.2, bits(&got.1)), (&want.0, &want.2, bits(&want.1)));
    }

    #[test]
    fn zeros_stay_zero_and_what_is_not_finite_is_not_hidden() {
        let rows = Int8Rows::quantize(&[0.0; 32], 32);
        assert_eq!((rows.scales[0], rows.quants[5]), (0.0, 0));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; 32];
            x[7] = bad;
            assert!(!Int8Rows::quantize(&x, 32).scales[0].is_finite());
        }
    }
}
