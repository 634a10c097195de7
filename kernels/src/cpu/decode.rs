//! Panel strips → f32: what the block formats say, element by element and exactly.
//!
//! The quantized ones have an AVX2 version written out, since compilers do not find it; the portable version is
//! its reference. Scales and minima come as `[blocks][16]`, quants as `[columns][16]` (or `[columns][8]` pairs of
//! nibbles: lane `i` low, lane `i + 8` high).

use super::simd::LANES;
use half::f16;

/// Weights per block of the quantized formats.
pub const BLOCK: usize = 32;

/// `w = d·q`.
pub fn decode_q8(quants: &[i8], scales: &[f16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::simd::avx2() {
        // SAFETY: AVX2 was detected on this CPU.
        return unsafe { avx2::decode_q8(quants, scales, out) };
    }
    portable(quants.chunks_exact(LANES), scales, None, out, |q, i| q[i] as f32);
}

/// `w = d·(q − 8)`.
pub fn decode_q4(quants: &[u8], scales: &[f16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::simd::avx2() {
        // SAFETY: AVX2 was detected on this CPU.
        return unsafe { avx2::decode_q4::<8, false>(quants, scales, scales, out) };
    }
    portable(quants.chunks_exact(8), scales, None, out, |q, i| nibble(q, i) - 8.0);
}

/// `w = d·q + m`.
pub fn decode_q4_min(quants: &[u8], scales: &[f16], minima: &[f16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::simd::avx2() {
        // SAFETY: AVX2 was detected on this CPU.
        return unsafe { avx2::decode_q4::<0, true>(quants, scales, minima, out) };
    }
    portable(quants.chunks_exact(8), scales, Some(minima), out, nibble);
}

fn nibble(q: &[u8], i: usize) -> f32 {
    (if i < 8 { q[i] & 15 } else { q[i - 8] >> 4 }) as f32
}

/// The reference of all three.
fn portable<'a, T: 'a>(
    quants: impl Iterator<Item = &'a [T]>,
    scales: &[f16],
    minima: Option<&[f16]>,
    out: &mut [f32],
    value: impl Fn(&[T], usize) -> f32,
) {
    for (column, (out, q)) in out.chunks_exact_mut(LANES).zip(quants).enumerate() {
        let block = column / BLOCK * LANES;
        for (i, o) in out.iter_mut().enumerate() {
            let product = scales[block + i].to_f32() * value(q, i);
            *o = minima.map_or(product, |m| product + m[block + i].to_f32());
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{BLOCK, LANES, f16};
    use std::arch::x86_64::*;

    /// Sixteen halves as two registers of floats.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn halves(x: &[f16]) -> (__m256, __m256) {
        let x: &[f16; LANES] = x[..LANES].try_into().expect("LANES");
        // SAFETY: 32 bytes behind a reference to 16 halves; unaligned loads.
        unsafe {
            let p = x.as_ptr().cast::<__m128i>();
            (_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1))))
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn store(out: &mut [f32], low: __m256, high: __m256) {
        let out: &mut [f32; LANES] = out.try_into().expect("LANES");
        // SAFETY: 64 bytes behind a reference to 16 floats; unaligned stores.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), low);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), high);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn decode_q8(quants: &[i8], scales: &[f16], out: &mut [f32]) {
        let blocks = out.chunks_mut(BLOCK * LANES).zip(quants.chunks(BLOCK * LANES));
        for ((out, q), d) in blocks.zip(scales.chunks_exact(LANES)) {
            let (d0, d1) = halves(d);
            for (out, q) in out.chunks_exact_mut(LANES).zip(q.chunks_exact(LANES)) {
                // SAFETY: 16 bytes of quants; unaligned load.
                let q = unsafe { _mm_loadu_si128(q.as_ptr().cast()) };
                let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
                let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(q)));
                store(out, _mm256_mul_ps(d0, low), _mm256_mul_ps(d1, high));
            }
        }
    }

    /// `d·(q − ZERO)`, plus the minimum if `MIN`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn decode_q4<const ZERO: i8, const MIN: bool>(
        quants: &[u8],
        scales: &[f16],
        minima: &[f16],
        out: &mut [f32],
    ) {
        let (mask, zero) = (_mm_set1_epi8(15), _mm_set1_epi8(ZERO));
        let blocks = out.chunks_mut(BLOCK * LANES).zip(quants.chunks(BLOCK * 8));
        for ((out, q), (d, m)) in blocks.zip(scales.chunks_exact(LANES).zip(minima.chunks_exact(LANES))) {
            let ((d0, d1), (m0, m1)) = (halves(d), halves(m));
            for (out, q) in out.chunks_exact_mut(LANES).zip(q.chunks_exact(8)) {
                // SAFETY: 8 bytes of nibbles; unaligned load.
                let q = unsafe { _mm_loadl_epi64(q.as_ptr().cast()) };
                let low = _mm_sub_epi8(_mm_and_si128(q, mask), zero);
                let high = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16::<4>(q), mask), zero);
                let mut a = _mm256_mul_ps(d0, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)));
                let mut b = _mm256_mul_ps(d1, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)));
                if MIN {
                    a = _mm256_add_ps(a, m0);
                    b = _mm256_add_ps(b, m1);
                }
                store(out, a, b);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_equals_the_portable_one_bit_for_bit() {
        let columns = 75;
        let scales: Vec<f16> = (0..3 * LANES).map(|i| f16::from_f32(0.013 * i as f32 - 0.2)).collect();
        let minima: Vec<f16> = (0..3 * LANES).map(|i| f16::from_f32(0.3 - 0.017 * i as f32)).collect();
        let bytes: Vec<u8> = (0..columns * LANES).map(|i| (i * 37 % 251) as u8).collect();
        let signed: Vec<i8> = bytes.iter().map(|b| *b as i8).collect();
        let (mut got, mut want) = (vec![0.0; columns * LANES], vec![0.0; columns * LANES]);
        decode_q8(&signed, &scales, &mut got);
        portable(signed.chunks_exact(LANES), &scales, None, &mut want, |q, i| q[i] as f32);
        assert_eq!(got, want, "q8");
        let pairs = &bytes[..columns * 8];
        decode_q4(pairs, &scales, &mut got);
        portable(pairs.chunks_exact(8), &scales, None, &mut want, |q, i| nibble(q, i) - 8.0);
        assert_eq!(got, want, "q4");
        decode_q4_min(pairs, &scales, &minima, &mut got);
        portable(pairs.chunks_exact(8), &scales, Some(&minima), &mut want, nibble);
        assert_eq!(got, want, "q4 with minima");
    }
}
