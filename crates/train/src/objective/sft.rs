//! Supervised fine-tuning and pre-training: the next token's cross-entropy.

use super::{Objective, Sums, scalar};
use crate::Error;
use crate::micro_batch::MicroBatch;
use burn::tensor::Tensor;
use hearth_data::Sequence;
use hearth_model::layers::Head;

/// `Σ −log p(token | tokens before it)` over the trained tokens; the mean is over these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sft;

impl Objective for Sft {
    fn check(&self, sequences: &[Sequence]) -> Result<(), Error> {
        if sequences.iter().all(|sequence| sequence.half.is_none()) {
            return Ok(());
        }
        Err(Error::Config(
            "the data is preference pairs, of which next-token prediction would learn the rejected replies too; use \
             [method] kind = \"dpo\", or data of another format"
                .into(),
        ))
    }

    fn sequences_per_unit(&self) -> usize {
        1
    }

    fn count(&self, batch: &MicroBatch) -> u64 {
        batch.trained()
    }

    fn compares(&self) -> bool {
        false
    }

    fn loss(&self, head: &Head, x: Tensor<2>, batch: &MicroBatch, _: &[f64]) -> (Tensor<1>, Sums) {
        let nll = head.nll_sum(x, batch.targets.clone());
        let sums = Sums { loss: scalar(nll.clone()), ..Sums::default() };
        (nll, sums)
    }
}
