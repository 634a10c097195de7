//! The commands, one file each: `run(args, ui)` does the work and returns what was found.

pub mod bench;
pub mod chat;
pub mod ckpt;
pub mod convert;
pub mod doctor;
pub mod eval;
pub mod fetch_data;
pub mod generate;
pub mod gpu;
pub mod inspect;
pub mod logits;
pub mod plan;
pub mod quickstart;
pub mod replay;
pub mod serve;
pub mod train;
pub mod verify;
