//! The integer product and the decoder with AVX2: a register is four columns of eight rows.

use super::Panel;
use super::activations::Int8Rows;
use super::format::ScaleKind;
use super::product::Put;
use crate::cpu::simd::{LANES, avx2};
use std::arch::x86_64::*;
use std::ops::Range;

const HALF: u8 = 0;
const HALF_MIN: u8 = 1;
const SUPER_MIN: u8 = 2;
const SUPER_SIGNED: u8 = 3;

/// Most rows of activations at a time.
const TILE: usize = 4;

/// As [`super::product::portable`]; only where AVX2 is.
pub fn multiply(panel: Panel, x: &Int8Rows, rows: Range<usize>, put: &mut Put) {
    assert!(avx2(), "the caller checks");
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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const BITS: usize, const KIND: u8, const R: usize>(
    panel: Panel,
    x: &Int8Rows,
    first: usize,
    ask: bool,
    put: &mut Put,
) -> usize {
    // With eight bits the codes are made signed first, so nothing is left to subtract.
    let zero = if BITS == 8 { 0 } else { i32::from(panel.format.zero) };
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    for b in 0..x.blocks {
        if ask {
            panel.ask_ahead::<BITS>(b, x.blocks);
        }
        for side in 0..2 {
            // SAFETY: block `b` of the panel, rows `first..first + R` of `x`: all within the lengths promised.
            unsafe {
                let codes = codes::<BITS>(panel.codes.as_ptr().add(b * 64 * BITS), side);
                let [d0, d1, m] = scales::<KIND>(panel.scales.as_ptr(), b, side);
                for r in 0..R {
                    let at = (first + r) * x.blocks + b;
                    let q = x.quants.as_ptr().add(at * 32).cast::<i32>();
                    let scale = _mm256_set1_ps(*x.scales.as_ptr().add(at));
                    let [s0, s1] = (*x.sums.as_ptr().add(at)).map(i32::from);
                    let sum = &mut acc[r][side];
                    let (low, high) = halves::<BITS>(&codes, q);
                    if KIND == SUPER_SIGNED {
                        let low = _mm256_sub_epi32(low, _mm256_set1_epi32(zero * s0));
                        let high = _mm256_sub_epi32(high, _mm256_set1_epi32(zero * s1));
                        *sum = _mm256_fmadd_ps(_mm256_mul_ps(d0, scale), _mm256_cvtepi32_ps(low), *sum);
                        *sum = _mm256_fmadd_ps(_mm256_mul_ps(d1, scale), _mm256_cvtepi32_ps(high), *sum);
                    } else {
                        let both = _mm256_add_epi32(low, high);
                        let both = _mm256_sub_epi32(both, _mm256_set1_epi32(zero * (s0 + s1)));
                        *sum = _mm256_fmadd_ps(_mm256_mul_ps(d0, scale), _mm256_cvtepi32_ps(both), *sum);
                    }
                    if KIND == HALF_MIN || KIND == SUPER_MIN {
                        let total = _mm256_set1_ps((s0 + s1) as f32);
                        *sum = _mm256_fmadd_ps(m, _mm256_mul_ps(scale, total), *sum);
                    }
                }
            }
        }
    }
    for (r, [low, high]) in acc.into_iter().enumerate() {
        let mut sums = [0.0; LANES];
        // SAFETY: 64 bytes of our own; unaligned stores.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), low);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), high);
        }
        put(first + r, &sums);
    }
    R
}

/// Sums of code times quant over the first and the second 16 columns.
///
/// # Safety
/// `q` points to 32 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves<const BITS: usize>(codes: &[__m256i; 8], q: *const i32) -> (__m256i, __m256i) {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); 2];
    for half in 0..2 {
        // Two products of a code and a quant fit 16 bits: as many sums of them are added as still do.
        let mut narrow = _mm256_setzero_si256();
        for g in 4 * half..4 * half + 4 {
            // SAFETY: word `g` of the eight behind `q`.
            let x = _mm256_set1_epi32(unsafe { q.add(g).read_unaligned() });
            let pairs = if BITS == 8 {
                let signed = _mm256_xor_si256(codes[g], _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
            } else {
                _mm256_maddubs_epi16(codes[g], x)
            };
            match BITS {
                4 | 5 => narrow = _mm256_add_epi16(narrow, pairs),
                6 if g % 2 == 0 => narrow = pairs,
                6 => {
                    let four = _mm256_madd_epi16(_mm256_add_epi16(narrow, pairs), ones);
                    sums[half] = _mm256_add_epi32(sums[half], four);
                }
                _ => sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones)),
            }
        }
        if BITS < 6 {
            sums[half] = _mm256_madd_epi16(narrow, ones);
        }
    }
    (sums[0], sums[1])
}

/// One side (eight rows) of a block's eight groups of codes.
///
/// # Safety
/// `p` points to `64 · BITS` bytes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn codes<const BITS: usize>(p: *const u8, side: usize) -> [__m256i; 8] {
    let mut codes = [_mm256_setzero_si256(); 8];
    // SAFETY: all loads lie within the block: 8·64 bytes, or 4·64 of nibbles and 64 per further bit.
    unsafe {
        if BITS == 8 {
            for g in 0..8 {
                codes[g] = _mm256_loadu_si256(p.add(64 * g + 32 * side).cast());
            }
            return codes;
        }
        let mask = _mm256_set1_epi8(15);
        for g in 0..4 {
            let pair = _mm256_loadu_si256(p.add(64 * g + 32 * side).cast());
            codes[g] = _mm256_and_si256(pair, mask);
            codes[g + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(pair), mask);
        }
        for bit in 4..BITS {
            let words = p.add(256 + (bit - 4) * 64 + 4 * side).cast::<i32>();
            for g in 0..8 {
                let set = spread(words.add(2 * g).read_unaligned());
                codes[g] = _mm256_or_si256(codes[g], _mm256_and_si256(set, _mm256_set1_epi8(1 << bit)));
            }
        }
    }
    codes
}

/// 32 bits as 32 bytes of all ones or zeros.
#[target_feature(enable = "avx2,fma,f16c")]
fn spread(bits: i32) -> __m256i {
    let which = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), which);
    let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each)
}

/// Scales of a block's halves and its minimum, for one side's eight rows.
///
/// # Safety
/// `p` points to scales that cover block `b`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scales<const KIND: u8>(p: *const u8, b: usize, side: usize) -> [__m256; 3] {
    // SAFETY: the records are laid out by `ScaleKind`; every load is 16 or 8 bytes within one.
    unsafe {
        match KIND {
            HALF => {
                let d = floats(p.add(ScaleKind::Half.record(b) + 16 * side));
                [d, d, d]
            }
            HALF_MIN => {
                let record = p.add(ScaleKind::HalfMin.record(b) + 16 * side);
                let d = floats(record);
                [d, d, floats(record.add(32))]
            }
            SUPER_MIN => {
                let record = p.add(ScaleKind::SuperMin.record(b));
                let inner = record.add(64 + b % 8 * 32 + 8 * side);
                let d = _mm256_mul_ps(floats(record.add(16 * side)), unsigned(inner));
                let m = _mm256_mul_ps(floats(record.add(32 + 16 * side)), unsigned(inner.add(16)));
                [d, d, _mm256_sub_ps(_mm256_set1_ps(-0.0), m)]
            }
            _ => {
                let record = p.add(ScaleKind::SuperSigned.record(b));
                let outer = floats(record.add(16 * side));
                let inner = record.add(32 + b % 8 * 32 + 8 * side);
                [_mm256_mul_ps(outer, signed(inner)), _mm256_mul_ps(outer, signed(inner.add(16))), outer]
            }
        }
    }
}

/// # Safety
/// `p` points to 8 halves.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn floats(p: *const u8) -> __m256 {
    // SAFETY: 16 bytes, an unaligned load.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
}

/// # Safety
/// `p` points to 8 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unsigned(p: *const u8) -> __m256 {
    // SAFETY: 8 bytes, an unaligned load.
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(p.cast()) }))
}

/// # Safety
/// `p` points to 8 bytes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn signed(p: *const u8) -> __m256 {
    // SAFETY: 8 bytes, an unaligned load.
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(p.cast()) }))
}

/// As [`super::strips::portable`]; only where AVX2 is.
pub fn decode(panel: Panel, b: usize, out: &mut [f32; 32 * LANES]) {
    assert!(avx2(), "the caller checks");
    assert!(panel.codes.len() >= (b + 1) * 64 * panel.format.bits as usize);
    assert!(panel.scales.len() >= panel.format.scales.end(b), "scales of block {b}");
    let bits = panel.format.bits;
    // SAFETY: AVX2 is there, and block `b` lies within the panel.
    unsafe {
        match panel.format.scales {
            ScaleKind::Half if bits == 8 => decode_block::<8, HALF>(panel, b, out),
            ScaleKind::Half if bits == 4 => decode_block::<4, HALF>(panel, b, out),
            ScaleKind::Half => decode_block::<5, HALF>(panel, b, out),
            ScaleKind::HalfMin if bits == 4 => decode_block::<4, HALF_MIN>(panel, b, out),
            ScaleKind::HalfMin => decode_block::<5, HALF_MIN>(panel, b, out),
            ScaleKind::SuperMin if bits == 4 => decode_block::<4, SUPER_MIN>(panel, b, out),
            ScaleKind::SuperMin => decode_block::<5, SUPER_MIN>(panel, b, out),
            ScaleKind::SuperSigned => decode_block::<6, SUPER_SIGNED>(panel, b, out),
        }
    }
}

/// # Safety
/// Block `b` lies within the panel, whose format is `BITS` and `KIND`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode_block<const BITS: usize, const KIND: u8>(
    panel: Panel,
    b: usize,
    out: &mut [f32; 32 * LANES],
) {
    let zero = _mm256_set1_epi32(i32::from(panel.format.zero));
    let byte = _mm256_set1_epi32(255);
    for side in 0..2 {
        // SAFETY: promised by the caller.
        let (codes, [d0, d1, m]) = unsafe {
            (
                codes::<BITS>(panel.codes.as_ptr().add(b * 64 * BITS), side),
                scales::<KIND>(panel.scales.as_ptr(), b, side),
            )
        };
        for g in 0..8 {
            let mut rest = codes[g];
            for c in 0..4 {
                let code = _mm256_sub_epi32(_mm256_and_si256(rest, byte), zero);
                rest = _mm256_srli_epi32::<8>(rest);
                let mut w = _mm256_mul_ps(if g < 4 { d0 } else { d1 }, _mm256_cvtepi32_ps(code));
                if KIND == HALF_MIN || KIND == SUPER_MIN {
                    w = _mm256_add_ps(w, m);
                }
                // SAFETY: eight of the block's 512 floats.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add((4 * g + c) * LANES + 8 * side), w) };
            }
        }
    }
}
