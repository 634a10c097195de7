//! One source, several instruction sets.
//!
//! Kernels are written once over fixed arrays of [`LANES`] floats with explicit `mul_add`, and compiled for
//! each instruction set by [`multiversion!`]. Rust neither contracts nor reorders floating point, so every
//! version computes the same bits; the portable one is merely slow where the CPU has no FMA.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// Floats handled side by side: one AVX-512 register, two of AVX2.
pub const LANES: usize = 16;

/// A group of lanes.
pub type Lanes = [f32; LANES];

/// An instruction set that kernels have a version for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of the architecture has.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL beside those.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The level that runs, plus one; 0 = not looked yet.
static LEVEL: AtomicU8 = AtomicU8::new(0);

impl Level {
    /// All that this CPU has, the best last.
    pub fn present() -> Vec<Level> {
        let mut levels = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 {
                levels.push(Level::Avx2);
            }
            if avx2 && avx512 {
                levels.push(Level::Avx512);
            }
        }
        levels
    }

    /// Its name, for start-up messages.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable (no AVX2: expect it to be slow)",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2+fma",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }
}

/// The level that kernels run at: the best this CPU has, unless [`limit`] says less.
#[inline]
pub fn level() -> Level {
    match LEVEL.load(Relaxed) {
        0 => limit(None),
        1 => Level::Portable,
        #[cfg(target_arch = "x86_64")]
        2 => Level::Avx2,
        #[cfg(target_arch = "x86_64")]
        _ => Level::Avx512,
        #[cfg(not(target_arch = "x86_64"))]
        _ => Level::Portable,
    }
}

/// From now on kernels run at no higher level than this (`None` = the best there is); returns what that comes to. All
/// levels compute the same bits: this is for tests and measurements.
#[cold]
pub fn limit(most: Option<Level>) -> Level {
    let present = Level::present();
    let mut allowed = present.into_iter().filter(|level| most.is_none_or(|most| *level <= most));
    let level = allowed.next_back().unwrap_or(Level::Portable);
    LEVEL.store(level as u8 + 1, Relaxed);
    level
}

/// Instruction set the kernels run on, for start-up messages.
pub fn instruction_set() -> &'static str {
    level().name()
}

/// Whether at least the AVX2 version runs.
#[inline]
pub fn avx2() -> bool {
    level() > Level::Portable
}

/// Whether the AVX-512 version runs.
#[inline]
pub fn avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        level() == Level::Avx512
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Compiles a function for AVX-512, for AVX2+FMA and for the portable baseline, and picks one at run time.
/// Everything the body calls must be `#[inline(always)]`. Type parameters take one bound each.
#[macro_export]
#[doc(hidden)]
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($generic:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[allow(clippy::too_many_arguments)]
            #[inline(always)]
            fn portable $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments)]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::too_many_arguments)]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512 $(<$($generic: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match $crate::cpu::simd::level() {
                // SAFETY: the features were detected on this CPU.
                $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                $crate::cpu::simd::Level::Portable => {}
            }
            portable($($arg),*)
        }
    };
}

/// Loads [`LANES`] floats from the front of a slice.
#[inline(always)]
pub fn load(x: &[f32]) -> Lanes {
    x[..LANES].try_into().expect("slice of LANES")
}

/// `a·b + c` lane by lane.
#[inline(always)]
pub fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
    // Plain loops throughout: a closure may be compiled apart from its caller, without the caller's features.
    let mut sum = c;
    for i in 0..LANES {
        sum[i] = a[i].mul_add(b[i], c[i]);
    }
    sum
}

/// Sum of the lanes by a fixed tree: halves are added until one is left.
#[inline(always)]
pub fn tree_sum(x: Lanes) -> f32 {
    let mut x = x;
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            x[i] += x[i + half];
        }
    }
    x[0]
}

/// Dot product: lane `i` sums elements `i, i+16, …` in order, the tail goes to lanes from 0, then [`tree_sum`].
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a16, b16) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (ta, tb) = (a16.remainder(), b16.remainder());
    let mut acc = [0.0; LANES];
    for (x, y) in a16.zip(b16) {
        acc = fma(load(x), load(y), acc);
    }
    for (i, (x, y)) in ta.iter().zip(tb).enumerate() {
        acc[i] = x.mul_add(*y, acc[i]);
    }
    tree_sum(acc)
}

/// `e^x` to about one unit in the last place (Cephes `expf` range reduction and polynomial), `0` below −87.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to the nearest integer
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(LOG2E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5.000_000_3e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    // The integer n sits in the low mantissa bits of `shifted`; move it to the exponent of 1.0.
    let scale = f32::from_bits((shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23);
    if x < -87.0 { 0.0 } else { y * scale }
}

/// Logistic function `1 / (1 + e^−x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        for i in 0..200_000 {
            let x = -86.9 + i as f32 * (174.0 / 200_000.0);
            let want = (x as f64).exp();
            let got = exp(x) as f64;
            assert!((got - want).abs() <= want * 2.4e-7, "exp({x}) = {got}, want {want}");
        }
    }

    #[test]
    fn exp_of_minus_infinity_is_zero() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn nan_stays_nan() {
        assert!(exp(f32::NAN).is_nan());
    }
}
