//! How a block reaches its keys and values.

use crate::rope::Rope;
use burn::tensor::Tensor;
use hearth_kernels::{AttentionSpec, RotaryTable, attention};
use std::sync::Arc;

/// Where one row stands in its document or sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowPosition {
    /// Position from the start of the document, from 0.
    pub position: u32,
    /// Length that dynamic RoPE scaling sees: the document's, or for a generated token its position + 1.
    pub length: u32,
}

/// What a transformer block is handed besides its input: the rows' rotary table, the attention itself, and the adapters
/// of single rows.
pub trait AttentionContext {
    /// Rotary table with a line per row of the forward pass.
    fn rotary(&self) -> &Arc<RotaryTable>;

    /// Attention of block `layer`. `q`: `[rows, heads, head_dim]`; `k`, `v`: `[rows, kv_heads, head_dim]`, the
    /// rows' own, already rotated. Returns `[rows, heads, head_dim]`.
    fn attend(
        &mut self,
        layer: usize,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        spec: AttentionSpec,
    ) -> Tensor<3>;

    /// Adds to the output `y`, `[rows, out]`, of the linear layer `layer` what the rows' adapters make of its input `x`,
    /// `[rows, in]`. Only layers that were given a name ask.
    fn adapt(&mut self, layer: &str, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        let (_, _) = (layer, x);
        y
    }
}

/// Whole documents, one after another: causal within each, nothing across. The training context.
pub struct DocumentContext {
    documents: Arc<[usize]>,
    rotary: Arc<RotaryTable>,
}

impl DocumentContext {
    /// `documents`: lengths, in row order.
    pub fn new(rope: &Rope, documents: &[usize]) -> Self {
        let rows: Vec<RowPosition> = documents
            .iter()
            .flat_map(|&n| (0..n as u32).map(move |position| RowPosition { position, length: n as u32 }))
            .collect();
        Self { documents: documents.into(), rotary: Arc::new(rope.table(&rows)) }
    }
}

impl AttentionContext for DocumentContext {
    fn rotary(&self) -> &Arc<RotaryTable> {
        &self.rotary
    }

    fn attend(
        &mut self,
        _: usize,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        spec: AttentionSpec,
    ) -> Tensor<3> {
        attention(q, k, v, self.documents.clone(), spec)
    }
}
