//! The contract of a process group.

use std::sync::Arc;
use std::time::Duration;

use crate::{Buffer, Error};

/// One rank's end of a process group.
///
/// Every rank makes the same calls in the same order. A call blocks until every rank has made it. Reductions are over
/// f32 (16-bit gradients are summed in f32); what only moves is bytes, so that one method serves every element type.
/// A program rarely calls these methods itself: [`Ordered`](crate::Ordered) does, with types, and does not block.
///
/// # Order of sums
/// Reductions sum each element over ranks as `sum(0..n) = sum(0..h) + sum(h..n)`, `h` the largest power of two below
/// `n`: `(x₀ + x₁) + x₂` for three ranks, `(x₀ + x₁) + (x₂ + x₃)` for four. Nothing else is added, no zero either. The
/// bits depend neither on timing nor on where the element lies in the buffer. If every rank first sums, in this tree,
/// the same power-of-two number of consecutive terms, the result is this tree over all the terms.
///
/// # Buffers
/// Buffers are handed over and come back as results. When a call returns, nothing of it is held but its result: every
/// rank has finished with every other rank's input. What is held while it runs says
/// [`Operation::held_bytes`](crate::Operation::held_bytes).
///
/// # Errors
/// Every rank gets the same [`Error`], even when only one of them passed what does not fit, so that none waits for
/// one that gave up:
/// - [`Error::Diverged`] if the ranks called different operations,
/// - [`Error::LengthMismatch`] if their inputs differ in length,
/// - [`Error::NotDivisible`] and [`Error::OutputLength`] as the method says,
/// - [`Error::PeerLeft`] if a rank was dropped, by returning or by panicking, before it made the call; then and in
///   every later call,
/// - [`Error::TimedOut`], each rank with its own diagnosis, if the call lasted longer than
///   [`set_timeout`](Self::set_timeout) allows; in every later call [`Error::Aborted`].
///
/// The buffers of an operation that fails are gone.
pub trait ProcessGroup: Send {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// The sum of `buffer` `[n]` over ranks, the same bits on every rank.
    fn all_reduce(&mut self, buffer: Vec<f32>) -> Result<Vec<f32>, Error>;

    /// Sums `input` `[world_size × n]` over ranks and gives rank `r` part `r` `[n]` of the sum.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] if `input` does not divide by the world size.
    fn reduce_scatter(&mut self, input: Vec<f32>) -> Result<Vec<f32>, Error>;

    /// Puts the `partition` `[n]` bytes of rank 0, 1, … one behind the other into `output` `[world_size × n]`, which
    /// it gives back.
    ///
    /// # Errors
    /// [`Error::OutputLength`] if `output` does not hold one partition per rank.
    fn all_gather(
        &mut self,
        partition: Box<dyn Buffer>,
        output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error>;

    /// Sends part `r` of `input` `[world_size × n]` bytes to rank `r`; part `s` of `output` `[world_size × n]`, which
    /// it gives back, comes from rank `s`.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] if `input` does not divide by the world size, [`Error::OutputLength`] if `output` is
    /// not as long as `input`.
    fn all_to_all(
        &mut self,
        input: Box<dyn Buffer>,
        output: Box<dyn Buffer>,
    ) -> Result<Box<dyn Buffer>, Error>;

    /// Gives every rank the `buffer` `[n]` bytes of rank `root`, in its own buffer.
    ///
    /// # Errors
    /// [`Error::NoSuchRoot`] if `root` is no rank, [`Error::RootMismatch`] if the ranks name different roots.
    fn broadcast(&mut self, root: usize, buffer: Box<dyn Buffer>) -> Result<Box<dyn Buffer>, Error>;

    /// Returns once every rank has called it.
    fn barrier(&mut self) -> Result<(), Error>;

    /// A new group of the ranks that pass the same `color`, numbered by `key`, then by their rank in this group. It
    /// inherits the timeout. Neither group's end is the other's.
    fn split(&mut self, color: usize, key: usize) -> Result<Box<dyn ProcessGroup>, Error>;

    /// How long a call may last, from when this rank makes it; at first [`DEFAULT_TIMEOUT`](crate::DEFAULT_TIMEOUT).
    fn set_timeout(&mut self, timeout: Duration);

    /// What ends the group at once, from any thread: this rank's call under way and all later calls of every rank fail
    /// with [`Error::Aborted`]. A backend may tell the other ranks only by what this rank does next.
    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync>;
}
