//! The step, on one rank or many.

mod passes;

use crate::activations::{Activations, Meter};
use crate::batches;
use crate::beside::Beside;
use crate::block_loop::BlockLoop;
use crate::checkpoint::{ModelIdentity, Progress};
use crate::config::{LossScale, TrainConfig};
use crate::flops::ModelFlops;
use crate::gradients::clip_coefficient;
use crate::loss_scale::LossScaler;
use crate::metrics::{DiskReport, MemoryReport, Rewards, StepReport, peak_rss_bytes};
use crate::micro_batch::MicroBatch;
use crate::objective::Sums;
use crate::params::{ParamStore, layout};
use crate::reduce::{Assignment, Spill};
use crate::reference::References;
use crate::run_dir::RunDir;
use crate::saving::Saving;
use crate::sizes::Sizes;
use crate::state::{OptimizerState, Which};
use crate::{Companion, Error};
use burn::tensor::Device;
use hearth_collective::Ordered;
use hearth_data::{Loader, Sequence};
use hearth_memory::heap::Hoard;
use hearth_memory::{Charge, Kind, Ledger, Tier};
use hearth_model::Architecture;
use hearth_model::rope::Rope;
use hearth_weights::TensorSource;
use passes::Accumulated;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// What a trainer is made of, beside its configuration.
pub struct Setup<'a> {
    /// The model.
    pub arch: Box<dyn Architecture>,
    /// Its weights.
    pub weights: &'a dyn TensorSource,
    /// Training data; its `global_batch` is the configuration's. The same on every rank.
    pub loader: Loader,
    /// What the run will be evaluated on; may be empty. An objective that compares with the first weights asks them of
    /// these sequences too before they change.
    pub validation: &'a [Sequence],
    /// Where tensors live.
    pub device: Device,
    /// Put beside the weights in every checkpoint of a full fine-tune (`config.json`, tokenizer), so that it is a
    /// model others can open: see [`crate::companions`].
    pub companions: Vec<Companion>,
    /// The ranks that train together; [`hearth_collective::single`] for one alone.
    pub comm: Ordered,
    /// This rank's budget.
    pub ledger: Ledger,
    /// What the forward and backward pass hold; all zero when nobody measured.
    pub activations: Activations,
}

/// One rank of a model being trained. Every rank makes the same calls in the same order.
pub struct Trainer {
    pub(crate) config: TrainConfig,
    pub(crate) store: ParamStore,
    pub(crate) state: OptimizerState,
    pub(crate) loader: Loader,
    pub(crate) progress: Progress,
    pub(crate) companions: Vec<Companion>,
    pub(crate) comm: Ordered,
    pub(crate) ledger: Ledger,
    /// Rank 0's.
    pub(crate) run_dir: Option<RunDir>,
    pub(crate) saving: Option<Saving>,
    /// A checkpoint that was completed and that nobody was told of.
    pub(crate) just_saved: Option<std::path::PathBuf>,
    pub(crate) files: Arc<dyn crate::Files>,
    assignment: Assignment,
    spill: Option<Spill>,
    /// What the kernels keep.
    _scratch: Charge,
    /// Every step asks for the same blocks of memory.
    _hoard: Hoard,
    /// The update, where it runs beside the passes.
    beside: Option<Beside>,
    meter: Meter,
    references: References,
    pub(crate) arch: Box<dyn Architecture>,
    rope: Rope,
    flops: ModelFlops,
}

impl Trainer {
    /// A trainer at step 0.
    ///
    /// # Errors
    /// Contradictory settings, weights that do not fit, a budget that does not hold the run, or [`Error::Occupied`] when
    /// the checkpoint directory holds another run.
    pub fn new(setup: Setup<'_>, config: TrainConfig) -> Result<Self, Error> {
        config.validate()?;
        let occupied = match &config.checkpoint {
            Some(checkpoint) if setup.comm.rank() == 0 => RunDir::refuse_occupied(&checkpoint.dir),
            _ => Ok(()),
        };
        crate::saving::agree(&setup.comm, occupied)?;
        let mut trainer = Self::build(setup, config)?;
        trainer.open_run_dir()?;
        Ok(trainer)
    }

    pub(crate) fn build(setup: Setup<'_>, config: TrainConfig) -> Result<Self, Error> {
        config.validate()?;
        let Setup { arch, weights, loader, validation, device, companions, comm, ledger, activations } =
            setup;
        let objective = config.objective;
        objective.objective().check(loader.sequences())?;
        objective.objective().check(validation)?;
        let assignment = Assignment::new(&config, comm.world_size())?;
        let layout = layout(&*arch, &config, comm.world_size(), comm.rank())?;
        let sizes = Sizes { layout: &layout, config: &config };
        let mut state = OptimizerState::new(&sizes, &ledger)?;
        let spill = match sizes.spills() {
            true => Some(Spill::new(&sizes, assignment, &ledger)?),
            false => None,
        };
        let _scratch = ledger.charge(Tier::Device, Kind::Staging, activations.scratch)?;
        // With an adapter the first weights are always there to ask.
        let remember = objective.objective().compares() && config.adapter.is_none();
        let mut first_weights = Sha256::new();
        let mut masters = |unit, values: &[f32]| {
            if remember && comm.rank() == 0 {
                first_weights.update(bytemuck::cast_slice::<f32, u8>(values));
            }
            state.set(Which::Master, unit, 0, values)
        };
        let store =
            ParamStore::load(&*arch, weights, &config, layout.clone(), device, &ledger, &mut masters)?;
        let beside =
            Beside::new(&Sizes { layout: &layout, config: &config }, &state, store.copies(), &ledger)?;
        let companions = match &config.adapter {
            Some(adapter) => vec![crate::lora::adapter_config(adapter)],
            None => companions,
        };
        let mut trainer = Self {
            rope: Rope::new(arch.config()),
            flops: ModelFlops::new(&*arch, &store),
            progress: Progress { cursor: loader.cursor(), ..Progress::default() },
            meter: Meter::new(ledger.clone(), activations),
            files: Arc::new(crate::Disk),
            run_dir: None,
            saving: None,
            just_saved: None,
            loader,
            arch,
            companions,
            state,
            store,
            config,
            comm,
            ledger,
            assignment,
            spill,
            _scratch,
            _hoard: Hoard::begin(),
            beside,
            references: References::default(),
        };
        if remember {
            trainer.references = trainer.references(first_weights, validation)?;
        }
        Ok(trainer)
    }

    pub(crate) fn open_run_dir(&mut self) -> Result<(), Error> {
        if let Some(checkpoint) = self.config.checkpoint.as_ref().filter(|_| self.comm.rank() == 0) {
            self.run_dir = Some(RunDir::open(checkpoint.clone(), self.config.log, self.progress.step)?);
        }
        Ok(())
    }

    /// One step: forward and backward over the global batch, clipping, one optimizer update.
    ///
    /// # Errors
    /// [`Error::NotFinite`] (the parameters are as before the step; where they are updated beside the backward pass, as
    /// far as their own gradients were not finite or came after), [`Error::Config`] when no token of the batch is
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
        Ok(self.step_unless(sequences, &AtomicBool::new(false))?.0)
    }

    /// A step, and whether any rank saw `stop` before its end: all ranks agree on that.
    pub(crate) fn step_unless(
        &mut self,
        sequences: Vec<Sequence>,
        stop: &AtomicBool,
    ) -> Result<(StepReport, bool), Error> {
        let start = Instant::now();
        let moved = self.disk_moved();
        let step = self.progress.step + 1;
        let batches = self.batches(step, sequences)?;
        let trained_tokens: u64 = batches.iter().map(MicroBatch::trained).sum();
        let count = self.count(&batches);
        // What the gradients are multiples of.
        let scale = count as f64 * self.loss_scale() as f64;
        let lr =
            self.config.sched.rate(self.progress.updates as usize, self.config.steps, self.config.optim.lr());
        if self.beside.is_some() {
            // A save under way reads the state: it ends before anything changes.
            self.finish_save()?;
        }
        let Accumulated { reduced, sums, stop } =
            self.accumulate(step, &batches, stop, lr, (1.0 / scale) as f32)?;
        let passes_s = start.elapsed().as_secs_f64();
        let squares = self.sum_squares(&reduced)?;
        let loss = sums.loss / count as f64;
        let grad_norm = squares.sqrt() / scale;
        let skipped = self.overflowed(step, loss, grad_norm)?;
        self.finish_save()?;
        let loss_scale = self.config.loss_scale.map(|_| self.loss_scale() as f64);
        let begun = Instant::now();
        let mut update = self.store.copies().gate().take_moved();
        if !skipped {
            self.progress.updates += 1;
            if self.beside.is_none() {
                let clip = clip_coefficient(grad_norm, self.config.clip_norm);
                update = self.update(lr, (clip as f64 / scale) as f32, reduced)?;
            }
        }
        let update_s = begun.elapsed().as_secs_f64();
        self.learn_scale(skipped);
        let tokens = batches.iter().map(|b| b.ids.len() as u64).sum();
        self.progress.step = step;
        self.progress.tokens += tokens;
        self.progress.cursor = self.loader.cursor();
        if loss.is_finite() {
            self.progress.loss = loss;
        }
        let step_s = start.elapsed().as_secs_f64();
        let report = StepReport {
            step,
            loss,
            lr,
            grad_norm: if skipped { 0.0 } else { grad_norm },
            loss_scale,
            skipped,
            tokens,
            trained_tokens,
            tokens_total: self.progress.tokens,
            tok_s: tokens as f64 / step_s,
            step_s,
            mfu: self.mfu(&batches, step_s),
            peak_rss_bytes: peak_rss_bytes(),
            memory: self.memory(),
            disk: self.disk_report(moved).map(|disk| DiskReport {
                passes_s,
                update_s,
                wait_update_s: update.io_wait_s,
                ..disk
            }),
            rewards: self.rewards(&sums, count),
            eval_loss: None,
            eval_reward_margin: None,
            eval_reward_accuracy: None,
        };
        Ok((report, stop))
    }

    fn batches(&self, step: u64, sequences: Vec<Sequence>) -> Result<Vec<MicroBatch>, Error> {
        batches::of_step(&self.config, self.vocab(), step, sequences, |of| self.micro_batch(of))
    }

    pub(crate) fn vocab(&self) -> usize {
        self.arch.config().vocab_size
    }

    /// With what is known of its sequences.
    fn micro_batch(&self, sequences: &[Sequence]) -> MicroBatch {
        MicroBatch { reference: self.references.of(sequences), ..MicroBatch::new(sequences) }
    }

    /// What the mean loss of these micro-batches is a mean over.
    fn count(&self, batches: &[MicroBatch]) -> u64 {
        batches.iter().map(|batch| self.config.objective.objective().count(batch)).sum()
    }

    fn rewards(&self, sums: &Sums, count: u64) -> Option<Rewards> {
        self.config.objective.objective().compares().then(|| Rewards::mean(sums, count))
    }

    /// What the next step's loss is multiplied by.
    fn loss_scale(&self) -> f32 {
        match (self.config.loss_scale, &self.progress.scaler) {
            (None, _) => 1.0,
            (Some(LossScale::Fixed(scale)), _) => scale,
            (Some(LossScale::Dynamic(_)), Some(scaler)) => scaler.scale(),
            (Some(LossScale::Dynamic(scaling)), None) => scaling.init as f32,
        }
    }

    /// Whether this step is to be skipped; every rank sees the same numbers.
    fn overflowed(&self, step: u64, loss: f64, grad_norm: f64) -> Result<bool, Error> {
        if loss.is_finite() && grad_norm.is_finite() {
            return Ok(false);
        }
        match (self.config.loss_scale, &self.progress.scaler) {
            (Some(LossScale::Dynamic(settings)), Some(scaler)) if !scaler.exhausted(&settings) => Ok(true),
            (Some(LossScale::Dynamic(_)), None) => Ok(true),
            _ => Err(Error::NotFinite { step, loss, grad_norm }),
        }
    }

    fn learn_scale(&mut self, overflow: bool) {
        if let Some(LossScale::Dynamic(settings)) = &self.config.loss_scale {
            let scaler = self.progress.scaler.get_or_insert_with(|| LossScaler::new(settings));
            // The verdict is known: it is what `overflow` says.
            let _ = scaler.update(settings, overflow);
        }
    }

    /// Mean loss over `sequences`, without dropout.
    ///
    /// # Errors
    /// Those of the weight source; [`Error::Config`] when nothing in them is trained, when they are not what the
    /// objective takes, or when it compares with first weights that were not asked ([`Setup::validation`]).
    pub fn evaluate(&self, sequences: &[Sequence]) -> Result<f64, Error> {
        Ok(self.evaluation(sequences)?.0)
    }

    /// [`Trainer::evaluate`], and how chosen and rejected sequences compare where the objective compares them.
    ///
    /// # Errors
    /// As [`Trainer::evaluate`].
    pub fn evaluation(&self, sequences: &[Sequence]) -> Result<(f64, Option<Rewards>), Error> {
        let make = |of: &[Sequence]| self.micro_batch(of);
        let (batches, count) = batches::of_validation(&self.config, self.vocab(), sequences, make)?;
        // The ranks take turns; a rank without a turn of its own goes along, for weights may have to be gathered.
        let mut sums = Sums::default();
        for round in batches.chunks(self.comm.world_size()) {
            let batch = &round[self.comm.rank().min(round.len() - 1)];
            let sent = self.block_loop(None).loss(batch)?.to_array().to_vec();
            let all = self.comm.all_gather(sent).wait()?;
            all.chunks_exact(Sums::LEN).take(round.len()).for_each(|of_one| sums += Sums::from_slice(of_one));
        }
        Ok((sums.loss / count as f64, self.rewards(&sums, count)))
    }

    pub(crate) fn block_loop(&self, dropout: Option<u64>) -> BlockLoop<'_> {
        let recompute = self.config.recompute;
        BlockLoop {
            arch: &*self.arch,
            store: &self.store,
            comm: &self.comm,
            objective: self.config.objective.objective(),
            rope: &self.rope,
            recompute,
            dropout,
            base: false,
            loss_scale: if dropout.is_some() { self.loss_scale() } else { 1.0 },
            meter: &self.meter,
        }
    }

    fn mfu(&self, batches: &[MicroBatch], step_s: f64) -> Option<f64> {
        let documents = batches.iter().flat_map(|b| b.documents.iter().copied());
        Some(self.flops.of(documents) / step_s / self.config.peak_flops?)
    }

    fn memory(&self) -> MemoryReport {
        let sizes = Sizes { layout: self.store.layout(), config: &self.config };
        let units = || 0..self.store.layout().units().len();
        let optimizer = |unit| {
            let parts = sizes.segments(unit).into_iter();
            parts.map(|(range, place)| sizes.optimizer_bytes(unit, &range, place)).sum::<u64>()
        };
        MemoryReport {
            params_bytes: units().map(|unit| sizes.copy_bytes(unit)).sum(),
            frozen_bytes: self.store.frozen_bytes(),
            grads_bytes: units().map(|unit| sizes.partition_bytes(unit)).sum(),
            optimizer_bytes: units().map(optimizer).sum(),
        }
    }

    /// The parameters as this rank holds them.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// The ranks.
    pub fn comm(&self) -> &Ordered {
        &self.comm
    }

    /// This rank's budget and what it holds.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
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
