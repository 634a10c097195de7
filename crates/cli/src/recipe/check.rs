//! Numbers that contradict each other, and values this version cannot serve yet.

use super::choices::*;
use super::tables::Recipe;

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
    ensure(a.quant.is_none() || a.kind == AdapterKind::Qlora, || {
        let kind = a.kind.name();
        format!("[adapter] quant is for kind = \"qlora\", kind is {kind:?}; change one of them")
    })?;
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
    if let Some(key) = o.stray() {
        return Err(format!("[optim] {key} is nothing that kind = {:?} has; remove it", o.kind.name()));
    }
    o.settings().validate().map_err(|e| e.to_string())?;
    let lr = o.settings().lr();
    ensure(s.min_lr >= 0.0 && s.min_lr <= lr, || {
        format!("[sched] min_lr is {}, it must be from 0 to [optim] lr, which is {lr}", s.min_lr)
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
    parallel(r)?;
    offload(r)?;
    loss_scale(r)?;
    let sizes = [("device", &r.memory.device), ("host", &r.memory.host), ("nvme", &r.memory.nvme)];
    for (key, size) in sizes {
        if let Some(text) = size {
            text.parse::<hearth_memory::Size>().map_err(|e| format!("[memory] {key}: {e}"))?;
        }
    }
    Ok(())
}

fn parallel(r: &Recipe) -> Result<(), String> {
    let p = &r.parallel;
    ensure(p.data != Some(0) && p.tensor > 0, || {
        "[parallel] data and tensor count ranks; each must be at least 1".into()
    })?;
    ensure(p.zero <= 3, || format!("[parallel] zero is {}, the stages are 0 to 3", p.zero))?;
    // A day is more than anybody waits, and more than a clock may overflow at.
    ensure(p.timeout_s > 0.0 && p.timeout_s <= 86_400.0, || {
        format!("[parallel] timeout_s is {}, it must be above 0 and at most 86400 seconds", p.timeout_s)
    })
}

fn offload(r: &Recipe) -> Result<(), String> {
    let o = &r.offload;
    ensure((0.0..=1.0).contains(&o.ratio), || {
        format!("[offload] ratio is {}, it must be from 0 to 1", o.ratio)
    })?;
    let on_disk = [("params", o.params), ("grads", o.grads), ("optim", o.optim)];
    match on_disk.into_iter().find(|(_, place)| *place == Place::Nvme) {
        Some((key, _)) if o.nvme_path.as_deref().is_none_or(str::is_empty) => {
            Err(format!("[offload] {key} is \"nvme\"; say in which folder with nvme_path"))
        }
        _ => Ok(()),
    }
}

fn loss_scale(r: &Recipe) -> Result<(), String> {
    let compute = r.precision.compute;
    match r.precision.loss_scale {
        None => Ok(()),
        Some(_) if compute != Dtype::F16 => Err(format!(
            "[precision] loss_scale is for compute = \"f16\", compute is \"{compute}\"; remove it"
        )),
        Some(LossScale::Fixed(scale)) if !(scale.is_finite() && scale >= 1.0) => {
            Err(format!("[precision] loss_scale is {scale}, it must be \"dynamic\" or at least 1"))
        }
        Some(_) => Ok(()),
    }
}

/// Values that are part of the recipe language and that a later version will serve.
fn not_yet(r: &Recipe) -> Result<(), String> {
    ensure(r.parallel.tensor == 1, || {
        "[parallel] tensor above 1 is not available in this version; use 1".into()
    })
}
