//! A model's files, trained on a card.
//!
//! - [`planning`]: whether a card's trainer does what a run asks, and where everything lies.
//! - [`pace`]: how long its micro-batches will take.
//! - `accelerator`: what computes a run's steps.

mod accelerator;
pub mod pace;
pub mod planning;

pub use accelerator::accelerator;

use crate::Error;
use crate::model::{Files, check_architecture, shape_of};
use hearth_cuda::decoder::weights::{HostMatrix, Source};
use hearth_cuda::runtime::Device;
use hearth_cuda::trainer::{Compute, MicroBatch, Model, Plan, Report, Trainer};
use hearth_kernels::cpu::adamw::AdamWRule;
use hearth_model::RowPosition;
use hearth_model::rope::Rope;
use hearth_weights::{ModelConfig, ModelFiles};
use std::borrow::Cow;
use std::sync::Arc;

/// Documents one after another, each row with the id it must predict.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Documents {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The id each row must predict, negative for none.
    pub targets: Vec<i32>,
    /// Lengths.
    pub lengths: Vec<usize>,
}

impl Documents {
    /// Adds a document; `labels` stand beside their tokens, negative = not trained.
    ///
    /// # Panics
    /// Without tokens, or with another number of labels.
    pub fn push(&mut self, ids: &[u32], labels: &[i32]) {
        assert!(!ids.is_empty() && ids.len() == labels.len(), "a label beside every token");
        self.ids.extend(ids);
        self.targets.extend(labels[1..].iter().copied().chain([-1]));
        self.lengths.push(ids.len());
    }
}

/// The same, borrowed.
#[derive(Clone, Copy)]
struct Packed<'a> {
    ids: &'a [u32],
    targets: &'a [i32],
    lengths: &'a [usize],
}

impl<'a> From<&'a Documents> for Packed<'a> {
    fn from(documents: &'a Documents) -> Self {
        let Documents { ids, targets, lengths } = documents;
        Self { ids, targets, lengths }
    }
}

/// Weights in f32, whatever they are stored as.
struct Masters<'a>(Files<'a>);

impl Source<Error> for Masters<'_> {
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<HostMatrix<'_>, Error> {
        let (files, name) = (self.0.files, format!("{name}.weight"));
        files.expect(&name, &shape)?;
        let values = files.tensors.read_f32(&name)?;
        files.tensors.release(&name);
        Ok(HostMatrix::F32(Cow::Owned(values)))
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        self.0.norm(name, len)
    }

    fn bias(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        self.0.bias(name, len)
    }
}

/// What the trainer makes of a model's configuration.
pub fn model_of(config: &ModelConfig) -> Model {
    Model {
        shape: shape_of(config),
        tied: config.tie_word_embeddings,
        qkv_bias: config.qkv_bias,
        out_bias: config.attention_out_bias,
        mlp_bias: config.mlp_bias,
        qk_norm: config.qk_norm,
    }
}

/// A model being trained on a card, computed in `T`.
pub struct CardTrainer<T> {
    trainer: Trainer<T>,
    rope: Rope,
}

impl<T: Compute> CardTrainer<T> {
    /// Takes the plan's memory and uploads the weights.
    ///
    /// # Errors
    /// [`Error::Architecture`] for another architecture, [`Error::Weights`] for files that do not hold what the
    /// configuration asks for, [`Error::Card`] when the budget does not hold the plan.
    pub fn load(device: &Arc<Device>, files: &ModelFiles, plan: Plan) -> Result<Self, Error> {
        check_architecture(&files.config)?;
        let trainer = Trainer::new(device, plan, &mut Masters(Files { files }))?;
        Ok(Self { trainer, rope: Rope::new(&files.config) })
    }

    /// The trainer below, for what needs no positions.
    pub fn trainer(&mut self) -> &mut Trainer<T> {
        &mut self.trainer
    }

    /// One step: see [`Trainer::step`].
    ///
    /// # Errors
    /// [`Error::Card`].
    pub fn step(
        &mut self,
        batches: &[Documents],
        clip_norm: f64,
        rule: impl FnOnce(f32) -> AdamWRule,
    ) -> Result<Report, Error> {
        self.with(&packed(batches), |trainer, batches| trainer.step(batches, clip_norm, rule))
    }

    /// Gradients alone: see [`Trainer::gradients_of`].
    ///
    /// # Errors
    /// [`Error::Card`].
    pub fn gradients_of(&mut self, batches: &[Documents]) -> Result<Report, Error> {
        self.with(&packed(batches), Trainer::gradients_of)
    }

    /// Logits after every row.
    ///
    /// # Errors
    /// [`Error::Card`].
    pub fn logits(&mut self, batch: &Documents) -> Result<Vec<f32>, Error> {
        self.with(&[batch.into()], |trainer, batches| trainer.logits(&batches[0]))
    }

    fn with<R>(
        &mut self,
        batches: &[Packed<'_>],
        run: impl FnOnce(&mut Trainer<T>, &[MicroBatch<'_>]) -> Result<R, hearth_cuda::runtime::Error>,
    ) -> Result<R, Error> {
        let tables: Vec<_> = batches.iter().map(|batch| self.rope.table(&positions(batch.lengths))).collect();
        let batches: Vec<MicroBatch<'_>> = batches
            .iter()
            .zip(&tables)
            .map(|(batch, table)| MicroBatch {
                ids: batch.ids,
                targets: batch.targets,
                documents: batch.lengths,
                cos: table.cos(),
                sin: table.sin(),
            })
            .collect();
        Ok(run(&mut self.trainer, &batches)?)
    }
}

fn packed(batches: &[Documents]) -> Vec<Packed<'_>> {
    batches.iter().map(Packed::from).collect()
}

/// Positions restart with each document.
fn positions(lengths: &[usize]) -> Vec<RowPosition> {
    let of_one = |&length: &usize| {
        (0..length).map(move |position| RowPosition { position: position as u32, length: length as u32 })
    };
    lengths.iter().flat_map(of_one).collect()
}
