//! Process groups: how the ranks of one run exchange buffers.
//!
//! A program asks [`open`] for its ranks: threads of this process, or the one rank that this process is if an MPI
//! launcher started it. It gives each to [`Ordered::start`], computes, and collects what it called for.
//!
//! # Layout
//! - [`group`]: [`ProcessGroup`], the contract of a backend: shapes, order of sums, buffers, failures.
//! - [`ordered`]: [`Ordered`], which runs operations in order beside the computation; what programs use.
//! - [`watchdog`]: how long an operation may last, and the [`Diagnosis`] of one that lasts longer.
//! - [`threads`]: the ranks are threads of this process; the default.
//! - [`mpi`]: the ranks are processes under `mpirun`, `mpiexec` or `srun`, on one machine or several.
//! - [`backend`]: [`BACKENDS`], the registry.
//! - [`buffer`]: what operations own while they run.
//! - [`mod@measure`]: how fast buffers move here.
//! - [`error`]: [`Error`] and [`Operation`], with the bytes that each holds.
//! - `call`: what a rank asked for, and the one check of all ranks' calls against each other.
//! - `tree`: the one order in which ranks are summed.
//!
//! `tests/suite` holds the promises as programs for any world. `tests/conformance.rs` runs them on threads,
//! `tests/mpi.rs` under Open MPI and MPICH, `.ci/two-hosts` over TCP between network namespaces.
//!
//! # Invariants
//! - Sums are taken in a fixed tree over the rank index, never in order of arrival: results do not depend on timing,
//!   nor on the backend.
//! - No rank waits for one that has left, nor longer than the watchdog allows, and a call that does not fit is refused
//!   on every rank, not on one.
//! - Nothing of MPI is needed to build or to run without a launcher.
//! - There is no unsafe code but in `mpi::ffi`: functions that are found at run time have no safe signature. Ranks that
//!   are threads share owned buffers.
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

pub use backend::{BACKENDS, Backend, Ranks, open};
pub use buffer::Buffer;
pub use error::{Error, Operation, SCRATCH_BYTES};
pub use group::ProcessGroup;
pub use measure::{Rate, measure};
pub use ordered::{Ordered, Pending, single};
pub use watchdog::{DEFAULT_TIMEOUT, Diagnosis, EXIT_CODE, Watchdog};
