//! The step's arithmetic against torch, transformers and PEFT, and against itself.

use crate::support::{
    config, fixtures, lora, masters, model, reference, reference_sequences, sequences, state, trainer,
};
use hearth_train::activations::{Activations, Meter};
use hearth_train::block_loop::BlockLoop;
use hearth_train::loss_scale::LossScaling;
use hearth_train::micro_batch::MicroBatch;
use hearth_train::{
    AdamW, Compute, LoraConfig, LossScale, OptimConfig, ParamStore, Recompute, Schedule, ScheduleKind,
    TrainConfig,
};
use safetensors::SafeTensors;
use std::collections::BTreeMap;

pub fn close(what: &str, got: f64, want: f64, relative: f64) {
    assert!((got - want).abs() <= relative * want.abs(), "{what}: {got}, expected {want}");
}

#[test]
fn five_adamw_steps_are_torchs() {
    let bytes = std::fs::read(fixtures().join("adamw/reference.safetensors")).expect("the reference");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let config = TrainConfig {
        steps: 5,
        global_batch: 2,
        clip_norm: 1.0,
        optim: OptimConfig::AdamW(AdamW { lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 }),
        sched: Schedule { kind: ScheduleKind::Cosine, warmup: 2, ..Schedule::default() },
        ..TrainConfig::default()
    };
    let model = model("llama-gqa-tied");
    let mut trainer = trainer(&model, &config);
    let [losses, norms, rates] = ["losses", "grad_norms", "learning_rates"].map(|n| reference(&file, n));
    for step in 0..5 {
        let report = trainer.step_on(reference_sequences(&file, &format!("step.{step}."))).expect("a step");
        close("learning rate", report.lr, rates[step], 1e-12);
        close("loss", report.loss, losses[step], 1e-6);
        close("gradient norm", report.grad_norm, norms[step], 1e-5);
    }
    for (name, values) in masters(&trainer) {
        let values: Vec<f64> = values.iter().map(|v| *v as f64).collect();
        let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        close(&name, norm, reference(&file, &format!("final.sum_and_norm.{name}"))[1], 1e-5);
        if file.tensor(&format!("final.{name}")).is_ok() {
            let want = reference(&file, &format!("final.{name}"));
            let off = values.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / norm;
            assert!(off < 1e-5, "{name}: off by {off:e}");
        }
    }
}

/// Mean loss and every gradient of the summed loss of one micro-batch.
pub fn gradients(
    files: &hearth_weights::ModelFiles,
    config: &TrainConfig,
    batch: &MicroBatch,
    prepare: impl FnOnce(&mut ParamStore),
) -> (f64, BTreeMap<String, Vec<f32>>) {
    let arch = hearth_model::architecture(&files.config).expect("an architecture");
    let device = hearth_model::device::open("cpu").expect("the CPU");
    let layout = hearth_train::params::layout(&*arch, config, 1, 0).expect("a layout");
    let ledger = hearth_memory::Ledger::default();
    let mut store =
        ParamStore::load(&*arch, &*files.tensors, config, layout, device, &ledger, &mut |_, _| Ok(()))
            .expect("loads");
    prepare(&mut store);
    let rope = hearth_model::rope::Rope::new(&files.config);
    let recompute = config.recompute;
    let (comm, meter) = (hearth_collective::single(), Meter::new(ledger, Activations::default()));
    let run = BlockLoop {
        arch: &*arch,
        store: &store,
        comm: &comm,
        objective: config.objective.objective(),
        rope: &rope,
        recompute,
        dropout: Some(5),
        base: false,
        loss_scale: 1.0,
        meter: &meter,
    };
    let mut found = BTreeMap::new();
    let sums = run
        .gradients(batch, &mut |index, gradient| {
            let name = store.trained()[index].name.clone();
            assert!(found.insert(name, gradient.into_f32()).is_none(), "each gradient comes once");
            Ok(())
        })
        .expect("gradients");
    assert_eq!(found.len(), store.trained().len(), "each gradient comes");
    assert!(!store.is_borrowed(), "no tensor outlives the pass");
    if config.adapter.as_ref().is_none_or(|a| a.dropout == 0.0) {
        assert_eq!(run.loss(batch).expect("a loss"), sums, "with and without a tape");
    }
    (sums.loss / config.objective.objective().count(batch) as f64, found)
}

#[test]
fn adapter_gradients_are_pefts() {
    for (case, rslora) in [("plain", false), ("rslora", true)] {
        let dir = fixtures().join("lora").join(case);
        let bytes = std::fs::read(dir.join("reference.safetensors")).expect("the reference");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let adapter = hearth_weights::open_adapter(&dir.join("adapter")).expect("the adapter");
        let lora = LoraConfig { rank: 4, alpha: 8.0, rslora, ..LoraConfig::default() };
        let config = TrainConfig { adapter: Some(lora), ..TrainConfig::default() };
        let batch = MicroBatch::new(&reference_sequences(&file, ""));
        let (loss, found) = gradients(&model("llama-gqa-tied"), &config, &batch, |store| {
            for (i, param) in store.trained().to_vec().iter().enumerate() {
                store.assign(i, &adapter.tensors.read_f32(&param.name).expect("in the adapter"));
            }
        });
        close("loss", loss, reference(&file, "loss")[0], 1e-6);
        for (name, gradient) in found {
            let want = reference(&file, &format!("grad.base_model.model.{name}"));
            let scale = batch.trained() as f64;
            let off: f64 = gradient.iter().zip(&want).map(|(a, b)| (*a as f64 / scale - b).powi(2)).sum();
            let norm: f64 = want.iter().map(|b| b * b).sum();
            assert!((off / norm).sqrt() < 1e-5, "{name}: off by {:e}", (off / norm).sqrt());
        }
    }
}

#[test]
fn recomputation_changes_no_bit_of_any_gradient() {
    for case in
        ["llama-gqa-tied", "qwen3-tied-biases-sharded", "mistral-window", "gemma", "starcoder2-window"]
    {
        let files = model(case);
        let batch = MicroBatch::new(&sequences(4, files.config.vocab_size));
        for compute in [Compute::F32, Compute::Bf16] {
            for adapter in [None, Some(lora())] {
                let run = |recompute| {
                    let config = TrainConfig { compute, adapter: adapter.clone(), recompute, ..config(1) };
                    gradients(&files, &config, &batch, |_| ())
                };
                assert_eq!(run(Recompute::None), run(Recompute::Full), "{case} {compute:?} {adapter:?}");
            }
        }
    }
}

#[test]
fn micro_batch_size_changes_results_by_rounding_only() {
    let files = model("llama-mha");
    let run = |micro_batch| {
        let config = TrainConfig { micro_batch, ..config(3) };
        let mut trainer = trainer(&files, &config);
        (0..3).map(|_| trainer.step().expect("a step")).collect::<Vec<_>>()
    };
    for (a, b) in run(1).iter().zip(run(4)) {
        close("loss", a.loss, b.loss, 1e-6);
        close("gradient norm", a.grad_norm, b.grad_norm, 1e-5);
        assert_eq!((a.tokens, a.trained_tokens), (b.tokens, b.trained_tokens));
    }
}

#[test]
fn recomputation_changes_no_bit_of_a_run() {
    let files = model("qwen2-tied-bin");
    let run = |recompute| {
        let config = TrainConfig { recompute, adapter: Some(lora()), micro_batch: 2, ..config(3) };
        let mut trainer = trainer(&files, &config);
        for _ in 0..3 {
            trainer.step().expect("a step");
        }
        state(&trainer)
    };
    assert_eq!(run(Recompute::None), run(Recompute::Full));
}

#[test]
fn loss_goes_down_in_every_mode() {
    let files = model("llama-gqa-tied");
    for compute in [Compute::F32, Compute::Bf16, Compute::F16] {
        for adapter in [None, Some(LoraConfig { rank: 8, alpha: 32.0, ..lora() })] {
            let lr = if adapter.is_some() { 3e-2 } else { 1e-2 };
            let loss_scale = (compute == Compute::F16).then(|| LossScale::Dynamic(LossScaling::default()));
            let mut config =
                TrainConfig { compute, adapter, loss_scale, peak_flops: Some(1e9), ..config(30) };
            config.optim = OptimConfig::AdamW(AdamW { lr, ..AdamW::default() });
            let mut trainer = trainer(&files, &config);
            let data = sequences(10, files.config.vocab_size);
            let before = trainer.evaluate(&data).expect("evaluates");
            let last = (0..30).map(|_| trainer.step().expect("a step")).last().expect("30 steps");
            let after = trainer.evaluate(&data).expect("evaluates");
            assert!(after < 0.6 * before, "{compute:?} {:?}: {before} -> {after}", config.adapter);
            assert!(last.mfu.is_some_and(|mfu| mfu > 0.0) && last.tok_s > 0.0);
            // An f32 copy is the master; beside a bf16 copy there is half of one, beside an f16 copy a whole one.
            let share = match compute {
                Compute::F32 => 2,
                Compute::Bf16 => 5,
                Compute::F16 => 6,
            };
            assert_eq!(last.memory.params_bytes * share, last.memory.optimizer_bytes);
            assert!(last.memory.grads_bytes >= last.memory.params_bytes);
        }
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let files = model("llama-mha");
    let mut trainer = trainer(&files, &TrainConfig { global_batch: 1, ..config(2) });
    let good = sequences(1, files.config.vocab_size);
    let untrained = hearth_data::Sequence { labels: vec![-100; good[0].ids.len()], ..good[0].clone() };
    let foreign = hearth_data::Sequence { ids: vec![1 << 30; good[0].ids.len()], ..good[0].clone() };
    let before = state(&trainer);
    for (sequence, part) in [(untrained, "none of its tokens is trained"), (foreign, "token id 1073741824")] {
        let error = trainer.step_on(vec![sequence]).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(state(&trainer), before);
}

#[test]
fn a_step_that_overflows_is_skipped_and_the_scale_falls_until_none_does() {
    let files = model("llama-gqa-tied");
    let scaling = LossScaling { init: 2f64.powi(40), hysteresis: 2, window: 3, ..LossScaling::default() };
    let config =
        TrainConfig { compute: Compute::F16, loss_scale: Some(LossScale::Dynamic(scaling)), ..config(60) };
    let mut trainer = trainer(&files, &config);
    let before = state(&trainer);
    let first = trainer.step().expect("a step that is skipped");
    assert!(first.skipped && first.grad_norm == 0.0 && first.loss.is_finite());
    assert_eq!((state(&trainer), trainer.progress().updates, trainer.progress().step), (before, 0, 1));
    let reports: Vec<_> = (1..60).map(|_| trainer.step().expect("a step")).collect();
    let updates = reports.iter().filter(|report| !report.skipped).count();
    assert_eq!(trainer.progress().updates as usize, updates);
    // The first overflow spends the hysteresis, each one after it halves.
    let good = reports.iter().position(|report| !report.skipped).expect("the scale becomes bearable");
    assert_eq!(reports[good].loss_scale, Some(2f64.powi(40 - good as i32)));
    // The rate is that of the updates, not of the steps.
    assert_eq!(reports[good].lr, first.lr);
    // Found again after three good steps, and lost again: it hovers at the edge.
    assert!(reports[good + 4..].iter().any(|report| report.skipped) || updates > 30);
}

#[test]
fn a_power_of_two_as_fixed_scale_changes_no_bit() {
    let files = model("llama-mha");
    let run = |loss_scale| {
        let mut trainer = trainer(&files, &TrainConfig { loss_scale, ..config(3) });
        let norms: Vec<u64> = (0..3).map(|_| trainer.step().expect("a step").grad_norm.to_bits()).collect();
        (norms, state(&trainer))
    };
    assert_eq!(run(None), run(Some(LossScale::Fixed(1024.0))));
}
