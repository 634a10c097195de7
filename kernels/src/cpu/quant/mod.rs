//! Block-quantized weight matrices for the CPU: repacked once, multiplied as integers or decoded exactly.
//!
//! # Layout
//! - [`format`](mod@format): what the file formats say, block by block, one line each in its registry.
//! - this file: panels of 16 rows, laid out so that one register holds four columns of all 16 rows.
//! - [`activations`]: rows of activations as 8-bit blocks.
//! - `product`: the integer product, its plain reference and the choice of instruction set; `avx2`, `avx512`: the
//!   same arithmetic written out.
//! - `strips`: panels → f32, what the formats say, bit for bit.
//!
//! # A panel
//! For each block of 32 columns: the codes, then (after all blocks) the scales.
//!
//! ```text
//! 8-bit codes    8 groups of 64 bytes; byte 4·row + c of group g is column 4g + c of that row
//! 4-bit codes    4 × 64 bytes; low nibbles are groups 0–3, high nibbles groups 4–7
//! 5, 6 bits      the same, then per further bit 8 × 64 bits: bit 4·row + c of word g
//! scales         per block (or per 256 columns) one value for each of the 16 rows, see `ScaleKind`
//! ```
//!
//! Codes are unsigned; a weight is `scale · (code − zero) + minimum`.

pub mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod format;
mod product;
mod strips;

use super::foresight;
use super::pages::{Arena, Image, LINE, Piece};
use super::simd::LANES;
use activations::Int8Rows;
use format::{QuantFormat, ScaleKind};
use half::f16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

pub use product::instruction_set;

/// Weights per block of columns.
pub const BLOCK: usize = 32;
/// Columns that share the outer scales of the K formats.
const SUPER: usize = 256;

/// A quantized matrix `[rows, columns]` in panels of 16 rows, the last one padded with zero weights.
pub struct QuantPanels {
    format: &'static QuantFormat,
    columns: usize,
    image: Image,
}

impl QuantPanels {
    /// Repacks row-major file blocks, into the arena where there is one; `None` if the columns are not whole blocks, if
    /// `bytes` has another length or the arena no room.
    pub fn pack(
        format: &'static QuantFormat,
        rows: usize,
        columns: usize,
        bytes: &[u8],
        arena: Option<&Arc<Arena>>,
    ) -> Option<Self> {
        let row_bytes = format.row_bytes(columns)?;
        if rows.checked_mul(row_bytes)? != bytes.len() {
            return None;
        }
        let shape = Shape { format, columns };
        let mut image = piece(arena, rows.div_ceil(LANES) * shape.panel_bytes())?;
        let panels = image.lines_mut().par_chunks_mut((shape.panel_bytes() / LINE).max(1));
        panels.enumerate().for_each(|(panel, lines)| {
            let image = bytemuck::cast_slice_mut(lines);
            for lane in 0..LANES {
                let row = panel * LANES + lane;
                match row < rows {
                    true => shape.put_row(image, lane, &bytes[row * row_bytes..][..row_bytes]),
                    false => shape.put_nothing(image, lane),
                }
            }
        });
        Some(Self { format, columns, image: Image::Own(image) })
    }

    /// Panels as [`Self::image`] gave them; `None` if they have another length than [`Self::bytes_for`].
    pub fn from_image(
        format: &'static QuantFormat,
        rows: usize,
        columns: usize,
        image: Image,
    ) -> Option<Self> {
        (Self::bytes_for(format, rows, columns)? == image.len()).then_some(Self { format, columns, image })
    }

    /// The panels as they lie in memory.
    pub fn image(&self) -> &[u8] {
        &self.image
    }

    /// Row-major file blocks again, exactly those that were packed.
    pub fn unpack(&self, rows: usize) -> Vec<u8> {
        let row_bytes = self.format.row_bytes(self.columns).expect("checked when it was packed");
        let mut out = vec![0; rows * row_bytes];
        out.par_chunks_mut(row_bytes.max(1)).enumerate().for_each(|(row, out)| {
            let (panel, lane) = (self.panel(row / LANES), row % LANES);
            let per_file_block = self.format.block / BLOCK;
            for (f, block) in out.chunks_exact_mut(self.format.block_bytes).enumerate() {
                for inner in 0..per_file_block {
                    (self.format.write)(block, inner, &panel.content(f * per_file_block + inner, lane));
                }
            }
        });
        out
    }

    /// Bytes that [`Self::pack`] holds, or `None` if the columns are not whole blocks.
    pub fn bytes_for(format: &'static QuantFormat, rows: usize, columns: usize) -> Option<usize> {
        format.row_bytes(columns)?;
        Some(rows.div_ceil(LANES) * Shape { format, columns }.panel_bytes())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.image.len()
    }

    fn panel(&self, panel: usize) -> Panel<'_> {
        let shape = Shape { format: self.format, columns: self.columns };
        let image = &self.image[panel * shape.panel_bytes()..][..shape.panel_bytes()];
        let (codes, scales) = image.split_at(shape.codes_bytes());
        Panel { format: self.format, codes, scales, ahead: 0 }
    }

    /// Decodes columns `from..` of a panel, whole blocks, as `[columns][16]`.
    pub fn decode(&self, panel: usize, from: usize, out: &mut [f32]) {
        assert!(from.is_multiple_of(BLOCK) && out.len().is_multiple_of(BLOCK * LANES), "whole blocks");
        let panel = self.panel(panel);
        for (b, out) in out.chunks_exact_mut(BLOCK * LANES).enumerate() {
            strips::decode(panel, from / BLOCK + b, out.try_into().expect("a block"));
        }
    }

    /// A panel's 16 rows by `rows` of `x`: `put(row of x, sums)`.
    pub fn multiply(
        &self,
        panel: usize,
        x: &Int8Rows,
        rows: Range<usize>,
        put: &mut dyn FnMut(usize, &[f32; LANES]),
    ) {
        let panel = self.panel(panel);
        let ahead = foresight::ahead(panel.codes.as_ptr() as usize);
        product::multiply(Panel { ahead, ..panel }, x, rows, put);
    }
}

/// Memory for `bytes`: a piece of the arena, or its own without one.
pub(super) fn piece(arena: Option<&Arc<Arena>>, bytes: usize) -> Option<Piece> {
    arena.map_or_else(|| Some(Piece::alone(bytes)), |arena| arena.take(bytes))
}

/// One panel's memory.
#[derive(Clone, Copy)]
struct Panel<'a> {
    format: &'static QuantFormat,
    codes: &'a [u8],
    scales: &'a [u8],
    /// Address of as many bytes as the panel has, to be asked for meanwhile.
    ahead: usize,
}

impl Panel<'_> {
    /// Asks for the part of what is [ahead](Panel::ahead) that is as long as block `b` of `blocks`, of codes of `BITS` bits.
    #[inline(always)]
    fn ask_ahead<const BITS: usize>(&self, b: usize, blocks: usize) {
        for line in 0..BITS {
            foresight::ask(self.ahead + (b * BITS + line) * LINE);
        }
        foresight::ask(self.ahead + self.codes.len() + b * (self.scales.len() / blocks));
    }

    /// Unsigned code at (`lane`, column `i` of block `b`): the definition of the layout.
    fn code(&self, b: usize, lane: usize, i: usize) -> u8 {
        let codes = &self.codes[b * self.format.block_codes()..][..self.format.block_codes()];
        let (group, at) = (i / 4, 4 * lane + i % 4);
        if self.format.bits == 8 {
            return codes[group * 64 + at];
        }
        let nibble = (codes[group % 4 * 64 + at] >> (group / 4 * 4)) & 15;
        (4..self.format.bits).fold(nibble, |code, bit| {
            let plane = 256 + (bit - 4) as usize * 64;
            code | ((codes[plane + group * 8 + at / 8] >> (at % 8)) & 1) << bit
        })
    }

    /// Block `b` of row `lane`, as [`QuantFormat::read`] gave it.
    fn content(&self, b: usize, lane: usize) -> format::Content {
        let record = self.format.scales.record(b);
        let half = |at: usize| [self.scales[at], self.scales[at + 1]];
        let pair = |at: usize| [self.scales[at + lane], self.scales[at + 16 + lane]];
        format::Content {
            codes: std::array::from_fn(|i| self.code(b, lane, i)),
            d: half(record + 2 * lane),
            m: if self.format.scales.has_minimum() { half(record + 32 + 2 * lane) } else { [0; 2] },
            inner: match self.format.scales {
                ScaleKind::Half | ScaleKind::HalfMin => [0; 2],
                ScaleKind::SuperMin => pair(record + 64 + b % 8 * 32),
                ScaleKind::SuperSigned => pair(record + 32 + b % 8 * 32),
            },
        }
    }

    /// Scales of the two halves of block `b` in row `lane`, and its minimum.
    fn scales(&self, b: usize, lane: usize) -> ([f32; 2], f32) {
        let half = |at: usize| f16::from_le_bytes([self.scales[at], self.scales[at + 1]]).to_f32();
        let record = self.format.scales.record(b);
        match self.format.scales {
            ScaleKind::Half => ([half(record + 2 * lane); 2], 0.0),
            ScaleKind::HalfMin => ([half(record + 2 * lane); 2], half(record + 32 + 2 * lane)),
            ScaleKind::SuperMin => {
                let inner = record + 64 + b % 8 * 32;
                let d = half(record + 2 * lane) * f32::from(self.scales[inner + lane]);
                let m = half(record + 32 + 2 * lane) * f32::from(self.scales[inner + 16 + lane]);
                ([d; 2], -m)
            }
            ScaleKind::SuperSigned => {
                let inner = record + 32 + b % 8 * 32;
                let d = |h: usize| f32::from(self.scales[inner + 16 * h + lane] as i8);
                let outer = half(record + 2 * lane);
                ([outer * d(0), outer * d(1)], 0.0)
            }
        }
    }
}

/// Where things lie in a panel.
#[derive(Clone, Copy)]
struct Shape {
    format: &'static QuantFormat,
    columns: usize,
}

impl Shape {
    fn codes_bytes(self) -> usize {
        self.columns / BLOCK * self.format.block_codes()
    }

    fn panel_bytes(self) -> usize {
        let scales = self.format.scales.record(self.columns / BLOCK);
        (self.codes_bytes() + scales).next_multiple_of(64)
    }

    fn put_row(self, image: &mut [u8], lane: usize, row: &[u8]) {
        let (codes, scales) = image.split_at_mut(self.codes_bytes());
        let per_file_block = self.format.block / BLOCK;
        for (f, block) in row.chunks_exact(self.format.block_bytes).enumerate() {
            for inner in 0..per_file_block {
                let b = f * per_file_block + inner;
                let content = (self.format.read)(block, inner);
                self.put_codes(&mut codes[b * self.format.block_codes()..], lane, &content.codes);
                self.put_scales(scales, b, lane, &content);
            }
        }
    }

    fn put_codes(self, codes: &mut [u8], lane: usize, values: &[u8; BLOCK]) {
        for (i, value) in values.iter().enumerate() {
            let (group, at) = (i / 4, 4 * lane + i % 4);
            if self.format.bits == 8 {
                codes[group * 64 + at] = *value;
                continue;
            }
            codes[group % 4 * 64 + at] |= (value & 15) << (group / 4 * 4);
            for bit in 4..self.format.bits {
                let plane = 256 + (bit - 4) as usize * 64;
                codes[plane + group * 8 + at / 8] |= ((value >> bit) & 1) << (at % 8);
            }
        }
    }

    fn put_scales(self, scales: &mut [u8], b: usize, lane: usize, content: &format::Content) {
        let record = self.format.scales.record(b);
        let mut half = |at: usize, value: [u8; 2]| scales[at..at + 2].copy_from_slice(&value);
        half(record + 2 * lane, content.d);
        if self.format.scales.has_minimum() {
            half(record + 32 + 2 * lane, content.m);
        }
        let inner = match self.format.scales {
            ScaleKind::Half | ScaleKind::HalfMin => return,
            ScaleKind::SuperMin => record + 64 + b % 8 * 32,
            ScaleKind::SuperSigned => record + 32 + b % 8 * 32,
        };
        scales[inner + lane] = content.inner[0];
        scales[inner + 16 + lane] = content.inner[1];
    }

    /// A row past the matrix: codes of zero weight; its scales stay zero.
    fn put_nothing(self, image: &mut [u8], lane: usize) {
        for block in image[..self.codes_bytes()].chunks_exact_mut(self.format.block_codes()) {
            self.put_codes(block, lane, &[self.format.zero; BLOCK]);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
