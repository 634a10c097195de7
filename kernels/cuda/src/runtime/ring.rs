//! Data that streams from the host to the card while kernels compute.

use super::{Device, DeviceBuffer, Error, Event, PinnedBuffer, Stream};
use hearth_memory::Kind;
use std::sync::Arc;

/// Slots of card memory that blocks of bytes pass through in order, each with a pinned buffer of its own.
///
/// Copies run on a stream of the ring's. [`Self::send`] waits for nobody but the slot's last copy; the copy itself waits on
/// the card until the slot's last user is done, and [`Self::take`] makes the computing stream wait for the copy.
pub struct Ring {
    copies: Stream,
    slots: Vec<Slot>,
    sent: usize,
    taken: usize,
}

struct Slot {
    host: PinnedBuffer,
    card: DeviceBuffer<u8>,
    len: usize,
    used: Event,
}

impl Ring {
    /// Slots of `bytes` bytes each; all memory is taken now and kept.
    ///
    /// # Errors
    /// [`Error::Budget`], [`Error::OutOfMemory`].
    ///
    /// # Panics
    /// Without slots.
    pub fn new(device: &Arc<Device>, slots: usize, bytes: usize) -> Result<Self, Error> {
        assert!(slots > 0, "a ring has slots");
        let slot = || {
            Ok(Slot {
                host: PinnedBuffer::new(device, Kind::Staging, bytes)?,
                card: DeviceBuffer::new(device, Kind::Staging, bytes)?,
                len: 0,
                used: Event::new(device)?,
            })
        };
        let slots = (0..slots).map(|_| slot()).collect::<Result<_, Error>>()?;
        Ok(Self { copies: device.stream()?, slots, sent: 0, taken: 0 })
    }

    /// Why copies are slower than they could be, as a sentence for the user.
    pub fn refusal(&self) -> Option<&str> {
        self.slots.iter().find_map(|slot| slot.host.refusal())
    }

    /// How many blocks may be sent ahead of the last one taken.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is a slot for another block.
    pub fn has_room(&self) -> bool {
        self.sent - self.taken < self.slots.len()
    }

    /// Sends a block of `len` bytes that `fill` writes.
    ///
    /// # Errors
    /// Those of `fill`, [`Error::Range`] when the block is larger than a slot, [`Error::Lost`].
    ///
    /// # Panics
    /// When there is no room: see [`Self::has_room`].
    pub fn send<E: From<Error>>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(self.has_room(), "a slot must be free");
        let at = self.sent % self.slots.len();
        let slot = &mut self.slots[at];
        if len > slot.host.len() {
            return Err(Error::Range { from: 0, to: len, len: slot.host.len() }.into());
        }
        fill(&mut slot.host.bytes()?[..len])?;
        self.copies.wait(&slot.used)?;
        slot.host.send(&self.copies, len, &mut slot.card, 0)?;
        slot.len = len;
        self.sent += 1;
        Ok(())
    }

    /// Lets `use_it` send work on the next block to `stream`, which waits for the block to arrive.
    ///
    /// # Errors
    /// Those of `use_it`, [`Error::Lost`].
    ///
    /// # Panics
    /// When no block was sent that has not been taken.
    pub fn take<R, E: From<Error>>(
        &mut self,
        stream: &Stream,
        use_it: impl FnOnce(&DeviceBuffer<u8>, usize) -> Result<R, E>,
    ) -> Result<R, E> {
        assert!(self.taken < self.sent, "a block must have been sent");
        let at = self.taken % self.slots.len();
        let slot = &self.slots[at];
        slot.host.precede(stream)?;
        let result = use_it(&slot.card, slot.len)?;
        slot.used.record(stream)?;
        self.taken += 1;
        Ok(result)
    }
}
