//! `metrics.jsonl`: one line per step.

use crate::Error;
use crate::objective::Sums;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Figures of one step, and the line it leaves in `metrics.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss per trained token, or per pair where the objective compares them, before the step's update.
    pub loss: f64,
    /// Learning rate of its update.
    pub lr: f64,
    /// Global gradient norm before clipping; 0 in a step that was skipped.
    pub grad_norm: f64,
    /// What the loss was multiplied by, if anything.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss_scale: Option<f64>,
    /// Whether gradients overflowed, so that nothing was updated.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub skipped: bool,
    /// Tokens processed in this step.
    pub tokens: u64,
    /// Of these, tokens that were trained.
    pub trained_tokens: u64,
    /// Tokens processed since the run began.
    pub tokens_total: u64,
    /// Tokens per second.
    pub tok_s: f64,
    /// Seconds the step took.
    pub step_s: f64,
    /// Model FLOPs utilisation: the share of this machine's measured peak; absent when the peak is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mfu: Option<f64>,
    /// Largest resident size of the process so far.
    pub peak_rss_bytes: u64,
    /// Bytes held for training.
    #[serde(flatten)]
    pub memory: MemoryReport,
    /// What the step moved to and from the nvme tier, where anything lies there.
    #[serde(flatten)]
    pub disk: Option<DiskReport>,
    /// How chosen and rejected sequences compare, where the objective compares them.
    #[serde(flatten)]
    pub rewards: Option<Rewards>,
    /// Loss on the validation data, in steps that evaluate.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
    /// [`Rewards::margin`] on the validation data.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_reward_margin: Option<f64>,
    /// [`Rewards::accuracy`] on the validation data.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_reward_accuracy: Option<f64>,
}

/// Means over pairs. A sequence's reward is β times how much likelier the model finds it than the reference model does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rewards {
    /// Of the chosen sequences.
    #[serde(rename = "reward_chosen")]
    pub chosen: f64,
    /// Of the rejected sequences.
    #[serde(rename = "reward_rejected")]
    pub rejected: f64,
    /// Chosen less rejected.
    #[serde(rename = "reward_margin")]
    pub margin: f64,
    /// Share of pairs whose chosen sequence has the higher reward.
    #[serde(rename = "reward_accuracy")]
    pub accuracy: f64,
}

impl Rewards {
    pub(crate) fn mean(sums: &Sums, pairs: u64) -> Self {
        let [chosen, rejected, accuracy] =
            [sums.chosen, sums.rejected, sums.wins].map(|sum| sum / pairs as f64);
        Self { chosen, rejected, margin: chosen - rejected, accuracy }
    }
}

/// Traffic of one rank's step with the nvme tier, counted where requests are answered, and where its time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskReport {
    /// Bytes read, those of a save under way included.
    pub disk_read_bytes: u64,
    /// Bytes written.
    pub disk_written_bytes: u64,
    /// Seconds of the forward and backward passes.
    pub passes_s: f64,
    /// Seconds in which they waited for parameters.
    pub wait_params_s: f64,
    /// Seconds in which they waited for gradients to be written, or to come back.
    pub wait_grads_s: f64,
    /// Seconds of the update.
    pub update_s: f64,
    /// Seconds in which it waited for the disk.
    pub wait_update_s: f64,
}

/// Bytes a rank holds for training, on all tiers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Trained parameters as the model is computed with.
    pub params_bytes: u64,
    /// Frozen parameters, as they are held.
    pub frozen_bytes: u64,
    /// Summed gradients.
    pub grads_bytes: u64,
    /// Optimizer state, masters beside 16-bit parameters included.
    pub optimizer_bytes: u64,
}

/// Appends to `metrics.jsonl`.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `dir/metrics.jsonl`, keeping the lines of steps up to `step`: those after it are about to be repeated.
    /// A line that a kill left torn goes too.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(dir: &Path, step: u64) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join("metrics.jsonl");
        let kept = kept_bytes(&path, step)?;
        let mut options = OpenOptions::new();
        let open = || -> std::io::Result<File> {
            let mut file = options.create(true).truncate(false).write(true).open(&path)?;
            file.set_len(kept)?;
            file.seek(SeekFrom::End(0))?;
            file.sync_all()?;
            Ok(file)
        };
        let file = { open }().map_err(Error::io(&path))?;
        Ok(Self { path, file })
    }

    /// Writes one line, in one piece.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, report: &StepReport) -> Result<(), Error> {
        let mut line = serde_json::to_vec(report).expect("a plain struct serialises");
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io(&self.path))
    }

    /// Makes the lines so far durable, before a checkpoint relies on them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().map_err(Error::io(&self.path))
    }
}

/// Length of the leading lines that are whole and belong to steps up to `step`.
fn kept_bytes(path: &Path, step: u64) -> Result<u64, Error> {
    #[derive(Deserialize)]
    struct Line {
        step: u64,
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let kept = bytes.split_inclusive(|b| *b == b'\n').take_while(|line| {
        line.ends_with(b"\n") && serde_json::from_slice::<Line>(line).is_ok_and(|line| line.step <= step)
    });
    Ok(kept.map(|line| line.len() as u64).sum())
}

/// Largest resident size of this process, from `/proc/self/status`; 0 where there is none.
pub fn peak_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(dir: &Path) -> Vec<StepReport> {
        let text = fs::read_to_string(dir.join("metrics.jsonl")).expect("written");
        text.lines().map(|line| serde_json::from_str(line).expect("a report")).collect()
    }

    fn report(step: u64, loss: f64) -> StepReport {
        StepReport { step, loss, ..StepReport::default() }
    }

    #[test]
    fn repeated_steps_are_rewritten_and_torn_lines_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut file = MetricsFile::open(dir.path(), 0).expect("opens");
        for step in 1..=4 {
            file.write(&report(step, 0.1 + 0.2)).expect("writes");
        }
        write!(file.file, "{{\"step\":5,\"lo").expect("writes");
        drop(file);
        let mut file = MetricsFile::open(dir.path(), 2).expect("opens");
        file.write(&report(3, 1.0)).expect("writes");
        let steps: Vec<_> = lines(dir.path()).iter().map(|l| (l.step, l.loss)).collect();
        assert_eq!(steps, [(1, 0.1 + 0.2), (2, 0.1 + 0.2), (3, 1.0)], "losses keep every bit");
        drop(MetricsFile::open(dir.path(), 9).expect("opens"));
        assert_eq!(lines(dir.path()).len(), 3);
    }

    #[test]
    fn rewards_are_keys_of_the_line_where_there_are_any() {
        let rewards = Rewards { chosen: 0.1 + 0.2, rejected: -0.5, margin: 0.8, accuracy: 0.75 };
        let compared = StepReport { rewards: Some(rewards), ..report(1, 0.5) };
        for (report, keys) in [(compared, 4), (report(1, 0.5), 0)] {
            let line = serde_json::to_string(&report).expect("serialises");
            assert_eq!(line.matches("\"reward_").count(), keys, "{line}");
            assert_eq!(serde_json::from_str::<StepReport>(&line).expect("a report"), report);
        }
    }

    #[test]
    fn the_process_has_a_peak() {
        assert!(peak_rss_bytes() > 1 << 20 || !cfg!(target_os = "linux"));
    }
}
