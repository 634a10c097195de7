//! Continuous batching over a paged KV cache.
//!
//! # Layout
//! - [`api`]: what callers exchange with the engine: [`api::Request`], [`api::Event`], [`api::EngineHandle`].
//! - `kv`: KV blocks, block tables, the [`AttentionContext`](hearth_model::AttentionContext) over them.
//! - `scheduler`: which tokens of which sequences the next forward pass holds. Knows no tensors.
//! - `sampler`: logits → token, deterministic for a seed.
//! - `runner`: runs the model over one step's tokens.
//! - `engine`: the loop on its own thread.
#![forbid(unsafe_code)]
pub mod api;
