//! `hearth plan`: what a recipe's run will hold in every tier, and how long its steps will take.
//!
//! # Layout
//! - `on_card`: the same for a run on an NVIDIA card.
//! - `forecast`: one configuration: its ledger and its step.
//! - `speeds`: what this machine does in a second.
//! - `table`, `picture`: the plan for people, as text and as SVG.
//! - [`serving`]: serving a model instead of training one.
//! - `search`: the fastest configurations that fit.

mod forecast;
mod on_card;
mod picture;
mod search;
pub mod serving;
mod speeds;
mod table;

pub use forecast::{Forecast, PhasePeak};
pub use search::{Found, Rejected, Search};
pub use speeds::Measured;

use crate::card::{self, Placement};
use crate::commands::train;
use crate::exit::usage;
use crate::ranks::Start;
use crate::running::{AdapterArg, PlacementAim};
use crate::tiers::Tiers;
use crate::training::Job;
use crate::ui::{Report, Ui};
use anyhow::Context;
use forecast::Clock;
use hearth_engine::KvType;
use hearth_memory::{Ledger, Size, heap};
use hearth_train::plan::{Speeds, StepTime};
use serde::Serialize;
use std::path::PathBuf;

/// Plans a recipe's run.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct PlanArgs {
    /// Recipe file
    #[arg(required_unless_present = "serve")]
    pub recipe: Option<PathBuf>,
    /// Plan serving this model instead of a recipe's run
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["recipe", "set", "svg", "search"])]
    pub serve: Option<PathBuf>,
    /// What the KV cache will store: f32, f16, bf16 or int8 [default: as in serve]
    #[arg(long, value_name = "TYPE", value_parser = crate::running::kv_type, requires = "serve")]
    pub kv_dtype: Option<KvType>,
    /// What the device will hold where it does not hold all weights: latency or throughput, as in serve
    #[arg(long, value_name = "AIM", value_enum, default_value_t, requires = "serve")]
    pub placement: PlacementAim,
    /// Sequences that will be in the batch at once [default: as in serve]
    #[arg(long, value_name = "N", requires = "serve")]
    pub max_seqs: Option<usize>,
    /// Host memory for KV blocks that the device has no room for any more
    #[arg(long, value_name = "SIZE", requires = "serve")]
    pub kv_host: Option<Size>,
    /// A smaller model that will guess tokens
    #[arg(long, value_name = "MODEL", requires = "serve")]
    pub draft: Option<PathBuf>,
    /// Most tokens it guesses at a time
    #[arg(long, value_name = "K", requires = "draft", default_value_t = 4)]
    pub draft_tokens: u64,
    /// LoRA adapter: DIR merged into the weights; NAME=DIR laid over them, as often as there are adapters
    #[arg(long, value_name = "[NAME=]DIR", requires = "serve")]
    pub adapter: Vec<AdapterArg>,
    /// Override a recipe key, for example parallel.zero=3
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Byte limits over those of the recipe's [memory]: device=512MiB,host=2GiB,nvme=20GiB
    #[arg(long, value_name = "SIZES")]
    pub memory: Option<String>,
    /// Draw what each tier holds over a step
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Look for the fastest stage, tiers, recomputation and micro-batch within the recipe's limits
    #[arg(long)]
    pub search: bool,
    /// Measure this machine again instead of taking what is kept
    #[arg(long)]
    pub measure: bool,
}

/// What will be.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// Most that lies in each tier: the device of each rank, host memory and disk of the machine.
    pub tiers: Tiers,
    /// Ranks of the run.
    pub ranks: usize,
    /// Of these, ranks on this machine.
    pub ranks_here: usize,
    /// Most that lies in each tier in each phase of a step.
    pub by_phase: Vec<PhasePeak>,
    /// The step's time and what takes it.
    #[serde(flatten)]
    pub time: StepTime,
    /// Tokens per second.
    pub tok_s: f64,
    /// Most that the ranks of this machine hold in main memory at once, if they are threads of one process, and what
    /// that process holds besides: all of it on the heap.
    pub process_peak_bytes: u64,
    /// Which of its units lie where, if it is on a card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<Placement>,
    /// Whether the budgets hold it.
    pub fits: bool,
    /// If not: the tiers that are too small, the smallest size of each that works, and what else would help.
    pub why: Option<String>,
    /// What was reckoned with; nothing of a resource that the run does not use.
    pub speeds: Speeds,
    /// Where all but arithmetic was measured.
    pub machine: String,
    /// The fastest that fit, with `--search`.
    pub search: Option<Search>,
    #[serde(skip)]
    layout: String,
}

/// Plans; of several ranks only rank 0 has a report. Trains nothing.
///
/// # Errors
/// A wrong recipe, a model or data that cannot be read, a disk that cannot be measured, a picture that cannot be written.
pub fn run(args: &PlanArgs, ui: &Ui) -> anyhow::Result<Option<PlanReport>> {
    let mut start = Start::join(ui)?;
    let recipe = args.recipe.as_deref().ok_or_else(|| usage("there is no recipe to plan"))?;
    let load = || train::recipe(recipe, &args.set, args.memory.as_deref());
    let recipe = start.agree(load())?;
    if let Some(ordinal) = card::ordinal(&recipe) {
        let world_size = start.world_size(recipe.parallel.data)?;
        return start.agree(on_card::run(&recipe, ordinal, world_size, args, ui)).map(Some);
    }
    let (recipe, job) = train::job(&mut start, || Ok(recipe), Job::open, ui)?;
    let world_size = start.world_size(recipe.parallel.data)?;
    if !start.speaks() {
        return Ok(None);
    }
    let nvme = job.config.offload.nvme_dir.clone();
    let measured = Measured::of(nvme.as_deref(), job.here(), args.measure, ui)?;
    let report = plan(job, world_size, measured, args, ui)?;
    Ok(Some(report))
}

fn plan(
    mut job: Job,
    world_size: usize,
    measured: Measured,
    args: &PlanArgs,
    ui: &Ui,
) -> anyhow::Result<PlanReport> {
    let before = heap::current().unwrap_or(0);
    let (activations, pace) = job.measure_activations()?;
    job.activations = activations;
    job.use_spare_memory(world_size)?;
    let clock = Clock::new(&job, world_size, &measured)?;
    let ledger = Ledger::default();
    ledger.record();
    let forecast = Forecast::of(&job, &clock, pace, ledger)?;
    if let Some(file) = &args.svg {
        let picture = picture::draw(&forecast.ledger, &job);
        std::fs::write(file, picture).with_context(|| format!("writing {}", file.display()))?;
        ui.note(format!("drawn: {}", file.display()));
    }
    let why = job.shortage(&forecast.ledger);
    Ok(PlanReport {
        tiers: forecast.tiers(&job),
        ranks: world_size,
        ranks_here: job.here(),
        by_phase: forecast.by_phase(job.here()),
        time: forecast.time,
        tok_s: forecast.tok_s,
        process_peak_bytes: before as u64 + job.here() as u64 * forecast.main_memory(),
        card: None,
        fits: why.is_none(),
        why,
        speeds: forecast.speeds,
        machine: measured.machine.clone(),
        layout: table::layout(&job.config),
        search: args.search.then(|| search::search(job, &clock, pace)).transpose()?,
    })
}

impl Report for PlanReport {
    fn text(&self) -> String {
        table::text(self)
    }

    fn ok(&self) -> bool {
        self.fits || self.search.as_ref().is_some_and(|search| !search.fastest.is_empty())
    }
}
