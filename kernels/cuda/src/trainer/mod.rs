//! A Llama-shaped model trained on a card: forward and backward block by block, gradients in f32, AdamW.
//!
//! # Layout
//! - [`model`]: [`Model`], its parameters by name, laid out in one flat vector per unit (embedding, block, head).
//! - [`numbers`]: [`Compute`], the types that passes are computed in: f32, and bf16 beside f32 masters.
//! - [`plan`]: [`Plan`], where each unit lies and what that takes; exactly what the ledger is charged.
//! - [`batch`]: [`MicroBatch`], packed documents.
//! - `weights`, `gradients`, `state`: where a unit's numbers lie, on the card or on the host.
//! - `space`: what passes are computed in; `block`: a transformer block, both ways; `loss`: the head.
//! - this file: [`Trainer`] and the order of a step.
//!
//! # Invariants
//! - All memory is taken when the trainer is made: a plan's bytes are the ledger's.
//! - **Layout changes no bit.** A gradient is one chain of sums wherever it lies, and the host's AdamW has the card's
//!   arithmetic, so what is offloaded, streamed or computed again is free.
//! - Nothing is added atomically: a step has the same bits every time.

pub mod batch;
pub mod model;
pub mod numbers;
pub mod plan;

mod block;
mod gradients;
mod loss;
mod space;
mod state;
mod weights;

pub use batch::MicroBatch;
pub use model::Model;
pub use numbers::Compute;
pub use plan::{Needs, Place, Plan};
pub use state::Numbers;

use crate::decoder::weights::Source;
use crate::ops::embedding::{gather_rows, scatter_rows};
use crate::runtime::{Device, Error, Stream};
use block::Pass;
use gradients::Gradients;
use hearth_kernels::cpu::adamw::AdamWRule;
use model::{EMBEDDING, Layout};
use space::Space;
use state::State;
use std::ops::Range;
use std::sync::Arc;
use weights::{Weights, read_unit};

/// As errors name it.
const OP: &str = "train";

fn wrong(argument: &'static str, value: usize, limit: &str) -> Error {
    Error::Value { op: OP, argument, value, limit: limit.to_owned() }
}

/// How much is computed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Most rows of a micro-batch.
    pub rows: usize,
    /// Rows whose logits are there at once; rounded up to eight.
    pub logit_rows: usize,
    /// Keep the blocks' inputs alone and compute each block again when its gradient is due.
    pub recompute: bool,
}

impl Settings {
    /// Rows of logits: a multiple of eight, so that every chunk begins where kernels read whole vectors.
    fn chunk(&self) -> usize {
        self.logit_rows.clamp(1, self.rows).next_multiple_of(8)
    }
}

/// What a step said.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Mean negative log-likelihood of the trained tokens, before the update.
    pub loss: f64,
    /// Norm of the mean loss's gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens that the loss is a mean over.
    pub trained: u64,
}

/// A parameter's elements within its unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    unit: usize,
    range: Range<usize>,
}

impl Stretch {
    /// The unit, and where in it the `first` of `len` elements is.
    fn within(&self, first: usize, len: usize) -> Result<(usize, usize), Error> {
        let (to, all) = (first.saturating_add(len), self.range.len());
        if to > all {
            return Err(Error::Range { from: first, to, len: all });
        }
        Ok((self.unit, self.range.start + first))
    }
}

/// A model with its gradients and optimizer state. Passes are computed in `T`.
pub struct Trainer<T> {
    plan: Plan,
    layout: Layout,
    weights: Weights<T>,
    gradients: Gradients,
    states: Vec<State>,
    space: Space<T>,
    // Last: what was made with it goes first.
    stream: Stream,
}

impl<T: Compute> Trainer<T> {
    /// Takes all memory that the plan says and brings the weights.
    ///
    /// # Errors
    /// [`Error::Budget`] when the ledger does not hold the plan, and what the source reports.
    pub fn new<E: From<Error>>(
        device: &Arc<Device>,
        plan: Plan,
        source: &mut dyn Source<E>,
    ) -> Result<Self, E> {
        let stream = device.stream()?;
        let layout = Layout::new(&plan.model)?;
        let places = &plan.places;
        let mut weights = Weights::new(device, &layout, places)?;
        let gradients = Gradients::new(device, &layout, places)?;
        let mut states = state::states::<T>(&stream, &layout, places)?;
        let space = Space::new(device, &plan.model, &plan.settings)?;
        for (i, unit) in layout.units.iter().enumerate() {
            let values = read_unit(unit.len, &unit.parameters, source)?;
            states[i].write(&stream, &mut weights, i, (Numbers::Master, 0), &values)?;
        }
        Ok(Self { plan, layout, weights, gradients, states, space, stream })
    }

    /// What it was made by.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Why copies are slower than they could be, as a sentence for the user.
    pub fn refusal(&self) -> Option<&str> {
        self.weights.refusal()
    }

    /// One step over micro-batches: gradients of their mean loss, clipped to `clip_norm` (0 = not), and one update. `rule`
    /// makes AdamW's of what gradients are to be multiplied by.
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Length`] for micro-batches that do not fit; [`Error::NotFinite`], and nothing was
    /// updated; [`Error::Lost`].
    pub fn step(
        &mut self,
        batches: &[MicroBatch<'_>],
        clip_norm: f64,
        rule: impl FnOnce(f32) -> AdamWRule,
    ) -> Result<Report, Error> {
        let report = self.gradients_of(batches)?;
        let Report { loss, grad_norm, trained } = report;
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Err(Error::NotFinite { loss, grad_norm });
        }
        let clip = if clip_norm > 0.0 { (clip_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 };
        self.update(rule((f64::from(clip as f32) / trained as f64) as f32))?;
        Ok(report)
    }

    /// The gradients of the summed loss, left where [`Self::read_gradients`] finds them.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn gradients_of(&mut self, batches: &[MicroBatch<'_>]) -> Result<Report, Error> {
        let trained: u64 = batches.iter().map(MicroBatch::trained).sum();
        if trained == 0 {
            return Err(wrong("trained tokens", 0, "at least 1"));
        }
        for batch in batches {
            batch.check(&self.plan.model, self.plan.settings.rows)?;
        }
        self.gradients.begin();
        let mut nll = 0.0;
        for (i, batch) in batches.iter().enumerate() {
            nll += self.pass(batch, i + 1 == batches.len())?;
        }
        let squares = self.gradients.squares(&self.stream)?;
        let count = trained as f64;
        Ok(Report { loss: nll / count, grad_norm: squares.sqrt() / count, trained })
    }

    /// Updates every parameter. The card works through its units while the host updates its own.
    fn update(&mut self, rule: AdamWRule) -> Result<(), Error> {
        let on_card = |unit: &usize| self.plan.places[*unit] == Place::Card;
        let (first, then): (Vec<_>, Vec<_>) = (0..self.states.len()).partition(on_card);
        for unit in first.into_iter().chain(then) {
            let state = &mut self.states[unit];
            state.update(&self.stream, rule, unit, &mut self.weights, &mut self.gradients)?;
        }
        Ok(())
    }

    /// Forward and backward over a micro-batch; the sum of its negative log-likelihoods.
    fn pass(&mut self, batch: &MicroBatch<'_>, last: bool) -> Result<f64, Error> {
        let blocks = self.plan.model.num_blocks();
        let units = (0..blocks).chain((0..blocks).rev()).map(|block| self.layout.of_block(block));
        // Backward, too, whatever was kept: activations are, weights are not.
        self.weights.begin(units);
        self.forward(batch)?;
        self.loss_backward(last)?;
        for block in (0..blocks).rev() {
            self.block_backward(block, last)?;
        }
        self.embedding_backward(last)?;
        self.nll()
    }

    /// The sum of a micro-batch's negative log-likelihoods.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn evaluate(&mut self, batch: &MicroBatch<'_>) -> Result<f64, Error> {
        self.only_forward(batch)?;
        self.loss_forward(None)?;
        self.nll()
    }

    /// Logits after every row: `[rows, vocab]`.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn logits(&mut self, batch: &MicroBatch<'_>) -> Result<Vec<f32>, Error> {
        self.only_forward(batch)?;
        let mut logits = Vec::new();
        self.loss_forward(Some(&mut logits))?;
        Ok(logits)
    }

    fn only_forward(&mut self, batch: &MicroBatch<'_>) -> Result<(), Error> {
        batch.check(&self.plan.model, self.plan.settings.rows)?;
        let units = (0..self.plan.model.num_blocks()).map(|block| self.layout.of_block(block));
        self.weights.begin(units);
        self.forward(batch)
    }

    fn forward(&mut self, batch: &MicroBatch<'_>) -> Result<(), Error> {
        let Self { plan, layout, space, weights, stream, .. } = self;
        space.batch.upload(stream, batch)?;
        let (hidden, rows) = (plan.model.shape.hidden, batch.ids.len());
        let (ids, first) = (space.batch.ids()?, space.streams[0].part_mut(0..rows * hidden)?);
        weights.with(stream, EMBEDDING, |w| {
            gather_rows(stream, w.part(layout.embedding.range())?, hidden, ids, first)
        })?;
        for block in 0..plan.model.num_blocks() {
            self.block_forward(block)?;
        }
        Ok(())
    }

    fn block_forward(&mut self, block: usize) -> Result<(), Error> {
        let Self { plan, layout, space, weights, stream, .. } = self;
        let Space { streams, saved, batch, .. } = space;
        let (width, kept) = (batch.rows() * plan.model.shape.hidden, block % saved.len());
        let (inputs, outputs) = streams.split_at_mut(block + 1);
        let (x, out) = (inputs[block].part(0..width)?, outputs[0].part_mut(0..width)?);
        weights.with(stream, layout.of_block(block), |weights| {
            let pass = Pass { stream, model: &plan.model, parts: &layout.block, batch, block, weights };
            pass.forward(x, &mut saved[kept], out)
        })
    }

    fn block_backward(&mut self, block: usize, last: bool) -> Result<(), Error> {
        let Self { plan, layout, space, weights, gradients, stream, .. } = self;
        let Space { streams, saved, batch, backward, .. } = space;
        let (width, kept) = (batch.rows() * plan.model.shape.hidden, block % saved.len());
        let (inputs, outputs) = streams.split_at_mut(block + 1);
        let (x, out) = (inputs[block].part(0..width)?, outputs[0].part_mut(0..width)?);
        let (unit, saved) = (layout.of_block(block), &mut saved[kept]);
        weights.with(stream, unit, |weights| {
            let pass = Pass { stream, model: &plan.model, parts: &layout.block, batch, block, weights };
            if plan.settings.recompute {
                // Its output was the next block's input, which nobody reads any more.
                pass.forward(x, saved, out)?;
            }
            gradients.with(stream, unit, last, |gradient| pass.backward(x, saved, backward, gradient))
        })
    }

    fn embedding_backward(&mut self, last: bool) -> Result<(), Error> {
        let Self { plan, layout, space, gradients, stream, .. } = self;
        let hidden = plan.model.shape.hidden;
        let dy = space.backward.dx.part(0..space.batch.rows() * hidden)?;
        let groups = space.batch.groups()?;
        gradients.with(stream, EMBEDDING, last, |gradient| {
            scatter_rows(stream, dy, hidden, groups, gradient.part_mut(layout.embedding.range())?)
        })
    }

    /// Every parameter by its name in files, in f32.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn read_parameters(&mut self, each: &mut dyn FnMut(&str, &[f32])) -> Result<(), Error> {
        for (i, unit) in self.layout.units.iter().enumerate() {
            let mut values = vec![0.0; unit.len];
            self.states[i].read(&self.stream, &mut self.weights, i, (Numbers::Master, 0), &mut values)?;
            tell(unit, &values, each);
        }
        Ok(())
    }

    /// Every parameter by its name in files, and where it lies.
    pub fn stretches(&self) -> impl Iterator<Item = (String, Stretch)> + '_ {
        let of_unit = |(unit, parts): (usize, &'_ model::Unit)| {
            let stretch = move |parameter: &model::Parameter| {
                (parameter.full_name(), Stretch { unit, range: parameter.span.range() })
            };
            parts.parameters.iter().map(stretch).collect::<Vec<_>>()
        };
        self.layout.units.iter().enumerate().flat_map(of_unit)
    }

    /// A parameter's numbers from the `first` on.
    ///
    /// # Errors
    /// [`Error::Range`] beyond its end, [`Error::Lost`].
    pub fn read(
        &mut self,
        parameter: &Stretch,
        numbers: Numbers,
        first: usize,
        into: &mut [f32],
    ) -> Result<(), Error> {
        let (unit, at) = parameter.within(first, into.len())?;
        self.states[unit].read(&self.stream, &mut self.weights, unit, (numbers, at), into)
    }

    /// Overwrites a parameter's numbers from the `first` on.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(
        &mut self,
        parameter: &Stretch,
        numbers: Numbers,
        first: usize,
        values: &[f32],
    ) -> Result<(), Error> {
        let (unit, at) = parameter.within(first, values.len())?;
        self.states[unit].write(&self.stream, &mut self.weights, unit, (numbers, at), values)
    }

    /// Every gradient of the summed loss by its parameter's name in files.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn read_gradients(&mut self, each: &mut dyn FnMut(&str, &[f32])) -> Result<(), Error> {
        for (i, unit) in self.layout.units.iter().enumerate() {
            let values = self.gradients.read(&self.stream, i)?;
            tell(unit, &values, each);
        }
        Ok(())
    }

    /// Waits until everything that was sent is done.
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn synchronize(&self) -> Result<(), Error> {
        self.stream.synchronize()
    }
}

fn tell(unit: &model::Unit, values: &[f32], each: &mut dyn FnMut(&str, &[f32])) {
    for parameter in &unit.parameters {
        each(&parameter.full_name(), &values[parameter.span.range()]);
    }
}
