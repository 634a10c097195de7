//! A run whose steps something else computes: a card with a trainer of its own.
//!
//! Data, schedule, metrics, evaluation and checkpoints are those of [`Trainer`](crate::Trainer), byte for byte in their
//! formats: either goes on from the other's checkpoints.

mod saving;

pub use saving::BUFFER_BYTES;

use crate::batches;
use crate::checkpoint::{self, Checkpoint, ModelIdentity, Progress};
use crate::config::TrainConfig;
use crate::flops::ModelFlops;
use crate::layout::Layout;
use crate::metrics::{MemoryReport, Rewards, StepReport, peak_rss_bytes};
use crate::micro_batch::MicroBatch;
use crate::observer::Observer;
use crate::optim::Step;
use crate::params::layout;
use crate::run::{Steps, Summary, drive, find};
use crate::run_dir::RunDir;
use crate::state::Which;
use crate::{Companion, Error, Files};
use hearth_data::{Loader, Sequence};
use hearth_memory::Ledger;
use hearth_model::Architecture;
use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Holds a model with its gradients and optimizer state, and computes its steps. Every parameter is trained; losses are
/// means over trained tokens.
pub trait Accelerator {
    /// Gradients of the mean loss over all micro-batches, clipped to `clip_norm` (0 = not), and one update. `rule` makes the
    /// update of what gradients are to be multiplied by.
    ///
    /// # Errors
    /// [`Failure`]; after [`Failure::NotFinite`] nothing was updated.
    fn step(
        &mut self,
        batches: &[MicroBatch],
        clip_norm: f64,
        rule: &dyn Fn(f32) -> Step,
    ) -> Result<Measure, Failure>;

    /// Summed negative log-likelihood of a micro-batch's trained tokens.
    ///
    /// # Errors
    /// [`Failure`].
    fn loss(&mut self, batch: &MicroBatch) -> Result<f64, Failure>;

    /// A parameter's numbers from the `first` on.
    ///
    /// # Errors
    /// [`Failure`].
    fn read(&mut self, param: &str, which: Which, first: usize, into: &mut [f32]) -> Result<(), Failure>;

    /// Overwrites them.
    ///
    /// # Errors
    /// [`Failure`].
    fn write(&mut self, param: &str, which: Which, first: usize, values: &[f32]) -> Result<(), Failure>;

    /// Waits until everything it was told is done.
    ///
    /// # Errors
    /// [`Failure`].
    fn settle(&mut self) -> Result<(), Failure>;

    /// What it holds.
    fn memory(&self) -> MemoryReport;

    /// Something the user should know that stops nothing.
    fn notice(&self) -> Option<String>;
}

/// What a step's micro-batches came to, before the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// Mean loss.
    pub loss: f64,
    /// Norm of its gradient, before clipping.
    pub grad_norm: f64,
}

/// Why an accelerator does not go on.
#[derive(Debug)]
pub enum Failure {
    /// Loss or gradients are no numbers.
    NotFinite(Measure),
    /// It is gone, with everything on it: a new process may find it again.
    Lost(Box<dyn StdError + Send + Sync>),
    /// Anything else.
    Other(Box<dyn StdError + Send + Sync>),
}

/// What makes the accelerator once nothing else stands in the way: weights take their time.
pub type MakeAccelerator<'a> = dyn FnOnce() -> Result<Box<dyn Accelerator>, Failure> + 'a;

/// What an [`AcceleratedTrainer`] is made of, beside its configuration.
pub struct AcceleratorSetup<'a> {
    /// The model, of which names and shapes are asked.
    pub arch: Box<dyn Architecture>,
    /// Training data; its `global_batch` is the configuration's.
    pub loader: Loader,
    /// Put beside the weights in every checkpoint.
    pub companions: Vec<Companion>,
    /// What a save's buffer is charged to.
    pub ledger: Ledger,
    /// Holds the model's first weights.
    pub accelerator: Box<MakeAccelerator<'a>>,
}

/// A run on an accelerator.
pub struct AcceleratedTrainer {
    accelerator: Box<dyn Accelerator>,
    config: TrainConfig,
    arch: Box<dyn Architecture>,
    layout: Layout,
    flops: ModelFlops,
    loader: Loader,
    progress: Progress,
    companions: Vec<Companion>,
    ledger: Ledger,
    run_dir: Option<RunDir>,
    /// The newest checkpoint.
    saved: Option<PathBuf>,
    /// One that nobody was told of.
    just_saved: Option<PathBuf>,
    files: Arc<dyn Files>,
}

impl AcceleratedTrainer {
    /// A trainer at step 0.
    ///
    /// # Errors
    /// Contradictory settings, [`Error::Occupied`] when the checkpoint directory holds another run, and the accelerator's.
    pub fn new(setup: AcceleratorSetup<'_>, config: TrainConfig) -> Result<Self, Error> {
        config.validate()?;
        if let Some(checkpoint) = &config.checkpoint {
            RunDir::refuse_occupied(&checkpoint.dir)?;
        }
        let mut trainer = Self::build(setup, config)?;
        trainer.open_run_dir()?;
        Ok(trainer)
    }

    /// A trainer that goes on from the newest complete checkpoint in `config.checkpoint.dir`, whoever wrote it.
    ///
    /// # Errors
    /// [`Error::NothingToResume`], [`Error::Foreign`], and those of [`AcceleratedTrainer::new`].
    pub fn resume(
        setup: AcceleratorSetup<'_>,
        config: TrainConfig,
        observer: &mut dyn Observer,
    ) -> Result<Self, Error> {
        config.validate()?;
        let Some(dir) = config.checkpoint.as_ref().map(|c| c.dir.clone()) else {
            return Err(Error::Config("resuming needs checkpoint.dir, the directory to resume from".into()));
        };
        let path = find(&dir, &config, observer)?;
        let mut trainer = Self::build(setup, config)?;
        trainer.restore(&Checkpoint::open_verified(&path)?)?;
        trainer.open_run_dir()?;
        Ok(trainer)
    }

    fn build(setup: AcceleratorSetup<'_>, config: TrainConfig) -> Result<Self, Error> {
        let AcceleratorSetup { arch, loader, companions, ledger, accelerator } = setup;
        if let Some(adapter) = &config.adapter {
            return Err(Error::Config(format!(
                "adapter.rank = {}: an accelerator trains every parameter; leave the adapter out",
                adapter.rank
            )));
        }
        config.objective.objective().check(loader.sequences())?;
        let layout = layout(&*arch, &config, 1, 0)?;
        let progress = Progress { cursor: loader.cursor(), ..Progress::default() };
        let accelerator = accelerator().map_err(|failure| explain(failure, &progress, None))?;
        Ok(Self {
            flops: ModelFlops::planned(&*arch, &config, &layout),
            progress,
            accelerator,
            config,
            arch,
            layout,
            loader,
            companions,
            ledger,
            run_dir: None,
            saved: None,
            just_saved: None,
            files: Arc::new(crate::Disk),
        })
    }

    fn open_run_dir(&mut self) -> Result<(), Error> {
        if let Some(checkpoint) = &self.config.checkpoint {
            let step = self.progress.step;
            self.run_dir = Some(RunDir::open(checkpoint.clone(), self.config.log, step)?);
            self.saved = (step > 0).then(|| checkpoint::step_path(&checkpoint.dir, step));
        }
        Ok(())
    }

    /// As [`Trainer::run`](crate::Trainer::run).
    ///
    /// # Errors
    /// [`Error::Lost`] when the accelerator is gone, and those of steps and saves; checkpoints that are there stay.
    pub fn run(
        &mut self,
        validation: &[Sequence],
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Summary, Error> {
        let newest = self.saved.clone();
        drive(self, newest, validation, observer, stop)
    }

    /// What saves are charged to.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Where the run stands.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// What computes the steps.
    pub fn accelerator(&mut self) -> &mut dyn Accelerator {
        &mut *self.accelerator
    }

    fn vocab(&self) -> usize {
        self.arch.config().vocab_size
    }

    fn identity(&self) -> ModelIdentity {
        ModelIdentity {
            model_type: self.arch.config().model_type.clone(),
            parameters_sha256: self.layout.names_sha256(),
            frozen_sample_sha256: String::new(),
        }
    }

    fn explain(&self, failure: Failure) -> Error {
        explain(failure, &self.progress, self.saved.as_deref())
    }

    fn step_on(&mut self, sequences: Vec<Sequence>) -> Result<StepReport, Error> {
        let start = Instant::now();
        let step = self.progress.step + 1;
        let batches = batches::of_step(&self.config, self.vocab(), step, sequences, MicroBatch::new)?;
        let lr =
            self.config.sched.rate(self.progress.updates as usize, self.config.steps, self.config.optim.lr());
        let (optim, update) = (self.config.optim, self.progress.updates + 1);
        let rule = |gradient_scale| optim.step(update, lr, gradient_scale);
        let done = self.accelerator.step(&batches, self.config.clip_norm, &rule);
        let Measure { loss, grad_norm } = done.map_err(|failure| self.explain(failure))?;
        let tokens = batches.iter().map(|batch| batch.ids.len() as u64).sum();
        self.progress = Progress {
            step,
            updates: update,
            tokens: self.progress.tokens + tokens,
            loss,
            cursor: self.loader.cursor(),
            ..self.progress
        };
        let step_s = start.elapsed().as_secs_f64();
        Ok(StepReport {
            step,
            loss,
            lr,
            grad_norm,
            tokens,
            trained_tokens: batches.iter().map(MicroBatch::trained).sum(),
            tokens_total: self.progress.tokens,
            tok_s: tokens as f64 / step_s,
            step_s,
            mfu: self.mfu(&batches, step_s),
            peak_rss_bytes: peak_rss_bytes(),
            memory: self.accelerator.memory(),
            ..StepReport::default()
        })
    }

    fn mfu(&self, batches: &[MicroBatch], step_s: f64) -> Option<f64> {
        let documents = batches.iter().flat_map(|batch| batch.documents.iter().copied());
        Some(self.flops.of(documents) / step_s / self.config.peak_flops?)
    }

    fn mean_loss(&mut self, sequences: &[Sequence]) -> Result<f64, Error> {
        let (batches, count) =
            batches::of_validation(&self.config, self.vocab(), sequences, MicroBatch::new)?;
        let mut sum = 0.0;
        for batch in &batches {
            sum += self.accelerator.loss(batch).map_err(|failure| self.explain(failure))?;
        }
        Ok(sum / count as f64)
    }
}

impl Steps for AcceleratedTrainer {
    fn stands(&self) -> (&TrainConfig, Progress) {
        (&self.config, self.progress)
    }

    fn step(&mut self, stop: &AtomicBool) -> Result<(StepReport, bool), Error> {
        let sequences = self.loader.next_step();
        let report = self.step_on(sequences)?;
        Ok((report, stop.load(Ordering::Relaxed)))
    }

    fn evaluation(&mut self, sequences: &[Sequence]) -> Result<(f64, Option<Rewards>), Error> {
        Ok((self.mean_loss(sequences)?, None))
    }

    fn log(&mut self, report: &StepReport) -> Result<(), Error> {
        self.run_dir.as_mut().map_or(Ok(()), |dir| dir.log(report))
    }

    fn begin_save(&mut self) -> Result<(), Error> {
        self.save().map(drop)
    }

    fn finish_save(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn settle(&mut self) -> Result<(), Error> {
        self.accelerator.settle().map_err(|failure| self.explain(failure))
    }

    fn take_saved(&mut self) -> Option<PathBuf> {
        self.just_saved.take()
    }
}

/// What a failure is to a run that stands there.
fn explain(failure: Failure, progress: &Progress, saved: Option<&std::path::Path>) -> Error {
    let step = progress.step + 1;
    match failure {
        Failure::NotFinite(Measure { loss, grad_norm }) => Error::NotFinite { step, loss, grad_norm },
        Failure::Other(source) => Error::Accelerator(source),
        Failure::Lost(source) => {
            let kept = match saved {
                Some(path) => format!("{} is kept: go on from it with --resume", path.display()),
                None => "no checkpoint was saved yet".to_owned(),
            };
            Error::Lost { step, source, kept }
        }
    }
}
