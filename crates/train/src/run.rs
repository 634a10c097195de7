//! A run from wherever it stands to its end, or until it is asked to stop; saving and resuming.

use crate::checkpoint::{
    self, ADAPTER_FILE, Checkpoint, Companion, MODEL_FILE, OPTIMIZER_FILE, Shard, Snapshot,
};
use crate::config::TrainConfig;
use crate::lora::PEFT_PREFIX;
use crate::metrics::peak_rss_bytes;
use crate::observer::Observer;
use crate::trainer::{Setup, Trainer};
use crate::{Error, Files};
use hearth_data::Sequence;
use hearth_weights::{ModelFiles, TensorSource};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
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
        let found = checkpoint::search(&dir)?;
        for skipped in &found.skipped {
            observer.notice(&format!("skipped checkpoint {}: {}", skipped.path.display(), skipped.why));
        }
        let Some(newest) = found.newest else {
            let skipped =
                found.skipped.iter().map(|s| format!("; {}: {}", s.path.display(), s.why)).collect();
            return Err(Error::NothingToResume { dir, skipped });
        };
        if newest.manifest.config_sha256 != config.hash() {
            let changed = changes(&newest.manifest.config, &config).join(", ");
            observer.notice(&format!("resuming {} with other settings: {changed}", newest.path.display()));
        }
        let mut trainer = Self::build(setup, config)?;
        trainer.restore(&newest)?;
        trainer.open_run_dir()?;
        Ok(trainer)
    }

    /// Takes over a checkpoint's state.
    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), Error> {
        let (theirs, ours) = (&checkpoint.manifest.model, self.identity());
        if *theirs != ours {
            let why = match () {
                () if theirs.model_type != ours.model_type => {
                    format!("it is of model type {}, this is {}", theirs.model_type, ours.model_type)
                }
                () if theirs.parameters_sha256 != ours.parameters_sha256 => {
                    "its trained parameters have other names or shapes (another model, or other adapter settings)".into()
                }
                () => "its adapter was trained on other base weights".into(),
            };
            return Err(Error::Foreign { path: checkpoint.path.clone(), why });
        }
        let weights = checkpoint.tensors(self.weights_file())?;
        let optimizer = checkpoint.tensors(OPTIMIZER_FILE)?;
        let names: Vec<String> = self.store.trained().iter().map(|p| p.name.clone()).collect();
        for (i, name) in names.iter().enumerate() {
            let len = self.store.trained()[i].values().len();
            let read = |source: &dyn TensorSource, name: &str| match source.read_f32(name)? {
                values if values.len() == len => Ok(values),
                values => {
                    let why = format!("{name} has {} values, the model needs {len}", values.len());
                    Err(Error::damaged(&checkpoint.path, why))
                }
            };
            *self.store.trained_mut()[i].values_mut() = read(&weights, &self.file_name(name))?;
            self.moments[i].m = read(&optimizer, &format!("m.{name}"))?;
            self.moments[i].v = read(&optimizer, &format!("v.{name}"))?;
        }
        self.progress = checkpoint.manifest.progress;
        self.loader.seek(self.progress.cursor)?;
        Ok(())
    }

    /// Writes checkpoints through `files` instead of straight to the disk: how tests let a disk fill up or die.
    pub fn set_files(&mut self, files: Box<dyn Files>) {
        if let Some(dir) = &mut self.run_dir {
            dir.set_files(files);
        }
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
        while self.progress.step < self.config.steps as u64 && !stopped {
            let mut report = self.step()?;
            let pause = Instant::now();
            let last = report.step >= self.config.steps as u64;
            stopped = stop.load(Ordering::Relaxed) && !last;
            let every = self.config.eval_every as u64;
            if !validation.is_empty() && !stopped && (last || every > 0 && report.step.is_multiple_of(every))
            {
                report.eval_loss = Some(self.evaluate(validation)?);
                eval_loss = report.eval_loss;
            }
            if let Some(dir) = &mut self.run_dir {
                dir.log(&report)?;
            }
            observer.step(&report);
            if last || stopped || self.run_dir.as_ref().is_some_and(|dir| dir.is_due(report.step)) {
                checkpoint = self.save()?.or(checkpoint);
                checkpoint.iter().for_each(|path| observer.saved(path));
            }
            aside += pause.elapsed().as_secs_f64();
        }
        let train_s = start.elapsed().as_secs_f64() - aside;
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

    /// Where the checkpoint of the present step is, if it was resumed from.
    fn newest_path(&self) -> Option<PathBuf> {
        let dir = &self.config.checkpoint.as_ref()?.dir;
        (self.progress.step > 0).then(|| checkpoint::step_path(dir, self.progress.step))
    }

    /// Saves the present state as `step-N`; `None` when the run keeps no checkpoints.
    ///
    /// # Errors
    /// [`Error::NotSaved`]; earlier checkpoints are untouched.
    pub fn save(&mut self) -> Result<Option<PathBuf>, Error> {
        let Some(mut dir) = self.run_dir.take() else { return Ok(None) };
        let saved = dir.save(&self.snapshot());
        self.run_dir = Some(dir);
        saved.map(Some)
    }

    fn snapshot(&self) -> Snapshot<'_> {
        let trained = self.store.trained();
        let weights =
            trained.iter().map(|p| (self.file_name(&p.name), p.shape.as_slice(), p.values())).collect();
        let mut moments = Vec::with_capacity(2 * trained.len());
        for (param, state) in trained.iter().zip(&self.moments) {
            moments.push((format!("m.{}", param.name), param.shape.as_slice(), state.m.as_slice()));
            moments.push((format!("v.{}", param.name), param.shape.as_slice(), state.v.as_slice()));
        }
        Snapshot {
            progress: self.progress,
            config: &self.config,
            model: self.identity(),
            shards: vec![
                Shard { file: self.weights_file(), tensors: weights },
                Shard { file: OPTIMIZER_FILE, tensors: moments },
            ],
            companions: &self.companions,
        }
    }

    fn weights_file(&self) -> &'static str {
        if self.config.adapter.is_some() { ADAPTER_FILE } else { MODEL_FILE }
    }

    /// A trained parameter's name in its file.
    fn file_name(&self, name: &str) -> String {
        if self.config.adapter.is_some() { format!("{PEFT_PREFIX}{name}") } else { name.into() }
    }
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
