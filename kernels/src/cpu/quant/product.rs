//! Integer products of a panel with rows of 8-bit activations.
//!
//! # Arithmetic
//! Within a block of 32 columns `Σ (code − zero)·q` is exact in integers, so its order is free. Between blocks
//! every element of the result is one chain over ascending blocks:
//!
//! ```text
//! acc = fma(d·x_scale, Σ(code − zero)·q, acc)      twice, for the halves, where a format scales 16 columns
//! acc = fma(m, x_scale·Σq, acc)                    where it has a minimum
//! ```
//!
//! Hence every instruction set gives the same bits, and a row does not depend on the rows beside it.

use super::Panel;
use super::activations::Int8Rows;
use super::format::ScaleKind;
use crate::cpu::simd::LANES;
use std::ops::Range;

/// Receives a row's number and its 16 sums.
pub(super) type Put<'a> = dyn FnMut(usize, &[f32; LANES]) + 'a;

/// Instruction set of the integer products, for start-up messages.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if super::avx512::available() {
            return "avx512+vnni";
        }
        if crate::cpu::simd::avx2() {
            return "avx2";
        }
    }
    "portable"
}

/// Some rows of `x` by a panel.
pub(super) fn multiply(panel: Panel, x: &Int8Rows, rows: Range<usize>, put: &mut Put) {
    #[cfg(target_arch = "x86_64")]
    {
        if super::avx512::available() {
            return super::avx512::multiply(panel, x, rows, put);
        }
        if crate::cpu::simd::avx2() {
            return super::avx2::multiply(panel, x, rows, put);
        }
    }
    portable(panel, x, rows, put);
}

/// The reference, and what CPUs without AVX2 run.
pub(super) fn portable(panel: Panel, x: &Int8Rows, rows: Range<usize>, put: &mut Put) {
    for row in rows {
        let mut sums = [0.0; LANES];
        for b in 0..x.blocks {
            let at = row * x.blocks + b;
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = block(panel, b, lane, x, at, *sum);
            }
        }
        put(row, &sums);
    }
}

fn block(panel: Panel, b: usize, lane: usize, x: &Int8Rows, at: usize, acc: f32) -> f32 {
    let zero = i32::from(panel.format.zero);
    let (d, m) = panel.scales(b, lane);
    let half = |h: usize| -> i32 {
        let q = &x.quants[at * 32 + 16 * h..][..16];
        q.iter()
            .enumerate()
            .map(|(i, q)| (i32::from(panel.code(b, lane, 16 * h + i)) - zero) * i32::from(*q))
            .sum()
    };
    let scale = x.scales[at];
    match panel.format.scales {
        ScaleKind::SuperSigned => {
            let acc = (d[0] * scale).mul_add(half(0) as f32, acc);
            (d[1] * scale).mul_add(half(1) as f32, acc)
        }
        ScaleKind::Half => (d[0] * scale).mul_add((half(0) + half(1)) as f32, acc),
        ScaleKind::HalfMin | ScaleKind::SuperMin => {
            let acc = (d[0] * scale).mul_add((half(0) + half(1)) as f32, acc);
            let [s0, s1] = x.sums[at].map(i32::from);
            m.mul_add(scale * (s0 + s1) as f32, acc)
        }
    }
}
