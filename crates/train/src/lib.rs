//! Training: the step loop and everything that makes it exact, resumable and observable.
//!
//! # Layout
//! - [`config`]: what a run is told.
//! - [`Trainer`]: the step, the run around it, saving and resuming.
//! - [`accelerator`]: the same run where something else computes the steps, a card.
//! - [`objective`]: what the loss is made of; `reference`: what the first weights said of the data.
//! - [`block_loop`]: forward and backward, one transformer block's gradients at a time, over [`micro_batch`]es.
//! - `reduce`: gradients summed over micro-batches and ranks; `update`: the optimizer's pass over all state, `beside`: the same
//!   unit by unit while the backward pass goes on.
//! - [`params`]: f32 masters as flat slices, frozen weights beside them; `source`, `lora`: how blocks get them.
//! - [`optim`], [`sched`], [`gradients`]: arithmetic over flat f32 slices, nothing of tensors.
//! - [`checkpoint`]: complete or invisible; [`metrics`], [`tensorboard`]: what a run leaves to look at; [`observer`]: who watches.
//! - [`flops`]: what a step's mathematics needs.
//!
//! # Invariants
//! - State is one flat f32 slice per parameter for each of master, first and second moment: it can be cut anywhere.
//! - Every sum has one documented order ([`gradients`]), every random number is drawn by counter: a run does not
//!   depend on threads, recomputation, where it was stopped, or who computes which micro-batch.
//! - A checkpoint holds everything the next step depends on, and is complete or invisible.
#![forbid(unsafe_code)]

pub mod accelerator;
pub mod activations;
pub mod block_loop;
pub mod checkpoint;
pub mod config;
pub mod flops;
pub mod gradients;
pub mod layout;
pub mod loss_scale;
pub mod metrics;
pub mod micro_batch;
pub mod objective;
pub mod observer;
pub mod optim;
pub mod params;
pub mod plan;
pub mod reduce;
pub mod sched;
pub mod sizes;
pub mod tensorboard;

mod batches;
mod beside;
mod copies;
mod disk;
mod error;
mod flat;
mod frozen;
mod gate;
mod lora;
mod random;
mod reference;
mod run;
mod run_dir;
mod saving;
mod source;
mod state;
mod state_values;
mod trainer;
mod update;

pub use accelerator::{AcceleratedTrainer, Accelerator, AcceleratorSetup, Failure, Measure};
pub use activations::{Activations, Pace};
pub use checkpoint::{Companion, Disk, Files, Progress};
pub use config::{
    CheckpointConfig, Compute, LogConfig, LoraConfig, LossScale, Offload, Place, Recompute, TrainConfig,
};
pub use error::Error;
pub use layout::{Layout, Param};
pub use metrics::{MemoryReport, Rewards, StepReport};
pub use objective::{Dpo, ObjectiveConfig};
pub use observer::Observer;
pub use optim::{AdamW, OptimConfig};
pub use params::ParamStore;
pub use reference::REFERENCE_FILE;
pub use run::{Summary, companions};
pub use sched::{Schedule, ScheduleKind};
pub use state::Which;
pub use trainer::{Setup, Trainer};
