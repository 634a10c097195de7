//! Numbers that contradict each other, and values this version cannot serve yet.

use super::choices::*;
use super::tables::{MemoryTable, Recipe};

/// The first sentence about what is wrong, if anything is.
pub(super) fn check(recipe: &Recipe) -> Result<(), String> {
    presence(recipe)?;
    adapter(recipe)?;
    train(recipe)?;
    optimizer(recipe)?;
    rest(recipe)?;
    not_yet(recipe)
}

fn ensure(holds: bool, sentence: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(sentence()) }
}

fn presence(r: &Recipe) -> Result<(), String> {
    ensure(!r.model.path.is_empty(), || {
        "[model] path is missing; give a Hugging Face directory, a .gguf file or a bundle".into()
    })?;
    ensure(r.data.iter().any(|d| d.split == Split::Train), || {
        "there is nothing to train on; add a [[data]] entry with a path and split = \"train\"".into()
    })?;
    match r.data.iter().position(|d| d.path.is_empty()) {
        Some(i) => Err(format!("[[data]] entry {i} has no path; give a file, a folder or a glob")),
        None => Ok(()),
    }
}

fn adapter(r: &Recipe) -> Result<(), String> {
    let a = &r.adapter;
    if a.kind == AdapterKind::None {
        return Ok(());
    }
    ensure((1..=65_536).contains(&a.rank), || {
        format!("[adapter] rank is {}, it must be from 1 to 65536", a.rank)
    })?;
    ensure(a.alpha.is_finite() && a.alpha > 0.0, || {
        format!("[adapter] alpha is {}, it must be above 0", a.alpha)
    })?;
    ensure((0.0..1.0).contains(&a.dropout), || {
        format!("[adapter] dropout is {}, it must be at least 0 and below 1", a.dropout)
    })?;
    ensure(!a.targets.is_empty(), || {
        "[adapter] targets is empty; name linear layers, for example [\"q_proj\", \"v_proj\"]".into()
    })
}

fn train(r: &Recipe) -> Result<(), String> {
    let t = &r.train;
    ensure(t.steps.is_none() || t.epochs.is_none(), || {
        "[train] has both steps and epochs; remove one of them".into()
    })?;
    ensure(t.steps != Some(0), || "[train] steps is 0, it must be at least 1".into())?;
    if let Some(epochs) = t.epochs {
        ensure(epochs.is_finite() && epochs > 0.0, || {
            format!("[train] epochs is {epochs}, it must be above 0")
        })?;
    }
    ensure(t.micro_batch > 0, || "[train] micro_batch is 0, it must be at least 1".into())?;
    ensure(t.global_batch > 0, || "[train] global_batch is 0, it must be at least 1".into())?;
    ensure(t.global_batch.is_multiple_of(t.micro_batch), || {
        format!(
            "[train] global_batch is {} and micro_batch {}; the first must be a multiple of the second",
            t.global_batch, t.micro_batch
        )
    })?;
    let least = if r.data_opts.packing { 8 } else { 2 };
    ensure(t.max_seq_len >= least, || {
        let why =
            if r.data_opts.packing { " to pack documents into" } else { ": one to predict the next from" };
        format!("[train] max_seq_len is {}, it must be at least {least}{why}", t.max_seq_len)
    })?;
    ensure(t.clip_norm.is_finite() && t.clip_norm >= 0.0, || {
        format!("[train] clip_norm is {}, it must be 0 (off) or above", t.clip_norm)
    })?;
    let f = r.data_opts.val_fraction;
    ensure((0.0..1.0).contains(&f), || {
        format!("[data_opts] val_fraction is {f}, it must be at least 0 and below 1")
    })
}

fn optimizer(r: &Recipe) -> Result<(), String> {
    let (o, s) = (&r.optim, &r.sched);
    ensure(o.lr.is_finite() && o.lr >= 0.0, || format!("[optim] lr is {}, it must be 0 or above", o.lr))?;
    for beta in o.betas {
        ensure((0.0..1.0).contains(&beta), || {
            format!("[optim] betas has {beta}, both must be at least 0 and below 1")
        })?;
    }
    ensure(o.eps.is_finite() && o.eps > 0.0, || format!("[optim] eps is {}, it must be above 0", o.eps))?;
    ensure(o.weight_decay.is_finite() && o.weight_decay >= 0.0, || {
        format!("[optim] weight_decay is {}, it must be 0 or above", o.weight_decay)
    })?;
    ensure(s.min_lr >= 0.0 && s.min_lr <= o.lr, || {
        format!("[sched] min_lr is {}, it must be from 0 to [optim] lr, which is {}", s.min_lr, o.lr)
    })?;
    match r.train.steps {
        Some(steps) if s.warmup > steps => {
            Err(format!("[sched] warmup is {}, [train] steps only {steps}; warm-up must fit", s.warmup))
        }
        _ => Ok(()),
    }
}

fn rest(r: &Recipe) -> Result<(), String> {
    ensure(!r.checkpoint.dir.is_empty(), || "[checkpoint] dir is empty; name a folder".into())?;
    ensure(r.parallel.data > 0 && r.parallel.tensor > 0, || {
        "[parallel] data and tensor count ranks; each must be at least 1".into()
    })?;
    ensure(r.parallel.zero <= 3, || {
        format!("[parallel] zero is {}, the stages are 0 to 3", r.parallel.zero)
    })?;
    ensure((0.0..=1.0).contains(&r.offload.ratio), || {
        format!("[offload] ratio is {}, it must be from 0 to 1", r.offload.ratio)
    })?;
    let sizes = [("device", &r.memory.device), ("host", &r.memory.host), ("nvme", &r.memory.nvme)];
    for (key, size) in sizes {
        if let Some(text) = size {
            text.parse::<hearth_memory::Size>().map_err(|e| format!("[memory] {key}: {e}"))?;
        }
    }
    Ok(())
}

/// Values that are part of the recipe language and that a later version will serve.
fn not_yet(r: &Recipe) -> Result<(), String> {
    let (p, o) = (&r.parallel, &r.offload);
    let wanted = [
        (r.adapter.kind == AdapterKind::Qlora, "[adapter] kind = \"qlora\"", "use \"lora\""),
        (r.method.kind == MethodKind::Dpo, "[method] kind = \"dpo\"", "use \"sft\" or \"pretrain\""),
        (r.precision.compute == Dtype::F16, "[precision] compute = \"f16\"", "use \"bf16\" or \"f32\""),
        (r.optim.state_dtype != Dtype::F32, "[optim] state_dtype other than \"f32\"", "use \"f32\""),
        (p.data > 1, "[parallel] data above 1", "use 1"),
        (p.tensor > 1, "[parallel] tensor above 1", "use 1"),
        (p.zero > 0, "[parallel] zero above 0", "use 0"),
        (o.params != Place::Device, "[offload] params away from the device", "use \"device\""),
        (o.grads != Place::Device, "[offload] grads away from the device", "use \"device\""),
        (o.optim != Place::Device, "[offload] optim away from the device", "use \"device\""),
        (r.memory != MemoryTable::default(), "a [memory] limit while training", "remove the table"),
        (o.ratio != 1.0, "[offload] ratio other than 1.0", "use 1.0"),
    ];
    match wanted.into_iter().find(|(asked, ..)| *asked) {
        Some((_, what, instead)) => Err(format!("{what} is not available in this version; {instead}")),
        None => Ok(()),
    }
}
