//! Adafactor (arXiv 1804.04235) without momentum: second moments of a matrix kept as one mean per row and one per
//! column.
//!
//! Not elementwise: it needs a whole parameter. Sums run over blocks of a fixed number of rows, in f64, and the
//! blocks' sums are added in order, so threads change no bit.

use super::halves::as_high;
use super::stored::Stored;
use super::update::CopyOut;
use crate::multiversion;
use rayon::prelude::*;

/// Rows of a matrix one task reduces.
const ROWS: usize = 128;
/// Elements of a vector one task reduces.
const ELEMENTS: usize = 1 << 14;

/// The constants of one update, as transformers' `Adafactor` computes it with `relative_step` and `scale_parameter`
/// off: `β = 1 − t^decay`, means of `g² + ε` decayed by `β`, `u = g/√v̂` scaled down to root mean square
/// `clip_threshold`, `p ← p(1−ηλ) − ηu`, with `g` the gradient times `gradient_scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdafactorRule {
    /// `β`.
    pub beta: f32,
    /// `1 − β`.
    pub one_minus_beta: f32,
    /// `ε`.
    pub eps: f32,
    /// Largest root mean square of an update.
    pub clip_threshold: f64,
    /// `1 − ηλ`.
    pub keep: f32,
    /// `η`.
    pub lr: f64,
    /// What gradients are multiplied by first.
    pub gradient_scale: f32,
}

/// Length of the state of a parameter: rows, then columns of a matrix; every element of anything else.
pub fn state_len(shape: &[usize]) -> usize {
    match *shape {
        [rows, columns] => rows + columns,
        _ => shape.iter().product(),
    }
}

/// Updates a whole parameter of shape `shape`; `state` is [`state_len`] long.
///
/// # Panics
/// If a slice's length does not follow from the shape.
pub fn adafactor(
    rule: AdafactorRule,
    shape: &[usize],
    master: &mut [f32],
    gradient: &[f32],
    state: &mut [f32],
    copy: Option<CopyOut>,
) {
    let len = shape.iter().product::<usize>();
    let fits = master.len() == len
        && gradient.len() == len
        && state.len() == state_len(shape)
        && copy.as_ref().is_none_or(|c| c.len() == len);
    assert!(fits, "adafactor: a whole parameter of shape {shape:?} wanted");
    match copy {
        None => by_shape(rule, shape, master, gradient, state, &mut vec![(); len]),
        Some(CopyOut::F32(copy)) => by_shape(rule, shape, master, gradient, state, copy),
        Some(CopyOut::Bf16(copy)) => by_shape(rule, shape, master, gradient, state, copy),
        Some(CopyOut::F16(copy)) => by_shape(rule, shape, master, gradient, state, copy),
        Some(CopyOut::High(copy)) => by_shape(rule, shape, master, gradient, state, as_high(copy)),
    }
}

fn by_shape<C: Stored>(
    rule: AdafactorRule,
    shape: &[usize],
    p: &mut [f32],
    g: &[f32],
    state: &mut [f32],
    copy: &mut [C],
) {
    match *shape {
        _ if g.is_empty() => {}
        [rows, columns] => matrix(rule, rows, columns, p, g, state, copy),
        _ => vector(rule, p, g, state, copy),
    }
}

impl AdafactorRule {
    /// `η` over what brings a root mean square of `√(square_sum/len)` down to the threshold.
    fn step_size(&self, square_sum: f64, len: usize) -> f32 {
        let rms = (square_sum / len as f64).sqrt();
        (self.lr / (rms / self.clip_threshold).max(1.0)) as f32
    }

    /// Decays `state` towards the mean of `count` squares that sum to `sum`.
    fn decay(&self, state: &mut f32, sum: f64, count: usize) {
        let mean = (sum / count as f64) as f32 + self.eps;
        *state = *state * self.beta + self.one_minus_beta * mean;
    }
}

fn matrix<C: Stored>(
    rule: AdafactorRule,
    rows: usize,
    columns: usize,
    p: &mut [f32],
    g: &[f32],
    state: &mut [f32],
    copy: &mut [C],
) {
    let (row_means, column_means) = state.split_at_mut(rows);
    let block = ROWS * columns;
    let mut row_sums = vec![0.0; rows];
    let mut column_sums = vec![0.0; rows.div_ceil(ROWS) * columns];
    g.par_chunks(block)
        .zip(row_sums.par_chunks_mut(ROWS))
        .zip(column_sums.par_chunks_mut(columns))
        .for_each(|((g, rows), columns)| square_sums(g, rule.gradient_scale, rows, columns));
    for (mean, sum) in row_means.iter_mut().zip(&row_sums) {
        rule.decay(mean, *sum, columns);
    }
    for (j, mean) in column_means.iter_mut().enumerate() {
        let sum = column_sums.iter().skip(j).step_by(columns).sum();
        rule.decay(mean, sum, rows);
    }
    let mean = (row_means.iter().map(|v| *v as f64).sum::<f64>() / rows as f64) as f32;
    let row_roots: Vec<f32> =
        row_means.iter().map(|v| 1.0 / (v / mean).sqrt() * rule.gradient_scale).collect();
    let column_roots: Vec<f32> = column_means.iter().map(|v| 1.0 / v.sqrt()).collect();
    let sums: Vec<f64> = g
        .par_chunks(block)
        .zip(row_roots.par_chunks(ROWS))
        .map(|(g, rows)| direction_square_sum(g, rows, &column_roots))
        .collect();
    let step_size = rule.step_size(sums.iter().sum(), p.len());
    p.par_chunks_mut(block)
        .zip(g.par_chunks(block))
        .zip(row_roots.par_chunks(ROWS))
        .zip(copy.par_chunks_mut(block))
        .for_each(|(((p, g), rows), copy)| apply_rows(rule.keep, step_size, p, g, rows, &column_roots, copy));
}

multiversion! {
    /// Sums of squares of each row of a block, and of each column.
    fn square_sums(g: &[f32], scale: f32, row_sums: &mut [f64], column_sums: &mut [f64]) {
        let columns = column_sums.len();
        for (g, row_sum) in g.chunks_exact(columns).zip(row_sums) {
            let mut lanes = [0.0f64; 8];
            let groups = g.chunks_exact(8);
            for (i, g) in groups.remainder().iter().enumerate() {
                lanes[i] = square(*g * scale);
            }
            for g in groups {
                for i in 0..8 {
                    lanes[i] += square(g[i] * scale);
                }
            }
            *row_sum = lanes.iter().sum();
            for (sum, g) in column_sums.iter_mut().zip(g) {
                *sum += square(*g * scale);
            }
        }
    }
}

#[inline(always)]
fn square(x: f32) -> f64 {
    x as f64 * x as f64
}

multiversion! {
    fn direction_square_sum(g: &[f32], row_roots: &[f32], column_roots: &[f32]) -> f64 {
        let mut sum = 0.0;
        for (g, row) in g.chunks_exact(column_roots.len()).zip(row_roots) {
            let mut lanes = [0.0f64; 8];
            for (g, columns) in g.chunks(8).zip(column_roots.chunks(8)) {
                for i in 0..g.len() {
                    lanes[i] += square(g[i] * (row * columns[i]));
                }
            }
            sum += lanes.iter().sum::<f64>();
        }
        sum
    }
}

multiversion! {
    fn apply_rows<C: Stored>(keep: f32, step_size: f32, p: &mut [f32], g: &[f32], row_roots: &[f32], column_roots: &[f32], copy: &mut [C]) {
        let d = column_roots.len();
        for (((p, g), row), copy) in p.chunks_exact_mut(d).zip(g.chunks_exact(d)).zip(row_roots).zip(copy.chunks_exact_mut(d)) {
            for j in 0..d {
                p[j] = p[j] * keep - step_size * (g[j] * (row * column_roots[j]));
                copy[j] = C::narrow(p[j]);
            }
        }
    }
}

fn vector<C: Stored>(rule: AdafactorRule, p: &mut [f32], g: &[f32], v: &mut [f32], copy: &mut [C]) {
    let sums: Vec<f64> = v
        .par_chunks_mut(ELEMENTS)
        .zip(g.par_chunks(ELEMENTS))
        .map(|(v, g)| {
            let mut sum = 0.0;
            for (v, g) in v.iter_mut().zip(g) {
                let g = g * rule.gradient_scale;
                *v = *v * rule.beta + rule.one_minus_beta * (g * g + rule.eps);
                sum += square(g / v.sqrt());
            }
            sum
        })
        .collect();
    let step_size = rule.step_size(sums.iter().sum(), p.len());
    for (((p, g), v), copy) in p.iter_mut().zip(g).zip(v).zip(copy) {
        *p = *p * rule.keep - step_size * (g * rule.gradient_scale / v.sqrt());
        *copy = C::narrow(*p);
    }
}
