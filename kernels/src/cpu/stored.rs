//! Number formats that memory holds and f32 arithmetic works on.
//!
//! Widening is exact; narrowing rounds to nearest, ties to even, as IEEE 754 says: too large becomes infinite,
//! NaN stays NaN. Both are integer arithmetic without branches, which vectorises on every instruction set.

use super::rows_per_task;
use crate::multiversion;
use half::{bf16, f16};
use rayon::prelude::*;

/// An element as it is stored.
pub trait Stored: Copy + Send + Sync + 'static {
    /// The value in f32.
    fn widen(self) -> f32;
    /// The nearest value of this format.
    fn narrow(x: f32) -> Self;
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
        let kept = if bits & 0x7FFF_FFFF > 0x7F80_0000 { bits | 0x0040_0000 } else { rounded };
        bf16::from_bits((kept >> 16) as u16)
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
}

/// Stores nothing: a state that is not there, a copy that nobody asked for.
impl Stored for () {
    #[inline(always)]
    fn widen(self) -> f32 {
        0.0
    }

    #[inline(always)]
    fn narrow(_: f32) -> Self {}
}

/// `to ← from`, rounded, with all cores.
///
/// # Panics
/// If the lengths differ.
pub fn narrow<T: Stored>(from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "narrow: lengths");
    let task = rows_per_task(to.len(), 1);
    to.par_chunks_mut(task).zip(from.par_chunks(task)).for_each(|(to, from)| narrow_chunk(from, to));
}

multiversion! {
    fn narrow_chunk<T: Stored>(from: &[f32], to: &mut [T]) {
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
    to.par_chunks_mut(task).zip(from.par_chunks(task)).for_each(|(to, from)| widen_chunk(from, to));
}

multiversion! {
    fn widen_chunk<T: Stored>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen();
        }
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
            assert_eq!(h.to_bits(), f16::from_f32(*x).to_bits(), "f16 of {:#x}", x.to_bits());
            assert_eq!(b.to_bits(), bf16::from_f32(*x).to_bits(), "bf16 of {:#x}", x.to_bits());
        }
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
