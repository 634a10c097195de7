//! The directory a run leaves: checkpoints, `metrics.jsonl`, TensorBoard events.

use crate::Error;
use crate::checkpoint::{self, Disk};
use crate::config::{CheckpointConfig, LogConfig};
use crate::metrics::{MetricsFile, StepReport};
use crate::tensorboard::EventFile;
use std::path::Path;

/// A run's directory, open for writing.
pub(crate) struct RunDir {
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
        Ok(Self { metrics, events })
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
            values.extend(report.rewards.iter().flat_map(|rewards| {
                [("train/reward_margin", rewards.margin), ("train/reward_accuracy", rewards.accuracy)]
            }));
            values.extend(report.eval_loss.map(|loss| ("eval/loss", loss)));
            values.extend(report.eval_reward_accuracy.map(|share| ("eval/reward_accuracy", share)));
            events.scalars(report.step, &values)?;
        }
        Ok(())
    }

    /// Makes the metrics so far survive a power cut.
    pub(crate) fn sync_metrics(&self) -> Result<(), Error> {
        match &self.metrics {
            Some(metrics) => metrics.sync(),
            None => Ok(()),
        }
    }
}
