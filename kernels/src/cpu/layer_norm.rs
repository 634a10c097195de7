//! LayerNorm (arXiv 1607.06450): rows made to mean 0 and variance 1, with a gain and a bias.
//!
//! The mean is taken first and subtracted before squares are summed: a row far from zero keeps its digits.

use super::simd::{LANES, Lanes, dot, load, tree_sum};
use super::{rows_per_task, written};
use crate::multiversion;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// `y = (x − mean(x)) · r · w + b` with `r = 1/sqrt(variance(x)+eps)`, row by row. `x`, `y`: `[rows, d]`; `w`, `b`: `[d]`.
pub fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<f32> {
    let d = w.len();
    assert!(b.len() == d && x.len().is_multiple_of(d.max(1)), "layer_norm: rows and bias of {d}");
    let task = d * rows_per_task(x.len() / d, d);
    // SAFETY: `x` is whole rows, and every row of the result is written.
    unsafe {
        written(x.len(), |y| {
            y.par_chunks_mut(task)
                .zip(x.par_chunks(task))
                .for_each(|(y, x)| layer_norm_rows(x, w, b, eps, y));
        })
    }
}

multiversion! {
    fn layer_norm_rows(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [MaybeUninit<f32>]) {
        for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            let Moments { mean, inverse } = moments(x, eps);
            for i in 0..w.len() {
                y[i].write(((x[i] - mean) * inverse).mul_add(w[i], b[i]));
            }
        }
    }
}

/// A row's mean and the inverse of its standard deviation.
#[derive(Clone, Copy, Default)]
struct Moments {
    mean: f32,
    inverse: f32,
}

#[inline(always)]
fn moments(x: &[f32], eps: f32) -> Moments {
    let d = x.len() as f32;
    let mean = sum(x) / d;
    Moments { mean, inverse: 1.0 / (squares_about(x, mean) / d + eps).sqrt() }
}

/// Lane `i` sums elements `i, i+16, …` in order, then [`tree_sum`].
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let groups = x.chunks_exact(LANES);
    let tail = groups.remainder();
    let mut acc: Lanes = [0.0; LANES];
    for x in groups {
        let x = load(x);
        for i in 0..LANES {
            acc[i] += x[i];
        }
    }
    for (acc, x) in acc.iter_mut().zip(tail) {
        *acc += x;
    }
    tree_sum(acc)
}

/// `Σ (x − mean)²` in the order of [`sum`].
#[inline(always)]
fn squares_about(x: &[f32], mean: f32) -> f32 {
    let groups = x.chunks_exact(LANES);
    let tail = groups.remainder();
    let mut acc: Lanes = [0.0; LANES];
    for x in groups {
        let x = load(x);
        for i in 0..LANES {
            let centred = x[i] - mean;
            acc[i] = centred.mul_add(centred, acc[i]);
        }
    }
    for (acc, x) in acc.iter_mut().zip(tail) {
        let centred = x - mean;
        *acc = centred.mul_add(centred, *acc);
    }
    tree_sum(acc)
}

/// Gradients of [`layer_norm`]: `dx` `[rows, d]`, `dw` and `db` `[d]`, the latter two summed over rows in order.
pub fn layer_norm_backward(x: &[f32], w: &[f32], eps: f32, dy: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let d = w.len();
    assert!(x.len() == dy.len() && x.len().is_multiple_of(d.max(1)), "layer_norm: rows of {d}");
    let rows = rows_per_task(x.len() / d, d);
    let mut rows_moments = vec![Moments::default(); x.len() / d];
    let tasks = |dx: &mut [MaybeUninit<f32>]| {
        dx.par_chunks_mut(d * rows)
            .zip(rows_moments.par_chunks_mut(rows))
            .zip(x.par_chunks(d * rows).zip(dy.par_chunks(d * rows)))
            .for_each(|((dx, moments), (x, dy))| layer_norm_dx(x, w, eps, dy, dx, moments));
    };
    // SAFETY: `x` and `dy` are whole rows, and every row of the result is written.
    let dx = unsafe { written(x.len(), tasks) };
    let (mut dw, mut db) = (vec![0.0; d], vec![0.0; d]);
    let columns = d.div_ceil(rayon::current_num_threads()).next_multiple_of(LANES);
    dw.par_chunks_mut(columns)
        .zip(db.par_chunks_mut(columns))
        .enumerate()
        .for_each(|(task, (dw, db))| layer_norm_dw(x, &rows_moments, dy, d, task * columns, dw, db));
    (dx, dw, db)
}

multiversion! {
    fn layer_norm_dx(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [MaybeUninit<f32>], rows: &mut [Moments]) {
        let d = w.len();
        let (mut g, mut normed) = (vec![0.0; d], vec![0.0; d]);
        let each = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(rows);
        for (((x, dy), dx), row) in each {
            *row = moments(x, eps);
            for i in 0..d {
                g[i] = dy[i] * w[i];
                normed[i] = (x[i] - row.mean) * row.inverse;
            }
            let (mean, along) = (sum(&g) / d as f32, dot(&g, &normed) / d as f32);
            for i in 0..d {
                dx[i].write((g[i] - mean - normed[i] * along) * row.inverse);
            }
        }
    }
}

multiversion! {
    /// Columns `first..` of both gradients, as many as they have.
    fn layer_norm_dw(x: &[f32], rows: &[Moments], dy: &[f32], d: usize, first: usize, dw: &mut [f32], db: &mut [f32]) {
        for ((x, dy), row) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(rows) {
            let (x, dy) = (&x[first..][..dw.len()], &dy[first..][..dw.len()]);
            for i in 0..dw.len() {
                dw[i] = dy[i].mul_add((x[i] - row.mean) * row.inverse, dw[i]);
                db[i] += dy[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_far_from_zero_keeps_its_digits() {
        let x: Vec<f32> = (0..40).map(|i| 4096.0 + (i % 5) as f32).collect();
        let y = layer_norm(&x, &[1.0; 40], &[0.0; 40], 0.0);
        for (y, i) in y.iter().zip(0..) {
            let want = ((i % 5) as f32 - 2.0) / 2f32.sqrt();
            assert!((y - want).abs() < 1e-6, "{y} {want}");
        }
    }

    #[test]
    fn a_row_is_the_same_whatever_stands_beside_it() {
        let d = 37;
        let x: Vec<f32> = (0..400 * d).map(|i| (i as f32 * 0.731).sin()).collect();
        let w: Vec<f32> = (0..d).map(|i| (i as f32).cos()).collect();
        let (all, dy) = (layer_norm(&x, &w, &w, 1e-5), &x);
        let (dx, ..) = layer_norm_backward(&x, &w, 1e-5, dy);
        for (i, row) in x.chunks_exact(d).enumerate() {
            assert_eq!(layer_norm(row, &w, &w, 1e-5), all[i * d..][..d]);
            assert_eq!(layer_norm_backward(row, &w, 1e-5, row).0, dx[i * d..][..d]);
        }
    }
}
