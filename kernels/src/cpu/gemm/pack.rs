//! Operands in the order in which the inner loop reads them.

use super::{Elems, Strip};
use crate::cpu::simd::Level;
use crate::cpu::stored::Stored;
use std::mem::MaybeUninit;

/// Packs rows or columns as `[k][width]`; those beyond the strip's count are zero. Element `(i, k)` lies at
/// `i·stride + k·k_stride`. `out` has `width` floats for every `k` of the strip.
pub(super) fn pack(
    elems: Elems,
    stride: usize,
    k_stride: usize,
    strip: &Strip,
    width: usize,
    level: Level,
    out: &mut [MaybeUninit<f32>],
) {
    let kb = strip.k.len();
    assert_eq!(out.len(), width * kb, "pack: {kb} steps of {width}");
    assert!(strip.count <= width && width <= 16, "pack: {} of at most {width}, 16", strip.count);
    if kb == 0 || strip.count == 0 {
        out.fill(MaybeUninit::new(0.0));
        return;
    }
    let start = strip.first * stride + strip.k.start * k_stride;
    let end = start + (strip.count - 1) * stride + (kb - 1) * k_stride + 1;
    let lines = Lines { stride, k_stride, count: strip.count, kb, width };
    match elems {
        Elems::F32(x) => lines.pack(&x[start..end], level, out),
        Elems::Bf16(x) => lines.pack(&x[start..end], level, out),
        Elems::F16(x) => lines.pack(&x[start..end], level, out),
    }
}

/// What lies where; the elements begin with `(0, 0)` and end with `(count − 1, kb − 1)`.
#[derive(Clone, Copy)]
struct Lines {
    stride: usize,
    k_stride: usize,
    count: usize,
    kb: usize,
    width: usize,
}

impl Lines {
    fn pack<T: Stored>(self, x: &[T], level: Level, out: &mut [MaybeUninit<f32>]) {
        #[cfg(target_arch = "x86_64")]
        if level == Level::Avx512 && (self.stride == 1 || self.k_stride == 1) {
            // SAFETY: the features are there; the lengths of `x` and `out` are those that `self` says.
            return unsafe { avx512::pack(self, x, out.as_mut_ptr().cast()) };
        }
        let _ = level;
        self.plain(x, out);
    }

    /// The definition.
    fn plain<T: Stored>(self, x: &[T], out: &mut [MaybeUninit<f32>]) {
        for (k, line) in out.chunks_exact_mut(self.width).enumerate() {
            let (used, beyond) = line.split_at_mut(self.count);
            for (i, out) in used.iter_mut().enumerate() {
                out.write(x[i * self.stride + k * self.k_stride].widen());
            }
            beyond.fill(MaybeUninit::new(0.0));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Lines;
    use crate::cpu::stored::Stored;
    use std::arch::x86_64::*;

    /// # Safety
    /// AVX-512 F, BW and VL are there; `x` and `out` are as long as `lines` says, `lines.stride` or `lines.k_stride`
    /// is 1.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn pack<T: Stored>(lines: Lines, x: &[T], out: *mut f32) {
        let Lines { stride, k_stride, count, kb, width } = lines;
        // SAFETY: every load is masked to elements that `x` has, every store to the `width` floats of its line.
        unsafe {
            let (used, all) = (mask(count), mask(width));
            if stride == 1 {
                for k in 0..kb {
                    let row = T::load16(x.as_ptr().add(k * k_stride), used);
                    _mm512_mask_storeu_ps(out.add(k * width), all, row);
                }
                return;
            }
            for k in (0..kb).step_by(16) {
                let steps = (kb - k).min(16);
                let mut rows = [_mm512_setzero_ps(); 16];
                for (i, row) in rows.iter_mut().enumerate().take(count) {
                    *row = T::load16(x.as_ptr().add(i * stride + k), mask(steps));
                }
                let columns = transposed(rows);
                for (j, column) in columns.iter().enumerate().take(steps) {
                    _mm512_mask_storeu_ps(out.add((k + j) * width), all, *column);
                }
            }
        }
    }

    /// The first `n` lanes.
    fn mask(n: usize) -> __mmask16 {
        ((1u32 << n) - 1) as __mmask16
    }

    /// The transpose of 16 rows of 16.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn transposed(x: [__m512; 16]) -> [__m512; 16] {
        let zero = _mm512_setzero_ps();
        let (mut a, mut b) = ([zero; 16], [zero; 16]);
        // Within groups of four lanes: pairs of rows, then pairs of pairs.
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
        }
        for i in 0..4 {
            let [l0, h0, l1, h1] =
                [a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]].map(|v| _mm512_castps_pd(v));
            b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(l0, l1));
            b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(l0, l1));
            b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(h0, h1));
            b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(h0, h1));
        }
        // b[4i + j] has, in group g, column 4g + j of rows 4i..4i + 4: gather the groups.
        for j in 0..4 {
            let even01 = _mm512_shuffle_f32x4::<0b10_00_10_00>(b[j], b[4 + j]);
            let odd01 = _mm512_shuffle_f32x4::<0b11_01_11_01>(b[j], b[4 + j]);
            let even23 = _mm512_shuffle_f32x4::<0b10_00_10_00>(b[8 + j], b[12 + j]);
            let odd23 = _mm512_shuffle_f32x4::<0b11_01_11_01>(b[8 + j], b[12 + j]);
            a[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even01, even23);
            a[4 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd01, odd23);
            a[8 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even01, even23);
            a[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd01, odd23);
        }
        a
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn every_instruction_set_packs_as_the_definition_says() {
        let x: Vec<f32> = (0..40 * 70).map(|i| i as f32 * 0.37 - 300.0).collect();
        let narrow: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
        for level in Level::present() {
            for (stride, k_stride) in [(1, 40), (70, 1), (2, 40)] {
                for (count, width) in [(1, 1), (5, 16), (12, 12), (16, 16), (7, 7)] {
                    for kb in [1, 15, 16, 33] {
                        let lines = Lines { stride, k_stride, count, kb, width };
                        let len = (count - 1) * stride + (kb - 1) * k_stride + 1;
                        let [mut got, mut want] = [(); 2].map(|()| vec![MaybeUninit::new(-1.0); width * kb]);
                        let bits = |x: &[MaybeUninit<f32>]| -> Vec<u32> {
                            // SAFETY: made of initialised values.
                            x.iter().map(|v| unsafe { v.assume_init() }.to_bits()).collect()
                        };
                        lines.pack(&x[3..][..len], level, &mut got);
                        lines.plain(&x[3..][..len], &mut want);
                        assert_eq!(
                            bits(&got),
                            bits(&want),
                            "{level:?} f32 {stride} {count} of {width}, {kb}"
                        );
                        lines.pack(&narrow[3..][..len], level, &mut got);
                        lines.plain(&narrow[3..][..len], &mut want);
                        assert_eq!(
                            bits(&got),
                            bits(&want),
                            "{level:?} bf16 {stride} {count} of {width}, {kb}"
                        );
                    }
                }
            }
        }
    }
}
