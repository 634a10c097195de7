//! Packed matrices as operands of the dense product: decoded a strip at a time, just before it is used.

use super::gemm::{Columns, Elems, Strip, pack_columns};
use super::packed::PackedMatrix;
use super::quant::BLOCK;
use super::simd::{LANES, Level};
use std::mem::MaybeUninit;

/// `wᵀ`: a column is a row of `w`, and a strip of them is one panel.
pub(super) struct Transposed<'a>(pub(super) &'a PackedMatrix);

impl Columns for Transposed<'_> {
    fn pack(&self, strip: &Strip, _: Level, out: &mut [MaybeUninit<f32>]) {
        for x in &mut *out {
            x.write(0.0);
        }
        // SAFETY: just written.
        let out = unsafe { &mut *(std::ptr::from_mut(out) as *mut [f32]) };
        self.0.decode(strip.first / LANES, strip.k.start, out);
    }
}

/// `w` itself: the panels of rows `k`, a few columns of them, transposed.
pub(super) struct Plain<'a>(pub(super) &'a PackedMatrix);

impl Columns for Plain<'_> {
    fn pack(&self, strip: &Strip, level: Level, out: &mut [MaybeUninit<f32>]) {
        // Quantized panels are decoded by whole blocks.
        let from = strip.first / BLOCK * BLOCK;
        let decoded = BLOCK.min(self.0.columns() - from);
        let mut block = [0.0; BLOCK * LANES];
        for (panel, out) in out.chunks_mut(LANES * LANES).enumerate() {
            let rows = out.len() / LANES;
            self.0.decode(strip.k.start / LANES + panel, from, &mut block[..decoded * LANES]);
            let part = Strip { first: strip.first - from, count: strip.count, k: 0..rows };
            pack_columns(Elems::F32(&block), LANES, 1, &part, level, out);
        }
    }
}
