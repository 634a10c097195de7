//! A card put to work: models served and decoded on it, its kernels held against the CPU's, its speed measured.
//!
//! # Layout
//! - [`bench`]: its speed against its own copies.
//! - [`checks`]: every kernel against the CPU's.
//! - [`model`]: [`CardModel`], a model's files decoded on a card.
//! - [`serving`]: [`CardBackend`], a card as the engine's device.
//! - [`training`]: [`training::CardTrainer`], a model's files trained on a card.
//!
//! # Invariants
//! Nothing here needs a card to be built or tested: the driver is found at run time, and tests bring one that runs kernels
//! on the CPU.
#![forbid(unsafe_code)]

pub mod bench;
pub mod checks;
pub mod model;
pub mod serving;
pub mod training;

mod error;

pub use error::Error;
pub use model::CardModel;
pub use serving::CardBackend;
