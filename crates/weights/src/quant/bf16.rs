//! `bf16`: the upper half of an f32, round to nearest even; NaN stays NaN.

use super::Format;

pub(super) struct Bf16;

impl Format for Bf16 {
    fn name(&self) -> &'static str {
        "bf16"
    }
    fn ggml_type(&self) -> u32 {
        30
    }
    fn block_len(&self) -> usize {
        1
    }
    fn block_bytes(&self) -> usize {
        2
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.chunks_exact(2).zip(out) {
            *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (v, o) in values.iter().zip(out.chunks_exact_mut(2)) {
            o.copy_from_slice(&half::bf16::from_f32(*v).to_le_bytes());
        }
        true
    }
}
