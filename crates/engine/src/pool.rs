//! The vectors of a prompt's tokens → one.

use crate::api::Pooling;

/// A vector in the making. Rows come in the order of their positions, so that the sum has one order whatever the
/// chunks.
pub struct Pool {
    pooling: Pooling,
    prompt: usize,
    /// Position of the next vector that counts: a preempted prompt is computed again from its start.
    next: usize,
    sum: Vec<f64>,
}

impl Pool {
    /// For a prompt of this many tokens.
    pub fn new(pooling: Pooling, prompt: usize) -> Self {
        let mut pool = Self { pooling, prompt, next: 0, sum: Vec::new() };
        pool.next = pool.first_wanted();
        pool
    }

    /// Position of the first token whose vector matters.
    pub fn first_wanted(&self) -> usize {
        match self.pooling {
            Pooling::Mean => 0,
            Pooling::Last => self.prompt - 1,
        }
    }

    /// Takes the vector, `[d_model]`, of the token at `position`; one that was taken before is left out.
    pub fn add(&mut self, position: usize, row: &[f32]) {
        if position != self.next {
            return;
        }
        self.next += 1;
        self.sum.resize(row.len(), 0.0);
        for (sum, &value) in self.sum.iter_mut().zip(row) {
            *sum += f64::from(value);
        }
    }

    /// The prompt's vector, `[d_model]`.
    pub fn finish(self) -> Vec<f32> {
        let rows = (self.prompt - self.first_wanted()) as f64;
        self.sum.iter().map(|sum| (sum / rows) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_computed_twice_count_once() {
        let mut pool = Pool::new(Pooling::Mean, 3);
        for position in [0, 1, 0, 1, 2] {
            pool.add(position, &[position as f32, 1.0]);
        }
        assert_eq!(pool.finish(), [1.0, 1.0]);
    }
}
