//! KV blocks in host memory, for what the card has no room for.

use super::Layered;
use crate::ops::paged::CacheElement;
use crate::runtime::{Device, Error, PinnedBuffer, Stream};
use hearth_memory::Kind;
use std::sync::Arc;

/// What is copied before a step, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// A block's contents to a slot.
    Out {
        /// Of the card.
        block: u32,
        /// Of the host.
        slot: u32,
    },
    /// A slot's contents to a block.
    Back {
        /// Of the host.
        slot: u32,
        /// Of the card.
        block: u32,
    },
    /// Each to the other.
    Swap {
        /// Of the card.
        block: u32,
        /// Of the host.
        slot: u32,
    },
}

/// Slots for whole KV blocks: every layer's keys, values and scales one after another.
///
/// There is one place more than slots: what is exchanged goes there, and the place it leaves is the next one over.
pub(super) struct Evicted {
    memory: PinnedBuffer,
    /// Bytes of a block's numbers in one layer, and of its scales.
    layer: [usize; 2],
    layers: usize,
    /// Which place each slot has, and which is over.
    places: Vec<usize>,
    spare: usize,
}

impl Evicted {
    /// All memory is taken now. `layer`: bytes of a block's numbers in one layer, and of its scales.
    pub fn new(device: &Arc<Device>, slots: usize, layers: usize, layer: [usize; 2]) -> Result<Self, Error> {
        let bytes = (slots + 1).saturating_mul(layers * (layer[0] + layer[1]));
        let memory = PinnedBuffer::new(device, Kind::KvCache, bytes)?;
        Ok(Self { memory, layer, layers, places: (0..slots).collect(), spare: slots })
    }

    /// Why copies are slower than they could be, if they are.
    pub fn refusal(&self) -> Option<&str> {
        self.memory.refusal()
    }

    /// Sends the copies to the stream in which steps run: they see them in this order.
    ///
    /// # Panics
    /// When there is no such block or slot.
    pub fn run<T: CacheElement>(
        &mut self,
        stream: &Stream,
        cache: &mut [Layered<T>],
        one: Move,
    ) -> Result<(), Error> {
        match one {
            Move::Out { block, slot } => self.fetch(stream, cache, block, self.places[slot as usize]),
            Move::Back { slot, block } => self.send(stream, cache, self.places[slot as usize], block),
            Move::Swap { block, slot } => {
                self.fetch(stream, cache, block, self.spare)?;
                self.send(stream, cache, self.places[slot as usize], block)?;
                std::mem::swap(&mut self.spare, &mut self.places[slot as usize]);
                Ok(())
            }
        }
    }

    fn fetch<T: CacheElement>(
        &mut self,
        stream: &Stream,
        cache: &mut [Layered<T>],
        block: u32,
        place: usize,
    ) -> Result<(), Error> {
        let [numbers, scales] = self.layer;
        for (i, (data, scale)) in cache.iter().enumerate() {
            let first = self.first(place, i);
            let (len, at) = stretch::<T>(numbers, block);
            self.memory.fetch_to(stream, first, len, data, at)?;
            if let Some(scale) = scale {
                let (len, at) = stretch::<f32>(scales, block);
                self.memory.fetch_to(stream, first + numbers, len, scale, at)?;
            }
        }
        Ok(())
    }

    fn send<T: CacheElement>(
        &mut self,
        stream: &Stream,
        cache: &mut [Layered<T>],
        place: usize,
        block: u32,
    ) -> Result<(), Error> {
        let [numbers, scales] = self.layer;
        for (i, (data, scale)) in cache.iter_mut().enumerate() {
            let first = self.first(place, i);
            let (len, at) = stretch::<T>(numbers, block);
            self.memory.send_from(stream, first, len, data, at)?;
            if let Some(scale) = scale {
                let (len, at) = stretch::<f32>(scales, block);
                self.memory.send_from(stream, first + numbers, len, scale, at)?;
            }
        }
        Ok(())
    }

    /// The first byte of a layer's part of a place.
    fn first(&self, place: usize, layer: usize) -> usize {
        (place * self.layers + layer) * (self.layer[0] + self.layer[1])
    }
}

/// How many elements `bytes` are, and where those of a block begin.
fn stretch<T>(bytes: usize, block: u32) -> (usize, usize) {
    let len = bytes / size_of::<T>();
    (len, block as usize * len)
}
