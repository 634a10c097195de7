//! What the forward and backward pass hold beside weights and gradients.
//!
//! The numbers are not estimated: [`Activations::measure`] runs one transformer block, the head and the embedding at the
//! run's own shapes and reads the heap. All blocks of a model have one shape, so a run's activations are sums of these.

use crate::Error;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use serde::Serialize;

/// What the model is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Keeping a block's input until its backward pass.
    Input,
    /// Keeping a block's tape until its backward pass; making it is the same size.
    Tape,
    /// A block without a tape.
    BlockForward,
    /// A block's backward pass over the tape that was kept.
    BlockBackward,
    /// A block's forward pass with a tape, and its backward pass.
    BlockAgain,
    /// The head without a tape.
    HeadForward,
    /// The head, forward and backward.
    Head,
    /// The embedding's gradient.
    Embedding,
}

/// Bytes of each phase, for one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Activations {
    /// A block's input.
    pub input: u64,
    /// A block's tape.
    pub tape: u64,
    /// Most that a block's forward pass holds beside its input.
    pub block_forward: u64,
    /// Most that a block's backward pass holds beside its tape.
    pub block_backward: u64,
    /// Most that a block's forward pass with a tape and its backward pass hold.
    pub block_again: u64,
    /// Most that the head's loss holds.
    pub head_forward: u64,
    /// Most that the head's loss and gradients hold.
    pub head: u64,
    /// Most that the embedding's gradient holds.
    pub embedding: u64,
    /// What is left of a block's backward pass when its gradients are handed out.
    pub block_gradients: u64,
    /// The same of the head.
    pub head_gradients: u64,
    /// The same of the embedding.
    pub embedding_gradients: u64,
}

impl Activations {
    /// Bytes of a phase at its height, and when only gradients are left.
    fn bytes(&self, phase: Phase) -> (u64, u64) {
        match phase {
            Phase::Input => (self.input, 0),
            Phase::Tape => (self.tape, 0),
            Phase::BlockForward => (self.block_forward, 0),
            Phase::BlockBackward => (self.block_backward, self.block_gradients),
            Phase::BlockAgain => (self.block_again, self.block_gradients),
            Phase::HeadForward => (self.head_forward, 0),
            Phase::Head => (self.head, self.head_gradients),
            Phase::Embedding => (self.embedding, self.embedding_gradients),
        }
    }
}

/// Charges activations to the device as they come and go.
#[derive(Clone)]
pub struct Meter {
    ledger: Ledger,
    sizes: Activations,
}

impl Meter {
    /// Charges `sizes` to `ledger`.
    pub fn new(ledger: Ledger, sizes: Activations) -> Self {
        Self { ledger, sizes }
    }

    /// What it charges.
    pub fn sizes(&self) -> &Activations {
        &self.sizes
    }

    /// Begins a phase.
    ///
    /// # Errors
    /// When the device's budget does not hold it.
    pub fn enter(&self, phase: Phase) -> Result<Working, Error> {
        let (height, gradients) = self.sizes.bytes(phase);
        let charge = self.ledger.charge(Tier::Device, Kind::Activations, height)?;
        Ok(Working { charge, gradients: gradients.min(height) })
    }

    /// A gradient that waits for its other half.
    pub(crate) fn hold(&self, gradient: &[f32]) -> Result<Working, Error> {
        let bytes = size_of_val(gradient) as u64;
        Ok(Working { charge: self.ledger.charge(Tier::Device, Kind::Gradients, bytes)?, gradients: bytes })
    }
}

/// A phase under way.
pub struct Working {
    charge: Charge,
    gradients: u64,
}

impl Working {
    /// The tape is gone, its gradients are there.
    pub(crate) fn only_gradients(&mut self) {
        self.charge.shrink_to(self.gradients);
    }

    /// Somebody else has `bytes` of it now.
    pub(crate) fn give(&mut self, bytes: usize) {
        self.charge.shrink_to(self.charge.bytes().saturating_sub(bytes as u64));
    }
}
