//! Architectures: one file per family, one line in [`FAMILIES`].

mod gemma;
mod llama;
mod starcoder2;

use crate::Error;
use crate::context::AttentionContext;
use crate::layers::{Embedding, Head};
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_kernels::cpu::block::BlockWeights;
use hearth_weights::config::ModelConfig;

/// A decoder-only language model, as parts that the caller puts in a loop.
pub trait Architecture: Send + Sync {
    /// Shape and constants.
    fn config(&self) -> &ModelConfig;
    /// Token ids → residual stream.
    fn embedding(&self, weights: &mut dyn WeightSource) -> Result<Embedding, Error>;
    /// Transformer block `i < num_blocks()`.
    fn block(&self, i: usize, weights: &mut dyn WeightSource) -> Result<Box<dyn Block>, Error>;
    /// Residual stream → logits.
    fn head(&self, weights: &mut dyn WeightSource) -> Result<Head, Error>;

    /// Number of transformer blocks.
    fn num_blocks(&self) -> usize {
        self.config().num_layers
    }
}

/// One transformer block with its weights.
pub trait Block: Send + Sync {
    /// `x`: `[rows, d_model]` → the same shape.
    fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2>;

    /// The same block for inference in one piece, with the same bits, if its weights allow that.
    fn fused(&self) -> Option<&BlockWeights> {
        None
    }
}

/// An architecture family: the HF `model_type`s it serves and its constructor.
pub struct Family {
    /// HF `model_type` values.
    pub model_types: &'static [&'static str],
    /// Builds the architecture for a configuration.
    pub build: fn(ModelConfig) -> Box<dyn Architecture>,
}

/// Every family hearth knows.
pub static FAMILIES: &[Family] = &[llama::FAMILY, gemma::FAMILY, starcoder2::FAMILY];

/// The architecture that a configuration names.
///
/// # Errors
/// [`Error::UnknownArchitecture`] if no family serves its `model_type`.
pub fn architecture(config: &ModelConfig) -> Result<Box<dyn Architecture>, Error> {
    let served = |f: &&Family| f.model_types.contains(&config.model_type.as_str());
    match FAMILIES.iter().find(served) {
        Some(family) => Ok((family.build)(config.clone())),
        None => Err(Error::UnknownArchitecture {
            model_type: config.model_type.clone(),
            supported: FAMILIES.iter().flat_map(|f| f.model_types).copied().collect::<Vec<_>>().join(", "),
        }),
    }
}
