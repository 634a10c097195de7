//! What a run asks of a card: whether its trainer does that, and where everything lies.

use super::model_of;
use crate::Error;
use crate::model::MODEL_TYPES;
use half::bf16;
use hearth_cuda::trainer::{Compute, Place, Plan, Settings};
use hearth_train::optim::{OptimConfig, StateDtype};
use hearth_train::{ObjectiveConfig, Offload, Recompute, TrainConfig, config};
use hearth_weights::ModelConfig;

/// Most bytes of logits and their slopes at once: enough rows to keep a card busy.
const LOGIT_BYTES: usize = 256 << 20;

/// Of attention's gradients.
const MOST_HEAD_DIM: usize = 128;

/// Refuses what a card's trainer does not do.
///
/// # Errors
/// [`Error::Refused`] with key, value and what to use instead.
pub fn check(run: &TrainConfig, model: &ModelConfig) -> Result<(), Error> {
    if !MODEL_TYPES.contains(&model.model_type.as_str()) {
        let (model_type, known) = (&model.model_type, MODEL_TYPES.join(", "));
        let sentence = format!("model type `{model_type}` is not trained on a card (trained there: {known})");
        return Err(Error::Refused { sentence });
    }
    let refuse = |key: &str, value: &str, why: &str| {
        Err(Error::Refused { sentence: format!("{key} = {value} is not done on a card: {why}") })
    };
    if model.head_dim > MOST_HEAD_DIM {
        return refuse(
            "the model's head_dim",
            &model.head_dim.to_string(),
            "attention takes heads of up to 128",
        );
    }
    if let Some(adapter) = &run.adapter {
        let kind = if adapter.quant.is_some() { "\"qlora\"" } else { "\"lora\"" };
        return refuse("adapter.kind", kind, "every parameter is trained there; use \"none\"");
    }
    if run.objective != ObjectiveConfig::Sft {
        return refuse("method.kind", "\"dpo\"", "use \"sft\" or \"pretrain\"");
    }
    if !matches!(run.optim, OptimConfig::AdamW(_)) {
        return refuse("optim.kind", &format!("{:?}", run.optim.name()), "use \"adamw\"");
    }
    if run.state_dtype != StateDtype::F32 {
        return refuse("optim.state_dtype", "\"bf16\"", "moments are f32 there; use \"f32\"");
    }
    if run.compute == config::Compute::F16 {
        return refuse("precision.compute", "\"f16\"", "use \"bf16\" or \"f32\"");
    }
    check_offload(&run.offload)
}

fn check_offload(offload: &Offload) -> Result<(), Error> {
    use hearth_train::Place::{Cpu, Device, Nvme};
    let Offload { params, grads, optim, ratio, .. } = offload;
    let refuse = |key: &str, value: String, why: String| {
        Err(Error::Refused { sentence: format!("offload.{key} = {value} is not done on a card: {why}") })
    };
    let quoted = |place: &hearth_train::Place| format!("{:?}", place.name());
    if let Some((key, _)) = [("params", params), ("grads", grads), ("optim", optim)]
        .into_iter()
        .find(|(_, place)| **place == Nvme)
    {
        return refuse(key, quoted(&Nvme), "its tiers are \"device\" and \"cpu\"".into());
    }
    if grads != optim {
        let why = format!("a gradient lies with its optimizer state; use {} for both", quoted(&Cpu));
        return refuse("grads", quoted(grads), why);
    }
    if (*params, *optim) == (Cpu, Device) {
        let why = format!(
            "weights on the host are updated there; use {} for offload.grads and offload.optim too",
            quoted(&Cpu)
        );
        return refuse("params", quoted(params), why);
    }
    if *params == Cpu && *ratio < 1.0 {
        let why = "all state lies on the host where offload.params does; use 1.0".into();
        return refuse("ratio", ratio.to_string(), why);
    }
    Ok(())
}

/// Where everything lies so that `device` bytes hold the card's part and `host` bytes the rest: what the run puts on the
/// host, and what else must go there. No micro-batch has more than `rows` tokens.
///
/// # Errors
/// As [`check`]; [`Error::Card`] when the budgets do not hold it.
pub fn plan(
    run: &TrainConfig,
    model: &ModelConfig,
    rows: usize,
    device: u64,
    host: u64,
) -> Result<Plan, Error> {
    check(run, model)?;
    match run.compute {
        config::Compute::Bf16 => plan_in::<bf16>(run, model, rows, device, host),
        config::Compute::F32 | config::Compute::F16 => plan_in::<f32>(run, model, rows, device, host),
    }
}

fn plan_in<T: Compute>(
    run: &TrainConfig,
    model: &ModelConfig,
    rows: usize,
    device: u64,
    host: u64,
) -> Result<Plan, Error> {
    let of_row = model.vocab_size.max(1) * (size_of::<f32>() + size_of::<T>());
    let settings = Settings {
        rows,
        logit_rows: (LOGIT_BYTES / of_row).clamp(8, 1024),
        recompute: run.recompute == Recompute::Full,
    };
    let offload = &run.offload;
    let share = if offload.optim == hearth_train::Place::Cpu { offload.ratio } else { 0.0 };
    let mut plan = Plan::with_share::<T>(model_of(model), settings, share)?;
    if offload.params == hearth_train::Place::Cpu {
        let mut places = plan.places;
        let head = places.len() - 1;
        places[1..head].fill(Place::Streamed);
        plan = Plan::of::<T>(plan.model, settings, places)?;
    }
    Ok(plan.fit::<T>(device, host)?)
}
