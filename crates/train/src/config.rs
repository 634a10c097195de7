//! What a run is told. Knows nothing of recipes.

use crate::Error;
use crate::loss_scale::LossScaling;
use crate::objective::ObjectiveConfig;
use crate::optim::{OptimConfig, StateDtype};
use crate::sched::Schedule;
use crate::sizes::RING;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Everything that decides what a run computes, and where it writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Updates.
    pub steps: usize,
    /// What the loss is made of.
    pub objective: ObjectiveConfig,
    /// Sequences per update, or pairs where the objective compares them.
    pub global_batch: usize,
    /// Sequences (or pairs) per forward pass; divides `global_batch`.
    pub micro_batch: usize,
    /// Largest global gradient norm; larger gradients are scaled down to it. 0 = off.
    pub clip_norm: f64,
    /// Seed of adapter initialisation and dropout.
    pub seed: u64,
    /// Optimizer.
    pub optim: OptimConfig,
    /// How its states are stored. Masters and gradients are f32 always.
    pub state_dtype: StateDtype,
    /// Learning rate over time.
    pub sched: Schedule,
    /// Arithmetic of activations and the weights they meet.
    pub compute: Compute,
    /// Multiplies the loss so that 16-bit gradients do not underflow; `None` = not at all.
    pub loss_scale: Option<LossScale>,
    /// ZeRO stage (arXiv 1910.02054): 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters are partitioned
    /// over the ranks.
    pub zero: u8,
    /// Where the training state lies.
    pub offload: Offload,
    /// What is kept of the forward pass.
    pub recompute: Recompute,
    /// A low-rank adapter over frozen weights, or `None` to train every parameter.
    pub adapter: Option<LoraConfig>,
    /// Where and how often to save, or `None` to keep nothing.
    pub checkpoint: Option<CheckpointConfig>,
    /// Evaluate every so many updates and at the end. 0 = at the end only.
    pub eval_every: usize,
    /// What to write beside the checkpoints.
    pub log: LogConfig,
    /// Measured peak of this machine in floating-point operations per second, for MFU.
    pub peak_flops: Option<f64>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            objective: ObjectiveConfig::Sft,
            global_batch: 8,
            micro_batch: 1,
            clip_norm: 1.0,
            seed: 0,
            optim: OptimConfig::default(),
            state_dtype: StateDtype::F32,
            sched: Schedule::default(),
            compute: Compute::F32,
            loss_scale: None,
            zero: 0,
            offload: Offload::default(),
            recompute: Recompute::None,
            adapter: None,
            checkpoint: None,
            eval_every: 0,
            log: LogConfig::default(),
            peak_flops: None,
        }
    }
}

/// Arithmetic of the forward and backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// 32 bits everywhere.
    #[default]
    F32,
    /// Weights and activations rounded to bfloat16.
    Bf16,
    /// Weights and activations rounded to half precision.
    F16,
}

impl Compute {
    /// As in recipes, and the name of the storage format.
    pub fn name(self) -> &'static str {
        match self {
            Compute::F32 => "f32",
            Compute::Bf16 => "bf16",
            Compute::F16 => "f16",
        }
    }
}

/// What the loss is multiplied by before the backward pass; gradients are divided by it in the update, in f32.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossScale {
    /// Always this.
    Fixed(f32),
    /// As large as the gradients allow; steps that overflow are skipped.
    Dynamic(LossScaling),
}

/// Where a share of the training state lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Beside the compute.
    #[default]
    Device,
    /// In host memory.
    Cpu,
    /// On a fast disk.
    Nvme,
}

impl Place {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Place::Device => "device",
            Place::Cpu => "cpu",
            Place::Nvme => "nvme",
        }
    }
}

/// Where the training state lies. Changes no bit of any result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Offload {
    /// The parameters as the model is computed with.
    pub params: Place,
    /// Summed gradients, until the update.
    pub grads: Place,
    /// Masters and moments.
    pub optim: Place,
    /// Share of the optimizer's state that goes to `optim`; the rest stays on the device.
    pub ratio: f64,
    /// Directory of the nvme tier.
    pub nvme_dir: Option<PathBuf>,
    /// Tiles of optimizer state on the nvme tier that are under way at once, in host memory; at least 3.
    pub ring: usize,
    /// Units that are updated late, beside the next step's forward pass, where a step's update runs beside its backward
    /// pass ([`Sizes::beside`](crate::sizes::Sizes::beside)): each keeps its gradient in host memory until then.
    pub late: usize,
}

impl Default for Offload {
    fn default() -> Self {
        let device = Place::Device;
        Self { params: device, grads: device, optim: device, ratio: 1.0, nvme_dir: None, ring: RING, late: 0 }
    }
}

impl Offload {
    /// Whether anything lies on a disk.
    pub fn uses_nvme(&self) -> bool {
        [self.params, self.grads, self.optim].contains(&Place::Nvme)
    }
}

/// What the backward pass finds of the forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Every intermediate of every transformer block.
    #[default]
    None,
    /// Each transformer block's input; the rest is computed again. Same gradients, bit for bit.
    Full,
}

/// A low-rank adapter (arXiv 2106.09685).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Inner width.
    pub rank: usize,
    /// Scales the adapter's share by `alpha / rank`.
    pub alpha: f64,
    /// Probability of dropping an input of the adapter.
    pub dropout: f32,
    /// Last components of the linear layers' names (`q_proj`), or `all-linear`.
    pub targets: Vec<String>,
    /// Scale by `alpha / sqrt(rank)` instead (arXiv 2312.03732).
    pub rslora: bool,
    /// What `adapter_config.json` says the base model is.
    pub base_model: String,
    /// Format that the linear layers' frozen weights are quantized to (QLoRA): `q8_0`, `q4_0`, `q4_1`. `None` keeps
    /// them as they are stored.
    pub quant: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: vec!["q_proj".into(), "v_proj".into()],
            rslora: false,
            base_model: String::new(),
            quant: None,
        }
    }
}

impl LoraConfig {
    /// What the adapter's share is multiplied by.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }
}

/// Where and how often to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Directory of the run: checkpoints, metrics, events.
    pub dir: PathBuf,
    /// Save every so many updates and at the end. 0 = at the end only.
    pub every: usize,
    /// Complete checkpoints kept. 0 = all.
    pub keep: usize,
}

/// What to write beside the checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `metrics.jsonl`, one line per update.
    pub jsonl: bool,
    /// TensorBoard event files.
    pub tensorboard: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { jsonl: true, tensorboard: false }
    }
}

impl TrainConfig {
    /// Micro-batches per update.
    pub fn micro_batches(&self) -> usize {
        self.global_batch / self.micro_batch
    }

    /// Refuses numbers that contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] with the key, its value and what to change.
    pub fn validate(&self) -> Result<(), Error> {
        self.validate_batches()?;
        self.objective.validate()?;
        self.validate_rates()?;
        self.validate_placement()?;
        self.adapter.as_ref().map_or(Ok(()), LoraConfig::validate)
    }

    fn validate_batches(&self) -> Result<(), Error> {
        at_least_one("train.steps", self.steps)?;
        at_least_one("train.global_batch", self.global_batch)?;
        at_least_one("train.micro_batch", self.micro_batch)?;
        let (global, micro) = (self.global_batch, self.micro_batch);
        if global % micro != 0 {
            return refuse(format!(
                "train.global_batch = {global} is not a multiple of train.micro_batch = {micro}; use {} or {}",
                global / micro * micro,
                (global / micro + 1) * micro
            ));
        }
        Ok(())
    }

    fn validate_rates(&self) -> Result<(), Error> {
        self.optim.validate()?;
        match self.loss_scale {
            Some(LossScale::Dynamic(scaling)) => scaling.validate()?,
            Some(LossScale::Fixed(scale)) if !(scale.is_normal() && scale > 0.0) => {
                return refuse(format!("precision.loss_scale = {scale} must be a number above 0"));
            }
            _ => {}
        }
        not_negative("train.clip_norm", self.clip_norm)?;
        not_negative("sched.min_lr", self.sched.min_lr)?;
        let lr = self.optim.lr();
        if self.sched.min_lr > lr {
            let min = self.sched.min_lr;
            return refuse(format!(
                "sched.min_lr = {min} is above optim.lr = {lr}; it is where the rate ends"
            ));
        }
        if self.sched.warmup > self.steps {
            let (warmup, steps) = (self.sched.warmup, self.steps);
            return refuse(format!(
                "sched.warmup = {warmup} is longer than the run of {steps} steps; shorten it"
            ));
        }
        Ok(())
    }

    fn validate_placement(&self) -> Result<(), Error> {
        let o = &self.offload;
        if self.zero > 3 {
            return refuse(format!("parallel.zero = {}: the stages are 0 to 3", self.zero));
        }
        if !(0.0..=1.0).contains(&o.ratio) {
            return refuse(format!("offload.ratio = {} must be from 0 to 1", o.ratio));
        }
        if o.ring < 3 {
            return refuse(format!("offload.ring = {}: reading, updating and writing need 3", o.ring));
        }
        if o.uses_nvme() && o.nvme_dir.is_none() {
            return refuse(
                "[offload] puts state on nvme; say in which directory with offload.nvme_path".into(),
            );
        }
        let whole = self.zero == 0 && o.optim != Place::Nvme && (o.optim == Place::Device || o.ratio == 1.0);
        if !(self.optim.elementwise() || whole && self.state_dtype == StateDtype::F32) {
            return refuse(format!(
                "optim.kind = {:?} updates whole matrices from a state that is small already: use parallel.zero = 0, \
                 offload.optim = \"device\" or \"cpu\" with offload.ratio = 1.0, and optim.state_dtype = \"f32\"",
                self.optim.name()
            ));
        }
        Ok(())
    }

    /// sha256 of everything that decides what is computed, as hex: paths, logging and the run's end apart.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(serde_json::to_vec(&self.computed()).expect("a plain struct serialises")))
    }

    /// The same with everything at its default that changes no result: paths, logging, ranks' stage, tiers.
    pub(crate) fn computed(&self) -> TrainConfig {
        TrainConfig {
            checkpoint: None,
            log: LogConfig::default(),
            eval_every: 0,
            peak_flops: None,
            recompute: Recompute::None,
            zero: 0,
            offload: Offload::default(),
            ..self.clone()
        }
    }
}

impl LoraConfig {
    fn validate(&self) -> Result<(), Error> {
        at_least_one("adapter.rank", self.rank)?;
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return refuse(format!("adapter.alpha = {} must be a number above 0", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(format!("adapter.dropout = {} must be at least 0 and below 1", self.dropout));
        }
        if self.targets.is_empty() {
            return refuse(
                "adapter.targets is empty; name linear layers, as [\"q_proj\", \"v_proj\"]".into(),
            );
        }
        Ok(())
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn refuse<T>(sentence: String) -> Result<T, Error> {
    Err(Error::Config(sentence))
}

fn at_least_one(key: &str, value: usize) -> Result<(), Error> {
    if value == 0 { refuse(format!("{key} = 0 must be at least 1")) } else { Ok(()) }
}

fn not_negative(key: &str, value: f64) -> Result<(), Error> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    refuse(format!("{key} = {value} must be a number of at least 0"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::Dpo;

    fn message(change: impl FnOnce(&mut TrainConfig)) -> String {
        let mut config = TrainConfig { adapter: Some(LoraConfig::default()), ..TrainConfig::default() };
        config.validate().expect("the defaults are valid");
        change(&mut config);
        config.validate().expect_err("must be refused").to_string()
    }

    #[test]
    fn contradictions_are_refused_with_key_value_and_advice() {
        let cases: Vec<(String, &str)> = vec![
            (message(|c| c.steps = 0), "train.steps = 0"),
            (message(|c| c.micro_batch = 3), "train.micro_batch = 3; use 6 or 9"),
            (message(|c| c.zero = 4), "parallel.zero = 4"),
            (message(|c| c.offload.ratio = 1.5), "offload.ratio = 1.5"),
            (message(|c| c.offload.grads = Place::Nvme), "offload.nvme_path"),
            (message(|c| c.sched.min_lr = 1.0), "sched.min_lr = 1 is above"),
            (message(|c| c.sched.warmup = 101), "sched.warmup = 101"),
            (message(|c| c.clip_norm = -1.0), "train.clip_norm = -1"),
            (message(|c| c.adapter.as_mut().unwrap().rank = 0), "adapter.rank = 0"),
            (message(|c| c.adapter.as_mut().unwrap().dropout = 1.0), "adapter.dropout = 1"),
            (message(|c| c.adapter.as_mut().unwrap().targets.clear()), "adapter.targets"),
        ];
        for (message, part) in cases {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[test]
    fn the_hash_sees_arithmetic_and_nothing_else() {
        let config = TrainConfig::default();
        let offload = Offload { optim: Place::Cpu, ..Offload::default() };
        let logged =
            TrainConfig { eval_every: 7, recompute: Recompute::Full, zero: 2, offload, ..config.clone() };
        assert_eq!(config.hash(), logged.hash());
        assert_ne!(config.hash(), TrainConfig { seed: 1, ..config.clone() }.hash());
        let dpo = |beta| ObjectiveConfig::Dpo(Dpo { beta, ..Dpo::default() });
        let hashes = [0.1, 0.5].map(|beta| TrainConfig { objective: dpo(beta), ..config.clone() }.hash());
        assert!(hashes[0] != hashes[1] && !hashes.contains(&config.hash()));
    }
}
