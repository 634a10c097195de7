//! How long a run's micro-batches take on a card, timed on models of one and of two of its blocks.

use super::{CardTrainer, Packed};
use crate::Error;
use crate::bench::Noise;
use half::bf16;
use hearth_cuda::runtime::Device;
use hearth_cuda::trainer::{Compute, Model, Plan};
use hearth_memory::Tier;
use hearth_model::rope::Rope;
use hearth_train::config;
use hearth_weights::ModelConfig;
use std::sync::Arc;
use std::time::Instant;

/// Runs of each, of which the fastest counts: the first compiles kernels.
const RUNS: usize = 3;

/// Seconds of the forward and backward pass over one micro-batch of documents of these lengths, everything on the card.
///
/// # Errors
/// [`Error::Card`], also where the ledger has no room for two blocks, embedding and head.
pub fn micro_batch_s(
    card: &Arc<Device>,
    config: &ModelConfig,
    compute: config::Compute,
    plan: &Plan,
    lengths: &[usize],
) -> Result<f64, Error> {
    match compute {
        config::Compute::Bf16 => seconds::<bf16>(card, config, plan, lengths),
        config::Compute::F32 | config::Compute::F16 => seconds::<f32>(card, config, plan, lengths),
    }
}

fn seconds<T: Compute>(
    card: &Arc<Device>,
    config: &ModelConfig,
    plan: &Plan,
    lengths: &[usize],
) -> Result<f64, Error> {
    let blocks = plan.model.num_blocks();
    let one = passes::<T>(card, config, plan, lengths, 1)?;
    if blocks == 1 {
        return Ok(one);
    }
    let two = passes::<T>(card, config, plan, lengths, 2)?;
    Ok(one + (two - one).max(0.0) * (blocks - 1) as f64)
}

/// The fastest passes through a model of the first `blocks` blocks.
fn passes<T: Compute>(
    card: &Arc<Device>,
    config: &ModelConfig,
    plan: &Plan,
    lengths: &[usize],
    blocks: usize,
) -> Result<f64, Error> {
    let mut model: Model = plan.model.clone();
    model.shape.windows.truncate(blocks);
    let ledger = card.ledger();
    let (device, host) = (ledger.free(Tier::Device), ledger.free(Tier::Host));
    let small = Plan::within::<T>(model, plan.settings, device, host)?;
    let trainer = hearth_cuda::trainer::Trainer::<T>::new(card, small, &mut Noise)?;
    let mut trainer = CardTrainer { trainer, rope: Rope::new(config) };
    let rows: usize = lengths.iter().sum();
    let ids: Vec<u32> = (0..rows).map(|i| ((i * 7919 + 13) % config.vocab_size) as u32).collect();
    let targets: Vec<i32> = ids[1..].iter().map(|&id| id as i32).chain([-1]).collect();
    let batch = Packed { ids: &ids, targets: &targets, lengths };
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        trainer.with(&[batch], |trainer, batches| {
            trainer.gradients_of(batches)?;
            trainer.synchronize()
        })?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok(fastest)
}
