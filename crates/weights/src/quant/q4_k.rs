//! `q4_k`: 256 four-bit quants in eight sub-blocks of 32, each with a 6-bit scale and minimum. Read-only.

use super::{Format, half_at, k_scales};

pub(super) struct Q4K;

impl Format for Q4K {
    fn name(&self) -> &'static str {
        "q4_k"
    }
    fn ggml_type(&self) -> u32 {
        12
    }
    fn block_len(&self) -> usize {
        256
    }
    fn block_bytes(&self) -> usize {
        144
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(144).zip(out.chunks_exact_mut(256)) {
            let (d, d_min) = (half_at(block, 0), half_at(block, 2));
            let scales = k_scales(&block[4..16]);
            for (s, sub) in values.chunks_exact_mut(32).enumerate() {
                let (scale, min) = (d * f32::from(scales[s].0), d_min * f32::from(scales[s].1));
                let nibbles = &block[16 + s / 2 * 32..][..32];
                for (v, q) in sub.iter_mut().zip(nibbles) {
                    *v = scale * f32::from((q >> (s % 2 * 4)) & 0x0f) - min;
                }
            }
        }
    }

    fn quantize(&self, _: &[f32], _: &mut [u8]) -> bool {
        false
    }
}
