//! The plan against the heap: what the process really allocates.
//!
//! One test, so that nothing else allocates beside it.

#[path = "../train/synthetic.rs"]
mod synthetic;

use hearth_data::{Half, Loader, Sequence};
use hearth_memory::{Ledger, Tier, heap};
use hearth_train::optim::StateDtype;
use hearth_train::plan::{Subject, plan};
use hearth_train::{
    Activations, Compute, Dpo, LoraConfig, ObjectiveConfig, Offload, Place, Recompute, Setup, TrainConfig,
    Trainer,
};
use hearth_weights::ModelFiles;
use std::path::Path;
use synthetic::synthetic;

#[global_allocator]
static HEAP: heap::CountingAllocator = heap::CountingAllocator;

const TOKENS: usize = 128;

/// Sequences, or the halves of pairs.
fn sequences(count: usize, vocab: usize, paired: bool) -> Vec<Sequence> {
    let one = |i: usize| {
        let half = paired.then_some(if i.is_multiple_of(2) { Half::Chosen } else { Half::Rejected });
        let example = if paired { i / 2 } else { i } as u64;
        let ids: Vec<u32> = (0..TOKENS).map(|j| ((i * 31 + j * 7) % vocab) as u32).collect();
        let labels = ids.iter().map(|id| *id as i32).collect();
        Sequence { ids, labels, documents: vec![TOKENS], example, half }
    };
    (0..count).map(one).collect()
}

/// Planned and measured peak of everything in memory, in bytes.
fn peaks(files: &ModelFiles, config: &TrainConfig) -> (u64, u64) {
    let arch = || hearth_model::architecture(&files.config).expect("a known architecture");
    let device = hearth_model::device::open("cpu").expect("the CPU");
    let unit = config.objective.objective().sequences_per_unit();
    let documents = vec![TOKENS; config.micro_batch * unit];
    let weights = &*files.tensors;
    let activations = Activations::measure(&*arch(), weights, config, &device, &documents).expect("measures");
    let data = sequences(16, files.config.vocab_size, unit == 2);
    let loader = Loader::new(data, 0, config.global_batch).expect("a loader");
    let subject = Subject { arch: &*arch(), weights, config, world: 1, activations, documents: &documents };
    let planned = Ledger::default();
    planned.record();
    plan(&subject, &planned).expect("a plan");
    let both = |held: &hearth_memory::ledger::Holdings| held.total(Tier::Device) + held.total(Tier::Host);
    let expected = planned.timeline().iter().map(|moment| both(&moment.held)).max().unwrap_or(0);
    // What the kernels keep is on the heap already.
    let base = heap::current().expect("counted") - activations.scratch;
    heap::reset_peak();
    let setup = Setup {
        arch: arch(),
        weights,
        loader,
        validation: &[],
        device,
        companions: Vec::new(),
        comm: hearth_collective::single(),
        ledger: Ledger::default(),
        activations,
    };
    let mut trainer = Trainer::new(setup, config.clone()).expect("a trainer");
    for _ in 0..2 {
        trainer.step().expect("a step");
    }
    (expected, heap::peak().expect("counted") - base)
}

fn cases(dir: &Path) -> Vec<(&'static str, TrainConfig)> {
    let plain = TrainConfig { global_batch: 4, micro_batch: 2, ..TrainConfig::default() };
    let full = TrainConfig { recompute: Recompute::Full, ..plain.clone() };
    let lora = LoraConfig { targets: vec!["all-linear".into()], ..LoraConfig::default() };
    let offload = |params, grads, optim| Offload {
        params,
        grads,
        optim,
        nvme_dir: Some(dir.into()),
        ..Offload::default()
    };
    let dpo = |config: &TrainConfig| TrainConfig {
        objective: ObjectiveConfig::Dpo(Dpo::default()),
        micro_batch: 1,
        ..config.clone()
    };
    let one = TrainConfig { global_batch: 2, compute: Compute::Bf16, ..full.clone() };
    use Place::{Cpu, Device, Nvme};
    vec![
        ("plain", plain.clone()),
        ("recompute", full.clone()),
        ("bf16", TrainConfig { compute: Compute::Bf16, ..plain.clone() }),
        ("bf16 recompute", TrainConfig { compute: Compute::Bf16, ..full.clone() }),
        ("lora", TrainConfig { adapter: Some(lora.clone()), ..plain.clone() }),
        ("preferences", dpo(&plain)),
        ("preferences recompute", dpo(&full)),
        ("preferences lora", dpo(&TrainConfig { adapter: Some(lora.clone()), ..full.clone() })),
        ("lora recompute", TrainConfig { adapter: Some(lora), ..full.clone() }),
        ("optimizer on the host", TrainConfig { offload: offload(Device, Cpu, Cpu), ..full.clone() }),
        ("optimizer on disk", TrainConfig { offload: offload(Device, Device, Nvme), ..full.clone() }),
        ("everything on disk", TrainConfig { offload: offload(Nvme, Nvme, Nvme), ..full.clone() }),
        ("one micro-batch, bf16", one.clone()),
        (
            "bf16, states in 8 bits",
            TrainConfig { compute: Compute::Bf16, state_dtype: StateDtype::F8, ..plain },
        ),
        (
            "one micro-batch, bf16, everything on disk",
            TrainConfig { offload: offload(Nvme, Nvme, Nvme), ..one.clone() },
        ),
        (
            "one micro-batch, bf16, updated beside",
            TrainConfig { offload: offload(Nvme, Nvme, Nvme), clip_norm: 0.0, ..one.clone() },
        ),
        (
            "one micro-batch, bf16, some units updated late",
            TrainConfig { offload: Offload { late: 2, ..offload(Nvme, Nvme, Nvme) }, clip_norm: 0.0, ..one },
        ),
        (
            "everything on disk, bf16",
            TrainConfig { compute: Compute::Bf16, offload: offload(Nvme, Nvme, Nvme), ..full },
        ),
    ]
}

#[test]
fn the_heap_peaks_within_two_percent_of_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let mut off = Vec::new();
    for tied in [true, false] {
        let models = tempfile::tempdir().unwrap();
        let files = synthetic(models.path(), 256, 6, 768, 4096, tied);
        // An untied head changes only where its gradient goes.
        let cases = cases(dir.path()).into_iter().step_by(if tied { 1 } else { 3 });
        for (name, config) in cases {
            let (planned, measured) = peaks(&files, &config);
            let ratio = measured as f64 / planned as f64;
            println!(
                "{name:26} tied {tied:5} planned {planned:>10} measured {measured:>10} ratio {ratio:.4}"
            );
            if (ratio - 1.0).abs() > 0.02 {
                off.push(format!("{name} (tied {tied}): {ratio:.4}"));
            }
        }
    }
    assert!(off.is_empty(), "{off:#?}");
}
