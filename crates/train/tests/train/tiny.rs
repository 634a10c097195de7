//! A run of a few sequences on any ranks, and everything of it that no layout may change.

use crate::synthetic::synthetic;
use hearth_data::{Loader, Sequence};
use hearth_memory::Ledger;
use hearth_train::{
    Activations, AdamW, Compute, Offload, OptimConfig, Place, Recompute, Schedule, ScheduleKind, Setup,
    TrainConfig, Trainer,
};
use hearth_weights::ModelFiles;
use std::path::Path;

/// Sequences with lengths of their own, some packed from two documents, some tokens untrained.
pub fn sequences(count: usize, vocab: usize) -> Vec<Sequence> {
    (0..count).map(|i| sequence(i, vocab)).collect()
}

fn sequence(i: usize, vocab: usize) -> Sequence {
    let len = 8 + i % 5;
    let ids: Vec<u32> = (0..len).map(|j| ((i * 31 + j * (7 + i % 3)) % vocab) as u32).collect();
    let documents = if i % 3 == 2 { vec![3, len - 3] } else { vec![len] };
    let mut labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    labels[0] = -100;
    labels[1 + i % 4] = -100;
    labels[if i % 3 == 2 { 3 } else { 0 }] = -100;
    Sequence { ids, labels, documents, example: i as u64, half: None }
}

pub fn config(steps: usize) -> TrainConfig {
    TrainConfig {
        steps,
        global_batch: 4,
        micro_batch: 1,
        seed: 7,
        sched: Schedule { kind: ScheduleKind::Cosine, warmup: 1, ..Schedule::default() },
        optim: OptimConfig::AdamW(AdamW { lr: 5e-3, weight_decay: 0.05, ..Default::default() }),
        ..TrainConfig::default()
    }
}

/// One rank alone.
pub fn setup<'a>(model: &'a ModelFiles, config: &TrainConfig, data: Vec<Sequence>) -> Setup<'a> {
    Setup {
        arch: hearth_model::architecture(&model.config).expect("a known architecture"),
        weights: &*model.tensors,
        validation: &[],
        loader: Loader::new(data, config.seed, config.global_batch).expect("a loader"),
        device: hearth_model::device::open("cpu").expect("the CPU"),
        comm: hearth_collective::single(),
        ledger: Ledger::default(),
        activations: Activations::default(),
        companions: hearth_train::companions(model).expect("companions"),
    }
}

/// A model whose units are cut unevenly: a transformer block is ten and a half chunks of the gradient norm, so that the
/// last rank's partition is always short and of the head there is only one.
pub fn cut(dir: &Path) -> ModelFiles {
    synthetic(dir, 64, 3, 160, 512, true)
}

/// Everything that must not differ: loss and gradient norm of every step, and every state by hash.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    steps: Vec<[u64; 2]>,
    state: Vec<(String, String)>,
}

impl Outcome {
    /// What comes of a step on each of these, or on what is next.
    pub fn of(trainer: &mut Trainer, steps: impl Iterator<Item = Option<Vec<Sequence>>>) -> Self {
        let one = |sequences| {
            let report = match sequences {
                Some(sequences) => trainer.step_on(sequences),
                None => trainer.step(),
            };
            let report = report.expect("a step");
            [report.loss.to_bits(), report.grad_norm.to_bits()]
        };
        let steps = steps.map(one).collect();
        Self { steps, state: trainer.fingerprint().expect("readable state") }
    }
}

/// What comes of the next steps.
pub fn outcome(trainer: &mut Trainer, steps: usize) -> Outcome {
    Outcome::of(trainer, (0..steps).map(|_| None))
}

/// Where the tiers of a case are, by name.
pub const TIERS: [&str; 5] = ["device", "cpu", "nvme", "split", "all-nvme"];

pub fn offload(tier: &str, dir: &Path) -> Offload {
    let nvme_dir = Some(dir.to_owned());
    let all = |place| Offload {
        params: place,
        grads: place,
        optim: place,
        nvme_dir: nvme_dir.clone(),
        ..Offload::default()
    };
    match tier {
        "device" => Offload::default(),
        "cpu" => Offload { params: Place::Device, ..all(Place::Cpu) },
        "nvme" => Offload { params: Place::Cpu, grads: Place::Cpu, ..all(Place::Nvme) },
        "split" => Offload { optim: Place::Cpu, ratio: 0.4, nvme_dir, ..Offload::default() },
        "all-nvme" => all(Place::Nvme),
        other => panic!("no tier {other}"),
    }
}

/// One way to lay out a run.
pub struct Case {
    pub name: String,
    pub world: usize,
    pub config: TrainConfig,
}

impl Case {
    /// What one plain rank, with everything on the device, is told.
    pub fn plain(&self) -> TrainConfig {
        TrainConfig { zero: 0, offload: Offload::default(), ..self.config.clone() }
    }
}

/// Whether everything is to be run, for minutes: `HEARTH_LONG_MATRIX=1`, as `cargo xtask matrix` sets it.
pub fn long() -> bool {
    std::env::var("HEARTH_LONG_MATRIX").is_ok_and(|value| value == "1")
}

/// The layouts to compare, and steps of each. Unless everything is wanted, every ninth: each value of each choice
/// still meets each value of every other.
pub fn matrix(dir: &Path) -> (Vec<Case>, usize) {
    let cases = every_case(dir);
    if long() {
        return (cases, 50);
    }
    eprintln!("SKIPPED: 8 of 9 layouts, and all steps but 4; HEARTH_LONG_MATRIX=1 runs everything");
    (cases.into_iter().step_by(9).collect(), 4)
}

fn every_case(dir: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    for compute in [Compute::F32, Compute::Bf16] {
        for accumulation in [1, 4] {
            for world in [1, 2, 4] {
                for zero in 0..4 {
                    for tier in TIERS {
                        let name = format!("{compute:?} x{accumulation} {world} ranks stage {zero} {tier}");
                        let (global_batch, offload) = (world * accumulation, offload(tier, dir));
                        let recompute = Recompute::Full;
                        let config =
                            TrainConfig { global_batch, compute, recompute, zero, offload, ..config(50) };
                        cases.push(Case { name, world, config });
                    }
                }
            }
        }
    }
    cases
}
