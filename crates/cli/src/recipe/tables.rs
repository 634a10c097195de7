//! The recipe's tables: every key, its default and its meaning.

use super::choices::*;
use serde::{Deserialize, Serialize};

/// One run, as the user wrote it. A missing table or key has the default shown here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// Which model.
    pub model: ModelTable,
    /// What is trained.
    pub adapter: AdapterTable,
    /// On which data; at least one entry.
    pub data: Vec<DataEntry>,
    /// How data becomes sequences.
    pub data_opts: DataOptsTable,
    /// What the loss is.
    pub method: MethodTable,
    /// How long and how much at a time.
    pub train: TrainTable,
    /// Optimizer.
    pub optim: OptimTable,
    /// Learning-rate schedule.
    pub sched: SchedTable,
    /// Number types.
    pub precision: PrecisionTable,
    /// Evaluation while training.
    pub eval: EvalTable,
    /// How the work is divided.
    pub parallel: ParallelTable,
    /// Where the training state lives.
    pub offload: OffloadTable,
    /// Hard byte limits.
    pub memory: MemoryTable,
    /// What the backward pass keeps.
    pub activation: ActivationTable,
    /// When and where state is saved.
    pub checkpoint: CheckpointTable,
    /// What is written about the run.
    pub log: LogTable,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelTable {
    /// Hugging Face directory, `.gguf` file or bundle. Needed.
    pub path: String,
    /// `cpu`, or `cuda:0` in a build with CUDA.
    pub device: String,
}

/// `[adapter]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterTable {
    /// `none` trains every weight.
    pub kind: AdapterKind,
    /// Inner width of the low-rank matrices.
    pub rank: usize,
    /// Their product is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Share of the adapter's inputs set to zero while training.
    pub dropout: f64,
    /// Last part of the names of the linear layers that get an adapter.
    pub targets: Vec<String>,
    /// Scale by `alpha / sqrt(rank)` instead (arXiv 2312.03732).
    pub rslora: bool,
    /// Format of the frozen linear layers of a `qlora` run. Missing: that of the base model if it is quantized
    /// already, else `q4_0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quant: Option<QuantKind>,
}

/// `[[data]]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataEntry {
    /// File, folder or glob. Needed.
    pub path: String,
    /// How its rows are written.
    pub format: DataFormat,
    /// Trained on, or only evaluated.
    pub split: Split,
}

/// `[data_opts]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptsTable {
    /// Put several documents into one sequence; attention and positions still restart at each.
    pub packing: bool,
    /// Which tokens of a conversation carry loss.
    pub train_on: TrainOn,
    /// Share of the training examples held out for evaluation.
    pub val_fraction: f64,
}

/// `[method]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MethodTable {
    /// What the loss is made of.
    pub kind: MethodKind,
    /// For `dpo`: how dear it is to leave the model that training starts from.
    pub beta: f64,
    /// For `dpo`: share of pairs believed to be labelled the wrong way round.
    pub label_smoothing: f64,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainTable {
    /// Optimizer steps; 100 if neither `steps` nor `epochs` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the data, instead of `steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Sequences per optimizer step.
    pub global_batch: usize,
    /// Sequences per forward pass; divides `global_batch`.
    pub micro_batch: usize,
    /// Longest sequence in tokens; longer examples are cut.
    pub max_seq_len: usize,
    /// Largest global gradient norm; 0 = no clipping.
    pub clip_norm: f64,
    /// Decides data order, dropout and adapter initialisation.
    pub seed: u64,
}

/// `[optim]`. A key that is missing has the default of the optimizer named by `kind`; a key that the optimizer does not
/// have is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimTable {
    /// Optimizer.
    pub kind: OptimKind,
    /// Learning rate after warm-up: 1e-4 for `adamw` and `adafactor`, 1e-3 for `sgd`, 1e-5 for `lion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Decay of the moment estimates: `[0.9, 0.95]` for `adamw`, `[0.9, 0.99]` for `lion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub betas: Option<[f64; 2]>,
    /// Added to the root of the second moment (`adamw`, 1e-8) or to squared gradients (`adafactor`, 1e-30).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Weight decay, 0; decoupled but for `sgd`, which adds it to the gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Decay of the momentum buffer of `sgd`, 0.9; 0 keeps no buffer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Second moments of `adafactor` decay by `1 − t^decay_rate`, -0.8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_rate: Option<f64>,
    /// Largest root mean square of an update of `adafactor` in units of the learning rate, 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_threshold: Option<f64>,
    /// Number type of the optimizer's states: `f32`, `bf16` or `f8`.
    pub state_dtype: StateKind,
}

/// `[sched]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedTable {
    /// Learning rate over the steps.
    pub kind: SchedKind,
    /// Steps over which the learning rate rises from 0.
    pub warmup: u64,
    /// Where it ends.
    pub min_lr: f64,
    /// Steps over which `wsd` falls; 0 = a tenth of the run.
    pub decay: u64,
}

/// `[precision]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrecisionTable {
    /// Type of weights and activations in forward and backward; the master weights are f32.
    pub compute: Dtype,
    /// What the loss is multiplied by in `f16`: `"dynamic"` (the default there) or a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

/// `[eval]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalTable {
    /// Steps between evaluations; 0 = only after the last step.
    pub every: u64,
}

/// `[parallel]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelTable {
    /// Ranks that share the batch. Missing: as many as the launcher started, 1 without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<usize>,
    /// Ranks that share each matrix.
    pub tensor: usize,
    /// ZeRO stage: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters are partitioned over the
    /// ranks.
    pub zero: u8,
    /// Seconds that the ranks wait for each other before the run ends with exit code 75.
    pub timeout_s: f64,
}

/// `[offload]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OffloadTable {
    /// Where the parameters live.
    pub params: Place,
    /// Where the gradients live.
    pub grads: Place,
    /// Where the optimizer's state lives.
    pub optim: Place,
    /// Share of the optimizer's state that goes to `optim`; the rest stays on the device.
    pub ratio: f64,
    /// Folder for what is kept on disk, made if it is missing; relative to the current directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_path: Option<String>,
}

/// `[memory]`: sizes such as `600MiB`; missing = no limit. `device` is each rank's; `host` and `nvme` are the machine's
/// and its ranks share them evenly.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryTable {
    /// Limit beside the compute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Limit in host memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Limit on disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme: Option<String>,
}

/// `[activation]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ActivationTable {
    /// What the backward pass computes again.
    pub checkpoint: Recompute,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointTable {
    /// Where checkpoints and metrics go; relative to the current directory.
    pub dir: String,
    /// Steps between checkpoints; 0 = only after the last step.
    pub every: u64,
    /// How many of the newest are kept; 0 = all.
    pub keep: usize,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogTable {
    /// `metrics.jsonl` in the checkpoint directory.
    pub jsonl: bool,
    /// TensorBoard events in the checkpoint directory.
    pub tensorboard: bool,
}

impl Default for ModelTable {
    fn default() -> Self {
        Self { path: String::new(), device: "cpu".into() }
    }
}

impl Default for AdapterTable {
    fn default() -> Self {
        Self {
            kind: AdapterKind::None,
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: vec!["q_proj".into(), "v_proj".into()],
            rslora: false,
            quant: None,
        }
    }
}

impl Default for DataEntry {
    fn default() -> Self {
        Self { path: String::new(), format: DataFormat::Chat, split: Split::Train }
    }
}

impl Default for DataOptsTable {
    fn default() -> Self {
        Self { packing: false, train_on: TrainOn::Assistant, val_fraction: 0.0 }
    }
}

impl Default for MethodTable {
    fn default() -> Self {
        Self { kind: MethodKind::Sft, beta: 0.1, label_smoothing: 0.0 }
    }
}

impl Default for TrainTable {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            global_batch: 8,
            micro_batch: 1,
            max_seq_len: 512,
            clip_norm: 1.0,
            seed: 0,
        }
    }
}

impl Default for OptimTable {
    fn default() -> Self {
        Self {
            kind: OptimKind::Adamw,
            lr: None,
            betas: None,
            eps: None,
            weight_decay: None,
            momentum: None,
            decay_rate: None,
            clip_threshold: None,
            state_dtype: StateKind::F32,
        }
    }
}

impl Default for SchedTable {
    fn default() -> Self {
        Self { kind: SchedKind::Cosine, warmup: 0, min_lr: 0.0, decay: 0 }
    }
}

impl Default for PrecisionTable {
    fn default() -> Self {
        Self { compute: Dtype::F32, loss_scale: None }
    }
}

impl Default for ParallelTable {
    fn default() -> Self {
        Self { data: None, tensor: 1, zero: 0, timeout_s: 600.0 }
    }
}

impl Default for OffloadTable {
    fn default() -> Self {
        Self {
            params: Place::Device,
            grads: Place::Device,
            optim: Place::Device,
            ratio: 1.0,
            nvme_path: None,
        }
    }
}

impl Default for ActivationTable {
    fn default() -> Self {
        Self { checkpoint: Recompute::None }
    }
}

impl Default for CheckpointTable {
    fn default() -> Self {
        Self { dir: "checkpoints/run".into(), every: 50, keep: 2 }
    }
}

impl Default for LogTable {
    fn default() -> Self {
        Self { jsonl: true, tensorboard: false }
    }
}
