//! A run's results are the same bits whatever the number of ranks, the ZeRO stage and the tiers.

use crate::support::{config, lora, model, setup};
use hearth_collective::{Ordered, Watchdog, threads};
use hearth_memory::{Budget, Ledger, Tier};
use hearth_train::{Compute, Offload, Place, Recompute, TrainConfig, Trainer};
use hearth_weights::ModelFiles;
use std::path::Path;

/// Everything that must not differ: loss and gradient norm of every step, and every state by hash.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    steps: Vec<[u64; 2]>,
    state: Vec<(String, String)>,
}

/// Where the tiers of a case are, by name.
pub const TIERS: [&str; 5] = ["device", "cpu", "nvme", "split", "all-nvme"];

pub fn offload(tier: &str, dir: &Path) -> Offload {
    let nvme_dir = Some(dir.to_owned());
    let all =
        |place| Offload { params: place, grads: place, optim: place, ratio: 1.0, nvme_dir: nvme_dir.clone() };
    match tier {
        "device" => Offload::default(),
        "cpu" => Offload { params: Place::Device, ..all(Place::Cpu) },
        "nvme" => Offload { params: Place::Cpu, grads: Place::Cpu, ..all(Place::Nvme) },
        "split" => Offload { optim: Place::Cpu, ratio: 0.4, nvme_dir, ..Offload::default() },
        "all-nvme" => all(Place::Nvme),
        other => panic!("no tier {other}"),
    }
}

/// Runs `config` on `world` ranks that are threads.
pub fn run(files: &ModelFiles, config: &TrainConfig, world: usize, steps: usize) -> Outcome {
    let mut outcomes = ranks(files, config, world, &|trainer| {
        let one = |_| {
            let report = trainer.step().expect("a step");
            [report.loss.to_bits(), report.grad_norm.to_bits()]
        };
        let steps = (0..steps).map(one).collect();
        Outcome { steps, state: trainer.fingerprint().expect("readable state") }
    });
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
    std::thread::scope(|scope| {
        let groups = threads::group(world).into_iter();
        let ranks: Vec<_> = groups
            .map(|group| {
                scope.spawn(move || {
                    let comm = Ordered::start(Box::new(group), Watchdog::default());
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
    let files = model("llama-gqa-tied");
    let dir = tempfile::tempdir().unwrap();
    for compute in [Compute::F32, Compute::Bf16] {
        for accumulation in [1, 4] {
            for world in [1, 2, 4] {
                let config = cases(world * accumulation, compute);
                let plain = run(&files, &config, 1, 4);
                for zero in 0..4 {
                    for tier in TIERS {
                        let offload = offload(tier, dir.path());
                        let config = TrainConfig { zero, offload, ..config.clone() };
                        let got = run(&files, &config, world, 4);
                        assert_eq!(
                            got, plain,
                            "{compute:?} world {world} stage {zero} {tier} x{accumulation}"
                        );
                    }
                }
            }
        }
    }
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
