//! `q6_k`: 256 six-bit quants in sixteen sub-blocks of 16, each with an 8-bit scale, `x = d · s · (q − 32)`.
//! Read-only.

use super::{Format, half_at};

pub(super) struct Q6K;

impl Format for Q6K {
    fn name(&self) -> &'static str {
        "q6_k"
    }
    fn ggml_type(&self) -> u32 {
        14
    }
    fn block_len(&self) -> usize {
        256
    }
    fn block_bytes(&self) -> usize {
        210
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(210).zip(out.chunks_exact_mut(256)) {
            let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
            let d = half_at(block, 208);
            for (e, v) in values.iter_mut().enumerate() {
                // Each half of 128 elements is four groups of 32: low nibbles twice, then high nibbles twice.
                let (half, group, l) = (e / 128, e / 32 % 4, e % 32);
                let nibble = (low[half * 64 + group % 2 * 32 + l] >> (group / 2 * 4)) & 0x0f;
                let upper = (high[half * 32 + l] >> (group * 2)) & 0x03;
                let q = (nibble | (upper << 4)) as i8 - 32;
                *v = d * f32::from(scales[e / 16] as i8) * f32::from(q);
            }
        }
    }

    fn quantize(&self, _: &[f32], _: &mut [u8]) -> bool {
        false
    }
}
