//! Gemma (the first): Llama's blocks with a GELU gate, norms whose stored weight is the gain less one, and token
//! embeddings multiplied by the root of their width.

use super::llama::LlamaBlock;
use super::{Architecture, Block, Family};
use crate::Error;
use crate::layers::{Attention, Embedding, GatedMlp, Head, RmsNorm};
use crate::source::WeightSource;
use hearth_weights::config::ModelConfig;

/// Registry line.
pub const FAMILY: Family = Family { model_types: &["gemma"], build: |config| Box::new(Gemma { config }) };

struct Gemma {
    config: ModelConfig,
}

impl Architecture for Gemma {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self, weights: &mut dyn WeightSource) -> Result<Embedding, Error> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let scale = (self.config.hidden_size as f64).sqrt() as f32;
        Ok(Embedding::new(weights.embedding("model.embed_tokens", shape)?).scaled(scale))
    }

    fn block(&self, i: usize, weights: &mut dyn WeightSource) -> Result<Box<dyn Block>, Error> {
        let (c, name) = (&self.config, format!("model.layers.{i}"));
        let before = |part: &str, weights: &mut dyn WeightSource| {
            RmsNorm::load_around_one(weights, &format!("{name}.{part}"), c.hidden_size, c)
        };
        let attention_norm = before("input_layernorm", weights)?;
        let attention = Attention::load(weights, &format!("{name}.self_attn"), i, c)?;
        let mlp_norm = before("post_attention_layernorm", weights)?;
        let mlp = GatedMlp::load(weights, &format!("{name}.mlp"), c)?;
        Ok(Box::new(LlamaBlock::new(attention_norm, attention, mlp_norm, mlp)))
    }

    fn head(&self, weights: &mut dyn WeightSource) -> Result<Head, Error> {
        let c = &self.config;
        let norm = RmsNorm::load_around_one(weights, "model.norm", c.hidden_size, c)?;
        let name = if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        Ok(Head::new(norm, weights.embedding(name, [c.vocab_size, c.hidden_size])?))
    }
}
