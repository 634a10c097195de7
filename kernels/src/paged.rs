//! The paged KV cache and attention through it, for inference.

pub use crate::cpu::attention::SequenceRows;
pub use crate::cpu::kv::KV_BLOCK;

pub use crate::cpu::block::{BlockWeights, Workspace};

use crate::RotaryTable;
use crate::cpu::attention::AttentionSpec;
use crate::cpu::attention_paged::{self, Blocks, Scratch};
use crate::cpu::block::Projected;
use crate::cpu::kv::KvLayout;
use crate::cpu::pages::on_huge_pages;
use crate::cpu::stored::Stored;
use burn::tensor::{Tensor, TensorData};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

/// What a cache stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Keys and values as they are.
    #[default]
    F32,
    /// Rounded to half precision: half the bytes to hold and to read.
    F16,
    /// The same bytes with f32's range and 8 bits of precision.
    Bf16,
    /// Each head of a token's key or value as 8-bit whole numbers with a scale: little more than a quarter of the bytes.
    Int8,
}

impl KvType {
    /// Every one with the name it goes by.
    pub const ALL: [(&'static str, Self); 4] =
        [("f32", Self::F32), ("f16", Self::F16), ("bf16", Self::Bf16), ("int8", Self::Int8)];

    /// Bytes of a block in one layer.
    fn block_bytes(self, layout: KvLayout) -> usize {
        match self {
            Self::F32 => 4 * layout.block_len(),
            Self::F16 | Self::Bf16 => 2 * layout.block_len(),
            Self::Int8 => layout.block_len() + size_of::<f32>() * layout.scales_len(),
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
    Bf16(Vec<Vec<bf16>>),
    /// Numbers and scales.
    Int8(Vec<(Vec<i8>, Vec<f32>)>),
}

impl KvCache {
    /// A cache of `blocks` blocks in each of `layers` layers, all zero.
    pub fn new(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize, kind: KvType) -> Self {
        let layout = KvLayout { kv_heads, head_dim };
        let len = blocks * layout.block_len();
        let halves = || on_huge_pages(vec![0u16; len]);
        let layers = 0..layers;
        let layers = match kind {
            KvType::F32 => Layers::F32(layers.map(|_| on_huge_pages(vec![0.0; len])).collect()),
            KvType::F16 => Layers::F16(layers.map(|_| halves().reinterpret_into()).collect()),
            KvType::Bf16 => Layers::Bf16(layers.map(|_| halves().reinterpret_into()).collect()),
            KvType::Int8 => {
                let scales = || vec![0.0; blocks * layout.scales_len()];
                Layers::Int8(layers.map(|_| (on_huge_pages(vec![0; len]), scales())).collect())
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
        layers * blocks * kind.block_bytes(KvLayout { kv_heads, head_dim })
    }

    /// Copies a block of another cache of the same shape over one of this cache, as it is stored.
    ///
    /// # Panics
    /// When there is no such block, or the caches are not of one shape.
    pub fn copy_block(&mut self, block: u32, from: &Self, from_block: u32) {
        let (layout, to, from_block) = (self.layout, block as usize, from_block as usize);
        match (&mut self.layers, &from.layers) {
            (Layers::F32(to_layers), Layers::F32(layers)) => {
                copy_layers(layout, to_layers, to, layers, from_block)
            }
            (Layers::F16(to_layers), Layers::F16(layers)) => {
                copy_layers(layout, to_layers, to, layers, from_block)
            }
            (Layers::Bf16(to_layers), Layers::Bf16(layers)) => {
                copy_layers(layout, to_layers, to, layers, from_block);
            }
            (Layers::Int8(to_layers), Layers::Int8(layers)) => {
                for ((to_data, to_scales), (data, scales)) in to_layers.iter_mut().zip(layers) {
                    copy_part(layout.block_len(), to_data, to, data, from_block);
                    copy_part(layout.scales_len(), to_scales, to, scales, from_block);
                }
            }
            _ => panic!("blocks are copied between caches of one number format"),
        }
    }

    /// Exchanges a block with one of another cache of the same shape.
    ///
    /// # Panics
    /// As [`Self::copy_block`].
    pub fn swap_block(&mut self, block: u32, other: &mut Self, other_block: u32) {
        let (layout, at, other_at) = (self.layout, block as usize, other_block as usize);
        match (&mut self.layers, &mut other.layers) {
            (Layers::F32(mine), Layers::F32(theirs)) => swap_layers(layout, mine, at, theirs, other_at),
            (Layers::F16(mine), Layers::F16(theirs)) => swap_layers(layout, mine, at, theirs, other_at),
            (Layers::Bf16(mine), Layers::Bf16(theirs)) => swap_layers(layout, mine, at, theirs, other_at),
            (Layers::Int8(mine), Layers::Int8(theirs)) => {
                for ((data, scales), (their_data, their_scales)) in mine.iter_mut().zip(theirs) {
                    swap_part(layout.block_len(), data, at, their_data, other_at);
                    swap_part(layout.scales_len(), scales, at, their_scales, other_at);
                }
            }
            _ => panic!("blocks are exchanged between caches of one number format"),
        }
    }

    /// Writes the rows' keys and values, then attends.
    fn attend(
        &mut self,
        layer: usize,
        sequences: &[SequenceRows],
        rows: Projected,
        spec: AttentionSpec,
        y: &mut [f32],
    ) {
        let Self { layout, layers, scratch } = self;
        match layers {
            Layers::F32(layers) => attend(*layout, &mut layers[layer], sequences, rows, spec, scratch, y),
            Layers::F16(layers) => attend(*layout, &mut layers[layer], sequences, rows, spec, scratch, y),
            Layers::Bf16(layers) => attend(*layout, &mut layers[layer], sequences, rows, spec, scratch, y),
            Layers::Int8(layers) => {
                let (data, scales) = &mut layers[layer];
                for (s, k, v) in by_sequence(*layout, sequences, rows) {
                    layout.write_scaled(data, scales, &s.table, s.first_position, k, v);
                }
                let kv = Blocks { layout: *layout, data, scales };
                attention_paged::attend(kv, sequences, rows.q, heads(*layout, rows), spec, scratch, y);
            }
        }
    }
}

fn copy_layers<T: Copy>(
    layout: KvLayout,
    to: &mut [Vec<T>],
    block: usize,
    from: &[Vec<T>],
    from_block: usize,
) {
    for (to, from) in to.iter_mut().zip(from) {
        copy_part(layout.block_len(), to, block, from, from_block);
    }
}

/// `len` numbers to a block.
fn copy_part<T: Copy>(len: usize, to: &mut [T], block: usize, from: &[T], from_block: usize) {
    to[block * len..][..len].copy_from_slice(&from[from_block * len..][..len]);
}

fn swap_layers<T>(layout: KvLayout, a: &mut [Vec<T>], a_block: usize, b: &mut [Vec<T>], b_block: usize) {
    for (a, b) in a.iter_mut().zip(b) {
        swap_part(layout.block_len(), a, a_block, b, b_block);
    }
}

/// As [`copy_part`].
fn swap_part<T>(len: usize, a: &mut [T], a_block: usize, b: &mut [T], b_block: usize) {
    a[a_block * len..][..len].swap_with_slice(&mut b[b_block * len..][..len]);
}

/// As [`KvCache::attend`], where numbers are stored without scales.
fn attend<T: Stored>(
    layout: KvLayout,
    data: &mut [T],
    sequences: &[SequenceRows],
    rows: Projected,
    spec: AttentionSpec,
    scratch: &mut Scratch,
    y: &mut [f32],
) {
    for (s, k, v) in by_sequence(layout, sequences, rows) {
        layout.write(data, &s.table, s.first_position, k, v);
    }
    let kv = Blocks { layout, data, scales: &[] };
    attention_paged::attend(kv, sequences, rows.q, heads(layout, rows), spec, scratch, y);
}

/// Query heads.
fn heads(layout: KvLayout, rows: Projected) -> usize {
    rows.q.len() * layout.kv_heads / rows.k.len().max(1)
}

/// Each sequence's keys and values.
fn by_sequence<'a>(
    layout: KvLayout,
    sequences: &'a [SequenceRows],
    rows: Projected<'a>,
) -> impl Iterator<Item = (&'a SequenceRows, &'a [f32], &'a [f32])> {
    let width = layout.kv_heads * layout.head_dim;
    sequences.iter().map(move |s| {
        let range = s.rows.start * width..s.rows.end * width;
        (s, &rows.k[range.clone()], &rows.v[range])
    })
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
    cache.attend(layer, sequences, Projected { q: &q, k: &k, v: &v }, spec, &mut y);
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
    weights.forward(&mut x, rotary, space, |projected, y| {
        cache.attend(layer, sequences, projected, weights.spec, y);
    });
    Tensor::from_data(TensorData::new(x, shape), &device)
}
