//! Normalisation of the residual stream, or of heads.

use super::linear::floats;
use crate::Error;
use crate::source::WeightSource;
use burn::tensor::{DType, Tensor};
use hearth_kernels as kernels;
use hearth_kernels::cpu::block::Gain;
use hearth_weights::config::ModelConfig;

/// Root-mean-square normalisation with a gain.
pub struct RmsNorm {
    gain: Tensor<1>,
    eps: f32,
}

impl RmsNorm {
    /// Loads `{name}.weight` of length `len`, the gain.
    pub fn load(
        w: &mut dyn WeightSource,
        name: &str,
        len: usize,
        config: &ModelConfig,
    ) -> Result<Self, Error> {
        Ok(Self { gain: w.norm(name, len)?, eps: config.rms_norm_eps })
    }

    /// Loads `{name}.weight` of length `len`, which the gain is larger than by one. The sum is f32 in every precision: a
    /// weight near zero would lose its digits to the one.
    pub fn load_around_one(
        w: &mut dyn WeightSource,
        name: &str,
        len: usize,
        config: &ModelConfig,
    ) -> Result<Self, Error> {
        Ok(Self { gain: w.norm(name, len)?.cast(DType::F32) + 1.0, eps: config.rms_norm_eps })
    }

    pub(crate) fn gain(&self) -> Gain {
        Gain { gain: floats(self.gain.clone()), eps: self.eps }
    }

    /// `x`: `[rows, len]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::rms_norm(x, self.gain.clone(), self.eps)
    }

    /// Normalises each head by itself. `x`: `[rows, heads, len]`.
    pub fn forward_heads(&self, x: Tensor<3>) -> Tensor<3> {
        let [rows, heads, len] = x.dims();
        self.forward(x.reshape([rows * heads, len])).reshape([rows, heads, len])
    }
}

/// Normalisation to mean 0 and variance 1, with a gain and a bias.
pub struct LayerNorm {
    gain: Tensor<1>,
    bias: Tensor<1>,
    eps: f32,
}

impl LayerNorm {
    /// Loads `{name}.weight` and `{name}.bias` of length `len`.
    pub fn load(
        w: &mut dyn WeightSource,
        name: &str,
        len: usize,
        config: &ModelConfig,
    ) -> Result<Self, Error> {
        Ok(Self { gain: w.norm(name, len)?, bias: w.norm_bias(name, len)?, eps: config.rms_norm_eps })
    }

    /// `x`: `[rows, len]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        kernels::layer_norm(x, self.gain.clone(), self.bias.clone(), self.eps)
    }
}

/// Either of them.
#[allow(clippy::large_enum_variant, reason = "tensors are handles; a model has one of these")]
pub enum Norm {
    /// Root-mean-square.
    Rms(RmsNorm),
    /// Mean and variance.
    Layer(LayerNorm),
}

impl Norm {
    /// `x`: `[rows, len]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match self {
            Norm::Rms(norm) => norm.forward(x),
            Norm::Layer(norm) => norm.forward(x),
        }
    }
}

impl From<RmsNorm> for Norm {
    fn from(norm: RmsNorm) -> Self {
        Norm::Rms(norm)
    }
}

impl From<LayerNorm> for Norm {
    fn from(norm: LayerNorm) -> Self {
        Norm::Layer(norm)
    }
}
