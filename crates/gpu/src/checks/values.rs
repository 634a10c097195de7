//! Types, numbers and comparisons.

use super::Failure;
use half::{bf16, f16};
use hearth_cuda::ops::Float;
use hearth_cuda::ops::attention::Tile;
use hearth_cuda::ops::paged::{Query, Stretch};
use hearth_cuda::ops::sampling::Sampling;

/// What lies on a card.
pub trait Plain: hearth_cuda::Pod {
    /// A value that no kernel writes.
    const UNWRITTEN: Self;
}

macro_rules! plain {
    ($($type:ty = $unwritten:expr),*) => {$(
        impl Plain for $type {
            const UNWRITTEN: Self = $unwritten;
        }
    )*};
}
plain!(
    f32 = f32::NAN,
    f64 = f64::NAN,
    bf16 = bf16::NAN,
    f16 = f16::NAN,
    u8 = 255,
    i8 = -128,
    u32 = u32::MAX,
    i32 = i32::MIN,
    Tile = Tile::EMPTY,
    Query = Query { position: 0, table: 0 },
    Stretch = Stretch { row: 0, rows: 0, position: 0, table: 0, first: 0 },
    Sampling = Sampling::GREEDY
);

/// A type of numbers, beside what the CPU computes in f32.
pub trait Number: Float + Plain {
    /// How far a result may be off, relative to the larger of it and 1.
    const TOLERANCE: f32;
    /// Whether kernels promise the CPU's bits in it.
    const EXACT: bool = false;
    /// The nearest one.
    fn of(x: f32) -> Self;
    /// In f32.
    fn wide(self) -> f32;
}

impl Number for f32 {
    const TOLERANCE: f32 = 2e-5;
    const EXACT: bool = true;
    fn of(x: f32) -> Self {
        x
    }
    fn wide(self) -> f32 {
        self
    }
}
impl Number for bf16 {
    const TOLERANCE: f32 = 1.6e-2;
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}
impl Number for f16 {
    const TOLERANCE: f32 = 2e-3;
    fn of(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn wide(self) -> f32 {
        self.to_f32()
    }
}

/// Numbers in (−1, 1), others for another seed.
pub fn numbers<T: Number>(seed: u64, len: usize) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        T::of((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// In f32.
pub fn wide<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.wide()).collect()
}

/// Whether both have the same bits, or where not.
pub fn same<T: hearth_cuda::Pod + std::fmt::Debug>(what: &str, got: &[T], want: &[T]) -> Result<(), Failure> {
    let bytes = |x: &T| hearth_cuda::bytes_of(x).to_vec();
    lengths(what, got.len(), want.len())?;
    match got.iter().zip(want).position(|(g, w)| bytes(g) != bytes(w)) {
        None => Ok(()),
        Some(i) => Err(Failure::Differs(format!("{what}[{i}] is {:?}, not {:?}", got[i], want[i]))),
    }
}

/// Whether both are close: `|got − want| ≤ tolerance · max(|want|, 1)`.
pub fn near(what: &str, got: &[f32], want: &[f32], tolerance: f32) -> Result<(), Failure> {
    lengths(what, got.len(), want.len())?;
    let far = |(g, w): (&f32, &f32)| {
        let error = (g - w).abs();
        error.is_nan() || error > tolerance * w.abs().max(1.0)
    };
    match got.iter().zip(want).position(far) {
        None => Ok(()),
        Some(i) => Err(Failure::Differs(format!("{what}[{i}] is {}, not {} ± {tolerance}", got[i], want[i]))),
    }
}

/// [`same`] where the type is exact, else [`near`].
pub fn agree<T: Number>(what: &str, got: &[T], want: &[f32]) -> Result<(), Failure> {
    let (what, got) = (format!("{what} in {}", T::NAME), wide(got));
    if T::EXACT { same(&what, &got, want) } else { near(&what, &got, want, T::TOLERANCE) }
}

/// [`near`] by the type's tolerance.
pub fn close<T: Number>(what: &str, got: &[T], want: &[f32]) -> Result<(), Failure> {
    near(&format!("{what} in {}", T::NAME), &wide(got), want, T::TOLERANCE)
}

fn lengths(what: &str, got: usize, want: usize) -> Result<(), Failure> {
    if got == want { Ok(()) } else { Err(Failure::Differs(format!("{what} has {got} elements, not {want}"))) }
}
