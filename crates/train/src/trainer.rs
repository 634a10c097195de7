//! The step, and the run around it.

use crate::block_loop::BlockLoop;
use crate::checkpoint::{ModelIdentity, Progress};
use crate::config::TrainConfig;
use crate::flops::ModelFlops;
use crate::gradients::{TreeSum, clip_coefficient, sum_of_squares};
use crate::metrics::{MemoryReport, StepReport, peak_rss_bytes};
use crate::micro_batch::MicroBatch;
use crate::optim::Moments;
use crate::params::ParamStore;
use crate::random::key;
use crate::run_dir::RunDir;
use crate::{Companion, Error};
use burn::tensor::Device;
use hearth_data::loader::micro_batches;
use hearth_data::{Loader, Sequence};
use hearth_model::Architecture;
use hearth_model::rope::Rope;
use hearth_weights::TensorSource;
use std::time::Instant;

/// What a trainer is made of, beside its configuration.
pub struct Setup<'a> {
    /// The model.
    pub arch: Box<dyn Architecture>,
    /// Its weights.
    pub weights: &'a dyn TensorSource,
    /// Training data; its `global_batch` is the configuration's.
    pub loader: Loader,
    /// Where tensors live.
    pub device: Device,
    /// Put beside the weights in every checkpoint of a full fine-tune (`config.json`, tokenizer), so that it is a
    /// model others can open: see [`crate::companions`].
    pub companions: Vec<Companion>,
}

/// A model being trained.
pub struct Trainer {
    pub(crate) config: TrainConfig,
    pub(crate) store: ParamStore,
    pub(crate) moments: Vec<Moments>,
    pub(crate) loader: Loader,
    pub(crate) progress: Progress,
    pub(crate) companions: Vec<Companion>,
    pub(crate) run_dir: Option<RunDir>,
    pub(crate) last: Option<StepReport>,
    arch: Box<dyn Architecture>,
    rope: Rope,
    flops: ModelFlops,
}

/// Summed gradients of one step.
struct StepGradients {
    /// One per trained parameter; sums over tokens, not means.
    sums: Vec<Vec<f32>>,
    /// Sum of losses over trained tokens.
    loss_sum: f64,
    peak_bytes: usize,
}

impl Trainer {
    /// A trainer at step 0.
    ///
    /// # Errors
    /// Contradictory settings, weights that do not fit, or [`Error::Occupied`] when the checkpoint directory holds
    /// another run.
    pub fn new(setup: Setup<'_>, config: TrainConfig) -> Result<Self, Error> {
        config.validate()?;
        if let Some(checkpoint) = &config.checkpoint {
            RunDir::refuse_occupied(&checkpoint.dir)?;
        }
        let mut trainer = Self::build(setup, config)?;
        trainer.open_run_dir()?;
        Ok(trainer)
    }

    pub(crate) fn build(setup: Setup<'_>, config: TrainConfig) -> Result<Self, Error> {
        config.validate()?;
        let store = ParamStore::load(&*setup.arch, setup.weights, &config, setup.device)?;
        let moments = store.trained().iter().map(|p| Moments::new(p.values().len())).collect();
        let companions = match &config.adapter {
            Some(adapter) => vec![crate::lora::adapter_config(adapter)],
            None => setup.companions,
        };
        Ok(Self {
            rope: Rope::new(setup.arch.config()),
            flops: ModelFlops::new(&*setup.arch, &store),
            progress: Progress { cursor: setup.loader.cursor(), ..Progress::default() },
            loader: setup.loader,
            arch: setup.arch,
            run_dir: None,
            last: None,
            companions,
            moments,
            store,
            config,
        })
    }

    pub(crate) fn open_run_dir(&mut self) -> Result<(), Error> {
        if let Some(checkpoint) = &self.config.checkpoint {
            self.run_dir = Some(RunDir::open(checkpoint.clone(), self.config.log, self.progress.step)?);
        }
        Ok(())
    }

    /// One step: forward and backward over the global batch, clipping, one optimizer update.
    ///
    /// # Errors
    /// [`Error::NotFinite`] (the parameters are as before the step), [`Error::Config`] when no token of the batch is
    /// trained.
    pub fn step(&mut self) -> Result<StepReport, Error> {
        let sequences = self.loader.next_step();
        self.step_on(sequences)
    }

    /// [`Trainer::step`] over sequences of the caller's choice instead of the loader's next.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn step_on(&mut self, sequences: Vec<Sequence>) -> Result<StepReport, Error> {
        let start = Instant::now();
        let step = self.progress.step + 1;
        let batches = self.batches(step, sequences)?;
        let trained_tokens: u64 = batches.iter().map(MicroBatch::trained).sum();
        let gradients = self.accumulate(step, &batches)?;
        let squares: f64 = gradients.sums.iter().map(|g| sum_of_squares(g)).sum();
        let (loss, grad_norm) =
            (gradients.loss_sum / trained_tokens as f64, squares.sqrt() / trained_tokens as f64);
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::NotFinite { step, loss, grad_norm });
        }
        let lr =
            self.config.sched.rate(self.progress.updates as usize, self.config.steps, self.config.optim.lr);
        let clip = clip_coefficient(grad_norm, self.config.clip_norm);
        self.update(lr, (clip as f64 / trained_tokens as f64) as f32, &gradients.sums);
        let tokens = batches.iter().map(|b| b.ids.len() as u64).sum();
        self.progress.step = step;
        self.progress.tokens += tokens;
        self.progress.cursor = self.loader.cursor();
        self.progress.loss = loss;
        let step_s = start.elapsed().as_secs_f64();
        let report = StepReport {
            step,
            loss,
            lr,
            grad_norm,
            tokens,
            trained_tokens,
            tokens_total: self.progress.tokens,
            tok_s: tokens as f64 / step_s,
            step_s,
            mfu: self.mfu(&batches, step_s),
            peak_rss_bytes: peak_rss_bytes(),
            memory: self.memory(gradients.peak_bytes),
            eval_loss: None,
        };
        self.last = Some(report.clone());
        Ok(report)
    }

    fn batches(&self, step: u64, sequences: Vec<Sequence>) -> Result<Vec<MicroBatch>, Error> {
        if sequences.len() != self.config.global_batch {
            let (got, want) = (sequences.len(), self.config.global_batch);
            return Err(Error::Config(format!(
                "a step was given {got} sequences, train.global_batch = {want}"
            )));
        }
        let batches: Vec<MicroBatch> = micro_batches(sequences, self.config.micro_batch)
            .iter()
            .map(|batch| MicroBatch::new(&batch.sequences))
            .collect();
        self.check_ids(&batches)?;
        if batches.iter().all(|b| b.trained() == 0) {
            return Err(Error::Config(format!(
                "step {step}: none of its tokens is trained; look at `hearth data inspect`, and at data_opts.train_on"
            )));
        }
        Ok(batches)
    }

    /// Refuses ids the model has no embedding for.
    fn check_ids(&self, batches: &[MicroBatch]) -> Result<(), Error> {
        let vocab = self.arch.config().vocab_size;
        let ids = batches.iter().flat_map(|b| b.ids.iter().copied());
        let labels = batches.iter().flat_map(|b| b.targets.iter().filter(|t| **t >= 0).map(|t| *t as u32));
        match ids.chain(labels).find(|id| *id as usize >= vocab) {
            None => Ok(()),
            Some(id) => Err(Error::Config(format!(
                "the data has token id {id}, the model's vocabulary ends at {}; use the model's own tokenizer",
                vocab - 1
            ))),
        }
    }

    /// Gradients of all micro-batches, summed in the tree of [`crate::gradients`].
    fn accumulate(&self, step: u64, batches: &[MicroBatch]) -> Result<StepGradients, Error> {
        let mut trees: Vec<TreeSum> = self.store.trained().iter().map(|_| TreeSum::default()).collect();
        let (mut loss_sum, mut peak_bytes) = (0.0, 0);
        for (i, batch) in batches.iter().enumerate() {
            let dropout = Some(key(&[self.config.seed, step, i as u64]));
            loss_sum += self.block_loop(dropout).gradients(batch, &mut |index, gradient| {
                trees[index].push(gradient);
            })?;
            peak_bytes = peak_bytes.max(trees.iter().map(TreeSum::bytes).sum());
        }
        let sums = trees.into_iter().map(|tree| tree.finish().expect("a gradient per micro-batch")).collect();
        Ok(StepGradients { sums, loss_sum, peak_bytes })
    }

    fn update(&mut self, lr: f64, gradient_scale: f32, gradients: &[Vec<f32>]) {
        self.progress.updates += 1;
        let update = self.config.optim.update(self.progress.updates, lr, gradient_scale);
        for ((param, moments), gradient) in
            self.store.trained_mut().iter_mut().zip(&mut self.moments).zip(gradients)
        {
            update.apply(param.values_mut(), moments, gradient);
        }
    }

    /// Mean loss per trained token over `sequences`, without dropout.
    ///
    /// # Errors
    /// Those of the weight source; [`Error::Config`] when nothing in them is trained.
    pub fn evaluate(&self, sequences: &[Sequence]) -> Result<f64, Error> {
        let (mut sum, mut count) = (0.0, 0);
        for chunk in sequences.chunks(self.config.micro_batch) {
            let batch = MicroBatch::new(chunk);
            self.check_ids(std::slice::from_ref(&batch))?;
            count += batch.trained();
            sum += self.block_loop(None).loss(&batch)?;
        }
        if count == 0 {
            return Err(Error::Config(
                "the validation data has no trained token; give it more examples".into(),
            ));
        }
        Ok(sum / count as f64)
    }

    fn block_loop(&self, dropout: Option<u64>) -> BlockLoop<'_> {
        let recompute = self.config.recompute;
        BlockLoop { arch: &*self.arch, store: &self.store, rope: &self.rope, recompute, dropout }
    }

    fn mfu(&self, batches: &[MicroBatch], step_s: f64) -> Option<f64> {
        let documents = batches.iter().flat_map(|b| b.documents.iter().copied());
        Some(self.flops.of(documents) / step_s / self.config.peak_flops?)
    }

    fn memory(&self, grads_bytes: usize) -> MemoryReport {
        let bytes = |moments: &Moments| size_of_val(moments.m.as_slice()) + size_of_val(moments.v.as_slice());
        MemoryReport {
            params_bytes: self.store.trained_bytes() as u64,
            frozen_bytes: self.store.frozen_bytes() as u64,
            grads_bytes: grads_bytes as u64,
            optimizer_bytes: self.moments.iter().map(|m| bytes(m) as u64).sum(),
        }
    }

    /// What is trained.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// AdamW's moments, in the order of [`ParamStore::trained`].
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Where the run stands.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// What the run was told.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model.
    pub fn architecture(&self) -> &dyn Architecture {
        &*self.arch
    }

    pub(crate) fn identity(&self) -> ModelIdentity {
        ModelIdentity {
            model_type: self.arch.config().model_type.clone(),
            parameters_sha256: self.store.parameters_sha256(),
            frozen_sample_sha256: self.store.frozen_sample_sha256(),
        }
    }
}
