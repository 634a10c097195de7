//! Lion (arXiv 2302.06675), fused.

use super::update::{Rule, Span, apply_one};

/// The constants of one update: `p ← p(1−ηλ) − η·sign(β₁m + (1−β₁)g)`, `m ← β₂m + (1−β₂)g`, with `g` the gradient
/// times `gradient_scale` and `sign(0) = 0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionRule {
    /// `1 − ηλ`.
    pub keep: f32,
    /// `β₁`.
    pub beta1: f32,
    /// `1 − β₁`.
    pub one_minus_beta1: f32,
    /// `β₂`.
    pub beta2: f32,
    /// `1 − β₂`.
    pub one_minus_beta2: f32,
    /// `η`.
    pub lr: f32,
    /// What gradients are multiplied by first.
    pub gradient_scale: f32,
}

impl Rule for LionRule {
    #[inline(always)]
    fn element(&self, p: f32, [m, _]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let g = g * self.gradient_scale;
        let direction = m * self.beta1 + self.one_minus_beta1 * g;
        let sign = if direction == 0.0 { 0.0 } else { 1f32.copysign(direction) };
        (p * self.keep - self.lr * sign, [m * self.beta2 + self.one_minus_beta2 * g, 0.0])
    }
}

/// Updates a span whose state is `m`.
///
/// # Panics
/// If the span has other states, or its slices differ in length.
pub fn lion(rule: LionRule, span: Span) {
    apply_one(rule, span);
}
