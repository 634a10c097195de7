//! Byte budgets and the ledger that keeps them.
//!
//! # Layout
//! - [`size`]: [`Size`], a number of bytes as users write it: `600MiB`, `2GiB`.
//! - [`tier`]: [`Tier`], where bytes lie, and [`Kind`], what they are.
//! - [`budget`]: [`Budget`], the hard limit of each tier: `device=600MiB,host=1GiB`.
//! - [`ledger`]: [`Ledger`], who holds which bytes; refuses what does not fit.
//!
//! # Invariants
//! This crate counts and moves bytes, never tensors. A large allocation is charged *before* it is made and
//! refunded when its [`Charge`] is dropped, so that the sum of live charges never exceeds the budget.
#![forbid(unsafe_code)]

pub mod budget;
pub mod ledger;
pub mod size;
pub mod tier;

mod error;

pub use budget::Budget;
pub use error::Error;
pub use ledger::{Charge, Ledger};
pub use size::Size;
pub use tier::{Kind, Tier};
