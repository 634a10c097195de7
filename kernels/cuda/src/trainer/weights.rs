//! Weights in the type of the computation: on the card, or on the host and streamed through it.

use super::model::{Layout, Parameter, Role};
use super::numbers::Compute;
use super::plan::{Place, SLOTS};
use super::wrong;
use crate::decoder::weights::{HostMatrix, Source};
use crate::runtime::{Device, DeviceBuffer, Error, PinnedBuffer, Ring, Stream, View};
use hearth_memory::Kind;
use std::collections::VecDeque;
use std::sync::Arc;

/// Every unit's weights.
pub(super) struct Weights<T> {
    /// By unit; `None` = streamed.
    pub on_card: Vec<Option<DeviceBuffer<T>>>,
    /// By unit: what the host updates and streams from; `None` = the card's alone.
    pub on_host: Vec<Option<PinnedBuffer>>,
    lengths: Vec<usize>,
    ring: Option<Ring>,
    /// Streamed units in the order of their coming uses.
    script: VecDeque<usize>,
}

impl<T: Compute> Weights<T> {
    /// Room for them.
    pub fn new(device: &Arc<Device>, layout: &Layout, places: &[Place]) -> Result<Self, Error> {
        let lengths: Vec<usize> = layout.units.iter().map(|unit| unit.len).collect();
        let place = |unit: usize| places[unit];
        let card = |unit: usize| {
            let buffer = || DeviceBuffer::new(device, Kind::Weights, lengths[unit]);
            (place(unit) != Place::Streamed).then(buffer).transpose()
        };
        let host = |unit: usize| {
            let buffer = || PinnedBuffer::new(device, Kind::Weights, lengths[unit] * size_of::<T>());
            (place(unit) != Place::Card).then(buffer).transpose()
        };
        let units = 0..lengths.len();
        let longest =
            units.clone().filter(|&unit| place(unit) == Place::Streamed).map(|unit| lengths[unit]).max();
        let ring = longest.map(|len| Ring::new(device, SLOTS, len * size_of::<T>())).transpose()?;
        Ok(Self {
            on_card: units.clone().map(card).collect::<Result<_, _>>()?,
            on_host: units.map(host).collect::<Result<_, _>>()?,
            lengths,
            ring,
            script: VecDeque::new(),
        })
    }

    /// Why copies are slower than they could be, as a sentence for the user.
    pub fn refusal(&self) -> Option<&str> {
        let ring = self.ring.as_ref().and_then(Ring::refusal);
        ring.or_else(|| self.on_host.iter().flatten().find_map(PinnedBuffer::refusal))
    }

    /// Rounds `values` to a unit's weights from the `first` on, wherever they lie.
    pub fn write(&mut self, stream: &Stream, unit: usize, first: usize, values: &[f32]) -> Result<(), Error> {
        let range = first..first.saturating_add(values.len());
        if range.end > self.lengths[unit] {
            return Err(Error::Range { from: first, to: range.end, len: self.lengths[unit] });
        }
        let rounded: Vec<T> = values.iter().map(|value| T::round(*value)).collect();
        if let Some(host) = &mut self.on_host[unit] {
            bytemuck::cast_slice_mut(host.bytes()?)[range.clone()].copy_from_slice(&rounded);
        }
        match &mut self.on_card[unit] {
            Some(card) => card.part_mut(range)?.write(stream, &rounded),
            None => Ok(()),
        }
    }

    /// A unit's weights from the `first` on, where they are f32.
    pub fn read_f32(
        &mut self,
        stream: &Stream,
        unit: usize,
        first: usize,
        into: &mut [f32],
    ) -> Result<(), Error> {
        let range = first..first.saturating_add(into.len());
        match (&mut self.on_host[unit], &self.on_card[unit]) {
            (Some(host), _) => {
                let (host, len) = (bytemuck::cast_slice(host.bytes()?), self.lengths[unit]);
                let part = host.get(range.clone());
                into.copy_from_slice(part.ok_or(Error::Range { from: first, to: range.end, len })?);
                Ok(())
            }
            (None, Some(card)) => card.part(range)?.cast()?.read(stream, into),
            (None, None) => unreachable!("weights lie on the host or on the card"),
        }
    }

    /// The order in which a pass will use units.
    pub fn begin(&mut self, units: impl Iterator<Item = usize>) {
        debug_assert!(self.script.is_empty(), "every announced unit is used");
        self.script = units.filter(|&unit| self.on_card[unit].is_none()).collect();
    }

    /// Lets `compute` send work on a unit's weights to `stream`; the next streamed units are on their way meanwhile.
    pub fn with<R>(
        &mut self,
        stream: &Stream,
        unit: usize,
        compute: impl FnOnce(View<'_, T>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        if let Some(weights) = &self.on_card[unit] {
            return compute(weights.all());
        }
        self.send_ahead()?;
        let ring = self.ring.as_mut().expect("there is one where units are streamed");
        let result = ring.take(stream, |bytes, len| compute(bytes.part(0..len)?.cast()?))?;
        self.send_ahead()?;
        Ok(result)
    }

    /// As many units as there is room for.
    fn send_ahead(&mut self) -> Result<(), Error> {
        let Self { on_host, lengths, ring: Some(ring), script, .. } = self else { return Ok(()) };
        while ring.has_room()
            && let Some(unit) = script.pop_front()
        {
            let host = on_host[unit].as_mut().expect("what is streamed is on the host");
            let bytes = host.bytes()?;
            ring.send(lengths[unit] * size_of::<T>(), |slot| {
                slot.copy_from_slice(bytes);
                Ok::<_, Error>(())
            })?;
        }
        Ok(())
    }
}

/// A unit's parameters in f32, zeros between them.
pub(super) fn read_unit<E: From<Error>>(
    len: usize,
    parameters: &[Parameter],
    source: &mut dyn Source<E>,
) -> Result<Vec<f32>, E> {
    let mut values = vec![0.0; len];
    for parameter in parameters {
        let (range, name) = (parameter.span.range(), &parameter.name);
        let needed = range.len();
        let missing = || Error::Length { op: super::OP, argument: "a parameter", len: 0, needed };
        let into = &mut values[range];
        match parameter.role {
            Role::Matrix(shape) => match source.matrix(name, shape)? {
                HostMatrix::F32(from) => copy(&from, into)?,
                HostMatrix::Blocks { .. } => {
                    return Err(wrong("matrices in block formats", 1, "0").into());
                }
            },
            Role::Norm => copy(&source.norm(name, needed)?.ok_or_else(missing)?, into)?,
            Role::Bias => copy(&source.bias(name, needed)?.ok_or_else(missing)?, into)?,
        }
    }
    Ok(values)
}

fn copy(from: &[f32], into: &mut [f32]) -> Result<(), Error> {
    if from.len() != into.len() {
        let (len, needed) = (from.len(), into.len());
        return Err(Error::Length { op: super::OP, argument: "a parameter", len, needed });
    }
    into.copy_from_slice(from);
    Ok(())
}
