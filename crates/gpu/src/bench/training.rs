//! bf16 training steps of whole models of random weights, and full fine-tuning within a budget for the card.

use super::Extent;
use super::decoding::{MODELS, Named, SMALL};
use crate::Error;
use half::bf16;
use hearth_cuda::decoder::weights::{HostMatrix, Source};
use hearth_cuda::runtime::Device;
use hearth_cuda::trainer::{MicroBatch, Model, Place, Plan, Settings, Trainer};
use hearth_kernels::cpu::adamw::AdamWRule;
use hearth_memory::Tier;
use serde::Serialize;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

/// What a user's card has: the budget that the largest model is fine-tuned within.
const SMALL_CARD: u64 = 24_000_000_000;

/// Training steps as measured.
#[derive(Clone, Debug, Serialize)]
pub struct Training {
    /// Model, type and batch.
    pub what: String,
    /// Trained numbers.
    pub parameters: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Of a step, by the host's clock.
    pub seconds: f64,
    /// What the card may hold; `None` = all of it.
    pub budget_bytes: Option<u64>,
    /// What the plan said before anything was allocated.
    pub planned_bytes: u64,
    /// Most that the ledger held.
    pub ledger_bytes: u64,
    /// What the driver says became less, its own needs included.
    pub driver_bytes: u64,
    /// Held on the host.
    pub host_bytes: u64,
    /// Units (embedding, blocks, head) whose optimizer state is the host's.
    pub units_on_host: usize,
    /// Blocks whose weights stream through the card.
    pub blocks_streamed: usize,
}

impl Training {
    /// Tokens per second.
    pub fn tok_s(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// The models that PyTorch's steps are measured with, and the largest that fits the small card's budget.
pub fn run(
    card: &Arc<Device>,
    extent: Extent,
    found: &mut dyn FnMut(Training),
) -> Result<Vec<String>, Error> {
    let models = if extent == Extent::Full { &MODELS[..] } else { &SMALL[..] };
    let mut left_out = Vec::new();
    let trained = models.iter().filter(|model| ["135M", "1.1B", "tiny"].contains(&model.name));
    for model in trained {
        let plan = Plan::with_share::<bf16>(dimensions(model), settings(extent, false), 0.0)?;
        match steps(card, extent, model, plan, None) {
            Ok(training) => found(training),
            Err(Error::Card(error)) if error.is_no_room() => {
                left_out.push(format!("training {}: {error}", model.name));
            }
            Err(error) => return Err(error),
        }
    }
    match budgeted(card, extent, models, &mut left_out)? {
        Some((model, plan, budget)) => found(steps(card, extent, model, plan, Some(budget))?),
        None => left_out.push("full fine-tuning within a budget: no model fits".to_owned()),
    }
    Ok(left_out)
}

/// The largest model that fits both tiers, how, and within how many bytes of the card.
fn budgeted<'a>(
    card: &Arc<Device>,
    extent: Extent,
    models: &'a [Named],
    left_out: &mut Vec<String>,
) -> Result<Option<(&'a Named, Plan, u64)>, Error> {
    let room = card.memory()?.free.min(card.ledger().free(Tier::Device));
    let settings = settings(extent, true);
    for model in models.iter().rev() {
        let budget = match extent {
            Extent::Full => SMALL_CARD.min(room),
            // Most of it, so that some of it must move.
            Extent::Tiny => {
                let whole = Plan::with_share::<bf16>(dimensions(model), settings, 0.0)?;
                (whole.needs.total(Tier::Device) * 9 / 10).min(room)
            }
        };
        match Plan::within::<bf16>(dimensions(model), settings, budget, host_room(card)) {
            Ok(plan) => return Ok(Some((model, plan, budget))),
            Err(error) if error.is_no_room() => {
                left_out.push(format!("fine-tuning {} within {budget} bytes: {error}", model.name));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Nine tenths of what the system says is available, within the ledger's budget.
fn host_room(card: &Arc<Device>) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(u64::MAX, |kib| kib * 1024 / 10 * 9).min(card.ledger().free(Tier::Host))
}

fn settings(extent: Extent, recompute: bool) -> Settings {
    Settings { rows: extent.pick(8 * 1024, 16), logit_rows: extent.pick(1024, 8), recompute }
}

fn dimensions(model: &Named) -> Model {
    let shape = model.shape();
    Model { shape, tied: false, qkv_bias: false, out_bias: false, mlp_bias: false, qk_norm: false }
}

/// Steps after two that do not count.
fn steps(
    card: &Arc<Device>,
    extent: Extent,
    model: &Named,
    plan: Plan,
    budget_bytes: Option<u64>,
) -> Result<Training, Error> {
    let (free, held) = (card.memory()?.free, card.ledger().used(Tier::Device));
    card.ledger().reset_peaks();
    let (tokens, documents) = (plan.settings.rows, extent.pick(8, 1));
    let mut trainer = Trainer::<bf16>::new(card, plan, &mut Noise)?;
    let ids: Vec<u32> = (0..tokens).map(|i| ((i * 7919 + 13) % model.vocab) as u32).collect();
    let targets: Vec<i32> = ids[1..].iter().map(|&id| id as i32).chain([-1]).collect();
    let half = tokens * (model.hidden / model.heads / 2);
    let (cos, sin) = (vec![1.0; half], vec![0.0; half]);
    let documents = vec![tokens / documents; documents];
    let batch = MicroBatch { ids: &ids, targets: &targets, documents: &documents, cos: &cos, sin: &sin };
    let mut step = || trainer.step(&[batch], 1.0, rule).map(|_| ());
    for _ in 0..2 {
        step()?;
    }
    let count = if budget_bytes.is_some() { extent.pick(3, 1) } else { extent.pick(10, 1) };
    let start = Instant::now();
    for _ in 0..count {
        step()?;
    }
    trainer.synchronize()?;
    let seconds = start.elapsed().as_secs_f64() / count as f64;
    let plan = trainer.plan();
    let how = if plan.settings.recompute { ", blocks computed again" } else { "" };
    let within = budget_bytes.map_or(String::new(), |_| " within a budget".to_owned());
    Ok(Training {
        what: format!("training {}{within} in bf16, {tokens} tokens a step{how}", model.name),
        parameters: plan.parameters(),
        tokens,
        seconds,
        budget_bytes,
        planned_bytes: plan.needs.total(Tier::Device),
        ledger_bytes: card.ledger().peak(Tier::Device) - held,
        driver_bytes: free.saturating_sub(card.memory()?.free),
        host_bytes: plan.needs.total(Tier::Host),
        units_on_host: plan.places.iter().filter(|place| **place != Place::Card).count(),
        blocks_streamed: plan.places.iter().filter(|place| **place == Place::Streamed).count(),
    })
}

fn rule(gradient_scale: f32) -> AdamWRule {
    AdamWRule {
        keep: 1.0,
        one_minus_beta1: 0.1,
        beta2: 0.95,
        one_minus_beta2: 0.05,
        step_size: 1e-5,
        root_correction2: 1.0,
        eps: 1e-8,
        gradient_scale,
    }
}

/// Weights that look like a model's before training.
pub(crate) struct Noise;

impl Source<Error> for Noise {
    fn matrix(&mut self, _name: &str, [rows, columns]: [usize; 2]) -> Result<HostMatrix<'_>, Error> {
        let scale = 0.04 / f32::from(u16::MAX);
        let number = |i: u32| (i.wrapping_mul(0x9e37_79b9) >> 16) as f32 * scale - 0.02;
        Ok(HostMatrix::F32(Cow::Owned((0..(rows * columns) as u32).map(number).collect())))
    }

    fn norm(&mut self, _name: &str, len: usize) -> Result<Option<Vec<f32>>, Error> {
        Ok(Some(vec![1.0; len]))
    }

    fn bias(&mut self, _name: &str, _len: usize) -> Result<Option<Vec<f32>>, Error> {
        Ok(None)
    }
}
