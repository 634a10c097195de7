//! Every kernel on the card at hand against the CPU's kernels: the same bits where they promise the same bits.
//!
//! # Layout
//! - [`values`]: types, numbers and comparisons.
//! - `pointwise`, `products`, `attention`, `training`: the checks of kernels; `steps`: of whole training steps. A new one is one line in [`CHECKS`].

mod attention;
mod pointwise;
mod products;
mod steps;
mod training;
pub mod values;

use hearth_cuda::runtime::{Device, DeviceBuffer, Error, Stream};
use hearth_memory::Kind;
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;

/// Why a check fails.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The card could not do it.
    #[error(transparent)]
    Card(#[from] Error),
    /// It did something else.
    #[error("{0}")]
    Differs(String),
}

/// A claim about kernels, and what holds a card to it.
pub struct Check {
    /// In words.
    pub claim: &'static str,
    run: fn(&On) -> Result<(), Failure>,
}

/// Every claim.
pub static CHECKS: &[Check] = &[
    Check { claim: "RMSNorm and its gradients are close to the CPU's", run: pointwise::norms },
    Check { claim: "RoPE has the CPU's bits, both ways", run: pointwise::rope },
    Check { claim: "SwiGLU and its gradients have the CPU's bits", run: pointwise::swiglu },
    Check { claim: "sums with repeated rows are exact", run: pointwise::add },
    Check { claim: "dropout has the trainer's mask", run: pointwise::dropout },
    Check { claim: "embeddings and their gradients have the CPU's bits", run: pointwise::embedding },
    Check { claim: "activations are quantized to the CPU's bits", run: products::quantized_rows },
    Check { claim: "every block format decodes to the reference's bits", run: products::dequantized },
    Check {
        claim: "quantized products have the CPU's bits, by dp4a and by tensor cores",
        run: products::quantized,
    },
    Check {
        claim: "dense products have the CPU's bits in f32 and are close in 16 bits",
        run: products::dense,
    },
    Check { claim: "cross-entropy and its slopes are close to the CPU's", run: products::cross_entropy },
    Check { claim: "attention and its gradients are close to the CPU's", run: attention::packed },
    Check { claim: "attention through the paged cache is close to the CPU's", run: attention::paged },
    Check { claim: "AdamW has the CPU's bits for every type of state and copy", run: training::adamw },
    Check { claim: "casts, unscaling and sums of squares have the CPU's bits", run: training::casts },
    Check {
        claim: "sampling is greedy, refuses what is no number and draws the same again",
        run: training::sampling,
    },
    Check { claim: "every gradient of a model is the slope of its loss", run: steps::slopes },
    Check {
        claim: "gradients of a model in bf16 are those in f32 within their rounding",
        run: steps::rounded,
    },
    Check { claim: "training steps have the same bits wherever their state lies", run: steps::layouts },
];

/// What became of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The claim.
    pub claim: &'static str,
    /// Why it does not hold; nothing when it does.
    pub failure: Option<String>,
    /// How long it took, compiling its kernels included.
    pub seconds: f64,
}

/// Runs every check, one after another; after a lost card the others are not tried.
///
/// # Errors
/// When the card cannot even make a stream.
pub fn run(card: &Arc<Device>, mut each: impl FnMut(&Outcome)) -> Result<Vec<Outcome>, Error> {
    let on = On { stream: card.stream()? };
    let mut outcomes = Vec::new();
    for check in CHECKS {
        let start = Instant::now();
        let failure = (check.run)(&on).err();
        let lost = matches!(&failure, Some(Failure::Card(error)) if error.is_lost());
        let seconds = start.elapsed().as_secs_f64();
        let outcome = Outcome { claim: check.claim, failure: failure.map(|f| f.to_string()), seconds };
        each(&outcome);
        outcomes.push(outcome);
        if lost {
            break;
        }
    }
    Ok(outcomes)
}

/// A stream, and memory to check with.
struct On {
    stream: Stream,
}

impl On {
    fn up<T: values::Plain>(&self, values: &[T]) -> Result<DeviceBuffer<T>, Error> {
        DeviceBuffer::from_host(&self.stream, Kind::Activations, values)
    }

    /// NaNs, or whatever has only bits set: what is not written shows.
    fn room<T: values::Plain>(&self, len: usize) -> Result<DeviceBuffer<T>, Error> {
        self.up(&vec![T::UNWRITTEN; len])
    }

    fn down<T: values::Plain>(&self, buffer: &DeviceBuffer<T>) -> Result<Vec<T>, Error> {
        buffer.to_host(&self.stream)
    }
}
