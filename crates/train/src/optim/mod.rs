//! Optimizers over flat f32 slices: one file each, one arithmetic wherever the slice lies.

mod adamw;

pub use adamw::{AdamW, Moments, Update};
