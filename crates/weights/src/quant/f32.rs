//! `f32`: as computed.

use super::Format;

pub(super) struct F32;

impl Format for F32 {
    fn name(&self) -> &'static str {
        "f32"
    }
    fn ggml_type(&self) -> u32 {
        0
    }
    fn block_len(&self) -> usize {
        1
    }
    fn block_bytes(&self) -> usize {
        4
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (b, o) in bytes.chunks_exact(4).zip(out) {
            *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (v, o) in values.iter().zip(out.chunks_exact_mut(4)) {
            o.copy_from_slice(&v.to_le_bytes());
        }
        true
    }
}
