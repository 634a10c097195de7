//! The paged KV cache and attention through it, for inference.

pub use crate::cpu::attention::SequenceRows;
pub use crate::cpu::kv::KV_BLOCK;

pub use crate::cpu::block::{BlockWeights, Workspace};

use crate::RotaryTable;
use crate::cpu::attention::AttentionSpec;
use crate::cpu::attention_paged::{self, Scratch};
use crate::cpu::block::Pass;
use crate::cpu::kv::KvLayout;
use crate::cpu::pages::on_huge_pages;
use crate::cpu::stored::Stored;
use burn::tensor::{Tensor, TensorData};
use half::f16;
use half::vec::HalfBitsVecExt;

/// What a cache stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Keys and values as they are.
    #[default]
    F32,
    /// Rounded to half precision: half the bytes to hold and to read.
    F16,
}

impl KvType {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// Keys and values of every layer in blocks of [`KV_BLOCK`] tokens, allocated once.
pub struct KvCache {
    layout: KvLayout,
    layers: Layers,
    scratch: Scratch,
}

enum Layers {
    F32(Vec<Vec<f32>>),
    F16(Vec<Vec<f16>>),
}

impl KvCache {
    /// A cache of `blocks` blocks in each of `layers` layers, all zero.
    pub fn new(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize, kind: KvType) -> Self {
        let layout = KvLayout { kv_heads, head_dim };
        let len = blocks * layout.block_len();
        let layers = match kind {
            KvType::F32 => Layers::F32((0..layers).map(|_| on_huge_pages(vec![0.0; len])).collect()),
            KvType::F16 => {
                let layer = |_| on_huge_pages(vec![0u16; len]).reinterpret_into();
                Layers::F16((0..layers).map(layer).collect())
            }
        };
        Self { layout, layers, scratch: Scratch::default() }
    }

    /// Most bytes that attention through it keeps besides, when sequences reach `context` tokens.
    pub fn scratch_bytes(context: usize) -> usize {
        attention_paged::scratch_bytes(context)
    }

    /// Bytes that [`Self::new`] allocates.
    pub fn bytes(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize, kind: KvType) -> usize {
        layers * blocks * KvLayout { kv_heads, head_dim }.block_len() * kind.bytes()
    }
}

/// Writes the rows' keys and values to the cache, then attends each row over its sequence so far.
/// `q`: `[rows, heads, head_dim]`; `k`, `v`: `[rows, kv_heads, head_dim]`; `sequences` cover the rows in order.
/// Returns `[rows, heads, head_dim]`; from a cache of f32 each row is bit-equal to what [`crate::attention`] gives for it.
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
    let [q, k, v] = [q, k, v].map(|x| x.into_data().try_into_vec::<f32>().expect("inference runs in f32"));
    let mut y = vec![0.0; rows * heads * d];
    let KvCache { layout, layers, scratch } = cache;
    let values = Values { q: &q, k: &k, v: &v, heads };
    match layers {
        Layers::F32(layers) => values.attend(*layout, &mut layers[layer], sequences, spec, scratch, &mut y),
        Layers::F16(layers) => values.attend(*layout, &mut layers[layer], sequences, spec, scratch, &mut y),
    }
    Tensor::from_data(TensorData::new(y, [rows, heads, d]), &device)
}

/// A whole transformer block on the residual stream `x`, `[rows, d_model]`, its keys and values written to the cache:
/// bit for bit what the ops of [`crate`] and [`attention_paged`] make of it.
pub fn block(
    x: Tensor<2>,
    weights: &BlockWeights,
    cache: &mut KvCache,
    layer: usize,
    sequences: &[SequenceRows],
    rotary: &RotaryTable,
    space: &mut Workspace,
) -> Tensor<2> {
    let (shape, device) = (x.dims(), x.device());
    let mut x = x.into_data().try_into_vec::<f32>().expect("inference runs in f32");
    let KvCache { layers, scratch, .. } = cache;
    match layers {
        Layers::F32(layers) => {
            let cache = &mut layers[layer];
            weights.forward(&mut x, Pass { rotary, sequences, cache, scratch }, space);
        }
        Layers::F16(layers) => {
            let cache = &mut layers[layer];
            weights.forward(&mut x, Pass { rotary, sequences, cache, scratch }, space);
        }
    }
    Tensor::from_data(TensorData::new(x, shape), &device)
}

/// A layer's queries, keys and values.
struct Values<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    heads: usize,
}

impl Values<'_> {
    fn attend<T: Stored>(
        &self,
        layout: KvLayout,
        data: &mut [T],
        sequences: &[SequenceRows],
        spec: AttentionSpec,
        scratch: &mut Scratch,
        y: &mut [f32],
    ) {
        let width = layout.kv_heads * layout.head_dim;
        for s in sequences {
            let range = s.rows.start * width..s.rows.end * width;
            layout.write(data, &s.table, s.first_position, &self.k[range.clone()], &self.v[range]);
        }
        attention_paged::attend(layout, data, sequences, self.q, self.heads, spec, scratch, y);
    }
}
