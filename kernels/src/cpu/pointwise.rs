//! Row-wise and elementwise kernels: RMSNorm, dropout, embedding gradient.

use super::simd::{LANES, dot, exp};
use super::{rows_per_task, to_be_written, written};
use crate::multiversion;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// `y = x · r · w` with `r = 1/sqrt(mean(x²)+eps)`, row by row. `x`, `y`: `[rows, d]`, `w`: `[d]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let d = w.len();
    assert!(x.len().is_multiple_of(d.max(1)), "rms_norm: rows of {d}");
    let task = d * rows_per_task(x.len() / d, d);
    // SAFETY: `x` is whole rows, and every row of the result is written.
    unsafe {
        written(x.len(), |y| {
            y.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(y, x)| rms_norm_rows(x, w, eps, y));
        })
    }
}

/// [`rms_norm`] into memory that is there, on the calling thread.
pub fn rms_norm_into(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(w.len().max(1)), "rms_norm: rows of {}", w.len());
    // SAFETY: the kernel writes numbers only.
    rms_norm_rows(x, w, eps, unsafe { to_be_written(y) });
}

multiversion! {
    fn rms_norm_rows(x: &[f32], w: &[f32], eps: f32, y: &mut [MaybeUninit<f32>]) {
        for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            let r = inverse_rms(x, eps);
            for i in 0..w.len() {
                y[i].write(x[i] * r * w[i]);
            }
        }
    }
}

multiversion! {
    /// [`rms_norm`] in place, on the calling thread.
    pub fn rms_norm_in_place(x: &mut [f32], w: &[f32], eps: f32) {
        for x in x.chunks_exact_mut(w.len()) {
            let r = inverse_rms(x, eps);
            for i in 0..w.len() {
                x[i] = x[i] * r * w[i];
            }
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// Gradients of [`rms_norm`]: `dx` `[rows, d]` and `dw` `[d]`, the latter summed over rows in order.
pub fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let d = w.len();
    assert!(x.len() == dy.len() && x.len().is_multiple_of(d.max(1)), "rms_norm: rows of {d}");
    let rows = rows_per_task(x.len() / d, d);
    let mut inverse = vec![0.0; x.len() / d];
    let tasks = |dx: &mut [MaybeUninit<f32>]| {
        dx.par_chunks_mut(d * rows)
            .zip(inverse.par_chunks_mut(rows))
            .zip(x.par_chunks(d * rows).zip(dy.par_chunks(d * rows)))
            .for_each(|((dx, inverse), (x, dy))| rms_norm_dx(x, w, eps, dy, dx, inverse));
    };
    // SAFETY: `x` and `dy` are whole rows, and every row of the result is written.
    let dx = unsafe { written(x.len(), tasks) };
    let mut dw = vec![0.0; d];
    let columns = d.div_ceil(rayon::current_num_threads()).next_multiple_of(LANES);
    dw.par_chunks_mut(columns)
        .enumerate()
        .for_each(|(task, dw)| rms_norm_dw(x, &inverse, dy, d, task * columns, dw));
    (dx, dw)
}

multiversion! {
    fn rms_norm_dx(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [MaybeUninit<f32>], inverse: &mut [f32]) {
        let d = w.len();
        let mut g = vec![0.0; d];
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(inverse);
        for (((x, dy), dx), inverse) in rows {
            let r = inverse_rms(x, eps);
            *inverse = r;
            for i in 0..d {
                g[i] = dy[i] * w[i];
            }
            let k = dot(&g, x) * r * r * r / d as f32;
            for i in 0..d {
                dx[i].write(g[i] * r - x[i] * k);
            }
        }
    }
}

multiversion! {
    /// Columns `first..` of the gradient, as many as `dw` has.
    fn rms_norm_dw(x: &[f32], inverse: &[f32], dy: &[f32], d: usize, first: usize, dw: &mut [f32]) {
        for ((x, dy), r) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(inverse) {
            let (x, dy) = (&x[first..][..dw.len()], &dy[first..][..dw.len()]);
            for i in 0..dw.len() {
                dw[i] = (dy[i] * x[i]).mul_add(*r, dw[i]);
            }
        }
    }
}

multiversion! {
    /// `y = exp((x − best) / temperature)`, on the calling thread: the weights of a softmax.
    pub fn softmax_weights(x: &[f32], best: f32, temperature: f32, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = exp((x - best) / temperature);
        }
    }
}

multiversion! {
    /// The highest of every `block` numbers, `maxima[i]` of `x[i · block..]`; `+∞` where one of them is NaN.
    pub fn block_maxima(x: &[f32], block: usize, maxima: &mut [f32]) {
        for (highest, x) in maxima.iter_mut().zip(x.chunks(block)) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for x in x.chunks(LANES) {
                for (lane, x) in lanes.iter_mut().zip(x) {
                    let x = if x.is_nan() { f32::INFINITY } else { *x };
                    *lane = if x > *lane { x } else { *lane };
                }
            }
            *highest = lanes[0];
            for lane in lanes {
                *highest = if lane > *highest { lane } else { *highest };
            }
        }
    }
}

/// Inverted dropout of a `[rows, columns]` matrix; see [`crate::dropout`].
pub fn dropout(x: &[f32], columns: usize, p: f32, key: u64, y: &mut [f32]) {
    let scale = 1.0 / (1.0 - p);
    let threshold = (p as f64 * (1u64 << 32) as f64) as u64;
    let rows = rows_per_task(x.len() / columns, columns);
    y.par_chunks_mut(rows * columns).zip(x.par_chunks(rows * columns)).enumerate().for_each(
        |(task, (y, x))| {
            let first = (task * rows * columns) as u64;
            for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
                let kept = mix(key, first + i as u64) >> 32 >= threshold;
                *y = if kept { x * scale } else { 0.0 };
            }
        },
    );
}

/// SplitMix64 (Steele et al. 2014) of a key and a counter.
fn mix(key: u64, counter: u64) -> u64 {
    let mut z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Adds row `i` of `dy` to row `ids[i]` of `dw`, in order. `dy`: `[ids, d]`, `dw`: `[vocab, d]`.
pub fn embedding_backward(dy: &[f32], ids: &[u32], d: usize, dw: &mut [f32]) {
    for (dy, &id) in dy.chunks_exact(d).zip(ids) {
        for (w, g) in dw[id as usize * d..][..d].iter_mut().zip(dy) {
            *w += g;
        }
    }
}
