//! The built binary, from outside: what it refuses and how, and the whole way on the tiny model.
#![forbid(unsafe_code)]

mod bad_input;
mod card;
mod ckpt;
mod crash;
mod draft;
mod end_to_end;
mod gpu;
mod kv;
mod launched;
mod plan;
mod ranks;
mod real_weights;
mod serving;
mod serving_on_card;
mod support;
