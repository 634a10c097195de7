//! The engine on the tiny models of `tests/fixtures`, held against `transformers`, the training forward and itself.

mod adapters;
mod budget;
mod embedding;
mod fixtures;
mod formats;
mod generation;
mod host_tier;
mod invariance;
mod scoring;
mod speculation;
mod streaming;
