//! `q5_0`: 32 five-bit quants and one f16 scale, `x = d · (q − 16)`; the fifth bits lie in four bytes of their own.

use super::{Format, fifth_bits, half_at, inverse, pack_five_bits, put_half, signed_extreme};

pub(super) struct Q5_0;

impl Format for Q5_0 {
    fn name(&self) -> &'static str {
        "q5_0"
    }
    fn ggml_type(&self) -> u32 {
        6
    }
    fn block_len(&self) -> usize {
        32
    }
    fn block_bytes(&self) -> usize {
        22
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(22).zip(out.chunks_exact_mut(32)) {
            let d = half_at(block, 0);
            let high = fifth_bits(&block[2..6]);
            let bit = |i: usize| ((high >> i) as u8 & 1) << 4;
            for (i, q) in block[6..].iter().enumerate() {
                values[i] = d * f32::from(((q & 0x0f) | bit(i)) as i8 - 16);
                values[i + 16] = d * f32::from(((q >> 4) | bit(i + 16)) as i8 - 16);
            }
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (x, block) in values.chunks_exact(32).zip(out.chunks_exact_mut(22)) {
            let d = signed_extreme(x) / -16.0;
            let scale = inverse(d);
            put_half(block, 0, d);
            let quants = std::array::from_fn(|i| ((x[i] * scale + 16.5) as u8).min(31));
            pack_five_bits(&quants, &mut block[2..]);
        }
        true
    }
}
