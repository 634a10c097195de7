use hearth_memory::{Size, Tier};
use std::path::PathBuf;

/// Why a model could not be loaded or an engine not started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model is at fault.
    #[error(transparent)]
    Weights(#[from] hearth_weights::Error),
    /// The model could not be put together.
    #[error(transparent)]
    Model(#[from] hearth_model::Error),
    /// The ledger refused.
    #[error(transparent)]
    Memory(#[from] hearth_memory::Error),
    /// Weights, working memory and the least useful KV cache do not fit the device together.
    #[error(transparent)]
    TooSmall(Box<Shortfall>),
    /// Host memory or disk do not hold what the device does not.
    #[error(
        "{tier} tier: {what} take {needed} bytes, {free} free; the smallest budget that works is {smallest}"
    )]
    Placement {
        /// Which.
        tier: Tier,
        /// What does not fit.
        what: &'static str,
        /// Its bytes.
        needed: u64,
        /// Bytes left.
        free: u64,
        /// The smallest budget of that tier under which it would, in whole MiB.
        smallest: Size,
    },
    /// An adapter that cannot be laid over this model.
    #[error("{}: {what}", path.display())]
    Adapter {
        /// Where it lies.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The device has no room for an adapter.
    #[error(
        "{}: the adapter takes {bytes} bytes, the device tier has {free} free; unload another, or keep more free for \
         adapters",
        path.display()
    )]
    AdapterTooLarge {
        /// Where it lies.
        path: PathBuf,
        /// What it takes.
        bytes: u64,
        /// Bytes left.
        free: u64,
    },
    /// A transformer block could not be read from disk when its turn came. The next pass reads it again.
    #[error("transformer block {block} could not be streamed: {cause}")]
    Streaming {
        /// Which.
        block: usize,
        /// What went wrong.
        cause: Box<Error>,
    },
    /// Rows of an embedding that stays on disk could not be read. The next step reads again.
    #[error("rows of the embedding could not be streamed: {cause}")]
    Table {
        /// What went wrong.
        cause: Box<Error>,
    },
    /// A configuration that cannot work.
    #[error("{0}")]
    Config(String),
    /// Tokens the model does not have.
    #[error(transparent)]
    Request(#[from] crate::api::SubmitError),
    /// A device other than the CPU.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// The operating system gave no thread.
    #[error("the engine's thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// What does not fit the device, part by part, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "device tier: needs {} bytes (weights {weights}, working memory {working}, KV cache for {tokens} tokens {kv}), \
     {free} free; the smallest budget that works is {}",
    weights + working + kv,
    self.smallest()
)]
pub struct Shortfall {
    /// Weights still to be loaded; 0 when they are.
    pub weights: u64,
    /// Values between layers in one step.
    pub working: u64,
    /// Tokens the smallest KV cache would hold.
    pub tokens: usize,
    /// Its bytes.
    pub kv: u64,
    /// Bytes held already, by anything.
    pub used: u64,
    /// Bytes left.
    pub free: u64,
}

impl Shortfall {
    /// The smallest device budget under which this would fit, in whole MiB.
    pub fn smallest(&self) -> Size {
        const MIB: u64 = 1 << 20;
        Size((self.used + self.weights + self.working + self.kv).next_multiple_of(MIB))
    }
}
