//! The contract of a process group.

use crate::Error;

/// One rank's end of a process group.
///
/// Every rank makes the same calls in the same order. A call blocks until every rank has made it. Reductions are over
/// f32 (16-bit gradients are summed in f32); what only moves is bytes, so that one method serves every element type.
///
/// # Order of sums
/// Reductions sum each element over ranks as `sum(0..n) = sum(0..h) + sum(h..n)`, `h` the largest power of two below
/// `n`: `(x₀ + x₁) + x₂` for three ranks, `(x₀ + x₁) + (x₂ + x₃)` for four. Nothing else is added, no zero either. The
/// bits depend neither on timing nor on where the element lies in the buffer. If every rank first sums, in this tree,
/// the same power-of-two number of consecutive terms, the result is this tree over all the terms.
///
/// # Errors
/// Every rank gets the same [`Error`], even when only one of them passed what does not fit, so that none waits for
/// one that gave up:
/// - [`Error::Diverged`] if the ranks called different operations,
/// - [`Error::LengthMismatch`] if their inputs differ in length,
/// - [`Error::NotDivisible`] and [`Error::OutputLength`] as the method says,
/// - [`Error::PeerLeft`] if a rank was dropped, by returning or by panicking, before it made the call; then and in
///   every later call.
///
/// An operation that fails writes to no buffer.
pub trait ProcessGroup: Send {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// Replaces `buffer` `[n]` by its sum over ranks, the same bits on every rank.
    fn all_reduce(&mut self, buffer: &mut [f32]) -> Result<(), Error>;

    /// Sums `input` `[world_size × n]` over ranks and gives rank `r` part `r` of the sum in `partition` `[n]`.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] if `input` does not divide by the world size, [`Error::OutputLength`] if `partition`
    /// does not hold one part.
    fn reduce_scatter(&mut self, input: &[f32], partition: &mut [f32]) -> Result<(), Error>;

    /// Puts the `partition` `[n]` bytes of rank 0, 1, … one behind the other into `output` `[world_size × n]`.
    ///
    /// # Errors
    /// [`Error::OutputLength`] if `output` does not hold one partition per rank.
    fn all_gather(&mut self, partition: &[u8], output: &mut [u8]) -> Result<(), Error>;

    /// Sends part `r` of `input` `[world_size × n]` bytes to rank `r`; part `s` of `output` `[world_size × n]` comes
    /// from rank `s`.
    ///
    /// # Errors
    /// [`Error::NotDivisible`] if `input` does not divide by the world size, [`Error::OutputLength`] if `output` is
    /// not as long as `input`.
    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<(), Error>;

    /// Replaces `buffer` `[n]` bytes by that of rank `root`.
    ///
    /// # Errors
    /// [`Error::NoSuchRoot`] if `root` is no rank, [`Error::RootMismatch`] if the ranks name different roots.
    fn broadcast(&mut self, root: usize, buffer: &mut [u8]) -> Result<(), Error>;

    /// Returns once every rank has called it.
    fn barrier(&mut self) -> Result<(), Error>;
}
