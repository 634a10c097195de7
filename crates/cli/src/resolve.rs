//! Recipe → what each room is told. Only this crate knows recipes.

use crate::exit::usage;
use crate::recipe::choices::{
    AdapterKind, DataFormat, Dtype, LossScale, MethodKind, Place, QuantKind, Recompute, SchedKind, Split,
    StateKind, TrainOn,
};
use crate::recipe::tables::{DataEntry, Recipe};
use hearth_data::{DataFile, DatasetConfig};
use hearth_memory::{Budget, Size};
use hearth_train::optim::StateDtype;
use hearth_train::{
    CheckpointConfig, Compute, Dpo, LogConfig, LoraConfig, ObjectiveConfig, Offload, Schedule, ScheduleKind,
    TrainConfig,
};
use hearth_weights::TensorSource;
use std::path::{Path, PathBuf};

/// The data room's share.
pub fn dataset(recipe: &Recipe, vocab_size: usize) -> DatasetConfig {
    DatasetConfig {
        files: recipe.data.iter().map(data_file).collect(),
        // Pre-training has no roles to choose between.
        train_on: match (recipe.method.kind, recipe.data_opts.train_on) {
            (MethodKind::Sft | MethodKind::Dpo, TrainOn::Assistant) => hearth_data::TrainOn::Assistant,
            (MethodKind::Pretrain, _) | (_, TrainOn::All) => hearth_data::TrainOn::All,
        },
        packing: recipe.data_opts.packing,
        max_seq_len: recipe.train.max_seq_len,
        val_fraction: recipe.data_opts.val_fraction,
        seed: recipe.train.seed,
        vocab_size: Some(vocab_size),
    }
}

/// Preferences are what `dpo` learns from, and nothing else does. Only training asks: any data may be looked at.
///
/// # Errors
/// A sentence that names the entry of `[[data]]` and the method that do not go together.
pub fn method_takes_data(recipe: &Recipe) -> anyhow::Result<()> {
    let dpo = recipe.method.kind == MethodKind::Dpo;
    let odd = recipe.data.iter().find(|entry| (entry.format == DataFormat::Preference) != dpo);
    match odd {
        None => Ok(()),
        Some(entry) if dpo => Err(usage(format!(
            "[method] kind = \"dpo\" learns from preferences, but [[data]] {} has format {:?}; give rows with \
             \"chosen\" and \"rejected\" and format = \"preference\"",
            entry.path,
            entry.format.name()
        ))),
        Some(entry) => Err(usage(format!(
            "[[data]] {} has format \"preference\", which only [method] kind = \"dpo\" learns from; kind is {:?}",
            entry.path,
            recipe.method.kind.name()
        ))),
    }
}

fn data_file(entry: &DataEntry) -> DataFile {
    DataFile {
        path: PathBuf::from(&entry.path),
        format: entry.format.name().to_owned(),
        split: match entry.split {
            Split::Train => hearth_data::Split::Train,
            Split::Val => hearth_data::Split::Val,
        },
    }
}

/// The trainer's share. `steps_per_epoch` turns epochs into steps; `base` is the model that is trained, or trained
/// over.
///
/// # Errors
/// When warm-up does not fit into the steps that the epochs come to, and other contradictions.
pub fn training(
    recipe: &Recipe,
    steps_per_epoch: usize,
    base: &dyn TensorSource,
) -> anyhow::Result<TrainConfig> {
    let t = &recipe.train;
    let steps = steps(recipe, steps_per_epoch);
    if recipe.sched.warmup as usize > steps {
        let epochs = t.epochs.unwrap_or_default();
        return Err(usage(format!(
            "[sched] warmup is {}, but {epochs} epochs of this data are only {steps} steps; warm-up must fit",
            recipe.sched.warmup
        )));
    }
    let config = TrainConfig {
        steps,
        objective: objective(recipe),
        global_batch: t.global_batch,
        micro_batch: t.micro_batch,
        clip_norm: t.clip_norm,
        seed: t.seed,
        optim: recipe.optim.settings(),
        state_dtype: match recipe.optim.state_dtype {
            StateKind::F32 => StateDtype::F32,
            StateKind::Bf16 => StateDtype::Bf16,
            StateKind::F8 => StateDtype::F8,
        },
        sched: schedule(recipe),
        compute: match recipe.precision.compute {
            Dtype::F32 => Compute::F32,
            Dtype::Bf16 => Compute::Bf16,
            Dtype::F16 => Compute::F16,
        },
        loss_scale: loss_scale(recipe),
        zero: recipe.parallel.zero,
        offload: offload(recipe),
        recompute: match recipe.activation.checkpoint {
            Recompute::None => hearth_train::Recompute::None,
            Recompute::Full => hearth_train::Recompute::Full,
        },
        adapter: (recipe.adapter.kind != AdapterKind::None).then(|| adapter(recipe, base)),
        checkpoint: Some(CheckpointConfig {
            dir: PathBuf::from(&recipe.checkpoint.dir),
            every: recipe.checkpoint.every as usize,
            keep: recipe.checkpoint.keep,
        }),
        eval_every: recipe.eval.every as usize,
        log: LogConfig { jsonl: recipe.log.jsonl, tensorboard: recipe.log.tensorboard },
        peak_flops: None,
    };
    config.validate().map_err(|e| usage(e.to_string()))?;
    Ok(config)
}

/// f16 has one unless it is given a number; the other types need none.
fn loss_scale(recipe: &Recipe) -> Option<hearth_train::LossScale> {
    match (recipe.precision.compute, recipe.precision.loss_scale) {
        (Dtype::F16, Some(LossScale::Fixed(scale))) => Some(hearth_train::LossScale::Fixed(scale as f32)),
        (Dtype::F16, _) => Some(hearth_train::LossScale::Dynamic(Default::default())),
        _ => None,
    }
}

fn offload(recipe: &Recipe) -> Offload {
    let o = &recipe.offload;
    let place = |place| match place {
        Place::Device => hearth_train::Place::Device,
        Place::Cpu => hearth_train::Place::Cpu,
        Place::Nvme => hearth_train::Place::Nvme,
    };
    Offload {
        params: place(o.params),
        grads: place(o.grads),
        optim: place(o.optim),
        ratio: o.ratio,
        nvme_dir: o.nvme_path.as_ref().map(PathBuf::from),
        ..Offload::default()
    }
}

/// The limits as the recipe has them: the device's of each rank, host and disk of the machine.
pub fn budget(recipe: &Recipe) -> Budget {
    // The recipe was checked: what is there is a size.
    let size = |text: &Option<String>| text.as_ref().and_then(|text| text.parse::<Size>().ok());
    let m = &recipe.memory;
    Budget { device: size(&m.device), host: size(&m.host), nvme: size(&m.nvme) }
}

fn objective(recipe: &Recipe) -> ObjectiveConfig {
    let m = &recipe.method;
    match m.kind {
        MethodKind::Sft | MethodKind::Pretrain => ObjectiveConfig::Sft,
        MethodKind::Dpo => ObjectiveConfig::Dpo(Dpo { beta: m.beta, label_smoothing: m.label_smoothing }),
    }
}

/// Optimizer steps of the run.
pub fn steps(recipe: &Recipe, steps_per_epoch: usize) -> usize {
    match (recipe.train.steps, recipe.train.epochs) {
        (Some(steps), _) => steps as usize,
        (None, Some(epochs)) => ((epochs * steps_per_epoch as f64).round() as usize).max(1),
        (None, None) => 100,
    }
}

fn schedule(recipe: &Recipe) -> Schedule {
    Schedule {
        kind: match recipe.sched.kind {
            SchedKind::Constant => ScheduleKind::Constant,
            SchedKind::Linear => ScheduleKind::Linear,
            SchedKind::Cosine => ScheduleKind::Cosine,
            SchedKind::Wsd => ScheduleKind::Wsd,
        },
        warmup: recipe.sched.warmup as usize,
        min_lr: recipe.sched.min_lr,
        decay: recipe.sched.decay as usize,
    }
}

fn adapter(recipe: &Recipe, base: &dyn TensorSource) -> LoraConfig {
    let a = &recipe.adapter;
    LoraConfig {
        rank: a.rank,
        alpha: a.alpha,
        dropout: a.dropout as f32,
        targets: a.targets.clone(),
        rslora: a.rslora,
        quant: (a.kind == AdapterKind::Qlora).then(|| quant(a.quant, base)).flatten(),
        base_model: absolute(Path::new(&recipe.model.path)).display().to_string(),
    }
}

/// The format of a QLoRA run's frozen weights; `None` keeps the base model's own.
fn quant(asked: Option<QuantKind>, base: &dyn TensorSource) -> Option<String> {
    let quantized = base.tensors().iter().any(|tensor| tensor.format.block_len() > 1);
    let default = if quantized { None } else { Some(QuantKind::Q4_0) };
    asked.or(default).map(|quant| quant.name().to_owned())
}

/// Where the path leads from anywhere.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
