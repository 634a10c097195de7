//! Rows of activations as blocks of 32 signed bytes with one f32 scale each.
//!
//! A block is scaled by its own largest magnitude, so a row's bytes depend on that row alone.

use super::BLOCK;
use crate::multiversion;
use rayon::prelude::*;

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
        assert!(columns > 0 && columns.is_multiple_of(BLOCK), "{columns} columns are not whole blocks");
        let (rows, blocks) = (x.len() / columns, columns / BLOCK);
        let mut out = Self {
            rows,
            blocks,
            quants: vec![0; rows * columns],
            scales: vec![0.0; rows * blocks],
            sums: vec![[0; 2]; rows * blocks],
        };
        if rows < PARALLEL_ROWS {
            quantize(x, &mut out.quants, &mut out.scales, &mut out.sums);
        } else {
            let per_task = rows.div_ceil(4 * rayon::current_num_threads());
            let parts = out.quants.par_chunks_mut(per_task * columns);
            let parts = parts.zip(out.scales.par_chunks_mut(per_task * blocks));
            let parts = parts.zip(out.sums.par_chunks_mut(per_task * blocks));
            parts.zip(x.par_chunks(per_task * columns)).for_each(|(((quants, scales), sums), x)| {
                quantize(x, quants, scales, sums);
            });
        }
        out
    }
}

multiversion! {
    /// Whole blocks of `x`, one after another.
    fn quantize(x: &[f32], quants: &mut [i8], scales: &mut [f32], sums: &mut [[i16; 2]]) {
        let blocks = x.chunks_exact(BLOCK).zip(quants.chunks_exact_mut(BLOCK));
        for ((x, q), (scale, sums)) in blocks.zip(scales.iter_mut().zip(sums)) {
            let x: &[f32; BLOCK] = x.try_into().expect("a block");
            let q: &mut [i8; BLOCK] = q.try_into().expect("a block");
            // As integers, magnitudes order like the floats, and what is not a number is the largest of all.
            let mut largest = [0u32; 8];
            for i in 0..BLOCK {
                largest[i % 8] = largest[i % 8].max(x[i].to_bits() & 0x7fff_ffff);
            }
            let mut most = 0;
            for l in largest {
                most = most.max(l);
            }
            let most = f32::from_bits(most);
            *scale = most / 127.0;
            let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
            // Adding 1.5·2^23 rounds to the nearest even integer and leaves it in the low bits.
            let mut codes = [0i32; BLOCK];
            for i in 0..BLOCK {
                let shifted = x[i] * inverse + 12_582_912.0;
                codes[i] = shifted.to_bits() as i32 - 0x4b40_0000;
            }
            let mut halves = [0i16; 2];
            for i in 0..BLOCK {
                q[i] = codes[i] as i8;
                halves[i / 16] += i16::from(q[i]);
            }
            *sums = halves;
        }
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
