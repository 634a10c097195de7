//! `q5_k`: as `q4_k` with a fifth bit per quant; bit `s` of high byte `l` belongs to element `l` of sub-block
//! `s`. Read-only.

use super::{Format, half_at, k_scales};

pub(super) struct Q5K;

impl Format for Q5K {
    fn name(&self) -> &'static str {
        "q5_k"
    }
    fn ggml_type(&self) -> u32 {
        13
    }
    fn block_len(&self) -> usize {
        256
    }
    fn block_bytes(&self) -> usize {
        176
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(176).zip(out.chunks_exact_mut(256)) {
            let (d, d_min) = (half_at(block, 0), half_at(block, 2));
            let scales = k_scales(&block[4..16]);
            let high = &block[16..48];
            for (s, sub) in values.chunks_exact_mut(32).enumerate() {
                let (scale, min) = (d * f32::from(scales[s].0), d_min * f32::from(scales[s].1));
                let nibbles = &block[48 + s / 2 * 32..][..32];
                for (l, v) in sub.iter_mut().enumerate() {
                    let q = ((nibbles[l] >> (s % 2 * 4)) & 0x0f) | (((high[l] >> s) & 1) << 4);
                    *v = scale * f32::from(q) - min;
                }
            }
        }
    }

    fn quantize(&self, _: &[f32], _: &mut [u8]) -> bool {
        false
    }
}
