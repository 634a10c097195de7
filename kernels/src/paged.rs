//! The paged KV cache and attention through it, for inference.

pub use crate::cpu::attention::SequenceRows;
pub use crate::cpu::kv::KV_BLOCK;

use crate::cpu::attention::{AttentionSpec, attend};
use crate::cpu::attention_decode;
use crate::cpu::kv::KvLayout;
use crate::cpu::pages::zeros_on_huge_pages;
use burn::tensor::{Tensor, TensorData};

/// Keys and values of every layer in blocks of [`KV_BLOCK`] tokens, allocated once.
pub struct KvCache {
    layout: KvLayout,
    layers: Vec<Vec<f32>>,
    /// Scores of the attention of a few rows.
    scratch: Vec<f32>,
}

/// Rows up to which attention cuts each row's work in pieces.
const FEW_ROWS: usize = 64;

impl KvCache {
    /// A cache of `blocks` blocks in each of `layers` layers, all zero.
    pub fn new(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize) -> Self {
        let layout = KvLayout { kv_heads, head_dim };
        Self {
            layout,
            layers: (0..layers).map(|_| zeros_on_huge_pages(blocks * layout.block_len())).collect(),
            scratch: Vec::new(),
        }
    }

    /// Bytes that attention through it allocates once, when sequences reach `context` tokens.
    pub fn scratch_bytes(heads: usize, kv_heads: usize, context: usize) -> usize {
        attention_decode::scratch_bytes(heads, kv_heads, context)
    }

    /// Bytes that [`Self::new`] allocates.
    pub fn bytes(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize) -> usize {
        layers * blocks * KvLayout { kv_heads, head_dim }.block_len() * size_of::<f32>()
    }
}

/// Writes the rows' keys and values to the cache, then attends each row over its sequence so far.
/// `q`: `[rows, heads, head_dim]`; `k`, `v`: `[rows, kv_heads, head_dim]`; `sequences` cover the rows in order.
/// Returns `[rows, heads, head_dim]`, each row bit-equal to what [`crate::attention`] gives for it.
pub fn attention_paged(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    cache: &mut KvCache,
    layer: usize,
    sequences: &[SequenceRows],
    spec: AttentionSpec,
) -> Tensor<3> {
    let ([rows, heads, d], device) = (q.dims(), q.device());
    let width = cache.layout.kv_heads * cache.layout.head_dim;
    let [q, k, v] = [q, k, v].map(|x| x.into_data().try_into_vec::<f32>().expect("inference runs in f32"));
    let data = &mut cache.layers[layer];
    for s in sequences {
        let range = s.rows.start * width..s.rows.end * width;
        cache.layout.write(data, &s.table, s.first_position, &k[range.clone()], &v[range]);
    }
    let mut y = vec![0.0; rows * heads * d];
    if rows <= FEW_ROWS {
        attention_decode::attend(cache.layout, data, sequences, &q, heads, spec, &mut cache.scratch, &mut y);
    } else {
        attend(cache.layout, data, sequences, &q, heads, spec, &mut y);
    }
    Tensor::from_data(TensorData::new(y, [rows, heads, d]), &device)
}
