//! Stochastic gradient descent with momentum, fused.

use super::update::{Rule, Span, apply_one, apply_stateless};

/// The constants of one update, as `torch.optim.SGD` computes it (dampening 0, no Nesterov):
/// `g ← g + λp`, `b ← μb + g`, `p ← p − ηb`, with `g` the gradient times `gradient_scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdRule {
    /// `λ`.
    pub weight_decay: f32,
    /// `μ`.
    pub momentum: f32,
    /// `η`.
    pub lr: f32,
    /// What gradients are multiplied by first.
    pub gradient_scale: f32,
}

impl Rule for SgdRule {
    #[inline(always)]
    fn element(&self, p: f32, [b, _]: [f32; 2], g: f32) -> (f32, [f32; 2]) {
        let g = g * self.gradient_scale + self.weight_decay * p;
        let b = b * self.momentum + g;
        (p - self.lr * b, [b, 0.0])
    }
}

/// Updates a span whose state is the momentum buffer, or that has none (then `momentum` counts as 0).
///
/// # Panics
/// If the span has other states, or its slices differ in length.
pub fn sgd(rule: SgdRule, span: Span) {
    if span.states.is_empty() { apply_stateless(rule, span) } else { apply_one(rule, span) }
}
