//! An optimizer step: unscaling with an overflow flag, sums of squares, AdamW with a copy out, casts.

use super::{Float, Op, arguments};
use crate::runtime::ffi::Argument;
use crate::runtime::{Error, Stream, View, ViewMut};
use hearth_kernels::cpu::adamw::AdamWRule;

const THREADS: usize = 256;
/// Elements of a chunk of [`chunk_squares`].
pub const CHUNK: usize = 4096;

/// Types that optimizer states may have.
pub trait State: Float {}
impl State for f32 {}
impl State for half::bf16 {}

/// One step over `n` elements: `master`, `m`, `v` are updated, `copy` gets the new values rounded. Any slice of the whole
/// may be updated alone, with the same bits.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn adamw<M: State, V: State, C: Float>(
    stream: &Stream,
    rule: AdamWRule,
    master: ViewMut<'_, f32>,
    (m, v): (ViewMut<'_, M>, ViewMut<'_, V>),
    gradient: View<'_, f32>,
    copy: Option<ViewMut<'_, C>>,
) -> Result<(), Error> {
    let op = Op("adamw");
    let n = gradient.len();
    op.gives("master", &master, n)?;
    op.gives("m", &m, n)?;
    op.gives("v", &v, n)?;
    op.takes("gradient", &gradient, n)?;
    let mut name = format!("adamw_{}_{}", M::NAME, V::NAME);
    if let Some(copy) = &copy {
        op.gives("copy", copy, n)?;
        name += &format!("_to_{}", C::NAME);
    }
    if n == 0 {
        return Ok(());
    }
    let copy = copy.map(|copy| copy.view());
    let rest = arguments![master, m, v, gradient, copy, n as i64];
    let all: Vec<Argument> = [argument(rule)].into_iter().chain(rest.iter().copied()).collect();
    stream.launch("adamw.cu", &name, op.line(n.div_ceil(4 * THREADS), THREADS as u32)?, &all)
}

/// The rule as the kernel reads it.
fn argument(rule: AdamWRule) -> Argument {
    Argument::of([
        rule.keep,
        rule.one_minus_beta1,
        rule.beta2,
        rule.one_minus_beta2,
        rule.step_size,
        rule.root_correction2,
        rule.eps,
        rule.gradient_scale,
    ])
}

/// Types that [`cast`] turns `Self` into.
pub trait CastTo<T: Float>: Float {}
impl CastTo<half::bf16> for f32 {}
impl CastTo<half::f16> for f32 {}
impl CastTo<f32> for half::bf16 {}
impl CastTo<f32> for half::f16 {}

/// The same numbers in another type, rounded to nearest even.
///
/// # Errors
/// As [`adamw`].
pub fn cast<F: CastTo<T>, T: Float>(stream: &Stream, x: View<'_, F>, y: ViewMut<'_, T>) -> Result<(), Error> {
    let op = Op("cast");
    let n = x.len();
    op.takes("x", &x, n)?;
    op.gives("y", &y, n)?;
    if n == 0 {
        return Ok(());
    }
    let grid = op.line(n.div_ceil(8 * THREADS), THREADS as u32)?;
    stream.launch("cast.cu", &format!("cast_{}_{}", F::NAME, T::NAME), grid, arguments![x, n as i64, y])
}

/// `y = x·factor` in f32; sets `overflowed[0]` to 1 if any product is infinite or not a number, else leaves it.
///
/// # Errors
/// As [`adamw`].
pub fn unscale<T: Float>(
    stream: &Stream,
    x: View<'_, T>,
    factor: f32,
    y: ViewMut<'_, f32>,
    overflowed: ViewMut<'_, u32>,
) -> Result<(), Error> {
    let op = Op("unscale");
    let n = x.len();
    op.takes("x", &x, n)?;
    op.gives("y", &y, n)?;
    op.gives("overflowed", &overflowed, 1)?;
    if n == 0 {
        return Ok(());
    }
    let grid = op.line(n.div_ceil(8 * THREADS), THREADS as u32)?;
    let arguments = arguments![x, factor, n as i64, y, overflowed];
    stream.launch("cast.cu", &format!("unscale_{}", T::NAME), grid, arguments)
}

/// Sums of squares of chunks of [`CHUNK`] elements, in f64 and in the trainer's order. `sums`: `[⌈n / CHUNK⌉]`; the caller
/// adds them in order.
///
/// # Errors
/// As [`adamw`].
pub fn chunk_squares(stream: &Stream, x: View<'_, f32>, sums: ViewMut<'_, f64>) -> Result<(), Error> {
    let op = Op("chunk_squares");
    let (n, chunks) = (x.len(), x.len().div_ceil(CHUNK));
    op.takes("x", &x, n)?;
    op.gives("sums", &sums, chunks)?;
    if n == 0 {
        return Ok(());
    }
    let grid = op.line(chunks.div_ceil(16), 128)?;
    stream.launch("squares.cu", "chunk_squares", grid, arguments![x, n as i64, sums])
}
