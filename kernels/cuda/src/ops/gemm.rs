//! Dense products with f32 sums.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};
use half::{bf16, f16};

/// Types that products of `T` come out as.
pub trait ResultOf<T: Float>: Float {
    /// As kernels are named.
    fn name() -> String {
        if T::NAME == Self::NAME { T::NAME.to_owned() } else { format!("{}_to_{}", T::NAME, Self::NAME) }
    }
}
impl ResultOf<f32> for f32 {}
impl ResultOf<bf16> for bf16 {}
impl ResultOf<f16> for f16 {}
impl ResultOf<bf16> for f32 {}
impl ResultOf<f16> for f32 {}

/// The shape of a product: `y`: `[m, n]`, sums of `k` terms.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms.
    pub k: usize,
}

/// `y (+)= a·bᵀ`. `a`: `[m, k]`, `b`: `[n, k]`. In f32 each element is one chain over ascending `k`: the CPU's bits.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn gemm_nt<T: Float, Y: ResultOf<T>>(
    stream: &Stream,
    a: View<'_, T>,
    b: View<'_, T>,
    shape: Shape,
    accumulate: bool,
    y: ViewMut<'_, Y>,
) -> Result<(), Error> {
    gemm(stream, "nt", [false, false], (a, b), shape, accumulate, y)
}

/// `y (+)= a·b`. `a`: `[m, k]`, `b`: `[k, n]`.
///
/// # Errors
/// As [`gemm_nt`].
pub fn gemm_nn<T: Float, Y: ResultOf<T>>(
    stream: &Stream,
    a: View<'_, T>,
    b: View<'_, T>,
    shape: Shape,
    accumulate: bool,
    y: ViewMut<'_, Y>,
) -> Result<(), Error> {
    gemm(stream, "nn", [false, true], (a, b), shape, accumulate, y)
}

/// `y (+)= aᵀ·b`, in f32: gradients of weights. `a`: `[k, m]`, `b`: `[k, n]`.
///
/// # Errors
/// As [`gemm_nt`].
pub fn gemm_tn<T: Float>(
    stream: &Stream,
    a: View<'_, T>,
    b: View<'_, T>,
    shape: Shape,
    accumulate: bool,
    y: ViewMut<'_, f32>,
) -> Result<(), Error>
where
    f32: ResultOf<T>,
{
    gemm(stream, "tn", [true, true], (a, b), shape, accumulate, y)
}

/// Columns of `a` and `b` are rows of the operand where `columns` says so.
fn gemm<T: Float, Y: ResultOf<T>>(
    stream: &Stream,
    kind: &str,
    columns: [bool; 2],
    (a, b): (View<'_, T>, View<'_, T>),
    Shape { m, n, k }: Shape,
    accumulate: bool,
    y: ViewMut<'_, Y>,
) -> Result<(), Error> {
    let op = Op("linear");
    op.takes("a", &a, m * k)?;
    op.takes("b", &b, n * k)?;
    op.gives("y", &y, m * n)?;
    if m * n == 0 {
        return Ok(());
    }
    // Tiles of 128×32 and 64×32, twice; rows are padded by 16 bytes.
    let tile = |rows: usize, columns: bool| match columns {
        false => rows * (32 + T::WIDTH),
        true => 32 * (rows + T::WIDTH),
    };
    let shared = 2 * (tile(128, columns[0]) + tile(64, columns[1])) * size_of::<T>();
    let grid = op.grid([n.div_ceil(64), m.div_ceil(128), 1], 128, shared)?;
    let (m, n, k) = (op.int("m", m)?, op.int("n", n)?, op.int("k", k)?);
    let name = format!("gemm_{kind}_{}", Y::name());
    stream.launch("gemm.cu", &name, grid, arguments![a, b, m, n, k, i32::from(accumulate), y])
}
