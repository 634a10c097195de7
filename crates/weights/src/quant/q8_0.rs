//! `q8_0`: 32 signed bytes and one f16 scale, `x = d · q`.

use super::{Format, half_at, inverse, put_half};

pub(super) struct Q8_0;

impl Format for Q8_0 {
    fn name(&self) -> &'static str {
        "q8_0"
    }
    fn ggml_type(&self) -> u32 {
        8
    }
    fn block_len(&self) -> usize {
        32
    }
    fn block_bytes(&self) -> usize {
        34
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(34).zip(out.chunks_exact_mut(32)) {
            let d = half_at(block, 0);
            for (q, v) in block[2..].iter().zip(values) {
                *v = f32::from(*q as i8) * d;
            }
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (x, block) in values.chunks_exact(32).zip(out.chunks_exact_mut(34)) {
            let d = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
            let scale = inverse(d);
            put_half(block, 0, d);
            for (v, q) in x.iter().zip(&mut block[2..]) {
                *q = (v * scale).round() as i8 as u8;
            }
        }
        true
    }
}
