//! Products of few rows with panels of floats, in the order of [`super::gemm`]: one chain over ascending columns.
//!
//! The panels are read once, front to back, and widened in registers.

use super::gemm::Output;
use super::lanes::{Load, leveled};
use super::simd::{LANES, Lanes, fma};
use super::stored::Stored;

/// Panels side by side: enough independent chains where there is one row.
pub(super) const PANELS: usize = 4;
/// Most rows at a time.
const ROWS: usize = 6;

/// Rows of activations, laid out for [`Self::multiply`].
pub(super) struct FewRows {
    /// Tiles of up to [`ROWS`] rows, `[columns][rows of the tile]` each.
    tiles: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl FewRows {
    /// From `[rows, columns]`.
    pub fn pack(x: &[f32], columns: usize) -> Self {
        let rows = x.len() / columns.max(1);
        let mut tiles = x.to_vec();
        for (tile, x) in tiles.chunks_mut((ROWS * columns).max(1)).zip(x.chunks((ROWS * columns).max(1))) {
            let rows = x.len() / columns;
            for (r, row) in x.chunks_exact(columns).enumerate().filter(|_| rows > 1) {
                for (k, v) in row.iter().enumerate() {
                    tile[k * rows + r] = *v;
                }
            }
        }
        Self { tiles, rows, columns }
    }

    /// Adds the share of the columns from `from` on, as many as the `panels` have, to the outputs of up to [`PANELS`]
    /// panels, the first of which has number `first`. The panels belong to the caller alone.
    pub fn multiply<T: Stored>(&self, panels: &[&[T]], from: usize, first: usize, out: Output) {
        let len = panels.first().map_or(0, |panel| panel.len() / LANES);
        for i in (0..self.rows).step_by(ROWS) {
            let rows = ROWS.min(self.rows - i);
            let x = &self.tiles[i * self.columns + from * rows..][..len * rows];
            let mut sums = [[[0.0; LANES]; PANELS]; ROWS];
            let place = |r: usize, p: usize| {
                let column = (first + p) * LANES;
                let count = LANES.min(out.columns - column);
                // SAFETY: row `i + r`, columns of one of the caller's panels, clipped to the matrix.
                unsafe {
                    let start = out.ptr.add((i + r) * out.columns + column);
                    std::slice::from_raw_parts_mut(start, count)
                }
            };
            for (r, sums) in sums[..rows].iter_mut().enumerate() {
                for (p, sums) in sums[..panels.len()].iter_mut().enumerate() {
                    let y = place(r, p);
                    sums[..y.len()].copy_from_slice(y);
                }
            }
            chains(x, rows, panels, &mut sums);
            for (r, sums) in sums[..rows].iter().enumerate() {
                for (p, sums) in sums[..panels.len()].iter().enumerate() {
                    let y = place(r, p);
                    y.copy_from_slice(&sums[..y.len()]);
                }
            }
        }
    }
}

/// A line of 16 outputs for each row and panel.
type Sums = [[Lanes; PANELS]; ROWS];

leveled! {
    /// Continues the chains of `rows` rows over the panels' columns.
    fn chains(x: &[f32], rows: usize, panels: &[&[T]], sums: &mut Sums) = chains_body
}

#[inline(always)]
fn chains_body<T: Stored, L: Load>(x: &[f32], rows: usize, panels: &[&[T]], sums: &mut Sums) {
    let mut p = 0;
    while p < panels.len() {
        p += match (rows, panels.len() - p) {
            (1, 4..) => tile::<T, L, 1, 4>(x, panels, p, sums),
            (1, 2..) => tile::<T, L, 1, 2>(x, panels, p, sums),
            (2, 2..) => tile::<T, L, 2, 2>(x, panels, p, sums),
            (3, 2..) => tile::<T, L, 3, 2>(x, panels, p, sums),
            (1, _) => tile::<T, L, 1, 1>(x, panels, p, sums),
            (2, _) => tile::<T, L, 2, 1>(x, panels, p, sums),
            (3, _) => tile::<T, L, 3, 1>(x, panels, p, sums),
            (4, _) => tile::<T, L, 4, 1>(x, panels, p, sums),
            (5, _) => tile::<T, L, 5, 1>(x, panels, p, sums),
            _ => tile::<T, L, 6, 1>(x, panels, p, sums),
        };
    }
}

/// `R` rows by `P` panels from `first` on, kept in registers. Returns `P`.
#[inline(always)]
fn tile<T: Stored, L: Load, const R: usize, const P: usize>(
    x: &[f32],
    panels: &[&[T]],
    first: usize,
    sums: &mut Sums,
) -> usize {
    let panels: [&[T]; P] = std::array::from_fn(|p| panels[first + p]);
    let mut acc = [[[0.0; LANES]; P]; R];
    for r in 0..R {
        acc[r].copy_from_slice(&sums[r][first..first + P]);
    }
    for (k, x) in x.chunks_exact(R).enumerate() {
        for p in 0..P {
            // SAFETY: the instruction set that the caller was compiled for and runs on.
            let w = unsafe { L::lanes(&panels[p][k * LANES..][..LANES]) };
            for r in 0..R {
                acc[r][p] = fma([x[r]; LANES], w, acc[r][p]);
            }
        }
    }
    for r in 0..R {
        sums[r][first..first + P].copy_from_slice(&acc[r]);
    }
    P
}
