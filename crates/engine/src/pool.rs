//! The vectors of a prompt's tokens → one.

use crate::api::Pooling;

/// A vector in the making. Rows come in the order of their positions, so that the sum has one order whatever the
/// chunks.
pub struct Pool {
    pooling: Pooling,
    prompt: usize,
    sum: Vec<f64>,
}

impl Pool {
    /// For a prompt of this many tokens.
    pub fn new(pooling: Pooling, prompt: usize) -> Self {
        Self { pooling, prompt, sum: Vec::new() }
    }

    /// Position of the first token whose vector matters.
    pub fn first_wanted(&self) -> usize {
        match self.pooling {
            Pooling::Mean => 0,
            Pooling::Last => self.prompt - 1,
        }
    }

    /// Takes the next token's vector, `[d_model]`.
    pub fn add(&mut self, row: &[f32]) {
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
