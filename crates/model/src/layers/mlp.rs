//! The gated MLP.

use super::Linear;
use crate::Error;
use crate::context::AttentionContext;
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_kernels::cpu::block::Projection;
use hearth_kernels::{Activation, gated, gated_linear};
use hearth_weights::config::ModelConfig;

/// `down(silu(gate(x)) · up(x))` (SwiGLU, arXiv 2002.05202).
pub struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedMlp {
    /// Loads `{name}.{gate,up,down}_proj`.
    pub fn load(w: &mut dyn WeightSource, name: &str, c: &ModelConfig) -> Result<Self, Error> {
        let (outer, inner) = (c.hidden_size, c.intermediate_size);
        Ok(Self {
            gate: w.linear(&format!("{name}.gate_proj"), [inner, outer], c.mlp_bias)?,
            up: w.linear(&format!("{name}.up_proj"), [inner, outer], c.mlp_bias)?,
            down: w.linear(&format!("{name}.down_proj"), [outer, inner], c.mlp_bias)?,
        })
    }

    /// Gate, up and down, if all of them are [`Projection`]s.
    pub(crate) fn projections(&self) -> Option<[Projection; 3]> {
        Some([self.gate.projection()?, self.up.projection()?, self.down.projection()?])
    }

    /// `x`: `[rows, d_model]` → the same shape.
    pub fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let (gate, up) = (self.gate.forward(x.clone(), context), self.up.forward(x, context));
        match self.down.trained() {
            Some(w) => gated_linear(gate, up, w, Activation::Silu),
            None => self.down.forward(gated(gate, up, Activation::Silu), context),
        }
    }
}
