//! MLPs, gated and plain.

use super::Linear;
use crate::Error;
use crate::context::AttentionContext;
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_kernels::cpu::block::Projection;
use hearth_kernels::{activate, gated, gated_linear};
use hearth_weights::config::{Activation, ModelConfig};

/// The kernels' name for the configuration's activation.
fn kernel(activation: Activation) -> hearth_kernels::Activation {
    match activation {
        Activation::Silu => hearth_kernels::Activation::Silu,
        Activation::Gelu => hearth_kernels::Activation::Gelu,
        Activation::GeluTanh => hearth_kernels::Activation::GeluTanh,
    }
}

/// `down(f(gate(x)) · up(x))` (SwiGLU and GeGLU, arXiv 2002.05202).
pub struct GatedMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: hearth_kernels::Activation,
}

impl GatedMlp {
    /// Loads `{name}.{gate,up,down}_proj`.
    pub fn load(w: &mut dyn WeightSource, name: &str, c: &ModelConfig) -> Result<Self, Error> {
        let (outer, inner) = (c.hidden_size, c.intermediate_size);
        Ok(Self {
            gate: w.linear(&format!("{name}.gate_proj"), [inner, outer], c.mlp_bias)?,
            up: w.linear(&format!("{name}.up_proj"), [inner, outer], c.mlp_bias)?,
            down: w.linear(&format!("{name}.down_proj"), [outer, inner], c.mlp_bias)?,
            activation: kernel(c.activation),
        })
    }

    /// Gate, up and down, if all of them are [`Projection`]s.
    pub(crate) fn projections(&self) -> Option<[Projection; 3]> {
        Some([self.gate.projection()?, self.up.projection()?, self.down.projection()?])
    }

    /// What the gate goes through.
    pub(crate) fn activation(&self) -> hearth_kernels::Activation {
        self.activation
    }

    /// `x`: `[rows, d_model]` → the same shape.
    pub fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let (gate, up) = (self.gate.forward(x.clone(), context), self.up.forward(x, context));
        match self.down.trained() {
            Some(w) => gated_linear(gate, up, w, self.activation),
            None => self.down.forward(gated(gate, up, self.activation), context),
        }
    }
}

/// `proj(f(fc(x)))`.
pub struct Mlp {
    fc: Linear,
    proj: Linear,
    activation: hearth_kernels::Activation,
}

impl Mlp {
    /// Loads `{name}.c_fc` and `{name}.c_proj`.
    pub fn load(w: &mut dyn WeightSource, name: &str, c: &ModelConfig) -> Result<Self, Error> {
        let (outer, inner) = (c.hidden_size, c.intermediate_size);
        Ok(Self {
            fc: w.linear(&format!("{name}.c_fc"), [inner, outer], c.mlp_bias)?,
            proj: w.linear(&format!("{name}.c_proj"), [outer, inner], c.mlp_bias)?,
            activation: kernel(c.activation),
        })
    }

    /// `x`: `[rows, d_model]` → the same shape.
    pub fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let inner = activate(self.fc.forward(x, context), self.activation);
        self.proj.forward(inner, context)
    }
}
