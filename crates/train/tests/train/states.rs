//! What the optimizer keeps, in fewer bits: masters in two halves, and states in 8.

use crate::layouts::{offload, run};
use crate::support::{config, masters, model, sequences, setup, trainer};
use crate::tiny::cut;
use hearth_train::optim::StateDtype;
use hearth_train::{CheckpointConfig, Compute, OptimConfig, Recompute, TrainConfig, Trainer};

/// Ranks, stages and tiers in which masters lie in every way.
const LAYOUTS: [(usize, u8, &str); 8] = [
    (1, 0, "cpu"),
    (1, 0, "split"),
    (1, 0, "nvme"),
    (1, 0, "all-nvme"),
    (2, 0, "device"),
    (2, 1, "device"),
    (3, 2, "cpu"),
    (2, 3, "all-nvme"),
];

fn steps(trainer: &mut Trainer, count: usize) {
    for _ in 0..count {
        trainer.step().expect("a step");
    }
}

#[test]
fn states_in_8_bits_are_the_same_bits_in_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    let files = cut(dir.path());
    for compute in [Compute::F32, Compute::Bf16] {
        for optim in &OptimConfig::ALL[..3] {
            let common = TrainConfig {
                compute,
                optim: *optim,
                global_batch: 6,
                state_dtype: StateDtype::F8,
                recompute: Recompute::Full,
                ..config(50)
            };
            let plain = run(&files, &common, 1, 3);
            for (world, zero, tier) in LAYOUTS {
                let config = TrainConfig { zero, offload: offload(tier, dir.path()), ..common.clone() };
                let what = format!("{compute:?} {} {world} ranks stage {zero} {tier}", optim.name());
                assert_eq!(run(&files, &config, world, 3), plain, "{what}");
            }
        }
    }
}

#[test]
fn a_run_goes_on_in_another_layout_with_the_same_bits() {
    let files = model("llama-gqa-tied");
    for state_dtype in [StateDtype::Bf16, StateDtype::F8] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = CheckpointConfig { dir: dir.path().join("run"), every: 0, keep: 0 };
        let common = TrainConfig { compute: Compute::Bf16, state_dtype, ..config(6) };
        let mut straight = trainer(&files, &common);
        steps(&mut straight, 6);
        let mut tiers = ["device", "all-nvme", "cpu", "device"].into_iter();
        let at = |tier: &str| TrainConfig {
            checkpoint: Some(checkpoint.clone()),
            offload: offload(tier, dir.path()),
            ..common.clone()
        };
        let mut parts = trainer(&files, &at(tiers.next().expect("a tier")));
        for tier in tiers {
            steps(&mut parts, 2);
            parts.save().expect("saves");
            drop(parts);
            let config = at(tier);
            parts = Trainer::resume(setup(&files, &config), config, &mut ()).expect("resumes");
        }
        assert_eq!(parts.fingerprint().unwrap(), straight.fingerprint().unwrap(), "{state_dtype:?}");
    }
}

/// Rounding by chance is noise and no drift: what is learned is what f32 states learn.
#[test]
fn training_with_states_in_8_bits_follows_training_with_f32_states() {
    let files = model("llama-gqa-tied");
    let sequences = sequences(10, files.config.vocab_size);
    let losses = [StateDtype::F32, StateDtype::Bf16, StateDtype::F8].map(|state_dtype| {
        let config = TrainConfig { compute: Compute::Bf16, state_dtype, ..config(60) };
        let mut trainer = trainer(&files, &config);
        let first = trainer.evaluate(&sequences).expect("a loss");
        steps(&mut trainer, 60);
        assert!(masters(&trainer).values().flatten().all(|x| x.is_finite()));
        (first, trainer.evaluate(&sequences).expect("a loss"))
    });
    let [(first, exact), (_, half), (_, eighth)] = losses;
    println!("from {first}: f32 {exact}, bf16 {half}, 8 bits {eighth}");
    assert!(exact < 0.8 * first, "60 steps teach something: {first} to {exact}");
    for other in [half, eighth] {
        assert!((other - exact).abs() < 0.03 * (first - exact), "{losses:?}");
    }
}
