//! An OpenAI-compatible HTTP server over an engine handle.
//!
//! ```text
//! bytes ─request─► checked options + prompts ─generation─► updates ─response─► JSON or SSE
//! ```
//!
//! # Layout
//! - [`config`], [`state`]: what the server is told, what it holds; it listens before the model is loaded.
//! - [`serve`], `connection`: accept, drain, stop. `router`: which path leads where; `routes`: one file per group of paths.
//! - `request`: JSON → checked values. A field that is known and wrong is a 400 that names it; an unknown one is
//!   ignored, because clients send many.
//! - `adapters`: which are loaded, and which one a request's `model` means.
//! - `constrain`: output that must conform to a format.
//! - `generation`: one task per sequence turns engine events into text: decoding, stop strings, offsets.
//! - `tools`: tool calls, one file per way of writing them.
//! - `response`: the shapes clients rely on, one file per API, and SSE.
//! - `error`: every failure as `{"error": {message, type, param, code}}`. Clients retry 408, 409, 429 and ≥ 500, so
//!   what would fail again is another 4xx.
//! - [`record`], [`replay`]: what became of each sequence; the same once more.
//! - `room`: bytes for bodies and answers, reserved before they are needed.
//! - `auth`, `request_id`, `metrics`: around every request.
//!
//! # Invariants
//! - Whoever drops the receiving end of a generation cancels it: a client that goes away frees its KV blocks.
//! - Nothing that might be the beginning of a stop string is sent before it is known not to be.
//! - Token ids from clients are checked against the vocabulary before the engine sees them.
#![forbid(unsafe_code)]

mod adapters;
mod auth;
pub mod config;
mod connection;
mod constrain;
pub mod error;
mod generation;
mod metrics;
pub mod record;
pub mod replay;
mod request;
mod request_id;
mod response;
mod room;
mod router;
mod routes;
pub mod serve;
pub mod state;
mod tools;

pub use adapters::check_adapter_name;
pub use config::ServerConfig;
pub use constrain::format::Format;
pub use error::ServeError;
pub use router::router;
pub use serve::serve;
pub use state::{AppState, Service};
pub use tools::tool_formats;
