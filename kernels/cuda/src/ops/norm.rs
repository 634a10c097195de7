//! RMSNorm over the last axis.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};

const FILE: &str = "rms_norm.cu";
const THREADS: u32 = 256;
/// Rows that one part of the gradient of `w` sums over.
const ROWS_PER_PART: usize = 64;

/// `y = x / sqrt(mean(x²) + eps) · w`. `x`, `y`: `[rows, d]`, `w`: `[d]`.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn rms_norm<T: Float>(
    stream: &Stream,
    x: View<'_, T>,
    w: View<'_, T>,
    eps: f32,
    y: ViewMut<'_, T>,
) -> Result<(), Error> {
    let op = Op("rms_norm");
    let d = w.len();
    let rows = op.rows("x", x.len(), d)?;
    op.takes("x", &x, rows * d)?;
    op.takes("w", &w, d)?;
    op.gives("y", &y, rows * d)?;
    if rows == 0 {
        return Ok(());
    }
    let name = format!("rms_norm_{}", T::NAME);
    stream.launch(FILE, &name, op.line(rows, THREADS)?, arguments![x, w, eps, op.int("d", d)?, y])
}

/// The gradient of `x`, and `inverse = 1/rms` of each row, which [`rms_norm_backward_w`] reads. `dx`: as `x`; `inverse`: `[rows]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_backward_x<T: Float>(
    stream: &Stream,
    x: View<'_, T>,
    w: View<'_, T>,
    eps: f32,
    dy: View<'_, T>,
    dx: ViewMut<'_, T>,
    inverse: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let op = Op("rms_norm_backward");
    let d = w.len();
    let rows = op.rows("x", x.len(), d)?;
    op.takes("x", &x, rows * d)?;
    op.takes("w", &w, d)?;
    op.takes("dy", &dy, rows * d)?;
    op.gives("dx", &dx, rows * d)?;
    op.gives("inverse", &inverse, rows)?;
    if rows == 0 {
        return Ok(());
    }
    let name = format!("rms_norm_backward_x_{}", T::NAME);
    let arguments = arguments![x, w, eps, dy, op.int("d", d)?, dx, inverse];
    stream.launch(FILE, &name, op.line(rows, THREADS)?, arguments)
}

/// Elements of scratch memory that [`rms_norm_backward_w`] needs.
pub fn rms_norm_backward_parts(rows: usize, d: usize) -> usize {
    rows.div_ceil(ROWS_PER_PART) * d
}

/// Adds the gradient of `w` to `dw`. `parts`: [`rms_norm_backward_parts`] elements of scratch; `dw`: `[d]`.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_backward_w<T: Float>(
    stream: &Stream,
    x: View<'_, T>,
    dy: View<'_, T>,
    inverse: View<'_, f32>,
    mut parts: ViewMut<'_, f32>,
    dw: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let op = Op("rms_norm_backward");
    let (d, rows) = (dw.len(), inverse.len());
    op.takes("x", &x, rows * d)?;
    op.takes("dy", &dy, rows * d)?;
    op.takes("inverse", &inverse, rows)?;
    op.gives("parts", &parts, rms_norm_backward_parts(rows, d))?;
    op.gives("dw", &dw, d)?;
    let (columns, count, width) =
        (d.div_ceil(THREADS as usize), rows.div_ceil(ROWS_PER_PART), op.int("d", d)?);
    if d == 0 {
        return Ok(());
    }
    if rows > 0 {
        let name = format!("rms_norm_backward_w_{}", T::NAME);
        let grid = op.grid([columns, count, 1], THREADS, 0)?;
        let arguments = arguments![x, dy, inverse, op.int("rows", rows)?, width, parts.again()];
        stream.launch(FILE, &name, grid, arguments)?;
    }
    let arguments = arguments![parts, op.int("parts", count)?, width, dw];
    stream.launch(FILE, "rms_norm_backward_w_sum", op.line(columns, THREADS)?, arguments)
}
