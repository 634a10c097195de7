//! A recipe's run on an NVIDIA card: `model.device = "cuda:0"`.

use crate::commands::train::{Notices, Trained, watch};
use crate::exit::{TryAgain, usage};
use crate::open::Model;
use crate::recipe::Recipe;
use crate::resolve;
use crate::tiers::Tiers;
use crate::training::{Material, rounded_up};
use crate::ui::{Ui, bytes};
use hearth_cuda::nvrtc::Nvrtc;
use hearth_cuda::runtime::device::ordinal_of;
use hearth_cuda::runtime::{self, Device, Libraries};
use hearth_cuda::trainer::{Place, Plan};
use hearth_data::Loader;
use hearth_gpu::training::{accelerator, planning};
use hearth_memory::{Charge, Error as BudgetError, Kind, Ledger, Size, Tier};
use hearth_train::accelerator::BUFFER_BYTES;
use hearth_train::{AcceleratedTrainer, AcceleratorSetup, Compute, Recompute};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A run on a card, before anything of it lies there.
pub struct CardJob {
    /// What it learns from what.
    pub material: Material,
    /// Where everything will lie.
    pub plan: Plan,
    /// The card; its ledger has the recipe's limits.
    pub card: Arc<Device>,
}

/// Where a run's units lie.
#[derive(Clone, Debug, Serialize)]
pub struct Placement {
    /// The card's name.
    pub card: String,
    /// Embedding, transformer blocks and head.
    pub units: usize,
    /// Of these, units whose gradients and optimizer state are the host's.
    pub units_on_host: usize,
    /// Of these, blocks whose weights stream through the card.
    pub blocks_streamed: usize,
}

/// The number of the card that a recipe's run is on; `None` = it is not on one.
pub fn ordinal(recipe: &Recipe) -> Option<usize> {
    ordinal_of(&recipe.model.device)
}

impl CardJob {
    /// Resolves a recipe for a card: what the card's trainer does not do is refused before the card is opened, what the
    /// machine lacks before the data is read.
    ///
    /// # Errors
    /// One sentence for each of these, for data that cannot be read, and for budgets that do not hold the run.
    pub fn open(recipe: &Recipe, ordinal: usize, world_size: usize, ui: &Ui) -> anyhow::Result<Self> {
        if world_size > 1 {
            return Err(usage(format!(
                "parallel.data = {world_size} is not done on a card: model.device = {:?} trains on one rank; use 1",
                recipe.model.device
            )));
        }
        let model = Model::open(Path::new(&recipe.model.path), ui)?;
        // How many steps epochs come to is not known before the data is read, and decides nothing here.
        let config = resolve::training(recipe, usize::MAX, &*model.files.tensors)?;
        planning::check(&config, &model.files.config).map_err(|e| usage(e.to_string()))?;
        let card = open_card(ordinal, &Ledger::new(resolve::budget(recipe)))?;
        let material = Material::read(recipe, model, ui)?;
        let plan = plan(&material, &card)?;
        Ok(Self { material, plan, card })
    }

    /// Where units lie.
    pub fn placement(&self) -> Placement {
        let places = &self.plan.places;
        Placement {
            card: self.card.card().name.clone(),
            units: places.len(),
            units_on_host: places.iter().filter(|place| **place != Place::Card).count(),
            blocks_streamed: places.iter().filter(|place| **place == Place::Streamed).count(),
        }
    }

    /// A ledger with the recipe's limits and every charge of the run: loading, steps, a save.
    ///
    /// # Errors
    /// Limits that do not hold it.
    pub fn planned(&self) -> anyhow::Result<Ledger> {
        let ledger = Ledger::new(self.card.ledger().budget());
        ledger.record();
        ledger.mark("step");
        let needs = &self.plan.needs;
        let kinds =
            [Tier::Device, Tier::Host].into_iter().flat_map(|tier| Kind::ALL.map(|kind| (tier, kind)));
        let charge = |(tier, kind)| ledger.charge(tier, kind, needs.bytes(tier, kind));
        let _held = kinds.map(charge).collect::<Result<Vec<Charge>, _>>()?;
        ledger.mark("save");
        drop(ledger.charge(Tier::Host, Kind::Staging, BUFFER_BYTES)?);
        ledger.mark("end");
        Ok(ledger)
    }

    /// Trains to the last step, or until `stop` is raised; with `resume` from the newest checkpoint on.
    ///
    /// # Errors
    /// A loss that is not finite, a checkpoint that cannot be written, a card that is full or lost (earlier checkpoints
    /// stay).
    pub fn run(self, resume: bool, ui: &Ui, stop: &AtomicBool) -> anyhow::Result<Trained> {
        let planned = Tiers::of(&self.planned()?, 1);
        let Self { material, plan, card } = self;
        let Material { config, train, validation, files, companions, .. } = material;
        let (steps, compute) = (config.steps, config.compute);
        let setup = AcceleratorSetup {
            arch: hearth_model::architecture(&files.config)?,
            loader: Loader::new(train, config.seed, config.global_batch)?,
            companions,
            ledger: card.ledger().clone(),
            accelerator: Box::new(|| accelerator(&card, &files, compute, plan)),
        };
        let mut trainer = match resume {
            true => AcceleratedTrainer::resume(setup, config, &mut Notices(ui))?,
            false => AcceleratedTrainer::new(setup, config)?,
        };
        if let Some(sentence) = trainer.accelerator().notice() {
            ui.note(sentence);
        }
        let mut watcher = watch(ui, steps);
        let summary = trainer.run(&validation, &mut watcher, stop)?;
        watcher.finish();
        Ok(Trained::new(summary, Tiers::of(card.ledger(), 1), planned))
    }
}

/// The card, if everything that training on it needs is there.
fn open_card(ordinal: usize, ledger: &Ledger) -> anyhow::Result<Arc<Device>> {
    let about = |error: &dyn std::error::Error| format!("model.device = \"cuda:{ordinal}\": {error}");
    let lacks = |error: runtime::Error| match error.is_lost() {
        true => TryAgain(about(&error)).into(),
        false => usage(about(&error)),
    };
    let libraries = Libraries::of_system();
    Device::driver_version(&libraries).map_err(lacks)?;
    let card = Device::open_with(ordinal, ledger, &libraries).map_err(lacks)?;
    // Kernels are compiled when first used: in the middle of a step it would be late to say that nothing compiles them.
    Nvrtc::open().and_then(|nvrtc| nvrtc.version()).map_err(|error| usage(about(&error)))?;
    Ok(card)
}

/// Where everything lies so that the recipe's limits and the card hold it.
fn plan(material: &Material, card: &Device) -> anyhow::Result<Plan> {
    let budget = card.ledger().budget();
    // The driver takes some for kernels as they are loaded.
    let free = card.memory()?.free / 16 * 15;
    let device = budget.limit(Tier::Device).unwrap_or(u64::MAX).min(free);
    let host = budget.limit(Tier::Host).unwrap_or(u64::MAX).saturating_sub(BUFFER_BYTES);
    let rows = material.largest_micro_batch().iter().sum();
    let (config, model) = (&material.config, &material.files.config);
    planning::plan(config, model, rows, device, host).map_err(|error| match error {
        hearth_gpu::Error::Card(runtime::Error::Budget(BudgetError::OverBudget { tier, needed, .. })) => {
            let why = too_small(material, card, tier, needed);
            anyhow::anyhow!(why)
        }
        other => other.into(),
    })
}

/// What to do about a tier of which the run needs so many bytes, whatever can be elsewhere being there.
fn too_small(material: &Material, card: &Device, tier: Tier, needed: u64) -> String {
    let config = &material.config;
    let extra = if tier == Tier::Host { BUFFER_BYTES } else { 0 };
    let enough = rounded_up(needed + extra);
    let has = match card.ledger().budget().limit(tier) {
        Some(limit) => format!("memory.{tier} is {}", Size(limit)),
        None => format!("{} has {} free", card.card().name, bytes(card.card().free_bytes.unwrap_or(0))),
    };
    let mut knobs = vec![format!("memory.{tier} = \"{enough}\"")];
    let mut add = |helps: bool, knob: &str| knobs.extend(helps.then(|| knob.to_owned()));
    let device = tier == Tier::Device;
    add(device && config.recompute == Recompute::None, "activation.checkpoint = \"full\"");
    add(config.compute == Compute::F32 && device, "precision.compute = \"bf16\"");
    add(device && config.micro_batch > 1, "a smaller train.micro_batch");
    add(device, "a smaller train.max_seq_len");
    add(!device, "a larger memory.device");
    let last = knobs.pop().expect("at least one");
    let knobs = if knobs.is_empty() { last } else { format!("{}, or {last}", knobs.join(", ")) };
    format!("{tier} tier: the run will need {enough}, {has}; what would help: {knobs}")
}
