//! Host memory that copies run from and to.

use super::ffi::HostMemory;
use super::{Device, DeviceBuffer, Error, Stream};
use bytemuck::Pod;
use hearth_memory::{Charge, Kind, Tier};
use std::ops::Range;
use std::sync::Arc;

/// Host memory that the system keeps in place, so that the card copies by itself while everybody goes on.
///
/// Allocate once and keep: pinning is slow. Its bytes are lent out only when no copy uses them any more. Where the
/// system refuses to pin, ordinary memory takes its place: the same results, but copies hold the caller up.
pub struct PinnedBuffer {
    memory: HostMemory,
    refusal: Option<String>,
    _charge: Charge,
    _device: Arc<Device>,
}

impl PinnedBuffer {
    /// Zeros, charged to the ledger's host tier.
    ///
    /// # Errors
    /// [`Error::Budget`], [`Error::Lost`]. A refusal to pin is none: see [`Self::refusal`].
    pub fn new(device: &Arc<Device>, kind: Kind, bytes: usize) -> Result<Self, Error> {
        let charge = device.ledger().charge(Tier::Host, kind, bytes as u64)?;
        let (memory, refusal) = match HostMemory::pinned(&device.context, bytes) {
            Ok(memory) => (memory, None),
            Err(error) if error.is_lost() => return Err(error),
            Err(error) => {
                let sentence = format!(
                    "{bytes} bytes of host memory cannot be pinned ({error}): copies to the card will be slower"
                );
                (HostMemory::plain(&device.context, bytes)?, Some(sentence))
            }
        };
        Ok(Self { memory, refusal, _charge: charge, _device: device.clone() })
    }

    /// Why it is ordinary memory, as a sentence for the user; `None` = it is pinned.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, after the last copy from or to them.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn bytes(&mut self) -> Result<&mut [u8], Error> {
        self.memory.bytes()
    }

    /// Sends the first elements to `to`, from element `at` on, in the stream's order; the caller goes on.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Lost`].
    pub fn send<T: Pod>(
        &mut self,
        stream: &Stream,
        len: usize,
        to: &mut DeviceBuffer<T>,
        at: usize,
    ) -> Result<(), Error> {
        self.send_from(stream, 0, len, to, at)
    }

    /// The same, beginning with the byte `first` of this buffer.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_from<T: Pod>(
        &mut self,
        stream: &Stream,
        first: usize,
        len: usize,
        to: &mut DeviceBuffer<T>,
        at: usize,
    ) -> Result<(), Error> {
        let (bytes, offset) = self.stretch::<T>(first, len, to, at)?;
        self.memory.send(bytes, to.memory(), offset, stream.raw())
    }

    /// Fetches elements `at..at + len` of `from`, in the stream's order; [`Self::bytes`] waits for them.
    ///
    /// # Errors
    /// [`Error::Range`], [`Error::Lost`].
    pub fn fetch<T: Pod>(
        &mut self,
        stream: &Stream,
        len: usize,
        from: &DeviceBuffer<T>,
        at: usize,
    ) -> Result<(), Error> {
        self.fetch_to(stream, 0, len, from, at)
    }

    /// The same, to where the byte `first` of this buffer is.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub fn fetch_to<T: Pod>(
        &mut self,
        stream: &Stream,
        first: usize,
        len: usize,
        from: &DeviceBuffer<T>,
        at: usize,
    ) -> Result<(), Error> {
        let (bytes, offset) = self.stretch::<T>(first, len, from, at)?;
        self.memory.fetch(bytes, from.memory(), offset, stream.raw())
    }

    /// Makes a stream wait for the last copy.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn precede(&self, stream: &Stream) -> Result<(), Error> {
        stream.raw().wait(self.memory.done())
    }

    /// The bytes of this buffer from `first` on, and where the card's begin.
    fn stretch<T: Pod>(
        &self,
        first: usize,
        len: usize,
        card: &DeviceBuffer<T>,
        at: usize,
    ) -> Result<(Range<usize>, usize), Error> {
        card.part(at..at.saturating_add(len))?;
        let range = first..first.saturating_add(len * size_of::<T>());
        if range.end > self.len() {
            return Err(Error::Range { from: range.start, to: range.end, len: self.len() });
        }
        Ok((range, at * size_of::<T>()))
    }
}
