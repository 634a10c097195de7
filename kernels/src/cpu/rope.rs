//! Rotary position embedding.

use super::{rows_per_task, written};
use crate::multiversion;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// cos and sin of every row's angles: `[rows, head_dim/2]` each.
#[derive(Debug)]
pub struct RotaryTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTable {
    /// `half = head_dim / 2`; `cos` and `sin` hold a line of `half` per row.
    pub fn new(half: usize, cos: Vec<f32>, sin: Vec<f32>) -> Self {
        assert!(
            cos.len() == sin.len() && cos.len().is_multiple_of(half.max(1)),
            "rotary table lines of {half}"
        );
        Self { half, cos, sin }
    }

    /// Rows the table serves.
    pub fn rows(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Pairs per head.
    pub fn half(&self) -> usize {
        self.half
    }

    /// All cosines, `[rows, head_dim/2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// All sines, `[rows, head_dim/2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// Rotates every head of `x`: `[rows, heads, head_dim]`; the other way if `inverse`.
pub fn rope(x: &[f32], heads: usize, table: &RotaryTable, inverse: bool) -> Vec<f32> {
    let width = heads * table.half * 2;
    assert_eq!(x.len(), table.rows() * width, "rope: rows of x and of the table differ");
    let rows = rows_per_task(table.rows(), width);
    let tasks = |y: &mut [MaybeUninit<f32>]| {
        let chunks = y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width));
        chunks.enumerate().for_each(|(task, (y, x))| {
            let lines = task * rows * table.half..;
            rotate(x, heads, table.half, &table.cos[lines.clone()], &table.sin[lines], inverse, y);
        });
    };
    // SAFETY: `x` is whole heads, and every head of the result is written.
    unsafe { written(x.len(), tasks) }
}

multiversion! {
    fn rotate(x: &[f32], heads: usize, half: usize, cos: &[f32], sin: &[f32], inverse: bool, y: &mut [MaybeUninit<f32>]) {
        let sign = if inverse { -1.0 } else { 1.0 };
        for (i, (x, y)) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)).enumerate() {
            let line = i / heads * half;
            let (cos, sin) = (&cos[line..][..half], &sin[line..][..half]);
            let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
            for j in 0..half {
                let s = sign * sin[j];
                y1[j].write(x1[j] * cos[j] - x2[j] * s);
                y2[j].write(x2[j] * cos[j] + x1[j] * s);
            }
        }
    }
}

/// Rotates every head of some rows in place, on the calling thread; `first` is the first one's line in the table.
pub fn rope_in_place(x: &mut [f32], heads: usize, table: &RotaryTable, first: usize) {
    let rows = x.len() / (heads * table.half * 2).max(1);
    let lines = first * table.half..(first + rows) * table.half;
    rotate_in_place(x, heads, table.half, &table.cos[lines.clone()], &table.sin[lines]);
}

multiversion! {
    fn rotate_in_place(x: &mut [f32], heads: usize, half: usize, cos: &[f32], sin: &[f32]) {
        for (i, x) in x.chunks_exact_mut(2 * half).enumerate() {
            let line = i / heads * half;
            let (cos, sin) = (&cos[line..][..half], &sin[line..][..half]);
            let (x1, x2) = x.split_at_mut(half);
            for j in 0..half {
                (x1[j], x2[j]) = (x1[j] * cos[j] - x2[j] * sin[j], x2[j] * cos[j] + x1[j] * sin[j]);
            }
        }
    }
}
