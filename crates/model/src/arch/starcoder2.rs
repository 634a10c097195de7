//! StarCoder2: pre-norm blocks of rotary grouped-query attention, perhaps within a window, and a plain GELU MLP;
//! LayerNorm, and biases throughout.

use super::{Architecture, Block, Family};
use crate::Error;
use crate::context::AttentionContext;
use crate::layers::{Attention, Embedding, Head, LayerNorm, Mlp};
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_weights::config::ModelConfig;

/// Registry line.
pub const FAMILY: Family =
    Family { model_types: &["starcoder2"], build: |config| Box::new(Starcoder2 { config }) };

struct Starcoder2 {
    config: ModelConfig,
}

impl Architecture for Starcoder2 {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self, weights: &mut dyn WeightSource) -> Result<Embedding, Error> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        Ok(Embedding::new(weights.embedding("model.embed_tokens", shape)?))
    }

    fn block(&self, i: usize, weights: &mut dyn WeightSource) -> Result<Box<dyn Block>, Error> {
        let (c, name) = (&self.config, format!("model.layers.{i}"));
        Ok(Box::new(Starcoder2Block {
            attention_norm: LayerNorm::load(weights, &format!("{name}.input_layernorm"), c.hidden_size, c)?,
            attention: Attention::load(weights, &format!("{name}.self_attn"), i, c)?,
            mlp_norm: LayerNorm::load(
                weights,
                &format!("{name}.post_attention_layernorm"),
                c.hidden_size,
                c,
            )?,
            mlp: Mlp::load(weights, &format!("{name}.mlp"), c)?,
        }))
    }

    fn head(&self, weights: &mut dyn WeightSource) -> Result<Head, Error> {
        let c = &self.config;
        let norm = LayerNorm::load(weights, "model.norm", c.hidden_size, c)?;
        let name = if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        Ok(Head::new(norm, weights.embedding(name, [c.vocab_size, c.hidden_size])?))
    }
}

struct Starcoder2Block {
    attention_norm: LayerNorm,
    attention: Attention,
    mlp_norm: LayerNorm,
    mlp: Mlp,
}

impl Block for Starcoder2Block {
    fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let h = x.clone() + self.attention.forward(self.attention_norm.forward(x), context);
        h.clone() + self.mlp.forward(self.mlp_norm.forward(h), context)
    }
}
