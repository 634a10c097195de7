//! What a run on an NVIDIA card will hold, and how long its steps will take.

use super::{Forecast, Measured, PlanArgs, PlanReport};
use crate::card::{CardJob, Placement};
use crate::exit::usage;
use crate::recipe::Recipe;
use crate::tiers::Tiers;
use crate::training::Material;
use crate::ui::Ui;
use hearth_cuda::trainer::{Place, Plan};
use hearth_gpu::bench::{Copies, copies};
use hearth_gpu::training::pace;
use hearth_memory::{Tier, heap};
use hearth_train::flops::ModelFlops;
use hearth_train::plan::{Speeds, StepTime};
use hearth_train::{Compute, Recompute};

/// Opens the card, times the model's blocks and copies on it, and plans.
///
/// # Errors
/// As [`CardJob::open`].
pub fn run(
    recipe: &Recipe,
    ordinal: usize,
    world_size: usize,
    args: &PlanArgs,
    ui: &Ui,
) -> anyhow::Result<PlanReport> {
    let flag = args.svg.as_ref().map(|_| "--svg").or(args.search.then_some("--search"));
    if let Some(flag) = flag {
        let device = &recipe.model.device;
        return Err(usage(format!(
            "{flag} is for runs on the CPU, model.device is {device:?}; leave it out"
        )));
    }
    let before = heap::current().unwrap_or(0) as u64;
    let job = CardJob::open(recipe, ordinal, world_size, ui)?;
    let measured = Measured::of(None, 1, args.measure, ui)?;
    let forecast = forecast(&job, &measured)?;
    let host = forecast.ledger.peak(Tier::Host);
    let placement = job.placement();
    Ok(PlanReport {
        tiers: Tiers::of(&forecast.ledger, 1),
        ranks: 1,
        ranks_here: 1,
        by_phase: forecast.by_phase(1),
        time: forecast.time,
        tok_s: forecast.tok_s,
        process_peak_bytes: before + host,
        fits: true,
        why: None,
        speeds: forecast.speeds,
        machine: format!("{} and {}", placement.card, measured.machine),
        layout: layout(&placement, &job.material),
        card: Some(placement),
        search: None,
    })
}

fn layout(placement: &Placement, material: &Material) -> String {
    let Placement { card, units, units_on_host, blocks_streamed } = placement;
    let recompute = if material.config.recompute == Recompute::Full { ", recomputed" } else { "" };
    let micro_batch = material.config.micro_batch;
    format!(
        "{card}: {units_on_host} of {units} units updated by the host, {blocks_streamed} blocks streamed, \
         micro-batch {micro_batch}{recompute}"
    )
}

fn forecast(job: &CardJob, measured: &Measured) -> anyhow::Result<Forecast> {
    let CardJob { material, plan, card } = job;
    let Material { config, train, files, .. } = material;
    let arch = hearth_model::architecture(&files.config)?;
    let flops = ModelFlops::planned(&*arch, config, &hearth_train::params::layout(&*arch, config, 1, 0)?);
    let largest = material.largest_micro_batch();
    let micro_batch_s = pace::micro_batch_s(card, &files.config, config.compute, plan, &largest)?;
    let of_largest = flops.of(largest.iter().copied());
    let of_all: f64 = flops.of(train.iter().flat_map(|sequence| sequence.documents.iter().copied()));
    let sequences = train.len().max(1) as f64;
    let share = of_all / sequences / (of_largest / config.micro_batch as f64);
    let speed = copies(card)?;
    let moved = Moved::of(plan, config.compute, config.micro_batches());
    let compute_s = config.micro_batches() as f64 * micro_batch_s * share;
    let time = moved.time(compute_s, speed, measured.memory);
    let tokens = train.iter().map(|sequence| sequence.ids.len()).sum::<usize>() as f64;
    let infinite = f64::INFINITY;
    Ok(Forecast {
        ledger: job.planned()?,
        speeds: Speeds {
            flops: of_largest / micro_batch_s,
            disk_read: infinite,
            disk_write: infinite,
            disk_both: infinite,
            memory: measured.memory,
            link: speed.to_card,
        },
        tok_s: tokens / sequences * config.global_batch as f64 / time.step_s,
        time,
    })
}

/// Bytes that a step moves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Moved {
    to_card: f64,
    to_host: f64,
    /// Read and written by the card's updates.
    update_card: f64,
    /// By the host's.
    update_host: f64,
}

impl Moved {
    fn of(plan: &Plan, compute: Compute, micro_batches: usize) -> Self {
        // AdamW reads gradient, moments and master and writes all but the first, and where it is apart the copy.
        let (weight, state) = if compute == Compute::Bf16 { (2.0, 30.0) } else { (4.0, 28.0) };
        let (gradient, passes) = (4.0, micro_batches as f64);
        let mut moved = Self::default();
        for (len, place) in plan.unit_lengths().into_iter().zip(&plan.places) {
            let len = len as f64;
            if *place == Place::Card {
                moved.update_card += len * state;
                continue;
            }
            moved.update_host += len * state;
            moved.to_host += len * gradient * passes;
            moved.to_card += len * gradient * (passes - 1.0);
            // Forward and backward of every micro-batch, or once after the update.
            moved.to_card += len * weight * if *place == Place::Streamed { 2.0 * passes } else { 1.0 };
        }
        moved
    }

    /// Copies run beside the passes and both ways at once, the card's updates beside the host's.
    fn time(self, compute_s: f64, copies: Copies, memory: f64) -> StepTime {
        let exchange_s = (self.to_card / copies.to_card).max(self.to_host / copies.to_host);
        let update_s = (self.update_card / copies.within).max(self.update_host / memory);
        let step_s = compute_s.max(exchange_s) + update_s;
        let shares = [("compute", compute_s), ("link", exchange_s), ("memory", update_s)];
        let longest = shares.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("three of them");
        StepTime { compute_s, disk_s: 0.0, exchange_s, update_s, step_s, bound_by: longest.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_bound_by_what_takes_longest_of_it() {
        let copies = Copies { within: 100.0, to_card: 10.0, to_host: 5.0 };
        let moved = Moved { to_card: 20.0, to_host: 20.0, update_card: 100.0, update_host: 30.0 };
        let bound = |compute_s, memory| {
            let time = moved.time(compute_s, copies, memory);
            (time.step_s, time.bound_by)
        };
        assert_eq!(bound(8.0, 30.0), (9.0, "compute"));
        assert_eq!(bound(1.0, 30.0), (5.0, "link"));
        assert_eq!(bound(1.0, 3.0), (14.0, "memory"));
    }
}
