//! Rotary grouped-query self-attention.

use super::{GatedMlp, Linear, RmsNorm};
use crate::Error;
use crate::context::AttentionContext;
use crate::source::WeightSource;
use burn::tensor::Tensor;
use hearth_kernels::cpu::block::BlockWeights;
use hearth_kernels::{AttentionSpec, rope};
use hearth_weights::config::ModelConfig;

/// Projections around an [`AttentionContext`].
pub struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    layer: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    spec: AttentionSpec,
}

impl Attention {
    /// Loads `{name}.{q,k,v,o}_proj` and, if configured, `{name}.{q,k}_norm`.
    pub fn load(w: &mut dyn WeightSource, name: &str, layer: usize, c: &ModelConfig) -> Result<Self, Error> {
        let (q_len, kv_len) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let qk_norm = match c.qk_norm {
            true => Some((
                RmsNorm::load(w, &format!("{name}.q_norm"), c.head_dim, c)?,
                RmsNorm::load(w, &format!("{name}.k_norm"), c.head_dim, c)?,
            )),
            false => None,
        };
        Ok(Self {
            q: w.linear(&format!("{name}.q_proj"), [q_len, c.hidden_size], c.qkv_bias)?,
            k: w.linear(&format!("{name}.k_proj"), [kv_len, c.hidden_size], c.qkv_bias)?,
            v: w.linear(&format!("{name}.v_proj"), [kv_len, c.hidden_size], c.qkv_bias)?,
            o: w.linear(&format!("{name}.o_proj"), [c.hidden_size, q_len], c.attention_out_bias)?,
            qk_norm,
            layer,
            heads: c.num_heads,
            kv_heads: c.num_kv_heads,
            head_dim: c.head_dim,
            spec: AttentionSpec { scale: (c.head_dim as f32).powf(-0.5), window: c.sliding_window[layer] },
        })
    }

    /// The block that this attention and an MLP make, in one piece; `None` unless all of their matrices multiply 8-bit
    /// activations.
    pub(crate) fn fuse(&self, norm: &RmsNorm, mlp_norm: &RmsNorm, mlp: &GatedMlp) -> Option<BlockWeights> {
        let (q, k) = (self.q.projection()?, self.k.projection()?);
        let (v, o) = (self.v.projection()?, self.o.projection()?);
        let [gate, up, down] = mlp.projections()?;
        Some(BlockWeights {
            attention_norm: norm.gain(),
            q,
            k,
            v,
            o,
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| [q.gain(), k.gain()]),
            mlp_norm: mlp_norm.gain(),
            gate,
            up,
            down,
            activation: mlp.activation(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            spec: self.spec,
        })
    }

    /// `x`: `[rows, d_model]` → the same shape.
    pub fn forward(&self, x: Tensor<2>, context: &mut dyn AttentionContext) -> Tensor<2> {
        let [rows, _] = x.dims();
        // [rows, heads·head_dim] → [rows, heads, head_dim]
        let mut q = self.q.forward(x.clone(), context).reshape([rows, self.heads, self.head_dim]);
        let mut k = self.k.forward(x.clone(), context).reshape([rows, self.kv_heads, self.head_dim]);
        let v = self.v.forward(x, context).reshape([rows, self.kv_heads, self.head_dim]);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward_heads(q), k_norm.forward_heads(k));
        }
        let table = context.rotary().clone();
        let (q, k) = (rope(q, table.clone()), rope(k, table));
        let y = context.attend(self.layer, q, k, v, self.spec);
        self.o.forward(y.reshape([rows, self.heads * self.head_dim]), context)
    }
}
