//! Training: the step loop and everything that makes it exact, resumable and observable.
//!
//! # Layout
//! - [`config`]: what a run is told.
//! - [`optim`], [`sched`], [`gradients`]: arithmetic over flat f32 slices, nothing of tensors.
//! - [`error`](Error): what can go wrong.
#![forbid(unsafe_code)]

pub mod config;
pub mod gradients;
pub mod optim;
pub mod sched;

mod error;
mod random;

pub use config::{CheckpointConfig, Compute, LogConfig, LoraConfig, Recompute, TrainConfig};
pub use error::Error;
pub use optim::AdamW;
pub use sched::{Schedule, ScheduleKind};
