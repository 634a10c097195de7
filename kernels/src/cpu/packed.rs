//! Frozen weight matrices in panel layout, dense or quantized, and their products.
//!
//! A panel holds 16 rows of the matrix side by side: for each column the 16 weights lie next to one another, so
//! a product streams memory front to back and needs no horizontal sums. Quantized panels are [`super::quant`]'s.
//!
//! A quantized matrix multiplies in one of two ways, chosen when it is packed ([`Activations`]): exactly as if it
//! were dense, decoded a few columns at a time into the first-level cache, with the arithmetic of [`super::gemm`]
//! (one chain over ascending columns); or in integers, with activations rounded to 8 bits block by block.

use super::decoded::{Plain, Transposed};
use super::few_rows::{FewRows, PANELS};
use super::foresight::{self, Reads};
use super::gemm::{Elems, Output, View, gemm_columns};
use super::pages::{Arena, Image, LINE, Piece};
use super::pool;
use super::quant::activations::Int8Rows;
use super::quant::{BLOCK, QuantPanels, format, piece};
use super::shared::Shared;
use super::simd::LANES;
use super::stored::Stored;
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Columns decoded at a time, a multiple of [`BLOCK`]: four panels of it are half a first-level cache.
const STRIP: usize = 64;
/// From this many rows of activations on the dense product is faster, which decodes every panel once.
const GEMM_ROWS: usize = 16;
/// Bytes of 8-bit activations that go through all panels of a task before the next: they stay in the second-level
/// cache.
const ROWS_BYTES: usize = 192 << 10;
/// [`PackedMatrix::work`] of a task at least.
const TASK_WORK: usize = 1 << 14;

/// A weight matrix `[rows, columns]` = `[out, in]` in panel layout.
pub struct PackedMatrix {
    rows: usize,
    columns: usize,
    panels: Panels,
    activations: Activations,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix[{} x {}, {} bytes]", self.rows, self.columns, self.bytes())
    }
}

/// Panel storage; `c` = columns, `p` = panels of 16 rows, zero-padded.
enum Panels {
    /// `[p][c][16]` f32.
    F32(Image),
    /// `[p][c][16]` f16.
    F16(Image),
    /// `[p][c][16]` bf16.
    Bf16(Image),
    /// Blocks of codes and scales.
    Quant(QuantPanels),
}

/// What a quantized matrix multiplies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Floats, as they are: the product of the decoded numbers.
    #[default]
    F32,
    /// Floats rounded to 8 bits with a scale per block of 32: integer products, several times as fast.
    Int8,
}

impl PackedMatrix {
    /// Packs row-major f32 weights.
    pub fn from_f32(rows: usize, columns: usize, values: &[f32]) -> Self {
        Self::from_f32_in(None, rows, columns, values).expect("memory of its own is large enough")
    }

    /// As [`Self::from_f32`] in a piece of an arena; `None` if it has no room.
    pub fn from_f32_in(
        arena: Option<&Arc<Arena>>,
        rows: usize,
        columns: usize,
        values: &[f32],
    ) -> Option<Self> {
        let panels = Panels::F32(Image::Own(interleave(arena, rows, columns, values, 1, |v| v[0])?));
        Some(Self { rows, columns, panels, activations: Activations::F32 })
    }

    /// Packs row-major weights stored as `f32`, `f16`, `bf16` or one of [`format::FORMATS`]; `None` for a format
    /// without a panel layout, or if `bytes` are not exactly `rows × columns` weights.
    pub fn from_format(rows: usize, columns: usize, format: &str, bytes: &[u8]) -> Option<Self> {
        Self::from_format_in(None, rows, columns, format, bytes)
    }

    /// As [`Self::from_format`] in a piece of an arena; `None` also if that has no room.
    pub fn from_format_in(
        arena: Option<&Arc<Arena>>,
        rows: usize,
        columns: usize,
        format: &str,
        bytes: &[u8],
    ) -> Option<Self> {
        let fits = |size: usize| bytes.len() == rows.saturating_mul(size).saturating_mul(columns);
        let panels = match format {
            "f32" if fits(4) => {
                let read = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("4 bytes"));
                Panels::F32(Image::Own(interleave(arena, rows, columns, bytes, 4, read)?))
            }
            "f16" if fits(2) => {
                let read = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]);
                Panels::F16(Image::Own(interleave(arena, rows, columns, bytes, 2, read)?))
            }
            "bf16" if fits(2) => {
                let read = |b: &[u8]| bf16::from_le_bytes([b[0], b[1]]);
                Panels::Bf16(Image::Own(interleave(arena, rows, columns, bytes, 2, read)?))
            }
            _ => {
                let format = format::by_name(format)?;
                Panels::Quant(QuantPanels::pack(format, rows, columns, bytes, arena)?)
            }
        };
        Some(Self { rows, columns, panels, activations: Activations::F32 })
    }

    /// A matrix from its panels as [`Self::image`] gave them, wherever they lie; `None` for a format without a panel
    /// layout, and for panels of another length or alignment than the matrix has.
    pub fn from_image(rows: usize, columns: usize, format: &str, image: Image) -> Option<Self> {
        let fits = image.len() == Self::bytes_for(rows, columns, format);
        if !fits || !(image.as_ptr() as usize).is_multiple_of(size_of::<f32>()) {
            return None;
        }
        let panels = match format {
            "f32" => Panels::F32(image),
            "f16" => Panels::F16(image),
            "bf16" => Panels::Bf16(image),
            _ => Panels::Quant(QuantPanels::from_image(format::by_name(format)?, rows, columns, image)?),
        };
        Some(Self { rows, columns, panels, activations: Activations::F32 })
    }

    /// As [`Self::from_image`] with a copy of the panels, in the arena where there is one; `None` also if that has no room.
    pub fn from_panels_in(
        arena: Option<&Arc<Arena>>,
        rows: usize,
        columns: usize,
        format: &str,
        panels: &[u8],
    ) -> Option<Self> {
        let mut copy = piece(arena, panels.len())?;
        copy.get_mut(..panels.len())?.copy_from_slice(panels);
        Self::from_image(rows, columns, format, Image::Own(copy))
    }

    /// As [`Self::from_panels_in`], in memory of its own.
    pub fn from_panels(rows: usize, columns: usize, format: &str, panels: &[u8]) -> Option<Self> {
        Self::from_panels_in(None, rows, columns, format, panels)
    }

    /// The panels as they lie in memory, whole cache lines. The same on every machine.
    pub fn image(&self) -> &[u8] {
        match &self.panels {
            Panels::F32(x) | Panels::F16(x) | Panels::Bf16(x) => x,
            Panels::Quant(x) => x.image(),
        }
    }

    /// What [`Self::from_format`] was given.
    pub fn unpack(&self) -> Vec<u8> {
        match &self.panels {
            Panels::F32(x) => deinterleave::<4>(x, self.rows, self.columns),
            Panels::F16(x) | Panels::Bf16(x) => deinterleave::<2>(x, self.rows, self.columns),
            Panels::Quant(x) => x.unpack(self.rows),
        }
    }

    /// Whether [`Self::from_format`] knows the format.
    pub fn has_layout(format: &str) -> bool {
        ["f32", "f16", "bf16"].contains(&format) || format::by_name(format).is_some()
    }

    /// The same matrix, multiplying `activations`; dense ones always take floats.
    pub fn with_activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.image().len()
    }

    /// Bytes that [`Self::from_format`] or [`Self::from_f32`] would hold: panels are padded to 16 rows, the whole
    /// to cache lines. A format without a panel layout counts as f32.
    pub fn bytes_for(rows: usize, columns: usize, format: &str) -> usize {
        let padded = rows.next_multiple_of(LANES);
        let bytes = match format {
            "f16" | "bf16" => 2 * padded * columns,
            _ => format::by_name(format)
                .and_then(|f| QuantPanels::bytes_for(f, rows, columns))
                .unwrap_or(4 * padded * columns),
        };
        bytes.next_multiple_of(LINE)
    }

    /// Decodes row `row` into `out` (`columns` long).
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let mut strip = [0.0; STRIP * LANES];
        for (s, out) in out.chunks_mut(STRIP).enumerate() {
            self.decode(row / LANES, s * STRIP, &mut strip[..out.len() * LANES]);
            for (o, lanes) in out.iter_mut().zip(strip.chunks_exact(LANES)) {
                *o = lanes[row % LANES];
            }
        }
    }

    /// Decodes columns `from..` of a panel as `[columns][16]`.
    pub(super) fn decode(&self, panel: usize, from: usize, out: &mut [f32]) {
        let at = (panel * self.columns + from) * LANES;
        match &self.panels {
            Panels::F32(x) => out.copy_from_slice(&elements::<f32>(x)[at..][..out.len()]),
            Panels::F16(x) => f16::widen_block(&elements::<f16>(x)[at..][..out.len()], out),
            Panels::Bf16(x) => bf16::widen_block(&elements::<bf16>(x)[at..][..out.len()], out),
            Panels::Quant(x) => x.decode(panel, from, out),
        }
    }

    /// `y = x·wᵀ`. `x`: `[m, columns]`, `y`: `[m, rows]`.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let m = x.len() / self.columns.max(1);
        assert_eq!(y.len(), m * self.rows, "packed product: output size");
        match &self.panels {
            Panels::Quant(panels) if self.activations == Activations::Int8 => {
                self.multiply_int8(panels, &Int8Rows::quantize(x, self.columns), y);
            }
            _ => self.multiply_f32(x, m, y),
        }
    }

    fn multiply_int8(&self, panels: &QuantPanels, x: &Int8Rows, y: &mut [f32]) {
        let y = Shared::new(y);
        each_panel(Walk::InTurn(&[self]), x, |panel, rows| {
            put_panel(self.rows, panels, panel, x, rows, &mut |row, column, sums| {
                // SAFETY: row `row`, columns of this task's own panel.
                store(unsafe { y.part(row * self.rows + column, sums.len()) }, sums);
            });
        });
    }

    /// Panels of 16 output features.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// What a product with `rows` rows costs, in about the bytes that could be read meanwhile.
    pub(super) fn work(&self, rows: usize) -> usize {
        self.bytes() + self.rows * self.columns * rows / 16
    }

    /// Whether it multiplies [`Activations::Int8`].
    pub(super) fn is_int8(&self) -> bool {
        matches!(self.panels, Panels::Quant(_)) && self.activations == Activations::Int8
    }

    /// A panel's outputs for `rows` of `x`: `put(row, first output, outputs)`.
    ///
    /// # Panics
    /// If it does not multiply [`Activations::Int8`].
    pub(super) fn multiply_panel(&self, panel: usize, x: &Int8Rows, rows: Range<usize>, put: &mut Put) {
        let Panels::Quant(panels) = &self.panels else { panic!("{self:?} multiplies floats") };
        put_panel(self.rows, panels, panel, x, rows, put);
    }

    fn multiply_f32(&self, x: &[f32], m: usize, y: &mut [f32]) {
        if m >= GEMM_ROWS {
            let x = View::rows(Elems::F32(x), self.columns);
            return gemm_columns(m, self.rows, self.columns, x, &Transposed(self), y, false);
        }
        y.fill(0.0);
        let x = FewRows::pack(x, self.columns);
        let out = Output { ptr: y.as_mut_ptr(), columns: self.rows };
        // Four panels at a time keep enough independent chains in flight when there are few rows of x.
        let quads = self.rows.div_ceil(PANELS * LANES);
        let per_task = quads.div_ceil(8 * pool::threads());
        let per_task = per_task.max((1 << 14) / (PANELS * LANES * self.columns * m).max(1)).max(1);
        pool::for_each(quads.div_ceil(per_task), |task| {
            let mut buffer = [0.0; PANELS * STRIP * LANES];
            for quad in task * per_task..((task + 1) * per_task).min(quads) {
                self.multiply_quad(quad, &x, &mut buffer, out);
            }
        });
    }

    /// Four panels from `4 · quad` on: whole if they are stored as floats, else decoded some columns at a time.
    fn multiply_quad(&self, quad: usize, x: &FewRows, buffer: &mut [f32], out: Output) {
        let first = quad * PANELS;
        let count = (self.panels() - first).min(PANELS);
        match &self.panels {
            Panels::F32(image) => x.multiply(&self.floats::<f32>(image, first, count), 0, first, out),
            Panels::F16(image) => x.multiply(&self.floats::<f16>(image, first, count), 0, first, out),
            Panels::Bf16(image) => x.multiply(&self.floats::<bf16>(image, first, count), 0, first, out),
            Panels::Quant(panels) => {
                for from in (0..self.columns).step_by(STRIP) {
                    let len = STRIP.min(self.columns - from) * LANES;
                    for (p, buffer) in buffer.chunks_mut(STRIP * LANES).take(count).enumerate() {
                        panels.decode(first + p, from, &mut buffer[..len]);
                    }
                    let mut strips = [&buffer[..0]; PANELS];
                    for (strip, buffer) in strips.iter_mut().zip(buffer.chunks(STRIP * LANES)).take(count) {
                        *strip = &buffer[..len];
                    }
                    x.multiply(&strips[..count], from, first, out);
                }
            }
        }
    }

    /// `count` panels of an image of floats.
    fn floats<'a, T: Pod>(&self, image: &'a Image, first: usize, count: usize) -> Vec<&'a [T]> {
        let len = self.columns * LANES;
        elements(image)[first * len..][..count * len].chunks_exact(len).collect()
    }

    /// `dx = dy·w`: a chain over ascending rows of `w`. `dy`: `[m, rows]`, `dx`: `[m, columns]`.
    pub fn multiply_transposed(&self, dy: &[f32], dx: &mut [f32]) {
        let m = dy.len() / self.rows.max(1);
        let dy = View::rows(Elems::F32(dy), self.rows);
        gemm_columns(m, self.columns, self.rows, dy, &Plain(self), dx, false);
    }
}

/// Receives a row's number, the first of its outputs, and up to 16 of them.
pub(super) type Put<'a> = dyn FnMut(usize, usize, &[f32]) + 'a;

/// Copies a panel's outputs. Nearly all of them are whole, and a copy of unknown length is a call.
pub(super) fn store(y: &mut [f32], sums: &[f32]) {
    match (y.as_mut_array::<LANES>(), sums.as_array::<LANES>()) {
        (Some(y), Some(sums)) => *y = *sums,
        _ => y.copy_from_slice(sums),
    }
}

fn put_panel(
    outputs: usize,
    panels: &QuantPanels,
    panel: usize,
    x: &Int8Rows,
    rows: Range<usize>,
    put: &mut Put,
) {
    let column = panel * LANES;
    let width = LANES.min(outputs - column);
    panels.multiply(panel, x, rows, &mut |row, sums| put(row, column, &sums[..width]));
}

/// Which matrices a loop goes through.
#[derive(Clone, Copy)]
pub(super) enum Walk<'a> {
    /// All panels of the first, then of the next.
    InTurn(&'a [&'a PackedMatrix]),
    /// Each panel of all, which have as many.
    Abreast(&'a [&'a PackedMatrix]),
}

impl<'a> Walk<'a> {
    fn matrices(self) -> &'a [&'a PackedMatrix] {
        match self {
            Walk::InTurn(matrices) | Walk::Abreast(matrices) => matrices,
        }
    }

    fn panels(self) -> usize {
        match self {
            Walk::InTurn(matrices) => matrices.iter().map(|m| m.panels()).sum(),
            Walk::Abreast(matrices) => matrices[0].panels(),
        }
    }

    fn reads(self) -> Reads {
        let mut images = [&[][..]; 3];
        let count = self.matrices().len();
        for (image, matrix) in images.iter_mut().zip(self.matrices()) {
            *image = matrix.image();
        }
        match self {
            Walk::InTurn(_) => Reads::in_turn(&images[..count]),
            Walk::Abreast(_) => Reads::abreast(&images[..count]),
        }
    }
}

/// Calls `each(panel, rows)` for all panels and all rows of `x` in parallel, as many rows at a time as stay in the
/// second-level cache.
pub(super) fn each_panel(walk: Walk, x: &Int8Rows, each: impl Fn(usize, Range<usize>) + Sync) {
    let panels = walk.panels();
    let work: usize = walk.matrices().iter().map(|m| m.work(x.rows)).sum();
    // Few tasks where there is little to do, several per thread where there is much; and as many for every thread.
    let tasks =
        (work / TASK_WORK).clamp(1, 6 * pool::threads()).next_multiple_of(pool::threads()).min(panels.max(1));
    let chunk = (ROWS_BYTES / (x.blocks * BLOCK)).max(8).next_multiple_of(8);
    let (reads, threads) = (walk.reads(), pool::threads());
    foresight::begin(reads);
    pool::for_each(tasks, |task| {
        foresight::enter(reads, task * threads / tasks, threads);
        for first in (0..x.rows).step_by(chunk) {
            for panel in task * panels / tasks..(task + 1) * panels / tasks {
                each(panel, first..(first + chunk).min(x.rows));
            }
        }
    });
}

/// Row-major items of `size` source elements → `[panel][item][16]`, missing rows zero.
fn interleave<S: Sync, T: Pod + Send>(
    arena: Option<&Arc<Arena>>,
    rows: usize,
    items: usize,
    source: &[S],
    size: usize,
    read: impl Fn(&[S]) -> T + Sync,
) -> Option<Piece> {
    let count = rows.div_ceil(LANES) * items * LANES;
    let mut out = piece(arena, count * size_of::<T>())?;
    let panels: &mut [T] = bytemuck::cast_slice_mut(&mut out);
    let panels = &mut panels[..count];
    panels.par_chunks_mut((items * LANES).max(1)).enumerate().for_each(|(panel, out)| {
        for lane in 0..LANES.min(rows - panel * LANES) {
            let row = &source[(panel * LANES + lane) * items * size..][..items * size];
            for (i, item) in row.chunks_exact(size).enumerate() {
                out[i * LANES + lane] = read(item);
            }
        }
    });
    Some(out)
}

/// The inverse of [`interleave`], for elements of `N` bytes.
fn deinterleave<const N: usize>(image: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![0; rows * columns * N];
    out.par_chunks_mut((columns * N).max(1)).enumerate().for_each(|(row, out)| {
        let panel = &image[row / LANES * columns * LANES * N..][..columns * LANES * N];
        for (to, from) in out.chunks_exact_mut(N).zip(panel.chunks_exact(LANES * N)) {
            to.copy_from_slice(&from[row % LANES * N..][..N]);
        }
    });
    out
}

/// An image's numbers.
fn elements<T: Pod>(image: &Image) -> &[T] {
    bytemuck::cast_slice(image)
}

#[cfg(test)]
mod tests;
