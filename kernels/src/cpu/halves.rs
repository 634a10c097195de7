//! f32 numbers in two halves: a bfloat16 that can be computed with, and 16 bits that make it exact.
//!
//! `high` is the number rounded to bfloat16, to the nearest, ties away from zero: `(bits + 0x8000) >> 16`. `low` is what is
//! left of the bits, from −0x8000 to 0x7FFF, so that `(high << 16) + low` is the number again, whatever it was. (With ties to
//! even it could not be: then 0x8000 is left on both sides of an even `high`.) Rounding up to infinity is taken back too;
//! a NaN stays one, its payload may change.

use super::stored::Stored;
use crate::multiversion;
use bytemuck::{Pod, Zeroable};
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m512};

/// bfloat16, rounded to the nearest, ties away from zero: the upper half of an f32.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub struct High(bf16);

// SAFETY: transparent over a type that both hold for.
unsafe impl Zeroable for High {}
// SAFETY: as above.
unsafe impl Pod for High {}

impl Stored for High {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.0.widen()
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        High(split(x).0)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load8x2(from: *const Self) -> [__m256; 2] {
        // SAFETY: the caller's promise; the same layout.
        unsafe { bf16::load8x2(from.cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load16(from: *const Self, mask: u16) -> __m512 {
        // SAFETY: the caller's promise; the same layout.
        unsafe { bf16::load16(from.cast(), mask) }
    }
}

/// The same memory as [`High`]s.
pub(crate) fn as_high(x: &mut [bf16]) -> &mut [High] {
    bytemuck::cast_slice_mut(x)
}

/// The two halves of a number.
#[inline(always)]
pub fn split(x: f32) -> (bf16, i16) {
    let bits = x.to_bits();
    // Rounding would carry a NaN to infinity or beyond: it keeps its top bits and becomes quiet.
    let rounded = if x.is_nan() { bits | 0x0040_0000 } else { bits.wrapping_add(0x8000) };
    (bf16::from_bits((rounded >> 16) as u16), bits as u16 as i16)
}

/// The number of two halves.
#[inline(always)]
pub fn join(high: bf16, low: i16) -> f32 {
    f32::from_bits(((high.to_bits() as u32) << 16).wrapping_add(low as i32 as u32))
}

/// [`split`] of each number, on this thread.
///
/// # Panics
/// If the lengths differ.
pub fn split_block(from: &[f32], high: &mut [bf16], low: &mut [i16]) {
    assert!(from.len() == high.len() && from.len() == low.len(), "split: lengths");
    split_each(from, high, low);
}

/// [`join`] of each pair, on this thread.
///
/// # Panics
/// If the lengths differ.
pub fn join_block(high: &[bf16], low: &[i16], to: &mut [f32]) {
    assert!(to.len() == high.len() && to.len() == low.len(), "join: lengths");
    join_each(high, low, to);
}

multiversion! {
    fn split_each(from: &[f32], high: &mut [bf16], low: &mut [i16]) {
        for ((x, high), low) in from.iter().zip(high).zip(low) {
            (*high, *low) = split(*x);
        }
    }
}

multiversion! {
    fn join_each(high: &[bf16], low: &[i16], to: &mut [f32]) {
        for ((to, high), low) in to.iter_mut().zip(high).zip(low) {
            *to = join(*high, *low);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every upper half with the lower halves that are special, and numbers spread over all others.
    fn numbers() -> Vec<f32> {
        let special = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
        let near_ties = (0..=u16::MAX).flat_map(|high| special.map(|low| (high as u32) << 16 | low));
        let spread = (0..1u32 << 20).map(|i| i.wrapping_mul(0x9E37_79B1));
        near_ties.chain(spread).map(f32::from_bits).collect()
    }

    #[test]
    fn halves_join_to_the_number_they_were_split_from() {
        let numbers = numbers();
        let (mut high, mut low) = (vec![bf16::ZERO; numbers.len()], vec![0; numbers.len()]);
        split_block(&numbers, &mut high, &mut low);
        let mut again = vec![0.0; numbers.len()];
        join_block(&high, &low, &mut again);
        for (x, y) in numbers.iter().zip(&again) {
            assert!(x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan(), "{:#x}", x.to_bits());
        }
    }

    #[test]
    fn the_upper_half_is_the_nearest_bfloat16_and_ties_go_away_from_zero() {
        for x in numbers() {
            let (high, _) = split(x);
            assert_eq!(High::narrow(x).0.to_bits(), high.to_bits());
            let even = bf16::from_f32(x);
            if x.is_nan() {
                assert!(high.is_nan(), "{:#x}", x.to_bits());
            } else if x.to_bits() & 0xFFFF == 0x8000 {
                assert_eq!(high.to_bits(), (x.to_bits() >> 16) as u16 + 1, "{:#x}", x.to_bits());
            } else {
                assert_eq!(high.to_bits(), even.to_bits(), "{:#x}", x.to_bits());
            }
        }
    }
}
