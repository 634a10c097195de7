//! What a run's loss is made of: one file per objective.
//!
//! The model's passes know an objective only as something that turns the last block's output into a loss; the step knows
//! what it counts. [`ObjectiveConfig`] is the registry.
//!
//! # Invariants
//! - A micro-batch gives **sums** ([`Sums`]); the step divides them by the global count, so that every micro-batch weighs
//!   by what it counts, on however many ranks.
//! - With and without a tape the sums are the same bits.

mod dpo;
mod sft;

pub use dpo::Dpo;
pub use sft::Sft;

use crate::Error;
use crate::micro_batch::MicroBatch;
use burn::tensor::Tensor;
use hearth_data::Sequence;
use hearth_model::layers::Head;
use serde::{Deserialize, Serialize};
use std::ops::AddAssign;

/// An objective and its settings, `kind` naming it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum ObjectiveConfig {
    /// Next-token prediction: `sft`.
    #[default]
    Sft,
    /// Preferences: `dpo`.
    Dpo(Dpo),
}

impl ObjectiveConfig {
    /// What it says to do.
    pub fn objective(&self) -> &dyn Objective {
        match self {
            ObjectiveConfig::Sft => &Sft,
            ObjectiveConfig::Dpo(dpo) => dpo,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        match self {
            ObjectiveConfig::Sft => Ok(()),
            ObjectiveConfig::Dpo(dpo) => dpo.validate(),
        }
    }
}

/// A loss over the last transformer block's output.
pub trait Objective: Send + Sync {
    /// Refuses sequences it has nothing to learn from.
    ///
    /// # Errors
    /// [`Error::Config`] with a sentence that says which data it takes.
    fn check(&self, sequences: &[Sequence]) -> Result<(), Error>;

    /// Sequences of what a batch size counts: 2 where they are pairs, else 1.
    fn sequences_per_unit(&self) -> usize;

    /// What the mean loss is a mean over.
    fn count(&self, batch: &MicroBatch) -> u64;

    /// Whether it compares with a reference model, so that [`Objective::loss`] must be told its log-likelihoods.
    fn compares(&self) -> bool;

    /// The sums of a micro-batch, and a tensor `[1]` whose gradient is that of the summed loss. `x`: `[rows, d_model]`,
    /// the last block's output; `reference`: log-likelihood of each sequence under the reference model, empty for an
    /// objective that does not compare.
    fn loss(&self, head: &Head, x: Tensor<2>, batch: &MicroBatch, reference: &[f64]) -> (Tensor<1>, Sums);
}

/// What a micro-batch, or a step, came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// The loss.
    pub loss: f64,
    /// Rewards of the chosen sequences, where pairs are compared.
    pub chosen: f64,
    /// Rewards of the rejected ones.
    pub rejected: f64,
    /// Pairs whose chosen sequence has the higher reward.
    pub wins: f64,
}

impl Sums {
    /// Numbers in [`Sums::to_array`].
    pub(crate) const LEN: usize = 4;

    /// As numbers to send.
    pub(crate) fn to_array(self) -> [f64; Self::LEN] {
        [self.loss, self.chosen, self.rejected, self.wins]
    }

    /// What [`Sums::to_array`] sent.
    pub(crate) fn from_slice(numbers: &[f64]) -> Self {
        Self { loss: numbers[0], chosen: numbers[1], rejected: numbers[2], wins: numbers[3] }
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.chosen += other.chosen;
        self.rejected += other.rejected;
        self.wins += other.wins;
    }
}

/// Negative log-likelihood of each sequence's trained tokens, `[1]` each. `x`: `[rows, d_model]`.
pub(crate) fn nll_of_each(head: &Head, x: &Tensor<2>, batch: &MicroBatch) -> Vec<Tensor<1>> {
    let one = |rows: std::ops::Range<usize>| {
        head.nll_sum(x.clone().slice([rows.clone()]), batch.targets[rows].into())
    };
    batch.rows_of_each().map(one).collect()
}

/// The number in a tensor.
pub(crate) fn scalar(x: Tensor<1>) -> f64 {
    x.into_data().try_into_vec_as::<f32>().expect("a loss is a readable number")[0] as f64
}
