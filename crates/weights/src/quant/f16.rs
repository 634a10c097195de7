//! `f16`: IEEE 754 half precision, round to nearest even.

use super::{Format, half_at, put_half};

pub(super) struct F16;

impl Format for F16 {
    fn name(&self) -> &'static str {
        "f16"
    }
    fn ggml_type(&self) -> u32 {
        1
    }
    fn block_len(&self) -> usize {
        1
    }
    fn block_bytes(&self) -> usize {
        2
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.chunks_exact(2).zip(out) {
            *o = half_at(b, 0);
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (v, o) in values.iter().zip(out.chunks_exact_mut(2)) {
            put_half(o, 0, *v);
        }
        true
    }
}
