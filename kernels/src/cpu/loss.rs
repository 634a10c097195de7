//! Output projection and cross-entropy in one, a few rows at a time.
//!
//! Rows without a target are left out before the projection. For the others logits are made in chunks, turned
//! into gradients in place, multiplied back, and forgotten: `[rows, vocab]` never exists.

use super::gemm::{Elems, View, gemm, product, product_into};
use super::packed::PackedMatrix;
use super::simd::{LANES, exp};
use crate::multiversion;
use rayon::prelude::*;

/// Largest chunk of logits, in floats (64 MiB).
const CHUNK: usize = 1 << 24;

/// The head's matrix, `[vocab, d]`.
#[derive(Clone, Copy)]
pub enum HeadWeights<'a> {
    /// Row-major.
    Dense(Elems<'a>),
    /// Panels.
    Packed(&'a PackedMatrix),
}

/// A loss to compute: `h`: `[rows, d]`, one target per row, negative = none.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    /// Hidden states.
    pub h: &'a [f32],
    /// Output matrix.
    pub w: HeadWeights<'a>,
    /// Classes.
    pub vocab: usize,
    /// Width of a hidden state.
    pub d: usize,
    /// Class per row.
    pub targets: &'a [i32],
}

/// Sum over counted rows of the negative log-likelihood; gives gradients where asked: `dh`: `[rows, d]`, zero on entry,
/// and `dw`: `[vocab, d]`, empty on entry.
pub fn cross_entropy(p: Problem, mut dh: Option<&mut [f32]>, mut dw: Option<&mut Vec<f32>>) -> f64 {
    let counted: Vec<usize> = (0..p.targets.len()).filter(|&i| p.targets[i] >= 0).collect();
    let chunk_rows = (CHUNK / p.vocab).clamp(16, 1024).min(counted.len().max(1));
    let (mut logits, mut total) = (Vec::new(), 0.0);
    for rows in counted.chunks(chunk_rows) {
        let h: Vec<f32> = rows.iter().flat_map(|&i| p.h[i * p.d..][..p.d].iter().copied()).collect();
        project(&p, &h, &mut logits);
        let with_grads = dh.is_some() || dw.is_some();
        let mut nll = vec![0.0; rows.len()];
        logits.par_chunks_mut(p.vocab).zip(&mut nll).zip(rows).for_each(|((logits, nll), &i)| {
            *nll = row_loss(logits, p.targets[i] as usize, with_grads);
        });
        total += nll.iter().sum::<f64>();
        if let Some(dh) = dh.as_deref_mut() {
            hidden_gradients(&p, rows, &logits, dh);
        }
        if let Some(dw) = dw.as_deref_mut() {
            // dw += dlogitsᵀ·h: a chain over rows, carried on from chunk to chunk.
            let a = View::transposed(Elems::F32(&logits), p.vocab);
            let b = View::rows(Elems::F32(&h), p.d);
            match dw.is_empty() {
                true => product_into(p.vocab, p.d, rows.len(), a, b, dw),
                false => gemm(p.vocab, p.d, rows.len(), a, b, dw, true),
            }
        }
    }
    if let Some(dw) = dw {
        dw.resize(p.vocab * p.d, 0.0); // where nothing counts
    }
    total
}

fn project(p: &Problem, h: &[f32], logits: &mut Vec<f32>) {
    let rows = h.len() / p.d;
    match p.w {
        HeadWeights::Packed(w) => {
            logits.resize(rows * p.vocab, 0.0);
            w.multiply(h, logits);
        }
        HeadWeights::Dense(w) => {
            let (a, b) = (View::rows(Elems::F32(h), p.d), View::transposed(w, p.d));
            product_into(rows, p.vocab, p.d, a, b, logits);
        }
    }
}

fn hidden_gradients(p: &Problem, rows: &[usize], dlogits: &[f32], dh: &mut [f32]) {
    let part = match p.w {
        HeadWeights::Packed(w) => {
            let mut part = vec![0.0; rows.len() * p.d];
            w.multiply_transposed(dlogits, &mut part);
            part
        }
        HeadWeights::Dense(w) => {
            let a = View::rows(Elems::F32(dlogits), p.vocab);
            product(rows.len(), p.d, p.vocab, a, View::rows(w, p.d))
        }
    };
    for (&i, part) in rows.iter().zip(part.chunks_exact(p.d)) {
        dh[i * p.d..][..p.d].copy_from_slice(part);
    }
}

#[inline(always)]
fn row_max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().fold(tail, |a, b| a.max(*b))
}

multiversion! {
    /// Negative log-likelihood of `target`; turns the logits into `softmax − onehot` if asked.
    fn row_loss(logits: &mut [f32], target: usize, with_grads: bool) -> f64 {
        let max = row_max(logits);
        let picked = (logits[target] - max) as f64;
        let mut sums = [0.0f64; LANES];
        let mut chunks = logits.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for i in 0..LANES {
                let e = exp(chunk[i] - max);
                sums[i] += e as f64;
                if with_grads {
                    chunk[i] = e;
                }
            }
        }
        for (i, x) in chunks.into_remainder().iter_mut().enumerate() {
            let e = exp(*x - max);
            sums[i] += e as f64;
            if with_grads {
                *x = e;
            }
        }
        let sum: f64 = sums.iter().sum();
        if with_grads {
            let inverse = (1.0 / sum) as f32;
            for x in logits.iter_mut() {
                *x *= inverse;
            }
            logits[target] -= 1.0;
        }
        sum.ln() - picked
    }
}
