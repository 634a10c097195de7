//! Models that another device than the CPU runs.
//!
//! The engine plans, samples and answers; a [`Backend`] says what its device takes for a model and then computes the
//! scheduled tokens, as [`Runner`](crate::runner::Runner) does on the CPU. Nothing else of the engine knows which it is.

use crate::error::Error;
use crate::runner::Forward;
use hearth_kernels::paged::KvType;
use hearth_memory::Ledger;
use hearth_weights::ModelConfig;

/// How much of a device an engine uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Tokens in one forward pass.
    pub rows: usize,
    /// Sequences in it.
    pub sequences: usize,
    /// Tokens of the longest sequence.
    pub context: usize,
    /// KV blocks.
    pub blocks: usize,
    /// KV blocks on the host besides.
    pub host_blocks: usize,
}

/// A model and the device that is to run it, before any of its memory is taken.
pub trait Backend {
    /// Shape and constants.
    fn config(&self) -> &ModelConfig;

    /// What everything is charged to.
    fn ledger(&self) -> &Ledger;

    /// What the KV cache stores.
    fn kv_type(&self) -> KvType;

    /// Bytes of weights on the device.
    fn weight_bytes(&self) -> u64;

    /// Bytes of what a step computes in.
    fn working_bytes(&self, room: Room) -> u64;

    /// Takes all memory and loads the weights, charging the ledger.
    ///
    /// # Errors
    /// Whatever keeps the device from running the model.
    fn start(self, room: Room) -> Result<Box<dyn Forward + Send>, Error>;
}
