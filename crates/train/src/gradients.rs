//! Gradients of one step: summed over micro-batches in one fixed tree, measured in one fixed order.
//!
//! # The order
//! A parameter's gradients `g₀ … gₙ₋₁` (one per micro-batch, by its global index) are summed as
//! `sum(0..n) = sum(0..h) + sum(h..n)` where `h` is the largest power of two below `n`. The order does not depend on
//! who computes which micro-batch or when, so any partition of the micro-batches over processes that keeps the tree
//! gives the same bits.

use hearth_kernels::cpu::stored::Stored;
use rayon::prelude::*;
use std::ops::Range;

/// Elements one task adds. Elements are independent, so the size changes no result.
const ADD_CHUNK: usize = 1 << 16;
/// Elements whose squares are summed by themselves before anything else is added. Changing it changes results:
/// a partition of a parameter must start at a multiple of it.
pub const NORM_CHUNK: usize = 1 << 12;

/// Sums gradients as they come, in any order, holding one partial sum per complete subtree. What a partial sum is made
/// of is the caller's: `N` may lie in memory or on a disk.
pub struct TreeSum<N> {
    total: usize,
    partial: Vec<(Range<usize>, N)>,
}

impl<N> TreeSum<N> {
    /// The sum of `total` micro-batches.
    pub fn new(total: usize) -> Self {
        Self { total, partial: Vec::new() }
    }

    /// Adds the sum over the micro-batches `range`, a node of the tree. `add` gets a left and a right half.
    ///
    /// # Errors
    /// Those of `add`; the tree is then of no more use.
    pub fn push<E>(
        &mut self,
        mut range: Range<usize>,
        mut node: N,
        add: &mut dyn FnMut(N, N) -> Result<N, E>,
    ) -> Result<(), E> {
        while let Some([left, right]) = halves(self.total, &range) {
            let other = if range == left { &right } else { &left };
            let Some(at) = self.partial.iter().position(|(there, _)| there == other) else { break };
            let (_, sibling) = self.partial.swap_remove(at);
            node = if range == left { add(node, sibling)? } else { add(sibling, node)? };
            range = left.start..right.end;
        }
        self.partial.push((range, node));
        Ok(())
    }

    /// The sum over all micro-batches, once it is complete.
    pub fn root(&self) -> Option<&N> {
        self.partial.first().filter(|(range, _)| *range == (0..self.total)).map(|(_, node)| node)
    }

    /// Takes the sum over all micro-batches, once it is complete.
    pub fn take_root(&mut self) -> Option<N> {
        self.root()?;
        self.partial.pop().map(|(_, node)| node)
    }

    /// Puts by the partial sum that was added last in another form.
    ///
    /// # Errors
    /// Those of `change`; the tree is then of no more use.
    pub fn update_last<E>(&mut self, change: &mut dyn FnMut(N) -> Result<N, E>) -> Result<(), E> {
        if let Some((range, node)) = self.partial.pop() {
            self.partial.push((range, change(node)?));
        }
        Ok(())
    }

    /// Partial sums held.
    pub fn held(&self) -> usize {
        self.partial.len()
    }
}

/// The node that has `node` for one of its halves, as these; `None` for the root.
fn halves(total: usize, node: &Range<usize>) -> Option<[Range<usize>; 2]> {
    let mut parent = 0..total;
    loop {
        if *node == parent {
            return None;
        }
        let middle = parent.start + parent.len().next_power_of_two() / 2;
        let (left, right) = (parent.start..middle, middle..parent.end);
        if *node == left || *node == right {
            return Some([left, right]);
        }
        assert!(parent.len() > 1, "{node:?} is not a node of the tree over {total} micro-batches");
        parent = if node.start < middle { left } else { right };
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

/// [`chunk_squares`] of values that are widened on the way.
pub(crate) fn chunk_squares_of<T: Stored>(gradient: &[T]) -> Vec<f64> {
    let widened = |chunk: &[T]| chunk_sum(T::floats(chunk, &mut [0.0; NORM_CHUNK]));
    gradient.par_chunks(NORM_CHUNK).map(widened).collect()
}

/// Sums of squares in f64 of each [`NORM_CHUNK`]: 8 interleaved lanes, then the lanes in order.
pub fn chunk_squares(gradient: &[f32]) -> Vec<f64> {
    gradient.par_chunks(NORM_CHUNK).map(chunk_sum).collect()
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
    fn any_order_of_arrival_gives_the_documented_tree() {
        for n in 1..20 {
            let gradients: Vec<Vec<f32>> =
                (0..n).map(|i| (0..9).map(|j| uniform(i, j) * 10f32.powi(j as i32)).collect()).collect();
            for stride in 1..n as usize + 1 {
                let mut tree = TreeSum::new(n as usize);
                let order = (0..stride).flat_map(|s| (s..n as usize).step_by(stride));
                for i in order {
                    let mut plus = |mut left: Vec<f32>, right: Vec<f32>| {
                        add(&mut left, &right);
                        Ok::<_, ()>(left)
                    };
                    assert_eq!(tree.root(), None);
                    tree.push(i..i + 1, gradients[i].clone(), &mut plus).expect("adds");
                    assert!(stride > 1 || tree.held() <= n.ilog2() as usize + 1);
                }
                assert_eq!(tree.take_root().expect("complete"), recursive(&gradients), "{n} by {stride}");
            }
        }
    }

    #[test]
    fn the_norm_of_parts_cut_at_chunks_is_the_norm_of_the_whole() {
        let g: Vec<f32> = (0..3 * NORM_CHUNK as u64 + 77).map(|i| uniform(1, i) - 0.5).collect();
        let parts: Vec<f64> = g.chunks(2 * NORM_CHUNK).flat_map(chunk_squares).collect();
        assert_eq!(chunk_squares(&g), parts);
        let mut padded = g.clone();
        padded.resize(5 * NORM_CHUNK, 0.0);
        assert_eq!(chunk_squares(&g).iter().sum::<f64>(), chunk_squares(&padded).iter().sum::<f64>());
        let plain: f64 = g.iter().map(|x| (*x as f64).powi(2)).sum();
        assert!((parts.iter().sum::<f64>() / plain - 1.0).abs() < 1e-12);
    }

    #[test]
    fn clipping_scales_down_and_never_up() {
        assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
        assert_eq!(clip_coefficient(100.0, 0.0), 1.0);
        assert!((clip_coefficient(4.0, 1.0) - 0.25).abs() < 1e-6);
    }
}
