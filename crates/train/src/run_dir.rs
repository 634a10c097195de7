//! The directory a run leaves: checkpoints, `metrics.jsonl`, TensorBoard events.

use crate::Error;
use crate::checkpoint::{self, Disk, Files, Snapshot};
use crate::config::{CheckpointConfig, LogConfig};
use crate::metrics::{MetricsFile, StepReport};
use crate::tensorboard::EventFile;
use std::path::{Path, PathBuf};

/// A run's directory, open for writing.
pub(crate) struct RunDir {
    config: CheckpointConfig,
    files: Box<dyn Files>,
    metrics: Option<MetricsFile>,
    events: Option<EventFile>,
}

impl RunDir {
    /// Refuses a directory in which another run left checkpoints.
    pub(crate) fn refuse_occupied(dir: &Path) -> Result<(), Error> {
        match checkpoint::search(dir)?.newest {
            None => Ok(()),
            Some(found) => Err(Error::Occupied {
                dir: dir.to_owned(),
                found: format!("step-{}", found.manifest.progress.step),
            }),
        }
    }

    /// Opens the directory for the steps after `step`.
    pub(crate) fn open(config: CheckpointConfig, log: LogConfig, step: u64) -> Result<Self, Error> {
        std::fs::create_dir_all(&config.dir).map_err(Error::io(&config.dir))?;
        checkpoint::sweep(&Disk, &config.dir)?;
        let metrics = if log.jsonl { Some(MetricsFile::open(&config.dir, step)?) } else { None };
        let events = match log.tensorboard {
            true => Some(EventFile::create(&config.dir.join("tensorboard"), step + 1)?),
            false => None,
        };
        Ok(Self { config, files: Box::new(Disk), metrics, events })
    }

    /// Writes checkpoints through `files` from now on.
    pub(crate) fn set_files(&mut self, files: Box<dyn Files>) {
        self.files = files;
    }

    pub(crate) fn log(&mut self, report: &StepReport) -> Result<(), Error> {
        if let Some(metrics) = &mut self.metrics {
            metrics.write(report)?;
        }
        if let Some(events) = &mut self.events {
            let mut values = vec![
                ("train/loss", report.loss),
                ("train/lr", report.lr),
                ("train/grad_norm", report.grad_norm),
                ("train/tok_s", report.tok_s),
                ("memory/peak_rss_bytes", report.peak_rss_bytes as f64),
            ];
            values.extend(report.mfu.map(|mfu| ("train/mfu", mfu)));
            values.extend(report.eval_loss.map(|loss| ("eval/loss", loss)));
            events.scalars(report.step, &values)?;
        }
        Ok(())
    }

    /// Whether a checkpoint is due after `step`.
    pub(crate) fn is_due(&self, step: u64) -> bool {
        self.config.every > 0 && step.is_multiple_of(self.config.every as u64)
    }

    /// Saves a checkpoint and removes those beyond `keep`.
    pub(crate) fn save(&mut self, snapshot: &Snapshot<'_>) -> Result<PathBuf, Error> {
        if let Some(metrics) = &self.metrics {
            metrics.sync()?;
        }
        let path = checkpoint::save(&*self.files, &self.config.dir, snapshot)?;
        checkpoint::prune(&*self.files, &self.config.dir, self.config.keep)?;
        Ok(path)
    }
}
