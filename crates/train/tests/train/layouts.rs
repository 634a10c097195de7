//! A run's results are the same bits whatever the number of ranks, the ZeRO stage and the tiers.

use crate::support::{config, lora, model, setup};
pub use crate::tiny::{Outcome, TIERS, offload};
use crate::tiny::{cut, matrix, outcome};
use hearth_collective::{Ordered, ProcessGroup, Watchdog, threads};
use hearth_memory::{Budget, Ledger, Tier};
use hearth_train::{AdamW, Compute, Offload, OptimConfig, Recompute, TrainConfig, Trainer};
use hearth_weights::ModelFiles;
use std::collections::HashMap;

/// Runs `config` on `world` ranks that are threads.
pub fn run(files: &ModelFiles, config: &TrainConfig, world: usize, steps: usize) -> Outcome {
    let mut outcomes = ranks(files, config, world, &|trainer| outcome(trainer, steps));
    let first = outcomes.remove(0);
    outcomes.iter().for_each(|other| assert_eq!(*other, first, "every rank knows the same"));
    first
}

/// What each of `world` ranks makes of its trainer.
pub fn ranks<T: Send>(
    files: &ModelFiles,
    config: &TrainConfig,
    world: usize,
    work: &(dyn Fn(&mut Trainer) -> T + Sync),
) -> Vec<T> {
    let groups = threads::group(world).into_iter().map(|group| Box::new(group) as Box<dyn ProcessGroup>);
    ranks_of(groups.collect(), files, config, work)
}

/// What each rank of a group makes of its trainer.
pub fn ranks_of<T: Send>(
    groups: Vec<Box<dyn ProcessGroup>>,
    files: &ModelFiles,
    config: &TrainConfig,
    work: &(dyn Fn(&mut Trainer) -> T + Sync),
) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .into_iter()
            .map(|group| {
                scope.spawn(move || {
                    let comm = Ordered::start(group, Watchdog::default());
                    let ledger = Ledger::new(Budget::UNLIMITED);
                    let activations = crate::plans::activations();
                    let setup = hearth_train::Setup { comm, ledger, activations, ..setup(files, config) };
                    let mut trainer = Trainer::new(setup, config.clone()).expect("a trainer");
                    work(&mut trainer)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    })
}

fn cases(global_batch: usize, compute: Compute) -> TrainConfig {
    TrainConfig { global_batch, compute, recompute: Recompute::Full, ..config(50) }
}

#[test]
fn every_layout_gives_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let files = cut(dir.path());
    let (cases, steps) = matrix(dir.path());
    let mut plain = HashMap::new();
    for case in &cases {
        let key = (case.config.compute.name(), case.config.global_batch);
        let plain = plain.entry(key).or_insert_with(|| run(&files, &case.plain(), 1, steps));
        assert_eq!(run(&files, &case.config, case.world, steps), *plain, "{}", case.name);
    }
    println!("{} layouts, {steps} steps of each", cases.len());
}

#[test]
fn awkward_numbers_of_ranks_and_micro_batches_give_the_same_bits() {
    let files = model("qwen3-tied-biases-sharded");
    let dir = tempfile::tempdir().unwrap();
    for (world, each) in [(3, 1), (3, 2), (3, 3), (2, 3), (5, 2)] {
        for adapter in [None, Some(lora())] {
            let config = TrainConfig { adapter, ..cases(world * each, Compute::F32) };
            let plain = run(&files, &config, 1, 3);
            for (zero, tier) in [(0, "all-nvme"), (1, "cpu"), (2, "all-nvme"), (3, "split"), (3, "device")] {
                let offload = offload(tier, dir.path());
                let config = TrainConfig { zero, offload, ..config.clone() };
                assert_eq!(run(&files, &config, world, 3), plain, "{world} ranks, {each} each, stage {zero}");
            }
        }
    }
}

/// One micro-batch, no clipping, all state on the disk: each unit is updated while the backward pass goes on. Gradients
/// of one micro-batch are kept in the precision of the model wherever they lie.
#[test]
fn updating_beside_the_backward_pass_gives_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["qwen3-tied-biases-sharded", "llama-mha"] {
        let files = model(name);
        for compute in [Compute::F32, Compute::Bf16] {
            for adapter in [None, Some(lora())] {
                for clip_norm in [0.0, 0.5] {
                    for optim in [OptimConfig::ALL[0], OptimConfig::ALL[1]] {
                        let config =
                            TrainConfig { adapter: adapter.clone(), clip_norm, optim, ..cases(1, compute) };
                        let plain = run(&files, &config, 1, 3);
                        for (tier, late) in
                            [("cpu", 0), ("split", 0), ("all-nvme", 0), ("all-nvme", 1), ("all-nvme", 9)]
                        {
                            let offload = Offload { late, ..offload(tier, dir.path()) };
                            let config = TrainConfig { offload, ..config.clone() };
                            let what =
                                format!("{name} {compute:?} clip {clip_norm} {tier} late {late} {optim:?}");
                            assert_eq!(run(&files, &config, 1, 3), plain, "{what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_ends_a_step_that_updates_beside_its_backward_pass() {
    let files = model("llama-mha");
    let dir = tempfile::tempdir().unwrap();
    let optim = OptimConfig::AdamW(AdamW { lr: 1e30, ..AdamW::default() });
    let offload = offload("all-nvme", dir.path());
    let config = TrainConfig { optim, clip_norm: 0.0, offload, ..cases(1, Compute::F32) };
    let ends = ranks(&files, &config, 1, &|trainer| {
        let error = (0..5).find_map(|_| trainer.step().err()).expect("weights of 1e30 overflow");
        assert!(matches!(error, hearth_train::Error::NotFinite { .. }), "{error}");
    });
    assert_eq!(ends.len(), 1);
}

#[test]
fn nothing_is_charged_when_a_run_is_over_and_nothing_is_left_on_the_disk() {
    let files = model("llama-mha");
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { zero: 3, offload: offload("all-nvme", dir.path()), ..cases(2, Compute::F32) };
    let ledgers = ranks(&files, &config, 2, &|trainer| {
        trainer.step().expect("a step");
        trainer.ledger().clone()
    });
    for ledger in ledgers {
        assert!(Tier::ALL.iter().all(|tier| ledger.peak(*tier) > 0));
        assert!(Tier::ALL.iter().all(|tier| ledger.used(*tier) == 0));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
