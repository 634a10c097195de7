//! Preference optimisation: against torch and TRL, and against itself in every layout.

use crate::arithmetic::{close, gradients};
use crate::layouts::{offload, ranks, run};
use crate::support::{config, fixtures, lora, model, pairs, reference, sequences, setup, state, trainer};
use hearth_data::{Half, Loader, Sequence};
use hearth_train::checkpoint::Checkpoint;
use hearth_train::micro_batch::MicroBatch;
use hearth_train::{
    AdamW, CheckpointConfig, Compute, Dpo, LoraConfig, ObjectiveConfig, Observer, OptimConfig,
    REFERENCE_FILE, Recompute, Schedule, ScheduleKind, Setup, StepReport, TrainConfig, Trainer,
};
use hearth_weights::ModelFiles;
use safetensors::SafeTensors;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

static GO: AtomicBool = AtomicBool::new(false);

fn dpo(beta: f64, label_smoothing: f64) -> ObjectiveConfig {
    ObjectiveConfig::Dpo(Dpo { beta, label_smoothing })
}

fn dpo_config(steps: usize) -> TrainConfig {
    TrainConfig { objective: dpo(0.3, 0.0), ..config(steps) }
}

/// The pairs of the reference, by the order of the step that takes them.
fn reference_pairs(file: &SafeTensors<'_>, order: &[usize]) -> Vec<Sequence> {
    let half = |pair: usize, which: usize| {
        let name = ["chosen", "rejected"][which];
        let ids: Vec<u32> =
            reference(file, &format!("{name}.{pair}.ids")).iter().map(|id| *id as u32).collect();
        let prompt = reference(file, &format!("{name}.{pair}.prompt"))[0] as usize;
        let labels = ids.iter().enumerate().map(|(j, id)| if j < prompt { -100 } else { *id as i32 });
        let half = Some([Half::Chosen, Half::Rejected][which]);
        Sequence { labels: labels.collect(), documents: vec![ids.len()], ids, example: pair as u64, half }
    };
    order.iter().flat_map(|pair| [half(*pair, 0), half(*pair, 1)]).collect()
}

fn reference_bytes() -> Vec<u8> {
    std::fs::read(fixtures().join("dpo/reference.safetensors")).expect("the reference")
}

#[test]
fn loss_and_gradients_are_torchs_with_and_without_smoothing() {
    let (bytes, files) = (reference_bytes(), model("llama-gqa-tied"));
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let adapter = hearth_weights::open_adapter(&fixtures().join("lora/plain/adapter")).expect("the adapter");
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    for case in 0..4 {
        let settings = reference(&file, &format!("case.{case}.beta_and_smoothing"));
        let objective = dpo(settings[0], settings[1]);
        for mode in ["full", "lora"] {
            let adapted = mode == "lora";
            let config =
                TrainConfig { objective, adapter: adapted.then(|| lora.clone()), ..TrainConfig::default() };
            let mut batch = MicroBatch::new(&reference_pairs(&file, &[0, 1]));
            if !adapted {
                // What it is compared with is the model wearing the adapter; with an adapter it is the model without.
                batch.reference = reference(&file, "log_likelihood.adapter").into();
            }
            let (loss, found) = gradients(&files, &config, &batch, |store| {
                for (i, param) in store.trained().to_vec().iter().enumerate().filter(|_| adapted) {
                    store.assign(i, &adapter.tensors.read_f32(&param.name).expect("in the adapter"));
                }
            });
            let what = format!("{mode} {settings:?}");
            close(&what, loss, reference(&file, &format!("case.{case}.{mode}.loss"))[0], 1e-6);
            for (name, gradient) in found {
                let name = format!("case.{case}.{mode}.grad.{name}");
                let norm = gradient.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
                if let Ok(want) = file.tensor(&format!("{name}.norm")) {
                    let want = f64::from_le_bytes(want.data().try_into().expect("one number"));
                    close(&format!("{what} {name}"), norm, want, 1e-5);
                    continue;
                }
                let want = reference(&file, &name);
                let off: f64 = gradient.iter().zip(&want).map(|(a, b)| (*a as f64 - b).powi(2)).sum();
                assert!(off.sqrt() < 1e-5 * norm, "{what} {name}: off by {:e}", off.sqrt() / norm);
            }
        }
    }
}

#[test]
fn a_run_is_torchs_step_for_step() {
    let (bytes, files) = (reference_bytes(), model("llama-gqa-tied"));
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let config = TrainConfig {
        steps: 5,
        objective: dpo(0.5, 0.0),
        global_batch: 2,
        clip_norm: 1.0,
        optim: OptimConfig::AdamW(AdamW { lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1 }),
        sched: Schedule { kind: ScheduleKind::Constant, ..Schedule::default() },
        ..TrainConfig::default()
    };
    let data = reference_pairs(&file, &[0, 1, 2, 3]);
    let loader = Loader::new(data.clone(), 0, 2).expect("a loader");
    let setup = Setup { loader, ..setup(&files, &config) };
    let mut trainer = Trainer::new(setup, config).expect("a trainer");
    let column = |name: &str| reference(&file, &format!("run.{name}"));
    let [losses, norms, chosen, rejected] = ["losses", "grad_norms", "chosen", "rejected"].map(column);
    for step in 0..5 {
        let order = [[0, 1], [2, 3]][step % 2];
        let report = trainer.step_on(reference_pairs(&file, &order)).expect("a step");
        let rewards = report.rewards.expect("pairs are compared");
        close("loss", report.loss, losses[step], 1e-5);
        close("gradient norm", report.grad_norm, norms[step], 1e-4);
        assert!((rewards.chosen - chosen[step]).abs() < 1e-5, "{rewards:?} {}", chosen[step]);
        assert!((rewards.rejected - rejected[step]).abs() < 1e-5, "{rewards:?} {}", rejected[step]);
        assert_eq!(report.trained_tokens, column("trained_tokens")[step] as u64);
    }
}

#[test]
fn every_layout_gives_the_same_bits() {
    let files = model("llama-gqa-tied");
    let dir = tempfile::tempdir().unwrap();
    for (compute, adapter) in [
        (Compute::F32, None),
        (Compute::F32, Some(lora())),
        (Compute::Bf16, None),
        (Compute::Bf16, Some(lora())),
    ] {
        for (world, accumulation) in [(1, 4), (2, 1), (2, 3), (4, 4)] {
            let global_batch = world * accumulation;
            let config = TrainConfig { global_batch, compute, adapter: adapter.clone(), ..dpo_config(50) };
            let plain = run(&files, &config, 1, 3);
            for (zero, tier) in [(0, "cpu"), (1, "device"), (2, "split"), (3, "device"), (3, "all-nvme")] {
                let recompute = if zero % 2 == 0 { Recompute::Full } else { Recompute::None };
                let config =
                    TrainConfig { zero, recompute, offload: offload(tier, dir.path()), ..config.clone() };
                assert_eq!(run(&files, &config, world, 3), plain, "{compute:?} {world} stage {zero} {tier}");
            }
        }
    }
}

#[test]
fn figures_are_the_same_on_every_rank_and_in_every_layout() {
    let files = model("llama-mha");
    let validation = pairs(3, files.config.vocab_size);
    let figures = |world, zero| {
        let config = TrainConfig { zero, micro_batch: 2, global_batch: 8, ..dpo_config(9) };
        let of_ranks = ranks(&files, &config, world, &|trainer| {
            let steps: Vec<_> = (0..3).map(|_| trainer.step().expect("a step").rewards).collect();
            (steps, trainer.evaluation(&validation).expect("evaluates"))
        });
        assert!(of_ranks.iter().all(|figures| *figures == of_ranks[0]));
        of_ranks.into_iter().next().expect("a rank")
    };
    let plain = figures(1, 0);
    assert_eq!([figures(2, 1), figures(4, 3)], [plain.clone(), plain.clone()]);
    let (steps, (_, evaluated)) = plain;
    let first = steps[0].expect("compared");
    assert_eq!((first.chosen, first.rejected), (0.0, 0.0), "at first it is its own reference");
    let rewards = evaluated.expect("compared");
    assert_eq!(rewards.margin, rewards.chosen - rewards.rejected);
    assert!(rewards.margin > 0.0 && rewards.accuracy > 0.5, "{rewards:?}");
}

#[test]
fn preferences_are_learnt_in_every_mode() {
    let files = model("llama-gqa-tied");
    for compute in [Compute::F32, Compute::Bf16] {
        for adapter in [None, Some(LoraConfig { rank: 8, alpha: 32.0, ..lora() })] {
            let lr = if adapter.is_some() { 1e-2 } else { 3e-3 };
            let optim = OptimConfig::AdamW(AdamW { lr, ..AdamW::default() });
            let config = TrainConfig { compute, adapter, optim, ..dpo_config(30) };
            let mut trainer = trainer(&files, &config);
            let data = pairs(10, files.config.vocab_size);
            let before = trainer.evaluate(&data).expect("evaluates");
            assert!((before - 2f64.ln()).abs() < 1e-3, "{before}");
            for _ in 0..30 {
                trainer.step().expect("a step");
            }
            let (loss, rewards) = trainer.evaluation(&data).expect("evaluates");
            let rewards = rewards.expect("compared");
            assert!(
                loss < 0.5 && rewards.accuracy == 1.0,
                "{compute:?} {:?}: {loss} {rewards:?}",
                config.adapter
            );
        }
    }
}

/// Sets the stop flag after some step.
struct StopAfter<'a>(u64, &'a AtomicBool);

impl Observer for StopAfter<'_> {
    fn step(&mut self, report: &StepReport) {
        self.1.store(report.step + 1 >= self.0, Ordering::Relaxed);
    }
}

fn saving(dir: &Path, adapter: Option<LoraConfig>) -> TrainConfig {
    let checkpoint = Some(CheckpointConfig { dir: dir.into(), every: 0, keep: 0 });
    TrainConfig { checkpoint, adapter, eval_every: 2, ..dpo_config(6) }
}

fn with<'a>(files: &'a ModelFiles, config: &TrainConfig, validation: &'a [Sequence]) -> Setup<'a> {
    Setup { validation, ..setup(files, config) }
}

#[test]
fn a_stopped_and_resumed_run_equals_an_uninterrupted_one_with_or_without_its_reference_file() {
    let files = model("llama-gqa-tied");
    let all = pairs(13, files.config.vocab_size);
    // Other places than the training data's: they count from 0 too.
    let validation: Vec<_> = all[20..].to_vec();
    for (adapter, lose) in [(None, false), (None, true), (Some(lora()), false)] {
        let (straight, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let full = saving(straight.path(), adapter.clone());
        let mut one = Trainer::new(with(&files, &full, &validation), full).expect("a trainer");
        let summary = one.run(&validation, &mut (), &GO).expect("runs");

        let config = saving(parts.path(), adapter.clone());
        let stop = AtomicBool::new(false);
        let mut first = Trainer::new(with(&files, &config, &validation), config.clone()).expect("a trainer");
        first.run(&validation, &mut StopAfter(3, &stop), &stop).expect("stops well");
        drop(first);
        let file = parts.path().join(REFERENCE_FILE);
        assert_eq!(file.exists(), adapter.is_none(), "with an adapter there is nothing to keep");
        if lose {
            std::fs::remove_file(&file).expect("was there");
        }
        let setup = with(&files, &config, &validation);
        let mut second = Trainer::resume(setup, config, &mut ()).expect("resumes");
        let resumed = second.run(&validation, &mut (), &GO).expect("runs");
        assert_eq!(state(&second), state(&one));
        assert_eq!(resumed.eval_loss, summary.eval_loss);
        let [a, b] =
            [&summary, &resumed].map(|s| Checkpoint::open(s.checkpoint.as_ref().unwrap()).unwrap().manifest);
        assert_eq!(a.files, b.files, "the same files by sha256");
    }
}

#[test]
fn a_reference_file_is_used_again_for_the_same_model_and_data_only() {
    let files = model("llama-gqa-tied");
    let dir = tempfile::tempdir().unwrap();
    let config = saving(dir.path(), None);
    let kept = |files: &ModelFiles, config: &TrainConfig, validation: &[Sequence]| {
        drop(Trainer::new(with(files, config, validation), config.clone()).expect("a trainer"));
        let path = dir.path().join(REFERENCE_FILE);
        (std::fs::read(&path).expect("kept"), std::fs::metadata(&path).unwrap().modified().unwrap())
    };
    let all = pairs(13, files.config.vocab_size);
    let first = kept(&files, &config, &all[20..]);
    let more_steps = TrainConfig { steps: 9, zero: 1, ..config.clone() };
    assert_eq!(kept(&files, &more_steps, &all[20..]), first, "the file was taken as it is");
    let others = [
        kept(&files, &config, &all[22..]),
        kept(&files, &TrainConfig { compute: Compute::Bf16, ..config.clone() }, &all[20..]),
        kept(&model("llama-mha"), &config, &[]),
    ];
    assert!(others.iter().all(|(bytes, _)| *bytes != first.0));
}

#[test]
fn data_of_the_wrong_kind_is_refused_with_a_sentence() {
    let files = model("llama-mha");
    let vocab = files.config.vocab_size;
    let refusal = |config: TrainConfig, data: Vec<Sequence>, validation: &[Sequence]| {
        let loader = Loader::new(data, 0, 4).expect("a loader");
        let setup = Setup { loader, validation, ..setup(&files, &config) };
        Trainer::new(setup, config).err().expect("refused").to_string()
    };
    let singles = refusal(dpo_config(1), sequences(4, vocab), &[]);
    assert!(singles.contains("\"dpo\" learns from pairs"), "{singles}");
    let validation = refusal(dpo_config(1), pairs(4, vocab), &sequences(1, vocab));
    assert!(validation.contains("\"dpo\" learns from pairs"), "{validation}");
    let preferences = refusal(config(1), pairs(4, vocab), &[]);
    assert!(preferences.contains("preference pairs") && preferences.contains("\"dpo\""), "{preferences}");

    let mut trainer = trainer(&files, &dpo_config(3));
    let strangers: Vec<_> = pairs(20, vocab).into_iter().skip(32).collect();
    let unknown = trainer.step_on(strangers).expect_err("refused").to_string();
    assert!(unknown.contains("before the first step"), "{unknown}");
    let few = trainer.step_on(pairs(1, vocab)).expect_err("refused").to_string();
    assert!(few.contains("2 sequences, train.global_batch = 4 is 8"), "{few}");
    trainer.step().expect("a step");
}
