//! Optimizer states in 8 bits: floating point with a common exponent for every [`BLOCK`] elements, rounded by chance.
//!
//! ```text
//! signed:   s eeee mmm     ±(1 + m/8) · 2^(e − 15) · 2^x, over 15 powers of two below the block's largest
//! unsigned:   eeeee mmm     (1 + m/8) · 2^(e − 31) · 2^x, over 31
//! ```
//! 0 is zero, `x` the block's exponent: the least that holds its largest element. Blocks are counted from a vector's first
//! element, so that it may be cut at multiples of [`BLOCK`] without changing a bit.
//!
//! A mean that moves by a thousandth of itself per step would never move if it were rounded to the nearest of steps of a
//! tenth. So a number goes up or down with the probability that makes its expectation exact, and the draw depends on a
//! key and the element's index alone. Two exceptions: an unsigned number above zero does not become zero (a second moment
//! of zero would make its element jump), and what is a code already stays it.

use crate::multiversion;

/// Elements with a common exponent.
pub const BLOCK: usize = 64;
/// Bits of an f32 below the three that are kept.
const DROPPED: u32 = 20;
/// Exponents of blocks, so that the smallest code is a normal f32.
const EXPONENTS: std::ops::RangeInclusive<i32> = -90..=126;

/// Where the draws of a vector come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    /// Names the vector and the update.
    pub key: u64,
    /// Index of the first element in the vector, a multiple of [`BLOCK`].
    pub first: u64,
}

/// A vector in 8 bits, or a part of one that begins with a block.
#[derive(Debug)]
pub struct EightBits<'a> {
    /// An element each.
    pub codes: &'a mut [u8],
    /// One for every [`BLOCK`], the last of which may be short.
    pub exponents: &'a mut [i8],
    /// Whether elements have a sign.
    pub signed: bool,
}

/// Bytes of `len` elements with their exponents.
pub fn bytes(len: usize) -> usize {
    len + len.div_ceil(BLOCK)
}

impl<'a> EightBits<'a> {
    /// Cut into parts of `len` elements, a multiple of [`BLOCK`].
    pub(crate) fn chunks(self, len: usize) -> impl Iterator<Item = EightBits<'a>> {
        assert!(len.is_multiple_of(BLOCK), "a part begins with a block");
        let signed = self.signed;
        let parts = self.codes.chunks_mut(len).zip(self.exponents.chunks_mut(len / BLOCK));
        parts.map(move |(codes, exponents)| EightBits { codes, exponents, signed })
    }

    /// Elements from a block's first on, as many as `to` takes.
    pub fn read(&self, first: usize, to: &mut [f32]) {
        read(&self.codes[first..first + to.len()], &self.exponents[first / BLOCK..], self.signed, to);
    }

    /// Replaces elements from a block's first on by whole blocks, or up to the end. Without draws they are rounded to the
    /// nearest.
    pub fn write(&mut self, first: usize, from: &[f32], draws: Option<Draws>) {
        let whole = first.is_multiple_of(BLOCK)
            && (from.len().is_multiple_of(BLOCK) || first + from.len() == self.codes.len());
        assert!(whole, "8-bit states are replaced block by block: {} elements from {first}", from.len());
        let codes = &mut self.codes[first..first + from.len()];
        let exponents = &mut self.exponents[first / BLOCK..];
        for (at, (from, codes)) in from.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).enumerate() {
            let index = draws.map(|draws| (draws.key, draws.first + (first + at * BLOCK) as u64));
            exponents[at] = write_block(from, self.signed, index, codes);
        }
    }
}

/// Elements from a block's first on, with their exponents.
///
/// # Panics
/// If there are fewer codes or exponents than `to` takes.
pub fn read(codes: &[u8], exponents: &[i8], signed: bool, to: &mut [f32]) {
    for ((codes, to), exponent) in codes.chunks(BLOCK).zip(to.chunks_mut(BLOCK)).zip(exponents) {
        match signed {
            true => read_block(Signed, codes, *exponent, to),
            false => read_block(Unsigned, codes, *exponent, to),
        }
    }
}

/// How a code's bits are shared out.
trait Form: Copy {
    /// Largest code without its sign.
    const TOP: u32;
    /// Bits of an f32 that are its sign here.
    const SIGN: u32;
}

#[derive(Clone, Copy)]
struct Signed;
#[derive(Clone, Copy)]
struct Unsigned;

impl Form for Signed {
    const TOP: u32 = 0x7F;
    const SIGN: u32 = 1 << 31;
}

impl Form for Unsigned {
    const TOP: u32 = 0xFF;
    const SIGN: u32 = 0;
}

/// What is added to a code without its sign to make it the top bits of an f32: its exponents end with the block's.
#[inline(always)]
fn offset<F: Form>(_: F, exponent: i8) -> u32 {
    ((127 + exponent as i32 - (F::TOP >> 3) as i32) << 3) as u32
}

multiversion! {
    fn read_block<F: Form>(form: F, codes: &[u8], exponent: i8, to: &mut [f32]) {
        let offset = offset(form, exponent);
        for (to, code) in to.iter_mut().zip(codes) {
            let code = *code as u32;
            let size = code & F::TOP;
            let bits = (size + offset) << DROPPED;
            let bits = if size == 0 { 0 } else { bits };
            *to = f32::from_bits(bits | (code << 24) & F::SIGN);
        }
    }
}

/// Returns the block's exponent.
fn write_block(from: &[f32], signed: bool, index: Option<(u64, u64)>, codes: &mut [u8]) -> i8 {
    let exponent = exponent(largest(from));
    // Half of what is dropped rounds to the nearest; a draw rounds by chance.
    let seed = index.map(|(key, index)| mix(key ^ mix(index)) as u32);
    match (signed, seed) {
        (true, Some(seed)) => write_drawn(Signed, from, exponent, seed, codes),
        (false, Some(seed)) => write_drawn(Unsigned, from, exponent, seed, codes),
        (true, None) => write_nearest(Signed, from, exponent, codes),
        (false, None) => write_nearest(Unsigned, from, exponent, codes),
    }
    exponent
}

multiversion! {
    /// The bits of the largest size; those of a NaN are larger than all others.
    fn largest(x: &[f32]) -> u32 {
        let mut largest = 0;
        for x in x {
            largest = largest.max(x.to_bits() & 0x7FFF_FFFF);
        }
        largest
    }
}

/// The least exponent at which a number of these bits is at most the largest code.
fn exponent(bits: u32) -> i8 {
    let rounded_up = (bits + (1 << DROPPED) - 1) >> 23;
    (rounded_up as i32 - 127).clamp(*EXPONENTS.start(), *EXPONENTS.end()) as i8
}

/// The code of an f32, of which `draw` of the dropped bits' range is added.
#[inline(always)]
fn code<F: Form>(_: F, x: f32, offset: u32, draw: u32) -> u8 {
    let bits = x.to_bits();
    let size = bits & 0x7FFF_FFFF;
    let rounded = ((size + draw) >> DROPPED) as i32 - offset as i32;
    // Between zero and the smallest code.
    let smallest = f32::from_bits((offset + 1) << DROPPED);
    let chance = draw as f32 * (smallest / (1u32 << DROPPED) as f32);
    let up = if F::SIGN == 0 { size > 0 } else { f32::from_bits(size) > chance };
    let below = size < (offset + 1) << DROPPED;
    let clamped = rounded.clamp(1, F::TOP as i32) as u32;
    let unsigned = if below { up as u32 } else { clamped };
    // A negative number has no unsigned code: none should come.
    let unsigned = if F::SIGN == 0 && bits >> 31 == 1 { 0 } else { unsigned };
    (unsigned | (bits & F::SIGN) >> 24) as u8
}

multiversion! {
    fn write_drawn<F: Form>(form: F, from: &[f32], exponent: i8, seed: u32, codes: &mut [u8]) {
        let offset = offset(form, exponent);
        for (i, (x, to)) in from.iter().zip(codes).enumerate() {
            *to = code(form, *x, offset, drawn(seed, i as u32));
        }
    }
}

multiversion! {
    fn write_nearest<F: Form>(form: F, from: &[f32], exponent: i8, codes: &mut [u8]) {
        let offset = offset(form, exponent);
        for (x, to) in from.iter().zip(codes) {
            *to = code(form, *x, offset, 1 << (DROPPED - 1));
        }
    }
}

/// [`DROPPED`] random bits (the finaliser of Wellons' `lowbias32` over a counter).
#[inline(always)]
fn drawn(seed: u32, i: u32) -> u32 {
    let mut x = seed ^ i.wrapping_mul(0x9E37_79B9);
    x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    (x ^ (x >> 16)) >> (32 - DROPPED)
}

/// SplitMix64's finaliser.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Held {
        codes: Vec<u8>,
        exponents: Vec<i8>,
        signed: bool,
    }

    impl Held {
        fn zeros(len: usize, signed: bool) -> Self {
            Self { codes: vec![0; len], exponents: vec![0; len.div_ceil(BLOCK)], signed }
        }

        fn view(&mut self) -> EightBits<'_> {
            EightBits { codes: &mut self.codes, exponents: &mut self.exponents, signed: self.signed }
        }

        fn values(&mut self) -> Vec<f32> {
            let mut values = vec![0.0; self.codes.len()];
            self.view().read(0, &mut values);
            values
        }

        fn of(values: &[f32], signed: bool, draws: Option<Draws>) -> Self {
            let mut held = Self::zeros(values.len(), signed);
            held.view().write(0, values, draws);
            held
        }
    }

    /// Sizes over many powers of two, some zero.
    fn numbers(len: usize, signed: bool) -> Vec<f32> {
        (0..len as u32)
            .map(|i| {
                let size = 2f32.powi(-((i * 7 % 31) as i32)) * (1.0 + drawn(5, i) as f32 / 1e6);
                let size = if i % 11 == 3 { 0.0 } else { size };
                if signed && i % 3 == 1 { -size } else { size }
            })
            .collect()
    }

    fn draws(key: u64) -> Option<Draws> {
        Some(Draws { key, first: 0 })
    }

    #[test]
    fn every_code_is_a_number_that_becomes_the_same_number_again() {
        for signed in [true, false] {
            for exponent in [-90, -40, 0, 3, 126] {
                let mut held = Held::zeros(256, signed);
                held.codes = (0..=255).collect();
                held.exponents.fill(exponent);
                let values = held.values();
                assert!(values.iter().all(|x| *x == 0.0 || x.is_normal()));
                for draws in [None, draws(1), draws(2)] {
                    let bits = |x: Vec<f32>| x.iter().map(|x| x.abs().to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(Held::of(&values, signed, draws).values()), bits(values.clone()));
                }
            }
        }
    }

    #[test]
    fn rounding_errs_by_less_than_a_step_and_its_mean_is_exact() {
        for signed in [true, false] {
            let values = numbers(1000, signed);
            let mut means = vec![0f64; values.len()];
            let tries = 4000;
            for key in 0..tries {
                let rounded = Held::of(&values, signed, draws(key)).values();
                for (block, part) in values.chunks(BLOCK).zip(rounded.chunks(BLOCK)) {
                    let top = block.iter().fold(0f32, |a, b| a.max(b.abs()));
                    let least = top * 2f32.powi(if signed { -14 } else { -30 });
                    for (x, y) in block.iter().zip(part) {
                        assert!((x - y).abs() <= x.abs() / 8.0 + least, "{x} became {y}, at most {top}");
                        assert!(x.signum() == y.signum() || *y == 0.0);
                    }
                }
                means.iter_mut().zip(&rounded).for_each(|(mean, x)| *mean += *x as f64 / tries as f64);
            }
            for (block, means) in values.chunks(BLOCK).zip(means.chunks(BLOCK)) {
                let top = block.iter().fold(0f32, |a, b| a.max(b.abs())) as f64;
                for (x, mean) in block.iter().zip(means) {
                    let step = (x.abs() as f64 / 8.0).max(top * 2f64.powi(-14));
                    assert!(
                        (*x as f64 - mean).abs() < 5.0 * 0.5 * step / (tries as f64).sqrt(),
                        "{x}: {mean}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_second_moment_above_zero_stays_above_zero() {
        let mut values = vec![1e-30f32; BLOCK];
        values[3] = 1.0;
        for key in 0..50 {
            assert!(Held::of(&values, false, draws(key)).values().iter().all(|x| *x > 0.0));
        }
    }

    #[test]
    fn a_vector_may_be_cut_at_any_block_and_ends_where_it_ends() {
        let values = numbers(5 * BLOCK + 17, true);
        let whole = Held::of(&values, true, draws(9));
        for cut in 1..=5 {
            let mut parts = Held::zeros(values.len(), true);
            parts.view().write(0, &values[..cut * BLOCK], draws(9));
            let rest = Draws { key: 9, first: (cut * BLOCK) as u64 };
            let mut second = Held::of(&values[cut * BLOCK..], true, Some(rest));
            assert_eq!(parts.codes[..cut * BLOCK], whole.codes[..cut * BLOCK]);
            assert_eq!(second.codes, whole.codes[cut * BLOCK..]);
            assert_eq!(second.exponents, whole.exponents[cut..]);
            assert_eq!(second.view().codes.len(), values.len() - cut * BLOCK);
        }
    }

    #[test]
    fn the_fast_path_rounds_as_one_element_does() {
        let values = numbers(BLOCK, true);
        for (i, x) in values.iter().enumerate() {
            let seed = mix(7 ^ mix(0)) as u32;
            let exponent = exponent(largest(&values));
            let plain = code(Signed, *x, offset(Signed, exponent), drawn(seed, i as u32));
            assert_eq!(Held::of(&values, true, draws(7)).codes[i], plain);
        }
    }
}
