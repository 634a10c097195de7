//! Training: the step loop and everything that makes it exact, resumable and observable.
//!
//! # Layout
//! - [`config`]: what a run is told.
//! - [`optim`], [`sched`], [`gradients`]: arithmetic over flat f32 slices, nothing of tensors.
//! - [`checkpoint`]: complete or invisible; [`metrics`], [`tensorboard`]: what a run leaves to look at.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod gradients;
pub mod metrics;
pub mod optim;
pub mod sched;
pub mod tensorboard;

mod error;
mod random;

pub use config::{CheckpointConfig, Compute, LogConfig, LoraConfig, Recompute, TrainConfig};
pub use error::Error;
pub use optim::AdamW;
pub use sched::{Schedule, ScheduleKind};
