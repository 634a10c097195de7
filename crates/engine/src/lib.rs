//! Continuous batching over a paged KV cache.
//!
//! # Layout
//! - [`api`]: what callers exchange with the engine: [`api::Request`], [`api::Event`], [`api::EngineHandle`].
//! - [`engine`]: the handle, and the loop on its own thread.
//! - [`scheduler`]: which tokens of which sequences the next forward pass holds. Knows no tensors.
//! - [`kv`]: which KV blocks are free, shared or remembered: the prefix cache.
//! - [`backend`]: models that another device than the CPU runs.
//! - [`runner`]: runs the model over one step's tokens, attention through the paged cache.
//! - [`sampler`]: logits → token, deterministic for a seed; log-probabilities.
//! - [`loader`]: weights from disk into panel layout, within the device's budget.
//! - [`footprint`]: how many bytes serving takes.
//! - [`forecast`]: how fast a placement can decode, and what it waits for.
//! - [`placement`]: which tier each transformer block lies in.
//! - [`streaming`]: blocks that pass through the device while the model runs.
//! - [`adapter`]: LoRA adapters that rows of a pass have of their own.
//! - [`speculation`]: several tokens of a sequence in one forward pass.
//! - `draft`: a smaller model that guesses them.
//! - [`score`]: logits of given tokens, through the same runner.
//! - `pool`: the vectors of a prompt's tokens → one.
//! - `sequence`: one request on its way from prompt to end.
//!
//! # A request's way
//! ```text
//! submit ─► scheduler: queue ─► KV blocks ─► step after step:
//!     plan (decodes, then prompt chunks) ─► runner: forward ─► sampler: token ─► event to the caller
//! ```
//!
//! # Invariants
//! - A response depends on its request alone: not on batch mates, chunking, the blocks it got, or what of
//!   its prompt was found computed. Kernels reduce in
//!   one fixed order per row; random numbers are counted by position.
//! - Nothing runs out while running: bytes are charged at start; who finds no KV block makes the youngest give its own up.
//! - Every accepted request ends with an event, or was cancelled.
#![forbid(unsafe_code)]

pub mod adapter;
pub mod api;
pub mod backend;
pub mod engine;
pub mod footprint;
pub mod forecast;
pub mod kv;
pub mod loader;
pub mod placement;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod score;
pub mod speculation;
pub mod streaming;

mod draft;
mod error;
mod pool;
mod sequence;

pub use adapter::{Adapter, AdapterLoader, AdapterSize};
pub use backend::{Backend, Room};
pub use engine::{Engine, EngineConfig, EngineHandle};
pub use error::{Error, Shortfall};
pub use hearth_kernels::Activations;
pub use hearth_kernels::paged::KvType;
pub use loader::{Arithmetic, LoadProgress, LoadedModel, ResidentWeights};
pub use placement::{Aim, Crowd};
pub use score::Scorer;
pub use speculation::Speculation;
pub use streaming::{Streamed, TableBytes, WeightPlan};
