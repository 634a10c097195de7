//! Gradients of weights, in f32: on the card, or on the host and brought to it while they are added to.

use super::model::Layout;
use super::plan::{Place, SLOTS};
use crate::ops::optimizer::{CHUNK, chunk_squares};
use crate::runtime::{Device, DeviceBuffer, Error, Event, PinnedBuffer, Stream};
use hearth_memory::Kind;
use std::sync::Arc;

/// Every unit's gradient, and the sums of squares of the last step's.
pub(super) struct Gradients {
    pub homes: Vec<Home>,
    lengths: Vec<usize>,
    /// Whether nothing was added yet in this step.
    fresh: Vec<bool>,
    /// By chunk, the units one behind another.
    squares: Vec<DeviceBuffer<f64>>,
    slots: Option<Slots>,
}

/// Where a gradient lies.
pub(super) enum Home {
    Card(DeviceBuffer<f32>),
    Host(PinnedBuffer),
}

/// Card memory that the host's gradients are made in, one after another; a slot is sent to the host while the next is
/// added to.
struct Slots {
    copies: Stream,
    slots: Vec<Slot>,
    next: usize,
}

struct Slot {
    buffer: DeviceBuffer<f32>,
    computed: Event,
    sent: Event,
}

impl Gradients {
    pub fn new(device: &Arc<Device>, layout: &Layout, places: &[Place]) -> Result<Self, Error> {
        let lengths: Vec<usize> = layout.units.iter().map(|unit| unit.len).collect();
        let home = |(&len, place): (&usize, &Place)| match place {
            Place::Card => Ok(Home::Card(DeviceBuffer::new(device, Kind::Gradients, len)?)),
            _ => Ok(Home::Host(PinnedBuffer::new(device, Kind::Gradients, len * size_of::<f32>())?)),
        };
        let homes = lengths.iter().zip(places).map(home).collect::<Result<Vec<_>, Error>>()?;
        let offloaded = lengths.iter().zip(places).filter(|(_, place)| **place != Place::Card);
        let longest = offloaded.map(|(len, _)| *len).max();
        let squares =
            lengths.iter().map(|len| DeviceBuffer::new(device, Kind::Gradients, len.div_ceil(CHUNK)));
        Ok(Self {
            homes,
            fresh: vec![true; lengths.len()],
            squares: squares.collect::<Result<_, _>>()?,
            slots: longest.map(|len| Slots::new(device, len)).transpose()?,
            lengths,
        })
    }

    /// A new step: what is there counts no more.
    pub fn begin(&mut self) {
        self.fresh.fill(true);
    }

    /// Lets `compute` add to a unit's gradient. `last`: nothing more comes in this step, so its squares are summed.
    pub fn with(
        &mut self,
        stream: &Stream,
        unit: usize,
        last: bool,
        compute: impl FnOnce(&mut DeviceBuffer<f32>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let fresh = std::mem::replace(&mut self.fresh[unit], false);
        let (len, squares) = (self.lengths[unit], last.then_some(&mut self.squares[unit]));
        let add = |buffer: &mut DeviceBuffer<f32>| {
            if fresh {
                buffer.part_mut(0..len)?.clear(stream)?;
            }
            compute(buffer)?;
            let sum = |squares: &mut DeviceBuffer<f64>| {
                chunk_squares(stream, buffer.part(0..len)?, squares.all_mut())
            };
            squares.map_or(Ok(()), sum)
        };
        match &mut self.homes[unit] {
            Home::Card(buffer) => add(buffer),
            Home::Host(host) => {
                let slots = self.slots.as_mut().expect("there are some where gradients are the host's");
                slots.with(stream, host, len, fresh, add)
            }
        }
    }

    /// The sum of all squares, once every unit's last addition was sent.
    pub fn squares(&self, stream: &Stream) -> Result<f64, Error> {
        let mut sum = 0.0;
        for squares in &self.squares {
            sum = squares.to_host(stream)?.iter().fold(sum, |sum, square| sum + square);
        }
        Ok(sum)
    }

    /// A unit's gradient as the last step left it.
    pub fn read(&mut self, stream: &Stream, unit: usize) -> Result<Vec<f32>, Error> {
        match &mut self.homes[unit] {
            Home::Card(buffer) => buffer.to_host(stream),
            Home::Host(host) => Ok(bytemuck::cast_slice(host.bytes()?).to_vec()),
        }
    }
}

impl Slots {
    fn new(device: &Arc<Device>, len: usize) -> Result<Self, Error> {
        let slot = || {
            let buffer = DeviceBuffer::new(device, Kind::Staging, len)?;
            Ok(Slot { buffer, computed: Event::new(device)?, sent: Event::new(device)? })
        };
        let slots = (0..SLOTS).map(|_| slot()).collect::<Result<_, Error>>()?;
        Ok(Self { copies: device.stream()?, slots, next: 0 })
    }

    /// Brings a gradient unless it begins at zero, lets `add` add to it, and sends it back beside what `stream` does next.
    fn with(
        &mut self,
        stream: &Stream,
        host: &mut PinnedBuffer,
        len: usize,
        fresh: bool,
        add: impl FnOnce(&mut DeviceBuffer<f32>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Self { copies, slots, next } = self;
        let at = *next % slots.len();
        let slot = &mut slots[at];
        if fresh {
            stream.wait(&slot.sent)?;
        } else {
            // Behind the slot's last fetch, which the same stream made.
            host.send(copies, len, &mut slot.buffer, 0)?;
            host.precede(stream)?;
        }
        add(&mut slot.buffer)?;
        slot.computed.record(stream)?;
        copies.wait(&slot.computed)?;
        host.fetch(copies, len, &slot.buffer, 0)?;
        slot.sent.record(copies)?;
        *next += 1;
        Ok(())
    }
}
