//! The server over real HTTP on 127.0.0.1, with the real engine and the tiny chat model.

mod adapters;
mod chat;
mod completions;
mod constrained;
mod disk;
mod embeddings;
mod errors;
mod fuzz;
mod harness;
mod lifecycle;
mod openapi;
mod operations;
mod patience;
mod schema;
mod tools;
