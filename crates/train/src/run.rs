//! A run from wherever it stands to its end, or until it is asked to stop; saving and resuming.

use crate::checkpoint::{self, Checkpoint, Companion};
use crate::config::TrainConfig;
use crate::metrics::peak_rss_bytes;
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
        let (start, tokens_before) = (Instant::now(), self.progress.tokens);
        let (mut checkpoint, mut eval_loss, mut stopped, mut aside) = (self.newest_path(), None, false, 0.0);
        let every = self.config.checkpoint.as_ref().map_or(0, |c| c.every as u64);
        while self.progress.step < self.config.steps as u64 && !stopped {
            let sequences = self.loader.next_step();
            let (mut report, asked) = match self.step_unless(sequences, stop) {
                Ok(done) => done,
                Err(error) => {
                    // What was saved before the step that failed is worth keeping.
                    self.finish_save()?;
                    return Err(error);
                }
            };
            self.tell_saved(observer, &mut checkpoint);
            let pause = Instant::now();
            let last = report.step >= self.config.steps as u64;
            stopped = asked && !last;
            let eval_every = self.config.eval_every as u64;
            let due = eval_every > 0 && report.step.is_multiple_of(eval_every);
            if !validation.is_empty() && !stopped && (last || due) {
                let (loss, rewards) = self.evaluation(validation)?;
                eval_loss = Some(loss);
                report.eval_loss = eval_loss;
                report.eval_reward_margin = rewards.map(|r| r.margin);
                report.eval_reward_accuracy = rewards.map(|r| r.accuracy);
            }
            if let Some(dir) = &mut self.run_dir {
                dir.log(&report)?;
            }
            observer.step(&report);
            aside += pause.elapsed().as_secs_f64();
            if last || stopped || every > 0 && report.step.is_multiple_of(every) {
                self.begin_save()?;
            }
        }
        // The last update may still be under way, and its failure is the run's.
        self.settle()?;
        let train_s = start.elapsed().as_secs_f64() - aside;
        self.finish_save()?;
        self.tell_saved(observer, &mut checkpoint);
        let tokens = (self.progress.tokens - tokens_before) as f64;
        Ok(Summary {
            steps: self.progress.step,
            loss: self.progress.loss,
            eval_loss,
            tok_s: if tokens > 0.0 { tokens / train_s } else { 0.0 },
            peak_rss_bytes: peak_rss_bytes(),
            checkpoint,
            stopped,
        })
    }

    fn tell_saved(&mut self, observer: &mut dyn Observer, newest: &mut Option<PathBuf>) {
        if let Some(path) = self.just_saved.take() {
            observer.saved(&path);
            *newest = Some(path);
        }
    }

    /// Where the checkpoint of the present step is, if it was resumed from.
    fn newest_path(&self) -> Option<PathBuf> {
        let dir = &self.config.checkpoint.as_ref()?.dir;
        (self.progress.step > 0).then(|| checkpoint::step_path(dir, self.progress.step))
    }
}

/// The newest complete checkpoint in `dir`, verified, with notices of what was skipped and what has changed since.
fn find(dir: &Path, config: &TrainConfig, observer: &mut dyn Observer) -> Result<PathBuf, Error> {
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
