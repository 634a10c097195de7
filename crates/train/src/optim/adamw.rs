//! AdamW (arXiv 1711.05101) in one pass over memory.

use super::{Span, Values, decays, not_negative, positive};
use crate::Error;
use hearth_kernels::cpu::adamw::{AdamWRule, adamw};
use serde::{Deserialize, Serialize};

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
        Self::DEFAULT
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

/// One AdamW update of parameters whose moments are [`Moments`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update(AdamWRule);

impl AdamW {
    pub(super) const DEFAULT: Self = Self { lr: 1e-4, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0 };

    /// The update number `t` (from 1) at learning rate `lr`; gradients are multiplied by `gradient_scale` first.
    pub fn update(&self, t: u64, lr: f64, gradient_scale: f32) -> Update {
        Update(self.rule(t, lr, gradient_scale))
    }

    pub(super) fn rule(&self, t: u64, lr: f64, gradient_scale: f32) -> AdamWRule {
        let [beta1, beta2] = self.betas;
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        AdamWRule {
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

    pub(super) fn validate(&self) -> Result<(), Error> {
        positive("eps", self.eps)?;
        not_negative("weight_decay", self.weight_decay)?;
        decays(self.betas)
    }
}

impl Update {
    /// Updates a parameter (or any slice of one) with all cores.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn apply(&self, p: &mut [f32], moments: &mut Moments, g: &[f32]) {
        let states = vec![Values::F32(&mut moments.m), Values::F32(&mut moments.v)];
        adamw(self.0, Span { master: p, states, gradient: g, copy: None });
    }
}
