//! Process groups: how the ranks of one run exchange buffers.
//!
//! # Layout
//! - [`group`]: [`ProcessGroup`], the contract: shapes, order of sums, failures.
//! - [`threads`]: the ranks are threads of this process; the default.
//! - [`backend`]: [`BACKENDS`], the registry; `tests/conformance.rs` loops over it.
//! - [`error`]: [`Error`] and [`Operation`].
//! - `call`: what a rank asked for, and the one check of all ranks' calls against each other.
//! - `tree`: the one order in which ranks are summed.
//!
//! # Invariants
//! - Sums are taken in a fixed tree over the rank index, never in order of arrival: results do not depend on timing,
//!   nor on the backend.
//! - No rank waits for one that has left, and a call that does not fit is refused on every rank, not on one.
//! - There is no unsafe code: ranks exchange owned copies.
#![deny(unsafe_code)]

pub mod backend;
pub mod buffer;
pub mod error;
pub mod group;
pub mod measure;
pub mod mpi;
pub mod ordered;
pub mod threads;
pub mod watchdog;

mod call;
mod tree;

pub use backend::{BACKENDS, Backend, open};
pub use buffer::Buffer;
pub use error::{Error, Operation, SCRATCH_BYTES};
pub use group::ProcessGroup;
pub use measure::{Rate, measure};
pub use ordered::{Ordered, Pending, single};
pub use watchdog::{DEFAULT_TIMEOUT, Diagnosis, EXIT_CODE, Watchdog};
