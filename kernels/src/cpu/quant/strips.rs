//! Panels → f32: what the block formats say, element by element and exactly.

use super::{BLOCK, Panel};
use crate::cpu::simd::LANES;

/// Block `b` of a panel as `[32 columns][16 rows]`.
pub(super) fn decode(panel: Panel, b: usize, out: &mut [f32; BLOCK * LANES]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::simd::avx2() {
        return super::avx2::decode(panel, b, out);
    }
    portable(panel, b, out);
}

/// The reference.
pub(super) fn portable(panel: Panel, b: usize, out: &mut [f32; BLOCK * LANES]) {
    let zero = i32::from(panel.format.zero);
    for lane in 0..LANES {
        let (d, m) = panel.scales(b, lane);
        for i in 0..BLOCK {
            let product = d[i / 16] * (i32::from(panel.code(b, lane, i)) - zero) as f32;
            out[i * LANES + lane] = if panel.format.scales.has_minimum() { product + m } else { product };
        }
    }
}
