//! SGD with momentum, as `torch.optim.SGD`.

use super::not_negative;
use crate::Error;
use hearth_kernels::cpu::sgd::SgdRule;
use serde::{Deserialize, Serialize};

/// Settings. Weight decay is added to the gradient, as torch does; there is neither dampening nor Nesterov's step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sgd {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the momentum buffer; 0 keeps no buffer.
    pub momentum: f64,
    /// Times the parameter, added to the gradient.
    pub weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Sgd {
    pub(super) const DEFAULT: Self = Self { lr: 1e-3, momentum: 0.9, weight_decay: 0.0 };

    pub(super) fn rule(&self, lr: f64, gradient_scale: f32) -> SgdRule {
        SgdRule {
            weight_decay: self.weight_decay as f32,
            momentum: self.momentum as f32,
            lr: lr as f32,
            gradient_scale,
        }
    }

    pub(super) fn validate(&self) -> Result<(), Error> {
        not_negative("weight_decay", self.weight_decay)?;
        if (0.0..1.0).contains(&self.momentum) {
            return Ok(());
        }
        Err(Error::Config(format!("optim.momentum = {} must be at least 0 and below 1", self.momentum)))
    }
}
