//! AdamW (arXiv 1711.05101), fused.

use super::update::{Rule, Span, apply_two};

/// The constants of one update:
/// `m ← m + (g−m)(1−β₁)`, `v ← β₂v + (1−β₂)g²`, `p ← p(1−ηλ) − (η/c₁)·m / (√v/√c₂ + ε)` with `cᵢ = 1 − βᵢᵗ`
/// and `g` the gradient times `gradient_scale`. The order of operations is torch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWRule {
    /// `1 − ηλ`.
    pub keep: f32,
    /// `1 − β₁`.
    pub one_minus_beta1: f32,
    /// `β₂`.
    pub beta2: f32,
    /// `1 − β₂`.
    pub one_minus_beta2: f32,
    /// `η/c₁`.
    pub step_size: f32,
    /// `√c₂`.
    pub root_correction2: f32,
    /// `ε`.
    pub eps: f32,
    /// What gradients are multiplied by first.
    pub gradient_scale: f32,
}

impl Rule for AdamWRule {
    #[inline(always)]
    fn element(&self, p: f32, [m, v]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let g = g * self.gradient_scale;
        let decayed = p * self.keep;
        let m = m + (g - m) * self.one_minus_beta1;
        let v = v * self.beta2 + (self.one_minus_beta2 * g) * g;
        let denominator = v.sqrt() / self.root_correction2 + self.eps;
        (decayed - self.step_size * (m / denominator), [m, v])
    }
}

/// Updates a span whose states are `m` and `v`.
///
/// # Panics
/// If the span has other states, or its slices differ in length.
pub fn adamw(rule: AdamWRule, span: Span) {
    apply_two(rule, span);
}
