//! What this machine's disk and memory can do: the limits that a plan and a benchmark are held against.
//!
//! Each figure is the median of several runs, whose samples are kept. Units are 10⁹ bytes per second.

mod disk;
mod memory;

pub use disk::{DiskSpeed, disk};
pub use memory::{MemorySpeed, memory};

/// Runs per figure.
const RUNS: usize = 5;

/// One figure.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figure {
    /// The median.
    pub gb_s: f64,
    /// Each run, in the order in which they were made.
    pub samples: Vec<f64>,
}

impl Figure {
    fn of(samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let gb_s = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        Self { gb_s, samples }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_its_median_and_keeps_the_order_of_its_samples() {
        let figure = Figure::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((figure.gb_s, figure.samples), (2.0, vec![3.0, 1.0, 2.0]));
    }
}
