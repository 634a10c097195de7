//! Direct preference optimisation (arXiv 2305.18290): make the chosen reply likelier than the rejected one, by more
//! than the model that training started from does.
//!
//! With π a sequence's log-likelihood over its trained tokens and ρ the same under the reference model, a sequence's
//! *reward* is `β(π − ρ)`, a pair's *margin* `h` the chosen reward less the rejected one, and its loss
//! `−(1 − ε) log σ(h) − ε log σ(−h)`, where ε, the label smoothing, is the share of pairs believed to be labelled the
//! wrong way round (cDPO, <https://ericmitchell.ai/cdpo.pdf>).

use super::{Objective, Sums, nll_of_each, scalar};
use crate::Error;
use crate::micro_batch::MicroBatch;
use burn::tensor::Tensor;
use hearth_data::{Half, Sequence};
use hearth_model::layers::Head;
use serde::{Deserialize, Serialize};

/// Settings of DPO; the mean is over pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dpo {
    /// β: how dear it is to leave the reference model; smaller strays farther.
    pub beta: f64,
    /// ε: share of pairs believed to be labelled the wrong way round, below one half.
    pub label_smoothing: f64,
}

impl Default for Dpo {
    fn default() -> Self {
        Self { beta: 0.1, label_smoothing: 0.0 }
    }
}

impl Dpo {
    pub(super) fn validate(&self) -> Result<(), Error> {
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return Err(Error::Config(format!("method.beta = {} must be a number above 0", self.beta)));
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let smoothing = self.label_smoothing;
            return Err(Error::Config(format!(
                "method.label_smoothing = {smoothing} must be at least 0 and below 0.5: it is the share of pairs \
                 labelled the wrong way round"
            )));
        }
        Ok(())
    }

    /// Loss of a pair with margin `h`.
    fn pair_loss(&self, h: f64) -> f64 {
        (1.0 - self.label_smoothing) * softplus(-h) + self.label_smoothing * softplus(h)
    }

    /// Derivative of a pair's loss by the chosen negative log-likelihood; by the rejected one it is the opposite.
    fn slope(&self, h: f64) -> f64 {
        self.beta * ((1.0 - self.label_smoothing) * sigmoid(-h) - self.label_smoothing * sigmoid(h))
    }
}

impl Objective for Dpo {
    fn check(&self, sequences: &[Sequence]) -> Result<(), Error> {
        let whole = |pair: &[Sequence]| match pair {
            [chosen, rejected] => {
                (chosen.half, rejected.half) == (Some(Half::Chosen), Some(Half::Rejected))
                    && chosen.example == rejected.example
            }
            _ => false,
        };
        if sequences.chunks(2).all(whole) {
            return Ok(());
        }
        Err(Error::Config(
            "[method] kind = \"dpo\" learns from pairs of a chosen and a rejected reply, and the data has other \
             sequences; use format = \"preference\", or [method] kind = \"sft\""
                .into(),
        ))
    }

    fn sequences_per_unit(&self) -> usize {
        2
    }

    fn count(&self, batch: &MicroBatch) -> u64 {
        batch.sequences.len() as u64 / 2
    }

    fn compares(&self) -> bool {
        true
    }

    /// Full fine-tuning keeps one gradient of the head's matrix per sequence until the pair's slope is known.
    fn loss(&self, head: &Head, x: Tensor<2>, batch: &MicroBatch, reference: &[f64]) -> (Tensor<1>, Sums) {
        let nll = nll_of_each(head, &x, batch);
        assert_eq!(nll.len(), reference.len(), "each sequence is compared with its reference");
        let mut sums = Sums::default();
        let pairs = nll.chunks_exact(2).zip(reference.chunks_exact(2)).map(|(nll, reference)| {
            let reward = |i: usize| self.beta * (-scalar(nll[i].clone()) - reference[i]);
            let (chosen, rejected) = (reward(0), reward(1));
            let margin = chosen - rejected;
            let wins = if chosen > rejected { 1.0 } else { 0.0 };
            sums += Sums { loss: self.pair_loss(margin), chosen, rejected, wins };
            (nll[0].clone() - nll[1].clone()) * self.slope(margin) as f32
        });
        let surrogate = pairs.reduce(|sum, pair| sum + pair).expect("a micro-batch has a pair");
        (surrogate, sums)
    }
}

/// `log(1 + eˣ) = −log σ(−x)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_the_derivative_of_the_loss() {
        for label_smoothing in [0.0, 0.1, 0.4] {
            let dpo = Dpo { beta: 0.3, label_smoothing };
            for h in [-30.0, -2.0, 0.0, 0.7, 25.0] {
                // The margin falls by β with the chosen negative log-likelihood.
                let numeric = -dpo.beta * (dpo.pair_loss(h + 1e-5) - dpo.pair_loss(h - 1e-5)) / 2e-5;
                assert!((dpo.slope(h) - numeric).abs() < 1e-9, "{h}: {} {numeric}", dpo.slope(h));
            }
        }
    }

    #[test]
    fn the_loss_starts_at_log_two_and_stays_finite_far_out() {
        let dpo = Dpo::default();
        assert_eq!(dpo.pair_loss(0.0), 2f64.ln());
        assert_eq!(dpo.pair_loss(-1e4), 1e4);
        assert_eq!(dpo.pair_loss(1e4), 0.0);
        assert_eq!((dpo.slope(-1e4), dpo.slope(1e4)), (dpo.beta, 0.0));
    }

    #[test]
    fn settings_beyond_their_range_are_refused_with_key_and_value() {
        let message = |dpo: Dpo| dpo.validate().expect_err("refused").to_string();
        assert!(message(Dpo { beta: 0.0, ..Dpo::default() }).contains("method.beta = 0 "));
        assert!(
            message(Dpo { label_smoothing: 0.5, ..Dpo::default() }).contains("method.label_smoothing = 0.5")
        );
    }
}
