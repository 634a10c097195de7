//! `q5_1`: 32 five-bit quants, f16 scale and minimum, `x = d · q + m`.

use super::{Format, fifth_bits, half_at, inverse, pack_five_bits, put_half, range};

pub(super) struct Q5_1;

impl Format for Q5_1 {
    fn name(&self) -> &'static str {
        "q5_1"
    }
    fn ggml_type(&self) -> u32 {
        7
    }
    fn block_len(&self) -> usize {
        32
    }
    fn block_bytes(&self) -> usize {
        24
    }

    fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        for (block, values) in bytes.chunks_exact(24).zip(out.chunks_exact_mut(32)) {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            let high = fifth_bits(&block[4..8]);
            let bit = |i: usize| ((high >> i) as u8 & 1) << 4;
            for (i, q) in block[8..].iter().enumerate() {
                values[i] = d * f32::from((q & 0x0f) | bit(i)) + m;
                values[i + 16] = d * f32::from((q >> 4) | bit(i + 16)) + m;
            }
        }
    }

    fn quantize(&self, values: &[f32], out: &mut [u8]) -> bool {
        for (x, block) in values.chunks_exact(32).zip(out.chunks_exact_mut(24)) {
            let (min, max) = range(x);
            let d = (max - min) / 31.0;
            let scale = inverse(d);
            put_half(block, 0, d);
            put_half(block, 2, min);
            let quants = std::array::from_fn(|i| (((x[i] - min) * scale + 0.5) as u8).min(31));
            pack_five_bits(&quants, &mut block[4..]);
        }
        true
    }
}
