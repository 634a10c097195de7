//! Keys and values in blocks of 16 tokens, laid out for the attention kernel.
//!
//! A block holds, for each KV head, the keys transposed, `[head_dim][16]` (a lane per token: scores need no
//! horizontal sums), then the values by token, `[16][padded]`, where `padded` is `head_dim` rounded up to whole
//! groups of lanes and the padding stays zero. Numbers of 8 bits have scales beside them, `[kv_head][2][16]` per block:
//! one for a token's key in a head and one for its value, so what a token is stored as depends on that token alone.
//! Training lays out a document the same way on the fly; the engine keeps blocks in its paged cache. Hence one attention
//! kernel.

use super::simd::LANES;
use super::stored::Stored;
use crate::multiversion;

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

    /// Scales of one block, where there are any.
    pub fn scales_len(self) -> usize {
        self.kv_heads * 2 * KV_BLOCK
    }

    /// Scales of a head's keys in a block, by token.
    #[inline(always)]
    pub fn key_scales(self, scales: &[f32], block: u32, head: usize) -> &[f32] {
        &scales[block as usize * self.scales_len() + head * 2 * KV_BLOCK..][..KV_BLOCK]
    }

    /// Scales of a head's values in a block, by token.
    #[inline(always)]
    pub fn value_scales(self, scales: &[f32], block: u32, head: usize) -> &[f32] {
        &scales[block as usize * self.scales_len() + (head * 2 + 1) * KV_BLOCK..][..KV_BLOCK]
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
        let mut narrow = [T::narrow(0.0); 64];
        for (i, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
            let (block, slot) = ((position + i) / KV_BLOCK, (position + i) % KV_BLOCK);
            let base = table[block] as usize * self.block_len();
            for head in 0..self.kv_heads {
                let tile = &mut data[base + head * self.tile_len()..][..self.tile_len()];
                let (keys, values) = tile.split_at_mut(KV_BLOCK * self.head_dim);
                let key = k[head * self.head_dim..][..self.head_dim].chunks(narrow.len());
                for (key, keys) in key.zip(keys.chunks_mut(narrow.len() * KV_BLOCK)) {
                    T::narrow_block(key, &mut narrow[..key.len()]);
                    for (token, x) in keys.chunks_exact_mut(KV_BLOCK).zip(narrow) {
                        token[slot] = x;
                    }
                }
                let values = &mut values[slot * self.padded()..][..self.head_dim];
                T::narrow_block(&v[head * self.head_dim..][..self.head_dim], values);
            }
        }
    }

    /// As [`KvLayout::write`], in 8 bits: each head of each token's key, and of its value, divided by 1/127 of its
    /// largest number.
    pub fn write_scaled(
        self,
        data: &mut [i8],
        scales: &mut [f32],
        table: &[u32],
        position: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let width = self.kv_heads * self.head_dim;
        let mut row = vec![0; self.head_dim];
        for (i, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
            let (block, slot) = (table[(position + i) / KV_BLOCK] as usize, (position + i) % KV_BLOCK);
            for head in 0..self.kv_heads {
                let tile = &mut data[block * self.block_len() + head * self.tile_len()..][..self.tile_len()];
                let (keys, values) = tile.split_at_mut(KV_BLOCK * self.head_dim);
                let scales = &mut scales[block * self.scales_len() + head * 2 * KV_BLOCK..][..2 * KV_BLOCK];
                let part = head * self.head_dim..(head + 1) * self.head_dim;
                quantize(&k[part.clone()], &mut row, &mut scales[slot]);
                for (d, q) in row.iter().enumerate() {
                    keys[d * KV_BLOCK + slot] = *q;
                }
                let values = &mut values[slot * self.padded()..][..self.head_dim];
                quantize(&v[part], values, &mut scales[KV_BLOCK + slot]);
            }
        }
    }
}

multiversion! {
    /// Numbers as whole ones, to be multiplied by `scale`. What is not finite makes all of them NaN: it must not be
    /// taken for a number.
    fn quantize(from: &[f32], to: &mut [i8], scale: &mut f32) {
        let mut largest = 0.0f32;
        let mut finite = true;
        for x in from {
            largest = largest.max(x.abs());
            finite &= x.is_finite();
        }
        *scale = if finite { largest / 127.0 } else { f32::NAN };
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        for (to, x) in to.iter_mut().zip(from) {
            *to = i8::narrow(x * inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_off_by_half_a_step_of_their_own_token_and_head() {
        let layout = KvLayout { kv_heads: 2, head_dim: 24 };
        let mut data = vec![0i8; 3 * layout.block_len()];
        let mut scales = vec![0.0; 3 * layout.scales_len()];
        let wave = |f: f32| -> Vec<f32> {
            (0..20 * 48).map(|i| (i as f32 * f).sin() * (1.0 + (i / 24) as f32)).collect()
        };
        let (mut k, v) = (wave(0.37), wave(0.11));
        k[5 * 48..5 * 48 + 24].fill(0.0);
        k[7 * 48] = f32::INFINITY;
        layout.write_scaled(&mut data, &mut scales, &[2, 0], 3, &k, &v);
        for token in 0..20 {
            let (block, slot) = ([2, 0][(token + 3) / 16], (token + 3) % 16);
            for head in 0..2 {
                let (key_scale, value_scale) = (
                    layout.key_scales(&scales, block, head)[slot],
                    layout.value_scales(&scales, block, head)[slot],
                );
                for d in 0..24 {
                    let at = token * 48 + head * 24 + d;
                    let key = layout.keys(&data, block, head)[d * 16 + slot].widen() * key_scale;
                    let value = layout.values(&data, block, head)[slot * 32 + d].widen() * value_scale;
                    if (token, head) == (7, 0) {
                        assert!(key.is_nan(), "what was infinite is no number");
                    } else {
                        assert!((key - k[at]).abs() <= 0.501 * key_scale, "{key} {}", k[at]);
                    }
                    assert!((value - v[at]).abs() <= 0.501 * value_scale, "{value} {}", v[at]);
                }
            }
        }
    }
}
