//! Kernels over stored numbers, sixteen at a time.

use super::simd::{LANES, Lanes};
use super::stored::Stored;

/// How sixteen stored numbers become floats: one way per instruction set.
pub(super) trait Load {
    /// # Safety
    /// The instruction set is there.
    unsafe fn lanes<T: Stored>(from: &[T]) -> Lanes;
}

pub(super) struct Plain;
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx512;

impl Load for Plain {
    #[inline(always)]
    unsafe fn lanes<T: Stored>(from: &[T]) -> Lanes {
        let from = &from[..LANES];
        let mut lanes = [0.0; LANES];
        for i in 0..LANES {
            lanes[i] = from[i].widen();
        }
        lanes
    }
}

#[cfg(target_arch = "x86_64")]
impl Load for Avx2 {
    #[inline(always)]
    unsafe fn lanes<T: Stored>(from: &[T]) -> Lanes {
        // SAFETY: 16 elements behind the slice, the caller's instruction set; two registers are 16 floats.
        unsafe { std::mem::transmute(T::load8x2(from[..LANES].as_ptr())) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Load for Avx512 {
    #[inline(always)]
    unsafe fn lanes<T: Stored>(from: &[T]) -> Lanes {
        // SAFETY: 16 elements behind the slice, the caller's instruction set; a register is 16 floats.
        unsafe { std::mem::transmute(T::load16(from[..LANES].as_ptr(), 0xffff)) }
    }
}

/// Compiles a kernel that loads stored numbers for every instruction set, and picks one at run time.
macro_rules! leveled {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        fn $name<T: Stored>($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<T: Stored>($($arg: $ty),*) $(-> $ret)? {
                $body::<T, $crate::cpu::lanes::Avx2>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512<T: Stored>($($arg: $ty),*) $(-> $ret)? {
                $body::<T, $crate::cpu::lanes::Avx512>($($arg),*)
            }

            match $crate::cpu::simd::level() {
                $crate::cpu::simd::Level::Portable => $body::<T, $crate::cpu::lanes::Plain>($($arg),*),
                // SAFETY: `level` names only what this CPU has.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx2 => unsafe { avx2::<T>($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx512 => unsafe { avx512::<T>($($arg),*) },
            }
        }
    };
}
pub(super) use leveled;
