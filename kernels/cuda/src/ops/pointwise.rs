//! Elementwise ops: RoPE, SwiGLU, sums, dropout.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};

const THREADS: usize = 256;

/// What [`rope`] turns each head by: `cos`, `sin`: `[rows, half]`.
#[derive(Clone, Copy)]
pub struct Rotations<'a> {
    /// Cosines.
    pub cos: View<'a, f32>,
    /// Sines.
    pub sin: View<'a, f32>,
    /// Half of a head's dimension.
    pub half: usize,
}

/// Rotates each head in place: dimension `i` is paired with `i + half`. `x`: `[rows, heads, 2·half]`; `inverse` rotates
/// the other way: the backward pass.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn rope<T: Float>(
    stream: &Stream,
    x: ViewMut<'_, T>,
    heads: usize,
    by: Rotations<'_>,
    inverse: bool,
) -> Result<(), Error> {
    let op = Op("rope");
    let half = by.half;
    let rows = op.rows("x", x.len(), 2 * half * heads)?;
    op.gives("x", &x, rows * heads * 2 * half)?;
    op.holds("cos", &by.cos, rows * half)?;
    op.holds("sin", &by.sin, rows * half)?;
    if rows == 0 {
        return Ok(());
    }
    let vectors = rows * heads * half.div_ceil(T::WIDTH);
    let sign: f32 = if inverse { -1.0 } else { 1.0 };
    let (rows, heads, half) = (op.int("rows", rows)?, op.int("heads", heads)?, op.int("half", half)?);
    let arguments = arguments![x.view(), by.cos, by.sin, sign, rows, heads, half, x];
    let grid = op.line(vectors.div_ceil(THREADS), THREADS as u32)?;
    stream.launch("rope.cu", &format!("rope_{}", T::NAME), grid, arguments)
}

/// `y = silu(gate)·up`, elementwise.
///
/// # Errors
/// As [`rope`].
pub fn swiglu<T: Float>(
    stream: &Stream,
    gate: View<'_, T>,
    up: View<'_, T>,
    y: ViewMut<'_, T>,
) -> Result<(), Error> {
    let op = Op("swiglu");
    let n = gate.len();
    op.takes("gate", &gate, n)?;
    op.takes("up", &up, n)?;
    op.gives("y", &y, n)?;
    if n == 0 {
        return Ok(());
    }
    let grid = op.line(n.div_ceil(T::WIDTH * THREADS), THREADS as u32)?;
    stream.launch("swiglu.cu", &format!("swiglu_{}", T::NAME), grid, arguments![gate, up, n as i64, y])
}

/// Gradients of [`swiglu`].
///
/// # Errors
/// As [`rope`].
pub fn swiglu_backward<T: Float>(
    stream: &Stream,
    gate: View<'_, T>,
    up: View<'_, T>,
    dy: View<'_, T>,
    dgate: ViewMut<'_, T>,
    dup: ViewMut<'_, T>,
) -> Result<(), Error> {
    let op = Op("swiglu_backward");
    let n = gate.len();
    op.takes("gate", &gate, n)?;
    op.takes("up", &up, n)?;
    op.takes("dy", &dy, n)?;
    op.gives("dgate", &dgate, n)?;
    op.gives("dup", &dup, n)?;
    if n == 0 {
        return Ok(());
    }
    let grid = op.line(n.div_ceil(T::WIDTH * THREADS), THREADS as u32)?;
    let name = format!("swiglu_backward_{}", T::NAME);
    stream.launch("swiglu.cu", &name, grid, arguments![gate, up, dy, n as i64, dgate, dup])
}

/// `y += x`, where `x` repeats: a residual as long as `y`, or a bias for each of its rows.
///
/// # Errors
/// As [`rope`].
pub fn add<T: Float>(stream: &Stream, x: View<'_, T>, y: ViewMut<'_, T>) -> Result<(), Error> {
    let op = Op("add");
    let (period, n) = (x.len(), y.len());
    if n == 0 {
        return Ok(());
    }
    op.rows("y", n, period)?;
    op.takes("x", &x, period)?;
    op.gives("y", &y, n)?;
    let grid = op.line(n.div_ceil(T::WIDTH * THREADS), THREADS as u32)?;
    stream.launch("add.cu", &format!("add_{}", T::NAME), grid, arguments![x, period as i64, n as i64, y])
}

/// Inverted dropout with the CPU's counter-based mask: elements are kept with probability `1 − p` and scaled by `1/(1 − p)`.
///
/// # Errors
/// As [`rope`].
pub fn dropout<T: Float>(
    stream: &Stream,
    x: View<'_, T>,
    p: f32,
    key: u64,
    y: ViewMut<'_, T>,
) -> Result<(), Error> {
    let op = Op("dropout");
    let n = x.len();
    op.takes("x", &x, n)?;
    op.gives("y", &y, n)?;
    if n == 0 {
        return Ok(());
    }
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    let scale: f32 = 1.0 / (1.0 - p);
    let grid = op.line(n.div_ceil(T::WIDTH * THREADS), THREADS as u32)?;
    let arguments = arguments![x, key, threshold, scale, n as i64, y];
    stream.launch("dropout.cu", &format!("dropout_{}", T::NAME), grid, arguments)
}
