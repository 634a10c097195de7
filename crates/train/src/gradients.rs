//! Gradients of one step: summed over micro-batches in one fixed tree, measured in one fixed order.
//!
//! # The order
//! A parameter's gradients `g₀ … gₙ₋₁` (one per micro-batch, by its global index) are summed as
//! `sum(0..n) = sum(0..h) + sum(h..n)` where `h` is the largest power of two below `n`. The order does not depend on
//! who computes which micro-batch or when, so any partition of the micro-batches over processes that keeps the tree
//! gives the same bits.

use rayon::prelude::*;

/// Elements one task adds. Elements are independent, so the size changes no result.
const ADD_CHUNK: usize = 1 << 16;
/// Elements whose squares are summed by themselves before anything else is added. Changing it changes results:
/// a partition of a parameter must start at a multiple of it.
pub const NORM_CHUNK: usize = 1 << 12;

/// Sums gradients as they come, holding one partial sum per set bit of their number.
#[derive(Default)]
pub struct TreeSum {
    /// Complete subtrees, largest first, each with its number of leaves.
    partial: Vec<(usize, Vec<f32>)>,
}

impl TreeSum {
    /// Adds the next micro-batch's gradient.
    pub fn push(&mut self, gradient: Vec<f32>) {
        let mut node = (1, gradient);
        while self.partial.last().is_some_and(|(leaves, _)| *leaves == node.0) {
            let (leaves, mut left) = self.partial.pop().expect("just seen");
            add(&mut left, &node.1);
            node = (2 * leaves, left);
        }
        self.partial.push(node);
    }

    /// The sum over all micro-batches, `None` if there was none.
    pub fn finish(mut self) -> Option<Vec<f32>> {
        let (_, mut sum) = self.partial.pop()?;
        while let Some((_, mut left)) = self.partial.pop() {
            add(&mut left, &sum);
            sum = left;
        }
        Some(sum)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.partial.iter().map(|(_, g)| size_of_val(g.as_slice())).sum()
    }
}

/// `a += b`, elementwise.
pub fn add(a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "gradients of one parameter have one length");
    a.par_chunks_mut(ADD_CHUNK).zip(b.par_chunks(ADD_CHUNK)).for_each(|(a, b)| {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    });
}

/// Sum of squares in f64: 8 interleaved lanes within each [`NORM_CHUNK`], the lanes in order, then chunk after chunk.
pub fn sum_of_squares(gradient: &[f32]) -> f64 {
    gradient.par_chunks(NORM_CHUNK).map(chunk_sum).collect::<Vec<_>>().iter().sum()
}

fn chunk_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for group in chunk.chunks(8) {
        for (lane, g) in lanes.iter_mut().zip(group) {
            *lane += *g as f64 * *g as f64;
        }
    }
    lanes.iter().sum()
}

/// What gradients of norm `norm` are multiplied by so that they end at most at `limit` (0 = no limit):
/// `min(1, limit / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.
pub fn clip_coefficient(norm: f64, limit: f64) -> f32 {
    if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    /// The documented recursion.
    fn recursive(gradients: &[Vec<f32>]) -> Vec<f32> {
        if let [one] = gradients {
            return one.clone();
        }
        let half = gradients.len().next_power_of_two() / 2;
        let (mut left, right) = (recursive(&gradients[..half]), recursive(&gradients[half..]));
        add(&mut left, &right);
        left
    }

    #[test]
    fn the_counter_is_the_documented_tree() {
        for n in 1..20 {
            let gradients: Vec<Vec<f32>> =
                (0..n).map(|i| (0..9).map(|j| uniform(i, j) * 10f32.powi(j as i32)).collect()).collect();
            let mut tree = TreeSum::default();
            gradients.iter().for_each(|g| tree.push(g.clone()));
            assert!(tree.bytes() <= 9 * 4 * (n.ilog2() as usize + 1));
            assert_eq!(tree.finish().expect("not empty"), recursive(&gradients), "{n} micro-batches");
        }
        assert_eq!(TreeSum::default().finish(), None);
    }

    #[test]
    fn the_norm_of_parts_cut_at_chunks_is_the_norm_of_the_whole() {
        let g: Vec<f32> = (0..3 * NORM_CHUNK as u64 + 77).map(|i| uniform(1, i) - 0.5).collect();
        let chunks: f64 = g.chunks(NORM_CHUNK).map(sum_of_squares).sum();
        assert_eq!(sum_of_squares(&g), chunks);
        let plain: f64 = g.iter().map(|x| (*x as f64).powi(2)).sum();
        assert!((sum_of_squares(&g) / plain - 1.0).abs() < 1e-12);
    }

    #[test]
    fn clipping_scales_down_and_never_up() {
        assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
        assert_eq!(clip_coefficient(100.0, 0.0), 1.0);
        assert!((clip_coefficient(4.0, 1.0) - 0.25).abs() < 1e-6);
    }
}
