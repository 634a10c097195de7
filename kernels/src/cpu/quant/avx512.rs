//! The integer product with AVX-512 VNNI: one register is four columns of 16 rows, `vpdpbusd` sums the four.

use super::Panel;
use super::activations::Int8Rows;
use super::format::ScaleKind;
use super::product::Put;
use crate::cpu::simd::{LANES, Level, level};
use std::arch::x86_64::*;
use std::ops::Range;

const HALF: u8 = 0;
const HALF_MIN: u8 = 1;
const SUPER_MIN: u8 = 2;
const SUPER_SIGNED: u8 = 3;

/// Most rows of activations at a time: their sums and a block's codes fill the registers.
const TILE: usize = 8;

/// Whether this CPU runs it.
#[inline]
pub fn available() -> bool {
    level() == Level::Avx512 && is_x86_feature_detected!("avx512vnni")
}

/// As [`super::product::portable`]; only where [`available`].
pub fn multiply(panel: Panel, x: &Int8Rows, rows: Range<usize>, put: &mut Put) {
    assert!(available(), "the caller checks");
    let bits = panel.format.bits;
    match panel.format.scales {
        ScaleKind::Half if bits == 8 => tiles::<8, HALF>(panel, x, rows, put),
        ScaleKind::Half if bits == 4 => tiles::<4, HALF>(panel, x, rows, put),
        ScaleKind::Half => tiles::<5, HALF>(panel, x, rows, put),
        ScaleKind::HalfMin if bits == 4 => tiles::<4, HALF_MIN>(panel, x, rows, put),
        ScaleKind::HalfMin => tiles::<5, HALF_MIN>(panel, x, rows, put),
        ScaleKind::SuperMin if bits == 4 => tiles::<4, SUPER_MIN>(panel, x, rows, put),
        ScaleKind::SuperMin => tiles::<5, SUPER_MIN>(panel, x, rows, put),
        ScaleKind::SuperSigned => tiles::<6, SUPER_SIGNED>(panel, x, rows, put),
    }
}

fn tiles<const BITS: usize, const KIND: u8>(panel: Panel, x: &Int8Rows, rows: Range<usize>, put: &mut Put) {
    assert_eq!(panel.format.bits as usize, BITS);
    assert_eq!(panel.codes.len(), x.blocks * 64 * BITS);
    assert!(panel.scales.len() >= panel.format.scales.record(x.blocks));
    assert_eq!(x.quants.len(), x.rows * x.blocks * 32);
    assert!(x.scales.len() == x.rows * x.blocks && x.sums.len() == x.scales.len());
    assert!(rows.end <= x.rows);
    let mut row = rows.start;
    while row < rows.end {
        // SAFETY: the features are there (`multiply`), the lengths were checked, and `row + R ≤ rows.end`.
        row += unsafe {
            match rows.end - row {
                TILE.. => tile::<BITS, KIND, TILE>(panel, x, row, row == rows.start, put),
                4.. => tile::<BITS, KIND, 4>(panel, x, row, row == rows.start, put),
                2.. => tile::<BITS, KIND, 2>(panel, x, row, row == rows.start, put),
                _ => tile::<BITS, KIND, 1>(panel, x, row, row == rows.start, put),
            }
        };
    }
}

/// `R` rows from `first` on. Returns `R`.
///
/// # Safety
/// The lengths are those that [`tiles`] checks, and `first + R ≤ x.rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn tile<const BITS: usize, const KIND: u8, const R: usize>(
    panel: Panel,
    x: &Int8Rows,
    first: usize,
    ask: bool,
    put: &mut Put,
) -> usize {
    let zero = i32::from(panel.format.zero);
    let mut acc = [_mm512_setzero_ps(); R];
    for b in 0..x.blocks {
        if ask {
            panel.ask_ahead::<BITS>(b, x.blocks);
        }
        // SAFETY: block `b` of the panel, rows `first..first + R` of `x`: all within the lengths promised.
        unsafe {
            let codes = codes::<BITS>(panel.codes.as_ptr().add(b * 64 * BITS));
            let [d0, d1, m] = scales::<KIND>(panel.scales.as_ptr(), b);
            for r in 0..R {
                let at = (first + r) * x.blocks + b;
                let q = x.quants.as_ptr().add(at * 32).cast::<i32>();
                let scale = _mm512_set1_ps(*x.scales.as_ptr().add(at));
                let [s0, s1] = (*x.sums.as_ptr().add(at)).map(i32::from);
                if KIND == SUPER_SIGNED {
                    let (low, high) = halves(&codes, q, -zero * s0, -zero * s1);
                    acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(d0, scale), _mm512_cvtepi32_ps(low), acc[r]);
                    acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(d1, scale), _mm512_cvtepi32_ps(high), acc[r]);
                } else {
                    let (low, high) = halves(&codes, q, -zero * (s0 + s1), 0);
                    let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
                    acc[r] = _mm512_fmadd_ps(_mm512_mul_ps(d0, scale), sum, acc[r]);
                }
                if KIND == HALF_MIN || KIND == SUPER_MIN {
                    let sum = _mm512_set1_ps((s0 + s1) as f32);
                    acc[r] = _mm512_fmadd_ps(m, _mm512_mul_ps(scale, sum), acc[r]);
                }
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        let mut sums = [0.0; LANES];
        // SAFETY: 64 bytes of our own; an unaligned store.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
        put(first + r, &sums);
    }
    R
}

/// Sums over the first and the second 16 columns, on top of `low` and `high`.
///
/// # Safety
/// `q` points to 32 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn halves(codes: &[__m512i; 8], q: *const i32, low: i32, high: i32) -> (__m512i, __m512i) {
    let (mut low, mut high) = (_mm512_set1_epi32(low), _mm512_set1_epi32(high));
    for g in 0..4 {
        // SAFETY: words `g` and `g + 4` of the eight behind `q`.
        unsafe {
            low = _mm512_dpbusd_epi32(low, codes[g], _mm512_set1_epi32(q.add(g).read_unaligned()));
            high = _mm512_dpbusd_epi32(high, codes[g + 4], _mm512_set1_epi32(q.add(g + 4).read_unaligned()));
        }
    }
    (low, high)
}

/// A block's eight groups of codes.
///
/// # Safety
/// `p` points to `64 · BITS` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn codes<const BITS: usize>(p: *const u8) -> [__m512i; 8] {
    let mut codes = [_mm512_setzero_si512(); 8];
    // SAFETY: all loads lie within the block: 8·64 bytes, or 4·64 of nibbles and 64 per further bit.
    unsafe {
        if BITS == 8 {
            for g in 0..8 {
                codes[g] = _mm512_loadu_si512(p.add(64 * g).cast());
            }
            return codes;
        }
        let mask = _mm512_set1_epi8(15);
        for g in 0..4 {
            let pair = _mm512_loadu_si512(p.add(64 * g).cast());
            codes[g] = _mm512_and_si512(pair, mask);
            codes[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(pair), mask);
        }
        for bit in 4..BITS {
            let words = p.add(256 + (bit - 4) * 64).cast::<u64>();
            let value = _mm512_set1_epi8(1 << bit);
            for g in 0..8 {
                let which = words.add(g).read_unaligned();
                codes[g] = _mm512_mask_add_epi8(codes[g], which, codes[g], value);
            }
        }
    }
    codes
}

/// Scales of a block's halves and its minimum, for 16 rows.
///
/// # Safety
/// `p` points to scales that cover block `b`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn scales<const KIND: u8>(p: *const u8, b: usize) -> [__m512; 3] {
    // SAFETY: the records are laid out by `ScaleKind`; every load is 32 or 16 bytes within one.
    unsafe {
        match KIND {
            HALF => {
                let d = floats(p.add(ScaleKind::Half.record(b)));
                [d, d, d]
            }
            HALF_MIN => {
                let record = p.add(ScaleKind::HalfMin.record(b));
                let d = floats(record);
                [d, d, floats(record.add(32))]
            }
            SUPER_MIN => {
                let record = p.add(ScaleKind::SuperMin.record(b));
                let inner = record.add(64 + b % 8 * 32);
                let d = _mm512_mul_ps(floats(record), unsigned(inner));
                let m = _mm512_mul_ps(floats(record.add(32)), unsigned(inner.add(16)));
                [d, d, _mm512_sub_ps(_mm512_set1_ps(-0.0), m)]
            }
            _ => {
                let record = p.add(ScaleKind::SuperSigned.record(b));
                let (outer, inner) = (floats(record), record.add(32 + b % 8 * 32));
                [_mm512_mul_ps(outer, signed(inner)), _mm512_mul_ps(outer, signed(inner.add(16))), outer]
            }
        }
    }
}

/// # Safety
/// `p` points to 16 halves.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn floats(p: *const u8) -> __m512 {
    // SAFETY: 32 bytes, an unaligned load.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// # Safety
/// `p` points to 16 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn unsigned(p: *const u8) -> __m512 {
    // SAFETY: 16 bytes, an unaligned load.
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(p.cast()) }))
}

/// # Safety
/// `p` points to 16 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
unsafe fn signed(p: *const u8) -> __m512 {
    // SAFETY: 16 bytes, an unaligned load.
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(p.cast()) }))
}
