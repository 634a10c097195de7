//! Rows of a table by id, and the gradient of that.

use super::{Float, Op, arguments};
use crate::runtime::{Error, Stream, View, ViewMut};

const FILE: &str = "embedding.cu";
const THREADS: usize = 256;

/// `y[i] = w[ids[i]]`. `w`: `[vocab, d]`, `y`: `[ids, d]`. Every id is below `vocab`.
///
/// # Errors
/// [`Error::Length`] and the like when shapes do not fit, [`Error::Lost`].
pub fn gather_rows<T: Float>(
    stream: &Stream,
    w: View<'_, T>,
    d: usize,
    ids: View<'_, u32>,
    y: ViewMut<'_, T>,
) -> Result<(), Error> {
    let op = Op("embedding");
    let vocab = op.rows("w", w.len(), d)?;
    op.takes("w", &w, vocab * d)?;
    op.gives("y", &y, ids.len() * d)?;
    if ids.is_empty() {
        return Ok(());
    }
    let grid = op.grid([ids.len(), d.div_ceil(T::WIDTH * THREADS), 1], THREADS as u32, 0)?;
    stream.launch(FILE, &format!("gather_rows_{}", T::NAME), grid, arguments![w, ids, op.int("d", d)?, y])
}

/// Which rows of an upstream gradient belong to which id.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    /// Rows of the gradient, grouped by id, ascending within a group.
    pub rows: View<'a, u32>,
    /// Where each group begins in `rows`, and the end of the last.
    pub starts: View<'a, u32>,
    /// Each group's id.
    pub ids: View<'a, u32>,
}

/// `dw[id] += Σ dy` over the rows with that id, in their order; rows of `dw` without a group stay. `dy`: `[rows, d]`, `dw`: `[vocab, d]`.
///
/// # Errors
/// As [`gather_rows`].
pub fn scatter_rows<T: Float>(
    stream: &Stream,
    dy: View<'_, T>,
    d: usize,
    groups: Groups<'_>,
    dw: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let op = Op("embedding_backward");
    op.takes("dy", &dy, groups.rows.len() * d)?;
    op.takes("starts", &groups.starts, groups.ids.len() + 1)?;
    op.rows("dw", dw.len(), d)?;
    if groups.ids.is_empty() {
        return Ok(());
    }
    let grid = op.grid([groups.ids.len(), d.div_ceil(THREADS), 1], THREADS as u32, 0)?;
    let arguments = arguments![dy, groups.rows, groups.starts, groups.ids, op.int("d", d)?, dw];
    stream.launch(FILE, &format!("scatter_rows_{}", T::NAME), grid, arguments)
}
