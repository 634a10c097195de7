//! A model on an NVIDIA card: what `--device cuda:0` does to commands that answer.

use crate::exit::usage;
use crate::open::Model;
use crate::running::{ModelArgs, PlacementAim, SpeculationArgs};
use crate::ui::{Ui, bytes};
use hearth_cuda::driver::Driver;
use hearth_cuda::runtime::device::ordinal_of;
use hearth_cuda::runtime::{self, Device};
use hearth_engine::{Activations, Arithmetic, Engine, EngineConfig, EngineHandle, Scorer};
use hearth_gpu::{CardBackend, Error};
use hearth_memory::{Budget, Ledger, Size, Tier};
use std::sync::Arc;

/// Which card `--device` names: `None` for the CPU.
///
/// # Errors
/// A sentence for any other word.
pub fn ordinal(device: Option<&str>) -> anyhow::Result<Option<usize>> {
    match device {
        None | Some("cpu") => Ok(None),
        Some(name) => match ordinal_of(name) {
            Some(ordinal) => Ok(Some(ordinal)),
            None => Err(usage(format!("--device {name} is not known; write cpu, or cuda:0 for a card"))),
        },
    }
}

/// Refuses what a card does not do, before anything is read.
///
/// # Errors
/// A sentence each.
pub fn refuse(args: &ModelArgs, guesses: &SpeculationArgs, config: &EngineConfig) -> anyhow::Result<()> {
    let refuse = |what: &str, instead: &str| Err(usage(format!("{what} is for the CPU alone; {instead}")));
    if guesses.draft.is_some() {
        return refuse("--draft", "on a card guess with --speculative ngram");
    }
    if let Some((name, path)) = args.live_adapters().next() {
        let path = path.display();
        return refuse(
            &format!("--adapter {name}={path}"),
            &format!("on a card merge it with --adapter {path}"),
        );
    }
    if config.adapter_rank > 0 {
        return refuse("--adapter-folder", "on a card merge an adapter with --adapter DIR");
    }
    if args.placement != PlacementAim::Latency {
        return refuse("--placement", "on a card all weights are resident");
    }
    Ok(())
}

/// Starts an engine on a card.
///
/// # Errors
/// One sentence each for no driver, no such card, a model that the card's kernels do not compute, and one that does not fit.
pub fn start(
    args: &ModelArgs,
    model: &Model,
    ordinal: usize,
    config: EngineConfig,
    ui: &Ui,
) -> anyhow::Result<EngineHandle> {
    let card = open(args, ordinal)?;
    let tell = |sentence: &str| ui.note(sentence);
    let engine = Engine::start_on(backend(args, &card, model)?.telling(&tell), config).map_err(refused)?;
    let stats = engine.stats();
    ui.note(format!(
        "{}: {} of weights and {} of KV cache on {}",
        args.model.display(),
        bytes(stats.weight_bytes),
        bytes(stats.kv_bytes),
        card.card().name
    ));
    Ok(engine)
}

/// Scores tokens on a card.
///
/// # Errors
/// As [`start`].
pub fn scorer(args: &ModelArgs, model: &Model, ordinal: usize, context: usize) -> anyhow::Result<Scorer> {
    let card = open(args, ordinal)?;
    Scorer::on(backend(args, &card, model)?, context).map_err(refused)
}

/// A machine without a compiler is not the model's fault.
fn refused(error: hearth_engine::Error) -> anyhow::Error {
    let hearth_engine::Error::Device(cause) = &error else { return error.into() };
    match cause.downcast_ref() {
        Some(Error::Card(runtime::Error::Nvrtc(_))) => usage(error.to_string()),
        _ => error.into(),
    }
}

/// Of a card nobody limited, this share of what is free is ours: the driver needs memory for kernels and recorded steps.
const SHARE: (u64, u64) = (9, 10);

/// The card, with a ledger whose device tier is its budget.
fn open(args: &ModelArgs, ordinal: usize) -> anyhow::Result<Arc<Device>> {
    let mut budget: Budget = args.budget()?;
    if budget.limit(Tier::Device).is_none() {
        let cards = Driver::open().and_then(|driver| driver.cards()).map_err(|e| usage(e.to_string()))?;
        let free = cards.get(ordinal).and_then(|card| card.free_bytes);
        budget.device = free.map(|free| Size(free / SHARE.1 * SHARE.0));
    }
    Device::open(ordinal, &Ledger::new(budget)).map_err(|e| usage(e.to_string()))
}

fn backend<'a>(args: &ModelArgs, card: &Arc<Device>, model: &'a Model) -> anyhow::Result<CardBackend<'a>> {
    let activations = args.activations.unwrap_or(Activations::Int8);
    let arithmetic = Arithmetic { activations, kv_type: args.kv_dtype };
    CardBackend::new(card, &model.files, arithmetic).map_err(|error| match error {
        Error::Weights(error) => error.into(),
        other => usage(other.to_string()),
    })
}
