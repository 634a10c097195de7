//! hearth: a language model's whole way, as functions. The binary `hearth` is a thin user of this crate.
//!
//! # Layout
//! - [`commands`]: one file per command; each has its arguments, its report and `run`.
//! - [`recipe`], [`resolve`]: what a run is told, and what that means for each room.
//! - [`ranks`], [`training`]: the ranks of a run; what each of them trains, and within which budget.
//! - [`card`]: a recipe's run on an NVIDIA card.
//! - [`tiers`]: what a ledger held in each tier, in the words of reports.
//! - [`open`], [`running`]: a model on disk with its words; the same in memory, answering.
//! - [`fingerprint`]: which weights these are.
//! - [`golden`]: prompts with the logits a bundle must give.
//! - [`fetch`], [`corpus`]: what the quickstart needs from elsewhere.
//! - [`probe`], [`machine`]: what this machine can do and what it says about itself.
//! - [`ui`], [`exit`], [`interrupt`]: output, exit codes, signals.
#![forbid(unsafe_code)]

pub mod card;
pub mod commands;
pub mod corpus;
pub mod exit;
pub mod fetch;
pub mod fingerprint;
pub mod gguf_vocabulary;
pub mod golden;
pub mod gpus;
pub mod interrupt;
pub mod machine;
pub mod open;
pub mod probe;
pub mod ranks;
pub mod recipe;
pub mod resolve;
pub mod running;
pub mod running_on_card;
pub mod tiers;
pub mod training;
pub mod ui;
