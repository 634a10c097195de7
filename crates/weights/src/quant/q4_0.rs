//! `q4_0`: 32 four-bit quants and one f16 scale, `x = d · (q − 8)`; element `i` shares a byte with `i + 16`.

use super::{Format, half_at, inverse, put_half, signed_extreme};

pub(super) struct Q4_0;

impl Format for Q4_0 {
    fn name(&self) -> &'static str {
        "q4_0"
    }
    fn ggml_type(&self) -> u32 {
        2
    }
    fn block_len(&self) -> usize {
        32
    }
    fn block_bytes(&self) -> usize {
        18
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(18).zip(out.chunks_exact_mut(32)) {
            let d = half_at(block, 0);
            for (i, q) in block[2..].iter().enumerate() {
                values[i] = d * f32::from((q & 0x0f) as i8 - 8);
                values[i + 16] = d * f32::from((q >> 4) as i8 - 8);
            }
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (x, block) in values.chunks_exact(32).zip(out.chunks_exact_mut(18)) {
            // The extreme lands on −8, the one value without a positive twin.
            let d = signed_extreme(x) / -8.0;
            let scale = inverse(d);
            let quant = |v: f32| ((v * scale + 8.5) as u8).min(15);
            put_half(block, 0, d);
            for i in 0..16 {
                block[2 + i] = quant(x[i]) | (quant(x[i + 16]) << 4);
            }
        }
        true
    }
}
