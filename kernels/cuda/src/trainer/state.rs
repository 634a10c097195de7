//! Masters and moments of AdamW, on the card or on the host, and their update: the same bits in either place.

use super::gradients::{Gradients, Home};
use super::model::{Layout, Unit};
use super::numbers::Compute;
use super::plan::Place;
use super::weights::Weights;
use crate::ops::optimizer::adamw;
use crate::runtime::{Device, DeviceBuffer, Error, Stream};
use hearth_kernels::cpu::adamw::{self, AdamWRule};
use hearth_kernels::cpu::update::{Span, Values};
use hearth_memory::{Charge, Kind, Tier};
use std::sync::Arc;

/// Which of a parameter's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Its value in f32.
    Master,
    /// AdamW's mean of its gradients.
    Mean,
    /// AdamW's mean of their squares.
    Square,
}

/// A unit's state. Masters are there only where weights are rounded.
pub(super) enum State {
    Card { master: Option<DeviceBuffer<f32>>, m: DeviceBuffer<f32>, v: DeviceBuffer<f32> },
    // Ordinary memory: no copy touches it, the host's own cores do.
    Host { master: Option<Vec<f32>>, m: Vec<f32>, v: Vec<f32>, _charge: Charge },
}

enum Vector<'a> {
    Card(&'a mut DeviceBuffer<f32>),
    Host(&'a mut [f32]),
}

fn stretch(vector: &mut [f32], first: usize, len: usize) -> Result<&mut [f32], Error> {
    let (to, all) = (first.saturating_add(len), vector.len());
    vector.get_mut(first..to).ok_or(Error::Range { from: first, to, len: all })
}

impl State {
    /// Zero moments, and room for masters.
    pub fn new<T: Compute>(stream: &Stream, unit: &Unit, place: Place) -> Result<Self, Error> {
        let (device, len) = (stream.device(), unit.len);
        if place == Place::Card {
            let zeros = || DeviceBuffer::zeros(stream, Kind::Optimizer, len);
            let master = T::APART.then(zeros).transpose()?;
            return Ok(State::Card { master, m: zeros()?, v: zeros()? });
        }
        let vectors = if T::APART { 3 } else { 2 };
        let _charge = charge(device, vectors * len)?;
        let zeros = || vec![0.0; len];
        Ok(State::Host { master: T::APART.then(zeros), m: zeros(), v: zeros(), _charge })
    }

    /// Overwrites numbers from the `first` on; masters with the weights that are rounded from them, wherever these lie.
    pub fn write<T: Compute>(
        &mut self,
        stream: &Stream,
        weights: &mut Weights<T>,
        unit: usize,
        (numbers, first): (Numbers, usize),
        values: &[f32],
    ) -> Result<(), Error> {
        match self.vector(numbers) {
            Some(Vector::Card(buffer)) => {
                buffer.part_mut(first..first + values.len())?.write(stream, values)?;
            }
            Some(Vector::Host(vector)) => stretch(vector, first, values.len())?.copy_from_slice(values),
            None => {}
        }
        match numbers {
            Numbers::Master => weights.write(stream, unit, first, values),
            Numbers::Mean | Numbers::Square => Ok(()),
        }
    }

    /// Numbers from the `first` on.
    pub fn read<T: Compute>(
        &mut self,
        stream: &Stream,
        weights: &mut Weights<T>,
        unit: usize,
        (numbers, first): (Numbers, usize),
        into: &mut [f32],
    ) -> Result<(), Error> {
        match self.vector(numbers) {
            Some(Vector::Card(buffer)) => buffer.part(first..first + into.len())?.read(stream, into)?,
            Some(Vector::Host(vector)) => into.copy_from_slice(stretch(vector, first, into.len())?),
            None => weights.read_f32(stream, unit, first, into)?,
        }
        Ok(())
    }

    /// Where these numbers lie; masters that are not apart are the weights.
    fn vector(&mut self, numbers: Numbers) -> Option<Vector<'_>> {
        match self {
            State::Card { master, m, v } => match numbers {
                Numbers::Master => master.as_mut(),
                Numbers::Mean => Some(m),
                Numbers::Square => Some(v),
            }
            .map(Vector::Card),
            State::Host { master, m, v, .. } => match numbers {
                Numbers::Master => master.as_mut(),
                Numbers::Mean => Some(m),
                Numbers::Square => Some(v),
            }
            .map(|vector| Vector::Host(vector)),
        }
    }

    /// One update by `rule`.
    pub fn update<T: Compute>(
        &mut self,
        stream: &Stream,
        rule: AdamWRule,
        unit: usize,
        weights: &mut Weights<T>,
        gradients: &mut Gradients,
    ) -> Result<(), Error> {
        match (self, &mut gradients.homes[unit]) {
            (State::Card { master, m, v }, Home::Card(gradient)) => {
                let weights = weights.on_card[unit].as_mut().expect("the card's").all_mut();
                let states = (m.all_mut(), v.all_mut());
                match master {
                    Some(master) => {
                        adamw(stream, rule, master.all_mut(), states, gradient.all(), Some(weights))
                    }
                    None => adamw::<_, _, f32>(stream, rule, weights.cast()?, states, gradient.all(), None),
                }
            }
            (State::Host { master, m, v, .. }, Home::Host(gradient)) => {
                let host = weights.on_host[unit].as_mut().expect("the host's").bytes()?;
                let gradient = bytemuck::cast_slice(gradient.bytes()?);
                let states = vec![Values::F32(m), Values::F32(v)];
                let span = match master {
                    Some(master) => {
                        let copy = Some(T::copy_out(bytemuck::cast_slice_mut(host)));
                        Span { master, states, gradient, copy }
                    }
                    None => Span { master: bytemuck::cast_slice_mut(host), states, gradient, copy: None },
                };
                adamw::adamw(rule, span);
                to_card(stream, weights, unit)
            }
            _ => unreachable!("gradients and states of a unit lie in one place"),
        }
    }
}

/// Sends the host's weights to where the card keeps them, if it does.
fn to_card<T: Compute>(stream: &Stream, weights: &mut Weights<T>, unit: usize) -> Result<(), Error> {
    let (Some(card), Some(host)) = (&mut weights.on_card[unit], &mut weights.on_host[unit]) else {
        return Ok(());
    };
    host.send(stream, card.len(), card, 0)
}

fn charge(device: &Arc<Device>, len: usize) -> Result<Charge, Error> {
    let bytes = len.saturating_mul(size_of::<f32>()) as u64;
    Ok(device.ledger().charge(Tier::Host, Kind::Optimizer, bytes)?)
}

/// Every unit's state.
pub(super) fn states<T: Compute>(
    stream: &Stream,
    layout: &Layout,
    places: &[Place],
) -> Result<Vec<State>, Error> {
    layout.units.iter().zip(places).map(|(unit, place)| State::new::<T>(stream, unit, *place)).collect()
}
