//! Number formats that memory holds and f32 arithmetic works on.
//!
//! Widening is exact; narrowing rounds to nearest, ties to even, as IEEE 754 says: too large becomes infinite,
//! NaN stays NaN. Both are integer arithmetic without branches, which vectorises on every instruction set; slices
//! of f16 take the CPU's own conversion (F16C) where it has one, which gives the same bits.

use super::rows_per_task;
use crate::multiversion;
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// An element as it is stored.
pub trait Stored: Pod + Send + Sync {
    /// The value in f32.
    fn widen(self) -> f32;
    /// The nearest value of this format.
    fn narrow(x: f32) -> Self;

    /// [`Stored::widen`] of a slice, on this thread.
    fn widen_block(from: &[Self], to: &mut [f32]) {
        widen_each(from, to);
    }

    /// [`Stored::narrow`] of a slice, on this thread.
    fn narrow_block(from: &[f32], to: &mut [Self]) {
        narrow_each(from, to);
    }

    /// The first lanes of 16 elements, as `mask` says, in f32; the others are zero and not read.
    ///
    /// # Safety
    /// AVX-512 F, BW and VL are there, `from` points to the elements of the mask.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512;

    /// 16 elements in f32.
    ///
    /// # Safety
    /// AVX2 and F16C are there, `from` points to 16 elements.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2];

    /// The slice in f32, widened into `buffer` (at least as long) unless it already is.
    #[inline(always)]
    fn floats<'a>(from: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..from.len()];
        Self::widen_block(from, buffer);
        buffer
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn floats<'a>(from: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        from
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2] {
        // SAFETY: the caller's promise.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
        // A NaN keeps its top bits and becomes quiet: rounding could carry it to infinity.
        let kept = if x.is_nan() { bits | 0x0040_0000 } else { rounded };
        bf16::from_bits((kept >> 16) as u16)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2] {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_loadu_si256(from.cast()) };
        let halves = [_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits)];
        // Written out: a closure may be compiled without this function's instruction set.
        let low = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves[0]));
        let high = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves[1]));
        [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = self.to_bits() as u32;
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7FFF) << 13);
        // Rebias by multiplication: f16 exponents land 112 too low.
        let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
        let special = if magnitude >= 0x0F80_0000 { 0x7F80_0000 } else { 0 };
        f32::from_bits(scaled.to_bits() | special | sign)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        const INFINITY: u32 = 0x7F80_0000;
        /// Smallest magnitude that rounds to infinity: halfway between 65504 and 65536.
        const OVERFLOW: u32 = 0x477F_F000;
        /// 2⁻¹⁴, the smallest normal f16.
        const NORMAL: u32 = 0x3880_0000;
        let bits = x.to_bits();
        let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7FFF_FFFF);
        // Rebias by 112 and round by adding half a unit, less one where the kept part is even.
        let normal = magnitude.wrapping_sub(0x3800_0000).wrapping_add(0xFFF + (magnitude >> 13 & 1)) >> 13;
        // Adding ½ makes the FPU round at 2⁻²⁴, the unit of subnormals.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if magnitude < NORMAL { subnormal } else { normal };
        let large = if magnitude > INFINITY { 0x7E00 | (magnitude >> 13 & 0x3FF) } else { 0x7C00 };
        f16::from_bits((if magnitude >= OVERFLOW { large } else { finite } | sign) as u16)
    }

    fn widen_block(from: &[Self], to: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if super::simd::avx2() {
            // SAFETY: F16C was detected on this CPU.
            return unsafe { f16c::widen(from, to) };
        }
        widen_each(from, to);
    }

    fn narrow_block(from: &[f32], to: &mut [Self]) {
        #[cfg(target_arch = "x86_64")]
        if super::simd::avx2() {
            // SAFETY: F16C was detected on this CPU.
            return unsafe { f16c::narrow(from, to) };
        }
        narrow_each(from, to);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2] {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_loadu_si256(from.cast()) };
        [_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(bits))]
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_cvtph_ps(bits)
    }
}

/// Whole numbers, kept beside a scale for several of them: narrowing rounds to the nearest within ±127.
impl Stored for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x.round_ties_even().clamp(-127.0, 127.0) as Self
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2] {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm_loadu_si128(from.cast()) };
        let high = _mm_unpackhi_epi64(bytes, bytes);
        [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise.
        let bytes = unsafe { _mm_maskz_loadu_epi8(mask, from) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    }
}

/// Stores nothing: a state that is not there, a copy that nobody asked for.
impl Stored for () {
    #[inline(always)]
    fn widen(self) -> f32 {
        0.0
    }

    #[inline(always)]
    fn narrow(_: f32) -> Self {}

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2] {
        let _ = from;
        [_mm256_setzero_ps(); 2]
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512 {
        let _ = (from, mask);
        _mm512_setzero_ps()
    }
}

/// `to ← from`, rounded, with all cores.
///
/// # Panics
/// If the lengths differ.
pub fn narrow<T: Stored>(from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "narrow: lengths");
    let task = rows_per_task(to.len(), 1);
    to.par_chunks_mut(task).zip(from.par_chunks(task)).for_each(|(to, from)| T::narrow_block(from, to));
}

multiversion! {
    fn narrow_each<T: Stored>(from: &[f32], to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::narrow(*from);
        }
    }
}

/// `to ← from`, exactly, with all cores.
///
/// # Panics
/// If the lengths differ.
pub fn widen<T: Stored>(from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "widen: lengths");
    let task = rows_per_task(to.len(), 1);
    to.par_chunks_mut(task).zip(from.par_chunks(task)).for_each(|(to, from)| T::widen_block(from, to));
}

multiversion! {
    fn widen_each<T: Stored>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
    }
}

/// Elements converted at a time on their way to new memory: they stay in the first-level cache.
const CONVERTED: usize = 1024;

/// A new vector of values in f32, exactly, with all cores.
pub fn widened<T: Stored>(from: &[T]) -> Vec<f32> {
    converted(from, T::widen_block)
}

/// A new vector of values, rounded, with all cores.
pub fn narrowed<T: Stored>(from: &[f32]) -> Vec<T> {
    converted(from, T::narrow_block)
}

/// Without writing zeros first, which would take as long as converting.
fn converted<F: Sync, T: Pod + Send>(from: &[F], convert: fn(&[F], &mut [T])) -> Vec<T> {
    let len = from.len();
    let mut to: Vec<T> = Vec::with_capacity(len);
    let task = rows_per_task(len, 1);
    let room = to.spare_capacity_mut()[..len].par_chunks_mut(task);
    room.zip(from.par_chunks(task)).for_each(|(to, from)| {
        let mut block = [T::zeroed(); CONVERTED];
        for (to, from) in to.chunks_mut(CONVERTED).zip(from.chunks(CONVERTED)) {
            convert(from, &mut block[..from.len()]);
            for (to, value) in to.iter_mut().zip(&block) {
                to.write(*value);
            }
        }
    });
    // SAFETY: the chunks are the vector, and each was written to its end.
    unsafe { to.set_len(len) };
    to
}

#[cfg(target_arch = "x86_64")]
mod f16c {
    use super::Stored;
    use half::f16;
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn widen(from: &[f16], to: &mut [f32]) {
        let (from8, mut to8) = (from.chunks_exact(8), to.chunks_exact_mut(8));
        let tail = from8.remainder();
        for (from, to) in from8.zip(&mut to8) {
            // SAFETY: 16 bytes read, 32 written, both unaligned.
            unsafe {
                let halves = _mm_loadu_si128(from.as_ptr().cast());
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
        }
        for (to, from) in to8.into_remainder().iter_mut().zip(tail) {
            *to = from.widen();
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn narrow(from: &[f32], to: &mut [f16]) {
        let (from8, mut to8) = (from.chunks_exact(8), to.chunks_exact_mut(8));
        let tail = from8.remainder();
        for (from, to) in from8.zip(&mut to8) {
            // SAFETY: 32 bytes read, 16 written, both unaligned.
            unsafe {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(from.as_ptr()));
                _mm_storeu_si128(to.as_mut_ptr().cast(), halves);
            }
        }
        for (to, from) in to8.into_remainder().iter_mut().zip(tail) {
            *to = f16::narrow(*from);
        }
    }
}

/// `to ← from` past the caches, where the CPU can: for results that are read much later, if at all soon. The thread
/// calls [`stream_fence`] before it tells others that they are there.
///
/// # Panics
/// If the lengths differ.
pub(crate) fn stream_out<T: Stored>(from: &[T], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "stream_out: lengths");
    let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
    #[cfg(target_arch = "x86_64")]
    if super::simd::avx2() {
        // SAFETY: AVX2 was detected on this CPU; the lengths are equal.
        return unsafe { stream_out_avx2(from, to) };
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn stream_out_avx2(from: &[u8], to: &mut [u8]) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_stream_si256};
    let head = to.as_ptr().align_offset(size_of::<__m256i>()).min(to.len());
    let (from_head, from) = from.split_at(head);
    let (to_head, to) = to.split_at_mut(head);
    to_head.copy_from_slice(from_head);
    let (groups, mut targets) = (from.chunks_exact(32), to.chunks_exact_mut(32));
    let tail = groups.remainder();
    for (from, to) in groups.zip(&mut targets) {
        // SAFETY: 32 bytes each; the target is aligned, being a multiple of 32 bytes behind the head.
        unsafe { _mm256_stream_si256(to.as_mut_ptr().cast(), _mm256_loadu_si256(from.as_ptr().cast())) };
    }
    targets.into_remainder().copy_from_slice(tail);
}

/// Orders [`stream_out`]'s writes before everything after it.
pub(crate) fn stream_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of every x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_value_widens_exactly_and_narrows_back() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(
                h.is_nan() && h.widen().is_nan() || h.widen().to_bits() == h.to_f32().to_bits(),
                "f16 {bits:#x}"
            );
            assert!(
                b.is_nan() && b.widen().is_nan() || b.widen().to_bits() == b.to_f32().to_bits(),
                "bf16 {bits:#x}"
            );
            assert!(h.is_nan() || f16::narrow(h.widen()).to_bits() == bits, "f16 {bits:#x}");
            assert!(b.is_nan() || bf16::narrow(b.widen()).to_bits() == bits, "bf16 {bits:#x}");
        }
    }

    #[test]
    fn slices_of_halves_widen_to_the_same_bits_on_every_path() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|h| !h.is_nan()).collect();
        let (mut fast, mut plain) = (vec![0.0; halves.len()], vec![0.0; halves.len()]);
        widen(&halves, &mut fast);
        widen_each(&halves, &mut plain);
        assert!(fast.iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn narrowing_equals_the_half_crates_bit_for_bit() {
        let near_ties = (0..=u16::MAX)
            .flat_map(|high| [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| (high as u32) << 16 | low));
        let f16_ties = (0..1u32 << 19)
            .flat_map(|high| [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF].map(|low| high << 13 | low));
        let spread = (0..1u32 << 20).map(|i| i.wrapping_mul(0x9E37_79B1));
        let values: Vec<f32> = near_ties.chain(f16_ties).chain(spread).map(f32::from_bits).collect();
        let mut halves = vec![f16::ZERO; values.len()];
        let mut brains = vec![bf16::ZERO; values.len()];
        narrow(&values, &mut halves);
        narrow(&values, &mut brains);
        for ((x, h), b) in values.iter().zip(&halves).zip(&brains) {
            assert_eq!(h.to_bits(), f16::from_f32_const(*x).to_bits(), "f16 of {:#x}", x.to_bits());
            assert_eq!(f16::narrow(*x).to_bits(), h.to_bits(), "f16 of {:#x}", x.to_bits());
            assert_eq!(b.to_bits(), bf16::from_f32(*x).to_bits(), "bf16 of {:#x}", x.to_bits());
        }
    }

    #[test]
    fn new_vectors_are_converted_to_their_last_element() {
        for len in [0, 1, CONVERTED - 1, CONVERTED + 1, (1 << 14) + 77] {
            let wide: Vec<f32> = (0..len).map(|i| i as f32 * 0.37 - 100.0).collect();
            let mut narrow = vec![bf16::ZERO; len];
            narrow_each(&wide, &mut narrow);
            assert_eq!(narrowed::<bf16>(&wide), narrow);
            let mut again = vec![0.0; len];
            widen_each(&narrow, &mut again);
            assert_eq!(widened(&narrow), again);
        }
    }

    #[test]
    fn whole_numbers_round_to_the_nearest_within_their_range() {
        for (x, expected) in
            [(0.5, 0), (1.5, 2), (-2.5, -2), (126.6, 127), (1e9, 127), (-1e9, -127), (f32::NAN, 0)]
        {
            assert_eq!(i8::narrow(x), expected, "{x}");
        }
        assert!((-127..=127).all(|q: i8| i8::narrow(q.widen()) == q));
    }

    #[test]
    fn too_large_for_f16_is_infinite_and_too_small_is_zero() {
        assert_eq!(f16::narrow(65519.996), f16::MAX);
        assert_eq!(f16::narrow(65520.0), f16::INFINITY);
        assert_eq!(f16::narrow(-1e30), f16::NEG_INFINITY);
        assert_eq!(f16::narrow(2f32.powi(-25)).to_bits(), 0);
        assert_eq!(f16::narrow(2f32.powi(-25) * 1.0001).to_bits(), 1);
    }
}
