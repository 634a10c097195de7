//! The fastest configurations that fit.

use super::forecast::{Clock, Forecast};
use crate::machine;
use crate::tiers::{Tiers, sharers};
use crate::training::Job;
use crate::ui::bytes;
use hearth_memory::{Ledger, Tier};
use hearth_train::reduce::Assignment;
use hearth_train::{Activations, Offload, Pace, Place, Recompute, TrainConfig};
use serde::Serialize;
use std::collections::BTreeMap;

/// How many are told.
const TOLD: usize = 3;

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Search {
    /// Configurations that were looked at.
    pub considered: usize,
    /// Those that cannot be, by reason.
    pub rejected: Vec<Rejected>,
    /// At most three that fit, the fastest first.
    pub fastest: Vec<Found>,
}

/// Configurations that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rejected {
    /// Why.
    pub reason: String,
    /// How many.
    pub count: usize,
}

/// One that fits.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// What makes it of the recipe, as options of a command.
    pub set: String,
    /// Seconds of a step.
    pub step_s: f64,
    /// Tokens per second.
    pub tok_s: f64,
    /// What binds it.
    pub bound_by: &'static str,
    /// Its peaks.
    pub tiers: Tiers,
}

/// Why a configuration cannot be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// The tier is too small.
    Short(Tier),
    /// Its activations alone exceed the device, or this machine's memory.
    Activations,
    /// It contradicts itself.
    Contradiction(String),
}

#[derive(Default)]
struct Rejections(BTreeMap<Reason, (usize, u64)>);

impl Rejections {
    fn add(&mut self, reason: Reason, count: usize, needed: u64) {
        let (sum, least) = self.0.entry(reason).or_insert((0, u64::MAX));
        *sum += count;
        *least = needed.min(*least);
    }

    fn told(self, job: &Job) -> Vec<Rejected> {
        let mut told: Vec<Rejected> = self
            .0
            .into_iter()
            .map(|(reason, (count, least))| Rejected { reason: reason.told(least, job), count })
            .collect();
        told.sort_by_key(|rejected| std::cmp::Reverse(rejected.count));
        told
    }
}

impl Reason {
    fn told(self, least: u64, job: &Job) -> String {
        match self {
            Reason::Contradiction(sentence) => sentence,
            Reason::Activations => "the activations of such a micro-batch alone are too much".into(),
            Reason::Short(tier) => {
                let ranks = sharers(tier, job.here());
                let limit = job.budget.limit(tier).unwrap_or(u64::MAX);
                format!(
                    "need more of the {tier} tier: {} at least, memory.{tier} is {}",
                    bytes(least.saturating_mul(ranks)),
                    bytes(limit.saturating_mul(ranks))
                )
            }
        }
    }
}

/// Looks at every stage, place of the state, recomputation and micro-batch. `pace` is that of the job's own micro-batch.
///
/// # Errors
/// Weights that cannot be read.
pub fn search(mut job: Job, clock: &Clock<'_>, pace: Pace) -> anyhow::Result<Search> {
    let own = job.config.clone();
    let (mut considered, mut rejections) = (0, Rejections::default());
    let mut fit: Vec<Found> = Vec::new();
    let mut known = vec![(own.micro_batch, job.activations, pace)];
    for micro_batch in divisors(own.global_batch) {
        let configs = candidates(&own, micro_batch, clock.world_size);
        considered += configs.len();
        job.config.micro_batch = micro_batch;
        let dividing = TrainConfig { micro_batch, ..own.clone() };
        if let Err(error) = Assignment::new(&dividing, clock.world_size) {
            rejections.add(Reason::Contradiction(error.to_string()), configs.len(), 0);
            continue;
        }
        let Some((activations, pace)) = measured(&job, &mut known)? else {
            rejections.add(Reason::Activations, configs.len(), 0);
            continue;
        };
        job.activations = activations;
        for config in configs {
            job.config = config;
            match look(&mut job, clock, pace) {
                Ok(found) => fit.push(found),
                Err((reason, needed)) => rejections.add(reason, 1, needed),
            }
        }
    }
    fit.sort_by(|a, b| a.step_s.total_cmp(&b.step_s).then(weight(a).cmp(&weight(b))));
    fit.truncate(TOLD);
    Ok(Search { considered, rejected: rejections.told(&job), fastest: fit })
}

/// Of two that are as fast the one that holds less.
fn weight(found: &Found) -> u64 {
    found.tiers.device.peak_bytes + found.tiers.host.peak_bytes
}

/// A configuration's forecast, or why there is none and what it would need.
fn look(job: &mut Job, clock: &Clock<'_>, pace: Pace) -> Result<Found, (Reason, u64)> {
    let contradiction = |error: anyhow::Error| (Reason::Contradiction(crate::exit::sentence(&error)), 0);
    job.use_spare_memory(clock.world_size).map_err(contradiction)?;
    let forecast = Forecast::of(job, clock, pace, Ledger::default()).map_err(contradiction)?;
    if let Some(tier) = job.short(&forecast.ledger).first() {
        return Err((Reason::Short(*tier), forecast.ledger.peak(*tier)));
    }
    Ok(Found {
        set: set(&job.config),
        step_s: forecast.time.step_s,
        tok_s: forecast.tok_s,
        bound_by: forecast.time.bound_by,
        tiers: forecast.tiers(job),
    })
}

/// What activations of the job's micro-batch take; nothing where they can be seen to be too much without measuring.
fn measured(
    job: &Job,
    known: &mut Vec<(usize, Activations, Pace)>,
) -> anyhow::Result<Option<(Activations, Pace)>> {
    let micro_batch = job.config.micro_batch;
    if let Some((_, activations, pace)) = known.iter().find(|(of, ..)| *of == micro_batch) {
        return Ok(Some((*activations, *pace)));
    }
    // From the largest that is smaller: what a sequence takes more of grows with their number.
    let smaller = known.iter().filter(|(of, ..)| *of < micro_batch).max_by_key(|(of, ..)| *of);
    if let Some((of, activations, _)) = smaller {
        let expected = activations.head.max(activations.block_again) / *of as u64 * micro_batch as u64;
        let (_, available) = machine::memory_bytes();
        if expected > job.budget.limit(Tier::Device).unwrap_or(u64::MAX).min(available / 2) {
            return Ok(None);
        }
    }
    let (activations, pace) = job.measure_activations()?;
    known.push((micro_batch, activations, pace));
    Ok(Some((activations, pace)))
}

fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|i| n.is_multiple_of(*i)).collect()
}

/// Everything that may be chosen, but the micro-batch.
fn candidates(own: &TrainConfig, micro_batch: usize, world_size: usize) -> Vec<TrainConfig> {
    let stages = if world_size > 1 { 0..=3 } else { 0..=0 };
    let mut all = Vec::new();
    for zero in stages {
        for recompute in [Recompute::None, Recompute::Full] {
            for offload in placements(&own.offload) {
                all.push(TrainConfig { zero, recompute, offload, micro_batch, ..own.clone() });
            }
        }
    }
    all
}

/// Optimizer state is used once a step: it goes before gradients do, and before parameters. Without a folder for it
/// nothing goes to nvme.
fn placements(own: &Offload) -> Vec<Offload> {
    let tiers = match own.nvme_dir {
        Some(_) => &[Place::Device, Place::Cpu, Place::Nvme][..],
        None => &[Place::Device, Place::Cpu],
    };
    let mut all = Vec::new();
    for (at, &optim) in tiers.iter().enumerate() {
        for &grads in &tiers[..=at] {
            for &params in &tiers[..=at] {
                all.push(Offload {
                    params,
                    grads,
                    optim,
                    nvme_dir: own.nvme_dir.clone(),
                    ..Offload::default()
                });
            }
        }
    }
    all
}

fn set(config: &TrainConfig) -> String {
    let o = &config.offload;
    let recompute = if config.recompute == Recompute::Full { "full" } else { "none" };
    let keys = [
        format!("parallel.zero={}", config.zero),
        format!("offload.params={}", o.params.name()),
        format!("offload.grads={}", o.grads.name()),
        format!("offload.optim={}", o.optim.name()),
        format!("offload.ratio={:.1}", o.ratio),
        format!("activation.checkpoint={recompute}"),
        format!("train.micro_batch={}", config.micro_batch),
    ];
    keys.map(|key| format!("--set {key}")).join(" ")
}
