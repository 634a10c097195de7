//! A plan is the ledger of the run it describes, byte for byte.

use crate::layouts::{TIERS, offload, ranks};
use crate::support::{config, lora};
use crate::synthetic::synthetic;
use hearth_memory::{Budget, Kind, Ledger, Tier};
use hearth_train::optim::StateDtype;
use hearth_train::plan::{Subject, plan};
use hearth_train::{Activations, Compute, Dpo, ObjectiveConfig, Offload, Recompute, TrainConfig};
use hearth_weights::ModelFiles;
use std::collections::BTreeMap;
use std::path::Path;

type Peaks = Vec<(u64, BTreeMap<Kind, u64>)>;

fn peaks(ledger: &Ledger) -> Peaks {
    Tier::ALL.iter().map(|tier| (ledger.peak(*tier), ledger.peak_by_kind(*tier))).collect()
}

/// Numbers that tell every phase from every other.
pub fn activations() -> Activations {
    Activations {
        input: 1_000,
        tape: 1_000_000,
        taping: 10_007,
        block_forward: 200_003,
        block_backward: 700_001,
        block_again: 1_900_001,
        block_gradients: 900_007,
        head_forward: 50_021,
        head: 1_400_003,
        head_gradients: 800_011,
        embedding: 600_011,
        embedding_gradients: 500_009,
        scratch: 12_347,
    }
}

fn planned(files: &ModelFiles, config: &TrainConfig, world: usize, budget: Budget) -> Result<Peaks, String> {
    let arch = hearth_model::architecture(&files.config).expect("a known architecture");
    let ledger = Ledger::new(budget);
    let subject = Subject {
        arch: &*arch,
        weights: &*files.tensors,
        config,
        world,
        activations: activations(),
        documents: &[12],
    };
    plan(&subject, &ledger).map_err(|e| e.to_string())?;
    assert!(Tier::ALL.iter().all(|tier| ledger.used(*tier) == 0), "everything is given back");
    Ok(peaks(&ledger))
}

fn ran(files: &ModelFiles, config: &TrainConfig, world: usize) -> Peaks {
    let all = ranks(files, config, world, &|trainer| {
        for _ in 0..2 {
            trainer.step().expect("a step");
        }
        peaks(trainer.ledger())
    });
    all.into_iter().next().expect("rank 0")
}

fn small(dir: &Path) -> ModelFiles {
    synthetic(dir, 64, 3, 160, 512, true)
}

#[test]
fn the_plan_is_the_ledger_of_the_run_in_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    let files = small(dir.path());
    // Every 11th of all combinations: each value of each choice meets each value of every other.
    for (at, (case, world, config)) in all_cases(dir.path()).into_iter().enumerate() {
        if at % 11 == 0 {
            let plan = planned(&files, &config, world, Budget::UNLIMITED).expect(&case);
            assert_eq!(ran(&files, &config, world), plan, "{case}");
        }
    }
}

/// Names, ranks and configurations.
fn all_cases(dir: &Path) -> Vec<(String, usize, TrainConfig)> {
    let mut cases = Vec::new();
    for compute in [Compute::F32, Compute::Bf16] {
        for recompute in [Recompute::None, Recompute::Full] {
            for (world, each) in [(1, 1), (1, 4), (2, 3), (3, 2), (4, 1)] {
                for zero in 0..4 {
                    for tier in TIERS {
                        for adapter in [None, Some(lora())] {
                            let kind = if adapter.is_some() { "lora" } else { "full" };
                            let case = format!(
                                "{compute:?} {recompute:?} {world} ranks x{each} stage {zero} {tier} {kind}"
                            );
                            let (offload, global_batch) = (offload(tier, dir), world * each);
                            let config = TrainConfig {
                                compute,
                                recompute,
                                zero,
                                offload,
                                adapter,
                                global_batch,
                                ..config(2)
                            };
                            cases.push((case, world, config));
                        }
                    }
                }
            }
        }
    }
    cases
}

#[test]
fn the_plan_of_one_micro_batch_without_clipping_is_its_ledger_too() {
    let dir = tempfile::tempdir().unwrap();
    for tied in [true, false] {
        let models = tempfile::tempdir().unwrap();
        let files = synthetic(models.path(), 64, 3, 160, 512, tied);
        for compute in [Compute::F32, Compute::Bf16] {
            let late = [("all-nvme", 1), ("all-nvme", 9)];
            for (tier, late) in TIERS.map(|tier| (tier, 0)).into_iter().chain(late) {
                for adapter in [None, Some(lora())] {
                    let offload = Offload { late, ..offload(tier, dir.path()) };
                    let config = TrainConfig {
                        compute,
                        offload,
                        adapter,
                        global_batch: 1,
                        clip_norm: 0.0,
                        recompute: Recompute::Full,
                        ..config(2)
                    };
                    let plan = planned(&files, &config, 1, Budget::UNLIMITED).expect("no limit");
                    assert_eq!(
                        ran(&files, &config, 1),
                        plan,
                        "{compute:?} {tier} late {late} {:?}",
                        config.adapter
                    );
                }
            }
        }
    }
}

#[test]
fn the_plan_of_states_in_fewer_bits_is_its_ledger_too() {
    let dir = tempfile::tempdir().unwrap();
    let files = small(dir.path());
    for compute in [Compute::F32, Compute::Bf16] {
        for state_dtype in [StateDtype::Bf16, StateDtype::F8] {
            for (world, zero, tier) in
                [(1, 0, "device"), (2, 1, "device"), (2, 2, "cpu"), (1, 0, "split"), (3, 3, "all-nvme")]
            {
                let offload = offload(tier, dir.path());
                let global_batch = 2 * world;
                let config = TrainConfig { compute, state_dtype, zero, offload, global_batch, ..config(2) };
                let plan = planned(&files, &config, world, Budget::UNLIMITED).expect("no limit");
                let what = format!("{compute:?} {state_dtype:?} {world} ranks stage {zero} {tier}");
                assert_eq!(ran(&files, &config, world), plan, "{what}");
            }
        }
    }
}

#[test]
fn the_plan_of_preference_training_is_its_ledger_too() {
    let dir = tempfile::tempdir().unwrap();
    let files = small(dir.path());
    for (world, zero, tier, recompute) in [
        (1, 0, "device", Recompute::None),
        (2, 2, "cpu", Recompute::Full),
        (2, 3, "all-nvme", Recompute::Full),
    ] {
        for adapter in [None, Some(lora())] {
            let (objective, offload) = (ObjectiveConfig::Dpo(Dpo::default()), offload(tier, dir.path()));
            let config = TrainConfig { objective, recompute, zero, offload, adapter, ..config(2) };
            let plan = planned(&files, &config, world, Budget::UNLIMITED).expect("no limit");
            assert_eq!(ran(&files, &config, world), plan, "{world} ranks stage {zero} {:?}", config.adapter);
        }
    }
}

#[test]
fn a_budget_of_the_planned_peaks_holds_the_run_and_a_byte_less_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let files = small(dir.path());
    for tier in TIERS {
        let config = TrainConfig { offload: offload(tier, dir.path()), ..config(2) };
        let plan = planned(&files, &config, 1, Budget::UNLIMITED).expect("no limit");
        let limits: Vec<u64> = plan.iter().map(|(peak, _)| *peak).collect();
        let budget = |limits: &[u64]| -> Budget {
            format!("device={},host={},nvme={}", limits[0], limits[1], limits[2]).parse().expect("a budget")
        };
        planned(&files, &config, 1, budget(&limits)).expect("exactly enough");
        for short in 0..3 {
            let mut limits = limits.clone();
            if limits[short] == 0 {
                continue;
            }
            limits[short] -= 1;
            let error = planned(&files, &config, 1, budget(&limits)).expect_err("a byte too few");
            assert!(error.contains(Tier::ALL[short].name()), "{error}");
        }
    }
}
