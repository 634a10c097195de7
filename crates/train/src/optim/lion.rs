//! Lion (arXiv 2302.06675).

use super::{decays, not_negative};
use crate::Error;
use hearth_kernels::cpu::lion::LionRule;
use serde::{Deserialize, Serialize};

/// Settings; the paper advises a learning rate 3–10 times smaller than AdamW's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lion {
    /// Peak learning rate.
    pub lr: f64,
    /// Share of the mean in the direction, and its own decay.
    pub betas: [f64; 2],
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Lion {
    pub(super) const DEFAULT: Self = Self { lr: 1e-5, betas: [0.9, 0.99], weight_decay: 0.0 };

    pub(super) fn rule(&self, lr: f64, gradient_scale: f32) -> LionRule {
        let [beta1, beta2] = self.betas;
        LionRule {
            keep: (1.0 - lr * self.weight_decay) as f32,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            lr: lr as f32,
            gradient_scale,
        }
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        not_negative("weight_decay", self.weight_decay)?;
        decays(self.betas)
    }
}
