//! `q4_1`: 32 four-bit quants, f16 scale and minimum, `x = d · q + m`; element `i` shares a byte with `i + 16`.

use super::{Format, half_at, inverse, put_half, range};

pub(super) struct Q4_1;

impl Format for Q4_1 {
    fn name(&self) -> &'static str {
        "q4_1"
    }
    fn ggml_type(&self) -> u32 {
        3
    }
    fn block_len(&self) -> usize {
        32
    }
    fn block_bytes(&self) -> usize {
        20
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(20).zip(out.chunks_exact_mut(32)) {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            for (i, q) in block[4..].iter().enumerate() {
                values[i] = d * f32::from(q & 0x0f) + m;
                values[i + 16] = d * f32::from(q >> 4) + m;
            }
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (x, block) in values.chunks_exact(32).zip(out.chunks_exact_mut(20)) {
            let (min, max) = range(x);
            let d = (max - min) / 15.0;
            let scale = inverse(d);
            let quant = |v: f32| (((v - min) * scale + 0.5) as u8).min(15);
            put_half(block, 0, d);
            put_half(block, 2, min);
            for i in 0..16 {
                block[4 + i] = quant(x[i]) | (quant(x[i + 16]) << 4);
            }
        }
        true
    }
}
