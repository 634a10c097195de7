//! AdamW (arXiv 1711.05101) in one pass over memory.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Elements one task updates. Elements are independent, so the size changes no result.
const CHUNK: usize = 1 << 16;

/// Settings. Weight decay applies to **every** trained parameter, norms and biases too, as `torch.optim.AdamW` does
/// when it is handed `model.parameters()`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-4, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0 }
    }
}

/// First and second moment of one parameter, or of a slice of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Mean of gradients.
    pub m: Vec<f32>,
    /// Mean of squared gradients.
    pub v: Vec<f32>,
}

impl Moments {
    /// Zeros.
    pub fn new(len: usize) -> Self {
        Self { m: vec![0.0; len], v: vec![0.0; len] }
    }
}

/// The constants of one update:
/// `m ← m + (g−m)(1−β₁)`, `v ← β₂v + (1−β₂)g²`, `p ← p(1−ηλ) − (η/c₁)·m / (√v/√c₂ + ε)` with `cᵢ = 1 − βᵢᵗ`
/// and `g` the gradient times the clipping coefficient. The order of operations is torch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_correction2: f32,
    eps: f32,
    gradient_scale: f32,
}

impl AdamW {
    /// The update number `t` (from 1) at learning rate `lr`; gradients are multiplied by `gradient_scale` first.
    pub fn update(&self, t: u64, lr: f64, gradient_scale: f32) -> Update {
        let [beta1, beta2] = self.betas;
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        Update {
            keep: (1.0 - lr * self.weight_decay) as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / correction(beta1)) as f32,
            root_correction2: correction(beta2).sqrt() as f32,
            eps: self.eps as f32,
            gradient_scale,
        }
    }
}

impl Update {
    /// Updates one element. The plain reference: every other path computes exactly this.
    #[inline(always)]
    fn element(&self, p: &mut f32, m: &mut f32, v: &mut f32, g: f32) {
        let g = g * self.gradient_scale;
        let decayed = *p * self.keep;
        *m += (g - *m) * self.one_minus_beta1;
        *v = *v * self.beta2 + (self.one_minus_beta2 * g) * g;
        let denominator = v.sqrt() / self.root_correction2 + self.eps;
        *p = decayed - self.step_size * (*m / denominator);
    }

    /// Updates a slice, one element after another.
    pub fn apply_scalar(&self, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            self.element(p, m, v, *g);
        }
    }

    /// Updates a parameter (or any slice of one) with all cores. Bit-equal to [`Update::apply_scalar`].
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn apply(&self, p: &mut [f32], moments: &mut Moments, g: &[f32]) {
        let Moments { m, v } = moments;
        assert!(
            p.len() == m.len() && p.len() == v.len() && p.len() == g.len(),
            "a slice of another parameter"
        );
        p.par_chunks_mut(CHUNK)
            .zip(m.par_chunks_mut(CHUNK))
            .zip(v.par_chunks_mut(CHUNK))
            .zip(g.par_chunks(CHUNK))
            .for_each(|(((p, m), v), g)| self.apply_scalar(p, m, v, g));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    fn values(seed: u64, len: usize) -> Vec<f32> {
        (0..len as u64).map(|i| uniform(seed, i) * 2.0 - 1.0).collect()
    }

    #[test]
    fn the_threaded_path_is_bit_equal_to_the_scalar_one() {
        let adamw = AdamW { weight_decay: 0.1, ..AdamW::default() };
        for len in [1, 7, CHUNK - 1, CHUNK, 3 * CHUNK + 5] {
            let (mut p, mut moments) = (values(1, len), Moments::new(len));
            let (mut q, mut other) = (p.clone(), moments.clone());
            for t in 1..4 {
                let g = values(t + 1, len);
                let update = adamw.update(t, 1e-3, 0.7);
                update.apply(&mut p, &mut moments, &g);
                update.apply_scalar(&mut q, &mut other.m, &mut other.v, &g);
            }
            assert_eq!((p, moments), (q, other));
        }
    }

    #[test]
    fn updates_follow_the_formula() {
        let adamw = AdamW { lr: 0.0, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 };
        let (mut p, mut moments) = (values(1, 50), Moments::new(50));
        let (mut q, mut m, mut v) = (p.iter().map(|p| *p as f64).collect::<Vec<_>>(), [0f64; 50], [0f64; 50]);
        for t in 1..20 {
            let g = values(100 + t, 50);
            adamw.update(t, 1e-2, 0.5).apply(&mut p, &mut moments, &g);
            for i in 0..50 {
                let g = g[i] as f64 * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let (mean, square) =
                    (m[i] / (1.0 - 0.9f64.powi(t as i32)), v[i] / (1.0 - 0.95f64.powi(t as i32)));
                q[i] = q[i] * (1.0 - 1e-2 * 0.1) - 1e-2 * mean / (square.sqrt() + 1e-8);
            }
        }
        for i in 0..50 {
            assert!((p[i] as f64 - q[i]).abs() < 1e-6, "element {i}: {} against {}", p[i], q[i]);
        }
    }

    #[test]
    fn a_slice_updated_in_parts_equals_the_whole() {
        let update = AdamW::default().update(3, 1e-3, 1.0);
        let (mut whole, mut moments, g) = (values(1, 100), Moments::new(100), values(2, 100));
        let mut parts = whole.clone();
        update.apply(&mut whole, &mut moments, &g);
        for range in [0..33, 33..34, 34..100] {
            update.apply(&mut parts[range.clone()], &mut Moments::new(range.len()), &g[range]);
        }
        assert_eq!(whole, parts);
    }
}
