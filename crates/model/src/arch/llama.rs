//! The Llama family: Llama 1–3, SmolLM2, Mistral, Qwen2, Qwen3. Pre-norm blocks of rotary grouped-query
//! attention and a SwiGLU MLP; the members differ in biases, q/k-norm, windows, tying and RoPE scaling only.

use super::{Architecture, Block, Family};
use crate::Error;
use crate::context::AttentionContext;
use crate::layers::{Attention, Embedding, GatedMlp, Head, RmsNorm};
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_kernels::cpu::block::BlockWeights;
use hearth_weights::config::ModelConfig;

/// Registry line.
pub const FAMILY: Family = Family {
    model_types: &["llama", "mistral", "qwen2", "qwen3"],
    build: |config| Box::new(Llama { config }),
};

struct Llama {
    config: ModelConfig,
}

impl Architecture for Llama {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self, weights: &mut dyn WeightSource) -> Result<Embedding, Error> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        Ok(Embedding::new(weights.embedding("model.embed_tokens", shape)?))
    }

    fn block(&self, i: usize, weights: &mut dyn WeightSource) -> Result<Box<dyn Block>, Error> {
        let (c, name) = (&self.config, format!("model.layers.{i}"));
        let attention_norm = RmsNorm::load(weights, &format!("{name}.input_layernorm"), c.hidden_size, c)?;
        let attention = Attention::load(weights, &format!("{name}.self_attn"), i, c)?;
        let mlp_norm = RmsNorm::load(weights, &format!("{name}.post_attention_layernorm"), c.hidden_size, c)?;
        let mlp = GatedMlp::load(weights, &format!("{name}.mlp"), c)?;
        Ok(Box::new(LlamaBlock::new(attention_norm, attention, mlp_norm, mlp)))
    }

    fn head(&self, weights: &mut dyn WeightSource) -> Result<Head, Error> {
        let c = &self.config;
        let norm = RmsNorm::load(weights, "model.norm", c.hidden_size, c)?;
        let name = if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        Ok(Head::new(norm, weights.embedding(name, [c.vocab_size, c.hidden_size])?))
    }
}

/// `h = x + attention(norm(x))`, `y = h + mlp(norm(h))`.
pub(super) struct LlamaBlock {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
    fused: Option<BlockWeights>,
}

impl LlamaBlock {
    pub(super) fn new(
        attention_norm: RmsNorm,
        attention: Attention,
        mlp_norm: RmsNorm,
        mlp: GatedMlp,
    ) -> Self {
        let fused = attention.fuse(&attention_norm, &mlp_norm, &mlp);
        Self { attention_norm, attention, mlp_norm, mlp, fused }
    }
}

impl Block for LlamaBlock {
    fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let h = x.clone() + self.attention.forward(self.attention_norm.forward(x), context);
        h.clone() + self.mlp.forward(self.mlp_norm.forward(h), context)
    }

    fn fused(&self) -> Option<&BlockWeights> {
        self.fused.as_ref()
    }
}
