//! The gated MLP.

use super::Linear;
use crate::Error;
use crate::context::AttentionContext;
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_kernels::swiglu;
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

    /// `x`: `[rows, d_model]` → the same shape.
    pub fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let (gate, up) = (self.gate.forward(x.clone(), context), self.up.forward(x, context));
        self.down.forward(swiglu(gate, up), context)
    }
}
