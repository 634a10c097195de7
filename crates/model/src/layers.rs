//! Layers shared by all architectures. Quantization, adapters and (later) sharding live here and nowhere else.

mod attention;
mod linear;
mod mlp;
mod norm;

pub use attention::Attention;
pub use linear::{Dropout, Linear, Lora, Matrix};
pub use mlp::{GatedMlp, Mlp};
pub use norm::{LayerNorm, Norm, RmsNorm};

use burn::tensor::Tensor;
use hearth_kernels::cpu::resize;
use std::sync::Arc;

/// Token embedding.
pub struct Embedding {
    weight: Matrix,
    scale: Option<f32>,
}

impl Embedding {
    /// From a `[vocab, d_model]` matrix.
    pub fn new(weight: Matrix) -> Self {
        Self { weight, scale: None }
    }

    /// Multiplies every row by `scale`.
    pub fn scaled(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Token ids, each below the vocabulary size → `[ids, d_model]`.
    pub fn forward(&self, ids: &[u32]) -> Tensor<2> {
        self.forward_from(&self.weight, ids)
    }

    /// The same with rows `ids` of another matrix, which stands in for this one's.
    pub fn forward_from(&self, weight: &Matrix, ids: &[u32]) -> Tensor<2> {
        let x = weight.rows(ids);
        match self.scale {
            Some(scale) => x * scale,
            None => x,
        }
    }
}

/// Final norm and output head.
pub struct Head {
    norm: Norm,
    weight: Matrix,
}

impl Head {
    /// From a norm and a `[vocab, d_model]` matrix.
    pub fn new(norm: impl Into<Norm>, weight: Matrix) -> Self {
        Self { norm: norm.into(), weight }
    }

    /// `x`: `[rows, d_model]` → `[rows, vocab]`.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        self.weight.project(self.norm.forward(x))
    }

    /// As [`Self::logits`], in place of what is in `out`, which keeps the memory of the most rows it ever held.
    pub fn logits_into(&self, x: Tensor<2>, out: &mut Vec<f32>) {
        let floats = |x: Tensor<2>| x.into_data().convert::<f32>().try_into_vec().expect("converted");
        match &self.weight {
            Matrix::Packed(w) => {
                let (rows, h): (usize, Vec<f32>) = (x.dims()[0], floats(self.norm.forward(x)));
                resize(out, rows * w.rows());
                w.multiply(&h, out);
            }
            _ => *out = floats(self.logits(x)),
        }
    }

    /// What the output matrix is applied to: `x`, `[rows, d_model]`, normalised. A token's embedding.
    pub fn vectors(&self, x: Tensor<2>) -> Tensor<2> {
        self.norm.forward(x)
    }

    /// Sum over rows of the negative log-likelihood of `targets` (negative = not counted), `[1]`. Logits are
    /// never kept. `x`: `[rows, d_model]`, one target per row.
    pub fn nll_sum(&self, x: Tensor<2>, targets: Arc<[i32]>) -> Tensor<1> {
        self.weight.cross_entropy(self.norm.forward(x), targets)
    }
}
