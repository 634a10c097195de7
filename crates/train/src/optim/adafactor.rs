//! Adafactor (arXiv 1804.04235).

use super::{not_negative, positive};
use crate::Error;
use hearth_kernels::cpu::adafactor::AdafactorRule;
use serde::{Deserialize, Serialize};

/// Settings, as transformers' `Adafactor` with `relative_step=False, scale_parameter=False` and no momentum. A matrix
/// has one second moment per row and per column, anything else one per element.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Adafactor {
    /// Peak learning rate.
    pub lr: f64,
    /// Added to squared gradients.
    pub eps: f64,
    /// Second moments decay by `1 − t^decay_rate`.
    pub decay_rate: f64,
    /// Largest root mean square of an update of one parameter, in units of the learning rate.
    pub clip_threshold: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for Adafactor {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Adafactor {
    pub(super) const DEFAULT: Self =
        Self { lr: 1e-4, eps: 1e-30, decay_rate: -0.8, clip_threshold: 1.0, weight_decay: 0.0 };

    pub(super) fn rule(&self, t: u64, lr: f64, gradient_scale: f32) -> AdafactorRule {
        let beta = 1.0 - (t as f64).powf(self.decay_rate);
        AdafactorRule {
            beta: beta as f32,
            one_minus_beta: (1.0 - beta) as f32,
            eps: self.eps as f32,
            clip_threshold: self.clip_threshold,
            keep: (1.0 - lr * self.weight_decay) as f32,
            lr,
            gradient_scale,
        }
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        positive("eps", self.eps)?;
        positive("clip_threshold", self.clip_threshold)?;
        not_negative("weight_decay", self.weight_decay)?;
        if self.decay_rate < 0.0 && self.decay_rate.is_finite() {
            return Ok(());
        }
        Err(Error::Config(format!("optim.decay_rate = {} must be below 0, as -0.8", self.decay_rate)))
    }
}
