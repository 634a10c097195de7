//! Keys and values in blocks of 16 tokens, laid out for the attention kernel.
//!
//! A block holds, for each KV head, the keys transposed, `[head_dim][16]` (a lane per token: scores need no
//! horizontal sums), then the values by token, `[16][padded]`, where `padded` is `head_dim` rounded up to whole
//! groups of lanes and the padding stays zero. Training lays out a document the same way on the fly; the engine
//! keeps blocks in its paged cache. Hence one attention kernel.

use super::simd::LANES;
use super::stored::Stored;

/// Tokens per KV block.
pub const KV_BLOCK: usize = LANES;

/// Dimensions of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// KV heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// `head_dim` rounded up to whole groups of lanes.
    pub fn padded(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Numbers of one head in one block: keys, then values.
    pub fn tile_len(self) -> usize {
        KV_BLOCK * (self.head_dim + self.padded())
    }

    /// Numbers of one block.
    pub fn block_len(self) -> usize {
        self.kv_heads * self.tile_len()
    }

    /// Transposed keys of a head in a block: `[head_dim][16]`.
    #[inline(always)]
    pub fn keys<T>(self, data: &[T], block: u32, head: usize) -> &[T] {
        &data[block as usize * self.block_len() + head * self.tile_len()..][..KV_BLOCK * self.head_dim]
    }

    /// Values of a head in a block: `[16][padded]`.
    #[inline(always)]
    pub fn values<T>(self, data: &[T], block: u32, head: usize) -> &[T] {
        let start = block as usize * self.block_len() + head * self.tile_len() + KV_BLOCK * self.head_dim;
        &data[start..][..KV_BLOCK * self.padded()]
    }

    /// Writes consecutive tokens from `position` on. `k`, `v`: `[tokens, kv_heads, head_dim]`; `table` names the
    /// sequence's blocks in order. Rounded to the nearest number that the cache stores.
    pub fn write<T: Stored>(self, data: &mut [T], table: &[u32], position: usize, k: &[f32], v: &[f32]) {
        let width = self.kv_heads * self.head_dim;
        for (i, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
            let (block, slot) = ((position + i) / KV_BLOCK, (position + i) % KV_BLOCK);
            let base = table[block] as usize * self.block_len();
            for head in 0..self.kv_heads {
                let tile = &mut data[base + head * self.tile_len()..][..self.tile_len()];
                let (keys, values) = tile.split_at_mut(KV_BLOCK * self.head_dim);
                for (d, x) in k[head * self.head_dim..][..self.head_dim].iter().enumerate() {
                    keys[d * KV_BLOCK + slot] = T::narrow(*x);
                }
                let values = &mut values[slot * self.padded()..][..self.head_dim];
                T::narrow_block(&v[head * self.head_dim..][..self.head_dim], values);
            }
        }
    }
}
