//! A run from wherever it stands to its end, or until it is asked to stop; saving and resuming.

use crate::checkpoint::{self, Checkpoint, Companion, Progress};
use crate::config::TrainConfig;
use crate::metrics::{Rewards, StepReport, peak_rss_bytes};
use crate::observer::Observer;
use crate::trainer::{Setup, Trainer};
use crate::{Error, Files};
use hearth_data::Sequence;
use hearth_weights::ModelFiles;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps taken in all, those before a resume included.
    pub steps: u64,
    /// Loss of the last step.
    pub loss: f64,
    /// Loss on the validation data at the end, if there is any.
    pub eval_loss: Option<f64>,
    /// Tokens per second over this process's steps.
    pub tok_s: f64,
    /// Largest resident size of the process.
    pub peak_rss_bytes: u64,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Whether it was stopped before its last step.
    pub stopped: bool,
}

impl Trainer {
    /// A trainer that goes on from the newest complete checkpoint in `config.checkpoint.dir`. `config` may change
    /// what the run computes from there on (a notice says so); the model may not.
    ///
    /// # Errors
    /// [`Error::NothingToResume`], [`Error::Foreign`], and those of [`Trainer::new`].
    pub fn resume(setup: Setup<'_>, config: TrainConfig, observer: &mut dyn Observer) -> Result<Self, Error> {
        let Some(dir) = config.checkpoint.as_ref().map(|c| c.dir.clone()) else {
            return Err(Error::Config("resuming needs checkpoint.dir, the directory to resume from".into()));
        };
        let found = match setup.comm.rank() {
            0 => find(&dir, &config, observer).map(Some),
            _ => Ok(None),
        };
        let path = crate::saving::agreed_path(&setup.comm, found)?;
        let mut trainer = Self::build(setup, config)?;
        trainer.restore(&Checkpoint::open_verified(&path)?)?;
        trainer.open_run_dir()?;
        Ok(trainer)
    }

    /// Writes checkpoints through `files` instead of straight to the disk: how tests let a disk fill up or die.
    pub fn set_files(&mut self, files: Arc<dyn Files>) {
        self.files = files;
    }

    /// Trains to the last step. Evaluates on `validation` (if it is not empty) and saves as configured and at the
    /// end. Once `stop` is set the step in progress is finished and saved, and the run ends well.
    ///
    /// # Errors
    /// Those of [`Trainer::step`] and of saving; checkpoints that are already there stay.
    pub fn run(
        &mut self,
        validation: &[Sequence],
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Summary, Error> {
        let newest = self.newest_path();
        drive(self, newest, validation, observer, stop)
    }

    /// Where the checkpoint of the present step is, if it was resumed from.
    fn newest_path(&self) -> Option<PathBuf> {
        let dir = &self.config.checkpoint.as_ref()?.dir;
        (self.progress.step > 0).then(|| checkpoint::step_path(dir, self.progress.step))
    }
}

/// What a run asks of a trainer, whatever computes its steps.
pub(crate) trait Steps {
    /// What the run was told, and where it stands.
    fn stands(&self) -> (&TrainConfig, Progress);
    /// The next step, and whether `stop` was seen before its end.
    fn step(&mut self, stop: &AtomicBool) -> Result<(StepReport, bool), Error>;
    /// Mean loss, and how pairs compare where they do.
    fn evaluation(&mut self, validation: &[Sequence]) -> Result<(f64, Option<Rewards>), Error>;
    /// Writes a step's line.
    fn log(&mut self, report: &StepReport) -> Result<(), Error>;
    /// Begins to save the present state; it may be complete only after [`Steps::finish_save`].
    fn begin_save(&mut self) -> Result<(), Error>;
    /// Completes the save under way, if there is one.
    fn finish_save(&mut self) -> Result<(), Error>;
    /// Waits for the last update, whose failure is the run's.
    fn settle(&mut self) -> Result<(), Error>;
    /// A checkpoint that was completed and that nobody was told of.
    fn take_saved(&mut self) -> Option<PathBuf>;
}

impl Steps for Trainer {
    fn stands(&self) -> (&TrainConfig, Progress) {
        (&self.config, self.progress)
    }

    fn step(&mut self, stop: &AtomicBool) -> Result<(StepReport, bool), Error> {
        let sequences = self.loader.next_step();
        self.step_unless(sequences, stop)
    }

    fn evaluation(&mut self, validation: &[Sequence]) -> Result<(f64, Option<Rewards>), Error> {
        Trainer::evaluation(self, validation)
    }

    fn log(&mut self, report: &StepReport) -> Result<(), Error> {
        self.run_dir.as_mut().map_or(Ok(()), |dir| dir.log(report))
    }

    fn begin_save(&mut self) -> Result<(), Error> {
        Trainer::begin_save(self).map(drop)
    }

    fn finish_save(&mut self) -> Result<(), Error> {
        Trainer::finish_save(self).map(drop)
    }

    fn settle(&mut self) -> Result<(), Error> {
        Trainer::settle(self)
    }

    fn take_saved(&mut self) -> Option<PathBuf> {
        self.just_saved.take()
    }
}

/// [`Trainer::run`], whatever computes the steps; `newest` is the checkpoint that the run stands at.
pub(crate) fn drive(
    trainer: &mut dyn Steps,
    newest: Option<PathBuf>,
    validation: &[Sequence],
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Summary, Error> {
    let (config, before) = trainer.stands();
    let (steps, eval_every) = (config.steps as u64, config.eval_every as u64);
    let every = config.checkpoint.as_ref().map_or(0, |c| c.every as u64);
    let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
    let start = Instant::now();
    let (mut checkpoint, mut eval_loss, mut stopped, mut aside) = (newest, None, false, 0.0);
    while trainer.stands().1.step < steps && !stopped {
        let (mut report, asked) = match trainer.step(stop) {
            Ok(done) => done,
            Err(error) => {
                // What was saved before the step that failed is worth keeping.
                trainer.finish_save()?;
                return Err(error);
            }
        };
        tell_saved(trainer, observer, &mut checkpoint);
        let pause = Instant::now();
        let last = report.step >= steps;
        stopped = asked && !last;
        if !validation.is_empty() && !stopped && (last || due(eval_every, report.step)) {
            let (loss, rewards) = trainer.evaluation(validation)?;
            eval_loss = Some(loss);
            report.eval_loss = eval_loss;
            report.eval_reward_margin = rewards.map(|r| r.margin);
            report.eval_reward_accuracy = rewards.map(|r| r.accuracy);
        }
        trainer.log(&report)?;
        observer.step(&report);
        aside += pause.elapsed().as_secs_f64();
        if last || stopped || due(every, report.step) {
            trainer.begin_save()?;
        }
    }
    trainer.settle()?;
    let train_s = start.elapsed().as_secs_f64() - aside;
    trainer.finish_save()?;
    tell_saved(trainer, observer, &mut checkpoint);
    let Progress { step, tokens, loss, .. } = trainer.stands().1;
    let tokens = (tokens - before.tokens) as f64;
    Ok(Summary {
        steps: step,
        loss,
        eval_loss,
        tok_s: if tokens > 0.0 { tokens / train_s } else { 0.0 },
        peak_rss_bytes: peak_rss_bytes(),
        checkpoint,
        stopped,
    })
}

fn tell_saved(trainer: &mut dyn Steps, observer: &mut dyn Observer, newest: &mut Option<PathBuf>) {
    if let Some(path) = trainer.take_saved() {
        observer.saved(&path);
        *newest = Some(path);
    }
}

/// The newest complete checkpoint in `dir`, verified, with notices of what was skipped and what has changed since.
pub(crate) fn find(dir: &Path, config: &TrainConfig, observer: &mut dyn Observer) -> Result<PathBuf, Error> {
    let found = checkpoint::search(dir)?;
    for skipped in &found.skipped {
        observer.notice(&format!("skipped checkpoint {}: {}", skipped.path.display(), skipped.why));
    }
    let Some(newest) = found.newest else {
        let skipped = found.skipped.iter().map(|s| format!("; {}: {}", s.path.display(), s.why)).collect();
        return Err(Error::NothingToResume { dir: dir.to_owned(), skipped });
    };
    if newest.manifest.config_sha256 != config.hash() {
        let changed = changes(&newest.manifest.config.computed(), &config.computed()).join(", ");
        observer.notice(&format!("resuming {} with other settings: {changed}", newest.path.display()));
    }
    Ok(newest.path)
}

/// The small files that make a directory of weights a Hugging Face model: `config.json`, tokenizer, chat template.
///
/// # Errors
/// [`Error::Weights`].
pub fn companions(model: &ModelFiles) -> Result<Vec<Companion>, Error> {
    let mut config = model.hf_config.clone();
    // Checkpoints hold f32 masters.
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = config.get_mut(key) {
            *dtype = Value::from("float32");
        }
    }
    let mut bytes = serde_json::to_vec_pretty(&config).expect("a JSON map serialises");
    bytes.push(b'\n');
    let mut found = vec![Companion { name: "config.json".into(), bytes }];
    for (name, bytes) in hearth_weights::hf_dir::side_files(model)? {
        if found.iter().all(|known| known.name != name) {
            found.push(Companion { name, bytes });
        }
    }
    Ok(found)
}

/// `key = new (was old)` for every setting that differs.
fn changes(old: &TrainConfig, new: &TrainConfig) -> Vec<String> {
    let value = |config| serde_json::to_value(config).expect("a plain struct serialises");
    let mut found = Vec::new();
    compare("", &value(old), &value(new), &mut found);
    found
}

fn compare(path: &str, old: &Value, new: &Value, found: &mut Vec<String>) {
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        for (key, new) in new {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            compare(&path, old.get(key).unwrap_or(&Value::Null), new, found);
        }
    } else if old != new {
        found.push(format!("{path} = {new} (was {old})"));
    }
}
